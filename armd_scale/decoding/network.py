"""The standalone network: two streams of rows through the layers, with or without a cache. Needs torch alone.

- ``ARMDConfig``: shape of a model, the fields of ``config.json``;
- ``Network``: weights and passes;
- ``Cache``: the state that decoding carries from step to step.

X holds known tokens and sees its own block; G predicts and sees earlier blocks only (arXiv 2601.16971, section 3).
Objectives of one stream have G alone: its rows begin as the embedding of the token before (causal ones) or of the token
itself, which may be the mask (those that see everything).
Shapes: B sequences, R rows, d hidden, H query and G key heads, D head width, V vocabulary, M cache slots.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armd_scale.formulas import gate, gelu, normalise, position_table, rotary_tables, rotate, scale_prefix
from armd_scale.traits import DEFAULT, TRAITS, Traits

Mask: TypeAlias = Tensor | Literal["causal"] | None
"""Keys that a row sees: a boolean mask [B, R or 1, keys], "causal" (row n sees n + 1 keys), or None (all keys)."""

Store: TypeAlias = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Stores a layer's new keys and values [B, G, R, D] and returns the keys and values to attend to."""


ROWS = 1024
"""Rows of a text that pass through the network together where earlier rows are in a cache: what bounds the memory of a
long text."""


MODEL_TYPE = "armd"
"""Name of the architecture in ``config.json``, whatever the objective."""


class InputError(ValueError):
    """Input that the model cannot process; the message says what is wrong and what to do."""

    bad_input = True


