"""Measure speed, compared with other libraries: the commands ``armd bench data|decode|train|gpu``."""

import sys

from launchers.cli import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])
