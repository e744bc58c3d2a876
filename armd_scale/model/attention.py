"""Attention kernels behind one function, ``attend``.

Every mask of the model has one form: rows are in generation order and blocks never decrease, so a query sees a *run* of
keys, from the first row of its document to the end of the prefix that it may see (``Seen``). None means causal (row n
sees n + 1 keys), the mask of both streams with one token a block, whatever the permutation (docs/explanation/model.md).
Masked diffusion sees every key: ``causal`` is False, and there is no mask.

- ``attend``: selects a backend.
- ``sdpa``: without a mask, streams become query heads of one grouped-query call, by a kernel that can be named; with
  ``Seen``, such a call for each document, or a boolean mask.
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

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "FA3": SDPBackend.FLASH_ATTENTION,
    "FA4": SDPBackend.FLASH_ATTENTION,
}
"""Kernels of ``sdpa`` by name. FA3 and FA4 replace PyTorch's own flash kernels (``activate``)."""

MASK_BLOCK = 128
"""Rows and keys of a block of a block mask."""


LONG = 512
"""Rows of a text from which separate documents are a causal call each on a CPU; a mask is faster for shorter ones."""


class Seen(NamedTuple):
    """The keys that each query sees: ``first`` (None: the first of all) to ``end`` (exclusive), [S, B, N] each, or
    [1, B, N] for all streams.
    """

    end: Tensor
    first: Tensor | None = None
    documents: list[list[int]] | None = None
    """With one token a block: lengths of the documents of every text, in each of which a row sees those up to itself.
    """

    @property
    def as_heads(self) -> bool:
        """Whether streams become query heads, as they do without a mask."""
        return self.documents is not None


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
    if seen is not None and q_SBGRND.is_cuda:
        return flex(q_SBGRND, k_BGMD, v_BGMD, seen)
    return sdpa(q_SBGRND, k_BGMD, v_BGMD, seen, causal, kernel)


def sdpa(
    q_SBGRND: Tensor,
    k_BGMD: Tensor,
    v_BGMD: Tensor,
    seen: Seen | None = None,
    causal: bool = True,
    kernel: str | None = None,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, without a mask by one of ``KERNELS`` (None: PyTorch's)."""
    if seen is None:
        return _unmasked(q_SBGRND, k_BGMD, v_BGMD, causal, kernel)
    if seen.documents is not None:
        return _by_document(q_SBGRND, k_BGMD, v_BGMD, seen.documents)
    q_BHRD, (first_BR, end_BR) = _streams_to_rows(q_SBGRND, seen)
    key = torch.arange(k_BGMD.shape[2], device=end_BR.device)
    mask_BRM = key < end_BR[..., None]
    if first_BR is not None:
        mask_BRM = mask_BRM & (key >= first_BR[..., None])
    out = F.scaled_dot_product_attention(
        q_BHRD, k_BGMD, v_BGMD, attn_mask=mask_BRM[:, None], enable_gqa=q_SBGRND.shape[3] > 1
    )
    return _rows_to_streams(out, q_SBGRND.shape)


def _unmasked(q_SBGRND: Tensor, k_BGMD: Tensor, v_BGMD: Tensor, causal: bool, kernel: str | None) -> Tensor:
    S, B, G, R, N, D = q_SBGRND.shape
    # Streams become additional query heads of the same key head: a view if memory is [N, B, G, S, R, D].
    q_BHND = q_SBGRND.permute(1, 2, 0, 3, 4, 5).reshape(B, G * S * R, N, D)
    with sdpa_kernel(KERNELS[kernel]) if kernel else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(q_BHND, k_BGMD, v_BGMD, is_causal=causal, enable_gqa=S * R > 1)
    return out.unflatten(1, (G, S, R)).permute(2, 0, 1, 3, 4, 5)


def _by_document(q_SBGRND: Tensor, k_BGMD: Tensor, v_BGMD: Tensor, documents: list[list[int]]) -> Tensor:
    texts = []
    for number, sizes in enumerate(documents):
        text = slice(number, number + 1)
        parts = zip(*(x.split(sizes, -2) for x in (q_SBGRND[:, text], k_BGMD[text], v_BGMD[text])), strict=True)
        texts.append(torch.cat([_unmasked(q, k, v, True, None) for q, k, v in parts], dim=-2))
    return torch.cat(texts, dim=1)


def flex(q_SBGRND: Tensor, k_BGMD: Tensor, v_BGMD: Tensor, seen: Seen) -> Tensor:
    """``flex_attention``: skips key blocks that no query of a block sees. Forward only on CPU.

    The block mask is made once per ``seen.end``, which all layers of a kind share.
    """
    from torch.nn.attention.flex_attention import flex_attention

    q_BHRD, (first_BR, end_BR) = _streams_to_rows(q_SBGRND, seen)
    masks, streams = _MASKS.setdefault(seen.end, {}), len(q_SBGRND)
    mask = masks.get(streams)
    if mask is None:
        mask = masks[streams] = block_mask(end_BR, k_BGMD.shape[2], first_BR)
    kernel: Callable = _compiled_flex() if q_SBGRND.is_cuda else flex_attention
    out = kernel(q_BHRD, k_BGMD, v_BGMD, block_mask=mask, enable_gqa=q_SBGRND.shape[3] > 1)
    return _rows_to_streams(out, q_SBGRND.shape)


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


def _streams_to_rows(q_SBGRND: Tensor, seen: Seen) -> tuple[Tensor, tuple[Tensor | None, Any]]:
    """Streams become additional query rows: [B, H, S * N, D], and first and end of what they see, [B, S * N] each; a
    view if memory is [S, N, B, G, R, D].
    """
    q_BHRD = q_SBGRND.permute(1, 2, 3, 0, 4, 5).flatten(3, 4).flatten(1, 2)
    first, end = (
        None if edge is None else edge.expand(len(q_SBGRND), -1, -1).transpose(0, 1).flatten(1)
        for edge in (seen.first, seen.end)
    )
    return q_BHRD, (first, end)


def _rows_to_streams(out_BHRD: Tensor, shape: torch.Size) -> Tensor:
    S, _, G, R, N, _ = shape
    return out_BHRD.unflatten(2, (S, N)).unflatten(1, (G, R)).permute(3, 0, 1, 2, 4, 5)


_MASKS = WeakTensorKeyDictionary()
"""Block masks by the ``Seen.end`` they were made from, for the lifetime of the tensor, and by the number of streams."""


def block_mask(end_BR: Tensor, keys: int, first_BR: Tensor | None = None):
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
                torch.autograd.grad(sdpa(q, k, v, None, causal, kernel), (q, k, v), gradient)
                _finish(device)
                seconds.append(time.perf_counter() - started)
            table[kernel] = sorted(seconds[3:])[repeats // 2]
    activate(None)
    return table


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
