"""The order of samples: permutations, left-out ranges, lost shards and mixtures."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from armd_scale.data.stream import Lost, Mixture, SampleStream


@given(st.integers(1, 3000), st.integers(0, 2**31), st.data())
def test_the_stream_is_a_permutation_of_every_epoch(samples, seed, data):
    stream = SampleStream(samples, seed)
    whole = stream.take(0, 2 * samples)
    for epoch in range(2):
        assert np.array_equal(np.sort(whole[epoch * samples : (epoch + 1) * samples]), np.arange(samples))
    # stopping and going on anywhere gives the same sequence
    cut = data.draw(st.integers(0, 2 * samples))
    again = SampleStream(samples, seed)
    assert np.array_equal(np.concatenate([again.take(0, cut), again.take(cut, 2 * samples - cut)]), whole)


@given(st.integers(1, 300), st.lists(st.integers(0, 400), max_size=6, unique=True).map(sorted), st.integers(1, 200))
def test_ranges_can_be_left_out(samples, edges, count):
    """What is left is the whole sequence without the ranges, in its order."""
    skip = list(zip(edges[::2], edges[1::2], strict=False))
    whole = SampleStream(samples, 3).take(0, count + 400)
    kept = [sample for place, sample in enumerate(whole) if not any(a <= place < b for a, b in skip)]
    mixture = Mixture([_Numbers(samples)], [2.0], 3, skip)
    assert mixture.read(0, count)[:, 0].tolist() == kept[:count]
    assert mixture.read(count // 2, count)[: count - count // 2, 0].tolist() == kept[count // 2 : count]


@given(
    st.integers(2, 300), st.integers(0, 9), st.lists(st.tuples(st.integers(0, 500), st.integers(0, 299)), max_size=5),
    st.integers(1, 30),
)  # fmt: skip
def test_lost_samples_are_passed_over(samples, seed, losses, size):
    """From the moment of a loss on, what comes is what would have come, without the lost ones: checked one by one."""
    lost = [Lost(since, min(first, samples - 1), min(first + size, samples)) for since, first in losses]
    gone = {
        since: {n for each in lost if each.since <= since for n in range(each.first, each.last)} for since, _ in losses
    }
    if any(len(each) == samples for each in gone.values()):
        return
    whole = iter(SampleStream(samples, seed).take(0, 200 * samples + 2000).tolist())
    expected = []
    for number in range(700):
        without = set().union(*(each for since, each in gone.items() if since <= number))
        expected.append(next(sample for sample in whole if sample not in without))
    stream = SampleStream(samples, seed, lost)
    assert stream.take(0, 700).tolist() == expected
    assert stream.take(350, 10).tolist() == expected[350:360]


class _Numbers:
    """A data set whose samples are their own numbers."""

    length, bytes_per_token = 1, 1.0

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def read(self, numbers):
        return np.asarray(numbers)[:, None]


@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0.01, 10)), min_size=1, max_size=4),
    st.integers(0, 9),
    st.integers(0, 10**9),
    st.data(),
)
def test_mixtures_are_exact(sources, seed, start, data):
    """Any cut gives the same samples; inside a data set they follow its own order; shares hold in any window."""
    sizes, weights = zip(*sources, strict=True)
    mixture = Mixture([_Numbers(size) for size in sizes], weights, seed)
    chosen, inside = mixture.assign(np.arange(start, start + 200))
    cut = data.draw(st.integers(0, 200))
    halves = [mixture.assign(np.arange(*part)) for part in ((start, start + cut), (start + cut, start + 200))]
    assert np.array_equal(np.concatenate([half[0] for half in halves]), chosen)
    assert np.array_equal(np.concatenate([half[1] for half in halves]), inside)
    tokens = mixture.read(start, 200)[:, 0]
    for source, (size, weight) in enumerate(sources):
        here = inside[chosen == source]
        assert np.array_equal(here, np.arange(len(here)) + (here[0] if len(here) else 0)), "none repeated, none lost"
        expected = SampleStream(size, seed).take(int(here[0]), len(here)) if len(here) else []
        assert tokens[chosen == source].tolist() == list(expected)
        assert abs(len(here) - 200 * weight / sum(weights)) <= source + 1.01


def test_the_stream_shuffles():
    """Neighbours are spread, and epochs differ: no correlation beyond chance between place and sample."""
    stream = SampleStream(5000, 0)
    first, second = stream.take(0, 5000), stream.take(5000, 5000)
    assert (first == second).mean() < 0.01
    for order in (first, second):
        assert abs(np.corrcoef(np.arange(5000), order)[0, 1]) < 0.05
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
