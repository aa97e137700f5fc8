"""Depthwise grad_weight and the bias gradient: for each tap, the sum over images and pixels of input times output gradient.

Vector lanes are channels; tiles of both operands are copied into scratch.  The sum has a fixed shape: tiles are grouped into *slices*,
whose number depends on the problem only; each slice adds its tiles in order into its own partial sums, and a second stage adds the slices in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ..codegen.emit import Function, Module, Value
from ..codegen.entry import ArgumentBlock, Task, emit_entry
from ..codegen.load import load
from ..codegen.numeric import Numeric
from ..problem import DTYPES, ConvProblem
from . import target as targets
from .depthwise_geometry import Line, context_rows, lines, predicted_cycles
from .depthwise_products import Edges, Shape, emit_bias_sum, emit_products
from .depthwise_tile import Lanes, emit_load, image_strides, inside, odd_lines
from .plan import CpuPlan
from .target import Target

__all__ = ["plan_weight"]

ARGUMENTS = ArgumentBlock((
    "tasks", "chunks", "chunk", "tiles", "slice_tiles", "row_tiles", "col_tiles", "tile_rows", "tile_cols", "vectors_total", "lanes_total", "multiplier",
    "scratch_at", "scratch_size", "gradient_at", "pixel", "gradient_pixel", "gradient_pitch", "strip_rows",
    "ring_table", "gradient_places",
    "row_table", "row_step", "row_context", "row_spacing", "col_table", "col_step", "col_extent", "inside_first", "inside_last",
    "gradient_rows", "gradient_cols", "row_count", "col_count", "row_blocks", "row_groups", "col_blocks", "col_groups",
    "source_image", "source_row", "source_channel", "gradient_image", "gradient_row", "gradient_channel",
    "source_rows", "source_at", "source_pixel", "taps", "kernel_columns", "partial_slice", "partial_vector", "sum_tasks", "slices",
))  # fmt: skip

_MANY_IMAGES = 4  # from which on, with AVX-512 at full rate, 16 vectors of channels are up to 1.17 times as fast as 8 (9 to 15 are one task then)
_SLICE_TASKS = 64  # tasks aimed at: enough for 16 threads to share evenly
_PARTIAL_BYTES = 32 << 20


@dataclass(frozen=True)
class Spec:
    """What a kernel of ``grad_weight`` is generated from: lanes of the input and of the gradient, and blocks of taps by pixels.

    ``direct``: the gradient is read where it is (nhwc, whole vectors and whole blocks of pixels), not through scratch; with ``edges`` so is the input.
    ``at_once``: one block holds all taps and reaches every output row, so that it adds up the bias gradient too: a pass of its own took a sixth of a 3x3
    layer's time.
    """

    source: Lanes
    gradient: Lanes
    shape: Shape
    bias: bool
    direct: bool
    edges: Edges | None
    at_once: bool

    @property
    def name(self) -> str:
        numeric = self.source.numeric
        parts = ("depthwise_weight", numeric.dtype, self.source.name, self.shape.name, *((self.edges.name,) if self.edges else ()))
        bias = (("bias_at_once" if self.at_once else "bias"),) if self.bias else ()
        return "_".join((*parts, *(("direct",) if self.direct else ()), *bias, numeric.target.isa))


def emit_weight(spec: Spec) -> Module:
    """The kernel of ``grad_weight``.

    Stage 0, for each slice and chunk of vectors: zero the partial sums ``[tap (and bias)][lane]``; for each strip of output rows of its tiles: load the
    next input rows into a ring of scratch rows (and the gradient's rows), then for each vector, block of kernel rows and block of kernel columns: add
    the products of the strip's pixels to the partial sums.
    Stage 1, for each vector: add the slices, write ``[k][r][s]``.
    """
    module = Module()
    load_source = None if spec.edges else emit_load(module, spec.source, "load_source", zero_rows=True)
    load_gradient = None if spec.direct else emit_load(module, spec.gradient, "load_gradient", zero_rows=True)
    sizes = [(rows, columns) for rows in spec.shape.rows for columns in spec.shape.columns]
    at_once = spec.bias and spec.at_once
    products = {size: emit_products(module, spec.source, spec.shape, *size, spec.direct, spec.edges, at_once) for size in sizes}
    bias = emit_bias_sum(module, spec.gradient, spec.shape, spec.direct, spec.edges) if spec.bias and not at_once else None

    def gather(f: Function, task: Task) -> object:
        return partial(_gather, f, task, spec, (load_source, load_gradient), products, bias)

    def total(f: Function, task: Task) -> object:
        return partial(_total, f, task, spec)

    emit_entry(module, ARGUMENTS, [("tasks", gather), ("sum_tasks", total)])  # type: ignore[list-item]
    return module


def _gather(
    f: Function,
    task: Task,
    spec: Spec,
    loaders: tuple[Function | None, Function | None],
    products: dict[tuple[int, int], Function],
    bias: Function | None,
    index: Value,
) -> None:
    lanes = spec.source
    numeric, entry = lanes.numeric, lanes.entry_bytes
    number = index // task["chunks"]
    vector0 = index % task["chunks"] * task["chunk"]
    vectors = f.minimum(task["chunk"], task["vectors_total"] - vector0)
    scratch = task.scratch
    gradient = scratch + task["gradient_at"]
    sums = task.workspace + (number * task["partial_slice"] + vector0 * task["partial_vector"])
    zero = f.zero(numeric.vector)
    f.loop(0, vectors * task["partial_vector"], entry, lambda i: f.store(zero, sums + i))
    first_tile = number * task["slice_tiles"]

    def tile(t: Value) -> None:
        col0 = t % task["col_tiles"] * task["tile_cols"]
        rest = t // task["col_tiles"]
        row0 = rest % task["row_tiles"] * task["tile_rows"]
        image = rest // task["row_tiles"]
        rows = f.minimum(task["tile_rows"], task["row_count"] - row0)
        real = f.minimum(task["tile_cols"], task["col_count"] - col0)
        # Whole blocks of pixels: the gradient is zero behind the last one, and so is the input there.
        cols = real if spec.edges else (real + spec.shape.pixels - 1) // spec.shape.pixels * spec.shape.pixels
        first_row, first_col = row0 * task["row_step"], col0 * task["col_step"]
        source_cols = (cols - 1) * task["col_step"] + task["col_extent"] + 1
        inside_first = f.minimum(f.maximum(task["inside_first"] - first_col, 0), source_cols)
        inside_last = f.maximum(f.minimum(task["inside_last"] - first_col, source_cols), inside_first)
        start = vector0 * numeric.lanes
        other = task.operand("other") + image * task["gradient_image"]

        def load_source(first: Value, count: Value) -> None:
            if loaders[0] is None:
                return
            f.call(loaders[0], [
                task.operand("source") + image * task["source_image"], scratch, task.table("row_table") + (first_row + first) * 8,
                task.table("ring_table") + first * 8, count, task.table("col_table") + first_col * 8, source_cols, inside_first, inside_last, start, vectors,
                task["lanes_total"], task["multiplier"], f.value(0), task["pixel"], task["source_row"], task["source_channel"],
            ])  # fmt: skip

        def strip(i: Value) -> None:
            count = f.minimum(task["strip_rows"], rows - i)
            load_source(i * task["row_step"] + task["row_context"], count * task["row_step"])
            if loaders[1] is None:
                at = other + (row0 + i) * task["gradient_row"] + col0 * task["gradient_channel"] + start * numeric.memory_bytes
            else:
                at = gradient
                f.call(loaders[1], [
                    other, gradient, task.table("gradient_rows") + (row0 + i) * 8, task.table("gradient_places"), count,
                    task.table("gradient_cols") + col0 * 8, cols, f.value(0), real, start, vectors, task["lanes_total"], f.value(1),
                    f.value(0), task["gradient_pixel"], task["gradient_row"], task["gradient_channel"],
                ])  # fmt: skip
            image_at = task.operand("source") + image * task["source_image"] + (start * numeric.memory_bytes + task["source_at"])
            memory = (image_at if spec.edges else scratch, at, sums)
            lanes_left = task["lanes_total"] - start
            f.loop(0, vectors, 1, lambda v: _vector(f, task, spec, memory, v, (row0, i, count, cols, lanes_left), products, bias))

        load_source(f.value(0), task["row_context"])
        f.loop(0, rows, task["strip_rows"], strip)

    f.loop(first_tile, f.minimum(first_tile + task["slice_tiles"], task["tiles"]), 1, tile)


def _vector(
    f: Function,
    task: Task,
    spec: Spec,
    memory: tuple[Value, Value, Value],
    v: Value,
    strip: tuple[Value, Value, Value, Value, Value],
    products: dict[tuple[int, int], Function],
    bias: Function | None,
) -> None:
    """Every block of taps for one vector of channels of a strip."""
    numeric, entry = spec.source.numeric, spec.source.entry_bytes
    pixel: Value | int = task["source_pixel" if spec.edges else "pixel"] if spec.source.format == "nhwc" else entry
    row0, i0, rows, cols, lanes_left = strip
    in_memory = numeric.lanes * numeric.memory_bytes
    source, gradient = memory[0] + v * (in_memory if spec.edges else entry), memory[1] + v * (in_memory if spec.direct else entry)
    ring_table, ring0 = (task.table("source_rows"), row0) if spec.edges else (task.table("ring_table"), f.value(0))
    lanes_left = lanes_left - v * numeric.lanes
    sums = memory[2] + v * task["partial_vector"]

    def block(i: Value, j: Value, function: Function) -> None:
        record = task.table("row_blocks") + i * 24
        first, low, high = (f.load(record + 8 * k) for k in range(3))
        column = f.load_index(task.table("col_blocks"), j)
        # Output rows of the strip that these kernel rows read inside the image.
        low = f.minimum(f.maximum(low - row0 - i0, 0), rows)
        count = f.maximum(f.minimum(high - row0 - i0, rows) - low, 0)
        ring = ring_table + ((ring0 + i0 + low) * task["row_step"] + first * task["row_spacing"]) * 8
        with f.when(count > 0):
            f.call(function, [
                source + column * spec.shape.spacing * pixel, ring, gradient + low * task["gradient_pitch"],
                sums + (first * task["kernel_columns"] + column) * entry, count, cols, task["row_step"] * 8, task["row_spacing"] * 8,
                task["gradient_pitch"], task["kernel_columns"] * entry, f.value(pixel), task["gradient_pixel"], lanes_left,
            ])  # fmt: skip

    for a, r in enumerate(spec.shape.rows):
        row_bounds = task.table("row_groups") + 8 * a
        for b, s in enumerate(spec.shape.columns):
            col_bounds = task.table("col_groups") + 8 * b
            function = products[r, s]

            def each_row(i: Value, function: Function = function, bounds: Value = col_bounds) -> None:
                f.loop(f.load(bounds), f.load(bounds + 8), 1, lambda j: block(i, j, function))

            f.loop(f.load(row_bounds), f.load(row_bounds + 8), 1, each_row)
    if bias is not None:
        f.call(bias, [gradient, sums + task["taps"] * entry, rows, cols, task["gradient_pitch"], task["gradient_pixel"], lanes_left])


def _total(f: Function, task: Task, spec: Spec, index: Value) -> None:
    """Add the slices' sums of one vector of channels, in the order of the slices, and write its lanes."""
    numeric, entry = spec.source.numeric, spec.source.entry_bytes
    sums = task.workspace + index * task["partial_vector"]

    def add(t: Value) -> None:
        at = sums + t
        value = f.load(at, numeric.vector)
        _, value = f.loop(
            1,
            task["slices"],
            1,
            lambda _, p, value: [p + task["partial_slice"], f.fadd(value, f.load(p, numeric.vector))],
            [at + task["partial_slice"], value],
        )
        f.store(value, at)

    f.loop(0, task["partial_vector"], entry, add)
    lane0 = index * numeric.lanes

    def lane(i: Value) -> None:
        number = lane0 + i
        from_ = sums + i * numeric.compute_bytes
        out = task.operand("out") + number * task["taps"] * numeric.memory_bytes

        def tap(t: Value) -> None:
            numeric.store(f, f.load(from_ + t * entry, numeric.compute), out + t * numeric.memory_bytes, 1)

        f.loop(0, task["taps"], 1, tap)
        if spec.bias:
            value = f.load(from_ + task["taps"] * entry, numeric.compute)
            numeric.store(f, value, task.operand("bias") + number * numeric.memory_bytes, 1)

    f.loop(0, f.minimum(numeric.lanes, task["lanes_total"] - lane0), 1, lane)


@dataclass(frozen=True)
class Tiling:
    """Output rows and columns of a tile, rows of a strip, vectors of channels together, tiles of a slice."""

    rows: int
    cols: int
    strip: int
    vectors: int
    slice_tiles: int


def tiling(problem: ConvProblem, source: Lanes, lines_: tuple[Line, Line], pixels: int, target: Target) -> Tiling:
    """A ring of rows within half of the second-level cache; depends on the problem and the machine, never on the thread count."""
    rows, cols = lines_
    budget = target.l2 // 2 // source.entry_bytes
    total = -(-problem.k // source.numeric.lanes)
    # Enough pixels a strip to make little of loading and storing the sums; of 1, 2, 4 and 8 rows of 56 or 28 pixels, 4 measured best for 3x3.
    strip = min(rows.count, max(4, (112 if problem.r * problem.s <= 49 else 448) // cols.count))

    def entries(tile_cols: int) -> int:
        tile_cols = -(-tile_cols // pixels) * pixels
        return cols.length(tile_cols) * (context_rows(rows) + strip * rows.step) + strip * tile_cols

    tile_cols = cols.count
    while tile_cols > 64 and entries(tile_cols) > budget:
        tile_cols = -(-tile_cols // (2 * pixels)) * pixels
    vectors = 1
    if problem.format == "nhwc" and source.kind == "same":
        most = 16 if problem.n >= _MANY_IMAGES and target.full_rate else 8
        vectors = max(1, min(total, most, budget // entries(tile_cols)))
        vectors = -(-total // -(-total // vectors))
    chunks, col_tiles = -(-total // vectors), -(-cols.count // tile_cols)
    # Every tile loads the context of its first row again.
    pieces = max(1, min(_SLICE_TASKS // (problem.n * chunks * col_tiles), rows.count // max(14, 4 * rows.extent)))
    tile_rows = -(-rows.count // pieces)
    tiles = problem.n * -(-rows.count // tile_rows) * col_tiles
    slice_bytes = total * (problem.r * problem.s + 1) * source.entry_bytes
    slices = max(1, min(tiles, -(-_SLICE_TASKS // chunks), _PARTIAL_BYTES // slice_bytes))
    return Tiling(tile_rows, tile_cols, min(strip, tile_rows), vectors, -(-tiles // slices))


def _row_blocks(rows: Line, blocks: list[int], edges: bool) -> list[tuple[int, int, int, int]]:
    """Records ``(kernel rows, first kernel row, first output row, last output row + 1)`` of the blocks.

    ``edges``: blocks are cut where they reach rows outside the image, which otherwise are rows of zeros.
    """
    ranges = rows.tap_ranges()[0]
    records = []
    first = 0
    for size in blocks:
        reached = np.flatnonzero((ranges[:, 0] < first + size) & (ranges[:, 1] > first))
        if not edges:
            records.append((size, first, int(reached[0]) if reached.size else 0, int(reached[-1]) + 1 if reached.size else 0))
        for p in map(int, reached) if edges else ():
            low, high = max(first, int(ranges[p, 0])), min(first + size, int(ranges[p, 1]))
            if records and records[-1][:2] == (high - low, low) and records[-1][3] == p:
                records[-1] = (*records[-1][:3], p + 1)
            else:
                records.append((high - low, low, p, p + 1))
        first += size
    return records


def _reads_little(problem: ConvProblem, cols: Line) -> bool:
    """Whether a row that several kernel rows read is read again out of the first-level cache, or seldom.

    Pixels at distances of 512 bytes share an eighth of that cache's sets: 3x3 at stride 1 on rows of 56 float32 pixels is 10 % slower from memory than through
    scratch, 7x7 60 %; at stride 2 it is 10 to 20 % faster, in the 16-bit types 25 to 55 %, in rows of 14 pixels 10 %.
    """
    small = problem.r * problem.s <= 9
    return cols.count <= 14 or (small and (cols.step > 1 or problem.dtype in ("bf16", "f16")))


def _shape(problem: ConvProblem, target: Target, cols: Line, plain: bool) -> tuple[Shape, Edges | None]:
    """Blocks of taps and pixels, and the ends of a row where it can be read from memory alone."""
    reach = cols.inside()
    left, right = reach[0], max(0, cols.length(cols.count) - reach[1])

    def edges(width: int) -> Edges | None:
        return Edges.of(cols.count, width, cols.step, left, right)

    def choose(fits: Callable[[int], bool]) -> Shape | None:
        return Shape.choose(target, problem.r, problem.s, cols.count, cols.step, cols.spacing, fits)

    whole = choose(lambda width: edges(width) is not None) if plain and cols.mode == "zeros" else None
    if whole is not None and len(whole.col_blocks(problem.s)) == 1:
        return whole, edges(whole.pixels)
    through_scratch = choose(lambda _: True)
    assert through_scratch is not None
    return through_scratch, None


def plan_weight(name: str, problem: ConvProblem, threads: int) -> CpuPlan:
    """The plan of a depthwise ``grad_weight``."""
    target = targets.target()
    numeric = Numeric(problem.dtype, target)
    tail = problem.k % numeric.lanes != 0
    source = Lanes(numeric, problem.format, "same" if problem.kg == 1 else "shared", tail)
    gradient = Lanes(numeric, problem.format, "same", tail)
    rows, cols = lines(problem, reduce_columns=problem.format == "nhwc")
    plain = problem.format == "nhwc" and source.kind == "same" and (target.masks or not tail)
    shape, edges = _shape(problem, target, cols, plain and _reads_little(problem, cols))
    tile = tiling(problem, source, (rows, cols), shape.pixels, target)
    if edges:
        tile = replace(tile, cols=cols.count)
    divides = tile.cols == cols.count and cols.count % shape.pixels == 0
    direct = edges is not None or (problem.format == "nhwc" and not numeric.converts and not tail and divides)
    records = _row_blocks(rows, shape.row_blocks(problem.r), edges is not None)
    shape = replace(shape, rows=tuple(sorted({record[0] for record in records}, reverse=True)))
    records.sort(key=lambda record: (-record[0], record[1]))
    col_sizes = shape.col_blocks(problem.s)
    at_once = records == [(problem.r, 0, 0, rows.count)] and len(col_sizes) == 1
    spec = Spec(source, gradient, shape, problem.epilogue.bias, direct, edges, at_once)
    kernel = load(spec.name, target, lambda: emit_weight(spec))
    col_starts = np.cumsum([0, *col_sizes[:-1]])
    slack = shape.pixels * (cols.step + 1)
    tables = {
        "row_table": rows.table(rows.step),
        "col_table": cols.table(slack),
        "gradient_rows": np.arange(problem.p, dtype=np.int64),
        "gradient_cols": np.concatenate([np.arange(problem.q, dtype=np.int64), np.full(slack, -1, np.int64)]),
        "row_blocks": np.array([record[1:] for record in records], np.int64),
        "row_groups": np.array([sum(record[0] > size for record in records) for size in shape.rows] + [len(records)], np.int64),
        "col_blocks": np.array(col_starts, np.int64),
        "col_groups": np.array([sum(shape.columns.index(c) < i for c in col_sizes) for i in range(len(shape.columns) + 1)], np.int64),
    }
    vectors = -(-problem.k // numeric.lanes)
    entry = source.entry_bytes
    tile_cols = -(-tile.cols // shape.pixels) * shape.pixels
    # An odd number of cache lines, so that the pixels of one vector spread over the cache's sets.
    pixel = (tile.vectors | 1) * entry
    slack = numeric.lanes if problem.format == "nchw" else 0
    pitch, gradient_pitch = odd_lines((cols.length(tile_cols) + slack) * pixel), odd_lines((tile_cols + slack) * pixel)
    x = image_strides("source", problem.format, problem.c, problem.h, problem.w, DTYPES[problem.dtype])
    tables["source_rows"] = np.maximum(rows.table(rows.step + 1), 0) * x["source_row"]
    strides = image_strides("gradient", problem.format, problem.k, problem.p, problem.q, DTYPES[problem.dtype])
    ring = context_rows(rows) + tile.strip * rows.step
    tables["ring_table"] = np.arange(rows.length(rows.count) + rows.step, dtype=np.int64) % ring * pitch
    tables["gradient_places"] = np.arange(tile.strip, dtype=np.int64) * gradient_pitch
    values = {key: table.ctypes.data for key, table in tables.items()}
    gradient_at = pitch * ring
    scratch_size = 64 if edges else -(-(gradient_at + (0 if direct else gradient_pitch * tile.strip)) // 4096) * 4096 + 64
    tiles = (problem.n, -(-rows.count // tile.rows), -(-cols.count // tile.cols))
    count = tiles[0] * tiles[1] * tiles[2]
    slices, chunks = -(-count // tile.slice_tiles), -(-vectors // tile.vectors)
    partial_vector = (problem.r * problem.s + problem.epilogue.bias) * entry
    scratch_at = -(-slices * vectors * partial_vector // 4096) * 4096
    first, last = inside(cols, problem.format)
    values |= {
        "tasks": slices * chunks, "chunks": chunks, "chunk": tile.vectors, "tiles": count, "slice_tiles": tile.slice_tiles, "row_tiles": tiles[1],
        "col_tiles": tiles[2], "tile_rows": tile.rows, "tile_cols": tile.cols, "vectors_total": vectors, "lanes_total": problem.k,
        "multiplier": problem.kg, "scratch_at": scratch_at, "scratch_size": scratch_size, "gradient_at": gradient_at, "pixel": pixel,
        "strip_rows": tile.strip,
        "gradient_pixel": strides["gradient_channel"] if direct else pixel, "gradient_pitch": strides["gradient_row"] if direct else gradient_pitch,
        "row_step": rows.step, "row_context": context_rows(rows), "row_spacing": rows.spacing,
        "col_step": cols.step, "col_extent": cols.extent, "inside_first": first, "inside_last": last, "row_count": rows.count, "col_count": cols.count,
        "taps": problem.r * problem.s, "kernel_columns": problem.s, "partial_slice": vectors * partial_vector, "partial_vector": partial_vector,
        "sum_tasks": vectors, "slices": slices,
    }  # fmt: skip
    values |= x | strides | {"source_at": cols.base * x["source_channel"], "source_pixel": cols.unit * x["source_channel"]}
    facts = {"tile": (tile.rows, tile.cols), "strip": tile.strip, "vectors": tile.vectors, "slices": slices, "block": shape.name}
    facts["predicted_cycles"] = predicted_cycles(problem, numeric.lanes, threads)
    return CpuPlan(problem, name, kernel, ARGUMENTS.pack(threads, values), tuple(tables.values()), scratch_at + threads * scratch_size, facts)
