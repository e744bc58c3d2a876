"""The model as a Hugging Face model: ``AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)``.

Texts begin with BOS here, as the tokenizer of the directory writes it: row i of the logits predicts token i + 1 left to
right, exactly. ``generate`` takes the usual settings and those of ``Decoding``.
"""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from armd_scale.decoding.network import MODEL_TYPE, ARMDConfig, InputError
from armd_scale.decoding.sampling import Decoding
from armd_scale.inference.model import ARMD


class ARMDHubConfig(PretrainedConfig):
    """``config.json``; its own fields are those of ``ARMDConfig``."""

    model_type = MODEL_TYPE
    attribute_map: ClassVar = {
        "hidden_size": "hidden",
        "intermediate_size": "ffn",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads",
        "max_position_embeddings": "length",
    }

    def shape(self) -> ARMDConfig:
        """The fields that make the model."""
        return ARMDConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(ARMDConfig)})


class ARMDForCausalLM(PreTrainedModel):
    """Auto-regressive masked diffusion language model; ``model`` is the ``ARMD`` itself."""

    config_class = ARMDHubConfig
    base_model_prefix = "model"
    accepts_loss_kwargs = False  # the loss is a mean: a trainer divides by its accumulation steps

    def __init__(self, config: ARMDHubConfig) -> None:
        super().__init__(config)
        self.model = ARMD(config.shape())
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: a directory holds every weight."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **more: Any,
    ) -> CausalLMOutput:
        """Logits [B, N, V] of the token behind each of ``input_ids`` [B, N], BOS first; padding may follow a text.

        ``labels`` [B, N]: -100 is not scored. Raises ``InputError``.
        """
        c = self.model.config
        if not c.traits.exact:
            raise InputError(f"{c.traits.label} models predict no next token: use model.bound and generate")
        unknown = [name for name, value in more.items() if value and name not in ("return_dict", "use_cache")]
        if unknown:
            raise InputError(f"{unknown[0]} is not offered here: give input_ids, attention_mask and labels")
        if not 1 <= input_ids.shape[1] <= c.length or not bool((input_ids[:, 0] == c.bos_id).all()):
            raise InputError(f"input_ids must be BOS ({c.bos_id}) and up to {c.length - 1} tokens behind it")
        if attention_mask is not None and not bool(attention_mask[:, 0].all()):
            raise InputError("padding must be on the right here; generate takes it on the left as well")
        tokens = torch.cat([input_ids[:, 1:], input_ids[:, :1]], dim=1)  # the last target has no token yet
        natural = torch.arange(1, tokens.shape[1] + 1, device=tokens.device).expand_as(tokens)
        logits = self.model.predict(self.model.whole(tokens, natural, natural))
        loss = None
        if labels is not None:
            if attention_mask is not None:
                labels = labels.masked_fill(attention_mask == 0, -100)
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generation_config: Any = None,
        seed: int | None = None,
        **settings: Any,
    ) -> Tensor:
        """``input_ids`` and the tokens generated behind them, filled up with EOS.

        Settings: ``max_new_tokens`` or ``max_length`` (default: the model's length), ``do_sample``, ``temperature``,
        ``top_k``, ``top_p``, ``min_p`` as usual, ``streams``, ``draft`` and ``steps`` as in ``Decoding``. Without a
        ``seed``, PyTorch's own state decides. Raises ``InputError``.
        """
        known = {field.name for field in dataclasses.fields(Decoding)}
        usual = {"max_new_tokens", "max_length", "do_sample"}
        chosen = generation_config or self.generation_config
        given: dict[str, Any] = (chosen.to_diff_dict() if chosen else {}) | settings
        # What is off asks for nothing: a saved generation_config lists much that is.
        given = {name: v for name, v in given.items() if v is not None and (v is not False or name in known | usual)}
        ignored = {"pad_token_id", "eos_token_id", "bos_token_id", "use_cache", "tokenizer", "assistant_tokenizer"}
        ignored |= {"transformers_version", "_from_model_config", "return_dict_in_generate"}
        unknown = sorted(given.keys() - known - usual - ignored)
        if unknown:
            raise InputError(f"unknown setting {unknown[0]}: choose from {', '.join(sorted(known | usual))}")
        if not given.get("do_sample", False):
            given["temperature"] = 0.0
        decoding = Decoding(**{"stop": True, **{name: given[name] for name in known & given.keys()}})
        c = self.model.config
        if input_ids is None:
            input_ids = torch.full((1, 1), c.bos_id, device=self.device)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [row[kept.bool()].tolist() for row, kept in zip(input_ids, mask, strict=True)]
        if any(not row or row[0] != c.bos_id for row in prompts):
            raise InputError(f"every text must begin with BOS ({c.bos_id})")
        most = c.length - max(len(row) - 1 for row in prompts)
        new = given.get("max_new_tokens", given.get("max_length", input_ids.shape[1] + most) - input_ids.shape[1])
        if not 0 <= new <= most:
            raise InputError(f"{new} new tokens do not fit: 0 to {most} do behind these texts")
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        if not new:
            return input_ids
        texts = self.model.generate([row[1:] for row in prompts], decoding=decoding, seed=seed, new_tokens=new)
        behind = [text[len(row) - 1 :][:new] for row, text in zip(prompts, texts, strict=True)]
        return torch.cat([input_ids, torch.stack(behind).to(input_ids.device)], dim=1)
