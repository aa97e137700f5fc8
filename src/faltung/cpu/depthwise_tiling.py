"""Tiles and register blocks of depthwise forward and grad_input: pure functions of sizes and the machine."""

from __future__ import annotations

from dataclasses import dataclass

from ..problem import DTYPES, ConvProblem
from .depthwise_geometry import Line, LinePhase, context_rows
from .depthwise_taps import Reach, block_pixels
from .depthwise_tile import Lanes
from .target import Target

__all__ = ["Tiling", "asks_ahead", "edges", "reach_of", "tiling"]

_SIDE_BY_SIDE = 32  # vectors of channels of a task, and twice as many where there are tasks enough
_MOST_TAPS = 13 * 13  # up to which so many are better than 8: their weights stay in the second-level cache
_LEAST_ROWS = 4  # of a task
_PLANE_COLUMNS = 32  # of a row from which on it is transposed by itself
_LINE = 64  # bytes
_FAR_BYTES, _NEAR_BYTES = 20 << 20, 8 << 20  # of a source whose rows are asked for ahead, at stride 2 and at stride 1


@dataclass(frozen=True)
class Tiling:
    """Outputs of a tile (of each phase), vectors of lanes together, pixels of a register block; see :class:`Spec` for the others."""

    rows: int
    cols: int
    vectors: int
    block: int
    direct: bool
    whole: bool
    abreast: int
    planes: bool = False


def edges(cols: Line) -> tuple[int, int]:
    """Columns of scratch, from the left and up to the right end, that outputs outside :meth:`Line.direct` read."""
    left, right = 0, cols.length(cols.count)
    for phase in cols.phases:
        first, last = cols.direct(phase)
        if first and phase.taps:
            left = max(left, phase.shift + (first - 1) * cols.step + (len(phase.taps) - 1) * cols.spacing + 1)
        if last < phase.count and phase.taps:
            right = min(right, phase.shift + last * cols.step)
    return left, right


