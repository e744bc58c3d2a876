"""Packed samples in WebDataset tar shards with an index, written once and read at random.

A sample is a ``.npy`` member of N tokens, and a member for each kind of flags of its tokens (``numpy.packbits``):

- ``documents.npy``: the first tokens of documents;
- ``loss.npy``: tokens that count in the loss, where not all do.

All samples of a split have the same length, so every member of a shard has a fixed offset and is read without unpacking
the tar. Any WebDataset reader can stream the shards. The tokens after the last whole sample form a shorter sample in a
separate shard (``tail``), which evaluation scores.

``index.json`` is written last and atomically: a directory without index is not complete.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import webdataset

from armd_scale import packing
from armd_scale.config import RunConfig, with_vocabulary
from armd_scale.data.tokenizer import token_type
from armd_scale.errors import UserError
from armd_scale.files import sha256, write_atomically

INDEX = "index.json"
DOCUMENTS, LOSS = "documents", "loss"  # flags of the tokens
_BLOCK = 512  # unit of a tar file
_CHECKSUM = slice(148, 154)  # octal digits of the sum of a member's header


class Place(NamedTuple):
    """A shard and its range of tokens in the stream; the last shard can be the tail."""

    name: str
    start: int
    stop: int


def cut(tokens: int, length: int, per_shard: int) -> list[Place]:
    """Split a stream of documents + EOS into samples of ``length`` tokens, and these into shards, without loss."""
    whole, size = tokens // length * length, length * per_shard
    places = [
        Place(f"shard-{number:06d}.tar", start, min(start + size, whole))
        for number, start in enumerate(range(0, whole, size))
    ]
    return places if whole == tokens else [*places, Place("tail.tar", whole, tokens)]


def write_shard(
    folder: Path, place: Place, tokens: np.ndarray, length: int, flags: Mapping[str, np.ndarray] | None = None
) -> dict[str, Any]:
    """Write the tokens [stop - start] of a shard, and ``flags`` of them by name, atomically. Returns its entry for the
    index.

    The bytes of the file depend on the tokens and flags only.
    """
    rows = length if len(tokens) >= length else len(tokens)
    members = {"npy": tokens.reshape(-1, rows)}
    for name, values in (flags or {}).items():
        members[f"{name}.npy"] = np.packbits(values.reshape(-1, rows), axis=1)
    archive = _archive(members)
    partial = folder / f".{place.name}.{os.getpid()}"
    with partial.open("wb") as file:
        file.write(archive)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / place.name)
    digest = hashlib.sha256(archive).hexdigest()
    return {"name": place.name, "samples": len(members["npy"]), "size": len(archive), "sha256": digest}


def _archive(members: Mapping[str, np.ndarray]) -> memoryview:
    """The tar that WebDataset's writer would write for arrays [count, ...] of members by their extensions.

    WebDataset writes the first sample. The other samples differ in name, checksum and values, which numpy fills in.
    """
    count, first = len(members["npy"]), io.BytesIO()
    sizes = {name: _member(values.shape[1], values.dtype) for name, values in sorted(members.items())}
    with webdataset.TarWriter(first, mtime=0, encoder=False) as tar:
        content = {name: head + members[name][0].tobytes() for name, (head, _) in sizes.items()}
        tar.write({"__key__": f"{0:08d}", **content})
    whole = sum(size for _, size in sizes.values())
    archive = np.zeros(-(-(count * whole + 2 * _BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE, np.uint8)
    samples = archive[: count * whole].reshape(-1, whole)
    samples[:] = np.frombuffer(first.getvalue(), np.uint8, whole)
    digits = np.arange(count)[:, None] // 10 ** np.arange(7, -1, -1) % 10
    at = 0
    for name, (head, size) in sizes.items():
        member, values = samples[:, at : at + size], np.ascontiguousarray(members[name])
        start = _BLOCK + len(head)
        member[:, start : start + values[0].nbytes] = values.view(np.uint8)
        sums = int(bytes(member[0, _CHECKSUM]), 8) + digits.sum(axis=1)
        member[:, :8] += digits.astype(np.uint8)
        member[:, _CHECKSUM] = ord("0") + sums[:, None] // 8 ** np.arange(5, -1, -1) % 8
        at += size
    return archive.data


def write_index(folder: Path, written: list[dict[str, Any]], length: int, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the index of a directory of shards.

    ``facts``: ``tokens``, ``vocab_size``, names of the ``flags`` and further fields.
    """
    shards = [shard for shard in written if shard["name"] != "tail.tar"]
    tail = next((shard for shard in written if shard["name"] == "tail.tar"), None)
    index = {
        "format": 1,
        "length": length,
        "dtype": token_type(facts["vocab_size"]).name,
        "samples": sum(shard["samples"] for shard in shards),
        **facts,
        "shards": shards,
        "tail": {**tail, "tokens": facts["tokens"] % length} if tail else None,
    }
    write_atomically(folder / INDEX, json.dumps(index, indent=1))
    return index


