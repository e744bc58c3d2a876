"""Encodes text by segments, with a cache of the tokens of known segments.

Tokenizer libraries spend most of their time on repeated words. If no token can span a pair of bytes, a text can be
split between these bytes without changing its tokens, and most of the resulting segments repeat. Splitting, looking up
and joining are a few numpy passes over a window of text, without a Python object per word.

- ``SegmentEncoder``: texts -> token arrays, equal to encoding each segment separately;
- ``sentencepiece_cuts``, ``bytelevel_cuts``: the byte pairs that no token of a tokenizer spans.
"""

import itertools
from collections.abc import Callable, Iterable

import numpy as np

_KEY = 15
"""Largest number of bytes of a segment in the hash table; longer segments are looked up in a dictionary."""
_LONGEST = 64  # largest number of bytes of a cached segment
_WINDOW = 1 << 18  # bytes of text processed at a time, whose arrays fit in the cache of a core
_MOST_SEGMENTS = 1 << 20
_MOST_TOKENS = 1 << 24
_LOW_BYTES = np.array([(1 << 8 * count) - 1 for count in range(9)], dtype=np.uint64)


class SegmentEncoder:
    """Encodes texts by segments.

    ``cuts`` [256, 256] bool: whether text is split between adjacent bytes x and y. ``encode``: tokenises segments.
    ``dtype``: dtype of the tokens. The cache is cleared when it reaches about 100 MB.
    """

    def __init__(self, cuts: np.ndarray, encode: Callable[[list[str]], list[list[int]]], dtype: np.dtype) -> None:
        self._cuts = cuts.reshape(-1)
        self._encode = encode
        self._dtype = dtype
        self._forget()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Tokens of each text."""
        encoded = [text.encode("utf-8") for text in texts]
        stops = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        raw = b"".join([*encoded, bytes(16)])  # padding, as keys are read in words of eight bytes
        tokens, counts, total, at = [], np.zeros(len(texts), dtype=np.int64), 0, 0
        size = len(raw) - 16
        while at < size:
            edges = self._edges(raw, at, size, stops)
            known, ends = self._tokens(raw, edges)
            first, last = np.searchsorted(stops, (at, edges[-1]), side="right")
            counts[first:last] = total + ends[np.searchsorted(edges, stops[first:last]) - 1]
            tokens.append(known)
            total, at = total + len(known), int(edges[-1])
        joined = np.concatenate(tokens) if tokens else np.empty(0, self._dtype)
        return np.split(joined, counts[:-1]) if texts else []

    def _forget(self) -> None:
        self._table = _Table()
        self._long: dict[bytes, tuple[int, int]] = {}
        self._pool = np.empty(1 << 12, self._dtype)
        self._used = 0

    def _edges(self, raw: bytes, at: int, size: int, stops: np.ndarray) -> np.ndarray:
        """Edges of the segments of a window that begins at ``at``."""
        window = _WINDOW
        while True:
            stop = min(at + window, size)
            here = np.frombuffer(raw, np.uint8, stop - at, at)
            pairs = here[:-1].astype(np.uint16) << 8
            pairs |= here[1:]
            cut = self._cuts.take(pairs)
            first, last = np.searchsorted(stops, (at, stop), side="right")
            ends = stops[first:last]
            cut[ends[ends < stop] - at - 1] = True
            inner = np.flatnonzero(cut) + (at + 1)
            if stop == size:
                return np.concatenate([[at], inner, [size]])
            if len(inner):  # the last segment may continue: it belongs to the next window
                return np.concatenate([[at], inner])
            window *= 2

    def _tokens(self, raw: bytes, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of adjacent segments, and the number of tokens up to the end of each segment."""
        if self._table.used > _MOST_SEGMENTS or self._used > _MOST_TOKENS:
            self._forget()
        starts = edges[:-1]
        low, high = _keys(raw, starts, np.diff(edges))
        slots = self._table.find(low, high)
        begin, count = self._table.begin.take(slots), self._table.count.take(slots)
        unknown = np.flatnonzero(slots < 0)
        if len(unknown):
            words = [raw[a:b] for a, b in zip(starts[unknown].tolist(), edges[unknown + 1].tolist(), strict=True)]
            first = dict(zip(reversed(words), reversed(unknown.tolist()), strict=True))
            new = [word for word in first if word not in self._long]
            places = self._add(new)
            short = np.array([len(word) <= _KEY for word in new], dtype=bool)
            at = np.array([first[word] for word in new], dtype=np.int64)[short]
            self._table.insert(low[at], high[at], *np.array(places, dtype=np.int64).reshape(-1, 2)[short].T)
            added = dict(zip(new, places, strict=True))
            self._long.update((word, place) for word, place in added.items() if _KEY < len(word) <= _LONGEST)
            spans = np.array([added.get(word) or self._long[word] for word in words])
            begin[unknown], count[unknown] = spans[:, 0], spans[:, 1]
        ends = np.cumsum(count)
        index = np.repeat(begin - (ends - count), count)
        index += np.arange(len(index))
        return self._pool.take(index), ends

    def _add(self, words: list[bytes]) -> list[tuple[int, int]]:
        """Encode segments into the pool; returns (begin, count) of the tokens of each segment."""
        encoded = self._encode([word.decode("utf-8") for word in words])
        edges = list(itertools.accumulate(map(len, encoded), initial=self._used))
        if edges[-1] > len(self._pool):
            self._pool = np.concatenate([self._pool, np.empty(edges[-1], self._dtype)])
        flat = itertools.chain.from_iterable(encoded)
        self._pool[self._used : edges[-1]] = np.fromiter(flat, self._dtype, edges[-1] - self._used)
        self._used = edges[-1]
        return [(begin, stop - begin) for begin, stop in itertools.pairwise(edges)]


