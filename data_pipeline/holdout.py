"""Which text is held out for validation.

Documents are held out by their hash, so that copies stay together and the choice depends on no other document. Where
documents are too few for that, the bound of the hash is adapted; of a few large documents, such as one file, the last
part of each document is held out.
"""

import hashlib
import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

SPLITS = ("train", "heldout")
_MANY = 1000
"""Number of documents that hold out about the wanted share by their hashes alone."""
_FACTOR = 2.0
"""Accepted ratio of the share that is held out and the share that is asked for."""
_LINE, _WORD = 2000, 200  # characters within which a line or a word ends


class Rule(NamedTuple):
    """The text that is held out."""

    below: int
    """Documents are held out whose ``hash_of`` is below."""
    tail: float = 0.0
    """Share at the end of each document that is held out."""

    def split(self, text: str) -> tuple[str, str]:
        """The training text and the held-out text of a document; one of them can be empty."""
        if self.tail:
            at = _cut(text, round(len(text) * (1 - self.tail)))
            return text[:at], text[at:]
        return ("", text) if hash_of(text) < self.below else (text, "")


NOTHING = Rule(0)


def plan(documents: Iterable[str], fraction: float) -> Rule:
    """The rule that holds out about ``fraction`` of the text. Reads at most ``_MANY`` documents."""
    rule = Rule(math.ceil(fraction * 2**64))
    known = [(hash_of(text), len(text)) for text in itertools.islice(documents, _MANY)]
    if len(known) == _MANY or not known or not fraction:
        return rule
    known.sort()
    wanted = fraction * sum(size for _, size in known)

    def fits(rule: Rule) -> bool:
        held_out = sum(size for hash_, size in known if hash_ < rule.below)
        return wanted / _FACTOR <= held_out <= wanted * _FACTOR

    if fits(rule):
        return rule
    held_out = itertools.accumulate(size for _, size in known)
    _, nearest = min((abs(size - wanted), hash_) for size, (hash_, _) in zip(held_out, known, strict=True))
    adapted = Rule(nearest + 1)
    return adapted if fits(adapted) else Rule(0, fraction)


def hash_of(text: str) -> int:
    """A hash of a text, uniform in [0, 2^64)."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "little")


def _cut(text: str, at: int) -> int:
    """The end of the line or of the word at a place; the place itself if both are far."""
    for end, far in (("\n", _LINE), (" ", _WORD)):
        found = text.find(end, at, at + far)
        if found >= 0:
            return found + 1
    return at
