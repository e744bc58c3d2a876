"""Units of work: parts of files that a process reads, filters, splits and tokenises.

The directory of a unit is renamed to its final name when the unit is complete. So any process can do any unit, and an
interrupted unit is repeated. The content of a unit depends on its files only:

- ``train.bin``, ``heldout.bin``: tokens of the documents, with EOS after each document;
- ``train.loss``, ``heldout.loss``: a byte for each of them that says whether it counts; empty where all do;
- ``train.npy``, ``heldout.npy``: a ``DOCUMENT`` per document; ``train.parquet``, ``heldout.parquet``: id and source;
- ``bad.jsonl``: bad records with their locations; ``facts.json``: counts of the records.
"""

import functools
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet

from armd_scale import packing
from armd_scale.data import chat, conversations, readers, shards
from armd_scale.data import tokenizer as tokenizers
from armd_scale.data.readers import PART_BYTES, Part, Record
from armd_scale.data.shards import Place
from armd_scale.data.tokenizer import token_type
from armd_scale.errors import UserError
from armd_scale.files import write_atomically
from data_pipeline.documents import PADDING
from data_pipeline.holdout import SPLITS, Rule

DOCUMENT = np.dtype([("tokens", "<u4"), ("bytes", "<u8"), ("hash", "<u8", 2)])
"""A document: number of tokens with EOS, number of UTF-8 bytes, and the first half of the SHA-256."""
REMOVED = ("bad", "empty", "short", "long", "ignored")
"""Reasons to remove a record; ``ignored``: a member of a tar that is no text."""
_BATCH = 1 << 20  # characters tokenised at a time
_EXCERPT = 200  # characters kept of the problem of a bad record


class Job(NamedTuple):
    """Settings of all units; ``units``: source (``text`` or ``heldout_text``) and parts of each unit."""

    folder: str
    fields: readers.Fields
    heldout: Rule
    """The part of ``text`` that is held out."""
    min_characters: int
    max_characters: int | None
    units: list[tuple[str, list[Part]]]
    length: int | None = None
    """Tokens of a sample."""

    def place(self, number: int) -> Path:
        """The directory of a unit."""
        return Path(self.folder) / "work" / f"unit-{number:06d}"

    def save(self) -> None:
        """Write the job to ``work/job.json``."""
        path = Path(self.folder) / "work/job.json"
        path.write_text(json.dumps(self._asdict()), encoding="utf-8")

    @staticmethod
    def load(folder: str) -> "Job":
        """The job of a directory."""
        fields = json.loads((Path(folder) / "work/job.json").read_text(encoding="utf-8"))
        units = [(source, [Part(*part) for part in parts]) for source, parts in fields["units"]]
        named = {"fields": readers.Fields(*fields["fields"]), "heldout": Rule(*fields["heldout"]), "units": units}
        return Job(**fields | named)


def cut(files: dict[str, list[str]], fields: readers.Fields) -> list[tuple[str, list[Part]]]:
    """Group the files of each source into units of about ``PART_BYTES``: large files are split, small files grouped."""
    units: list[tuple[str, list[Part]]] = []
    for source, names in files.items():
        parts: list[Part] = []
        for part in readers.parts(names, fields):
            if parts and sum(p.size for p in parts) + part.size > PART_BYTES:
                units.append((source, parts))
                parts = []
            parts.append(part)
        if parts:
            units.append((source, parts))
    return units


