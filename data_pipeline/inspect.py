"""Summarise prepared data, and verify every shard.

    armd inspect DATA_DIR [--samples 3] [--picture lengths.png]

Prints counts, sources, the lengths of the documents and some samples of each split.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from armd_scale.errors import UserError, cli

if TYPE_CHECKING:
    from armd_scale.data.shards import PackedDataset

_READ = 4096  # samples read at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command line."""
    parser.add_argument(
        "folder", type=Path, metavar="DATA_DIR", help="data directory of a run, with train/, heldout/ and tokenizer/"
    )
    parser.add_argument("--samples", type=int, default=2, help="samples of each split to print (default 2)")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="also plot the lengths of the documents to this file"
    )


def main() -> None:
    """``python -m data_pipeline.inspect``."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Print a summary of prepared data; ``UserError`` if the data is damaged or not complete."""
    from armd_scale.data import shards
    from armd_scale.data import tokenizer as tokenizers
    from data_pipeline import documents

    if not (args.folder / "complete.json").is_file():
        raise UserError(f"{args.folder} is not complete prepared data, as complete.json is missing: prepare it")
    tokenizer = tokenizers.load(args.folder / "tokenizer")
    records = json.loads((args.folder / "complete.json").read_text(encoding="utf-8")).get("records", {})
    print(f"{args.folder}: " + ", ".join(f"{name} {count:,}" for name, count in records.items()))
    print(f"tokenizer: {tokenizer.path.name}, {tokenizer.vocab_size} entries, SHA-256 {tokenizers.digest(tokenizer)}")
    lengths = {}
    for split in ("train", "heldout"):
        data = shards.PackedDataset(args.folder / split)
        if data.index["tokenizer_sha256"] != tokenizers.digest(tokenizer):
            raise UserError(
                f"{args.folder / split} was made with another tokenizer than {tokenizer.path}: restore the tokenizer"
            )
        index = data.index
        tail = index["tail"]["tokens"] if index["tail"] else 0
        print(
            f"\n{split}: {index['documents']:,} documents, {index['bytes']:,} bytes, {index['tokens']:,} tokens "
            f"({data.bytes_per_token:.2f} bytes each) in {len(data):,} samples of {data.length} and a tail of {tail}; "
            f"{len(index['shards'])} shards of {index['dtype']}"
        )
        if "cut_documents" in index:
            padding = index.get("padding", 0)
            print(
                f"  {index['cut_documents'] / max(1, index['documents']):.1%} of the documents are cut, "
                f"{padding / index['tokens']:.2%} of the tokens are padding"
            )
        shards.verify(args.folder / split)
        print("  every shard has its size and SHA-256")
        lengths[split] = document_lengths(data, tokenizer.eos_id)
        print(_bars(lengths[split]))
        chosen = np.linspace(0, len(data) - 1, num=min(args.samples, len(data)), dtype=int)
        if index.get("sources"):
            most = list(index["sources"].items())[:10]
            print("  tokens by source: " + ", ".join(f"{name or 'others'} {tokens:,}" for name, tokens in most))
        for number, sample in zip(chosen.tolist(), data.read(chosen), strict=True):
            parts = (
                data.sequences([number], True) if data.has(shards.DOCUMENTS) else _documents(sample, tokenizer.eos_id)
            )
            text = " | ".join(tokenizer.decode(part.tolist()) for part in parts)
            rows = documents.inside(data.folder, number, data.length)
            names = ", ".join(" ".join(filter(None, (row["source"], row["id"]))) for row in rows[:5])
            print(f"  sample {number} ({names}): {text[:300]!r}")
    if args.picture:
        _draw(lengths, args.picture)
        print(f"\n{args.picture}")


def document_lengths(data: "PackedDataset", eos_id: int) -> np.ndarray:
    """Number of tokens of every document of a split, EOS included, in order; of its pieces if they are packed."""
    from data_pipeline import documents

    packed = documents.lengths(data.folder) if "padding" in data.index else None
    if packed is not None:
        return packed
    ends, at = [], 0
    for start in range(0, len(data), _READ):
        tokens = data.read(np.arange(start, min(start + _READ, len(data)))).reshape(-1)
        ends.append(at + np.flatnonzero(tokens == eos_id))
        at += len(tokens)
    ends.append(at + np.flatnonzero(data.tail() == eos_id))
    return np.diff(np.concatenate(ends), prepend=-1)


def _documents(sample: np.ndarray, eos_id: int) -> list[np.ndarray]:
    return np.split(sample, np.flatnonzero(sample == eos_id) + 1)


def _histogram(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts and edges: a bin for each doubling of the length."""
    top = max(1, int(np.ceil(np.log2(lengths.max(initial=1) + 1))))
    edges = 2 ** np.arange(top + 1)
    return np.histogram(lengths, edges)[0], edges


def _bars(lengths: np.ndarray) -> str:
    counts, edges = _histogram(lengths)
    most = max(1, counts.max(initial=0))
    lines = [
        f"  {low:>9,}-{high - 1:<9,} {count:>11,} {'#' * round(40 * count / most)}"
        for count, low, high in zip(counts, edges, edges[1:], strict=False)
        if count
    ]
    return "\n".join(["  tokens in a document", *lines])


def _draw(lengths: dict[str, np.ndarray], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for split, counts in lengths.items():
        axes.hist(counts, bins=_histogram(counts)[1].tolist(), alpha=0.6, label=f"{split}: {len(counts):,}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens in a document")
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    cli(main)
