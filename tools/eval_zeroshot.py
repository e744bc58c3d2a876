"""Score a model on texts: the command ``armd eval zeroshot``."""

import sys

from launchers.cli import main

if __name__ == "__main__":
    main(["eval", "zeroshot", *sys.argv[1:]])
