"""Checkpoint of a run to model directory, the command ``armd export``; with ``--to-training`` back, ``armd import``."""

import sys

from launchers.cli import main

if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--to-training"]
    main(["import" if "--to-training" in sys.argv else "export", *words])
