"""What a step does, as a function of its number: learning rate, phase, and the generation orders of its samples."""

import math

from armd_scale import orders
from armd_scale.config import OptimizerConfig, RunConfig
from armd_scale.orders import Layout


def learning_rate(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Learning rate of ``step`` (from 0): linear warm-up, then constant or a cosine down to ``min_lr_ratio``."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    floor = config.lr * config.min_lr_ratio
    return floor + (config.lr - floor) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def phase(step: int, config: RunConfig) -> str:
    """``left-to-right``, ``permutation`` or ``strided``; ``masked`` for masked diffusion."""
    if config.objective != "armd":
        return "masked" if config.objective == "mdm" else "left-to-right"
    if step >= config.train.steps:
        return "strided"
    return "left-to-right" if step < config.orders.ar_steps else "permutation"


def streams(step: int, config: RunConfig) -> int:
    """Streams of a strided step, 1 in the base training."""
    if phase(step, config) != "strided":
        return 1
    return orders.draw_streams(config.orders.streams, config.seed, step)


def shuffled_tokens(step: int, config: RunConfig) -> int:
    """Tokens shuffled in each sequence of ``step``; 0 in strided fine-tuning and for other objectives."""
    if phase(step, config) != "permutation":
        return 0
    return orders.shuffled_tokens(
        step,
        ar_steps=config.orders.ar_steps,
        permutation_steps=config.orders.permutation_steps,
        rho=config.orders.rho,
    )


def layout(step: int, slot: int, config: RunConfig) -> Layout:
    """Generation order and blocks of the sample in place ``slot`` of the global batch of ``step``."""
    length = config.model.length
    if phase(step, config) == "strided":
        return orders.strided(length, streams(step, config))
    draw = orders.window if config.orders.shuffle == "window" else orders.shuffled
    return draw(length, shuffled_tokens(step, config), config.seed, step, slot)
