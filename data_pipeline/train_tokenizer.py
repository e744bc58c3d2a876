"""Trains a sentencepiece tokenizer on a sample of text.

python -m data_pipeline.train_tokenizer --text 'corpus/*.jsonl.zst' --vocab 32000 --out tokenizer [--kind bpe]
"""

import argparse
import bisect
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from armd_scale.data import readers, sources
from armd_scale.data import tokenizer as tokenizers
from armd_scale.data.readers import FIELDS, Fields, Part
from armd_scale.errors import UserError, cli
from armd_scale.logs import DATA
from data_pipeline import holdout

_SAMPLE = 32 << 20  # characters of text
_LONGEST_PIECE = 1 << 14  # characters; sentencepiece passes over lines of more than a megabyte
_PARTS = 256  # parts of files that a sample of a large corpus comes from
_BUILTIN_SIZE = 4 << 20  # bytes


def sample(files: Iterable[str], fields: Fields = FIELDS, rule: holdout.Rule = holdout.NOTHING) -> Iterator[str]:
    """Paragraphs from all files, about ``_SAMPLE`` characters, without the held-out text of ``rule``.

    A part of a file gives text in proportion to its size; of a file that is read as a whole, its begin is used. Long
    paragraphs are cut. Raises ``UserError`` if there is no text, with the problem of the first record.
    """
    problem, found = "", False
    for part, budget in _budgets(list(readers.parts(files, fields))):
        for record in readers.read(part, fields):
            text = rule.split(record.text)[0][:budget] if not record.problem else ""
            budget -= len(text)
            problem = problem or f"{record.place} {record.problem}" * bool(record.problem)
            for paragraph in text.split("\n\n"):
                if paragraph.strip():
                    found = True
                    for at in range(0, len(paragraph), _LONGEST_PIECE):
                        yield paragraph[at : at + _LONGEST_PIECE] + "\n"
            if not budget:
                break
    if not found:
        raise UserError(f"there is no text to train a tokenizer on: {problem or 'all documents are empty'}")


def _budgets(parts: list[Part]) -> Iterator[tuple[Part, int]]:
    """The parts to read, with the characters to use of each part."""
    sizes = [part.size or _BUILTIN_SIZE for part in parts]
    edges = list(itertools.accumulate(sizes, initial=0))
    if len(parts) <= _PARTS:
        yield from ((part, max(1, _SAMPLE * size // edges[-1])) for part, size in zip(parts, sizes, strict=True))
        return
    drawn = Counter(bisect.bisect_right(edges, (2 * n + 1) * edges[-1] // (2 * _PARTS)) - 1 for n in range(_PARTS))
    yield from ((parts[number], _SAMPLE // _PARTS * count) for number, count in sorted(drawn.items()))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.train_tokenizer", description=__doc__.split("\n")[0])
    parser.add_argument("--text", nargs="+", required=True, help="files, directories, globs or URLs of text")
    parser.add_argument("--field", default="text", help="field of a jsonl record or parquet column with the text")
    parser.add_argument("--vocab", type=int, default=32000, help="number of pieces (default 32000)")
    parser.add_argument("--kind", choices=("unigram", "bpe"), default="unigram", help="model (default unigram)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="directory for tokenizer.model")
    args = parser.parse_args()
    target = args.out / "tokenizer.model"
    if target.exists():
        raise UserError(f"{target} exists, and data may depend on it: choose another directory")
    args.out.mkdir(parents=True, exist_ok=True)
    files = sources.expand(args.text)
    if files.left_out:
        DATA.warning(sources.describe(files.left_out))
    texts = sample(files.names, Fields(args.field))
    tokenizer = tokenizers.train(texts, target, args.vocab, args.seed, args.kind)
    print(f"{target}: {tokenizer.vocab_size} pieces ({args.kind}), SHA-256 {tokenizers.digest(tokenizer)}")


if __name__ == "__main__":
    cli(main)
