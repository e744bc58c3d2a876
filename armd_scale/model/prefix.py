"""Prefix aggregation: the seed of the strictly causal stream (paper section 3.2).

    g_n = sum over context rows i that target n may see of  <PE(pos n), PE(pos i)> x_i

Linear attention with position embeddings as query and key: with fixed tables the kernel depends on the distance
alone. Computed in float32 and in chunks of the sequence, so that nothing of size N x N x d exists and the
work between chunks goes through the running state d_pe x d that decoding carries. It is linear in the d_pe features, so
tensor-parallel ranks share the work: each takes a part of the features of a fixed table, and the seeds are summed.
"""

import functools

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_rank
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from armd_scale.config import ModelConfig

CHUNK = 128


def position_table(rows: int, kernel: str, dim: int, width: float) -> Tensor:
    """Fixed position embeddings [rows, dim], float64, of unit length: [sin(w_k p), cos(w_k p)] / sqrt(dim / 2).

    ``gaussian``: w_k are the quantiles of |w| for w normal with standard deviation 1 / ``width`` (w and -w give the
    same pair up to sign), so <PE(p), PE(q)> is about exp(-(p - q)^2 / (2 width^2)). ``sinusoid``: the 10000-base table.
    """
    count = dim // 2
    if kernel == "gaussian":
        quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        frequencies = torch.special.ndtri((1 + quantiles) / 2) / width
    else:
        frequencies = 10000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
    angles = torch.arange(rows, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1) / count**0.5


@functools.cache
def fixed_table(rows: int, kernel: str, dim: int, width: float, device: torch.device) -> Tensor:
    # Not a buffer: an engine that casts a module to bfloat16 would cast it too, and it must stay exact.
    return position_table(rows, kernel, dim, width).to(device, torch.float32)


class PrefixAggregation(nn.Module):
    """Seeds [N, B, d] of all targets from the embeddings [N, B, d] of the context rows."""

    def __init__(self, config: ModelConfig, parallel: TransformerConfig) -> None:
        super().__init__()
        self.config = config.prefix
        self.dim = config.prefix_dim
        self.rows = config.length + 1
        dtype = parallel.params_dtype
        ranks = parallel.tensor_model_parallel_size
        self.ranks = 1 if self.config.kernel == "learned" or self.dim % ranks else ranks
        if self.config.kernel == "learned":
            self.table = nn.Parameter(torch.empty(self.rows, self.dim, dtype=dtype))
        self.target_projection = (
            nn.Parameter(torch.empty(config.hidden, self.dim, dtype=dtype)) if self.config.target_position else None
        )

    def forward(self, x_NBd: Tensor, context_BN: Tensor, targets_BN: Tensor, visible_BN: Tensor | None) -> Tensor:
        """``context_BN``, ``targets_BN``: positions of the rows; ``visible_BN``: how many context rows a target sees
        (None: row n sees n + 1)."""
        dtype = torch.promote_types(x_NBd.dtype, torch.float32)
        table = self._table(x_NBd.device)
        mine = table
        if self.ranks > 1:
            mine = table.chunk(self.ranks, dim=-1)[get_tensor_model_parallel_rank()]
        keys_BNp = mine[context_BN].to(dtype)
        queries_BNp = mine[targets_BN].to(dtype)
        x_BNd = x_NBd.transpose(0, 1).to(dtype)
        if self.ranks > 1:
            # Contiguous, and sliced after it: Megatron does not reduce a gradient that is not contiguous.
            x_BNd = copy_to_tensor_model_parallel_region(x_BNd.contiguous())
        batch, length, _ = x_BNd.shape
        # A block may reach back any distance, so block layouts are one chunk.
        chunk = CHUNK if visible_BN is None else max(1, length)
        rows = torch.arange(length, device=x_BNd.device)
        if visible_BN is None:
            visible_BN = (rows + 1).expand(batch, length)
        state_Bpd = x_BNd.new_zeros(batch, keys_BNp.shape[-1], x_BNd.shape[-1])
        seeds = []
        for start in range(0, length, chunk):
            here = slice(start, min(start + chunk, length))
            q_BCp, k_BCp, x_BCd = queries_BNp[:, here], keys_BNp[:, here], x_BNd[:, here]
            seen_BCC = rows[here] < visible_BN[:, here, None]
            seeds.append(((q_BCp @ k_BCp.transpose(1, 2)) * seen_BCC) @ x_BCd + q_BCp @ state_Bpd)
            state_Bpd = state_Bpd + k_BCp.transpose(1, 2) @ x_BCd
        seed_BNd = torch.cat(seeds, dim=1)
        if self.ranks > 1:
            seed_BNd = reduce_from_tensor_model_parallel_region(seed_BNd)
        if self.config.scale != "none":
            size = visible_BN[..., None].to(dtype)
            seed_BNd = seed_BNd / (size.sqrt() if self.config.scale == "sqrt" else size)
        if self.target_projection is not None:
            seed_BNd = seed_BNd + table[targets_BN].to(dtype) @ self.target_projection.to(dtype).t()
        return seed_BNd.transpose(0, 1).to(x_NBd.dtype).contiguous()

    def _table(self, device: torch.device) -> Tensor:
        if self.config.kernel == "learned":
            return self.table
        return fixed_table(self.rows, self.config.kernel, self.dim, self.config.width, device)
