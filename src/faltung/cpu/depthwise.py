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
from .depthwise_geometry import Line, LinePhase, context_rows, lines
from .depthwise_taps import Reach, block_pixels, emit_taps
from .depthwise_tile import Lanes, emit_flush, emit_load, image_strides, inside, odd_lines
from .depthwise_weight import plan_weight
from .plan import CpuPlan
from .target import Target

__all__ = ["DEPTHWISE", "Depthwise"]

_FAR_BYTES, _NEAR_BYTES = 20 << 20, 8 << 20  # of a source whose rows are asked for ahead, at stride 2 and at stride 1

ARGUMENTS = ArgumentBlock((
    # stage 0: weights and bias into vectors
    "pack_tasks", "pack_vectors", "vectors_total", "taps", "kernel_size", "tap_table", "bias_at",
    # stage 1: tiles
    "tiles", "chunks", "row_tiles", "col_tiles", "chunk", "tile_rows", "tile_cols", "scratch_at", "scratch_bytes", "out_row_at",
    "lanes_total", "multiplier", "residues", "pixel", "residue_plane",
    "strip_rows", "ring_table", "row_table", "row_step", "row_context", "row_spacing", "col_table", "col_step", "col_extent", "inside_first", "inside_last",
    "row_phases", "row_phase_table", "col_phase_table", "weight_table", "range_table", "row_count", "col_count", "col_phases", "col_groups",
    "source_image", "source_row", "source_channel", "out_image", "out_row", "out_channel", "out_row_step", "out_col_step", "out_cols",
    "left_cols", "right_at", "direct_at", "direct_pixel", "direct_table",
))  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """What a kernel of ``forward`` or ``grad_input`` is generated from.

    ``columns``: what column taps occur, one loop each; ``block``: pixels of a register block; ``step`` and ``spacing``:
    distance of pixels and of column taps in scratch entries.  ``direct`` (nhwc): pixels whose taps all lie inside the image's columns are computed from the
    caller's memory, and only the columns at the edges pass through the scratch; no column does where ``columns`` are whole.  ``ahead``: ask for the
    source rows of the next output row.  ``abreast``: vectors of channels of a register block.
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

    @property
    def name(self) -> str:
        numeric = self.lanes.numeric
        columns = "_".join(reach.name for reach in self.columns)
        block = f"b{self.block}" + (f"v{self.abreast}" if self.abreast > 1 else "")
        parts = ("depthwise_gather", numeric.dtype, self.lanes.name, f"s{columns}", f"st{self.step}d{self.spacing}", block)
        return "_".join(
            (*parts, *(("direct",) if self.direct else ()), *(("ahead",) if self.ahead else ()), *(("bias",) if self.bias else ()), numeric.target.isa)
        )


def emit_gather(spec: Spec) -> str:
    """The kernel of ``forward`` and ``grad_input``.

    Stage 0, for each vector of lanes: weights to ``[residue][tap][lane]`` in the compute type, taps in the order of the phases; bias to ``[lane]``.
    Stage 1, for each tile ``(image, rows, columns, chunk of vectors)``: for each output row: load the next source rows into a ring of scratch
    rows, then for each row phase and column phase: blocks of ``block`` pixels times all taps, stored to nhwc memory, or to a scratch row that is
    transposed to nchw.
    """
    module = Module()
    lanes = spec.lanes
    loader = None if spec.columns[0].whole else emit_load(module, lanes, "load_tile", zero_rows=False)
    flush = emit_flush(module, lanes, "flush_row") if lanes.format == "nchw" else None
    taps = [emit_taps(module, lanes, reach, spec.step, spec.spacing, spec.block, spec.bias, spec.ahead, spec.abreast) for reach in spec.columns]

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


def _tile(f: Function, task: Task, spec: Spec, index: Value, loader: Function | None, flush: Function | None, taps: list[Function]) -> None:
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

    place = _Place(scratch, image, row0, col0, vector0, vectors)
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
    """Where a task works: its scratch, image, first output of rows and columns (of each phase), first vector and number of vectors."""

    scratch: Value
    image: Value
    row0: Value
    col0: Value
    vector0: Value
    vectors: Value


def _row(f: Function, task: Task, spec: Spec, at: _Place, i: Value, flush: Function | None, taps: list[Function]) -> None:
    """Row ``i`` of a tile: every row phase and column phase of it."""
    lanes = spec.lanes
    numeric, entry = lanes.numeric, lanes.entry_bytes
    nhwc = lanes.format == "nhwc"
    out = task.operand("out") + at.image * task["out_image"]
    out_row_scratch = at.scratch + task["out_row_at"]
    weight_bytes = task["residues"] * task["taps"] * entry
    pixel_bytes = task["out_channel"] if nhwc else f.value(entry)
    lane0 = at.vector0 * numeric.lanes
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
                image = task.operand("source") + at.image * task["source_image"] + (lane0 * numeric.memory_bytes + task["direct_at"])
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
        return _plan_gather(self.name, problem, threads)


DEPTHWISE = Depthwise()


def _lanes(problem: ConvProblem, target: Target) -> Lanes:
    numeric = Numeric(problem.dtype, target)
    forward = problem.direction == "forward"
    kind = "same" if problem.kg == 1 else "shared" if forward else "strided"
    return Lanes(numeric, problem.format, kind, (problem.k if forward else problem.c) % numeric.lanes != 0)


@dataclass(frozen=True)
class Tiling:
    """Outputs of a tile (of each phase), vectors of lanes together, pixels of a register block; see :class:`Spec` for the others."""

    rows: int
    cols: int
    vectors: int
    block: int
    direct: bool
    whole: bool
    abreast: int


def _edges(cols: Line) -> tuple[int, int]:
    """Columns of scratch, from the left and up to the right end, that outputs outside :meth:`Line.direct` read."""
    left, right = 0, cols.length(cols.count)
    for phase in cols.phases:
        first, last = cols.direct(phase)
        if first and phase.taps:
            left = max(left, phase.shift + (first - 1) * cols.step + (len(phase.taps) - 1) * cols.spacing + 1)
        if last < phase.count and phase.taps:
            right = min(right, phase.shift + last * cols.step)
    return left, right


def tiling(problem: ConvProblem, lanes: Lanes, lines_: tuple[Line, Line], target: Target, threads: int) -> Tiling:
    """A ring of rows that takes at most half of the second-level cache, with several tasks for each thread where there is enough to do."""
    rows, cols = lines_
    entry, residues = lanes.entry_bytes, problem.kg if lanes.kind == "strided" else 1
    budget = target.l2 // 2 // entry
    total = -(-(problem.k if problem.direction == "forward" else problem.c) // lanes.numeric.lanes)
    ring = context_rows(rows) + rows.step
    tile_cols = cols.count
    inner = sum(last - first for first, last in map(cols.direct, cols.phases))
    plain = lanes.format == "nhwc" and lanes.kind == "same" and (target.masks or not lanes.tail)

    abreast = _abreast(problem, target, cols) if plain else 1
    whole = _whole_block(target, cols, abreast) if plain and cols.mode == "zeros" else 0
    direct = bool(whole) or (plain and not lanes.tail and not lanes.numeric.converts and inner * 4 >= cols.outputs * 3)
    while not direct and tile_cols > 64 and cols.length(tile_cols) * ring * residues > budget:
        tile_cols = -(-tile_cols // 2)
    vectors = 1
    if lanes.format == "nhwc" and lanes.kind == "same":
        # Whole cache lines side by side in memory: with 8 of them the hardware prefetches well.  A strided gradient's results are written in phases, every
        # second pixel at a time: whole rows of up to 32 of them (512 and 1024 channels at 28x28 and 14x14 take 0.6 of the time that 8 take).
        vectors = max(1, min(total, 32 if direct and cols.output_step > 1 else 8, budget // ((cols.length(tile_cols)) * ring)))
        vectors = -(-total // -(-total // vectors))
    others = problem.n * -(-total // vectors) * -(-cols.count // tile_cols)
    pieces = 1
    while others * pieces < 4 * threads and pieces < rows.count // 4:
        pieces += 1
    columns = max(len(phase.taps) for phase in cols.phases)
    widths = [last - first for first, last in map(cols.direct, cols.phases)] if direct else [phase.count for phase in cols.phases]
    block = whole or block_pixels(target, min((width for width in widths if width), default=1), columns)
    return Tiling(-(-rows.count // pieces), tile_cols, vectors, block, direct, bool(whole), abreast if whole else 1)


def _reach(cols: Line, phase: LinePhase, block: int) -> Reach:
    """What a phase's pixels need, read from memory in blocks of ``block``; of a whole row of them where it is 0."""
    first, last = cols.inside()
    end = phase.shift + (phase.count - 1) * cols.step + (len(phase.taps) - 1) * cols.spacing + 1
    return Reach(len(phase.taps), max(0, first - phase.shift), max(0, end - last), True, block == phase.count) if phase.taps else Reach(0, 0, 0, True)


