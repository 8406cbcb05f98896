"""The CUDA decoder: the Triton kernels behind the decoder interface, steps as CUDA graphs."""
