"""Attention kernels behind one function, ``attend``.

Every mask of the model has one form: rows are in generation order and blocks never decrease, so a query sees a *run* of
keys, from the first row of its document to the end of the prefix that it may see (``Seen``). None means causal (row n
sees n + 1 keys), the mask of both streams with one token a block, whatever the permutation (docs/explanation/model.md).
Masked diffusion sees every key: ``causal`` is False, and there is no mask.

- ``attend``: selects a backend.
- ``sdpa``: without a mask, streams become query heads of one grouped-query call, by a kernel that can be named.
- ``pieces``: ``Seen`` on a CPU: a call for each block of rows, over the keys that the block sees.
- ``flex``: ``Seen`` as a block mask, for CUDA.
- ``dense``: the reference: explicit scores and softmax in the type of its inputs (float64 in tests).
- ``measure``: seconds of every kernel that runs on this device; the run chooses the fastest.

Shapes: queries [S, B, G, R, N, D] of S streams, with R query heads for each of G key heads; keys and values
[B, G, M, D].
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.weak import WeakTensorKeyDictionary

from armd_scale.model.regions import fused

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "FA3": SDPBackend.FLASH_ATTENTION,
    "FA4": SDPBackend.FLASH_ATTENTION,
}
"""Kernels of ``sdpa`` by name. FA3 and FA4 replace PyTorch's own flash kernels (``activate``)."""

MASK_BLOCK = 128
"""Rows and keys of a block of a block mask."""


PIECE = 128
"""Rows of a call of ``pieces``."""


class Span(NamedTuple):
    """Rows, and the keys that they see at most."""

    rows: slice
    keys: slice


class Seen(NamedTuple):
    """The keys that each query sees: ``first`` (None: the first of all) to ``end`` (exclusive), [S, B, N] each, or
    [1, B, N] for all streams, or [S, 1, N] for all texts.
    """

    end: Tensor
    first: Tensor | None = None
    spans: tuple[Span, ...] | None = None
    """Blocks of rows of which it is known, without a look at ``end`` and ``first``, which keys they see at most."""


def attend(
    q_SBGRND: Tensor,
    k_BGMD: Tensor,
    v_BGMD: Tensor,
    seen: Seen | None = None,
    causal: bool = True,
    kernel: str | None = None,
) -> Tensor:
    """Softmax attention of each query over the keys that it sees, or over all of them -> [S, B, G, R, N, D].

    ``kernel``: name in ``KERNELS`` for attention without a mask; None: PyTorch's choice.
    """
    if seen is None:
        return sdpa(q_SBGRND, k_BGMD, v_BGMD, causal, kernel)
    return masked(q_SBGRND, k_BGMD, v_BGMD, seen)


def _products(q_SBGRND: Tensor, k_BGMD: Tensor, v_BGMD: Tensor, seen: Seen) -> float:
    """Operations of the two products of attention over ``Seen.spans``, whose last keys a row sees up to its own."""
    S, B, G, R, _, D = q_SBGRND.shape
    assert seen.spans
    sizes = [(rows.stop - rows.start, keys.stop - keys.start) for rows, keys in seen.spans]
    return 2 * 2 * S * B * G * R * D * sum(rows * (keys - rows / 2) for rows, keys in sizes)


@fused(keeps=lambda read, made: [*read[:3], *made], work=_products)
def masked(q_SBGRND: Tensor, k_BGMD: Tensor, v_BGMD: Tensor, seen: Seen) -> Tensor:
    """Attention with ``Seen``, by ``flex`` or ``pieces``."""
    return (flex if q_SBGRND.is_cuda else pieces)(q_SBGRND, k_BGMD, v_BGMD, seen)


