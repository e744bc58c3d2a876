"""Likelihood of texts under a model: perplexity per token and bits per byte.

Protocol (docs/howto/evaluation.md): tokens + EOS of all documents are concatenated and split into chunks of the model's
length. Every token of a chunk is scored given BOS. There is no sliding window, and the last partial chunk is scored.

Chunks are scored in units of adjacent chunks (``units``), which can be spread over processes. The figures of a unit do
not depend on other units and are added exactly, so the result has the same bits for any number of processes.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from armd_scale import orders
from armd_scale.errors import UserError
from armd_scale.evaluation.models import Mapper, Scored
from armd_scale.formulas import stream_bounds
from armd_scale.orders import Layout

_UNIT = 16
_NOISE = 8
"""Evenly spread noise levels in a draw of a bound."""

REPEATS = 2
"""Default number of draws of orders or noise for each chunk."""


@dataclass(frozen=True)
class Score:
    """Likelihood of a text under a kind of order."""

    order: str
    nll: float
    """Nats per token, EOS included; for a bound or random orders the mean over the draws."""
    nll_se: float
    """Standard error of ``nll`` over the draws; 0 without draws."""
    perplexity: float
    """exp(nll)."""
    bits_per_byte: float
    """Bits of the scored text over its UTF-8 bytes."""
    tokens: int
    """Scored tokens."""

    @property
    def perplexity_se(self) -> float:
        return self.perplexity * self.nll_se

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"perplexity_se": self.perplexity_se}


def parse_order(name: str) -> tuple[str, int]:
    """The kind of an order and its number: ``left-to-right``, ``infill``, ``bound``, or ``shuffled:K``, ``groups:K``
    or ``strided:S``. Raises ``UserError`` for other names.
    """
    kind, _, number = name.partition(":")
    if name in ("left-to-right", "infill", "bound"):
        return kind, 0
    if kind in ("shuffled", "strided", "groups") and number.isascii() and number.isdigit() and int(number) >= 1:
        return kind, int(number)
    raise UserError(
        f"unknown order '{name}': use left-to-right, shuffled:K, groups:K or strided:S, with K and S at least 1, "
        "infill, or bound for objectives without an exact likelihood"
    )


def default_orders(model: Scored, shuffles: int = 8, streams: int = 4) -> list[str]:
    """Orders under which the likelihood of a model is reported."""
    return model.objective.orders(shuffles, streams)


def layout(name: str, length: int, chunk: int, draw: int = 0) -> Layout:
    """Layout of chunk ``chunk`` of ``length`` tokens under a named order; ``chunk`` and ``draw`` seed the shuffles."""
    kind, number = parse_order(name)
    if kind == "shuffled":
        return orders.shuffled(length, min(number, length), draw, chunk)
    if kind == "groups":
        return orders.groups(length, number)
    if kind == "infill":
        return orders.infill(length)
    return orders.strided(length, number) if kind == "strided" else orders.left_to_right(length)


def scored(name: str, length: int) -> slice:
    """The tokens of a chunk that count: all, or the middle third that ``infill`` writes last."""
    return orders.middle(length) if name == "infill" else slice(0, length)


@dataclass(frozen=True)
class Unit:
    """Adjacent chunks of equal length, [B, N] tokens; ``first``: number of the first chunk."""

    first: int
    tokens: np.ndarray


Totals: TypeAlias = list[list[float]]
"""-log p of every chunk of a unit in nats: a list for each draw."""


def units(chunks: Sequence[np.ndarray]) -> list[Unit]:
    """Group chunks into units."""
    out, start = [], 0
    while start < len(chunks):
        stop = start + 1
        while stop < min(len(chunks), start + _UNIT) and len(chunks[stop]) == len(chunks[start]):
            stop += 1
        out.append(Unit(start, np.stack(chunks[start:stop]).astype(np.int64)))
        start = stop
    return out


def score_unit(model: Scored, unit: Unit, order: str, repeats: int) -> Totals:
    """Score a unit. Deterministic orders have a single draw."""
    tokens, numbers = torch.from_numpy(unit.tokens), range(unit.first, unit.first + len(unit.tokens))
    kind = parse_order(order)[0]
    if kind in ("bound", "shuffled") and repeats < 2:
        raise UserError(f"{order} needs at least 2 repeats for its standard error")
    if kind == "bound":
        draws = [[number * repeats + draw for number in numbers] for draw in range(repeats)]
        return [model.bound(tokens, _NOISE, seeds).tolist() for seeds in draws]
    counted = scored(order, tokens.shape[1])
    draws_of_order = range(repeats if kind == "shuffled" else 1)
    return [_nll(model, unit, order, draw)[:, counted].double().sum(1).tolist() for draw in draws_of_order]


def _nll(model: Scored, unit: Unit, order: str, draw: int = 0) -> torch.Tensor:
    """-log p of every token of a unit under a draw of an order, in nats: [B, N]."""
    count, length = unit.tokens.shape
    layouts = [layout(order, length, unit.first + number, draw) for number in range(count)]
    order_BN, blocks_BN = (torch.from_numpy(np.stack(field)) for field in zip(*layouts, strict=True))
    return model.nll(torch.from_numpy(unit.tokens), order_BN, blocks_BN)


def places(order: str, length: int) -> np.ndarray:
    """Place of every token of a chunk, from 1: its position, in a strided order its position in its stream."""
    kind, number = parse_order(order)
    streams = stream_bounds(length, number) if kind == "strided" else [(0, length)]
    return np.concatenate([np.arange(1, stop - start + 1) for start, stop in streams])


def place_totals(model: Scored, unit: Unit, order: str) -> list[float]:
    """-log p of the tokens at every position of a unit's chunks, summed over the chunks, in nats."""
    return _nll(model, unit, order).double().sum(0).tolist()


