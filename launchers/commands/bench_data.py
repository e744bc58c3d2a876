"""Measure data preparation and streaming on one core, compared with Hugging Face datasets, Megatron and WebDataset.

armd bench data --text 'books/*.jsonl.zst' [--tokenizer gpt2] [--json bench.json]
"""

import argparse

from armd_scale.files import check_writable
from launchers.commands import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text", nargs="+", default=["builtin:python"],
        help="files, directories or globs of text (default: the documentation of Python)",
    )  # fmt: skip
    parser.add_argument(
        "--vocab", type=int, default=16_000, help="pieces of the sentencepiece model trained on it (default 16000)"
    )
    parser.add_argument("--tokenizer", help="directory of a Hugging Face tokenizer, measured as well")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> None:
    arguments.check_installed("bench", "datasets", "transformers")
    if args.json:
        check_writable(args.json)
    from data_pipeline import benchmark

    arguments.write_json(args.json, benchmark.measure(args.text, args.vocab, args.tokenizer))
