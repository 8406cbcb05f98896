"""Whether PyTorch's operations are watched or transformed from outside: then it has to run them.

Known to be plain are tensors of PyTorch's own classes, outside of all modes and transforms.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

_PLAIN = (Tensor, nn.Parameter)


def why_not_plain(tensors: Iterable[Tensor]) -> str:
    """What makes a call with these tensors one that PyTorch itself has to run; "" if nothing."""
    if torch._C._is_tracing() or torch.compiler.is_compiling():
        return "it is being traced"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms it"
    if forward_ad._current_level >= 0:
        return "it is differentiated in forward mode"
    if torch._C._len_torch_dispatch_stack():
        return "a mode of PyTorch's watches its operations"
    for mode in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
        if type(mode) is not DeviceContext:  # of torch.set_default_device
            return f"{type(mode).__name__} watches its operations"
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            return f"there is a {type(tensor).__name__}"
    return ""


def why_no_later_graph(device_type: str) -> str:
    """Why the graph of a call's gradients has to be made at once; "" if backward can make it."""
    if torch.is_anomaly_enabled():
        return "anomalies of its gradients are looked for"
    if torch.is_autocast_enabled(device_type):
        return "gradients under autocast"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "what is saved for its gradients goes through hooks"
    return ""
