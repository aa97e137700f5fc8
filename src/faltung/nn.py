"""Modules: ``Conv2d`` is a :class:`torch.nn.Conv2d` in everything but what it computes with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arguments import Padding
from .functional import conv2d

__all__ = ["Conv2d", "LazyConv2d", "padding_of"]

_compiling = torch.compiler.is_dynamo_compiling


def padding_of(module: torch.nn.Conv2d) -> Padding:
    """The padding that a module computes with, as :func:`faltung.conv2d` takes it.

    With a padding mode other than zeros PyTorch pads by numbers that it fixed when the module was made, (left, right, top, bottom).
    """
    padding: Padding = module.padding
    if module.padding_mode == "zeros" or (isinstance(padding, tuple) and len(padding) == 4):
        return padding
    return tuple(module._reversed_padding_repeated_twice)


class Conv2d(torch.nn.Conv2d):
    """A :class:`torch.nn.Conv2d` on faltung's kernels.

    Constructor, parameters, initialization, ``state_dict``, ``repr``, pickling and ``isinstance`` are inherited.  ``padding`` may also be four numbers
    (left, right, top, bottom).  No padding mode copies the input.  ``torch.jit.script`` cannot compile it: use ``torch.compile`` or ``torch.export``.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if _compiling():
            return self._conv_forward(input, self.weight, self.bias)
        # Module.__getattr__ takes as long as allocating a small output, and there would be two; what a parametrization computes is not in here
        parameters: dict[str, Any] = self._parameters
        try:
            weight, bias = parameters["weight"], parameters["bias"]
        except KeyError:
            weight, bias = self.weight, self.bias
        return self._conv_forward(input, weight, bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        padding = self.padding if self.padding_mode == "zeros" else padding_of(self)
        return conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups, padding_mode=self.padding_mode)


class LazyConv2d(torch.nn.LazyConv2d):
    """A :class:`torch.nn.LazyConv2d` that becomes a :class:`Conv2d` of ours with its first input."""

    cls_to_become = Conv2d
    forward = Conv2d.forward
    _conv_forward = Conv2d._conv_forward
