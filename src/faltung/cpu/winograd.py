"""Winograd convolution: forward and grad_input of square kernels with stride 1 or 2."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import config as options
from ..codegen.load import load
from ..codegen.numeric import Numeric
from ..dispatch import Unsupported
from ..problem import DTYPES, ConvProblem
from . import target as targets
from .direct import choose_config as direct_config
from .direct import packs_at_use
from .frozen import Packing
from .plan import CpuPlan
from .target import Rates, Target
from .tile import PAGE, align, odd_lines
from .winograd_few import PIXEL, few_strip_bytes
from .winograd_filter import filter_scratch_bytes
from .winograd_form import MOST_SPREAD, Form, Reads, Roles, out_tables, tile_starts
from .winograd_input import strip_bytes, strip_groups, strip_table
from .winograd_kernel import ARGUMENTS, LINE, WinogradKernel
from .winograd_output import output_scratch_bytes
from .winograd_tiling import WinogradConfig, candidates, choose_config, choose_kept, density, direct_cycles
from .winograd_transform import ALGORITHMS, ERROR_LIMIT, Algorithm, sum_error

__all__ = ["WINOGRAD", "Winograd", "allowed_algorithms", "build_plan", "refusal"]

_SLACK = 1024
_LEAST_CHANNELS = 16  # a vector of the widest target, of float32
_Tables = dict[str, npt.NDArray[Any]]
_DOUBLE_PUMPED = 0.885  # strided layers: measured over predicted, beside direct convolution's, where products take twice as long as all else was fitted for
_FULL_RATE = {("nhwc", "forward"): 0.91, ("nhwc", "grad_input"): 0.765, ("nchw", "grad_input"): 0.965}
"""The same with AVX-512 at full rate, from more than four source channels on: direct convolution's predicted cycles are too many by so much."""
_LEAST_PRODUCED = 128  # of channels that grad_input produces, for these: with 32 and 64 direct convolution ran at 0.9 of Winograd's speed
_REPRODUCIBLE_BATCH = 8  # the batch that the choice of algorithm is made for where it must not depend on the batch


@lru_cache(maxsize=1024)
def _error_bound(algorithm: Algorithm, channels: int, form: Form) -> float:
    """Of the phase that errs most, where there are several."""
    return max(algorithm.error_bound(channels, (short,)) for short in form.short) if form.phased else algorithm.error_bound(channels, form.short)


def algorithms(problem: ConvProblem) -> tuple[Algorithm, ...]:
    """Those for the problem's kernel, stride and type: float64 keeps whole numbers exact, and its error that of a direct sum."""
    found = ALGORITHMS[Roles(problem).form.taps[0]]
    return tuple(a for a in found if a.exact) if problem.dtype == "f64" else found


def allowed_algorithms(problem: ConvProblem) -> tuple[Algorithm, ...]:
    """The algorithms whose error is within the limit."""
    roles = Roles(problem)
    return tuple(a for a in algorithms(problem) if _error_bound(a, roles.source_channels, roles.form) <= ERROR_LIMIT)


def refusal(problem: ConvProblem) -> str | None:
    """Why Winograd's algorithm does not apply, in any direction, or None."""
    roles = Roles(problem)
    reason = _form_refusal(problem)
    if reason is not None:
        return reason
    if problem.g != 1:
        return "one group only"
    if not algorithms(problem):
        return "not float64: this kernel's transforms round whole numbers"
    if problem.dtype != "f32" and roles.few:
        return "few channels in float32 only"
    if min(problem.k if roles.forward and roles.few else problem.c, problem.k) < _LEAST_CHANNELS:
        return f"fewer than {_LEAST_CHANNELS} channels: the transforms cost more than they save"
    if problem.direction == "grad_input" and problem.padding_mode != "zeros":
        return "grad_input in this padding mode is padded_grad_input's"
    if options.current().precision == "strict":
        return "precision is strict"
    if problem.empty:
        return "nothing to compute"
    return None


