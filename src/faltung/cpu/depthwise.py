"""Depthwise convolution: one input channel a group, any kernel size, stride, dilation, padding and channel multiplier.

Vector lanes are channels in both formats: a tile of the image is copied into scratch as vectors of channels (transposed on the way for
nchw, converted for 16-bit types, padded by the tables of indices), and the taps are multiplied out of the scratch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..codegen.emit import Function, Module, Value
from ..codegen.entry import ArgumentBlock, Task, emit_entry
from ..codegen.load import load
from ..codegen.numeric import Numeric
from ..dispatch import Unsupported
from ..problem import DTYPES, ConvProblem
from . import target as targets
from .depthwise_geometry import Line, lines
from .depthwise_taps import block_pixels, emit_taps
from .depthwise_tile import Lanes, emit_flush, emit_load, image_strides, inside, odd_lines
from .depthwise_weight import plan_weight
from .plan import CpuPlan
from .target import Target

__all__ = ["DEPTHWISE", "Depthwise"]

ARGUMENTS = ArgumentBlock((
    # stage 0: weights and bias into vectors
    "pack_tasks", "pack_vectors", "vectors_total", "taps", "kernel_size", "tap_table", "bias_at",
    # stage 1: tiles
    "tiles", "chunks", "row_tiles", "col_tiles", "chunk", "tile_rows", "tile_cols", "scratch_at", "scratch_bytes", "out_row_at",
    "lanes_total", "multiplier", "residues", "pitch", "plane", "residue_plane",
    "row_table", "row_step", "row_extent", "row_spacing", "col_table", "col_step", "col_extent", "inside_first", "inside_last",
    "row_phases", "row_phase_table", "col_phase_table", "weight_table", "range_table", "row_count", "col_count", "col_phases", "col_groups",
    "source_image", "source_row", "source_channel", "out_image", "out_row", "out_channel", "out_row_step", "out_col_step", "out_cols",
))  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """What a kernel of ``forward`` or ``grad_input`` is generated from.

    ``columns``: the numbers of column taps that occur, one loop each; ``block``: pixels of a register block; ``step`` and ``spacing``:
    distance of pixels and of column taps in scratch entries.
    """

    lanes: Lanes
    columns: tuple[int, ...]
    block: int
    step: int
    spacing: int
    bias: bool

    @property
    def name(self) -> str:
        numeric = self.lanes.numeric
        columns = "_".join(map(str, self.columns))
        parts = ("depthwise_gather", numeric.dtype, self.lanes.name, f"s{columns}", f"st{self.step}d{self.spacing}", f"b{self.block}")
        return "_".join((*parts, *(("bias",) if self.bias else ()), numeric.target.isa))


def emit_gather(spec: Spec) -> str:
    """The kernel of ``forward`` and ``grad_input``.

    Stage 0, for each vector of lanes: weights to ``[residue][tap][lane]`` in the compute type, taps in the order of the phases; bias to ``[lane]``.
    Stage 1, for each tile ``(image, rows, columns, chunk of vectors)``: load the scratch, then for each row phase, row, vector, column phase:
    blocks of ``block`` pixels times all taps, stored to nhwc memory, or to a scratch row that is transposed to nchw.
    """
    module = Module()
    lanes = spec.lanes
    loader = emit_load(module, lanes, "load_tile", zero_rows=False)
    flush = emit_flush(module, lanes, "flush_row") if lanes.format == "nchw" else None
    taps = [emit_taps(module, lanes, s, spec.step, spec.spacing, spec.block, spec.bias) for s in spec.columns]

    def pack(f: Function, task: Task) -> object:
        return lambda index: _pack(f, task, spec, index)

    def tile(f: Function, task: Task) -> object:
        return lambda index: _tile(f, task, spec, index, loader, flush, taps)

    emit_entry(module, ARGUMENTS, [("pack_tasks", pack), ("tiles", tile)])  # type: ignore[list-item]
    return str(module)


def _pack(f: Function, task: Task, spec: Spec, index: Value) -> None:
    """Weights (and bias) of some vectors, lane by lane; lanes behind the last one become zero."""
    numeric, entry = spec.lanes.numeric, spec.lanes.entry_bytes
    count = numeric.lanes
    residues, taps, total = task["residues"], task["taps"], task["lanes_total"]
    first = index * task["pack_vectors"]
    last = f.minimum(first + task["pack_vectors"], task["vectors_total"])

    def vector(v: Value) -> None:
        def lane(i: Value) -> None:
            number = v * count + i

            def residue(j: Value) -> None:
                target = task.workspace + ((v * residues + j) * taps * entry + i * numeric.compute_bytes)
                source = task.operand("other") + (number * residues + j) * task["kernel_size"] * numeric.memory_bytes

                def tap(t: Value) -> None:
                    f.store(numeric.load(f, source + f.load_index(task.table("tap_table"), t) * numeric.memory_bytes, 1), target + t * entry)

                f.branch(
                    number < total,
                    lambda: _ignore(f.loop(0, taps, 1, tap)),
                    lambda: _ignore(f.loop(0, taps, 1, lambda t: f.store(f.zero(numeric.compute), target + t * entry))),
                )

            f.loop(0, residues, 1, residue)
            if spec.bias:
                at = task.workspace + task["bias_at"] + v * entry + i * numeric.compute_bytes
                f.branch(
                    number < total,
                    lambda: f.store(numeric.load(f, task.operand("bias") + number * numeric.memory_bytes, 1), at),
                    lambda: f.store(f.zero(numeric.compute), at),
                )

        f.loop(0, count, 1, lane)

    f.loop(first, last, 1, vector)


def _ignore(_: object) -> None:
    """For calls whose result is not wanted, where a statement cannot stand."""


def _tile(f: Function, task: Task, spec: Spec, index: Value, loader: Function, flush: Function | None, taps: list[Function]) -> None:
    lanes = spec.lanes
    numeric = lanes.numeric
    if lanes.format == "nhwc":  # chunks of channels innermost: neighbours in memory
        chunk, rest = index % task["chunks"], index // task["chunks"]
    else:
        tiles = task["row_tiles"] * task["col_tiles"]
        rest, chunk = index % tiles, index // tiles % task["chunks"]
        rest = rest + index // (tiles * task["chunks"]) * tiles
    col0 = rest % task["col_tiles"] * task["tile_cols"]
    rest = rest // task["col_tiles"]
    row0 = rest % task["row_tiles"] * task["tile_rows"]
    image = rest // task["row_tiles"]
    vector0 = chunk * task["chunk"]
    start = vector0 * numeric.lanes
    vectors = f.minimum(task["chunk"], task["vectors_total"] - vector0)
    scratch = task.workspace + task["scratch_at"] + task.thread * task["scratch_bytes"]
    pitch, plane = task["pitch"], task["plane"]
    rows = (f.minimum(task["tile_rows"], task["row_count"] - row0) - 1) * task["row_step"] + task["row_extent"] + 1
    cols = (f.minimum(task["tile_cols"], task["col_count"] - col0) - 1) * task["col_step"] + task["col_extent"] + 1
    first_row, first_col = row0 * task["row_step"], col0 * task["col_step"]
    inside_first = f.minimum(f.maximum(task["inside_first"] - first_col, 0), cols)
    inside_last = f.maximum(f.minimum(task["inside_last"] - first_col, cols), inside_first)
    source = task.operand("source") + image * task["source_image"]

    def load_residue(j: Value) -> None:
        f.call(loader, [
            source, scratch + j * task["residue_plane"], task.table("row_table") + first_row * 8, rows, task.table("col_table") + first_col * 8, cols,
            inside_first, inside_last, start, vectors, task["lanes_total"], task["multiplier"], j, pitch, plane, task["source_row"],
            task["source_channel"],
        ])  # fmt: skip

    f.loop(0, task["residues"], 1, load_residue)
    _rows(f, task, spec, _Place(scratch, image, row0, col0, vector0, vectors), flush, taps)


@dataclass(frozen=True)
class _Place:
    """Where a task works: its scratch, image, first output of rows and columns (of each phase), first vector and number of vectors."""

    scratch: Value
    image: Value
    row0: Value
    col0: Value
    vector0: Value
    vectors: Value


def _rows(f: Function, task: Task, spec: Spec, at: _Place, flush: Function | None, taps: list[Function]) -> None:
    """Every row phase, row, vector and column phase of a tile."""
    lanes = spec.lanes
    numeric, entry = lanes.numeric, lanes.entry_bytes
    nhwc = lanes.format == "nhwc"
    pitch = task["pitch"]
    out = task.operand("out") + at.image * task["out_image"]
    out_row_scratch = at.scratch + task["out_row_at"]
    weight_bytes = task["residues"] * task["taps"] * entry
    pixel_bytes = task["out_channel"] if nhwc else f.value(entry)

    def phase(number: Value) -> None:
        record = task.table("row_phase_table") + number * 24
        start, count, shift = (f.load(record + 8 * i) for i in range(3))
        ranges = task.table("range_table") + (number * task["row_count"] + at.row0) * 16

        def row(i: Value) -> None:
            low, high = f.load(ranges + i * 16), f.load(ranges + i * 16 + 8)
            source = at.scratch + (i * task["row_step"] + shift) * pitch
            out_row = out + (start + (at.row0 + i) * task["out_row_step"]) * task["out_row"]

            def vector(v: Value) -> None:
                lane0 = (at.vector0 + v) * numeric.lanes
                base = out_row + lane0 * numeric.memory_bytes + at.col0 * task["out_col_step"] * pixel_bytes if nhwc else out_row_scratch
                weights = task.workspace + (at.vector0 + v) * weight_bytes
                bias = task.workspace + task["bias_at"] + (at.vector0 + v) * entry

                def column_phase(c: Value, function: Function) -> None:
                    col_record = task.table("col_phase_table") + c * 24
                    col_start, col_count, col_shift = (f.load(col_record + 8 * k) for k in range(3))
                    n = f.minimum(col_count - at.col0, task["tile_cols"])
                    tap_at = f.load_index(task.table("weight_table"), number * task["col_phases"] + c)
                    f.call(function, [
                        source + v * task["plane"] + col_shift * entry, weights + tap_at * entry, base + col_start * pixel_bytes, bias, n, low, high,
                        task["row_spacing"] * pitch, pixel_bytes * task["out_col_step"], task["lanes_total"] - lane0, task["residues"],
                        task["residue_plane"], task["taps"] * entry,
                    ])  # fmt: skip

                for g, function in enumerate(taps):
                    bounds = task.table("col_groups") + 8 * g
                    f.loop(f.load(bounds), f.load(bounds + 8), 1, lambda c, function=function: column_phase(c, function))

            f.loop(0, at.vectors, 1, vector)
            if flush is not None:
                first = at.col0 * task["out_col_step"]
                cols = f.minimum(task["tile_cols"] * task["out_col_step"], task["out_cols"] - first)
                f.call(flush, [
                    out_row_scratch, out_row + first * numeric.memory_bytes, cols, at.vector0 * numeric.lanes, task["lanes_total"], task["out_channel"],
                ])  # fmt: skip

        f.loop(0, f.minimum(count - at.row0, task["tile_rows"]), 1, row)

    f.loop(0, task["row_phases"], 1, phase)


class Depthwise:
    """The implementation; see the module's text."""

    name = "depthwise"

    def plan(self, problem: ConvProblem, threads: int) -> CpuPlan:
        """A plan for a depthwise problem; raises Unsupported for others, and for ``grad_input`` of a padding mode other than zeros."""
        if not problem.depthwise:
            raise Unsupported("not depthwise: it takes one input channel a group, and more than one group")
        if problem.empty:
            raise Unsupported("an operand has no element")
        if problem.direction == "grad_weight":
            return plan_weight(self.name, problem, threads)
        if problem.direction == "grad_input" and problem.padding_mode != "zeros":
            raise Unsupported("grad_input is computed for zero padding; the gradient of another padding is folded outside")
        return _plan_gather(self.name, problem, threads)


