"""Grouped convolution with few channels a group: plans of the kernels whose vectors span several groups."""

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
from .geometry import Axis, axes
from .grouped_kernel import ARGUMENTS, PHASE_FIELDS, GroupedKernel, Shapes
from .grouped_lanes import Chunk, GroupedTile, Lanes, chunks
from .grouped_weight import build_weight_plan
from .plan import CpuPlan
from .target import Target
from .tile import align, pitches, weight_strides
from .tiling import split, split_count, tile_candidates

__all__ = ["GROUPED", "Grouped", "GroupedConfig", "choose_config", "lanes_of"]

_SLACK = 4096
_STRIDED_VECTORS = 16
_PARTS, _MOST_READ = 2, 32  # vectors of a group's results, and channels that it reads
_WHOLE_PIXELS = 1024  # 64 KB with 16 float32 lanes
_TERMS = 1024  # of one sum, a chain of roundings


@dataclass(frozen=True)
class GroupedConfig:
    """Tile (rows, columns of each phase), block of pixels in registers and taps that share a load; ``cycles`` is the predicted total of all cores."""

    tile: tuple[int, int]
    block: tuple[int, int]
    taps: int
    vectors: int
    cycles: float


def lanes_of(problem: ConvProblem, numeric: Numeric) -> Lanes:
    """The lanes over the channels that the direction produces (grad_weight: output channels)."""
    out, source = (problem.cg, problem.kg) if problem.direction == "grad_input" else (problem.kg, problem.cg)
    return Lanes.choose(numeric, out, source, problem.g)


def check(problem: ConvProblem, target: Target) -> Lanes:
    """The lanes; raises :class:`Unsupported` where they would not pay."""
    if problem.g == 1:
        raise Unsupported("one group: there are no lanes to share")
    if problem.depthwise:
        raise Unsupported("one channel a group is depthwise's")
    if problem.direction == "grad_input" and problem.padding_mode != "zeros":
        raise Unsupported("grad_input in this padding mode is padded_grad_input's")
    numeric = Numeric(problem.dtype, target)
    out, source = (problem.cg, problem.kg) if problem.direction == "grad_input" else (problem.kg, problem.cg)
    lanes = lanes_of(problem, numeric)
    single = lanes.single and problem.direction != "grad_weight"
    if out > numeric.lanes and not (single and out % numeric.lanes == 0 and out <= _PARTS * numeric.lanes):
        raise Unsupported(f"{out} channels of a group are more than a vector's {numeric.lanes} lanes")
    most = _MOST_READ if single else 16
    if source > most:
        raise Unsupported(f"a group reads {source} channels, more than {most}")
    if problem.r * problem.s * source > _TERMS:
        raise Unsupported(f"sums of {problem.r * problem.s * source} terms are longer than {_TERMS}")
    strided_gradient = problem.direction == "grad_input" and max(problem.stride) > 1
    if numeric.pairs and problem.direction != "grad_weight" and (source >= 12 or (problem.format == "nchw" and source >= 8 and not strided_gradient)):
        # Measured on 16 channels a group 1.3 to 1.8 times as fast, on 8 channels in nchw 1.05 to 1.2 times.
        raise Unsupported("direct multiplies pairs of bfloat16, which is faster here")
    if single and lanes.parts > 1 and problem.format == "nhwc" and target.full_rate:
        # One image of 7x7 and 14x14 0.64 to 0.85 of the time (float32, float64 and 16-bit types), larger ones and batches 0.9 to 1.03.
        raise Unsupported("direct fills whole vectors of such groups too, and packs fewer weights at a time")
    if lanes.source_width > 4 * lanes.lanes:
        raise Unsupported(f"a vector's groups read {lanes.source_width} channels, more than four vectors")
    if lanes.efficiency < 0.5:
        raise Unsupported("too few groups to fill a vector's lanes")
    return lanes


