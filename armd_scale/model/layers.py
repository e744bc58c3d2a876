"""Transformer layers on Megatron-Core's tensor-parallel linears.

- ``normalise`` ... ``cross_entropy``: the fused regions, of the formulae in ``armd_scale.formulas``.
- ``Norm``: scale-only LayerNorm or RMSNorm, computed in float32.
- ``Attention``: queries from all streams, keys and values from the first one.
- ``MLP``: GELU or SwiGLU.
- ``LowRank``: the addition of an adapter to a linear, for draft rows.
- ``Linears``: the linears of a layer: TransformerEngine's on CUDA if it is installed, else Megatron-Core's own.
- ``Layer``: the pre-norm block. Layers differ only in the number of streams in and out: two-stream 2 -> 2, last
  two-stream 2 -> 1 (the output of X is not needed), causal 1 -> 1. Models of one stream have layers 1 -> 1 alone.

Activations are [N, S * B, d], sequence first as Megatron's sequence parallelism requires. The S streams are
concatenated in the batch dimension, X first, so that one matrix product serves both (paper section 3.3).
"""

from typing import NamedTuple

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from armd_scale import formulas
from armd_scale.config import ModelConfig
from armd_scale.model.attention import Seen, attend
from armd_scale.model.context import Gather
from armd_scale.model.context import share as context_share
from armd_scale.model.float8 import Float8ColumnParallelLinear, Float8RowParallelLinear
from armd_scale.model.parameters import ONES, ZEROS, Initial, describe
from armd_scale.model.regions import fused, inputs

normalise = fused(keeps=inputs)(formulas.normalise)
gate = fused(keeps=inputs)(formulas.gate)


@fused(keeps=lambda read, made: [made[0], read[-1]])
def add_normalise(h: Tensor, update: Tensor, weight: Tensor, eps: float, centre: bool) -> tuple[Tensor, Tensor]:
    """The residual sum, and its normalisation."""
    h = h + update
    return h, formulas.normalise(h, weight, eps, centre)


