"""Quick starts: Megatron-Core without what it loads and this project does not use.

Importing Megatron-Core loads PyTorch's compiler, to decorate functions that are not called here, and wandb, for its own
inference: about a third of the time from the command to the first step.
"""

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any


@functools.cache
def megatron() -> ModuleType:
    """Import ``megatron.core``. Packages that use it call this first."""
    import torch

    with _replaced(torch, "compile", _as_it_is), _without("wandb"):
        return importlib.import_module("megatron.core")


def _as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """Stands in for ``torch.compile``: the function itself."""
    return function or _as_it_is


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """Inside, a package that is not imported yet cannot be imported."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
