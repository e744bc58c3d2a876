"""Measures a micro-batch in a pipeline stage with real shapes and no memory: torch's fake tensors on a fake group.

The real ``Stage`` runs forward and backward as one of up to thousands of ranks. Nothing is computed or sent.
Every operation that PyTorch dispatches is seen, with its tensors: what stays alive, the largest amount alive at once,
floating-point operations, bytes moved, and what is sent over the tensor-parallel and the context-parallel
group.

Layers of the same kind cost the same: a stage is measured with at most two layers of each kind and extrapolated.
"""

import contextlib
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from armd_scale.config import RunConfig
from armd_scale.model import prefix
from armd_scale.model.network import Stage, is_adapter, left_to_right, streams_of
from armd_scale.model.regions import Region, intercepted
from armd_scale.parallel import megatron_cpu
from armd_scale.parallel.groups import transformer_config
from armd_scale.parallel.sharding import global_shape
from armd_scale.planning.hardware import GPU
from armd_scale.rows import Drafts, Rows

_REDUCED = {"allreduce_": 2.0, "_allgather_base_": 1.0, "_reduce_scatter_base_": 1.0}
"""Passes of the data over a ring, by c10d collective."""
_ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"}
"""Operations without memory traffic."""


@dataclass
class Pass:
    """Costs of a forward or backward pass of a micro-batch."""

    peak: float = 0.0
    """Peak bytes of this micro-batch."""
    flops: float = 0.0
    """Floating-point operations of matrix products and attention."""
    seconds: float = 0.0
    """Sum of ``GPU.operation`` over all operations."""
    moved: float = 0.0
    """Bytes that the operations read and write."""
    sent: float = 0.0
    """Bytes that this rank sends over the tensor-parallel group, by the ring algorithm."""
    exchanged: float = 0.0
    """Bytes that this rank sends over the context-parallel group, likewise."""
    products: float = 0.0
    """Seconds of matrix products."""
    attention: float = 0.0
    """Seconds of attention."""
    regions: float = 0.0
    """Seconds of fused regions."""


def add_up(passes: list[Pass]) -> Pass:
    """The sum of several passes, field by field."""
    return Pass(**{f.name: sum(getattr(single, f.name) for single in passes) for f in fields(Pass)})


@dataclass
class StageCost:
    """Costs of a (virtual) pipeline stage on one rank."""

    matrices: float = 0.0
    """Number of weights in tensors of two or more dimensions, before ZeRO shards them."""
    vectors: float = 0.0
    """Number of weights in vectors."""
    whole: float = 0.0
    """Number of weights of all tensor-parallel ranks, without the head's copy of the embedding."""
    largest: float = 0.0
    """Number of elements of the largest tensor."""
    shared: float = 0.0
    """Bytes of the buffer into which sequence parallelism gathers activations, shared by all layers of a rank."""
    kept: float = 0.0
    """Bytes alive between the forward and the backward pass of a micro-batch."""
    forward: Pass = field(default_factory=Pass)
    backward: Pass = field(default_factory=Pass)

    @property
    def parameters(self) -> float:
        return self.matrices + self.vectors


