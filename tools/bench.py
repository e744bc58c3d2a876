"""Speed beside peers, in one run on this machine: prints a table, as ratios, and writes JSON.

python tools/bench.py data --text 'books/*.jsonl.zst' [--tokenizer gpt2] [--json bench.json]
python tools/bench.py decode [--layers 12 --hidden 768] [--batch 1 8 64] [--device cuda --dtype bfloat16]
python tools/bench.py train [--layers 12 --hidden 768] [--length 1024] [--batch 8] [--device cuda --dtype bfloat16]
"""

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from armd_scale.benchmarks import decode, train
from armd_scale.errors import UserError, cli
from armd_scale.files import check_picture, check_writable, write_atomically
from data_pipeline import benchmark as data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    of_data = commands.add_parser("data", help="preparing and streaming data, on one core")
    of_data.add_argument("--text", nargs="+", default=["builtin:python"], help="files, folders or globs of text")
    of_data.add_argument("--vocab", type=int, default=16_000, help="pieces of the sentencepiece model trained here")
    of_data.add_argument("--tokenizer", help="a Hugging Face tokenizer folder, measured as well")
    of_data.add_argument("--json", type=Path, help="write all figures to this file as well")
    of_decode = commands.add_parser("decode", help="generating text, beside transformers' GPT-2 of the same shape")
    of_decode.add_argument("--layers", type=int, default=12)
    of_decode.add_argument("--hidden", type=int, default=768, help="width; heads have 64")
    of_decode.add_argument("--vocab", type=int, default=50_257)
    of_decode.add_argument("--length", type=int, default=data.LENGTH, help="tokens of a text")
    of_decode.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], help="texts at a time, one table each")
    of_decode.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8])
    of_decode.add_argument(
        "--draft", type=int, default=4, help="tokens drafted by exact parallel decoding; 0: leave out"
    )
    of_decode.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="on a CPU")
    of_decode.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    of_decode.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    of_decode.add_argument("--json", type=Path, help="write all figures to this file as well")
    of_train = commands.add_parser("train", help="a training step of each objective, beside transformers' GPT-2")
    of_train.add_argument("--layers", type=int, default=12)
    of_train.add_argument("--hidden", type=int, nargs="+", default=[768], help="width; heads have 64")
    of_train.add_argument("--vocab", type=int, default=50_257)
    of_train.add_argument("--length", type=int, nargs="+", default=[data.LENGTH], help="tokens of a text")
    of_train.add_argument("--batch", type=int, nargs="+", default=[8], help="texts of a step")
    of_train.add_argument("--steps", type=int, default=10, help="steps that are timed, after three that are not")
    of_train.add_argument("--norm", default="layernorm", choices=("layernorm", "rmsnorm"))
    of_train.add_argument("--mlp", default="gelu", choices=("gelu", "swiglu"))
    of_train.add_argument("--recompute", default="none", choices=("none", "selective", "full"))
    of_train.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="on a CPU")
    of_train.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    of_train.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    of_train.add_argument("--fp8", action="store_true", help="layers in FP8, see train.fp8")
    of_train.add_argument("--trace", type=Path, help="folder for a profile of one more step of each kind")
    of_train.add_argument("--plot", type=Path, help="picture of how cost grows along the size that has several values")
    of_train.add_argument("--json", type=Path, help="write all figures to this file as well")
    args = parser.parse_args()
    for peer in ("datasets", "transformers") if args.command == "data" else ("transformers",):
        if importlib.util.find_spec(peer) is None:
            raise UserError(f"{peer} is not installed: pip install -c constraints.txt -e '.[bench]'")
    if args.json:
        check_writable(args.json)
    if getattr(args, "plot", None):
        check_picture(args.plot)
    if args.command == "data":
        facts = data.measure(args.text, args.vocab, args.tokenizer)
    else:
        facts = (decode if args.command == "decode" else train).measure(args)
    if args.json:
        write_atomically(args.json, json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    cli(main)
