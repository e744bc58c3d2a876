"""The standalone model: likelihoods in any order, and text in several streams at once.

- ``load``: a model directory (``config.json``, safetensors) -> ``ARMD``;
- ``ARMD.nll``, ``ARMD.logits``: one pass over whole texts, any generation order and blocks;
- ``ARMD.conditional_nll``: any part of a text given any other;
- ``ARMD.acceptance``: how often exact parallel decoding accepts what draft rows propose;
- ``ARMD.bound``: what objectives without an exact likelihood have instead;
- ``ARMD.generate``, ``ARMD.fill``, ``ARMD.decode``: text after prompts, text in gaps, and both step by step.
"""

import dataclasses
import json
import operator
import time
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from armd_scale.decoding.lanes import FREE, LOGIT_ROWS, STRATEGIES, Lockstep, Step, Strided, Task, task
from armd_scale.decoding.network import MODEL_TYPE, ARMDConfig, InputError, Network
from armd_scale.decoding.sampling import AUTO, Decoding, seeds
from armd_scale.objectives.interface import Inference
from armd_scale.traits import TRAITS

Texts: TypeAlias = Tensor | Sequence[int] | Sequence[Sequence[int]]
"""Token ids of one text, or of several texts, which may differ in length."""

_LENGTHS = 1, 2, 3, 4, 6, 8
"""Drafts among which ``ARMD.draft_length`` chooses."""
_TRIAL, _TRIAL_TEXTS = 64, 8
"""Tokens and number of the texts that it writes."""
_GAIN = 1.05
"""Smallest gain in speed for which it drafts."""
_MAY_BE_0 = "bos_id", "eos_id", "two_stream_layers", "head_dim", "adapter_rank"
_LOOK = 4  # steps between two checks of what an accelerator has finished


