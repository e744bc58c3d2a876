"""The order in which samples are seen: a permutation of the data set for every epoch, computed and never stored.

Sample number n of a run is position n mod len of the permutation of epoch n div len. Its state is n alone, so
resuming is immediate on any number of ranks, and nothing is repeated or lost. The permutation is a Feistel
network over the smallest even-bit domain that holds the data set, walked until it falls inside (cycle walking).

Ranges of this sequence can be left out: the numbers behind them move up. So do the samples of lost shards, wherever the
permutation has put them. Several data sets can be mixed: each sample number belongs to one of them, in even turns, and
has a number inside it, both computed as well.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from armd_scale.config import RunConfig
from armd_scale.data.shards import PackedDataset
from armd_scale.errors import UserError
from armd_scale.orders import random_words

_ROUNDS = 4


class Lost(NamedTuple):
    """Samples [first, last) of a data set that are left out from its sample number ``since`` on."""

    since: int
    first: int
    last: int


class SampleStream:
    """Maps sample numbers of a run to samples of a data set.

    Where samples are lost, the order of the others stays, so none of them is repeated or missed.
    """

    def __init__(self, samples: int, seed: int, lost: Sequence[Lost] = ()) -> None:
        if samples < 1:
            raise ValueError("a stream needs at least one sample")
        self.samples = samples
        self.seed = seed
        self._half = max(1, ((samples - 1).bit_length() + 1) // 2)
        self._known: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._losses: list[tuple[int, int, np.ndarray]] = []  # since which number, its place, samples lost from then on
        for since in sorted({each.since for each in lost}):
            place = int(self._places(np.array([since]))[0])
            gone = [np.arange(each.first, each.last) for each in lost if each.since <= since]
            self._losses.append((since, place, np.unique(np.concatenate(gone))))

    def take(self, start: int, count: int) -> np.ndarray:
        """Data set indices of the sample numbers start..start + count - 1."""
        return self.at(np.arange(start, start + count))

    def at(self, numbers: np.ndarray) -> np.ndarray:
        """Data set indices of sample numbers."""
        epochs, places = np.divmod(self._places(numbers), self.samples)
        out = np.empty(len(numbers), dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = self._walk(places[here], int(epoch), self._feistel)
        return out

    def _places(self, numbers: np.ndarray) -> np.ndarray:
        """Places of sample numbers in the sequence of all epochs with nothing lost."""
        places = numbers.astype(np.int64)
        for since, place, gone in self._losses:
            later = numbers >= since
            places[later] = self._kept(place, numbers[later] - since, gone)
        return places

    def _kept(self, start: int, ranks: np.ndarray, gone: np.ndarray) -> np.ndarray:
        """The places that are reached from ``start`` after passing ``ranks`` others that are not lost."""
        epoch, inside = divmod(start, self.samples)
        ranks = ranks + (inside - np.searchsorted(self._holes(epoch, gone), inside))
        epochs, ranks = np.divmod(ranks, self.samples - len(gone))
        epochs += epoch
        places = np.empty_like(ranks)
        for each in np.unique(epochs):
            here, holes = epochs == each, self._holes(int(each), gone)
            passed = np.searchsorted(holes - np.arange(len(holes)), ranks[here], side="right")
            places[here] = each * self.samples + ranks[here] + passed
        return places

    def _holes(self, epoch: int, gone: np.ndarray) -> np.ndarray:
        """Places of lost samples inside an epoch, sorted."""
        if epoch not in self._known or self._known[epoch][0] is not gone:
            if len(self._known) > 4:
                self._known.clear()
            self._known[epoch] = gone, np.sort(self._walk(gone, epoch, self._inverse))
        return self._known[epoch][1]

    def _walk(self, values: np.ndarray, epoch: int, step: Callable[..., np.ndarray]) -> np.ndarray:
        """One step of the permutation of an epoch, or of its inverse, and as many more as lead back inside."""
        keys = random_words(_ROUNDS, "samples", self.seed, epoch)
        values = values.astype(np.uint64)
        outside = np.ones(len(values), dtype=bool)
        while outside.any():
            values[outside] = step(values[outside], keys)
            outside = values >= self.samples
        return values.astype(np.int64)

    def _feistel(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        left, right, half, mask = self._halves(values)
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << half) | right

    def _inverse(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        left, right, half, mask = self._halves(values)
        for key in keys[::-1]:
            left, right = right ^ (_mix(left ^ key) & mask), left
        return (left << half) | right

    def _halves(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.uint64, np.uint64]:
        half, mask = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        return values >> half, values & mask, half, mask


class Mixture:
    """The samples of a run, out of one or several data sets.

    Of any n samples in a row, the data set with share w has n w, rounded up or down once for it and for every data set
    before it; where its turns begin depends on the seed, so that the expectation is exact. ``skip``: ranges of the
    sequence that are left out (``skipping``). ``left_out``: shards that are lost, each with the place in the sequence
    since which it is, the number of its data set, and its name.
    """

    def __init__(
        self,
        datasets: Sequence[PackedDataset],
        weights: Sequence[float],
        seed: int,
        skip: Sequence[tuple[int, int]] = (),
        left_out: Sequence[tuple[int, int, str]] = (),
    ) -> None:
        self.datasets = datasets
        self.shares = np.array(weights, dtype=np.float64) / sum(weights)
        self._skip = skip
        offsets = random_words(len(datasets), "mixture", seed)
        self._offsets = (offsets >> np.uint64(11)).astype(np.float64) / 2**53
        self._streams = []
        for number, data in enumerate(datasets):
            lost = [Lost(self._first(place, number), *data.span(name)) for place, of, name in left_out if of == number]
            self._streams.append(SampleStream(len(data), seed, lost))

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each token, EOS included, on average."""
        return float(sum(w * data.bytes_per_token for w, data in zip(self.shares, self.datasets, strict=True)))

    def assign(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Data set of each of the places ``numbers`` of the sequence, and its number inside it."""
        sources = np.full(len(numbers), len(self.datasets) - 1)
        inside, left, rest = numbers.copy(), np.ones(len(numbers), dtype=bool), 1.0
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

    def _first(self, place: int, source: int) -> int:
        """The number inside a data set of its first sample at or behind a place of the sequence."""
        count = 16
        while True:
            sources, inside = self.assign(np.arange(place, place + count))
            if (sources == source).any():
                return int(inside[sources == source][0])
            count *= 4

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens of the sample numbers start..start + count - 1, [count, N] int64."""
        sources, indices = self.locate(start, count)
        out = np.empty((count, self.datasets[0].length), dtype=np.int64)
        for source in np.unique(sources):
            here = sources == source
            out[here] = self.datasets[source].read(indices[here])
        return out

    def locate(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Data set of the sample numbers start..start + count - 1, and their indices in it."""
        sources, inside = self.assign(skipping(np.arange(start, start + count), self._skip))
        indices = np.empty(count, dtype=np.int64)
        for source in np.unique(sources):
            here = sources == source
            indices[here] = self._streams[source].at(inside[here])
        return sources, indices


def skipping(numbers: np.ndarray, skip: Sequence[tuple[int, int]]) -> np.ndarray:
    """Places of sample numbers in a sequence of which the growing ranges [first, last) are left out."""
    for first, last in skip:
        numbers = np.where(numbers >= first, numbers + (last - first), numbers)
    return numbers


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
