"""Generated code to callables, kept for the process: a kernel's functions are compiled and placed one by one, and shared with other kernels."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .builtin import builtin, builtin_on_stack
from .compile import compile_object, object_key
from .emit import Function, Module
from .place import place, publish

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..cpu.target import Target

__all__ = ["Kernel", "Unit", "load", "units"]

_lock = threading.RLock()
_DIGITS = 32
"""Of a key that tell one unit from another in a process."""
_kernels: dict[tuple[str, Target], Kernel] = {}
_engines: dict[str, Any] = {}
"""What holds a unit's code, by its symbol."""


class Kernel:
    """Machine code with a name; ``address`` is the entry point, valid as long as this object lives."""

    def __init__(self, name: str, target: Target, engine: Any, entry: str) -> None:
        self.name, self.target = name, target
        self._engine, self._entry = engine, entry
        self.address: int = engine.get_function_address(entry)
        if not self.address:
            raise RuntimeError(f"the kernel {name} has no entry point {entry}")

    def function(self, arguments: int) -> Callable[..., None]:
        """A callable that takes ``arguments`` addresses or 64-bit integers and releases the interpreter's lock while it runs."""
        return builtin(self.address, arguments, self, self.target)

    def function_on_stack(self, arguments: int, block: npt.NDArray[np.int64], workspace_bytes: int, keep: object) -> Callable[..., None]:
        """The same for the address of ``block``, ``arguments`` more, and that of a small workspace on the caller's stack; ``keep`` lives as long."""
        return builtin_on_stack(self.address, arguments, block.ctypes.data, workspace_bytes, (self, block, keep), self.target)


@dataclass(frozen=True)
class Unit:
    """What is compiled and kept by itself: a module of IR text with one public function, ``symbol``, that other units call."""

    symbol: str
    text: str


def units(module: Module, target: Target) -> Iterator[Unit]:
    """A module's functions, each a unit, callees before those that call them, and its entry point last.

    Most of a kernel is what others have too (a micro-kernel, the packing of a panel): apart, it is compiled once for all of them.  A symbol is a
    function's name and a digest of its text and those of all that it calls.
    """
    symbols: dict[str, str] = {}

    def unit(function: Function, text: str) -> Unit:
        symbol = symbols[function.name] = f"{function.name}_{object_key(text, target)[:_DIGITS]}"
        return Unit(symbol, text.replace(f" @{function.name}(", f" @{symbol}(", 1))

    def visit(function: Function) -> Iterator[Unit]:
        for inside in (function, *function.parts.values()):
            for callee in inside.callees.values():
                if callee.name not in symbols and callee.name not in function.parts:
                    yield from visit(callee)
        yield unit(function, module.unit(function, symbols))

    yield from visit(module.entry) if module.divisible else [unit(module.entry, str(module))]


def load(name: str, target: Target, emit: Callable[[], Module]) -> Kernel:
    """The kernel ``name`` for ``target``; ``emit`` gives its code where it is not loaded yet.  Safe to call from many threads."""
    found = _kernels.get((name, target))
    if found is not None:
        return found
    with _lock:
        found = _kernels.get((name, target))
        if found is None:
            found = _place(name, target, units(emit(), target))
            _kernels[name, target] = found
    return found


def _place(name: str, target: Target, parts: Iterable[Unit]) -> Kernel:
    parts = list(parts)
    missing = [part for part in parts if part.symbol not in _engines]
    if missing:
        engine = place([compile_object(part.text, target) for part in missing])
        for part in missing:
            publish(part.symbol, engine)
            _engines[part.symbol] = engine
    entry = parts[-1].symbol
    return Kernel(name, target, _engines[entry], entry)