class Meter:
    """Measures stages for one kind of GPU; stages of the same shape are measured once."""

    def __init__(self, gpu: GPU) -> None:
        self.gpu = gpu
        self._known: dict[str, StageCost] = {}

    def stages(self, config: RunConfig, edges: list[int]) -> list[StageCost]:
        """Costs of the stages between consecutive ``edges``, for a configuration with a known vocabulary."""
        with fake_ranks(config):
            return [self._stage_cost(config, first, last) for first, last in itertools.pairwise(edges)]

    def _stage_cost(self, config: RunConfig, first: int, last: int) -> StageCost:
        kinds = [streams_of(config.model, index) for index in range(first, last)]
        counts = [min(2, kinds.count(kind)) for kind in _KINDS]
        ends = first == 0, last == config.model.layers
        base = self._shrunk(config, counts, *ends)
        total = base
        for kind, name in enumerate(_KINDS):
            more = kinds.count(name) - 2
            if more > 0:
                fewer = [count - (kind == number) for number, count in enumerate(counts)]
                total = _add(total, base, self._shrunk(config, fewer, *ends), more)
        return total

    def _shrunk(self, config: RunConfig, counts: list[int], has_first: bool, has_last: bool) -> StageCost:
        """Cost of a stage with ``counts`` layers of each kind, in a model with one more layer before it (unless it is
        the first stage) and behind it (unless it is the last).
        """
        both, turning, single = counts
        before, after = int(not has_first), int(not has_last)
        if both + turning == 0:
            two_stream = before
        elif turning:
            two_stream = before + both + 1
        else:
            two_stream = before + both + after
        length = both + turning + single
        shape = config.model.model_copy(update={"layers": before + length + after, "two_stream_layers": two_stream})
        parallel = config.parallel
        layout = parallel.tensor, parallel.sequence, parallel.context, parallel.recompute, parallel.pipeline > 1
        train = config.train.dtype, config.train.micro_batch, config.train.head_batch, config.train.distill > 0
        drafts = has_drafts(config), config.orders.draft_target, config.train.freeze
        key = repr((shape, layout, train, drafts, has_first, has_last))
        if key not in self._known:
            small = config.model_copy(update={"model": shape})
            self._known[key] = measure_stage(small, before, before + length, self.gpu)
        return self._known[key]


_KINDS = ((2, 2), (2, 1), (1, 1))
"""Streams into and out of a layer."""


def _add(total: StageCost, base: StageCost, fewer: StageCost, times: int) -> StageCost:
    """``total`` and ``times`` the difference of ``base`` to ``fewer``; what there is once stays as it is."""

    def add(a: Any, b: Any, c: Any) -> Any:
        values = {f.name: getattr(a, f.name) for f in fields(a)}
        for name, value in values.items():
            others = getattr(b, name), getattr(c, name)
            if name not in ("largest", "shared"):
                values[name] = (
                    add(value, *others) if isinstance(value, Pass) else value + times * (others[0] - others[1])
                )
        return type(a)(**values)

    return add(total, base, fewer)


def has_drafts(config: RunConfig) -> bool:
    """Whether steps with one token a block have draft rows."""
    return config.orders.drafts > 0 and config.traits.streams == 2


def measure_stage(config: RunConfig, first: int, last: int, gpu: GPU) -> StageCost:
    """Cost of layers ``first`` to ``last`` (exclusive), measured directly inside ``fake_ranks``."""
    dtype = getattr(torch, config.train.dtype)
    length, batch, model = config.model.length, config.train.micro_batch, config.model
    watch = _Watch(gpu, low=dtype is torch.bfloat16)
    # On CUDA, a region of element-wise work is one kernel.
    kernels = intercepted(functools.partial(_Kernel.apply, watch)) if gpu.cuda else contextlib.nullcontext()
    _forget_tensors()
    try:
        with FakeTensorMode(), kernels:
            stage = Stage(
                model,
                transformer_config(model, config.parallel, dtype),
                first,
                last,
                config.parallel.recompute,
                head_batch=config.train.head_batch,
                draft_law=config.orders.draft_target == "law",
                freeze=config.train.freeze,
            )
            for name, param in stage.named_parameters():
                param.requires_grad_(not config.train.freeze or is_adapter(name))
                param.grad = torch.empty_like(param)
            teacher = None
            if config.train.distill and stage.is_last:  # of one layer: ``Planner`` adds the others
                single = left_to_right(model).model_copy(update={"layers": 1})
                teacher = Stage(single, transformer_config(single, config.parallel, dtype)).requires_grad_(False)
            index = torch.zeros(batch, length, dtype=torch.int64)
            drafts = Drafts(index, index, index, torch.zeros(batch, length)) if has_drafts(config) else None
            rows = Rows(index, index, index, index, visible=None, drafts=drafts)
            own = length // config.parallel.context
            if not stage.is_first:
                streams = model.streams if config.parallel.pipeline > 1 else streams_of(config.model, first)[0]
                streams += drafts is not None
                rank_rows = own // config.parallel.tensor if config.parallel.sequence else own
            sharing = config.parallel.sequence and config.parallel.tensor > 1
            gathered = parallel_state.get_global_memory_buffer().get_tensor(
                [own, model.streams * batch, model.hidden] if sharing else [0], dtype, "mpu"
            )
            with watch:
                if not stage.is_first:
                    received = torch.empty(rank_rows, streams * batch, model.hidden, dtype=dtype, requires_grad=True)
                    stage.set_input_tensor(received)
                out = stage(rows, teacher)
                loss = out.mean() if stage.is_last else out
            kept, sent = watch.alive, 0 if stage.is_last else out.nbytes
            forward = watch.turn()
            with watch:
                loss.backward(torch.empty_like(loss))
            backward = watch.turn()
            if gpu.cuda:  # Megatron frees sent activations and keeps only their shape
                kept, backward.peak = kept - sent, backward.peak - sent
            sizes = [param.numel() for param in stage.parameters()]
            matrices = sum(param.numel() for param in stage.parameters() if param.dim() > 1)
            copied = stage.is_last and not stage.is_first and model.tied_head
            whole = sum(
                math.prod(global_shape(param))
                for name, param in stage.named_parameters()
                if not (copied and name == "embedding.weight")
            )
    finally:
        _forget_tensors()
    return StageCost(matrices, sum(sizes) - matrices, whole, max(sizes), gathered.nbytes, kept, forward, backward)


