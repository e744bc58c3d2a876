"""The standalone model; imports torch, never megatron or deepspeed."""

from armd_scale.inference.decoding import FREE, Frontier, Step, Task, strided_blocks
from armd_scale.inference.model import ARMD, load, read_config
from armd_scale.inference.network import ARMDConfig, InputError
from armd_scale.inference.sampling import Decoding

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
