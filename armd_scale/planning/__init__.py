"""Predicts memory, time and communication of a layout without its GPUs."""
