"""Units of work: parts of files that a process reads, filters, splits and tokenises.

The directory of a unit is renamed to its final name when the unit is complete. So any process can do any unit, and an
interrupted unit is repeated. The content of a unit depends on its files only:

- ``train.bin``, ``heldout.bin``: tokens of the documents, with EOS after each document;
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

from armd_scale.data import readers, shards
from armd_scale.data import tokenizer as tokenizers
from armd_scale.data.readers import PART_BYTES, Part, Record
from armd_scale.data.shards import Place
from armd_scale.data.tokenizer import token_type
from armd_scale.files import write_atomically
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


def _digest(raw: bytes) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(raw).digest()[:16], "<u8")


def _tokenise(job: Job, number: int, tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    counts: Counter[str] = Counter()
    source, parts = job.units[number]
    with (folder / "bad.jsonl").open("w", encoding="utf-8") as bad:
        records = _usable(job, parts, counts, bad)
        eos = np.array([tokenizer.eos_id], token_type(tokenizer.vocab_size))
        writers = {split: _Writer(folder, split, eos) for split in SPLITS}
        for batch in _batches(_pieces(job, source, records)):
            encoded = tokenizer.encode_batch([piece.text for piece in batch])
            for (split, text, record, file), tokens in zip(batch, encoded, strict=True):
                raw = text.encode("utf-8")
                writers[split].add(len(raw), _digest(raw), tokens, record.id, record.source or file)
                counts["tokens"] += len(tokens) + 1
                counts["bytes"] += len(raw)
    for split, writer in writers.items():
        counts[split] = writer.close()
    facts = {name: counts[name] for name in ("records", *SPLITS, *REMOVED, "tokens", "bytes")}
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


class Stream:
    """The concatenated tokens of all units of a split, without duplicate documents (``drop_duplicates``)."""

    def __init__(self, folder: str, split: str) -> None:
        job, tokenizer = _tools(folder)
        self._job, self._split, self._dtype = job, split, token_type(tokenizer.vocab_size)
        documents = [self.documents(number) for number in range(len(job.units))]
        self._first = np.cumsum([0, *map(len, documents)])
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
        pieces = [np.empty(0, self._dtype)]
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            upto = min(stop, int(self._starts[number + 1]))
            if upto > start:
                first = int(self._starts[number])
                pieces.append(self._tokens(number)[start - first : upto - first])
                start = upto
            number += 1
        return np.concatenate(pieces)

    def names(self, number: int) -> pyarrow.Table:
        """Id and source of the kept documents of a unit."""
        table = pyarrow.parquet.read_table(self._job.place(number) / f"{self._split}.parquet")
        return table if self._keep is None else table.filter(pyarrow.array(np.asarray(self._mask(number))))

    def _tokens(self, number: int) -> np.ndarray:
        path = self._job.place(number) / f"{self._split}.bin"
        tokens = np.memmap(path, self._dtype, mode="r") if path.stat().st_size else np.empty(0, self._dtype)
        if self._keep is None:
            return tokens
        return tokens[np.repeat(self._mask(number), self.documents(number)["tokens"])]


def write_shard(folder: str, split: str, place: Place, length: int) -> dict[str, Any]:
    """Write a shard of a split unless it exists; returns its entry for the index."""
    known = Path(folder) / "work" / f"{split}-{place.name}.json"
    if not known.is_file():
        stream = open_stream(folder, split)
        facts = shards.write_shard(Path(folder) / split, place, stream.read(place.start, place.stop), length)
        write_atomically(known, json.dumps(facts))
    return json.loads(known.read_text(encoding="utf-8"))


def open_stream(folder: str, split: str) -> Stream:
    """The stream of a split, after the units are merged. Cached in the process."""
    return _load_stream(folder, split, (Path(folder) / "work/job.json").stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _load_stream(folder: str, split: str, written: int) -> Stream:
    return Stream(folder, split)


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
        self._eos = eos.tobytes()
        self._tokens = (folder / f"{split}.bin").open("wb")
        self._path = folder / f"{split}.npy"
        self._documents: list[tuple[int, int, np.ndarray]] = []
        self._names: tuple[list[str | None], list[str]] = ([], [])

    def add(self, size: int, digest: np.ndarray, tokens: np.ndarray, id_: str | None, source: str) -> None:
        self._tokens.write(tokens.tobytes())
        self._tokens.write(self._eos)
        self._documents.append((len(tokens) + 1, size, digest))
        self._names[0].append(id_)
        self._names[1].append(source)

    def close(self) -> int:
        self._tokens.close()
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


def _usable(job: Job, parts: list[Part], counts: Counter[str], bad: Any) -> Iterator[tuple[Record, str]]:
    """The usable records with the names of their files; counts all records."""
    for part in parts:
        file = part.file if part.file == readers.BUILTIN else part.file.rpartition("/")[2]
        file = file.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        for record in readers.read(part, job.fields):
            counts["records"] += 1
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
