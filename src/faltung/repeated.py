"""A layer's call that repeats: one look at the operands by PyTorch's own guard, instead of their signature built and looked up anew.

Building the signature takes a tenth of a tiny layer's forward pass.  The guard is what ``torch.compile`` asks before it runs compiled code: it compares the
class, dispatch keys, dtype, device, sizes, strides and ``requires_grad`` of all operands, and what is active around the call (autocast, transforms, modes of
dispatch, tracing), in one call.  It is no part of PyTorch's public interface; without it every call goes the longer way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import config, ops
from .functional import is_plain, prepared_call

TensorGuards: Any
try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # pragma: no cover
    TensorGuards = None

__all__ = ["RepeatedCall"]

_function_modes = torch._C._len_torch_function_stack
_grad_enabled = torch.is_grad_enabled
_threads = torch.get_num_threads
_options = config.current
_apply = ops.apply


class RepeatedCall:
    """The call that a layer repeats, if it does.  Safe with threads: what is known is one tuple; a copy, or one from a pickle, begins empty."""

    def __init__(self) -> None:
        self._known: tuple[Any, ...] | None = None
        self._misses = 0

    def __reduce__(self) -> tuple[type[RepeatedCall], tuple[()]]:
        return RepeatedCall, ()

    def forward(self, layer: torch.nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The layer's output; None where this is not the call that is known.  Not to be called by a compiler."""
        known = self._known
        if known is None:
            return None
        check, call, stride, padding, dilation, groups, without_bias, derivatives, threads, token = known
        if (
            layer.stride is stride
            and layer.padding is padding
            and layer.dilation is dilation
            and layer.groups is groups
            and layer.padding_mode == "zeros"
            and (bias is None) is without_bias
            and _threads() == threads
            and _options().token == token
            and not _function_modes()
            and forward_ad._current_level < 0
            and (check(x, weight) if without_bias else check(x, weight, bias))
        ):
            return _apply(x, weight, bias, call) if derivatives and _grad_enabled() else call.forward(x, weight, bias)
        return None

    def missed(self, layer: torch.nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Know this call from now on, after :meth:`forward` had no output for it.

        Only the first, second, fourth, eighth, ... miss is worth a guard: a layer whose calls alternate would make one each time.
        """
        self._misses += 1
        if self._misses & (self._misses - 1) or TensorGuards is None or layer.padding_mode != "zeros" or not is_plain(x, weight, bias):
            return
        arguments = layer.stride, layer.padding, layer.dilation, layer.groups
        call = prepared_call(x, weight, bias, *arguments, "zeros")
        if call is None:
            return
        tensors = (x, weight) if bias is None else (x, weight, bias)
        guard = TensorGuards(*tensors, dynamic_dims_sizes=[list(t.shape) for t in tensors], dynamic_dims_strides=[list(t.stride()) for t in tensors])
        derivatives = any(t.requires_grad for t in tensors)
        self._known = guard.check, call, *arguments, bias is None, derivatives, _threads(), _options().token