class _Table:
    """An open-addressing hash table from segments to (begin, count) in the pool, with vectorised operations."""

    def __init__(self, size: int = 1 << 12) -> None:
        self.used = 0
        self._low, self._high = np.zeros(size, np.uint64), np.zeros(size, np.uint64)  # high is 0 where a slot is free
        self.begin, self.count = np.zeros(size, np.int64), np.zeros(size, np.int64)

    def find(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Slots of keys, -1 for unknown keys."""
        slots = self._slots(low, high)
        open_ = np.flatnonzero((self._low.take(slots) != low) | (self._high.take(slots) != high))
        while len(open_):
            free = self._high[slots[open_]] == 0
            slots[open_[free]] = -1
            open_ = open_[~free]
            slots[open_] = (slots[open_] + 1) & (len(self._low) - 1)
            here = slots[open_]
            open_ = open_[(self._low[here] != low[open_]) | (self._high[here] != high[open_])]
        return slots

    def insert(self, low: np.ndarray, high: np.ndarray, begin: np.ndarray, count: np.ndarray) -> None:
        """Add keys that differ from each other and from all stored keys."""
        if self.used + len(low) > len(self._low) // 2:
            self._grow(self.used + len(low))
        self.used += len(low)
        slots, open_ = self._slots(low, high), np.arange(len(low))
        while len(open_):
            writing = open_[self._high[slots[open_]] == 0]
            here = slots[writing]
            # Of the keys written to the same slot, the last key stays; the others find it there and probe further.
            self._low[here], self._high[here] = low[writing], high[writing]
            self.begin[here], self.count[here] = begin[writing], count[writing]
            here = slots[open_]
            open_ = open_[(self._low[here] != low[open_]) | (self._high[here] != high[open_])]
            slots[open_] = (slots[open_] + 1) & (len(self._low) - 1)

    def _grow(self, least: int) -> None:
        kept = self._high != 0
        before = [field[kept] for field in (self._low, self._high, self.begin, self.count)]
        _Table.__init__(self, 1 << (4 * least - 1).bit_length())
        self.insert(*before)

    def _slots(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        mixed = (low ^ (high * np.uint64(0x9E3779B97F4A7C15))) * np.uint64(0xBF58476D1CE4E5B9)
        return ((mixed ^ (mixed >> np.uint64(32))) & np.uint64(len(self._low) - 1)).astype(np.int64)


def _keys(raw: bytes, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys of two words: bytes and length of a segment. Long segments share a key that is never stored."""
    words = np.ndarray((len(raw) - 7,), np.dtype("<u8"), raw, strides=(1,))
    low = words[starts] & _LOW_BYTES.take(np.minimum(lengths, 8))
    high = words[starts + 8] & _LOW_BYTES.take(np.clip(lengths - 8, 0, 7))
    high |= np.minimum(lengths, 255).astype(np.uint64) << np.uint64(56)
    long = lengths > _KEY
    low[long], high[long] = 0, np.uint64(255 << 56)
    return low, high


def sentencepiece_cuts(pieces: Iterable[str]) -> np.ndarray:
    """Cuts of a unigram or BPE model: byte pairs that no piece contains.

    ``pieces``: pieces that match text, with spaces for U+2581. The best path through a text consists of the best paths
    through its segments, and no BPE merge spans a cut.
    """
    held = np.zeros((256, 256), dtype=bool)
    units = np.frombuffer(b"\xff".join(piece.encode("utf-8") for piece in pieces), np.uint8)  # no byte of UTF-8
    held[units[:-1], units[1:]] = True
    held[:, 0x80:0xC0] = True  # never inside a character
    return ~held


def bytelevel_cuts() -> np.ndarray:
    r"""Cuts that follow GPT-2's split of text into words, which no token spans.

    GPT-2's expression is ``'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+``. A match never
    continues from a letter or a digit to another kind of character, nor from a sign other than the apostrophe to a
    letter or digit, nor from anything to white space. Cuts are made between ASCII characters, and before white space
    after non-ASCII characters whose last byte cannot belong to white space. White space stays with the following
    characters, as the expression looks ahead.
    """
    byte = np.arange(256)
    ascii_, apostrophe = byte < 0x80, byte == 0x27
    letter = ascii_ & np.isin(byte | 0x20, np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)) & (byte >= 0x41)
    digit, space = (byte >= 0x30) & (byte <= 0x39), np.isin(byte, np.frombuffer(b" \n\t\r", np.uint8))
    sign = (byte > 0x20) & (byte < 0x7F) & ~letter & ~digit & ~apostrophe
    white = np.isin(byte, [0x85, 0x8E, 0x9F, 0xA0, 0xA8, 0xA9, 0xAF, *range(0x80, 0x8B)])
    cuts = letter[:, None] & (ascii_ & ~letter)
    cuts |= digit[:, None] & (ascii_ & ~digit)
    cuts |= sign[:, None] & (letter | digit | space)
    cuts |= apostrophe[:, None] & (digit | space)
    cuts |= (~ascii_ & ~white)[:, None] & space
    return cuts
