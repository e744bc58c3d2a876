"""Serve a standalone model over HTTP: the command ``armd serve``."""

import sys

from launchers.cli import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
