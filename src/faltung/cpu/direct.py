"""Direct convolution: any kernel, stride, dilation, groups, padding mode and type; forward and grad_input."""

from __future__ import annotations

import math
from dataclasses import dataclass


import numpy as np
import numpy.typing as npt

from ..codegen.load import load
from ..codegen.numeric import Numeric
from ..dispatch import Unsupported
from ..problem import DTYPES, ConvProblem
from . import target as targets
from .direct_kernel import ARGUMENTS, PHASE_FIELDS, DirectKernel
from .geometry import Axis, axes
from .plan import CpuPlan
from .target import Target
from .tiling import Block, choose_block, split_count, tile_candidates

__all__ = ["DIRECT", "Direct", "DirectConfig", "choose_config"]

_CHUNK_BYTES = 24 << 10  # of a panel: with the rows that it meets it stays in the first-level cache
_SLACK = 4096
_PLANE_BYTES = 512 << 10


@dataclass(frozen=True)
class Roles:
    """A problem as its gather sees it: ``forward`` gathers x for y, ``grad_input`` gathers the gradient of y for that of x."""

    problem: ConvProblem

    @property
    def forward(self) -> bool:
        return self.problem.direction == "forward"

    @property
    def source_channels(self) -> int:
        """Channels of a group that are gathered."""
        return self.problem.cg if self.forward else self.problem.kg

    @property
    def out_channels(self) -> int:
        """Channels of a group that are produced."""
        return self.problem.kg if self.forward else self.problem.cg

    @property
    def source_size(self) -> tuple[int, int]:
        return (self.problem.h, self.problem.w) if self.forward else (self.problem.p, self.problem.q)

    @property
    def out_size(self) -> tuple[int, int]:
        return (self.problem.p, self.problem.q) if self.forward else (self.problem.h, self.problem.w)


@dataclass(frozen=True)
class DirectConfig:
    """Tile and block sizes of one direct convolution; ``cycles`` is the predicted total of all cores."""

    orientation: str
    layout: str
    tile: tuple[int, int]
    block: Block
    chunk: int
    k_blocks: int
    cycles: float


def _tile_bytes(rows: Axis, columns: Axis, channels: int, size: int) -> int:
    return rows.scratch_starts[-1] * columns.scratch_starts[-1] * channels * size


