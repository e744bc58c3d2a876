"""Tensor-parallel shards of parameters, and initial weights that do not depend on the layout.

Megatron-Core marks a parameter that is sharded over the tensor-parallel ranks with ``tensor_model_parallel`` and
``partition_dim``; other parameters are replicated. Every shard is contiguous in the global shape.
"""

import hashlib
from collections.abc import Iterable

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from armd_scale.model.parameters import Initial


def partition_dim(param: Tensor) -> int | None:
    """The dimension in which a parameter is sharded over tensor-parallel ranks; None if it is replicated."""
    return param.partition_dim if getattr(param, "tensor_model_parallel", False) else None  # type: ignore[attr-defined]


def is_partial(param: Tensor) -> bool:
    """Whether each tensor-parallel rank computes only a part of the gradient of a replicated parameter.

    A module that sees a part of the activations on each rank, such as a norm under sequence parallelism, marks its
    parameters with ``tensor_partial = True``. Their gradients are summed over the tensor-parallel ranks.
    """
    return getattr(param, "tensor_partial", False)


def is_frozen(param: Tensor) -> bool:
    """Whether training leaves a parameter as it is. The engine marks it with ``frozen = True``."""
    return getattr(param, "frozen", False)


def is_pipeline_copy(param: Tensor) -> bool:
    """Whether another pipeline stage holds the same parameter, and counts and saves it.

    The engine marks the copy of a tied embedding on the last stage with ``pipeline_copy = True``.
    """
    return getattr(param, "pipeline_copy", False)


def global_shape(param: Tensor) -> tuple[int, ...]:
    """Shape of the whole tensor of which ``param`` is the tensor-parallel shard of this rank."""
    shape = list(param.shape)
    dim = partition_dim(param)
    if dim is not None:
        shape[dim] *= parallel_state.get_tensor_model_parallel_world_size()
    return tuple(shape)


def local_part(whole: Tensor, param: Tensor) -> Tensor:
    """The shard of this rank of a whole tensor, in the shape of ``param``."""
    dim = partition_dim(param)
    if dim is None:
        return whole
    size = param.shape[dim]
    return whole.narrow(dim, parallel_state.get_tensor_model_parallel_rank() * size, size)


@torch.no_grad()
def initialise(chunks: Iterable[nn.Module], seed: int) -> None:
    """Initialise all weights as ``model.parameters.describe`` declares.

    Each parameter has a separate random stream, keyed by (seed, global name), and each rank keeps its shard of the
    whole tensor, so the weights are the same under every layout.
    """
    for name, param in (pair for chunk in chunks for pair in chunk.named_parameters()):
        initial: Initial = param.initial  # type: ignore[assignment]
        if not initial.std:
            param.fill_(initial.value)
            continue
        key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
        whole = torch.empty(global_shape(param)).normal_(initial.value, initial.std, generator=generator)
        param.copy_(local_part(whole, param))
