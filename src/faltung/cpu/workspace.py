"""Scratch memory of the CPU kernels: a buffer for each Python thread, grown as needed and given back when it was large; another for what plans leave plans."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

__all__ = ["BETWEEN", "KEPT_BYTES", "WITHIN", "workspace"]

KEPT_BYTES = 64 << 20
"""A larger workspace is freed after the call that needed it."""
_ALIGNMENT = 4096
_POISON_BEYOND = 64 << 10
"""Bytes behind the workspace that are poisoned too, of what the buffer has: filling a large one whole takes longer than most calls."""


class _Local(threading.local):
    kept: tuple[int, int, npt.NDArray[np.uint8] | None] = (0, 0, None)
    """Usable bytes, address and owner of this thread's buffer."""


WITHIN = _Local()
"""The workspaces of plans."""
BETWEEN = _Local()
"""The buffer of what one plan leaves for the next, while each has its own workspace."""


def workspace(size: int, poison: bool = False, of: _Local = WITHIN) -> tuple[int, npt.NDArray[np.uint8] | None]:
    """The address of at least ``size`` bytes, page-aligned, valid until this thread's next call; and what keeps it alive if it is not kept here.

    ``poison`` fills it, and what lies close behind it, with NaN of every floating type.
    """
    usable, address, buffer = of.kept
    if size > usable:
        buffer = np.empty(size + _ALIGNMENT, np.uint8)
        address = -(-buffer.ctypes.data // _ALIGNMENT) * _ALIGNMENT
        if size <= KEPT_BYTES:
            of.kept = size, address, buffer
    if poison and buffer is not None:
        start = address - buffer.ctypes.data
        buffer[start : start + size + _POISON_BEYOND].fill(0xFF)
    return address, buffer
