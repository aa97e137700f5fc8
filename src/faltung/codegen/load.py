"""Generated code to callables, kept for the process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .builtin import builtin, builtin_on_stack
from .compile import compile_object
from .place import place

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..cpu.target import Target

__all__ = ["Kernel", "load"]

_lock = threading.RLock()
_kernels: dict[tuple[str, Target], Kernel] = {}


class Kernel:
    """Machine code with a name; ``address`` is the entry point, valid as long as this object lives."""

    def __init__(self, name: str, target: Target, engine: Any, entry: str) -> None:
        self.name, self.target = name, target
        self._engine = engine
        self.address: int = engine.get_function_address(entry)
        if not self.address:
            raise RuntimeError(f"the kernel {name} has no entry point {entry}")

    def function(self, arguments: int) -> Callable[..., None]:
        """A callable that takes ``arguments`` addresses or 64-bit integers and releases the interpreter's lock while it runs."""
        return builtin(self.address, arguments, self, self.target)

    def function_on_stack(self, arguments: int, block: npt.NDArray[np.int64], workspace_bytes: int, keep: object) -> Callable[..., None]:
        """The same for the address of ``block``, ``arguments`` more, and that of a small workspace on the caller's stack; ``keep`` lives as long."""
        return builtin_on_stack(self.address, arguments, block.ctypes.data, workspace_bytes, (self, block, keep), self.target)


def load(name: str, target: Target, emit: Callable[[], str], entry: str = "entry") -> Kernel:
    """The kernel ``name`` for ``target``; ``emit`` gives its IR text where it is not loaded yet.  Safe to call from many threads."""
    found = _kernels.get((name, target))
    if found is not None:
        return found
    with _lock:
        found = _kernels.get((name, target))
        if found is None:
            found = _place(name, target, compile_object(emit(), target), entry)
            _kernels[name, target] = found
    return found


def _place(name: str, target: Target, code: bytes, entry: str) -> Kernel:
    return Kernel(name, target, place(code, target), entry)
