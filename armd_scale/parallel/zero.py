"""DeepSpeed ZeRO behind one interface: the only module that knows DeepSpeed's classes and attributes.

``build`` returns the ``ZeroStage`` of a configuration:

================  ========  ==========  ===========================================================
class             ZeRO      dtype       what DeepSpeed shards over the replicas
================  ========  ==========  ===========================================================
``Zero0``         0         float32     nothing
``Zero1``         1         float32     master weights and optimiser states
``Zero1BFloat16`` 1         bfloat16    the same; gradients accumulate and are reduced in float32
``Zero2``         2         both        also gradients, after the last micro-batch of a step
``Zero3``         3         both        also weights
================  ========  ==========  ===========================================================

``forward`` and ``backward`` of the DeepSpeed engine are never called: Megatron-Core's schedule runs the bare
modules and divides the loss by the number of micro-batches, and DeepSpeed would scale the gradients again.
"""

import contextlib
import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import deepspeed
import deepspeed.ops
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
from torch import Tensor, nn

from armd_scale.config import RunConfig
from armd_scale.parallel import optimizer as optimizers
from armd_scale.parallel.groups import MegatronTopology, replicas
from armd_scale.parallel.optimizer import MASTER
from armd_scale.parallel.sharding import is_pipeline_copy, partition_dim

BUCKET = 40_000_000
"""Largest number of gradients that DeepSpeed collects into one reduction."""


def build(config: RunConfig, modules: nn.ModuleList) -> "ZeroStage":
    """The ZeRO stage of a run, for this rank's initialised modules on their device. Collective."""
    first = Zero1BFloat16 if config.train.dtype == "bfloat16" else Zero1
    kinds: dict[int, type[ZeroStage]] = {0: Zero0, 1: first, 2: Zero2, 3: Zero3}
    return kinds[config.parallel.zero](config, modules)


def local_shape(param: Tensor) -> tuple[int, ...]:
    """Shape of this rank's tensor-parallel part of a parameter, also where ZeRO-3 shards that part."""
    return tuple(getattr(param, "ds_shape", param.shape))


