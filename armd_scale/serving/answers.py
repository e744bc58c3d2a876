"""The forms of answers: OpenAI's completions and chat completions."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from armd_scale.serving.logprobs import Pieces, Scored


class Result(NamedTuple):
    """A finished text."""

    text: str
    reason: str
    """Why it ended: ``stop`` or ``length``."""
    tokens: int
    """Number of generated tokens."""
    logprobs: dict[str, Any] | None = None


class CompletionForm:
    """The form of answers of ``/v1/completions``."""

    prefix, kind, part_kind = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, result: Result) -> dict[str, Any]:
        return {"index": index, "text": result.text, "finish_reason": result.reason, "logprobs": result.logprobs}

    def first(self, index: int, echo: str) -> dict[str, Any] | None:
        """The choice of the first event of a stream; None: there is no such event."""
        return self.part(index, echo, None) if echo else None

    def part(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        """The choice of an event of a stream."""
        return {"index": index, "text": text, "finish_reason": reason, "logprobs": None}

    def logprobs(self, pieces: Pieces, scored: Sequence[Scored], before: Sequence[int], top: int) -> dict[str, Any]:
        """The log-probabilities of a text behind the tokens ``before``, with the ``top`` likeliest tokens."""
        return pieces.completion(scored, before, top)


class ChatForm(CompletionForm):
    """The form of answers of ``/v1/chat/completions``."""

    prefix, kind, part_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, result: Result) -> dict[str, Any]:
        message = {"role": "assistant", "content": result.text, "refusal": None}
        return {"index": index, "message": message, "finish_reason": result.reason, "logprobs": result.logprobs}

    def first(self, index: int, echo: str) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "finish_reason": None, "logprobs": None}

    def part(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}

    def logprobs(self, pieces: Pieces, scored: Sequence[Scored], before: Sequence[int], top: int) -> dict[str, Any]:
        return pieces.chat(scored)
