"""Causal autoregressive diffusion: CARD (arXiv 2601.22031). One causal stream that also learns from a noised prefix.

Training masks tokens of the tail of a text and predicts every token from the noised tokens before it:

    -E_t sum_n w(n, x_t^{<n}) log p(x_n | x_t^{<n})

- *soft tail*: at time t, k = max(1, floor(N t)) tokens are masked, drawn from the last min(N, floor(lambda k))
  positions; the tokens before stay clean;
- *reweighting*: w_n = 1 / (beta + S_n), where S_n = sum_{i<n} C_i (1 - p)^(n-1-i), and C_i is 0 for a clean token, 1
  for a mask behind a clean token and 2 for a mask behind a mask.

Decoding proposes a block of tokens behind the finished text and accepts them by confidence.
docs/explanation/objectives.md says what the paper leaves open and what was chosen.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from armd_scale import packing
from armd_scale.decoding.lanes import Lanes, Task
from armd_scale.decoding.network import Network, Sight
from armd_scale.decoding.sampling import Decoding, uniform
from armd_scale.objectives.ar import left_to_right_rows
from armd_scale.objectives.interface import Card, Inference, Training
from armd_scale.objectives.mdm import spread, times
from armd_scale.orders import random_words
from armd_scale.rows import Rows

if TYPE_CHECKING:
    from armd_scale.config import ModelConfig, RunConfig


class Confident(Lanes, name="confident"):
    """A pass proposes K tokens behind the finished text, each given the text and masks, and accepts the leading ones.

    The first is always accepted: its context is clean. The next are accepted as long as the likeliest token has at
    least the probability ``confidence``. Keys and values of finished tokens are kept; those of masks are overwritten
    when the tokens in their places are finished.
    """

    @staticmethod
    def targets(decoding: Decoding) -> int:
        return decoding.block

    def __init__(self, network: Network, count: int, slots: int, width: int) -> None:
        super().__init__(network, count, slots, width)
        self._uniform = self._zeros(slots + width, dtype=torch.float64)
        self._first, self._last = self._zeros(1), self._zeros(1)  # finished positions that are not in the cache yet
        self._block, self._size = self._zeros(1), self._zeros(1)
        self._confidence = self._zeros(1, dtype=network.precise)
        self._blocks = [0] * count

    def _start(self, lane: int, task: Task, last: int) -> None:
        size = len(task.tokens)
        self._uniform[lane, : size + 1] = uniform(task.key, size + 1).to(self._uniform.device)
        self._first[lane], self._last[lane], self._size[lane] = last, last, size
        self._block[lane], self._confidence[lane] = task.decoding.block, task.decoding.confidence
        self._blocks[lane] = task.decoding.block

    def release(self, lane: int) -> None:
        super().release(lane)
        self._size[lane], self._block[lane], self._blocks[lane] = 0, 0, 0

    def step(self) -> Any:
        proposals = max(1, *self._blocks)
        return self._run(torch.arange(2 * proposals - 1, device=self.text.device))

    def _advance(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        [column] = inputs
        proposals = torch.arange((len(column) + 1) // 2, device=column.device)
        # Rows: the finished tokens that are not in the cache, then masks; the row of a token predicts the next one.
        at = self._first + column
        keep = (at < self._size) & (at < self._last + self._block)
        at, targets = at.where(keep, 0), (at + 1).where(keep, 0)
        tokens = self.text.gather(1, at).where(at <= self._last, self.network.config.vocab_size)
        slot = torch.arange(self.slots, device=column.device)
        seen = (slot >= 1) & (slot <= targets.clamp(min=1)[..., None])
        hidden = self.network.step(tokens, at, targets, self.cache, keep, Sight(None, None, seen))

        row = (self._last - self._first + proposals).clamp(max=len(column) - 1)
        positions = targets.gather(1, row).where(proposals < self._block, 0)
        hidden = hidden.gather(1, row[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = self._predict(hidden, positions).to(self.network.precise)
        sure = logits.softmax(-1).amax(-1) >= self._confidence
        accepted = (((proposals == 0) | sure) & (positions > 0)).long().cumprod(dim=1).bool()
        positions = positions.where(accepted, 0)
        written = self.sampler.draw(logits, self._uniform.gather(1, positions))
        self._write(positions, written)
        self._first.copy_(self._last + accepted.any(1, keepdim=True))
        self._last += accepted.sum(1, keepdim=True)
        return positions, written


class CardInference(Inference, name="card"):
    """Scores left to right, exactly; writes left to right, several tokens a pass where it is confident."""

    def ways(self, tokens_per_step: Sequence[int], free: int) -> dict[int, Decoding]:
        """The number of accepted tokens depends on the text; ``count`` is the most that a pass proposes."""
        return {count: Decoding(block=count if count > 1 else 0) for count in tokens_per_step}


class CardTraining(Training):
    """Next-token prediction from a prefix whose tail is masked."""

    card = Card(
        "A causal autoregressive diffusion language model (CARD, arXiv 2601.22031), trained and exported with "
        "armd_scale as a\nbaseline of its ARMD models. It scores a text exactly left to right, and writes several "
        "tokens a pass where it is\nconfident.",
        "causal-diffusion, parallel-decoding",
        "block=4",
        "model.nll(text)  # nats per token, left to right",
    )
    flops_formula = "3 x 2 x (projections + MLP; causal attention N d per layer; head) per token"
    decoding_words = "Up to S tokens are proposed in a pass, and the leading ones accepted by confidence."

    def rows(
        self,
        config: "RunConfig",
        tokens_BN: np.ndarray,
        step: int,
        slots: Sequence[int],
        starts_BN: np.ndarray | None = None,
    ) -> Rows:
        batch, keys = times(config.train.global_batch, config.seed, step), [(config.seed, step, slot) for slot in slots]
        documents = _noised(config, tokens_BN, [batch[slot] for slot in slots], keys, starts_BN)
        beta, decay = config.diffusion.beta, config.diffusion.decay
        weights = np.stack([np.concatenate([reweight(part, beta, decay) for part in parts]) for parts in documents])
        rows = noised_rows(config.model, tokens_BN, np.stack([*map(np.concatenate, documents)]), starts_BN)
        return rows._replace(weights=torch.from_numpy(weights.astype(np.float32)))

    def heldout_rows(
        self,
        config: "RunConfig",
        kind: str,
        tokens_BN: np.ndarray,
        numbers: Sequence[int],
        starts_BN: np.ndarray | None = None,
    ) -> Rows:
        """``noised``: one draw of noise a text, whose times are spread evenly over the numbers; no weights."""
        if kind == "left_to_right":
            return left_to_right_rows(config.model, tokens_BN, starts_BN)
        evenly = [spread(0.5, number) for number in numbers]
        documents = _noised(config, tokens_BN, evenly, [(0, number) for number in numbers], starts_BN)
        return noised_rows(config.model, tokens_BN, np.stack([*map(np.concatenate, documents)]), starts_BN)

    def probes(self, model: "ModelConfig", tokens_BN: np.ndarray) -> list[tuple[Rows, Callable[[Any], Tensor]]]:
        assert model.vocab_size is not None
        masked = soft_tail(model.length, 0.5, 1.5, 0)[None]
        natural = torch.arange(1, model.length + 1)[None]

        def logits(exported: Any, seen: np.ndarray) -> Tensor:
            return exported.predict(exported.whole(torch.from_numpy(seen), natural, natural))[0]

        noised = np.where(masked, model.vocab_size, tokens_BN)
        return [
            (left_to_right_rows(model, tokens_BN), lambda exported: logits(exported, tokens_BN)),
            (noised_rows(model, tokens_BN, masked), lambda exported: logits(exported, noised)),
        ]

    def kinds(self, config: "RunConfig") -> dict[str, str]:
        return {"left_to_right": "left to right", "noised": "from a noised prefix"}

    def progress(self, step: int, config: "RunConfig") -> dict[str, Any]:
        return {"phase": "noised", "shuffled": 0, "streams": 1}


def _noised(
    config: "RunConfig",
    tokens_BN: np.ndarray,
    times_B: Sequence[float],
    keys: Sequence[tuple[int, ...]],
    starts_BN: np.ndarray | None,
) -> list[list[np.ndarray]]:
    """``soft_tail`` of every document of every text."""
    texts = zip(packing.documents(tokens_BN.shape, starts_BN), times_B, keys, strict=True)
    tail = config.diffusion.tail
    return [
        [soft_tail(size, spread(time, number), tail, *key, *packing.key(number)) for number, size in enumerate(sizes)]
        for sizes, time, key in texts
    ]


def soft_tail(length: int, time: float, tail: float, *key: int) -> np.ndarray:
    """Mask [N] of a text at a time in (0, 1): k = max(1, floor(N t)) of the last ``tail`` k positions."""
    count = max(1, int(length * time))
    window = min(length, int(tail * count))
    masked = np.zeros(length, dtype=bool)
    masked[length - window + np.argsort(random_words(window, "soft tail", *key), kind="stable")[:count]] = True
    return masked


def reweight(masked: np.ndarray, beta: float, decay: float) -> np.ndarray:
    """Weights [N] of the NLL of the tokens, given the mask [N]: the more of a context is masked, the smaller."""
    cost = masked * (1 + np.concatenate([[False], masked[:-1]]))
    total, weights = 0.0, np.empty(len(masked))
    for n in range(len(masked)):
        weights[n] = 1 / (beta + total)
        total = cost[n] + (1 - decay) * total
    return weights


def noised_rows(
    model: "ModelConfig", tokens_BN: np.ndarray, masked_BN: np.ndarray, starts_BN: np.ndarray | None = None
) -> Rows:
    """Rows of texts [B, N] left to right, whose context has masks; every token is a target."""
    assert model.vocab_size is not None
    rows = left_to_right_rows(model, tokens_BN, starts_BN)
    noised = left_to_right_rows(model, np.where(masked_BN, model.vocab_size, tokens_BN), starts_BN)
    return rows._replace(context_tokens=noised.context_tokens)


TRAINING = CardTraining()