class ZeroStage(ABC):
    """Gradients, update and states of this rank's parameters under one ZeRO stage.

    A step is ``accumulate`` around the backward passes, ``squares`` summed over all ranks, and ``update``. Every
    method but ``gradient`` and ``squares`` is called by all ranks together.
    """

    stage: ClassVar[int]
    """DeepSpeed's number of the ZeRO stage."""
    managed: ClassVar[bool] = False
    """Setting ``managed_gradient_accumulation``, which ``coalesce_grad_reduction`` requires."""
    compute_grad_norm: ClassVar[bool] = True
    """Setting ``zero_optimization.compute_grad_norm``."""
    deepspeed_clips: ClassVar[bool] = False
    """Whether DeepSpeed's step computes the global gradient norm and clips, instead of ``squares`` and ``update``."""

    def __init__(self, config: RunConfig, modules: nn.ModuleList) -> None:
        self._modules = modules
        self._clip = config.optimizer.clip
        self._device = next(modules.parameters()).device
        # The optimiser that DeepSpeed steps on its float32 tensors.
        self._optimizer = optimizers.build(modules, config.optimizer)
        deepspeed.ops.__compatible_ops__ = {}  # DeepSpeed would probe a compiler for its operations at every start
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # DeepSpeed would log a line in every step
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        # The wrapper is DeepSpeed's ZeRO optimiser around ours; ZeRO-0 has none.
        self._engine, self._wrapper, _, _ = deepspeed.initialize(
            model=modules,
            optimizer=self._optimizer,
            mpu=MegatronTopology(count_by_tensor_rank=self.deepspeed_clips),
            config=self._settings(config, sum(param.numel() for param in modules.parameters())),
        )
        self._engine.enable_backward_allreduce = False  # ``accumulate`` reduces

    def _settings(self, config: RunConfig, parameters: int) -> dict[str, Any]:
        """DeepSpeed's configuration for a rank that holds ``parameters`` weights before ZeRO shards them."""
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": config.train.micro_batch,
            "gradient_accumulation_steps": 1,  # the schedule divides the loss by the number of micro-batches
            "managed_gradient_accumulation": self.managed,
            "gradient_clipping": self._clip if self.deepspeed_clips else 0.0,
            "zero_optimization": {
                "stage": self.stage,
                "compute_grad_norm": self.compute_grad_norm,
                "overlap_comm": False,  # gradients are reduced once, after the last micro-batch
                # DeepSpeed allocates the whole bucket, 2 GB by default, even for a small model.
                "reduce_bucket_size": min(BUCKET, parameters),
            },
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        if config.train.dtype == "bfloat16":
            # Without float32 here, DeepSpeed reduces gradients in bfloat16. Zero1BFloat16 accumulates them itself.
            settings["bf16"] = {"enabled": True, "immediate_grad_update": False, "check_grad_overflow": False}
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
            settings["communication_data_type"] = "fp32"
        return settings

    # --- a step

    def set_learning_rate(self, learning_rate: float) -> None:
        """Use this learning rate from the next update on."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate

    @abstractmethod
    def accumulate(self, idle: Sequence[nn.Parameter] = ()) -> contextlib.AbstractContextManager[None]:
        """Inside, backward passes add to the gradients; at its end, gradients are averaged over the replicas.

        ``idle``: parameters that the passes leave out; their gradient is zero.
        """

    @contextlib.contextmanager
    def _without(self, idle: Sequence[nn.Parameter]) -> Iterator[None]:
        """Leave parameters out of the passes inside, and then give them a gradient of zero."""
        for param in idle:
            param.requires_grad_(False)
        yield
        for param in idle:
            param.requires_grad_(True)
            torch.autograd.backward(param, torch.zeros_like(param))  # calls the hooks that await a gradient

    def gradient(self, param: nn.Parameter) -> Tensor:
        """The gradient of a parameter that will be reduced; inside ``accumulate``, after a backward pass."""
        assert param.grad is not None
        return param.grad

    @abstractmethod
    def squares(self) -> Tensor:
        """Float64 scalar on the device: this rank's share of the squared norm of the averaged gradients.

        DeepSpeed's own norm synchronises with the device, and under ZeRO-0 it counts replicated weights of the first
        pipeline stage only.
        """

    @torch.no_grad()
    def update(self, accepted: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Clip the gradients to the configured norm, step, gather the new weights and discard the gradients.

        ``accepted`` (bool) and ``norm`` (the global gradient norm) are scalars on the device: the host does not read
        them. Weights and states stay the same where ``accepted`` is False or the norm is not finite. Returns whether
        the step was applied, and the norm.
        """
        accepted = accepted & norm.isfinite()
        self._optimizer.guard(accepted, ((norm + 1e-6) / self._clip).clamp(min=1.0).float())
        self._step()
        return accepted, norm

    def _step(self) -> None:
        self._engine.step()

    # --- states

    @property
    def state_names(self) -> tuple[str, ...]:
        """The float32 tensors of every parameter: master weight, moments, moving average."""
        average = (optimizers.EMA,) if self._optimizer.ema_decay else ()
        return (MASTER, *optimizers.MOMENTS, *average)

    def link_states(self) -> None:  # noqa: B027
        """Prepare ``read_state``."""

    def read_state(self, param: nn.Parameter, name: str) -> Tensor:
        """A state of a parameter, whole in this rank's tensor-parallel part; after ``link_states``."""
        value = safe_get_full_fp32_param(param) if name == MASTER else safe_get_full_optimizer_state(param, name)
        return value.view(local_shape(param))

    def write_states(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        read: Callable[[nn.Parameter, str, str], Tensor],
        steps: int,
    ) -> None:
        """Set all states from ``read(param, parameter name, state name)``, as after ``steps`` updates."""
        for master in self._masters():
            self._optimizer.state[master] = {
                "step": torch.tensor(float(steps), device=master.device),
                **{name: torch.zeros_like(master) for name in self.state_names if name != MASTER},
            }
        self.link_states()
        with torch.no_grad():
            for parameter, param in named:
                for name in self.state_names:
                    self._write_state(param, name, read(param, parameter, name))
            self._gather_weights()

    def _write_state(self, param: nn.Parameter, name: str, value: Tensor) -> None:
        if name == MASTER:
            safe_set_full_fp32_param(param, value)
        else:
            safe_set_full_optimizer_state(param, value, name)

    @torch.no_grad()
    def swap_average(self) -> None:
        """Exchange the weights and their moving average, where it is kept and exists already."""
        if not self._optimizer.ema_decay:
            return
        for master in self._masters():
            average = self._optimizer.state.get(master, {}).get(optimizers.EMA)
            if average is not None:
                weights = master.detach().clone()
                master.copy_(average)
                average.copy_(weights)
        self._gather_weights()

    def _masters(self) -> list[Tensor]:
        """The float32 tensors that the optimiser steps: this rank's part of the master weights."""
        return [master for group in self._optimizer.param_groups for master in group["params"]]

    @abstractmethod
    def _gather_weights(self) -> None:
        """Copy the master weights of all replicas into the weights of the model."""


