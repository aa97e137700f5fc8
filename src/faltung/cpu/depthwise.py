"""Depthwise convolution: one input channel a group, any kernel size, stride, dilation, padding and channel multiplier.

Vector lanes are channels in both formats: a tile of the image is copied into scratch as vectors of channels (transposed on the way for
nchw, converted for 16-bit types, padded by the tables of indices), and the taps are multiplied out of the scratch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from ..codegen.emit import Function, Module, Value
from ..codegen.entry import ArgumentBlock, Task, emit_entry
from ..codegen.load import load
from ..codegen.numeric import Numeric
from ..dispatch import Unsupported
from ..problem import DTYPES, ConvProblem
from . import target as targets
from .depthwise_few import plan_few, takes_few
from .depthwise_geometry import LinePhase, context_rows, lines, predicted_cycles
from .depthwise_taps import Reach, emit_taps
from .depthwise_tile import Lanes, emit_filters, emit_flush, emit_load, emit_load_planes, image_strides, inside, odd_lines
from .depthwise_tiling import asks_ahead, edges, reach_of, tiling
from .depthwise_weight import plan_weight
from .plan import CpuPlan
from .target import Target
from .tiling import place_scratch

__all__ = ["DEPTHWISE", "Depthwise"]

ARGUMENTS = ArgumentBlock((
    # stage 0: weights and bias into vectors
    "pack_tasks", "pack_vectors", "vectors_total", "taps", "kernel_size", "place_table", "bias_at", "at_use",
    # stage 1: tiles
    "tiles", "chunks", "row_tiles", "col_tiles", "chunk", "tile_rows", "tile_cols", "scratch_at", "scratch_size", "out_row_at",
    "lanes_total", "multiplier", "residues", "pixel", "residue_plane",
    "strip_rows", "ring_table", "row_table", "row_step", "row_context", "row_spacing", "col_table", "col_step", "col_extent", "inside_first", "inside_last",
    "row_phases", "row_phase_table", "col_phase_table", "weight_table", "range_table", "row_count", "col_count", "col_phases", "col_groups",
    "source_image", "source_row", "source_channel", "out_image", "out_row", "out_channel", "out_row_step", "out_col_step", "out_cols",
    "left_cols", "right_at", "direct_at", "direct_pixel", "direct_table", "source_pixels", "out_pixels", "plane_bytes",
))  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """What a kernel of ``forward`` or ``grad_input`` is generated from.

    ``columns``: what column taps occur, one loop each; ``block``: pixels of a register block; ``step`` and ``spacing``:
    distance of pixels and of column taps in scratch entries.  ``direct`` (nhwc): pixels whose taps all lie inside the image's columns are computed from the
    caller's memory, and only the columns at the edges pass through the scratch; no column does where ``columns`` are whole.  ``ahead``: ask for the
    source rows of the next output row.  ``abreast``: vectors of channels of a register block.
    ``planes`` (nchw): whole images are transposed, as they lie in memory, to scratch, which is then computed on as an image of nhwc is in memory.
    """

    lanes: Lanes
    columns: tuple[Reach, ...]
    block: int
    step: int
    spacing: int
    bias: bool
    direct: bool
    ahead: bool
    abreast: int = 1
    planes: bool = False

    @property
    def rows(self) -> Lanes:
        """The lanes of the rows that are computed: of the transposed image where ``planes``."""
        numeric = self.lanes.numeric
        return Lanes(Numeric("f32" if numeric.converts else numeric.dtype, numeric.target), "nhwc", "same", False) if self.planes else self.lanes

    @property
    def name(self) -> str:
        numeric = self.lanes.numeric
        columns = "_".join(reach.name for reach in self.columns)
        block = f"b{self.block}" + (f"v{self.abreast}" if self.abreast > 1 else "")
        kind = "depthwise_planes" if self.planes else "depthwise_gather"
        parts = (kind, numeric.dtype, self.lanes.name, f"s{columns}", f"st{self.step}d{self.spacing}", block)
        return "_".join(
            (*parts, *(("direct",) if self.direct else ()), *(("ahead",) if self.ahead else ()), *(("bias",) if self.bias else ()), numeric.target.isa)
        )


def emit_gather(spec: Spec) -> Module:
    """The kernel of ``forward`` and ``grad_input``.

    Stage 0, for each vector of lanes: weights to ``[residue][tap][lane]`` in the compute type, taps in the order of the phases; bias to ``[lane]``.
    With ``at_use``, where one task meets a vector, that task does it.
    Stage 1, for each tile ``(image, rows, columns, chunk of vectors)``: for each output row: load the next source rows into a ring of scratch
    rows, then for each row phase and column phase: blocks of ``block`` pixels times all taps, stored to nhwc memory, or to a scratch row that is
    transposed to nchw.
    """
    module = Module()
    lanes = spec.lanes
    planes = emit_load_planes(module, lanes, "load_planes") if spec.planes else None
    loader = None if spec.columns[0].whole else emit_load(module, lanes, "load_tile", zero_rows=False)
    flush = emit_flush(module, lanes, "flush_row") if lanes.format == "nchw" else None
    taps = [emit_taps(module, spec.rows, reach, spec.step, spec.spacing, spec.block, spec.bias, spec.ahead, spec.abreast) for reach in spec.columns]

    packing = _emit_pack(module, spec)

    def pack(f: Function, task: Task) -> object:
        def body(index: Value) -> None:
            first = index * task["pack_vectors"]
            f.call(packing, [f["context"], first, f.minimum(first + task["pack_vectors"], task["vectors_total"])])

        return body

    def tile(f: Function, task: Task) -> object:
        if planes is not None and flush is not None:
            return partial(_image, f, task, spec, packing, planes, flush, taps)
        return lambda index: _tile(f, task, spec, index, packing, loader, flush, taps)

    emit_entry(module, ARGUMENTS, [("pack_tasks", pack), ("tiles", tile)], own_first=True)  # type: ignore[list-item]
    return module


def _emit_pack(module: Module, spec: Spec) -> Function:
    """``pack_vectors(context, first, last)``: weights (and bias) of some vectors: a lane's are one run of memory, blocks of them are transposed.  Lanes
    behind the last one repeat it."""
    f = module.function("pack_vectors", [("ptr", "context"), ("i64", "first"), ("i64", "last")])
    task = Task(f, ARGUMENTS, f["context"], f.value(0), "pack_tasks", own_front=False)
    numeric, entry = spec.lanes.numeric, spec.lanes.entry_bytes
    count, memory = numeric.lanes, numeric.memory_bytes
    residues, taps, last = task["residues"], task["taps"], task["lanes_total"] - 1
    length, places = task["kernel_size"], task.table("place_table")

    def put(value: Value, tap: Value, target: Value) -> None:
        place = f.load_index(places, tap)
        with f.when(place >= 0):
            f.store(value, target + place)

    def vector(v: Value) -> None:
        numbers = [f.minimum(v * count + i, last) for i in range(count)]

        def residue(j: Value) -> None:
            target = task.workspace + (v * residues + j) * taps * entry
            rows = [task.operand("other") + (number * residues + j) * length * memory for number in numbers]

            emit_filters(f, numeric, rows, length, lambda value, tap: put(value, tap, target))

        f.loop(0, residues, 1, residue)
        if spec.bias:
            values = f.zero(numeric.vector)
            for i, number in enumerate(numbers):
                values = f.insert(values, numeric.load(f, task.operand("bias") + number * memory, 1), i)
            f.store(values, task.workspace + task["bias_at"] + v * entry)

    f.loop(f["first"], f["last"], 1, vector)
    f.ret()
    return f


def _tile(f: Function, task: Task, spec: Spec, index: Value, packing: Function, loader: Function | None, flush: Function | None, taps: list[Function]) -> None:
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
    with f.when(task["at_use"] > 0):
        f.call(packing, [f["context"], vector0, vector0 + vectors])
    scratch = task.scratch
    cols = (f.minimum(task["tile_cols"], task["col_count"] - col0) - 1) * task["col_step"] + task["col_extent"] + 1
    first_row, first_col = row0 * task["row_step"], col0 * task["col_step"]
    inside_first, inside_last = task["inside_first"] - first_col, task["inside_last"] - first_col
    source = task.operand("source") + image * task["source_image"]

    def load_rows(first: Value, count: Value) -> None:
        if loader is None:
            return

        def columns(j: Value, at: Value, cols: Value) -> None:
            low = f.minimum(f.maximum(inside_first - at, 0), cols)
            high = f.maximum(f.minimum(inside_last - at, cols), low)
            f.call(loader, [
                source, scratch + j * task["residue_plane"] + at * task["pixel"], task.table("row_table") + (first_row + first) * 8,
                task.table("ring_table") + first * 8, count, task.table("col_table") + (first_col + at) * 8, cols, low, high, start, vectors,
                task["lanes_total"], task["multiplier"], j, task["pixel"], task["source_row"], task["source_channel"],
            ])  # fmt: skip

        if spec.direct:
            columns(f.value(0), f.value(0), task["left_cols"])
            columns(f.value(0), task["right_at"], cols - task["right_at"])
        else:
            f.loop(0, task["residues"], 1, lambda j: columns(j, f.value(0), cols))

    place = _Place(scratch, source, task.operand("out") + image * task["out_image"], row0, col0, vector0, vectors, vector0 * numeric.lanes)
    count = f.minimum(task["tile_rows"], task["row_count"] - row0)
    # The first rows' context, then a few new rows at a time into the ring.
    load_rows(f.value(0), task["row_context"])

    def strip(i: Value) -> None:
        rows = f.minimum(task["strip_rows"], count - i)
        load_rows(i * task["row_step"] + task["row_context"], rows * task["row_step"])
        f.loop(i, i + rows, 1, lambda i: _row(f, task, spec, place, i, flush, taps))

    f.loop(0, count, task["strip_rows"], strip)


@dataclass(frozen=True)
class _Place:
    """Where a task works: its scratch, image and result, first output of rows and columns (of each phase), first vector and number of vectors, and
    the first vector's lane in the image and the result."""

    scratch: Value
    source: Value
    out: Value
    row0: Value
    col0: Value
    vector0: Value
    vectors: Value
    lane0: Value