def sdpa(q_SBGRND: Tensor, k_BGMD: Tensor, v_BGMD: Tensor, causal: bool = True, kernel: str | None = None) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` by one of ``KERNELS`` (None: PyTorch's choice)."""
    S, B, G, R, N, D = q_SBGRND.shape
    # Streams become additional query heads of the same key head: a view if memory is [N, B, G, S, R, D].
    q_BHND = q_SBGRND.permute(1, 2, 0, 3, 4, 5).reshape(B, G * S * R, N, D)
    with sdpa_kernel(KERNELS[kernel]) if kernel else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(q_BHND, k_BGMD, v_BGMD, is_causal=causal, enable_gqa=S * R > 1)
    return out.unflatten(1, (G, S, R)).permute(2, 0, 1, 3, 4, 5)


def pieces(q_SBGRND: Tensor, k_BGMD: Tensor, v_BGMD: Tensor, seen: Seen) -> Tensor:
    """PyTorch's flash attention for CPUs, block of rows by block of rows.

    What the blocks see is found once per ``seen.end``, which all layers of a kind share.
    """
    known, streams = _KNOWN.setdefault(seen.end, {}), len(q_SBGRND)
    key = streams, q_SBGRND.dtype
    if key not in known:
        known[key] = _cut(seen, streams, q_SBGRND.dtype)
    return _Pieces.apply(q_SBGRND, k_BGMD, v_BGMD, known[key])


class _Piece(NamedTuple):
    rows: slice
    keys: slice
    mask: Tensor
    """0 where a row sees a key, else -inf: [B, 1, S * rows, keys], or [1, ...] for all texts."""


def _cut(seen: Seen, streams: int, dtype: torch.dtype) -> list[_Piece]:
    end, first = seen.end, torch.zeros_like(seen.end) if seen.first is None else seen.first
    spans = seen.spans
    if spans is None:
        if (end == end[:, :1]).all() and (first == first[:, :1]).all():
            end, first = end[:, :1], first[:, :1]
        blocks = zip(first.split(PIECE, -1), end.split(PIECE, -1), strict=True)
        starts = range(0, end.shape[-1], PIECE)
        spans = tuple(
            Span(slice(at, at + PIECE), slice(int(low.min()), int(high.max())))
            for at, (low, high) in zip(starts, blocks, strict=True)
        )
    cut = []
    for rows, keys in spans:
        key = torch.arange(keys.start, keys.stop, device=end.device)
        low, high = first[..., rows, None], end[..., rows, None]
        hidden = ((key < low) | (key >= high)).expand(streams, -1, -1, -1)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=end.device).masked_fill(hidden, -torch.inf)
        cut.append(_Piece(rows, keys, mask.transpose(0, 1).flatten(1, 2)[:, None]))
    return cut


class _Pieces(torch.autograd.Function):
    """``pieces``. Slices of the keys would each have a whole gradient; here they add to one."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cut: list[_Piece]) -> Tensor:
        S, B, G, R, N, D = q.shape
        out = q.new_empty(N, S, B, G, R, D).permute(1, 2, 3, 4, 0, 5)  # the memory layout that layers read
        sums = []
        for rows, keys, mask in cut:
            part, total = _flash_forward(_as_heads(q, rows), k[:, :, keys], v[:, :, keys], 0.0, False, attn_mask=mask)
            _as_streams(out, rows).copy_(part.view(B, G, R, S, -1, D))
            sums.append(total)
        ctx.save_for_backward(q, k, v, out, *sums)
        ctx.cut = cut
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, *sums = ctx.saved_tensors
        S, B, G, R, _, D = q.shape
        grads = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (rows, keys, mask), total in zip(ctx.cut, sums, strict=True):
            tensors = _as_heads(grad, rows), _as_heads(q, rows), k[:, :, keys], v[:, :, keys], _as_heads(out, rows)
            of_q, of_k, of_v = _flash_backward(*tensors, total, 0.0, False, attn_mask=mask)
            _as_streams(grads[0], rows).copy_(of_q.view(B, G, R, S, -1, D))
            grads[1][:, :, keys] += of_k
            grads[2][:, :, keys] += of_v
        return *grads, None


_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _as_streams(x_SBGRND: Tensor, rows: slice) -> Tensor:
    """A view of rows as [B, G, R, S, n, D]."""
    return x_SBGRND[..., rows, :].permute(1, 2, 3, 0, 4, 5)


def _as_heads(x_SBGRND: Tensor, rows: slice) -> Tensor:
    """Rows as [B, G * R, S * n, D]."""
    return _as_streams(x_SBGRND, rows).flatten(3, 4).flatten(1, 2)


def flex(q_SBGRND: Tensor, k_BGMD: Tensor, v_BGMD: Tensor, seen: Seen) -> Tensor:
    """``flex_attention``: skips key blocks that no query of a block sees. Forward only on CPU.

    The block mask is made once per ``seen.end``, which all layers of a kind share.
    """
    from torch.nn.attention.flex_attention import flex_attention

    S, B, G, R, N, _ = q_SBGRND.shape
    masks = _KNOWN.setdefault(seen.end, {})
    if S not in masks:
        masks[S] = block_mask(*_edges(seen, S, B), k_BGMD.shape[2])
    kernel: Callable = _compiled_flex() if q_SBGRND.is_cuda else flex_attention
    q_BHRD = _as_heads(q_SBGRND, slice(None))  # a view if memory is [S, N, B, G, R, D]
    out = kernel(q_BHRD, k_BGMD, v_BGMD, block_mask=masks[S], enable_gqa=R > 1)
    return out.unflatten(2, (S, N)).unflatten(1, (G, R)).permute(3, 0, 1, 2, 4, 5)


def dense(q_SBGRND: Tensor, k_BGMD: Tensor, v_BGMD: Tensor, seen: Seen | None = None, causal: bool = True) -> Tensor:
    """Slow reference; every backend equals it up to rounding."""
    streams, batch, _, _, rows, width = q_SBGRND.shape
    key = torch.arange(k_BGMD.shape[2], device=q_SBGRND.device)
    if seen is None:
        end = torch.arange(1, rows + 1) if causal else torch.full((rows,), len(key))
        seen = Seen(end.to(q_SBGRND.device).expand(streams, batch, rows))
    scores = torch.einsum("sbgrnd,bgmd->sbgrnm", q_SBGRND, k_BGMD) / width**0.5
    hidden_SBNM = key >= seen.end[..., None]
    if seen.first is not None:
        hidden_SBNM = hidden_SBNM | (key < seen.first[..., None])
    weights = scores.masked_fill(hidden_SBNM[:, :, None, None], -torch.inf).softmax(dim=-1)
    return torch.einsum("sbgrnm,bgmd->sbgrnd", weights, v_BGMD)


def _edges(seen: Seen, streams: int, batch: int) -> tuple[Tensor, Tensor | None]:
    """End and first of what rows see, where streams are additional rows: [B, S * N] each."""
    end, first = (
        None if edge is None else edge.expand(streams, batch, -1).transpose(0, 1).flatten(1)
        for edge in (seen.end, seen.first)
    )
    assert end is not None
    return end, first


_KNOWN = WeakTensorKeyDictionary()
"""Block masks and pieces by the ``Seen.end`` they were made from, for the lifetime of the tensor."""


def block_mask(end_BR: Tensor, first_BR: Tensor | None, keys: int):
    """``BlockMask`` of runs of keys. A block of rows sees all key blocks that are inside the run of each of its rows,
    and none outside all runs; the other key blocks are masked key by key. Does not synchronise with the device.
    """
    from torch.nn.attention.flex_attention import BlockMask

    rows = end_BR.shape[1]
    count = (keys + MASK_BLOCK - 1) // MASK_BLOCK
    every = torch.arange(count, device=end_BR.device)
    first_BR = torch.zeros_like(end_BR) if first_BR is None else first_BR

    def blocks(values_BR: Tensor, behind: Tensor) -> tuple[Tensor, Tensor]:
        more = behind.expand(-1, -rows % MASK_BLOCK)
        padded = torch.cat([values_BR, more], dim=1).unflatten(1, (-1, MASK_BLOCK))
        return padded.amin(-1)[..., None], padded.amax(-1)[..., None]

    # The rows that fill the last block up see nothing.
    (low, high), (short, far) = blocks(first_BR, first_BR[:, -1:]), blocks(end_BR, torch.zeros_like(end_BR[:, :1]))
    touched = (every >= low // MASK_BLOCK) & (every * MASK_BLOCK < far)
    whole = (every * MASK_BLOCK >= high) & ((every + 1) * MASK_BLOCK <= short)

    def tables(chosen: Tensor) -> tuple[Tensor, Tensor]:
        # A stable sort puts the chosen blocks first, in order.
        indices = (~chosen).byte().sort(dim=-1, stable=True).indices
        return chosen.sum(-1, dtype=torch.int32)[:, None], indices.int()[:, None].contiguous()

    def sees(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key < end_BR[b, row]) & (key >= first_BR[b, row])

    return BlockMask.from_kv_blocks(
        *tables(touched & ~whole),
        *tables(whole),
        BLOCK_SIZE=MASK_BLOCK,
        mask_mod=sees,
        seq_lengths=(rows, keys),
    )


@functools.cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def activate(kernel: str | None) -> None:
    """Replace PyTorch's flash attention by FlashAttention-3 or 4 if ``kernel`` names it, else restore PyTorch's own."""
    from torch.nn import attention

    if kernel in ("FA3", "FA4"):
        attention.activate_flash_attention_impl(kernel)
    elif attention.current_flash_attention_impl() is not None:
        attention.restore_flash_attention_impl()


def measure(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    causal: bool = True,
    repeats: int = 10,
    kernels: Iterable[str] = KERNELS,
) -> dict[str, float]:
    """Kernel -> seconds of a forward and a backward pass over queries of a ``shape`` [S, B, G, R, N, D], the median of
    ``repeats``, for the ``kernels`` that can run on the device.
    """
    S, B, G, R, N, D = shape
    sizes = (N, B, G, S, R, D), (N, B, G, D), (N, B, G, D), (N, B, G, S, R, D)
    tensors = [torch.randn(size, dtype=dtype, device=device) for size in sizes]
    # The memory layout of the layers.
    q, gradient = (x.permute(3, 1, 2, 4, 0, 5) for x in (tensors[0], tensors[3]))
    k, v = (x.permute(1, 2, 0, 3) for x in tensors[1:3])
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    table = {}
    for kernel in kernels:
        # Kernels that are missing or do not support the device or the shape raise various exceptions.
        with contextlib.suppress(RuntimeError, ImportError, ValueError, AttributeError, AssertionError):
            activate(kernel)
            seconds = []
            for _ in range(3 + repeats):
                _finish(device)
                started = time.perf_counter()
                torch.autograd.grad(sdpa(q, k, v, causal, kernel), (q, k, v), gradient)
                _finish(device)
                seconds.append(time.perf_counter() - started)
            table[kernel] = sorted(seconds[3:])[repeats // 2]
    activate(None)
    return table


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
