"""Evaluate a model with lm-evaluation-harness: the command ``armd eval harness``."""

import sys

from launchers.cli import main

if __name__ == "__main__":
    main(["eval", "harness", *sys.argv[1:]])
