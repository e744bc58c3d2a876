"""Architectures of transformers that this project reads and writes: names of their fields and of their tensors.

One table for each direction: ``FIELDS`` and ``tensors`` say which names correspond, ``model_fields`` and
``foreign_config`` translate configurations. A field that the table does not know must have a neutral value.

Layout: rows of ``attention.key_value`` are [key head, (key, value), D], rows of ``mlp.up`` are [unit, (gate, value)],
and rotary pairs are (i, i + D / 2), as in transformers.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from armd_scale.config import ModelConfig
from armd_scale.errors import UserError


class Architecture(NamedTuple):
    """A class of transformers."""

    model_type: str
    qkv_bias: bool = False
    qk_norm: bool = False
    defaults: Mapping[str, Any] = {}
    """Values of fields that ``config.json`` leaves out, where they differ from ``_DEFAULTS``."""


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama"),
    "MistralForCausalLM": Architecture("mistral", defaults={"num_key_value_heads": 8}),
    "Qwen2ForCausalLM": Architecture("qwen2", qkv_bias=True, defaults={"num_key_value_heads": 32}),
    "Qwen3ForCausalLM": Architecture("qwen3", qk_norm=True, defaults={"num_key_value_heads": 32, "head_dim": 128}),
}
"""Known classes; a model is written as the first one with its features."""

FIELDS = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "ffn",
    "rms_norm_eps": "norm_eps",
    "vocab_size": "vocab_size",
    "tie_word_embeddings": "tied_head",
}
"""Field of transformers -> field of ``ModelConfig``."""

_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
"""Values of fields that ``config.json`` leaves out."""
_READ = {
    "architectures", "model_type", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters",
    "original_max_position_embeddings", "sliding_window", "layer_types", "use_sliding_window", "max_window_layers",
    "hidden_act",
}  # fmt: skip
"""Other fields that the translation looks at."""
_WITHOUT_EFFECT = {
    "attention_dropout", "dtype", "initializer_range", "is_llama_config", "max_length", "max_sequence_length",
    "output_attentions", "output_hidden_states", "output_scores", "pretraining_tp", "return_dict",
    "return_dict_in_generate", "rope_interleaved", "tokenizer_class", "torch_dtype", "torchscript",
    "transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
    "id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params", "prefix",
    "chunk_size_feed_forward", "tf_legacy_loss",
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "length_penalty", "min_length",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "remove_invalid_values",
    "repetition_penalty", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
}  # fmt: skip
"""Fields that do not change what a model computes, besides ids of tokens and names that begin with ``_``."""
_NEEDS = {
    "auto_map": "code of its own",
    "attention_bias": "a bias of the output projection",
    "mlp_bias": "biases of the MLP",
    "num_local_experts": "experts",
    "num_experts": "experts",
    "n_routed_experts": "experts",
    "quantization_config": "quantised weights; dequantise them first",
    "final_logit_softcapping": "soft caps",
    "attn_logit_softcapping": "soft caps",
    "partial_rotary_factor": "rotary embeddings of a part of a head",
    "no_rope_layers": "layers without rotary embeddings",
}
"""What has to be supported for fields that models of these architectures may have."""


def name_of(config: Mapping[str, Any]) -> str:
    """The class that ``config.json`` names; ``UserError`` if it is not known."""
    kind = config.get("model_type")
    names = config.get("architectures") or [name for name, known in ARCHITECTURES.items() if known.model_type == kind]
    names = [names] if isinstance(names, str) else names or [f"of '{kind}'"]
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        raise UserError(f"architecture {', '.join(map(str, names))}: known are {', '.join(ARCHITECTURES)}")
    if kind not in (None, ARCHITECTURES[names[0]].model_type):
        raise UserError(f"model_type = {kind!r} contradicts architectures = {names}: restore config.json")
    return names[0]


def find(config: Mapping[str, Any]) -> Architecture:
    """The architecture of ``config.json``; ``UserError`` if it is not known."""
    return ARCHITECTURES[name_of(config)]


def model_fields(
    config: Mapping[str, Any], length: int | None = None, rope: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """``config.json`` of transformers -> fields of ``ModelConfig``. ``length``: of the run; None: that of the model.

    ``rope``: fields of ``RopeConfig`` that extend a model without scaling to more positions, ``factor`` times as many.

    Raises ``UserError`` for what ``ModelConfig`` cannot express.
    """
    architecture = find(config)
    for name, value in config.items():
        is_known = (
            name in FIELDS or name in _READ | _WITHOUT_EFFECT or name.startswith("_") or name.endswith("_token_id")
        )
        neutral = 1 if name == "partial_rotary_factor" else None
        if not is_known and value not in (neutral, None, False, 0, [], {}):
            raise UserError(f"{name} = {value!r}: {_NEEDS.get(name, 'this field')} would have to be supported")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"hidden_act = {config['hidden_act']!r}: this activation would have to be supported")
    defaults = _DEFAULTS | {**architecture.defaults}
    values = {ours: config.get(theirs, defaults.get(theirs)) for theirs, ours in FIELDS.items()}
    missing = [
        theirs for theirs, ours in FIELDS.items() if values[ours] is None and ours not in ("kv_heads", "head_dim")
    ]
    if missing:
        raise UserError(f"{missing[0]} is missing")
    values["kv_heads"] = values["kv_heads"] or values["heads"]
    values["head_dim"] = values["head_dim"] or values["hidden"] // values["heads"]
    values["length"] = length or longest(config)
    rotary = _rope(config)
    if rope and not rotary["rope"]:
        rotary["rope"] = {"original_length": longest(config), **rope}
    most = longest(config) * (rope["factor"] if rope else 1)
    if values["length"] > most:
        raise UserError(
            f"model.length = {length} exceeds the {most:.0f} positions of the model: lower it, or raise "
            "model.rope.factor with model.rope.scaling=yarn"
        )
    _check_windows(config, values["length"])
    return {
        **values,
        **rotary,
        "norm": "rmsnorm",
        "mlp": "swiglu",
        "qk_norm": architecture.qk_norm,
        "qkv_bias": architecture.qkv_bias,
    }


def longest(config: Mapping[str, Any]) -> int:
    """Positions that a model was trained for."""
    return int(config.get("max_position_embeddings") or 2048)


def _check_windows(config: Mapping[str, Any], length: int) -> None:
    """``UserError`` if a layer attends to fewer than ``length`` + 1 positions."""
    always = config.get("model_type") == "mistral"
    window = config.get("sliding_window", 4096 if always else None)
    used = config.get("use_sliding_window", always)
    if config.get("max_window_layers", 0) >= config.get("num_hidden_layers", 1):  # of Qwen: the first layer with one
        used = False
    kinds = set(config.get("layer_types") or ()) - {"full_attention"}
    slides = kinds == {"sliding_attention"} or (used and not config.get("layer_types"))
    if kinds - {"sliding_attention"}:
        raise UserError(f"layer_types = {sorted(kinds)}: these layers would have to be supported")
    if window and slides and window <= length:
        raise UserError(
            f"sliding_window = {window}: windows would have to be supported; up to model.length={window - 1} it has "
            "no effect"
        )


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_base`` and ``rope``."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    base = given.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = given.get("rope_type", given.get("type", "default"))
    if given.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"rope: partial_rotary_factor: {_NEEDS['partial_rotary_factor']} would have to be supported")
    if kind == "default":
        return {"rope_base": float(base), "rope": {}}
    if kind not in ("linear", "llama3", "yarn"):
        raise UserError(f"rope_type = {kind!r}: this scaling of rotary embeddings would have to be supported")
    original = (
        config.get("original_max_position_embeddings")
        or given.get("original_max_position_embeddings")
        or longest(config)
    )
    rope = {"scaling": kind, "factor": float(given["factor"]), "original_length": original}
    if kind == "llama3":
        rope |= {"low_turns": float(given["low_freq_factor"]), "high_turns": float(given["high_freq_factor"])}
    if kind == "yarn":
        if not given.get("truncate", True):
            raise UserError("rope: truncate = False: this form of yarn would have to be supported")
        slow, fast = given.get("beta_slow") or 1, given.get("beta_fast") or 32
        rope |= {"low_turns": float(slow), "high_turns": float(fast), "attention": _attention_factor(given)}
    return {"rope_base": float(base), "rope": rope}


def _attention_factor(rope: Mapping[str, Any]) -> float | None:
    """Factor of queries and keys with yarn; None: the usual one."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    top, bottom = rope.get("mscale"), rope.get("mscale_all_dim")
    if not (top and bottom):
        return None
    scale = 0.1 * math.log(rope["factor"]) if rope["factor"] > 1 else 0.0
    return (top * scale + 1) / (bottom * scale + 1)


