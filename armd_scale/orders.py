"""Generation orders and blocks: the order of the positions and the tokens that are generated together.

A layout of a sequence of N tokens is a pair of integer arrays, both along the generation order:

- ``order`` [N]: the position (1..N) of the n-th generated token; a permutation;
- ``block_ids`` [N]: B(n) >= 1, never decreasing; tokens of one block are generated together.

Position 0 is BOS, in block 0, and belongs to no layout. Every layout is a function of (seed, step, sample), so every
rank can compute any layout without communication.
Source: paper section 3 (orders, progressive permutation) and section 4 (strided); docs/explanation/model.md.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from armd_scale.errors import UserError


class Layout(NamedTuple):
    """A generation order [..., N] (positions 1..N) and its block indices [..., N]."""

    order: np.ndarray
    block_ids: np.ndarray


def join(layouts: Sequence[Layout]) -> Layout:
    """The layout of a packed sample from those of its documents: one document after another, positions in the sample.

    Every further document skips a block number, which is that of its BOS.
    """
    position, block, fields = 0, 0, []
    for layout in layouts:
        fields.append((layout.order + position, layout.block_ids + block))
        position, block = position + len(layout.order), block + int(layout.block_ids[-1]) + 1
    return Layout(*map(np.concatenate, zip(*fields, strict=True)))


def random_words(count: int, purpose: str, *key: int) -> np.ndarray:
    """``count`` uint64 words, a function of ``purpose`` and the key; raw bits, equal in all NumPy versions."""
    digest = hashlib.sha256(f"{purpose}:{key}".encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)


def left_to_right(length: int) -> Layout:
    """Positions 1..length, one token per block."""
    positions = np.arange(1, length + 1)
    return Layout(positions, positions.copy())


def shuffled(length: int, count: int, *key: int) -> Layout:
    """Left to right, with ``count`` random positions permuted among their places.

    ``count`` = 0 or 1 is left to right; ``count`` = ``length`` is a uniformly random order. The layout is a function of
    the arguments.
    """
    order, block_ids = left_to_right(length)
    if count > 1:
        # A stable sort is deterministic even for equal words.
        chosen = np.argsort(random_words(length, "order", *key), kind="stable")[:count]
        order[np.sort(chosen)] = chosen + 1
    return Layout(order, block_ids)


def window(length: int, count: int, *key: int) -> Layout:
    """Left to right, with a random window of ``count`` consecutive positions permuted."""
    order, block_ids = left_to_right(length)
    if count > 1:
        words = random_words(1 + count, "window", *key)
        first = int(words[0] % np.uint64(length - count + 1))
        order[first : first + count] = first + 1 + np.argsort(words[1:], kind="stable")
    return Layout(order, block_ids)


def strided(length: int, streams: int) -> Layout:
    """S contiguous streams interleaved by relative position: strided block-parallel order.

    The heads of the streams come first, one head per block; then all tokens of a relative position form a block. When S
    does not divide the length, the first ``length % streams`` streams are one token longer, so that only the last block
    is shorter. Number of blocks: S + ceil(N / S) - 1.
    """
    from armd_scale.formulas import stream_bounds  # local import: preparing data needs no torch

    if streams < 1:
        raise UserError(f"a strided layout needs at least 1 stream, not {streams}")
    starts = np.array([start for start, _ in stream_bounds(length, streams)])
    streams = len(starts)
    short, longer = divmod(length, streams)
    # Round r holds relative position r of all streams; the last round holds the longer streams only.
    rounds = np.arange(short)[:, None] + starts[None, :]
    order = np.concatenate([rounds.reshape(-1), starts[:longer] + short]) + 1
    index = np.arange(length)
    block_ids = np.where(index < streams, index + 1, streams + index // streams)
    return Layout(order, block_ids)


def groups(length: int, size: int, first: int = 0) -> Layout:
    """Contiguous groups: left to right, ``size`` neighbours in a block; the first block has ``first`` tokens.

    ``first`` = 0: as many as the others.
    """
    if size < 1:
        raise UserError(f"a layout in groups needs at least 1 token in a group, not {size}")
    order, index = np.arange(1, length + 1), np.arange(length)
    return Layout(order, (index + (-first) % size) // size + 1)


def infill(length: int) -> Layout:
    """The first and the last third left to right, then the ``middle``; one token per block."""
    positions = np.arange(1, length + 1)
    gap = positions[middle(length)]
    return Layout(np.concatenate([np.setdiff1d(positions, gap), gap]), positions)


def middle(length: int) -> slice:
    """The middle third of a text, as indices from 0."""
    return slice(length // 3, length - length // 3)


def places(layout: Layout) -> np.ndarray:
    """Place of every token in its block, from 0, along the order [N]."""
    index = np.arange(len(layout.order))
    starts = np.searchsorted(layout.block_ids, layout.block_ids)
    return index - starts


def shuffled_tokens(step: int, *, ar_steps: int, permutation_steps: int, rho: int) -> int:
    """Number of tokens that progressive permutation shuffles at ``step``: 0, then from 1 to ``rho``.

    Left to right for the first ``ar_steps`` (i_AR); linear growth until ``permutation_steps`` (i_perm).
    """
    if step < ar_steps or rho == 0:
        return 0
    if step >= permutation_steps:
        return rho
    return 1 + (rho - 1) * (step - ar_steps) // (permutation_steps - ar_steps)


def draw_streams(streams: list[int], seed: int, step: int) -> int:
    """The number of streams S of a strided fine-tuning step, equal on all ranks."""
    return _choose(streams, "streams", seed, step)


def draw_share(seed: int, step: int) -> float:
    """A uniform number in [0, 1) that selects the kind of order of a step, equal on all ranks."""
    return float(random_words(1, "kind", seed, step)[0]) / 2.0**64


def draw_group(sizes: list[int], seed: int, step: int) -> int:
    """The size of the groups of a step, equal on all ranks."""
    return _choose(sizes, "group", seed, step)


def _choose(values: list[int], purpose: str, seed: int, step: int) -> int:
    return values[int(random_words(1, purpose, seed, step)[0] % np.uint64(len(values)))]


def inverse(order: np.ndarray) -> np.ndarray:
    """The inverse permutation: the generation step n (from 1) of the positions 1..N, [..., N]."""
    return np.argsort(order, axis=-1) + 1
