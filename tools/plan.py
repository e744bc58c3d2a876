"""What a run will cost before it is paid for. Needs no GPU.

python tools/plan.py --config configs/7b.yaml --nodes 16 [--gpu h100] [section.field=value ...]
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the plan is made on fake tensors of the CPU, wherever it runs

from armd_scale import config as configs
from armd_scale.errors import UserError, cli
from armd_scale.files import check_writable, write_atomically


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory, time and communication of a run, without its GPUs")
    parser.add_argument("--config", required=True, help="YAML file of a run")
    parser.add_argument("--nodes", type=int, help="machines (default: cluster.nodes of the configuration)")
    parser.add_argument("--gpu", help="h100, h200, a100 or cpu (default: h100, cpu when the run has no GPUs)")
    parser.add_argument("--vocab", type=int, default=50257, help="vocabulary size where the configuration has none")
    parser.add_argument("--alternatives", type=int, default=5, help="other layouts to list; 0 searches none")
    parser.add_argument("--json", type=Path, help="write all figures to this file as well")
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    args = parser.parse_args()
    if not 1 <= args.vocab <= 10**8 or args.alternatives < 0:
        parser.error("--vocab must be from 1 to 100 million and --alternatives at least 0")
    if args.json:
        check_writable(args.json)
    overrides = list(args.overrides)
    if args.nodes is not None:
        overrides.append(f"cluster.nodes={args.nodes}")
    config = configs.load(args.config, overrides)
    assumed = config.model.vocab_size is None
    from armd_scale.planning import hardware, report
    from armd_scale.planning.plan import Planner, alternatives, assume_vocabulary, with_recompute

    config = assume_vocabulary(config, args.vocab)

    gpu = hardware.find(args.gpu or ("h100" if config.cluster.gpus_per_node else "cpu"))
    planner = Planner(gpu)
    try:
        plan = planner.plan(config)
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise UserError(f"a tensor of this model has more bytes than can be counted: {error}") from error
    kinds = ("none", "selective", "full")
    recomputed = {kind: planner.plan(with_recompute(config, kind)) for kind in kinds}
    print(report.table(plan, recomputed, assumed_vocabulary=assumed), flush=True)
    others = []
    if args.alternatives and gpu.cuda:
        if sys.stderr.isatty():
            print("\n  searching other layouts, up to a few minutes ...", file=sys.stderr, flush=True)
        others = sorted(alternatives(planner, config), key=lambda other: other.step)
        print(report.comparison(plan, others[: args.alternatives]))
    if args.json:
        facts = [
            {**asdict(one), **report.derived(one), "gpu": one.gpu.name} for one in [plan, *others[: args.alternatives]]
        ]
        for one, fact in zip([plan, *others], facts, strict=False):
            fact["config"] = one.config.model_dump()
        write_atomically(args.json, json.dumps({"plan": facts[0], "alternatives": facts[1:]}, indent=1) + "\n")


if __name__ == "__main__":
    cli(main)
