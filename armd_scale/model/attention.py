"""Attention kernels behind one function, ``attend``.

Every mask of the model has one form: rows are in generation order and blocks never decrease, so a query sees
a *prefix* of the keys. ``visible`` is the length of the prefix per query row; None means causal (row n sees n + 1
keys), the mask of both streams with one token a block, whatever the permutation (docs/explanation/model.md). Masked
diffusion sees every key: ``causal`` is False, and there is no mask.

- ``attend``: selects a backend.
- ``sdpa``: without a mask, streams become query heads of one grouped-query call, by a kernel that can be named; with
  ``visible``, a boolean mask.
- ``flex``: ``visible`` as a block mask, for CUDA.
- ``dense``: the reference: explicit scores and softmax in the type of its inputs (float64 in tests).
- ``measure``: seconds of every kernel that runs on this device; the run chooses the fastest.

Shapes: queries [S, B, G, R, N, D] of S streams, with R query heads for each of G key heads; keys and values
[B, G, M, D]; ``visible`` [S, B, N].
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterable

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


def attend(
    q_SBGRND: Tensor,
    k_BGMD: Tensor,
    v_BGMD: Tensor,
    visible_SBN: Tensor | None = None,
    causal: bool = True,
    kernel: str | None = None,
) -> Tensor:
    """Softmax attention of each query over its visible prefix of keys, or over all of them -> [S, B, G, R, N, D].

    ``kernel``: name in ``KERNELS`` for attention without a mask; None: PyTorch's choice.
    """
    if visible_SBN is not None and q_SBGRND.is_cuda:
        return flex(q_SBGRND, k_BGMD, v_BGMD, visible_SBN)
    return sdpa(q_SBGRND, k_BGMD, v_BGMD, visible_SBN, causal, kernel)


def sdpa(
    q_SBGRND: Tensor,
    k_BGMD: Tensor,
    v_BGMD: Tensor,
    visible_SBN: Tensor | None = None,
    causal: bool = True,
    kernel: str | None = None,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, without a mask by one of ``KERNELS`` (None: PyTorch's)."""
    S, B, G, R, N, D = q_SBGRND.shape
    if visible_SBN is None:
        # Streams become additional query heads of the same key head: a view if memory is [N, B, G, S, R, D].
        q_BHND = q_SBGRND.permute(1, 2, 0, 3, 4, 5).reshape(B, G * S * R, N, D)
        with sdpa_kernel(KERNELS[kernel]) if kernel else contextlib.nullcontext():
            out = F.scaled_dot_product_attention(q_BHND, k_BGMD, v_BGMD, is_causal=causal, enable_gqa=S * R > 1)
        return out.unflatten(1, (G, S, R)).permute(2, 0, 1, 3, 4, 5)
    q_BHRD, visible_BR = _streams_to_rows(q_SBGRND, visible_SBN)
    mask_B1RM = (torch.arange(k_BGMD.shape[2], device=visible_BR.device) < visible_BR[..., None])[:, None]
    out = F.scaled_dot_product_attention(q_BHRD, k_BGMD, v_BGMD, attn_mask=mask_B1RM, enable_gqa=R > 1)
    return _rows_to_streams(out, q_SBGRND.shape)


def flex(q_SBGRND: Tensor, k_BGMD: Tensor, v_BGMD: Tensor, visible_SBN: Tensor) -> Tensor:
    """``flex_attention``: skips key blocks that no query of a block sees. Forward only on CPU.

    The block mask is made once per ``visible`` tensor, which all layers of a kind share.
    """
    from torch.nn.attention.flex_attention import flex_attention

    q_BHRD, visible_BR = _streams_to_rows(q_SBGRND, visible_SBN)
    mask = _MASKS.get(visible_SBN)
    if mask is None:
        mask = _MASKS[visible_SBN] = block_mask(visible_BR, k_BGMD.shape[2])
    kernel: Callable = _compiled_flex() if q_SBGRND.is_cuda else flex_attention
    out = kernel(q_BHRD, k_BGMD, v_BGMD, block_mask=mask, enable_gqa=q_SBGRND.shape[3] > 1)
    return _rows_to_streams(out, q_SBGRND.shape)


def dense(
    q_SBGRND: Tensor, k_BGMD: Tensor, v_BGMD: Tensor, visible_SBN: Tensor | None = None, causal: bool = True
) -> Tensor:
    """Slow reference; every backend equals it up to rounding."""
    streams, batch, _, _, rows, width = q_SBGRND.shape
    if visible_SBN is None:
        seen = torch.arange(1, rows + 1) if causal else torch.full((rows,), k_BGMD.shape[2])
        visible_SBN = seen.to(q_SBGRND.device).expand(streams, batch, rows)
    scores = torch.einsum("sbgrnd,bgmd->sbgrnm", q_SBGRND, k_BGMD) / width**0.5
    hidden_SB11NM = torch.arange(k_BGMD.shape[2], device=q_SBGRND.device) >= visible_SBN[:, :, None, None, :, None]
    weights = scores.masked_fill(hidden_SB11NM, -torch.inf).softmax(dim=-1)
    return torch.einsum("sbgrnm,bgmd->sbgrnd", weights, v_BGMD)


def _streams_to_rows(q_SBGRND: Tensor, visible_SBN: Tensor) -> tuple[Tensor, Tensor]:
    """Streams become additional query rows: [B, H, S * N, D] and [B, S * N]; a view if memory is [S, N, B, G, R, D]."""
    q_BHRD = q_SBGRND.permute(1, 2, 3, 0, 4, 5).flatten(3, 4).flatten(1, 2)
    return q_BHRD, visible_SBN.transpose(0, 1).flatten(1)


def _rows_to_streams(out_BHRD: Tensor, shape: torch.Size) -> Tensor:
    S, _, G, R, N, _ = shape
    return out_BHRD.unflatten(2, (S, N)).unflatten(1, (G, R)).permute(3, 0, 1, 2, 4, 5)


_MASKS = WeakTensorKeyDictionary()
"""Block masks by the ``visible`` tensor they were made from, for the lifetime of the tensor."""


def block_mask(visible_BR: Tensor, keys: int):
    """``BlockMask`` of prefixes. A block of rows sees all key blocks before its shortest prefix and none behind its
    longest one; the key blocks between are masked key by key. Does not synchronise with the device.
    """
    from torch.nn.attention.flex_attention import BlockMask

    rows = visible_BR.shape[1]
    blocks = F.pad(visible_BR, (0, -rows % MASK_BLOCK)).unflatten(1, (-1, MASK_BLOCK))
    whole, seen = blocks.amin(-1) // MASK_BLOCK, (blocks.amax(-1) + MASK_BLOCK - 1) // MASK_BLOCK
    count = (keys + MASK_BLOCK - 1) // MASK_BLOCK
    every = torch.arange(count, device=visible_BR.device)
    partial = (whole[..., None] + every) % count

    def sees(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return key < visible_BR[b, row]

    return BlockMask.from_kv_blocks(
        *(table[:, None].int() for table in (seen - whole, partial, whole, every.expand_as(partial).contiguous())),
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
