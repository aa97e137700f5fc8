"""The machine that kernels are made for: instruction set, registers, caches.  Detected once; other ones by name, for tests."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .matrix_tiles import permitted

__all__ = ["TARGETS", "Rates", "Target", "host_target", "runnable_targets", "target", "use_target"]


@dataclass(frozen=True)
class Rates:
    """Rates of a machine relative to those that the cost models' constants were fitted on: bytes a cycle from the second-level cache, from beyond it
    and from memory, and cycles to start threads.  Powers of two; see :mod:`faltung.cpu.machine`."""

    near: float = 1.0
    far: float = 1.0
    memory: float = 1.0
    fork: float = 1.0


@dataclass(frozen=True)
class Target:
    """What a generator may count on.

    ``vector_bytes`` and ``registers`` describe the vector registers; ``fma`` a fused multiply-add, ``masks`` cheap masked memory
    access in every element width, ``half`` conversion instructions between float16 and float32, ``bfloat16_dot`` products of bfloat16 pairs added
    to float32 at twice the rate of float32's, ``matrix_tiles`` such products of whole matrices (:mod:`faltung.cpu.matrix_tiles`).  Cache sizes are bytes,
    one core's.  ``rates`` scale the cost models; no choice that decides bits may look at them.
    """

    isa: str
    triple: str
    cpu: str
    features: str
    vector_bytes: int
    registers: int
    fma: bool = True
    masks: bool = False
    half: bool = True
    bfloat16_dot: bool = False
    matrix_tiles: bool = False
    l1: int = 32 << 10
    l2: int = 1 << 20
    rates: Rates = Rates()

    @property
    def double_pumped(self) -> bool:
        """Whether the units that compute are half as wide as a vector, which takes them two turns: in units of products, all else takes half the time."""
        return self.vector_bytes == 64 and self.cpu in _DOUBLE_PUMPED

    @property
    def full_rate(self) -> bool:
        """Whether vectors of 512 bits are computed in one turn."""
        return self.vector_bytes == 64 and not self.double_pumped

    def lanes(self, element: str) -> int:
        """Elements of a compute type (``float`` or ``double``) in one vector."""
        return self.vector_bytes // {"float": 4, "double": 8}[element]


_DOUBLE_PUMPED = {"znver4"}
_X86 = "x86_64-unknown-linux-gnu"
_AVX512_FLAGS = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"}
TARGETS: dict[str, Target] = {
    # Processors with tiles multiply pairs of bfloat16 in vectors at half the rate of float32 (Emerald Rapids: 2 cycles an instruction).
    "amx": Target("amx", _X86, "sapphirerapids", "-prefer-256-bit", 64, 32, masks=True, matrix_tiles=True),
    "avx512_bf16": Target("avx512_bf16", _X86, "cooperlake", "-prefer-256-bit", 64, 32, masks=True, bfloat16_dot=True),
    "avx512": Target("avx512", _X86, "skylake-avx512", "-prefer-256-bit", 64, 32, masks=True),
    "avx2": Target("avx2", _X86, "haswell", "", 32, 16),
    "sse2": Target("sse2", _X86, "x86-64", "", 16, 16, fma=False, half=False),
    "neon": Target("neon", "aarch64-unknown-linux-gnu", "cortex-a76", "", 16, 32),
}
"""A plain target for each instruction set, used by name (``FALTUNG_ISA`` or :func:`target`)."""


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.split(":", 1)[1].split())
    return set()


def _cache_bytes(level: int, default: int) -> int:
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    for index in range(6):
        try:
            if (folder / f"index{index}/level").read_text().strip() != str(level):
                continue
            if (folder / f"index{index}/type").read_text().strip() == "Instruction":
                continue
            size = (folder / f"index{index}/size").read_text().strip()
            return int(size[:-1]) << {"K": 10, "M": 20}[size[-1]]
        except (OSError, ValueError, KeyError):
            continue
    return default


def runnable_targets() -> tuple[str, ...]:
    """Names of the instruction sets that this machine runs, the best one first."""
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):
        return ("neon",)
    if machine not in ("x86_64", "amd64"):
        return ()
    flags = _cpu_flags()
    names = []
    if flags >= {*_AVX512_FLAGS, "avx512_bf16", "amx_tile", "amx_bf16"} and permitted():
        names.append("amx")
    if flags >= {*_AVX512_FLAGS, "avx512_bf16"}:
        names.append("avx512_bf16")
    if flags >= _AVX512_FLAGS:
        names.append("avx512")
    if flags >= {"avx2", "fma", "f16c"}:
        names.append("avx2")
    return (*names, "sse2")


@lru_cache(maxsize=1)
def host_target() -> Target:
    """The host as detected: its best instruction set, tuned for its processor, with its cache sizes.

    Raises RuntimeError where the processor is none that kernels can be generated for.
    """
    from ..codegen.compile import host_cpu

    names = runnable_targets()
    if not names:
        raise RuntimeError(f"faltung generates code for x86-64 and AArch64 processors; this one is {platform.machine()!r}")
    wanted = os.environ.get("FALTUNG_ISA")
    if wanted is not None and wanted not in names:
        raise ValueError(f"FALTUNG_ISA must be one of {', '.join(names)} on this machine; got {wanted!r}")
    base = TARGETS[wanted or names[0]]
    cpu, features = (base.cpu, base.features) if wanted not in (None, names[0]) else host_cpu()
    return Target(
        base.isa, base.triple, cpu, features, base.vector_bytes, base.registers, base.fma, base.masks, base.half, base.bfloat16_dot,
        base.matrix_tiles, l1=_cache_bytes(1, base.l1), l2=_cache_bytes(2, base.l2),
    )  # fmt: skip


_override: list[Target] = []


def target() -> Target:
    """The target in force: the host with its measured rates, or the one that :func:`use_target` set."""
    if _override:
        return _override[-1]
    from .machine import calibrated

    return calibrated()


@contextmanager
def use_target(value: str | Target) -> Iterator[Target]:
    """Make plans for another target, by name or a :class:`Target`, inside a ``with`` block.  For tests; not thread-safe."""
    from .. import dispatch

    chosen = TARGETS[value] if isinstance(value, str) else value
    dispatch.clear()
    _override.append(chosen)
    try:
        yield chosen
    finally:
        _override.pop()
        dispatch.clear()