def counts(axis: Axis) -> tuple[int, ...]:
    """Outputs in a tile: of every phase, in a whole and in the last tile."""
    found = set()
    for phase in axis.phases:
        found.add(min(axis.tile, phase.count))
        found.add(phase.count - (phase.count - 1) // axis.tile * axis.tile if phase.count else 0)
    return tuple(sorted(found - {0}))


def _accumulators(target: Target, taps: int) -> int:
    """Most accumulators of a block: the registers less the weights of one channel, a broadcast and the next one (a product where there is no fused one).

    More than 16 were never faster: 1 x 14 pixels ran 5 to 10 % faster than 1 x 19, 1 x 28 and 2 x 10.
    """
    return min(16, target.registers - taps - (2 if target.fma else 3))


def _choose_block(target: Target, unit: int, taps: int, rows: tuple[int, ...], columns: tuple[int, ...]) -> tuple[int, int]:
    """The block (rows, columns) of fewest cycles for tiles of so many rows and columns."""
    limit = _accumulators(target, taps)
    best, least = (1, 1), math.inf
    for m in range(1, min(limit, max(columns, default=1)) + 1):
        if not all(split(total, m) for total in columns):
            continue
        for b in range(1, min(4, limit // m, max(rows, default=1)) + 1):
            if not all(split(total, b) for total in rows):
                continue
            cycles = 0.0
            for total_rows in rows:
                for total in columns:
                    pieces = -(-total_rows // b) * -(-total // m)
                    work = total_rows * total * taps * unit / 2
                    halo = -(-total // m) * total_rows * (taps - 1) * unit / 2
                    cycles += max(work, pieces * 4.0 * taps * unit) + halo + pieces * (unit * taps / 2 + 4.0)
            if cycles < least:
                best, least = (b, m), cycles
    return best


def choose_config(problem: ConvProblem, target: Target, threads: int) -> GroupedConfig:
    """The configuration predicted to be fastest.  No choice changes the order of any sum, so none changes the bits."""
    numeric = Numeric(problem.dtype, target)
    lanes = lanes_of(problem, numeric)
    taps = 7 if target.registers >= 32 else 4
    whole_rows, whole_columns = axes(problem, (1, 1))
    budget = target.l2 * 2 // 5
    best: GroupedConfig | None = None
    for tile_q in tile_candidates(whole_columns.count):
        for tile_p in tile_candidates(whole_rows.count):
            rows, columns = axes(problem, (tile_p, tile_q))
            entries = rows.scratch_starts[-1] * columns.scratch_starts[-1] * lanes.planes
            if entries * numeric.lanes * numeric.compute_bytes > budget and (tile_p, tile_q) != (1, 1):
                continue
            if _strided(problem) and tile_p > 1 and _touched(problem, lanes, rows) > target.l2 * 7 // 8:
                continue
            config = _configure(problem, target, threads, lanes, taps, rows, columns)
            if best is None or config.cycles < best.cycles:
                best = config
        if best is not None:
            break
    assert best is not None
    return best


def _strided(problem: ConvProblem) -> bool:
    """Whether memory, not arithmetic, decides the time: many source pixels or many results for each multiplication, in pieces of a cache line."""
    return problem.format == "nhwc" and max(problem.stride) > 1


def _touched(problem: ConvProblem, lanes: Lanes, rows: Axis) -> int:
    """Bytes of both images between the first and the last row that a tile of ``rows`` reads and writes, for the channels of a task."""
    vectors = min(_STRIDED_VECTORS, lanes.vectors)
    forward = problem.direction == "forward"
    columns = (problem.w, problem.q) if forward else (problem.q, problem.w)
    read, written = rows.scratch_starts[-1], rows.tile * len(rows.phases)
    return (read * columns[0] * lanes.source_width + written * columns[1] * lanes.width) * vectors * DTYPES[problem.dtype]


def _configure(problem: ConvProblem, target: Target, threads: int, lanes: Lanes, taps: int, rows: Axis, columns: Axis) -> GroupedConfig:
    used = max((len(c.shape) for phase in columns.phases for c in chunks(phase.taps, taps)), default=1)
    block = _choose_block(target, lanes.source if lanes.interleaved else lanes.unit, used, counts(rows), counts(columns))
    scratch = rows.scratch_starts[-1] * columns.scratch_starts[-1]
    row_taps, column_taps = sum(len(p.taps) for p in rows.phases), sum(len(p.taps) for p in columns.phases)
    pixels = rows.tile * columns.tile
    pieces = -(-rows.tile // block[0]) * -(-columns.tile // block[1])
    work = pixels * row_taps * column_taps * lanes.source / 2 * (1.0 + 1.0 / block[1])
    overhead = pieces * len(rows.phases) * len(columns.phases) * 60.0 + pixels * len(rows.phases) * len(columns.phases) * 2.0
    pack = scratch * (2.0 + 1.5 * lanes.planes + (4.0 if problem.format == "nchw" else 0.0)) + rows.scratch_starts[-1] * len(columns.slabs) * 20.0
    tiles = problem.n * -(-rows.count // rows.tile) * -(-columns.count // columns.tile)
    # Neighbouring vectors of channels share cache lines or neighbours of them, as long as there are tasks enough to share out.
    # Strided layers in nhwc take as many as there are, in tiles of a few rows that stay in the cache meanwhile: 256 channels in groups of 8 at 56x56 to 28x28
    # take 2.4 instead of 2.9 ms forward and 1.9 instead of 3.5 ms for the input's gradient; at stride 1 nothing is gained.
    vectors = max(1, min(_STRIDED_VECTORS if _strided(problem) else 4, lanes.vectors, tiles * lanes.vectors // (8 * threads)))
    vectors = -(-vectors // lanes.parts) * lanes.parts
    tasks = tiles * -(-lanes.vectors // vectors)
    cycles = math.ceil(tasks / threads) * threads * vectors * (work + overhead + pack + 400.0)
    return GroupedConfig((rows.tile, columns.tile), block, taps, vectors, cycles)


class _Phases:
    """Phases as records of the kernel, with the tables that they point to."""

    def __init__(self, problem: ConvProblem, lanes: Lanes, config: GroupedConfig, tile: GroupedTile, rows: Axis, columns: Axis) -> None:
        strides, numeric = weight_strides(problem), Numeric(problem.dtype, targets.target())
        channel = strides[0] if problem.direction == "grad_input" else strides[1]
        forward, memory = problem.direction == "forward", DTYPES[problem.dtype]
        neighbours = problem.weight_format == "nchw"
        self.weights = "runs" if forward or neighbours else "vectors" if lanes.single else "terms"
        # A run: all weights of an output channel, or (grad_input) those of one output channel and one input channel.
        self.runs, self.run_length = (1, problem.cg * problem.r * problem.s) if forward else (problem.kg, problem.r * problem.s)
        self._run_offsets = (np.arange(self.runs)[:, None] * strides[0] + np.arange(self.run_length) * memory).reshape(-1)
        parts = [chunks(phase.taps, config.taps) for phase in columns.phases]
        shapes: list[Shapes] = [tuple(dict.fromkeys(chunk.shape for chunk in part)) for part in parts]
        self.kinds = tuple(dict.fromkeys(shapes))
        self.tables: list[npt.NDArray[np.int64]] = []
        self.packed_bytes = 0
        most = max((len(kind) for kind in self.kinds), default=0)
        records = []
        for row in rows.phases:
            for column, part, mine in zip(columns.phases, parts, shapes, strict=True):
                weights: list[int] = []
                tail: list[int] = []
                for shape in mine:
                    offsets = []
                    for chunk in (c for c in part if c.shape == shape):
                        for tap in row.taps:
                            for h, (plane, place) in enumerate(lanes.steps(numeric.compute_bytes)):
                                offsets.append(tile.offset(tap, chunk, plane) + place)
                                weights += self._terms(lanes, chunk, tap.kernel_index * strides[2], strides[3], channel, h)
                    table = np.array(offsets, dtype=np.int64)
                    self.tables.append(table)
                    tail += [len(offsets), table.ctypes.data]
                table = np.array(weights, dtype=np.int64)
                if self.weights == "runs":
                    order = np.searchsorted(self._run_offsets, table)
                    table = np.full(len(self._run_offsets), -1, np.int64)
                    table[order] = np.arange(len(order)) * tile.vector
                self.tables.append(table)
                head = (self.kinds.index(mine), len(weights), table.ctypes.data, self.packed_bytes, row.start, row.count, column.start, column.count)
                records.append([*head, *tail, *[0] * (2 * (most - len(mine)))])
                self.packed_bytes = align(self.packed_bytes + lanes.vectors * len(weights) * tile.vector)
        self.size = 8 * (len(PHASE_FIELDS) + 2 * most)
        self.records = np.array(records, dtype=np.int64)

    @staticmethod
    def _terms(lanes: Lanes, chunk: Chunk, row: int, column: int, channel: int, plane: int) -> list[int]:
        """The weight's byte offsets of one step of the kernel, in its order."""
        return [row + s * column + (plane * lanes.unit + j) * channel for j in range(lanes.unit) for s in chunk.kernel]


class Grouped:
    """The implementation named ``grouped``."""

    name = "grouped"

    def plan(self, problem: ConvProblem, threads: int) -> CpuPlan:
        """A plan for any direction; raises :class:`Unsupported` for what it does not take."""
        target = targets.target()
        lanes = check(problem, target)
        if problem.direction == "grad_weight":
            return build_weight_plan(problem, target, threads, lanes, self.name)
        return build_plan(problem, target, threads, choose_config(problem, target, threads), self.name)


GROUPED = Grouped()


def whole_planes(fmt: str, rows: Axis, columns: Axis, lanes: int) -> bool:
    """Whether planes are transposed as wholes: where their rows are short or every second column is read, rows one by one fill few lanes."""
    one = rows.tile == rows.count and columns.tile == columns.count
    return fmt == "nchw" and one and (columns.size < 2 * lanes or columns.step > 1) and rows.size * columns.size <= _WHOLE_PIXELS


def build_plan(problem: ConvProblem, target: Target, threads: int, config: GroupedConfig, name: str = "grouped") -> CpuPlan:
    """Tables, kernel and argument block of a configuration."""
    numeric = Numeric(problem.dtype, target)
    lanes = lanes_of(problem, numeric)
    forward = problem.direction == "forward"
    rows, columns = axes(problem, config.tile)
    vector = numeric.lanes * numeric.compute_bytes
    source, out = pitches(problem, forward), pitches(problem, not forward)
    whole = whole_planes(problem.format, rows, columns, numeric.lanes)
    tile = GroupedTile(rows, columns, lanes.planes, vector, source, lanes.expansion().loads if whole else 0)
    phases = _Phases(problem, lanes, config, tile, rows, columns)
    kernel = GroupedKernel(
        target, problem.dtype, problem.format, lanes.out, lanes.source, lanes.unit, lanes.partial, phases.kinds, min(columns.step, 3), *config.block,
        any(split_count(count, config.block[0])[1] for count in counts(rows)), any(split_count(count, config.block[1])[1] for count in counts(columns)),
        lanes.interleaved, whole, phases.weights,
    )  # fmt: skip
    out_rows, out_columns = (problem.p, problem.q) if forward else (problem.h, problem.w)
    p_tiles, q_tiles = -(-rows.count // config.tile[0]), -(-columns.count // config.tile[1])
    c_width = out_columns if q_tiles == 1 else config.tile[1] * len(columns.phases)
    c_at = align(tile.bytes + vector)
    c_bytes = 0 if problem.format == "nhwc" else (config.tile[0] * len(rows.phases) * c_width + numeric.lanes) * vector
    strides = weight_strides(problem)
    lane = np.arange(lanes.width, dtype=np.int64)
    lane_offsets = lane // lanes.out * (problem.kg * strides[0]) + lane % lanes.out * strides[0 if forward else 1]
    scratch_at = align(phases.packed_bytes + lanes.vectors * vector, 4096)
    # An odd number of cache lines, so that the threads' scratch does not fall on the same places of the shared cache.
    scratch_size = align(c_at + c_bytes + _SLACK) + 64 * 9
    tiles = problem.n * p_tiles * q_tiles
    vector_blocks = -(-lanes.vectors // config.vectors)
    tasks = tiles * vector_blocks
    values = {
        **tile.arguments("source_"),
        "pack_tasks": len(phases.records) * lanes.vectors, "tasks": tasks, "vectors": lanes.vectors, "vector_blocks": vector_blocks,
        "block_vectors": config.vectors, "phases": phases.records.ctypes.data,
        "phase_bytes": phases.size, "row_phases": len(rows.phases), "column_phases": len(columns.phases), "p_tiles": p_tiles, "q_tiles": q_tiles,
        "tile_p": config.tile[0], "tile_q": config.tile[1], "source_channels": problem.g * lanes.source, "out_channels": problem.g * lanes.out,
        "source_image": source[0], "out_image": out[0], "out_rows": out_rows, "out_columns": out_columns, "out_row": out[2], "out_column": out[3],
        "out_channel": out[1], "weight_vector": lanes.per_vector * problem.kg * strides[0], "weight_part": lanes.lanes * strides[0 if forward else 1],
        "runs": phases.runs, "run_length": phases.run_length, "run_pitch": strides[0],
        "lane_offsets": lane_offsets.ctypes.data,
        "bias_at": phases.packed_bytes, "has_bias": int(problem.epilogue.bias and forward), "scratch_at": scratch_at, "scratch_size": scratch_size,
        "c_at": c_at, "c_width": c_width, "prefetch_rows": -(-rows.scratch_starts[-1] // config.tile[0]),
    }  # fmt: skip
    facts = {
        "block": f"{config.block[0]}x{config.block[1]}", "tile": f"{config.tile[0]}x{config.tile[1]}", "unit": lanes.unit, "tasks": tasks,
        "predicted_cycles": config.cycles / threads,
    }  # fmt: skip
    tables = [*tile.tables, *phases.tables, phases.records, lane_offsets]
    block = ARGUMENTS.pack(threads, values)
    return CpuPlan(problem, name, load(kernel.name, target, kernel.emit), block, tables, scratch_at + threads * scratch_size, facts)
