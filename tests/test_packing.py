"""Borders of documents, and packing them into samples."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from armd_scale import packing

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=9)


@given(SIZES)
def test_borders(sizes):
    firsts = np.isin(np.arange(sum(sizes)), np.cumsum([0, *sizes]))[None]
    starts = packing.starts(firsts)
    assert packing.lengths(starts[0]) == sizes
    edges = np.cumsum([0, *sizes])
    assert starts[0].tolist() == np.repeat(edges[:-1], sizes).tolist()
    assert packing.ends(starts)[0].tolist() == np.repeat(edges[1:], sizes).tolist()
    firsts[0, 0] = False
    assert np.array_equal(packing.starts(firsts), starts), "a sample begins with a document"


@given(st.integers(0, 100), SIZES)
def test_shares_add_up_and_follow_the_lengths(count, sizes):
    parts = packing.share_out(count, sizes)
    assert sum(parts) == count
    for part, size in zip(parts, sizes, strict=True):
        assert abs(part - count * size / sum(sizes)) < 1


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 30))
def test_best_fit(sizes, length):
    """Every token once, no document cut that fits, and each piece where it leaves the least room."""
    samples = packing.best_fit(np.array(sizes, dtype=np.int64), length)
    pieces = sorted(piece for sample in samples for piece in sample)
    expected = [(n, at, min(at + length, size)) for n, size in enumerate(sizes) for at in range(0, size, length)]
    assert pieces == sorted(expected)
    room = [length] * len(samples)
    numbers = {piece: number for number, sample in enumerate(samples) for piece in sample}
    opened = 0
    for piece in sorted(expected, key=lambda piece: piece[1] - piece[2]):
        size, number = piece[2] - piece[1], numbers[piece]
        fitting = [left for left in room[:opened] if left >= size]
        assert room[number] == (min(fitting) if fitting else length)
        opened = max(opened, number + 1)
        room[number] -= size
    assert all(left >= 0 for left in room)
