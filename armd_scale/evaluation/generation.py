"""Quality of generated texts: perplexity under a judge, entropy and repetition, with their standard errors.

Protocol (design section 6): texts are generated from nothing at temperature 1 without truncation; the judge is named; a
low perplexity counts only beside an entropy like that of real text.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from armd_scale import inference
from armd_scale import tokenizer as tokenizers
from armd_scale.errors import UserError
from armd_scale.evaluation.likelihood import cut


class Judge(Protocol):
    """A language model that scores texts left to right."""

    name: str

    def nll(self, text: str) -> tuple[float, int]:
        """-log p of a text in nats, and the number of the judge's tokens."""
        ...


class ARMDJudge:
    """A standalone model of this project, left to right, which is exact."""

    def __init__(self, folder: Path) -> None:
        self.name = f"{folder.name} (ARMD, left to right)"
        self._model = inference.load(folder)
        self._tokenizer = tokenizers.load(folder, self._model.config.vocab_size)

    def nll(self, text: str) -> tuple[float, int]:
        chunks = cut(self._tokenizer.encode(text), self._model.config.length)
        total = sum(float(self._model.nll(torch.from_numpy(chunk)[None]).double().sum()) for chunk in chunks)
        return total, sum(map(len, chunks))


class HuggingFaceJudge:
    """A causal language model of transformers, such as GPT-2, from a local folder; BOS before each text."""

    def __init__(self, folder: Path) -> None:
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise UserError("a judge of transformers needs it: pip install -c constraints.txt -e '.[eval]'") from error
        self.name = folder.name
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder))
            self._model = AutoModelForCausalLM.from_pretrained(str(folder)).eval()
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is no causal language model: {error}") from error
        ends = [self._tokenizer.bos_token_id, self._tokenizer.eos_token_id]
        self._bos = next((token for token in ends if token is not None), None)
        if self._bos is None:
            raise UserError(f"{folder} has neither a BOS nor an EOS token, so that no text could begin")
        self._longest = getattr(self._model.config, "max_position_embeddings", 2048) - 1

    @torch.no_grad()
    def nll(self, text: str) -> tuple[float, int]:
        tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        total = 0.0
        for chunk in cut(tokens, self._longest):
            ids = torch.tensor([[self._bos, *chunk.tolist()]])
            scores = self._model(ids).logits[0, :-1].double().log_softmax(-1)
            total -= float(scores.gather(1, ids[0, 1:, None]).sum())
        return total, len(tokens)


def load_judge(folder: Path) -> Judge:
    """The judge in a folder, of this project or of transformers. Raises ``UserError``."""
    if not (folder / "config.json").is_file():
        raise UserError(f"there is no judge in {folder}: name a model folder")
    return ARMDJudge(folder) if (folder / "modeling_armd.py").is_file() else HuggingFaceJudge(folder)


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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"entropy_bits": self.entropy / math.log(2)}


def quality(texts: Sequence[str], tokens: Sequence[Sequence[int]], judge: Judge) -> Quality:
    """Score texts, given also as tokens of the model that made them. Raises ``UserError`` on an empty set."""
    scored = [judge.nll(text) for text in texts if text]
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
    return Quality(len(texts), perplexity, perplexity * error, float(entropies.mean()), entropy_error, *distinct)


def _entropy(tokens: Sequence[int]) -> float:
    counts = np.array(list(Counter(tokens).values()), dtype=float)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _distinct(tokens: Sequence[int], n: int) -> float:
    grams = [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
    return len(set(grams)) / max(1, len(grams))
