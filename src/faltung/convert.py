"""Putting faltung under existing models: module by module, or by catching calls of PyTorch's function."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from . import nn
from .functional import conv2d

__all__ = ["ConversionEntry", "ConversionReport", "accelerate", "conversion_report", "convert"]

M = TypeVar("M", bound=torch.nn.Module)


@dataclass(frozen=True)
class ConversionEntry:
    """One convolution of a model: where it is, its class, whether it is faltung's, and why it is not."""

    name: str
    kind: str
    converted: bool
    reason: str = ""


@dataclass(frozen=True)
class ConversionReport:
    """Every convolution of a model.  ``str(report)`` is a table for people."""

    entries: tuple[ConversionEntry, ...]

    @property
    def converted(self) -> tuple[ConversionEntry, ...]:
        """Those that faltung computes."""
        return tuple(e for e in self.entries if e.converted)

    @property
    def kept(self) -> tuple[ConversionEntry, ...]:
        """Those that PyTorch computes; ``reason`` says why :func:`convert` leaves them, and is empty for those that it would take."""
        return tuple(e for e in self.entries if not e.converted)

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} of {len(self.entries)} convolutions run on faltung"]
        width = max((len(e.name or "(model)") for e in self.kept), default=0)
        lines += [f"  {e.name or '(model)':{width}}  {e.kind}: {e.reason or 'not converted yet'}" for e in self.kept]
        return "\n".join(lines)


def convert(model: M, *, inplace: bool = False) -> M:
    """``model`` with every ``torch.nn.Conv2d``, and every subclass that keeps its forward, computed by faltung.

    With ``inplace=False`` the modules are copied and share parameters and buffers with the given model by identity; with ``inplace=True`` the given
    model is changed and returned.  Names, hooks, the training flag and parametrizations are kept.  :func:`conversion_report` says what was
    converted, and why the rest was not.
    """
    result = model if inplace else _copy_sharing_tensors(model)
    for _, module, reason in _convolutions(result):
        if not (reason or _is_ours(module)):
            module.__class__ = _class_on_faltung(type(module))
    return result


def conversion_report(model: torch.nn.Module) -> ConversionReport:
    """What of ``model`` faltung computes, converted or not, and why not the rest."""
    return ConversionReport(tuple(ConversionEntry(name, type(module).__name__, _is_ours(module), reason) for name, module, reason in _convolutions(model)))


def _convolutions(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, str]]:
    for name, module in model.named_modules():
        if _is_ours(module):
            yield name, module, ""
        elif isinstance(module, torch.nn.modules.conv._ConvNd) or (type(module).__module__.startswith("torch.ao.nn") and "Conv" in type(module).__name__):
            yield name, module, _obstacle(module)
        elif isinstance(module, torch.jit.ScriptModule) and getattr(module, "original_name", "") == "Conv2d":
            yield name, module, "compiled by torch.jit.script, which fixes what it calls"


def _is_ours(module: torch.nn.Module) -> bool:
    return isinstance(module, (nn.Conv2d, nn.LazyConv2d)) and not _obstacle_in(module, nn.Conv2d)


def _obstacle(module: torch.nn.Module) -> str:
    """Why ``module`` is left as it is; empty where it can be converted."""
    if isinstance(module, torch.nn.modules.conv._ConvTransposeNd):
        return "a transposed convolution"
    if not isinstance(module, torch.nn.Conv2d):
        return "quantized" if type(module).__module__.startswith("torch.ao.nn") else "not a two-dimensional convolution"
    return _obstacle_in(module, torch.nn.Conv2d)


def _obstacle_in(module: torch.nn.Module, base: type[Any]) -> str:
    for method in ("forward", "_conv_forward", "__call__"):
        if method in vars(module):
            return f"{method} is replaced on this module"
        if getattr(type(module), method) is not getattr(base, method):
            return f"{type(module).__name__} overrides {method}"
    return ""


def _class_on_faltung(cls: Any) -> Any:
    """The class that is ``cls`` with faltung's computation: one for each, so that instances compare and pickle."""
    return _make_class(cls)


@cache
def _make_class(cls: Any) -> Any:
    if cls is torch.nn.Conv2d:
        return nn.Conv2d
    if cls is torch.nn.LazyConv2d:
        return nn.LazyConv2d
    if issubclass(cls, torch.nn.Conv2d) and cls.__name__.startswith("Parametrized") and cls.__module__ == parametrize.__name__:
        # a class that parametrize made for one module: its properties and pickling, on the converted base, which removing the parametrization uncovers
        members = {name: member for name, member in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        return type(cls.__name__, (_class_on_faltung(cls.__base__),), members)
    return type(cls.__name__, (nn.Conv2d, cls), {"__module__": cls.__module__, "__reduce_ex__": _reduce, "_converted_from": cls})


def _reduce(module: Any, protocol: Any) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:  # noqa: ARG001
    # the class may leave something out of its state (a lock, a file); before Python 3.11 only a class that does so has the method
    state = module.__getstate__() if hasattr(module, "__getstate__") else dict(vars(module))
    return _blank, (module._converted_from,), state


def _blank(cls: type[Any]) -> Any:
    converted = _class_on_faltung(cls)
    return converted.__new__(converted)


def _copy_sharing_tensors(model: M) -> M:
    shared: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (vars(module).get("_parameters", {}), vars(module).get("_buffers", {}), vars(module)):
            shared.update((id(t), t) for t in tensors.values() if isinstance(t, Tensor))
    return copy.deepcopy(model, shared)


class _Accelerate(TorchFunctionMode):
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return (conv2d if func is torch.conv2d else func)(*args, **(kwargs or {}))


def accelerate() -> TorchFunctionMode:
    """A context manager inside which ``torch.conv2d`` and ``torch.nn.functional.conv2d`` run on faltung, ``torch.nn.Conv2d`` modules included.

    It holds for the calls of its own thread.  A padding mode other than zeros still copies the input: :func:`convert` avoids that.
    """
    return _Accelerate()
