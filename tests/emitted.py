"""Small functions emitted for tests: a module, its text, a callable on addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from faltung.codegen.emit import Function, Module
from faltung.codegen.load import load
from faltung.cpu.target import Target

__all__ = ["build", "module_of", "module_text"]

_serial = 0


def module_of(parameters: Sequence[str], body: Callable[[Function], None]) -> Module:
    """A module with one public function ``entry`` of addresses and integers (``p...`` are pointers)."""
    module = Module()
    f = module.function("entry", [("ptr" if name.startswith("p") else "i64", name) for name in parameters], public=True)
    body(f)
    f.ret()
    return module


def module_text(parameters: Sequence[str], body: Callable[[Function], None]) -> str:
    """That module as text."""
    return str(module_of(parameters, body))


def build(target: Target, parameters: Sequence[str], body: Callable[[Function], None]) -> Callable[..., None]:
    """The function compiled for a target that this machine runs."""
    global _serial
    _serial += 1
    kernel = load(f"test{_serial}", target, lambda: module_of(parameters, body))
    return kernel.function(len(parameters))
