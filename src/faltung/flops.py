"""What ``torch.utils.flop_counter`` is told of the registered operators: as many operations as it counts for PyTorch's own convolution.

But for the weight's gradient of grouped layers, which it counts as if there were one group; here each direction has the same number.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from . import ops

__all__ = ["FORMULAS", "tell_counters"]

Shape = Sequence[int]


def _count(batch: int, places: Shape, weight: Shape) -> int:
    return 2 * batch * places[0] * places[1] * weight[0] * weight[1] * weight[2] * weight[3]


def _forward(x: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return _count(x[0], out_shape[2:], weight)


def _grad_input(grad_output: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return _count(grad_output[0], grad_output[2:], weight)


def _grad_weight(_: Shape, grad_output: Shape, weight_size: Shape, *__: Any, **___: Any) -> int:
    return _count(grad_output[0], grad_output[2:], weight_size)


_BY_OPERATOR: tuple[tuple[Any, Callable[..., int]], ...] = (ops.forward, _forward), (ops.grad_input, _grad_input), (ops.grad_weight, _grad_weight)
FORMULAS = {operator.overloadpacket: formula for operator, formula in _BY_OPERATOR}


def tell_counters() -> None:
    """Register the formulas where a counter may be at work.

    PyTorch's module of counters takes longer to import than faltung, so nothing is registered before somebody else has imported it; counters at work by
    then have a registry of their own.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    for operator, formula in FORMULAS.items():
        if operator not in module.flop_registry:
            module.register_flop_formula(operator)(formula)
        for mode in _get_current_dispatch_mode_stack():
            registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
            if registry is not None:
                registry.setdefault(operator, module.flop_registry[operator])
