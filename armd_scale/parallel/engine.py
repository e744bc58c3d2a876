"""One training step over all processes: Megatron-Core's schedule runs it, a DeepSpeed ZeRO engine updates the weights.

The schedule runs forward and backward on the bare module and divides the loss by the number of micro-batches; DeepSpeed
shards optimiser, gradients and weights, averages gradients over the data-parallel ranks and gathers weights.
The engine's own ``forward`` and ``backward`` are never called: they would scale gradients again.

A step is asked for, and its outcome looked at later: on CUDA the host runs ahead of the device. So whether a step is
applied, and by how much its gradients are clipped, is decided on the device. (ZeRO-3 is the exception: DeepSpeed
itself waits for the norm there.)
"""

import contextlib
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import deepspeed
import deepspeed.ops
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from armd_scale.config import RunConfig
from armd_scale.model.flops import run_edges
from armd_scale.model.layers import Attention
from armd_scale.model.network import Stage
from armd_scale.parallel import optimizer as optimizers
from armd_scale.parallel.groups import MegatronTopology, transformer_config
from armd_scale.parallel.sharding import initialise, local_shape, partition_dim
from armd_scale.parallel.timeline import Recorder, Timed
from armd_scale.rows import Rows

MASTER = "weight"
"""Name of the float32 master weights beside the optimiser's own states."""

BUCKET = 40_000_000
"""Largest number of gradients that one reduction of ZeRO collects before it is sent."""


class Step(NamedTuple):
    """What came of a training step, the same on all ranks."""

    loss: float
    """Mean NLL per token over the batch, in nats."""
    flags: int
    """Sum of the flags that the ranks raised."""
    applied: bool
    """Whether the weights were updated."""
    grad_norm: float
    """Global gradient norm before clipping; it may be not finite where the step was not applied."""


