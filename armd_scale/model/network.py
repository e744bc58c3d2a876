"""The network, or one pipeline stage of it: consecutive layers.

The first stage embeds the context rows (stream X) and seeds the targets (stream G). Layers below ``two_stream`` carry
both streams, the others G alone. The last stage scores the targets. Stages exchange one tensor, [N, 2 B, d]; its second
half is zero where G is alone.

Objectives of one stream have the embeddings of the context rows alone: a causal one predicts from each row the token of
the next (the shift query), one that sees everything the token that a row masks.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.enums import ModelType
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    VocabParallelEmbedding,
    scatter_to_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from armd_scale.config import ModelConfig
from armd_scale.model.layers import (
    Layer,
    Linears,
    Norm,
    Rotary,
    cross_entropy,
    linears,
    rotary,
)
from armd_scale.model.parameters import Initial, describe
from armd_scale.model.prefix import PrefixAggregation
from armd_scale.model.regions import on_cuda
from armd_scale.rows import Rows


class Stage(nn.Module):
    """Layers ``first`` to ``last`` (exclusive) of the network.

    ``recompute``: activations that the backward pass computes again: ``none``, ``selective`` (inside attention),
    ``full`` (inside layers). ``kinds``: linears of the layers, by default the fastest available ones. ``head_batch``:
    number of texts whose logits exist at the same time; None: all.
    """

    def __init__(
        self,
        config: ModelConfig,
        parallel: TransformerConfig,
        first: int = 0,
        last: int | None = None,
        recompute: str = "none",
        kinds: Linears | None = None,
        head_batch: int | None = None,
    ) -> None:
        super().__init__()
        kinds = kinds or linears(bool(parallel.fp8))
        self.head_batch = head_batch
        last = config.layers if last is None else last
        self.config = parallel  # Megatron's schedules read ``config`` and ``model_type``
        self.model_type = ModelType.encoder_or_decoder
        self.model_config = config
        self.is_first, self.is_last = first == 0, last == config.layers
        self.recompute = recompute
        self._received: Tensor | None = None
        vocab = config.padded_vocab
        if self.is_first or (self.is_last and config.tied_head):
            self.embedding = VocabParallelEmbedding(
                vocab, config.hidden, init_method=lambda weight: weight, config=parallel
            )
            describe(self.embedding.weight, Initial(config.init_std), 0)
        if self.is_first and config.traits.streams == 2:
            self.prefix = PrefixAggregation(config, parallel)
        # Names carry the global layer number, so that checkpoints do not depend on the pipeline layout.
        self.layers = nn.ModuleDict(
            {
                str(index): Layer(config, parallel, kinds, *streams_of(config, index), recompute == "selective")
                for index in range(first, last)
            }
        )
        if self.is_last:
            self.norm = Norm(config, parallel)
            self.head = ColumnParallelLinear(
                config.hidden,
                vocab,
                config=parallel,
                init_method=lambda weight: weight,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=config.tied_head,
            )
            if not config.tied_head:
                describe(self.head.weight, Initial(config.init_std), 0)
            # The table has padding rows; those of this rank get no probability.
            local = self.head.output_size_per_partition
            assert config.vocab_size is not None
            self.vocab_rows = min(local, max(0, config.vocab_size - local * self.head.tp_group.rank()))

    def set_input_tensor(self, received: Tensor | list[Tensor | None] | None) -> None:
        """Take the activations of the previous stage; called by Megatron's schedules."""
        self._received = received[0] if isinstance(received, list) else received

    def forward(self, rows: Rows) -> Tensor:
        """NLL of every target in nats [B, N], generation order, float32, times its weight if rows have weights; on
        earlier stages, the activations for the next stage."""
        h = self.hidden(rows)
        if self.is_last:
            nll = self.nll(h, rows.target_tokens)
            return nll if rows.weights is None else nll * rows.weights
        missing = self.model_config.streams * len(rows.target_tokens) - h.shape[1]
        if self.config.pipeline_model_parallel_size > 1 and missing:
            # Stages exchange fixed-size tensors: negotiating a shape would synchronise with the device.
            h = torch.cat([h, torch.zeros_like(h)], dim=1)
        return h

    def hidden(self, rows: Rows) -> Tensor:
        """Activations after the last layer of this stage."""
        h = self._enter(rows) if self.is_first else self._received
        assert h is not None
        streams = next(iter(self.layers.values())).streams_in
        h = h[:, : streams * len(rows.target_tokens)]
        of_context = self._rotary(rows.context_positions)
        of_target = self._rotary(rows.target_positions)
        of_both = of_context.repeat(of_target)
        # Made once for all layers: ``attention.flex`` caches its block mask by the tensor.
        seen = rows.visible and (
            rows.visible.target_of_target[None],
            rows.visible.context_of_target[None],
            torch.stack(rows.visible[:2]),
        )
        update: Tensor | None = None  # added to h by the next norm
        for layer in self.layers.values():
            if self.model_config.traits.streams == 1:
                inputs = (of_context, of_context, None)
            elif layer.streams_in == 1:
                inputs = (of_target, of_target, seen and seen[0])
            elif layer.streams_out == 1:
                inputs = (of_target, of_context, seen and seen[1])
            else:
                inputs = (of_both, of_context, seen and seen[2])
            if self.recompute == "full" and torch.is_grad_enabled():
                # Sum here, so that one tensor is kept per layer.
                h = torch.add(
                    *checkpoint(self._through, layer, h, None, *inputs, use_reentrant=False, preserve_rng_state=False)
                )
            else:
                h, update = self._through(layer, h, update, *inputs)
        return h if update is None else h + update

    def _through(self, layer: nn.Module, *inputs: Any) -> tuple[Tensor, Tensor]:
        # Around each layer and not around all: recomputation in the backward pass needs the context as well.
        with get_fp8_context(self.config):
            return layer(*inputs)

    def logits(self, h: Tensor) -> Tensor:
        """Logits of this rank's part of the vocabulary, [N, B, V / tensor], float32."""
        logits = self._scores(h)
        unused = logits.shape[-1] - self.vocab_rows
        if unused:
            logits = F.pad(logits[..., : self.vocab_rows], (0, unused), value=torch.finfo(logits.dtype).min)
        return logits.float()

    def _scores(self, h: Tensor) -> Tensor:
        """Logits of this rank's rows of the table, padding rows included, in the type of the weights."""
        return self.head(self.norm(h)[1], weight=self.embedding.weight if self.model_config.tied_head else None)[0]

    def nll(self, h: Tensor, target_tokens_BN: Tensor) -> Tensor:
        """-log p of the targets in nats, [B, N], from activations [N, B, d]."""
        size = self.head_batch or len(target_tokens_BN)
        if size >= len(target_tokens_BN):
            return self._nll(h, target_tokens_BN)
        parts = zip(h.split(size, dim=1), target_tokens_BN.split(size), strict=True)
        return torch.cat([self._nll_of_part(part.contiguous(), targets) for part, targets in parts])

    def _nll_of_part(self, h: Tensor, targets_BN: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self._nll(h, targets_BN)
        return checkpoint(self._nll, h, targets_BN, use_reentrant=False, preserve_rng_state=False)

    def _nll(self, h: Tensor, target_tokens_BN: Tensor) -> Tensor:
        if self.config.tensor_model_parallel_size == 1 and on_cuda(h):
            return cross_entropy(self._scores(h), target_tokens_BN.t(), self.vocab_rows).t()
        # Megatron's cross-entropy overwrites the logits.
        return vocab_parallel_cross_entropy(self.logits(h), target_tokens_BN.t().contiguous()).t()

    def _enter(self, rows: Rows) -> Tensor:
        h = self.embedding(rows.context_tokens).transpose(0, 1).contiguous()
        if self.model_config.traits.streams == 2:
            seen = rows.visible and rows.visible.context_of_target
            h = torch.cat([h, self.prefix(h, rows.context_positions, rows.target_positions, seen)], dim=1)
        return scatter_to_sequence_parallel_region(h) if self.config.sequence_parallel else h

    def _rotary(self, positions_BN: Tensor) -> Rotary:
        return rotary(positions_BN, self.model_config.head_dim, self.model_config.rope_base)


def streams_of(config: ModelConfig, index: int) -> tuple[int, int]:
    """Streams into and out of layer ``index``."""
    if index >= config.two_stream:
        return 1, 1
    return (2, 1) if index == config.two_stream - 1 else (2, 2)
