"""Packed samples in WebDataset tar shards with an index, written once and read at random.

A sample is a ``.npy`` member of N tokens. All samples of a split have the same length, so member i of a shard has a
fixed offset and is read without unpacking the tar. Any WebDataset reader can stream the shards. The tokens after the
last whole sample form a shorter sample in a separate shard (``tail``), which evaluation scores.

``index.json`` is written last and atomically: a directory without index is not complete.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import webdataset

from armd_scale.config import RunConfig, with_vocabulary
from armd_scale.data.tokenizer import token_type
from armd_scale.errors import UserError
from armd_scale.files import sha256, write_atomically

INDEX = "index.json"
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


def write_shard(folder: Path, place: Place, tokens: np.ndarray, length: int) -> dict[str, Any]:
    """Write the tokens [stop - start] of a shard atomically. Returns its entry for the index.

    The bytes of the file depend on the tokens only.
    """
    samples = tokens.reshape(-1, length) if len(tokens) >= length else tokens[None]
    archive = _archive(samples)
    partial = folder / f".{place.name}.{os.getpid()}"
    with partial.open("wb") as file:
        file.write(archive)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / place.name)
    digest = hashlib.sha256(archive).hexdigest()
    return {"name": place.name, "samples": len(samples), "size": len(archive), "sha256": digest}


def _archive(samples: np.ndarray) -> memoryview:
    """The tar that WebDataset's writer would write for samples [count, N].

    WebDataset writes the first member. The other members differ in name, checksum and tokens, which numpy fills in.
    """
    (head, size), first = _member(samples.shape[1], samples.dtype), io.BytesIO()
    with webdataset.TarWriter(first, mtime=0, encoder=False) as tar:
        tar.write({"__key__": f"{0:08d}", "npy": head + samples[0].tobytes()})
    start = _BLOCK + len(head)
    archive = np.zeros(-(-(len(samples) * size + 2 * _BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE, np.uint8)
    members = archive[: len(samples) * size].reshape(-1, size)
    members[:] = np.frombuffer(first.getvalue(), np.uint8, size)
    members[:, start : start + samples[0].nbytes] = np.ascontiguousarray(samples).view(np.uint8)
    digits = np.arange(len(samples))[:, None] // 10 ** np.arange(7, -1, -1) % 10
    members[:, :8] += digits.astype(np.uint8)
    sums = int(bytes(members[0, _CHECKSUM]), 8) + digits.sum(axis=1)
    members[:, _CHECKSUM] = ord("0") + sums[:, None] // 8 ** np.arange(5, -1, -1) % 8
    return archive.data


def write_index(folder: Path, written: list[dict[str, Any]], length: int, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the index of a directory of shards. ``facts``: ``tokens``, ``vocab_size`` and further fields."""
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
        self._open: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token, EOS included."""
        return self.index["bytes"] / self.index["tokens"]

    def read(self, numbers: np.ndarray | Sequence[int]) -> np.ndarray:
        """Samples by number -> [len(numbers), N] int64."""
        numbers = np.asarray(numbers)
        out = np.empty((len(numbers), self.length), dtype=np.int64)
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        for row, (number, shard) in enumerate(zip(numbers, shards, strict=True)):
            out[row] = self._rows(int(shard))[number - self._starts[shard]]
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
        return self._view(tail, tail["tokens"])[0].astype(np.int64)

    def _rows(self, shard: int) -> np.ndarray:
        if shard not in self._open:
            self._open[shard] = self._view(self.index["shards"][shard], self.length)
        return self._open[shard]

    def _view(self, shard: dict[str, Any], length: int) -> np.ndarray:
        """The tokens of a shard as an array [samples, length] over the mapped file."""
        path = self.folder / shard["name"]
        problem = _problem(path, shard, hashes=False)
        if problem:
            raise UserError(problem)
        head, size = _member(length, self._dtype)
        start, stop = _BLOCK + len(head), _BLOCK + len(head) + length * self._dtype.itemsize
        data = np.memmap(path, dtype=np.uint8, mode="r")[: shard["samples"] * size]
        return data.reshape(-1, size)[:, start:stop].view(self._dtype)


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


def _member(length: int, dtype: np.dtype) -> tuple[bytes, int]:
    """The ``.npy`` header of a sample, and the size of its tar member in bytes."""
    whole = io.BytesIO()
    np.lib.format.write_array(whole, np.zeros(length, dtype), version=(1, 0))
    content = whole.getvalue()
    return content[: len(content) - length * dtype.itemsize], _BLOCK + -(-len(content) // _BLOCK) * _BLOCK
