"""Sizes of the weight's gradient on matrix tiles, and its predicted cost, as pure functions of the problem and the target (never of the threads)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ..problem import DTYPES, ConvProblem
from .amx_weight_pack import UNIT
from .geometry import Axis, Phase, Slab, Tap, axes
from .matrix_tiles import ROWS, TILE_BYTES
from .parts import PARTS, PRODUCTS
from .target import Target
from .tile import align, odd_lines
from .tiling import tile_candidates

__all__ = ["AmxWeightConfig", "Gather", "candidates", "choose_config"]

_SUM_BYTES = 704 << 10  # of a block: they stay in the second-level cache
_PARTIAL_BYTES = 16 << 20
_SCRATCH_BYTES = 32 << 20  # a thread: tiles that need more are not considered
_TASKS = 12  # to share out, whatever the number of threads
_SHARE_CYCLES = 40_000.0
_STEP_CYCLES = {(2, 2): 68.0, (1, 2): 52.0, (2, 1): 52.0, (1, 1): 52.0}  # two chains of additions and fewer wait for each other
_CALL_CYCLES = 60.0
_SUMS_CYCLES = 200.0  # of four tiles, from and to the second-level cache
_INTERLEAVE_CYCLES, _TRANSPOSE_CYCLES, _COPY_CYCLES, _SPLIT_CYCLES = 22.0, 60.0, 24.0, 110.0
"""Of 16 channels by 32 pixels: pairs of x, rows to columns, copies of rows, and one number into its parts (a part)."""
_POINTER_CYCLES = 1.5
_MEMORY_BYTES = 12.0
_WEIGHT_CYCLES = {False: 0.2, True: 0.7}  # by whether taps are neighbours in the weight's memory
_LEVELS = ("parity", "columns", "taps")
_THREADS = (2, 4, 8)
"""Threads that blocks and shares are chosen for: bits depend on them, so they depend on no number of threads in force."""


@dataclass(frozen=True)
class AmxWeightConfig:
    """``level``: what a plane of x is for: ``parity``: the odd or even columns' taps; ``columns``: one column of taps; ``taps``: one tap, and then the pixels
    of all images and rows follow each other without gaps.  ``tile`` is (images, rows, columns) of outputs; blocks are channels of a group."""

    level: str
    tile: tuple[int, int, int]
    block_c: int
    block_k: int
    shares: int = 1
    share_tiles: int = 1
    cycles: float = math.inf
    score: float = math.inf


class Gather:
    """The linear order of a tile's pixels, and the planes of x that taps read; ``right_tile``, ``left_tile``: bytes of 16 channels of both operands."""

    def __init__(self, problem: ConvProblem, level: str, tile: tuple[int, int, int]) -> None:
        rows, columns = axes(problem, tile[1:])
        if level == "taps":
            rows = _own_slabs(rows)
        self.rows, self.columns = rows, _by_parity(columns) if level == "parity" else _own_slabs(columns)
        self.folded = level == "taps"
        extent = max(slab.extent for slab in self.columns.slabs)
        self.pitch = tile[2] if self.folded else (tile[2] + extent + 1) // 2 * 2
        self.extent = max(slab.extent for slab in self.rows.slabs) * self.pitch + extent
        pixels = tile[1] * self.pitch
        self.runs, pixels = (1, pixels * tile[0]) if self.folded else (tile[0], pixels)
        self.chunks = -(-pixels // UNIT)
        self.entries = (self.chunks * UNIT + self.extent + 1) // 2 * 2
        self.planes = len(self.rows.slabs) * len(self.columns.slabs)
        self.plane_bytes = self.runs * self.entries * 32
        self.right_tile = odd_lines(self.planes * self.plane_bytes)
        self.left_tile = odd_lines(self.runs * self.chunks * TILE_BYTES)

    def taps(self) -> tuple[npt.NDArray[np.int64], int]:
        """Where each tap reads x and where its sums are, in bytes, and how many of them, first of all, are pairs of one plane."""
        places: dict[int, list[tuple[int, int]]] = {}
        taps = [(a, b) for a in self.rows.phases[0].taps for b in self.columns.phases[0].taps]
        for i, (a, b) in enumerate(taps):
            plane = a.slab * len(self.columns.slabs) + b.slab
            read = plane * self.plane_bytes + (a.shift * self.pitch + b.shift) // 2 * 64
            places.setdefault(plane, []).append((read, i * TILE_BYTES))
        pairs = [tap for group in places.values() for tap in sorted(group)[: len(group) // 2 * 2]]
        single = [tap for group in places.values() for tap in sorted(group)[len(group) // 2 * 2 :]]
        return np.array([*pairs, *single], np.int64), len(pairs)


def _replaced(axis: Axis, places: list[tuple[int, int, int]]) -> Axis:
    """The axis with slabs of its own: for each tap its slab's first source index, and the tap's and the longest shift there."""
    slabs: dict[int, int] = {}
    for offset, shift, _ in places:
        slabs[offset] = max(slabs.get(offset, 0), shift)
    order = list(slabs)
    taps = tuple(Tap(i, order.index(offset), shift) for i, (offset, shift, _) in enumerate(places))
    return replace(axis, slabs=tuple(Slab(offset, extent) for offset, extent in slabs.items()), phases=(Phase(0, axis.count, taps),))


def _own_slabs(axis: Axis) -> Axis:
    return _replaced(axis, [(axis.slabs[tap.slab].offset + tap.shift * axis.step, 0, 0) for tap in axis.phases[0].taps])


def _by_parity(axis: Axis) -> Axis:
    """Every tap an even number of entries behind the start of its slab: pairs of pixels stay together."""
    return _replaced(axis, [(axis.slabs[tap.slab].offset + tap.shift % 2 * axis.step, tap.shift // 2 * 2, 0) for tap in axis.phases[0].taps])


@lru_cache(maxsize=1024)
def choose_config(problem: ConvProblem, target: Target) -> AmxWeightConfig | None:
    """The configuration predicted to be fastest over several numbers of threads; None where a row of pixels takes too much scratch."""
    return min(candidates(problem, target), key=lambda config: config.score, default=None)


def candidates(problem: ConvProblem, target: Target) -> Iterator[AmxWeightConfig]:
    """Configurations worth a prediction, with their shares and costs."""
    taps = problem.r * problem.s
    pairs = set()
    for most_c in (32, 64, 128, 256, 512):
        most_k = max(UNIT, _SUM_BYTES // (taps * 4 * min(most_c, align(problem.cg, 16))) // UNIT * UNIT)
        for limit in (most_k, most_k // 2, most_k // 4):
            if limit >= UNIT:
                pairs.add((_block(problem.cg, most_c), _block(problem.kg, limit)))
    sides = [_Blocks(problem, *pair) for pair in sorted(pairs)]
    for level in _LEVELS if taps > 1 else ("taps",):
        for tile in _tiles(problem):
            model = _Model(problem, target, Gather(problem, level, tile), AmxWeightConfig(level, tile, 0, 0))
            yield from (config for blocks in sides if (config := model.predicted(blocks)) is not None)


def _block(total: int, most: int) -> int:
    """Channels of the fewest even blocks of at most ``most``, whole units."""
    return min(total, align(-(-total // -(-total // most)), UNIT))


def _tiles(problem: ConvProblem) -> list[tuple[int, int, int]]:
    found = set()
    for pixels in (384, 768, 1536, 3072):
        columns = next((q for q in tile_candidates(problem.q) if q <= pixels), 1)
        rows = next((p for p in tile_candidates(problem.p) if p * columns <= pixels), 1) if columns == problem.q else 1
        images = max(1, min(problem.n, pixels // (rows * columns))) if (rows, columns) == (problem.p, problem.q) else 1
        found.add((-(-problem.n // -(-problem.n // images)), rows, columns))
    return sorted(found)


def _step_cycles(channels: int, other: int) -> float:
    """Cycles of one step of the reduction for every pair of tiles of two sides."""
    pairs, single = divmod(-(-channels // ROWS), 2)
    other_pairs, other_single = divmod(-(-other // ROWS), 2)
    counts = {(2, 2): pairs * other_pairs, (2, 1): pairs * other_single, (1, 2): single * other_pairs, (1, 1): single * other_single}
    return sum(count * _STEP_CYCLES[shape] for shape, count in counts.items())


def _pieces(total: int, size: int) -> list[tuple[int, int]]:
    """How many pieces of which size."""
    whole, last = divmod(total, size)
    return [(whole, size), (1, last)] if last else [(whole, size)]


class _Blocks:
    """Blocks of channels of one group, and what a step of the reduction costs for all of them together."""

    def __init__(self, problem: ConvProblem, block_c: int, block_k: int) -> None:
        self.block_c, self.block_k = block_c, block_k
        self.of_c, self.of_k = -(-problem.cg // block_c), -(-problem.kg // block_k)
        self.c_tiles, self.k_tiles = -(-block_c // ROWS), -(-block_k // ROWS)
        self.sum_bytes = problem.r * problem.s * self.c_tiles * self.k_tiles * TILE_BYTES
        sides = [(m * n, c, k) for m, c in _pieces(problem.cg, block_c) for n, k in _pieces(problem.kg, block_k)]
        self.step = sum(count * _step_cycles(c, k) for count, c, k in sides)
        self.calls = -(-block_c // UNIT) * -(-block_k // UNIT) * self.of_c * self.of_k * problem.r * problem.s


class _Model:
    """What tiles of pixels cost, whatever the blocks of channels."""

    def __init__(self, problem: ConvProblem, target: Target, gather: Gather, config: AmxWeightConfig) -> None:
        self.problem, self.gather, self.config = problem, gather, config
        self.near_bytes = target.l2 * 3 // 4
        self.parts = parts = PARTS[problem.dtype]
        images, rows, columns = config.tile
        self.tiles = -(-problem.n // images) * -(-problem.p // rows) * -(-problem.q // columns)
        self.chunks = self.tiles * gather.runs * gather.chunks
        self.products = problem.r * problem.s * self.chunks * sum(len(chosen) for chosen in PRODUCTS[parts])
        c_tiles, k_tiles, nchw = -(-problem.cg // ROWS), -(-problem.kg // ROWS), problem.format == "nchw"
        x_tiles, split = self.tiles * gather.runs * gather.entries / UNIT, _SPLIT_CYCLES * parts if parts > 1 else 0.0
        self.x_tile, self.x_pointers = x_tiles * gather.planes * c_tiles * parts * _INTERLEAVE_CYCLES, x_tiles * gather.planes * UNIT * _POINTER_CYCLES
        self.row_pixels = 0
        if nchw or parts > 1:
            span = (rows - 1) * problem.stride[0] + (problem.r - 1) * problem.dilation[0] + 1
            self.row_pixels = images * problem.w * (problem.h if problem.padding_mode == "circular" else min(problem.h, span))
            source = self.tiles * images * (rows * problem.stride[0] + gather.extent / gather.pitch) * problem.w / UNIT
            self.x_tile += source * c_tiles * ((_TRANSPOSE_CYCLES if nchw else 0.0) + split * (2 if nchw else 1))
        self.gy_tile = self.chunks * k_tiles * ((_COPY_CYCLES if nchw else _TRANSPOSE_CYCLES) * parts + split)
        self.gy_pointers = 0.0 if nchw else self.chunks * UNIT * _POINTER_CYCLES
        self.x_bytes = problem.n * problem.c * problem.h * problem.w * DTYPES[problem.dtype]
        self.gy_bytes = problem.n * problem.k * problem.p * problem.q * DTYPES[problem.dtype]
        self.weights = problem.k * problem.cg * problem.r * problem.s
        self.weight_cycles = _WEIGHT_CYCLES[problem.r * problem.s > 1 and problem.weight_format == "nchw"]

    def predicted(self, blocks: _Blocks) -> AmxWeightConfig | None:
        """The configuration with its shares and its cost; None where its operands are too large."""
        gather, problem, parts = self.gather, self.problem, self.parts
        operands = parts * (blocks.c_tiles * gather.right_tile + blocks.k_tiles * gather.left_tile)
        if operands + parts * self.row_pixels * (align(blocks.block_c, UNIT) * 2 + 64) + blocks.sum_bytes > _SCRATCH_BYTES:
            return None
        near = operands + blocks.sum_bytes < self.near_bytes
        call = _CALL_CYCLES + _SUMS_CYCLES * (1.0 if near else 2.5) * (1.0 if parts == 1 else 1.5)
        multiply = self.products * blocks.step * (1.0 if near else 1.4) + self.tiles * blocks.calls * call
        pack = blocks.of_k * (self.x_tile + blocks.of_c * self.x_pointers) + blocks.of_c * (self.gy_tile + blocks.of_k * self.gy_pointers)
        work = problem.g * (multiply + pack) + (blocks.of_k * self.x_bytes + blocks.of_c * self.gy_bytes) / _MEMORY_BYTES
        count = problem.g * blocks.of_c * blocks.of_k
        most = max(1, min(self.tiles, _PARTIAL_BYTES // (self.weights * 4), int(work / count / _SHARE_CYCLES)))
        shares = min(most, -(-_TASKS // count)) if count < _TASKS else 1
        share_tiles = -(-self.tiles // shares)
        shares = -(-self.tiles // share_tiles)
        finish = self.weights * (self.weight_cycles + (shares * 8 / _MEMORY_BYTES if shares > 1 else 0))
        tasks = count * shares
        score = sum((work / tasks * t * -(-tasks // t) if tasks < 16 * t else work) + finish for t in _THREADS)
        return AmxWeightConfig(self.config.level, self.config.tile, blocks.block_c, blocks.block_k, shares, share_tiles, work + finish, score)