def foreign_config(model: ModelConfig) -> dict[str, Any]:
    """``config.json`` of transformers for a left-to-right model.

    Raises ``UserError`` for models that no known architecture can express.
    """
    traits = model.traits
    if traits.streams > 1 or traits.mask or not traits.causal:
        raise UserError(f"transformers has no architecture for {traits.label} models: only objective=ar has one")
    for name, wanted in (("norm", "rmsnorm"), ("mlp", "swiglu")):
        if getattr(model, name) != wanted:
            raise UserError(f"model.{name} = {getattr(model, name)}: known architectures have {wanted}")
    features = (model.qkv_bias, model.qk_norm)
    matching = [name for name, known in ARCHITECTURES.items() if (known.qkv_bias, known.qk_norm) == features]
    if not matching:
        raise UserError("no known architecture has model.qkv_bias and model.qk_norm together")
    resolved = model.exported()
    values = {theirs: resolved[ours] for theirs, ours in FIELDS.items()}
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.rope.scaling != "none":
        rope = {
            "rope_type": model.rope.scaling,
            "factor": model.rope.factor,
            "original_max_position_embeddings": model.rope.original_length,
        }
        names = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_slow", "beta_fast")}
        turns = zip(names.get(model.rope.scaling, ()), (model.rope.low_turns, model.rope.high_turns), strict=False)
        rope |= dict(turns)
        if model.rope.attention is not None:
            rope["attention_factor"] = model.rope.attention
    return {
        "architectures": matching[:1],
        "model_type": ARCHITECTURES[matching[0]].model_type,
        **values,
        "max_position_embeddings": model.length,
        "hidden_act": "silu",
        "rope_theta": model.rope_base,
        "rope_parameters": {**rope, "rope_theta": model.rope_base},
        **({"rope_scaling": rope} if model.rope.scaling != "none" else {}),
    }


