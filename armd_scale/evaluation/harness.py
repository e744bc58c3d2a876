"""A model directory in EleutherAI's lm-evaluation-harness: ``--model armd --model_args pretrained=MODEL_DIR``.

Likelihoods are exact and left to right. Texts are generated with any decoding settings of the model, which
``--gen_kwargs`` and the tasks name.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import lm_eval.models  # noqa: F401  (the harness registers its own models only if there are no others)
import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from armd_scale import inference
from armd_scale.data import chat
from armd_scale.data import tokenizer as tokenizers
from armd_scale.data.detokenizer import Detokenizer
from armd_scale.errors import UserError
from armd_scale.inference import FREE, Decoding, Frontier, Task

_BATCH = 16
"""Texts of a batch on a CPU with ``batch_size=auto``."""
_LARGEST_BATCH = 256
_TOKENS = 256
"""Tokens to generate for a task that does not say how many: the harness's default."""
_COUNTS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the number of tokens to generate. The last that is given counts: ``--gen_kwargs`` come behind the task's."""
_FIELDS = [field.name for field in dataclasses.fields(Decoding) if field.name != "stop"]
_NEUTRAL = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1,
    "length_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "use_cache": True,
}
"""Settings of other models that are accepted with the value that has no effect."""


class Generation(NamedTuple):
    """How a text of ``generate_until`` is generated."""

    tokens: int | None
    """Number of tokens to generate; None: the default."""
    stops: list[str]
    decoding: Decoding


