"""The weight's gradient (and the bias's) on matrix tiles, for bfloat16, and for float16 and float32 as sums of bfloat16 parts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..codegen.load import load
from ..dispatch import Unsupported
from ..problem import DTYPES, ConvProblem
from . import target as targets
from .amx_weight_kernel import ARGUMENTS, PLANE_FIELDS, AmxWeightKernel
from .amx_weight_pack import UNIT
from .checked import FLAG_BYTES, CheckedPlan
from .direct_weight import DIRECT_WEIGHT
from .geometry import Axis, Phase, Slab, Tap, axes, padded_index
from .matrix_tiles import MAX_PAIRS, ROWS, TILE_BYTES, palette
from .parts import PARTS, PRODUCTS
from .target import Target
from .tile import PAGE, align, meets_itself, odd_lines, pitches, weight_strides
from .tiling import tile_candidates, useful_threads

__all__ = ["AMX_WEIGHT", "AmxWeight", "AmxWeightConfig", "build_plan", "choose_config", "predicted"]

_SLACK = 4096
_SCRATCH_BYTES = 32 << 20  # a thread: more is refused
_SUM_BYTES = 704 << 10  # of a block: they stay in the second-level cache
_PARTIAL_BYTES = 16 << 20
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
    """The linear order of a tile's pixels, and the planes of x that taps read."""

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

    def tap_offsets(self, plane_bytes: int) -> npt.NDArray[np.int64]:
        offsets = [
            (a.slab * len(self.columns.slabs) + b.slab) * plane_bytes + (a.shift * self.pitch + b.shift) // 2 * 64
            for a in self.rows.phases[0].taps
            for b in self.columns.phases[0].taps
        ]
        return np.array(offsets, np.int64)


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


def choose_config(problem: ConvProblem, target: Target) -> AmxWeightConfig | None:
    """The configuration predicted to be fastest, from sizes and caches alone (not from the number of threads)."""
    found = [predicted(problem, target, config) for config in _candidates(problem)]
    return min((config for config in found if config is not None), key=lambda config: config.score, default=None)


