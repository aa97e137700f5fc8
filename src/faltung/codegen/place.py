"""Object code in memory: placed by LLVM's linker, never writable and executable at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import llvmlite.binding as llvm

__all__ = ["place", "publish"]


@lru_cache(maxsize=1)
def _native() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


def place(objects: Sequence[bytes]) -> Any:
    """LLVM's engine that holds the objects; their functions have addresses as long as it lives."""
    _native()
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    # llvmlite's own memory manager places an object's sections in one piece: the default one may map code and constants further apart than the
    # 32 bits of their relocations reach, which aborts the process.  Other objects are reached through tables of addresses, at any distance.
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine, use_lmm=True)
    for code in objects:
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine


def publish(symbol: str, engine: Any) -> None:
    """Let all objects that are placed from now on call the engine's function ``symbol``; the engine must live as long as they."""
    llvm.add_symbol(symbol, engine.get_function_address(symbol))
