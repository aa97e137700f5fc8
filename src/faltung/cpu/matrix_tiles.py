"""Matrix tiles (AMX): eight registers of 16 rows of 64 bytes, multiplied as matrices of bfloat16 with sums in float32.

One instruction multiplies 16 rows of up to 16 pairs by as many pairs of rows of 16 columns: 8,192 multiply-adds in 16 cycles, where the vector units
make 512 of float32.  An *element* is a pair of neighbouring terms of a reduction, as in :mod:`faltung.cpu.bfloat`.

* Sums: ``SUMS`` of 16 rows by 16 float32.
* Left operands: ``LEFT``, rows of ``pairs`` pairs that are neighbours in memory; rows are any distance apart.
* Right operands: ``RIGHT``, ``pairs`` rows of 16 pairs.

The registers' shapes are state of a thread (:func:`configure`), given back with :func:`release`.  Linux hands them to a process that asks
(:func:`permitted`).  Subnormal numbers are zero to the multiplication, which rounds after each addition, to the nearest.

Source: Intel, *Architecture Instruction Set Extensions Programming Reference*, chapter 3.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ..codegen.emit import Function, Value

__all__ = [
    "LEFT", "MAX_PAIRS", "RIGHT", "ROWS", "SUMS", "TILE_BYTES", "TILE_RATE",
    "configure", "dot", "load", "palette", "permitted", "release", "store", "zero",
]  # fmt: skip

ROWS, MAX_PAIRS, TILE_BYTES = 16, 16, 1024
TILE_RATE = 16
"""Products of bfloat16 in tiles for one of float32 in vectors: 512 a cycle, 32 a cycle."""
SUMS, LEFT, RIGHT = (0, 1, 2, 3), (4, 5), (6, 7)

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


@lru_cache(maxsize=1)
def permitted() -> bool:
    """Whether Linux lets this process use the tile registers; asks for them once.  Child processes inherit the answer."""
    if not sys.platform.startswith("linux") or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        return int(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)) == 0
    except (OSError, AttributeError):
        return False


def palette(pairs: int) -> npt.NDArray[np.uint8]:
    """The 64 bytes that :func:`configure` reads, for left operands of ``pairs`` pairs (1 to 16)."""
    if not 1 <= pairs <= MAX_PAIRS:
        raise ValueError(f"a tile has 1 to {MAX_PAIRS} pairs; got {pairs}")
    found = np.zeros(64, np.uint8)
    found[0] = 1
    for tiles, rows, row_bytes in ((SUMS, ROWS, 64), (LEFT, ROWS, 4 * pairs), (RIGHT, pairs, 64)):
        for tile in tiles:
            found[16 + 2 * tile], found[48 + tile] = row_bytes, rows
    return found


def _call(f: Function, name: str, *arguments: str) -> None:
    types = ["i8 immarg" if argument.startswith("i8") else argument.split()[0] for argument in arguments]
    f.module.declare(name, f"void @{name}({', '.join(types)})")
    f.line(f"call void @{name}({', '.join(arguments)})")


def configure(f: Function, shapes: Value) -> None:
    """Give this thread's tiles the shapes of the :func:`palette` at ``shapes``."""
    _call(f, "llvm.x86.ldtilecfg", str(shapes))


def release(f: Function) -> None:
    """Give the tiles back: what they hold is neither kept nor saved when threads change."""
    _call(f, "llvm.x86.tilerelease")


def zero(f: Function, tile: int) -> None:
    _call(f, "llvm.x86.tilezero", f"i8 {tile}")


def load(f: Function, tile: int, pointer: Value, pitch: Value) -> None:
    """Rows ``pitch`` bytes apart; with a pitch of 0 every row is the same."""
    _call(f, "llvm.x86.tileloadd64", f"i8 {tile}", str(pointer), str(pitch))


def store(f: Function, tile: int, pointer: Value, pitch: Value) -> None:
    _call(f, "llvm.x86.tilestored64", f"i8 {tile}", str(pointer), str(pitch))


def dot(f: Function, total: int, left: int, right: int) -> None:
    """``total += left @ right``: both products of every pair."""
    _call(f, "llvm.x86.tdpbf16ps", f"i8 {total}", f"i8 {left}", f"i8 {right}")
