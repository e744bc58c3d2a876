"""The formulae of the network, once for training and for the standalone model. Needs torch alone.

The training model (``model/``) fuses them into kernels; the standalone model (``inference/``) calls them as they are.
Every function computes in at least float32, whatever the type of its input, and returns the type of its input.

- ``position_table``, ``scale_prefix``: prefix aggregation (paper section 3.2);
- ``rotary_tables``, ``rotate``: rotary position embedding (arXiv 2104.09864), pairs (i, i + D / 2);
- ``normalise``, ``gate``, ``gelu``: what stands between the matrix products;
- ``stream_bounds``: how strided block-parallel order cuts a text (paper section 4).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def position_table(rows: int, kernel: str, dim: int, width: float) -> Tensor:
    """Fixed position embeddings [rows, dim], float64, of unit length: [sin(w_k p), cos(w_k p)] / sqrt(dim / 2).

    ``gaussian``: w_k are the quantiles of |w| for w normal with standard deviation 1 / ``width`` (w and -w give the
    same pair up to sign), so <PE(p), PE(q)> is about exp(-(p - q)^2 / (2 width^2)). ``sinusoid``: the 10000-base table.
    """
    count = dim // 2
    index = torch.arange(count, dtype=torch.float64)
    if kernel == "gaussian":
        frequencies = torch.special.ndtri((1 + (index + 0.5) / count) / 2) / width
    else:
        frequencies = 10000.0 ** (-index / count)
    angles = torch.arange(rows, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1) / count**0.5


def scale_prefix(total: Tensor, size: Tensor, scale: str) -> Tensor:
    """The sum over a prefix of ``size`` rows, divided by 1 (``none``), sqrt(size) (``sqrt``) or size (``mean``)."""
    if scale == "none":
        return total
    size = size.to(torch.promote_types(total.dtype, torch.float32))
    return total / (size.sqrt() if scale == "sqrt" else size)


def rotary_tables(
    positions: Tensor, head_dim: int, base: float, scaling: Mapping[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., head_dim / 2], float32, of the rotation at ``positions`` [...].

    ``scaling``: fields of ``RopeConfig``.
    """
    frequencies, factor = rotary_frequencies(head_dim, base, scaling or {}, positions.device)
    angles = positions.float()[..., None] * frequencies
    return angles.cos() * factor, angles.sin() * factor


def rotary_frequencies(
    head_dim: int, base: float, scaling: Mapping[str, Any], device: torch.device
) -> tuple[Tensor, float]:
    """Frequencies [head_dim / 2], float32, and a factor of cosines and sines.

    ``linear``: arXiv 2306.15595; ``llama3``: as in Llama 3.1; ``yarn``: arXiv 2309.00071, section 3.
    """
    steps = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    frequencies = 1.0 / base ** (steps / head_dim)
    kind = scaling.get("scaling", "none")
    if kind == "none":
        return frequencies, 1.0
    # As transformers rounds: at long positions the logits show the last bit of a frequency.
    slow, original = frequencies / scaling["factor"], scaling["original_length"]
    if kind == "linear":
        return slow, 1.0
    if kind == "llama3":
        turns = original * frequencies / (2 * math.pi)
        low, high = scaling["low_turns"], scaling["high_turns"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - keep) * slow + keep * frequencies, 1.0

    def pair(turns: float) -> float:
        """The pair of dimensions that makes so many turns within the original length."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = (
        max(math.floor(pair(scaling["high_turns"])), 0),
        min(math.ceil(pair(scaling["low_turns"])), head_dim - 1),
    )
    ramp = (torch.arange(head_dim // 2, device=device) - first) / (last - first or 0.001)
    factor = scaling["attention"] or (0.1 * math.log(scaling["factor"]) + 1 if scaling["factor"] > 1 else 1.0)
    keep, slow = 1 - ramp.clamp(0, 1), 1.0 / (scaling["factor"] * base ** (steps / head_dim))
    return slow * (1 - keep) + frequencies * keep, factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D / 2) of the last dimension of ``x`` [..., D] by tables [..., D / 2]."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def normalise(x: Tensor, weight: Tensor, eps: float, centre: bool) -> Tensor:
    """LayerNorm (``centre``) or RMSNorm of the last dimension, with a scale and no bias."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if centre:
        return F.layer_norm(x.to(dtype), weight.shape, weight.to(dtype), None, eps).to(x.dtype)
    return F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps).to(x.dtype)


def gate(hidden: Tensor) -> Tensor:
    """SwiGLU of [..., 2 F]: silu of the even units times the odd ones -> [..., F]."""
    gates, values = hidden.unflatten(-1, (-1, 2)).unbind(-1)
    return F.silu(gates) * values


def gelu(hidden: Tensor) -> Tensor:
    """GELU in its tanh form."""
    return F.gelu(hidden, approximate="tanh")


def stream_bounds(count: int, streams: int) -> list[tuple[int, int]]:
    """Half-open ranges of S contiguous streams over ``count`` tokens, the first ``count % S`` one token longer.

    S is capped at ``count``.
    """
    streams = min(streams, count)
    stops = [(count // streams) * (part + 1) + min(part + 1, count % streams) for part in range(streams)]
    return list(zip([0, *stops], stops, strict=False))
