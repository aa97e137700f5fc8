"""Object code in memory: placed by LLVM's linker, never writable and executable at once."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import llvmlite.binding as llvm

if TYPE_CHECKING:
    from ..cpu.target import Target

__all__ = ["place"]


@lru_cache(maxsize=1)
def _native() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


def place(code: bytes, target: Target) -> Any:
    """LLVM's engine that holds ``code``; its functions have addresses as long as it lives."""
    _native()
    machine = llvm.Target.from_default_triple().create_target_machine(cpu=target.cpu, features=target.features, jit=True)
    # llvmlite's own memory manager places an object's sections in one piece: the default one may map code and constants further apart than the
    # 32 bits of their relocations reach, which aborts the process.
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine, use_lmm=True)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine
