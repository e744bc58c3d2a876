"""End all jobs of a run, on Slurm or on this machine.

    armd cancel RUN_DIR

armd train resumes the run from its newest checkpoint.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run directory")


def run(args: argparse.Namespace) -> None:
    from launchers import jobs, status

    status.open_run(args.run_dir)
    ended = jobs.cancel(args.run_dir)
    print(f"ended: {', '.join(job.step for job in ended)}" if ended else "no job of this run waits or runs")
