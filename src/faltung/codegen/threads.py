"""Threads through the OpenMP runtime that PyTorch has loaded.

Generated code forks and joins with ``GOMP_parallel`` of that same library (under 1 us for two threads), so it shares PyTorch's worker
threads and never oversubscribes the machine.  Where no such library is loaded the generated code runs on one thread.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

__all__ = ["openmp_addresses"]


_NAMES = ("GOMP_parallel", "omp_get_thread_num")
_NOLOAD = 0x4  # RTLD_NOLOAD: only a library that the process already has


@lru_cache(maxsize=1)
def openmp_addresses() -> tuple[int, int]:
    """Addresses of ``GOMP_parallel`` and ``omp_get_thread_num`` in the library that PyTorch's own loops use, or ``(0, 0)`` where there is none.

    A process may hold several: other packages (scikit-learn, SciPy) bring their own.  With another one's pool the threads of both pools would wait for
    work on the same cores, each in a busy loop.  So the search goes the way of the dynamic linker when it bound PyTorch: what is visible
    to the whole process, then what PyTorch's library depends on.
    """
    for library in (None, *_loaded_libraries()):
        try:
            handle = ctypes.CDLL(library, mode=ctypes.DEFAULT_MODE | (_NOLOAD if library else 0))
            addresses = [ctypes.cast(handle[name], ctypes.c_void_p).value for name in _NAMES]
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
    order = ("libtorch_cpu", "libgomp", "libomp", "libiomp")  # the last three offer the same two entry points
    return [p for start in order for p in paths if Path(p).name.startswith(start)]
