"""The kernel of grouped convolution with few channels a group: lanes over several groups, forward and grad_input.

Loop nest (a *phase* is one residue of the output index by the stride; forward has one)::

    stage 1, for each phase and vector of output channels:      pack the weights, one vector a term of the sum; convert the bias
    stage 2, for each image, tile of output rows and columns, block of vectors of output channels; then for each vector:
        pack the tile of the source into planes [column slab][plane][row][column][lanes]
        for each phase, block of rows x columns:
            for each chunk of column taps, kernel row, plane:
                for each column of the block and its halo:  load once, broadcast each channel of a run, multiply for every tap of the chunk
            store, or (nchw) to scratch and by transposition
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..codegen.emit import Function, Module, Value, vector_type
from ..codegen.entry import ArgumentBlock, Task, emit_entry
from ..codegen.numeric import Numeric
from .grouped_lanes import TILE_FIELDS, Lanes
from .grouped_pack import emit_flush, emit_pack, emit_prefetch
from .target import Target

__all__ = ["ARGUMENTS", "PHASE_FIELDS", "GroupedKernel", "Shapes", "emit_channel", "in_memory_order", "shapes_name"]

Shapes = tuple[tuple[int, ...], ...]
"""The distinct chunks of a column phase: the shifts of their taps."""

PHASE_FIELDS = ("kind", "terms", "weights", "panel", "row_start", "row_count", "column_start", "column_count")
"""A phase: the number of its column phase's shapes among the kernel's kinds; the length of its sum; the weight's byte offset of each term (where they
are packed by runs: of each weight of the runs, the byte offset of its term among the packed ones, or -1); the place of its weights in the workspace; the
outputs it covers.  Behind them, for each shape: how many chunks, kernel rows and planes it is used for, and the address of the tile's byte offsets of
those."""

ARGUMENTS = ArgumentBlock(
    (
        *("source_" + name for name in TILE_FIELDS),
        "pack_tasks", "tasks", "vectors", "vector_blocks", "block_vectors", "phases", "phase_bytes", "row_phases", "column_phases", "p_tiles",
        "q_tiles", "tile_p", "tile_q", "source_channels", "out_channels", "source_image", "out_image", "out_rows", "out_columns", "out_row",
        "out_column", "out_channel", "weight_vector", "weight_part", "lane_offsets", "runs", "run_length", "run_pitch", "bias_at", "has_bias", "scratch_at",
        "scratch_size", "c_at", "c_width", "prefetch_rows",
    )
)  # fmt: skip
"""Pitches are bytes.  A task is a tile of ``block_vectors`` vectors.  ``weight_vector``: from one vector's weights to the next one's (of the next
group, where a group takes several: those are ``weight_part`` apart); ``lane_offsets``: a vector's lanes in the weight; ``runs``: of neighbours in memory,
``run_length`` weights of a lane each.  ``c_at``: where a thread's scratch holds the results of a tile before they go to nchw, ``c_width`` pixels a row.
``prefetch_rows``: scratch rows of the next tile that are asked for with each row of the first phase."""


def shapes_name(shapes: Shapes) -> str:
    return "+".join(".".join(map(str, shape)) for shape in shapes) or "none"


@dataclass(frozen=True)
class GroupedKernel:
    """What a kernel is made for; everything else is an argument.

    ``out``, ``source``, ``unit``, ``partial``, ``interleaved``: see :class:`Lanes`.  ``kinds``: the shapes of each kind of column phase.  A block is ``rows`` x
    ``columns`` pixels, with pieces one smaller where ``narrow_*`` say so.  ``step``: of the source's columns, 3 for any above 2.
    ``whole``: see :func:`emit_pack`.  ``weights``: how a lane's are packed, in ``runs`` of neighbours or by ``terms``, of which all lanes may be ``vectors``.
    """

    target: Target
    dtype: str
    format: str
    out: int
    source: int
    unit: int
    partial: bool
    kinds: tuple[Shapes, ...]
    step: int
    rows: int
    columns: int
    narrow_rows: bool
    narrow_columns: bool
    interleaved: bool
    whole: bool
    weights: str

    @property
    def name(self) -> str:
        kinds = "_".join(map(shapes_name, self.kinds))
        flags = "".join(letter for letter, set_ in zip("prcw", (self.partial, self.narrow_rows, self.narrow_columns, self.whole)) if set_)
        block = f"{self.rows}x{self.columns}{'_' + flags if flags else ''}"
        channels = f"{self.source}to{self.out}_u{'i' if self.interleaved else self.unit}"
        return f"grouped_{self.dtype}_{self.format}_{channels}_{kinds}_st{self.step}_{self.weights}_{block}_{self.target.isa}"

    @property
    def lanes(self) -> Lanes:
        """The lanes, of as many groups as fill one vector (one more where the last vector is partial)."""
        lanes = Numeric(self.dtype, self.target).lanes
        per_vector = max(1, lanes // self.out)
        return Lanes(lanes, self.out, self.source, per_vector + (1 if self.partial else 0), self.unit, self.interleaved)

    def emit(self) -> Module:
        """The module's IR text; its entry point is ``entry``."""
        module = Module()
        builder = _Builder(self, module, Numeric(self.dtype, self.target))
        emit_entry(module, ARGUMENTS, [("pack_tasks", builder.pack_stage), ("tasks", builder.compute_stage)])
        return module


