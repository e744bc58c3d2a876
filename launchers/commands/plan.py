"""Predict memory, time, traffic and cost of a run. Needs no GPU.

    armd plan --config configs/7b.yaml --nodes 16 [--gpu h100] [section.field=value ...]
    armd plan --config configs/125m.yaml --along model.length=512,1024,2048 --plot length.png

The first form also lists faster layouts; the second shows how the cost of every objective grows with a field.
"""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from armd_scale.errors import UserError
from armd_scale.files import check_picture, check_writable
from armd_scale.traits import TRAITS
from launchers.commands import arguments

if TYPE_CHECKING:
    from armd_scale.config import RunConfig
    from armd_scale.planning.plan import Plan, Planner


OBJECTIVES = ("ar", "armd", "mdm", "card")
"""Objectives that are compared along a field; times are given as multiples of the first."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser)
    parser.add_argument("--nodes", type=int, help="number of nodes (default: cluster.nodes of the configuration)")
    parser.add_argument("--gpu", help="h100, h200, a100 or cpu (default: h100, or cpu if the run uses no GPUs)")
    parser.add_argument(
        "--vocab", type=int, default=50257, help="vocabulary size if the configuration has none (default 50257)"
    )
    parser.add_argument("--alternatives", type=int, default=5, help="faster layouts to list (default 5; 0: none)")
    parser.add_argument(
        "--along", nargs="+", metavar="FIELD=A,B,...",
        help="plan every objective with each value of a field instead; several fields change together",
    )  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot of the costs --along a field")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the plan is made on fake tensors of the CPU, wherever it runs
    if not 1 <= args.vocab <= 10**8 or args.alternatives < 0:
        raise UserError("--vocab must be from 1 to 100 million and --alternatives at least 0")
    if args.plot and not args.along:
        raise UserError("--plot needs --along")
    if args.json:
        check_writable(args.json)
    if args.plot:
        check_picture(args.plot)
    overrides = [*args.overrides, *([f"cluster.nodes={args.nodes}"] if args.nodes is not None else [])]
    if args.along:
        _along(args, overrides)
    else:
        _plan(args, overrides)


def _plan(args: argparse.Namespace, overrides: list[str]) -> None:
    """The plan of one run, and faster layouts of it."""
    from armd_scale import config_files

    config = config_files.load(args.config, overrides)
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
    others: list[Plan] = []
    if args.alternatives and gpu.cuda:
        if sys.stderr.isatty():
            print("\n  searching other layouts, up to a few minutes ...", file=sys.stderr, flush=True)
        others = sorted(alternatives(planner, config), key=lambda other: other.step)
        print(report.comparison(plan, others[: args.alternatives]))
    if args.json:
        plans = [plan, *others[: args.alternatives]]
        facts = [
            {**asdict(layout), **report.derived(layout), "gpu": layout.gpu.name, "config": layout.config.model_dump()}
            for layout in plans
        ]
        arguments.write_json(args.json, {"plan": facts[0], "alternatives": facts[1:]})


def _planned(planner: "Planner", config: "RunConfig") -> "Plan":
    try:
        return planner.plan(config)
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise UserError(f"a tensor of this model has more bytes than can be counted: {error}") from error


def _along(args: argparse.Namespace, overrides: list[str]) -> None:
    """Plans of all objectives along the values of fields."""
    from armd_scale import config_files
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
        for objective in OBJECTIVES:
            config = config_files.load(args.config, [*overrides, *chosen, f"objective={objective}"])
            plan = _planned(planner, assume_vocabulary(config, args.vocab))
            left_to_right = left_to_right or plan.step
            row = {
                "kind": TRAITS[objective].label, "place": number, "seconds": plan.step, "memory": plan.peak.total,
                "batch": config.train.global_batch, "length": config.model.length, "ratio": plan.step / left_to_right,
                "mfu": plan.mfu,
            }  # fmt: skip
            rows.append(row)
            print(
                f"{' '.join(chosen) if objective == OBJECTIVES[0] else '':<20}{row['kind']:>10}{1e3 * plan.step:>12.1f}"
                f"{row['ratio']:>8.2f}{plan.mfu:>8.1%}{plan.peak.total / 1e9:>8.1f}",
                flush=True,
            )
    if args.plot:
        report.draw_growth(rows, f"{fields[0][0]}, by plan for {planner.gpu.name}", args.plot)
    arguments.write_json(args.json, rows)
