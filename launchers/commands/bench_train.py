"""Measure a training step of each objective, compared with transformers' GPT-2 of the same shape.

    armd bench train [--layers 12 --hidden 768] [--length 1024] [--batch 8] [--device cuda --dtype bfloat16]

Several values of one of --hidden, --length and --batch measure how the cost grows.
"""

import argparse
import os
from pathlib import Path

from armd_scale.files import check_picture, check_writable
from launchers.commands import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, nargs="+", default=[768], help="hidden size; a head has 64 (default 768)")
    parser.add_argument("--vocab", type=int, default=50_257)
    parser.add_argument("--length", type=int, nargs="+", default=[1024], help="tokens of a text (default 1024)")
    parser.add_argument("--batch", type=int, nargs="+", default=[8], help="texts per step (default 8)")
    parser.add_argument("--steps", type=int, default=10, help="measured steps, after three of warm-up (default 10)")
    parser.add_argument("--norm", default="layernorm", choices=("layernorm", "rmsnorm"))
    parser.add_argument("--mlp", default="gelu", choices=("gelu", "swiglu"))
    parser.add_argument("--recompute", default="none", choices=("none", "selective", "full"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads (default: all)")
    arguments.add_device(parser)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--fp8", action="store_true", help="layers in FP8, see train.fp8")
    parser.add_argument("--trace", type=Path, metavar="DIR", help="directory for a profile of a step of each objective")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot of the cost along the size with several values")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> None:
    arguments.check_installed("bench", "transformers")
    if args.json:
        check_writable(args.json)
    if args.plot:
        check_picture(args.plot)
    from armd_scale.benchmarks import train

    arguments.write_json(args.json, train.measure(args))