def _forget_tensors() -> None:
    """Clear cached tensors: a tensor of a fake mode is invalid outside this mode."""
    prefix.fixed_table.cache_clear()
    prefix.fixed_kernel.cache_clear()
    parallel_state.destroy_global_memory_buffer()
    parallel_state._set_global_memory_buffer()


@contextlib.contextmanager
def fake_ranks(config: RunConfig) -> Iterator[None]:
    """Megatron-Core's process groups of a layout as on rank 0, without other processes."""
    megatron_cpu.install()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=config.cluster.processes)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.parallel.tensor,
            pipeline_model_parallel_size=config.parallel.pipeline,
            virtual_pipeline_model_parallel_size=config.parallel.chunks if config.parallel.chunks > 1 else None,
            context_parallel_size=config.parallel.context,
            create_gloo_process_groups=False,
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _storages(tree: Any) -> set[torch.UntypedStorage]:
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.device.type != "meta")
    return {tensor.untyped_storage() for tensor in tensors}


class Live(TorchDispatchMode):
    """Counts the live bytes of tensors that operations inside the mode create, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0
        self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out) - _storages((args, kwargs)):
            if storage in self._known:
                continue
            size = storage.nbytes()
            self._known.add(storage)
            self.alive += size
            weakref.finalize(storage, self._free, size)
        self.peak = max(self.peak, self.alive)
        return out

    def _free(self, size: int) -> None:
        self.alive -= size


class _Watch(Live):
    """Counts the work of the operations of a pass too."""

    def __init__(self, gpu: GPU, low: bool) -> None:
        super().__init__()
        self.gpu = gpu
        self.low = low
        self.counts = Pass()
        self._inside = False

    def kernel(self, work: Callable[[], Any], inputs: Iterable[Tensor], flops: float = 0.0) -> list[Tensor]:
        """Results of ``work``, counted as one kernel that reads ``inputs`` and writes the results."""
        self._inside = True
        results = [leaf for leaf in tree_leaves(work()) if isinstance(leaf, Tensor)]
        self._inside = False
        read = sum(tensor.nbytes for tensor in inputs)
        seconds = self._count(flops, read + sum(tensor.nbytes for tensor in results), self.gpu.flops)
        if flops:
            self.counts.attention += seconds
        else:
            self.counts.regions += seconds
        return [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in results]

    def _count(self, flops: float, moved: float, rate: float) -> float:
        """Count an operation and return its seconds."""
        seconds = self.gpu.operation(flops, moved, rate)
        self.counts.flops += flops
        self.counts.moved += moved
        self.counts.seconds += seconds
        return seconds

    def turn(self) -> Pass:
        """End a pass and return its counts; live tensors stay counted."""
        done, self.counts = self.counts, Pass()
        done.peak, self.peak = self.peak, self.alive
        return done

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._inside:
            return func(*args, **(kwargs or {}))
        out = super().__torch_dispatch__(func, types, args, kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        name = func.overloadpacket._qualified_op_name
        if name.startswith("c10d::"):
            self._collective(name.removeprefix("c10d::"), args)
        else:
            view = _storages(outputs) <= _storages(inputs)
            if name not in _ALLOCATIONS and (func._schema.is_mutable or not view):
                self._charge(func, name, args, kwargs or {}, out, inputs, outputs)
        return out

    def _collective(self, name: str, args: Any) -> None:
        size = max(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        boxes = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.ScriptObject)]
        group = next(group for group in map(_unboxed, boxes) if group is not None)
        ranks = group.size()
        sent = _REDUCED[name] * size * (ranks - 1) / ranks
        if ranks > 1 and group.group_name == parallel_state.get_context_parallel_group().group_name:
            self.counts.exchanged += sent
        else:
            self.counts.sent += sent

    def _charge(self, func: Any, name: str, args: Any, kwargs: Any, out: Any, inputs: Any, outputs: Any) -> None:
        flops = 0.0
        if func.overloadpacket in flop_registry:
            flops = float(flop_registry[func.overloadpacket](*args, **kwargs, out_val=out))
        elif name.startswith("aten::_scaled_dot_product_flash_attention_for_cpu"):
            backward = name.endswith("_backward")
            query, key = args[1 if backward else 0], args[2 if backward else 1]
            batch, heads, rows, width = query.shape
            index = 7 if backward else 4
            causal = args[index] if len(args) > index else kwargs.get("is_causal", False)
            # Two products forward, five backward; causal attention computes half of the scores.
            flops = (5 if backward else 2) * 2 * batch * heads * rows * key.shape[2] * width / (2 if causal else 1)
        moved = sum(tensor.nbytes for tensor in inputs) + sum(tensor.nbytes for tensor in outputs)
        seconds = self._count(flops, moved, self._rate(inputs))
        if "attention" in name:
            self.counts.attention += seconds
        elif flops:
            self.counts.products += seconds

    def _rate(self, inputs: list[Tensor]) -> float:
        if not any(tensor.dtype is torch.float32 and tensor.dim() > 1 for tensor in inputs):
            return self.gpu.flops
        return self.gpu.flops_tf32 if self.low else self.gpu.flops_float32


def _unboxed(box: torch.ScriptObject) -> dist.ProcessGroup | None:
    """The process group among the arguments of a collective; other arguments are no groups."""
    try:
        return dist.ProcessGroup.unbox(box)
    except RuntimeError:
        return None


class _Kernel(torch.autograd.Function):
    """A fused region of the network: one kernel forward, one kernel backward, and the saved tensors."""

    @staticmethod
    def forward(ctx: Any, watch: _Watch, region: Region, *inputs: Any) -> Any:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        ctx.flops = region.work(*inputs) if region.work else 0.0
        # Attention has the shape of its queries; a call for every block of rows would take long to trace.
        work = (lambda: torch.empty_like(tensors[0])) if region.work else (lambda: region.function(*inputs))
        outputs = watch.kernel(work, tensors, ctx.flops)
        ctx.watch = watch
        ctx.shapes = [
            (value.shape, value.dtype) for value, needed in zip(inputs, ctx.needs_input_grad[2:], strict=True) if needed
        ]
        ctx.save_for_backward(*region.keeps(tensors, outputs))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        computed = ctx.watch.kernel(
            lambda: [torch.empty(shape, dtype=dtype) for shape, dtype in ctx.shapes],
            [*ctx.saved_tensors, *gradients],
            2.5 * ctx.flops,
        )
        remaining = iter(computed)
        return None, None, *(next(remaining) if needed else None for needed in ctx.needs_input_grad[2:])