def _counts(axis: Axis) -> tuple[int, ...]:
    """Outputs in a tile: of every phase, in a whole and in the last tile."""
    found = set()
    for phase in axis.phases:
        found.add(min(axis.tile, phase.count))
        found.add(phase.count - (phase.count - 1) // axis.tile * axis.tile if phase.count else 0)
        # A phase may end in the tile before the last one of the longest phase.
    return tuple(sorted(found - {0}))


def _pitch(columns: Axis) -> int:
    """Columns of one row of the ``outer`` layout."""
    return columns.tile + max((s.extent for s in columns.slabs), default=0)


def choose_config(problem: ConvProblem, target: Target, threads: int, orientation: str | None = None) -> DirectConfig:
    """The configuration predicted to be fastest; the orientation does not depend on the batch size, so neither do the bits."""
    found = [_choose_tile(problem, target, threads, o) for o in ((orientation,) if orientation else ("channels", "pixels"))]
    return min(found, key=lambda config: config.cycles / (config_tasks(problem, config)))


def config_tasks(problem: ConvProblem, config: DirectConfig) -> int:
    """A constant: images, so that orientations are compared per image."""
    return problem.n


def _choose_tile(problem: ConvProblem, target: Target, threads: int, orientation: str) -> DirectConfig:
    roles = Roles(problem)
    numeric = Numeric(problem.dtype, target)
    layout = "inner" if problem.format == "nhwc" and orientation == "channels" else "outer"
    whole_rows, whole_columns = axes(problem, (1, 1))
    budget = target.l2 * 2 // 5
    best: DirectConfig | None = None
    for tile_q in tile_candidates(whole_columns.count):
        wide = whole_columns.count // tile_q
        if best is not None and wide > 1 and _fits(problem, (1, best.tile[1]), roles.source_channels, numeric.compute_bytes, budget):
            break
        for tile_p in tile_candidates(whole_rows.count):
            tile = (tile_p, tile_q)
            if (tile_p > 1) and not _fits(problem, tile, roles.source_channels, numeric.compute_bytes, budget):
                continue
            config = _configure(problem, target, threads, orientation, layout, tile)
            if best is None or config.cycles < best.cycles:
                best = config
            if _small_enough(problem, tile, threads):
                break
    assert best is not None
    return best


def _small_enough(problem: ConvProblem, tile: tuple[int, int], threads: int) -> bool:
    """Whether smaller tiles would only add packing: there are tasks enough to share out evenly."""
    rows, columns = axes(problem, tile)
    tasks = problem.n * problem.g * -(-rows.count // tile[0]) * -(-columns.count // tile[1])
    return tasks >= 16 * threads


def _fits(problem: ConvProblem, tile: tuple[int, int], channels: int, size: int, budget: int) -> bool:
    return _tile_bytes(*axes(problem, tile), channels, size) <= budget


def _configure(problem: ConvProblem, target: Target, threads: int, orientation: str, layout: str, tile: tuple[int, int]) -> DirectConfig:
    """The best block for a tile, and the cost of the whole problem with it."""
    roles, numeric = Roles(problem), Numeric(problem.dtype, target)
    rows, columns = axes(problem, tile)
    lanes, size = numeric.lanes, numeric.compute_bytes
    tiles = -(-rows.count // tile[0]) * -(-columns.count // tile[1])
    reduction = sum(len(r.taps) * len(c.taps) for r in rows.phases for c in columns.phases) * roles.source_channels
    phases = len(rows.phases) * len(columns.phases)
    mean = reduction / max(1, phases)
    if orientation == "channels":
        vectors = -(-roles.out_channels // lanes)
        block = choose_block(target, _counts(columns), vectors, 192, round_vectors=False)
        # The counts that the block was chosen for are the distinct ones; scale to a whole tile's rows.
        per_step = block.cycles / len(_counts(columns)) * tile[0]
        store = tile[0] * tile[1] * phases * vectors * (2.0 if problem.format == "nchw" else 0.5)
        panels = _pieces(vectors, block.vectors)
    else:
        pixels = (tile[0] - 1) * _pitch(columns) + tile[1]
        block = choose_block(target, (roles.out_channels,), -(-pixels // lanes), 128, round_vectors=True)
        per_step = block.cycles
        store = tile[0] * tile[1] * phases * roles.out_channels / lanes * (1.0 if problem.format == "nchw" else 3.0) + roles.out_channels * tile[0] * 8
        panels = _pieces(roles.out_channels, block.rows)
    chunk = _chunk(orientation, block, lanes * size)
    scratch = rows.scratch_starts[-1] * columns.scratch_starts[-1] * roles.source_channels
    natural = (problem.format == "nchw") == (layout == "outer")
    pack = scratch / lanes * (2.0 if natural else 6.0) + rows.scratch_starts[-1] * len(columns.slabs) * (roles.source_channels if problem.format == "nchw" else 1) * 20.0
    each = per_step * mean * phases + store
    tasks = problem.n * problem.g * tiles
    k_blocks = min(panels, -(-2 * threads // tasks)) if tasks < 2 * threads else 1
    if orientation == "pixels":
        plane = len(columns.phases) * roles.out_channels * (pixels + 4 * lanes) * size
        k_blocks = max(k_blocks, min(panels, -(-plane // _PLANE_BYTES)))
    total = tasks * k_blocks
    cycles = math.ceil(total / threads) * threads * (pack + each / k_blocks + 300.0)
    return DirectConfig(orientation, layout, tile, block, chunk, k_blocks, cycles)


def _chunk(orientation: str, block: Block, vector_bytes: int) -> int:
    chunk = _CHUNK_BYTES // (block.vectors * vector_bytes)
    return max(32, min(384, chunk // 16 * 16))


def _pieces(total: int, size: int) -> int:
    return -(-total // size)


class Direct:
    """The implementation named ``direct``."""

    name = "direct"

    def plan(self, problem: ConvProblem, threads: int) -> CpuPlan:
        """A plan for forward or grad_input; raises :class:`Unsupported` for what it does not take."""
        if problem.direction == "grad_weight":
            raise Unsupported("grad_weight is direct_weight's")
        if problem.direction == "grad_input" and problem.padding_mode != "zeros":
            raise Unsupported("grad_input in this padding mode is padded_grad_input's")
        target = targets.target()
        return build_plan(problem, target, threads, choose_config(problem, target, threads), self.name)


DIRECT = Direct()


def build_plan(problem: ConvProblem, target: Target, threads: int, config: DirectConfig, name: str) -> CpuPlan:
    """Tables, kernel and argument block for a configuration."""
    roles, numeric = Roles(problem), Numeric(problem.dtype, target)
    rows, columns = axes(problem, config.tile)
    kernel = _kernel(problem, roles, numeric, config, rows, columns)
    layout = _Layout(problem, roles, numeric, config, kernel, rows, columns)
    tables = _Tables(problem, roles, layout, rows, columns)
    values = _values(problem, roles, numeric, config, kernel, layout, tables, rows, columns)
    block = ARGUMENTS.pack(threads, values)
    facts = {
        "orientation": config.orientation, "block": f"{config.block.rows}x{config.block.vectors}", "tile": f"{config.tile[0]}x{config.tile[1]}",
        "chunk": config.chunk, "tasks": values["tasks"], "predicted_cycles": config.cycles / threads,
    }  # fmt: skip
    workspace_bytes = values["scratch_at"] + threads * values["scratch_size"]
    return CpuPlan(problem, name, load(kernel.name, target, kernel.emit), block, tables.all, workspace_bytes, facts)


def _kernel(problem: ConvProblem, roles: Roles, numeric: Numeric, config: DirectConfig, rows: Axis, columns: Axis) -> DirectKernel:
    lanes, block = numeric.lanes, config.block
    partial = roles.out_channels % lanes != 0
    channels = config.orientation == "channels"
    # Without cheap masks a partial vector goes through scratch.
    in_place = channels and problem.format == "nhwc" and not numeric.converts and (not partial or numeric.target.isa in ("avx512", "avx2"))
    if channels:
        narrow_rows = any(split_count(count, block.rows)[1] for count in _counts(columns))
        narrow_vectors = bool(split_count(-(-roles.out_channels // lanes), block.vectors)[1])
    else:
        narrow_rows = bool(split_count(roles.out_channels, block.rows)[1])
        narrow_vectors = block.vectors > 1
    return DirectKernel(
        numeric.target, problem.dtype, problem.format, config.orientation, config.layout, min(columns.step, 3), block.rows, block.vectors,
        narrow_rows, narrow_vectors, partial and in_place, in_place, 1 if channels else max(1, len(columns.phases)),
    )  # fmt: skip


class _Layout:
    """Byte pitches of a thread's scratch and of the packed panels."""

    def __init__(
        self, problem: ConvProblem, roles: Roles, numeric: Numeric, config: DirectConfig, kernel: DirectKernel, rows: Axis, columns: Axis
    ) -> None:
        size, lanes = numeric.compute_bytes, numeric.lanes
        self.size = size
        self.inner = config.layout == "inner"
        self.pitch = _pitch(columns)
        scratch_rows = rows.scratch_starts[-1]
        if self.inner:
            self.column = roles.source_channels * size
            self.row = columns.scratch_starts[-1] * self.column
            self.channel = size
            tile = scratch_rows * self.row
        else:
            self.column = size
            self.row = self.pitch * size
            self.slab = scratch_rows * self.row
            self.channel = len(columns.slabs) * self.slab
            tile = roles.source_channels * self.channel
        self.c_at = _align(tile + _SLACK)
        if kernel.orientation == "channels":
            self.panels = _pieces(-(-roles.out_channels // lanes), kernel.vectors)
            self.wide = split_count(-(-roles.out_channels // lanes), kernel.vectors)[0]
            self.padded = -(-roles.out_channels // lanes) * lanes
            self.c_channel = 0
            c = 0 if kernel.in_place else config.tile[0] * config.tile[1] * kernel.vectors * lanes * size + lanes * kernel.vectors * lanes * size
        else:
            self.panels = _pieces(roles.out_channels, kernel.rows)
            self.wide = split_count(roles.out_channels, kernel.rows)[0]
            self.padded = roles.out_channels
            pixels = (config.tile[0] - 1) * self.pitch + config.tile[1]
            # Not a multiple of the page, where neighbouring planes would fall into the same cache sets.
            self.c_channel = _align((pixels + 4 * lanes) * size) + 64
            c = max(1, len(columns.phases)) * self.padded * self.c_channel
        self.scratch_size = _align(self.c_at + c + _SLACK) + 64 * 9


def _align(value: int) -> int:
    return -(-value // 64) * 64


class _Tables:
    """The tables that the argument block points to."""

    def __init__(self, problem: ConvProblem, roles: Roles, layout: _Layout, rows: Axis, columns: Axis) -> None:
        memory = DTYPES[problem.dtype]
        source_h, source_w = roles.source_size
        total = problem.c if roles.forward else problem.k
        row_pitch = source_w * memory * (total if problem.format == "nhwc" else 1)
        self.row_table = np.where(rows.table >= 0, rows.table * row_pitch, -1)
        self.row_positions = rows.table_positions
        self.column_table = columns.table
        starts = columns.scratch_starts
        self.slab_table = np.array(
            [
                (columns.table_start(i), starts[i] if layout.inner else i * layout.slab, columns.tile + slab.extent, *columns.interior(i), slab.offset)
                for i, slab in enumerate(columns.slabs)
            ],
            dtype=np.int64,
        )
        self.zeros = np.zeros(64, np.float64)
        self.offsets: list[npt.NDArray[np.int64]] = []
        self.phases = self._phases(problem, roles, layout, rows, columns)
        self.all = [self.row_table, self.row_positions, self.column_table, self.slab_table, self.zeros, self.phases, *self.offsets]

    def _phases(self, problem: ConvProblem, roles: Roles, layout: _Layout, rows: Axis, columns: Axis) -> npt.NDArray[np.int64]:
        weight = weight_strides(problem)
        packed = 0
        records = []
        channel = np.arange(roles.source_channels, dtype=np.int64)
        for row in rows.phases:
            for column in columns.phases:
                tile_parts, weight_parts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
                for a in row.taps:
                    for b in column.taps:
                        row_at = (rows.scratch_starts[a.slab] + a.shift) * layout.row
                        column_at = (columns.scratch_starts[b.slab] + b.shift) * layout.column if layout.inner else b.slab * layout.slab + b.shift * layout.column
                        tile_parts.append(row_at + column_at + channel * layout.channel)
                        weight_parts.append(a.kernel_index * weight[2] + b.kernel_index * weight[3] + channel * weight[1 if roles.forward else 0])
                weight_offsets = np.concatenate(weight_parts)
                order = np.argsort(weight_offsets, kind="stable")
                tile_offsets, weight_offsets = np.concatenate(tile_parts)[order], weight_offsets[order]
                self.offsets += [tile_offsets, weight_offsets]
                count = len(tile_offsets)
                spans = (row.start, row.count, column.start, column.count)
                records.append((count, tile_offsets.ctypes.data, weight_offsets.ctypes.data, packed, *spans))
                packed = _align(packed + problem.g * layout.padded * count * layout.size)
        self.packed_bytes = packed
        return np.array(records, dtype=np.int64).reshape(-1, len(PHASE_FIELDS))


def weight_strides(problem: ConvProblem) -> tuple[int, int, int, int]:
    """Byte strides of the weight's output channel, input channel, row and column."""
    _, c, r, s = problem.weight_shape
    strides = (c * r * s, r * s, s, 1) if problem.weight_format == "nchw" else (r * s * c, 1, s * c, c)
    memory = DTYPES[problem.dtype]
    return tuple(memory * x for x in strides)  # type: ignore[return-value]


def _values(
    problem: ConvProblem, roles: Roles, numeric: Numeric, config: DirectConfig, kernel: DirectKernel, layout: _Layout, tables: _Tables, rows: Axis, columns: Axis
) -> dict[str, int]:
    """The argument block's values by name."""
    memory, size = numeric.memory_bytes, numeric.compute_bytes
    source, out = _pitches(problem, roles, roles.forward), _pitches(problem, roles, not roles.forward)
    strides = weight_strides(problem)
    p_tiles, q_tiles = -(-rows.count // config.tile[0]), -(-columns.count // config.tile[1])
    weight_offsets = tables.offsets[1::2]
    contiguous = all(len(o) < 2 or bool((np.diff(o) == memory).all()) for o in weight_offsets)
    bias_at = _align(tables.packed_bytes)
    bias_group = layout.padded * size
    block_panels = -(-layout.panels // config.k_blocks)
    return {
        "channels": roles.source_channels, "source_channel": source[1], "source_column": source[3], "rows": rows.scratch_starts[-1],
        "row_positions": tables.row_positions.ctypes.data, "row_table": tables.row_table.ctypes.data, "slabs": len(columns.slabs),
        "slab_table": tables.slab_table.ctypes.data, "column_table": tables.column_table.ctypes.data, "tile_channel": layout.channel,
        "tile_row": layout.row, "tile_columns": columns.scratch_starts[-1], "zeros": tables.zeros.ctypes.data,
        "pack_tasks": len(tables.phases) * problem.g * layout.panels, "tasks": problem.n * problem.g * p_tiles * q_tiles * -(-layout.panels // block_panels),
        "phases": tables.phases.ctypes.data, "row_phases": len(rows.phases), "column_phases": len(columns.phases), "p_tiles": p_tiles, "q_tiles": q_tiles,
        "tile_p": config.tile[0], "tile_q": config.tile[1], "k_blocks": -(-layout.panels // block_panels), "block_panels": block_panels,
        "wide_panels": layout.wide, "panels": layout.panels, "groups": problem.g, "out_channels": roles.out_channels,
        "source_image": source[0], "source_group": source[1] * roles.source_channels, "out_image": out[0], "out_group": out[1] * roles.out_channels,
        "out_row": out[2], "out_column": out[3], "out_channel": out[1], "chunk": config.chunk, "weight_group": strides[0] * problem.kg,
        "weight_pitch": strides[0 if roles.forward else 1], "weight_contiguous": int(contiguous), "packed_panel": 1,
        "bias_at": bias_at, "bias_group": bias_group, "has_bias": int(problem.epilogue.bias and roles.forward),
        "scratch_at": -(-(bias_at + problem.g * bias_group + 64) // 4096) * 4096, "scratch_size": layout.scratch_size,
        "c_at": layout.c_at, "c_channel": layout.c_channel,
    }  # fmt: skip


def _pitches(problem: ConvProblem, roles: Roles, input_side: bool) -> tuple[int, int, int, int]:
    """Byte pitches (image, channel, row, column) of x and its gradient, or of y and its gradient."""
    channels, (height, width) = (problem.c, (problem.h, problem.w)) if input_side else (problem.k, (problem.p, problem.q))
    memory = DTYPES[problem.dtype]
    if problem.format == "nchw":
        return channels * height * width * memory, height * width * memory, width * memory, memory
    return channels * height * width * memory, memory, width * channels * memory, channels * memory


