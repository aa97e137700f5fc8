"""Convolution on matrix tiles (AMX): forward and grad_input, for any kernel, stride, dilation, groups and padding mode.

bfloat16 is multiplied as it is, float32 and float16 as sums of bfloat16 parts (:mod:`faltung.cpu.parts`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from .. import config as options
from ..codegen.load import load
from ..dispatch import Unsupported
from ..problem import DTYPES, ConvProblem
from . import target as targets
from .amx_kernel import ARGUMENTS, PANEL, AmxKernel
from .amx_pack import READ_BEYOND
from .checked import FLAG_BYTES, CheckedPlan
from .direct import DIRECT, Roles, elements_apart
from .direct import choose_config as choose_direct
from .direct_kernel import PHASE_FIELDS
from .frozen import Packing
from .geometry import Axis, axes
from .grouped import check as check_grouped
from .grouped import choose_config as choose_grouped
from .matrix_tiles import MAX_PAIRS, ROWS, palette
from .parts import BY_NAME_ONLY, PARTS, PRODUCTS
from .plan import CpuPlan
from .pointwise import joined
from .target import Rates, Target
from .tile import PAGE, Tile, align, meets_itself, pitches, row_pitch, weight_strides
from .tiling import split_count, tile_candidates, useful_threads

__all__ = ["AMX", "Amx", "AmxConfig", "choose_config", "tiles_refusal"]

_SLACK = 4096
_STEP_CYCLES = 80.0  # four products of 16 rows take 64, their operands come from the second-level cache at times
_CALL_CYCLES = 250.0  # of a micro-kernel: sums are loaded and stored, the first products wait for each other
_CHECK_CYCLES = 4.0  # to look at the sums of a pixel
_TASK_CYCLES = 600.0
_CANDIDATES = 24  # sizes of a tile's side that are tried, from the whole image to one pixel
_ADVANTAGE = 1.25  # of 286 layers in bfloat16 those predicted closer than this were as often slower as faster
_SUM_PIXELS = 320  # whose sums are kept until they are stored, 40 KiB
_L3_BYTES = 12.0  # a cycle, of weights that do not fit the second-level cache


@dataclass(frozen=True)
class AmxConfig:
    """Sizes of one convolution: ``tile`` outputs (of each phase), ``k_blocks`` tasks that share a tile; ``cycles`` is the predicted total of all cores."""

    tile: tuple[int, int]
    k_blocks: int
    packed: bool
    cycles: float


@dataclass(frozen=True)
class _Sizes:
    """What a problem's pixels and reduction look like to matrix tiles: a tap, or the ``joined`` taps of a row, has ``terms`` terms in ``blocks`` blocks of
    ``pairs`` pairs."""

    terms: int
    pairs: int
    blocks: int
    parts: int
    joined: bool

    @classmethod
    def of(cls, problem: ConvProblem) -> _Sizes:
        channels, parts = Roles(problem).source_channels, PARTS[problem.dtype]
        apart, run = cls._of_terms(channels, parts, False), cls._of_terms(channels * problem.s, parts, True)
        return run if _joins(problem) and 4 * run.blocks < 3 * problem.s * apart.blocks else apart

    @classmethod
    def _of_terms(cls, terms: int, parts: int, joined: bool) -> _Sizes:
        wanted = -(-terms // 2)
        blocks = -(-wanted // MAX_PAIRS)
        return cls(terms, -(-wanted // blocks), blocks, parts, joined)

    @property
    def room(self) -> int:
        """Terms of a tap with the zeros that fill its blocks."""
        return 2 * self.pairs * self.blocks


def _joins(problem: ConvProblem) -> bool:
    """Whether the columns that neighbouring taps read are neighbours, in one slab."""
    if problem.s == 1 or problem.dilation[1] != 1:
        return False
    return problem.s >= problem.stride[1] if problem.direction == "forward" else problem.stride[1] == 1


def _reads_in_place(problem: ConvProblem) -> bool:
    """Whether the pixels of a joined row are runs of bfloat16 as they lie in memory."""
    roles, sizes = Roles(problem), _Sizes.of(problem)
    plain = (
        not sizes.joined
        and problem.dtype == "bf16"
        and problem.format == "nhwc"
        and problem.h == 1
        and (problem.r, problem.s) == (1, 1)
        and problem.stride == (1, 1)
    )
    pixel = problem.g * roles.source_channels * 2
    return plain and problem.padding == (0, 0, 0, 0) and sizes.room == roles.source_channels and problem.w >= ROWS and not meets_itself(pixel)


def _sides(count: int) -> list[int]:
    """Sizes of a tile's side, about evenly spread over all that divide ``count`` well."""
    found = list(tile_candidates(count))
    return [*found[:: -(-len(found) // _CANDIDATES)], *found[-1:]] if len(found) > _CANDIDATES else found


@lru_cache(maxsize=1024)
def choose_config(problem: ConvProblem, target: Target, threads: int) -> AmxConfig:
    """The configuration predicted to be fastest.  No choice changes the bits."""
    roles, sizes = Roles(problem), _Sizes.of(problem)
    packed = not _reads_in_place(problem)
    rows, columns = axes(problem, (1, 1), dense=sizes.joined)
    best: AmxConfig | None = None
    # The axes do not depend on each other: each is made once for a size.
    row_axes = [axes(problem, (size, 1), dense=sizes.joined)[0] for size in _sides(rows.count)]
    for tile_q in _sides(columns.count):
        if not packed and tile_q < min(problem.w, ROWS):
            break
        column_axis = axes(problem, (1, tile_q), dense=sizes.joined)[1]
        for row_axis in row_axes:
            config = _predict(problem, target, threads, roles, sizes, packed, row_axis, column_axis)
            if config is not None and (best is None or config.cycles < best.cycles):
                best = config
        if best is not None and tile_q * max(1, rows.count) < 16 * ROWS:
            break
    if best is None:
        tile = axes(problem, (1, 1), dense=sizes.joined)
        best = _predict(problem, target, threads, roles, sizes, packed, *tile, whole=True)
    assert best is not None
    return best


def _predict(
    problem: ConvProblem, target: Target, threads: int, roles: Roles, sizes: _Sizes, packed: bool, rows: Axis, columns: Axis, whole: bool = False
) -> AmxConfig | None:
    """The configuration of these tiles; None where they do not fit the second-level cache."""
    nhwc, pitch = problem.format == "nhwc", -(-row_pitch(columns) // columns.advance)
    scratch = rows.scratch_starts[-1] * pitch * columns.advance * max(1, len(columns.slabs))
    room = roles.source_channels if sizes.joined else sizes.room
    if not whole and scratch * room * 2 * sizes.parts > target.l2 * 3 // 8:
        return None
    vectors = -(-roles.out_channels // 16)
    panels = -(-vectors // PANEL)
    products = sum(len(chosen) for chosen in PRODUCTS[sizes.parts])
    runs = nhwc and columns.step == 1 and room == roles.source_channels and problem.g == 1  # pixels without gaps, moved together
    pack = (scratch if packed else 0) * (room * _pack_cycles(problem, columns.step) + (0.5 if runs else 6.0))
    weight_bytes = problem.r * (1 if sizes.joined else problem.s) * sizes.room * vectors * 16 * 2 * sizes.parts
    each = weight_bytes / (_L3_BYTES if weight_bytes > target.l2 // 2 else 64.0)
    for row in rows.phases:
        for column in columns.phases:
            # The mean tile: the last ones are smaller.
            high, wide = row.count / max(1, -(-rows.count // rows.tile)), column.count / max(1, -(-columns.count // columns.tile))
            together = sum_rows(rows.tile, columns.tile, pitch)
            linear = max(0.0, (min(together, high) - 1) * pitch + wide)
            steps = len(row.taps) * (1 if sizes.joined else len(column.taps)) * sizes.blocks
            blocks = math.ceil(linear / (2 * ROWS)) * max(1.0, high / together)
            store = high * wide * (_CHECK_CYCLES * (sizes.joined or sizes.parts > 1) + (4.0 if nhwc else 14.0 if columns.output_step == 1 else 60.0))
            each += panels * (blocks * (steps * _STEP_CYCLES * products + _CALL_CYCLES) + store)
    tasks = problem.n * problem.g * -(-rows.count // rows.tile) * -(-columns.count // columns.tile)
    k_blocks = 1
    if tasks < 2 * threads:
        wanted = min(panels, -(-2 * threads // max(1, tasks)))
        k_blocks = -(-panels // -(-panels // wanted))
    cycles = math.ceil(tasks * k_blocks / threads) * threads * (pack + each / k_blocks + _TASK_CYCLES)
    return AmxConfig((rows.tile, columns.tile), k_blocks, packed, cycles)


def _pack_cycles(problem: ConvProblem, step: int) -> float:
    """Cycles to pack a channel of a pixel."""
    if problem.format == "nhwc":
        return {"bf16": 2.0 / 32, "f16": 9.0 / 16, "f32": 12.0 / 16}[problem.dtype]
    return {"bf16": 10.0 / 32, "f16": 16.0 / 16, "f32": 18.0 / 16}[problem.dtype] * (1.0 if step == 1 else 1.5 if step == 2 else 6.0)


def sum_rows(rows: int, columns: int, pitch: int) -> int:
    """Rows of a tile whose sums are stored together: as many as leave the least of the matrix tiles empty."""
    step = 2 * ROWS
    fitting = [g for g in range(1, rows + 1) if (g - 1) * pitch + columns <= _SUM_PIXELS] or [1]
    return max(fitting, key=lambda g: (g * columns / (-(-((g - 1) * pitch + columns) // step) * step), g))


class _Phases:
    """The phases' reductions: where the tile holds each step's channels, where the weight holds each term, and where the packed panels lie."""

    def __init__(self, problem: ConvProblem, roles: Roles, sizes: _Sizes, padded: int, tile: Tile, rows: Axis, columns: Axis) -> None:
        weight = weight_strides(problem)
        between = weight[1 if roles.forward else 0]
        self.tap_major = sizes.joined or (between < min(weight[2], weight[3]) and problem.r * problem.s > 1)
        channels = np.arange(roles.source_channels, dtype=np.int64) * between
        steps = np.arange(sizes.blocks, dtype=np.int64) * (4 * sizes.pairs)
        self.tables: list[npt.NDArray[np.int64]] = []
        self.contiguous, self.packed_bytes, self.most_taps = True, 0, 0
        records = []
        for row in rows.phases:
            for column in columns.phases:
                found = []
                if sizes.joined:  # the taps of a row in the order in which the tile holds what they read
                    run = sorted(column.taps, key=lambda tap: tap.shift)
                    terms = (np.array([b.kernel_index * weight[3] for b in run], dtype=np.int64)[:, None] + channels).reshape(-1)
                    found = sorted((a.kernel_index * weight[2], tile.offset(a, run[0])) for a in row.taps)
                else:
                    terms = channels
                    found = sorted((a.kernel_index * weight[2] + b.kernel_index * weight[3], tile.offset(a, b)) for a in row.taps for b in column.taps)
                taps, places = (np.array([pair[i] for pair in found], dtype=np.int64) for i in (0, 1))
                weights = (taps[:, None] + terms if self.tap_major else terms[:, None] + taps).reshape(-1)
                offsets = (steps[:, None] + places).reshape(-1)
                self.tables += [offsets, weights]
                self.contiguous &= bool((np.diff(terms if self.tap_major else weights) == DTYPES[problem.dtype]).all())
                self.most_taps = max(self.most_taps, len(found))
                count = len(offsets) * sizes.pairs * sizes.parts
                spans = (row.start, row.count, column.start, column.count)
                records.append((count, offsets.ctypes.data, weights.ctypes.data, self.packed_bytes, *spans))
                self.packed_bytes = align(self.packed_bytes + problem.g * padded * count * 4)
        self.records = np.array(records, dtype=np.int64).reshape(-1, len(PHASE_FIELDS))


def build_plan(problem: ConvProblem, target: Target, threads: int, config: AmxConfig) -> CpuPlan:
    """Tables, kernel and argument block for a configuration."""
    roles, sizes = Roles(problem), _Sizes.of(problem)
    rows, columns = axes(problem, config.tile, dense=sizes.joined)
    strides, source, out = weight_strides(problem), pitches(problem, roles.forward), pitches(problem, not roles.forward)
    room = roles.source_channels if sizes.joined else sizes.room
    channels = room if config.packed else problem.g * roles.source_channels
    tile = Tile(rows, columns, "linear", channels, 2, source, config.packed)
    vectors = -(-roles.out_channels // 16)
    panels, wide, padded = -(-vectors // PANEL), split_count(vectors, PANEL)[0], vectors * 16
    phases = _Phases(problem, roles, sizes, padded, tile, rows, columns)
    kernel = AmxKernel(target, problem.dtype, problem.format, min(columns.step, 3), wide < panels, config.packed, elements_apart(problem, target), sizes.joined)
    part = align(tile.bytes + 4 * ROWS * tile.column * columns.advance + READ_BEYOND)  # whole matrix tiles
    c_at = align(part * sizes.parts + _SLACK) if config.packed else 0
    row_pixels = tile.row // (tile.column * columns.advance)
    together = sum_rows(config.tile[0], config.tile[1], row_pixels)
    linear = (together - 1) * row_pixels + config.tile[1]
    sums = (linear + 4 * ROWS) * PANEL * 64  # in whole matrix tiles; the transposing store reads blocks of 16 pixels
    pack_rows = 2 * sizes.pairs * phases.most_taps * PANEL * 64 + _SLACK
    bias_group = padded * 4
    shapes = palette(sizes.pairs)
    p_tiles, q_tiles = -(-rows.count // config.tile[0]), -(-columns.count // config.tile[1])
    block_panels = -(-panels // config.k_blocks)
    k_blocks = -(-panels // block_panels)
    scratch_size = align(max(c_at + sums, pack_rows) + _SLACK) + 64 * 9
    values = {
        **tile.arguments(), "room": room, "tile_part": part,
        "pack_tasks": len(phases.records) * problem.g * panels, "tasks": problem.n * problem.g * p_tiles * q_tiles * k_blocks,
        "phases": phases.records.ctypes.data, "row_phases": len(rows.phases), "column_phases": len(columns.phases),
        "p_tiles": p_tiles, "q_tiles": q_tiles, "tile_p": config.tile[0], "tile_q": config.tile[1], "k_blocks": k_blocks, "block_panels": block_panels,
        "wide_panels": wide, "panels": panels, "groups": problem.g, "source_channels": roles.source_channels,
        "out_channels": roles.out_channels, "source_image": source[0], "source_group": source[1] * roles.source_channels,
        "out_image": out[0], "out_group": out[1] * roles.out_channels, "out_row": out[2], "out_column": out[3], "out_channel": out[1],
        "weight_group": strides[0] * problem.kg, "weight_pitch": strides[0 if roles.forward else 1], "weight_contiguous": int(phases.contiguous),
        "bias_at": phases.packed_bytes, "bias_group": bias_group, "has_bias": int(problem.epilogue.bias and roles.forward),
        "scratch_at": align(phases.packed_bytes + problem.g * bias_group + 64, PAGE), "scratch_size": scratch_size,
        "c_at": c_at, "column_advance": columns.advance, "palette": shapes.ctypes.data, "pairs": sizes.pairs, "channel_blocks": sizes.blocks,
        "tap_major": int(phases.tap_major), "sum_rows": together, "terms": sizes.terms, "flag_at": threads * scratch_size,
    }  # fmt: skip
    block = ARGUMENTS.pack(threads, values)
    facts = {
        "tile": f"{config.tile[0]}x{config.tile[1]}", "pairs": sizes.pairs, "parts": sizes.parts, "in_place": not config.packed,
        "tasks": values["tasks"], "predicted_cycles": config.cycles / threads,
    }  # fmt: skip
    flag_at = values["scratch_at"] + values["flag_at"]
    tables = [*tile.tables, *phases.tables, phases.records, shapes]
    code = load(kernel.name, target, kernel.emit)
    if not kernel.checked:
        return CpuPlan(problem, AMX.name, code, block, tables, flag_at, facts, _PACKING)
    return CheckedPlan(problem, AMX.name, code, block, tables, flag_at + FLAG_BYTES, facts, flag_at, lambda: DIRECT.plan(problem, threads), _PACKING)


class Amx:
    """The implementation named ``amx``, for forward and grad_input."""

    name = "amx"

    def plan(self, problem: ConvProblem, threads: int) -> CpuPlan:
        """A plan; raises :class:`Unsupported` for what it does not take, and, where it is not asked for by name, where another one is predicted faster."""
        target = targets.target()
        if (reason := _refusal(problem, target)) is not None:
            raise Unsupported(reason)
        one = (problem.r, problem.s, *problem.stride, *problem.padding) == (1, 1, 1, 1, 0, 0, 0, 0)
        row = joined(problem) if one else problem
        config = choose_config(row, target, threads)
        if options.current().implementation != self.name:
            # Which algorithm it is decides bits: neither the number of threads nor the machine's rates may.
            plain = replace(target, rates=Rates())
            own, rival = choose_config(row, plain, 1).cycles, _rival(problem, row, plain)
            if rival < _ADVANTAGE * own:
                raise Unsupported(f"vectors are predicted to be faster ({rival:.3g} cycles of one core; {own:.3g})")
        if (useful := useful_threads(threads, config.cycles, target)) < threads:
            threads, config = useful, choose_config(row, target, useful)
        found = build_plan(row, target, threads, config)
        found.problem = problem
        return found


AMX = Amx()
_PACKING = Packing(ARGUMENTS, "pack_tasks", "tasks")


def _refusal(problem: ConvProblem, target: Target) -> str | None:
    """Why the algorithm does not apply."""
    if problem.direction == "grad_weight":
        return "grad_weight is amx_weight's"
    if problem.direction == "grad_input" and problem.padding_mode != "zeros":
        return "grad_input in this padding mode is padded_grad_input's"
    return tiles_refusal(problem, target)


def tiles_refusal(problem: ConvProblem, target: Target) -> str | None:
    """Why matrix tiles are not for this type, on this processor, under the options in force."""
    if not target.matrix_tiles:
        return "the processor has no matrix tiles (AMX)"
    if problem.dtype not in PARTS:
        return f"{problem.dtype} is no sum of a few bfloat16 numbers"
    if problem.dtype != "bf16" and options.current().precision == "strict":
        return "precision is strict"
    if problem.dtype != "bf16" and options.current().implementation != Amx.name:
        return BY_NAME_ONLY
    return None


def _rival(problem: ConvProblem, row: ConvProblem, target: Target) -> float:
    """The cycles that the best of the kernels on vectors is predicted to take on one core."""
    direct = choose_direct(row, target, 1).cycles
    try:
        check_grouped(problem, target)
    except Unsupported:
        return direct
    return min(direct, choose_grouped(problem, target, 1).cycles)