def _image(f: Function, task: Task, spec: Spec, packing: Function, load_planes: Function, flush: Function, taps: list[Function], index: Value) -> None:
    """A whole image of one vector of channels of nchw: transposed to scratch, computed there row by row, transposed back."""
    vector, image = index % task["vectors_total"], index // task["vectors_total"]
    with f.when(task["at_use"] > 0):
        f.call(packing, [f["context"], vector, vector + 1])
    lane0, zero = vector * spec.lanes.numeric.lanes, f.value(0)
    scratch = task.scratch
    out, source = scratch + task["out_row_at"], task.operand("source") + image * task["source_image"]
    to = task.operand("out") + image * task["out_image"]
    f.loop(0, task["plane_bytes"] * spec.lanes.numeric.lanes, 64, lambda at: f.prefetch(to + lane0 * task["plane_bytes"] + at, 2))
    f.call(load_planes, [source, scratch, task["source_pixels"], lane0, task["lanes_total"], task["multiplier"], task["source_channel"]])
    place = _Place(scratch, scratch, out, zero, zero, vector, f.value(1), zero)
    # What this thread most likely transposes next: neighbours in memory that it reads in an order no hardware foresees.
    after = task.after(index)
    ahead = task.operand("source") + after // task["vectors_total"] * task["source_image"]
    ahead = ahead + (after % task["vectors_total"] * spec.lanes.numeric.lanes) // task["multiplier"] * task["source_channel"]
    share = (task["source_channel"] * spec.lanes.numeric.lanes) // task["row_count"]

    def row(i: Value) -> None:
        f.loop(i * share, (i + 1) * share, 64, lambda at: f.prefetch(ahead + at, 2))
        _row(f, task, spec, place, i, None, taps)

    f.loop(0, task["row_count"], 1, row)
    f.call(flush, [out, to, task["out_pixels"], lane0, task["lanes_total"], task["plane_bytes"]])


