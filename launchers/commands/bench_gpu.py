"""Check correctness and measure speed on one GPU, within a time budget. Correctness comes first.

    armd bench gpu --seconds 540 --json gpu.json   # one GPU of any kind; the targets are for an H100
    armd bench gpu --list --seconds 540            # measurements and their order
    armd bench gpu --device cpu --quick            # toy sizes, a trial without a GPU
    armd bench gpu --report docs/results           # write the results page from DIR/gpu/*.json

tools/gpu.py runs this command on a machine where armd_scale or its dependencies are not installed.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

from armd_scale.benchmarks import gpu_report, registry
from armd_scale.errors import UserError
from armd_scale.files import check_writable

REQUIRED = ("torch", "transformers", "numpy", "deepspeed", "megatron.core", "yaml", "pydantic", "zstandard")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--seconds", type=float, help="time budget; measurements that do not fit are skipped")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these measurements alone")
    parser.add_argument("--skip", nargs="+", metavar="NAME", default=[], help="leave these measurements out")
    parser.add_argument("--list", action="store_true", help="print the measurements in their order, run nothing")
    parser.add_argument("--json", type=Path, help="results file, rewritten after every figure")
    parser.add_argument("--trace", type=Path, help="directory for profiles of training steps")
    parser.add_argument("--wheels", metavar="DIR", help="install these wheels first, beside what is installed")
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="instead: write DIR/performance.md from the results in DIR/gpu/"
    )


def run(args: argparse.Namespace) -> int:
    if args.wheels:
        raise UserError("--wheels is an option of tools/gpu.py, which installs them before this command starts")
    if args.report:
        gpu_report.write(args.report)
        return 0
    if args.seconds is not None and args.seconds <= 0:
        raise UserError("--seconds must be positive")
    chosen = _chosen(args.only, args.skip)
    if args.list:
        print(registry.schedule_table(chosen, args.quick, args.seconds))
        return 0
    missing = [name for name in REQUIRED if not _installed(name)]
    if missing:
        raise UserError(
            f"not installed: {', '.join(missing)}. Run pip install -c constraints.txt -e '.[bench]', "
            "or name a directory of wheels with tools/gpu.py --wheels"
        )
    _check_device(args.device)
    from armd_scale.training.telemetry import git  # imports packages that may be missing

    if args.json:
        check_writable(args.json)
    if args.trace:
        args.trace.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, _interrupt)
    with tempfile.TemporaryDirectory(prefix="armd-scale-") as shared:
        # Processes of one run share what the compilers made.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{shared}/inductor")
        os.environ.setdefault("TRITON_CACHE_DIR", f"{shared}/triton")
        context = registry.Context(args.device, args.quick, shared, str(args.trace) if args.trace else None)
        facts = {
            "environment": environment(args.device),
            "date": datetime.date.today().isoformat(),
            "commit": git("rev-parse", "HEAD"),
            "command": " ".join(["armd", *sys.argv[1:]]),
            "quick": args.quick,
        }
        print(", ".join(f"{name} {value}" for name, value in facts["environment"].items()))
        runner = registry.Runner(context, args.json, args.seconds, facts)
        try:
            runner.run(chosen)
        finally:
            if "ARMD_SCALE_SITE" in os.environ:
                shutil.rmtree(os.environ["ARMD_SCALE_SITE"], ignore_errors=True)
    entries = runner.results["measurements"].items()
    incomplete = [f"{name} ({entry['reason']})" for name, entry in entries if entry["status"] != "done"]
    if incomplete:
        print("\nnot complete: " + "; ".join(incomplete))
    wrong = runner.wrong()
    if wrong:
        print(f"\nWRONG RESULTS on {args.device}: {'; '.join(wrong)}")
    failed = any(entry["status"] == "failed" for _, entry in entries)
    return 1 if wrong or failed else 0


def _chosen(only: list[str] | None, skip: list[str]) -> list[registry.Measurement]:
    known = registry.load()
    for name in [*(only or []), *skip]:
        if name not in known:
            raise UserError(f"there is no measurement '{name}'; known: {', '.join(known)}")
    return [m for name, m in known.items() if name not in skip and (only is None or name in only)]


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no GPU here: --device cpu --quick runs the measurements without one")


def environment(device: str) -> dict[str, str]:
    """Versions of what is measured."""
    import torch

    versions = {"Python": platform.python_version(), "torch": torch.__version__}
    for name in ("deepspeed", "megatron-core", "transformers"):
        versions[name] = importlib.metadata.version(name)
    versions["TransformerEngine"] = "yes" if _installed("transformer_engine") else "no"
    if device == "cuda":
        versions |= {"GPU": torch.cuda.get_device_name(), "CUDA": str(torch.version.cuda)}
    return versions


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
