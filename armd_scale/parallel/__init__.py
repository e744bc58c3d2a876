"""How processes share the model: Megatron-Core groups, parameter shards, the DeepSpeed ZeRO engine."""

import os
import warnings

import torch

from armd_scale import startup

# DeepSpeed chooses its accelerator when it is first imported, and warns when it has to guess.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

# Megatron-Core 0.16 calls collectives under names that torch 2.13 renames.
warnings.filterwarnings("ignore", message="`torch.distributed.", category=FutureWarning)

startup.megatron()
