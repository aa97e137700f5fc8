"""Frozen weights: a layer that serves keeps its weights as the kernels read them, packed or transformed.

Nothing is kept unless :func:`faltung.freeze` was asked to: a write through ``.data``, for one, changes a weight and leaves no trace.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from . import config, dispatch
from .arguments import Padding
from .functional import is_plain, prepared_call
from .prepared import Prepared, dense

__all__ = ["FrozenWeights"]

_PROBLEMS = 16  # a layer's entries; those beyond push out the oldest

_grad_enabled = torch.is_grad_enabled
_threads = torch.get_num_threads
_options = config.current


class _Entry:
    """One problem of a layer: the plan with its weights, or None, and what the weights were."""

    def __init__(self, call: Prepared, weight: Tensor, bias: Tensor | None) -> None:
        self._of = _identity(weight), None if bias is None else _identity(bias)
        # Detached aliases keep the memory: were it freed, another weight could come to lie at the same address.
        self._keep = weight.detach(), None if bias is None else bias.detach()
        self.call = call
        # An operand of odd strides is read from its copy.
        self.weight = dense(self._keep[0], call.problem.weight_format)
        self.bias = None if self._keep[1] is None else dense(self._keep[1], "nchw")
        self.plan: dispatch.FrozenPlan | None = call.freeze(self.weight, self.bias)

    def holds(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether weight and bias are what they were, as far as that can be seen without reading them."""
        return self._of == (_identity(weight), None if bias is None else _identity(bias))


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    # Tensors made in inference mode count no versions.
    version = -1 if tensor.is_inference() else tensor._version
    return id(tensor), version, tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()


class FrozenWeights:
    """What a frozen layer keeps, made for each problem when it first meets it.  Safe with threads; a copy, or one from a pickle, begins empty."""

    def __init__(self) -> None:
        self._entries: dict[Any, _Entry] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[FrozenWeights], tuple[()]]:
        return FrozenWeights, ()

    def forward(self, layer: torch.nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None, padding: Padding) -> Tensor | None:
        """The layer's output; None where the call is none that frozen weights serve: one with derivatives, a compiler's, one with other weights, ..."""
        parameters: dict[str, Any] = layer._parameters
        if weight is not parameters.get("weight") or bias is not parameters.get("bias") or not is_plain(x, weight, bias):
            return None
        if _grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
            return None
        arguments = layer.stride, padding, layer.dilation, layer.groups, layer.padding_mode
        try:
            key = (x.shape, x.stride(), x.dtype, x.device, *arguments, _threads(), _options().token)
            entry = self._entries.get(key)
        except (TypeError, RuntimeError):  # an argument that is a list, or a tensor without strides
            return None
        if entry is None or not entry.holds(weight, bias):
            entry = self._make(key, x, weight, bias, arguments)
        if entry is None or entry.plan is None:
            return None
        return entry.call.forward_frozen(entry.plan, x, entry.weight, entry.bias)

    @property
    def bytes(self) -> int:
        """Memory of the packed weights, those that problems share counted once."""
        plans = [e.plan for e in self._entries.values() if e.plan is not None]
        return sum(plan.bytes for i, plan in enumerate(plans) if not any(plan.shares(other) for other in plans[:i]))

    def _make(self, key: Any, x: Tensor, weight: Tensor, bias: Tensor | None, arguments: tuple[Any, ...]) -> _Entry | None:
        with self._lock:
            found = self._entries.get(key)
            if found is not None and found.holds(weight, bias):  # another thread's, meanwhile
                return found
            call = prepared_call(x, weight, bias, *arguments)
            if call is None:
                return None
            made = _Entry(call, weight, bias)
            self._entries = {k: e for k, e in list(self._entries.items())[-_PROBLEMS + 1 :] if k != key and e.holds(weight, bias)}
            if made.plan is not None:
                any(made.plan.share(e.plan) for e in self._entries.values() if e.plan is not None)
            self._entries = {**self._entries, key: made}
            return made
