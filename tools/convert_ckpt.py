"""Turn the newest checkpoint of a run into a standalone model folder, and check that it is the same function.

    python tools/convert_ckpt.py RUN_DIR OUT_DIR [--checkpoint DIR] [--weights averaged|last] [--file-gb 2]
    python tools/convert_ckpt.py MODEL_DIR RUN_DIR --to-training --config FILE [section.field=value ...]

The second form begins a run with a model's weights; launchers/slurm.py with the same configuration trains on.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from armd_scale.errors import cli


def main() -> None:
    parser = argparse.ArgumentParser(description="Training checkpoint -> standalone model folder, and back")
    parser.add_argument("source", type=Path, help="run folder, as made by launchers/slurm.py; or a model folder")
    parser.add_argument("out_dir", type=Path, help="model folder to write; or the run folder to begin")
    parser.add_argument("--to-training", action="store_true", help="begin a run with the weights of a model folder")
    parser.add_argument("--config", type=Path, help="configuration of the run to begin")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes to --config")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint folder (default: the newest of the run)")
    parser.add_argument(
        "--weights",
        choices=("averaged", "last"),
        default="averaged",
        help="moving average of the weights, or the last ones",
    )
    parser.add_argument("--file-gb", type=float, default=2.0, help="most gigabytes of weights in one file (default 2)")
    args = parser.parse_intermixed_args()
    if not 0 < args.file_gb < 1e6:
        parser.error(f"--file-gb must be more than 0 and below a million, not {args.file_gb}")
    if args.to_training != bool(args.config) or (args.overrides and not args.config):
        parser.error("--to-training and --config FILE go together")
    from armd_scale import config as configs
    from armd_scale.run_directory import RunDirectory
    from armd_scale.training import export, manifest

    if args.to_training:
        config = configs.load(args.config, [*args.overrides, f"run_dir={args.out_dir}"])
        begun = export.to_training(args.source, config)
        print(f"{begun}: train on with launchers/slurm.py --config {args.config} run_dir={args.out_dir} and the same")
        return
    config = RunDirectory(args.source).load_config(vocabulary=True)
    if args.checkpoint:
        source = args.checkpoint
        manifest.verify(source)
    else:
        source = export.newest_checkpoint(config)
    averaged = args.weights == "averaged"
    facts = export.export(config, source, args.out_dir, averaged, int(args.file_gb * 1e9))
    print(f"{args.out_dir}: {facts['parameters']:,} parameters from {source}")
    print(f"largest difference to the training model's logits: {facts['difference']:.1e}")


if __name__ == "__main__":
    cli(main)
