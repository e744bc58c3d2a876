"""Atomic writes, JSON that a crash may have torn, checks of output paths, and lock files."""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from armd_scale import logs
from armd_scale.errors import UserError

_PICTURES = (".png", ".pdf", ".svg")
_NO_LOCKS = frozenset((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP))
"""Error numbers of file systems without locks."""


def write_atomically(path: Path, text: str) -> None:
    """Replace the content of a file; a reader sees the old or the new content, even after a crash."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if the file does not exist, or is damaged, which gives a warning."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    record = _record(content)
    if record is None:
        logs.JOB.warning(
            "%s is damaged and ignored: it holds %d bytes but no JSON object", path, len(content), extra=logs.ONCE
        )
    return record


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; none if the file does not exist."""
    try:
        return parse_json_lines(path, path.read_bytes())
    except FileNotFoundError:
        return []


def parse_json_lines(path: Path, content: bytes) -> list[dict[str, Any]]:
    """The records in ``content``, a part of the file ``path``.

    Lines without a record, for example half a line or zeros after a crash, are left out with a warning.
    """
    lines = [line for line in content.split(b"\n") if line.strip()]
    records = [record for line in lines if (record := _record(line)) is not None]
    if len(records) < len(lines):
        logs.JOB.warning("%s: %d damaged lines are ignored", path, len(lines) - len(records), extra=logs.ONCE)
    return records


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """Append a record to a file of JSON lines."""
    with path.open("a+b", buffering=0) as file:
        file.write(b"\n" * ends_torn(file) + json.dumps(record).encode() + b"\n")


def ends_torn(file: io.FileIO) -> bool:
    """Whether the last line of a file has no end; a record that was appended to it would be lost."""
    if not file.seek(0, os.SEEK_END):
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def _record(text: bytes) -> dict[str, Any] | None:
    """A JSON object, also between zeros; None if ``text`` holds none."""
    try:
        record = json.loads(text.strip(b"\0"))
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(path: Path) -> None:
    """``UserError`` unless ``path`` can be written; called before the work that produces the file."""
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: there is no directory {path.parent}; create it first")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        reason = "it is a directory" if path.is_dir() else "its directory is read-only"
        raise UserError(f"{path} cannot be written: {reason}; choose another path")


def check_picture(path: Path) -> None:
    """``UserError`` unless a picture can be written at ``path``."""
    if path.suffix not in _PICTURES:
        raise UserError(f"{path} has no picture format: pictures are {', '.join(_PICTURES)}")
    check_writable(path)


class Holder(NamedTuple):
    """The process that holds a lock file."""

    pid: int | None
    """None while the process has not yet written its name."""
    host: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" if self.pid else "not yet known"


@contextlib.contextmanager
def exclusive(path: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock file ``path``, which then names this process. ``what``: the locked object.

    ``wait``: wait for another process that holds the lock; else another process is a ``UserError``. The lock ends with
    the process, however that dies. A file system without locks gives a warning.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            other = holder(path) or Holder(None)
            if not wait:
                raise UserError(
                    f"another process works on {what} ({other}): wait for that process or stop it"
                ) from error
            logs.DATA.info("waiting for another process that works on %s (%s)", what, other)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logs.DATA.warning("%s cannot be locked (%s): start one process at a time for %s", path, error, what)
        file.truncate(0)
        file.write(f"{os.getpid()} {socket.gethostname()}\n")
        file.flush()
        yield


@contextlib.contextmanager
def in_use(path: Path) -> Iterator[None]:
    """Mark an existing file as used by this process, for ``is_in_use``."""
    with path.open("rb") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


def is_in_use(path: Path) -> bool:
    """Whether another process uses a file, where the file system has locks."""
    with path.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass
    return False


def holder(path: Path) -> Holder | None:
    """The process that holds the lock file ``path``; None if no process holds it."""
    try:
        with path.open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                words = file.read().split()
                return Holder(int(words[0]), words[1]) if len(words) == 2 else Holder(None)
    except OSError:
        pass
    return None