def generation(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> Generation:
    """Read ``generation_kwargs``; null is a setting that is not given. ``defaults``: fields of ``Decoding``.

    Raises ``UserError`` for a setting that is unknown or has no effect, and ``InputError`` for a wrong value.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    counts = [int(given.pop(name)) for name in list(given) if name in _COUNTS]
    until = given.pop("until", [])
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    sampled = given.pop("do_sample", given.get("temperature", 0) > 0)
    fields = {**defaults, **{name: given.pop(name) for name in _FIELDS if name in given}}
    fields |= {name: int(fields[name]) for name in ("top_k", "streams", "draft") if name in fields}
    if not sampled:
        fields["temperature"] = 0.0
    for name, value in given.items():
        if name not in _NEUTRAL or value != _NEUTRAL[name]:
            raise UserError(
                f"the generation setting {name}={value} is not available: remove it from --gen_kwargs or the task; "
                f"settings: {', '.join((*_COUNTS, 'until', 'do_sample', *_FIELDS))}"
            )
    count = counts[-1] if counts else None
    if count is not None and count < 1:
        raise UserError(f"max_gen_toks must be at least 1, not {count}")
    return Generation(count, stops, Decoding(**fields, stop=True))


@register_model("armd")
class ARMDHarness(TemplateLM):
    """``pretrained``: model directory; ``streams``, ``draft``: settings of ``generate_until``.

    ``batch_size``: a number, or ``auto`` for the largest batch that fits into the memory of the GPU.
    ``trust_remote_code`` has no effect: a model directory of this project runs no code of its own here.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        device: str | None = None,
        batch_size: int | str = _BATCH,
        dtype: str | None = None,
        streams: int = 1,
        draft: int = 0,
        max_batch_size: int | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if pretrained is None or unknown:
            what = f"has no '{next(iter(unknown))}'" if unknown else "needs pretrained=MODEL_DIR"
            raise UserError(f"--model_args of armd {what}: use pretrained, device, dtype, streams, draft, seed")
        if dtype not in (None, "float32", "bfloat16"):
            raise UserError(f"dtype must be float32 or bfloat16, not {dtype}")
        auto = str(batch_size).partition(":")[0] == "auto"
        if not auto and (not str(batch_size).isdigit() or int(batch_size) < 1):
            raise UserError(f"batch_size must be auto or a whole number of at least 1, not {batch_size}")
        precision = getattr(torch, dtype) if dtype else None
        if device == "cuda:0" and not torch.cuda.is_available():  # lm_eval's default on every machine
            print("no GPU: the model runs on the CPU", file=sys.stderr)
            device = None
        self._model = inference.load(pretrained, device or "cpu", precision)
        if not self._model.config.traits.exact:
            label = self._model.config.traits.label
            raise UserError(
                f"{pretrained} is an {label} model, which has no exact likelihood to rank answers by: "
                "choose another model"
            )
        self._tokenizer = tokenizers.load(pretrained, self._model.config.vocab_size, segments=False)
        self._template, self._chats = chat.load(self._tokenizer), False
        limit = int(max_batch_size or _LARGEST_BATCH)
        self._batch = self._fitting_batch(limit) if auto else min(int(batch_size), int(max_batch_size or batch_size))
        self._defaults, self._seed = {"streams": streams, "draft": draft}, seed

    def _fitting_batch(self, limit: int) -> int:
        """The largest power of 2 of texts of the model's length that fit into memory; ``_BATCH`` on a CPU."""
        if self._model.device.type == "cpu":
            return min(_BATCH, limit)
        size = 1 << limit.bit_length() - 1
        text = [0] * (self._model.config.length - 1) + [FREE]
        while size > 1:
            try:
                self._model.complete(self._model.plan([text] * size))
                self._loglikelihood_tokens([(("", ""), text[:1], text[:-1])] * size, True, batch=size)
                break
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                size //= 2
        print(f"batch size: {size}", file=sys.stderr)
        return size

    @property
    def eot_token_id(self) -> int:
        return self._model.config.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._model.config.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.path.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; in chats, the control tokens that the template writes are tokens."""
        return self._tokenizer.encode_with_special(string) if self._chats else self._tokenizer.encode(string)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._template.source if chat_template and self._template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self._template is None:
            raise UserError(f"{self._tokenizer.path.parent} has no chat template: leave out --apply_chat_template")
        self._chats = True
        return self._template.render(chat_history, add_generation_prompt)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        batch: int | None = None,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Sum of log p of each continuation given its context, and whether greedy decoding writes it."""
        longest, batch = self._model.config.length, batch or self._batch
        texts, cut = [], 0
        for _names, context, continuation in requests:
            if not 0 < len(continuation) <= longest:
                raise UserError(f"a continuation has {len(continuation)} tokens: this model takes 1 to {longest}")
            whole = [*self._model.without_bos(context), *continuation]
            cut += len(whole) > longest
            texts.append((whole[-longest:], len(continuation)))
        self._report_cut(cut, len(texts))
        ranked = sorted(range(len(texts)), key=lambda index: -len(texts[index][0]))
        out: dict[int, tuple[float, bool]] = {}
        for start in tqdm(range(0, len(ranked), batch), desc="likelihoods", disable=disable_tqdm):
            group = ranked[start : start + batch]
            size = len(texts[group[0]][0])
            # Padding behind a shorter text does not change its scores: rows see earlier rows only.
            rows = torch.tensor([texts[index][0] + [0] * (size - len(texts[index][0])) for index in group])
            rows = rows.to(self._model.device)
            natural = torch.arange(1, size + 1, device=rows.device).expand_as(rows)
            hidden = self._model.whole(rows, natural, natural)
            for row, index in enumerate(group):
                tokens, count = texts[index]
                scored = slice(len(tokens) - count, len(tokens))
                scores = self._model.predict(hidden[row, scored]).to(self._model.precise).log_softmax(-1)
                wanted = rows[row, scored, None]
                greedy = bool((scores.argmax(-1) == wanted[:, 0]).all())
                out[index] = float(scores.gather(1, wanted).double().sum()), greedy
        return [out[index] for index in range(len(texts))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts in windows of the model's length; windows overlap by at least a token of context."""
        totals = []
        for request in requests:
            tokens = self._tokenizer.encode(request.args[0])
            windows = utils.get_rolling_token_windows(
                tokens, self.prefix_token_id, max_seq_len=self._model.config.length - 1, context_len=1
            )
            pairs = [(("", ""), *utils.make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations of contexts, up to a stop string, EOS or ``max_gen_toks``."""
        longest, cut = self._model.config.length, 0
        tasks: list[tuple[Task, list[str]]] = []
        for number, request in enumerate(requests):
            context, settings = request.args
            wanted, stops, decoding = generation(settings, self._defaults)
            most = wanted or min(_TOKENS, longest // 2)
            if most >= longest:
                raise UserError(
                    f"max_gen_toks={most} leaves no room for a prompt: this model takes {longest} tokens in all; "
                    f"lower it with --gen_kwargs max_gen_toks=N"
                )
            prompt = self._model.without_bos(self.tok_encode(context))
            cut += len(prompt) > longest - most
            row = prompt[-(longest - most) :] + [FREE] * most
            tasks += [(task, stops) for task in self._model.plan([row], decoding, [self._seed + number])]
        self._report_cut(cut, len(tasks))
        # A batch has one strategy of decoding, and texts of similar length.
        ranked = sorted(range(len(tasks)), key=lambda n: (tasks[n][0].decoding.strategy, -len(tasks[n][0].tokens)))
        batches: list[list[int]] = []
        for index in ranked:
            strategy = tasks[index][0].decoding.strategy
            full = not batches or len(batches[-1]) == self._batch
            if full or tasks[batches[-1][0]][0].decoding.strategy != strategy:
                batches.append([])
            batches[-1].append(index)
        texts: dict[int, str] = {}
        for batch in tqdm(batches, desc="texts", disable=disable_tqdm):
            texts |= zip(batch, self._generate([tasks[index] for index in batch]), strict=True)
        return [texts[index] for index in range(len(tasks))]

    def _generate(self, batch: Sequence[tuple[Task, list[str]]]) -> list[str]:
        """The generated texts of a batch, which ends when all its texts have ended."""
        tasks = [task for task, _ in batch]
        frontiers = [Frontier(task, self._model.config.eos_id) for task in tasks]
        arriving = [
            Detokenizer(self._tokenizer, task.tokens[: task.tokens.index(FREE)], stops) for task, stops in batch
        ]
        texts, open_ = [""] * len(batch), set(range(len(batch)))
        for step in self._model.decode(tasks):
            for index, row in enumerate(zip(step.positions.tolist(), step.tokens.tolist(), strict=True)):
                if index in open_:
                    fresh = frontiers[index].push(*row)
                    texts[index] += arriving[index].add(fresh, frontiers[index].ended)
                    if frontiers[index].ended or arriving[index].stopped:
                        open_.discard(index)
            if not open_:
                break
        return texts

    def _report_cut(self, cut: int, count: int) -> None:
        if cut:
            longest = self._model.config.length
            print(f"{cut} of {count} texts are longer than {longest} tokens: their beginning is cut", file=sys.stderr)