def emit_channel(f: Function, numeric: Numeric, lanes: Lanes, place: Value, j: int) -> Value:
    """Channel ``j`` of the step at ``place`` (of a pixel in scratch), for each lane that of its group."""
    if not lanes.interleaved:
        value = f.load(place, numeric.vector)
        return f.shuffle(value, None, lanes.broadcast(j)) if lanes.unit > 1 else value
    if lanes.per_vector == 1:
        return f.splat(f.load(place, numeric.compute), numeric.lanes)
    return f.shuffle(f.load(place, vector_type(numeric.compute, lanes.per_vector)), None, lanes.repeated())


def in_memory_order(lanes: Lanes) -> list[int]:
    """The shuffle that puts a vector's results in the order of memory."""
    return [*lanes.places, *range(lanes.width, lanes.lanes)]


def _emit_block(module: Module, numeric: Numeric, lanes: Lanes, shapes: Shapes, rows: int, columns: int, in_place: bool) -> Function:
    """``block(source, panel, c, bias, record, source_row, c_row, c_column, valid)``: ``rows`` x ``columns`` results of one vector.

    ``record``: counts and tables of the shapes.  ``in_place``: results go to memory in its type, else to scratch.
    """
    parameters = [("ptr", name) for name in ("source", "panel", "c", "bias", "record")]
    parameters += [("i64", name) for name in ("source_row", "c_row", "c_column", "valid")]
    f = module.function(f"block_{shapes_name(shapes).replace('+', '_')}_{rows}x{columns}", parameters)
    vector, fused = numeric.lanes * numeric.compute_bytes, numeric.target.fma
    bias = f.load(f["bias"], numeric.vector)
    panel, values = f["panel"], [bias] * (rows * columns)
    row_offsets = [f["source_row"] * m for m in range(rows)]

    def turn(shape: tuple[int, ...], table: Value) -> Callable[..., list[Value]]:
        taps, span = len(shape), columns + shape[-1]

        def body(index: Value, panel: Value, *carried: Value) -> list[Value]:
            sums = list(carried)
            base = f["source"] + f.load_index(table, index)
            for j in range(lanes.unit):
                if j:
                    # Loads of the line are made anew for each channel: held in registers they would crowd out the sums.
                    f.barrier()
                weights = [f.load(panel + (j * taps + t) * vector, numeric.vector) for t in range(taps)]
                for m in range(rows):
                    line = base + row_offsets[m] if m else base
                    for x in range(span):
                        used = [(t, x - shift) for t, shift in enumerate(shape) if 0 <= x - shift < columns]
                        if not used:
                            continue
                        value = emit_channel(f, numeric, lanes, line + x * vector, j)
                        for t, q in used:
                            sums[m * columns + q] = f.fma(value, weights[t], sums[m * columns + q], fused)
            return [panel + (lanes.unit * taps) * vector, *sums]

        return body

    for i, shape in enumerate(shapes):
        count, table = f.load(f["record"] + 16 * i), f.to_pointer(f.load(f["record"] + 16 * i + 8))
        panel, *values = f.loop(0, count, 1, turn(shape, table), [panel, *values])
    mask = f.lane_mask(f["valid"], numeric.lanes) if in_place and lanes.masked else None
    memory_order = in_memory_order(lanes)
    for m in range(rows):
        place = f["c"] + f["c_row"] * m if m else f["c"]
        for q in range(columns):
            value = values[m * columns + q]
            if in_place:
                numeric.store(f, value if lanes.in_order else f.shuffle(value, None, memory_order), place, numeric.lanes, mask)
            else:
                f.store(value, place)
            place = place + f["c_column"]
    f.ret()
    return f


