"""Likelihood of texts under a model: perplexity per token and bits per byte, with what they depend on.

Protocol (docs/howto/evaluation.md): tokens + EOS of every document are concatenated and cut into chunks of the model's
length; every token of a chunk is scored given BOS; no sliding window; the last partial chunk is scored too.

Chunks are scored in units of neighbours (``units``), which may be spread over processes: a unit's figures depend on
nothing else, and they are added without rounding, so that the result is the same to the last bit.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from armd_scale import orders
from armd_scale.errors import UserError
from armd_scale.evaluation.models import Mapper
from armd_scale.inference import ARMD
from armd_scale.orders import Layout

_UNIT = 16
_NOISE = 8
"""Levels of noise of one draw of a bound, spread evenly."""

REPEATS = 2
"""Draws of orders or noise for every chunk, unless more are asked for."""


@dataclass(frozen=True)
class Score:
    """Likelihood of a text under one kind of order."""

    order: str
    nll: float
    """Nats per token, EOS included; for a bound or random orders the mean over the draws."""
    nll_se: float
    """Standard error of ``nll`` that is due to the draws; 0 where nothing is drawn."""
    perplexity: float
    """exp(nll)."""
    bits_per_byte: float
    """Bits of the whole text over its UTF-8 bytes."""
    tokens: int
    """Scored tokens."""

    @property
    def perplexity_se(self) -> float:
        return self.perplexity * self.nll_se

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"perplexity_se": self.perplexity_se}


def parse_order(name: str) -> tuple[str, int]:
    """``left-to-right``, ``bound``, ``shuffled:K`` or ``strided:S`` -> (kind, number); ``UserError`` otherwise."""
    kind, _, number = name.partition(":")
    if name in ("left-to-right", "bound"):
        return kind, 0
    if kind in ("shuffled", "strided") and number.isascii() and number.isdigit() and int(number) >= 1:
        return kind, int(number)
    raise UserError(
        f"unknown order '{name}': use left-to-right, shuffled:K or strided:S, with K and S at least 1, or bound for "
        "objectives without an exact likelihood"
    )


def default_orders(model: ARMD, shuffles: int = 8, streams: int = 4) -> list[str]:
    """The orders that a model's likelihood is reported in, side by side."""
    return model.objective.orders(shuffles, streams)


def layout(name: str, length: int, chunk: int, draw: int = 0) -> Layout:
    """Layout of chunk number ``chunk`` of ``length`` tokens under a named order; shuffles are fixed by the
    chunk's number and the draw's.
    """
    kind, number = parse_order(name)
    if kind == "shuffled":
        return orders.shuffled(length, min(number, length), draw, chunk)
    return orders.strided(length, number) if kind == "strided" else orders.left_to_right(length)


@dataclass(frozen=True)
class Unit:
    """Neighbouring chunks of one length, [B, N] tokens; ``first``: the number of the first of them."""

    first: int
    tokens: np.ndarray


Totals: TypeAlias = list[list[float]]
"""-log p of every chunk of a unit in nats, a list for each draw."""


def units(chunks: Sequence[np.ndarray]) -> list[Unit]:
    """Chunks as units."""
    out, start = [], 0
    while start < len(chunks):
        stop = start + 1
        while stop < min(len(chunks), start + _UNIT) and len(chunks[stop]) == len(chunks[start]):
            stop += 1
        out.append(Unit(start, np.stack(chunks[start:stop]).astype(np.int64)))
        start = stop
    return out


def score_unit(model: ARMD, unit: Unit, order: str, repeats: int) -> Totals:
    """Score a unit; kinds of order that draw nothing have one draw."""
    tokens, numbers = torch.from_numpy(unit.tokens), range(unit.first, unit.first + len(unit.tokens))
    kind = parse_order(order)[0]
    if kind in ("bound", "shuffled") and repeats < 2:
        raise UserError(f"{order} needs at least 2 repeats: its error comes from their spread")
    if kind == "bound":
        draws = [[number * repeats + draw for number in numbers] for draw in range(repeats)]
        return [model.bound(tokens, _NOISE, seeds).tolist() for seeds in draws]
    totals = []
    for draw in range(repeats if kind == "shuffled" else 1):
        layouts = [layout(order, tokens.shape[1], number, draw) for number in numbers]
        order_BN, blocks_BN = (torch.from_numpy(np.stack(field)) for field in zip(*layouts, strict=True))
        totals.append(model.nll(tokens, order_BN, blocks_BN).double().sum(1).tolist())
    return totals


def combine(order: str, scored: Sequence[Totals], tokens: int, text_bytes: float) -> Score:
    """The score of a text of so many tokens and bytes from its units'; ``UserError`` when there is nothing."""
    if not tokens:
        raise UserError("there is nothing to score: the text is empty")
    draws = [[total for unit in scored for total in unit[draw]] for draw in range(len(scored[0]))]
    total = math.fsum(math.fsum(draw) for draw in draws) / len(draws)
    error = 0.0
    if len(draws) > 1:
        error = math.sqrt(math.fsum(np.var(draws, axis=0, ddof=1).tolist()) / len(draws))
    nll = total / tokens
    # Beyond e^700 a float overflows; a model that bad has no perplexity worth printing.
    perplexity, bits = math.exp(min(nll, 700.0)), total / math.log(2) / text_bytes
    return Score(order, nll, error / tokens, perplexity, bits, tokens)


def score(each: Mapper, chunks: Sequence[np.ndarray], order: str, text_bytes: float, repeats: int = REPEATS) -> Score:
    """Score chunks of tokens (each up to the model's length) that stand for ``text_bytes`` bytes of text.

    ``each``: where the model is (``models.alone``, ``models.workers``).
    """
    jobs = [(unit, order, repeats) for unit in units(chunks)]
    return combine(order, each(score_unit, jobs), sum(map(len, chunks)), text_bytes)


def cut(tokens: Sequence[int] | np.ndarray, length: int) -> list[np.ndarray]:
    """Chunks of ``length`` tokens; the last may be shorter."""
    array = np.asarray(tokens, dtype=np.int64)
    return [array[start : start + length] for start in range(0, len(array), length)]
