"""Checkpoint of a run to model directory, the command ``armd export``.

With ``--to-training`` or ``--from-transformers`` from a model directory to a run, ``armd import``.
"""

import sys

from launchers.cli import main

if __name__ == "__main__":
    backwards = {"--to-training", "--from-transformers"}
    words = [word for word in sys.argv[1:] if word not in backwards]
    main(["import" if backwards & set(sys.argv) else "export", *words])
