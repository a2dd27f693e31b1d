"""The U-Net on a GPU as few operations as possible, each of which reads and writes memory once.

Convolutions and matrix products leave their biases to the operation that reads their result anyway, and all else is one
of three operations over feature maps in channels_last: `operations.normalize`, `operations.add_residual` and
`operations.interleave`. They are kernels in Triton (`triton_kernels`) where Triton works, and PyTorch's operators
(`reference`) elsewhere; `network.FusedNetwork` is the network in terms of them.
"""
