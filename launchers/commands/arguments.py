"""Arguments that several commands share."""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

from armd_scale.errors import UserError
from armd_scale.files import write_atomically


def add_config(parser: argparse.ArgumentParser) -> None:
    """A configuration file and changes to it."""
    parser.add_argument("--config", required=True, type=Path, help="YAML file of the run, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes to the configuration")


def add_log(parser: argparse.ArgumentParser) -> None:
    """Which output of a run is printed."""
    parser.add_argument("--rank", type=int, default=0, help="process whose output is printed (default 0)")
    parser.add_argument("--stage", default="train", help="stage whose output is printed (default train)")
    parser.add_argument("--stream", choices=("out", "err"), default="out", help="standard output or errors")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")


def draft(word: str) -> int | str:
    """Value of ``--draft``: a number, or ``auto``."""
    return word if word == "auto" else int(word)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to this file")


def write_json(path: Path | None, facts: Any) -> None:
    """Write what ``--json`` asks for."""
    if path:
        write_atomically(path, json.dumps(facts, indent=1) + "\n")


def check_installed(extra: str, *packages: str) -> None:
    """``UserError`` unless the packages of an optional dependency group are installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(not_installed(package, extra))


def not_installed(package: str | None, extra: str) -> str:
    """Error line about a missing optional package."""
    return f"{package} is not installed: pip install -c constraints.txt -e '.[{extra}]'"
