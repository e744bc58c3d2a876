"""The standalone ARMD model: likelihoods in any order, and strided parallel decoding. Needs torch and safetensors.

- ``load``: a model folder (``config.json``, ``model.safetensors``) -> ``ARMD``;
- ``ARMD.nll``, ``ARMD.logits``: one pass over whole texts, any generation order and blocks;
- ``ARMD.generate``, ``ARMD.decode``: sampling with caches, S tokens a step.

An export folder carries this file as it is, so it imports nothing of the project. Two streams run through the
layers (arXiv 2601.16971, section 3): X holds known tokens and sees its own block; G predicts and sees earlier blocks
only. Shapes: B sequences, R rows, d hidden, H query and G key heads, D head width, V vocabulary.
"""

import dataclasses
import hashlib
import json
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LOGIT_ROWS = 2048  # rows whose logits are held at a time

Mask: TypeAlias = Tensor | Literal["causal"] | None
"""Which keys a row sees: a boolean [B, R, M], as many as its own index + 1, or (None) all of them."""


class InputError(ValueError):
    """Input that the model cannot take; the text says what is wrong and what to do."""

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
    prefix_width: float
    prefix_dim: int
    prefix_scale: str
    """``none``, ``sqrt`` or ``mean``."""
    prefix_target_position: bool
    model_type: str = "armd"


class Step(NamedTuple):
    """One parallel decoding step: the text positions (from 1) that it filled and their tokens [B, len(positions)]."""

    positions: list[int]
    tokens: Tensor


class _Layer(nn.Module):
    """Weights of a layer; the names are those of the training model."""

    def __init__(self, config: ARMDConfig) -> None:
        super().__init__()
        width = config.hidden // config.heads
        self.attention_norm = _weight(config.hidden)
        self.attention = nn.ModuleDict(
            {
                "query": _weight(config.heads * width, config.hidden),
                "key_value": _weight(config.kv_heads * 2 * width, config.hidden),
                "output": _weight(config.hidden, config.heads * width),
            }
        )
        self.mlp_norm = _weight(config.hidden)
        inner = config.ffn * (2 if config.mlp == "swiglu" else 1)
        self.mlp = nn.ModuleDict({"up": _weight(inner, config.hidden), "down": _weight(config.hidden, config.ffn)})


