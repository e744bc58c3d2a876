"""Reporting of bad input.

- ``UserError``: bad input; the message says what is wrong and what to do.
- ``is_permanent``: whether an error repeats with the same input;
- ``cli``: runs a command line; a ``UserError`` becomes a line on stderr and exit code 2.
"""

import codecs
import errno
import locale
import os
import sys
from collections.abc import Callable
from typing import NoReturn

_PERMANENT = frozenset(
    (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)
)
"""Error numbers of files that are missing or may not be used."""


class UserError(ValueError):
    """Bad input; the message is one line that says what is wrong and what to do."""


def is_user_error(error: BaseException) -> bool:
    """Whether the message of an error says what is wrong and what to do."""
    # The standalone model cannot import this module and marks its errors by an attribute.
    return isinstance(error, UserError) or getattr(error, "bad_input", False)


def is_bad_input(error: BaseException) -> bool:
    """Whether the user can fix an error: bad input, or a file that cannot be read or written."""
    return isinstance(error, OSError) or is_user_error(error)


def is_permanent(error: BaseException) -> bool:
    """Whether an error repeats with the same input, so that a retry is of no use.

    Errors of devices, networks and memory can pass; torch raises them as ``RuntimeError``.
    """
    if isinstance(error, OSError):
        return error.errno in _PERMANENT
    faults = (ValueError, TypeError, LookupError, AttributeError, NameError, ImportError, AssertionError)
    return isinstance(error, (*faults, NotImplementedError, RecursionError)) or is_user_error(error)


def cli(main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` as a program and exit: 0 (or its result), 2 on bad input, 130 when interrupted.

    In a locale without UTF-8 the program starts again in UTF-8, as libraries read their files in the locale's encoding.
    """
    if codecs.lookup(locale.getpreferredencoding(False)).name != "utf-8":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONUTF8": "1"})
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:  # the reader closed the pipe
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
