"""Tile sizes as pure functions of sizes and target: testable with no hardware.

The cost of a micro-kernel is counted in cycles of a core with two multiply-add and two load ports and a latency of four cycles, which
holds for every x86 server core of the last years; only the ratios matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from .micro import largest_rows
from .target import Target

__all__ = [
    "MOST_VECTORS",
    "Block",
    "choose_block",
    "least_cycles",
    "piece_length",
    "place_scratch",
    "split",
    "split_count",
    "tile_candidates",
    "useful_threads",
]

_CALL_CYCLES = 40.0
_LATENCY = 4.0
MOST_VECTORS = 4
_STREAM_CYCLES = 1.43  # of a panel's vector from the second-level cache: 22 of 32 bytes a cycle with AVX2
_CHUNK_BYTES = 24 << 10  # of a panel: with the rows that it meets it stays in the first-level cache
_WHOLE = 192  # terms that are one piece: the first layer's 147 in two pieces take 12 % more time, for a second trip of the sums
_FORK_CYCLES = 8_000  # about 2 us: a fork and join costs half of that, and more where the threads have gone to sleep


@dataclass(frozen=True)
class Block:
    """Accumulators of a micro-kernel, ``rows`` x ``vectors`` at most; ``cycles`` predicts one pass over everything per unit of reduction."""

    rows: int
    vectors: int
    cycles: float


def useful_threads(threads: int, cycles: float, target: Target) -> int:
    """Threads that pay for their start on ``target``, of at most ``threads``, for work of ``cycles`` in all."""
    return max(1, min(threads, int(cycles / (_FORK_CYCLES * target.rates.fork))))


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


@lru_cache(maxsize=64)
def _step_costs(chunk: int, row_cycles: float, latency: float, near: int) -> dict[tuple[int, int], float]:
    """Cycles of one step of the reduction for every ``(rows, vectors)`` of a micro-kernel, a call's share included.

    ``near``: so many vectors of a panel stay in the first-level cache; more stream from the second, beside the multiply-adds.
    """
    return {
        (rows, vectors): max(step_cycles(rows, vectors, latency), _STREAM_CYCLES * vectors if vectors > near else 0.0)
        + row_cycles * rows
        + (_CALL_CYCLES + 2.0 * rows * vectors) / chunk
        for rows in range(1, largest_rows(1, 1 << 10, fma=True) + 1)
        for vectors in range(1, MOST_VECTORS + 1)
    }


@lru_cache(maxsize=512)
def _row_costs(
    target: Target, row_totals: tuple[int, ...], chunk: int, row_cycles: float, latency: float, piece: int
) -> tuple[tuple[tuple[int, float, float], ...], ...]:
    """For 1, 2, ... vectors: each number of rows that splits ``row_totals``, with the cycles of all rows by that many vectors and by one fewer."""
    cost = _step_costs(chunk, row_cycles, latency, target.l1 * 5 // 8 // (piece * target.vector_bytes) if piece else MOST_VECTORS)
    pieces: dict[int, list[float]] = {}
    for rows in range(1, largest_rows(1, target.registers, target.fma) + 1):
        counts = [split_count(total, rows) for total in row_totals]
        if all(wide >= 0 for wide, _ in counts):
            pieces[rows] = [
                sum(wide * cost[rows, v] + (narrow * cost[rows - 1, v] if narrow else 0.0) for wide, narrow in counts) for v in range(1, MOST_VECTORS + 1)
            ]
    return tuple(
        tuple(
            (rows, cycles[v - 1], cycles[v - 2] if v > 1 else math.inf)
            for rows, cycles in pieces.items()
            if rows <= largest_rows(v, target.registers, target.fma)
        )
        for v in range(1, MOST_VECTORS + 1)
    )


@lru_cache(maxsize=4096)
def choose_block(
    target: Target,
    row_totals: tuple[int, ...],
    vector_total: int,
    chunk: int,
    *,
    round_vectors: bool,
    row_cycles: float = 0.0,
    latency: float = _LATENCY,
    piece: int = 0,
    least_vectors: int = 1,
    most_vectors: int = MOST_VECTORS,
) -> Block:
    """The block that passes over ``row_totals`` rows (each split into pieces of its own) and ``vector_total`` vectors in the fewest cycles.

    ``row_cycles``: what reading a row costs in a step, beside the load; ``latency`` of a multiply-add.  ``round_vectors``: the last piece of vectors
    may run over the end (into scratch), so every count of vectors can be split.  ``piece``: steps of a panel that every block of rows reads
    again, where vectors are a panel's: as long as they fit, from the first-level cache.  Blocks of fewer than ``least_vectors`` or more than ``most_vectors``
    are not considered.
    """
    costs = _row_costs(target, row_totals, chunk, row_cycles, latency, piece)
    least, rows, vectors = math.inf, 0, 0
    for v in range(least_vectors, min(most_vectors, vector_total) + 1):
        wide, narrow = split_count(vector_total, v)
        if wide < 0:
            if not round_vectors:
                continue
            wide, narrow = 0, -(-vector_total // v)
            if narrow * (v - 1) < vector_total:
                wide, narrow = narrow, 0
        for size, of_wide, of_narrow in costs[v - 1]:
            cycles = wide * of_wide + (narrow * of_narrow if narrow else 0.0)
            if cycles < least:
                least, rows, vectors = cycles, size, v
    assert rows  # one row by one vector always splits
    return Block(rows, vectors, least)


@lru_cache(maxsize=512)
def least_cycles(target: Target, row_totals: tuple[int, ...], chunk: int) -> float:
    """What :func:`choose_block` predicts at least for each of its vectors: cheap, for ruling out tiles."""
    return min(of_wide / (v + 1) for v, costs in enumerate(_row_costs(target, row_totals, chunk, 0.0, _LATENCY, 0)) for _, of_wide, _ in costs)


def piece_length(longest: int, out_vectors: int, vector_bytes: int) -> int:
    """Length of the pieces of a reduction of ``longest`` terms.  Each piece is summed by itself, so it must depend on nothing but the channels, the kernel
    and the target: it decides the bits.  One long sum would have up to four times the error of PyTorch's."""
    if longest <= _WHOLE:
        return _WHOLE
    return max(32, min(192, _CHUNK_BYTES // (min(4, out_vectors) * vector_bytes) // 16 * 16))


def tile_candidates(count: int) -> Iterator[int]:
    """Tile sizes that split ``count`` evenly, from all of it down to 1."""
    size = count
    while size > 1:
        yield size
        pieces = -(-count // (size - 1))  # the fewest that make them smaller
        size = -(-count // pieces)
    if count:
        yield 1


def place_scratch(front: int, threads: int, target: Target) -> tuple[int, int]:
    """``(front_pitch, scratch_at)``: how far apart the threads' own copies of ``front`` bytes of packed weights lie, 0 where they share one, and where
    their scratch begins.

    A copy of its own costs each thread the whole packing; half of a shared one (with two threads) would come from the other core's cache, line by line, which
    takes longer.  As long as it stays in the second-level cache.
    """
    if threads == 1 or not 0 < front <= target.l2 // 2:
        return 0, front
    return front, threads * front
