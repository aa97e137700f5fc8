"""What this machine does in a second: short measurements, made once and kept on disk.

The cost models count cycles and bytes a cycle with constants that were fitted on one machine (:data:`FITTED`).  Here the same rates are measured on
the machine at hand, with generated code: about 60 ms, once for each processor and release.  They serve two ends.  :func:`faltung.explain` turns predicted
cycles into seconds and shows the floor, the time that arithmetic or memory alone would take (the roofline of Williams, Waterman and Patterson, 2009).  And
where a rate differs from the fitted one by more than a factor of the square root of two, the models' constants are scaled, by powers of two: noise changes
nothing, and neither does any of it change which algorithm computes, so it changes no bits.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import numpy as np

from .. import choices
from ..codegen.emit import Function, Module, Value
from ..codegen.entry import ENTRY_ARGUMENTS, ArgumentBlock, Task, emit_entry
from ..codegen.load import load
from ..codegen.numeric import Numeric
from ..problem import ConvProblem
from .geometry import multiplications
from .matrix_tiles import TILE_RATE
from .target import Rates, Target, host_target

__all__ = [
    "CALL_SECONDS",
    "FITTED",
    "SHARED_CACHE",
    "Floor",
    "Machine",
    "calibrated",
    "floor",
    "machine",
    "measure",
    "predicted_seconds",
    "processor",
    "versions",
]

_FORMAT = 2
_MOST_TURNS = 4
_ACCUMULATORS = 10  # enough to hide a latency of four cycles at two a cycle
_ROUNDS = 12
_MEMORY_BYTES = 128 << 20  # beyond the last cache, or so far into it that it makes no difference
_UNROLL = 8
CALL_SECONDS = 3e-6
"""From Python to the kernel and back, the result's allocation included."""
SHARED_CACHE = 24 << 20
"""Bytes that a convolution may hope to find in the last cache, which other cores use too."""


@dataclass(frozen=True)
class Machine:
    """``cycle``: seconds of two vector multiply-adds of one core, the unit of the cost models.  ``near``, ``far``, ``memory``: bytes a cycle that one core
    reads from its second-level cache, from four times its size, and from memory.  ``stream``: bytes a second that ``threads`` cores read from memory
    together.  ``fork``: seconds to start and join them."""

    cycle: float
    near: float
    far: float
    memory: float
    stream: float
    fork: float
    threads: int

    @property
    def rates(self) -> Rates:
        """The rates relative to those that the constants were fitted on, to the nearest power of two; of four for what other
        programs have a share in, memory and the start of threads.  At most four times as much or as little: a machine that
        was busy when it was measured is not to be believed further."""

        def nearest(value: float, fitted: float, base: float) -> float:
            return min(max(base ** round(math.log(value / fitted, base)), 0.25), 4.0) if value > 0 else 1.0

        own = {"near": self.near, "far": self.far, "memory": self.memory, "fork": self.fork / self.cycle}
        return Rates(**{name: nearest(value, FITTED[name], 4.0 if name in ("memory", "fork") else 2.0) for name, value in own.items()})

    @property
    def doubtful(self) -> bool:
        """Whether a rate is so bad that the machine was probably busy: with both cores at work elsewhere a start of threads took 8.7 us instead of 0.5."""
        rates = self.rates
        return rates.fork >= 4.0 or rates.memory <= 0.25 or min(rates.near, rates.far) <= 0.5

    def best_of(self, other: Machine) -> Machine:
        """The better of each rate, as what interrupts a measurement only worsens it."""
        cycle = min(self.cycle, other.cycle)
        found = {name: max(getattr(m, name) / m.cycle for m in (self, other)) * cycle for name in ("near", "far", "memory")}
        return Machine(cycle=cycle, stream=max(self.stream, other.stream), fork=min(self.fork, other.fork), threads=self.threads, **found)


FITTED = {"near": 62.0, "far": 27.0, "memory": 11.0, "fork": 2500.0}
"""Bytes a cycle and cycles, of the machine that the models' constants were fitted on."""

_ARGUMENTS = ArgumentBlock(("fma_tasks", "read_tasks", "count", "share"))


def _emit(target: Target) -> Module:
    module, numeric = Module(), Numeric("f32", target)
    size = numeric.lanes * numeric.compute_bytes

    def keep(f: Function, task: Task, values: list[Value]) -> None:
        for i, value in enumerate(values):
            f.store(value, task.workspace + task.thread * 4096 + i * size)

    def multiply(f: Function, task: Task) -> Callable[[Value], None]:
        def body(_: Value) -> None:
            a, b = (f.load(task.operand("source") + i * size, numeric.vector) for i in range(2))
            start = [f.load(task.operand("source") + i * size, numeric.vector) for i in range(2, 2 + _ACCUMULATORS)]
            keep(f, task, f.loop(0, task["count"], 1, lambda _, *sums: [f.fma(a, b, s, target.fma) for s in sums], start))

        return body

    def read(f: Function, task: Task) -> Callable[[Value], None]:
        def body(index: Value) -> None:
            source = task.operand("source") + index * task["share"]

            def turn(place: Value, *sums: Value) -> list[Value]:
                return [f.fadd(s, f.load(source + place + i * size, numeric.vector)) for i, s in enumerate(sums)]

            zeros = [f.zero(numeric.vector)] * _UNROLL
            keep(f, task, f.loop(0, task["count"], 1, lambda _, *sums: f.loop(0, task["share"], _UNROLL * size, turn, sums), zeros))

        return body

    emit_entry(module, _ARGUMENTS, [("fma_tasks", multiply), ("read_tasks", read)])
    return module


