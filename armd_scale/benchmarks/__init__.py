"""What ``tools/bench.py`` and ``tools/gpu.py`` measure."""
