"""The files of a list of sources, and their formats.

A source is a file, a directory, a glob or a URL that fsspec opens.

- ``expand``: sources -> files in the order of reading, and the files that are left out;
- ``format_of``: the format of a file, from its name, or from its content if the name says nothing;
- ``fingerprint``, ``unchanged``: identify the content of a file.
"""

import bz2
import contextlib
import glob
import gzip
import io
import json
import lzma
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import fsspec
import zstandard

from armd_scale.errors import UserError
from armd_scale.files import sha256

BUILTIN = "builtin:python"
_KINDS = {
    "txt": "txt", "text": "txt", "jsonl": "jsonl", "ndjson": "jsonl", "jsonlines": "jsonl", "json": "json",
    "parquet": "parquet", "pq": "parquet", "tar": "tar",
}  # fmt: skip
_PACKINGS = {"gz": b"\x1f\x8b", "zst": b"\x28\xb5\x2f\xfd", "bz2": b"BZh", "xz": b"\xfd7zXZ\x00"}
"""Endings of compressed files, and their first bytes."""
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that Hugging Face datasets writes beside the data."""
_KNOWN = "txt, jsonl, json, parquet and tar, also compressed with gz, zst, bz2 or xz"
_HEAD = 1 << 16  # bytes that decide the format of a file
_POINTER, _LARGEST_POINTER = b"version https://git-lfs.github.com/spec/", 1024
_WINDOW = 1 << 31  # zstd --long=31

Check = Literal["size", "mtime", "sha256"]


class Format(NamedTuple):
    """Format of a file."""

    kind: str
    """txt, jsonl, json, parquet or tar."""
    packing: str = ""
    """gz, zst, bz2 or xz; empty: not compressed."""


class Files(NamedTuple):
    """The files of sources."""

    names: list[str]
    """Paths and URLs in the order of reading, without repetition."""
    left_out: list[str]
    """Files of directories and globs that are hidden or in no known format."""


def expand(sources: list[str]) -> Files:
    """The files of ``sources``, sorted by name within each source.

    A directory or a glob yields its files of known formats, a glob also the files whose ending it spells out
    (``*.py``). A file that several names lead to is read once. Raises ``UserError`` for sources without text, dangling
    links and directories that cannot be read, and ``OSError`` if a remote source does not respond.
    """
    names: dict[Any, str] = {}
    left_out: list[str] = []
    for source in sources:
        if source == BUILTIN:
            found = Files([BUILTIN], [])
        else:
            found = _remote(source) if is_remote(source) else _local(Path(source).expanduser())
        if not found.names:
            others = f"; {_few(found.left_out)} left out, as their format is unknown" if found.left_out else ""
            raise UserError(f"there is no text at {source}: give files, a directory or a glob of {_KNOWN}{others}")
        for name in found.names:
            names.setdefault(identity(name), name)
        left_out += found.left_out
    return Files(list(names.values()), list(dict.fromkeys(left_out)))


def describe(left_out: list[str]) -> str:
    """A line that names files that are left out."""
    return f"left out, as they are hidden or in no format of text: {_few(left_out)}; name a file to read it"


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)} files ({shown}, ...)" if len(names) > 3 else shown


def is_remote(file: str) -> bool:
    """Whether fsspec opens a file."""
    return "://" in file


def identity(file: str) -> Any:
    """A key that is the same for all names of a local file."""
    if is_remote(file) or file == BUILTIN:
        return file
    stat = Path(file).stat()
    return stat.st_dev, stat.st_ino


def size(file: str) -> int | None:
    """Size of a file in bytes; None if a server does not tell."""
    if is_remote(file):
        system, path = _system(file)
        bytes_ = _ask(file, lambda: system.size(path))
        return None if bytes_ is None else int(bytes_)
    return Path(file).stat().st_size


def can_seek(file: str) -> bool:
    """Whether a part of a file can be read alone."""
    if not is_remote(file):
        return True
    system, path = _system(file)
    return bool(_ask(file, lambda: system.info(path)).get("partial", True)) and size(file) is not None


def format_of(file: str) -> Format:
    """Format of a file: by its name, or by its content if the name is unknown or ends in json.

    Raises ``UserError`` for binary files of unknown formats and for pointers of Git LFS.
    """
    named = _by_name(file)
    if _is_pointer(file):
        raise UserError(f"{file} is a pointer of Git LFS to a file that is not here: run git lfs pull")
    if named and named.kind != "json":
        return named
    packing = named.packing if named else None
    with open_file(file) as raw:
        head = raw.read(_HEAD)
    if packing is None:
        packing = next((ending for ending, magic in _PACKINGS.items() if head.startswith(magic)), "")
    if packing:
        with open_file(file) as raw:
            head = unpack(raw, packing).read(_HEAD)
    kind = _sniff(head, bool(named))
    if kind == "txt" and b"\0" in head:
        raise UserError(f"{file} is binary, in no known format: convert it to one of {_KNOWN}")
    return Format(kind, packing)


def _is_pointer(file: str) -> bool:
    if is_remote(file):
        return False
    with contextlib.suppress(OSError), open_file(file) as raw:
        return os.path.getsize(file) < _LARGEST_POINTER and raw.read(len(_POINTER)) == _POINTER
    return False


def known(name: str) -> Format | None:
    """The format of a member of an archive by its name; None: unknown."""
    return _by_name(name)


def _by_name(file: str) -> Format | None:
    name = file.partition("::")[0].rpartition("/")[2].partition("?")[0].lower()
    name = re.sub(r"-\d+-of-\d+$", "", name)
    name = f"{name[:-4]}.tar.gz" if name.endswith(".tgz") else name
    stem, _, ending = name.rpartition(".")
    packing = ending if ending in _PACKINGS else ""
    if packing:
        stem, _, ending = stem.rpartition(".")
    return Format(_KINDS[ending], packing) if stem and ending in _KINDS else None


def _sniff(head: bytes, is_json: bool) -> str:
    """The kind of a file that begins with ``head``; ``is_json``: its name ends in json."""
    if head.startswith(b"PAR1"):
        return "parquet"
    if head[257:262] == b"ustar":
        return "tar"
    lines = head.removeprefix(b"\xef\xbb\xbf").lstrip().splitlines()
    first = lines[0] if lines else b""
    # A first line beyond the head cannot be parsed.
    is_record = first.startswith(b"{") and (len(first) > _HEAD // 2 or _is_object(first))
    if is_json:
        return "jsonl" if is_record and len(lines) > 1 else "json"
    return "jsonl" if is_record else "txt"


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line, parse_int=str), dict)
    except (ValueError, RecursionError):
        return False


def fingerprint(file: str, check: Check) -> list[Any]:
    """[name, size, modification time, SHA-256] of a file; the hash is None unless ``check`` is ``sha256``."""
    if file == BUILTIN:
        return [file, sys.version, None, None]
    if is_remote(file):
        return [file, size(file), None, None]
    stat = Path(file).stat()
    return [file, stat.st_size, stat.st_mtime_ns, sha256(Path(file)) if check == "sha256" else None]


def unchanged(before: list[Any], now: list[Any], check: Check) -> bool:
    """Whether two fingerprints are of the same content. Fingerprints of version 0.1 have name and size alone."""
    if before[:2] != now[:2]:
        return False
    time, digest = [*before[2:], None, None][:2]
    if check == "size" or time is None or time == now[2]:
        return digest is None or now[3] is None or digest == now[3]
    # Of a copy with a new time, the content decides.
    return digest is not None and digest == (now[3] or sha256(Path(now[0])))


def open_file(file: str) -> IO[bytes]:
    """Open a file or a URL."""
    if not is_remote(file):
        return open(file, "rb", buffering=1 << 20)
    system, path = _system(file)
    # The files of some file systems have a ``readline`` without a limit.
    reader = io.BufferedReader(_ask(file, lambda: system.open(path, "rb")), 1 << 20)
    reader.system = system  # type: ignore[attr-defined]  # a zip closes when its file system is collected
    return reader


def unpack(file: IO[bytes], packing: str) -> IO[bytes]:
    """The decompressed content of a file."""
    if packing == "gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=file), 1 << 20)  # type: ignore[arg-type]
    if packing == "bz2":
        return io.BufferedReader(bz2.BZ2File(file), 1 << 20)
    if packing == "xz":
        return io.BufferedReader(lzma.LZMAFile(file), 1 << 20)  # type: ignore[type-var]
    if packing == "zst":
        return io.BufferedReader(_ZstdStream(file), 1 << 20)
    return file


def _local(path: Path) -> Files:
    if path.is_file():
        return Files([str(path)], [])
    if path.is_dir():
        return _readable(list(_walk(path)), "")
    if path.is_symlink():
        raise UserError(f"{path} is a link to {os.readlink(path)}, which does not exist: restore the file")
    matches = [str(Path(name)) for name in glob.glob(str(path), recursive=True)]
    files = [name for name in matches if not os.path.isdir(name)]
    found = _readable(files, path.suffix)
    folders = [] if "**" in str(path) else [f"{name}/" for name in sorted(set(matches) - set(files))]
    return Files(found.names, found.left_out + folders)


def _walk(folder: Path) -> Iterator[str]:
    """All files below a directory, and its hidden directories; links to directories are followed, once each."""
    visited = {os.path.realpath(folder)}
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        yield from (os.path.join(place, name) for name in files)
        for name in sorted(folders):
            path = os.path.join(place, name)
            if name.startswith("."):
                yield f"{path}/"
            if name.startswith(".") or os.path.realpath(path) in visited:
                folders.remove(name)
            visited.add(os.path.realpath(path))


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read ({error.strerror}): allow reading it, or name its files")


def _readable(names: list[str], ending: str) -> Files:
    """Split the files of a directory or a glob into text and others; ``ending``: the ending that the glob spells."""
    read, left_out = [], []
    for name in sorted(names, key=lambda name: [name] if is_remote(name) else name.split("/")):
        base = name.rpartition("/")[2]
        is_text = _by_name(name) is not None or (ending not in ("", ".*") and base.endswith(ending))
        if base.startswith(".") or base in _DESCRIPTIONS or not is_text:
            left_out.append(name)
            continue
        if not is_remote(name) and not os.path.exists(name):
            raise UserError(f"{name} is a link to a file that does not exist: restore the file or remove the link")
        read.append(name)
    return Files(read, left_out)


def _remote(source: str) -> Files:
    system, path = _system(source)
    _, chain, rest = source.partition("::")

    def url(name: str) -> str:
        return system.unstrip_protocol(name) + chain + rest

    try:
        kind = "directory" if source.endswith("/") else _type(system, path)
        if kind == "file":
            return Files([source], [])
        if kind == "directory":
            return _readable([url(name) for name in system.find(path)], "")
        matches = system.glob(path, detail=True)
    except (FileNotFoundError, PermissionError, ValueError, NotImplementedError) as error:
        raise UserError(f"{source} cannot be opened: {error}") from error
    except Exception as error:  # every file system has errors of its own
        raise OSError(f"{source} cannot be opened: {error!r}") from error
    names = [url(name) for name, info in matches.items() if info["type"] == "file"]
    return _readable(names, os.path.splitext(path)[1])


def _type(system: Any, path: str) -> str | None:
    """``file`` or ``directory``; None for a path that does not exist, such as a glob."""
    try:
        return str(system.info(path)["type"])
    except FileNotFoundError:
        return None


def _system(file: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(file)
    except (ValueError, ImportError, FileNotFoundError) as error:
        raise UserError(f"{file} cannot be opened: {error}") from error


def _ask(file: str, question: Any) -> Any:
    """The answer of a remote file system. ``UserError`` for a missing file, ``OSError`` for faults that can pass."""
    try:
        return question()
    except (FileNotFoundError, PermissionError, ValueError, ImportError) as error:
        raise UserError(f"{file} cannot be opened: {error}") from error
    except Exception as error:  # every file system has errors of its own
        raise OSError(f"{file} cannot be opened: {error!r}") from error


class _ZstdStream(io.RawIOBase):
    """The content of a zst file of any number of frames; damage and a missing end raise ``EOFError``."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._frame = self._new_frame()
        self._started = False
        self._packed = self._ready = b""

    @staticmethod
    def _new_frame() -> Any:
        return zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        while not self._ready:
            self._packed = self._packed or self._file.read(1 << 18)
            if not self._packed:
                if self._started:
                    raise EOFError("the file ends in the middle of a zstd frame")
                return 0
            try:
                self._ready = self._frame.decompress(self._packed)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            self._packed, self._started = self._frame.unused_data, not self._frame.eof
            if self._frame.eof:
                self._frame = self._new_frame()
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
