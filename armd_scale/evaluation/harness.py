"""A model directory in EleutherAI's lm-evaluation-harness: ``--model armd --model_args pretrained=MODEL_DIR``.

Likelihoods are exact and left to right. Texts are generated with any decoding settings of the model.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from armd_scale import inference
from armd_scale.data import tokenizer as tokenizers
from armd_scale.errors import UserError
from armd_scale.inference import FREE, Decoding


@register_model("armd")
class ARMDHarness(TemplateLM):
    """``pretrained``: model directory; ``streams``, ``draft``: settings of ``generate_until``."""

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        batch_size: int | str = 16,
        dtype: str | None = None,
        streams: int = 1,
        draft: int = 0,
        max_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if dtype not in (None, "float32", "bfloat16"):
            raise UserError(f"dtype must be float32 or bfloat16, not {dtype}")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"batch_size must be a whole number of at least 1, not {batch_size}")
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
        self._tokenizer = tokenizers.load(pretrained, self._model.config.vocab_size)
        self._batch = min(int(batch_size), max_batch_size or int(batch_size))
        self._streams, self._draft, self._seed = streams, draft, seed

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
        return self._tokenizer.encode(string)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Sum of log p of each continuation given its context, and whether greedy decoding writes it."""
        longest, bos = self._model.config.length, self._model.config.bos_id
        texts = []
        for _names, context, continuation in requests:
            context = context[1:] if context[:1] == [bos] else context  # the model adds BOS
            if not 0 < len(continuation) <= longest:
                raise UserError(f"a continuation has {len(continuation)} tokens: this model takes 1 to {longest}")
            texts.append(([*context, *continuation][-longest:], len(continuation)))
        ranked = sorted(range(len(texts)), key=lambda index: -len(texts[index][0]))
        out: dict[int, tuple[float, bool]] = {}
        for start in tqdm(range(0, len(ranked), self._batch), desc="likelihoods", disable=disable_tqdm):
            group = ranked[start : start + self._batch]
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
        texts: list[str] = []
        for start in tqdm(range(0, len(requests), self._batch), desc="texts", disable=disable_tqdm):
            group = [request.args for request in requests[start : start + self._batch]]
            texts += self._generate(group, start)
        return texts

    def _generate(self, group: Sequence[tuple[str, dict[str, Any]]], first: int) -> list[str]:
        longest = self._model.config.length
        tasks, prompts = [], []
        for number, (context, settings) in enumerate(group):
            most = min(int(settings.get("max_gen_toks", 256)), longest // 2)  # leaves half of the length to the prompt
            sampled = settings.get("do_sample", settings.get("temperature", 0) > 0)
            decoding = Decoding(
                self._streams,
                self._draft,
                float(settings.get("temperature", 1.0)) if sampled else 0.0,
                int(settings.get("top_k", 0)),
                float(settings.get("top_p", 1.0)),
                float(settings.get("min_p", 0.0)),
                stop=True,
            )
            prompt = self._tokenizer.encode(context)[-(longest - most) :]
            prompts.append(prompt)
            tasks += self._model.plan([prompt + [FREE] * most], decoding, [self._seed + first + number])
        texts = []
        for (_, settings), prompt, tokens in zip(group, prompts, self._model.complete(tasks), strict=True):
            text = self._tokenizer.decode(tokens.tolist())[len(self._tokenizer.decode(prompt)) :]
            stops = settings.get("until", [])
            for stop in [stops] if isinstance(stops, str) else stops:
                text = text.split(stop)[0] if stop else text
            texts.append(text)
        return texts