def _row(f: Function, task: Task, spec: Spec, at: _Place, i: Value, flush: Function | None, taps: list[Function]) -> None:
    """Row ``i`` of a tile: every row phase and column phase of it."""
    lanes = spec.rows
    numeric, entry = lanes.numeric, lanes.entry_bytes
    nhwc = lanes.format == "nhwc"
    out, lane0 = at.out, at.lane0
    out_row_scratch = at.scratch + task["out_row_at"]
    weight_bytes = task["residues"] * task["taps"] * entry
    pixel_bytes = task["out_channel"] if nhwc else f.value(entry)
    weights = task.workspace + at.vector0 * weight_bytes
    bias = task.workspace + task["bias_at"] + at.vector0 * entry

    def phase(number: Value) -> None:
        record = task.table("row_phase_table") + number * 24
        start, count, shift = (f.load(record + 8 * k) for k in range(3))

        def row() -> None:
            ranges = task.table("range_table") + (number * task["row_count"] + at.row0 + i) * 16
            low, high = f.load(ranges), f.load(ranges + 8)
            row_entry = i * task["row_step"] + shift
            ring = task.table("ring_table") + row_entry * 8
            out_row = out + (start + (at.row0 + i) * task["out_row_step"]) * task["out_row"]
            base = out_row + lane0 * numeric.memory_bytes + at.col0 * task["out_col_step"] * pixel_bytes if nhwc else out_row_scratch

            def column_phase(c: Value, function: Function) -> None:
                # Pixels ``first`` to ``last - 1`` of the phase have all their taps inside the image's columns.
                col_record = task.table("col_phase_table") + c * 40
                col_start, col_count, col_shift, first, last = (f.load(col_record + 8 * k) for k in range(5))
                n = f.minimum(col_count - at.col0, task["tile_cols"])
                tap_at = f.load_index(task.table("weight_table"), number * task["col_phases"] + c)
                step = pixel_bytes * task["out_col_step"]

                def pixels(q: Value, n: Value, source: Value, ring: Value, pixel: Value) -> None:
                    f.call(function, [
                        source + (col_shift + q * task["col_step"]) * (pixel if nhwc else entry), ring, weights + tap_at * entry,
                        base + col_start * pixel_bytes + q * step, bias, n, low, high, task["row_spacing"] * 8, pixel, at.vectors, weight_bytes, step,
                        task["lanes_total"] - lane0, task["residues"], task["residue_plane"], task["taps"] * entry,
                    ])  # fmt: skip

                if not spec.direct:
                    pixels(f.value(0), n, at.scratch, ring, task["pixel"])
                    return
                image = at.source + (lane0 * numeric.memory_bytes + task["direct_at"])
                rows = task.table("direct_table") + (at.row0 * task["row_step"] * 8 + row_entry * 8)
                if spec.columns[0].whole:
                    pixels(f.value(0), n, image, rows, task["direct_pixel"])
                    return
                pixels(f.value(0), first, at.scratch, ring, task["pixel"])
                pixels(first, last - first, image, rows, task["direct_pixel"])
                pixels(last, n - last, at.scratch, ring, task["pixel"])

            for g, function in enumerate(taps):
                bounds = task.table("col_groups") + 8 * g
                f.loop(f.load(bounds), f.load(bounds + 8), 1, lambda c, function=function: column_phase(c, function))
            if flush is not None:
                first = at.col0 * task["out_col_step"]
                cols = f.minimum(task["tile_cols"] * task["out_col_step"], task["out_cols"] - first)
                f.call(flush, [out_row_scratch, out_row + first * numeric.memory_bytes, cols, lane0, task["lanes_total"], task["out_channel"]])

        with f.when(at.row0 + i < count):
            row()

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
        return plan_few(self.name, problem, threads) if takes_few(problem, targets.target()) else _plan_gather(self.name, problem, threads)


