"""The CUDA decoder: the Triton kernels (kernels/) as a Decoder; decode steps are CUDA graphs."""