@dataclasses.dataclass(frozen=True)
class ARMDConfig:
    """Shape of a model: the fields of ``config.json``."""

    vocab_size: int
    bos_id: int
    eos_id: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    length: int
    """Longest text in tokens, without BOS."""
    two_stream_layers: int
    norm: str
    """``layernorm`` or ``rmsnorm``, both with a scale and no bias."""
    mlp: str
    """``gelu`` (tanh form) or ``swiglu``."""
    tied_head: bool
    rope_base: float
    norm_eps: float
    prefix_kernel: str
    """``gaussian``, ``sinusoid`` or ``learned``."""
    prefix_width: float | list[float]
    """A list: one kernel for each width, and their sum."""
    prefix_dim: int
    prefix_scale: str
    """``none``, ``sqrt`` or ``mean``."""
    prefix_target_position: bool
    prefix_gate: bool = False
    """Whether the sum of each kernel has a factor for each channel."""
    prefix_neighbour: bool = False
    """Whether a seed holds the embedding of the token before the target, where it is visible."""
    prefix_place: str = "target"
    """``target`` or ``before``: position of a row of G in the rotary embedding."""
    target_mlp: bool = True
    """Whether G passes through the MLP of two-stream layers but the last."""
    objective: str = DEFAULT
    """One of ``TRAITS``. Objectives of one stream have no two-stream layers."""
    qk_norm: bool = False
    """RMSNorm of every head of queries and keys before the rotary embedding."""
    qkv_bias: bool = False
    """Biases of queries, keys and values."""
    head_dim: int = 0
    """Width of a head; 0: hidden / heads."""
    adapter_rank: int = 0
    """Rank of the additions to the linears of draft rows; 0: none."""
    rope: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Scaling of the rotary frequencies (``formulas.rotary_frequencies``); empty: none."""
    model_type: str = MODEL_TYPE

    @property
    def traits(self) -> Traits:
        """The traits of the objective."""
        return TRAITS[self.objective]

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden // self.heads

    def has_target_mlp(self, index: int) -> bool:
        """Whether G passes through the MLP of layer ``index``."""
        return self.target_mlp or index >= self.two_stream_layers - 1

    @property
    def prefix_widths(self) -> tuple[float, ...]:
        """Widths of the kernels."""
        return tuple(self.prefix_width) if isinstance(self.prefix_width, list) else (self.prefix_width,)


class Sight(NamedTuple):
    """Masks of one pass: rows of X over X, rows of G over X, rows of G over G."""

    x: Mask
    g: Mask
    top: Mask


EVERYTHING = Sight(None, None, None)
CAUSAL = Sight("causal", "causal", "causal")


class Cache:
    """Keys and values of every layer, and the state of prefix aggregation.

    Two-stream layers cache rows of X, the layers above them rows of G. Buffers are allocated at their final size. Rows
    are either appended, the same number for every sequence (``append``), or written to slots (``scatter``); an
    additional scratch slot takes padding rows.
    """

    def __init__(self, network: "Network", batch: int, slots: int) -> None:
        c, like = network.config, network.embedding.weight
        shape = (c.layers, 2, batch, c.kv_heads, slots + 1, c.head_size)
        self.slots = slots
        # Zeros, since a masked key is multiplied by a weight of zero, and NaN times zero is NaN.
        self.key_values = torch.zeros(shape, dtype=like.dtype, device=like.device)
        width = c.prefix_dim * len(c.prefix_widths) if c.traits.streams == 2 else 0
        self.prefix = torch.zeros(batch, width, c.hidden, dtype=network.precise, device=like.device)
        self.rows = torch.zeros(batch, 1, 1, dtype=network.precise, device=like.device)
        """Context rows in ``prefix``."""
        # The last column takes padding.
        self.tokens = torch.full((batch, c.length + 2), -1, device=like.device) if c.prefix_neighbour else None
        """With ``prefix_neighbour``: tokens of the context rows in ``prefix`` by their positions [B, length + 2]; -1:
        not there."""
        self._filled = [0] * c.layers
        self._two_stream = c.two_stream_layers

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """``Store``: append the rows to the layer's rows; attend to all of them."""
        start = self._filled[layer]
        stop = self._filled[layer] = start + keys.shape[2]
        buffer = self.key_values[layer]
        buffer[0, :, :, start:stop] = keys
        buffer[1, :, :, start:stop] = values
        return buffer[0, :, :, :stop], buffer[1, :, :, :stop]

    def scatter(self, slots_x: Tensor, slots_g: Tensor, lanes: Tensor | None = None) -> Store:
        """``Store``: write rows of X to ``slots_x`` [B, C] and rows of G to ``slots_g`` [B, T].

        Attends to every slot. With ``lanes`` [B], the sequences of the cache that a prompt fills, the slots are those
        of all rows of the prompt so far, of which the last ones are new, and it attends to them alone.
        """
        every = torch.arange(self.prefix.shape[0], device=slots_x.device) if lanes is None else lanes
        head = torch.arange(self.key_values.shape[3], device=slots_x.device)[None, :, None]

        def store(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            slots = slots_x if layer < self._two_stream else slots_g
            known, buffer = slots.shape[1] - keys.shape[2], self.key_values[layer]
            at = every[:, None, None], head, slots[:, None, known:]
            buffer[0].index_put_(at, keys.to(buffer.dtype))  # autocast computes them in another type
            buffer[1].index_put_(at, values.to(buffer.dtype))
            if lanes is None:
                return buffer[0, :, :, :-1], buffer[1, :, :, :-1]
            if not known:
                return keys, values
            at = every[:, None, None], head, slots[:, None]
            return buffer[0][at], buffer[1][at]

        return store

    def clear(self, lanes: Tensor) -> None:
        """Remove the context rows of sequences from the prefix."""
        self.prefix[lanes], self.rows[lanes] = 0, 0
        if self.tokens is not None:
            self.tokens[lanes] = -1

    def absorb(
        self, keys: Tensor, rows: Tensor, tokens: Tensor, at: Tensor, keep: Tensor | None, lanes: Tensor | None = None
    ) -> None:
        """Add context rows [B, C, d] of tokens at positions [B, C] to the prefix.

        ``keys``: their position embeddings [B, C, d_pe], zero where ``keep`` is False: padding.
        """
        if lanes is None:
            self.prefix.baddbmm_(keys.transpose(1, 2).expand(rows.shape[0], -1, -1), rows)
            self.rows += at.shape[1] if keep is None else keep.sum(1)[:, None, None]
        else:
            assert keep is not None
            self.prefix[lanes] += (keys.transpose(1, 2) @ rows).to(self.prefix.dtype)
            self.rows[lanes] += keep.sum(1)[:, None, None].to(self.rows.dtype)
        if self.tokens is not None:
            index = at if keep is None else at.where(keep, self.tokens.shape[1] - 1)
            if lanes is None:
                self.tokens.scatter_(1, index.expand(len(self.tokens), -1), tokens.expand(len(self.tokens), -1))
            else:
                self.tokens[lanes] = self.tokens[lanes].scatter(1, index, tokens)


class _Norm(nn.Module):
    """LayerNorm or RMSNorm, both with a scale and no bias."""

    def __init__(self, config: ARMDConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden))
        self.eps, self.centred = config.norm_eps, config.norm == "layernorm"

    def forward(self, rows: Tensor) -> Tensor:
        return normalise(rows, self.weight, self.eps, self.centred)


