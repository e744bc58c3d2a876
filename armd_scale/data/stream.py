"""The order of the samples of a run: a permutation of the data set for every epoch, computed and never stored.

Sample n of a run is position n mod len of the permutation of epoch n div len. The state of the stream is n alone, so a
run resumes at once on any number of ranks, without repeating or losing samples. The permutation is a Feistel network
over the smallest domain of an even number of bits that holds the data set, with cycle walking.

Ranges of this sequence can be left out: later samples move up. The samples of lost shards are left out too. Data sets
can be mixed: a sample number maps to a data set, evenly interleaved, and to a number in this data set.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from armd_scale.config import RunConfig
from armd_scale.data.shards import DOCUMENTS, PackedDataset
from armd_scale.errors import UserError
from armd_scale.orders import random_words

_ROUNDS = 4


class Lost(NamedTuple):
    """Samples [first, last) of a data set, left out from sample number ``since`` of its stream on."""

    since: int
    first: int
    last: int


class SampleStream:
    """Maps sample numbers of a run to samples of a data set.

    Lost samples do not change the order of the other samples, so no sample is repeated or missed.
    """

    def __init__(self, samples: int, seed: int, lost: Sequence[Lost] = ()) -> None:
        if samples < 1:
            raise ValueError("a stream needs at least one sample")
        self.samples = samples
        self.seed = seed
        self._half = max(1, ((samples - 1).bit_length() + 1) // 2)
        self._known: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._losses: list[tuple[int, int, np.ndarray]] = []  # (since, position of since, samples lost from then on)
        for since in sorted({entry.since for entry in lost}):
            position = int(self._positions(np.array([since]))[0])
            gone = [np.arange(entry.first, entry.last) for entry in lost if entry.since <= since]
            self._losses.append((since, position, np.unique(np.concatenate(gone))))

    def take(self, start: int, count: int) -> np.ndarray:
        """Data set indices of the sample numbers start..start + count - 1."""
        return self.at(np.arange(start, start + count))

    def at(self, numbers: np.ndarray) -> np.ndarray:
        """Data set indices of sample numbers."""
        epochs, positions = np.divmod(self._positions(numbers), self.samples)
        out = np.empty(len(numbers), dtype=np.int64)
        for epoch in np.unique(epochs):
            selected = epochs == epoch
            out[selected] = self._walk(positions[selected], int(epoch), self._feistel)
        return out

    def _positions(self, numbers: np.ndarray) -> np.ndarray:
        """Positions of sample numbers in the sequence of all epochs with nothing lost."""
        positions = numbers.astype(np.int64)
        for since, position, gone in self._losses:
            later = numbers >= since
            positions[later] = self._kept(position, numbers[later] - since, gone)
        return positions

    def _kept(self, start: int, ranks: np.ndarray, gone: np.ndarray) -> np.ndarray:
        """Positions of the samples that follow ``ranks`` kept samples after position ``start``."""
        first_epoch, offset = divmod(start, self.samples)
        ranks = ranks + (offset - np.searchsorted(self._holes(first_epoch, gone), offset))
        epochs, ranks = np.divmod(ranks, self.samples - len(gone))
        epochs += first_epoch
        positions = np.empty_like(ranks)
        for epoch in np.unique(epochs):
            selected, holes = epochs == epoch, self._holes(int(epoch), gone)
            passed = np.searchsorted(holes - np.arange(len(holes)), ranks[selected], side="right")
            positions[selected] = epoch * self.samples + ranks[selected] + passed
        return positions

    def _holes(self, epoch: int, gone: np.ndarray) -> np.ndarray:
        """Sorted positions of lost samples in an epoch."""
        if epoch not in self._known or self._known[epoch][0] is not gone:
            if len(self._known) > 4:
                self._known.clear()
            self._known[epoch] = gone, np.sort(self._walk(gone, epoch, self._inverse))
        return self._known[epoch][1]

    def _walk(self, values: np.ndarray, epoch: int, step: Callable[..., np.ndarray]) -> np.ndarray:
        """Apply the permutation of an epoch, or its inverse, until the values are sample indices (cycle walking)."""
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
    """The samples of a run from its data sets.

    Of any n consecutive samples, a data set with share w has n w, up to a rounding for this data set and each data set
    before it. The offsets of the turns depend on the seed, so that the expectation is exact. ``skip``: ranges of the
    sequence to leave out (``skipping``). ``left_out``: (first sample of the sequence without the shard, number of the
    data set, name) of lost shards.
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
        """(data set, number in the data set) of the positions ``numbers`` of the sequence."""
        sources = np.full(len(numbers), len(self.datasets) - 1)
        inside, left, rest = numbers.copy(), np.ones(len(numbers), dtype=bool), 1.0
        for source, share in enumerate(self.shares[:-1]):
            # This data set against all later data sets, which share the remaining positions.
            rate, offset = share / rest, self._offsets[source]
            taken = np.floor(inside * rate + offset).astype(np.int64)
            mine = left & (np.floor((inside + 1) * rate + offset).astype(np.int64) > taken)
            sources[mine] = source
            inside = np.where(mine, taken, np.where(left, inside - taken, inside))
            left &= ~mine
            rest -= share
        return sources, inside

    def _first(self, place: int, source: int) -> int:
        """The number in a data set of its first sample at or after position ``place`` of the sequence."""
        count = 16
        while True:
            sources, inside = self.assign(np.arange(place, place + count))
            if (sources == source).any():
                return int(inside[sources == source][0])
            count *= 4

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [count, N], int64, of the samples start..start + count - 1."""
        return self._gather(start, count, np.int64, lambda data, numbers: data.read(numbers))

    def starts(self, start: int, count: int) -> np.ndarray:
        """``packing.starts`` [count, N] of these samples."""
        return self._gather(start, count, np.int64, lambda data, numbers: data.starts(numbers))

    def flags(self, start: int, count: int, name: str) -> np.ndarray:
        """Flags [count, N] of the tokens of these samples."""
        return self._gather(start, count, bool, lambda data, numbers: data.flags(numbers, name))

    def _gather(
        self, start: int, count: int, dtype: type, read: Callable[[PackedDataset, np.ndarray], np.ndarray]
    ) -> np.ndarray:
        sources, indices = self.locate(start, count)
        out: np.ndarray = np.empty((count, self.datasets[0].length), dtype=dtype)
        for source in np.unique(sources):
            selected = sources == source
            out[selected] = read(self.datasets[source], indices[selected])
        return out

    def locate(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(data sets, indices in the data sets) of the samples start..start + count - 1."""
        sources, inside = self.assign(skipping(np.arange(start, start + count), self._skip))
        indices = np.empty(count, dtype=np.int64)
        for source in np.unique(sources):
            selected = sources == source
            indices[selected] = self._streams[source].at(inside[selected])
        return sources, indices


def skipping(numbers: np.ndarray, skip: Sequence[tuple[int, int]]) -> np.ndarray:
    """Positions of sample numbers in a sequence without the ranges [first, last), given in increasing order."""
    for first, last in skip:
        numbers = np.where(numbers >= first, numbers + (last - first), numbers)
    return numbers


def open_mixture(config: RunConfig) -> list[PackedDataset]:
    """Open the training data of a run and the data sets of its mixture; ``UserError`` if they do not match."""
    folders = [config.data_directory, *(Path(other.directory) for other in config.data.mixture)]
    datasets = [PackedDataset(folder / "train") for folder in folders]
    for data in datasets:
        if data.length != config.model.length:
            raise UserError(
                f"the samples in {data.folder} have {data.length} tokens but model.length is {config.model.length}: "
                "prepare them again in another data.directory"
            )
        if config.data.documents == "separate" and not data.has(DOCUMENTS):
            raise UserError(
                f"the samples in {data.folder} have no borders of documents, which data.documents=separate needs: "
                "prepare them again in another data.directory, or set data.documents=joined"
            )
        if any(data.index[key] != datasets[0].index[key] for key in ("tokenizer_sha256", "bos_id", "eos_id")):
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