class Zero0(ZeroStage):
    """Every replica holds and steps all float32 weights."""

    stage = 0

    @contextlib.contextmanager
    def accumulate(self, idle: Sequence[nn.Parameter] = ()) -> Iterator[None]:
        with self._without(idle):
            yield
        _average(map(self.gradient, self._modules.parameters()))

    def squares(self) -> Tensor:
        pairs = ((self.gradient(param), param) for param in self._modules.parameters())
        return _squares(pairs, self._device) / replicas().size()

    def read_state(self, param: nn.Parameter, name: str) -> Tensor:
        return param.detach() if name == MASTER else self._optimizer.state[param][name]

    def _write_state(self, param: nn.Parameter, name: str, value: Tensor) -> None:
        (param if name == MASTER else self._optimizer.state[param][name]).copy_(value)

    def _gather_weights(self) -> None:
        """The weights of the model are the master weights."""


class Zero1(ZeroStage):
    """Each replica holds and steps its part of the master weights."""

    stage = 1
    compute_grad_norm = False  # DeepSpeed would synchronise with the device

    @contextlib.contextmanager
    def accumulate(self, idle: Sequence[nn.Parameter] = ()) -> Iterator[None]:
        with self._without(idle):
            yield
        with torch.no_grad():
            self._wrapper.set_gradient_accumulation_boundary(True)
            self._wrapper.reduce_gradients()

    def squares(self) -> Tensor:
        averaged = (self._wrapper.averaged_gradients[group] for group in range(len(self._wrapper.bit16_groups)))
        parts = ([part for part in group if not getattr(part, "_zero_padding", False)] for group in averaged)
        pairs = itertools.chain(*map(zip, parts, self._wrapper.params_in_partition))
        return _squares(pairs, self._device)

    def link_states(self) -> None:
        """Attach the optimiser's states to every parameter.

        DeepSpeed 0.19 attaches them once, after the step of the first parameter group, when the states of the other
        groups do not exist yet.
        """
        self._wrapper._hp_optimizer_states_linked = False
        self._wrapper._lazy_init_hp_params_optimizer_state()

    def _gather_weights(self) -> None:
        self._wrapper.update_lp_params()


class Zero1BFloat16(Zero1):
    """ZeRO-1 over DeepSpeed's ``BF16_Optimizer``: each rank has whole gradients, accumulated in float32."""

    compute_grad_norm = True  # BF16_Optimizer refuses False; ``_step`` does not compute the norm

    def __init__(self, config: RunConfig, modules: nn.ModuleList) -> None:
        super().__init__(config, modules)
        assert isinstance(self._wrapper, BF16_Optimizer)
        groups = zip(self._wrapper.bf16_groups, self._wrapper.fp32_groups_gradients, strict=True)
        self._sums: dict[nn.Parameter, Tensor] = {
            param: total for params, sums in groups for param, total in zip(params, sums, strict=True)
        }
        self._stale: set[nn.Parameter] = set()  # parameters whose sum still holds the gradient of the previous step
        for param in self._sums:
            param.register_post_accumulate_grad_hook(self._add)

    def _add(self, param: nn.Parameter) -> None:
        """Move a new gradient into its float32 sum at once.

        DeepSpeed's own hooks make a float32 copy of the gradient first, and its step fills all sums with zeros.
        """
        assert param.grad is not None
        total = self._sums[param]
        gradient, param.grad = param.grad.view_as(total), None
        if param in self._stale:
            self._stale.remove(param)
            total.copy_(gradient)
        else:
            total.add_(gradient)

    @contextlib.contextmanager
    def accumulate(self, idle: Sequence[nn.Parameter] = ()) -> Iterator[None]:
        self._stale = set(self._sums)
        with self._without(idle):
            yield
        # The sums are contiguous; DeepSpeed would copy them into buckets and back.
        _average(self._wrapper.fp32_groups_gradients_flat)

    def gradient(self, param: nn.Parameter) -> Tensor:
        return self._sums[param]

    def squares(self) -> Tensor:
        pairs = ((self.gradient(param), param) for param in self._modules.parameters())
        return _squares(pairs, self._device) / replicas().size()

    def _step(self) -> None:
        # The same as BF16_Optimizer.step without the norm, which would synchronise with the device.
        parts = self._wrapper.fp32_groups_flat_partition, self._wrapper.fp32_groups_gradient_flat_partition
        for weights, gradients in zip(*parts, strict=True):
            weights.grad = gradients
        self._optimizer.step()
        self._wrapper._lazy_init_hp_params_optimizer_state()
        self._wrapper.update_lp_params()