def _whole_block(target: Target, cols: Line, abreast: int) -> int:
    """Pixels of a block with which every column phase is read from memory alone; 0 where there is none."""

    def fits(block: int) -> bool:
        return all(_reach(cols, phase, block).fits(target, phase.count, block, cols.step) for phase in cols.phases)

    return block_pixels(target, min(phase.count for phase in cols.phases), max(len(phase.taps) for phase in cols.phases), fits, abreast)


def _abreast(problem: ConvProblem, target: Target, cols: Line) -> int:
    """Vectors of channels that a register block takes, with as many fewer pixels: each pixel is then read in a run of up to four cache lines.

    Where a layer waits for its source, lines side by side arrive up to 1.4 times as fast as lines a pixel apart (3x3 at stride 2 on 14x14 to 112x112: 10 to
    30 % of the time; at stride 1 10 to 20 % where the source is larger than the caches or its pixels share few cache sets); elsewhere the shorter rows of
    pixels cost more loads than is gained.
    """
    columns = max(len(phase.taps) for phase in cols.phases)
    if target.registers < 32 or cols.output_step > 1 or columns > 5:
        return 1
    if cols.step > 1:
        return 4 if columns <= 3 else 2
    pixel = problem.c * DTYPES[problem.dtype]
    return 4 if columns <= 3 and (problem.n * cols.size * problem.h * pixel > _NEAR_BYTES or pixel % 2048 == 0) else 1


