"""Triton kernels of fastgen, installed as `fastgen.kernels`. They import torch and triton only.

    embedding -> [norm] -> qkv -> attention -> linear (residual) -> ... -> head -> sampling

One file a kernel: what it computes, with shapes; the kernel; its launcher. Common to all:

- N tokens of a step, packed; R rows; H heads, D head_dim, C = H * D hidden, V vocabulary.
- Weights are (out, in) matrices, so that a program reads rows of memory at any tile width.
- The residual stream, biases, layer norms and sums are float32; products take operands of the
  activations' dtype. int8 weights are widened to it and have a float32 scale for each output.
- Sizes of the model are compile-time constants; those of a step are not.
"""
