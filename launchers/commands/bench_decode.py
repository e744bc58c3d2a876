"""Measure text generation, compared with transformers' GPT-2 of the same shape.

armd bench decode [--layers 12 --hidden 768] [--batch 1 8 64] [--device cuda --dtype bfloat16]
armd bench decode --batch --prompt 1024 8192 32768    # reading prompts alone
"""

import argparse
import os

from armd_scale.files import check_writable
from launchers.commands import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768, help="hidden size; a head has 64 (default 768)")
    parser.add_argument("--vocab", type=int, default=50_257)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a text (default 1024)")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 64], help="texts per batch, a table for each")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8], help="streams of strided decoding")
    parser.add_argument("--draft", type=int, default=4, help="draft tokens of exact parallel decoding; 0: skip it")
    parser.add_argument("--prompt", type=int, nargs="+", default=[], help="also read prompts of so many tokens")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads (default: all)")
    arguments.add_device(parser)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> None:
    arguments.check_installed("bench", "transformers")
    if args.json:
        check_writable(args.json)
    from armd_scale.benchmarks import decode

    arguments.write_json(args.json, decode.measure(args))
