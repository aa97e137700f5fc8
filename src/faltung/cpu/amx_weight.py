"""The weight's gradient (and the bias's) on matrix tiles, for bfloat16, and for float16 and float32 as sums of bfloat16 parts."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from .. import config as options
from ..codegen.load import load
from ..dispatch import Unsupported
from ..problem import ConvProblem
from . import target as targets
from .amx import tiles_refusal
from .amx_weight_kernel import ARGUMENTS, PLANE_FIELDS, AmxWeightKernel
from .amx_weight_pack import UNIT
from .amx_weight_tiling import AmxWeightConfig, Gather, choose_config
from .checked import FLAG_BYTES, CheckedPlan
from .direct_weight import DIRECT_WEIGHT, predicted_cycles
from .direct_weight import choose_config as choose_direct
from .geometry import Axis, padded_index
from .matrix_tiles import MAX_PAIRS, ROWS, TILE_BYTES, palette
from .parts import PARTS
from .target import Rates, Target
from .tile import PAGE, align, meets_itself, pitches, weight_strides
from .tiling import useful_threads
from .winograd import refusal
from .winograd_weight_tiling import choose_config as choose_winograd

__all__ = ["AMX_WEIGHT", "AmxWeight", "AmxWeightConfig", "build_plan", "choose_config"]

_SLACK = 4096
_ADVANTAGE = 1.4  # of 150 layers in bfloat16 some of those predicted closer than this were slower, none above it


class _Layout:
    """Places and pitches, in bytes, of the workspace's pieces and those of a thread's scratch."""

    def __init__(self, problem: ConvProblem, config: AmxWeightConfig, gather: Gather) -> None:
        parts, taps = PARTS[problem.dtype], problem.r * problem.s
        images, rows, columns = config.tile
        self.c_tiles, self.k_tiles = -(-config.block_c // ROWS), -(-config.block_k // ROWS)
        self.right_part = self.c_tiles * gather.right_tile
        self.right_bytes = parts * self.right_part
        self.left_part = self.k_tiles * gather.left_tile
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
            (gather.rows.table_start(a), slab.extent, b * column_length, (a * len(gather.columns.slabs) + b) * gather.plane_bytes)
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
    taps, paired = gather.taps()
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
        "gy_columns_pitch": width * 8, "taps": len(taps), "paired_taps": paired, "tap_table": taps.ctypes.data, "right_tile": gather.right_tile,
        "right_part": layout.right_part, "left_tile": gather.left_tile, "left_part": layout.left_part, "sums_block": layout.sums_block,
        "sums_k": layout.sums_k, "sums_c": layout.sums_c, "has_bias": int(problem.epilogue.bias), "ones": ones.ctypes.data, "zeros": zeros.ctypes.data,
        "palette": shapes.ctypes.data, "weight_k": weight[0], "weight_c": weight[1], "weight_tap": weight[3],
    }  # fmt: skip
    return values, [layout.spans, row_table, column_table, planes, gradient_rows, gradient_columns, taps, zeros, ones, shapes]


class AmxWeight:
    """The implementation named ``amx`` for the direction grad_weight."""

    name = "amx"

    def plan(self, problem: ConvProblem, threads: int) -> CheckedPlan:
        """A plan; raises :class:`Unsupported` for what it does not take, and, where it is not asked for by name, where another one is predicted faster."""
        target = targets.target()
        if (reason := _refusal(problem, target)) is not None:
            raise Unsupported(reason)
        # Which algorithm it is, and its blocks, decide bits: neither the number of threads nor the machine's rates may.
        plain = replace(target, rates=Rates())
        config = choose_config(problem, plain)
        if config is None:
            raise Unsupported("a row of pixels takes more scratch than a thread may have")
        if options.current().implementation != self.name:
            rival = _rival(problem, plain)
            if rival < _ADVANTAGE * config.cycles:
                raise Unsupported(f"vectors are predicted to be faster ({rival:.3g} cycles of one core; {config.cycles:.3g})")
        return build_plan(problem, target, threads, config, self.name)


AMX_WEIGHT = AmxWeight()


def _refusal(problem: ConvProblem, target: Target) -> str | None:
    """Why the algorithm does not apply."""
    if problem.direction != "grad_weight":
        return "only grad_weight"
    if problem.empty:
        return "an operand is empty"
    return tiles_refusal(problem, target)


def _rival(problem: ConvProblem, target: Target) -> float:
    """The cycles that the best of the kernels on vectors is predicted to take on one core."""
    direct = predicted_cycles(problem, target, choose_direct(problem, target))
    if refusal(problem) is not None:
        return direct
    winograd = choose_winograd(problem, target)
    return direct if winograd is None else min(direct, winograd.cycles)
