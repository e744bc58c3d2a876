"""What a run will cost before it is paid for. Needs no GPU.

python tools/plan.py --config configs/7b.yaml --nodes 16 [--gpu h100] [section.field=value ...]
python tools/plan.py --config configs/125m.yaml --along model.length=512,1024,2048 --plot length.png   # how costs grow
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the plan is made on fake tensors of the CPU, wherever it runs

from armd_scale import config as configs
from armd_scale.errors import UserError, cli
from armd_scale.files import check_picture, check_writable, write_atomically


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory, time and communication of a run, without its GPUs")
    parser.add_argument("--config", required=True, help="YAML file of a run")
    parser.add_argument("--nodes", type=int, help="machines (default: cluster.nodes of the configuration)")
    parser.add_argument("--gpu", help="h100, h200, a100 or cpu (default: h100, cpu when the run has no GPUs)")
    parser.add_argument("--vocab", type=int, default=50257, help="vocabulary size where the configuration has none")
    parser.add_argument("--alternatives", type=int, default=5, help="other layouts to list; 0 searches none")
    parser.add_argument(
        "--along", nargs="+", metavar="FIELD=A,B,...",
        help="instead: every objective with each value of a field, or of several that go together",
    )  # fmt: skip
    parser.add_argument("--plot", type=Path, help="picture of the costs --along a field")
    parser.add_argument("--json", type=Path, help="write all figures to this file as well")
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    args = parser.parse_args()
    if not 1 <= args.vocab <= 10**8 or args.alternatives < 0:
        parser.error("--vocab must be from 1 to 100 million and --alternatives at least 0")
    if bool(args.plot) > bool(args.along):
        parser.error("--plot needs --along")
    if args.json:
        check_writable(args.json)
    if args.plot:
        check_picture(args.plot)
    overrides = list(args.overrides)
    if args.nodes is not None:
        overrides.append(f"cluster.nodes={args.nodes}")
    if args.along:
        _along(args, overrides)
        return
    config = configs.load(args.config, overrides)
    assumed = config.model.vocab_size is None
    from armd_scale.planning import hardware, report
    from armd_scale.planning.plan import Planner, alternatives, assume_vocabulary, with_recompute

    config = assume_vocabulary(config, args.vocab)

    gpu = hardware.find(args.gpu or ("h100" if config.cluster.gpus_per_node else "cpu"))
    planner = Planner(gpu)
    plan = _planned(planner, config)
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


def _planned(planner: Any, config: configs.RunConfig) -> Any:
    try:
        return planner.plan(config)
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise UserError(f"a tensor of this model has more bytes than can be counted: {error}") from error


def _along(args: argparse.Namespace, overrides: list[str]) -> None:
    """Plans of all objectives along the values of fields."""
    from armd_scale.planning import hardware, report
    from armd_scale.planning.plan import Planner, assume_vocabulary

    fields = [word.partition("=")[::2] for word in args.along]
    values = [text.split(",") for _, text in fields]
    if len({len(several) for several in values}) > 1 or not all(map(all, values)):
        raise UserError("--along wants FIELD=A,B,... with as many values for every field")
    try:
        places = [float(value) for value in values[0]]
    except ValueError:
        raise UserError(f"--along wants numbers for its first field, not {args.along[0]}") from None
    planner = Planner(hardware.find(args.gpu or "h100"))
    if not planner.gpu.cuda:
        raise UserError("no times are known for a CPU: --along plans for a GPU")
    rows = []
    print(f"{'':<20}{'objective':>10}{'ms a step':>12}{'to AR':>8}{'MFU':>8}{'GB':>8}")
    for number, place in zip(places, zip(*values, strict=True), strict=True):
        chosen = [f"{name}={value}" for (name, _), value in zip(fields, place, strict=True)]
        left_to_right = 0.0
        for objective in ("ar", "armd", "mdm"):
            config = configs.load(args.config, [*overrides, *chosen, f"objective={objective}"])
            plan = _planned(planner, assume_vocabulary(config, args.vocab))
            left_to_right = left_to_right or plan.step
            row = {
                "kind": objective.upper(), "place": number, "seconds": plan.step, "memory": plan.peak.total,
                "batch": config.train.global_batch, "length": config.model.length, "ratio": plan.step / left_to_right,
                "mfu": plan.mfu,
            }  # fmt: skip
            rows.append(row)
            print(
                f"{' '.join(chosen) if objective == 'ar' else '':<20}{row['kind']:>10}{1e3 * plan.step:>12.1f}"
                f"{row['ratio']:>8.2f}{plan.mfu:>8.1%}{plan.peak.total / 1e9:>8.1f}",
                flush=True,
            )
    if args.plot:
        report.draw_growth(rows, f"{fields[0][0]}, by plan for {planner.gpu.name}", args.plot)
    if args.json:
        write_atomically(args.json, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    cli(main)
