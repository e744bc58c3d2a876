"""Last-word accuracy: how often the likeliest continuation of a passage is its last word (LAMBADA).

The last word's tokens are written greedily, left to right, given all before them: the word counts when each is right.
Masked diffusion writes them in the same order, and is told their number by that.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from armd_scale.data.tokenizer import Tokenizer
from armd_scale.errors import UserError
from armd_scale.evaluation.models import Mapper
from armd_scale.inference import ARMD, FREE, Decoding

_UNIT = 16


@dataclass(frozen=True)
class Accuracy:
    """Share of passages whose last word is right."""

    passages: int
    right: int

    @property
    def value(self) -> float:
        return self.right / self.passages

    @property
    def se(self) -> float:
        """Standard error over passages."""
        return math.sqrt(self.value * (1 - self.value) / self.passages)


def last_words(each: Mapper, tokenizer: Tokenizer, passages: Sequence[str], length: int) -> Accuracy:
    """Accuracy on passages of at least two words; of a longer one than ``length`` tokens, the end is given.

    Raises ``UserError`` when there is none.
    """
    tasks = [task for passage in passages if (task := _task(tokenizer, passage, length)) is not None]
    if not tasks:
        raise UserError("there is no passage with a last word to guess")
    ranked = sorted(tasks, key=lambda task: len(task[0]) + len(task[1]))  # texts of like length share their steps
    units = [(ranked[start : start + _UNIT],) for start in range(0, len(ranked), _UNIT)]
    return Accuracy(len(tasks), sum(each(right, units)))


def _task(tokenizer: Tokenizer, passage: str, length: int) -> tuple[list[int], list[int]] | None:
    """Tokens of the context and of the last word."""
    context, _, word = passage.strip().rpartition(" ")
    if not context or not word:
        return None
    whole, before = tokenizer.encode(passage.strip()), tokenizer.encode(context)
    shared = next((n for n, pair in enumerate(zip(whole, before, strict=False)) if pair[0] != pair[1]), len(before))
    shared = min(shared, len(whole) - 1)
    word_tokens = whole[shared:][:length]
    return whole[:shared][max(0, shared + len(word_tokens) - length) :], word_tokens


def right(model: ARMD, tasks: Sequence[tuple[list[int], list[int]]]) -> int:
    """How many of the words are written."""
    texts = [[*context, *[FREE] * len(word)] for context, word in tasks]
    # One position after the other, also for masked diffusion.
    plans = [
        model.plan([text], Decoding(temperature=0), 0, range(len(context) + 1, len(text) + 1))[0]
        for text, (context, _) in zip(texts, tasks, strict=True)
    ]
    written = model.complete(plans)
    return sum(text[len(context) :].tolist() == word for text, (context, word) in zip(written, tasks, strict=True))
