"""Documents out of files: txt, jsonl, both packed with gz or zst, and parquet.

- ``documents``: all documents of a list of files, folders and globs, in sorted order;
- ``builtin:python``: real English and code that every Python installation carries.
"""

import ast
import builtins
import functools
import glob
import gzip
import importlib
import io
import json
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import zstandard

from armd_scale.errors import UserError

BUILTIN = "builtin:python"
_FORMATS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".txt.zst", ".jsonl.zst", ".parquet")
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}


def documents(sources: list[str], field: str = "text") -> Iterator[str]:
    """All non-empty documents of ``sources``, in the order of the sorted file names.

    A txt file is one document, and so is a named file of no known format; a jsonl line and a parquet row hold one in
    ``field``. Raises ``UserError`` that names the file and the record for anything that cannot be read.
    """
    for source in files(sources):
        texts = python_documents() if source == BUILTIN else _read(Path(source), field)
        yield from (text for text in texts if text.strip())


def files(sources: list[str]) -> list[str]:
    """The files that ``sources`` stand for, each once, in the order in which they are read."""
    expanded = (name for source in sources for name in ([source] if source == BUILTIN else map(str, _files(source))))
    return list(dict.fromkeys(expanded))


@functools.cache
def python_documents() -> tuple[str, ...]:
    """The language reference and the docstrings of the standard library, each with the head that it documents.

    One document a reference topic and one a module, sorted by name; a docstring that was seen before is left out.
    The same Python gives the same text.
    """
    return tuple(_python_documents())


def _python_documents() -> Iterator[str]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    seen: set[str] = set()
    for name in sorted(topics):
        if topics[name] not in seen:
            seen.add(topics[name])
            yield topics[name].strip() + "\n"
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if not _NOT_LIBRARY.intersection(path.relative_to(root).parts):
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, ValueError, OSError):
                continue  # test data of the standard library, in odd encodings
            module = ".".join(path.relative_to(root).with_suffix("").parts)
            text = _documented(module, _heads(tree), seen)
            if text:
                yield text
    for name in sorted({"builtins", *sys.builtin_module_names} - {"__main__"}):
        compiled = builtins if name == "builtins" else importlib.import_module(name)
        text = _documented(name, _compiled_heads(compiled), seen)
        if text:
            yield text


def _heads(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(head, docstring) of a module and of all that it defines, in the order of the source."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if not docstring:
            continue
        if isinstance(node, ast.Module):
            yield "", docstring
        elif isinstance(node, ast.ClassDef):
            yield f"class {node.name}:", docstring
        else:
            yield f"def {node.name}({ast.unparse(node.args)}):", docstring


def _compiled_heads(module: object) -> Iterator[tuple[str, str]]:
    """(name, docstring) of a module written in C and of all that it defines."""
    yield "", getattr(module, "__doc__", None) or ""
    for name, value in sorted(vars(module).items()):
        docstring = getattr(value, "__doc__", None)
        if name.startswith("_") or not callable(value) or not isinstance(docstring, str):
            continue
        yield name, docstring
        if isinstance(value, type):
            for method, entry in sorted(vars(value).items()):
                docstring = getattr(entry, "__doc__", None)
                if not method.startswith("_") and isinstance(docstring, str):
                    yield f"{name}.{method}", docstring


def _documented(name: str, heads: Iterator[tuple[str, str]], seen: set[str]) -> str:
    parts = []
    for head, docstring in heads:
        docstring = docstring.strip()
        if docstring and docstring not in seen:
            seen.add(docstring)
            parts.append(f"{head}\n{docstring}\n" if head else f"{docstring}\n")
    return f"module {name}\n\n" + "\n".join(parts) if parts else ""


def _files(source: str) -> list[Path]:
    path = Path(source)
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = [p for p in path.rglob("*") if p.is_file() and p.name.endswith(_FORMATS)]
    else:
        found = [Path(name) for name in glob.glob(source, recursive=True)]
    if not found:
        raise UserError(f"there is no text at {source}: give files, a folder or a glob of {', '.join(_FORMATS)}")
    return sorted(found)


def _read(path: Path, field: str) -> Iterator[str]:
    if path.name.endswith(".parquet"):
        yield from _read_parquet(path, field)
        return
    try:
        with _open(path) as stream:
            if ".jsonl" in path.name:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        yield _record(path, number, line, field)
            else:
                yield stream.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _open(path: Path) -> IO[bytes]:
    if path.name.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(path, "rb"))
    if path.name.endswith(".zst"):
        return io.BufferedReader(_ZstdStream(path), 1 << 20)
    return path.open("rb")


class _ZstdStream(io.RawIOBase):
    """The text of a zst file of any number of frames; damage and a missing end are errors of reading."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
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
                    raise OSError("it ends in the middle of a zstd frame")
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


def _record(path: Path, number: int, line: bytes, field: str) -> str:
    try:
        text = json.loads(line)[field]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} line {number} is not a JSON object with a field '{field}': {error!r}") from error
    if not isinstance(text, str):
        raise UserError(f"{path} line {number}: field '{field}' is not text")
    if not encodable(text):
        raise UserError(f"{path} line {number}: field '{field}' has half a surrogate pair, which is no text")
    return text


def encodable(text: str) -> bool:
    """Whether a string is text: JSON and command lines can smuggle in lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise UserError(f"{path} has no column '{field}'; its columns: {', '.join(file.schema_arrow.names)}")
            kind = file.schema_arrow.field(field).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UserError(f"{path}: column '{field}' is {kind}, not text")
            for batch in file.iter_batches(columns=[field], batch_size=1024):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