def _blocks(total: int, most: int) -> int:
    """Channels of the fewest even blocks of at most ``most``, whole units."""
    return min(total, align(-(-total // -(-total // most)), UNIT))


def _candidates(problem: ConvProblem) -> Iterator[AmxWeightConfig]:
    taps = problem.r * problem.s
    sides = set()
    for most_c in (32, 64, 128, 256, 512):
        most_k = max(UNIT, _SUM_BYTES // (taps * 4 * min(most_c, align(problem.cg, 16))) // UNIT * UNIT)
        for limit in (most_k, most_k // 2, most_k // 4):
            if limit >= UNIT:
                sides.add((_blocks(problem.cg, most_c), _blocks(problem.kg, limit)))
    for level in _LEVELS:
        if taps == 1 and level != "taps":
            continue
        for tile in _tiles(problem):
            for block_c, block_k in sides:
                yield AmxWeightConfig(level, tile, block_c, block_k)


def _tiles(problem: ConvProblem) -> Iterator[tuple[int, int, int]]:
    found = set()
    for pixels in (384, 768, 1536, 3072):
        columns = next((q for q in tile_candidates(problem.q) if q <= pixels), 1)
        rows = next((p for p in tile_candidates(problem.p) if p * columns <= pixels), 1) if columns == problem.q else 1
        images = max(1, min(problem.n, pixels // (rows * columns))) if (rows, columns) == (problem.p, problem.q) else 1
        found.add((-(-problem.n // -(-problem.n // images)), rows, columns))
    yield from sorted(found)


def _side_cycles(channels: int, other: int) -> float:
    """Cycles of one step of the reduction for every pair of tiles of two sides."""
    pairs, single = divmod(-(-channels // ROWS), 2)
    other_pairs, other_single = divmod(-(-other // ROWS), 2)
    counts = {(2, 2): pairs * other_pairs, (2, 1): pairs * other_single, (1, 2): single * other_pairs, (1, 1): single * other_single}
    return sum(count * _STEP_CYCLES[shape] for shape, count in counts.items())


def predicted(problem: ConvProblem, target: Target, config: AmxWeightConfig) -> AmxWeightConfig | None:
    """The configuration with its shares and its cost; None where its scratch is too large."""
    parts, taps = PARTS[problem.dtype], problem.r * problem.s
    products = sum(len(p) for p in PRODUCTS[parts])
    gather = Gather(problem, config.level, config.tile)
    layout = _Layout(problem, config, gather)
    if layout.scratch_size > _SCRATCH_BYTES:
        return None
    images, rows, columns = config.tile
    tiles = -(-problem.n // images) * -(-problem.p // rows) * -(-problem.q // columns)
    c_blocks, k_blocks = -(-problem.cg // config.block_c), -(-problem.kg // config.block_k)
    blocks = problem.g * c_blocks * k_blocks
    c_tiles, k_tiles = -(-problem.cg // ROWS), -(-problem.kg // ROWS)
    near = layout.right_bytes + layout.left_bytes + taps * config.block_c * config.block_k * 4 < target.l2 * 3 // 4
    chunks = tiles * gather.runs * gather.chunks
    step = sum(_side_cycles(c, k) for c in _pieces(problem.cg, config.block_c) for k in _pieces(problem.kg, config.block_k))
    calls = -(-config.block_c // UNIT) * -(-config.block_k // UNIT) * c_blocks * k_blocks * taps * tiles
    multiply = taps * chunks * products * step * (1.0 if near else 1.4) + calls * (
        _CALL_CYCLES + _SUMS_CYCLES * (1.0 if near else 2.5) * (1 if parts == 1 else 1.5)
    )
    x_tiles = tiles * gather.runs * gather.entries / UNIT
    nchw = problem.format == "nchw"
    pack = k_blocks * (x_tiles * gather.planes * (c_tiles * parts * _INTERLEAVE_CYCLES + c_blocks * UNIT * _POINTER_CYCLES))
    source = tiles * images * (rows * problem.stride[0] + gather.extent / gather.pitch) * problem.w / UNIT
    if nchw or parts > 1:
        pack += k_blocks * source * c_tiles * ((_TRANSPOSE_CYCLES if nchw else 0) + (_SPLIT_CYCLES * parts * (2 if nchw else 1) if parts > 1 else 0))
    split = _SPLIT_CYCLES * parts if parts > 1 else 0
    pack += c_blocks * chunks * k_tiles * ((_COPY_CYCLES if nchw else _TRANSPOSE_CYCLES) * parts + split)
    if not nchw:
        pack += c_blocks * k_blocks * chunks * UNIT * _POINTER_CYCLES
    weights = problem.k * problem.cg * taps
    work = problem.g * (multiply + pack)
    memory = (k_blocks * problem.n * problem.c * problem.h * problem.w + c_blocks * problem.n * problem.k * problem.p * problem.q) * DTYPES[problem.dtype]
    work += memory / _MEMORY_BYTES
    most = max(1, min(tiles, _PARTIAL_BYTES // (weights * 4), int(work / blocks / _SHARE_CYCLES)))
    shares = min(most, -(-_TASKS // blocks)) if blocks < _TASKS else 1
    share_tiles = -(-tiles // shares)
    shares = -(-tiles // share_tiles)
    finish = weights * (_WEIGHT_CYCLES[taps > 1 and problem.weight_format == "nchw"] + (shares * 8 / _MEMORY_BYTES if shares > 1 else 0))
    tasks = blocks * shares
    score = sum((work / tasks * t * -(-tasks // t) if tasks < 16 * t else work) + finish for t in (2, 4, 8))
    return replace(config, shares=shares, share_tiles=share_tiles, cycles=work + finish, score=score)


def _pieces(total: int, size: int) -> Iterator[int]:
    for first in range(0, total, size):
        yield min(size, total - first)


class _Layout:
    """Places and pitches, in bytes, of the workspace's pieces and those of a thread's scratch."""

    def __init__(self, problem: ConvProblem, config: AmxWeightConfig, gather: Gather) -> None:
        parts, taps = PARTS[problem.dtype], problem.r * problem.s
        images, rows, columns = config.tile
        self.c_tiles, self.k_tiles = -(-config.block_c // ROWS), -(-config.block_k // ROWS)
        self.plane_bytes = gather.runs * gather.entries * 32
        self.right_tile = odd_lines(gather.planes * self.plane_bytes)
        self.right_part = self.c_tiles * self.right_tile
        self.right_bytes = parts * self.right_part
        self.left_tile = odd_lines(gather.runs * gather.chunks * TILE_BYTES)
        self.left_part = self.k_tiles * self.left_tile
        self.left_bytes = parts * self.left_part
        self.sums_c = taps * TILE_BYTES
        self.sums_k = self.c_tiles * self.sums_c
        self.sums_block = self.k_tiles * self.sums_k
        self.x_part, self.gy_part = (align(block, UNIT) * 2 for block in (config.block_c, config.block_k))
        self.x_pixel, self.gy_pixel = (part * parts + (64 if meets_itself(part * parts) else 0) for part in (self.x_part, self.gy_part))
        self.spans = _row_spans(problem, gather.rows, rows)
        kernel_rows = problem.format == "nchw" or parts > 1, problem.format == "nhwc" and parts > 1
        self.pixel_image = int(self.spans[:, 1].max(initial=0)) * problem.w * self.x_pixel if kernel_rows[0] else pitches(problem, True)[0]
        room = {
            "right": self.right_bytes,
            "left": self.left_bytes,
            "pointers": (gather.runs * max(gather.entries, gather.chunks * UNIT) + 64) * 8,
            "rows": images * self.pixel_image + 8 * self.x_pixel if kernel_rows[0] else 0,
            "gy_rows": images * rows * columns * self.gy_pixel if kernel_rows[1] else 0,
            "own_sums": self.sums_block if config.shares == 1 else 0,
            "spill": TILE_BYTES,
        }
        self.places, at = dict[str, int](), 0
        for name, size in room.items():
            self.places[name + "_at"] = at
            at = align(at + size + 64) + 7 * 64
        self.scratch_size = align(at + _SLACK, PAGE) + 9 * 64


def _row_spans(problem: ConvProblem, axis: Axis, rows: int) -> npt.NDArray[np.int64]:
    """First source row, and number of them, that each tile of rows may read."""
    spans = []
    for p0 in range(0, problem.p, rows):
        here = min(rows, problem.p - p0)
        starts = [axis.table_start(i) + p0 for i in range(len(axis.slabs))]
        read = np.concatenate([axis.table[start : start + here + slab.extent] for start, slab in zip(starts, axis.slabs)])
        read = read[read >= 0]
        spans.append((int(read.min()), int(read.max() - read.min()) + 1) if len(read) else (0, 0))
    return np.array(spans, np.int64).reshape(-1, 2)


def _column_tables(problem: ConvProblem, gather: Gather, tile_q: int, pitch: int) -> tuple[npt.NDArray[np.int64], int]:
    """Byte offsets of the columns of every slab (-1: zero), as far as rows of ``gather.pitch`` pixels reach, and the length of a slab's."""
    axis = gather.columns
    length = (-(-problem.q // tile_q) - 1) * tile_q + align(gather.pitch, 8) + 8
    table = np.full((len(axis.slabs), length), -1, np.int64)
    for row, slab in zip(table, axis.slabs):
        index = padded_index(np.arange(min(length, axis.covered + slab.extent), dtype=np.int64) * axis.step + slab.offset, axis.size, axis.padding_mode)
        row[: len(index)] = np.where(index >= 0, index * pitch, -1)
    return table, length


def build_plan(problem: ConvProblem, target: Target, threads: int, config: AmxWeightConfig, name: str = "amx") -> CheckedPlan:
    """Tables, kernel and argument block for a configuration."""
    gather = Gather(problem, config.level, config.tile)
    layout = _Layout(problem, config, gather)
    threads = useful_threads(threads, config.cycles if math.isfinite(config.cycles) else 1e9, target)
    planar = problem.weight_format == "nchw" and problem.r * problem.s > 1
    kernel = AmxWeightKernel(target, problem.dtype, problem.format, planar, config.shares == 1)
    values, tables = _values(problem, config, gather, layout, kernel)
    blocks = problem.g * values["c_blocks"] * values["k_blocks"]
    bias_group = -(-problem.kg // ROWS) * TILE_BYTES
    partial = 0 if kernel.single else align(config.shares * blocks * layout.sums_block + 64)
    bias = align(config.shares * problem.g * bias_group + 64)
    values |= {
        "sums_at": 0, "sums_share": blocks * layout.sums_block, "bias_at": partial, "bias_share": problem.g * bias_group, "bias_group": bias_group,
        "flag_at": partial + bias, "scratch_at": align(partial + bias + FLAG_BYTES, PAGE), "scratch_size": layout.scratch_size, **layout.places,
    }  # fmt: skip
    facts = {
        "tile": "x".join(map(str, config.tile)), "planes": config.level, "block": f"{config.block_k}x{config.block_c}", "parts": config.shares,
        "tasks": values["tasks"], "predicted_cycles": config.cycles / threads,
    }  # fmt: skip

    workspace_bytes = values["scratch_at"] + threads * layout.scratch_size
    code = load(kernel.name, target, kernel.emit)
    return CheckedPlan(
        problem, name, code, ARGUMENTS.pack(threads, values), tables, workspace_bytes, facts, values["flag_at"], lambda: DIRECT_WEIGHT.plan(problem, threads)
    )


def _values(
    problem: ConvProblem, config: AmxWeightConfig, gather: Gather, layout: _Layout, kernel: AmxWeightKernel
) -> tuple[dict[str, int], list[npt.NDArray[np.generic]]]:
    """The argument block's values by name, but for places in the workspace, and the tables they point to."""
    images, tile_p, tile_q = config.tile
    x, gy = pitches(problem, True), pitches(problem, False)
    x_rows, gy_rows = kernel.rows_first
    p_tiles, q_tiles = -(-problem.p // tile_p), -(-problem.q // tile_q)
    tiles = -(-problem.n // images) * p_tiles * q_tiles
    c_blocks, k_blocks = -(-problem.cg // config.block_c), -(-problem.kg // config.block_k)
    blocks = problem.g * c_blocks * k_blocks
    row_pitch, column_pitch = (problem.w * layout.x_pixel, layout.x_pixel) if x_rows else (x[2], x[3])
    row_table = np.where(gather.rows.table >= 0, gather.rows.table * row_pitch, -1)
    column_table, column_length = _column_tables(problem, gather, tile_q, column_pitch)
    planes = np.array(
        [
            (gather.rows.table_start(a), slab.extent, b * column_length, (a * len(gather.columns.slabs) + b) * layout.plane_bytes)
            for a, slab in enumerate(gather.rows.slabs)
            for b in range(len(gather.columns.slabs))
        ],
        np.int64,
    ).reshape(-1, len(PLANE_FIELDS))
    gy_row, gy_column = (tile_q * layout.gy_pixel, layout.gy_pixel) if gy_rows else (gy[2], gy[3])
    gradient_rows = np.arange(tile_p, dtype=np.int64) * gy_row
    width = align(gather.pitch, 8) + 8
    gradient_columns = np.full((q_tiles, width), -1, np.int64)
    for i, line in enumerate(gradient_columns):
        here = min(tile_q, problem.q - i * tile_q)
        line[:here] = np.arange(here) * gy_column
    taps = gather.tap_offsets(layout.plane_bytes)
    zeros = np.zeros(max(layout.x_pixel, layout.gy_pixel) + 64, np.uint8)
    ones = np.full(TILE_BYTES // 2, 0x3F80, np.uint16)
    shapes = palette(MAX_PAIRS)
    weight = weight_strides(problem)
    values = {
        "tasks": blocks * config.shares, "finish_tasks": blocks * layout.k_tiles, "shares": config.shares, "share_tiles": config.share_tiles, "tiles": tiles,
        "c_blocks": c_blocks, "k_blocks": k_blocks, "block_c": config.block_c, "block_k": config.block_k, "in_channels": problem.cg,
        "out_channels": problem.kg, "p_tiles": p_tiles, "q_tiles": q_tiles, "tile_p": tile_p, "tile_q": tile_q, "tile_images": images, "images": problem.n,
        "p": problem.p, "q": problem.q, "width": problem.w, "folded": int(gather.folded), "pitch": gather.pitch, "extent": gather.extent,
        "x_image": x[0], "x_channel": x[1], "x_row": x[2], "x_column": x[3], "gy_image": gy[0], "gy_channel": gy[1], "gy_row": gy[2], "gy_column": gy[3],
        "pixel_image": layout.pixel_image, "x_pixel": layout.x_pixel, "x_part": layout.x_part, "gy_pixel": layout.gy_pixel, "gy_part": layout.gy_part,
        "row_spans": layout.spans.ctypes.data, "row_table": row_table.ctypes.data, "column_table": column_table.ctypes.data, "planes": len(planes),
        "plane_table": planes.ctypes.data, "gy_rows": gradient_rows.ctypes.data, "gy_columns": gradient_columns.ctypes.data,
        "gy_columns_pitch": width * 8, "taps": len(taps), "tap_offsets": taps.ctypes.data, "right_tile": layout.right_tile,
        "right_part": layout.right_part, "left_tile": layout.left_tile, "left_part": layout.left_part, "sums_block": layout.sums_block,
        "sums_k": layout.sums_k, "sums_c": layout.sums_c, "has_bias": int(problem.epilogue.bias), "ones": ones.ctypes.data, "zeros": zeros.ctypes.data,
        "palette": shapes.ctypes.data, "weight_k": weight[0], "weight_c": weight[1], "weight_tap": weight[3],
    }  # fmt: skip
    return values, [layout.spans, row_table, column_table, planes, gradient_rows, gradient_columns, taps, zeros, ones, shapes]


class AmxWeight:
    """The implementation named ``amx`` for the direction grad_weight."""

    name = "amx"

    def plan(self, problem: ConvProblem, threads: int) -> CheckedPlan:
        """A plan for grad_weight; raises :class:`Unsupported` where there are no matrix tiles or another algorithm is predicted faster."""
        target = targets.target()
        if problem.direction != "grad_weight":
            raise Unsupported("only grad_weight")
        if not target.matrix_tiles:
            raise Unsupported(f"{target.isa} has no matrix tiles")
        if problem.dtype not in PARTS:
            raise Unsupported("not for float64: matrix tiles multiply bfloat16")
        if problem.empty:
            raise Unsupported("an operand is empty")
        config = choose_config(problem, target)
        if config is None:
            raise Unsupported("a row of pixels takes more scratch than a thread may have")
        return build_plan(problem, target, threads, config, self.name)


AMX_WEIGHT = AmxWeight()
