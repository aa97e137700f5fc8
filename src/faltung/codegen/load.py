"""Object code to callables: placed in memory by LLVM's linker (never writable and executable at once), kept for the process."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import llvmlite.binding as llvm

from .compile import compile_object

if TYPE_CHECKING:
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
        # ctypes converts c_void_p in a quarter of the time that its integers take: 0.35 us of a call with six arguments
        return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(self.address)


@lru_cache(maxsize=1)
def _native() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


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
    _native()
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=target.cpu, features=target.features, jit=True)
    # llvmlite's own memory manager places an object's sections in one piece: the default one may map code and constants further apart than the
    # 32 bits of their relocations reach, which aborts the process.
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine, use_lmm=True)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return Kernel(name, target, engine, entry)
