"""One training step over all processes: Megatron-Core's schedule runs it, a DeepSpeed ZeRO engine updates the weights.

The schedule runs forward and backward on the bare module and divides the loss by the number of micro-batches; DeepSpeed
averages gradients over the data-parallel ranks, clips, steps the sharded optimiser and gathers the new weights.
The engine's own ``forward`` and ``backward`` are never called: they would scale gradients again.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
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
from armd_scale.model.network import Stage
from armd_scale.model.rows import Rows
from armd_scale.parallel import optimizer as optimizers
from armd_scale.parallel.groups import MegatronTopology, transformer_config
from armd_scale.parallel.sharding import initialise

MASTER = "weight"
"""Name of the float32 master weights beside the optimiser's own states."""


class Engine:
    """The sharded model of a run on this rank, and the operations that all ranks do together."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        dtype = getattr(torch, config.train.dtype)
        self.stage = Stage(config.model, transformer_config(config.model, config.parallel, dtype))
        initialise(self.stage, config.model, config.seed)
        self.stage.to(device)
        # Neither is wanted: a shared-memory all-reduce that is compiled at start, and a line for each step.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=self.stage,
            optimizer=optimizers.build(self.stage, config.optimizer, fused=device.type == "cuda"),
            mpu=MegatronTopology(),
            config=_deepspeed_config(config),
        )
        self._base: optimizers.AveragedAdamW = self._zero.optimizer
        self._schedule = get_forward_backward_func()

    @property
    def data_rank(self) -> int:
        return parallel_state.get_data_parallel_rank()

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping."""
        return float(self._engine.get_global_grad_norm())

    @property
    def state_names(self) -> tuple[str, ...]:
        """What is kept for every parameter, all float32: master weight, moments, moving average."""
        average = (optimizers.EMA,) if self._base.ema_decay else ()
        return (MASTER, *optimizers.MOMENTS, *average)

    def train_step(self, micro_batches: Sequence[Rows], learning_rate: float) -> Tensor:
        """Forward, backward and update; returns this rank's mean NLL per token in nats (a detached scalar)."""
        for group in self._base.param_groups:
            group["lr"] = learning_rate
        self.stage.train()
        # The schedule divides the loss in place, so what is logged is a copy.
        results = self._run(micro_batches, lambda nll: (nll.mean(), nll.detach().mean().clone()), forward_only=False)
        self._sum_sequence_parallel_gradients()
        self._engine.step()
        return torch.stack(results).mean()

    def evaluate(self, micro_batches: Sequence[Rows]) -> tuple[float, int]:
        """Sum of the NLL in nats and number of tokens over the micro-batches of all data-parallel ranks."""
        self.stage.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        if micro_batches:
            with torch.no_grad():
                sums = self._run(micro_batches, lambda nll: (nll.mean(), nll.double().sum()), forward_only=True)
            totals[0] = torch.stack(sums).sum()
            totals[1] = sum(rows.target_tokens.numel() for rows in micro_batches)
        dist.all_reduce(totals, group=parallel_state.get_data_parallel_group())
        return float(totals[0]), int(totals[1])

    def mean(self, value: Tensor) -> float:
        """Mean of a scalar over the data-parallel ranks."""
        total = value.detach().double().clone()
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        return float(total) / parallel_state.get_data_parallel_world_size()

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
        if name == MASTER:
            return safe_get_full_fp32_param(param)
        return safe_get_full_optimizer_state(param, name)

    def link_states(self) -> None:
        """Let DeepSpeed find the optimiser's states of every parameter.

        DeepSpeed 0.19 does it after the step of the first parameter group, when the states of the other groups
        do not exist yet, and never again.
        """
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()

    def write_state(self, read: Callable[[nn.Parameter, str, str], Tensor], steps: int) -> None:
        """Set all states from ``read(param, parameter name, state name)`` after ``steps`` updates; collective."""
        for group in self._base.param_groups:
            for flat in group["params"]:
                self._base.state[flat] = {
                    "step": torch.tensor(float(steps), device=flat.device if group["fused"] else "cpu"),
                    **{name: torch.zeros_like(flat) for name in self.state_names if name != MASTER},
                }
        self.link_states()
        for parameter, param in self.stage.named_parameters():
            for name in self.state_names:
                value = read(param, parameter, name)
                if name == MASTER:
                    safe_set_full_fp32_param(param, value)
                else:
                    safe_set_full_optimizer_state(param, value, name)
        self._zero.update_lp_params()

    def _run(self, micro_batches: Sequence[Rows], loss: Callable, forward_only: bool) -> list[Tensor]:
        def forward_step(batches: Iterator[Rows], stage: nn.Module) -> tuple[Tensor, Callable]:
            return stage(next(batches).to(self.device)), loss

        return self._schedule(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=self.stage,
            num_microbatches=len(micro_batches),
            seq_length=self.config.model.length,
            micro_batch_size=self.config.train.micro_batch,
            forward_only=forward_only,
        )

    def _sum_sequence_parallel_gradients(self) -> None:
        """Weights that see a part of the sequence on each tensor-parallel rank hold a part of their gradient."""
        if not self.stage.config.sequence_parallel:
            return
        group = parallel_state.get_tensor_model_parallel_group()
        for param in self.stage.parameters():
            if getattr(param, "sequence_parallel", False):
                gradient = getattr(param, "_hp_grad", None)
                dist.all_reduce(param.grad if gradient is None else gradient, group=group)

    @torch.no_grad()
    def _swap_average(self) -> None:
        if not self._base.ema_decay:
            return
        for group in self._base.param_groups:
            for flat in group["params"]:
                average = self._base.state.get(flat, {}).get(optimizers.EMA)
                if average is not None:
                    weights = flat.detach().clone()
                    flat.copy_(average)
                    average.copy_(weights)
        self._zero.update_lp_params()


def _deepspeed_config(config: RunConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": 1,  # the schedule divides by the micro-batches already
        "managed_gradient_accumulation": False,  # every step() is an update
        "gradient_clipping": config.optimizer.clip,
        "zero_optimization": {"stage": 1, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if config.train.dtype == "bfloat16":
        # Without these, gradients would be accumulated and reduced in bfloat16.
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    return settings