def _asks_ahead(cols: Line, source_bytes: int, pixel_bytes: int) -> bool:
    """Whether the rows of the next output row are asked for: where the source is larger than the caches.

    Measured at stride 1: 5 to 30 % on 3x3 and 7x7, and 2 to 7 % lost on small images; at stride 2 5 to 10 % on 5x5 and twice the speed on 3x3 with pixels of
    256 bytes, but 4 to 10 % lost on 3x3 with wider ones.
    """
    if cols.step == 1:
        return source_bytes > _NEAR_BYTES
    return source_bytes > _FAR_BYTES and not (cols.extent < 3 and pixel_bytes > 256)


def _plan_gather(name: str, problem: ConvProblem, threads: int) -> CpuPlan:
    target = targets.target()
    lanes = _lanes(problem, target)
    numeric = lanes.numeric
    rows, cols = lines(problem, reduce_columns=problem.format == "nhwc")
    tile = tiling(problem, lanes, (rows, cols), target, threads)
    forward = problem.direction == "forward"
    reaches = {phase: _reach(cols, phase, tile.block) if tile.whole else Reach(len(phase.taps)) for phase in cols.phases}
    # Column phases in the order of what their taps reach: one loop for each kind.
    phases = sorted(cols.phases, key=lambda phase: reaches[phase])
    columns = tuple(sorted(set(reaches.values())))
    source_bytes = problem.n * (problem.c if forward else problem.k) * rows.size * cols.size * DTYPES[problem.dtype]
    ahead = tile.direct and _asks_ahead(cols, source_bytes, problem.c * DTYPES[problem.dtype])
    spec = Spec(lanes, columns, tile.block, cols.step, cols.spacing, problem.epilogue.bias and forward, tile.direct, ahead, tile.abreast)
    kernel = load(spec.name, target, lambda: emit_gather(spec))
    strides = image_strides("source", problem.format, problem.c if forward else problem.k, rows.size, cols.size, DTYPES[problem.dtype])
    row_bytes = strides["source_row"]
    tap_list: list[int] = []
    weight_starts: list[int] = []
    for row in rows.phases:
        for col in phases:
            weight_starts.append(len(tap_list))
            tap_list += [r * problem.s + s for r in row.taps for s in col.taps]
    groups = [sum(reaches[p] < reach for p in phases) for reach in columns] + [len(phases)]
    first, last = inside(cols, problem.format)
    tables = {
        "tap_table": np.array(tap_list, np.int64),
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
    scratch_bytes = -(-(out_row_at + out_row_bytes) // 4096) * 4096 + 64
    scratch_at = -(-(weight_bytes + vectors * entry) // 4096) * 4096
    tiles = (-(-rows.count // tile.rows), -(-cols.count // tile.cols), -(-vectors // tile.vectors))
    values = {key: table.ctypes.data for key, table in tables.items()}
    pack_vectors = max(1, 4096 // (numeric.lanes * residues * max(1, len(tap_list))))
    values |= {
        "pack_tasks": -(-vectors // pack_vectors), "pack_vectors": pack_vectors, "vectors_total": vectors, "taps": len(tap_list),
        "kernel_size": problem.r * problem.s, "bias_at": weight_bytes,
        "tiles": problem.n * tiles[0] * tiles[1] * tiles[2], "chunks": tiles[2], "row_tiles": tiles[0], "col_tiles": tiles[1], "chunk": tile.vectors,
        "tile_rows": tile.rows, "tile_cols": tile.cols, "scratch_at": scratch_at, "scratch_bytes": scratch_bytes, "out_row_at": out_row_at,
        "lanes_total": total, "multiplier": problem.kg, "residues": residues, "pixel": pixel, "residue_plane": plane,
        "strip_rows": strip, "row_step": rows.step, "row_context": context_rows(rows), "row_spacing": rows.spacing,
        "col_step": cols.step, "col_extent": cols.extent, "inside_first": first, "inside_last": last,
        "row_phases": len(rows.phases), "row_count": rows.count, "col_count": cols.count, "col_phases": len(phases),
        "out_row_step": rows.output_step, "out_col_step": cols.output_step, "out_cols": cols.outputs,
    }  # fmt: skip
    left, right = _edges(cols)
    values |= {
        "left_cols": left, "right_at": right, "direct_at": cols.base * strides["source_channel"], "direct_pixel": cols.unit * strides["source_channel"],
    }  # fmt: skip
    values |= strides | image_strides("out", problem.format, total, rows.outputs, cols.outputs, DTYPES[problem.dtype])
    block = ARGUMENTS.pack(threads, values)
    facts = {"tile": (tile.rows, tile.cols), "vectors": tile.vectors, "block": tile.block}
    return CpuPlan(problem, name, kernel, block, tuple(tables.values()), scratch_at + threads * scratch_bytes, facts)
