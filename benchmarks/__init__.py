"""Measurements side by side with the peer, `diffusers`, in one run. Each module runs as `python -m benchmarks.NAME`."""