DEPTHWISE = Depthwise()


def _lanes(problem: ConvProblem, target: Target) -> Lanes:
    numeric = Numeric(problem.dtype, target)
    forward = problem.direction == "forward"
    kind = "same" if problem.kg == 1 else "shared" if forward else "strided"
    return Lanes(numeric, problem.format, kind, (problem.k if forward else problem.c) % numeric.lanes != 0)


def _places(taps: list[int], size: int) -> npt.NDArray[np.int64]:
    """Where each of ``size`` weights of a filter stands in ``taps``; negative where it does not."""
    places = np.full(size, -1, np.int64)
    places[taps] = np.arange(len(taps))
    return places


def _taps_by_phase(problem: ConvProblem, rows: Sequence[LinePhase], columns: Sequence[LinePhase]) -> tuple[list[int], list[int]]:
    """The taps of all phases, one phase after the other, and where each begins."""
    taps: list[int] = []
    starts: list[int] = []
    for row in rows:
        for col in columns:
            starts.append(len(taps))
            taps += [r * problem.s + s for r in row.taps for s in col.taps]
    return taps, starts


def _plan_gather(name: str, problem: ConvProblem, threads: int) -> CpuPlan:
    target = targets.target()
    lanes = _lanes(problem, target)
    numeric = lanes.numeric
    rows, cols = lines(problem, reduce_columns=problem.format == "nhwc")
    tile = tiling(problem, lanes, (rows, cols), target, threads)
    forward = problem.direction == "forward"
    reaches = {phase: reach_of(cols, phase, tile.block) if tile.whole else Reach(len(phase.taps)) for phase in cols.phases}
    # Column phases in the order of what their taps reach: one loop for each kind.
    phases = sorted(cols.phases, key=lambda phase: reaches[phase])
    columns = tuple(sorted(set(reaches.values())))
    source_bytes = problem.n * (problem.c if forward else problem.k) * rows.size * cols.size * DTYPES[problem.dtype]
    ahead = tile.direct and not tile.planes and asks_ahead(cols, source_bytes, problem.c * DTYPES[problem.dtype])
    spec = Spec(lanes, columns, tile.block, cols.step, cols.spacing, problem.epilogue.bias and forward, tile.direct, ahead, tile.abreast, tile.planes)
    kernel = load(spec.name, target, lambda: emit_gather(spec))
    strides = image_strides("source", problem.format, problem.c if forward else problem.k, rows.size, cols.size, DTYPES[problem.dtype])
    row_bytes = cols.size * lanes.entry_bytes if tile.planes else strides["source_row"]
    tap_list, weight_starts = _taps_by_phase(problem, rows.phases, phases)
    groups = [sum(reaches[p] < reach for p in phases) for reach in columns] + [len(phases)]
    first, last = inside(cols, problem.format)
    tables = {
        "place_table": _places(tap_list, problem.r * problem.s) * np.int64(lanes.entry_bytes),
        "row_table": rows.table(rows.step),
        "col_table": cols.table(),
        "row_phase_table": np.array([(p.start, p.count, p.shift) for p in rows.phases], np.int64),
        "col_phase_table": np.array([(p.start, p.count, p.shift, *cols.direct(p)) for p in phases], np.int64),
        "direct_table": np.maximum(rows.table(rows.step + 1), 0) * row_bytes,
        "weight_table": np.array(weight_starts, np.int64),
        "range_table": rows.tap_ranges(),
        "col_groups": np.array(groups, np.int64),
    }
    total = problem.k if forward else problem.c
    vectors = -(-total // numeric.lanes)
    entry = lanes.entry_bytes
    residues = 1 if lanes.kind != "strided" else problem.kg
    weight_bytes = vectors * residues * len(tap_list) * entry
    strip = 1
    ring = context_rows(rows) + strip * rows.step
    pixel = tile.vectors * entry
    # Short blocks of nchw columns write zeros behind their end.
    pitch = odd_lines((cols.length(min(tile.cols, cols.count)) + (numeric.lanes if problem.format == "nchw" else 0)) * pixel)
    tables["ring_table"] = np.arange(rows.length(rows.count) + rows.step + 1, dtype=np.int64) % ring * pitch
    plane = ring * pitch
    out_row_at = plane * residues
    out_row_bytes = (tile.cols * cols.output_step + numeric.lanes) * entry if problem.format == "nchw" else 0
    if tile.planes:
        out_row_at, out_row_bytes = (rows.size * cols.size + numeric.lanes) * entry, (rows.outputs * cols.outputs + numeric.lanes) * entry
    scratch_size = -(-(out_row_at + out_row_bytes) // 4096) * 4096 + 64
    front = -(-(weight_bytes + vectors * entry) // 4096) * 4096
    tiles = (-(-rows.count // tile.rows), -(-cols.count // tile.cols), -(-vectors // tile.vectors))
    at_use = problem.n * tiles[0] * tiles[1] == 1
    front_pitch, scratch_at = (0, front) if at_use else place_scratch(front, threads, target)
    values = {key: table.ctypes.data for key, table in tables.items()}
    pack_vectors = max(1, 4096 // (numeric.lanes * residues * max(1, len(tap_list))))
    values |= {
        "pack_tasks": 0 if at_use else -(-vectors // pack_vectors), "pack_vectors": pack_vectors, "at_use": int(at_use), "vectors_total": vectors,
        "taps": len(tap_list), "kernel_size": problem.r * problem.s, "bias_at": weight_bytes,
        "tiles": problem.n * tiles[0] * tiles[1] * tiles[2], "chunks": tiles[2], "row_tiles": tiles[0], "col_tiles": tiles[1], "chunk": tile.vectors,
        "tile_rows": tile.rows, "tile_cols": tile.cols, "scratch_at": scratch_at, "scratch_size": scratch_size, "out_row_at": out_row_at,
        "lanes_total": total, "multiplier": problem.kg, "residues": residues, "pixel": pixel, "residue_plane": plane,
        "strip_rows": strip, "row_step": rows.step, "row_context": context_rows(rows), "row_spacing": rows.spacing,
        "col_step": cols.step, "col_extent": cols.extent, "inside_first": first, "inside_last": last,
        "row_phases": len(rows.phases), "row_count": rows.count, "col_count": cols.count, "col_phases": len(phases),
        "out_row_step": rows.output_step, "out_col_step": cols.output_step, "out_cols": cols.outputs,
    }  # fmt: skip
    left, right = edges(cols)
    values |= {
        "left_cols": left, "right_at": right, "direct_at": cols.base * strides["source_channel"], "direct_pixel": cols.unit * strides["source_channel"],
    }  # fmt: skip
    out = image_strides("out", problem.format, total, rows.outputs, cols.outputs, DTYPES[problem.dtype])
    values |= strides | out | {"source_pixels": rows.size * cols.size, "out_pixels": rows.outputs * cols.outputs, "plane_bytes": out["out_channel"]}
    if tile.planes:  # what is computed on lies in scratch
        values |= {"direct_at": cols.base * entry, "direct_pixel": cols.unit * entry, "out_row": cols.outputs * entry, "out_channel": entry}
    block = ARGUMENTS.pack(threads, values, front_pitch)
    predicted = predicted_cycles(problem, numeric.lanes, threads)
    facts = {"tile": (tile.rows, tile.cols), "vectors": tile.vectors, "block": tile.block, "predicted_cycles": predicted}
    return CpuPlan(problem, name, kernel, block, tuple(tables.values()), scratch_at + threads * scratch_size, facts)
