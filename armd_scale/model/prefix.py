"""Prefix aggregation: the seed of the strictly causal stream (paper section 3.2).

    g_n = sum over context rows i that target n may see of  <PE(pos n), PE(pos i)> x_i

With ``prefix.gate`` the sum has a learned factor for each channel, and several widths give a sum of such sums. With
``prefix.neighbour`` the embedding of the token before the target is added, where it is visible.

This is linear attention with position embeddings as queries and keys. With a fixed table, the product of two position
embeddings depends on the distance alone: within a chunk of rows the weights are looked up and multiplied with the
embeddings. Rows before the chunk contribute through a running state of d_pe x d in float32, the state that decoding
carries. A target costs (rows of a chunk) x d within its chunk and 2 d_pe x d for the state. So a text of up to 2 d_pe
rows is one chunk without a state, and the cost per token of longer texts does not depend on their length.

With blocks of several tokens a target does not see the last rows before it, ``Rows.reach`` at most: these are looked
up as well, and the state ends before them.

Columns of x do not mix, so each tensor-parallel rank computes a part of them. Context-parallel ranks exchange the
states of their chunks of the text.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from armd_scale.config import ModelConfig
from armd_scale.formulas import position_table, scale_prefix
from armd_scale.model import context
from armd_scale.model.parameters import ZEROS, Initial, describe
from armd_scale.model.regions import fused
from armd_scale.rows import Rows

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
    """Seeds of all targets from the embeddings of the context rows."""

    def __init__(self, config: ModelConfig, parallel: TransformerConfig) -> None:
        super().__init__()
        self.share = context.share(parallel)
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

    def windows(self, rows: Rows) -> list[slice]:
        """The context rows, of every chunk of the text that this rank holds, whose embeddings its targets need."""
        chunks = self.share.chunks(rows.context_positions.shape[1])
        return [slice(max(0, chunk.start - rows.reach), chunk.stop) for chunk in chunks]

    def forward(self, windows_BNd: Sequence[Tensor], rows: Rows) -> list[Tensor]:
        """Seeds [N, B, d] of the targets, and of the draft rows if there are any, without their neighbours.

        ``windows_BNd``: the embeddings of ``windows``; ``rows``: those of all ranks.
        """
        length, own = rows.context_positions.shape[1], self.share
        visible_BN = rows.visible.context_of_target if rows.visible else None
        if visible_BN is None:
            visible_BN = torch.arange(1, length + 1, device=windows_BNd[0].device).expand_as(rows.context_positions)
        kinds = [_Targets(rows.target_positions, self.gate)]
        if rows.drafts:
            more = self.draft_gate is not None
            kinds.append(_Targets(rows.drafts.positions, self.gate + self.draft_gate if more else self.gate))  # type: ignore[operator]
        if self.split:
            windows_BNd = [scatter_to_tensor_model_parallel_region(x_BNd) for x_BNd in windows_BNd]
            kinds = [kind.map(scatter_to_tensor_model_parallel_region) for kind in kinds]
        texts = _Texts(rows, visible_BN)
        parts: list[list[Tensor]] = [[] for _ in kinds]
        states = self._states_before(windows_BNd, texts)
        for chunk, window, x_BNd, state in zip(
            own.chunks(length), self.windows(rows), windows_BNd, states, strict=True
        ):
            for start in range(chunk.start, chunk.stop, self.chunk):
                here = slice(start, min(start + self.chunk, chunk.stop))
                edge = texts.edge(start)
                near_BCd = x_BNd[:, edge - window.start : here.stop - window.start]
                for kind, seeds in zip(kinds, parts, strict=True):
                    seeds.append(self._sum(kind, near_BCd, texts, here, state))
                if here.stop < chunk.stop:
                    state = self._advance(state, near_BCd, texts, slice(edge, texts.edge(here.stop)))
        count_BN = own.part(visible_BN if rows.starts is None else visible_BN - rows.starts)
        return [
            self._finish(torch.cat(seeds, dim=1), own.part(kind.positions_BN), count_BN, drafts=number == 1)
            for number, (kind, seeds) in enumerate(zip(kinds, parts, strict=True))
        ]

    def _sum(
        self, kind: "_Targets", near_BCd: Tensor, texts: "_Texts", here: slice, state: list[Tensor] | None
    ) -> Tensor:
        """Weighted sums of the targets ``here``, from the context rows near them and the state of those before."""
        rows, edge = texts.rows, texts.edge(here.start)
        near, targets_BC = slice(edge, here.stop), kind.positions_BN[:, here]
        row = torch.arange(near.start, near.stop, device=near_BCd.device)
        seen_BCC = row < texts.visible_BN[:, here, None]
        if rows.starts is not None:
            seen_BCC = seen_BCC & (row >= rows.starts[:, here, None])
        sums = []
        for kernel, width in enumerate(self.widths):
            weights = self._weights(width, targets_BC, rows.context_positions[:, near], seen_BCC, near_BCd.dtype)
            seed = weights @ near_BCd
            if state is not None:
                earlier = self._embedding(width, targets_BC, state[kernel].dtype)
                if rows.starts is not None:
                    earlier = earlier * (rows.starts[:, here] < edge)[..., None]
                seed = seed + earlier @ state[kernel]
            sums.append(seed if kind.gates_Kd is None else seed * kind.gates_Kd[kernel])
        return sum(sums[1:], start=sums[0])

    def _advance(
        self, state: list[Tensor] | None, near_BCd: Tensor, texts: "_Texts", added: slice
    ) -> list[Tensor] | None:
        """The state [B, d_pe, d] of every width behind the rows ``added``, the first of ``near_BCd``.

        It is that of the document of the last of these rows.
        """
        if added.start == added.stop:
            return state
        starts, dtype = texts.rows.starts, torch.promote_types(near_BCd.dtype, torch.float32)
        new_BCd = near_BCd[:, : added.stop - added.start].to(dtype)
        positions_BC = texts.rows.context_positions[:, added]
        embedded = [self._embedding(width, positions_BC, dtype) for width in self.widths]
        if starts is not None:
            last_B1 = starts[:, added.stop - 1, None]
            row = torch.arange(added.start, added.stop, device=near_BCd.device)
            embedded = [keys_BCp * (row >= last_B1)[..., None] for keys_BCp in embedded]
            state = state and [old_Bpd * (last_B1 < added.start)[..., None] for old_Bpd in state]
        sums = [keys_BCp.transpose(1, 2) @ new_BCd for keys_BCp in embedded]
        return sums if state is None else [old + new for old, new in zip(state, sums, strict=True)]

    def _states_before(self, windows_BNd: Sequence[Tensor], texts: "_Texts") -> list[list[Tensor] | None]:
        """The state at the edge of every chunk of this rank: None, or with several ranks a sum of what all hold."""
        own = self.share
        if own.ranks == 1:
            return [None]
        edges, totals = texts.edges(2 * own.ranks), []
        for chunk, x_BNd in zip(own.numbers, windows_BNd, strict=True):
            state = self._advance(None, x_BNd, texts, slice(edges[chunk], edges[chunk + 1]))
            if state is None:
                batch, _, columns = x_BNd.shape
                dtype = torch.promote_types(x_BNd.dtype, torch.float32)
                state = [x_BNd.new_zeros(batch, self.dim, columns, dtype=dtype) for _ in self.widths]
            totals.append(torch.stack(state))
        totals_cKBpd = context.gather(torch.stack(totals), own)
        states: list[list[Tensor] | None] = []
        for chunk in own.numbers:
            before_cKBpd = totals_cKBpd[:chunk]
            if texts.rows.starts is not None and edges[chunk]:
                ends = [max(0, edge - 1) for edge in edges[1 : chunk + 1]]
                last_Bc = torch.stack([texts.rows.starts[:, end] for end in ends], dim=1)
                before_cKBpd = before_cKBpd * (last_Bc == last_Bc[:, -1:]).t()[:, None, :, None, None]
            states.append(list(before_cKBpd.sum(0)) if edges[chunk] else None)
        return states

    def _finish(self, seed_BNd: Tensor, positions_BN: Tensor, count_BN: Tensor, drafts: bool) -> Tensor:
        dtype = seed_BNd.dtype
        if self.split:
            seed_BNd = gather_from_tensor_model_parallel_region(seed_BNd)
        seed_BNd = scale_prefix(seed_BNd, count_BN[..., None], self.prefix_config.scale)
        if self.target_projection is not None:
            wide = torch.promote_types(dtype, torch.float32)
            embedded_BNp = self._embedding(self.widths[0], positions_BN, wide)
            seed_BNd = seed_BNd + embedded_BNp @ self.target_projection.to(wide).t()
        if drafts and self.draft_seed is not None:
            seed_BNd = seed_BNd + self.draft_seed
        return seed_BNd.transpose(0, 1)

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


def neighbours(rows: Rows, targets_BN: Tensor) -> tuple[Tensor, Tensor]:
    """The token before each target, [B, N], and whether the target sees it; any token where it does not."""
    batch, length = rows.context_positions.shape
    row_BN = torch.arange(length, device=targets_BN.device).expand(batch, length)
    # Every document of n tokens has n + 1 positions, of which the last token of its order has no context row.
    places, origins_BN = length + 1, torch.zeros_like(row_BN)
    if rows.starts is not None:
        places, origins_BN = 2 * length, rows.starts + (rows.starts == row_BN).cumsum(1) - 1
    row_of_BP = torch.full((batch, places), length, device=targets_BN.device)
    row_of_BP = row_of_BP.scatter(1, origins_BN + rows.context_positions, row_BN)
    found_BN = row_of_BP.gather(1, origins_BN + targets_BN - 1)
    seen_BN = found_BN < (rows.visible.context_of_target if rows.visible else row_BN + 1)
    return rows.context_tokens.gather(1, found_BN.where(seen_BN, 0)), seen_BN


class _Targets(NamedTuple):
    positions_BN: Tensor
    gates_Kd: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> "_Targets":
        return self if self.gates_Kd is None else self._replace(gates_Kd=change(self.gates_Kd))


class _Texts(NamedTuple):
    rows: Rows
    visible_BN: Tensor

    def edge(self, row: int) -> int:
        """Number of first context rows that every target from ``row`` on sees, if they are in its document."""
        return max(0, row - self.rows.reach)

    def edges(self, chunks: int) -> list[int]:
        """``edge`` of the first target of each of ``chunks`` chunks, and behind the last one."""
        size = self.visible_BN.shape[1] // chunks
        return [self.edge(chunk * size) for chunk in range(chunks + 1)]
