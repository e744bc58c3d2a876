"""Reads documents from txt, jsonl, both compressed with gz or zst, parquet, and tar files of txt and jsonl.

- ``files``: expands a list of files, directories, globs and URLs to a sorted list of files;
- ``parts``: parts of files that are read independently: byte ranges of an uncompressed jsonl file, row groups of a
  parquet file, whole files of other formats;
- ``read``: the records of a part, good and bad, with their locations;
- ``documents``: all documents of a list of sources; a bad record is an error.

URLs are opened with fsspec.
"""

import glob
import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import fsspec
import zstandard

from armd_scale.data.builtin import python_documents
from armd_scale.errors import UserError

BUILTIN = "builtin:python"
PART_BYTES = 32 << 20
"""Size of a part of a file that can be split."""
LONGEST_LINE = 256 << 20
"""Longest line of a jsonl file in bytes; longer lines are bad records."""
_FORMATS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".txt.zst", ".jsonl.zst", ".parquet", ".tar")


class Part(NamedTuple):
    """A part of a file: bytes of a jsonl file or row groups of a parquet file; ``stop`` -1: the whole file."""

    file: str
    start: int
    stop: int
    size: int
    """Approximate size on disk in bytes."""


class Record(NamedTuple):
    """A document, or the problem of a bad record."""

    text: str
    place: str
    """File and record, for messages."""
    problem: str | None = None
    id: str | None = None
    """Value of the id field."""
    source: str | None = None
    """Value of the source field."""


class Fields(NamedTuple):
    """Names of the fields of a jsonl record or the columns of a parquet file."""

    text: str = "text"
    id: str = "id"
    source: str = "source"


FIELDS = Fields()


def documents(sources: list[str], field: str = "text") -> Iterator[str]:
    """All non-empty documents of ``sources``, in the order of the sorted file names.

    A txt file, or an explicitly named file of unknown format, is a document. A jsonl line or a parquet row holds a
    document in ``field``. Raises ``UserError`` with the file and the record that cannot be read.
    """
    for part in parts(files(sources)):
        for record in read(part, Fields(field)):
            if record.problem:
                raise UserError(f"{record.place} {record.problem}")
            if record.text.strip():
                yield record.text


def files(sources: list[str]) -> list[str]:
    """Expand ``sources`` to files without repetition, in the order of reading."""
    expanded = (name for source in sources for name in ([source] if source == BUILTIN else _files(source)))
    return list(dict.fromkeys(expanded))


def size(file: str) -> int:
    """Size of a file in bytes."""
    if "://" in file:
        system, path = fsspec.core.url_to_fs(file)
        return int(system.size(path) or 0)
    return Path(file).stat().st_size


def parts(names: Iterable[str]) -> Iterator[Part]:
    """The parts of files, in order. The parts depend on the files only."""
    for name in names:
        if name == BUILTIN:
            yield Part(name, 0, -1, 0)
        elif name.endswith(".jsonl"):
            whole = size(name)
            for start in range(0, whole, PART_BYTES):
                yield Part(name, start, min(start + PART_BYTES, whole), min(PART_BYTES, whole - start))
        elif name.endswith(".parquet"):
            yield from _parquet_parts(name)
        else:
            yield Part(name, 0, -1, size(name))


def read(part: Part, fields: Fields = FIELDS) -> Iterator[Record]:
    """The records of a part, including empty records. Raises ``UserError`` if the file cannot be read."""
    if part.file == BUILTIN:
        yield from (Record(text, f"{BUILTIN} document {n}") for n, text in enumerate(python_documents(), start=1))
    elif part.file.endswith(".parquet"):
        yield from _read_parquet(part, fields)
    else:
        try:
            yield from _read_stream(part, fields)
        except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
            raise UserError(f"{part.file} cannot be read: {error}") from error


