"""Winograd's algorithm for the weight's gradient (and the bias's), 3x3 with stride 1 and any dilation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .. import config as options
from ..codegen.load import load
from ..codegen.numeric import Numeric
from ..dispatch import Unsupported
from ..problem import ConvProblem
from . import target as targets
from .plan import CpuPlan
from .target import Target
from .tile import PAGE, align, odd_lines
from .winograd import refusal
from .winograd_form import Reads, tile_starts
from .winograd_input import strip_bytes, strip_groups, strip_table
from .winograd_kernel import LINE
from .winograd_transform import ERROR_LIMIT, sum_error
from .winograd_weight_kernel import ARGUMENTS, WinogradWeightKernel
from .winograd_weight_tiling import WinogradWeightConfig, choose_config, direct_cycles, residues, tile_counts

__all__ = ["WINOGRAD_WEIGHT", "WinogradWeight", "build_plan"]

_SLACK = 1024


class _Layout:
    """Sizes and places in memory, all in bytes."""

    def __init__(self, problem: ConvProblem, numeric: Numeric, config: WinogradWeightConfig, threads: int) -> None:
        points, lanes = config.algorithm.n**2, numeric.lanes
        size = numeric.compute_bytes
        vector = lanes * size
        self.tiles_p, self.tiles_q = tile_counts(problem, config.algorithm)
        self.tiles = problem.n * self.tiles_p * self.tiles_q
        self.k_most = -(-(problem.k // lanes) // config.k_blocks) * lanes + problem.k % lanes
        self.v_pitch = align(min(problem.c, config.block_panels * config.vectors * lanes) * size) + LINE
        self.w_pitch = align(self.k_most * size) + LINE
        self.v_point, self.w_point = odd_lines(config.block_tiles * self.v_pitch), odd_lines(config.block_tiles * self.w_pitch)
        self.s_point = odd_lines((self.k_most + config.rows) * config.vectors * vector)
        self.s_panel = points * self.s_point
        v, w, s = points * self.v_point + _SLACK, points * self.w_point + _SLACK, config.block_panels * self.s_panel + _SLACK
        self.sum_pitch = align(problem.k * size) + vector + LINE
        self.partial_tap = align(problem.c * size) + LINE
        self.partial_k = 9 * self.partial_tap
        self.partial_part = problem.k * self.partial_k
        self.partial_at = align(config.parts * self.sum_pitch, PAGE)
        self.scratch_at = align(self.partial_at + (config.parts * self.partial_part if config.parts > 1 else 0), PAGE)
        self.w_at = align(v) + 5 * LINE
        self.s_at = align(self.w_at + w) + 3 * LINE
        self.block_sums_at = align(self.s_at + s)
        self.strip_at = align(self.block_sums_at + self.sum_pitch)
        strip = strip_bytes(config.algorithm, numeric, problem.dilation[1], residues(problem)[1])
        self.scratch_size = align(self.strip_at + strip + _SLACK, PAGE) + 9 * LINE
        self.workspace = self.scratch_at + threads * self.scratch_size


def build_plan(problem: ConvProblem, target: Target, threads: int, config: WinogradWeightConfig, name: str) -> CpuPlan:
    """The plan with the given configuration."""
    numeric = Numeric(problem.dtype, target)
    narrow = -(-problem.c // numeric.lanes) % config.vectors != 0
    kernel = WinogradWeightKernel(
        target, problem.dtype, config.algorithm.m, problem.format, problem.weight_format, config.rows, config.vectors, narrow, config.parts == 1,
        problem.epilogue.bias, problem.format == "nchw" and problem.dilation[1] > 1,
    )  # fmt: skip
    layout = _Layout(problem, numeric, config, threads)
    zeros = np.zeros((max(problem.c, problem.k) + 64) * numeric.compute_bytes, np.uint8)
    left, _, top, _ = problem.padding
    m = config.algorithm.m
    nhwc = problem.format == "nhwc"
    step, groups, element = problem.dilation, residues(problem), numeric.memory_bytes
    starts = tile_starts(layout.tiles_p, m, step[0], groups[0]), tile_starts(layout.tiles_q, m, step[1], groups[1])
    image = Reads((problem.h, problem.w), problem.c, config.algorithm.n, (top, left), problem.padding_mode, step, element=element).tables(starts, nhwc)
    gradient = Reads((problem.p, problem.q), problem.k, m, (0, 0), step=step, element=element).tables(starts, nhwc)
    strips = strip_table(m, numeric, step[1], groups[1])
    values = _values(problem, numeric, config, layout, kernel)
    values |= _source("", numeric, problem.c, problem.h, problem.w, left, nhwc, image)
    values |= _source("gradient_", numeric, problem.k, problem.p, problem.q, 0, nhwc, gradient)
    values |= {
        "zeros": zeros.ctypes.data, "column_group": groups[1], "column_spread": step[1], "strip_tiles": strip_groups(groups[1]) * groups[1],
        "strip_table": strips.ctypes.data,
    }  # fmt: skip
    facts = {
        "tile": f"{m}x{m}", "parts": config.parts, "block_tiles": config.block_tiles, "blocks": config.k_blocks * config.c_blocks,
        "predicted_cycles": config.cycles / threads, "error_bound": sum_error(config.error_bound, problem.dtype),
        "products": layout.tiles * config.algorithm.n**2 * problem.c * problem.k,
    }  # fmt: skip
    tables = (*image, *gradient, zeros, strips)
    return CpuPlan(problem, name, load(kernel.name, target, kernel.emit), ARGUMENTS.pack(threads, values), tables, layout.workspace, facts)


def _source(
    prefix: str, numeric: Numeric, channels: int, height: int, width: int, before: int, nhwc: bool, tables: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
) -> dict[str, int]:
    """The arguments of x or (with its prefix) of the gradient of y."""
    size = numeric.memory_bytes
    values = {
        "source_channels": channels, "source_image": channels * height * width * size, "source_channel": size if nhwc else height * width * size,
        "source_width": width, "column_before": before,
        "row_table": tables[0].ctypes.data, "column_table": tables[1].ctypes.data,
    }  # fmt: skip
    return {prefix + name: value for name, value in values.items()}


def _values(problem: ConvProblem, numeric: Numeric, config: WinogradWeightConfig, layout: _Layout, kernel: WinogradWeightKernel) -> dict[str, int]:
    """The argument block's values by name, but for the sources."""
    lanes, size = numeric.lanes, numeric.memory_bytes
    vectors = -(-problem.c // lanes)
    panels = -(-vectors // config.vectors)
    return {
        "tiles_p": layout.tiles_p, "tiles_q": layout.tiles_q, "tasks": config.c_blocks * config.k_blocks * config.parts,
        "finish_tasks": (problem.k if config.parts > 1 else 0) + int(problem.epilogue.bias), "tiles": layout.tiles, "parts": config.parts,
        "part_tiles": config.part_tiles, "block_tiles": config.block_tiles, "c_blocks": config.c_blocks, "block_panels": config.block_panels,
        "panels": panels, "wide_panels": vectors - panels * (config.vectors - 1) if kernel.narrow else panels, "k_blocks": config.k_blocks,
        "k_vectors": problem.k // lanes, "sum_pitch": layout.sum_pitch, "v_point": layout.v_point, "v_pitch": layout.v_pitch, "w_point": layout.w_point,
        "w_pitch": layout.w_pitch, "s_point": layout.s_point, "s_panel": layout.s_panel, "sums_at": 0, "partial_at": layout.partial_at,
        "partial_part": layout.partial_part, "partial_k": layout.partial_k, "partial_tap": layout.partial_tap,
        "k_pitch": problem.c * 9 * size, "tap_pitch": problem.c * size, "channel_pitch": 9 * size if problem.weight_format == "nchw" else size,
        "scratch_at": layout.scratch_at, "scratch_size": layout.scratch_size, "w_at": layout.w_at, "s_at": layout.s_at,
        "block_sums_at": layout.block_sums_at, "strip_at": layout.strip_at,
    }  # fmt: skip


class WinogradWeight:
    """The implementation named ``winograd`` for the direction grad_weight."""

    name = "winograd"

    def plan(self, problem: ConvProblem, threads: int) -> CpuPlan:
        """A plan for grad_weight; raises :class:`Unsupported` where the algorithm does not apply or direct convolution is predicted faster.

        Nothing that decides bits depends on the number of threads.
        """
        target = targets.target()
        reason = "grad_weight only" if problem.direction != "grad_weight" else refusal(problem)
        if reason is not None:
            raise Unsupported(reason)
        best = choose_config(problem, target)
        if best is None:
            raise Unsupported(f"the error bound over {problem.n} images is above {ERROR_LIMIT:g}")
        direct = direct_cycles(problem, target)
        if options.current().implementation != self.name and best.cycles > direct:
            raise Unsupported(f"direct convolution is predicted to be faster ({direct:.3g} cycles; {best.algorithm.name} {best.cycles:.3g})")
        return build_plan(problem, target, threads, best, self.name)


WINOGRAD_WEIGHT = WinogradWeight()
