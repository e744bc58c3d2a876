"""Show the jobs, progress, checkpoints and restarts of a run.

    armd status RUN_DIR [--follow]

--follow then prints the output of a process as it grows, like armd logs.
"""

import argparse
from pathlib import Path

from launchers.commands import arguments, logs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run directory")
    parser.add_argument("--follow", action="store_true", help="then print the output of rank 0 (or --rank) as it grows")
    arguments.add_log(parser)


def run(args: argparse.Namespace) -> None:
    from armd_scale.run_directory import RunDirectory
    from launchers import status

    print("\n".join(status.lines(RunDirectory(args.run_dir))))
    if args.follow:
        logs.run(args)