class _Cache:
    """What decoding carries: keys and values of every layer, and the state of prefix aggregation.

    Layers with two streams cache X, the layers above them G. Buffers have their final size from the start.
    """

    def __init__(self, model: "ARMD", batch: int, rows: int) -> None:
        c = model.config
        shape = (c.layers, 2, batch, c.kv_heads, rows, c.hidden // c.heads)
        like = model.embedding.weight
        self.key_values = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.filled = [0] * c.layers
        self.prefix = torch.zeros(batch, c.prefix_dim, c.hidden, dtype=model.precise, device=like.device)
        self.context_rows = 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, G, R, D]; returns all of this layer so far."""
        start = self.filled[layer]
        stop = start + keys.shape[2]
        buffer = self.key_values[layer]
        buffer[0, :, :, start:stop] = keys
        buffer[1, :, :, start:stop] = values
        self.filled[layer] = stop
        return buffer[0, :, :, :stop], buffer[1, :, :, :stop]


class ARMD(nn.Module):
    """Auto-regressive masked diffusion language model."""

    def __init__(self, config: ARMDConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = _weight(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList([_Layer(config) for _ in range(config.layers)])
        self.norm = _weight(config.hidden)
        if not config.tied_head:
            self.head = _weight(config.vocab_size, config.hidden)
        prefix = {}
        if config.prefix_kernel == "learned":
            prefix["table"] = nn.Parameter(torch.empty(config.length + 1, config.prefix_dim))
        if config.prefix_target_position:
            prefix["target_projection"] = nn.Parameter(torch.empty(config.hidden, config.prefix_dim))
        self.prefix = nn.ParameterDict(prefix)
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def precise(self) -> torch.dtype:
        """Type of sums and probabilities: float32, or float64 for a float64 model."""
        return torch.promote_types(self.embedding.weight.dtype, torch.float32)

    # Likelihood ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def nll(self, tokens: Tensor, order: Tensor | None = None, block_ids: Tensor | None = None) -> Tensor:
        """-log p of every token given the tokens of earlier blocks, in nats, at original positions: [B, N].

        ``tokens`` [B, N]: text order, no BOS, N up to ``config.length``. ``order`` [B, N] or [N]: a permutation
        of 1..N, the position generated n-th (default: left to right). ``block_ids`` [B, N] or [N]: B(n) >= 1
        along the order, never decreasing (default: one token a block). Raises ``InputError``.
        """
        tokens, order, blocks = self._layout(tokens, order, block_ids)
        hidden = self._one_pass(tokens, order, blocks)
        targets = tokens.gather(1, order - 1)
        parts = [
            -self._log_probabilities(rows).gather(-1, wanted[:, None])[:, 0]
            for rows, wanted in zip(
                hidden.flatten(0, 1).split(_LOGIT_ROWS), targets.flatten().split(_LOGIT_ROWS), strict=True
            )
        ]
        along_order = torch.cat(parts).view(targets.shape)
        return torch.zeros_like(along_order).scatter(1, order - 1, along_order)

    @torch.no_grad()
    def logits(self, tokens: Tensor, order: Tensor | None = None, block_ids: Tensor | None = None) -> Tensor:
        """Logits that predict every token, at original positions: [B, N, V]; arguments as for ``nll``."""
        tokens, order, blocks = self._layout(tokens, order, block_ids)
        along_order = self._logits(self._one_pass(tokens, order, blocks))
        return torch.zeros_like(along_order).scatter(1, (order - 1)[..., None].expand_as(along_order), along_order)

    # Decoding --------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt_tokens: Tensor | Sequence[int] | None = None,
        length: int | None = None,
        streams: int = 1,
        temperature: float = 1.0,
        seed: int | Sequence[int] = 0,
        batch: int = 1,
    ) -> Tensor:
        """Sample texts of ``length`` tokens, prompt included: [B, length].

        The positions after the prompt are split into ``streams`` contiguous streams that are written side by side:
        S + ceil(n / S) - 1 steps for n new tokens. ``prompt_tokens``: [B, P] or [P]; without one, ``batch`` texts
        from nothing. ``temperature`` 0 takes the likeliest token. ``seed``: one for the batch, or one per
        sequence; a sequence depends on its own seed and prompt alone, and row 0 of a batch with one seed is the
        sequence of that seed.
        """
        prompt, length = self._prompt(prompt_tokens, length, batch)
        text = torch.zeros(prompt.shape[0], length, dtype=torch.long, device=self.device)
        text[:, : prompt.shape[1]] = prompt
        for step in self.decode(prompt, length, streams, temperature, seed):
            text[:, [position - 1 for position in step.positions]] = step.tokens
        return text

    @torch.no_grad()
    def decode(
        self,
        prompt_tokens: Tensor | Sequence[int] | None = None,
        length: int | None = None,
        streams: int = 1,
        temperature: float = 1.0,
        seed: int | Sequence[int] = 0,
        batch: int = 1,
    ) -> Iterator[Step]:
        """The steps of ``generate`` as they are made."""
        prompt, length = self._prompt(prompt_tokens, length, batch)
        if streams < 1:
            raise InputError(f"streams must be at least 1, not {streams}")
        if not temperature >= 0:
            raise InputError(f"temperature must be 0 or more, not {temperature}")
        count, given = prompt.shape
        if given == length:
            return
        uniform = self._uniform(seed, count, length)
        # The last block is never context, so it needs no row.
        cache = _Cache(self, count, length)
        bos = torch.full((count, 1), self.config.bos_id, device=self.device)
        context, at = torch.cat([bos, prompt], dim=1), list(range(given + 1))
        if given:
            self._advance(context[:, :-1], at[:-1], at[1:], cache, "causal")
            context, at = context[:, -1:], at[-1:]
        for positions in strided_blocks(given, length, streams):
            hidden = self._advance(context, at, positions, cache, None)
            chosen = _sample(self._logits(hidden), uniform[:, [p - 1 for p in positions]], temperature)
            yield Step(positions, chosen)
            context, at = chosen, positions

    # The network -----------------------------------------------------------------------------------------------

    def _one_pass(self, tokens: Tensor, order: Tensor, blocks: Tensor) -> Tensor:
        """Final activations of all targets along the order, [B, N, d]."""
        first = torch.zeros_like(order[:, :1])
        known = tokens.gather(1, order - 1)[:, :-1]
        x = self._embed(torch.cat([first + self.config.bos_id, known], dim=1))
        at_x, at_g = torch.cat([first, order[:, :-1]], dim=1), order
        block_x, block_g = torch.cat([first, blocks[:, :-1]], dim=1), blocks
        if bool((blocks[:, 1:] > blocks[:, :-1]).all()):
            masks: tuple[Mask, Mask, Mask] = ("causal", "causal", "causal")
            strict = torch.ones(order.shape[1], order.shape[1], dtype=torch.bool, device=self.device).tril()
        else:
            strict = block_x[:, None, :] < block_g[:, :, None]
            masks = (
                block_x[:, None, :] <= block_x[:, :, None],
                strict,
                block_g[:, None, :] <= block_g[:, :, None],
            )
        table = self._table()
        query, key = table[at_g], table[at_x]
        seed = ((query @ key.transpose(1, 2)) * strict) @ x.to(self.precise)
        g = self._finish_seed(seed, query, strict.sum(-1, keepdim=True))
        return self._run(x, g, self._rotary(at_x), self._rotary(at_g), masks, None)

    def _advance(
        self, context: Tensor, at: list[int], targets: list[int], cache: _Cache, mask: Literal["causal"] | None
    ) -> Tensor:
        """Feed context tokens [B, R] at positions ``at`` and predict ``targets`` -> activations [B, len(targets), d].

        ``mask`` None: the context rows are one block and the targets the next, so all rows see all keys;
        "causal": one token a block, row n of either stream sees n + 1 keys.
        """
        x = self._embed(context)
        table = self._table()
        key, query = table[at], table[targets]
        precise = x.to(self.precise)
        if mask == "causal":
            seed = (query @ key.t()).tril() @ precise
            size = torch.arange(1, len(targets) + 1, device=self.device)[:, None]
            cache.prefix += key.t() @ precise
        else:
            cache.prefix += key.t() @ precise
            seed = query @ cache.prefix
            size = torch.tensor(cache.context_rows + len(at), device=self.device)
        cache.context_rows += len(at)
        g = self._finish_seed(seed, query, size)
        rope_x, rope_g = (self._rotary(torch.tensor([p], device=self.device)) for p in (at, targets))
        return self._run(x, g, rope_x, rope_g, (mask, mask, mask), cache)

    def _run(
        self,
        x: Tensor,
        g: Tensor,
        rope_x: tuple[Tensor, Tensor],
        rope_g: tuple[Tensor, Tensor],
        masks: tuple[Mask, Mask, Mask],
        cache: _Cache | None,
    ) -> Tensor:
        """All layers: rows of X and G [B, R, d] -> rows of G before the final norm.

        ``masks``: X over X, G over X, G over G.
        """
        context = x.shape[1]
        h = torch.cat([x, g], dim=1)
        both = tuple(torch.cat(pair, dim=2) for pair in zip(rope_x, rope_g, strict=True))
        for index, layer in enumerate(self.layers):
            normed = self._norm(h, layer.attention_norm)
            if index >= self.config.two_stream_layers:
                keys = self._keys(index, normed, rope_g, cache)
                attended = self._attend(layer, normed, rope_g, keys, masks[2])
            else:
                keys = self._keys(index, normed[:, :context], rope_x, cache)
                if index == self.config.two_stream_layers - 1:  # X has no reader above
                    h, normed = h[:, context:], normed[:, context:]
                    attended = self._attend(layer, normed, rope_g, keys, masks[1])
                elif masks[0] is None and masks[1] is None:
                    attended = self._attend(layer, normed, both, keys, None)
                else:
                    attended = torch.cat(
                        [
                            self._attend(layer, normed[:, :context], rope_x, keys, masks[0]),
                            self._attend(layer, normed[:, context:], rope_g, keys, masks[1]),
                        ],
                        dim=1,
                    )
            h = h + attended
            h = h + self._mlp(layer, self._norm(h, layer.mlp_norm))
        return h

    def _keys(
        self, index: int, rows: Tensor, rope: tuple[Tensor, Tensor], cache: _Cache | None
    ) -> tuple[Tensor, Tensor]:
        c = self.config
        joint = F.linear(rows, self.layers[index].attention["key_value"].weight)
        keys, values = joint.unflatten(-1, (c.kv_heads, 2, -1)).transpose(1, 2).unbind(3)
        keys = _rotate(keys, rope)
        return cache.extend(index, keys, values) if cache else (keys, values)

    def _attend(
        self,
        layer: nn.Module,
        rows: Tensor,
        rope: tuple[Tensor, ...],
        keys_values: tuple[Tensor, Tensor],
        mask: Mask,
    ) -> Tensor:
        c = self.config
        query = F.linear(rows, layer.attention["query"].weight)
        query = _rotate(query.unflatten(-1, (c.heads, -1)).transpose(1, 2), rope)
        keys, values = keys_values
        out = F.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=mask[:, None] if isinstance(mask, Tensor) else None,
            is_causal=isinstance(mask, str),
            enable_gqa=c.heads != c.kv_heads,
        )
        return F.linear(out.transpose(1, 2).flatten(2), layer.attention["output"].weight)

    def _mlp(self, layer: nn.Module, rows: Tensor) -> Tensor:
        hidden = F.linear(rows, layer.mlp["up"].weight)
        if self.config.mlp == "swiglu":
            gate, value = hidden.unflatten(-1, (-1, 2)).unbind(-1)
            hidden = F.silu(gate) * value
        else:
            hidden = F.gelu(hidden, approximate="tanh")
        return F.linear(hidden, layer.mlp["down"].weight)

    def _norm(self, rows: Tensor, weight: nn.Module) -> Tensor:
        scale = weight.weight.to(self.precise)
        if self.config.norm == "layernorm":
            out = F.layer_norm(rows.to(self.precise), scale.shape, scale, None, self.config.norm_eps)
        else:
            out = F.rms_norm(rows.to(self.precise), scale.shape, scale, self.config.norm_eps)
        return out.to(rows.dtype)

    def _embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.embedding.weight)

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self.embedding.weight if self.config.tied_head else self.head.weight
        return F.linear(self._norm(hidden, self.norm), head)

    def _log_probabilities(self, hidden: Tensor) -> Tensor:
        return self._logits(hidden).to(self.precise).log_softmax(dim=-1)

    def _finish_seed(self, seed: Tensor, query: Tensor, size: Tensor) -> Tensor:
        """Scale the prefix sum of targets that see ``size`` rows, and add the target's own position if so
        configured.
        """
        if self.config.prefix_scale != "none":
            size = size.to(seed.dtype)
            seed = seed / (size.sqrt() if self.config.prefix_scale == "sqrt" else size)
        if self.config.prefix_target_position:
            seed = seed + query @ self.prefix["target_projection"].to(seed.dtype).t()
        return seed.to(self.embedding.weight.dtype)

    def _table(self) -> Tensor:
        """Position embeddings of prefix aggregation [length + 1, d_pe]."""
        c = self.config
        if c.prefix_kernel == "learned":
            return self.prefix["table"].to(self.precise)
        key = (self.device, self.precise)
        if key not in self._tables:
            count = c.prefix_dim // 2
            index = torch.arange(count, dtype=torch.float64)
            if c.prefix_kernel == "gaussian":
                frequencies = torch.special.ndtri((1 + (index + 0.5) / count) / 2) / c.prefix_width
            else:
                frequencies = 10000.0 ** (-index / count)
            angles = torch.arange(c.length + 1, dtype=torch.float64)[:, None] * frequencies
            # float32 first: training rounds the table so, and a float64 model must be the same function
            table = (torch.cat([angles.sin(), angles.cos()], dim=-1) / count**0.5).float()
            self._tables[key] = table.to(self.device, self.precise)
        return self._tables[key]

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions [B, R]: [B, 1, R, D / 2] each."""
        width = self.config.hidden // self.config.heads
        steps = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32)
        angles = positions.float()[:, None, :, None] * self.config.rope_base ** (-steps / width)
        return angles.cos().to(self.precise), angles.sin().to(self.precise)

    # Checks ----------------------------------------------------------------------------------------------------

    def _layout(self, tokens: Tensor, order: Tensor | None, block_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        tokens = self._tokens(tokens)
        count = tokens.shape[1]
        if not 1 <= count <= self.config.length:
            raise InputError(f"a text of {count} tokens does not fit this model: it takes 1 to {self.config.length}")
        natural = torch.arange(1, count + 1, device=self.device)
        order = _like(tokens, order, natural, "order")
        blocks = _like(tokens, block_ids, natural, "block_ids")
        if not bool((order.sort(dim=1).values == natural).all()):
            raise InputError(f"order must be a permutation of 1..{count} in every row")
        if bool((blocks[:, :1] < 1).any()) or bool((blocks[:, 1:] < blocks[:, :-1]).any()):
            raise InputError("block_ids must start at 1 or more and never decrease along the order")
        return tokens, order, blocks

    def _prompt(self, prompt: Tensor | Sequence[int] | None, length: int | None, batch: int) -> tuple[Tensor, int]:
        length = self.config.length if length is None else length
        if not 1 <= length <= self.config.length:
            raise InputError(f"length {length} does not fit this model: choose 1 to {self.config.length}")
        if prompt is None:
            return torch.zeros(batch, 0, dtype=torch.long, device=self.device), length
        given = prompt if isinstance(prompt, Tensor) else torch.tensor(prompt, dtype=torch.long)
        given = self._tokens(given[None] if given.dim() == 1 else given)
        if given.shape[1] > length:
            raise InputError(
                f"the prompt has {given.shape[1]} tokens but the text may have {length}: shorten it or raise the "
                f"length (this model: up to {self.config.length})"
            )
        return given, length

    def _tokens(self, tokens: Tensor) -> Tensor:
        if tokens.dim() != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise InputError(f"tokens must be whole numbers [batch, length], not {tokens.dtype} {list(tokens.shape)}")
        tokens = tokens.to(self.device, torch.long)
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab_size:
            raise InputError(
                f"token {int(tokens.min()) if int(tokens.min()) < 0 else int(tokens.max())} is not in the "
                f"vocabulary of {self.config.vocab_size}: was another tokenizer used?"
            )
        return tokens

    def _uniform(self, seed: int | Sequence[int], count: int, length: int) -> Tensor:
        """One uniform number per position [B, length], float64, from each sequence's own stream."""
        try:
            keys = [(operator.index(seed), row) for row in range(count)]  # type: ignore[arg-type]
        except TypeError:
            keys = [(operator.index(one), 0) for one in seed]  # type: ignore[union-attr]
        if len(keys) != count:
            raise InputError(f"{len(keys)} seeds for {count} sequences: give one for each, or a single one")
        rows = []
        for key in keys:
            digest = hashlib.sha256(repr(key).encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            rows.append(torch.rand(length, generator=generator, dtype=torch.float64))
        return torch.stack(rows).to(self.device)


def strided_blocks(start: int, stop: int, streams: int) -> list[list[int]]:
    """Positions start + 1..stop as S contiguous streams written side by side: the positions of each block.

    The heads of the streams come one at a time, then one token of every stream at once. The first
    ``n % S`` streams are one longer, so only the last block can be ragged. ``streams`` is capped at n.
    """
    count = stop - start
    streams = min(streams, count)
    sizes = [count // streams + (stream < count % streams) for stream in range(streams)]
    heads = [start + 1 + sum(sizes[:stream]) for stream in range(streams)]
    rounds = [
        [head + step for head, size in zip(heads, sizes, strict=True) if step < size] for step in range(1, sizes[0])
    ]
    return [[head] for head in heads] + rounds


def load(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> ARMD:
    """Load a model folder. ``dtype``: None keeps the stored type. Raises ``InputError`` when the folder is no model."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is not a model folder: config.json is missing; make one with tools/convert_ckpt.py")
    try:
        device = torch.device(device)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise InputError(f"device {device} is not there or cannot run a model; use device='cpu'") from error
    config = _read_config(folder / "config.json")
    weights = _read_weights(folder)
    with torch.device("meta"):
        model = ARMD(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if wanted != found:
        name = sorted(set(wanted.items()) ^ set(found.items()))[0][0]
        raise InputError(
            f"the weights in {folder} do not fit config.json: {name} is {found.get(name, 'missing')}, "
            f"expected {wanted.get(name, 'nothing')}; export it again"
        )
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"the weights in {folder} are damaged: {name} is not finite; export it again")
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval().to(device=device, dtype=dtype)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of ``model.safetensors``, or of the files that ``model.safetensors.index.json`` names."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.is_file():
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index} cannot be read: {error}; export the model again") from error
    weights: dict[str, Tensor] = {}
    for name in sorted(files):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is not a model folder: {name} is missing; make one with tools/convert_ckpt.py")
        try:
            weights |= load_file(folder / name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{folder / name} cannot be read: {error}; export the model again") from error
    return weights


_CHOICES = {
    "norm": ("layernorm", "rmsnorm"),
    "mlp": ("gelu", "swiglu"),
    "prefix_kernel": ("gaussian", "sinusoid", "learned"),
    "prefix_scale": ("none", "sqrt", "mean"),
    "model_type": ("armd",),
}


def _read_config(path: Path) -> ARMDConfig:
    """``config.json``, with every field of its type and in its range; unknown fields are left out."""
    wrong = f"{path} does not describe an ARMD model"
    kinds: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(ARMDConfig)}
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        config = ARMDConfig(**{name: value for name, value in fields.items() if name in kinds})
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{wrong}: {error}") from error
    for name, kind in kinds.items():
        value = getattr(config, name)
        accepted = (int, float) if kind is float else kind
        right = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
        if right and kind in (int, float):
            right = value >= 0 if name in ("bos_id", "eos_id") else value > 0
        if not right or value not in _CHOICES.get(name, (value,)):
            raise InputError(f"{wrong}: {name} is {value!r}")
    c = config
    fits = c.hidden % (2 * c.heads) == c.heads % c.kv_heads == c.prefix_dim % 2 == 0
    if not fits or c.two_stream_layers > c.layers or max(c.bos_id, c.eos_id) >= c.vocab_size:
        raise InputError(f"{wrong}: its sizes contradict each other")
    return config


def _weight(*shape: int) -> nn.Module:
    """A module that holds one tensor named ``weight``."""
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.empty(*shape))
    return holder


def _rotate(rows: Tensor, rope: tuple[Tensor, ...]) -> Tensor:
    """Rotary embedding of [B, H, R, D]: pairs (i, i + D / 2)."""
    cos, sin = rope
    first, second = rows.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(rows.dtype)


def _sample(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Tokens [B, R] from logits [B, R, V] by inversion of the cumulative distribution, in float64."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.double()
    # The largest logit becomes 0 before the division: a tiny temperature must not overflow.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    threshold = uniform[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[..., 0].clamp(max=logits.shape[-1] - 1)


def _like(tokens: Tensor, given: Tensor | None, default: Tensor, name: str) -> Tensor:
    if given is None:
        return default.expand(tokens.shape)
    if given.dim() not in (1, 2) or given.shape[-1] != tokens.shape[1] or given.is_floating_point():
        raise InputError(
            f"{name} must be whole numbers {list(tokens.shape)} or [{tokens.shape[1]}], "
            f"not {given.dtype} {list(given.shape)}"
        )
    try:
        return given.to(tokens.device, torch.long).expand(tokens.shape)
    except RuntimeError as error:
        raise InputError(f"{name} of shape {list(given.shape)} does not fit {list(tokens.shape)}") from error