class Pending:
    """A step that the device may still be working on."""

    def __init__(self, told: Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        self._told = told
        if told.is_cuda:
            self._told = torch.empty_like(told, device="cpu", pin_memory=True).copy_(told, non_blocking=True)
            self._done = torch.cuda.Event(blocking=True)
            self._done.record()

    def result(self) -> Step:
        """Wait for the step."""
        if self._done:
            self._done.synchronize()
        loss, flags, applied, norm = self._told.tolist()
        return Step(loss, int(flags), bool(applied), norm)


class Engine:
    """The sharded model of a run on this rank, and the operations that all ranks do together."""

    def __init__(self, config: RunConfig, device: torch.device, attention_kernel: str | None = None) -> None:
        self.config = config
        self.device = device
        self.zero = config.parallel.zero
        self._parallel = transformer_config(
            config.model, config.parallel, getattr(torch, config.train.dtype), config.train.fp8
        )
        self.chunks = nn.ModuleList(self._build_chunks())
        for module in self.chunks.modules():
            if isinstance(module, Attention):
                module.kernel = attention_kernel
        initialise(self.chunks, config.model, config.seed)
        self.chunks.to(device)
        # Neither is wanted: operations that DeepSpeed would probe with a compiler at every start, and a line a step.
        deepspeed.ops.__compatible_ops__ = {}
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=self.chunks,
            optimizer=optimizers.build(self.chunks, config.optimizer),
            mpu=MegatronTopology(count_by_tensor_rank=self.zero == 3),
            config=_deepspeed_config(config, sum(p.numel() for p in self.chunks.parameters())),
        )
        self._engine.enable_backward_allreduce = False  # see _reduce
        # With these, every rank has the whole gradients, in the type in which they are summed.
        self._whole_gradients = self.zero == 0 or isinstance(self._zero, BF16_Optimizer)
        self._untouched: set[nn.Parameter] = set()  # whose sum of gradients is that of the step before
        if isinstance(self._zero, BF16_Optimizer):
            self._sum_in_float32()
        # ZeRO-0 in float32 steps the bare optimiser; every other stage wraps it.
        self._base: optimizers.AveragedAdamW = self._zero.optimizer if self.zero else self._zero
        self._spans: deque[tuple[Any, Any]] = deque(maxlen=1000)  # begin and end of the passes of a step
        self._schedule = get_forward_backward_func()
        self._uploads = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _build_chunks(self) -> list[Stage]:
        """This rank's runs of layers: one, or several when stages are interleaved."""
        model, parallel = self.config.model, self.config.parallel
        edges = run_edges(self.config)
        rank = parallel_state.get_pipeline_model_parallel_rank()
        chunks = []
        for chunk in range(parallel.chunks):
            run = chunk * parallel.pipeline + rank
            stage = Stage(
                model,
                self._parallel,
                edges[run],
                edges[run + 1],
                parallel.recompute,
                head_batch=self.config.train.head_batch,
            )
            stage.vp_stage = chunk if parallel.chunks > 1 else None  # read by Megatron's schedules
            if stage.is_last and not stage.is_first and model.tied_head:
                # The copy of the embedding that is the head: counted once in the gradient norm.
                stage.embedding.weight.ds_pipe_replicated = True
            if self.zero == 3 and model.tied_head:
                deepspeed.zero.register_external_parameter(stage, stage.embedding.weight)
            chunks.append(stage)
        return chunks

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters under their global names."""
        for chunk in self.chunks:
            yield from chunk.named_parameters()

    def _sum_in_float32(self) -> None:
        """Let every gradient go into its float32 sum as soon as it is there. DeepSpeed's own hooks make a float32 copy
        of it first, and its step zeroes all sums.
        """

        def add(param: nn.Parameter) -> None:
            assert param.grad is not None
            total = _gradient(param)
            gradient, param.grad = param.grad.view_as(total), None
            if param in self._untouched:
                self._untouched.remove(param)
                total.copy_(gradient)
            else:
                total.add_(gradient)

        for params, sums in zip(self._zero.bf16_groups, self._zero.fp32_groups_gradients, strict=True):
            for param, total in zip(params, sums, strict=True):
                param._hp_grad = total
                param.register_post_accumulate_grad_hook(add)

    @property
    def data_rank(self) -> int:
        return parallel_state.get_data_parallel_rank()

    @property
    def reads_data(self) -> bool:
        """Whether this rank is the one, of those that share a part of the batch, that answers for it."""
        first_stage = parallel_state.get_pipeline_model_parallel_rank() == 0
        return first_stage and parallel_state.get_tensor_model_parallel_rank() == 0

    def rank_figures(self, figures: Sequence[float] = ()) -> np.ndarray:
        """Mean time of the passes since the last call and ``figures``, of every rank [ranks, 1 + figures]; collective.

        The time of a rank includes what it waits for ranks of its own tensor-parallel group and pipeline.
        """
        told = torch.zeros(dist.get_world_size(), 1 + len(figures), dtype=torch.float64, device=self.device)
        spans = [a.elapsed_time(b) / 1e3 if self.device.type == "cuda" else b - a for a, b in self._spans]
        told[dist.get_rank()] = torch.tensor([sum(spans) / max(1, len(spans)), *figures], dtype=torch.float64)
        self._spans.clear()
        dist.all_reduce(told)
        return told.cpu().numpy()

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def state_names(self) -> tuple[str, ...]:
        """What is kept for every parameter, all float32: master weight, moments, moving average."""
        average = (optimizers.EMA,) if self._base.ema_decay else ()
        return (MASTER, *optimizers.MOMENTS, *average)

    def upload(self, micro_batches: Sequence[Rows]) -> Sequence[Rows]:
        """The micro-batches on the device. Another thread may call it during a step: neither waits for the other."""
        if self._uploads is None:
            return micro_batches
        torch.cuda.set_device(self.device)  # each thread has its own; that of a new one is GPU 0
        steps = torch.cuda.default_stream(self.device)

        def move(tensor: Tensor) -> Tensor:
            moved = tensor.pin_memory().to(self.device, non_blocking=True)
            moved.record_stream(steps)  # its memory is not given to the next upload while a step reads it
            return moved

        with torch.cuda.stream(self._uploads):
            uploaded = [rows.map(move) for rows in micro_batches]
        self._uploads.synchronize()
        return uploaded

    def train_step(
        self, micro_batches: Sequence[Rows], learning_rate: float, limit: float = math.inf, flag: int = 0
    ) -> Pending:
        """Forward, backward and update.

        ``limit``: a step of a larger loss is not applied, nor one whose loss or gradient is not finite. ``flag``: what
        this rank has to tell the others.
        """
        for group in self._base.param_groups:
            group["lr"] = learning_rate
        self.chunks.train()
        self._untouched = set(self.chunks.parameters())
        # ZeRO-2 and 3 reduce when the context ends: all micro-batches of the step in one pass.
        with self._engine.coalesce_grad_reduction() if self.zero > 1 else contextlib.nullcontext():
            # The schedule divides the loss in place, so what is logged is a copy.
            started = self._now()
            results = self._run(
                micro_batches, lambda nll: (nll.mean(), nll.detach().mean().clone()), forward_only=False
            )
            self._spans.append((started, self._now()))
            self._sum_sequence_parallel_gradients()
            self._sum_tied_gradients()
        self._reduce()
        loss, flags, norm = self._agree(results, flag)
        accepted = loss.isfinite() & (loss <= limit)
        divisor = None
        if self.zero < 3:
            accepted &= norm.isfinite()
            divisor = ((norm + 1e-6) / self.config.optimizer.clip).clamp(min=1.0).float()
        self._base.guard(accepted, divisor)
        self._update()
        if self.zero == 3:
            accepted &= not self._zero.overflow
            norm = torch.as_tensor(self._zero._global_grad_norm, dtype=torch.float64, device=self.device)
        return Pending(torch.stack([loss, flags, accepted.double(), norm]))

    def _agree(self, losses: list[Tensor], flag: int) -> Tensor:
        """Mean loss of the micro-batches over all ranks, sum of the flags, gradient norm, in one message."""
        told = torch.zeros(3, dtype=torch.float64, device=self.device)
        if losses:
            told[0] = torch.stack(losses).mean()
        told[1].fill_(flag)
        told[2] = self._squares()
        dist.all_reduce(told)
        told[0] /= parallel_state.get_data_parallel_world_size() * parallel_state.get_tensor_model_parallel_world_size()
        told[2].sqrt_()
        return told

    def evaluate(self, micro_batches: Sequence[Rows]) -> tuple[float, int]:
        """Sum of the NLL in nats and number of tokens over the micro-batches of all data-parallel ranks."""
        self.chunks.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        if micro_batches:
            # Stages want full micro-batches, interleaved ones a multiple of their number; what is added is not counted.
            padded, size = list(micro_batches), self.config.train.micro_batch
            if self.config.parallel.pipeline > 1:
                padded = [rows.fill(size) for rows in padded]
                padded += [padded[-1]] * (-len(padded) % self.config.parallel.pipeline)
            with torch.no_grad():
                sums = self._run(padded, lambda nll: (nll.mean(), nll.double().sum(1)), forward_only=True)
            for rows, of_texts in zip(micro_batches, sums, strict=False):
                totals[0] += of_texts[: len(rows.target_tokens)].sum()
                totals[1] += rows.target_tokens.numel()
        # Of the pipeline stages, only the last has a loss.
        dist.all_reduce(totals, group=parallel_state.get_pipeline_model_parallel_group())
        dist.all_reduce(totals, group=parallel_state.get_data_parallel_group())
        return float(totals[0]), int(totals[1])

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Timed]]:
        """Inside, the passes of this rank are written into the list, with their times."""
        recorder = Recorder()
        self._parallel.timers = recorder
        try:
            yield recorder.passes
        finally:
            self._parallel.timers = None

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the model has the moving average of its weights."""
        self._swap_average()
        try:
            yield
        finally:
            self._swap_average()

    def read_state(self, param: nn.Parameter, name: str) -> Tensor:
        """One of ``state_names`` of a parameter, the whole of this rank's tensor-parallel part; collective.

        Only after ``link_states``.
        """
        if self.zero == 0:
            return param.detach() if name == MASTER else self._base.state[param][name]
        value = safe_get_full_fp32_param(param) if name == MASTER else safe_get_full_optimizer_state(param, name)
        return value.view(local_shape(param))

    def link_states(self) -> None:
        """Let DeepSpeed find the optimiser's states of every parameter.

        DeepSpeed 0.19 does it after the step of the first parameter group, when the states of the other groups
        do not exist yet, and never again.
        """
        if self.zero in (1, 2):
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def write_state(self, read: Callable[[nn.Parameter, str, str], Tensor], steps: int) -> None:
        """Set all states from ``read(param, parameter name, state name)`` after ``steps`` updates; collective."""
        for flat in self._masters():
            self._base.state[flat] = {
                "step": torch.tensor(float(steps), device=flat.device),
                **{name: torch.zeros_like(flat) for name in self.state_names if name != MASTER},
            }
        self.link_states()
        for parameter, param in self.named_parameters():
            for name in self.state_names:
                self._write(param, name, read(param, parameter, name))
        self._gather_weights()

    @torch.no_grad()
    def _write(self, param: nn.Parameter, name: str, value: Tensor) -> None:
        if self.zero == 0:
            (param if name == MASTER else self._base.state[param][name]).copy_(value)
        elif self.zero == 3:
            # DeepSpeed's own setter fails where a parameter does not divide into equal parts.
            part, _ = self._zero._get_fp32_opt_state_partition(
                param, release_swap_buffers=False, optim_state_key=None if name == MASTER else name
            )
            parts = parallel_state.get_data_parallel_world_size()
            flat = F.pad(value.flatten(), (0, parts * part.numel() - value.numel()))
            part.copy_(flat.view(parts, -1)[self.data_rank])
        elif name == MASTER:
            safe_set_full_fp32_param(param, value)
        else:
            safe_set_full_optimizer_state(param, value, name)

    @torch.no_grad()
    def _gather_weights(self) -> None:
        """Let the working weights follow the master weights."""
        if self.zero == 3:
            self._zero._partition_all_parameters()
            for index in range(len(self._zero.fp16_partitioned_groups_flat)):
                self._zero._reassign_or_swap_out_partitioned_parameters(index)
            whole = self._zero.persistent_parameters  # small ones, which every rank keeps whole
            if whole:
                whole[0].all_gather(whole)
        elif self.zero:
            self._zero.update_lp_params()

    def _run(self, micro_batches: Sequence[Rows], loss: Callable, forward_only: bool) -> list[Tensor]:
        def forward_step(batches: Iterator[Rows], stage: nn.Module) -> tuple[Tensor, Callable]:
            return stage(next(batches).to(self.device)), loss

        return self._schedule(
            forward_step_func=forward_step,
            data_iterator=[iter(micro_batches) for _ in self.chunks],
            model=list(self.chunks),
            num_microbatches=len(micro_batches),
            seq_length=self.config.model.length,
            micro_batch_size=self.config.train.micro_batch * self.config.model.streams,  # of what stages exchange
            forward_only=forward_only,
        )

    def _sum_sequence_parallel_gradients(self) -> None:
        """Weights that see a part of the sequence on each tensor-parallel rank hold a part of their gradient."""
        if not self._parallel.sequence_parallel:
            return
        group = parallel_state.get_tensor_model_parallel_group()
        for param in self.chunks.parameters():
            if getattr(param, "sequence_parallel", False):
                dist.all_reduce(_gradient(param), group=group)

    def _sum_tied_gradients(self) -> None:
        """The embedding and the head are one weight on two stages: both copies get the gradient of both uses."""
        if self.config.parallel.pipeline == 1 or not self.config.model.tied_head:
            return
        for chunk in self.chunks:
            if chunk.is_first or chunk.is_last:
                dist.all_reduce(_gradient(chunk.embedding.weight), group=parallel_state.get_embedding_group())

    @torch.no_grad()
    def _reduce(self) -> None:
        """Average the gradients over the data-parallel ranks, where it is not done yet."""
        size = parallel_state.get_data_parallel_world_size()
        if not self._whole_gradients:
            if self.zero == 1:
                self._zero.set_gradient_accumulation_boundary(True)
                self._zero.reduce_gradients()
        elif size > 1:
            # DeepSpeed would copy what lies in one piece into buckets and back.
            sums = self._zero.fp32_groups_gradients_flat if self.zero else map(_gradient, self.chunks.parameters())
            for gradients in sums:
                gradients /= size
                dist.all_reduce(gradients, group=parallel_state.get_data_parallel_group())

    @torch.no_grad()
    def _squares(self) -> Tensor:
        """This rank's share in the square of the gradient norm. DeepSpeed would ask the device for the norm, and for
        ZeRO-0 count replicated weights of the first stage only; that of ZeRO-3 is its own.
        """
        pairs: Iterator[tuple[Tensor, nn.Parameter]] = iter(())
        if self._whole_gradients:
            pairs = ((_gradient(param), param) for param in self.chunks.parameters())
        elif self.zero < 3:
            found = (self._zero.averaged_gradients[group] for group in range(len(self._zero.bit16_groups)))
            parts = ([one for one in group if not getattr(one, "_zero_padding", False)] for group in found)
            pairs = itertools.chain(*map(zip, parts, self._zero.params_in_partition))
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        counted = [
            gradient
            for gradient, param in pairs
            if (first or partition_dim(param) is not None) and not getattr(param, "ds_pipe_replicated", False)
        ]
        if not counted:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        squares = torch.stack(torch._foreach_norm(counted)).double().square().sum()
        return squares / parallel_state.get_data_parallel_world_size() if self._whole_gradients else squares

    @torch.no_grad()
    def _update(self) -> None:
        """Step the optimiser, gather the new weights and forget the gradients."""
        if not isinstance(self._zero, BF16_Optimizer):
            self._engine.step()
            return
        # What its own step does, but for looking at the norm.
        parts = self._zero.fp32_groups_flat_partition, self._zero.fp32_groups_gradient_flat_partition
        for weights, gradients in zip(*parts, strict=True):
            weights.grad = gradients
        self._base.step()
        self._zero._lazy_init_hp_params_optimizer_state()
        self._zero.update_lp_params()

    def _masters(self) -> list[Tensor]:
        """The float32 tensors that the optimiser steps: this rank's part of the master weights."""
        if self.zero == 3:
            return self._zero.fp32_partitioned_groups_flat
        return [flat for group in self._base.param_groups for flat in group["params"]]

    @torch.no_grad()
    def _swap_average(self) -> None:
        if not self._base.ema_decay:
            return
        for flat in self._masters():
            average = self._base.state.get(flat, {}).get(optimizers.EMA)
            if average is not None:
                weights = flat.detach().clone()
                flat.copy_(average)
                average.copy_(weights)
        self._gather_weights()