class _LowRank(nn.Module):
    """b a x, what draft rows add to a linear."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, inputs))
        self.b = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, rows: Tensor) -> Tensor:
        return F.linear(F.linear(rows, self.a), self.b)


class _Attention(nn.Module):
    """Weights of an attention; the names are those of the training model."""

    def __init__(self, config: ARMDConfig) -> None:
        super().__init__()
        width = config.head_size
        self.query = nn.Linear(config.hidden, config.heads * width, bias=config.qkv_bias)
        self.key_value = nn.Linear(config.hidden, config.kv_heads * 2 * width, bias=config.qkv_bias)
        self.output = nn.Linear(config.heads * width, config.hidden, bias=False)
        if config.adapter_rank:
            self.query_adapter = _LowRank(config.hidden, config.heads * width, config.adapter_rank)
            self.output_adapter = _LowRank(config.heads * width, config.hidden, config.adapter_rank)
        self.query_norm = nn.Parameter(torch.ones(width)) if config.qk_norm else None
        self.key_norm = nn.Parameter(torch.ones(width)) if config.qk_norm else None


class _Layer(nn.Module):
    """Weights of a layer; the names are those of the training model."""

    def __init__(self, config: ARMDConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = _Norm(config)
        self.attention = _Attention(config)
        self.mlp_norm = _Norm(config)
        inner = config.ffn * (2 if config.mlp == "swiglu" else 1)
        up, down = nn.Linear(config.hidden, inner, bias=False), nn.Linear(config.ffn, config.hidden, bias=False)
        self.mlp = nn.ModuleDict({"up": up, "down": down})
        if config.adapter_rank and config.has_target_mlp(index):
            self.mlp["up_adapter"] = _LowRank(config.hidden, inner, config.adapter_rank)
            self.mlp["down_adapter"] = _LowRank(config.ffn, config.hidden, config.adapter_rank)


class Network(nn.Module):
    """Weights of a model and passes over them."""

    def __init__(self, config: ARMDConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size + config.traits.mask, config.hidden)
        self.layers = nn.ModuleList([_Layer(config, index) for index in range(config.layers)])
        self.norm = _Norm(config)
        if not config.tied_head:
            self.head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        prefix, aggregates = {}, config.traits.streams == 2
        if aggregates and config.prefix_kernel == "learned":
            prefix["table"] = nn.Parameter(torch.randn(config.length + 1, config.prefix_dim))
        if aggregates and config.prefix_gate:
            prefix["gate"] = nn.Parameter(torch.ones(len(config.prefix_widths), config.hidden))
        if aggregates and config.adapter_rank:
            prefix["draft_seed"] = nn.Parameter(torch.zeros(config.hidden))
            if config.prefix_gate:
                prefix["draft_gate"] = nn.Parameter(torch.zeros(len(config.prefix_widths), config.hidden))
        if aggregates and config.prefix_target_position:
            prefix["target_projection"] = nn.Parameter(torch.randn(config.hidden, config.prefix_dim))
        self.prefix = nn.ParameterDict(prefix)
        self._tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def precise(self) -> torch.dtype:
        """Type of sums and probabilities: float32, or float64 for a float64 model."""
        return torch.promote_types(self.embedding.weight.dtype, torch.float32)

    def initialise(self, module: nn.Module, std: float) -> None:
        """Draw new weights of a module of this network, without those of its children, as training does.

        ``std``: standard deviation of the projections (``model.init_std``).
        """
        if isinstance(module, _LowRank):
            nn.init.normal_(module.a, std=module.a.shape[1] ** -0.5)
            nn.init.zeros_(module.b)
        elif isinstance(module, nn.Linear | nn.Embedding):
            residual = any(module in (layer.attention.output, layer.mlp["down"]) for layer in self.layers)
            nn.init.normal_(module.weight, std=std / math.sqrt(2 * self.config.layers) if residual else std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, _Norm):
            nn.init.ones_(module.weight)
        elif isinstance(module, _Attention):
            for scale in (module.query_norm, module.key_norm):
                if scale is not None:
                    nn.init.ones_(scale)
        elif isinstance(module, nn.ParameterDict):
            for name, parameter in module.items():
                nn.init.normal_(
                    parameter, std={"table": self.config.prefix_dim**-0.5, "draft_gate": 0.0}.get(name, std)
                )

    # Passes ----------------------------------------------------------------------------------------------------

    def whole(self, tokens: Tensor, at: Tensor, blocks: Tensor, ahead: Tensor | None = None) -> Tensor:
        """One pass over texts in generation order -> activations of all targets [B, N, d].

        ``tokens``, ``at``, ``blocks`` [B, N]: token, position (from 1) and block (from 1) of every row. ``ahead``
        [B, N]: positions that draft rows predict, each with the knowledge of the target row of its column; their
        activations follow those of the targets. Needs two streams and one token a block.
        """
        one_by_one = bool((blocks[:, 1:] > blocks[:, :-1]).all())
        if at.shape[1] > ROWS and one_by_one and ahead is None and not torch.is_grad_enabled():
            keep, cache = torch.ones_like(at, dtype=torch.bool), Cache(self, *at.shape)
            return torch.cat(list(self._parts(tokens, at, keep, cache, None)), dim=1)
        first = torch.zeros_like(at[:, :1])
        x = self._embed(torch.cat([first + self.config.bos_id, tokens[:, :-1]], dim=1))
        at_x, block_x = (torch.cat([first, rows[:, :-1]], dim=1) for rows in (at, blocks))
        if self.config.traits.streams == 1:
            return self._run(x[:, :0], x, at_x[:, :0], at_x, CAUSAL, None)
        keyed: int | None = None
        if one_by_one:
            sight = CAUSAL
            strict = torch.ones(at.shape[1], at.shape[1], dtype=torch.bool, device=self.device).tril()
        else:
            strict = block_x[:, None, :] < blocks[:, :, None]
            sight = Sight(block_x[:, None, :] <= block_x[:, :, None], strict, blocks[:, None, :] <= blocks[:, :, None])
        if ahead is not None:
            assert sight is CAUSAL
            at, keyed = torch.cat([at, ahead], dim=1), at.shape[1]
            once, strict = strict[None], strict.repeat(2, 1)
            sight = Sight(once, strict[None], strict[None])
        table, precise = self._positions(), x.to(self.precise)
        query, key = table[at], table[at_x]
        drafts = 0 if ahead is None else ahead.shape[1]
        seed = self._sums(lambda part: ((query[..., part] @ key[..., part].transpose(1, 2)) * strict) @ precise, drafts)
        g = self._finish_seed(seed, query, strict.sum(-1, keepdim=True), self._neighbours(x, at_x, at, strict), drafts)
        return self._run(x, g, at_x, at, sight, None, keyed)

    def denoise(self, tokens: Tensor, there: Tensor | None = None) -> Tensor:
        """One pass over partly masked texts (the mask is token V) -> activations of every position [B, N, d].

        ``there`` [B, N]: True for the positions of a text, if texts differ in length.
        """
        at = torch.arange(1, tokens.shape[1] + 1, device=tokens.device).expand_as(tokens)
        g = self._embed(tokens)
        sight = EVERYTHING if there is None else Sight(None, None, there[:, None])
        return self._run(g[:, :0], g, at[:, :0], at, sight, None)

    def prefill(self, tokens: Tensor, at: Tensor, keep: Tensor, cache: Cache, lanes: Tensor | None) -> None:
        """Write known tokens to a cache, one token a block in the order of the columns.

        ``tokens``, ``at`` [B, R]: token and position of every row, without BOS; ``keep`` [B, R]: False for padding
        behind a shorter sequence. X takes BOS and all rows but the last of each sequence, which the first step feeds;
        G takes all rows. ``lanes`` [B]: sequences of the cache, cleared, whose slots are positions; None: append the
        rows (``keep`` is then True everywhere). ``ROWS`` rows are in memory at a time.
        """
        for _ in self._parts(tokens, at, keep, cache, lanes):
            pass

    def _parts(self, tokens: Tensor, at: Tensor, keep: Tensor, cache: Cache, lanes: Tensor | None) -> Iterator[Tensor]:
        """``prefill``, yielding the activations [B, ROWS, d] of the targets of ``ROWS`` columns after the others."""
        first = torch.zeros_like(at[:, :1])
        at_x = torch.cat([first, at[:, :-1]], dim=1)
        given = torch.cat([first + self.config.bos_id, tokens[:, :-1]], dim=1)
        slots_x, slots_g = (places.where(keep, cache.slots) for places in (at_x, at))
        for start in range(0, at.shape[1], ROWS):
            here = slice(start, start + ROWS)
            store: Store = cache.append
            if lanes is not None:
                store = cache.scatter(slots_x[:, : here.stop], slots_g[:, : here.stop], lanes)
            rows = given[:, here], at_x[:, here], at[:, here], keep[:, here]
            yield self._prefill(start, *rows, cache, lanes, store)

    def _prefill(
        self, start: int, given: Tensor, at_x: Tensor, at: Tensor, keep: Tensor, cache: Cache, lanes: Tensor | None,
        store: Store,
    ) -> Tensor:  # fmt: skip
        """``prefill`` of columns from ``start`` on; those before are in the cache."""
        x, count = self._embed(given), at.shape[1]
        sight = CAUSAL
        if start:
            row = torch.arange(start, start + count, device=self.device)
            seen = (torch.arange(start + count, device=self.device) <= row[:, None])[None]
            sight = Sight(seen, seen, seen) if self.config.traits.streams == 2 else Sight(None, None, seen)
        if self.config.traits.streams == 1:
            return self._run(x[:, :0], x, at_x[:, :0], at_x, sight, store)
        table = self._positions()
        query, key = table[at], table[at_x] * keep[..., None]
        precise = x.to(self.precise)
        before = cache.prefix if lanes is None else cache.prefix[lanes]

        def sum_of(part: slice) -> Tensor:
            near = (query[..., part] @ key[..., part].transpose(1, 2)).tril() @ precise
            return near + query[..., part] @ before[:, part] if start else near

        rows = torch.arange(count, device=self.device)
        near = self._neighbours(x, at_x, at, rows <= rows[:, None])
        if start and near is not None:
            near = near + self._nearest(cache, at, lanes)
        g = self._finish_seed(self._sums(sum_of), query, start + rows[:, None] + 1, near)
        cache.absorb(key, precise, given, at_x, keep, lanes)
        return self._run(x, g, at_x, at, sight, store)

    def _nearest(self, cache: Cache, targets: Tensor, lanes: Tensor | None = None) -> Tensor:
        """Embeddings of the tokens before ``targets`` [B, T], 0 where they are not among the cache's context rows."""
        assert cache.tokens is not None
        tokens = cache.tokens if lanes is None else cache.tokens[lanes]
        token = tokens.gather(1, (targets - 1).clamp(min=0).expand(len(tokens), -1))
        return self._embed(token.clamp(min=0)) * (token >= 0)[..., None]

    def step(
        self,
        tokens: Tensor,
        at: Tensor,
        targets: Tensor,
        cache: Cache,
        keep: Tensor | None = None,
        sight: Sight = EVERYTHING,
        before: Tensor | None = None,
        keyed: int | None = None,
    ) -> Tensor:
        """Feed tokens [B, C] at positions ``at`` and predict ``targets`` [B, T] -> activations [B, T, d].

        ``keep`` None: append the rows, which see everything. Otherwise ``keep`` [B, C] is False for padding context
        rows, a target of 0 is padding, and ``sight`` masks slots, which are positions. ``keyed``: the number of targets
        that other rows see; those behind them are drafts.
        ``before`` [B, T, C]: context rows that a target sees, if not all; the context rows then do not join the prefix
        (``absorb`` adds those that stay).
        """
        x = self._embed(tokens)
        store: Store = cache.append
        if keep is not None:
            seen = targets[:, :keyed]
            store = cache.scatter(at.where(keep, cache.slots), seen.where(seen > 0, cache.slots))
        if self.config.traits.streams == 1:
            return self._run(x[:, :0], x, at[:, :0], at, sight, store)
        table = self._positions()
        key, query = table[at], table[targets]
        precise = x.to(self.precise)
        if keep is not None:
            key = key * keep[..., None]
        drafts = 0 if keyed is None else targets.shape[1] - keyed
        if before is None:
            cache.absorb(key, precise, tokens, at, keep)
            seed, size = self._sums(lambda part: query[..., part] @ cache.prefix[:, part]), cache.rows
        else:
            seed = self._sums(
                lambda part: (
                    query[..., part] @ cache.prefix[:, part]
                    + ((query[..., part] @ key[..., part].transpose(1, 2)) * before) @ precise
                ),
                drafts,
            )
            size = cache.rows + before.sum(-1, keepdim=True)
        near: Tensor | None = None
        if cache.tokens is not None:
            near = self._nearest(cache, targets)
            fed = None if before is None else self._neighbours(x, at, targets, before)
            near = near if fed is None else near + fed
        g = self._finish_seed(seed, query, size, near, drafts)
        return self._run(x, g, at, targets, sight, store, keyed)

    def absorb(self, tokens: Tensor, at: Tensor, keep: Tensor, cache: Cache) -> None:
        """Add context rows of a step with ``before`` to the prefix."""
        rows = self._embed(tokens).to(self.precise)
        cache.absorb(self._positions()[at] * keep[..., None], rows, tokens, at, keep)

    def predict(self, hidden: Tensor) -> Tensor:
        """Logits of activations [..., d]."""
        normed = self.norm(hidden)
        if not self.config.tied_head:
            return _project(normed, self.head)
        return _linear(normed, self.embedding.weight[: self.config.vocab_size])

    # Layers ----------------------------------------------------------------------------------------------------

    def _run(
        self,
        x: Tensor,
        g: Tensor,
        at_x: Tensor,
        at_g: Tensor,
        sight: Sight,
        store: Store | None,
        keyed: int | None = None,
    ) -> Tensor:
        """Run all layers on rows of X and G [B, R, d] at positions [B, R] -> rows of G before the final norm.

        ``keyed``: the number of rows of G that rows of G see; None: all.
        """
        context, drafts = x.shape[1], 0 if keyed is None else g.shape[1] - keyed
        if self.config.prefix_place == "before" and self.config.traits.streams == 2:
            at_g = (at_g - 1).clamp(min=0)  # 0 is padding
        rotary = self._rotary()
        rope_x, rope_g = rotary[at_x][:, None], rotary[at_g][:, None]
        both = torch.cat([rope_x, rope_g], dim=2)
        h = torch.cat([x, g], dim=1)
        together = _together(sight, x.shape[1], g.shape[1])
        for index, layer in enumerate(self.layers):
            normed = layer.attention_norm(h)
            if index >= self.config.two_stream_layers:
                keys = self._keys(index, normed[:, :keyed], rope_g[:, :, :keyed], store)
                attended = self._attend(layer, normed, rope_g, keys, sight.top, drafts)
            else:
                keys = self._keys(index, normed[:, :context], rope_x, store)
                if index == self.config.two_stream_layers - 1:  # no later layer reads X
                    h, normed = h[:, context:], normed[:, context:]
                    attended = self._attend(layer, normed, rope_g, keys, sight.g, drafts)
                elif together != "causal":
                    attended = self._attend(layer, normed, both, keys, together, drafts)
                else:
                    attended = torch.cat(
                        [
                            self._attend(layer, normed[:, :context], rope_x, keys, sight.x),
                            self._attend(layer, normed[:, context:], rope_g, keys, sight.g),
                        ],
                        dim=1,
                    )
            h = h + attended
            if self.config.has_target_mlp(index):
                h = h + self._mlp(layer, layer.mlp_norm(h), drafts)
            else:
                x = h[:, :context]
                h = torch.cat([x + self._mlp(layer, layer.mlp_norm(x)), h[:, context:]], dim=1)
        return h

    def _keys(self, index: int, rows: Tensor, rope: Tensor, store: Store | None) -> tuple[Tensor, Tensor]:
        joint = _project(rows, self.layers[index].attention.key_value)
        keys, values = joint.unflatten(-1, (self.config.kv_heads, 2, -1)).transpose(1, 2).unbind(3)
        keys = self._rotate(keys, rope, self.layers[index].attention.key_norm)
        return store(index, keys, values) if store else (keys, values)

    def _attend(
        self,
        layer: nn.Module,
        rows: Tensor,
        rope: Tensor,
        keys_values: tuple[Tensor, Tensor],
        mask: Mask,
        drafts: int = 0,
    ) -> Tensor:
        """``drafts``: number of draft rows, the last ones."""
        c = self.config
        query = self._adapted(_project(rows, layer.attention.query), rows, layer.attention, "query_adapter", drafts)
        query = query.unflatten(-1, (c.heads, -1)).transpose(1, 2)
        query = self._rotate(query, rope, layer.attention.query_norm)
        keys, values = keys_values
        if isinstance(mask, str):
            out = F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=c.heads != c.kv_heads)
        else:
            # Heads of a group become rows of one head: the fast kernels do not combine masks with grouped heads.
            group, count = c.heads // c.kv_heads, rows.shape[1]
            folded = query.reshape(query.shape[0], c.kv_heads, group * count, -1)
            if mask is not None:
                mask = (mask if mask.shape[1] == 1 else mask.repeat(1, group, 1))[:, None]
            out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask).reshape(query.shape)
        out = out.transpose(1, 2).flatten(2)
        return self._adapted(_project(out, layer.attention.output), out, layer.attention, "output_adapter", drafts)

    def _mlp(self, layer: nn.Module, rows: Tensor, drafts: int = 0) -> Tensor:
        hidden = self._adapted(_project(rows, layer.mlp["up"]), rows, layer.mlp, "up_adapter", drafts)
        hidden = gate(hidden) if self.config.mlp == "swiglu" else gelu(hidden)
        return self._adapted(_project(hidden, layer.mlp["down"]), hidden, layer.mlp, "down_adapter", drafts)

    def _adapted(self, out: Tensor, rows: Tensor, module: nn.Module, name: str, drafts: int) -> Tensor:
        """``out`` of a linear for ``rows`` [B, R, d], with the adapter's addition to the last ``drafts`` rows."""
        if not drafts or not self.config.adapter_rank:
            return out
        more = module.get_submodule(name)(rows[:, -drafts:])
        return torch.cat([out[:, :-drafts], out[:, -drafts:] + more], dim=1)

    def _rotate(self, heads: Tensor, rope: Tensor, scale: Tensor | None) -> Tensor:
        """Rotary embedding of heads [B, H, R, D] by tables [B, 1, R, 2, D / 2], after their norm if there is one."""
        if scale is not None:
            heads = normalise(heads, scale, self.config.norm_eps, False)
        return rotate(heads, *rope.unbind(-2))

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens)

    def _sums(self, sum_of: Callable[[slice], Tensor], drafts: int = 0) -> Tensor:
        """The sum over the kernels of ``sum_of`` their part of the position embeddings, times the gate.

        ``drafts``: number of draft rows, the last ones.
        """
        width, total = self.config.prefix_dim, None
        for kernel in range(len(self.config.prefix_widths)):
            seed = sum_of(slice(kernel * width, (kernel + 1) * width))
            if self.config.prefix_gate:
                gates = self.prefix["gate"][kernel].to(seed.dtype)
                if drafts and self.config.adapter_rank:
                    own = (gates + self.prefix["draft_gate"][kernel].to(seed.dtype)).expand(drafts, -1)
                    gates = torch.cat([gates.expand(seed.shape[1] - drafts, -1), own])
                seed = seed * gates
            total = seed if total is None else total + seed
        assert total is not None
        return total

    def _neighbours(self, x: Tensor, at: Tensor, targets: Tensor, seen: Tensor) -> Tensor | None:
        """Rows ``x`` [B, C, d] at the positions before ``targets`` [B, T], 0 where ``seen`` [T, C] or [B, T, C] is
        False; None without ``prefix_neighbour``.
        """
        if not self.config.prefix_neighbour:
            return None
        match = (at[:, None] == targets[..., None] - 1) & seen
        found, row = match.max(-1)
        return x.gather(1, row[..., None].expand(len(x), -1, x.shape[-1])) * found[..., None]

    def _finish_seed(self, seed: Tensor, query: Tensor, size: Tensor, near: Tensor | None, drafts: int = 0) -> Tensor:
        """Scale the prefix sum of targets that see ``size`` rows; add what is configured: the projected position of the
        target, the row ``near`` it, and the seed of the last ``drafts`` rows.
        """
        seed = scale_prefix(seed, size.clamp(min=1), self.config.prefix_scale)
        if self.config.prefix_target_position:
            seed = seed + query @ self.prefix["target_projection"].to(seed.dtype).t()
        if near is not None:
            seed = seed + near
        if drafts and self.config.adapter_rank:
            own = seed[:, -drafts:] + self.prefix["draft_seed"].to(seed.dtype)
            seed = torch.cat([seed[:, :-drafts], own], dim=1)
        return seed.to(self.embedding.weight.dtype)

    # Tables ----------------------------------------------------------------------------------------------------

    def _positions(self) -> Tensor:
        """Position embeddings of prefix aggregation [length + 1, d_pe], those of several kernels side by side."""
        c = self.config
        if c.prefix_kernel == "learned":
            return self.prefix["table"].to(self.precise)

        # float32 first: training rounds the table so, and a float64 model must be the same function
        tables = (position_table(c.length + 1, c.prefix_kernel, c.prefix_dim, width) for width in c.prefix_widths)
        return self._table("positions", lambda: torch.cat([table.float() for table in tables], dim=1))

    def _rotary(self) -> Tensor:
        """Cosines and sines [length + 1, 2, D / 2]."""
        c = self.config
        return self._table(
            "rotary",
            lambda: torch.stack(rotary_tables(torch.arange(c.length + 1), c.head_size, c.rope_base, c.rope), dim=1),
        )

    def _table(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        key = (name, self.device, self.precise)
        if key not in self._tables:
            with torch.device("cpu"):
                self._tables[key] = make().to(self.device, self.precise)
        return self._tables[key]


def _together(sight: Sight, context: int, targets: int) -> Mask:
    """The mask of rows of X and G in one call; "causal" if X and G need separate calls."""
    if not isinstance(sight.x, Tensor) or not isinstance(sight.g, Tensor):
        return sight.x
    if sight.x is sight.g and sight.x.shape[1] == 1:
        return sight.x
    return torch.cat([sight.x.expand(-1, context, -1), sight.g.expand(-1, targets, -1)], dim=1)


def _project(rows: Tensor, linear: nn.Module) -> Tensor:
    """``linear`` of ``rows`` [..., d]: by ``_linear`` if it is few rows on a CPU and nothing changes the module.

    LoRA and quantisers replace the module or its weight, others add hooks or replace ``forward``.
    """
    plain = type(linear) is nn.Linear and type(linear.weight) in (nn.Parameter, Tensor)
    if plain and _is_slow(rows, linear.weight):
        own = vars(linear)
        if not ("forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]):
            out = _linear(rows, linear.weight)
            return out if linear.bias is None else out + linear.bias
    return linear(rows)


def _is_slow(rows: Tensor, weight: Tensor) -> bool:
    """Whether the usual kernels read ``weight`` slowly: one or two rows on a CPU, in inference; on up to two threads
    also a few rows of a tall weight, such as the head.
    """
    if rows.device.type != "cpu" or torch.is_grad_enabled():
        return False
    few = 8 if len(weight) >= 2048 and torch.get_num_threads() <= 2 else 2
    return rows.numel() <= few * rows.shape[-1]


def _linear(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows`` [..., d] times the transpose of ``weight``.

    On a CPU, products of few rows are limited by reading the weights, which the usual kernels of that size do slowly:
    one row is computed as two, and on up to two threads the product is transposed (docs/results/cpu.md has the
    figures).
    """
    if not _is_slow(rows, weight):
        return F.linear(rows, weight)
    count = rows.numel() // rows.shape[-1]
    some = rows.reshape(count, -1).expand(max(count, 2), -1).contiguous()
    out = (weight @ some.t()).t() if torch.get_num_threads() <= 2 else F.linear(some, weight)
    return out[:count].reshape(*rows.shape[:-1], -1)
