"""Last-word accuracy: how often the greedy continuation of a passage is its last word (LAMBADA).

The tokens of the last word are decoded greedily, left to right, given the passage before them. A word is right if all
its tokens are. Masked diffusion decodes in the same order, and so knows the number of tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from armd_scale.data.tokenizer import Tokenizer
from armd_scale.errors import UserError
from armd_scale.evaluation.models import Mapper, Scored
from armd_scale.inference import FREE, Decoding

_UNIT = 16


@dataclass(frozen=True)
class Accuracy:
    """Number and share of passages whose last word is right."""

    passages: int
    right: int

    @property
    def value(self) -> float:
        return self.right / self.passages

    @property
    def se(self) -> float:
        """Standard error over passages."""
        return math.sqrt(self.value * (1 - self.value) / self.passages)


def last_words(mapper: Mapper, tokenizer: Tokenizer, passages: Sequence[str], length: int) -> Accuracy:
    """Accuracy on the passages of at least two words; longer passages are reduced to their last ``length`` tokens.

    Raises ``UserError`` if no passage has two words.
    """
    tasks = [task for passage in passages if (task := _task(tokenizer, passage, length)) is not None]
    if not tasks:
        raise UserError("no passage has two words: check the text")
    ranked = sorted(tasks, key=lambda task: len(task[0]) + len(task[1]))  # texts of similar length share steps
    units = [(ranked[start : start + _UNIT],) for start in range(0, len(ranked), _UNIT)]
    return Accuracy(len(tasks), sum(mapper(right, units)))


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


def right(model: Scored, tasks: Sequence[tuple[list[int], list[int]]]) -> int:
    """Number of last words that the model writes."""
    texts = [[*context, *[FREE] * len(word)] for context, word in tasks]
    # Position by position, also for masked diffusion.
    plans = [
        model.plan([text], Decoding(temperature=0), 0, range(len(context) + 1, len(text) + 1))[0]
        for text, (context, _) in zip(texts, tasks, strict=True)
    ]
    written = model.complete(plans)
    return sum(text[len(context) :].tolist() == word for text, (context, word) in zip(written, tasks, strict=True))
