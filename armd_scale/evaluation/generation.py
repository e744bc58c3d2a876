"""Quality of generated texts: perplexity under a judge, entropy, distinct n-grams and self-BLEU, with standard errors.

Protocol (docs/howto/evaluation.md): texts are generated without a prompt at temperature 1, without truncation. Results
name the judge. A low perplexity is meaningful only together with an entropy close to that of real text.
"""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from armd_scale import config_syntax
from armd_scale.errors import UserError
from armd_scale.evaluation import models
from armd_scale.evaluation.likelihood import cut, units
from armd_scale.evaluation.models import open_model
from armd_scale.inference import ARMD, FREE, Decoding, Frontier
from armd_scale.run_directory import RunDirectory

JUDGE = "ar"
"""Objective of the runs among which ``find_judge`` chooses."""


LAGS = 4
"""Places of drafts whose acceptance is measured, at most."""


class Judge(Protocol):
    """A language model that scores texts left to right."""

    name: str

    def nll(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        """-log p of each text in nats, and its number of tokens under the judge."""
        ...


class OwnJudge:
    """A model of this project with an exact left-to-right likelihood."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self._model, self._tokenizer = open_model(path, device)
        traits = self._model.config.traits
        if not traits.exact:
            raise UserError(f"{path} is an {traits.label} model, which has no exact likelihood: choose another judge")
        self.name = f"{path.name} ({traits.label}, left to right)"

    def nll(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        parts = [cut(tokens, self._model.config.length) for tokens in self._tokenizer.encode_batch(list(texts))]
        # Chunks of equal length share a batch.
        ranked = sorted(
            ((row, chunk) for row, chunks in enumerate(parts) for chunk in chunks), key=lambda pair: len(pair[1])
        )
        totals = [0.0] * len(texts)
        for unit in units([part for _, part in ranked]):
            nll = self._model.nll(torch.from_numpy(unit.tokens)).double().sum(1).tolist()
            for (row, _), value in zip(ranked[unit.first :], nll, strict=False):
                totals[row] += value
        return [(total, sum(map(len, chunks))) for total, chunks in zip(totals, parts, strict=True)]


class HuggingFaceJudge:
    """A causal language model of transformers, such as GPT-2, from a local directory. Puts BOS before each text."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.name = folder.name
        self._model = models.load_transformer(folder, device)
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder))
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} has no tokenizer that transformers reads: {error}") from error
        ends = [self._tokenizer.bos_token_id, self._tokenizer.eos_token_id]
        self._bos = next((token for token in ends if token is not None), None)
        if self._bos is None:
            raise UserError(f"{folder} has neither a BOS nor an EOS token: choose another judge")
        self._longest = models.positions(self._model) - 1

    @torch.no_grad()
    def nll(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        return [self._score(text) for text in texts]

    def _score(self, text: str) -> tuple[float, int]:
        tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        total = 0.0
        for chunk in cut(tokens, self._longest):
            ids = torch.tensor([[self._bos, *chunk.tolist()]], device=self._model.device)
            scores = self._model(ids).logits[0, :-1].double().log_softmax(-1)
            total -= float(scores.gather(1, ids[0, 1:, None]).sum())
        return total, len(tokens)


def load_judge(path: Path, device: str = "cpu") -> Judge:
    """Load a judge from a run directory, a model directory or a directory of transformers. Raises ``UserError``."""
    if not (path / "config.json").is_file() and not RunDirectory(path).exists():
        raise UserError(f"{path} holds no judge: name a model directory or a run directory")
    return HuggingFaceJudge(path, device) if models.is_foreign(path) else OwnJudge(path, device)


def find_judge(model: Path) -> Path:
    """The best run with objective ``JUDGE`` in the parent of the run directory; ``UserError`` if none exists.

    ``model``: the run directory of a model, or a directory inside it.
    """
    own = RunDirectory.around(model)
    siblings = map(RunDirectory, own.path.resolve().parent.iterdir()) if own else ()
    scores: dict[Path, float] = {}
    for run in siblings:
        if own is None or run.path == own.path.resolve() or not run.exists():
            continue
        records = [record for record in run.metrics() if "heldout_left_to_right" in record]
        settings = config_syntax.read(run.config_path)
        if records and settings.get("objective") == JUDGE and run.complete_checkpoints():
            scores[run.path] = records[-1]["heldout_left_to_right_bits_per_byte"]
    if not scores:
        raise UserError(f"no judge beside the run of {model}: train a run with objective={JUDGE}, or use --judge")
    return min(scores, key=lambda run: scores[run])


def ways(model: ARMD, streams: Sequence[int], free: int) -> dict[int, Decoding]:
    """Ways of decoding ``free`` tokens: (mean) number of tokens per step -> settings."""
    return model.objective.ways(streams, free)


@dataclass(frozen=True)
class Sample:
    """Texts generated with the same settings."""

    tokens: list[list[int]]
    tokens_per_second: float
    tokens_per_pass: float
    """Tokens of a text per forward pass."""


def sample(model: ARMD, decoding: Decoding, count: int, length: int, batch: int, seed: int = 0) -> Sample:
    """Generate ``count`` texts of ``length`` tokens in batches of ``batch``; text n has the seed ``seed`` + n."""
    tokens: list[list[int]] = []
    seconds, passes = 0.0, 0
    while len(tokens) < count:
        keys = [seed + len(tokens) + row for row in range(min(batch, count - len(tokens)))]
        started = time.perf_counter()
        tasks = model.plan([[FREE] * length] * len(keys), decoding, keys)
        frontiers = [Frontier(task, model.config.eos_id) for task in tasks]
        for step in model.decode(tasks):
            passes += sum(not frontier.ended for frontier in frontiers)  # a finished text waits for the others
            for frontier, *written in zip(frontiers, step.positions.tolist(), step.tokens.tolist(), strict=True):
                frontier.push(*written)
        seconds += time.perf_counter() - started
        tokens += [frontier.tokens for frontier in frontiers]
    return Sample(tokens, len(tokens) * length / seconds, len(tokens) * length / passes)


def acceptance(model: ARMD, texts: Sequence[Sequence[int]]) -> tuple[list[float], float]:
    """Acceptance of draft rows at places 1 to ``LAGS`` behind the next token, and the tokens of a pass by it.

    ``texts``: of one length. A pass writes the token that it scores, and the drafted tokens up to the first refused.
    """
    shared = model.acceptance(torch.tensor(texts), min(LAGS, len(texts[0]) - 1)).double()
    return shared.mean((1, 2)).tolist(), 1 + float(shared.cumprod(0).sum(0).mean())


class Marginal(NamedTuple):
    """Acceptance of the first drafted token if it is drawn from the model's own law without the token before it."""

    acceptance: float
    error: float
    """Standard error over the places."""
    covered: float
    """Probability of the tokens that were followed, mean over the places."""


def marginal_acceptance(
    model: ARMD, texts: Sequence[Sequence[int]], places: int, branches: int, seed: int = 0
) -> Marginal:
    """Estimate 1 - TV(p(x_(t+2) | x_(<=t+1)), p(x_(t+2) | x_(<=t))) for texts of the model, left to right.

    The law of token t + 2 without token t + 1, which draft rows learn, is the mean of the laws behind each token t + 1.
    ``branches``: likeliest tokens t + 1 that are followed. ``places``: number of (text, t), drawn with ``seed``.
    """
    draw, shares, covered = np.random.default_rng(seed), [], []
    for _ in range(places):
        text = texts[int(draw.integers(len(texts)))]
        begin = torch.tensor(text[: int(draw.integers(len(text) - 1))], dtype=torch.long, device=model.device)
        weights, tokens = _next(model, begin[None])[0].topk(min(branches, model.config.vocab_size))
        behind_KN = torch.cat([begin.expand(len(tokens), -1), tokens[:, None]], dim=1)
        laws_KV = torch.cat([_next(model, part) for part in behind_KN.split(16)])
        covered.append(float(weights.sum()))
        weights = weights / weights.sum()
        shares.append(float(weights @ torch.minimum(laws_KV, weights @ laws_KV).sum(-1)))
    return Marginal(float(np.mean(shares)), float(np.std(shares) / places**0.5), float(np.mean(covered)))


@torch.no_grad()
def _next(model: ARMD, texts_KN: torch.Tensor) -> torch.Tensor:
    """The law of the token behind texts [K, N], [K, V] in float64."""
    # The last token of a row of texts is a target alone, so any token can stand in its place.
    texts_KN = torch.cat([texts_KN, texts_KN.new_zeros(len(texts_KN), 1)], dim=1)
    places = torch.arange(1, texts_KN.shape[1] + 1, device=model.device).expand_as(texts_KN)
    return model.predict(model.whole(texts_KN, places, places)[:, -1]).double().softmax(-1)


@dataclass(frozen=True)
class Quality:
    """Figures of a set of texts. ``X_se`` is the standard error of ``X`` over the texts."""

    texts: int
    perplexity: float
    """exp of the judge's nats per token over all texts."""
    perplexity_se: float
    entropy: float
    """Entropy of the tokens of a text, in nats, mean over texts."""
    entropy_se: float
    distinct_1: float
    distinct_2: float
    distinct_3: float
    """Number of different n-grams of a text over its number of n-grams, mean over texts."""
    self_bleu: float | None
    """BLEU-4 of a text against other texts of the set, from 0 to 100, mean over texts. None without sacrebleu."""
    self_bleu_se: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"entropy_bits": self.entropy / math.log(2)}


