"""What a run will need before it is paid for: memory, time and communication of a layout, without its GPUs."""
