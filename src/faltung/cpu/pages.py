"""Huge pages for large results.

A result of more than 32 MiB is memory that the C library has just got from the kernel: every page of it is still to be mapped and cleared when a
convolution writes it for the first time.  In pieces of 4 KiB that takes longer than most convolutions (98 MiB: 29 ms on two cores; in pieces of 2 MiB: 5 ms).
Where the system leaves the choice to programs (``madvise`` in ``/sys/kernel/mm/transparent_hugepage/enabled``, the usual setting), they have to ask.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable

__all__ = ["LARGE_BYTES", "ask_for_huge_pages", "whole_pages"]

LARGE_BYTES = 4 << 20
"""Results from this size on are asked for; NumPy does the same for its arrays, from the same size."""


def whole_pages(address: int, size: int) -> tuple[int, int]:
    """Start and length of the whole pages inside ``size`` bytes at ``address``: neighbours' memory is not spoken for."""
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    return start, max(0, stop - start)


def _system_call() -> Callable[[int, int, int], int] | None:
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if not sys.platform.startswith("linux") or advice is None:
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):  # pragma: no cover
        return None
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return function


_madvise = _system_call()


def ask_for_huge_pages(address: int, size: int) -> None:
    """Ask that memory not written yet be mapped in huge pages; changes nothing but time.  A refusal (a kernel without them) is no error."""
    if _madvise is not None:
        start, length = whole_pages(address, size)
        _madvise(start, length, mmap.MADV_HUGEPAGE)
