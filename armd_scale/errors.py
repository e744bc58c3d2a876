"""The one way in which a mistake of the user is reported.

- ``UserError``: input that cannot be used; its text says what is wrong and what to do.
- ``cli``: runs a command line; a ``UserError`` becomes one line on stderr and exit code 2.
"""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input of any kind: one line, what is wrong and what to do about it."""


def cli(main: Callable[[], int | None]) -> None:
    """Run ``main`` as a program and exit: 0 (or its result), 2 on bad input, 130 when interrupted."""
    try:
        code = main() or 0
    except ValueError as error:
        # The standalone model may not import this module: it marks its own bad-input errors.
        if not (isinstance(error, UserError) or getattr(error, "bad_input", False)):
            raise
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
