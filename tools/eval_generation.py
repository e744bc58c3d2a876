"""Measure quality against speed of generated texts: the command ``armd eval generation``."""

import sys

from launchers.cli import main

if __name__ == "__main__":
    main(["eval", "generation", *sys.argv[1:]])
