"""Packed samples in WebDataset tar shards, with an index; written once, read at random.

A sample is N tokens, one ``.npy`` member of the tar. All samples of a split have the same length, so member i of
a shard lies at a fixed offset and is read without unpacking; any WebDataset reader can stream them as well.
Tokens after the last whole sample are one shorter sample in a shard of its own (``tail``): kept, and scored in
evaluation.

``index.json`` is written last and atomically: a folder without one is not complete.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from armd_scale.errors import UserError
from armd_scale.files import write_atomically

INDEX = "index.json"
_BLOCK = 512  # unit of a tar file


def pack(documents: Iterable[Sequence[int]], eos_id: int, length: int) -> Iterable[np.ndarray]:
    """Documents + EOS, concatenated and cut into samples of ``length`` tokens; the last may be shorter."""
    pending = np.empty(0, dtype=np.int64)
    for tokens in documents:
        pending = np.concatenate([pending, np.asarray(tokens, dtype=np.int64), [eos_id]])
        whole = len(pending) // length * length
        yield from pending[:whole].reshape(-1, length)
        pending = pending[whole:]
    if len(pending):
        yield pending


def write(
    folder: Path, samples: Iterable[np.ndarray], length: int, per_shard: int, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write samples as shards of ``per_shard`` and then the index, which holds ``facts`` as well; returns the index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    dtype = np.uint16 if facts["vocab_size"] <= 1 << 16 else np.uint32
    shards: list[dict[str, Any]] = []
    tail: dict[str, Any] | None = None
    writer: _Shard | None = None
    tokens = 0
    for sample in samples:
        tokens += len(sample)
        if len(sample) < length:
            shard = _Shard(folder / "tail.tar")
            shard.add(sample.astype(dtype))
            tail = {**shard.close(), "tokens": len(sample)}
            continue
        writer = writer or _Shard(folder / f"shard-{len(shards):06d}.tar")
        writer.add(sample.astype(dtype))
        if writer.samples == per_shard:
            shards.append(writer.close())
            writer = None
    if writer:
        shards.append(writer.close())
    index = {
        "format": 1,
        "length": length,
        "dtype": np.dtype(dtype).name,
        "samples": sum(shard["samples"] for shard in shards),
        "tokens": tokens,
        **facts,
        "shards": shards,
        "tail": tail,
    }
    write_atomically(folder / INDEX, json.dumps(index, indent=1))
    return index


class _Shard:
    """One tar file in the making; bytes depend on the samples alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples = 0
        self._file = path.open("wb")
        self._tar = webdataset.TarWriter(self._file, mtime=0, encoder=False)

    def add(self, tokens: np.ndarray) -> None:
        member = io.BytesIO()
        np.lib.format.write_array(member, tokens, version=(1, 0))
        self._tar.write({"__key__": f"{self.samples:08d}", "npy": member.getvalue()})
        self.samples += 1

    def close(self) -> dict[str, Any]:
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"name": self.path.name, "samples": self.samples, "size": self.path.stat().st_size, "sha256": digest}


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
            raise UserError(f"{self.folder} is not a complete data set: it has no {INDEX}; prepare it first") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.folder / INDEX} is damaged ({error!r}): prepare the data again") from error
        self._open: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each token, EOS included."""
        return self.index["bytes"] / self.index["tokens"]

    def read(self, numbers: np.ndarray | Sequence[int]) -> np.ndarray:
        """Samples by number -> [len(numbers), N] int64."""
        numbers = np.asarray(numbers)
        out = np.empty((len(numbers), self.length), dtype=np.int64)
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        for row, (number, shard) in enumerate(zip(numbers, shards, strict=True)):
            out[row] = self._rows(int(shard))[number - self._starts[shard]]
        return out

    def tail(self) -> np.ndarray:
        """The shorter last sample [tokens], empty when there is none."""
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
        if not path.is_file():
            raise UserError(f"shard {path} is missing: restore it or prepare the data again")
        if path.stat().st_size != shard["size"]:
            raise UserError(
                f"shard {path} is damaged: {path.stat().st_size} bytes, the index says {shard['size']}; "
                "restore it or prepare the data again"
            )
        payload = length * self._dtype.itemsize
        header = len(_npy_header(length, self._dtype))
        member = _BLOCK + -(-(header + payload) // _BLOCK) * _BLOCK
        data = np.memmap(path, dtype=np.uint8, mode="r")[: shard["samples"] * member]
        return data.reshape(-1, member)[:, _BLOCK + header : _BLOCK + header + payload].view(self._dtype)


def verify(folder: Path) -> None:
    """Check the size and SHA-256 of every shard against the index; ``UserError`` names the first damaged one."""
    index = PackedDataset(folder).index
    for shard in [*index["shards"], *([index["tail"]] if index["tail"] else [])]:
        path = folder / shard["name"]
        if not path.is_file():
            raise UserError(f"shard {path} is missing: restore it or prepare the data again")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                raise UserError(f"shard {path} is damaged: its SHA-256 differs from the index; prepare the data again")


def _npy_header(length: int, dtype: np.dtype) -> bytes:
    member = io.BytesIO()
    np.lib.format.write_array(member, np.zeros(length, dtype), version=(1, 0))
    return member.getvalue()[: -length * dtype.itemsize]