class Zero2(Zero1):
    """ZeRO-1 that also shards the gradients once the micro-batches of a step are accumulated."""

    stage = 2
    managed = True

    @contextlib.contextmanager
    def accumulate(self, idle: Sequence[nn.Parameter] = ()) -> Iterator[None]:
        # At its end, DeepSpeed reduces the sums of all micro-batches in one pass.
        with self._engine.coalesce_grad_reduction(), self._without(idle):
            yield


class Zero3(ZeroStage):
    """Each replica holds its part of the weights, which DeepSpeed gathers for each module in turn.

    DeepSpeed computes the norm and clips: its step synchronises with the device in any case.
    """

    stage = 3
    managed = True
    deepspeed_clips = True

    def __init__(self, config: RunConfig, modules: nn.ModuleList) -> None:
        if config.model.tied_head:
            # The head uses the weight of the embedding outside of the embedding's forward.
            for module in modules:
                deepspeed.zero.register_external_parameter(module, module.embedding.weight)
        super().__init__(config, modules)

    @contextlib.contextmanager
    def accumulate(self, idle: Sequence[nn.Parameter] = ()) -> Iterator[None]:
        for param in idle:
            param.requires_grad_(False)
        with self._engine.coalesce_grad_reduction():
            yield
        for param in idle:  # DeepSpeed has taken zeros for their gradients
            param.requires_grad_(True)

    def squares(self) -> Tensor:
        """Zero: DeepSpeed's step computes the norm."""
        return torch.zeros((), dtype=torch.float64, device=self._device)

    @torch.no_grad()
    def update(self, accepted: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        self._optimizer.guard(accepted, None)
        self._step()
        norm = torch.as_tensor(self._wrapper._global_grad_norm, dtype=torch.float64, device=self._device)
        return accepted & (not self._wrapper.overflow), norm

    def _write_state(self, param: nn.Parameter, name: str, value: Tensor) -> None:
        # DeepSpeed's own setter fails where a parameter does not divide into equal parts.
        key = None if name == MASTER else name
        part, _ = self._wrapper._get_fp32_opt_state_partition(param, release_swap_buffers=False, optim_state_key=key)
        parts = replicas().size()
        flat = F.pad(value.flatten(), (0, parts * part.numel() - value.numel()))
        part.copy_(flat.view(parts, -1)[replicas().rank()])

    def _masters(self) -> list[Tensor]:
        return self._wrapper.fp32_partitioned_groups_flat

    def _gather_weights(self) -> None:
        self._wrapper._partition_all_parameters()
        for index in range(len(self._wrapper.fp16_partitioned_groups_flat)):
            self._wrapper._reassign_or_swap_out_partitioned_parameters(index)
        whole = self._wrapper.persistent_parameters  # small parameters, which every rank keeps whole
        if whole:
            whole[0].all_gather(whole)


@torch.no_grad()
def _average(gradients: Iterable[Tensor]) -> None:
    """Average tensors over the replicas in place."""
    size = replicas().size()
    if size == 1:
        return
    for gradient in gradients:
        gradient /= size
        dist.all_reduce(gradient, group=replicas())


@torch.no_grad()
def _squares(pairs: Iterable[tuple[Tensor, nn.Parameter]], device: torch.device) -> Tensor:
    """Sum of squares of the gradients that this rank counts.

    The gradient of a replicated parameter counts on the first tensor-parallel rank only; that of a tied embedding on
    the first pipeline stage only.
    """
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    counted = [
        gradient
        for gradient, param in pairs
        if (first or partition_dim(param) is not None) and not is_pipeline_copy(param)
    ]
    if not counted:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(counted)).double().square().sum()