def tokenise(folder: str, number: int) -> dict[str, Any]:
    """Tokenise a unit unless it is complete; returns its facts."""
    job, tokenizer = _tools(folder)
    final = job.place(number)
    if not final.is_dir():
        partial = final.with_name(f".{final.name}.{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _tokenise(job, number, tokenizer, partial)
        os.replace(partial, final)
    return json.loads((final / "facts.json").read_text(encoding="utf-8"))


def _tools(folder: str) -> tuple[Job, tokenizers.Tokenizer]:
    return _load_tools(folder, (Path(folder) / "work/job.json").stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _load_tools(folder: str, written: int) -> tuple[Job, tokenizers.Tokenizer]:
    """``written``: modification time of the job, so that a new job is not served from the cache."""
    return Job.load(folder), tokenizers.load(Path(folder) / "tokenizer")


def _template(job: Job, tokenizer: tokenizers.Tokenizer) -> chat.ChatTemplate | None:
    """The chat template, for data of conversations."""
    if job.fields.messages is None:
        return None
    template = chat.load(tokenizer)
    assert template, "begin() refuses tokenizers without one"
    return template


def _digest(raw: bytes) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(raw).digest()[:16], "<u8")


def _tokenise(job: Job, number: int, tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    counts: Counter[str] = Counter()
    source, parts = job.units[number]
    with (folder / "bad.jsonl").open("w", encoding="utf-8") as bad:
        records = _usable(job, parts, counts, bad, _template(job, tokenizer))
        eos = np.array([tokenizer.eos_id], token_type(tokenizer.vocab_size))
        writers = {split: _Writer(folder, split, eos) for split in SPLITS}
        for batch in _batches(_pieces(job, source, records)):
            for piece, (tokens, counted) in zip(batch, _encode(job, tokenizer, batch), strict=True):
                text, record = piece.text, piece.record
                raw = ("".join(record.segments) if record.segments else text).encode("utf-8")
                names = record.id, record.source or piece.file
                writers[piece.split].add(len(raw), _digest(raw), tokens, counted, *names)
                counts["tokens"] += len(tokens) + 1
                counts["bytes"] += len(raw)
    for split, writer in writers.items():
        counts[split] = writer.close()
    facts = {name: counts[name] for name in ("records", *SPLITS, *REMOVED, "tokens", "bytes")}
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def _encode(
    job: Job, tokenizer: tokenizers.Tokenizer, batch: list["_Piece"]
) -> Iterable[tuple[np.ndarray, np.ndarray | None]]:
    """Tokens of pieces, and which of them count; None where all do."""
    if not job.fields.in_records:
        return ((tokens, None) for tokens in tokenizer.encode_batch([piece.text for piece in batch]))
    special = job.fields.messages is not None
    parts = (piece.record.segments or ("", piece.text) for piece in batch)
    return (conversations.encode(tokenizer, each, special) for each in parts)


class Stream:
    """The concatenated tokens of all units of a split, without duplicate documents (``drop_duplicates``)."""

    def __init__(self, folder: str, split: str) -> None:
        job, tokenizer = _tools(folder)
        self._job, self._split, self._dtype = job, split, token_type(tokenizer.vocab_size)
        documents = [self.documents(number) for number in range(len(job.units))]
        self._first = np.cumsum([0, *map(len, documents)])
        self._files: dict[tuple[int, str], np.ndarray] = {}
        path = _keep_path(folder, split)
        self._keep = np.load(path, mmap_mode="r") if path.is_file() else None
        self._starts = np.cumsum([0, *(self._kept(n, docs)["tokens"].sum() for n, docs in enumerate(documents))])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def documents(self, number: int) -> np.ndarray:
        """The documents of a unit, of type ``DOCUMENT``."""
        return np.load(self._job.place(number) / f"{self._split}.npy")

    def totals(self) -> dict[str, int]:
        """Number and UTF-8 bytes of the documents."""
        kept = [self._kept(number, self.documents(number)) for number in range(len(self._job.units))]
        return {"documents": sum(map(len, kept)), "bytes": sum(int(docs["bytes"].sum()) for docs in kept)}

    def tables(self) -> Iterator[pyarrow.Table]:
        """Tables of the kept documents, unit by unit: id, source, first token in the stream, tokens, bytes."""
        for number in range(len(self._job.units)):
            documents = self._kept(number, self.documents(number))
            tokens = documents["tokens"].astype(np.int64)
            start = int(self._starts[number]) + np.cumsum(tokens) - tokens
            columns = {"start": start, "tokens": tokens, "bytes": documents["bytes"].astype(np.int64)}
            table = self.names(number)
            for name, values in columns.items():
                table = table.append_column(name, pyarrow.array(values))
            yield table

    def _kept(self, number: int, documents: np.ndarray) -> np.ndarray:
        return documents if self._keep is None else documents[self._mask(number)]

    def _mask(self, number: int) -> np.ndarray:
        assert self._keep is not None
        return self._keep[self._first[number] : self._first[number + 1]]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop``."""
        return self._read(start, stop, "bin")

    def _read(self, start: int, stop: int, kind: str) -> np.ndarray:
        pieces = [np.empty(0, self._type(kind))]
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            upto = min(stop, int(self._starts[number + 1]))
            if upto > start:
                first = int(self._starts[number])
                pieces.append(self._tokens(number, kind)[start - first : upto - first])
                start = upto
            number += 1
        return np.concatenate(pieces)

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """Tokens of every document."""
        kept = (self._kept(number, self.documents(number))["tokens"] for number in range(len(self._job.units)))
        return np.concatenate([np.empty(0, np.int64), *kept]).astype(np.int64)

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """The first token of every document."""
        return np.cumsum(self.sizes) - self.sizes

    def flags(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Flags of the tokens ``start`` to ``stop`` (``shards``)."""
        firsts = np.zeros(stop - start, dtype=bool)
        firsts[self.starts[slice(*np.searchsorted(self.starts, [start, stop]))] - start] = True
        if not self._job.fields.in_records:
            return {shards.DOCUMENTS: firsts}
        return {shards.DOCUMENTS: firsts, shards.LOSS: self._read(start, stop, "loss").astype(bool)}

    @property
    def counted(self) -> int:
        """Tokens that count in the loss."""
        units = range(len(self._job.units)) if self._job.fields.in_records else ()
        return sum(int(self._tokens(number, "loss").sum()) for number in units) if units else len(self)

    def cut_documents(self, length: int) -> int:
        """Documents that do not lie in a single sample of ``length`` tokens."""
        return int((self.starts // length < (self.starts + self.sizes - 1) // length).sum())

    def names(self, number: int) -> pyarrow.Table:
        """Id and source of the kept documents of a unit."""
        table = pyarrow.parquet.read_table(self._job.place(number) / f"{self._split}.parquet")
        return table if self._keep is None else table.filter(pyarrow.array(np.asarray(self._mask(number))))

    def _type(self, kind: str) -> np.dtype:
        return self._dtype if kind == "bin" else np.dtype(np.uint8)

    def _file(self, number: int, kind: str) -> np.ndarray:
        """The file of a unit with this suffix, duplicate documents included."""
        if (number, kind) not in self._files:
            path, dtype = self._job.place(number) / f"{self._split}.{kind}", self._type(kind)
            empty = not path.stat().st_size
            self._files[number, kind] = np.empty(0, dtype) if empty else np.memmap(path, dtype, mode="r")
        return self._files[number, kind]

    def _tokens(self, number: int, kind: str) -> np.ndarray:
        """The file of a unit without duplicate documents."""
        tokens = self._file(number, kind)
        if self._keep is None:
            return tokens
        return tokens[np.repeat(self._mask(number), self.documents(number)["tokens"])]

    @functools.cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """Unit of every document, and its first token in the files of the unit."""
        units, firsts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for number in range(len(self._job.units)):
            documents = self.documents(number)
            sizes = documents["tokens"].astype(np.int64)
            firsts.append(self._kept(number, np.cumsum(sizes) - sizes))
            units.append(np.full(len(firsts[-1]), number))
        return np.concatenate(units), np.concatenate(firsts)

    def piece(self, document: int, begin: int, size: int) -> tuple[np.ndarray, np.ndarray | None]:
        """``size`` tokens of a document from token ``begin`` on, and which of them count; None where all do."""
        number, first = (int(values[document]) for values in self._places)
        part = slice(first + begin, first + begin + size)
        counted = self._file(number, "loss")[part].astype(bool) if self._job.fields.in_records else None
        return self._file(number, "bin")[part], counted


def write_shard(folder: str, split: str, place: Place, length: int) -> dict[str, Any]:
    """Write a shard of a split unless it exists; returns its entry for the index."""
    known = Path(folder) / "work" / f"{split}-{place.name}.json"
    if not known.is_file():
        stream, part = open_packed(folder, split), (place.start, place.stop)
        facts = shards.write_shard(Path(folder) / split, place, stream.read(*part), length, stream.flags(*part))
        write_atomically(known, json.dumps(facts))
    return json.loads(known.read_text(encoding="utf-8"))


def open_stream(folder: str, split: str) -> Stream:
    """The stream of a split, after the units are merged. Cached in the process."""
    return _load_stream(folder, split, (Path(folder) / "work/job.json").stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _load_stream(folder: str, split: str, written: int) -> Stream:
    return Stream(folder, split)


class Packed:
    """The documents of a stream packed into samples by best fit, in the place of the stream itself.

    ``pieces``: rows of document, first token in it, tokens, and first token in the packed samples.
    """

    def __init__(self, stream: Stream, pieces: np.ndarray, length: int, eos_id: int) -> None:
        self._stream, self._pieces, self._length, self._eos_id = stream, pieces, length, eos_id
        self.totals, self.counted = stream.totals, stream.counted

    def __len__(self) -> int:
        return -(-int(self._pieces[-1, 2:].sum()) // self._length) * self._length if len(self._pieces) else 0

    @property
    def padding(self) -> int:
        """Tokens behind the last documents of samples."""
        return len(self) - int(self._stream.sizes.sum())

    def cut_documents(self, length: int) -> int:
        """Documents that are longer than a sample."""
        return int((self._stream.sizes > length).sum())

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop``, which are whole samples; EOS behind the documents of a sample."""
        out = np.full(stop - start, self._eos_id, self._stream.read(0, 0).dtype)
        for document, begin, size, at in self._inside(start, stop):
            out[at - start : at - start + size] = self._stream.piece(document, begin, size)[0]
        return out

    def flags(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Flags of these tokens; padding is a document of its own that does not count in the loss."""
        firsts, counted = (np.zeros(stop - start + 1, dtype=bool) for _ in range(2))
        for document, begin, size, at in self._inside(start, stop):
            firsts[[at - start, at - start + size]] = True
            those = self._stream.piece(document, begin, size)[1]
            counted[at - start : at - start + size] = True if those is None else those
        return {shards.DOCUMENTS: firsts[:-1], shards.LOSS: counted[:-1]}

    def tables(self) -> Iterator[pyarrow.Table]:
        """Tables of the pieces and of the padding, as ``Stream.tables``."""
        documents = pyarrow.concat_tables(self._stream.tables())
        number, begin, size, at = self._pieces.T
        table = documents.take(pyarrow.array(number))
        columns = {"start": at, "tokens": size, "bytes": np.where(begin, 0, table["bytes"].to_numpy())}
        for name, values in columns.items():
            table = table.set_column(table.schema.get_field_index(name), name, pyarrow.array(values))
        behind = at + size
        padded = behind != np.append(at[1:], len(self))
        rest = {"start": behind[padded], "tokens": np.append(at[1:], len(self))[padded] - behind[padded]}
        rest["bytes"] = np.zeros_like(rest["start"])
        rows = [
            {"id": None, "source": PADDING} | dict(zip(rest, row, strict=True))
            for row in zip(*rest.values(), strict=True)
        ]
        padding = pyarrow.Table.from_pylist(rows, schema=table.schema)
        yield pyarrow.concat_tables([table, padding]).sort_by("start")

    def _inside(self, start: int, stop: int) -> list[list[int]]:
        return self._pieces[slice(*np.searchsorted(self._pieces[:, 3], [start, stop]))].tolist()


def pack(folder: str, split: str, length: int) -> None:
    """Plan the samples of a split by best fit, after the units are merged."""
    samples = packing.best_fit(open_stream(folder, split).sizes, length)
    pieces = []
    for number, sample in enumerate(samples):
        at = number * length
        for document, begin, stop in sample:
            pieces.append((document, begin, stop - begin, at))
            at += stop - begin
    path = _pieces_path(folder, split)
    partial = path.with_suffix(".partial.npy")
    np.save(partial, np.array(pieces, dtype=np.int64).reshape(-1, 4))
    os.replace(partial, path)


def open_packed(folder: str, split: str) -> Stream | Packed:
    """What the samples of a split are cut from: its stream, or its documents packed by best fit. Cached."""
    return _load_packed(folder, split, (Path(folder) / "work/job.json").stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _load_packed(folder: str, split: str, written: int) -> Stream | Packed:
    stream, path = open_stream(folder, split), _pieces_path(folder, split)
    if not path.is_file():
        return stream
    job, tokenizer = _tools(folder)
    assert job.length is not None
    return Packed(stream, np.load(path, mmap_mode="r"), job.length, tokenizer.eos_id)


def _pieces_path(folder: str, split: str) -> Path:
    return Path(folder) / "work" / f"{split}.pieces.npy"


def drop_duplicates(folder: str) -> dict[str, int]:
    """Mark duplicate documents; returns their number in each split. Of equal documents a held-out copy is kept.

    Needs about 40 bytes of memory per document.
    """
    job = Job.load(folder)
    hashes = {
        split: np.concatenate([np.load(job.place(n) / f"{split}.npy")["hash"] for n in range(len(job.units))])
        for split in SPLITS
    }
    order = np.concatenate([hashes["heldout"], hashes["train"]])
    first = np.zeros(len(order), dtype=bool)
    first[np.unique(order, axis=0, return_index=True)[1]] = True
    held = len(hashes["heldout"])
    kept = {"heldout": first[:held], "train": first[held:]}
    for split, keep in kept.items():
        partial = _keep_path(folder, split).with_suffix(".partial.npy")
        np.save(partial, keep)
        os.replace(partial, _keep_path(folder, split))
    return {split: int((~keep).sum()) for split, keep in kept.items()}


def _keep_path(folder: str, split: str) -> Path:
    return Path(folder) / "work" / f"{split}.keep.npy"


class _Writer:
    """Writes the documents of a unit in a split."""

    def __init__(self, folder: Path, split: str, eos: np.ndarray) -> None:
        self._eos, self._dtype = eos.tobytes(), eos.dtype
        self._tokens, self._counted = ((folder / f"{split}.{kind}").open("wb") for kind in ("bin", "loss"))
        self._path = folder / f"{split}.npy"
        self._documents: list[tuple[int, int, np.ndarray]] = []
        self._names: tuple[list[str | None], list[str]] = ([], [])

    def add(
        self,
        size: int,
        digest: np.ndarray,
        tokens: np.ndarray,
        counted: np.ndarray | None,
        id_: str | None,
        source: str,
    ) -> None:
        self._tokens.write(tokens.astype(self._dtype, copy=False).tobytes())
        self._tokens.write(self._eos)
        if counted is not None:
            self._counted.write(np.append(counted, True).astype(np.uint8).tobytes())
        self._documents.append((len(tokens) + 1, size, digest))
        self._names[0].append(id_)
        self._names[1].append(source)

    def close(self) -> int:
        self._tokens.close()
        self._counted.close()
        np.save(self._path, np.array(self._documents, dtype=DOCUMENT))
        columns = [pyarrow.array(names, pyarrow.string()) for names in self._names]
        table = pyarrow.table(dict(zip(("id", "source"), columns, strict=True)))
        pyarrow.parquet.write_table(table, self._path.with_suffix(".parquet"))
        return len(self._documents)


class _Piece(NamedTuple):
    """A document of a split: a record, or its part that is not held out or held out."""

    split: str
    text: str
    record: Record
    file: str
    """Name of the file, for the source."""


def _usable(
    job: Job, parts: list[Part], counts: Counter[str], bad: Any, template: chat.ChatTemplate | None
) -> Iterator[tuple[Record, str]]:
    """The usable records with the names of their files; counts all records."""
    for part in parts:
        file = part.file if part.file == readers.BUILTIN else part.file.rpartition("/")[2]
        file = file.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        for record in readers.read(part, job.fields):
            counts["records"] += 1
            if template and not record.problem and record.text.strip():
                try:
                    record = record._replace(segments=(*conversations.segments(json.loads(record.text), template),))
                except UserError as error:
                    record = record._replace(problem=str(error))
            length = len(record.text)
            if record.ignored:
                counts["ignored"] += 1
            elif record.problem:
                counts["bad"] += 1
                bad.write(json.dumps({"place": record.place, "problem": record.problem[:_EXCERPT]}) + "\n")
            elif not record.text.strip():
                counts["empty"] += 1
            elif length < job.min_characters:
                counts["short"] += 1
            elif job.max_characters is not None and length > job.max_characters:
                counts["long"] += 1
            else:
                yield record, file


def _pieces(job: Job, source: str, records: Iterable[tuple[Record, str]]) -> Iterator[_Piece]:
    for record, file in records:
        texts = ("", record.text) if source == "heldout_text" else job.heldout.split(record.text)
        for split, text in zip(SPLITS, texts, strict=True):
            if text.strip():
                yield _Piece(split, text, record, file)


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size > _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
