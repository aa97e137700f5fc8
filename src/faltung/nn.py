"""Modules: ``Conv2d`` is a :class:`torch.nn.Conv2d` in everything but what it computes with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .arguments import Padding
from .frozen import FrozenWeights
from .functional import conv2d

__all__ = ["Conv2d", "LazyConv2d", "freeze", "padding_of", "unfreeze"]

if TYPE_CHECKING:
    from typing_extensions import Self

M = TypeVar("M", bound=torch.nn.Module)

_compiling = torch.compiler.is_dynamo_compiling


def padding_of(module: torch.nn.Conv2d) -> Padding:
    """The padding that a module computes with, as :func:`faltung.conv2d` takes it.

    With a padding mode other than zeros PyTorch pads by numbers that it fixed when the module was made, (left, right, top, bottom).
    """
    padding: Padding = module.padding
    if module.padding_mode == "zeros" or (isinstance(padding, tuple) and len(padding) == 4):
        return padding
    return tuple(module._reversed_padding_repeated_twice)


class _Freezing:
    """A module whose weights :func:`freeze` may keep packed; training mode undoes that."""

    training: bool

    _frozen: FrozenWeights | None = None

    @property
    def frozen(self) -> bool:
        """Whether :func:`freeze` holds for this layer."""
        return self._frozen is not None

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._frozen = None
        return super().train(mode)  # type: ignore[misc]


class Conv2d(_Freezing, torch.nn.Conv2d):
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
        frozen = self._frozen
        if frozen is not None and not _compiling():
            output = frozen.forward(self, input, weight, bias, padding)
            if output is not None:
                return output
        return conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups, padding_mode=self.padding_mode)


class LazyConv2d(_Freezing, torch.nn.LazyConv2d):  # type: ignore[misc]
    """A :class:`torch.nn.LazyConv2d` that becomes a :class:`Conv2d` of ours with its first input."""

    cls_to_become = Conv2d
    forward = Conv2d.forward
    _conv_forward = Conv2d._conv_forward


def freeze(model: M) -> M:
    """Keep the weights of every faltung layer of ``model`` as the kernels read them, packed or transformed; returns ``model``.

    Each layer packs its weights in the first call of each problem (an input's sizes and format) and keeps the result, which later calls without
    derivatives use; their outputs have the bits that they had before.  The memory that a layer keeps is in :func:`faltung.explain`.

    **Weights must not be changed while they are frozen.**  A change that can be seen from outside is noticed, and the weights are packed again: another
    parameter, its memory, type or device, ``load_state_dict``, and what else PyTorch counts as a new version.  A write through ``.data``, or to the same
    memory from elsewhere, is not.  Training mode (``model.train()``) and :func:`unfreeze` end it; a copy of the model, or one from a pickle, is
    frozen and packs anew.

    Raises RuntimeError where a layer is in training mode (call ``model.eval()`` first), ValueError where ``model`` has no faltung layers.
    """
    layers = _layers(model)
    if not layers:
        raise ValueError("the model has no faltung layers to freeze: faltung.convert(model) makes them")
    if any(layer.training for layer in layers):
        raise RuntimeError("a model in training mode cannot be frozen: call its eval() first")
    for layer in layers:
        if layer._frozen is None:
            layer._frozen = FrozenWeights()
    return model


def unfreeze(model: M) -> M:
    """Undo :func:`freeze`, and give its memory back; returns ``model``."""
    for layer in _layers(model):
        layer._frozen = None
    return model


def _layers(model: torch.nn.Module) -> list[_Freezing]:
    return [module for module in model.modules() if isinstance(module, _Freezing)]
