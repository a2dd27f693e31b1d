"""Compiled kernels over float32 feature maps in channels_last, on PyTorch's own CPU threads."""
