"""What an objective's module holds: how its model is scored and decoded, and how it is trained.

- ``Inference``: what the standalone model does differently. A module defines a subclass (and its decoding strategy, if
  it has one of its own) above its ``Training``: that part needs torch alone, and goes into every model directory.
- ``Training``: phases, rows of a batch, held-out rows, and the words of cards and reports. Not in model directories.

A module is found by the name of its objective in ``armd_scale.traits.TRAITS``.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from armd_scale.decoding.network import InputError
from armd_scale.decoding.sampling import Decoding
from armd_scale.rows import Rows
from armd_scale.traits import TRAITS, Traits

if TYPE_CHECKING:
    from armd_scale.config import ModelConfig, RunConfig


class Inference:
    """How a standalone model of an objective is scored and decoded. Subclasses register under the objective's name."""

    known: ClassVar[dict[str, "Inference"]] = {}
    """Objectives by their names."""
    traits: Traits

    def __init_subclass__(cls, name: str) -> None:
        cls.traits = TRAITS[name]
        Inference.known[name] = cls()

    def complete(self, decoding: Decoding, free: int) -> Decoding:
        """The decoding of a text with ``free`` tokens to generate; ``InputError`` for settings of other objectives."""
        default = Decoding()
        others = {setting for traits in TRAITS.values() for setting in traits.settings} - {*self.traits.settings}
        for setting in sorted(others):
            if getattr(decoding, setting) != getattr(default, setting):
                has = " or ".join(self.traits.settings) or "no setting of this kind"
                raise InputError(f"{setting} is not a setting of {self.traits.label} models: they have {has}")
        return decoding

    def ways(self, tokens_per_step: Sequence[int], free: int) -> dict[int, Decoding]:
        """Requested number of tokens per step (or its mean) -> decoding of ``free`` tokens at that rate."""
        return {1: Decoding()}

    def orders(self, shuffles: int, streams: int) -> list[str]:
        """Orders in which likelihoods are reported side by side, the one a model is known by first."""
        return ["left-to-right"]

    def bound(self, model: Any, tokens: Tensor, draws: int, keys: Sequence[tuple[int, int]]) -> Tensor:
        """Upper bounds of -log p of texts [B, N], in nats: [B]."""
        raise InputError(f"{self.traits.label} models have an exact nll and no bound of it: use nll")


class Card(NamedTuple):
    """What a model card says of an objective."""

    summary: str
    tags: str
    decoding: str
    """Arguments of ``Decoding`` in the example."""
    scoring: str
    """The example's line that scores a text."""


class Training(ABC):
    """How an objective is trained: everything is a function of (seed, step, place in the batch), so ranks agree."""

    card: ClassVar[Card]
    flops_formula: ClassVar[str]
    """What is counted in the FLOPs of a token (``model.flops``)."""
    decoding_words: ClassVar[str]
    """How samples are written, in a sentence of the report."""

    @abstractmethod
    def rows(
        self,
        config: "RunConfig",
        tokens_BN: np.ndarray,
        step: int,
        slots: Sequence[int],
        starts_BN: np.ndarray | None = None,
    ) -> Rows:
        """Training rows of texts [B, N] that have the places ``slots`` in the global batch of ``step``.

        ``starts_BN``: ``packing.starts`` of separate documents; None: every text is one sequence.
        """

    @abstractmethod
    def heldout_rows(
        self,
        config: "RunConfig",
        kind: str,
        tokens_BN: np.ndarray,
        numbers: Sequence[int],
        starts_BN: np.ndarray | None = None,
    ) -> Rows:
        """Rows of held-out texts [B, N] with these numbers, the same at every evaluation; ``kind``: of ``kinds``."""

    @abstractmethod
    def probes(self, model: "ModelConfig", tokens_BN: np.ndarray) -> list[tuple[Rows, Callable[[Any], Tensor]]]:
        """Rows of a text [1, N], and how the standalone model computes the logits [N, V] of the same targets.

        The export compares both.
        """

    def kinds(self, config: "RunConfig") -> dict[str, str]:
        """Kinds of held-out scores, and each in words; the first is the one that a run is known by."""
        return {"left_to_right": "left to right"}

    def lags(self, config: "RunConfig") -> int:
        """How many tokens ahead drafts of held-out texts look, at most; 0: no drafts are trained."""
        return 0

    def progress(self, step: int, config: "RunConfig") -> dict[str, Any]:
        """``phase``, ``shuffled`` tokens a text and ``streams`` of a step, for its record."""
        return {"phase": "left-to-right", "shuffled": 0, "streams": 1}

    def spans(self, config: "RunConfig") -> list[tuple[str, int, int]]:
        """Phases of the whole run in words, with their first and last step; empty where there is one phase."""
        return []

    def report_orders(self, config: "RunConfig") -> list[str]:
        """Orders in which the report scores held-out text beside the first of ``Inference.orders``."""
        return []


def training(name: str) -> Training:
    """The training of an objective."""
    return importlib.import_module(f"armd_scale.objectives.{name}").TRAINING
