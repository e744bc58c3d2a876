"""FP8 linears for devices without FP8 matrix units: TransformerEngine's rounding without its speed.

Inputs and weights are rounded to e4m3, gradients to e5m2 ("hybrid"). Each tensor is scaled so that its largest value is
the largest value of the type ("current scaling", which has no history that a checkpoint would have to keep). Products
use the type of the run.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` rounded to a scaled FP8 type, in the type of ``x``."""
    largest = x.abs().amax().float()
    scale = torch.where(largest > 0, torch.finfo(dtype).max / largest, 1.0).clamp(max=torch.finfo(torch.float32).max)
    return ((x.float() * scale).to(dtype).float() / scale).to(x.dtype)


class _Forward(torch.autograd.Function):
    """Rounds the input; the gradient is passed on unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return rounded(x, torch.float8_e4m3fn)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Backward(torch.autograd.Function):
    """Rounds the gradient; the input is passed on unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return rounded(gradient, torch.float8_e5m2)


class Float8ColumnParallelLinear(ColumnParallelLinear):
    """Megatron-Core's linear on rounded inputs, weights and gradients."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:
        return _Backward.apply(super()._forward_impl(_Forward.apply(input), _Forward.apply(weight), *args, **options))


class Float8RowParallelLinear(RowParallelLinear):
    """Megatron-Core's linear on rounded inputs, weights and gradients."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:
        return _Backward.apply(super()._forward_impl(_Forward.apply(input), _Forward.apply(weight), *args, **options))
