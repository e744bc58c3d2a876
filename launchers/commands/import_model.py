"""Start a run with the weights of a model directory.

    armd import MODEL_DIR RUN_DIR [--config FILE] [section.field=value ...]

MODEL_DIR is written by armd export, or holds a Llama, Mistral, Qwen2 or Qwen3 model of transformers. The result is the
checkpoint of step 0 in RUN_DIR, from which armd train goes on under any layout. For a model of transformers, RUN_DIR
also gets the tokenizer and the configuration: armd train --config RUN_DIR/config.yaml 'data.text=[...]'.
"""

import argparse
import json
from pathlib import Path

from armd_scale.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_dir", type=Path, metavar="MODEL_DIR", help="model directory")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run directory to start")
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration; models of transformers need none")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes of the configuration")


def run(args: argparse.Namespace) -> None:
    if not (args.model_dir / "config.json").is_file():
        raise UserError(f"{args.model_dir} is not a model directory: it has no config.json")
    if _is_foreign(args.model_dir):
        from armd_scale.training import pretrained

        config, checkpoint = pretrained.adopt(args.model_dir, args.run_dir, args.config, args.overrides)
        print(f"{checkpoint}: {config.traits.label} model that begins as {args.model_dir}")
        print(f"train on with armd train --config {config.run_directory.config_path} 'data.text=[FILE, ...]'")
        return
    if args.config is None:
        raise UserError("the configuration of the run is missing: add --config FILE")
    from armd_scale import config_files
    from armd_scale.training import export

    config = config_files.load(args.config, [*args.overrides, f"run_dir={args.run_dir}"])
    checkpoint = export.to_training(args.model_dir, config)
    overrides = " ".join([f"run_dir={args.run_dir}", *args.overrides])
    print(f"{checkpoint}: train on with armd train --config {args.config} {overrides}")


def _is_foreign(model_dir: Path) -> bool:
    """Whether a directory holds a model of another project."""
    from armd_scale.decoding.network import MODEL_TYPE

    try:
        model_type = json.loads((model_dir / "config.json").read_text(encoding="utf-8")).get("model_type", MODEL_TYPE)
    except (OSError, ValueError, AttributeError):
        return False  # whoever loads the model says what is wrong with the directory
    return bool(model_type != MODEL_TYPE)
