"""Transformer layers on Megatron-Core's tensor-parallel linears.

- ``fused``: regions of element-wise work that are one kernel on CUDA: norm, rotation, gate, cross-entropy.
- ``Norm``: scale-only LayerNorm or RMSNorm, computed in float32.
- ``Attention``: queries from any streams, keys and values from the first one.
- ``MLP``: GELU or SwiGLU.
- ``Linears``: which linears those are: TransformerEngine's on CUDA where it is installed, else Megatron-Core's own.
- ``Layer``: the pre-norm block. One class serves the three kinds of the model, which differ only in the number of
  streams that come in and go out: two-stream 2 -> 2, last two-stream 2 -> 1 (X's output is not needed), causal 1 -> 1.
The left-to-right and the masked-diffusion models are made of 1 -> 1 alone.

Activations are [N, S * B, d], sequence first as Megatron's sequence parallelism wants; the S streams lie behind each
other in the batch dimension, X first, so that one matrix product serves both (paper section 3.3).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from armd_scale.config import ModelConfig
from armd_scale.model.attention import attend
from armd_scale.model.float8 import Float8ColumnParallelLinear, Float8RowParallelLinear

_M = TypeVar("_M", bound=nn.Module)
_T = TypeVar("_T")

_SHAPES = 64
"""Shapes that a region is compiled for: those of layers, evaluations and the last samples of each."""


def on_cuda(x: Tensor) -> bool:
    """Whether work on a tensor is done by CUDA kernels."""
    return x.is_cuda


def fused(function: Callable[..., _T]) -> Callable[..., _T]:
    """A region of element-wise work, compiled into as few kernels as it needs where its first input is on CUDA.

    Elsewhere it runs as it is written. A region compiles anew for new shapes, of which a run has few; the compiler
    would stop, without a word, after eight.
    """
    torch._dynamo.config.recompile_limit = _SHAPES
    compiled = torch.compile(function, dynamic=False)

    @functools.wraps(function)
    def region(x: Tensor, *more: Any) -> _T:
        return compiled(x, *more) if on_cuda(x) else function(x, *more)

    return region


def _normalised(x: Tensor, weight: Tensor, eps: float, centre: bool) -> Tensor:
    if centre:
        return F.layer_norm(x.float(), weight.shape, weight.float(), None, eps).to(x.dtype)
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


@fused
def normalise(x: Tensor, weight: Tensor, eps: float, centre: bool) -> Tensor:
    """LayerNorm (``centre``) or RMSNorm of the last dimension with a scale, in float32."""
    return _normalised(x, weight, eps, centre)


@fused
def add_normalise(h: Tensor, update: Tensor, weight: Tensor, eps: float, centre: bool) -> tuple[Tensor, Tensor]:
    """The residual sum, and its normalisation."""
    h = h + update
    return h, _normalised(h, weight, eps, centre)


@fused
def add_normalise_streams(
    h: Tensor, update: Tensor | None, weight: Tensor, eps: float, centre: bool, batch: int, dropped: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The residual sum of streams [N, S * B, d] and its normalisation without their first ``dropped`` columns, and the
    normalisation of the first ``batch``, which are keys and values. All are contiguous: Megatron reduces a tensor that
    is not into a copy, and returns it unreduced.
    """
    h = h if update is None else h + update
    normed = _normalised(h, weight, eps, centre)
    return h[:, dropped:].contiguous(), normed[:, dropped:].contiguous(), normed[:, :batch].contiguous()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


@fused
def rotate_queries(x_NRHD: Tensor, cos: Tensor, sin: Tensor, key_heads: int, streams: int, as_heads: bool) -> Tensor:
    """Rotate pairs (i, i + D/2) of every head of the rows of all streams, in float32.

    In the layout in which streams are more heads of a key head, [N, B, G, S, R, D], or more rows, [S, N, B, G, R, D].
    """
    x_NSBGRD = _rotated(x_NRHD, cos, sin).unflatten(2, (key_heads, -1)).unflatten(1, (streams, -1))
    return x_NSBGRD.permute((0, 2, 3, 1, 4, 5) if as_heads else (1, 0, 2, 3, 4, 5)).contiguous()


