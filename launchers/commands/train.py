"""Start or resume a run: prepare the data, train, export and evaluate.

    armd train --config configs/1b.yaml [section.field=value ...]

Jobs are submitted to Slurm where sbatch is found, and otherwise run as processes of this machine. The same command
resumes a run that was stopped, and skips the stages that are complete.
"""

import argparse
import re
import shutil
import signal
from types import FrameType
from typing import TYPE_CHECKING

from armd_scale.errors import UserError
from armd_scale.files import exclusive
from armd_scale.processes import ENDING
from launchers.commands import arguments

if TYPE_CHECKING:
    from armd_scale.config import RunConfig

_STAGES = ("tokenise", "train", "export", "evaluate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser)
    parser.add_argument(
        "--cluster",
        choices=("slurm", "local", "debug"),
        help="Slurm, processes of this machine, or this process alone (default: slurm where sbatch is found, or local)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print configuration, plan and job scripts, run nothing")
    parser.add_argument("--detach", action="store_true", help="submit to Slurm and return")
    stages = parser.add_mutually_exclusive_group()
    stages.add_argument("--only", choices=_STAGES, help="run this stage alone, even if its output exists")
    stages.add_argument("--from", choices=_STAGES, dest="start", help="run this stage and all later ones")


def run(args: argparse.Namespace) -> None:
    from armd_scale import config_files

    config = config_files.load(args.config, args.overrides)
    cluster = args.cluster or ("slurm" if shutil.which("sbatch") else "local")
    _check(config, cluster, args)
    if args.dry_run:
        _dry_run(config, args)
        return
    from launchers.launcher import Launcher

    try:
        config.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the run directory {config.directory} cannot be written: {error}") from error
    # A launcher that gets SIGTERM ends its processes: two launchers must not work on the same run.
    # SIGINT too: started in the background of a script it is ignored, here and in the jobs, which are cancelled by it.
    for number in ENDING:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, _interrupt)
    with exclusive(config.run_directory.lock_path, f"the run directory {config.directory}"):
        Launcher(config, cluster, args.only, args.start).run(args.detach)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _check(config: "RunConfig", cluster: str, args: argparse.Namespace) -> None:
    """``UserError`` if the chosen cluster does not support the configuration or the options."""
    from launchers import jobs

    if cluster == "slurm" and not shutil.which("sbatch") and not args.dry_run:
        raise UserError("--cluster slurm: no sbatch on this machine: use --cluster local")
    if cluster != "slurm" and not args.dry_run and config.cluster.nodes > 1:
        raise UserError(
            f"cluster.nodes is {config.cluster.nodes} but this machine has no Slurm: run on a machine with sbatch, "
            "or set cluster.nodes=1 and a layout that fits"
        )
    pattern = re.search(r"%\d*[A-Za-z%]", str(config.directory.resolve()))
    if pattern:
        raise UserError(
            f"the run directory {config.directory} holds '{pattern[0]}', which Slurm and submitit replace in the names "
            "of logs: choose a run_dir without %"
        )
    if cluster == "local":
        jobs.visible_devices(config.cluster.gpus_per_node, config.cluster.environment)
    if cluster == "debug" and config.cluster.processes > 1:
        raise UserError("--cluster debug runs a single process: set cluster.tasks_per_node=1 and a layout that fits")
    if args.detach and cluster != "slurm":
        raise UserError("--detach needs Slurm: local processes end with the command that started them")


def _dry_run(config: "RunConfig", args: argparse.Namespace) -> None:
    """Print the resolved configuration, the plan of its layout, and the script of every job."""
    from armd_scale import config_syntax
    from armd_scale.planning import hardware, report
    from armd_scale.planning.plan import Planner, assume_vocabulary
    from launchers import jobs

    print(config_syntax.write(config.model_dump()).rstrip())
    planner = Planner(hardware.find("h100" if config.cluster.gpus_per_node else "cpu"))
    plan = planner.plan(assume_vocabulary(config))
    print("\n" + report.table(plan, {config.parallel.recompute: plan}, config.model.vocab_size is None))
    code = config.run_directory.code.resolve() / "SNAPSHOT"
    for spec in jobs.remaining_jobs(config, args.only, args.start):
        print(f"\n--- {spec.name}\n{jobs.sbatch_text(config, spec, code)}")