class ARMD(Network):
    """Auto-regressive masked diffusion language model, or a model of another objective of its shape.

    Models of one causal stream score and write left to right only; those without an exact likelihood have ``bound``.
    """

    _draft_length: int | None = None

    @property
    def objective(self) -> Inference:
        """Scoring and decoding of the model's objective."""
        return Inference.known[self.config.objective]

    # Likelihood ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def nll(self, tokens: Tensor, order: Tensor | None = None, block_ids: Tensor | None = None) -> Tensor:
        """-log p of every token given the tokens of earlier blocks, in nats, at original positions: [B, N].

        ``tokens`` [B, N]: text order, no BOS, N up to ``config.length``. ``order`` [B, N] or [N]: a permutation
        of 1..N, the position generated n-th (default: left to right). ``block_ids`` [B, N] or [N]: B(n) >= 1
        along the order, never decreasing (default: one token a block). Raises ``InputError``.
        """
        tokens, order, blocks = self._layout(tokens, order, block_ids)
        along_order = self._nll(tokens.gather(1, order - 1), order, blocks)
        return torch.zeros_like(along_order).scatter(1, order - 1, along_order)

    @torch.no_grad()
    def logits(self, tokens: Tensor, order: Tensor | None = None, block_ids: Tensor | None = None) -> Tensor:
        """Logits that predict every token, at original positions: [B, N, V]; arguments as for ``nll``."""
        tokens, order, blocks = self._layout(tokens, order, block_ids)
        along_order = self.predict(self.whole(tokens.gather(1, order - 1), order, blocks))
        return torch.zeros_like(along_order).scatter(1, (order - 1)[..., None].expand_as(along_order), along_order)

    @torch.no_grad()
    def conditional_nll(self, tokens: Texts, targets: Sequence[int], given: Sequence[int] = ()) -> Tensor:
        """-log p of the tokens at ``targets`` given those at ``given``, in nats: [B, len(targets)].

        Positions count from 1. The targets are generated one after the other in the order in which they are named;
        their sum is the joint -log p in that order. Positions in neither are unknown, and may hold -1. Raises
        ``InputError``.
        """
        self._check_exact()
        rows, targets, given = self._rows(tokens, free=True), list(targets), sorted(given)
        count = min(len(row) for row in rows)
        used = [*given, *targets]
        if not targets or len({len(row) for row in rows}) > 1:
            raise InputError("name at least one target" if not targets else "the texts must be of one length")
        if len(set(used)) < len(used) or not all(1 <= position <= count for position in used):
            raise InputError(f"targets and given must be different positions from 1 to {count}")
        if any(row[position - 1] == FREE for row in rows for position in used):
            raise InputError("targets and given must have tokens; only other positions may hold -1")
        order = torch.tensor(used, device=self.device).expand(len(rows), -1)
        known = torch.tensor(rows, device=self.device).gather(1, order - 1)
        blocks = torch.arange(1, len(used) + 1, device=self.device).expand_as(order)
        if not self.config.traits.any_order:
            self._left_to_right(order, blocks)
        return self._nll(known, order, blocks)[:, len(given) :]

    @torch.no_grad()
    def acceptance(self, tokens: Tensor, lags: int) -> Tensor:
        """Probability that the token of a draft row is accepted, left to right: [lags, B, N - lags].

        Entry [k - 1, b, n]: sum over v of min(p(v), q(v)), where the draft row's law p knows the first n tokens of text
        b, the law q of one token a block knows k more, and both predict the token after those. ``tokens`` [B, N]: text
        order, no BOS. For models with draft rows. Raises ``InputError``.
        """
        if not self.config.traits.any_order:
            raise InputError(f"{self.config.traits.label} models have no draft rows")
        tokens = self._texts(tokens)
        count = tokens.shape[1]
        if not 1 <= lags < count:
            raise InputError(f"lags must be from 1 to {count - 1}, one less than the tokens of a text, not {lags}")
        places = torch.arange(1, count + 1, device=self.device).expand_as(tokens)
        shared = torch.empty(lags, len(tokens), count - lags, dtype=self.precise)
        for row, text in enumerate(tokens[:, None]):
            at = places[row][None]
            for lag in range(1, lags + 1):
                hidden = self.whole(text, at, at, (at + lag).clamp(max=count))[0]
                judged, ahead = hidden[lag : lag + count - lags], hidden[count : 2 * count - lags]
                for start in range(0, count - lags, LOGIT_ROWS):
                    part = slice(start, start + LOGIT_ROWS)
                    laws = [self.predict(rows[part]).to(self.precise).softmax(-1) for rows in (judged, ahead)]
                    shared[lag - 1, row, part] = torch.minimum(*laws).sum(-1)
        return shared

    @torch.no_grad()
    def bound(self, tokens: Tensor, draws: int = 1, seed: int | Sequence[int] = 0) -> Tensor:
        """Unbiased estimates of a bound of -log p, in nats: [B], the mean over ``draws`` of noise.

        For objectives without an exact likelihood. ``tokens`` [B, N]: text order, no BOS. A text's draws follow from
        its seed. Raises ``InputError``.
        """
        if draws < 1:
            raise InputError(f"draws must be at least 1, not {draws}")
        tokens = self._texts(tokens)
        return self.objective.bound(self, tokens, draws, seeds(seed, len(tokens)))

    def _nll(self, tokens: Tensor, at: Tensor, blocks: Tensor) -> Tensor:
        """-log p along the order, [B, N]."""
        hidden = self.whole(tokens, at, blocks)
        parts = [
            -self.predict(rows).to(self.precise).log_softmax(dim=-1).gather(-1, wanted[:, None])[:, 0]
            for rows, wanted in zip(
                hidden.flatten(0, 1).split(LOGIT_ROWS), tokens.flatten().split(LOGIT_ROWS), strict=True
            )
        ]
        return torch.cat(parts).view(tokens.shape)

    # Decoding --------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Texts | None = None,
        length: int | None = None,
        decoding: Decoding | None = None,
        seed: int | Sequence[int] = 0,
        *,
        batch: int = 1,
        new_tokens: int | None = None,
    ) -> Tensor:
        """Texts that continue prompts, [B, length]; shorter texts are padded with EOS.

        ``prompts``: one, or several, which may differ in length; without any, ``batch`` texts from nothing. A BOS at
        the head of a prompt, as tokenizers write it, is the BOS of the text: it is returned and counts for nothing.
        ``length``: tokens of a text, prompt included (default: the model's length), or ``new_tokens`` behind each
        prompt. ``seed``: one for the batch, or one per sequence. A sequence depends on its own prompt, seed and
        ``decoding`` alone; row 0 of a batch with one seed is the sequence of that seed. Raises ``InputError``.
        """
        return self._write(self._prompts(prompts, length, batch, new_tokens), decoding, seed)

    def fill(
        self,
        tokens: Texts,
        decoding: Decoding | None = None,
        seed: int | Sequence[int] = 0,
        order: Sequence[int] | None = None,
    ) -> Tensor:
        """Texts with their free positions (token -1) generated given all other tokens: [B, N].

        The free positions are written left to right, by streams over them, or one after the other in ``order``. A BOS
        at the head of a text is returned and is position 0. Raises ``InputError``.
        """
        return self._write(self._rows(tokens, free=True, headed=True), decoding, seed, order)

    def without_bos(self, tokens: Sequence[int]) -> list[int]:
        """Tokens of a prompt without a BOS at its head: every text begins with BOS, which is not one of its tokens."""
        return list(tokens[1:] if tokens[:1] == [self.config.bos_id] else tokens)

    def _write(
        self,
        rows: list[list[int]],
        decoding: Decoding | None,
        seed: int | Sequence[int],
        order: Sequence[int] | None = None,
    ) -> Tensor:
        """Texts with their free positions generated, behind the BOS of those that have one, padded with EOS."""
        bare = [self.without_bos(row) for row in rows]
        heads = [row[: len(row) - len(text)] for row, text in zip(rows, bare, strict=True)]
        texts = self.complete(self.plan(bare, decoding, seed, order))
        headed = [torch.cat([text.new_tensor(head), text]) for head, text in zip(heads, texts, strict=True)]
        return self._filled_up(headed, max(map(len, rows)))

    def plan(
        self,
        texts: Sequence[Sequence[int]],
        decoding: Decoding | None = None,
        seed: int | Sequence[int] = 0,
        order: Sequence[int] | None = None,
    ) -> list[Task]:
        """Tasks for ``decode``: texts in which -1 is to be generated. Raises ``InputError``."""
        decoding = decoding or Decoding()
        rows = self._rows(texts, free=True)
        keys = seeds(seed, len(rows))
        return [
            task(row, key, self._decoding(row, decoding, order), order) for row, key in zip(rows, keys, strict=True)
        ]

    @torch.no_grad()
    def decode(self, tasks: Sequence[Task]) -> Iterator[Step]:
        """Yield the steps that complete the tasks."""
        if not tasks:
            return
        kinds = {task.decoding.strategy for task in tasks}
        if len(kinds) > 1:
            raise InputError(f"tasks of different strategies cannot share their steps: {', '.join(sorted(kinds))}")
        strategy, look = STRATEGIES[kinds.pop()], 1 if self.device.type == "cpu" else _LOOK
        stopping = any(task.decoding.stop for task in tasks)
        plans = {(tuple(task.order), tuple(map(len, task.blocks)), len(task.tokens)) for task in tasks}
        if strategy is Strided and len(plans) == 1 and not stopping and self.device.type == "cpu":
            lockstep = Lockstep(self, tasks)
            for _ in lockstep.blocks:
                yield lockstep.step()
            return
        slots = max(len(task.tokens) for task in tasks) + 1
        lanes = strategy(self, len(tasks), slots, max(strategy.targets(task.decoding) for task in tasks))
        lanes.admit(dict(enumerate(tasks)))
        step = 0
        while not (isinstance(lanes, Strided) and lanes.exhausted):
            looks = stopping or not isinstance(lanes, Strided)
            if looks and step % look == 0 and bool(lanes.finished().all()):
                return
            yield lanes.step()
            step += 1

    def complete(self, tasks: Sequence[Task]) -> list[Tensor]:
        """The finished texts; with ``stop``, a text ends with its first generated EOS or other end."""
        size = max((len(one.tokens) for one in tasks), default=0)
        text = torch.zeros(len(tasks), size + 1, dtype=torch.long)
        for row, planned in enumerate(tasks):
            text[row, 1 : len(planned.tokens) + 1] = torch.tensor(planned.tokens)
        text = text.to(self.device)
        for positions, tokens in self.decode(tasks):
            text.scatter_(1, positions, tokens)  # column 0 takes the writes of padding
        texts = []
        for written, planned in zip(text.cpu(), tasks, strict=True):
            stop = len(planned.tokens) + 1
            ends = planned.decoding.ends(self.config.eos_id)
            if ends:
                stop = min([stop, *(p + 1 for p in planned.order if int(written[p]) in ends)])
            texts.append(written[1:stop].to(self.device))
        return texts

    def _filled_up(self, texts: list[Tensor], size: int) -> Tensor:
        """Texts as rows, padded with EOS."""
        out = torch.full((len(texts), size), self.config.eos_id, device=self.device)
        for row, text in zip(out, texts, strict=True):
            row[: len(text)] = text
        return out

    @torch.no_grad()
    def draft_length(self) -> int:
        """The draft with which one text at a time is written fastest on this device, left to right; 0: none.

        Compares the time of a pass with the tokens that it writes by the acceptance on texts of the model's own. The
        first call measures, for some seconds. Another device, or another measurement, may find another length; the
        distribution of texts is the same with all. Raises ``InputError``.
        """
        if self._draft_length is None:
            count = min(_TRIAL, self.config.length)
            texts = self.generate(length=count, batch=_TRIAL_TEXTS)
            reached = self.acceptance(texts, min(_LENGTHS[-1], count - 1)).cumprod(0).mean((1, 2)).tolist()
            speeds = {
                length: (1 + sum(reached[:length])) / self._seconds_of_a_pass(length, count)
                for length in (0, *(length for length in _LENGTHS if length < count))
            }
            best = max(speeds, key=lambda length: speeds[length])
            self._draft_length = best if speeds[best] > _GAIN * speeds[0] else 0
        return self._draft_length

    def _seconds_of_a_pass(self, draft: int, count: int) -> float:
        """Median over the passes that write a text of ``count`` tokens."""
        seconds = []
        started = time.perf_counter()
        for _ in self.decode(self.plan([[FREE] * count], Decoding(draft=draft))):
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
        return sorted(seconds)[len(seconds) // 2]

    # Checks ----------------------------------------------------------------------------------------------------

    def _check_exact(self) -> None:
        if not self.config.traits.exact:
            raise InputError(f"{self.config.traits.label} models have no exact likelihood: use bound")

    def _decoding(self, row: list[int], decoding: Decoding, order: Sequence[int] | None) -> Decoding:
        """The decoding of a text with the objective's defaults. Raises ``InputError``."""
        label = self.config.traits.label
        decoding = self.objective.complete(decoding, row.count(FREE))
        if decoding.draft == AUTO:
            decoding = dataclasses.replace(decoding, draft=self.draft_length())
        if decoding.stop_ids:
            self._check_tokens(0, max(decoding.stop_ids))
        if not self.config.traits.any_order:
            if FREE in row and any(token != FREE for token in row[row.index(FREE) :]):
                raise InputError(f"{label} models cannot fill gaps: leave the free tokens at the end")
            if order is not None and sorted(order) != list(order):
                raise InputError(f"{label} models write left to right: leave out order")
        return decoding

    def _texts(self, tokens: Tensor) -> Tensor:
        if tokens.dim() != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise InputError(f"tokens must be whole numbers [batch, length], not {tokens.dtype} {list(tokens.shape)}")
        tokens, count = tokens.to(self.device, torch.long), tokens.shape[1]
        self._check_length(count)
        if tokens.numel():
            self._check_tokens(int(tokens.min()), int(tokens.max()))
        return tokens

    def _layout(self, tokens: Tensor, order: Tensor | None, block_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        self._check_exact()
        tokens = self._texts(tokens)
        count = tokens.shape[1]
        natural = torch.arange(1, count + 1, device=self.device)
        order = _like(tokens, order, natural, "order")
        blocks = _like(tokens, block_ids, natural, "block_ids")
        if not bool((order.sort(dim=1).values == natural).all()):
            raise InputError(f"order must be a permutation of 1..{count} in every row")
        if bool((blocks[:, :1] < 1).any()) or bool((blocks[:, 1:] < blocks[:, :-1]).any()):
            raise InputError("block_ids must start at 1 or more and never decrease along the order")
        if not self.config.traits.any_order:
            self._left_to_right(order, blocks)
        return tokens, order, blocks

    def _left_to_right(self, at: Tensor, blocks: Tensor) -> None:
        """``InputError`` unless rows are a text's first tokens in their order, one a block."""
        natural = torch.arange(1, at.shape[1] + 1, device=at.device)
        if not bool((at == natural).all()) or bool((blocks[:, 1:] == blocks[:, :-1]).any()):
            raise InputError(f"{self.config.traits.label} models score left to right only, one token a block")

    def _prompts(
        self, prompts: Texts | None, length: int | None, batch: int, new_tokens: int | None
    ) -> list[list[int]]:
        """Texts that begin with the prompts and are free behind them."""
        if length is not None and new_tokens is not None:
            raise InputError("give length or new_tokens, not both")
        if length is None and new_tokens is None:
            length = self.config.length
        if length is not None and not 1 <= length <= self.config.length:
            raise InputError(f"length {length} does not fit this model: choose 1 to {self.config.length}")
        rows = [[] for _ in range(batch)] if prompts is None else self._rows(prompts, empty=True, headed=True)
        for row in rows:
            given = len(self.without_bos(row))
            size = given + (new_tokens or 0) if length is None else length
            if new_tokens is not None and new_tokens < 0:
                raise InputError(f"new_tokens must be 0 or more, not {new_tokens}")
            if given > size or size > self.config.length:
                raise InputError(
                    f"the prompt has {given} tokens but the text may have {min(size, self.config.length)}: shorten "
                    f"it or change the length (this model: up to {self.config.length})"
                    if new_tokens is None
                    else f"a prompt of {given} tokens and {new_tokens} new ones do not fit this model: up to "
                    f"{self.config.length} together"
                )
            row += [FREE] * (size - given)
        if not any(self.without_bos(row) for row in rows):
            raise InputError("there is nothing to generate: no text, or none with a token")
        return rows

    def _rows(self, texts: Texts, free: bool = False, empty: bool = False, headed: bool = False) -> list[list[int]]:
        """Texts as lists, each token in the vocabulary (or -1 where ``free``); ``headed``: BOS may precede them."""
        wrong = "texts must be whole numbers, one list or several"
        values: Any = texts.tolist() if isinstance(texts, Tensor) else texts
        try:
            values = list(values)
            if not values or not isinstance(values[0], Iterable):
                values = [values]
            rows = [[operator.index(token) for token in row] for row in values]
        except TypeError as error:
            raise InputError(wrong) from error
        for row in rows:
            count = len(self.without_bos(row) if headed else row)
            if count or not empty:
                self._check_length(count)
            known = [token for token in row if not (free and token == FREE)]
            if known:
                self._check_tokens(min(known), max(known))
        return rows

    def _check_length(self, count: int) -> None:
        if not 1 <= count <= self.config.length:
            raise InputError(f"a text of {count} tokens does not fit this model: it takes 1 to {self.config.length}")

    def _check_tokens(self, least: int, most: int) -> None:
        if least < 0 or most >= self.config.vocab_size:
            raise InputError(
                f"token {least if least < 0 else most} is not in the vocabulary of {self.config.vocab_size}: was "
                "another tokenizer used?"
            )


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


def load(path: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None) -> ARMD:
    """Load a model directory. ``dtype``: a type or its name; None keeps the stored type. Raises ``InputError``."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is not a model directory: config.json is missing; export it with `armd export`")
    kinds = {None: None} | {name: getattr(torch, name) for name in ("float32", "bfloat16", "float64")}
    name = str(dtype).removeprefix("torch.") if dtype is not None else None
    if name not in kinds:
        raise InputError(f"a model cannot run in {name}: choose float32, bfloat16 or float64")
    device = check_device(device)
    config = read_config(folder / "config.json")
    weights = _read_weights(folder)
    with torch.device("meta"):
        model = ARMD(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if wanted != found:
        wrong = sorted(set(wanted.items()) ^ set(found.items()))[0][0]
        raise InputError(
            f"the weights in {folder} do not fit config.json: {wrong} is {found.get(wrong, 'missing')}, "
            f"expected {wanted.get(wrong, 'nothing')}; export it again"
        )
    for parameter, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"the weights in {folder} are damaged: {parameter} is not finite; export it again")
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval().to(device=device, dtype=kinds[name])


def check_device(device: str | torch.device) -> torch.device:
    """The device; ``InputError`` if it is not available."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found).cpu()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise InputError(f"device {device} is not available or cannot run a model; use device='cpu'") from error
    return found


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
            raise InputError(f"{folder} is not a model directory: {name} is missing; export it with `armd export`")
        try:
            weights |= load_file(folder / name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{folder / name} cannot be read: {error}; export the model again") from error
    # transformers names them so when it saves a model.
    return {name.removeprefix("model."): tensor for name, tensor in weights.items()}


_CHOICES = {
    "norm": ("layernorm", "rmsnorm"),
    "mlp": ("gelu", "swiglu"),
    "prefix_kernel": ("gaussian", "sinusoid", "learned"),
    "prefix_scale": ("none", "sqrt", "mean"),
    "prefix_place": ("target", "before"),
    "model_type": (MODEL_TYPE,),
    "objective": tuple(TRAITS),
}


def read_config(path: Path) -> ARMDConfig:
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
        if name == "prefix_width":
            value, kind = min(value) if isinstance(value, list) and value else value, float
        accepted = (int, float) if kind is float else typing.get_origin(kind) or kind
        right = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
        if right and kind in (int, float):
            right = value >= 0 if name in _MAY_BE_0 else value > 0
        if not right or value not in _CHOICES.get(name, (value,)):
            raise InputError(f"{wrong}: {name} is {value!r}")
    c = config
    fits = c.hidden % (1 if c.head_dim else c.heads) == c.head_size % 2 == c.heads % c.kv_heads == c.prefix_dim % 2 == 0
    fits &= (c.two_stream_layers > 0) == (c.traits.streams == 2)
    if not fits or c.two_stream_layers > c.layers or max(c.bos_id, c.eos_id) >= c.vocab_size:
        raise InputError(f"{wrong}: its sizes contradict each other")
    return config
