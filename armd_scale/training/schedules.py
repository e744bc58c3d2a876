"""The schedule of a run: learning rate and phase as functions of the step, and their change at a resume."""

import math
from collections.abc import Mapping
from typing import Any

from armd_scale.config import OptimizerConfig, RunConfig
from armd_scale.errors import UserError

_FIELDS = {
    "train": ("steps",),
    "orders": (
        "ar_steps",
        "permutation_steps",
        "rho",
        "shuffle",
        "strided_steps",
        "streams",
        "left_to_right_share",
        "groups",
        "group_share",
        "group_decay",
    ),
    "optimizer": ("lr", "schedule", "warmup_steps", "decay_steps", "min_lr_ratio"),
}
_LENGTHS = {f"{section}.{name}" for section, names in _FIELDS.items() for name in names if name.endswith("steps")}
"""Fields that move the schedule of all steps."""


def learning_rate(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Learning rate of ``step`` (from 0): linear warm-up, then constant, or down to ``min_lr_ratio`` in a cosine or
    (``wsd``: warm-up, stable, decay) linearly over the last steps.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    floor = config.lr * config.min_lr_ratio
    if config.schedule == "wsd":
        decay = config.decay_steps or max(1, total_steps // 10)
        return floor + (config.lr - floor) * min(1.0, max(0, total_steps - step) / decay)
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return floor + (config.lr - floor) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def fields(config: RunConfig) -> dict[str, Any]:
    """The fields of the schedule by their names, for the manifest of a checkpoint."""
    sections = {name: names for name, names in _FIELDS.items() if name != "orders" or config.traits.phases}
    return {
        f"{part}.{name}": getattr(getattr(config, part), name) for part, names in sections.items() for name in names
    }


def check(before: Mapping[str, Any], config: RunConfig, step: int) -> list[str]:
    """The fields of the schedule that differ at a resume from ``step`` as ``name = value (before: value)``.

    ``before``: ``fields`` of the checkpoint. ``UserError`` if a number of steps differs, the last step before the
    checkpoint would then have had another phase or learning rate, and ``train.schedule_from`` does not name ``step``.
    """
    now = fields(config)
    differing = [name for name in now if name in before and before[name] != now[name]]
    lines = [f"{name} = {now[name]} (before: {before[name]})" for name in differing]
    if step and _LENGTHS & set(differing) and config.train.schedule_from != step:
        was, would = (_values(other, step - 1) for other in (_with(config, before), config))
        jumps = [f"{name} was {was[name]} and becomes {would[name]}" for name in was if was[name] != would[name]]
        if jumps:
            raise UserError(
                f"{', '.join(lines)} changes the schedule at step {step}: {', '.join(jumps)}. "
                f"Restore the fields, or accept the change with train.schedule_from={step}"
            )
    return lines


def _with(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The configuration with other fields of the schedule."""
    parts: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, field = name.partition(".")
        parts.setdefault(section, {})[field] = value
    return config.model_copy(
        update={section: getattr(config, section).model_copy(update=update) for section, update in parts.items()}
    )


def _values(config: RunConfig, step: int) -> dict[str, str]:
    """Learning rate and phase of a step in words."""
    from armd_scale.objectives import interface  # imports torch, which a launch without a change does not need

    progress = interface.training(config.objective).progress(step, config)
    shuffled = f", {progress['shuffled']} tokens shuffled" if progress["shuffled"] else ""
    return {
        "the phase": f"{progress['phase']}{shuffled}",
        "the learning rate": f"{learning_rate(step, config.optimizer, config.total_steps):.3g}",
    }
