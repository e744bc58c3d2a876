"""Sampling: temperature, truncation, and draws that depend on the seed of a sequence alone.

Probabilities are float32 (float64 for a float64 model), independent of the dtype of the weights. Shapes: B sequences, T
rows of a sequence, V vocabulary.
"""

import dataclasses
import hashlib
import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from armd_scale.decoding.network import InputError

AUTO = "auto"
"""Value of ``Decoding.draft`` that ``ARMD.draft_length`` replaces."""

_CHUNK = 256  # entries of the vocabulary that the outer search sums


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Settings of decoding.

    By default, S = ``streams`` contiguous streams of the free positions are written together, S tokens per step. With
    ``draft``, the text has the distribution of a token per step in the same order. Other objectives use ``steps`` or
    ``block`` instead. Raises ``InputError``.
    """

    streams: int = 1
    """Number of streams, 1 is left to right."""
    draft: int | str = 0
    """Exact parallel decoding: tokens drafted at a time; 0 is off; ``auto``: as many as write the text fastest here."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability; 1 is off."""
    min_p: float = 0.0
    """Only tokens at least this probable relative to the likeliest; 0 is off."""
    steps: int = 0
    """Masked diffusion: equal steps of time from 1 to 0 in which tokens are revealed; 0: as many as free tokens."""
    stop: bool = False
    """End the text at its first EOS by position, and discard later tokens."""
    block: int = 0
    """Causal diffusion: number of tokens proposed at a time after the finished text; 0: a single token."""
    confidence: float = 0.9
    """Causal diffusion: probability that the likeliest token must have for a proposed token to be accepted."""
    stop_ids: tuple[int, ...] = ()
    """With ``stop``: tokens that end a text; none: the model's EOS."""
    min_tokens: int = 0
    """With ``stop``: number of generated tokens, by position, before the text may end."""

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if name == "draft" and value == AUTO:
                continue
            whole = name in ("streams", "draft", "top_k", "steps", "block", "min_tokens")
            number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not number or not low <= value <= high:
                limits = f"from {low} to {high:g}" if high < 2**31 else f"of at least {low}"
                raise InputError(f"{name} must be {'a whole number' if whole else 'a number'} {limits}, not {value!r}")
        if not all(isinstance(token, int) and token >= 0 for token in self.stop_ids):
            raise InputError(f"stop_ids must be tokens of the vocabulary, not {list(self.stop_ids)}")

    def ends(self, eos_id: int) -> tuple[int, ...]:
        """Tokens that end a text; none without ``stop``."""
        return (self.stop_ids or (eos_id,)) if self.stop else ()

    @property
    def drafted(self) -> int:
        """Tokens drafted at a time, in settings that a model has completed."""
        assert isinstance(self.draft, int)
        return self.draft

    @property
    def strategy(self) -> str:
        """Name of the strategy of these settings, by default ``strided``."""
        chosen = {"ancestral": self.steps, "confident": self.block, "exact": self.draft}
        return next((name for name, value in chosen.items() if value), "strided")


_RANGES = (
    ("streams", 1, 2**31),
    ("draft", 0, 16),
    ("temperature", 0, 1e6),
    ("top_k", 0, 2**31),
    ("top_p", 1e-6, 1),
    ("min_p", 0, 1),
    ("steps", 0, 2**31),
    ("block", 0, 64),
    ("confidence", 0, 1),
    ("min_tokens", 0, 2**31),
)


