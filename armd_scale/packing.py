"""Documents in packed samples: where they begin, and how they are put into samples of a fixed length.

A packed sample of N tokens holds one document after another. ``starts`` [N] is, for every token, the index of the first
token of its document; a document that was cut at the end of a sample goes on in the next one as a document of its own.
Where documents are separate (``data.documents``), each is a sequence with positions, BOS and order of its own.
"""

from collections.abc import Sequence

import numpy as np


def starts(first_BN: np.ndarray) -> np.ndarray:
    """``starts`` [B, N] from a mask [B, N] of the first tokens of documents; a sample begins with a document."""
    index = np.arange(first_BN.shape[-1])
    return np.maximum.accumulate(np.where(first_BN, index, 0), axis=-1)


def ends(starts_BN: np.ndarray) -> np.ndarray:
    """Index behind the last token of the document of every token, [B, N]."""
    length = starts_BN.shape[-1]
    index = np.arange(length)
    last_BN = np.append(starts_BN[..., 1:] == index[1:], np.ones_like(starts_BN[..., :1], dtype=bool), axis=-1)
    behind = np.where(last_BN, index + 1, length)
    return np.minimum.accumulate(behind[..., ::-1], axis=-1)[..., ::-1]


def lengths(starts_N: np.ndarray) -> list[int]:
    """Tokens of the documents of a sample."""
    firsts = np.flatnonzero(starts_N == np.arange(len(starts_N)))
    return np.diff(firsts, append=len(starts_N)).tolist()


def documents(shape: tuple[int, ...], starts_BN: np.ndarray | None) -> list[list[int]]:
    """Tokens of the documents of every sample of tokens of a ``shape`` [B, N]; None: each is one document."""
    return [[shape[1]]] * shape[0] if starts_BN is None else [lengths(starts_N) for starts_N in starts_BN]


def key(number: int) -> tuple[int, ...]:
    """What the document ``number`` of a sample adds to the key of the sample's draws; nothing for the first one."""
    return (number,) if number else ()


def share_out(count: int, sizes: Sequence[int]) -> list[int]:
    """Divide ``count`` among documents in proportion to their lengths, by the largest remainders."""
    total = sum(sizes)
    parts = [count * size // total for size in sizes]
    largest = sorted(range(len(sizes)), key=lambda n: (-(count * sizes[n] % total), n))
    for n in largest[: count - sum(parts)]:
        parts[n] += 1
    return parts


def best_fit(sizes: np.ndarray, length: int) -> list[list[tuple[int, int, int]]]:
    """Pack documents into samples of ``length`` tokens: a list of (document, from, to) for every sample.

    A document is cut only where it is longer than a sample. Pieces are taken from the longest to the shortest, and each
    goes where it leaves the least room (best-fit decreasing; arXiv 2404.10830). The rest of a sample is padding.
    """
    pieces = [(n, at, min(at + length, size)) for n, size in enumerate(sizes.tolist()) for at in range(0, size, length)]
    pieces.sort(key=lambda piece: piece[1] - piece[2])
    samples: list[list[tuple[int, int, int]]] = []
    by_room: list[list[int]] = [[] for _ in range(length)]  # samples by the tokens that are left in them
    rooms = 0  # bit r: there is a sample with r tokens left
    for piece in pieces:
        size = piece[2] - piece[1]
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
            samples[number].append(piece)
        else:
            room, number = length, len(samples)
            samples.append([piece])
        if room > size:
            by_room[room - size].append(number)
            rooms |= 1 << (room - size)
    return samples
