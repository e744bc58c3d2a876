"""The training network on Megatron-Core: prefix aggregation, attention, layers, and pipeline stages of them."""

from armd_scale import startup

startup.megatron()
