"""Generation orders and blocks: which position is generated when, and together with which others.

A layout of a sequence of N tokens is a pair of integer arrays, both along the generation order:

- ``order`` [N]: the position (1..N) of the n-th generated token; a permutation;
- ``block_ids`` [N]: B(n) >= 1, never decreasing; tokens of one block are generated together.

Position 0 is BOS, in block 0, and belongs to no layout. Everything here is a function of
(seed, step, sample) alone, so every rank can compute any layout without communication.
Source: paper section 3 (orders, progressive permutation) and section 4 (strided); docs/explanation/model.md.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from armd_scale.errors import UserError


class Layout(NamedTuple):
    """A generation order [..., N] (positions 1..N) and its block indices [..., N]."""

    order: np.ndarray
    block_ids: np.ndarray


def random_words(count: int, purpose: str, *key: int) -> np.ndarray:
    """``count`` uint64 words that depend on ``purpose`` and the key alone; raw bits, stable over NumPy versions."""
    digest = hashlib.sha256(f"{purpose}:{key}".encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)


def left_to_right(length: int) -> Layout:
    """Positions 1..length, one token a block."""
    positions = np.arange(1, length + 1)
    return Layout(positions, positions.copy())


def shuffled(length: int, count: int, *key: int) -> Layout:
    """Left to right, but ``count`` random positions are permuted among their own slots.

    ``count`` = 0 or 1 is left to right and ``count`` = ``length`` a uniformly random order. The same
    key gives the same layout everywhere.
    """
    order, block_ids = left_to_right(length)
    if count > 1:
        # Equal words would be a tie; a stable sort keeps even that case deterministic.
        chosen = np.argsort(random_words(length, "order", *key), kind="stable")[:count]
        order[np.sort(chosen)] = chosen + 1
    return Layout(order, block_ids)


def window(length: int, count: int, *key: int) -> Layout:
    """Left to right, but a run of ``count`` neighbours, placed at random, is permuted."""
    order, block_ids = left_to_right(length)
    if count > 1:
        words = random_words(1 + count, "window", *key)
        first = int(words[0] % np.uint64(length - count + 1))
        order[first : first + count] = first + 1 + np.argsort(words[1:], kind="stable")
    return Layout(order, block_ids)


def strided(length: int, streams: int) -> Layout:
    """S contiguous streams interleaved by relative position: strided block-parallel order.

    The heads of the streams come first, each a block of its own; then the tokens of one relative
    position are one block. When S does not divide the length, the first ``length % streams`` streams
    are one token longer, so only the last block is ragged. Blocks: S + ceil(N / S) - 1.
    """
    from armd_scale.formulas import stream_bounds  # not above: preparing data needs no torch

    if streams < 1:
        raise UserError(f"a strided layout needs at least 1 stream, not {streams}")
    starts = np.array([start for start, _ in stream_bounds(length, streams)])
    streams = len(starts)
    short, longer = divmod(length, streams)
    # round r holds relative position r of each stream; the last round only the longer streams
    rounds = np.arange(short)[:, None] + starts[None, :]
    order = np.concatenate([rounds.reshape(-1), starts[:longer] + short]) + 1
    index = np.arange(length)
    block_ids = np.where(index < streams, index + 1, streams + index // streams)
    return Layout(order, block_ids)


def shuffled_tokens(step: int, *, ar_steps: int, permutation_steps: int, rho: int) -> int:
    """How many tokens progressive permutation shuffles at ``step``: 0, then 1 growing to ``rho``.

    Left to right for the first ``ar_steps`` (i_AR); linear growth until ``permutation_steps`` (i_perm).
    """
    if step < ar_steps or rho == 0:
        return 0
    if step >= permutation_steps:
        return rho
    return 1 + (rho - 1) * (step - ar_steps) // (permutation_steps - ar_steps)


def draw_streams(streams: list[int], seed: int, step: int) -> int:
    """The number of streams S of a strided fine-tuning step, one draw for all ranks."""
    word = random_words(1, "streams", seed, step)[0]
    return streams[int(word % np.uint64(len(streams)))]


def inverse(order: np.ndarray) -> np.ndarray:
    """The generation step n (from 1) of each position 1..N: the map from positions back to the order [..., N]."""
    return np.argsort(order, axis=-1) + 1
