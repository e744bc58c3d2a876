"""The table of documents of a split: the source of each document and the position of its tokens.

``documents.parquet`` has a row per document, in the order of the stream: ``id``, ``source``, ``start`` (its first token
in the stream), ``tokens`` (with EOS), ``bytes``. Sample n of length N holds the tokens n x N to (n + 1) x N of the
stream. Documents that are packed by best fit have a row per piece, and the padding of a sample has a row of the source
``padding``.
"""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

NAME = "documents.parquet"
PADDING = "padding"
"""Source of the rows that are no document."""
_SCHEMA = pyarrow.schema(
    {"id": pyarrow.string(), "source": pyarrow.string()} | dict.fromkeys(("start", "tokens", "bytes"), pyarrow.int64())
)
_ROWS = 1 << 16  # fixed size of a row group, so that the bytes of the file do not depend on the units


def write(folder: Path, tables: Iterable[pyarrow.Table], edges: list[int]) -> list[Counter[str]]:
    """Write the table of a split; returns the tokens by source of each shard, given the ``edges`` of the shards."""
    counts: list[Counter[str]] = [Counter() for _ in edges[1:]]
    partial = folder / f".{NAME}.{os.getpid()}"
    with pyarrow.parquet.ParquetWriter(partial, _SCHEMA) as writer:
        rest = _SCHEMA.empty_table()
        for table in tables:
            _count(table, np.array(edges), counts)
            rest = pyarrow.concat_tables([rest, table.cast(_SCHEMA)])
            while len(rest) >= _ROWS:
                writer.write_table(rest.slice(0, _ROWS).combine_chunks())
                rest = rest.slice(_ROWS)
        if len(rest):
            writer.write_table(rest.combine_chunks())
    os.replace(partial, folder / NAME)
    return counts


def inside(folder: Path, sample: int, length: int) -> list[dict[str, Any]]:
    """The documents with tokens in a sample; empty for data that was prepared without a table."""
    path = folder / NAME
    if not path.is_file():
        return []
    field = pyarrow.compute.field
    reached = field("start") + field("tokens") > sample * length
    return pyarrow.parquet.read_table(path, filters=(field("start") < (sample + 1) * length) & reached).to_pylist()


def lengths(folder: Path) -> np.ndarray | None:
    """Tokens of the pieces of documents packed by best fit; None without a table."""
    path = folder / NAME
    if not path.is_file():
        return None
    table = pyarrow.parquet.read_table(path, columns=["source", "tokens"])
    return table["tokens"].to_numpy()[table["source"].to_numpy(zero_copy_only=False) != PADDING]


def _count(table: pyarrow.Table, edges: np.ndarray, counts: list[Counter[str]]) -> None:
    """Add the tokens of documents to the counts of their shards."""
    if not len(table):
        return
    sources = table["source"].combine_chunks().dictionary_encode()
    codes, names = sources.indices.to_numpy(), sources.dictionary.to_pylist()
    starts = table["start"].to_numpy()
    end = int(starts[-1]) + table["tokens"][-1].as_py()
    within = edges[(edges > starts[0]) & (edges < end)]
    pieces = np.union1d(starts, within)
    sizes = np.diff(pieces, append=end)
    shard = np.searchsorted(edges, pieces, side="right") - 1
    source = codes[np.searchsorted(starts, pieces, side="right") - 1]
    tokens = np.bincount((shard - shard[0]) * len(names) + source, weights=sizes).astype(np.int64)
    for at in np.flatnonzero(tokens):
        counts[int(shard[0] + at // len(names))][names[at % len(names)]] += int(tokens[at])
