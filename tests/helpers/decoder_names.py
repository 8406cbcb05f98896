"""The decoders that can be tested here. In Triton's interpreter, only the one that needs it."""

from __future__ import annotations

import importlib.util
import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_CUDA = torch.cuda.is_available() and HAS_TRITON
DECODERS = ["cuda"] * HAS_TRITON if INTERPRETED else ["cpu", "torch", *["cuda"] * HAS_CUDA]
