"""Scratch memory of the CPU kernels: one buffer a Python thread, grown as needed and given back when it was large."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

__all__ = ["KEPT_BYTES", "workspace"]

KEPT_BYTES = 64 << 20
"""A larger workspace is freed after the call that needed it."""
_ALIGNMENT = 4096


class _Local(threading.local):
    buffer: npt.NDArray[np.uint8] | None = None
    address: int = 0


_local = _Local()


def workspace(size: int, poison: bool = False) -> tuple[int, npt.NDArray[np.uint8] | None]:
    """The address of at least ``size`` bytes, page-aligned, valid until this thread's next call; and what keeps it alive if it is not kept here.

    ``poison`` fills it with NaN of every floating type.
    """
    if size == 0:
        return 0, None
    buffer = _local.buffer
    if buffer is None or buffer.size < size + _ALIGNMENT:
        buffer = np.empty(size + _ALIGNMENT, np.uint8)
        address = -(-buffer.ctypes.data // _ALIGNMENT) * _ALIGNMENT
        if size <= KEPT_BYTES:
            _local.buffer, _local.address = buffer, address
    else:
        address = _local.address
    if poison:
        buffer.fill(0xFF)
    return address, buffer
