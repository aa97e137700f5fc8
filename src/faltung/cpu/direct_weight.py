"""The weight's gradient (and the bias's) for any kernel, stride, dilation, groups, padding mode and type."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..codegen.load import load
from ..codegen.numeric import Numeric
from ..dispatch import Unsupported
from ..problem import DTYPES, ConvProblem
from . import target as targets
from .bfloat import pair_efficiency, pair_tiles
from .direct_weight_kernel import ARGUMENTS, DirectWeightKernel
from .geometry import Axis, axes
from .pack import ANY_STEP
from .plan import CpuPlan
from .target import Target
from .tile import Tile, align, meets_itself, pitches
from .tiling import Block, choose_block, split_count, tile_candidates, useful_threads

__all__ = ["DIRECT_WEIGHT", "DirectWeight", "WeightConfig", "choose_config", "predicted_cycles"]

_SLACK = 4096
_CHUNK_PIXELS = 196  # 14x14, 4 images of 7x7, 7 rows of 28
# Enough tasks to share out, whatever the number of threads: the parts must not depend on it.  Where there are blocks of weights enough, the pixels are
# one part, and the sums never leave the second-level cache (512x7x7 to 2048: 3.9 ms with two parts, 2.5 without).
_TASKS = 24
_ENOUGH_BLOCKS = 8
_PARTIAL_BYTES = 16 << 20
_PART_PIXELS = {"nchw": 1024, "nhwc": 96}  # at least: a part's sums go through memory; but in nhwc packing twice costs as much
_LEAST_SIDE = 128  # channels of a block that is not halved
_LEAST_SIDE_OF_ONE = 32  # the same where it is the only task: one thread would do everything (1x1, 120x28x28 to 40: 171 us in one task, 102 in two)
_FEW_PIXELS = 1024  # up to so many, what is done once for each weight counts:
_FEW_BYTES = 512 << 10  # of partial sums: more are slower than smaller blocks (1x1 nhwc, 768x20x20 to 512: 3.5 ms in three parts, 2.3 in one)
_MANY_WEIGHTS = 1 << 20  # from so many on, writing them to nhwc does:
_RUN_BYTES = 512  # what a block then writes side by side, at most, for a tap of an output channel; 136 bytes at a time 512 channels took 1.25 times as long
_LEAST_WIDTH = 64  # output channels of a block that is not made narrower for it
_ROW_CYCLES = 1 / 8  # blocks of 6x4 beat 14x2 by up to 6 %, and are never slower
_BLOCK_BYTES = 320 << 10  # of partial sums that a task works on: they stay in the second-level cache
_PANEL_BYTES = 192 << 10
_IN_PLACE_BYTES = 512  # of a pixel: the pieces of wider ones that a block reads are too far apart to be foreseen

_LINES_OF_PAGES = 192  # pixels of a tile: 64x64x64 to 64 takes 0.76 of the time that tiles ending in the midst of lines take, 64 to 2 channels 1.1


@dataclass(frozen=True)
class WeightConfig:
    """Blocks of a grad_weight: ``tile`` is (images, rows, columns) of pixels; ``columns``: column taps that are rows of a block together."""

    tile: tuple[int, int, int]
    block: Block
    block_channels: int
    block_panels: int
    parts: int
    part_tiles: int
    columns: int = 1


def _block_sides(problem: ConvProblem, lanes: int, size: int, most_parts: int) -> tuple[int, int]:
    """Input channels and vectors of output channels of a block."""
    vectors, taps = -(-problem.kg // lanes), problem.r * problem.s
    # Each block of output channels packs x anew, which takes long where columns are picked out of rows: there blocks are twice as wide.
    picked = problem.format == "nchw" and problem.stride[1] > 1 and taps <= 4

    def fitting(width: int) -> int:
        return max(1, min(problem.cg, _BLOCK_BYTES // (taps * width * lanes * size)))

    width = max(1, min(vectors, (512 if picked else 256) // lanes))
    channels = fitting(width)
    few = problem.n * problem.p * problem.q <= _FEW_PIXELS
    if few and problem.weight_format == "nhwc" and taps > 1 and math.prod(problem.weight_shape) >= _MANY_WEIGHTS:
        while channels < problem.cg and channels * size < _RUN_BYTES and width * lanes > _LEAST_WIDTH:
            width = -(-width // 2)
            channels = fitting(width)
    parts = 1 if few and taps * problem.cg * vectors * lanes * size * problem.g >= _FEW_BYTES else most_parts
    # Where the pixels are too few to share out, blocks are halved: what is packed twice costs less than partial sums in memory.
    for enough, parts_of_pixels, least in ((_ENOUGH_BLOCKS, parts, _LEAST_SIDE), (2, most_parts, _LEAST_SIDE_OF_ONE)):
        while problem.g * -(-problem.cg // channels) * -(-vectors // width) * parts_of_pixels < enough:
            if max(channels, 0 if picked else width * lanes) <= least:
                break
            if width * lanes > channels and not picked:
                width = -(-width // 2)
            else:
                channels = -(-channels // 2)
    return channels, width


@lru_cache(maxsize=1024)
def choose_config(problem: ConvProblem, target: Target) -> WeightConfig:
    """Blocks from sizes and caches alone (not from the number of threads)."""
    numeric = Numeric(problem.dtype, target)
    lanes, size = numeric.lanes, numeric.compute_bytes
    vectors, pixels = -(-problem.kg // lanes), problem.n * problem.p * problem.q
    part_bytes = problem.g * problem.r * problem.s * problem.cg * vectors * lanes * size
    most_parts = max(1, min(pixels // _PART_PIXELS[problem.format], _PARTIAL_BYTES // part_bytes))
    channels, width = _block_sides(problem, lanes, size, most_parts)
    c_blocks = -(-problem.cg // channels)
    channels = -(-problem.cg // c_blocks)
    last = problem.cg - (c_blocks - 1) * channels
    while last <= 0:
        c_blocks -= 1
        last = problem.cg - (c_blocks - 1) * channels
    block = choose_block(target, tuple(sorted({channels, last})), vectors, _CHUNK_PIXELS, round_vectors=False, row_cycles=_ROW_CYCLES, piece=_CHUNK_PIXELS)
    columns = 1
    if c_blocks == 1 and _joins(problem, numeric):
        # A pass over all column taps at once; with few input channels it has more accumulators, whose additions do not wait for each other.
        joined = choose_block(target, (problem.s * channels,), vectors, _CHUNK_PIXELS, round_vectors=False, row_cycles=_ROW_CYCLES, piece=_CHUNK_PIXELS)
        whole = problem.format == "nhwc" or joined.rows == problem.s * channels
        if whole and joined.cycles < 0.9 * problem.s * block.cycles:
            block, columns = joined, problem.s
    panels = -(-vectors // block.vectors)
    block_panels = min(panels, -(-width // block.vectors))
    tile = _choose_tile(problem, target, channels, block_panels * block.vectors * lanes, size)
    tiles = _tile_count(problem, numeric, tile)
    blocks = problem.g * c_blocks * -(-panels // block_panels)
    parts = 1 if blocks >= _ENOUGH_BLOCKS else max(1, min(tiles, -(-_TASKS // blocks), most_parts))
    part_tiles = -(-tiles // parts)
    return WeightConfig(tile, block, channels, block_panels, -(-tiles // part_tiles), part_tiles, columns)


def predicted_cycles(problem: ConvProblem, target: Target, config: WeightConfig) -> float:
    """Cycles of the products on one core: a block's are those of a whole and of the last block of channels, where these differ."""
    pixels = Numeric(problem.dtype, target).elements(problem.n * problem.p * problem.q)
    last = problem.cg % config.block_channels
    passes = problem.cg / (config.block_channels + last)
    return config.block.cycles * passes * problem.r * (problem.s // config.columns) * problem.g * pixels


def _joins(problem: ConvProblem, numeric: Numeric) -> bool:
    """Whether a pixel's column taps are neighbours in a tile whose columns are all there."""
    return problem.s > 1 and problem.dilation[1] == 1 and problem.s >= problem.stride[1] and not numeric.pairs


def _tile_count(problem: ConvProblem, numeric: Numeric, tile: tuple[int, int, int]) -> int:
    if numeric.pairs:
        return len(pair_tiles(problem, tile, 0, (0, 0)))
    return -(-problem.n // tile[0]) * -(-problem.p // tile[1]) * -(-problem.q // tile[2])


def _even_tiles(tiles: int) -> int:
    """About as many tiles, that are shared out evenly: 17 tasks for two threads take as long as 18."""
    if tiles < _TASKS:
        return tiles + tiles % 2 if tiles > 2 else tiles
    return round(tiles / _TASKS) * _TASKS if tiles % _TASKS <= tiles // 10 else -(-tiles // _TASKS) * _TASKS


def _choose_tile(problem: ConvProblem, target: Target, channels: int, width: int, size: int) -> tuple[int, int, int]:
    """Images, rows and columns of a tile: at least a chunk of pixels (or pairs of pixels), within the cache."""
    pairs = Numeric(problem.dtype, target).pairs
    budget = target.l2 * 2 // 5
    pixels = max(_CHUNK_PIXELS, _PANEL_BYTES // (width * size))

    def fits(p: int, q: int) -> bool:
        rows, columns = axes(problem, (p, q))
        return rows.scratch_starts[-1] * columns.scratch_starts[-1] * channels * size <= budget

    def paired(candidates: list[int], shape: Callable[[int], tuple[int, int, int]]) -> int:
        """The largest candidate that leaves few pixels without a partner."""
        found = [(pair_efficiency(problem, shape(value)), value) for value in candidates]
        most = max(efficiency for efficiency, _ in found)
        return max(value for efficiency, value in found if efficiency >= 0.95 * most)

    columns = next((q for q in tile_candidates(problem.q) if q <= max(pixels, 1) and fits(1, q)), 1)
    plane = problem.h * problem.w * DTYPES[problem.dtype]
    if (
        problem.p == 1
        and problem.r * problem.s == 1
        and problem.format == "nchw"
        and min(problem.cg, problem.kg) >= 16
        and not pairs
        and meets_itself(plane)
        and fits(1, _LINES_OF_PAGES)
    ):
        # Lines of planes whole pages apart share a few sets: each is read once, whole, as a vector.
        return 1, 1, _LINES_OF_PAGES
    if problem.n * problem.p == 1 and not pairs:
        columns = -(-problem.q // _even_tiles(-(-problem.q // columns)))
    # Some tiles are wanted even from one image, so that there are parts to share out, but none of less than a chunk.
    fewest = max(1, min(problem.p, -(-8 // max(1, problem.n)), problem.p * problem.q // _CHUNK_PIXELS))
    high = [p for p in tile_candidates(problem.p) if p * columns <= pixels and fits(p, columns) and -(-problem.p // p) >= fewest] or [1]
    rows = paired(high, lambda p: (1, p, columns)) if pairs else high[0]
    images = 1
    if rows == problem.p and columns == problem.q:
        axis_rows, axis_columns = axes(problem, (rows, columns))
        image = axis_rows.scratch_starts[-1] * axis_columns.scratch_starts[-1] * channels * size
        images = max(1, min(problem.n, _CHUNK_PIXELS // max(1, rows * columns), budget // max(1, image)))
        if pairs:
            images = paired(list(range(1, images + 1)), lambda i: (i, rows, columns))
    return images, rows, columns


class DirectWeight:
    """The implementation named ``direct`` for the direction grad_weight."""

    name = "direct"

    def plan(self, problem: ConvProblem, threads: int) -> CpuPlan:
        """A plan for grad_weight; raises :class:`Unsupported` for another direction."""
        if problem.direction != "grad_weight":
            raise Unsupported("only grad_weight")
        target = targets.target()
        return build_plan(problem, target, threads, choose_config(problem, target))


DIRECT_WEIGHT = DirectWeight()


def _pixel_offsets(tile: Tile, config: WeightConfig, image_bytes: int, columns: int) -> np.ndarray:
    """Byte offsets of the tile's pixels in their order: images, rows, ``columns`` columns."""
    images, rows, _ = config.tile
    grid = (
        np.arange(images, dtype=np.int64)[:, None, None] * image_bytes
        + np.arange(rows, dtype=np.int64)[None, :, None] * tile.row
        + np.arange(columns, dtype=np.int64)[None, None, :] * tile.pixel
    )
    return np.ascontiguousarray(grid.reshape(-1))


def _weight_rows(problem: ConvProblem, channels: int, tap_pitch: int, row_pitch: int) -> np.ndarray:
    """For each weight of one output channel and a block of input channels, in memory order: its byte offset in ``[tap][c][k]``."""
    taps = np.arange(problem.r * problem.s, dtype=np.int64) * tap_pitch
    rows = np.arange(channels, dtype=np.int64) * row_pitch
    grid = rows[:, None] + taps[None, :] if problem.weight_format == "nchw" else taps[:, None] + rows[None, :]
    return np.ascontiguousarray(grid.reshape(-1))


def build_plan(problem: ConvProblem, target: Target, threads: int, config: WeightConfig, name: str = "direct") -> CpuPlan:
    """Tables, kernel and argument block for a configuration."""
    numeric = Numeric(problem.dtype, target)
    lanes, size = numeric.lanes, numeric.compute_bytes
    cycles = predicted_cycles(problem, target, config)
    threads = useful_threads(threads, cycles, target)
    rows, columns = axes(problem, config.tile[1:], dense=problem.format == "nhwc" or config.columns > 1)
    c_blocks = -(-problem.cg // config.block_channels)
    last = problem.cg - (c_blocks - 1) * config.block_channels
    vectors = -(-problem.kg // lanes)
    x_in_place = _in_place(problem, numeric)
    gy_in_place = x_in_place and problem.k == vectors * lanes == config.block.vectors * lanes
    kernel = DirectWeightKernel(
        target, problem.dtype, problem.format, min(columns.step, ANY_STEP), config.block.rows, config.block.vectors,
        any(split_count(c * config.columns, config.block.rows)[1] for c in (config.block_channels, last)), bool(split_count(vectors, config.block.vectors)[1]),
        config.parts == 1, x_in_place, gy_in_place, config.columns, problem.cg if config.columns > 1 and problem.format == "nchw" else 0,
    )  # fmt: skip
    tile = Tile(rows, columns, kernel.layout, problem.c if x_in_place else config.block_channels, size, pitches(problem, True), not x_in_place)
    image_bytes = align(tile.bytes + 64)
    values, tables = _values(problem, config, numeric, tile, rows, columns, image_bytes)
    panels_at = 0 if x_in_place else align(config.tile[0] * image_bytes + _SLACK)
    panel_bytes = 0 if gy_in_place else values["panel_pixels"] * config.block_panels * config.block.vectors * lanes * size
    sums_at = align(panels_at + panel_bytes + _SLACK)
    sums = values["partial_block"] if kernel.single else 0
    values |= {"panels_at": panels_at, "sums_at": sums_at, "scratch_size": align(sums_at + sums + _SLACK) + 64 * 9}
    facts = {
        "block": f"{config.block.rows}x{config.block.vectors}", "tile": "x".join(map(str, config.tile)), "parts": config.parts,
        "tasks": values["tasks"], "predicted_cycles": cycles / threads,
    }  # fmt: skip
    workspace_bytes = values["scratch_at"] + threads * values["scratch_size"]
    block = ARGUMENTS.pack(threads, values)
    return CpuPlan(problem, name, load(kernel.name, target, kernel.emit), block, tables, workspace_bytes, facts)


def _in_place(problem: ConvProblem, numeric: Numeric) -> bool:
    """Whether x is read where it lies: a row of pixels in nhwc, of few channels (16 to 16 at 112x112 takes 0.27 ms with copies of both operands)."""
    if problem.format != "nhwc" or numeric.converts or (problem.n, problem.h, problem.g) != (1, 1, 1):
        return False
    row = (problem.r, problem.s, problem.stride, problem.padding) == (1, 1, (1, 1), (0, 0, 0, 0))
    pitch = problem.c * numeric.memory_bytes
    return row and pitch <= _IN_PLACE_BYTES and not meets_itself(pitch)


def _values(
    problem: ConvProblem, config: WeightConfig, numeric: Numeric, tile: Tile, rows: Axis, columns: Axis, image_bytes: int
) -> tuple[dict[str, int], list[np.ndarray]]:
    """The argument block's values by name, but for the scratch, and the tables they point to."""
    lanes, size, memory = numeric.lanes, numeric.compute_bytes, DTYPES[problem.dtype]
    images, tile_p, tile_q = config.tile
    x, gy = pitches(problem, True), pitches(problem, False)
    vectors = -(-problem.kg // lanes)
    panels = -(-vectors // config.block.vectors)
    p_tiles, q_tiles = -(-problem.p // tile_p), -(-problem.q // tile_q)
    tiles = _tile_count(problem, numeric, config.tile)
    tile_table = pair_tiles(problem, config.tile, x[0], (gy[0], gy[2])) if numeric.pairs else np.zeros((0, 0), np.int64)
    k_blocks, c_blocks = -(-panels // config.block_panels), -(-problem.cg // config.block_channels)
    taps_count, blocks = problem.r * problem.s, problem.g * k_blocks * c_blocks
    row = config.block_panels * config.block.vectors * lanes * size
    tap = config.block_channels * row
    block_bytes = taps_count * tap
    bias_group = vectors * lanes * size
    whole_rows = tile_q == problem.q
    pixel_offsets = _pixel_offsets(tile, config, image_bytes, tile_q)
    last_offsets = _pixel_offsets(tile, config, image_bytes, problem.q - (q_tiles - 1) * tile_q)
    taps = np.array([tile.offset(a, b) for a in rows.phases[0].taps for b in columns.phases[0].taps[:: config.columns]], dtype=np.int64)
    gy_offsets = np.arange(tile_p * tile_q if whole_rows else tile_q, dtype=np.int64) * gy[3]
    weight_rows = _weight_rows(problem, config.block_channels, tap, row)
    channel_weights = problem.cg * taps_count
    # OIHW: the block's weights are one run; channels_last: one run of channels for each tap.
    planar = problem.weight_format == "nchw"
    run_weights = taps_count if planar else 1
    run_blocks = -(-config.block_channels * run_weights // lanes)
    runs = 1 if planar else taps_count
    bias_at = 0 if config.parts == 1 else align(config.parts * blocks * block_bytes)
    values = {
        **tile.arguments(),
        "tasks": blocks * config.parts, "finish_tasks": blocks * runs * run_blocks, "parts": config.parts,
        "part_tiles": config.part_tiles, "tiles": tiles, "k_blocks": k_blocks, "c_blocks": c_blocks, "block_panels": config.block_panels,
        "block_channels": config.block_channels, "groups": problem.g, "p_tiles": p_tiles, "q_tiles": q_tiles, "tile_p": tile_p, "tile_q": tile_q,
        "tile_images": images, "images": problem.n, "p": problem.p, "q": problem.q, "in_channels": problem.cg, "out_channels": problem.kg,
        "wide_panels": split_count(vectors, config.block.vectors)[0], "panels": panels, "x_image": x[0], "x_group": x[1] * problem.cg,
        "gy_image": gy[0], "gy_row": gy[2], "gy_column": gy[3], "gy_channel": gy[1], "gy_offsets": gy_offsets.ctypes.data,
        "gy_contiguous": int(problem.format == "nchw"), "whole_rows": int(whole_rows), "image_bytes": image_bytes,
        "pixel_offsets": pixel_offsets.ctypes.data, "last_pixel_offsets": last_offsets.ctypes.data, "taps": len(taps), "tap_offsets": taps.ctypes.data,
        # PyTorch sums float64 in short runs, and its error is the measure: shorter pieces, each summed from zero.
        "chunk": _CHUNK_PIXELS // 2 if problem.dtype == "f64" else _CHUNK_PIXELS,
        "partial_at": 0, "partial_part": blocks * block_bytes, "partial_block": block_bytes, "partial_tap": tap, "partial_row": row,
        "bias_part_at": bias_at, "bias_part": problem.g * bias_group, "bias_group": bias_group, "has_bias": int(problem.epilogue.bias),
        "scratch_at": align(bias_at + config.parts * problem.g * bias_group + 64, 4096), "panel_pixels": images * tile_p * tile_q,
        "weight_rows": weight_rows.ctypes.data, "weight_pitch": channel_weights * memory, "runs": runs, "run_weights": run_weights,
        "run_start": run_weights * memory, "run_pitch": problem.cg * memory, "run_rows": config.block_channels, "run_blocks": run_blocks,
        "column_advance": columns.advance, "tile_table": tile_table.ctypes.data,
    }  # fmt: skip
    return values, [*tile.tables, pixel_offsets, last_offsets, taps, gy_offsets, weight_rows, tile_table]
