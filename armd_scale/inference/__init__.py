"""The standalone model; imports torch, never megatron or deepspeed."""

from armd_scale.inference.modeling_armd import (
    ARMD,
    ARMDConfig,
    InputError,
    Step,
    load,
    strided_blocks,
)

__all__ = ["ARMD", "ARMDConfig", "InputError", "Step", "load", "strided_blocks"]
