"""Decodes tokens to text while they arrive."""

from collections.abc import Sequence

from armd_scale.data.tokenizer import Tokenizer

_CONTEXT = 8
"""Tokens that are decoded together with new tokens, as several tokens may encode a character."""


class Detokenizer:
    """Decodes tokens to text incrementally. Returned text is final, and ends before a stop string."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._tokens = list(before[-_CONTEXT:])
        self._known = len(tokenizer.decode(self._tokens))
        self._held = ""
        self.stopped = False
        """Whether a stop string was found."""

    def add(self, tokens: Sequence[int], last: bool) -> str:
        """Add ``tokens`` and return the text that is now final; ``last``: no tokens follow."""
        if self.stopped:
            return ""
        if tokens or last:
            self._tokens += tokens
            text = self._tokenizer.decode(self._tokens)
            if last or not text.endswith("\ufffd"):
                self._held += text[self._known :]
                self._tokens = self._tokens[-_CONTEXT:]
                self._known = len(self._tokenizer.decode(self._tokens))
        offsets = [offset for stop in self._stops if (offset := self._held.find(stop)) >= 0]
        if offsets:
            self.stopped = True
            out, self._held = self._held[: min(offsets)], ""
            return out
        # Hold back the beginning of a possible stop string.
        tail = 0 if last else max((_overlap(self._held, stop) for stop in self._stops), default=0)
        out, self._held = self._held[: len(self._held) - tail], self._held[len(self._held) - tail :]
        return out


def _overlap(text: str, stop: str) -> int:
    """Number of characters at the end of ``text`` that ``stop`` begins with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
