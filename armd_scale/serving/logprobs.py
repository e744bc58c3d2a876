"""Log-probabilities of the tokens of a text, as the library scores them, in the forms of OpenAI's interface."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from armd_scale.data.detokenizer import Detokenizer
from armd_scale.data.tokenizer import Tokenizer
from armd_scale.inference import ARMD, FREE, Task

_ROWS = 512
"""Tokens whose logits exist at the same time."""
_LEAST = -9999.0
"""Log-probability of an impossible token: JSON has no infinity."""


class Scored(NamedTuple):
    """A token of a text."""

    token: int
    logprob: float | None
    """log p in nats; None for BOS, which is not predicted."""
    top: list[tuple[int, float]]
    """The likeliest tokens at this position and their log p, from the likeliest on."""


@torch.no_grad()
def score(model: ARMD, task: Task, tokens: Sequence[int], top: int) -> dict[int, Scored]:
    """Positions (from 1) of the known tokens of a text -> their log p, and that of the ``top`` likeliest tokens.

    ``tokens``: token of each position, ``FREE`` where it is not known. Given tokens are scored left to right,
    generated tokens given all given ones and the generated tokens of earlier blocks of the task.
    """
    blocks = [[position] for position in task.given] + task.blocks
    if not model.config.traits.any_order:
        blocks = [[position] for position in range(1, len(tokens) + 1)]
    rows = [
        (position, block) for block, positions in enumerate(blocks, start=1) for position in positions
        if tokens[position - 1] != FREE
    ]  # fmt: skip
    if not rows:
        return {}
    at, block = (torch.tensor([column], device=model.device) for column in zip(*rows, strict=True))
    known = torch.tensor([[tokens[position - 1] for position, _ in rows]], device=model.device)
    scored: dict[int, Scored] = {}
    start = 0
    for hidden in model.whole(known, at, block)[0].split(_ROWS):
        scores = model.predict(hidden).to(model.precise).log_softmax(-1)
        own = scores.gather(1, known[0, start : start + len(hidden), None])[:, 0].clamp(min=_LEAST).tolist()
        best = scores.topk(min(top, scores.shape[1]), dim=1)
        for row, (value, ids, values) in enumerate(
            zip(own, best.indices.tolist(), best.values.clamp(min=_LEAST).tolist(), strict=True), start=start
        ):
            scored[rows[row][0]] = Scored(int(known[0, row]), value, list(zip(ids, values, strict=True)))
        start += len(hidden)
    return scored


class Pieces:
    """Texts of single tokens, as they stand behind other text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before = tokenizer.encode("a")
        self._known = len(tokenizer.decode(self._before))

    def text(self, token: int) -> str:
        """The text of a token; the name of a control token, or of a token that is a part of a character."""
        text = self._tokenizer.decode([*self._before, token])[self._known :]
        return text if text and "\ufffd" not in text else self._tokenizer.token(token)

    def completion(self, scored: Sequence[Scored], before: Sequence[int], top: int) -> dict[str, Any]:
        """The ``logprobs`` of a completion; ``before``: tokens in front of the text."""
        return {
            "tokens": [self.text(each.token) for each in scored],
            "token_logprobs": [each.logprob for each in scored],
            "top_logprobs": [self._best(each) for each in scored] if top else None,
            "text_offset": self.offsets([each.token for each in scored], before),
        }

    def offsets(self, tokens: Sequence[int], before: Sequence[int]) -> list[int]:
        """Where each token begins in the text of ``tokens``, which stands behind ``before``, in characters."""
        arriving, offsets, size = Detokenizer(self._tokenizer, before, []), [], 0
        for token in tokens:
            offsets.append(size)
            size += len(arriving.add([token], last=False))
        return offsets

    def _best(self, scored: Scored) -> dict[str, float] | None:
        """The likeliest tokens and the token itself."""
        if scored.logprob is None:
            return None
        best: dict[str, float] = {}
        for token, value in [*scored.top, (scored.token, scored.logprob)]:
            best.setdefault(self.text(token), value)
        return best

    def chat(self, scored: Sequence[Scored]) -> dict[str, Any]:
        """The ``logprobs`` of a message."""
        content = [
            {
                **self._entry(each.token, each.logprob),
                "top_logprobs": [self._entry(token, value) for token, value in each.top],
            }
            for each in scored
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "surrogatepass"))}
