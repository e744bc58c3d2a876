"""Training steps over all processes: Megatron-Core's schedule runs the passes, ZeRO updates the weights.

The schedule runs forward and backward on the bare modules and divides the loss by the number of micro-batches.
``zero.ZeroStage`` averages gradients over the replicas (data x context ranks), steps the sharded optimiser and gathers
weights.

On CUDA, the host starts a step before it reads the outcome of the previous step. So the device decides whether a step
is applied and how much its gradients are clipped. (Under ZeRO-3, DeepSpeed's step synchronises with the device.)
"""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn
from torch.nn import functional as F

from armd_scale.config import RunConfig
from armd_scale.model.context import share
from armd_scale.model.flops import stage_edges
from armd_scale.model.layers import Attention
from armd_scale.model.network import Stage, is_adapter, left_to_right
from armd_scale.parallel import zero
from armd_scale.parallel.groups import replicas, transformer_config
from armd_scale.parallel.sharding import initialise, is_frozen, is_partial
from armd_scale.parallel.timeline import Recorder, Timed
from armd_scale.rows import Rows


class Step(NamedTuple):
    """Outcome of a training step, the same on all ranks."""

    loss: float
    """Mean NLL per token over the batch, in nats."""
    flags: int
    """Sum of the flags that the ranks raised."""
    applied: bool
    """Whether the weights were updated."""
    grad_norm: float
    """Global gradient norm before clipping; can be infinite or NaN if the step was skipped."""
    divergence: float
    """Mean KL(teacher || model) per token in nats; 0 without a teacher."""
    drafts: float
    """Mean loss of the draft rows in nats; 0 without them."""


