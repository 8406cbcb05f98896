"""The CPU decoder: csrc/decoder/ as a Decoder. No PyTorch."""
