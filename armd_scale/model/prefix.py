"""Prefix aggregation: the seed of the strictly causal stream (paper section 3.2).

    g_n = sum over context rows i that target n may see of  <PE(pos n), PE(pos i)> x_i

With ``prefix.gate`` the sum has a learned factor for each channel, and several widths give a sum of such sums. With
``prefix.neighbour`` the embedding of the token before the target is added, where it is visible.

This is linear attention with position embeddings as queries and keys. With a fixed table, the product of two position
embeddings depends on the distance alone: within a chunk of rows the weights are looked up and multiplied with the
embeddings. Rows before the chunk contribute through a running state of d_pe x d in float32, the state that decoding
carries. A target costs (rows of a chunk) x d within its chunk and 2 d_pe x d for the state. So a text of up to 2 d_pe
rows is one chunk without a state, and the cost per token of longer texts does not depend on their length.

Columns of x do not mix, so each tensor-parallel rank computes a part of them.
"""

import functools

import torch
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from armd_scale.config import ModelConfig
from armd_scale.formulas import position_table, scale_prefix
from armd_scale.model.parameters import ZEROS, Initial, describe
from armd_scale.model.regions import fused

CHUNK = 128, 1024
"""Minimum and maximum rows of a chunk of a text with several chunks."""


def rows_of_chunk(config: ModelConfig) -> int:
    """Rows of a chunk in training with one token a block: as many as cost as much as the state, within ``CHUNK``."""
    state = 2 * config.prefix_dim
    return config.length if config.length <= state else min(max(state, CHUNK[0]), CHUNK[1])


