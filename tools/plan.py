"""Predict memory, time and traffic of a run: the command ``armd plan``."""

import sys

from launchers.cli import main

if __name__ == "__main__":
    main(["plan", *sys.argv[1:]])
