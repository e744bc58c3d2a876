"""The model as a Hugging Face model: ``AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)``.

Texts begin with BOS here, as the tokenizer of the directory writes it: row i of the logits predicts token i + 1 left to
right, exactly. ``generate`` takes the usual settings and those of ``Decoding``.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    MaxTimeCriteria,
    PretrainedConfig,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutput

from armd_scale.decoding.lanes import FREE, Frontier, Task
from armd_scale.decoding.network import MODEL_TYPE, ARMDConfig, InputError
from armd_scale.decoding.sampling import Decoding, Sampler
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
        "tie_word_embeddings": "tied_head",
    }

    def shape(self) -> ARMDConfig:
        """The fields that make the model."""
        return ARMDConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(ARMDConfig)})


class ARMDForCausalLM(PreTrainedModel, GenerationMixin):
    """Auto-regressive masked diffusion language model; ``model`` is the ``ARMD`` itself."""

    config_class = ARMDHubConfig
    base_model_prefix = "model"
    accepts_loss_kwargs = False  # the loss is a mean: a trainer divides by its accumulation steps
    _supports_sdpa = True
    _no_split_modules: ClassVar = ["ARMD"]  # a device map puts the model on one device

    def __init__(self, config: ARMDHubConfig) -> None:
        super().__init__(config)
        self.model = ARMD(config.shape())
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        self.model.initialise(module, getattr(self.config, "initializer_range", 0.02))

    # Embeddings ------------------------------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """The head; the embedding if it is tied."""
        return self.model.embedding if self.model.config.tied_head else self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        setattr(self.model, "embedding" if self.model.config.tied_head else "head", new_embeddings)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Change the size of the vocabulary; a mask token stays behind it."""
        embedding, old = self.model.embedding, self.model.config.vocab_size
        if new_num_tokens is None and pad_to_multiple_of is None:
            return embedding
        weight, trained = embedding.weight.detach(), embedding.weight.requires_grad
        words = nn.Embedding.from_pretrained(weight[:old].clone(), freeze=not trained)
        words = self._get_resized_embeddings(words, new_num_tokens, pad_to_multiple_of, mean_resizing)
        count = words.num_embeddings
        embedding.weight = nn.Parameter(torch.cat([words.weight.detach(), weight[old:]]), requires_grad=trained)
        embedding.num_embeddings = len(embedding.weight)
        if not self.model.config.tied_head:
            trained = self.model.head.weight.requires_grad
            self.model.head = self._get_resized_lm_head(self.model.head, count, mean_resizing=mean_resizing)
            self.model.head.requires_grad_(trained)
        self.config.vocab_size = count
        self.model.config = dataclasses.replace(self.model.config, vocab_size=count)
        return embedding

    # Scores ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **more: Any,
    ) -> CausalLMOutput | tuple[Tensor, ...]:
        """Logits [B, N, V] of the token behind each of ``input_ids`` [B, N], BOS first; padding may follow a text.

        ``position_ids`` may only count the tokens of a text from 0. ``labels`` [B, N]: -100 is not scored. Raises
        ``InputError``.
        """
        c = self.model.config
        if not c.traits.exact:
            raise InputError(f"{c.traits.label} models predict no next token: use model.bound and generate")
        unknown = [name for name, value in more.items() if not _is_off(value) and name != "use_cache"]
        if unknown:
            raise InputError(f"{unknown[0]} is not offered here: give input_ids, attention_mask and labels")
        if not 1 <= input_ids.shape[1] <= c.length or not bool((input_ids[:, 0] == c.bos_id).all()):
            raise InputError(f"input_ids must be BOS ({c.bos_id}) and up to {c.length - 1} tokens behind it")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = (mask.expand_as(input_ids) if mask.dim() == 2 else torch.zeros_like(input_ids)).bool()
        if not bool(mask[:, 0].all()) or bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise InputError("padding must be on the right here; generate takes it on the left as well")
        natural = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device).expand_as(input_ids)
        if position_ids is not None and bool(((position_ids + 1 != natural) & mask).any()):
            raise InputError("position_ids must count each text's tokens from 0: leave them out, and pack no texts")
        tokens = torch.cat([input_ids[:, 1:], input_ids[:, :1]], dim=1)  # the last target has no token yet
        logits = self.model.predict(self.model.whole(tokens, natural, natural))
        loss = None
        if labels is not None:
            labels = labels.masked_fill(~mask, -100)
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        out = CausalLMOutput(loss=loss, logits=logits)
        return out if (self.config.return_dict if return_dict is None else return_dict) else out.to_tuple()

    # Text ------------------------------------------------------------------------------------------------------

    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        streamer: Any = None,
        seed: int | Sequence[int] | None = None,
        tokenizer: Any = None,
        **settings: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """``input_ids`` and the tokens generated behind them; shorter texts are filled up with ``pad_token_id``.

        Prompts may begin with BOS or leave it out, as some chat templates do: each text has one BOS either way.
        Settings: ``max_new_tokens`` or ``max_length`` (default: the model's length), ``min_new_tokens``,
        ``eos_token_id``, ``pad_token_id`` (default: EOS), ``do_sample``, ``temperature``, ``top_k``, ``top_p``,
        ``min_p`` (unlike in transformers, nothing is cut off by default), ``num_return_sequences``,
        ``stop_strings``, ``max_time``, ``return_dict_in_generate``, ``output_scores`` and ``output_logits`` as usual;
        ``streams``, ``draft``, ``steps``, ``block`` and ``confidence`` as in ``Decoding``. ``streamer`` and
        ``stopping_criteria`` are given the tokens in the order of the text, as it becomes complete. Without a
        ``seed``, PyTorch's own state decides. Raises ``InputError``.
        """
        c, ids = self.model.config, input_ids if inputs is None else inputs
        given = self._given(generation_config, {**settings, "logits_processor": logits_processor})
        ends = _tokens(given.pop("eos_token_id", c.eos_id))
        if settings.get("eos_token_id", ends) is None:
            ends = ()
        pad = given.pop("pad_token_id", ends[0] if ends else c.eos_id)
        copies, sampled = given.pop("num_return_sequences", 1), given.pop("do_sample", False)
        if copies > 1 and not sampled:
            raise InputError(f"{copies} greedy texts are all the same: set do_sample=True or num_return_sequences=1")
        if ids is None:
            ids = torch.full((1, 1), c.bos_id, device=self.device)
        mask = self._mask(ids, attention_mask, pad, ends)
        ids, mask = (rows.repeat_interleave(copies, dim=0) for rows in (ids, mask))
        prompts = [self.model.without_bos(row[kept].tolist()) for row, kept in zip(ids, mask, strict=True)]
        new, least = self._sizes(given, ids.shape[1], max(map(len, prompts)))
        criteria = _criteria(given, tokenizer, stopping_criteria)
        as_dict = given.pop("return_dict_in_generate", False)
        scores, logits = (given.pop(name, False) and as_dict for name in ("output_scores", "output_logits"))
        if not sampled:
            given["temperature"] = 0.0
        stop = given.pop("stop", True) and bool(ends)
        decoding = Decoding(**{**given, "stop": stop, "stop_ids": ends if stop else (), "min_tokens": least})
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        tasks = self.model.plan([row + [FREE] * new for row in prompts], decoding, seed) if new else []
        if (scores or logits) and any(task.decoding.strategy not in ("strided", "exact") for task in tasks):
            raise InputError("output_scores and output_logits need a likelihood of each token: leave them out")
        watch = _Watch(ids, pad, criteria, streamer)
        if streamer is not None or criteria or scores or logits:
            texts = watch.follow(tasks, self.model)
        else:
            whole = self.model.complete(tasks)
            texts = [text[len(task.given) :].tolist() for text, task in zip(whole, tasks, strict=True)]
        width = max(map(len, texts), default=0)
        out = torch.full((len(ids), width), pad, device=ids.device)
        for row, text in zip(out, texts, strict=bool(tasks)):
            row[: len(text)] = torch.tensor(text, dtype=torch.long)
        sequences = torch.cat([ids, out.to(ids.dtype)], dim=1)
        if not as_dict:
            return sequences
        rows = (
            self._logits(tasks, watch.written, width)
            if tasks and (scores or logits)
            else torch.empty(len(ids), 0, c.vocab_size)
        )
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=_scores(rows, tasks, c.eos_id) if scores else None,
            logits=tuple(rows.unbind(1)) if logits else None,
        )

    def _given(self, chosen: GenerationConfig | None, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings that ask for something: the model's own, those of a ``generation_config``, and arguments."""
        given: dict[str, Any] = {}
        for source in (self.generation_config, chosen):
            given |= source.to_diff_dict() if source is not None else {}
        given |= {name: value for name, value in settings.items() if value is not None}
        known = {field.name for field in dataclasses.fields(Decoding)} - {"stop_ids", "min_tokens"} | _USUAL
        unknown = [
            name for name, value in given.items() if name not in known | _WITHOUT_EFFECT and not _is_off(value, name)
        ]
        if unknown:
            raise InputError(
                f"generate cannot use {unknown[0]}: leave it out, or choose from {', '.join(sorted(known))}"
            )
        return {name: value for name, value in given.items() if name in known and value is not None}

    def _mask(self, ids: Tensor, mask: Tensor | None, pad: int, ends: Sequence[int]) -> Tensor:
        """Which of ``input_ids`` [B, N] are a text, and which are padding; a warning if that cannot be told."""
        if not isinstance(ids, Tensor):
            raise InputError("input_ids must be a tensor: write generate(**tokenizer(texts, return_tensors='pt'))")
        if ids.dim() != 2 or (mask is not None and mask.shape != ids.shape):
            raise InputError(f"input_ids {[*ids.shape]} and attention_mask must both be [texts, tokens]")
        if mask is not None:
            return mask.bool()
        if pad not in (*ends, self.model.config.bos_id):
            return ids != pad
        if len(ids) > 1 and bool((ids[:, -1] == pad).any()):
            warnings.warn(
                "input_ids end with the padding token, and there is no attention_mask: the texts go on behind the "
                "padding; pass the tokenizer's attention_mask",
                stacklevel=3,
            )
        return torch.ones_like(ids).bool()

    def _sizes(self, given: dict[str, Any], width: int, longest: int) -> tuple[int, int]:
        """Numbers of new tokens of each text, the most and the least; ``longest``: tokens of the longest prompt."""
        length = self.model.config.length
        most = length - longest
        if most < 0:
            raise InputError(f"a prompt has {longest} tokens behind BOS, but this model takes {length}: shorten it")
        size, new = given.pop("max_length", width + most), given.pop("max_new_tokens", None)
        new = size - width if new is None else new
        if new < 0:
            raise InputError(
                f"{new} new tokens: raise max_length, which counts the prompts' {width}, or max_new_tokens"
            )
        if new > most:  # pipelines ask for 256 by default
            warnings.warn(f"{new} new tokens do not fit: these texts get up to {most}", stacklevel=3)
            new = most
        least = given.pop("min_length", 0) - width
        return new, max(0, given.pop("min_new_tokens", least))

    def _logits(self, tasks: Sequence[Task], written: Sequence[list[int]], width: int) -> Tensor:
        """Logits [B, width, V] of the generated positions, each given the tokens that were written before it."""
        rows = []
        for task, tokens in zip(tasks, written, strict=True):
            blocks = [[position] for position in task.given]
            blocks += task.blocks if task.decoding.strategy == "strided" else [[position] for position in task.order]
            order = torch.tensor([position for block in blocks for position in block])
            numbers = torch.tensor([number for number, block in enumerate(blocks, 1) for _ in block])
            known = torch.tensor(tokens).clamp(min=0)  # what was never written is in no token's context
            first = len(task.given)
            rows.append(self.model.logits(known[None], order, numbers)[0, first : first + width])
        return torch.stack(rows)


class _Watch:
    """Follows texts by position as they are written, for a streamer and stopping criteria.

    ``ids`` [B, N]: the prompts; ``pad``: what follows an ended text.
    """

    def __init__(self, ids: Tensor, pad: int, criteria: StoppingCriteriaList, streamer: Any) -> None:
        self._ids, self._pad, self._criteria, self._streamer = ids, pad, criteria, streamer
        self.written: list[list[int]] = []
        """All tokens of the texts, ``FREE`` where none was written."""

    def follow(self, tasks: Sequence[Task], model: ARMD) -> list[list[int]]:
        """Write the texts; returns their generated tokens."""
        if self._streamer is not None:
            self._streamer.put(self._ids.cpu())
        frontiers = [Frontier(task, model.config.eos_id) for task in tasks]
        texts: list[list[int]] = [[] for _ in tasks]
        done = [False] * len(tasks)
        for step in model.decode(tasks):
            for row, positions, tokens in zip(range(len(tasks)), *map(Tensor.tolist, step), strict=True):
                frontiers[row].push(positions, tokens)
            while not all(done) and self._column(tasks, frontiers, texts, done):
                pass
            if all(done):
                break
        if self._streamer is not None:
            self._streamer.end()
        self.written = [frontier.tokens for frontier in frontiers]
        return texts

    def _column(
        self, tasks: Sequence[Task], frontiers: Sequence[Frontier], texts: list[list[int]], done: list[bool]
    ) -> bool:
        """Give out the next token of every text that goes on; False if one of them is not written yet."""
        size = max(map(len, texts))
        places = [len(task.given) + size for task in tasks]
        if any(not over and at >= one.passed for over, at, one in zip(done, places, frontiers, strict=True)):
            return False
        column = []
        for row, (at, frontier) in enumerate(zip(places, frontiers, strict=True)):
            column.append(self._pad if done[row] else frontier.tokens[at])
            if not done[row]:
                texts[row].append(column[-1])
                done[row] = frontier.ended and at + 1 == frontier.passed
        tokens = torch.tensor(column, dtype=self._ids.dtype)
        if self._streamer is not None:
            self._streamer.put(tokens)
        if self._criteria:
            self._ids = torch.cat([self._ids, tokens.to(self._ids.device)[:, None]], dim=1)
            stopped = self._criteria(self._ids, None).tolist()
            done[:] = [over or stop for over, stop in zip(done, stopped, strict=True)]
        return True


_USUAL = {
    "max_new_tokens",
    "max_length",
    "min_new_tokens",
    "min_length",
    "max_time",
    "stop_strings",
    "do_sample",
    "num_return_sequences",
    "eos_token_id",
    "pad_token_id",
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
}
"""Settings of transformers that ``generate`` takes."""

_WITHOUT_EFFECT = {
    "bos_token_id",
    "use_cache",
    "cache_implementation",
    "cache_config",
    "compile_config",
    "disable_compile",
    "early_stopping",
    "length_penalty",
    "low_memory",
    "prefill_chunk_size",
    "remove_invalid_values",
    "renormalize_logits",
    "synced_gpus",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "assistant_tokenizer",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "target_lookbehind",
    "transformers_version",
    "_from_model_config",
}
"""Settings of transformers that concern how fast a text is written, or only beams and assistants."""

_NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "typical_p": 1,
    "guidance_scale": 1,
}
"""Values, beside 0, None, False and what is empty, that ask for nothing."""