# Not buffers: DeepSpeed casts buffers to bfloat16, and the tables must stay exact.
@functools.cache
def fixed_table(rows: int, kernel: str, dim: int, width: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``position_table`` on a device."""
    return position_table(rows, kernel, dim, width).to(device, dtype)


@functools.cache
def fixed_kernel(rows: int, kernel: str, dim: int, width: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """<PE(p), PE(q)> of a fixed table by the distance of p and q, [rows]."""
    table = position_table(rows, kernel, dim, width)
    return (table @ table[0]).to(device, dtype)


@fused(keeps=lambda read, made: [])
def look_up(targets_BC: Tensor, context_BC: Tensor, seen_BCC: Tensor, kernel: Tensor) -> Tensor:
    """Weight of every context row for every target, [B, C, C], 0 where it is not seen."""
    distance = (targets_BC[:, :, None] - context_BC[:, None]).abs()
    return torch.where(seen_BCC, kernel[distance], 0)


class PrefixAggregation(nn.Module):
    """Seeds [N, B, d] of all targets from the embeddings [N, B, d] of the context rows."""

    def __init__(self, config: ModelConfig, parallel: TransformerConfig) -> None:
        super().__init__()
        self.prefix_config = config.prefix
        self.dim = config.prefix_dim
        self.rows = config.length + 1
        dtype = parallel.params_dtype
        self.chunk = rows_of_chunk(config)
        self.learned = self.prefix_config.kernel == "learned"
        self.widths = self.prefix_config.widths
        # The gradient of a learned table is a sum over all columns.
        self.split = parallel.tensor_model_parallel_size > 1 and not self.learned
        if self.learned:
            self.table = nn.Parameter(torch.empty(self.rows, self.dim, dtype=dtype))
            describe(self.table, Initial(self.dim**-0.5))
        self.gate: nn.Parameter | None = None
        if self.prefix_config.gate is not None:
            self.gate = nn.Parameter(torch.empty(len(self.widths), config.hidden, dtype=dtype))
            describe(self.gate, Initial(value=self.prefix_config.gate))
        self.draft_seed: nn.Parameter | None = None
        self.draft_gate: nn.Parameter | None = None
        if config.adapter.rank:
            self.draft_seed = nn.Parameter(torch.empty(config.hidden, dtype=dtype))
            describe(self.draft_seed, Initial(config.init_std))
            if self.gate is not None:
                self.draft_gate = nn.Parameter(torch.empty_like(self.gate))
                describe(self.draft_gate, ZEROS)
        self.target_projection: nn.Parameter | None = None
        if self.prefix_config.target_position:
            self.target_projection = nn.Parameter(torch.empty(config.hidden, self.dim, dtype=dtype))
            describe(self.target_projection, Initial(config.init_std))

    def forward(
        self,
        x_NBd: Tensor,
        context_BN: Tensor,
        targets_BN: Tensor,
        visible_BN: Tensor | None,
        starts_BN: Tensor | None = None,
        drafts: bool = False,
    ) -> Tensor:
        """``context_BN``, ``targets_BN``: positions of the rows; ``visible_BN``: end of the context rows that a target
        sees (None: row n sees up to n + 1); ``starts_BN``: the first of them (None: 0); ``drafts``: whether the targets
        are draft rows.
        """
        batch, length = context_BN.shape
        # A block may reach back any distance, so block layouts are one chunk.
        chunk = self.chunk if visible_BN is None else length
        rows = torch.arange(length, device=x_NBd.device)
        if visible_BN is None:
            visible_BN = (rows + 1).expand(batch, length)
        whole_NBd, gates_Kd = x_NBd, self.gate
        if drafts and self.draft_gate is not None:
            gates_Kd = self.gate + self.draft_gate
        if self.split:
            x_NBd = scatter_to_tensor_model_parallel_region(x_NBd)
            gates_Kd = gates_Kd if gates_Kd is None else scatter_to_tensor_model_parallel_region(gates_Kd)
        x_BNd, dtype = x_NBd.transpose(0, 1), torch.promote_types(x_NBd.dtype, torch.float32)
        states_Bpd: list[Tensor] = []
        seeds = []
        for start in range(0, length, chunk):
            here = slice(start, min(start + chunk, length))
            places = targets_BN[:, here], context_BN[:, here]
            seen_BCC = rows[here] < visible_BN[:, here, None]
            if starts_BN is not None:
                seen_BCC = seen_BCC & (rows[here] >= starts_BN[:, here, None])
            sums = []
            for kernel, width in enumerate(self.widths):
                seed = self._weights(width, *places, seen_BCC, x_NBd.dtype) @ x_BNd[:, here]
                if states_Bpd:
                    earlier = self._embedding(width, places[0], dtype)
                    if starts_BN is not None:  # the state is that of the document at the end of the last chunk
                        earlier = earlier * (starts_BN[:, here] < start)[..., None]
                    seed = seed + earlier @ states_Bpd[kernel]
                sums.append(seed if gates_Kd is None else seed * gates_Kd[kernel])
            seeds.append(sum(sums[1:], start=sums[0]))
            if here.stop < length:
                embedded = [self._embedding(width, places[1], dtype) for width in self.widths]
                if starts_BN is not None:
                    last_B1 = starts_BN[:, here.stop - 1, None]
                    embedded = [keys_BCp * (rows[here] >= last_B1)[..., None] for keys_BCp in embedded]
                    states_Bpd = [state_Bpd * (last_B1 < start)[..., None] for state_Bpd in states_Bpd]
                seen_Bpd = [keys_BCp.transpose(1, 2) @ x_BNd[:, here].to(dtype) for keys_BCp in embedded]
                states_Bpd = [sum(pair) for pair in zip(states_Bpd, seen_Bpd, strict=True)] if states_Bpd else seen_Bpd
        seed_BNd = torch.cat(seeds, dim=1)
        if self.split:
            seed_BNd = gather_from_tensor_model_parallel_region(seed_BNd)
        count_BN = visible_BN if starts_BN is None else visible_BN - starts_BN
        seed_BNd = scale_prefix(seed_BNd, count_BN[..., None], self.prefix_config.scale)
        if self.target_projection is not None:
            embedded_BNp = self._embedding(self.widths[0], targets_BN, dtype)
            seed_BNd = seed_BNd + embedded_BNp @ self.target_projection.to(dtype).t()
        if drafts and self.draft_seed is not None:
            seed_BNd = seed_BNd + self.draft_seed
        if self.prefix_config.neighbour:
            seed_BNd = seed_BNd + neighbours(whole_NBd.transpose(0, 1), context_BN, targets_BN, visible_BN, starts_BN)
        return seed_BNd.transpose(0, 1).to(x_NBd.dtype).contiguous()

    def _weights(
        self, width: float, targets_BC: Tensor, context_BC: Tensor, seen_BCC: Tensor, dtype: torch.dtype
    ) -> Tensor:
        if self.learned:
            queries_BCp, keys_BCp = (self._embedding(width, places, dtype) for places in (targets_BC, context_BC))
            return (queries_BCp @ keys_BCp.transpose(1, 2)) * seen_BCC
        return look_up(targets_BC, context_BC, seen_BCC, fixed_kernel(*self._fixed, width, targets_BC.device, dtype))

    def _embedding(self, width: float, positions_BC: Tensor, dtype: torch.dtype) -> Tensor:
        if self.learned:
            return self.table[positions_BC].to(dtype)
        return fixed_table(*self._fixed, width, positions_BC.device, dtype)[positions_BC]

    @property
    def _fixed(self) -> tuple[int, str, int]:
        return self.rows, self.prefix_config.kernel, self.dim


def neighbours(
    x_BNd: Tensor, context_BN: Tensor, targets_BN: Tensor, visible_BN: Tensor, starts_BN: Tensor | None = None
) -> Tensor:
    """Embeddings [B, N, d] of the token before each target, 0 where the target does not see it."""
    batch, length = context_BN.shape
    rows_BN = torch.arange(length, device=x_BNd.device).expand(batch, length)
    # Every document of n tokens has n + 1 positions, of which the last token of its order has no context row.
    places, origins_BN = length + 1, torch.zeros_like(rows_BN)
    if starts_BN is not None:
        places, origins_BN = 2 * length, starts_BN + (starts_BN == rows_BN).cumsum(1) - 1
    row_of_BP = torch.full((batch, places), length, device=x_BNd.device).scatter(1, origins_BN + context_BN, rows_BN)
    found_BN = row_of_BP.gather(1, origins_BN + targets_BN - 1)
    seen_BN = found_BN < visible_BN
    index_BNd = found_BN.where(seen_BN, 0)[..., None].expand_as(x_BNd)
    return x_BNd.gather(1, index_BNd) * seen_BN[..., None]
