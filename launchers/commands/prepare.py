"""Prepare the data of a run on this machine, without training: the tokenizer, and packed training and held-out text.

    armd prepare --config configs/1b.yaml [section.field=value ...]

The result is the directory data.directory of the configuration (default: data/ in the run directory), which armd train
then uses as it is. armd train --only tokenise does the same as jobs of Slurm.
"""

import argparse

from launchers.commands import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config(parser)


def run(args: argparse.Namespace) -> None:
    from armd_scale import config_files
    from launchers import stages

    config = config_files.load(args.config, args.overrides)
    count = stages.tokenise(config)["samples"]
    print(f"{config.data_directory}: {count:,} training samples of {config.model.length} tokens")
