"""Triton kernels of fastgen, installed as `fastgen.kernels`. They import torch and triton only."""
