"""Depthwise convolution with wide kernels by Winograd's filtering F(4, 4) along rows: 1.75 multiply-adds for four, whatever the width.

Vector lanes are channels, as in :mod:`faltung.cpu.depthwise`.  A source row is transformed once, in blocks of four columns, for all the output rows and groups
of four taps that read it; sums over kernel rows and groups of taps stay transformed until they are complete.  For 31x31 at 56x56 the transforms'
operations are a twentieth of the products'.  Forward and grad_input with stride and dilation 1 and no channel multiplier.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .. import config as options
from ..codegen.load import load
from ..codegen.numeric import Numeric
from ..dispatch import Unsupported
from ..problem import DTYPES, ConvProblem
from . import target as targets
from .depthwise_geometry import Line, even_parts, lines, predicted_cycles
from .depthwise_tile import image_strides, inside, odd_lines
from .depthwise_winograd_kernel import ARGUMENTS, DepthwiseWinogradKernel
from .depthwise_winograd_transform import BLOCK, POINTS, error_bound
from .geometry import multiplications
from .plan import CpuPlan
from .target import Target
from .tile import align
from .winograd_transform import ERROR_LIMIT, sum_error

__all__ = ["DEPTHWISE_WINOGRAD", "DepthwiseWinograd"]

_TASKS = 2  # a thread's, at least
_INPUT_CYCLES, _OUTPUT_CYCLES, _FILTER_CYCLES = 67.0, 52.0, 60.0  # of a block's, and of a group's transform, with what it reads and writes
_READ_FROM_MEMORY = 15  # column taps up to which plain sums leave out columns of padding
_MARGIN, _LEAST = 1.3, 0.9  # of plain sums' predicted time: measured with up to 15 and with more column taps (docs/engineering/cpu-depthwise.md)
_LEAST_ROWS = 5  # of taps: a transformed row is read by as many output rows
_LEAST_COLUMNS = 5
"""Column taps: four are one group, and a fifth of the transforms' price."""


@dataclass(frozen=True)
class Config:
    """Register block (``abreast`` output rows by ``block`` blocks of four, ``pieces`` groups of taps), tile, and kernel rows at a time."""

    block: int
    abreast: int
    pieces: tuple[int, ...]
    blocks: int
    rows: int
    chunk: int
    cycles: float


