"""Attributes of a parameter: initial values, tensor-parallel sharding and summation of its gradient.

``parallel/`` reads the attributes, so a feature of a layer is defined together with its parameters.
"""

from typing import NamedTuple

from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor


class Initial(NamedTuple):
    """Initial values: ``value``, plus normal noise of standard deviation ``std``."""

    std: float = 0.0
    value: float = 0.0


ONES = Initial(value=1.0)
ZEROS = Initial()


def describe(param: Tensor, initial: Initial, shard_dim: int | None = None, partial: bool = False) -> None:
    """Mark a parameter.

    ``shard_dim``: the dimension in which tensor-parallel ranks share it; None: every rank holds all of it.
    ``partial``: every rank holds all of it but sees only a part of the rows or heads, so that its gradient is the sum
    over the tensor-parallel ranks.
    """
    param.initial = initial  # type: ignore[attr-defined]
    param.tensor_partial = partial  # type: ignore[attr-defined]
    # Megatron-Core marks a weight itself only when it draws the values.
    if shard_dim is not None and not hasattr(param, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(param, is_parallel=True, dim=shard_dim, stride=1)
