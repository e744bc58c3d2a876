"""Generation orders and blocks."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from armd_scale import orders
from armd_scale.errors import UserError


def check(layout):
    """A permutation of 1..N, and blocks that start at 1 or more and never decrease."""
    length = len(layout.order)
    assert sorted(layout.order.tolist()) == list(range(1, length + 1))
    assert layout.block_ids[0] >= 1
    assert (np.diff(layout.block_ids) >= 0).all()


def test_keys_do_not_run_into_each_other():
    """(0, 5) and (0, 5, 0), or a seed of two words and a step, are different draws."""
    draws = [
        orders.random_words(2, *key).tolist() for key in (("a", 0, 5), ("a", 0, 5, 0), ("b", 0, 5), ("a", 2**32, 5))
    ]
    assert len({tuple(words) for words in draws}) == 4


def test_strided_example_of_the_paper():
    """N = 8, S = 2: 1, 5 | 2, 6 | 3, 7 | 4, 8; the heads are blocks of their own."""
    layout = orders.strided(8, 2)
    assert layout.order.tolist() == [1, 5, 2, 6, 3, 7, 4, 8]
    assert layout.block_ids.tolist() == [1, 2, 3, 3, 4, 4, 5, 5]


def test_ragged_strided_layout():
    layout = orders.strided(7, 2)
    assert layout.order.tolist() == [1, 5, 2, 6, 3, 7, 4]
    assert layout.block_ids.tolist() == [1, 2, 3, 3, 4, 4, 5]


@given(st.integers(1, 70), st.integers(1, 80))
def test_strided_is_a_layout(length, streams):
    layout = orders.strided(length, streams)
    check(layout)
    used = min(streams, length)
    steps = used + -(-length // used) - 1
    assert layout.block_ids[-1] == steps
    sizes = np.bincount(layout.block_ids)[1:]
    assert (sizes[:used] == 1).all()
    assert (sizes[used:-1] == used).all()
    # every stream is contiguous and in order: the ranks of neighbours that are not heads grow
    ranks = orders.inverse(layout.order)
    heads = set(layout.order[:used].tolist())
    assert all(ranks[p - 1] > ranks[p - 2] for p in range(2, length + 1) if p not in heads)


@given(st.integers(1, 70), st.integers(0, 80), st.integers(0, 2**40), st.integers(0, 99))
def test_shuffled_moves_only_the_chosen(length, count, seed, sample):
    layout = orders.shuffled(length, count, seed, 1, sample)
    check(layout)
    moved = (layout.order != np.arange(1, length + 1)).sum()
    assert moved <= (count if count > 1 else 0)
    again = orders.shuffled(length, count, seed, 1, sample)
    assert np.array_equal(orders.inverse(layout.order)[layout.order - 1], np.arange(1, length + 1))
    assert np.array_equal(layout.order, again.order)


def test_shuffled_is_uniform_over_positions_and_permutations():
    """k = 2 of 4: each pair is chosen equally often and is swapped half of the time; k = N is any permutation."""
    swapped: dict[tuple[int, ...], int] = {}
    for sample in range(6000):
        key = tuple(orders.shuffled(4, 2, 0, sample).order.tolist())
        swapped[key] = swapped.get(key, 0) + 1
    assert len(swapped) == 7  # identity and six transpositions
    assert swapped.pop((1, 2, 3, 4)) == pytest.approx(3000, abs=160)
    assert all(count == pytest.approx(500, abs=100) for count in swapped.values())
    every = {tuple(orders.shuffled(4, 4, 1, sample).order.tolist()) for sample in range(500)}
    assert len(every) == 24


def test_layouts_are_the_same_forever():
    """Golden values: a resumed run of another version must not see other orders."""
    assert orders.shuffled(10, 5, 7, 3, 1).order.tolist() == GOLDEN_ORDER
    assert [orders.draw_streams([1, 2, 4], 0, step) for step in range(8)] == GOLDEN_STREAMS


def test_progressive_schedule():
    k = [orders.shuffled_tokens(s, ar_steps=10, permutation_steps=50, rho=8) for s in range(60)]
    assert k[:10] == [0] * 10
    assert k[10] == 1
    assert k[50:] == [8] * 10
    assert all(b - a in (0, 1) for a, b in itertools.pairwise(k))
    assert orders.shuffled_tokens(0, ar_steps=0, permutation_steps=0, rho=16) == 16
    assert orders.shuffled_tokens(99, ar_steps=0, permutation_steps=0, rho=0) == 0


def test_draw_streams_draws_all():
    drawn = [orders.draw_streams([1, 2, 4], 5, step) for step in range(3000)]
    assert {s: pytest.approx(1000, abs=120) for s in (1, 2, 4)} == {s: drawn.count(s) for s in (1, 2, 4)}


def test_strided_needs_a_stream():
    with pytest.raises(UserError, match="at least 1 stream"):
        orders.strided(8, 0)


GOLDEN_ORDER = [1, 2, 3, 10, 5, 9, 4, 8, 7, 6]
GOLDEN_STREAMS = [4, 2, 4, 4, 4, 2, 2, 1]


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 8))
def test_groups_are_neighbours(length, size, first):
    layout = orders.groups(length, size, first)
    check(layout)
    assert layout.order.tolist() == list(range(1, length + 1))
    sizes = np.bincount(layout.block_ids)[1:].tolist()
    assert sizes[0] == min(length, first % size or size)
    assert all(count == size for count in sizes[1:-1])
    assert len(sizes) == 1 or 1 <= sizes[-1] <= size
    expected = [place for count in sizes for place in range(count)]
    assert orders.places(layout).tolist() == expected