def by_place(mapper: Mapper, chunks: Sequence[np.ndarray], order: str) -> list[dict[str, float]]:
    """Mean -log p of the tokens by their place: ``first``, ``last``, ``tokens``, ``nll`` in nats a token.

    Places are grouped into 1 to 16, 17 to 32, 33 to 64 and so on.
    """
    if parse_order(order)[0] in ("bound", "infill"):
        raise UserError(f"the loss by place needs an exact likelihood of all tokens, which {order} is not")
    groups = units(chunks)
    sums: dict[int, list[float]] = {}
    for unit, totals in zip(groups, mapper(place_totals, [(unit, order) for unit in groups]), strict=True):
        numbers = np.maximum(4, np.ceil(np.log2(places(order, unit.tokens.shape[1])))).astype(int)
        for number in np.unique(numbers):
            here = numbers == number
            known = sums.setdefault(int(number), [0.0, 0.0])
            known[0] += float(np.asarray(totals)[here].sum())
            known[1] += int(here.sum()) * len(unit.tokens)
    return [
        {"first": 1 if number == 4 else 2 ** (number - 1) + 1, "last": 2**number, "tokens": count, "nll": total / count}
        for number, (total, count) in sorted(sums.items())
    ]


def combine(order: str, scored: Sequence[Totals], tokens: int, text_bytes: float) -> Score:
    """The score of a text from the totals of its units; ``UserError`` if the text is empty."""
    if not tokens:
        raise UserError("nothing to score: the text is empty")
    draws = [[total for unit in scored for total in unit[draw]] for draw in range(len(scored[0]))]
    total = math.fsum(math.fsum(draw) for draw in draws) / len(draws)
    error = 0.0
    if len(draws) > 1:
        error = math.sqrt(math.fsum(np.var(draws, axis=0, ddof=1).tolist()) / len(draws))
    nll = total / tokens
    # exp overflows a float beyond e^709.
    perplexity, bits = math.exp(min(nll, 700.0)), total / math.log(2) / text_bytes
    return Score(order, nll, error / tokens, perplexity, bits, tokens)


def score(mapper: Mapper, chunks: Sequence[np.ndarray], order: str, text_bytes: float, repeats: int = REPEATS) -> Score:
    """Score chunks of at most the model's length, which encode ``text_bytes`` bytes of text.

    ``mapper``: runs the jobs (``models.alone``, ``models.workers``).
    """
    jobs = [(unit, order, repeats) for unit in units(chunks)]
    whole, counted = sum(map(len, chunks)), sum(len(chunk[scored(order, len(chunk))]) for chunk in chunks)
    return combine(order, mapper(score_unit, jobs), counted, text_bytes * counted / max(1, whole))


def cut(tokens: Sequence[int] | np.ndarray, length: int) -> list[np.ndarray]:
    """Split tokens into chunks of ``length``; the last chunk may be shorter."""
    array = np.asarray(tokens, dtype=np.int64)
    return [array[start : start + length] for start in range(0, len(array), length)]
