"""The order in which samples are seen: a permutation of the data set for every epoch, computed and never stored.

Sample number n of a run is position n mod len of the permutation of epoch n div len. Its state is n alone, so
resuming is immediate on any number of ranks, and nothing is repeated or lost. The permutation is a Feistel
network over the smallest even-bit domain that holds the data set, walked until it falls inside (cycle walking).

Ranges of this sequence can be left out: the numbers behind them move up. Several data sets can be mixed: each sample
number belongs to one of them, in even turns, and has a number inside it, both computed as well.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from armd_scale.config import RunConfig
from armd_scale.errors import UserError
from armd_scale.orders import random_words
from data_pipeline.shards import PackedDataset

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
        return self.at(self.places(np.arange(start, start + count)))

    def at(self, numbers: np.ndarray) -> np.ndarray:
        """Data set indices of places in the whole sequence."""
        epochs, places = np.divmod(numbers, self.samples)
        out = np.empty(len(numbers), dtype=np.int64)
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


class Mixture:
    """The samples of a run, out of one or several data sets.

    Of any n samples in a row, the data set with share w has n w, rounded up or down once for it and for every data set
    before it; where its turns begin depends on the seed, so that the expectation is exact. ``skip``: as for
    ``SampleStream``.
    """

    def __init__(
        self,
        datasets: Sequence[PackedDataset],
        weights: Sequence[float],
        seed: int,
        skip: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.datasets = datasets
        self.shares = np.array(weights, dtype=np.float64) / sum(weights)
        self._order = SampleStream(1, seed, skip)
        self._streams = [SampleStream(len(data), seed) for data in datasets]
        offsets = random_words(len(datasets), "mixture", seed)
        self._offsets = (offsets >> np.uint64(11)).astype(np.float64) / 2**53

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each token, EOS included, on average."""
        return float(sum(w * data.bytes_per_token for w, data in zip(self.shares, self.datasets, strict=True)))

    def assign(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Data set of the sample numbers start..start + count - 1, and their numbers inside it."""
        numbers = self._order.places(np.arange(start, start + count))
        sources = np.full(count, len(self.datasets) - 1)
        inside, left, rest = numbers.copy(), np.ones(count, dtype=bool), 1.0
        for source, share in enumerate(self.shares[:-1]):
            # This one against all behind it; those have what it leaves, numbered anew.
            rate, offset = share / rest, self._offsets[source]
            taken = np.floor(inside * rate + offset).astype(np.int64)
            mine = left & (np.floor((inside + 1) * rate + offset).astype(np.int64) > taken)
            sources[mine] = source
            inside = np.where(mine, taken, np.where(left, inside - taken, inside))
            left &= ~mine
            rest -= share
        return sources, inside

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens of the sample numbers start..start + count - 1, [count, N] int64."""
        sources, inside = self.assign(start, count)
        out = np.empty((count, self.datasets[0].length), dtype=np.int64)
        for source in np.unique(sources):
            here = sources == source
            out[here] = self.datasets[source].read(self._streams[source].at(inside[here]))
        return out


def open_mixture(config: RunConfig) -> list[PackedDataset]:
    """The run's own training data and what it is mixed with; ``UserError`` when they do not fit together."""
    folders = [config.data_directory, *(Path(other.directory) for other in config.data.mixture)]
    datasets = [PackedDataset(folder / "train") for folder in folders]
    for data in datasets:
        if data.length != config.model.length:
            raise UserError(
                f"the samples in {data.folder} have {data.length} tokens but model.length is {config.model.length}: "
                "prepare them again in another data.directory"
            )
        if data.index["tokenizer_sha256"] != datasets[0].index["tokenizer_sha256"]:
            raise UserError(
                f"{data.folder} was made with another tokenizer than {datasets[0].folder}: prepare it again with "
                f"data.tokenizer={folders[0] / 'tokenizer'}"
            )
    return datasets


def _mix(words: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: every input bit changes every output bit with probability about one half."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
