"""Turn the newest checkpoint of a run into a standalone model folder, and check that it is the same function.

python tools/convert_ckpt.py RUN_DIR OUT_DIR [--checkpoint DIR] [--weights averaged|last] [--file-gb 2]
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from armd_scale.errors import cli


def main() -> None:
    parser = argparse.ArgumentParser(description="Training checkpoint -> standalone model folder")
    parser.add_argument("run_dir", type=Path, help="run folder, as made by launchers/slurm.py")
    parser.add_argument("out_dir", type=Path, help="model folder to write")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint folder (default: the newest of the run)")
    parser.add_argument(
        "--weights",
        choices=("averaged", "last"),
        default="averaged",
        help="moving average of the weights, or the last ones",
    )
    parser.add_argument("--file-gb", type=float, default=2.0, help="most gigabytes of weights in one file (default 2)")
    args = parser.parse_args()
    if not 0 < args.file_gb < 1e6:
        parser.error(f"--file-gb must be more than 0 and below a million, not {args.file_gb}")
    from armd_scale.training import export, manifest

    config = export.load_run(args.run_dir)
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
