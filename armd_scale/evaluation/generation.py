"""Quality of generated texts: perplexity under a judge, entropy, repetition and sameness, with their standard errors.

Protocol (docs/howto/evaluation.md): texts are generated from nothing at temperature 1 without truncation; the judge is
named; a low perplexity counts only beside an entropy like that of real text.
"""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import yaml

from armd_scale.errors import UserError
from armd_scale.evaluation.likelihood import cut, units
from armd_scale.evaluation.models import open_model
from armd_scale.inference import ARMD, FREE, Decoding, Frontier
from armd_scale.run_directory import RunDirectory

JUDGE = "ar"
"""Objective of the runs that judge texts unless another judge is named."""


class Judge(Protocol):
    """A language model that scores texts left to right."""

    name: str

    def nll(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        """-log p of each text in nats, and the number of the judge's tokens."""
        ...


class OwnJudge:
    """A model of this project, left to right, which is exact: ``armd`` or, as a rule, ``ar``."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self._model, self._tokenizer = open_model(path, device)
        traits = self._model.config.traits
        if not traits.exact:
            raise UserError(f"{path} is an {traits.label} model, which has no exact likelihood: name another judge")
        self.name = f"{path.name} ({traits.label}, left to right)"

    def nll(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        parts = [cut(tokens, self._model.config.length) for tokens in self._tokenizer.encode_batch(list(texts))]
        # Chunks of one length go side by side.
        ranked = sorted(((row, part) for row, one in enumerate(parts) for part in one), key=lambda pair: len(pair[1]))
        totals = [0.0] * len(texts)
        for unit in units([part for _, part in ranked]):
            nll = self._model.nll(torch.from_numpy(unit.tokens)).double().sum(1).tolist()
            for (row, _), value in zip(ranked[unit.first :], nll, strict=False):
                totals[row] += value
        return [(total, sum(map(len, one))) for total, one in zip(totals, parts, strict=True)]


class HuggingFaceJudge:
    """A causal language model of transformers, such as GPT-2, from a local directory; BOS before each text."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise UserError("a judge of transformers needs it: pip install -c constraints.txt -e '.[eval]'") from error
        self.name = folder.name
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder))
            self._model = AutoModelForCausalLM.from_pretrained(str(folder)).eval().to(device)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is no causal language model: {error}") from error
        ends = [self._tokenizer.bos_token_id, self._tokenizer.eos_token_id]
        self._bos = next((token for token in ends if token is not None), None)
        if self._bos is None:
            raise UserError(f"{folder} has neither a BOS nor an EOS token, so that no text could begin")
        self._longest = getattr(self._model.config, "max_position_embeddings", 2048) - 1

    @torch.no_grad()
    def nll(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        return [self._one(text) for text in texts]

    def _one(self, text: str) -> tuple[float, int]:
        tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        total = 0.0
        for chunk in cut(tokens, self._longest):
            ids = torch.tensor([[self._bos, *chunk.tolist()]], device=self._model.device)
            scores = self._model(ids).logits[0, :-1].double().log_softmax(-1)
            total -= float(scores.gather(1, ids[0, 1:, None]).sum())
        return total, len(tokens)


def load_judge(path: Path, device: str = "cpu") -> Judge:
    """The judge in a directory: a model or a run of this project, or a model of transformers. Raises ``UserError``."""
    if not (path / "config.json").is_file() and not RunDirectory(path).exists():
        raise UserError(f"there is no judge in {path}: name a model directory or a run directory")
    foreign = (path / "config.json").is_file() and not (path / "modeling_armd.py").is_file()
    return HuggingFaceJudge(path, device) if foreign else OwnJudge(path, device)


def find_judge(model: Path) -> Path:
    """The best left-to-right run beside the run that a model comes from; ``UserError`` when there is none.

    ``model``: a run directory, or a directory inside one.
    """
    own = RunDirectory.around(model)
    beside = map(RunDirectory, own.path.resolve().parent.iterdir()) if own else ()
    scores: dict[Path, float] = {}
    for run in beside:
        if own is None or run.path == own.path.resolve() or not run.exists():
            continue
        found = [record for record in run.metrics() if "heldout_left_to_right" in record]
        chosen = yaml.safe_load(run.config_path.read_text(encoding="utf-8")) or {}
        if found and chosen.get("objective") == JUDGE and run.complete_checkpoints():
            scores[run.path] = found[-1]["heldout_left_to_right_bits_per_byte"]
    if not scores:
        raise UserError(f"there is no judge beside the model: train a run with objective={JUDGE}, or use --judge")
    return min(scores, key=lambda run: scores[run])


def ways(model: ARMD, streams: Sequence[int], free: int) -> dict[int, Decoding]:
    """How a model writes ``free`` tokens, by the number of tokens a step (or their mean)."""
    return model.objective.ways(streams, free)


@dataclass(frozen=True)
class Sample:
    """Texts of one way of decoding."""

    tokens: list[list[int]]
    tokens_per_second: float
    tokens_per_pass: float
    """Tokens of one text written in a pass."""


def sample(model: ARMD, decoding: Decoding, count: int, length: int, batch: int, seed: int = 0) -> Sample:
    """``count`` texts of ``length`` tokens from nothing, ``batch`` at a time; text n has the seed ``seed`` + n."""
    tokens: list[list[int]] = []
    seconds, passes, made = 0.0, 0, 0
    while len(tokens) < count:
        keys = [seed + len(tokens) + row for row in range(min(batch, count - len(tokens)))]
        started = time.perf_counter()
        tasks = model.plan([[FREE] * length] * len(keys), decoding, keys)
        frontiers = [Frontier(task, model.config.eos_id) for task in tasks]
        for step in model.decode(tasks):
            passes += 1
            for frontier, *written in zip(frontiers, step.positions.tolist(), step.tokens.tolist(), strict=True):
                frontier.push(*written)
        seconds += time.perf_counter() - started
        made += length
        tokens += [frontier.tokens for frontier in frontiers]
    return Sample(tokens, len(tokens) * length / seconds, made / passes)


@dataclass(frozen=True)
class Quality:
    """Figures of a set of texts; ``_se`` is the standard error, over texts, of the figure before it."""

    texts: int
    perplexity: float
    """exp of the judge's nats per token, all texts together."""
    perplexity_se: float
    entropy: float
    """Entropy of the tokens of one text, in nats, mean over texts."""
    entropy_se: float
    distinct_1: float
    distinct_2: float
    distinct_3: float
    """Different n-grams of a text over its n-grams, mean over texts."""
    self_bleu: float | None
    """BLEU-4 of a text against others of the set, from 0 to 100, mean over texts: how alike they are. None without
    sacrebleu."""
    self_bleu_se: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"entropy_bits": self.entropy / math.log(2)}


