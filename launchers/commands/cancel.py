"""End all jobs of a run, on Slurm or on this machine.

    armd cancel RUN_DIR

armd train resumes the run from its newest checkpoint.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run directory")


def run(args: argparse.Namespace) -> None:
    from armd_scale.config_files import load_run
    from armd_scale.run_directory import RunDirectory
    from launchers import jobs

    run = RunDirectory(args.run_dir)
    load_run(run)
    ended = jobs.cancel(run)
    print(f"ended: {', '.join(job.step for job in ended)}" if ended else "no job of this run waits or runs")
