"""The network on Megatron-Core layers: seed, layers, attention, and the stage that strings them together."""