def measure(target: Target, threads: int) -> Machine:
    """The rates of this machine, of its quickest turns: what interrupts a turn only slows it down."""
    kernel = load(f"machine_{target.isa}", target, lambda: _emit(target))
    call = kernel.function(ENTRY_ARGUMENTS)
    memory = np.ones(_MEMORY_BYTES // 4, np.float32)
    scratch = np.empty(4096 * (threads + 1), np.uint8)
    source, workspace = -(-memory.ctypes.data // 64) * 64, -(-scratch.ctypes.data // 64) * 64

    def seconds(tasks: str, number: int, count: int, share: int, rounds: int = _ROUNDS) -> float:
        values = {"fma_tasks": 0, "read_tasks": 0, "count": count, "share": share, tasks: number}
        block = _ARGUMENTS.pack(number, values)
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            call(block.ctypes.data, source, 0, 0, 0, workspace)
            times.append(time.perf_counter() - start)
        return min(times)

    steps = 20_000
    empty = seconds("fma_tasks", 1, 0, 0)
    cycle = (seconds("fma_tasks", 1, steps, 0) - empty) / (steps * _ACCUMULATORS / 2)

    def read_rate(share: int, count: int, rounds: int = _ROUNDS) -> float:
        return share * count / (seconds("read_tasks", 1, count, share, rounds) - empty) * cycle

    whole = (_MEMORY_BYTES - 64) // (threads * 4096) * 4096
    return Machine(
        cycle=cycle,
        near=read_rate(target.l2 // 2, 4),
        far=read_rate(min(4 * target.l2, _MEMORY_BYTES // 8), 1),
        memory=read_rate(_MEMORY_BYTES // 2, 1, 3),
        stream=whole * threads / seconds("read_tasks", threads, 1, whole, 3),
        fork=max(0.0, seconds("fma_tasks", threads, 0, 0, 100) - empty) if threads > 1 else 0.0,
        threads=threads,
    )


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


@lru_cache(maxsize=1)
def versions() -> str:
    """The releases that generated code depends on."""
    found = []
    for package in ("faltung", "llvmlite"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(package)
    return " ".join(found)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _store_path() -> Path | None:
    return choices.store_path("machine", f"{processor()} {host_target()} {versions()} format {_FORMAT}")


_store = choices.ChoiceStore(_store_path)
_lock = threading.Lock()


@lru_cache(maxsize=1)
def machine() -> Machine:
    """The machine at hand: as it was kept on disk, else as it is measured now.

    What is doubtful is measured again by the next processes, four times in all.
    """
    with _lock:
        key = f"threads {_cpus()}"
        record = _store.lookup(key)
        known, turns = None, 0
        try:
            if record is not None:
                known = Machine(threads=int(record["threads"]), **{f.name: float(record[f.name]) for f in fields(Machine) if f.name != "threads"})
                turns = int(record["turns"])
        except (KeyError, TypeError, ValueError):  # a damaged record is measured anew
            known = None
        if known is not None and (turns >= _MOST_TURNS or not known.doubtful):
            return known
        found = measure(host_target(), _cpus())
        if known is not None:
            found = found.best_of(known)
        _store.remember(key, {**asdict(found), "turns": turns + 1})
        return found


@lru_cache(maxsize=1)
def calibrated() -> Target:
    """The host, with its rates."""
    return replace(host_target(), rates=machine().rates)


@dataclass(frozen=True)
class Floor:
    """Seconds below which a computation cannot go, and what sets them: ``arithmetic`` or ``memory``."""

    seconds: float
    bound: str


def floor(problem: ConvProblem, target: Target, threads: int, products: float | None = None) -> Floor:
    """The floor of ``problem`` on ``threads`` threads of this machine, for an algorithm of so many ``products`` (None: the direct one's).

    Every operand is read or written once: from memory where all together exceed the caches, else from the last of these.
    """
    own, numeric = machine(), Numeric(problem.dtype, target)
    threads = min(threads, own.threads)
    lanes = numeric.lanes
    if products is None:  # algorithms of fewer products compute them in float32
        lanes *= TILE_RATE if problem.dtype == "bf16" and target.matrix_tiles else 2 if numeric.pairs else 1
    arithmetic = (multiplications(problem) if products is None else products) / (2 * lanes) * own.cycle / threads
    rate = own.stream * threads / own.threads if problem.bytes() > SHARED_CACHE else own.far / own.cycle * threads
    memory = problem.bytes() / rate
    return Floor(arithmetic, "arithmetic") if arithmetic >= memory else Floor(memory, "memory")


def predicted_seconds(cycles: float, threads: int, least: Floor) -> float:
    """The time of ``cycles`` on the thread that is busy longest, at least the floor, with the call itself and the start of the other threads."""
    own = machine()
    return max(cycles * own.cycle, least.seconds) + CALL_SECONDS + (own.fork if threads > 1 else 0.0)