@fused
def rotate_keys(kv_NBG2D: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated keys, and values, [N, B, G, D] each, of the pairs of them."""
    k_NBGD, v_NBGD = kv_NBG2D.unbind(-2)
    return _rotated(k_NBGD, cos, sin), v_NBGD.contiguous()


@fused
def gate(hidden: Tensor) -> Tensor:
    """SwiGLU: silu of the even units times the odd ones."""
    gates, values = hidden.unflatten(-1, (-1, 2)).unbind(-1)
    return F.silu(gates) * values


@fused
def cross_entropy(logits: Tensor, targets: Tensor, vocab: int) -> Tensor:
    """-log p of ``targets`` [N, B], float32, from logits [N, B, V] of which the first ``vocab`` are those of tokens."""
    scores = logits.float().flatten(0, 1)
    if vocab < logits.shape[-1]:
        scores = scores.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= vocab, -torch.inf)
    return F.cross_entropy(scores, targets.flatten(), reduction="none").view(targets.shape)


class Linears(NamedTuple):
    """Megatron-Core specs of the tensor-parallel linears that layers are built from."""

    column: ModuleSpec
    """Cut along its outputs."""
    row: ModuleSpec
    """Cut along its inputs."""


def linears(fp8: bool = False) -> Linears:
    """TransformerEngine's linears where they can run, else Megatron-Core's own. They hold the same weights.

    ``fp8``: TransformerEngine's have it by their context; on a CPU, those that round as they do.
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
        """These rows, then the rows of ``other``, along the batch."""
        return Rotary(torch.cat([self.cos, other.cos], dim=1), torch.cat([self.sin, other.sin], dim=1))


def rotary(positions_BN: Tensor, head_dim: int, base: float) -> Rotary:
    """Rotary tables of original positions."""
    steps = torch.arange(0, head_dim, 2, device=positions_BN.device, dtype=torch.float32)
    angles = positions_BN.t().float()[..., None, None] * base ** (-steps / head_dim)
    return Rotary(angles.cos(), angles.sin())


class Norm(nn.Module):
    """Scale-only normalisation of the last dimension, in float32."""

    def __init__(self, config: ModelConfig, parallel: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.centre = config.norm == "layernorm"
        self.weight = nn.Parameter(torch.empty(config.hidden, dtype=parallel.params_dtype))
        # Under sequence parallelism each rank normalises a part of the sequence.
        self.weight.tensor_partial = parallel.sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self, h: Tensor, update: Tensor | None = None, batch: int | None = None, dropped: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """h + ``update``, its normalisation, and that of keys and values, which is the same for one stream; for several
        in columns of ``batch``, see ``add_normalise_streams``.
        """
        if batch is not None:
            return add_normalise_streams(h, update, self.weight, self.eps, self.centre, batch, dropped)
        if update is None:
            normed = normalise(h, self.weight, self.eps, self.centre)
        else:
            h, normed = add_normalise(h, update, self.weight, self.eps, self.centre)
        return h, normed, normed


class Attention(nn.Module):
    """Rotary grouped-query attention; heads are split over the tensor-parallel ranks."""

    def __init__(self, config: ModelConfig, parallel: TransformerConfig, kinds: Linears, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.kernel: str | None = None  # of attention, see attention.KERNELS
        self.causal = config.objective != "mdm"
        self.heads = config.heads // parallel.tensor_model_parallel_size
        self.key_heads = config.key_heads // parallel.tensor_model_parallel_size
        self.head_dim = config.head_dim
        width = config.heads * config.head_dim
        self.query = _column(kinds, config.hidden, width, parallel)
        # Rows are [key head, (k, v), D], so that a contiguous cut gives whole heads under any layout.
        self.key_value = _column(kinds, config.hidden, 2 * config.key_heads * config.head_dim, parallel)
        self.output = _row(kinds, width, config.hidden, parallel)

    def forward(
        self, queries: Tensor, context: Tensor, query_rope: Rotary, key_rope: Rotary, visible_SBN: Tensor | None
    ) -> Tensor:
        """Attend from ``queries`` [N, S * B, d] to ``context`` [N, B, d] -> [N, S * B, d]."""
        q, _ = self.query(queries)
        kv, _ = self.key_value(context)
        k_NBGD, v_NBGD = rotate_keys(kv.unflatten(-1, (self.key_heads, 2, self.head_dim)), *key_rope)
        streams, as_heads = queries.shape[1] // context.shape[1], visible_SBN is None
        q_NRHD = q.unflatten(-1, (self.heads, self.head_dim))
        q = rotate_queries(q_NRHD, *query_rope, self.key_heads, streams, as_heads)
        q_SBGRND = q.permute((3, 1, 2, 4, 0, 5) if as_heads else (0, 2, 3, 4, 1, 5))
        keys_values = k_NBGD.permute(1, 2, 0, 3), v_NBGD.permute(1, 2, 0, 3)
        inputs = (q_SBGRND, *keys_values, visible_SBN, self.causal, self.kernel)
        if self.recompute and torch.is_grad_enabled():
            out_SBGRND = checkpoint(attend, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            out_SBGRND = attend(*inputs)
        out = out_SBGRND.permute(4, 0, 1, 2, 3, 5).flatten(3).flatten(1, 2).contiguous()
        return self.output(out)[0]


class MLP(nn.Module):
    """Two-layer perceptron; inner units are split over the tensor-parallel ranks."""

    def __init__(self, config: ModelConfig, parallel: TransformerConfig, kinds: Linears) -> None:
        super().__init__()
        self.gated = config.mlp == "swiglu"
        # Rows of a gated MLP are [unit, (gate, value)], so that a contiguous cut gives whole units.
        self.up = _column(kinds, config.hidden, config.ffn_width * (2 if self.gated else 1), parallel)
        self.down = _row(kinds, config.ffn_width, config.hidden, parallel)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.up(x)
        hidden = gate(hidden) if self.gated else F.gelu(hidden, approximate="tanh")
        return self.down(hidden)[0]


class Layer(nn.Module):
    """Pre-norm block from ``streams_in`` to ``streams_out`` streams; keys and values come from the first one.

    ``recompute``: compute attention again in the backward pass instead of keeping what it needs.
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
        self.mlp = MLP(config, parallel, kinds)
        self.mlp_streams = streams_out if config.target_mlp else 1

    def forward(
        self, h: Tensor, update: Tensor | None, query_rope: Rotary, key_rope: Rotary, visible_SBN: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The residual stream is h + ``update``, on entry and on return: what a block adds to it is summed where the
        next norm reads it.
        """
        batch = h.shape[1] // self.streams_in
        cut = () if self.streams_in == 1 else (batch, (self.streams_in - self.streams_out) * batch)
        h, queries, context = self.attention_norm(h, update, *cut)
        h, normed, _ = self.mlp_norm(h, self.attention(queries, context, query_rope, key_rope, visible_SBN))
        if self.mlp_streams == self.streams_out:
            return h, self.mlp(normed)
        of_context = self.mlp(normed[:, :batch].contiguous())
        return h, torch.cat([of_context, torch.zeros_like(h[:, batch:])], dim=1)


def _column(kinds: Linears, inputs: int, outputs: int, parallel: TransformerConfig) -> nn.Module:
    return _linear(kinds.column, 0, inputs, outputs, parallel, gather_output=False, skip_bias_add=False)


def _row(kinds: Linears, inputs: int, outputs: int, parallel: TransformerConfig) -> nn.Module:
    return _linear(kinds.row, 1, inputs, outputs, parallel, input_is_parallel=True, skip_bias_add=False)


def _linear(
    spec: ModuleSpec, dim: int, inputs: int, outputs: int, parallel: TransformerConfig, **options: bool
) -> nn.Module:
    linear = build_module(
        spec, inputs, outputs, config=parallel, init_method=_later, bias=False, is_expert=False, **options
    )
    return mark_partitioned(linear, dim)


def mark_partitioned(module: _M, dim: int) -> _M:
    """Mark the weight of a Megatron module as cut in ``dim``; Megatron itself does so only when it draws the weight."""
    if module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dim, stride=1)
    return module


def _later(weight: Tensor) -> Tensor:
    """Weights are drawn by ``parallel.sharding.initialise``, the same under every layout."""
    return weight
