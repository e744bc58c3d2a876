"""Train a sentencepiece tokenizer on text.

python -m data_pipeline.train_tokenizer --text 'corpus/*.jsonl.zst' --vocab 32000 --out tokenizer [--kind bpe]
"""

import argparse
from pathlib import Path

from armd_scale.data import readers
from armd_scale.data import tokenizer as tokenizers
from armd_scale.errors import UserError, cli
from data_pipeline.prepare import paragraphs


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.train_tokenizer", description=__doc__.split("\n")[0])
    parser.add_argument("--text", nargs="+", required=True, help="files, directories, globs or URLs of text")
    parser.add_argument("--field", default="text", help="field of a jsonl record or parquet column with the text")
    parser.add_argument("--vocab", type=int, default=32000, help="number of pieces (default 32000)")
    parser.add_argument("--kind", choices=("unigram", "bpe"), default="unigram", help="model (default unigram)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="directory for tokenizer.model")
    args = parser.parse_args()
    target = args.out / "tokenizer.model"
    if target.exists():
        raise UserError(f"{target} exists, and data may depend on it: choose another directory")
    args.out.mkdir(parents=True, exist_ok=True)
    texts = paragraphs(readers.documents(args.text, args.field))
    tokenizer = tokenizers.train(texts, target, args.vocab, args.seed, args.kind)
    print(f"{target}: {tokenizer.vocab_size} pieces ({args.kind}), SHA-256 {tokenizers.digest(tokenizer)}")


if __name__ == "__main__":
    cli(main)
