"""Reads documents from the files of ``sources``: txt, jsonl, json, parquet and tar.

- ``parts``: parts of files that are read independently: byte ranges of a file of lines, row groups of a parquet file,
  whole files of other formats;
- ``read``: the records of a part, good and bad, with their locations;
- ``documents``: all documents of a list of sources; a bad record is an error.
"""

import json
import lzma
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple

from armd_scale.data import sources
from armd_scale.data.builtin import python_documents
from armd_scale.data.sources import BUILTIN, Format
from armd_scale.errors import UserError, is_permanent

PART_BYTES = 32 << 20
"""Size of a part of a file that can be split."""
LONGEST_LINE = 256 << 20
"""Longest line of a jsonl file in bytes; longer lines are bad records."""
_BOM = "\ufeff"


class Part(NamedTuple):
    """A part of a file: bytes of a file of lines or row groups of a parquet file; ``stop`` -1: the whole file."""

    file: str
    start: int
    stop: int
    size: int
    """Approximate size on disk in bytes."""
    kind: str
    """Fields of the ``Format`` of the file."""
    packing: str = ""


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
    ignored: bool = False
    """Whether this is a member of a tar that is no text."""
    segments: tuple[str, ...] | None = None
    """Parts of the text in turn that do not count in the loss and that do; None: all counts."""


class Fields(NamedTuple):
    """Where documents stand in a file."""

    text: str = "text"
    """Name of the field of a jsonl record or the column of a parquet file."""
    id: str = "id"
    source: str = "source"
    txt: str = "file"
    """Documents of a txt file: ``file``, ``line``, ``paragraph``, or the text that separates documents."""
    messages: str | None = None
    """Field that holds a conversation in place of the text; the text of its record is JSON."""
    prompt: str | None = None
    """Field that holds what stands before the text and does not count in the loss."""

    @property
    def main(self) -> str:
        """The field that a record must have."""
        return self.messages or self.text

    @property
    def in_records(self) -> bool:
        """Whether documents have more fields than a text file has."""
        return self.messages is not None or self.prompt is not None


FIELDS = Fields()


def documents(names: list[str], field: str = "text") -> Iterator[str]:
    """All non-empty documents of the sources ``names``, in the order of the sorted file names.

    A txt file is a document; a record of another format holds a document in ``field``. Raises ``UserError`` with the
    file and the record that cannot be read.
    """
    for part in parts(sources.expand(names).names):
        for record in read(part, Fields(field)):
            if record.problem and not record.ignored:
                raise UserError(f"{record.place} {record.problem}")
            if record.text.strip():
                yield record.text


def parts(names: Iterable[str], fields: Fields = FIELDS) -> Iterator[Part]:
    """The parts of files, in order. The parts depend on the files and on the kind of documents of a txt file only."""
    for name in names:
        if name == BUILTIN:
            yield Part(name, 0, -1, 0, "txt")
            continue
        format_ = sources.format_of(name)
        if format_ == Format("parquet"):
            yield from _parquet_parts(name)
            continue
        whole = sources.size(name) or 0
        has_lines = format_.kind == "jsonl" or (format_.kind == "txt" and fields.txt == "line")
        if has_lines and not format_.packing and whole and (whole <= PART_BYTES or sources.can_seek(name)):
            for start in range(0, whole, PART_BYTES):
                stop = min(start + PART_BYTES, whole)
                yield Part(name, start, stop, stop - start, format_.kind)
        else:
            yield Part(name, 0, -1, whole, *format_)


def read(part: Part, fields: Fields = FIELDS) -> Iterator[Record]:
    """The records of a part, including empty records.

    Raises ``UserError`` if the file is damaged or does not exist, and ``OSError`` for faults that can pass.
    """
    if part.file == BUILTIN:
        yield from (Record(text, f"{BUILTIN} document {n}") for n, text in enumerate(python_documents(), start=1))
        return
    try:
        yield from _read_parquet(part, fields) if part.kind == "parquet" else _read_stream(part, fields)
    except UserError:
        raise
    except (EOFError, zlib.error, lzma.LZMAError, tarfile.TarError) as error:
        raise UserError(f"{part.file} cannot be read: {error}") from error
    except OSError as error:
        # Decompression reports damage by an error without a number.
        damaged = error.errno is None and not sources.is_remote(part.file)
        kind = UserError if damaged or is_permanent(error) else OSError
        raise kind(f"{part.file} cannot be read: {error}") from error


