"""Fused regions: element-wise work between matrix products, or attention with a mask, that is one kernel on CUDA.

A region declares what it keeps for the backward pass and its products where it is defined; the plan
(``planning/measure.py``) reads the declaration instead of tracing a compiled kernel.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")

Kept = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]
"""From the tensors that a region reads and those that it makes, the ones it keeps for the backward pass."""

Work = Callable[..., float]
"""From the inputs of a region, the floating-point operations of its products in the forward pass."""

REGIONS: "dict[str, Region[Any]]" = {}
"""Every region by its name."""

_SHAPES = 64
"""Shapes that a region is compiled for: those of layers, evaluations and the last samples of each."""

_interceptor: "list[Callable[..., Any]]" = []


class Region(Generic[_T]):
    """A function of tensors, compiled into as few kernels as it needs where its first input is on CUDA.

    ``work``: of a region of attention, which calls a compiled kernel itself; its backward pass does 2.5 times as much.
    """

    def __init__(self, function: Callable[..., _T], keeps: Kept, work: Work | None = None) -> None:
        functools.update_wrapper(self, function)
        self.function, self.keeps, self.work = function, keeps, work
        REGIONS[function.__name__] = self

    @functools.cached_property
    def _compiled(self) -> Callable[..., _T]:
        """The function, compiled; loading the compiler takes seconds, so only where it is used."""
        if self.work:
            return self.function
        # The compiler would silently stop after eight shapes.
        torch._dynamo.config.recompile_limit = _SHAPES
        return torch.compile(self.function, dynamic=False)

    def __call__(self, x: Tensor, *more: Any) -> _T:
        if _interceptor:
            return _interceptor[-1](self, x, *more)
        return (self._compiled if x.is_cuda else self.function)(x, *more)


def fused(keeps: Kept, work: Work | None = None) -> Callable[[Callable[..., _T]], Region[_T]]:
    """Make a function a region that ``keeps`` these tensors for its backward pass."""
    return lambda function: Region(function, keeps, work)


def inputs(read: Sequence[Tensor], made: Sequence[Tensor]) -> Sequence[Tensor]:
    """``Kept``: everything that the region reads."""
    return read


def on_cuda(x: Tensor) -> bool:
    """Whether work on a tensor is done by CUDA kernels, or planned as if it were."""
    return x.is_cuda or bool(_interceptor)


@contextlib.contextmanager
def intercepted(handler: Callable[..., Any]) -> Iterator[None]:
    """Inside, regions are not run: ``handler(region, *inputs)`` stands for them, on any device as if on CUDA."""
    _interceptor.append(handler)
    try:
        yield
    finally:
        _interceptor.pop()