@fused(keeps=lambda read, made: read if made[0].shape != read[0].shape else [made[0], read[-1]])
def add_normalise_streams(
    h: Tensor, update: Tensor | None, weight: Tensor, eps: float, centre: bool, batch: int, dropped: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The residual sum of streams [N, S * B, d] and its normalisation, both without the first ``dropped`` columns, and
    the normalisation of the first ``batch`` columns, for keys and values. All are contiguous, since Megatron reduces a
    non-contiguous tensor into a copy and returns the tensor unreduced. If columns are dropped, the sum is not kept.
    """
    h = h if update is None else h + update
    normed = formulas.normalise(h, weight, eps, centre)
    return h[:, dropped:].contiguous(), normed[:, dropped:].contiguous(), normed[:, :batch].contiguous()


@fused(keeps=lambda read, made: read[1:] if len(read) == 3 else read)
def rotate_queries(
    x_NRHD: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_heads: int,
    streams: int,
    as_heads: bool,
    scale: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Rotate every head of the rows of all streams, after an RMSNorm if there is a ``scale``.

    The result has streams as additional heads of a key head, [N, B, G, S, R, D], or (``as_heads`` False) as additional
    rows, [S, N, B, G, R, D].
    """
    if scale is not None:
        x_NRHD = formulas.normalise(x_NRHD, scale, eps, False)
    x_NSBGRD = formulas.rotate(x_NRHD, cos, sin).unflatten(2, (key_heads, -1)).unflatten(1, (streams, -1))
    return x_NSBGRD.permute((0, 2, 3, 1, 4, 5) if as_heads else (1, 0, 2, 3, 4, 5)).contiguous()


@fused(keeps=lambda read, made: read[1:] if len(read) == 3 else read)
def rotate_keys(
    kv_NBG2D: Tensor, cos: Tensor, sin: Tensor, scale: Tensor | None = None, eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Rotated keys, after an RMSNorm if there is a ``scale``, and values, [N, B, G, D] each."""
    k_NBGD, v_NBGD = kv_NBG2D.unbind(-2)
    if scale is not None:
        k_NBGD = formulas.normalise(k_NBGD, scale, eps, False)
    return formulas.rotate(k_NBGD, cos, sin), v_NBGD.contiguous()


@fused(keeps=inputs)
def cross_entropy(logits: Tensor, targets: Tensor, vocab: int) -> Tensor:
    """-log p of ``targets`` [N, B], float32, from logits [N, B, V] of which the first ``vocab`` are those of tokens."""
    scores = logits.float().flatten(0, 1)
    if vocab < logits.shape[-1]:
        scores = scores.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= vocab, -torch.inf)
    return F.cross_entropy(scores, targets.flatten(), reduction="none").view(targets.shape)


class Linears(NamedTuple):
    """Megatron-Core specs of the tensor-parallel linears of a layer."""

    column: ModuleSpec
    """Sharded along its outputs."""
    row: ModuleSpec
    """Sharded along its inputs."""


def linears(fp8: bool = False) -> Linears:
    """TransformerEngine's linears if they can run, else Megatron-Core's own. Both hold the same weights.

    ``fp8``: on a CPU, linears that round as TransformerEngine's do; TransformerEngine's follow their FP8 context.
    """
    if torch.cuda.is_available():
        from megatron.core.extensions import transformer_engine

        if transformer_engine.HAVE_TE:
            return Linears(
                ModuleSpec(transformer_engine.TEColumnParallelLinear),
                ModuleSpec(transformer_engine.TERowParallelLinear),
            )
    if fp8:
        return Linears(ModuleSpec(Float8ColumnParallelLinear), ModuleSpec(Float8RowParallelLinear))
    return Linears(ModuleSpec(ColumnParallelLinear), ModuleSpec(RowParallelLinear))


class Rotary(NamedTuple):
    """Cosines and sines of a set of rows, [N, B, 1, D/2] each, float32."""

    cos: Tensor
    sin: Tensor

    def repeat(self, other: "Rotary") -> "Rotary":
        """These rows and the rows of ``other``, concatenated along the batch."""
        return Rotary(torch.cat([self.cos, other.cos], dim=1), torch.cat([self.sin, other.sin], dim=1))


def rotary(positions_BN: Tensor, config: ModelConfig) -> Rotary:
    """Rotary tables of positions."""
    places = positions_BN.t()[..., None]
    return Rotary(*formulas.rotary_tables(places, config.head_size, config.rope_base, config.rope.model_dump()))


class Norm(nn.Module):
    """Scale-only normalisation of the last dimension, in float32."""

    def __init__(self, config: ModelConfig, parallel: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.centre = config.norm == "layernorm"
        self.weight = nn.Parameter(torch.empty(config.hidden, dtype=parallel.params_dtype))
        describe(self.weight, ONES, partial=parallel.sequence_parallel)

    def forward(
        self, h: Tensor, update: Tensor | None = None, batch: int | None = None, dropped: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """h + ``update``, its normalisation, and the normalisation for keys and values. With one stream both
        normalisations are the same; with several, of ``batch`` columns each, see ``add_normalise_streams``.
        """
        if batch is not None:
            return add_normalise_streams(h, update, self.weight, self.eps, self.centre, batch, dropped)
        if update is None:
            normed = normalise(h, self.weight, self.eps, self.centre)
        else:
            h, normed = add_normalise(h, update, self.weight, self.eps, self.centre)
        return h, normed, normed


class LowRank(nn.Module):
    """b a x, added to what a tensor-parallel linear makes of the same rows x; zero at the start.

    ``column``: the linear is sharded along its outputs, and b with it; else along its inputs, and a with it.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, column: bool, parallel: TransformerConfig) -> None:
        super().__init__()
        self.column, self.sequence = column, parallel.sequence_parallel
        parts = parallel.tensor_model_parallel_size
        own_in, own_out = (inputs, outputs // parts) if column else (inputs // parts, outputs)
        self.a = nn.Parameter(torch.empty(rank, own_in, dtype=parallel.params_dtype))
        self.b = nn.Parameter(torch.empty(own_out, rank, dtype=parallel.params_dtype))
        describe(self.a, Initial(inputs**-0.5), None if column else 1, partial=column)
        describe(self.b, ZEROS, 0 if column else None, partial=not column and self.sequence)

    def forward(self, x: Tensor) -> Tensor:
        if self.column:
            enter = gather_from_sequence_parallel_region if self.sequence else copy_to_tensor_model_parallel_region
            return F.linear(F.linear(enter(x), self.a), self.b)
        leave = (
            reduce_scatter_to_sequence_parallel_region if self.sequence else reduce_from_tensor_model_parallel_region
        )
        return F.linear(leave(F.linear(x, self.a)), self.b)


def _adapted(out: Tensor, x: Tensor, adapter: LowRank | None, drafts: int) -> Tensor:
    """``out`` of a linear for rows ``x``, with the adapter's addition to the last ``drafts`` columns."""
    if adapter is None or not drafts:
        return out
    more = adapter(x[:, -drafts:].contiguous())
    return torch.cat([out[:, :-drafts], out[:, -drafts:] + more], dim=1)


class Attention(nn.Module):
    """Rotary grouped-query attention; heads are split over the tensor-parallel ranks."""

    def __init__(self, config: ModelConfig, parallel: TransformerConfig, kinds: Linears, recompute: bool) -> None:
        super().__init__()
        self.share = context_share(parallel)
        self.recompute = recompute
        self.kernel: str | None = None  # a name of attention.KERNELS
        self.causal = config.traits.causal
        self.heads = config.heads // parallel.tensor_model_parallel_size
        self.key_heads = config.key_heads // parallel.tensor_model_parallel_size
        self.head_dim = config.head_size
        self.eps = config.norm_eps
        width, std = config.heads * config.head_size, config.init_std
        self.query = _column(kinds, config.hidden, width, std, parallel, config.qkv_bias)
        # Rows are [key head, (k, v), D], so that contiguous shards are whole heads under any layout.
        key_values = 2 * config.key_heads * config.head_size
        self.key_value = _column(kinds, config.hidden, key_values, std, parallel, config.qkv_bias)
        self.output = _row(kinds, width, config.hidden, config.residual_std, parallel)
        rank = config.adapter.rank
        self.query_adapter = LowRank(config.hidden, width, rank, True, parallel) if rank else None
        self.output_adapter = LowRank(width, config.hidden, rank, False, parallel) if rank else None
        self.query_norm = self._head_scale(parallel) if config.qk_norm else None
        self.key_norm = self._head_scale(parallel) if config.qk_norm else None

    def _head_scale(self, parallel: TransformerConfig) -> nn.Parameter:
        """Scale [D] of a normalisation per head: one for all heads, of which each rank sees its own."""
        scale = nn.Parameter(torch.empty(self.head_dim, dtype=parallel.params_dtype))
        describe(scale, ONES, partial=True)
        return scale

    def forward(
        self,
        queries: Tensor,
        context: Tensor,
        query_rope: Rotary,
        key_rope: Rotary,
        seen: Seen | None,
        drafts: int = 0,
    ) -> Tensor:
        """Attend from ``queries`` [N, S * B, d] to ``context`` [N, B, d] -> [N, S * B, d].

        ``drafts``: columns of draft rows, the last ones.
        """
        kv, _ = self.key_value(context)
        kv_NBG2D = kv.unflatten(-1, (self.key_heads, 2, self.head_dim))
        k_NBGD, v_NBGD = rotate_keys(kv_NBG2D, *key_rope, self.key_norm, self.eps)
        gathered = Gather(torch.stack([k_NBGD, v_NBGD], dim=1), self.share) if self.share.ranks > 1 else None
        q = _adapted(self.query(queries)[0], queries, self.query_adapter, drafts)
        streams, as_heads = queries.shape[1] // context.shape[1], seen is None
        q_NRHD = q.unflatten(-1, (self.heads, self.head_dim))
        q = rotate_queries(q_NRHD, *query_rope, self.key_heads, streams, as_heads, self.query_norm, self.eps)
        q_SBGRND = q.permute((3, 1, 2, 4, 0, 5) if as_heads else (0, 2, 3, 4, 1, 5))
        if gathered:
            k_NBGD, v_NBGD = gathered.finish().unbind(1)
        keys_values = k_NBGD.permute(1, 2, 0, 3), v_NBGD.permute(1, 2, 0, 3)
        inputs = (q_SBGRND, *keys_values, seen, self.causal, self.kernel)
        if self.recompute and torch.is_grad_enabled():
            out_SBGRND = checkpoint(attend, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            out_SBGRND = attend(*inputs)
        out = out_SBGRND.permute(4, 0, 1, 2, 3, 5).flatten(3).flatten(1, 2).contiguous()
        return _adapted(self.output(out)[0], out, self.output_adapter, drafts)


class MLP(nn.Module):
    """Two-layer perceptron; inner units are split over the tensor-parallel ranks. ``rank``: of its adapter, or 0."""

    def __init__(self, config: ModelConfig, parallel: TransformerConfig, kinds: Linears, rank: int) -> None:
        super().__init__()
        self.gated = config.mlp == "swiglu"
        # Rows of a gated MLP are [unit, (gate, value)], so that contiguous shards are whole units.
        inner = config.ffn_width * (2 if self.gated else 1)
        self.up = _column(kinds, config.hidden, inner, config.init_std, parallel)
        self.down = _row(kinds, config.ffn_width, config.hidden, config.residual_std, parallel)
        self.up_adapter = LowRank(config.hidden, inner, rank, True, parallel) if rank else None
        self.down_adapter = LowRank(config.ffn_width, config.hidden, rank, False, parallel) if rank else None

    def forward(self, x: Tensor, drafts: int = 0) -> Tensor:
        hidden = _adapted(self.up(x)[0], x, self.up_adapter, drafts)
        hidden = gate(hidden) if self.gated else formulas.gelu(hidden)
        return _adapted(self.down(hidden)[0], hidden, self.down_adapter, drafts)


class Layer(nn.Module):
    """Pre-norm block from ``streams_in`` to ``streams_out`` streams; keys and values come from the first one.

    ``recompute``: compute attention again in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        config: ModelConfig,
        parallel: TransformerConfig,
        kinds: Linears,
        streams_in: int,
        streams_out: int,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.streams_in = streams_in
        self.streams_out = streams_out
        self.attention_norm = Norm(config, parallel)
        self.attention = Attention(config, parallel, kinds, recompute)
        self.mlp_norm = Norm(config, parallel)
        self.mlp_streams = streams_out if config.target_mlp else 1
        of_drafts = config.adapter.rank if self.mlp_streams == streams_out else 0
        self.mlp = MLP(config, parallel, kinds, of_drafts)

    def forward(
        self,
        h: Tensor,
        update: Tensor | None,
        query_rope: Rotary,
        key_rope: Rotary,
        seen: Seen | None,
        drafts: int = 0,
        apart: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream is h + ``update``, on entry and on return: the next norm adds the update.

        ``drafts``: streams behind those of the layer that no other row sees. ``apart``: they alone have a gradient.
        """
        if apart:
            return self._apart(h, update, query_rope, key_rope, seen)
        streams = self.streams_in + drafts
        batch = h.shape[1] // streams
        cut = () if streams == 1 else (batch, (self.streams_in - self.streams_out) * batch)
        h, queries, context = self.attention_norm(h, update, *cut)
        columns = drafts * batch
        h, normed, _ = self.mlp_norm(h, self.attention(queries, context, query_rope, key_rope, seen, columns))
        if self.mlp_streams == self.streams_out:
            return h, self.mlp(normed, columns)
        of_context = self.mlp(normed[:, :batch].contiguous())
        return h, torch.cat([of_context, torch.zeros_like(h[:, batch:])], dim=1)

    def _apart(
        self, h: Tensor, update: Tensor | None, query_rope: Rotary, key_rope: Rotary, seen: Seen | None
    ) -> tuple[Tensor, Tensor]:
        """``forward`` with one draft stream and one token a block, whose backward pass is that of the draft rows."""
        batch = h.shape[1] // (self.streams_in + 1)
        h, ahead = h.split([h.shape[1] - batch, batch], dim=1)
        of_others = Rotary(*(table[:, :-batch] for table in query_rope))
        of_drafts = Rotary(*(table[:, -batch:] for table in query_rope))
        drafted: Tensor | None = None
        if update is not None:
            update, drafted = update.split(h.shape[1], dim=1)
        with torch.no_grad():
            others, of_layer = self(h, update, of_others, key_rope, seen)
            context = (h if update is None else h + update)[:, :batch].contiguous()
            context = self.attention_norm(context)[1]
        ahead, queries, _ = self.attention_norm(ahead.contiguous(), None if drafted is None else drafted.contiguous())
        ahead, normed, _ = self.mlp_norm(ahead, self.attention(queries, context, of_drafts, key_rope, seen, batch))
        drafted = self.mlp(normed, batch) if self.mlp_streams == self.streams_out else torch.zeros_like(ahead)
        return torch.cat([others, ahead], dim=1), torch.cat([of_layer, drafted], dim=1)


def _column(
    kinds: Linears, inputs: int, outputs: int, std: float, parallel: TransformerConfig, bias: bool = False
) -> nn.Module:
    """A linear that ranks share along its outputs, and its bias with it."""
    options = {"gather_output": False, "skip_bias_add": False, "bias": bias}
    return _linear(kinds.column, 0, inputs, outputs, std, parallel, **options)


def _row(kinds: Linears, inputs: int, outputs: int, std: float, parallel: TransformerConfig) -> nn.Module:
    """A linear that ranks share along its inputs."""
    options = {"input_is_parallel": True, "skip_bias_add": False, "bias": False}
    return _linear(kinds.row, 1, inputs, outputs, std, parallel, **options)


def _linear(
    spec: ModuleSpec, dim: int, inputs: int, outputs: int, std: float, parallel: TransformerConfig, **options: bool
) -> nn.Module:
    # Weights are drawn by ``parallel.sharding.initialise``, the same under every layout.
    linear = build_module(
        spec, inputs, outputs, config=parallel, init_method=lambda weight: weight, is_expert=False, **options
    )
    describe(linear.weight, Initial(std), dim)
    if options["bias"]:
        describe(linear.bias, ZEROS, dim)
    return linear