def _form_refusal(problem: ConvProblem) -> str | None:
    """What is wrong with kernel, stride and dilation."""
    taps = Roles(problem).form.taps
    if problem.direction == "grad_weight" and ((problem.r, problem.s) != (3, 3) or problem.stride != (1, 1)):
        return "the weight's gradient for 3x3 kernels with stride 1 only"
    if problem.stride not in ((1, 1), (2, 2)) or (problem.stride == (2, 2) and problem.dilation != (1, 1)):
        return "stride 1, or 2 with dilation 1, only"
    if taps[0] != taps[1] or taps[0] not in ALGORITHMS:
        return "square kernels of 2 to 5 rows, of 3 to 10 with stride 2, only"
    if max(problem.dilation) > MOST_SPREAD:
        return f"dilation above {MOST_SPREAD}"
    return None


class _Layout:
    """Sizes and places in memory, all in bytes."""

    def __init__(self, roles: Roles, numeric: Numeric, config: WinogradConfig, kernel: WinogradKernel, threads: int) -> None:
        algorithm = config.algorithm
        points, size, vector = algorithm.n**2, numeric.compute_bytes, numeric.lanes * numeric.compute_bytes
        source, out, form = roles.source_channels, roles.out_channels, roles.form
        components, phases = len(form.components), len(form.phases)
        self.tiles_p, self.tiles_q = roles.grid(algorithm.m)
        self.tiles = roles.problem.n * self.tiles_p * self.tiles_q
        self.blocks = -(-self.tiles // config.tiles)
        out_vectors = -(-out // numeric.lanes)
        self.panels = -(-out_vectors // config.vectors)
        self.wide_panels = out_vectors - self.panels * (config.vectors - 1) if kernel.narrow else self.panels
        self.pieces = max(1, source // config.piece)
        run_over = config.tiles + config.rows
        longest = (source - (self.pieces - 1) * config.piece) * components
        by_pieces = roles.by_pieces
        self.v_pitch = PIXEL * size if roles.few else align((longest if by_pieces else source) * size) + LINE
        self.v_point = odd_lines(run_over * self.v_pitch)
        self.m_point = odd_lines(run_over * config.vectors * vector)
        self.m_panel = points * self.m_point
        tiles_first = config.order == "tiles"
        v = points * self.v_point + _SLACK
        m = self.m_panel * (-(-self.panels // config.shares) if by_pieces else phases)
        u_piece = points * (longest * config.vectors * vector + LINE)
        u = points * (roles.virtual * out_vectors * vector + self.panels * LINE)
        self.u_phase = odd_lines(u if tiles_first else u_piece)
        u_piece, u = (phases - 1) * self.u_phase + u_piece, (phases - 1) * self.u_phase + u + _SLACK
        nchw = roles.problem.format == "nchw"
        strip = max(
            few_strip_bytes(algorithm, numeric) if roles.few else strip_bytes(algorithm, numeric, roles.step[1], roles.groups[1], form.step) * nchw,
            output_scratch_bytes(algorithm, numeric, config.vectors, roles.problem.format, 2 if form.phased else roles.spread[1], roles.groups[1]),
            filter_scratch_bytes(numeric, form),
        )
        self.m_at = align(v if tiles_first else u_piece + _SLACK) + 5 * LINE
        self.strip_at = align(self.m_at + m) + 3 * LINE
        self.scratch_size = align(self.strip_at + strip + _SLACK, PAGE) + 9 * LINE
        self.v_block = v
        self.shared = u if tiles_first else self.blocks * v
        self.scratch_at = align(self.shared + _SLACK, PAGE)
        self.workspace = self.scratch_at + threads * self.scratch_size


def build_plan(problem: ConvProblem, target: Target, threads: int, config: WinogradConfig, name: str) -> CpuPlan:
    """The plan with the given configuration."""
    roles, numeric = Roles(problem), Numeric(problem.dtype, target)
    lanes = numeric.lanes
    narrow = -(-roles.out_channels // lanes) % config.vectors != 0
    formats = problem.format, problem.weight_format
    dilated = problem.format == "nchw" and roles.spread[1] > 1
    kernel = WinogradKernel(
        target, problem.dtype, config.algorithm.m, *formats, not roles.forward, config.order, config.rows, config.vectors, narrow,
        dilated, roles.form, roles.source_channels if roles.few else 0,
    )  # fmt: skip
    layout = _Layout(roles, numeric, config, kernel, threads)
    tables = _tables(roles, numeric, config.algorithm, layout)
    values = _values(roles, config, layout, tables)
    facts = {
        "tile": f"{config.algorithm.m}x{config.algorithm.m}", "order": config.order, "block_tiles": config.tiles, "blocks": layout.blocks,
        "predicted_cycles": config.cycles, "error_bound": sum_error(_error_bound(config.algorithm, roles.source_channels, roles.form), problem.dtype),
    }  # fmt: skip
    points = config.algorithm.n**2 * density(roles.form, config.algorithm.n) * len(roles.form.parts)
    facts["products"] = round(layout.tiles * points * roles.source_channels * roles.out_channels)
    packing = Packing(ARGUMENTS, "filter_tasks", "tasks") if config.order == "tiles" else None
    block = ARGUMENTS.pack(threads, values)
    return CpuPlan(problem, name, load(kernel.name, target, kernel.emit), block, list(tables.values()), layout.workspace, facts, packing)


def _tables(roles: Roles, numeric: Numeric, algorithm: Algorithm, layout: _Layout) -> _Tables:
    """The arguments that are addresses of tables."""
    nhwc, spread, m, step = roles.problem.format == "nhwc", roles.spread, algorithm.m, roles.form.step
    starts = tile_starts(layout.tiles_p, m, spread[0], roles.groups[0]), tile_starts(layout.tiles_q, m, spread[1], roles.groups[1])
    reads = Reads(roles.source_size, roles.source_channels, algorithm.n, roles.before, roles.padding_mode, roles.step, step, numeric.memory_bytes)
    rows, columns = reads.tables(starts, nhwc)
    if roles.few:
        columns = reads.positions(starts[1], numeric.memory_bytes * (roles.source_channels if nhwc else 1))
    zeros = max(roles.source_channels, roles.out_channels, roles.source_size[1] * roles.source_channels if roles.few else 0) + 64
    out = out_tables(roles, starts, m, numeric.memory_bytes)
    return {
        "row_table": rows, "column_table": columns, "out_row_table": out[0], "out_column_table": out[1],
        "strip_table": strip_table(m, numeric, roles.step[1], roles.groups[1], step), "zeros": np.zeros(zeros * numeric.compute_bytes, np.uint8),
    }  # fmt: skip


def _values(roles: Roles, config: WinogradConfig, layout: _Layout, tables: _Tables) -> dict[str, int]:
    """The argument block's values by name."""
    problem = roles.problem
    (height, width), (out_height, out_width) = roles.source_size, roles.out_size
    source, out = roles.source_channels, roles.out_channels
    nhwc = problem.format == "nhwc"
    size = DTYPES[problem.dtype]
    plane = out_height * out_width * size
    taps, group, form = problem.r * problem.s, roles.groups[1] if max(roles.spread) > 1 else 1, roles.form
    if problem.weight_format == "nchw":
        k_pitch, c_pitch, tap_pitch = problem.c * taps * size, taps * size, size
    else:
        k_pitch, c_pitch, tap_pitch = problem.c * taps * size, size, problem.c * size
    tiles_first = config.order == "tiles"
    share_panels = -(-layout.panels // config.shares)
    shares = -(-layout.panels // share_panels)
    input_pieces = -(-config.tiles // config.input_tiles)
    return {
        "tiles_p": layout.tiles_p, "tiles_q": layout.tiles_q, "source_channels": source, "source_image": source * height * width * size,
        "source_channel": height * width * size, "source_width": width, "column_before": roles.before[1],
        "column_group": group, "column_spread": roles.step[1], "strip_tiles": strip_groups(group, form.step) * group,
        **{name: table.ctypes.data for name, table in tables.items()},
        "out_width": out_width, "out_image": out * plane, "out_channel": size if nhwc else plane,
        "filter_tasks": layout.panels * layout.pieces, "input_tasks": layout.blocks * input_pieces,
        "tasks": layout.blocks * (shares if tiles_first else layout.panels), "tiles": layout.tiles, "block_tiles": config.tiles,
        "input_pieces": input_pieces, "piece_tiles": config.input_tiles, "shares": shares, "share_panels": share_panels, "panels": layout.panels,
        "wide_panels": layout.wide_panels, "out_channels": out, "reduced_pieces": layout.pieces, "reduced_piece": config.piece,
        "chunk": config.chunk * len(form.components),
        "reduced_pitch": c_pitch if roles.forward else k_pitch, "lane_pitch": k_pitch if roles.forward else c_pitch, "tap_pitch": tap_pitch,
        "out_column": roles.phase_shift[1] - 1, "m_phase": layout.m_panel, "u_phase": layout.u_phase,
        "has_bias": int(problem.epilogue.bias and roles.forward), "v_point": layout.v_point, "v_pitch": layout.v_pitch, "v_block": layout.v_block,
        "m_point": layout.m_point, "m_panel": layout.m_panel, "u_at": 0, "v_at": 0, "scratch_at": layout.scratch_at, "scratch_size": layout.scratch_size,
        "m_at": layout.m_at, "strip_at": layout.strip_at,
    }  # fmt: skip


class Winograd:
    """The implementation named ``winograd``."""

    name = "winograd"

    def configs(self, problem: ConvProblem, threads: int) -> list[WinogradConfig]:
        """What the tuner may choose from, beside the predicted choice: each algorithm in each order."""
        target = targets.target()
        found: dict[str, WinogradConfig] = {}
        for algorithm in allowed_algorithms(problem):
            for config in sorted(candidates(problem, target, threads, algorithm), key=lambda c: c.cycles):
                found.setdefault(config.label, config)
        return list(found.values())

    def plan(self, problem: ConvProblem, threads: int, config: WinogradConfig | None = None) -> CpuPlan:
        """A plan for forward or grad_input; raises :class:`Unsupported` where the algorithm does not apply or direct convolution is predicted faster."""
        target = targets.target()
        reason = "forward and grad_input only" if problem.direction == "grad_weight" else refusal(problem)
        if reason is not None:
            raise Unsupported(reason)
        allowed = allowed_algorithms(problem)
        if not allowed:
            raise Unsupported(f"the error bound over {Roles(problem).source_channels} channels is above {ERROR_LIMIT:g}")
        if config is None:
            config = choose_config(problem, target, threads, _faster_than_direct(problem, target, threads, allowed))
        algorithm = config.algorithm
        plan = build_plan(problem, target, threads, config, self.name)
        plan.when_frozen = lambda: build_plan(problem, target, threads, choose_kept(problem, target, threads, algorithm), self.name)
        return plan


def _faster_than_direct(problem: ConvProblem, target: Target, threads: int, allowed: tuple[Algorithm, ...]) -> tuple[Algorithm, ...]:
    """The algorithm predicted to be fastest; raises :class:`Unsupported` where that is the direct one.

    Everything but this choice leaves the bits as they are, so it does not look at what the machine's rates were measured to be; where results must be
    reproducible it depends on neither batch size nor threads.
    """
    target = replace(target, rates=Rates())
    if options.current().reproducible:
        problem, threads = replace(problem, n=_REPRODUCIBLE_BATCH), 1
    best = choose_config(problem, target, threads, allowed)
    config = direct_config(problem, target, threads)
    direct = direct_cycles(problem, target, config.cycles, threads, packs_at_use(problem, target, config))
    if problem.stride != (1, 1):
        direct *= _correction(problem, target)
    if options.current().implementation != "winograd" and best.cycles > direct:
        raise Unsupported(f"direct convolution is predicted to be faster ({direct:.3g} cycles; {best.algorithm.name} {best.cycles:.3g})")
    return (best.algorithm,)


def _correction(problem: ConvProblem, target: Target) -> float:
    """Of direct convolution's predicted cycles for a strided layer (docs/engineering/cpu-winograd.md)."""
    if target.double_pumped:
        return 1 / _DOUBLE_PUMPED
    roles = Roles(problem)
    if not target.full_rate or roles.few or (not roles.forward and roles.out_channels < _LEAST_PRODUCED):
        return 1.0
    return _FULL_RATE.get((problem.format, problem.direction), 1.0)


WINOGRAD = Winograd()