def _groups(columns: Line) -> int:
    return -(-len(columns.phases[0].taps) // BLOCK)


def _tile_bytes(entry: int, rows: int, taps: int, blocks: int, groups: int) -> int:
    return POINTS * entry * ((rows + taps - 1) * (blocks + groups - 1) + rows * blocks)


def choose(problem: ConvProblem, target: Target, threads: int, axes: tuple[Line, Line]) -> Config:
    """The tile: within three quarters of the second-level cache, and tasks enough for the threads, on whose number no bit of a result depends."""
    rows, columns = axes
    numeric = Numeric(problem.dtype, target)
    entry = numeric.lanes * numeric.compute_bytes
    many = target.registers >= 32
    groups, taps = _groups(columns), problem.r
    pieces = tuple(even_parts(groups, 8 if many else 4))
    whole = -(-columns.count // BLOCK)
    block = even_parts(whole, 14 if many else 8)[0]
    while block < whole and _tile_bytes(entry, 16, taps, whole, groups) > target.l2 * 3 // 4:
        whole = -(-whole // (2 * block)) * block if whole > 2 * block else block
    blocks = -(-whole // block) * block
    abreast = max(1, min(rows.count, (14 if many else 8) // block))
    vectors = -(-problem.c // numeric.lanes)
    # Tasks are vectors of channels where there are enough of them, which transform their weights once.
    wanted = max(1, -(-_TASKS * threads // (vectors * problem.n * -(-columns.count // (blocks * BLOCK)))))
    tile_rows = -(-rows.count // wanted)
    while tile_rows > 8 and _tile_bytes(entry, tile_rows, taps, blocks, groups) > target.l2 * 3 // 4:
        tile_rows = -(-tile_rows // 2)
    tile_rows = -(-tile_rows // abreast) * abreast
    chunk = max(4, target.l1 * 5 // 8 // ((blocks + 2 * groups) * entry))
    return Config(block, abreast, pieces, blocks, tile_rows, even_parts(taps, chunk)[0], _cycles(problem, numeric, threads, axes, groups))


def _cycles(problem: ConvProblem, numeric: Numeric, threads: int, axes: tuple[Line, Line], groups: int) -> float:
    """Half a cycle for each product of vectors, in kernel rows that meet the image and groups of taps that do; what the transforms take was fitted."""
    rows, columns = axes
    blocks, inputs = -(-columns.count // BLOCK), -(-columns.count // BLOCK) + groups - 1
    first, last = columns.inside() if columns.mode == "zeros" else (0, columns.length(columns.count))
    low, high = _blocks_met(first, last)
    met = sum(max(0, min(blocks, high - g) - max(0, low - g)) for g in range(groups))
    products = _rows_met(rows) * met * POINTS / 2
    moved = rows.size * inputs * _INPUT_CYCLES + rows.count * blocks * _OUTPUT_CYCLES
    return (problem.n * (products + moved) + problem.r * groups * _FILTER_CYCLES) * -(-problem.c // numeric.lanes) / threads


def _blocks_met(first: int, last: int) -> tuple[int, int]:
    """The first block of inputs that has one of the columns ``first`` to ``last - 1`` among its seven, and the one after the last."""
    return max(0, -(-(first - 2 * BLOCK + 2) // BLOCK)), -(-last // BLOCK)


def _rows_met(rows: Line) -> float:
    """Pairs of an output row and a kernel row that meets the image."""
    ranges = rows.tap_ranges()[0]
    return float((ranges[:, 1] - ranges[:, 0]).sum())


class DepthwiseWinograd:
    """The implementation; see the module's text."""

    name = "depthwise_winograd"

    def plan(self, problem: ConvProblem, threads: int) -> CpuPlan:
        """A plan for forward or grad_input; raises :class:`Unsupported` for what it does not take or where sums of plain products are predicted faster."""
        target, view = targets.target(), _view(problem)
        reason = _refusal(view)
        if reason is not None:
            raise Unsupported(reason)
        axes = lines(view, reduce_columns=False)
        if options.current().implementation != self.name and not _pays(problem, target, axes):
            raise Unsupported("the transforms cost more than they save")
        return build_plan(problem, target, threads, choose(view, target, threads, axes), self.name)


DEPTHWISE_WINOGRAD = DepthwiseWinograd()


def _view(problem: ConvProblem) -> ConvProblem:
    """The problem as the kernel sees it: of a tall kernel in nhwc, where pixels are as far apart along a column as they like, with rows for columns."""
    if problem.format != "nhwc" or problem.r <= problem.s:
        return problem
    left, right, top, bottom = problem.padding
    return replace(
        problem, h=problem.w, w=problem.h, r=problem.s, s=problem.r, padding=(top, bottom, left, right), stride=problem.stride[::-1],
        dilation=problem.dilation[::-1],
    )  # fmt: skip


def _refusal(problem: ConvProblem) -> str | None:
    if not problem.depthwise or problem.empty:
        return "not depthwise: it takes one input channel a group, and more than one group"
    if problem.direction == "grad_weight":
        return "forward and grad_input only"
    if problem.kg != 1 or problem.stride != (1, 1) or problem.dilation != (1, 1):
        return "only stride 1, dilation 1 and one output channel a group"
    if problem.direction == "grad_input" and problem.padding_mode != "zeros":
        return "grad_input is computed for zero padding; the gradient of another padding is folded outside"
    if problem.dtype == "f64":
        return "not float64: the transforms round whole numbers"
    if options.current().precision == "strict":
        return "precision is strict"
    if problem.s < _LEAST_COLUMNS:
        return f"fewer than {_LEAST_COLUMNS} columns of taps: little is saved"
    if error_bound(problem.r, problem.s) > ERROR_LIMIT:
        return f"the error bound of {problem.r}x{problem.s} taps is above {ERROR_LIMIT:g}"
    return None


def _pays(problem: ConvProblem, target: Target, axes: tuple[Line, Line]) -> bool:
    """Whether plain sums are predicted to take longer, for one image on one thread: the choice decides bits."""
    view = replace(_view(problem), n=1)
    if view.r < _LEAST_ROWS:
        return False
    numeric = Numeric(problem.dtype, target)
    one = replace(problem, n=1)
    own = _cycles(view, numeric, 1, axes, _groups(axes[1]))
    plain = predicted_cycles(one, numeric.lanes, 1)
    if problem.s <= _READ_FROM_MEMORY:
        return plain > _MARGIN * own
    # columns of padding are multiplied there
    rows, columns = lines(problem, reduce_columns=False)
    padding = _rows_met(rows) * columns.count * problem.s - multiplications(one) / problem.c
    return plain + padding / 2 * problem.c / numeric.lanes > _LEAST * own


def build_plan(problem: ConvProblem, target: Target, threads: int, config: Config, name: str) -> CpuPlan:
    """Tables, kernel and argument block of a configuration."""
    asked, problem = problem, _view(problem)
    rows, columns = lines(problem, reduce_columns=False)
    numeric = Numeric(problem.dtype, target)
    forward, size, groups = problem.direction == "forward", DTYPES[problem.dtype], _groups(columns)
    tail = problem.c % numeric.lanes != 0
    col_tiles, row_tiles = -(-columns.count // (config.blocks * BLOCK)), -(-rows.count // config.rows)
    first, last = inside(columns, problem.format)
    reach = _blocks_met(first, last) if col_tiles == 1 and config.blocks == config.block else None
    kernel = DepthwiseWinogradKernel(
        target, problem.dtype, problem.format, tail, problem.epilogue.bias and forward, config.block, config.abreast, config.pieces,
        reach if columns.mode == "zeros" else None,
    )  # fmt: skip
    entry = numeric.lanes * numeric.compute_bytes
    vectors, inputs = -(-problem.c // numeric.lanes), config.blocks + groups - 1
    tiles = problem.n * row_tiles * col_tiles
    slices = min(tiles, -(-_TASKS * threads // vectors))
    row_bytes = odd_lines((inputs * BLOCK + BLOCK - 1 + numeric.lanes) * entry)
    v_row, m_row = inputs * entry, config.blocks * entry
    v_point, m_point = odd_lines((config.rows + problem.r - 1) * v_row), odd_lines(config.rows * m_row)
    u_at = max(row_bytes, problem.r * groups * BLOCK * entry)
    v_at = u_at + POINTS * problem.r * groups * entry
    m_at = v_at + POINTS * v_point
    out_at = m_at + POINTS * m_point
    scratch_size = align(out_at + (1 + config.blocks * BLOCK + numeric.lanes) * entry, 4096) + 64
    slack = config.rows + problem.r
    ranges = np.concatenate([rows.tap_ranges()[0], np.tile([problem.r, 0], (slack, 1))])
    turns = -(-(row_tiles * config.rows) // config.abreast)
    joined = ranges[: turns * config.abreast].reshape(turns, config.abreast, 2)
    joined = np.stack([joined[:, :, 0].min(axis=1), joined[:, :, 1].max(axis=1)], axis=1).astype(np.int64)
    taps = np.array([(r, s) for r in rows.phases[0].taps for s in columns.phases[0].taps])
    order = np.zeros(problem.r * problem.s, np.int64)
    memory = taps[:, 0] * problem.s + taps[:, 1] if problem is asked else taps[:, 1] * problem.r + taps[:, 0]
    order[memory] = [(i // problem.s * groups * BLOCK + i % problem.s) * entry for i in range(len(taps))]
    tables = {
        "place_table": order, "row_table": _needed(rows.table(slack), joined, config.abreast), "zero_table": np.zeros(1, np.int64),
        "col_table": columns.table((inputs + 1) * BLOCK + config.blocks * BLOCK),
        "range_table": joined,
    }  # fmt: skip
    tables = {key: np.ascontiguousarray(table) for key, table in tables.items()}
    source = image_strides("source", problem.format, problem.c, rows.size, columns.size, size)
    out = image_strides("out", problem.format, problem.c, rows.outputs, columns.outputs, size)
    if problem is not asked:
        pixel = problem.c * size
        source |= {"source_row": pixel, "source_channel": rows.size * pixel}
        out |= {"out_row": pixel, "out_channel": rows.outputs * pixel}
    values = {
        **{key: table.ctypes.data for key, table in tables.items()},
        "tasks": slices * vectors, "vectors": vectors, "tiles": tiles, "slice_tiles": -(-tiles // slices), "lanes_total": problem.c,
        "kernel_size": problem.r * problem.s, "r": problem.r, "groups": groups, "scratch_size": scratch_size,
        "row_tiles": row_tiles, "col_tiles": col_tiles, "tile_rows": config.rows,
        "tile_blocks": config.blocks, "row_count": rows.count, "col_count": columns.count, "parts": config.blocks // config.block,
        "chunk": config.chunk, "inside_first": first, "inside_last": last,
        "u_at": u_at, "v_at": v_at, "v_point": v_point, "v_row": v_row, "m_at": m_at, "m_point": m_point, "m_row": m_row, "out_at": out_at,
        **source, **out,
    }  # fmt: skip
    facts = {
        "along": "rows" if problem is asked else "columns", "tile": f"{config.rows}x{config.blocks * BLOCK}",
        "block": f"{config.abreast}x{config.block}", "chunk": config.chunk,
        "predicted_cycles": config.cycles, "error_bound": sum_error(error_bound(problem.r, problem.s), problem.dtype),
        "products": round(multiplications(problem) * POINTS * groups / (BLOCK * problem.s)),
    }  # fmt: skip
    block = ARGUMENTS.pack(threads, values)
    return CpuPlan(asked, name, load(kernel.name, target, kernel.emit), block, tuple(tables.values()), threads * scratch_size, facts)


def _needed(table: npt.NDArray[np.int64], ranges: npt.NDArray[np.int64], abreast: int) -> npt.NDArray[np.int64]:
    """The table of source rows, with -2 for rows outside the image that no block of output rows reads."""
    needed = np.zeros(len(table), bool)
    for turn, (low, high) in enumerate(ranges):
        needed[turn * abreast + low : (turn + 1) * abreast - 1 + high] = True
    return np.where((table < 0) & ~needed, -2, table)
