"""Plots the loss curves of several runs, and prints their last values.

python tools/curves.py --out curves.png bf16=runs/a,runs/b fp8=runs/c,runs/d [--figure heldout_left_to_right]

Runs with the same name are repetitions with other seeds: the line is their mean, the band spans minimum to maximum.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from armd_scale.errors import UserError, cli
from armd_scale.files import check_picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN[,RUN...]", help="run directories of a line")
    parser.add_argument("--figure", default="loss", help="a figure of the metrics (default: loss)")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    args = parser.parse_args()
    check_picture(args.out)
    curves = {}
    for words in args.runs:
        name, _, folders = words.partition("=")
        if not name or not folders:
            raise UserError(f"'{words}' is not NAME=RUN[,RUN...]")
        if name in curves:
            raise UserError(f"two lines have the name '{name}': separate the repetitions of a run with commas")
        curves[name] = _curve([Path(folder) for folder in folders.split(",")], args.figure)
    _draw(curves, args.figure, args.out)
    first = next(iter(curves.values()))[1][:, -1].mean()
    for name, (steps, values) in curves.items():
        last = values[:, -1]
        end = f"{last.mean():.4f} ({last.mean() - first:+.4f} to the first line)"
        print(
            f"{name}: step {steps[-1]:,}, {args.figure} {end}, {len(last)} runs, {last.min():.4f} to {last.max():.4f}"
        )


def _curve(folders: list[Path], figure: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [K] and the figure of every run [runs, K]."""
    from armd_scale.run_directory import RunDirectory

    values_of_runs = []
    for folder in folders:
        run = RunDirectory(folder)
        records = run.metrics()
        if not records:
            raise UserError(
                f"{folder} has no {run.metrics_path.name}: it is no run directory, or nothing is recorded yet"
            )
        known = {record["step"]: record[figure] for record in records if _is_number(record.get(figure))}
        if not known:
            names = sorted({name for record in records for name in record if _is_number(record[name])} - {"step"})
            raise UserError(f"no record of {folder} has a number '{figure}'; there are {', '.join(names)}")
        values_of_runs.append(known)
    steps = sorted(set.intersection(*map(set, values_of_runs)))
    if not steps:
        raise UserError(f"the runs {', '.join(map(str, folders))} have no step in common")
    return np.array(steps), np.array([[known[step] for step in steps] for known in values_of_runs])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _draw(curves: dict[str, tuple[np.ndarray, np.ndarray]], figure: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture, (whole, behind) = pyplot.subplots(1, 2, figsize=(11, 4), dpi=120)
    reference = next(iter(curves.values()))
    for name, (steps, values) in curves.items():
        whole.plot(steps, values.mean(0), lw=1.2, label=name)
        whole.fill_between(steps, values.min(0), values.max(0), alpha=0.2, lw=0)
        there = np.isin(steps, reference[0])
        of_reference = reference[1].mean(0)[np.isin(reference[0], steps)]
        behind.plot(steps[there], values.mean(0)[there] - of_reference, lw=1.2, label=name)
    whole.set_title(figure, fontsize=10)
    behind.set_title(f"difference to {next(iter(curves))}", fontsize=10)
    for axes in (whole, behind):
        axes.set_xlabel("step")
        axes.grid(alpha=0.2)
    whole.legend(fontsize=8)
    picture.tight_layout()
    picture.savefig(path)
    pyplot.close(picture)


if __name__ == "__main__":
    cli(main)
