"""Threads through the OpenMP runtime that PyTorch has loaded.

Generated code forks and joins with ``GOMP_parallel`` of that same library (under 1 us for two threads), so it shares PyTorch's worker
threads and never oversubscribes the machine.  Where no such library is loaded the generated code runs on one thread.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

__all__ = ["openmp_addresses"]


@lru_cache(maxsize=1)
def openmp_addresses() -> tuple[int, int]:
    """Addresses of ``GOMP_parallel`` and ``omp_get_thread_num`` in the library already loaded, or ``(0, 0)``."""
    for library in _loaded_libraries():
        try:
            # RTLD_NOLOAD: only a library that the process already has.
            handle = ctypes.CDLL(library, mode=ctypes.DEFAULT_MODE | 0x4)
            addresses = [ctypes.cast(handle[name], ctypes.c_void_p).value for name in ("GOMP_parallel", "omp_get_thread_num")]
        except (OSError, AttributeError):
            continue
        return addresses[0] or 0, addresses[1] or 0
    return 0, 0


def _loaded_libraries() -> list[str]:
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = dict.fromkeys(line.split(None, 5)[5] for line in lines if len(line.split(None, 5)) == 6)
    # The GNU runtime first; LLVM's and Intel's offer the same two entry points.
    return sorted((p for p in paths if Path(p).name.startswith(("libgomp", "libomp", "libiomp"))), key=lambda p: "libgomp" not in p)