class _Builder:
    def __init__(self, kernel: GroupedKernel, module: Module, numeric: Numeric) -> None:
        self.kernel, self.numeric, self.lanes = kernel, numeric, kernel.lanes
        self.vector = numeric.lanes * numeric.compute_bytes
        self.in_place = kernel.format == "nhwc"
        self.pack = emit_pack(module, ARGUMENTS, numeric, self.lanes.expansion(), kernel.format, kernel.step, "source_", kernel.whole)
        self.prefetch = emit_prefetch(module, ARGUMENTS, numeric, self.lanes.source_width, kernel.format, "source_")
        self.flush = None if self.in_place else emit_flush(module, numeric, self.lanes)
        self.row_sizes = (kernel.rows, kernel.rows - 1)[: 2 if kernel.narrow_rows else 1]
        self.column_sizes = (kernel.columns, kernel.columns - 1)[: 2 if kernel.narrow_columns else 1]
        self.blocks = {
            (kind, rows, columns): _emit_block(module, numeric, self.lanes, shapes, rows, columns, self.in_place)
            for kind, shapes in enumerate(kernel.kinds)
            for rows in self.row_sizes
            for columns in self.column_sizes
        }

    def split(self, v: Value) -> tuple[Value, Value | int]:
        """Which groups' vector it is, and which part of it."""
        parts = self.lanes.parts
        return (v, 0) if parts == 1 else (v // parts, v % parts)

    def phase(self, f: Function, task: Task, index: Value) -> dict[str, Value]:
        address = task.table("phases") + index * task["phase_bytes"]
        phase = {name: f.load(address + 8 * i) for i, name in enumerate(PHASE_FIELDS)}
        phase["record"] = address + 8 * len(PHASE_FIELDS)
        return phase

    def pack_stage(self, f: Function, task: Task) -> Callable[[Value], None]:
        """The weights of one phase and vector, and its bias; the lanes without a channel are not defined."""
        numeric, size, memory, width = self.numeric, self.numeric.compute_bytes, self.numeric.memory_bytes, self.lanes.width

        def body(index: Value) -> None:
            v, phase = index % task["vectors"], self.phase(f, task, index // task["vectors"])
            valid = f.minimum(task["out_channels"] - v * width, width)
            target = task.workspace + phase["panel"] + v * phase["terms"] * self.vector
            group, part = self.split(v)
            weight = task.operand("other") + group * task["weight_vector"] + task["weight_part"] * part
            (self.pack_runs if self.kernel.weights == "runs" else self.pack_terms)(f, task, phase, weight, target, valid)
            with f.when(index < task["vectors"]):
                place = task.workspace + task["bias_at"] + v * self.vector
                source = task.operand("bias") + v * (width * memory)
                known = f.select(task["has_bias"] > 0, valid, f.value(0))
                f.store(f.zero(numeric.vector), place)
                f.loop(0, known, 1, lambda i: f.store(numeric.load(f, source + i * memory, 1), place + self.lane(i) * size))

        return body

    def lane(self, result: Value) -> Value:
        """The lane of one of a vector's results."""
        out, per_vector = self.lanes.out, self.lanes.per_vector
        return result if self.lanes.in_order else result % out * per_vector + result // out

    def pack_terms(self, f: Function, task: Task, phase: dict[str, Value], weight: Value, target: Value, valid: Value) -> None:
        """Term by term, a lane at a time, or all of them where they are neighbours."""
        numeric, size = self.numeric, self.numeric.compute_bytes
        lane_offsets, offsets = task.table("lane_offsets"), f.to_pointer(phase["weights"])
        mask = f.lane_mask(valid, numeric.lanes)

        def term(t: Value) -> None:
            source, place = weight + f.load_index(offsets, t), target + t * self.vector

            def lane(i: Value) -> None:
                f.store(numeric.load(f, source + f.load_index(lane_offsets, i), 1), place + self.lane(i) * size)

            if self.kernel.weights == "vectors":
                f.store(numeric.load(f, source, numeric.lanes, mask), place)
                return
            f.store(f.zero(numeric.vector), place)
            f.loop(0, valid, 1, lane)

        f.loop(0, phase["terms"], 1, term)

    def pack_runs(self, f: Function, task: Task, phase: dict[str, Value], weight: Value, target: Value, valid: Value) -> None:
        """A lane's weights are runs of memory: blocks of them are transposed, and each goes to its term's place, if the phase has it."""
        numeric, lanes = self.numeric, self.numeric.lanes
        length, places = task["run_length"], f.to_pointer(phase["weights"])
        rows = [weight + f.load_index(task.table("lane_offsets"), f.minimum(valid - 1, result)) for result in self.lanes.order]

        def put(value: Value, index: Value) -> None:
            place = f.load_index(places, index)
            with f.when(place >= 0):
                f.store(value, target + place)

        def run(number: Value) -> None:
            def block(first: Value, count: Value | None) -> None:
                mask = None if count is None else f.lane_mask(count, lanes)
                at = number * task["run_pitch"] + first * numeric.memory_bytes
                for i, value in enumerate(f.transpose([numeric.load(f, row + at, lanes, mask) for row in rows])):
                    if count is None:
                        put(value, number * length + first + i)
                    else:
                        with f.when(count > i):
                            put(value, number * length + i)

            def many() -> None:
                f.loop(0, length, lanes, lambda i: block(f.minimum(i, length - lanes), None))

            f.branch(length >= lanes, many, lambda: block(f.value(0), length))

        f.loop(0, task["runs"], 1, run)

    def compute_stage(self, f: Function, task: Task) -> Callable[[Value], None]:
        scratch = task.scratch

        def body(index: Value) -> None:
            t = self.place(f, task, index)
            after = self.place(f, task, task.after(index))

            def vector(v: Value) -> None:
                more = v + 1 < t["last"]
                following = {name: f.select(more, t[name], after[name]) for name in ("p0", "q0", "image")}
                following["source"] = self.source(task, following["image"], f.select(more, v + 1, after["first"]))
                self.tile(f, task, {**t, "v": v, "tile": scratch, "c": scratch + task["c_at"]}, following)

            f.loop(t["first"], t["last"], 1, vector)

        return body

    def place(self, f: Function, task: Task, index: Value) -> dict[str, Value]:
        """The vectors, the tile and the image of a task."""
        t: dict[str, Value] = {}
        t["first"], index = (index % task["vector_blocks"]) * task["block_vectors"], index // task["vector_blocks"]
        t["last"] = f.minimum(t["first"] + task["block_vectors"], task["vectors"])
        t["q0"], index = (index % task["q_tiles"]) * task["tile_q"], index // task["q_tiles"]
        t["p0"], t["image"] = (index % task["p_tiles"]) * task["tile_p"], index // task["p_tiles"]
        return t

    def source(self, task: Task, image: Value, v: Value) -> Value:
        return task.operand("source") + image * task["source_image"] + self.split(v)[0] * task["source_channel"] * self.lanes.source_width

    def tile(self, f: Function, task: Task, t: dict[str, Value], following: dict[str, Value]) -> None:
        """One tile of one vector; ``following`` is what this thread packs next."""
        lanes = self.lanes
        group, part = self.split(t["v"])
        known = f.minimum(task["source_channels"] - group * lanes.source_width, lanes.source_width)
        packing = [f.to_pointer(f.load(f["context"])), self.source(task, t["image"], t["v"]), t["tile"], t["p0"], t["q0"], known]
        if isinstance(part, int):
            f.call(self.pack, packing)
        else:  # the parts of a group read the same tile
            with f.when(part.equals(0)):
                f.call(self.pack, packing)
        t["valid"] = f.minimum(task["out_channels"] - t["v"] * lanes.width, lanes.width)
        out = task.operand("out") + t["image"] * task["out_image"] + t["v"] * task["out_channel"] * lanes.width
        row, column = t["p0"] * task["row_phases"], t["q0"] * task["column_phases"]
        out = out + row * task["out_row"] + column * task["out_column"]
        t["bias"] = task.workspace + task["bias_at"] + t["v"] * self.vector
        if self.in_place:
            t["c"], t["c_row"], t["c_column"] = out, task["out_row"], task["out_column"]
        else:
            t["c_row"], t["c_column"] = task["c_width"] * self.vector, f.value(self.vector)
        phases = task["row_phases"] * task["column_phases"]
        f.loop(0, phases, 1, lambda i: self.compute(f, task, t, following, self.phase(f, task, i), i.equals(0)))
        if self.flush is not None:
            rows = f.minimum(task["out_rows"] - row, task["tile_p"] * task["row_phases"])
            columns = f.minimum(task["out_columns"] - column, task["tile_q"] * task["column_phases"])
            whole = task["q_tiles"].equals(1)
            runs, length = f.select(whole, f.value(1), rows), f.select(whole, rows * columns, columns)
            f.call(self.flush, [t["c"], out, runs, length, t["c_row"], task["out_row"], task["out_channel"], t["valid"]])

    def compute(self, f: Function, task: Task, t: dict[str, Value], following: dict[str, Value], phase: dict[str, Value], first: Value) -> None:
        """One phase of the tile, in blocks; with the first one the source of the next tile is asked for."""
        block = f.to_pointer(f.load(f["context"]))
        rows = f.maximum(f.minimum(phase["row_count"] - t["p0"], task["tile_p"]), 0)
        columns = f.maximum(f.minimum(phase["column_count"] - t["q0"], task["tile_q"]), 0)
        row_step, column_step = t["c_row"] * task["row_phases"], t["c_column"] * task["column_phases"]
        c = t["c"] + phase["row_start"] * t["c_row"] + phase["column_start"] * t["c_column"]
        panel = task.workspace + phase["panel"] + t["v"] * phase["terms"] * self.vector
        source_row = task["source_row"]
        for kind in range(len(self.kernel.kinds)):

            def row_block(p: Value, row_size: int, kind: int = kind) -> None:
                def column_block(q: Value, column_size: int) -> None:
                    source = t["tile"] + p * source_row + q * self.vector
                    place = c + p * row_step + q * column_step
                    arguments = [source, panel, place, t["bias"], phase["record"], source_row, row_step, column_step, t["valid"]]
                    f.call(self.blocks[kind, row_size, column_size], arguments)

                _pieces(f, columns, self.column_sizes, column_block)
                with f.when(first):
                    ahead = [p * task["prefetch_rows"], (p + row_size) * task["prefetch_rows"]]
                    f.call(self.prefetch, [block, following["source"], following["p0"], following["q0"], *ahead])

            with f.when(phase["kind"].equals(kind)):
                _pieces(f, rows, self.row_sizes, row_block)


def _pieces(f: Function, total: Value, sizes: tuple[int, ...], body: Callable[[Value, int], None]) -> None:
    """``body(start, size)`` for ``total`` split into pieces of the first size and, where there are two, the second, one smaller."""
    size = sizes[0]
    count = (total + (size - 1)) // size
    wide = count - (count * size - total) if len(sizes) > 1 else count
    f.loop(0, wide, 1, lambda i: body(i * size, size))
    if len(sizes) > 1:
        f.loop(wide, count, 1, lambda i: body(i * (size - 1) + wide, size - 1))