def quality(texts: Sequence[str], tokens: Sequence[Sequence[int]], judge: Judge) -> Quality:
    """Score texts, given also as tokens of the model that made them. Raises ``UserError`` on an empty set."""
    scored = judge.nll([text for text in texts if text])
    count = sum(number for _, number in scored)
    if not count:
        raise UserError("there is no text to judge")
    nats, sizes = (np.array(column, dtype=float) for column in zip(*scored, strict=True))
    mean = nats.sum() / count
    # Standard error of a ratio of sums, by the spread of the texts around it.
    error = math.sqrt(float(np.sum((nats - mean * sizes) ** 2))) / count
    entropies = np.array([_entropy(one) for one in tokens])
    distinct = [float(np.mean([_distinct(one, n) for one in tokens])) for n in (1, 2, 3)]
    perplexity = math.exp(min(mean, 700.0))
    entropy_error = float(entropies.std() / math.sqrt(len(entropies)))
    means = perplexity, perplexity * error, float(entropies.mean()), entropy_error
    return Quality(len(texts), *means, *distinct, *_self_bleu(texts))


def _entropy(tokens: Sequence[int]) -> float:
    counts = np.array(list(Counter(tokens).values()), dtype=float)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


_ALIKE = 64
"""Texts that are compared with each other."""


def _self_bleu(texts: Sequence[str]) -> tuple[float, float] | tuple[None, None]:
    """Mean BLEU of the first texts, each against all others of them, and its standard error."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        return None, None
    some = [text for text in texts if text.strip()][:_ALIKE]
    if len(some) < 2:
        return None, None
    bleu = BLEU(effective_order=True)
    scores = [bleu.sentence_score(one, some[:at] + some[at + 1 :]).score for at, one in enumerate(some)]
    return float(np.mean(scores)), float(np.std(scores, ddof=1) / math.sqrt(len(scores)))


def _distinct(tokens: Sequence[int], n: int) -> float:
    grams = [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
    return len(set(grams)) / max(1, len(grams))
