"""The training network on Megatron-Core: prefix aggregation, attention, layers, and pipeline stages of them."""