class Pair(NamedTuple):
    """A tensor of a training checkpoint, and the tensors of transformers that it is made of."""

    name: str
    shape: tuple[int, ...]
    """Shape of the tensor of the checkpoint, without the padding of the vocabulary."""
    foreign: tuple[str, ...]
    size: int = 1
    """Rows of a tensor that stay together when the rows of several alternate."""

    @property
    def foreign_shape(self) -> tuple[int, ...]:
        return (self.shape[0] // len(self.foreign), *self.shape[1:])

    def join(self, tensors: list[Tensor]) -> Tensor:
        """The tensor of the checkpoint."""
        if len(tensors) == 1:
            return tensors[0]
        return torch.stack([tensor.unflatten(0, (-1, self.size)) for tensor in tensors], dim=1).flatten(0, 2)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of transformers."""
        if len(self.foreign) == 1:
            return [tensor]
        parts = tensor.unflatten(0, (-1, len(self.foreign), self.size)).unbind(1)
        return [part.flatten(0, 1) for part in parts]


def tensors(model: ModelConfig) -> list[Pair]:
    """All tensors of a model of a known architecture, without the gates of its seed."""
    assert model.vocab_size is not None
    d, f, width = model.hidden, model.ffn_width, model.head_size
    q, kv = model.heads * width, 2 * model.key_heads * width
    pairs = [
        Pair("embedding.weight", (model.vocab_size, d), ("model.embed_tokens.weight",)),
        Pair("norm.weight", (d,), ("model.norm.weight",)),
    ]
    if not model.tied_head:
        pairs.append(Pair("head.weight", (model.vocab_size, d), ("lm_head.weight",)))
    for index in range(model.layers):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        pairs += [
            Pair(f"{ours}.attention_norm.weight", (d,), (f"{theirs}.input_layernorm.weight",)),
            Pair(f"{ours}.mlp_norm.weight", (d,), (f"{theirs}.post_attention_layernorm.weight",)),
            Pair(f"{ours}.attention.output.weight", (d, q), (f"{attention}.o_proj.weight",)),
            Pair(f"{ours}.mlp.up.weight", (2 * f, d), (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight")),
            Pair(f"{ours}.mlp.down.weight", (d, f), (f"{mlp}.down_proj.weight",)),
        ]
        for kind, rest in (("weight", (d,)), *((("bias", ()),) if model.qkv_bias else ())):
            keys = (f"{attention}.k_proj.{kind}", f"{attention}.v_proj.{kind}")
            pairs += [
                Pair(f"{ours}.attention.query.{kind}", (q, *rest), (f"{attention}.q_proj.{kind}",)),
                Pair(f"{ours}.attention.key_value.{kind}", (kv, *rest), keys, width),
            ]
        if model.qk_norm:
            pairs += [
                Pair(f"{ours}.attention.query_norm", (width,), (f"{attention}.q_norm.weight",)),
                Pair(f"{ours}.attention.key_norm", (width,), (f"{attention}.k_norm.weight",)),
            ]
    return pairs
