"""Predicts memory, time and communication of a layout without its GPUs."""

from armd_scale import startup

startup.megatron()
