"""The one way in which a mistake of the user is reported.

- ``UserError``: input that cannot be used; its text says what is wrong and what to do.
- ``cli``: runs a command line; a ``UserError`` becomes one line on stderr and exit code 2.
"""

import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """Bad input of any kind: one line, what is wrong and what to do about it."""


def is_bad_input(error: BaseException) -> bool:
    """Whether an error is the user's to mend: bad input, or a file that cannot be read or written."""
    # The standalone model may not import this module: it marks its own errors.
    return isinstance(error, UserError | OSError) or getattr(error, "bad_input", False)


def cli(main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` as a program and exit: 0 (or its result), 2 on bad input, 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (ValueError, OSError) as error:
        if not is_bad_input(error):
            raise
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
