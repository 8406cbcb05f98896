"""The CPU decoder: csrc/decoder behind the decoder interface. No PyTorch."""