def _gradient(param: nn.Parameter) -> Tensor:
    """The gradient that DeepSpeed will reduce: its float32 sum, or the parameter's own."""
    gradient = getattr(param, "_hp_grad", None)
    gradient = param.grad if gradient is None else gradient
    assert gradient is not None
    return gradient


def _deepspeed_config(config: RunConfig, parameters: int) -> dict[str, Any]:
    """DeepSpeed's settings for a rank that holds ``parameters`` weights before ZeRO cuts them."""
    zero, bf16 = config.parallel.zero, config.train.dtype == "bfloat16"
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": 1,  # the schedule divides by the micro-batches already
        # Every step() is an update; what ZeRO-2 and 3 need for reducing once a step works in the managed mode only.
        "managed_gradient_accumulation": zero > 1,
        # Below ZeRO-3 our engine clips, and refuses gradients that are not finite: DeepSpeed would wait for the device.
        "gradient_clipping": config.optimizer.clip if zero == 3 else 0.0,
        "zero_optimization": {
            "stage": zero,
            "compute_grad_norm": zero not in (1, 2) or (zero == 1 and bf16),
            "overlap_comm": False,  # gradients are reduced once, after the last micro-batch
            # DeepSpeed allocates the whole bucket, 2 GB by default, whatever the size of the model.
            "reduce_bucket_size": min(BUCKET, parameters),
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if bf16:
        # Without these, gradients would be reduced in bfloat16; with ZeRO-1 our engine sums them, see _sum_in_float32.
        settings["bf16"] = {"enabled": True, "immediate_grad_update": False, "check_grad_overflow": False}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    return settings