DEPTHWISE = Depthwise()


def _lanes(problem: ConvProblem, target: Target) -> Lanes:
    numeric = Numeric(problem.dtype, target)
    forward = problem.direction == "forward"
    kind = "same" if problem.kg == 1 else "shared" if forward else "strided"
    return Lanes(numeric, problem.format, kind, (problem.k if forward else problem.c) % numeric.lanes != 0)


@dataclass(frozen=True)
class Tiling:
    """Outputs of a tile (of each phase), vectors of lanes together, pixels of a register block."""

    rows: int
    cols: int
    vectors: int
    block: int


def tiling(problem: ConvProblem, lanes: Lanes, lines_: tuple[Line, Line], target: Target, threads: int) -> Tiling:
    """A tile whose scratch takes at most half of the second-level cache, with several tasks for each thread where there is enough to do."""
    rows, cols = lines_
    entry, residues = lanes.entry_bytes, problem.kg if lanes.kind == "strided" else 1
    budget = target.l2 // 2 // entry
    total = -(-(problem.k if problem.direction == "forward" else problem.c) // lanes.numeric.lanes)
    tile_cols, tile_rows = cols.count, rows.count
    while tile_cols > 64 and cols.length(tile_cols) * rows.length(min(4, tile_rows)) * residues > budget:
        tile_cols = -(-tile_cols // 2)
    width = cols.length(tile_cols) * residues
    vectors = 1
    if lanes.format == "nhwc" and lanes.kind == "same":
        vectors = max(1, min(total, 4, budget // (width * rows.length(min(8, tile_rows)))))
        vectors = -(-total // -(-total // vectors))
    fitting = max(1, (budget // (width * vectors) - rows.extent - 1) // rows.step + 1)
    pieces = -(-tile_rows // min(fitting, tile_rows))
    others = problem.n * -(-total // vectors) * -(-cols.count // tile_cols)
    while others * pieces < 4 * threads and pieces < tile_rows // 4:
        pieces += 1
    tile_rows = -(-tile_rows // pieces)
    columns = max(len(phase.taps) for phase in cols.phases)
    block = block_pixels(target, min((p.count for p in cols.phases if p.count), default=1), columns)
    return Tiling(tile_rows, tile_cols, vectors, block)


def _plan_gather(name: str, problem: ConvProblem, threads: int) -> CpuPlan:
    target = targets.target()
    lanes = _lanes(problem, target)
    numeric = lanes.numeric
    rows, cols = lines(problem, reduce_columns=problem.format == "nhwc")
    tile = tiling(problem, lanes, (rows, cols), target, threads)
    # Column phases in the order of their number of taps: one loop for each number.
    phases = sorted(cols.phases, key=lambda phase: len(phase.taps))
    columns = tuple(sorted({len(phase.taps) for phase in phases}))
    spec = Spec(lanes, columns, tile.block, cols.step, cols.spacing, problem.epilogue.bias)
    kernel = load(spec.name, target, lambda: emit_gather(spec))
    tap_list, weight_starts = [], []
    for row in rows.phases:
        for col in phases:
            weight_starts.append(len(tap_list))
            tap_list += [r * problem.s + s for r in row.taps for s in col.taps]
    groups = [sum(len(p.taps) < c for p in phases) for c in columns] + [len(phases)]
    first, last = inside(cols, problem.format)
    tables = {
        "tap_table": np.array(tap_list, np.int64),
        "row_table": rows.table(),
        "col_table": cols.table(),
        "row_phase_table": np.array([(p.start, p.count, p.shift) for p in rows.phases], np.int64),
        "col_phase_table": np.array([(p.start, p.count, p.shift) for p in phases], np.int64),
        "weight_table": np.array(weight_starts, np.int64),
        "range_table": rows.tap_ranges(),
        "col_groups": np.array(groups, np.int64),
    }
    values = {key: table.ctypes.data for key, table in tables.items()}
    forward = problem.direction == "forward"
    total = problem.k if forward else problem.c
    vectors = -(-total // numeric.lanes)
    entry = lanes.entry_bytes
    residues = 1 if lanes.kind != "strided" else problem.kg
    weight_bytes = vectors * residues * len(tap_list) * entry
    pitch = odd_lines(cols.length(min(tile.cols, cols.count)) * entry)
    plane = odd_lines(pitch * rows.length(min(tile.rows, rows.count)))
    planes = plane * tile.vectors * residues
    out_row_at = planes + numeric.lanes * entry
    out_row_bytes = (tile.cols * cols.output_step + numeric.lanes) * entry if problem.format == "nchw" else 0
    scratch_bytes = -(-(out_row_at + out_row_bytes) // 4096) * 4096 + 64
    scratch_at = -(-(weight_bytes + vectors * entry) // 4096) * 4096
    tiles = (-(-rows.count // tile.rows), -(-cols.count // tile.cols), -(-vectors // tile.vectors))
    pack_vectors = max(1, 4096 // (numeric.lanes * residues * max(1, len(tap_list))))
    values |= {
        "pack_tasks": -(-vectors // pack_vectors), "pack_vectors": pack_vectors, "vectors_total": vectors, "taps": len(tap_list),
        "kernel_size": problem.r * problem.s, "bias_at": weight_bytes,
        "tiles": problem.n * tiles[0] * tiles[1] * tiles[2], "chunks": tiles[2], "row_tiles": tiles[0], "col_tiles": tiles[1], "chunk": tile.vectors,
        "tile_rows": tile.rows, "tile_cols": tile.cols, "scratch_at": scratch_at, "scratch_bytes": scratch_bytes, "out_row_at": out_row_at,
        "lanes_total": total, "multiplier": problem.kg, "residues": residues, "pitch": pitch, "plane": plane, "residue_plane": plane * tile.vectors,
        "row_step": rows.step, "row_extent": rows.extent, "row_spacing": rows.spacing,
        "col_step": cols.step, "col_extent": cols.extent, "inside_first": first, "inside_last": last,
        "row_phases": len(rows.phases), "row_count": rows.count, "col_count": cols.count, "col_phases": len(phases),
        "out_row_step": rows.output_step, "out_col_step": cols.output_step, "out_cols": cols.outputs,
    }  # fmt: skip
    size = DTYPES[problem.dtype]
    values |= image_strides("source", problem.format, problem.c if forward else problem.k, rows.size, cols.size, size)
    values |= image_strides("out", problem.format, total, rows.outputs, cols.outputs, size)
    block = ARGUMENTS.pack(threads, values)
    facts = {"tile": (tile.rows, tile.cols), "vectors": tile.vectors, "block": tile.block}
    return CpuPlan(problem, name, kernel, block, tuple(tables.values()), scratch_at + threads * scratch_bytes, facts)
