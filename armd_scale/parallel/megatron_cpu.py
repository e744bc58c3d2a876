"""Lets Megatron-Core 0.16 run on CPUs with gloo; does nothing with CUDA.

Megatron-Core uses ``torch.cuda`` for the device, synchronisation and the random state, and allocates on "cuda" by name.
``install`` rebinds the name ``torch`` in the modules of ``megatron.core`` to a proxy that implements these calls for
the CPU. ``torch`` itself does not change, so DeepSpeed and torch.distributed are not affected.
"""

import functools
import importlib
import sys
import types
from typing import Any

import torch

# Imported before the names are rebound, as a module imported later would keep the real torch.
_USED = (
    "megatron.core.tensor_parallel.random",
    "megatron.core.tensor_parallel.mappings",
    "megatron.core.tensor_parallel.layers",
    "megatron.core.tensor_parallel.cross_entropy",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.transformer.transformer_config",
    "megatron.core.utils",
)
_ALLOCATORS = ("zeros", "ones", "empty", "full", "tensor", "arange", "zeros_like", "ones_like", "empty_like")


class _CpuDevice(types.ModuleType):
    """Stands in for ``torch.cuda`` inside Megatron-Core."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def synchronize(*_: Any, **__: Any) -> None:
        pass

    @staticmethod
    def empty_cache() -> None:
        pass


class _CpuTorch(types.ModuleType):
    """Stands in for ``torch`` inside Megatron-Core."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CpuDevice("torch.cuda")
        for name in _ALLOCATORS:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(allocate: Any) -> Any:
    @functools.wraps(allocate)
    def call(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and not isinstance(device, int) and torch.device(device).type == "cuda":
            kwargs["device"] = torch.device("cpu")
        return allocate(*args, **kwargs)

    return call


@functools.cache
def install() -> None:
    """Make Megatron-Core usable without CUDA; call before its first use."""
    if torch.cuda.is_available():
        return
    for name in _USED:
        importlib.import_module(name)
    proxy = _CpuTorch()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = proxy  # type: ignore[attr-defined]
