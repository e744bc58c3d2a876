"""Print the output of a process of a run.

armd logs RUN_DIR [--rank 7] [--stage tokenise] [--stream err] [--follow]
"""

import argparse
from pathlib import Path

from launchers.commands import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run directory")
    parser.add_argument("--follow", action="store_true", help="continue to print the output as it grows")
    arguments.add_log(parser)


def run(args: argparse.Namespace) -> None:
    from armd_scale.run_directory import RunDirectory
    from launchers import jobs, status

    run_directory = RunDirectory(args.run_dir)
    path = status.log_of(run_directory, args.stage, args.rank, args.stream)
    if args.follow:
        status.follow(path, lambda: bool(jobs.alive(run_directory)))
    else:
        print(path.read_text(encoding="utf-8", errors="replace"), end="")