class Pending:
    """A step that may still run on the device."""

    def __init__(self, values: Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        self._values = values
        if values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            self._done = torch.cuda.Event(blocking=True)
            self._done.record()

    def result(self) -> Step:
        """Wait for the step and return its outcome."""
        if self._done:
            self._done.synchronize()
        loss, flags, applied, norm, divergence, drafts = self._values.tolist()
        return Step(loss, int(flags), bool(applied), norm, divergence, drafts)


class Engine:
    """The sharded model of a run on this rank, with the collective operations of training."""

    def __init__(self, config: RunConfig, device: torch.device, attention_kernel: str | None = None) -> None:
        self.config = config
        self.device = device
        self._parallel = transformer_config(
            config.model, config.parallel, getattr(torch, config.train.dtype), config.train.fp8
        )
        self.stages = nn.ModuleList(self._build_stages())
        for module in self.stages.modules():
            if isinstance(module, Attention):
                module.kernel = attention_kernel
        initialise(self.stages, config.seed)
        self.stages.to(device)
        for name, param in self.named_parameters():
            param.frozen = config.train.freeze and not is_adapter(name)  # type: ignore[attr-defined]
        self.zero = zero.build(config, self.stages)
        self.teacher = self._build_teacher() if config.train.distill else None
        self._spans: deque[tuple[Any, Any]] = deque(maxlen=1000)  # begin and end of the passes of a step
        self._schedule = get_forward_backward_func()
        self._uploads = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _build_stages(self) -> list[Stage]:
        """This rank's pipeline stage; with interleaving, its virtual stages."""
        model, parallel = self.config.model, self.config.parallel
        edges = stage_edges(self.config)
        rank = parallel_state.get_pipeline_model_parallel_rank()
        stages = []
        for virtual in range(parallel.chunks):
            number = virtual * parallel.pipeline + rank
            stage = Stage(
                model,
                self._parallel,
                edges[number],
                edges[number + 1],
                parallel.recompute,
                head_batch=self.config.train.head_batch,
                draft_law=self.config.orders.draft_target == "law",
                freeze=self.config.train.freeze,
            )
            stage.vp_stage = virtual if parallel.chunks > 1 else None  # read by Megatron's schedules
            if stage.is_last and not stage.is_first and model.tied_head:
                stage.embedding.weight.pipeline_copy = True
            stages.append(stage)
        return stages

    def _build_teacher(self) -> Stage | None:
        """The whole imported model, left to right, on the ranks of the last stage; its weights are not set yet."""
        if not any(stage.is_last for stage in self.stages):
            return None
        parallel = transformer_config(self.config.model, self.config.parallel, getattr(torch, self.config.train.dtype))
        teacher = Stage(left_to_right(self.config.model), parallel)
        return teacher.requires_grad_(False).to(self.device)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters under their global names."""
        for stage in self.stages:
            yield from stage.named_parameters()

    @property
    def data_rank(self) -> int:
        return parallel_state.get_data_parallel_rank()

    @property
    def reads_data(self) -> bool:
        """Whether this rank is the first of the ranks that use the same part of the batch."""
        ranks = (
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_context_parallel_rank(),
        )
        return not any(ranks)

    def rank_figures(self, figures: Sequence[float] = ()) -> np.ndarray:
        """Mean time of the passes of a step since the last call, and ``figures``: [ranks, 1 + figures]. Collective.

        The time includes waits for other ranks of the tensor-parallel group and the pipeline.
        """
        stats = torch.zeros(dist.get_world_size(), 1 + len(figures), dtype=torch.float64, device=self.device)
        spans = [a.elapsed_time(b) / 1e3 if self.device.type == "cuda" else b - a for a, b in self._spans]
        stats[dist.get_rank()] = torch.tensor([sum(spans) / max(1, len(spans)), *figures], dtype=torch.float64)
        self._spans.clear()
        dist.all_reduce(stats)
        return stats.cpu().numpy()

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def state_names(self) -> tuple[str, ...]:
        """The float32 tensors of every parameter: master weight, moments, moving average."""
        return self.zero.state_names

    def upload(self, micro_batches: Sequence[Rows]) -> Sequence[Rows]:
        """Copy micro-batches to the device. Another thread can call this during a step without delaying the step."""
        if self._uploads is None:
            return micro_batches
        torch.cuda.set_device(self.device)  # the current device is per thread and starts as GPU 0
        steps = torch.cuda.default_stream(self.device)

        def move(tensor: Tensor) -> Tensor:
            moved = tensor.pin_memory().to(self.device, non_blocking=True)
            moved.record_stream(steps)  # keeps the memory from being reused while a step reads it
            return moved

        with torch.cuda.stream(self._uploads):
            uploaded = [rows.map(move) for rows in micro_batches]
        self._uploads.synchronize()
        return uploaded

    def train_step(
        self, micro_batches: Sequence[Rows], learning_rate: float, limit: float = math.inf, flag: int = 0
    ) -> Pending:
        """Forward, backward and update.

        The step is skipped if its loss exceeds ``limit``, or if its loss or gradient is not finite. ``flag``:
        contribution of this rank to ``Step.flags``.
        """
        self.zero.set_learning_rate(learning_rate)
        self.stages.train()
        with self.zero.accumulate(self._idle(micro_batches)):
            started = self._now()
            results = self._run(micro_batches, self._loss, forward_only=False)
            self._spans.append((started, self._now()))
            self._sum_partial_gradients()
            self._sum_tied_gradients()
        loss, divergence, drafts, flags, norm = self._agree(results, flag)
        accepted, norm = self.zero.update(loss.isfinite() & (loss <= limit), norm)
        return Pending(torch.stack([loss, flags, accepted.double(), norm, divergence, drafts]))

    def _idle(self, micro_batches: Sequence[Rows]) -> list[nn.Parameter]:
        """Parameters that the rows do not train: frozen ones, and without draft rows those of the adapter."""
        drafted = any(rows.drafts is not None for rows in micro_batches)
        named = self.named_parameters()
        return [param for name, param in named if is_frozen(param) or (not drafted and is_adapter(name))]

    def _loss(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a micro-batch, and for the log its mean NLL, divergence from the teacher, and NLL of drafts."""
        means = scores.mean(dim=(-2, -1)).view(-1)
        loss = means[0]
        if len(means) == 3:
            loss = loss + self.config.train.distill * means[1] + self.config.orders.draft_weight * means[2]
        # The schedule changes the loss in place, so what is logged is a copy. It multiplies by the number of context
        # ranks, of which each has the mean of its tokens.
        return loss / self.config.parallel.context, F.pad(means.detach(), (0, 3 - len(means))).clone()

    def _agree(self, results: list[Tensor], flag: int) -> Tensor:
        """Means of ``_loss`` over the micro-batches of all ranks, sum of flags, and gradient norm, in an all-reduce."""
        sums = torch.zeros(5, dtype=torch.float64, device=self.device)
        if results:
            sums[:3] = torch.stack(results).mean(dim=0)
        sums[3].fill_(flag)
        sums[4] = self.zero.squares()
        dist.all_reduce(sums)
        sums[:3] /= replicas().size() * parallel_state.get_tensor_model_parallel_world_size()
        sums[4].sqrt_()
        return sums

    def evaluate(self, micro_batches: Sequence[Rows]) -> tuple[float, int]:
        """Sum of the NLL in nats and number of tokens over the micro-batches of all data-parallel ranks."""
        self.stages.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        if micro_batches:
            padded = self._padded(micro_batches)
            with torch.no_grad():
                sums = self._run(padded, lambda nll: (nll.mean(), nll.double().sum(1)), forward_only=True)
            for rows, of_texts in zip(micro_batches, sums, strict=False):
                totals[0] += of_texts[: len(rows.target_tokens)].sum()
                totals[1] += rows.target_tokens.numel() if rows.counted is None else rows.counted.sum()
            totals[1] /= self.config.parallel.context
        self._sum_over_stages_and_replicas(totals)
        return float(totals[0]), int(totals[1])

    def acceptance(self, micro_batches: Sequence[Rows], lags: int) -> tuple[list[float], list[float]]:
        """How tokens of draft rows are accepted, over the texts of all data-parallel ranks.

        ``micro_batches``: the same rows ``lags`` times in succession, with drafts that look 1, ..., ``lags`` tokens
        ahead. Returns for every lag the mean probability that its token is accepted, and that it and those before it
        are.
        """
        self.stages.eval()
        totals = torch.zeros(1 + 2 * lags, dtype=torch.float64, device=self.device)

        def forward(stage: Stage, rows: Rows) -> Tensor:
            return stage.accepted(rows) if stage.is_last else stage(rows)

        if micro_batches:
            with torch.no_grad():
                results = self._run(
                    self._padded(micro_batches), lambda shared: (shared.sum(), shared), True, forward=forward
                )
            for first in range(0, len(micro_batches) if results else 0, lags):  # only the last stage has results
                # Draft row n of lag k is judged by target row n + k, which must exist for the longest lag.
                drafts = micro_batches[first + lags - 1].drafts
                assert drafts
                judged = share(self._parallel).part(drafts.weights > 0).to(self.device)
                shared = torch.stack([one[: len(judged)][judged] for one in results[first : first + lags]]).double()
                totals[0] += shared[0].numel()
                totals[1:] += torch.cat([shared.sum(1), shared.cumprod(0).sum(1)])
        self._sum_over_stages_and_replicas(totals)
        means = (totals[1:] / totals[0]).tolist()
        return means[:lags], means[lags:]

    def _padded(self, micro_batches: Sequence[Rows]) -> list[Rows]:
        """Micro-batches of an evaluation, filled up where pipeline stages need it: stages exchange full micro-batches,
        interleaved stages a multiple of their number.
        """
        padded = list(micro_batches)
        if self.config.parallel.pipeline > 1:
            padded = [rows.fill(self.config.train.micro_batch) for rows in padded]
            padded += [padded[-1]] * (-len(padded) % self.config.parallel.pipeline)
        return padded

    def _sum_over_stages_and_replicas(self, totals: Tensor) -> None:
        """Sum over the pipeline stages, of which the last one alone counts, and over the replicas."""
        dist.all_reduce(totals, group=parallel_state.get_pipeline_model_parallel_group())
        dist.all_reduce(totals, group=replicas())

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Timed]]:
        """Record the passes of this rank, with their times, in the returned list."""
        recorder = Recorder()
        self._parallel.timers = recorder
        try:
            yield recorder.passes
        finally:
            self._parallel.timers = None

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Use the moving average of the weights."""
        self.zero.swap_average()
        try:
            yield
        finally:
            self.zero.swap_average()

    def link_states(self) -> None:
        """Prepare ``read_state``."""
        self.zero.link_states()

    def read_state(self, param: nn.Parameter, name: str) -> Tensor:
        """A state of ``state_names`` of a parameter, for the tensor-parallel part of this rank. Collective.

        Call ``link_states`` first.
        """
        return self.zero.read_state(param, name)

    def write_state(self, read: Callable[[nn.Parameter, str, str], Tensor], steps: int) -> None:
        """Set all states from ``read(param, parameter name, state name)``, as after ``steps`` updates. Collective."""
        self.zero.write_states(self.named_parameters(), read, steps)

    def _run(
        self,
        micro_batches: Sequence[Rows],
        loss: Callable,
        forward_only: bool,
        forward: Callable[[Stage, Rows], Tensor] | None = None,
    ) -> list[Tensor]:
        def forward_step(batches: Iterator[Rows], stage: Stage) -> tuple[Tensor, Callable]:
            rows = next(batches).to(self.device)
            if forward:
                return forward(stage, rows), loss
            taught = rows.in_text_order and not forward_only
            return stage(rows, self.teacher if taught else None), loss

        streams = self.config.model.streams + any(rows.drafts is not None for rows in micro_batches)
        return self._schedule(
            forward_step_func=forward_step,
            data_iterator=[iter(micro_batches) for _ in self.stages],
            model=list(self.stages),
            num_microbatches=len(micro_batches),
            seq_length=self.config.model.length,
            micro_batch_size=self.config.train.micro_batch * streams,  # of what stages exchange
            forward_only=forward_only,
        )

    def _sum_partial_gradients(self) -> None:
        """Sum the gradients of parameters for which tensor-parallel ranks compute partial gradients."""
        if self.config.parallel.tensor == 1:
            return
        group = parallel_state.get_tensor_model_parallel_group()
        for param in filter(is_partial, self.stages.parameters()):
            if param.requires_grad:
                dist.all_reduce(self.zero.gradient(param), group=group)

    def _sum_tied_gradients(self) -> None:
        """Sum the gradients of a tied weight, which has copies on the first and the last stage."""
        if self.config.parallel.pipeline == 1 or not self.config.model.tied_head:
            return
        for stage in self.stages:
            if (stage.is_first or stage.is_last) and stage.embedding.weight.requires_grad:
                dist.all_reduce(self.zero.gradient(stage.embedding.weight), group=parallel_state.get_embedding_group())
