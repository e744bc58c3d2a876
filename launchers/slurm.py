"""Start or resume a run, the command ``armd train``; or one of ``armd status|logs|cancel`` RUN_DIR."""

import sys

from launchers.cli import main

if __name__ == "__main__":
    about_a_run = sys.argv[1:2] and sys.argv[1] in ("status", "logs", "cancel")
    main(sys.argv[1:] if about_a_run else ["train", *sys.argv[1:]])
