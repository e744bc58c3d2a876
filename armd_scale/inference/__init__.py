"""The standalone model; imports torch, never megatron or deepspeed."""

import importlib

from armd_scale.decoding.lanes import FREE, Frontier, Step, Task, strided_blocks
from armd_scale.decoding.network import ARMDConfig, InputError
from armd_scale.decoding.sampling import Decoding
from armd_scale.inference.model import ARMD, load, read_config
from armd_scale.traits import TRAITS

for _name in TRAITS:  # an objective's module registers how its models are scored and decoded
    importlib.import_module(f"armd_scale.objectives.{_name}")

__all__ = [
    "ARMD",
    "FREE",
    "ARMDConfig",
    "Decoding",
    "Frontier",
    "InputError",
    "Step",
    "Task",
    "load",
    "read_config",
    "strided_blocks",
]
