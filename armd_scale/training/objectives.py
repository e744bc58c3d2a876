"""What is learned from a text: the rows of each objective, in training and for held-out scores.

- ``armd``: the tokens in the generation order of the step (``schedules``);
- ``ar``: left to right;
- ``mdm``: some tokens masked, to be predicted from all others. Absorbing diffusion with the linear schedule, without
  time conditioning: MDLM (arXiv 2406.07524), RADD (arXiv 2406.03736).

Everything is a function of (seed, step, place in the batch) alone, so any rank can make its part.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from armd_scale import orders
from armd_scale.config import Objective, RunConfig
from armd_scale.orders import Layout, random_words
from armd_scale.rows import Rows, arrange, corrupt
from armd_scale.training import schedules

_GOLDEN = (5**0.5 - 1) / 2


class Noise(NamedTuple):
    """A masked text: which tokens are masked [N], and what the NLL of each of them counts."""

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
    of them and weighs by N / k. Either way a set of k masked tokens counts 1 / k over all sets of its size: the
    integral of C(N, k) t^k (1 - t)^(N - k) / t is 1 / k, and so is 1 / N x N / k (RADD, section 3.3).
    """
    words = random_words(length, "noise", *key)
    if form == "time":
        return Noise((words + 0.5) * 2.0**-64 < time, 1 / time)
    count = 1 + int(length * time)
    masked = np.zeros(length, dtype=bool)
    masked[np.argsort(words, kind="stable")[:count]] = True
    return Noise(masked, length / count)


def training_rows(config: RunConfig, tokens_BN: np.ndarray, step: int, slots: Sequence[int]) -> Rows:
    """Rows of texts [B, N] that have the places ``slots`` in the global batch of ``step``."""
    if config.objective == "mdm":
        batch = times(config.train.global_batch, config.seed, step)
        form, length = config.diffusion.loss_form, tokens_BN.shape[1]
        return _masked(config, tokens_BN, [noise(length, batch[slot], form, config.seed, step, slot) for slot in slots])
    return _ordered(config, tokens_BN, [schedules.layout(step, slot, config) for slot in slots])


HELDOUT: dict[Objective, tuple[str, ...]] = {
    "armd": ("left_to_right", "permutation", "strided"),
    "ar": ("left_to_right",),
    "mdm": ("bound",),
}
"""Kinds of held-out scores of an objective; the first is the one it is known by."""


def labels(config: RunConfig) -> dict[str, str]:
    """The kinds of a run in words."""
    words = {
        "left_to_right": "left to right",
        "permutation": f"{config.orders.rho} tokens shuffled",
        "strided": f"strided, {config.train.eval_streams} streams",
        "bound": "bound",
    }
    return {kind: words[kind] for kind in HELDOUT[config.objective]}


def heldout_rows(config: RunConfig, kind: str, tokens_BN: np.ndarray, numbers: Sequence[int]) -> Rows:
    """Rows of held-out texts [B, N] that have these numbers among those that are scored, the same at every evaluation.

    ``bound``: one draw of noise a text, whose times are spread evenly over 0, 1, 2, ...
    """
    length = tokens_BN.shape[1]
    if kind == "bound":
        drawn = [noise(length, (0.5 + number * _GOLDEN) % 1, "any-order", 0, number) for number in numbers]
        return _masked(config, tokens_BN, drawn)
    if kind == "permutation":
        rho = config.orders.rho
        return _ordered(config, tokens_BN, [orders.shuffled(length, rho, 0, number) for number in numbers])
    layout = orders.left_to_right(length)
    if kind == "strided":
        layout = orders.strided(length, config.train.eval_streams)
    return _ordered(config, tokens_BN, [layout] * len(numbers))


def _ordered(config: RunConfig, tokens_BN: np.ndarray, layouts: Sequence[Layout]) -> Rows:
    assert config.model.bos_id is not None
    together = Layout(*(np.stack(field) for field in zip(*layouts, strict=True)))
    return arrange(tokens_BN, together, config.model.bos_id)


def _masked(config: RunConfig, tokens_BN: np.ndarray, drawn: Sequence[Noise]) -> Rows:
    assert config.model.vocab_size is not None
    masked, weights = (np.array(column) for column in zip(*drawn, strict=True))
    return corrupt(tokens_BN, masked, weights, mask_id=config.model.vocab_size)