class PackedDataset:
    """Random access to the samples of a split by number."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.index: dict[str, Any] = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
            self.length: int = self.index["length"]
            self._dtype = np.dtype(self.index["dtype"])
            self._starts = np.cumsum([0] + [shard["samples"] for shard in self.index["shards"]])
        except FileNotFoundError as error:
            raise UserError(f"{self.folder} is not a complete data set, as {INDEX} is missing: prepare it") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.folder / INDEX} is damaged ({error!r}): prepare the data again") from error
        self._flags: list[str] = self.index.get("flags", [])
        self._open: dict[tuple[int, str], np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token, EOS included."""
        return self.index["bytes"] / (self.index["tokens"] - self.index.get("padding", 0))

    def read(self, numbers: np.ndarray | Sequence[int]) -> np.ndarray:
        """Samples by number -> [len(numbers), N] int64."""
        return self._gather(numbers, "npy", self.length).astype(np.int64)

    def has(self, name: str) -> bool:
        """Whether there are flags of this name."""
        return name in self._flags

    def flags(self, numbers: np.ndarray | Sequence[int], name: str) -> np.ndarray:
        """Flags of samples by number -> [len(numbers), N] bool; all set where the data set has none of this name."""
        if not self.has(name):
            return np.ones((len(numbers), self.length), dtype=bool)
        packed = self._gather(numbers, f"{name}.npy", -(-self.length // 8))
        return np.unpackbits(packed, axis=1, count=self.length).astype(bool)

    def starts(self, numbers: np.ndarray | Sequence[int]) -> np.ndarray:
        """``packing.starts`` of samples by number -> [len(numbers), N] int64."""
        return packing.starts(self.flags(numbers, DOCUMENTS))

    def sequences(self, numbers: np.ndarray | Sequence[int], separate: bool) -> list[np.ndarray]:
        """Tokens of samples by number; ``separate``: those of each of their documents, without padding."""
        samples = self.read(numbers)
        return _split(samples, self.starts(numbers), self.flags(numbers, LOSS)) if separate else list(samples)

    def _gather(self, numbers: np.ndarray | Sequence[int], member: str, width: int) -> np.ndarray:
        numbers = np.asarray(numbers)
        out = np.empty((len(numbers), width), dtype=self._dtype if member == "npy" else np.uint8)
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        for row, (number, shard) in enumerate(zip(numbers, shards, strict=True)):
            out[row] = self._rows(int(shard), member)[number - self._starts[shard]]
        return out

    def span(self, name: str) -> tuple[int, int]:
        """Samples [first, last) of a shard."""
        number = next(n for n, shard in enumerate(self.index["shards"]) if shard["name"] == name)
        return int(self._starts[number]), int(self._starts[number + 1])

    def tail(self) -> np.ndarray:
        """The shorter last sample [tokens]; empty without a tail."""
        tail = self.index["tail"]
        if tail is None:
            return np.empty(0, dtype=np.int64)
        return self._view(tail, "npy", tail["tokens"])[0].astype(np.int64)

    def tail_sequences(self, separate: bool) -> list[np.ndarray]:
        """``sequences`` of the shorter last sample; empty without a tail."""
        tail = self.tail()[None]
        if not tail.size:
            return []
        if not separate:
            return list(tail)
        packed = self._view(self.index["tail"], f"{DOCUMENTS}.npy", tail.size)
        firsts = np.unpackbits(packed, axis=1, count=tail.size).astype(bool)
        return _split(tail, packing.starts(firsts), np.ones_like(firsts))

    def _rows(self, shard: int, member: str) -> np.ndarray:
        if (shard, member) not in self._open:
            self._open[shard, member] = self._view(self.index["shards"][shard], member, self.length)
        return self._open[shard, member]

    def _view(self, shard: dict[str, Any], member: str, length: int) -> np.ndarray:
        """A member of all samples of ``length`` tokens of a shard, as an array over the mapped file."""
        path = self.folder / shard["name"]
        problem = _problem(path, shard, hashes=False)
        if problem:
            raise UserError(problem)
        bits = np.dtype(np.uint8)
        widths = {f"{name}.npy": (-(-length // 8), bits) for name in self._flags} | {"npy": (length, self._dtype)}
        sizes = {name: _member(*width) for name, width in sorted(widths.items())}
        before = sum(size for name, (_, size) in sizes.items() if name < member)
        whole, (count, dtype) = sum(size for _, size in sizes.values()), widths[member]
        start = before + _BLOCK + len(sizes[member][0])
        data = np.memmap(path, dtype=np.uint8, mode="r")[: shard["samples"] * whole]
        return data.reshape(-1, whole)[:, start : start + count * dtype.itemsize].view(dtype)


def fill_vocabulary(config: RunConfig) -> RunConfig:
    """The configuration with the vocabulary of its data set; ``UserError`` when the data set is missing.

    The configuration of an imported model has it before there is data.
    """
    if not config.data_directory.exists() and config.model.bos_id is not None:
        return config
    index = PackedDataset(config.data_directory / "train").index
    return with_vocabulary(config, index["vocab_size"], index["bos_id"])


def damaged(folder: Path, hashes: bool = True) -> dict[str, str]:
    """Name -> error message of the shards that are missing or differ from the index in size or SHA-256."""
    index = PackedDataset(folder).index
    problems = {}
    for shard in [*index["shards"], *([index["tail"]] if index["tail"] else [])]:
        problem = _problem(folder / shard["name"], shard, hashes)
        if problem:
            problems[shard["name"]] = problem
    return problems


def verify(folder: Path, hashes: bool = True) -> None:
    """``UserError`` that names the first damaged or missing shard."""
    for problem in damaged(folder, hashes).values():
        raise UserError(problem)


def _problem(path: Path, shard: dict[str, Any], hashes: bool) -> str | None:
    if not path.is_file():
        return f"shard {path} is missing: restore it or prepare the data again"
    size = path.stat().st_size
    if size != shard["size"]:
        difference = f"{size} bytes instead of {shard['size']}"
    elif hashes and sha256(path) != shard["sha256"]:
        difference = "its SHA-256 differs from the index"
    else:
        return None
    return f"shard {path} is damaged: {difference}; restore it or prepare the data again"


def _split(samples_BN: np.ndarray, starts_BN: np.ndarray, counted_BN: np.ndarray) -> list[np.ndarray]:
    """The documents of samples that have tokens that count."""
    texts = []
    for sample, starts, counted in zip(samples_BN, starts_BN, counted_BN, strict=True):
        edges = np.cumsum(packing.lengths(starts))[:-1]
        pairs = zip(np.split(sample, edges), np.split(counted, edges), strict=True)
        texts += [text for text, counts in pairs if counts.any()]
    return texts


def _member(length: int, dtype: np.dtype) -> tuple[bytes, int]:
    """The ``.npy`` header of a sample, and the size of its tar member in bytes."""
    whole = io.BytesIO()
    np.lib.format.write_array(whole, np.zeros(length, dtype), version=(1, 0))
    content = whole.getvalue()
    return content[: len(content) - length * dtype.itemsize], _BLOCK + -(-len(content) // _BLOCK) * _BLOCK
