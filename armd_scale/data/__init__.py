"""Text and samples: readers of files, tokenizers, packed shards, and the order in which samples are seen."""
