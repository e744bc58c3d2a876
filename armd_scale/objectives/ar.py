"""Left to right with one causal stream: an ordinary autoregressive language model, the baseline."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from armd_scale import orders
from armd_scale.objectives.interface import Card, Inference, Training
from armd_scale.rows import Rows, arrange

if TYPE_CHECKING:
    from armd_scale.config import ModelConfig, RunConfig


class ArInference(Inference, name="ar"):
    """Scores and writes left to right, one token a step."""


class ArTraining(Training):
    """Next-token prediction."""

    card = Card(
        "A left-to-right language model, trained and exported with armd_scale as a baseline of its ARMD models.",
        "left-to-right",
        "",
        "model.nll(text)  # nats per token, left to right",
    )
    flops_formula = "3 x 2 x (projections + MLP; causal attention N d per layer; head) per token"
    decoding_words = "One token is written after the other."

    def rows(
        self,
        config: "RunConfig",
        tokens_BN: np.ndarray,
        step: int,
        slots: Sequence[int],
        starts_BN: np.ndarray | None = None,
    ) -> Rows:
        return left_to_right_rows(config.model, tokens_BN, starts_BN)

    def heldout_rows(
        self,
        config: "RunConfig",
        kind: str,
        tokens_BN: np.ndarray,
        numbers: Sequence[int],
        starts_BN: np.ndarray | None = None,
    ) -> Rows:
        return left_to_right_rows(config.model, tokens_BN, starts_BN)

    def probes(self, model: "ModelConfig", tokens_BN: np.ndarray) -> list[tuple[Rows, Callable[[Any], Tensor]]]:
        tokens = torch.from_numpy(tokens_BN)
        return [(left_to_right_rows(model, tokens_BN), lambda exported: exported.logits(tokens)[0])]


def left_to_right_rows(model: "ModelConfig", tokens_BN: np.ndarray, starts_BN: np.ndarray | None = None) -> Rows:
    """Rows of texts [B, N] left to right, one token a block."""
    assert model.bos_id is not None
    rows = arrange(tokens_BN, orders.left_to_right(tokens_BN.shape[1]), model.bos_id, starts_BN)
    return rows._replace(in_text_order=True)


TRAINING = ArTraining()
