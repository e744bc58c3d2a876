"""Write a checkpoint of a run as a standalone model directory, and check that it computes the same function.

armd export RUN_DIR MODEL_DIR [--checkpoint DIR] [--weights averaged|last] [--file-gb 2]
armd export RUN_DIR MODEL_DIR --format transformers [--dtype bfloat16]

With --format transformers, a left-to-right model (objective=ar) becomes a model of a class that transformers itself
has, and that other programs read.
"""

import argparse
from pathlib import Path

from armd_scale.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run directory")
    parser.add_argument("model_dir", type=Path, metavar="MODEL_DIR", help="model directory to write")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="checkpoint (default: the newest of the run)")
    parser.add_argument(
        "--weights",
        choices=("averaged", "last"),
        default="averaged",
        help="moving average of the weights (default), or the weights of the last step",
    )
    parser.add_argument("--file-gb", type=float, default=2.0, help="maximum size of a weight file in GB (default 2)")
    parser.add_argument(
        "--format",
        choices=("armd", "transformers"),
        default="armd",
        help="model directory with its own code (default), or of a class of transformers (objective=ar)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the weights of --format transformers (default: that of the imported model, else float32)",
    )


def run(args: argparse.Namespace) -> None:
    if args.dtype and args.format != "transformers":
        raise UserError("--dtype needs --format transformers: an armd model has float32 weights")
    if not 0 < args.file_gb < 1e6:
        raise UserError(f"--file-gb must be more than 0 and below a million, not {args.file_gb}")
    from armd_scale.config_files import load_run
    from armd_scale.data.shards import fill_vocabulary
    from armd_scale.run_directory import RunDirectory
    from armd_scale.training import export, manifest, pretrained

    config = fill_vocabulary(load_run(RunDirectory(args.run_dir)))
    if args.checkpoint:
        manifest.verify(args.checkpoint)
    checkpoint = args.checkpoint or export.newest_checkpoint(config)
    averaged, file_bytes = args.weights == "averaged", int(args.file_gb * 1e9)
    if args.format == "transformers":
        facts = pretrained.write_folder(config, checkpoint, args.model_dir, averaged, args.dtype, file_bytes)
        print(f"{args.model_dir}: {facts['architecture']}, {facts['parameters']:,} parameters in {facts['dtype']}")
        return
    facts = export.export(config, checkpoint, args.model_dir, averaged, file_bytes)
    print(f"{args.model_dir}: {facts['parameters']:,} parameters from {checkpoint}")
    print(f"largest difference to the training model's logits: {facts['difference']:.1e}")
