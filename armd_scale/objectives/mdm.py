"""Masked diffusion with an absorbing state: MDLM (arXiv 2406.07524) and RADD (arXiv 2406.03736), the other baseline.

Linear schedule, no time conditioning. One stream sees the whole text with some tokens masked, and predicts the masked
tokens.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from armd_scale import packing
from armd_scale.decoding.lanes import LOGIT_ROWS, Strided, Task
from armd_scale.decoding.network import Network
from armd_scale.decoding.sampling import Decoding, uniform
from armd_scale.objectives.interface import Card, Inference, Training
from armd_scale.orders import random_words
from armd_scale.rows import Rows, corrupt

if TYPE_CHECKING:
    from armd_scale.config import ModelConfig, RunConfig


def ancestral_blocks(free: Sequence[int], steps: int, key: tuple[int, int]) -> list[list[int]]:
    """Free positions by the step in which the ancestral sampler reveals them; steps that reveal none are left out.

    From time 1 to 0 in K equal steps, a masked token is revealed in a step from t to s with probability (t - s) / t,
    whatever the text: each of the K steps is as likely for each position (MDLM, arXiv 2406.07524, equation 6). As the
    network does not see the time, a step that reveals nothing needs no pass.
    """
    reveal = (uniform((*key, 1), len(free)) * steps).long().clamp(max=steps - 1).tolist()
    blocks: dict[int, list[int]] = {}
    for position, step in sorted(zip(free, reveal, strict=True), key=lambda pair: pair[1]):
        blocks.setdefault(step, []).append(position)
    return list(blocks.values())


class Ancestral(Strided, name="ancestral"):
    """Masked diffusion: every step predicts from the whole text, masked in part, and keeps its own block."""

    cached = False

    @staticmethod
    def blocks(free: Sequence[int], decoding: Decoding, key: tuple[int, int]) -> list[list[int]]:
        return ancestral_blocks(free, decoding.steps, key)

    def __init__(self, network: Network, count: int, slots: int, width: int) -> None:
        super().__init__(network, count, slots, width)
        self._sizes = [0] * count

    def _start(self, lane: int, task: Task, last: int) -> None:
        super()._start(lane, task, last)
        self._sizes[lane] = len(task.tokens)

    def release(self, lane: int) -> None:
        super().release(lane)
        self._sizes[lane] = 0

    def _graph_sizes(self, fed: int, wanted: int) -> tuple[int, int]:
        return 1, 1 << (wanted - 1).bit_length()

    def _advance(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        _, targets = inputs
        longest = self.slots - 1 if self._graphs is not None else max(1, *self._sizes)
        text = self.text.where(self.known, self.network.config.vocab_size)[:, 1 : longest + 1]
        there = None
        if self._graphs is not None or set(self._sizes) != {longest}:
            place = torch.arange(1, longest + 1, device=text.device)
            there = place <= self._length.clamp(min=1)[:, None]  # an idle lane sees something, too
        hidden = self.network.denoise(text, there)
        hidden = hidden.gather(1, (targets - 1).clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1]))
        numbers = self._uniform.gather(1, targets)
        size = max(1, LOGIT_ROWS // self.count)
        parts = zip(*(rows.split(size, dim=1) for rows in (hidden, targets, numbers)), strict=True)
        tokens = torch.cat([self.sampler.draw(self._predict(rows, at), part) for rows, at, part in parts], dim=1)
        self._write(targets, tokens)
        return targets, tokens


class MdmInference(Inference, name="mdm"):
    """Has a bound of a text's likelihood; writes in any number of steps."""

    def complete(self, decoding: Decoding, free: int) -> Decoding:
        decoding = super().complete(decoding, free)
        return dataclasses.replace(decoding, steps=decoding.steps or max(1, free))

    def ways(self, tokens_per_step: Sequence[int], free: int) -> dict[int, Decoding]:
        return {count: Decoding(steps=-(-free // count)) for count in tokens_per_step}

    def orders(self, shuffles: int, streams: int) -> list[str]:
        return ["bound"]

    def bound(self, model: Network, tokens: Tensor, draws: int, keys: Sequence[tuple[int, int]]) -> Tensor:
        """Each draw masks k tokens and sums N / k times the NLL of the masked ones (RADD, equation 9); the k of a text
        are spread evenly over 1..N.
        """
        batch, count = tokens.shape
        masked, sizes = [], []
        for key in keys:
            drawn = (torch.arange(draws) + uniform((*key, 2), 1)) / draws
            sizes.append(1 + (drawn * count).long().clamp(max=count - 1))
            masked.append(uniform((*key, 3), draws, count).argsort(dim=1).argsort(dim=1) < sizes[-1][:, None])
        hidden_BKN = torch.stack(masked).to(model.device)
        texts = tokens[:, None].expand(-1, draws, -1)
        total = torch.zeros(batch, draws, dtype=torch.float64)
        rows = max(1, LOGIT_ROWS // count)
        for part in torch.cartesian_prod(torch.arange(batch), torch.arange(draws)).split(rows):
            at = tuple(part.to(model.device).t())
            hidden, wanted = hidden_BKN[at], texts[at]
            states = model.denoise(wanted.masked_fill(hidden, model.config.vocab_size))
            scores = model.predict(states[hidden]).to(model.precise).log_softmax(dim=-1)
            nll = torch.zeros(hidden.shape, dtype=torch.float64, device=model.device)
            nll[hidden] = -scores.gather(1, wanted[hidden][:, None])[:, 0].double()
            total[tuple(part.t())] = nll.sum(1).cpu()
        return (total * count / torch.stack(sizes)).mean(1)


class MdmTraining(Training):
    """Some tokens masked, to be predicted from all others."""

    card = Card(
        "A masked diffusion language model (absorbing, as MDLM and RADD), trained and exported with armd_scale as a "
        "baseline of\nits ARMD models. It has a bound of a text's likelihood, and writes in any number of steps.",
        "masked-diffusion, parallel-decoding",
        "steps=16",
        "model.bound(text, draws=32)  # nats per text, from above",
    )
    flops_formula = "3 x 2 x (projections + MLP; full attention 2 N d per layer; head) per token"
    decoding_words = "A token is revealed in one of N / S steps drawn at random, S tokens a step on average."

    def rows(
        self,
        config: "RunConfig",
        tokens_BN: np.ndarray,
        step: int,
        slots: Sequence[int],
        starts_BN: np.ndarray | None = None,
    ) -> Rows:
        batch, keys = times(config.train.global_batch, config.seed, step), [(config.seed, step, slot) for slot in slots]
        form = config.diffusion.loss_form
        return _masked(config.model, tokens_BN, form, [batch[slot] for slot in slots], keys, starts_BN)

    def heldout_rows(
        self,
        config: "RunConfig",
        kind: str,
        tokens_BN: np.ndarray,
        numbers: Sequence[int],
        starts_BN: np.ndarray | None = None,
    ) -> Rows:
        """One draw of noise a text, whose times are spread evenly over the numbers 0, 1, 2, ..."""
        evenly, keys = [spread(0.5, number) for number in numbers], [(0, number) for number in numbers]
        return _masked(config.model, tokens_BN, "any-order", evenly, keys, starts_BN)

    def probes(self, model: "ModelConfig", tokens_BN: np.ndarray) -> list[tuple[Rows, Callable[[Any], Tensor]]]:
        rows = _masked(model, tokens_BN, "any-order", [0.5], [(0,)])
        rows = rows._replace(weights=None)
        return [(rows, lambda exported: exported.predict(exported.denoise(rows.context_tokens))[0])]

    def kinds(self, config: "RunConfig") -> dict[str, str]:
        return {"bound": "bound"}

    def progress(self, step: int, config: "RunConfig") -> dict[str, Any]:
        return {"phase": "masked", "shuffled": 0, "streams": 1}


def spread(time: float, number: int) -> float:
    """A time in (0, 1) for each number 0, 1, 2, ..., spread evenly; ``time`` for the first."""
    return max((time + number * (5**0.5 - 1) / 2) % 1, 2.0**-53)


class Noise(NamedTuple):
    """A masked text: its mask [N], and the weight of the NLL of each masked token."""

    masked: np.ndarray
    weight: float


def times(count: int, *key: int) -> np.ndarray:
    """``count`` times in (0, 1), one in each of as many equal parts: a low-discrepancy draw (MDLM, section 3.5).

    Each of them alone is uniform.
    """
    offset = (int(random_words(1, "time", *key)[0]) + 0.5) / 2**64
    return np.clip((np.arange(count) + offset) / count, 2.0**-53, 1 - 2.0**-53)


def noise(length: int, time: float, form: str, *key: int) -> Noise:
    """Mask a text at a time in (0, 1) so that the mean over times and masks of ``weight`` x NLL of the masked tokens
    is the negative evidence bound of the text in nats.

    ``form``: ``time`` masks each token with probability t and weighs by 1 / t; ``any-order`` masks k = 1 + floor(N t)
    of them and weighs by N / k. Either way the sets of k masked tokens share an expected weight of 1 / k: the
    integral of C(N, k) t^k (1 - t)^(N - k) / t is 1 / k, and so is 1 / N x N / k (RADD, section 3.3).
    """
    words = random_words(length, "noise", *key)
    if form == "time":
        return Noise((words + 0.5) * 2.0**-64 < time, 1 / time)
    count = 1 + int(length * time)
    masked = np.zeros(length, dtype=bool)
    masked[np.argsort(words, kind="stable")[:count]] = True
    return Noise(masked, length / count)


def _masked(
    model: "ModelConfig",
    tokens_BN: np.ndarray,
    form: str,
    times_B: Sequence[float],
    keys: Sequence[tuple[int, ...]],
    starts_BN: np.ndarray | None = None,
) -> Rows:
    """Rows of texts with ``noise`` of every document."""
    assert model.vocab_size is not None
    masked_BN, weights_BN = np.empty(tokens_BN.shape, dtype=bool), np.empty(tokens_BN.shape)
    texts = zip(packing.documents(tokens_BN.shape, starts_BN), times_B, keys, strict=True)
    for text, (sizes, time, key) in enumerate(texts):
        at = 0
        for number, size in enumerate(sizes):
            drawn = noise(size, spread(time, number), form, *key, *packing.key(number))
            here = text, slice(at, at + size)
            masked_BN[here], weights_BN[here], at = drawn.masked, drawn.weight, at + size
    return corrupt(tokens_BN, masked_BN, weights_BN, model.vocab_size, starts_BN)


TRAINING = MdmTraining()