def encodable(text: str) -> bool:
    """Whether a string can be encoded in UTF-8: JSON and command lines may contain lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_stream(part: Part, fields: Fields) -> Iterator[Record]:
    with sources.open_file(part.file) as file:
        if part.stop >= 0:
            first = None if part.start else 1
            yield from _lines(_range(file, part), part.file, fields, first, part.kind)
        elif part.kind == "tar":
            yield from _read_tar(part, file, fields)
        else:
            yield from _plain(sources.unpack(file, part.packing), part.kind, part.file, fields)


def _read_tar(part: Part, file: IO[bytes], fields: Fields) -> Iterator[Record]:
    """The records of the members of a tar, or of several archives in a row."""
    file = sources.unpack(file, part.packing)
    # A compressed archive is read as a stream, in blocks, so that the next archive begins where this one ends.
    mode = "r|" if part.packing else "r:"
    while True:
        with tarfile.open(fileobj=file, mode=mode, bufsize=tarfile.BLOCKSIZE) as archive:  # type: ignore[call-overload]
            for member in archive:
                if not member.isdir():
                    yield from _member(archive, member, f"{part.file}/{member.name}", fields)
            if not part.packing:
                file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise EOFError("the end mark is missing")  # tarfile accepts a truncated archive
        while (ahead := file.peek(1)[:1]) == b"\0":  # type: ignore[attr-defined]
            file.read(tarfile.BLOCKSIZE)
        if not ahead:
            return


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo, place: str, fields: Fields) -> Iterator[Record]:
    format_ = sources.known(member.name)
    if format_ is None or member.name.rpartition("/")[2].startswith("."):
        yield Record("", place, "is no text", ignored=True)
    elif format_.kind in ("parquet", "tar"):
        yield Record("", place, "is not read inside a tar: unpack it")
    else:
        try:
            content = archive.extractfile(member)
        except (KeyError, tarfile.StreamError) as error:
            yield Record("", place, f"is a link that cannot be followed: unpack the tar ({error})")
            return
        if content is None:
            yield Record("", place, "is neither a file nor a link")
        else:
            yield from _plain(sources.unpack(content, format_.packing), format_.kind, place, fields)


def _plain(file: IO[bytes], kind: str, place: str, fields: Fields) -> Iterator[Record]:
    """The records of a txt, jsonl or json file that is not compressed."""
    if kind == "json":
        yield from _read_json(file.read(), place, fields)
    elif kind == "txt" and fields.in_records:
        yield Record("", place, f"is a text file, which has no field '{fields.messages or fields.prompt}'")
    elif kind == "jsonl" or fields.txt == "line":
        yield from _lines(_all_lines(file), place, fields, 1, kind)
    elif fields.txt == "file":
        yield _text(file.read(), place)
    else:
        separators = (b"\n\n", b"\n\r\n") if fields.txt == "paragraph" else (fields.txt.encode("utf-8"),)
        for number, raw in enumerate(_separated(file, separators), start=1):
            yield _text(raw.strip(b"\r\n"), f"{place} document {number}")


def _text(raw: bytes, place: str) -> Record:
    try:
        return Record(raw.decode("utf-8").removeprefix(_BOM), place)
    except UnicodeDecodeError as error:
        return Record("", place, f"is not UTF-8 text: {error}")


def _separated(file: IO[bytes], separators: tuple[bytes, ...]) -> Iterator[bytes]:
    """The pieces of a file between separators."""
    longest = max(map(len, separators))
    buffer, searched = bytearray(), 0
    while chunk := file.read(1 << 20):
        buffer += chunk
        begin = 0
        while True:
            places = [(at, len(text)) for text in separators if (at := buffer.find(text, max(begin, searched))) >= 0]
            if not places:
                break
            at, length = min(places)
            yield bytes(buffer[begin:at])
            begin = at + length
        del buffer[:begin]
        searched = max(0, len(buffer) - longest + 1)
    yield bytes(buffer)


def _read_json(raw: bytes, place: str, fields: Fields) -> Iterator[Record]:
    """The records of a json file: an array of records, or one record."""
    try:
        content = _parse(raw)
    except (ValueError, RecursionError) as error:
        yield Record("", place, f"is not JSON: {error}")
        return
    if isinstance(content, list):
        yield from (_record(item, f"{place} record {n}", fields) for n, item in enumerate(content, start=1))
    else:
        yield _record(content, place, fields)


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


def _lines(
    lines: Iterator[tuple[int, bytes]], place: str, fields: Fields, first: int | None, kind: str
) -> Iterator[Record]:
    """Records of lines of jsonl or text; ``first``: number of the first line, None if only byte offsets are known."""
    for count, (at, line) in enumerate(lines):
        if line.strip():
            where = f"{place} byte {at}" if first is None else f"{place} line {first + count}"
            if isinstance(line, _Giant):
                yield Record("", where, f"is a line of {line.whole} bytes, more than {LONGEST_LINE}")
            else:
                yield _text(line.rstrip(b"\r\n"), where) if kind == "txt" else _json_line(line, where, fields)


def _json_line(line: bytes, place: str, fields: Fields) -> Record:
    try:
        return _record(_parse(line), place, fields)
    except (ValueError, RecursionError) as error:
        return Record("", place, f"is not a JSON object with a field '{fields.main}': {error!r}")


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError as error:
        if "integer string conversion" not in str(error):
            raise
        return json.loads(raw, parse_int=str)  # a number of more than 4,300 digits in another field


def _record(record: Any, place: str, fields: Fields) -> Record:
    needed = [fields.main, *([fields.prompt] if fields.prompt else [])]
    for name in needed:
        if not isinstance(record, dict) or name not in record:
            held = f"; its fields: {', '.join(map(str, record))[:200]}" if isinstance(record, dict) else ""
            return Record("", place, f"is not a JSON object with a field '{name}'{held}")
    return _document(
        place, fields, *(record.get(name) for name in (fields.main, fields.prompt, fields.id, fields.source))
    )


def _document(place: str, fields: Fields, content: Any, prompt: Any, id_: Any, source: Any) -> Record:
    """The record of the values of its fields."""
    id_, source = _name(id_), _name(source)
    if fields.messages:
        if not _is_conversation(content):
            return Record("", place, f"field '{fields.messages}' is not a list of messages with a role")
        return Record(json.dumps(content, ensure_ascii=False, default=str), place, None, id_, source)
    parts = ("" if prompt is None else prompt, "" if content is None else content)  # null is an empty text
    for name, text in zip((fields.prompt, fields.text), parts, strict=True):
        if not isinstance(text, str):
            return Record("", place, f"field '{name}' is not text")
        if not encodable(text):
            return Record("", place, f"field '{name}' has half a surrogate pair, which is no text")
    if not fields.prompt or not parts[1].strip():
        return Record(parts[1], place, None, id_, source)
    return Record("".join(parts), place, None, id_, source, segments=parts)


def _is_conversation(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(each, dict) and "role" in each for each in content)


def _name(value: Any) -> str | None:
    """An id or a source: a text or a number."""
    text = str(value) if isinstance(value, str | int) else None
    return text if text is None or encodable(text) else None


def _parquet_parts(name: str) -> Iterator[Part]:
    import pyarrow
    import pyarrow.parquet

    try:
        with sources.open_file(name) as stream, pyarrow.parquet.ParquetFile(stream) as file:
            sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    except pyarrow.ArrowException as error:
        raise UserError(f"{name} cannot be read: {error}") from error
    start = 0
    for stop in range(1, len(sizes) + 1):
        total = sum(sizes[start:stop])
        if total >= PART_BYTES or stop == len(sizes):
            yield Part(name, start, stop, total, "parquet")
            start = stop


def _read_parquet(part: Part, fields: Fields) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    if part.packing:
        raise UserError(f"{part.file} is a compressed parquet file: decompress it, as parquet has its own compression")
    try:
        with sources.open_file(part.file) as stream, pyarrow.parquet.ParquetFile(stream) as file:
            columns = _columns(file.schema_arrow, part.file, fields)
            row = sum(file.metadata.row_group(group).num_rows for group in range(part.start))
            groups = list(range(part.start, part.stop))
            for batch in file.iter_batches(columns=columns, batch_size=1024, row_groups=groups):
                empty, wanted = [None] * len(batch), (fields.main, fields.prompt, fields.id, fields.source)
                values = (batch.column(name) if name in columns else empty for name in wanted)
                for cells in zip(*values, strict=True):
                    yield _parquet_record(f"{part.file} row {row}", fields, cells)
                    row += 1
    except pyarrow.ArrowException as error:
        raise UserError(f"{part.file} cannot be read: {error}") from error


def _columns(schema: Any, file: str, fields: Fields) -> list[str]:
    """The fields that are columns of a parquet file. ``UserError`` if the text is missing, repeated or no text."""
    from pyarrow import types

    wanted = (fields.main, fields.prompt, fields.id, fields.source)
    columns = list(dict.fromkeys(name for name in wanted if name is not None and name in schema.names))
    for needed in filter(None, (fields.main, fields.prompt)):
        if needed not in columns:
            raise UserError(f"{file} has no column '{needed}'; its columns: {', '.join(schema.names)}")
    for name in columns:
        if schema.names.count(name) > 1:
            raise UserError(f"{file} has {schema.names.count(name)} columns named '{name}': rename all but one")
    if fields.messages:
        return columns
    kind = schema.field(fields.text).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    is_text = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    if not any(check(value) for check in is_text):
        raise UserError(f"{file}: column '{fields.text}' is {kind}, not text")
    return columns


def _parquet_record(place: str, fields: Fields, cells: Iterable[Any]) -> Record:
    try:
        values = [None if cell is None else cell.as_py() for cell in cells]
    except UnicodeDecodeError as error:
        return Record("", place, f"is not UTF-8 text: {error}")
    return _document(place, fields, *values)
