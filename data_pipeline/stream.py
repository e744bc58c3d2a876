"""The order in which samples are seen: a permutation of the data set for every epoch, computed and never stored.

Sample number n of a run is position n mod len of the permutation of epoch n div len. Its state is n alone, so
resuming is immediate on any number of ranks, and nothing is repeated or lost. The permutation is a Feistel
network over the smallest even-bit domain that holds the data set, walked until it falls inside (cycle walking).

Ranges of this sequence can be left out: the numbers behind them move up.
"""

from collections.abc import Sequence

import numpy as np

from armd_scale.orders import random_words

_ROUNDS = 4


class SampleStream:
    """Maps sample numbers of a run to samples of a data set.

    ``skip``: growing ranges [first, last) of the whole sequence that are left out.
    """

    def __init__(self, samples: int, seed: int, skip: Sequence[tuple[int, int]] = ()) -> None:
        if samples < 1:
            raise ValueError("a stream needs at least one sample")
        self.samples = samples
        self.seed = seed
        self.skip = tuple(skip)
        self._half = max(1, ((samples - 1).bit_length() + 1) // 2)

    def take(self, start: int, count: int) -> np.ndarray:
        """Data set indices of the sample numbers start..start + count - 1."""
        numbers = self.places(np.arange(start, start + count))
        epochs, places = np.divmod(numbers, self.samples)
        out = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = self._permute(places[here], int(epoch))
        return out

    def places(self, numbers: np.ndarray) -> np.ndarray:
        """Places of sample numbers in the whole sequence, with nothing left out."""
        for first, last in self.skip:
            numbers = np.where(numbers >= first, numbers + (last - first), numbers)
        return numbers

    def _permute(self, places: np.ndarray, epoch: int) -> np.ndarray:
        keys = random_words(_ROUNDS, "samples", self.seed, epoch)
        values = places.astype(np.uint64)
        outside = np.ones(len(values), dtype=bool)
        while outside.any():
            values[outside] = self._feistel(values[outside], keys)
            outside = values >= self.samples
        return values.astype(np.int64)

    def _feistel(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        half = np.uint64(self._half)
        mask = np.uint64((1 << self._half) - 1)
        left, right = values >> half, values & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << half) | right


def _mix(words: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: every input bit changes every output bit with probability about one half."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
