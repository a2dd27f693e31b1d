"""Measurements side by side with `diffusers`, in one run. Each module runs as `python -m benchmarks.NAME`."""
