"""Start a run with the weights of a model directory.

    armd import MODEL_DIR RUN_DIR --config FILE data.tokenizer=MODEL_DIR [section.field=value ...]

The result is the checkpoint of step 0 in RUN_DIR. armd train with the same configuration, run_dir=RUN_DIR and the same
changes trains from there, under any layout.
"""

import argparse
import json
from pathlib import Path

from armd_scale.errors import UserError
from launchers.commands import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_dir", type=Path, metavar="MODEL_DIR", help="model directory, written by armd export")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run directory to start")
    arguments.add_config(parser)


def run(args: argparse.Namespace) -> None:
    from armd_scale import config as configs

    config = configs.load(args.config, [*args.overrides, f"run_dir={args.run_dir}"])
    _check_type(args.model_dir)
    from armd_scale.training import export

    checkpoint = export.to_training(args.model_dir, config)
    overrides = " ".join([f"run_dir={args.run_dir}", *args.overrides])
    print(f"{checkpoint}: train on with armd train --config {args.config} {overrides}")


def _check_type(model_dir: Path) -> None:
    """``UserError`` for a model of another project."""
    from armd_scale.decoding.network import MODEL_TYPE

    try:
        model_type = json.loads((model_dir / "config.json").read_text(encoding="utf-8")).get("model_type", MODEL_TYPE)
    except (OSError, ValueError, AttributeError):
        return  # whoever loads the model says what is wrong with the directory
    if model_type != MODEL_TYPE:
        raise UserError(
            f"{model_dir} holds a model of type '{model_type}': only directories exported by armd_scale "
            "(armd export) can be imported yet"
        )
