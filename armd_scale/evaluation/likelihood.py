"""Likelihood of texts under a standalone model: perplexity per token and bits per byte, with what they depend on.

Protocol (design section 6): tokens + EOS of every document are concatenated and cut into chunks of the model's
length; every token of a chunk is scored given BOS; no sliding window; the last partial chunk is scored too.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from armd_scale import orders
from armd_scale.errors import UserError
from armd_scale.inference import ARMD
from armd_scale.orders import Layout

_BATCH = 16


@dataclass(frozen=True)
class Score:
    """Likelihood of a text under one kind of order."""

    order: str
    nll: float
    """Nats per token, EOS included."""
    perplexity: float
    """exp(nll)."""
    bits_per_byte: float
    """Bits of the whole text over its UTF-8 bytes."""
    tokens: int
    """Scored tokens."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse_order(name: str) -> tuple[str, int]:
    """``left-to-right``, ``shuffled:K`` or ``strided:S`` -> (kind, number); ``UserError`` otherwise."""
    kind, _, number = name.partition(":")
    if name == "left-to-right":
        return kind, 0
    if kind in ("shuffled", "strided") and number.isascii() and number.isdigit() and int(number) >= 1:
        return kind, int(number)
    raise UserError(f"unknown order '{name}': use left-to-right, shuffled:K or strided:S, with K and S at least 1")


def layout(name: str, length: int, chunk: int) -> Layout:
    """Layout of chunk number ``chunk`` of ``length`` tokens under a named order; shuffles are fixed by the
    chunk's number.
    """
    kind, number = parse_order(name)
    if kind == "shuffled":
        return orders.shuffled(length, min(number, length), 0, chunk)
    return orders.strided(length, number) if kind == "strided" else orders.left_to_right(length)


def score(model: ARMD, chunks: Sequence[np.ndarray], order: str, text_bytes: float) -> Score:
    """Score chunks of tokens (each up to the model's length) that stand for ``text_bytes`` bytes of text."""
    total, count = 0.0, 0
    start = 0
    while start < len(chunks):
        stop = start + 1
        while stop < min(len(chunks), start + _BATCH) and len(chunks[stop]) == len(chunks[start]):
            stop += 1
        tokens = torch.from_numpy(np.stack(chunks[start:stop]).astype(np.int64))
        layouts = [layout(order, tokens.shape[1], number) for number in range(start, stop)]
        order_BN, blocks_BN = (torch.from_numpy(np.stack(field)) for field in zip(*layouts, strict=True))
        total += float(model.nll(tokens, order_BN, blocks_BN).double().sum())
        count += tokens.numel()
        start = stop
    if not count:
        raise UserError("there is nothing to score: the text is empty")
    nll = total / count
    # Beyond e^700 a float overflows; a model that bad has no perplexity worth printing.
    return Score(order, nll, math.exp(min(nll, 700.0)), total / math.log(2) / text_bytes, count)


def cut(tokens: Sequence[int] | np.ndarray, length: int) -> list[np.ndarray]:
    """Chunks of ``length`` tokens; the last may be shorter."""
    array = np.asarray(tokens, dtype=np.int64)
    return [array[start : start + length] for start in range(0, len(array), length)]
