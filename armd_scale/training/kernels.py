"""Selects the kernels of a run.

- ``check_fp8``: refuses FP8 where TransformerEngine is missing or too old.
- ``attention_kernel``: the fastest attention kernel for the shapes of the run on its GPU. The timings are kept in the
  run directory, so a resumed run uses the same kernel and computes the same bits.
"""

import contextlib
import json
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.extensions import transformer_engine
from megatron.core.utils import is_te_min_version

from armd_scale.config import RunConfig
from armd_scale.errors import UserError
from armd_scale.files import write_atomically
from armd_scale.model import attention
from armd_scale.model.network import streams_of


def check_fp8(config: RunConfig, device: torch.device) -> None:
    """``UserError`` if the run uses FP8 on a GPU and TransformerEngine is missing or older than 2.2."""
    available = transformer_engine.HAVE_TE and is_te_min_version("2.2.0")
    if config.train.fp8 and device.type == "cuda" and not available:
        raise UserError("train.fp8 needs TransformerEngine on a GPU: pip install 'transformer-engine[pytorch]>=2.2'")


def shapes(config: RunConfig) -> Counter[tuple[int, ...]]:
    """Shapes of the queries [S, B, G, R, N, D] of attention without a mask on this rank -> number of layers."""
    model, parallel = config.model, config.parallel
    heads = model.key_heads // parallel.tensor, model.heads // model.key_heads
    kinds = (streams_of(model, index)[1] for index in range(model.layers))
    return Counter((streams, config.train.micro_batch, *heads, model.length, model.head_size) for streams in kinds)


def attention_kernel(config: RunConfig, device: torch.device) -> str | None:
    """The kernel of ``attention.KERNELS`` for a run, the same on all ranks; None: PyTorch chooses. Collective.

    ``UserError`` if the selected kernel cannot run on this device.
    """
    wanted: str | None = config.train.attention
    source = "train.attention"
    if wanted == "measured":
        if device.type != "cuda":
            return None
        choice = [_measured(config, device) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(choice, src=0, device=device)
        wanted, source = choice[0], f"the kernel in {config.run_directory.attention_path}"
    if wanted is None:
        return None
    shape = next(iter(shapes(config)))
    if not attention.measure(shape, _dtype(config), device, _causal(config), repeats=1, kernels=[wanted]):
        raise UserError(f"{source} = {wanted} cannot run on this device: set train.attention to another kernel")
    attention.activate(wanted)
    return wanted


def _measured(config: RunConfig, device: torch.device) -> str | None:
    path = config.run_directory.attention_path
    layers, name = shapes(config), torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    setting = {"device": name, "torch": torch.__version__, "dtype": config.train.dtype, "shapes": _listed(layers)}
    known: Any = None
    with contextlib.suppress(OSError, ValueError):  # a missing or damaged file is measured again
        known = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(known, dict) or "chosen" not in known or {key: known.get(key) for key in setting} != setting:
        tables = {shape: attention.measure(shape, _dtype(config), device, _causal(config)) for shape in layers}
        everywhere = set.intersection(*(set(table) for table in tables.values()))
        seconds = {
            kernel: sum(count * tables[shape][kernel] for shape, count in layers.items()) for kernel in everywhere
        }
        chosen = min(seconds, key=lambda kernel: seconds[kernel], default=None)
        known = {**setting, "seconds": seconds, "chosen": chosen}
        with contextlib.suppress(OSError):  # the other ranks wait; checkpoints and metrics report a full disk
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(known, indent=1) + "\n")
    return known["chosen"]


def _listed(layers: Counter[tuple[int, ...]]) -> list[list[int]]:
    return [[*shape, count] for shape, count in sorted(layers.items())]


def _dtype(config: RunConfig) -> torch.dtype:
    return getattr(torch, config.train.dtype)


def _causal(config: RunConfig) -> bool:
    return config.traits.causal
