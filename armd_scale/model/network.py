"""The network, or the contiguous layers of a (virtual) pipeline stage.

The first stage embeds the context rows (X stream) and seeds the target rows (G stream). Layers below ``two_stream``
carry both streams, the other layers carry G alone. The last stage scores the targets. Stages exchange tensors
[N, 2 B, d], whose second half is zero where only G exists. Draft rows, if there are any, are a further stream of B
columns behind G that sees what G sees.

Single-stream objectives embed the context rows only. A causal objective predicts from each row the token of the next
row (the shift query); a bidirectional objective predicts the token that the row masks.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.enums import ModelType
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from armd_scale.config import AdapterConfig, ModelConfig
from armd_scale.model import attention, context, laws
from armd_scale.model.attention import Seen, Span
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
from armd_scale.model.prefix import PrefixAggregation, neighbours
from armd_scale.model.regions import on_cuda
from armd_scale.rows import Rows


class Stage(nn.Module):
    """Layers ``first`` to ``last`` (exclusive) of the network.

    ``recompute``: what the backward pass recomputes: ``none``, ``selective`` (attention) or ``full`` (layers).
    ``kinds``: linear modules of the layers, by default the fastest that this device supports. ``head_batch``: number of
    texts whose logits exist at the same time; None: all. ``draft_law``: the loss of draft rows is their divergence from
    the law of the target rows that predict the same tokens, instead of their NLL. ``freeze``: the adapter alone is
    trained, so that no row but the draft rows has a gradient.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        config: TransformerConfig,
        first: int = 0,
        last: int | None = None,
        recompute: str = "none",
        kinds: Linears | None = None,
        head_batch: int | None = None,
        draft_law: bool = False,
        freeze: bool = False,
    ) -> None:
        super().__init__()
        self.draft_law, self.freeze = draft_law, freeze
        self.share = context.share(config)
        kinds = kinds or linears(bool(config.fp8))
        self.head_batch = head_batch
        last = model_config.layers if last is None else last
        self.config = config  # Megatron's schedules read config and model_type
        self.model_type = ModelType.encoder_or_decoder
        self.model_config = model_config
        self.is_first, self.is_last = first == 0, last == model_config.layers
        self.recompute = recompute
        self._received: Tensor | None = None
        vocab = model_config.padded_vocab
        if self.is_first or (self.is_last and model_config.tied_head):
            self.embedding = VocabParallelEmbedding(
                vocab, model_config.hidden, init_method=lambda weight: weight, config=config
            )
            describe(self.embedding.weight, Initial(model_config.init_std), 0)
        if self.is_first and model_config.traits.streams == 2:
            self.prefix = PrefixAggregation(model_config, config)
        # Names hold the global layer number, so that checkpoints do not depend on the pipeline layout.
        recompute_attention = recompute == "selective"
        self.layers = nn.ModuleDict(
            {
                str(index): Layer(model_config, config, kinds, *streams_of(model_config, index), recompute_attention)
                for index in range(first, last)
            }
        )
        if self.is_last:
            self.norm = Norm(model_config, config)
            self.head = ColumnParallelLinear(
                model_config.hidden,
                vocab,
                config=config,
                init_method=lambda weight: weight,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=model_config.tied_head,
            )
            if not model_config.tied_head:
                describe(self.head.weight, Initial(model_config.init_std), 0)
            # The table is padded: rows of this rank beyond the vocabulary get no probability.
            local = self.head.output_size_per_partition
            assert model_config.vocab_size is not None
            self.vocab_rows = min(local, max(0, model_config.vocab_size - local * self.head.tp_group.rank()))

    def set_input_tensor(self, received: Tensor | list[Tensor | None] | None) -> None:
        """Set the activations received from the previous stage; called by Megatron's schedules."""
        self._received = received[0] if isinstance(received, list) else received

    def forward(self, rows: Rows, teacher: "Stage | None" = None) -> Tensor:
        """NLL of the targets in nats, [B, N] float32 in generation order, times ``rows.weights``.

        ``teacher``: a whole left-to-right network, for rows in text order. With a teacher or drafts the result is
        [3, B, N]: NLL, KL(teacher || network) in nats, and loss of the drafts times their weights. Stages before the
        last return their activations. A context-parallel rank has the results of its rows (``context.Share``).
        """
        h = self.hidden(rows)
        if self.is_last:
            return self._scored(h, rows, teacher)
        missing = self.model_config.streams * len(rows.target_tokens) - h.shape[1] + _drafted(rows)
        if self.config.pipeline_model_parallel_size > 1 and missing:
            # Stages exchange fixed-size tensors: negotiating a shape would synchronise with the device.
            h = torch.cat([h, h.new_zeros(len(h), missing, h.shape[2])], dim=1)
        return h

    def _scored(self, h: Tensor, rows: Rows, teacher: "Stage | None") -> Tensor:
        """The result of the last stage."""
        own = self.share.of(rows)
        h, *ahead = (part.contiguous() for part in h.split(len(own.target_tokens), dim=1)) if own.drafts else (h,)
        h = h.detach() if self.freeze else h
        scores = self.nll(h, own.target_tokens) if teacher is None else self._taught(h, rows, teacher)
        scores = scores if own.weights is None else scores * own.weights
        if teacher is None and not ahead:
            return scores
        planes = list(scores) if teacher else [scores, torch.zeros_like(scores)]
        for drafts in ahead:
            planes.append(self._drafted(drafts, h, own))
        return torch.stack(planes + [torch.zeros_like(planes[0])] * (3 - len(planes)))

    def hidden(self, rows: Rows) -> Tensor:
        """Activations after the last layer of this stage."""
        h = self._enter(rows) if self.is_first else self._received
        assert h is not None
        streams = next(iter(self.layers.values())).streams_in
        h = h[:, : streams * len(rows.target_tokens) + _drafted(rows)]
        own = self.share.of(rows)
        of_context = self._rotary(own.context_positions)
        shift = int(self.model_config.prefix.place == "before")
        of_target = self._rotary(own.target_positions - shift)
        of_targets = of_target.repeat(self._rotary(own.drafts.positions - shift)) if own.drafts else of_target
        of_all = of_context.repeat(of_targets)
        # Made once for all layers, as backends cache data derived from a mask with its tensor (see attention.flex).
        seen_of_targets, seen_of_context, seen_of_all = self._seen(own, rows.context_tokens.shape[1])
        drafts = int(rows.drafts is not None)
        apart = bool(drafts) and self.freeze and torch.is_grad_enabled()
        update: Tensor | None = None  # residual update of the previous layer, not yet added to h
        for layer in self.layers.values():
            if self.model_config.traits.streams == 1:
                inputs = (of_context, of_context, seen_of_context)
            elif layer.streams_in == 1:
                inputs = (of_targets, of_target, seen_of_targets)
            elif layer.streams_out == 1:
                inputs = (of_targets, of_context, seen_of_context)
            else:
                inputs = (of_all, of_context, seen_of_all)
            if self.recompute == "full" and torch.is_grad_enabled():
                # The sum is computed here, so that the checkpoint keeps a single tensor per layer.
                h = torch.add(
                    *checkpoint(
                        self._through, layer, h, None, *inputs, drafts, apart, use_reentrant=False,
                        preserve_rng_state=False,
                    )
                )  # fmt: skip
            else:
                h, update = self._through(layer, h, update, *inputs, drafts, apart)
        return h if update is None else h + update

    def _seen(self, own: Rows, length: int) -> tuple[Seen | None, Seen | None, Seen | None]:
        """What targets see of targets, targets of the context, and context and targets of the context."""
        first = None if own.starts is None else own.starts[None]
        if own.visible is not None:
            context_of_context, context_of_target, target_of_target = own.visible
            both = torch.stack([context_of_context, context_of_target])
            return Seen(target_of_target[None], first), Seen(context_of_target[None], first), Seen(both, first)
        if not self.model_config.traits.causal or (first is None and self.share.ranks == 1):
            return None, None, None
        end = self.share.part(torch.arange(1, length + 1, device=own.context_tokens.device))[None, None]
        seen = Seen(end, first, None if first is not None else self._spans(length))
        return seen, seen, seen

    def _spans(self, length: int) -> tuple[Span, ...]:
        """What the rows of this rank see at most with one token a block."""
        spans, done = [], 0
        for chunk in self.share.chunks(length):
            for start in range(chunk.start, chunk.stop, attention.PIECE):
                stop = min(start + attention.PIECE, chunk.stop)
                spans.append(Span(slice(done, done + stop - start), slice(0, stop)))
                done += stop - start
        return tuple(spans)

    def _through(self, layer: nn.Module, *inputs: Any) -> tuple[Tensor, Tensor]:
        # The context is entered per layer, as recomputation in the backward pass needs the context too.
        with get_fp8_context(self.config):
            return layer(*inputs)

    def logits(self, h: Tensor) -> Tensor:
        """Logits of each row for the vocabulary part of this rank, [N, B, V / tensor], float32."""
        logits = self._scores(h)
        unused = logits.shape[-1] - self.vocab_rows
        if unused:
            logits = F.pad(logits[..., : self.vocab_rows], (0, unused), value=torch.finfo(logits.dtype).min)
        return logits.float()

    def _scores(self, h: Tensor) -> Tensor:
        """Logits for the table rows of this rank, padding included, in the dtype of the weights."""
        return self.head(self.norm(h)[1], weight=self.embedding.weight if self.model_config.tied_head else None)[0]

    def nll(self, h: Tensor, target_tokens_BN: Tensor) -> Tensor:
        """-log p of the targets in nats, [B, N], from activations [N, B, d]."""
        return self._in_parts(self._nll, h, target_tokens_BN)

    def _in_parts(self, score: Callable[..., Tensor], h: Tensor, targets_BN: Tensor, *more: Tensor) -> Tensor:
        """``score`` of activations [N, B, d] and targets, with the logits of ``head_batch`` texts at a time."""
        size = self.head_batch or len(targets_BN)
        if size >= len(targets_BN):
            return score(h, targets_BN, *more)
        parts = zip(targets_BN.split(size), *(tensor.split(size, dim=1) for tensor in (h, *more)), strict=True)
        scores = []
        for targets, *activations in parts:
            first, *rest = (tensor.contiguous() for tensor in activations)
            if torch.is_grad_enabled():
                kept = {"use_reentrant": False, "preserve_rng_state": False}
                scores.append(checkpoint(score, first, targets, *rest, **kept))
            else:
                scores.append(score(first, targets, *rest))
        return torch.cat(scores, dim=-2)

    def _taught(self, h: Tensor, rows: Rows, teacher: "Stage") -> Tensor:
        """NLL of the targets and divergence from ``teacher``, [2, B, N]."""

        def score(h: Tensor, targets_BN: Tensor, taught: Tensor) -> Tensor:
            with torch.no_grad():
                known = teacher.logits(taught)
            return laws.scores(self.logits(h), targets_BN.t(), known).transpose(1, 2)

        with torch.no_grad():
            taught = teacher.hidden(rows._replace(drafts=None))
        return self._in_parts(score, h, self.share.part(rows.target_tokens), taught)

    def _drafted(self, ahead: Tensor, h: Tensor, own: Rows) -> Tensor:
        """Loss of draft rows from activations [N, B, d] of draft and target rows, times its weights, [B, N]."""
        assert own.drafts
        if not self.draft_law:
            return self.nll(ahead, own.drafts.tokens) * own.drafts.weights

        def score(ahead: Tensor, tokens_BN: Tensor, judges: Tensor) -> Tensor:
            with torch.no_grad():
                known = self.logits(judges)
            return laws.scores(self.logits(ahead), tokens_BN.t(), known)[1].t()

        judges = self._later(h.detach(), own.drafts.lags)
        return self._in_parts(score, ahead, own.drafts.tokens, judges) * own.drafts.weights

    def _nll(self, h: Tensor, target_tokens_BN: Tensor) -> Tensor:
        if self.config.tensor_model_parallel_size == 1 and on_cuda(h):
            return cross_entropy(self._scores(h), target_tokens_BN.t(), self.vocab_rows).t()
        # Megatron's cross-entropy overwrites the logits, which have no other use.
        return vocab_parallel_cross_entropy(self.logits(h), target_tokens_BN.t().contiguous()).t()

    @torch.no_grad()
    def accepted(self, rows: Rows) -> Tensor:
        """``laws.overlap`` of every draft row and of the target row that predicts the same token: [B, N]."""
        own = self.share.of(rows)
        assert own.drafts
        h, ahead = (part.contiguous() for part in self.hidden(rows).split(len(own.target_tokens), dim=1))

        def score(ahead: Tensor, _: Tensor, judges: Tensor) -> Tensor:
            return laws.overlap(self.logits(ahead), self.logits(judges)).t()

        return self._in_parts(score, ahead, own.drafts.tokens, self._later(h, own.drafts.lags))

    @torch.no_grad()
    def _later(self, h: Tensor, lags_BN: Tensor) -> Tensor:
        """Activations of the target rows that predict the tokens of draft rows; any for tokens behind the text."""
        if self.config.sequence_parallel:
            h = gather_from_sequence_parallel_region(h, tensor_parallel_output_grad=False)
        length = len(h) * self.share.ranks
        index_NB = self.share.part(torch.arange(length, device=h.device))[:, None] + lags_BN.t()
        every = context.gather(h, self.share)
        later = every.gather(0, index_NB.clamp(max=length - 1)[..., None].expand(-1, -1, h.shape[2]))
        return scatter_to_sequence_parallel_region(later) if self.config.sequence_parallel else later

    def _enter(self, rows: Rows) -> Tensor:
        if self.model_config.traits.streams == 1:
            h = self.embedding(self.share.part(rows.context_tokens)).transpose(0, 1).contiguous()
            return scatter_to_sequence_parallel_region(h) if self.config.sequence_parallel else h
        length = rows.context_tokens.shape[1]
        windows = self.prefix.windows(rows)
        tokens = [rows.context_tokens[:, window] for window in windows]
        nearest, targets = [], [rows.target_positions, *([rows.drafts.positions] if rows.drafts else [])]
        if self.model_config.prefix.neighbour:
            nearest = [neighbours(rows, targets_BN) for targets_BN in targets]
            tokens += [self.share.part(tokens_BN) for tokens_BN, _ in nearest]
        embedded = self.embedding(torch.cat(tokens, dim=1)).split([part.shape[1] for part in tokens], dim=1)
        seeds = self.prefix(embedded[: len(windows)], rows)
        for number, (_, seen_BN) in enumerate(nearest):
            seen_NB1 = self.share.part(seen_BN).t()[..., None]
            seeds[number] = seeds[number] + embedded[len(windows) + number].transpose(0, 1) * seen_NB1
        chunks = zip(self.share.chunks(length), windows, embedded, strict=False)
        x = [part[:, chunk.start - window.start :] for chunk, window, part in chunks]
        context_NBd = torch.cat(x, dim=1).transpose(0, 1)
        h = torch.cat([context_NBd, *(seed.to(context_NBd.dtype) for seed in seeds)], dim=1)
        return scatter_to_sequence_parallel_region(h) if self.config.sequence_parallel else h

    def _rotary(self, positions_BN: Tensor) -> Rotary:
        return rotary(positions_BN, self.model_config)


def _drafted(rows: Rows) -> int:
    """Columns of draft rows."""
    return len(rows.target_tokens) if rows.drafts else 0


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to draft rows alone."""
    return "_adapter." in name or name.startswith("prefix.draft_")


def streams_of(config: ModelConfig, index: int) -> tuple[int, int]:
    """Streams into and out of layer ``index``."""
    if index >= config.two_stream:
        return 1, 1
    return (2, 1) if index == config.two_stream - 1 else (2, 2)


def left_to_right(config: ModelConfig) -> ModelConfig:
    """The network with one causal stream and the same layers, without an adapter."""
    return config.model_copy(update={"objective": "ar", "adapter": AdapterConfig()})
