"""From raw text to batches: readers, packing into WebDataset shards, and a resumable stream."""