def tiling(problem: ConvProblem, lanes: Lanes, lines_: tuple[Line, Line], target: Target, threads: int) -> Tiling:
    """A ring of rows that takes at most half of the second-level cache, with several tasks for each thread where there is enough to do."""
    rows, cols = lines_
    entry, residues = lanes.entry_bytes, problem.kg if lanes.kind == "strided" else 1
    budget = target.l2 // 2 // entry
    total = -(-(problem.k if problem.direction == "forward" else problem.c) // lanes.numeric.lanes)
    ring = context_rows(rows) + rows.step
    tile_cols = cols.count
    inner = sum(last - first for first, last in map(cols.direct, cols.phases))
    plain = lanes.format == "nhwc" and lanes.kind == "same" and (target.masks or not lanes.tail)

    block = _plane_block(lanes, rows, cols, target)
    if block:
        return Tiling(rows.count, cols.count, 1, block, True, True, 1, True)
    abreast = _abreast(problem, target, cols) if plain else 1
    whole = _whole_block(target, cols, abreast) if plain and cols.mode == "zeros" else 0
    direct = bool(whole) or (plain and not lanes.tail and not lanes.numeric.converts and inner * 4 >= cols.outputs * 3)
    while not direct and tile_cols > 64 and cols.length(tile_cols) * ring * residues > budget:
        tile_cols = -(-tile_cols // 2)
    vectors = 1
    if lanes.format == "nhwc" and lanes.kind == "same":
        most = _most_vectors(lanes, rows, cols, target, direct)
        if most == _SIDE_BY_SIDE and problem.n * max(1, rows.count // _LEAST_ROWS) * -(-total // (2 * most)) >= 4 * threads:
            most = 2 * most
        vectors = max(1, min(total, most, budget // ((cols.length(tile_cols)) * ring)))
        vectors = -(-total // -(-total // vectors))
    others = problem.n * -(-total // vectors) * -(-cols.count // tile_cols)
    pieces = 1
    while others * pieces < 4 * threads and pieces < rows.count // _LEAST_ROWS:
        pieces += 1
    columns = max(len(phase.taps) for phase in cols.phases)
    widths = [last - first for first, last in map(cols.direct, cols.phases)] if direct else [phase.count for phase in cols.phases]
    block = whole or block_pixels(target, min((width for width in widths if width), default=1), columns)
    return Tiling(-(-rows.count // pieces), tile_cols, vectors, block, direct, bool(whole), abreast if whole else 1)


def _most_vectors(lanes: Lanes, rows: Line, cols: Line, target: Target, direct: bool) -> int:
    """Vectors side by side in memory that a task of nhwc takes.

    With 8 of them the hardware sees a stream. With AVX-512 at full rate 32 take 0.9 of the time that 8 take (at batch 8 1.06 times as fast, and 64 1.09
    times; at batch 1 1.11 times; up to 1.5 where 9 were two tasks). A strided gradient's results are written in phases, every second pixel at a time: whole
    rows of up to 32 (512 and 1024 channels at 28x28 and 14x14 take 0.6 of the time that 8 take). Vectors of half a cache line (AVX2) want whole pixels: 3x3
    kernels are 5 to 28 % faster with 64 than with 8, but 5x5 and 7x7, whose weights then leave the first-level cache, up to 15 % slower.
    """
    taps = max(len(phase.taps) for phase in rows.phases) * max(len(phase.taps) for phase in cols.phases)
    if target.vector_bytes < _LINE and 64 * taps * lanes.entry_bytes <= target.l1 and not lanes.numeric.converts:
        return 64
    side_by_side = target.full_rate and taps <= _MOST_TAPS
    return _SIDE_BY_SIDE if side_by_side or (direct and cols.output_step > 1) else 8


def reach_of(cols: Line, phase: LinePhase, block: int) -> Reach:
    """What a phase's pixels need, read from memory in blocks of ``block``; of a whole row of them where it is 0."""
    first, last = cols.inside()
    end = phase.shift + (phase.count - 1) * cols.step + (len(phase.taps) - 1) * cols.spacing + 1
    return Reach(len(phase.taps), max(0, first - phase.shift), max(0, end - last), True, block == phase.count) if phase.taps else Reach(0, 0, 0, True)


def _plane_block(lanes: Lanes, rows: Line, cols: Line, target: Target) -> int:
    """Pixels of a block with which whole images of nchw are computed in scratch; 0 where they are not.

    Their rows would fill a part of the lanes that are transposed together, and need zeros on both sides.
    """
    pixels = rows.size * cols.size + rows.outputs * cols.outputs
    if lanes.format == "nhwc" or lanes.kind == "strided" or cols.mode != "zeros" or min(cols.size, cols.outputs) >= _PLANE_COLUMNS:
        return 0
    return _whole_block(target, cols, 1) if pixels * lanes.entry_bytes <= target.l2 // 2 else 0


def _whole_block(target: Target, cols: Line, abreast: int) -> int:
    """Pixels of a block with which every column phase is read from memory alone; 0 where there is none."""

    def fits(block: int) -> bool:
        return all(reach_of(cols, phase, block).fits(target, phase.count, block, cols.step) for phase in cols.phases)

    return block_pixels(target, min(phase.count for phase in cols.phases), max(len(phase.taps) for phase in cols.phases), fits, abreast)


def _abreast(problem: ConvProblem, target: Target, cols: Line) -> int:
    """Vectors of channels that a register block takes, with as many fewer pixels: each pixel is then read in a run of up to four cache lines.

    Where a layer waits for its source, lines side by side arrive up to 1.4 times as fast as lines a pixel apart (3x3 at stride 2 on 14x14 to 112x112: 10 to
    30 % of the time; at stride 1 10 to 20 % where the source is larger than the caches or its pixels share few cache sets); elsewhere the shorter rows of
    pixels cost more loads than is gained.
    """
    columns = max(len(phase.taps) for phase in cols.phases)
    if target.registers < 32 or cols.output_step > 1 or columns > 5:
        return 1
    if cols.step > 1:
        return 4 if columns <= 3 else 2
    pixel = problem.c * DTYPES[problem.dtype]
    return 4 if columns <= 3 and (problem.n * cols.size * problem.h * pixel > _NEAR_BYTES or pixel % 2048 == 0) else 1


def asks_ahead(cols: Line, source_bytes: int, pixel_bytes: int) -> bool:
    """Whether the rows of the next output row are asked for: where the source is larger than the caches.

    Measured at stride 1: 5 to 30 % on 3x3 and 7x7, and 2 to 7 % lost on small images; at stride 2 5 to 10 % on 5x5 and twice the speed on 3x3 with pixels of
    256 bytes, but 4 to 10 % lost on 3x3 with wider ones.
    """
    if cols.step == 1:
        return source_bytes > _NEAR_BYTES
    return source_bytes > _FAR_BYTES and not (cols.extent < 3 and pixel_bytes > 256)