def encodable(text: str) -> bool:
    """Whether a string can be encoded in UTF-8: JSON and command lines may contain lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _files(source: str) -> list[str]:
    if "://" in source:
        return _remote_files(source)
    path = Path(source)
    if path.is_file():
        paths = [path]
    elif path.is_dir():
        paths = [p for p in path.rglob("*") if p.is_file() and p.name.endswith(_FORMATS)]
    else:
        paths = [Path(name) for name in glob.glob(source, recursive=True)]
    if not paths:
        raise UserError(f"there is no text at {source}: give files, a directory or a glob of {', '.join(_FORMATS)}")
    return [str(path) for path in sorted(paths)]


def _remote_files(source: str) -> list[str]:
    try:
        system, path = fsspec.core.url_to_fs(source)
        if system.isdir(path):
            names = [name for name in system.find(path) if name.endswith(_FORMATS)]
        else:
            names = [name for name in system.glob(path) if system.isfile(name)]
    except (ValueError, ImportError, OSError) as error:
        raise UserError(f"{source} cannot be opened: {error}") from error
    if not names:
        raise UserError(f"there is no text at {source}: give files, a directory or a glob of {', '.join(_FORMATS)}")
    return sorted(system.unstrip_protocol(name) for name in names)


def _open(file: str) -> IO[bytes]:
    return fsspec.open(file, "rb").open() if "://" in file else open(file, "rb", buffering=1 << 20)


def _read_stream(part: Part, fields: Fields) -> Iterator[Record]:
    with _open(part.file) as file:
        if part.stop >= 0:
            yield from _lines(_range(file, part), part.file, fields, first=None if part.start else 1)
        elif part.file.endswith(".tar"):
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    if member.isfile() and member.name.endswith((".parquet", ".tar")):
                        yield Record("", f"{part.file}/{member.name}", "is not read inside a tar: unpack it")
                    elif member.isfile() and member.name.endswith(_FORMATS):
                        content = archive.extractfile(member)
                        assert content is not None
                        yield from _plain(content, member.name, f"{part.file}/{member.name}", fields)
                file.seek(archive.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise OSError("the end mark is missing")  # tarfile accepts a truncated archive
        else:
            yield from _plain(file, part.file, part.file, fields)


def _plain(file: IO[bytes], name: str, place: str, fields: Fields) -> Iterator[Record]:
    """The records of a txt or jsonl file, compressed or not."""
    if name.endswith(".gz"):
        file = io.BufferedReader(gzip.GzipFile(fileobj=file))  # type: ignore[arg-type]
    elif name.endswith(".zst"):
        file = io.BufferedReader(_ZstdStream(file), 1 << 20)
    if ".jsonl" in Path(name).suffixes[-2:]:
        yield from _lines(_all_lines(file), place, fields, first=1)
        return
    try:
        yield Record(file.read().decode("utf-8"), place)
    except UnicodeDecodeError as error:
        yield Record("", place, f"is not UTF-8 text: {error}")


def _range(file: IO[bytes], part: Part) -> Iterator[tuple[int, bytes]]:
    """(first byte, line) of the lines that begin in a part; a line belongs to the part in which it begins."""
    at = part.start
    if at:
        file.seek(at - 1)
        at += len(_line(file)) - 1
    while at < part.stop:
        line = _line(file)
        if not line:
            return
        yield at, line
        at += len(line)


def _all_lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    at = 0
    while line := _line(file):
        yield at, line
        at += len(line)


class _Giant(bytes):
    """The beginning of a line that is too long; ``len`` gives the length of the whole line."""

    def __len__(self) -> int:
        return self.whole

    whole = 0


def _line(file: IO[bytes]) -> bytes:
    line = file.readline(LONGEST_LINE)
    if len(line) < LONGEST_LINE or line.endswith(b"\n"):
        return line
    giant = _Giant(line[:100])
    giant.whole = len(line)
    while more := file.readline(LONGEST_LINE):
        giant.whole += len(more)
        if more.endswith(b"\n"):
            break
    return giant


def _lines(lines: Iterator[tuple[int, bytes]], place: str, fields: Fields, first: int | None) -> Iterator[Record]:
    """Records of jsonl lines; ``first``: number of the first line, None if only byte offsets are known."""
    for count, (at, line) in enumerate(lines):
        if line.strip():
            where = f"{place} byte {at}" if first is None else f"{place} line {first + count}"
            yield _record(line, where, fields)


def _record(line: bytes, place: str, fields: Fields) -> Record:
    if isinstance(line, _Giant):
        return Record("", place, f"is a line of {line.whole} bytes, more than {LONGEST_LINE}")
    try:
        record = json.loads(line)
        text = record[fields.text]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return Record("", place, f"is not a JSON object with a field '{fields.text}': {error!r}")
    if not isinstance(text, str):
        return Record("", place, f"field '{fields.text}' is not text")
    if not encodable(text):
        return Record("", place, f"field '{fields.text}' has half a surrogate pair, which is no text")
    return Record(text, place, id=_name(record.get(fields.id)), source=_name(record.get(fields.source)))


def _name(value: Any) -> str | None:
    """An id or a source: a text or a number."""
    text = str(value) if isinstance(value, str | int) else None
    return text if text is None or encodable(text) else None


def _parquet_parts(name: str) -> Iterator[Part]:
    import pyarrow
    import pyarrow.parquet

    try:
        with _open(name) as stream, pyarrow.parquet.ParquetFile(stream) as file:
            sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{name} cannot be read: {error}") from error
    start = 0
    for stop in range(1, len(sizes) + 1):
        total = sum(sizes[start:stop])
        if total >= PART_BYTES or stop == len(sizes):
            yield Part(name, start, stop, total)
            start = stop


def _read_parquet(part: Part, fields: Fields) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    path = part.file
    try:
        with _open(path) as stream, pyarrow.parquet.ParquetFile(stream) as file:
            names = file.schema_arrow.names
            if fields.text not in names:
                raise UserError(f"{path} has no column '{fields.text}'; its columns: {', '.join(names)}")
            kind = file.schema_arrow.field(fields.text).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UserError(f"{path}: column '{fields.text}' is {kind}, not text")
            row = sum(file.metadata.row_group(group).num_rows for group in range(part.start))
            groups = range(part.start, part.stop)
            columns = list(dict.fromkeys(name for name in fields if name in names))
            for batch in file.iter_batches(columns=columns, batch_size=1024, row_groups=list(groups)):
                empty = [None] * len(batch)
                ids, sources = (batch.column(name) if name in columns else empty for name in (fields.id, fields.source))
                for value, id_, source in zip(batch.column(fields.text), ids, sources, strict=True):
                    yield _parquet_record(value, f"{path} row {row}", id_, source)
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _parquet_record(value: Any, place: str, id_: Any, source: Any) -> Record:
    try:
        text = value.as_py()
        names = [_name(None if field is None else field.as_py()) for field in (id_, source)]
    except UnicodeDecodeError as error:
        return Record("", place, f"is not UTF-8 text: {error}")
    return Record(text or "", place, None, *names)  # null is an empty text


class _ZstdStream(io.RawIOBase):
    """The text of a zst file of any number of frames; damage and a missing end raise ``OSError``."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._started = False
        self._packed = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        while not self._ready:
            self._packed = self._packed or self._file.read(1 << 18)
            if not self._packed:
                if self._started:
                    raise OSError("the file ends in the middle of a zstd frame")
                return 0
            try:
                self._ready = self._frame.decompress(self._packed)
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            self._packed, self._started = self._frame.unused_data, not self._frame.eof
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
