"""Tile sizes as pure functions of sizes and target: testable with no hardware.

The cost of a micro-kernel is counted in cycles of a core with two multiply-add and two load ports and a latency of four cycles, which
holds for every x86 server core of the last years; only the ratios matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from .micro import largest_rows
from .target import Target

__all__ = ["Block", "choose_block", "split", "split_count", "tile_candidates", "useful_threads"]

_CALL_CYCLES = 40.0
_LATENCY = 4.0
_FORK_CYCLES = 12_000  # about 3 us: a fork and join costs a third of that, and more where the threads have gone to sleep


@dataclass(frozen=True)
class Block:
    """Accumulators of a micro-kernel, ``rows`` x ``vectors`` at most; ``cycles`` predicts one pass over everything per unit of reduction."""

    rows: int
    vectors: int
    cycles: float


def useful_threads(threads: int, cycles: float) -> int:
    """Threads that pay for their start, of at most ``threads``, for work of ``cycles`` in all."""
    return max(1, min(threads, int(cycles / _FORK_CYCLES)))


def split_count(total: int, size: int) -> tuple[int, int]:
    """``total`` as ``a`` pieces of ``size`` and ``b`` of ``size - 1``, as few pieces as possible; ``a`` is negative where that is impossible."""
    pieces = -(-total // size)
    rest = pieces * size - total
    return pieces - rest, rest


def split(total: int, size: int) -> bool:
    """Whether ``total`` is a sum of pieces of ``size`` and ``size - 1`` in the fewest pieces possible."""
    return total == 0 or split_count(total, size)[0] >= 0


def step_cycles(rows: int, vectors: int, latency: float = _LATENCY) -> float:
    """Cycles of one step of the reduction: multiply-adds, loads, or the latency of a lone accumulator chain."""
    return max(rows * vectors / 2, (rows + vectors + 1) / 2, latency)


def _pieces_cost(total: int, size: int, cost: dict[int, float]) -> float:
    wide, narrow = split_count(total, size)
    return wide * cost[size] + (narrow * cost[size - 1] if narrow else 0.0)


@lru_cache(maxsize=4096)
def choose_block(
    target: Target, row_totals: tuple[int, ...], vector_total: int, chunk: int, *, round_vectors: bool, row_cycles: float = 0.0, latency: float = _LATENCY
) -> Block:
    """The block that passes over ``row_totals`` rows (each split into pieces of its own) and ``vector_total`` vectors in the fewest cycles.

    ``row_cycles``: what reading a row costs in a step, beside the load; ``latency`` of a multiply-add.  ``round_vectors``: the last piece of vectors
    may run over the end (into scratch), so every count of vectors can be split.
    """
    best: Block | None = None
    for vectors in range(1, min(4, vector_total) + 1):
        if not round_vectors and not split(vector_total, vectors):
            continue
        for rows in range(1, largest_rows(vectors, target.registers, target.fma) + 1):
            if not all(split(total, rows) for total in row_totals):
                continue
            cycles = _block_cycles(rows, vectors, row_totals, vector_total, chunk, row_cycles, latency)
            if best is None or cycles < best.cycles:
                best = Block(rows, vectors, cycles)
    assert best is not None  # rows = vectors = 1 always splits
    return best


def _block_cycles(rows: int, vectors: int, row_totals: Iterable[int], vector_total: int, chunk: int, row_cycles: float, latency: float) -> float:
    cycles = 0.0
    wide, narrow = split_count(vector_total, vectors)
    if wide < 0:
        wide, narrow = 0, -(-vector_total // vectors)
        if narrow * (vectors - 1) < vector_total:
            wide, narrow = narrow, 0
    for count, width in ((wide, vectors), (narrow, vectors - 1)):
        if count <= 0:
            continue
        if width == 0:
            return math.inf
        cost = {size: step_cycles(size, width, latency) + row_cycles * size + (_CALL_CYCLES + 2.0 * size * width) / chunk for size in (rows, rows - 1) if size}
        cycles += count * sum(_pieces_cost(total, rows, cost) for total in row_totals)
    return cycles


def tile_candidates(count: int) -> Iterator[int]:
    """Tile sizes that split ``count`` evenly, from all of it down to 1."""
    seen = set()
    for pieces in range(1, count + 1):
        size = -(-count // pieces)
        if size not in seen:
            seen.add(size)
            yield size