def quality(texts: Sequence[str], tokens: Sequence[Sequence[int]], judge: Judge) -> Quality:
    """Score texts. ``tokens``: the tokens of the generating model. Raises ``UserError`` if all texts are empty."""
    scored = judge.nll([text for text in texts if text])
    count = sum(number for _, number in scored)
    if not count:
        raise UserError("no text to judge: all generated texts are empty")
    nats, sizes = (np.array(column, dtype=float) for column in zip(*scored, strict=True))
    mean = nats.sum() / count
    # Standard error of a ratio of sums, from the deviations of the texts.
    error = math.sqrt(float(np.sum((nats - mean * sizes) ** 2))) / count
    entropies = np.array([_entropy(text) for text in tokens])
    distinct = [float(np.mean([_distinct(text, n) for text in tokens])) for n in (1, 2, 3)]
    perplexity = math.exp(min(mean, 700.0))
    entropy_error = float(entropies.std() / math.sqrt(len(entropies)))
    means = perplexity, perplexity * error, float(entropies.mean()), entropy_error
    return Quality(len(texts), *means, *distinct, *_self_bleu(texts))


def _entropy(tokens: Sequence[int]) -> float:
    counts = np.array(list(Counter(tokens).values()), dtype=float)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


_ALIKE = 64
"""Largest number of texts in self-BLEU."""


def _self_bleu(texts: Sequence[str]) -> tuple[float, float] | tuple[None, None]:
    """Mean and standard error of the BLEU of each of the first texts against the rest of them."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        return None, None
    some = [text for text in texts if text.strip()][:_ALIKE]
    if len(some) < 2:
        return None, None
    bleu = BLEU(effective_order=True)
    scores = [bleu.sentence_score(text, some[:at] + some[at + 1 :]).score for at, text in enumerate(some)]
    return float(np.mean(scores)), float(np.std(scores, ddof=1) / math.sqrt(len(scores)))


def _distinct(tokens: Sequence[int], n: int) -> float:
    grams = [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
    return len(set(grams)) / max(1, len(grams))