class Sampler:
    """Draws tokens for B sequences, each with its own ``Decoding``."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._decodings = [Decoding()] * count
        # Changed in place, so that captured CUDA graphs see later settings.
        self._columns = torch.ones(4, count, 1, 1, dtype=torch.float64, device=device)

    def set(self, lane: int, decoding: Decoding) -> None:
        """Set the decoding of a sequence."""
        self._decodings[lane] = decoding
        top_k = decoding.top_k or float("inf")
        column = torch.tensor([decoding.temperature, decoding.min_p, top_k, decoding.top_p], dtype=torch.float64)
        self._columns[:, lane, 0, 0] = column.to(self._columns.device)

    @property
    def kinds(self) -> tuple[bool, ...]:
        """Kinds of draw that the sequences need: greedy, temperature, sorted (top k, top p), min p."""
        decodings = self._decodings
        return (
            any(decoding.temperature == 0 for decoding in decodings),
            any(decoding.temperature != 1 for decoding in decodings),
            any(decoding.top_k or decoding.top_p < 1 for decoding in decodings),
            any(decoding.min_p for decoding in decodings),
        )

    @property
    def draft(self) -> int:
        """Largest draft of all sequences."""
        return max(one.drafted for one in self._decodings)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities [B, T, V] from logits, in float32 or better, after temperature and truncation."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        greedy, tempered, ranks, cut = self.kinds
        temperature, min_p, top_k, top_p = self._columns
        if tempered:
            # The largest logit becomes 0 before the division: a tiny temperature must not overflow.
            shifted = logits - logits.amax(dim=-1, keepdim=True)
            logits = shifted / temperature.clamp(min=1e-30).to(logits.dtype)
        out = logits.softmax(dim=-1)
        if ranks:
            ranked, index = out.sort(dim=-1, descending=True, stable=True)
            among = torch.arange(out.shape[-1], device=out.device) < top_k
            ranked = ranked.where(among, 0)
            before = ranked.cumsum(dim=-1) - ranked
            kept = among & ((before < top_p * ranked.sum(dim=-1, keepdim=True)) | (top_p == 1))
            out = out.where(torch.zeros_like(kept).scatter_(-1, index, kept), 0)
        if cut:
            out = out.where(out >= min_p * out.amax(dim=-1, keepdim=True), 0)
        if greedy:
            likeliest = torch.zeros_like(out).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1)
            out = torch.where(temperature == 0, likeliest, out)
        if not (ranks or cut):
            return out
        # Rows without truncation stay bit for bit the same, whatever other rows do.
        truncated = (top_k < float("inf")) | (top_p < 1) | (min_p > 0)
        return out / out.sum(dim=-1, keepdim=True).where(truncated, 1)

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Tokens [B, T] from logits [B, T, V] and uniform numbers [B, T]."""
        return draw(self.probabilities(logits), uniform)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Indices [B, T] drawn with weights [B, T, V], by inversion of the cumulative sum at uniform numbers [B, T].

    In two levels, chunks of the vocabulary and then the entries of a chunk, both with float64 sums: a large vocabulary
    needs no long sum, and rare entries keep their probability.
    """
    size = weights.shape[-1]
    whole = size // _CHUNK * _CHUNK
    sums = weights[..., :whole].unflatten(-1, (-1, _CHUNK)).sum(dim=-1)
    if whole < size:
        sums = torch.cat([sums, weights[..., whole:].sum(dim=-1, keepdim=True)], dim=-1)
    outer = sums.double().cumsum(dim=-1)
    threshold = uniform[..., None].double() * outer[..., -1:]
    chunk = torch.searchsorted(outer, threshold, right=True).clamp(max=outer.shape[-1] - 1)
    rest = threshold - torch.where(chunk > 0, outer.gather(-1, (chunk - 1).clamp(min=0)), 0)
    entries = chunk * _CHUNK + torch.arange(_CHUNK, device=chunk.device)
    inner = weights.gather(-1, entries.clamp(max=size - 1)).where(entries < size, 0).double()
    # A threshold at the end of the chunk selects the last entry with weight.
    last = (inner > 0).long().mul(torch.arange(1, _CHUNK + 1, device=inner.device)).amax(dim=-1) - 1
    index = torch.searchsorted(inner.cumsum(dim=-1), rest, right=True)[..., 0]
    return chunk[..., 0] * _CHUNK + torch.minimum(index, last.clamp(min=0))


def seeds(seed: int | Sequence[int], count: int) -> list[tuple[int, int]]:
    """Keys of ``count`` sequences: (seed, row) for a single seed, (seed, 0) for a list. Raises ``InputError``."""
    try:
        if isinstance(seed, Iterable):
            keys = [(operator.index(number), 0) for number in seed]
        else:
            keys = [(operator.index(seed), row) for row in range(count)]
    except TypeError as error:
        raise InputError(f"seed must be a whole number or a list of {count}, not {seed!r}") from error
    if len(keys) != count:
        raise InputError(f"{len(keys)} seeds for {count} sequences: give {count} seeds or a single seed")
    return keys


def uniform(key: tuple[int, ...], *shape: int) -> Tensor:
    """Uniform float64 numbers in [0, 1) from the random stream of ``key``."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    # A generator uses 32 bits of its seed: two generators, so that thousands of texts do not share a stream.
    parts = [torch.Generator().manual_seed(int.from_bytes(digest[at : at + 4], "little")) for at in (0, 4)]
    return sum((torch.rand(*shape, generator=part, dtype=torch.float64) for part in parts), torch.zeros(())).frac()