def _is_off(value: Any, name: str = "") -> bool:
    """Whether an argument asks for nothing."""
    if isinstance(value, Tensor):
        return False
    return not value or (name in _NEUTRAL and value == _NEUTRAL[name])


def _tokens(ids: Any) -> tuple[int, ...]:
    """Token ids from a number, a list or a tensor; -1, which is no token, is left out."""
    return tuple(token for token in torch.as_tensor(ids).flatten().tolist() if token >= 0)


def _criteria(given: dict[str, Any], tokenizer: Any, own: Any) -> StoppingCriteriaList:
    """The caller's own criteria, and those of ``stop_strings`` and ``max_time``."""
    criteria = StoppingCriteriaList(own or [])
    strings, seconds = given.pop("stop_strings", None), given.pop("max_time", None)
    if strings:
        if tokenizer is None:
            raise InputError("stop_strings are found with a tokenizer: pass tokenizer= as well")
        criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=strings))
    if seconds is not None:
        criteria.append(MaxTimeCriteria(max_time=seconds))
    return criteria


def _scores(logits: Tensor, tasks: Sequence[Task], eos_id: int) -> tuple[Tensor, ...]:
    """Logits [B, T, V] as sampling uses them: after temperature and truncation, with log 0 for what was cut off."""
    rows = logits.clone()
    sampler = Sampler(len(tasks), logits.device)
    for row, task in enumerate(tasks):
        sampler.set(row, task.decoding)
        rows[row, : task.decoding.min_tokens, list(task.decoding.ends(eos_id))] = float("-inf")
    if tasks and tasks[0].decoding.temperature > 0:
        rows = sampler.probabilities(rows).log()
    return tuple(rows.unbind(1))
