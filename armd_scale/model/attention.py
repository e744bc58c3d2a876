"""Attention kernels behind one seam.

Every mask of the model has one form: rows are in generation order and blocks never decrease, so a query sees
a *prefix* of the keys. ``visible`` holds its length per query row; None means causal (row n sees n + 1 keys),
which is what both streams need with one token a block, whatever the permutation (design section 2). Masked diffusion
sees every key: ``causal`` is False, and there is no mask.

- ``attend``: the seam; picks a backend.
- ``sdpa``: causal: streams folded into the query heads of one grouped-query call, no mask at all;
  with ``visible``: a boolean mask.
- ``flex``: ``visible`` as a block mask, for CUDA.
- ``dense``: the reference: explicit scores and softmax in the type of its inputs (float64 in tests).

Shapes: queries [S, B, H, N, D] of S streams, keys and values [B, G, M, D] of G key heads, ``visible`` [S, B, N].
Query head h uses key head h // (H / G).
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


def attend(
    q_SBHND: Tensor, k_BGMD: Tensor, v_BGMD: Tensor, visible_SBN: Tensor | None = None, causal: bool = True
) -> Tensor:
    """Softmax attention of each query over its visible prefix of keys, or over all of them -> [S, B, H, N, D]."""
    if visible_SBN is not None and q_SBHND.is_cuda:
        return flex(q_SBHND, k_BGMD, v_BGMD, visible_SBN)
    return sdpa(q_SBHND, k_BGMD, v_BGMD, visible_SBN, causal)


def sdpa(
    q_SBHND: Tensor, k_BGMD: Tensor, v_BGMD: Tensor, visible_SBN: Tensor | None = None, causal: bool = True
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``: flash kernels where the hardware has them."""
    if visible_SBN is None:
        q_BHND, shape = _streams_to_heads(q_SBHND, k_BGMD.shape[1])
        grouped = q_BHND.shape[1] != k_BGMD.shape[1]
        out = F.scaled_dot_product_attention(q_BHND, k_BGMD, v_BGMD, is_causal=causal, enable_gqa=grouped)
        return _heads_to_streams(out, shape)
    q_BHRD, visible_BR = _streams_to_rows(q_SBHND, visible_SBN)
    mask_B1RM = (torch.arange(k_BGMD.shape[2], device=visible_BR.device) < visible_BR[..., None])[:, None]
    grouped = q_BHRD.shape[1] != k_BGMD.shape[1]
    out = F.scaled_dot_product_attention(q_BHRD, k_BGMD, v_BGMD, attn_mask=mask_B1RM, enable_gqa=grouped)
    return _rows_to_streams(out, q_SBHND.shape[0])


def flex(q_SBHND: Tensor, k_BGMD: Tensor, v_BGMD: Tensor, visible_SBN: Tensor) -> Tensor:
    """``flex_attention``: skips key blocks that no query of a block sees. Forward only on CPU.

    The block mask is made once for a ``visible`` tensor, which all layers of a kind share.
    """
    from torch.nn.attention.flex_attention import flex_attention

    q_BHRD, visible_BR = _streams_to_rows(q_SBHND, visible_SBN)
    block_mask = _MASKS.get(visible_SBN)
    if block_mask is None:
        block_mask = _MASKS[visible_SBN] = _block_mask(visible_BR, k_BGMD.shape[2])
    kernel: Callable = _compiled_flex() if q_SBHND.is_cuda else flex_attention
    out = kernel(q_BHRD, k_BGMD, v_BGMD, block_mask=block_mask, enable_gqa=q_BHRD.shape[1] != k_BGMD.shape[1])
    return _rows_to_streams(out, q_SBHND.shape[0])


def dense(
    q_SBHND: Tensor, k_BGMD: Tensor, v_BGMD: Tensor, visible_SBN: Tensor | None = None, causal: bool = True
) -> Tensor:
    """The slow, obvious reference; every backend equals it within rounding."""
    streams, batch, heads, rows, width = q_SBHND.shape
    k_BHMD = k_BGMD.repeat_interleave(heads // k_BGMD.shape[1], dim=1)
    v_BHMD = v_BGMD.repeat_interleave(heads // v_BGMD.shape[1], dim=1)
    if visible_SBN is None:
        seen = torch.arange(1, rows + 1) if causal else torch.full((rows,), k_BGMD.shape[2])
        visible_SBN = seen.to(q_SBHND.device).expand(streams, batch, rows)
    scores_SBHNM = torch.einsum("sbhnd,bhmd->sbhnm", q_SBHND, k_BHMD) / width**0.5
    hidden_SB1NM = torch.arange(k_BGMD.shape[2], device=q_SBHND.device) >= visible_SBN[:, :, None, :, None]
    weights = scores_SBHNM.masked_fill(hidden_SB1NM, -torch.inf).softmax(dim=-1)
    return torch.einsum("sbhnm,bhmd->sbhnd", weights, v_BHMD)


def _streams_to_heads(q_SBHND: Tensor, key_heads: int) -> tuple[Tensor, tuple[int, ...]]:
    """Streams become extra query heads of the same key head: [B, G * S * H/G, N, D]."""
    S, B, H, N, D = q_SBHND.shape
    q_BGSRND = q_SBHND.unflatten(2, (key_heads, H // key_heads)).permute(1, 2, 0, 3, 4, 5)
    return q_BGSRND.reshape(B, S * H, N, D), (B, key_heads, S, H // key_heads, N, D)


def _heads_to_streams(out: Tensor, shape: tuple[int, ...]) -> Tensor:
    return out.view(shape).permute(2, 0, 1, 3, 4, 5).flatten(2, 3)


def _streams_to_rows(q_SBHND: Tensor, visible_SBN: Tensor) -> tuple[Tensor, Tensor]:
    """Streams become extra query rows: [B, H, S * N, D] and [B, S * N]."""
    q_BHRD = q_SBHND.permute(1, 2, 0, 3, 4).flatten(2, 3)
    return q_BHRD, visible_SBN.transpose(0, 1).flatten(1)


def _rows_to_streams(out_BHRD: Tensor, streams: int) -> Tensor:
    return out_BHRD.unflatten(2, (streams, -1)).permute(2, 0, 1, 3, 4)


_MASKS = WeakTensorKeyDictionary()
"""Block masks by the tensor that they were made of, as long as that lives."""


def _block_mask(visible_BR: Tensor, keys: int):
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(b, h, row, key):
        return key < visible_BR[b, row]

    batch, rows = visible_BR.shape
    return create_block_mask(sees, batch, None, rows, keys, device=visible_BR.device.type)


@functools.cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
