"""Auto-regressive masked diffusion (arXiv 2601.16971): two streams, any generation order, blocks of tokens.

Training passes through the orders of paper sections 3.4 and 4: left to right, progressive permutation, and strided
fine-tuning on top of the base training.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from armd_scale import orders, packing
from armd_scale.decoding.sampling import Decoding
from armd_scale.objectives.interface import Card, Inference, Training
from armd_scale.orders import Layout
from armd_scale.rows import Rows, arrange, look_ahead

if TYPE_CHECKING:
    from armd_scale.config import ModelConfig, RunConfig


class ArmdInference(Inference, name="armd"):
    """Scores in any order, exactly. Generates in S streams, or with ``draft`` several tokens per pass with the
    distribution of one token per pass.
    """

    def ways(self, tokens_per_step: Sequence[int], free: int) -> dict[int, Decoding]:
        return {count: Decoding(streams=count) for count in tokens_per_step}

    def orders(self, shuffles: int, streams: int) -> list[str]:
        return ["left-to-right", f"shuffled:{shuffles}", f"strided:{streams}"]


class ArmdTraining(Training):
    """Every text in the generation order of its step."""

    card = Card(
        "An auto-regressive masked diffusion language model (ARMD, arXiv 2601.16971), trained and exported with "
        "armd_scale. It\nscores a text exactly in any generation order, and writes up to S tokens a step in S parallel "
        "streams.",
        "armd, masked-diffusion, parallel-decoding",
        "streams=4",
        "model.nll(text)  # nats per token, left to right",
    )
    flops_formula = (
        "3 x 2 x (projections + MLP of both streams, K and V of one; causal attention N d per stream and layer; "
        "prefix aggregation; head) per token"
    )
    decoding_words = "S streams are written side by side, S tokens a step."

    def rows(
        self,
        config: "RunConfig",
        tokens_BN: np.ndarray,
        step: int,
        slots: Sequence[int],
        starts_BN: np.ndarray | None = None,
    ) -> Rows:
        documents = packing.documents(tokens_BN.shape, starts_BN)
        layouts = [self.layout(step, slot, config, sizes) for slot, sizes in zip(slots, documents, strict=True)]
        rows = _ordered(config.model, tokens_BN, layouts, starts_BN)
        in_text_order = self.streams(step, config) == 1 and self.shuffled_tokens(step, config) < 2
        rows = rows._replace(in_text_order=in_text_order)
        if config.orders.drafts and rows.visible is None:
            drawn = [orders.random_words(tokens_BN.shape[1], "drafts", config.seed, step, slot) for slot in slots]
            rows = look_ahead(rows, 1 + (np.stack(drawn) % np.uint64(config.orders.drafts)).astype(np.int64))
        decay = config.orders.group_decay
        if decay is None or self.phase(step, config) != "groups":
            return rows
        weights_BN = np.stack([np.exp(-orders.places(layout) / decay) for layout in layouts])
        weights_BN /= weights_BN.mean(axis=-1, keepdims=True)
        return rows._replace(weights=torch.from_numpy(weights_BN.astype(np.float32)))

    def heldout_rows(
        self,
        config: "RunConfig",
        kind: str,
        tokens_BN: np.ndarray,
        numbers: Sequence[int],
        starts_BN: np.ndarray | None = None,
    ) -> Rows:
        def layout(key: int, sizes: Sequence[int]) -> Layout:
            if kind == "permutation":
                return _shuffled(orders.shuffled, config.orders.rho, sizes, 0, key)
            if kind == "strided":
                return _strided(config.train.eval_streams, sizes)
            if kind == "groups":
                return orders.join([orders.groups(size, max(config.orders.groups)) for size in sizes])
            return orders.join([*map(orders.left_to_right, sizes)])

        documents = packing.documents(tokens_BN.shape, starts_BN)
        layouts = [layout(number, sizes) for number, sizes in zip(numbers, documents, strict=True)]
        return _ordered(config.model, tokens_BN, layouts, starts_BN)

    def probes(self, model: "ModelConfig", tokens_BN: np.ndarray) -> list[tuple[Rows, Callable[[Any], Tensor]]]:
        length, tokens = model.length, torch.from_numpy(tokens_BN)
        layouts = [orders.left_to_right(length), orders.shuffled(length, length, 0), orders.strided(length, 4)]

        def logits(layout: Layout) -> Callable[[Any], Tensor]:
            order, blocks = (torch.from_numpy(np.array(field)) for field in layout)
            return lambda exported: exported.logits(tokens, order, blocks)[0, order - 1]

        return [(_ordered(model, tokens_BN, [layout]), logits(layout)) for layout in layouts]

    def kinds(self, config: "RunConfig") -> dict[str, str]:
        kinds = {
            "left_to_right": "left to right",
            "permutation": f"{config.orders.rho} tokens shuffled",
            "strided": f"strided, {config.train.eval_streams} streams",
        }
        if config.orders.groups:
            kinds["groups"] = f"groups of {max(config.orders.groups)}"
        return kinds

    def lags(self, config: "RunConfig") -> int:
        return max([config.orders.drafts, *(size - 1 for size in config.orders.groups)])

    def progress(self, step: int, config: "RunConfig") -> dict[str, Any]:
        shuffled = self.shuffled_tokens(step, config)
        return {"phase": self.phase(step, config), "shuffled": shuffled, "streams": self.streams(step, config)}

    def spans(self, config: "RunConfig") -> list[tuple[str, int, int]]:
        edges = [0, config.orders.ar_steps, config.train.steps, config.total_steps]
        names = ("left to right", "progressive permutation", "strided")
        return list(zip(names, edges, edges[1:], strict=False))

    def report_orders(self, config: "RunConfig") -> list[str]:
        shuffled = [f"shuffled:{config.orders.rho}"] if config.orders.rho else []
        return shuffled + [f"strided:{s}" for s in config.report.generate_streams if s > 1]

    def phase(self, step: int, config: "RunConfig") -> str:
        """``left-to-right``, ``permutation``, ``groups`` or ``strided``."""
        order = config.orders
        strided, in_groups = step >= config.train.steps, step >= order.permutation_steps and order.group_share > 0
        if step < order.ar_steps and not strided:
            return "left-to-right"
        if order.left_to_right_share or in_groups:
            share = orders.draw_share(config.seed, step)
            if share < order.left_to_right_share:
                return "left-to-right"
            if in_groups and not strided and share < order.left_to_right_share + order.group_share:
                return "groups"
        return "strided" if strided else "permutation"

    def streams(self, step: int, config: "RunConfig") -> int:
        """Streams of a strided step, 1 in the base training."""
        if self.phase(step, config) != "strided":
            return 1
        return orders.draw_streams(config.orders.streams, config.seed, step)

    def shuffled_tokens(self, step: int, config: "RunConfig") -> int:
        """Tokens shuffled in each text of ``step``; 0 in strided fine-tuning."""
        if self.phase(step, config) != "permutation":
            return 0
        return orders.shuffled_tokens(
            step,
            ar_steps=config.orders.ar_steps,
            permutation_steps=config.orders.permutation_steps,
            rho=config.orders.rho,
        )

    def layout(self, step: int, slot: int, config: "RunConfig", documents: Sequence[int] | None = None) -> Layout:
        """Generation order and blocks of the text in place ``slot`` of the global batch of ``step``.

        ``documents``: lengths of its separate documents, each in an order of its own; None: it is one sequence.
        """
        sizes, phase = documents or [config.model.length], self.phase(step, config)
        if phase == "strided":
            return _strided(self.streams(step, config), sizes)
        if phase == "groups":
            size, key = orders.draw_group(config.orders.groups, config.seed, step), (config.seed, step, slot)
            words = [orders.random_words(1, "first", *key, *packing.key(number))[0] for number in range(len(sizes))]
            firsts = [int(word % np.uint64(size)) for word in words]
            return orders.join([orders.groups(n, size, first) for n, first in zip(sizes, firsts, strict=True)])
        draw = orders.window if config.orders.shuffle == "window" else orders.shuffled
        return _shuffled(draw, self.shuffled_tokens(step, config), sizes, config.seed, step, slot)


STREAM_TOKENS = 16
"""Tokens of a separate document for every stream: a shorter document has fewer streams. The first tokens of a stream
know least."""


def _shuffled(draw: Callable[..., Layout], count: int, sizes: Sequence[int], *key: int) -> Layout:
    """``count`` shuffled tokens of a text, shared out among its documents by their lengths."""
    counts = packing.share_out(count, sizes)
    parts = enumerate(zip(sizes, counts, strict=True))
    return orders.join([draw(size, count, *key, *packing.key(number)) for number, (size, count) in parts])


def _strided(streams: int, sizes: Sequence[int]) -> Layout:
    if len(sizes) == 1:
        return orders.strided(sizes[0], streams)
    return orders.join([orders.strided(size, max(1, min(streams, size // STREAM_TOKENS))) for size in sizes])


def _ordered(
    model: "ModelConfig", tokens_BN: np.ndarray, layouts: Sequence[Layout], starts_BN: np.ndarray | None = None
) -> Rows:
    assert model.bos_id is not None
    together = Layout(*(np.stack(field) for field in zip(*layouts, strict=True)))
    return arrange(tokens_BN, together, model.bos_id, starts_BN)


TRAINING = ArmdTraining()
