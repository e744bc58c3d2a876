"""Generate text with a standalone model: the command ``armd generate``."""

import sys

from launchers.cli import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
