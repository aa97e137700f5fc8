"""The kernel of weight gradients as sums of outer products, a pixel of the gradient of y by a pixel of x, read where they lie.

Vectors run over input channels, which are neighbours in a pixel of nhwc and in the weight's gradient; the gradient of y is broadcast, in either format::

    stage 1, for each group, block of taps, block of input channels, block of output channels:
        for each piece of the pixels, segment of input channels:
            (nchw, where a segment is a panel: transpose what the piece reads of x)
            for each tap of the task's, rows of output channels, panel:                 micro-kernel
            (first block of input channels: sums of the gradient of y, for the bias)
    stage 2 (several taps that are neighbours in the weight):                           sums to the weight's gradient

Nothing else is packed, no sum is shared by two tasks, and no result is transposed where a tap's channels are neighbours in the weight.
Each tap clips a piece to the outputs that it reads inside x for.  What it reads in a padding other than zeros are runs of outputs too, whose steps in x may
be negative or nothing: entries of the tap table behind those of the taps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..codegen.emit import Function, Module, Value
from ..codegen.entry import ArgumentBlock, Task, emit_entry
from ..codegen.numeric import Numeric
from .micro import Pitches
from .target import Target

__all__ = ["ARGUMENTS", "PIECE", "TAP", "OuterKernel"]

ARGUMENTS = ArgumentBlock(
    (
        "tasks", "finish_tasks", "has_bias", "bias_at", "source_image", "source_channel", "x_image", "x_pixel", "x_group",
        "gy_image", "gy_row", "gy_column", "gy_channel", "pieces", "piece_table", "taps", "tap_table", "tap_blocks", "edge_table", "zeros",
        "c_blocks", "block_panels", "segment_panels", "panels", "wide_panels", "k_blocks", "block_groups", "row_groups", "wide_groups", "out_channels",
        "group_channels", "sum_row", "sum_tap", "weight_row", "scratch_at", "scratch_size",
    )
)  # fmt: skip
"""Pitches are bytes: of x as it is read, of the gradient of y, of the sums and of the weight; nchw: of x in memory too.  Of the tap table's entries behind
the taps those of block ``b`` begin at entry ``edge_table[b]`` and end at the next one's first.  Panels are of input channels, row groups of output channels;
of both the ``wide`` ones come first.  A segment is what all rows of a task meet before the next panels."""

PIECE = ("first_image", "last_image", "first_row", "last_row", "first_column", "last_column", "first_pixel", "last_pixel", "at_edge")
"""An entry of the piece table: the outputs whose products are summed from zero, the pixels of x, a run of an image, that they read, and whether some of
them are in the padding."""
TAP = ("tap", "offset", "x_row", "x_column", "first_row", "last_row", "first_column", "last_column")
"""An entry of the tap table: the tap; where output 0 would read, in bytes from pixel 0 of x, and from there for an output row and column more; and the outputs
that it holds for."""
_TRANSPOSE = [("ptr", "source"), ("ptr", "target"), ("i64", "pixels"), ("i64", "channels"), ("i64", "plane")]
_WAYS = 4
_BIAS = [
    ("ptr", "gy"), ("ptr", "sums"), ("ptr", "out"), ("i64", "count"), ("i64", "images"), ("i64", "rows"), ("i64", "columns"),
    ("i64", "gy_image"), ("i64", "gy_row"), ("i64", "gy_column"), ("i64", "gy_channel"), ("i64", "first"), ("i64", "last"),
]  # fmt: skip
_MICRO = [
    ("ptr", "x"), ("ptr", "gy"), ("ptr", "sums"), ("ptr", "before"), ("i64", "images"), ("i64", "rows"), ("i64", "columns"),
    ("i64", "x_image"), ("i64", "x_row"), ("i64", "x_column"), ("i64", "gy_image"), ("i64", "gy_row"), ("i64", "gy_column"), ("i64", "gy_channel"),
    ("i64", "sum_row"), ("i64", "before_row"), ("i64", "lanes_last"),
]  # fmt: skip


@dataclass(frozen=True)
class OuterKernel:
    """What the code depends on: ``rows`` x ``vectors`` accumulators; ``narrow_rows``, ``narrow_vectors``: blocks of one less are needed too; ``masked``:
    the input channels fill no vectors; ``gathered``: the weight has several taps, neighbours in memory."""

    target: Target
    dtype: str
    format: str
    rows: int
    vectors: int
    narrow_rows: bool
    narrow_vectors: bool
    masked: bool
    gathered: bool

    @property
    def name(self) -> str:
        flags = "".join(letter for letter, set_ in zip("rvmg", (self.narrow_rows, self.narrow_vectors, self.masked, self.gathered)) if set_)
        return f"outer_{self.dtype}_{self.format}_{self.rows}x{self.vectors}{flags}_{self.target.isa}"

    def emit(self) -> Module:
        """The module's IR text; its entry point is ``entry``."""
        module = Module()
        builder = _Builder(self, module)
        finish = [("finish_tasks", builder.finish_stage)] if self.gathered else []
        emit_entry(module, ARGUMENTS, [("tasks", builder.stage), *finish])
        return module


class _Builder:
    def __init__(self, kernel: OuterKernel, module: Module) -> None:
        self.kernel, self.module = kernel, module
        self.numeric = Numeric(kernel.dtype, kernel.target)
        rows = (kernel.rows, kernel.rows - 1) if kernel.narrow_rows else (kernel.rows,)
        vectors = (kernel.vectors, kernel.vectors - 1) if kernel.narrow_vectors else (kernel.vectors,)
        self.micros = {(r, v): self.emit_micro(r, v) for r in rows for v in vectors}
        self.bias = self.emit_bias()
        self.transposes = {v: self.emit_transpose(v) for v in vectors} if kernel.format == "nchw" else {}

    def emit_micro(self, rows: int, vectors: int) -> Function:
        """``sums[row][vector] = before[row][vector] + sum over pixels of gy[pixel][row] * x[pixel][vector]``."""
        numeric = self.numeric
        f = self.module.function(f"micro_{rows}x{vectors}", _MICRO)
        lanes, size, fused = numeric.lanes, numeric.compute_bytes, numeric.target.fma
        pitches = Pitches(f["gy_channel"]) if self.kernel.format == "nchw" else None
        mask = f.lane_mask(f["lanes_last"], lanes) if self.kernel.masked else None

        def last(v: int) -> Value | None:
            return mask if v == vectors - 1 else None

        def pixel(_: Value, source: Value, gradient: Value, *sums: Value) -> list[Value]:
            loaded = [numeric.load(f, source + v * lanes * size, lanes, last(v)) for v in range(vectors)]
            # Opaque, or every third row gets a pointer that is carried from step to step, and accumulators go to the stack.
            places = pitches.rows(f.opaque(gradient), rows) if pitches else [gradient + r * size for r in range(rows)]
            result = list(sums)
            for r in range(rows):
                scalar = f.splat(numeric.load(f, places[r], 1), lanes)
                for v in range(vectors):
                    result[r * vectors + v] = f.fma(scalar, loaded[v], result[r * vectors + v], fused)
            return [source + f["x_column"], gradient + f["gy_column"], *result]

        def row(p: Value, source: Value, gradient: Value, *sums: Value) -> list[Value]:
            _, _, *found = f.loop(0, f["columns"], 1, pixel, [source + p * f["x_row"], gradient + p * f["gy_row"], *sums])
            return [source, gradient, *found]

        def image(i: Value, *sums: Value) -> list[Value]:
            _, _, *found = f.loop(0, f["rows"], 1, row, [f["x"] + i * f["x_image"], f["gy"] + i * f["gy_image"], *sums])
            return found

        sums = f.loop(0, f["images"], 1, image, [f.zero(numeric.vector)] * (rows * vectors))
        for r, (place, before) in enumerate(zip(Pitches(f["sum_row"]).rows(f["sums"], rows), Pitches(f["before_row"]).rows(f["before"], rows))):
            for v in range(vectors):
                value, at = sums[r * vectors + v], v * lanes * size
                if last(v) is None:
                    f.store(f.fadd(value, f.load(before + at, numeric.vector)), place + at)
                else:
                    f.store_masked(f.fadd(value, f.load_masked(before + at, mask, numeric.vector)), place + at, mask)  # type: ignore[arg-type]
        f.ret()
        return f

    # -- stage 1

    def emit_transpose(self, vectors: int) -> Function:
        """Pixels of a panel's channels side by side, as far apart in narrow panels as in wide ones, from planes; the last block of pixels begins early,
        channels behind the last one are the last one."""
        numeric = self.numeric
        lanes, size = numeric.lanes, numeric.compute_bytes
        f = self.module.function(f"transpose_{vectors}", _TRANSPOSE)
        pitch = self.kernel.vectors * lanes * size

        def block(start: Value, whole: bool) -> None:
            first = f.minimum(start, f["pixels"] - lanes) if whole else start
            mask = None if whole else f.lane_mask(f["pixels"] - first, lanes)

            def vector(v: Value) -> None:
                planes = [f["source"] + f.minimum(v * lanes + i, f["channels"] - 1) * f["plane"] for i in range(lanes)]
                loaded = [numeric.load(f, plane + first * size, lanes, mask) for plane in planes]
                target = f["target"] + first * pitch + v * (lanes * size)
                for i, transposed in enumerate(f.transpose(loaded)):
                    f.store(transposed, target + i * pitch)  # behind the last pixel there is room

            f.loop(0, vectors, 1, vector)

        f.branch(f["pixels"] >= lanes, lambda: f.loop(0, f["pixels"], lanes, lambda i: block(i, True)), lambda: block(f.value(0), False))
        f.ret()
        return f

    def emit_bias(self) -> Function:
        """Adds a piece's share of the gradient of the bias: ``count`` channels, vectors along them (nhwc) or along a row (nchw); the ``last`` piece
        writes the sums.  A piece is summed for itself first, in ``_WAYS`` sums of pixels, so that additions need not wait for each other."""
        numeric = self.numeric
        lanes, size, nchw = numeric.lanes, numeric.compute_bytes, self.kernel.format == "nchw"
        f = self.module.function("bias", _BIAS)
        zeros = [f.zero(numeric.vector)] * _WAYS
        step = lanes if nchw else 1

        def channels(k: Value) -> None:
            mask = None if nchw else f.lane_mask(f["count"] - k, lanes)
            start = f["gy"] + k * f["gy_channel"]

            def row(p: Value, base: Value, *sums: Value) -> list[Value]:
                place = base + p * f["gy_row"]

                def columns(q: Value, *found: Value) -> list[Value]:
                    return [f.fadd(s, numeric.load(f, place + (q + way * step) * f["gy_column"], lanes, mask)) for way, s in enumerate(found)]

                def rest(q: Value, s: Value) -> list[Value]:
                    inside = f.lane_mask(f["columns"] - q, lanes) if nchw else mask
                    return [f.fadd(s, numeric.load(f, place + q * f["gy_column"], lanes, inside))]

                whole = f["columns"] // (_WAYS * step) * (_WAYS * step)
                sums = tuple(f.loop(0, whole, _WAYS * step, columns, sums))
                return [base, *f.loop(whole, f["columns"], step, rest, sums[:1]), *sums[1:]]

            def image(i: Value, *sums: Value) -> list[Value]:
                return f.loop(0, f["rows"], 1, row, [start + i * f["gy_image"], *sums])[1:]

            sums = f.loop(0, f["images"], 1, image, zeros)
            total = f.fadd(f.fadd(sums[0], sums[1]), f.fadd(sums[2], sums[3]))
            width = 1 if nchw else lanes
            value, type_ = (f.sum_lanes(total), numeric.compute) if nchw else (total, numeric.vector)
            before = f.select(f["first"] > 0, f.zero(type_), f.load(f["sums"] + k * size, type_))
            value = f.fadd(before, value)
            numeric.store(f, value, f["sums"] + k * size, width, mask)  # masked: the channels behind are another task's
            with f.when(f["last"] > 0):
                numeric.store(f, value, f["out"] + k * size, width, mask)

        f.loop(0, f["count"], 1 if nchw else lanes, channels)
        f.ret()
        return f

    def stage(self, f: Function, task: Task) -> Callable[[Value], None]:
        kernel = self.kernel
        sums = task.workspace if kernel.gathered else task.operand("out")

        def body(index: Value) -> None:
            k_block, rest = index % task["k_blocks"], index // task["k_blocks"]
            c_block, rest = rest % task["c_blocks"], rest // task["c_blocks"]
            tap_block, group = rest % task["tap_blocks"], rest // task["tap_blocks"]
            edges = task.table("edge_table") + tap_block * 8
            first_group, first_panel = k_block * task["block_groups"], c_block * task["block_panels"]
            first_k = group * task["out_channels"]
            t = {
                "first_group": first_group, "last_group": f.minimum(first_group + task["block_groups"], task["row_groups"]), "first_panel": first_panel,
                "last_panel": f.minimum(first_panel + task["block_panels"], task["panels"]), "first_k": first_k,
                "c_block": c_block, "tap_block": tap_block, "first_tap": task["taps"] * tap_block // task["tap_blocks"],
                "last_tap": task["taps"] * (tap_block + 1) // task["tap_blocks"], "first_edge": f.load(edges), "last_edge": f.load(edges + 8),
                "source": task.operand("source") + group * task["x_group"], "gy": task.operand("other") + first_k * task["gy_channel"],
                "sums": sums + first_k * task["sum_row"],
            }  # fmt: skip
            f.loop(0, task["pieces"], 1, lambda number: self.piece(f, task, t, number))

        return body

    def piece(self, f: Function, task: Task, t: dict[str, Value], number: Value) -> None:
        """All products of a task with a piece of the pixels."""
        kernel = self.kernel
        box = _entry(f, task.table("piece_table"), number, PIECE)
        box["images"], box["number"] = box["last_image"] - box["first_image"], number
        box["gy"] = t["gy"] + box["first_image"] * task["gy_image"]
        alone = (t["c_block"] + t["tap_block"]).equals(0)
        wanted = f.define("i1", f"and i1 {(task['has_bias'] > 0).text}, {alone.text}")
        with f.when(wanted):
            self.add_bias(f, task, t, box)
        if kernel.format == "nchw":
            place = t["source"] + box["first_image"] * task["source_image"]
            panels = t["first_panel"], t["last_panel"], task["wide_panels"], kernel.vectors, kernel.narrow_vectors
            self.each(f, *panels, lambda i, vectors: self.transposed(f, task, t, box, place, i, vectors))
            return
        x, step = t["source"] + box["first_image"] * task["x_image"], task["segment_panels"]
        widths = (kernel.vectors, kernel.vectors - 1) if kernel.narrow_vectors else (kernel.vectors,)
        f.loop(t["first_panel"], t["last_panel"], step, lambda i: self.segment(f, task, t, box, x, i, f.minimum(i + step, t["last_panel"]), widths))

    def transposed(self, f: Function, task: Task, t: dict[str, Value], box: dict[str, Value], source: Value, index: Value, vectors: int) -> None:
        """nchw: one panel, after what the piece reads of it is in scratch, where pixel 0 of x need not be."""
        start = self.start(f, task["wide_panels"], index, self.kernel.vectors) * self.numeric.lanes
        scratch = task.scratch
        place = source + start * task["source_channel"] + box["first_pixel"] * self.numeric.compute_bytes
        sizes = [box["last_pixel"] - box["first_pixel"], task["group_channels"] - start, task["source_channel"]]

        def image(n: Value) -> None:
            f.call(self.transposes[vectors], [place + n * task["source_image"], scratch + n * task["x_image"], *sizes])

        f.loop(0, box["images"], 1, image)
        self.segment(f, task, t, box, scratch + (0 - box["first_pixel"]) * task["x_pixel"], index, index + 1, (vectors,))

    def segment(
        self, f: Function, task: Task, t: dict[str, Value], box: dict[str, Value], x: Value, first: Value, last: Value, widths: tuple[int, ...]
    ) -> None:
        """Panels ``first`` to ``last`` with all taps and the task's rows; pixel 0 of the piece's first image of x is at ``x``."""
        kernel, lanes, size = self.kernel, self.numeric.lanes, self.numeric.compute_bytes
        gy_pitches = [task[name] for name in ("gy_image", "gy_row", "gy_column", "gy_channel", "sum_row")]

        def tap(number: Value, fresh: Value | None) -> None:
            inside = _entry(f, task.table("tap_table"), number, TAP)
            p, q = f.maximum(box["first_row"], inside["first_row"]), f.maximum(box["first_column"], inside["first_column"])
            rows = f.maximum(f.minimum(box["last_row"], inside["last_row"]) - p, 0)
            columns = f.maximum(f.minimum(box["last_column"], inside["last_column"]) - q, 0)
            x_at = x + p * inside["x_row"] + q * inside["x_column"] + inside["offset"]
            gy_at = box["gy"] + p * task["gy_row"] + q * task["gy_column"]
            pitches = [task["x_image"], inside["x_row"], inside["x_column"], *gy_pitches]

            def row_group(j: Value, size_of_group: int) -> None:
                k = self.start(f, task["wide_groups"], j, kernel.rows)
                gy_rows, sums = gy_at + k * task["gy_channel"], t["sums"] + inside["tap"] * task["sum_tap"] + k * task["sum_row"]

                def panel(i: Value, vectors: int) -> None:
                    start = self.start(f, task["wide_panels"], i, kernel.vectors) * lanes
                    place, lanes_last = sums + start * size, task["group_channels"] - start - (vectors - 1) * lanes
                    before, before_row = place, task["sum_row"]
                    if fresh is not None:
                        before, before_row = f.select(fresh, task.table("zeros"), place), f.select(fresh, f.value(0), before_row)
                    x_panel = x_at if kernel.format == "nchw" else x_at + start * size
                    arguments = [x_panel, gy_rows, place, before, box["images"], rows, columns, *pitches, before_row, lanes_last]
                    f.call(self.micros[size_of_group, vectors], arguments)

                if len(widths) == 1:
                    f.loop(first, last, 1, lambda i: panel(i, widths[0]))
                else:
                    self.each(f, first, last, task["wide_panels"], kernel.vectors, True, panel)

            def groups() -> None:
                self.each(f, t["first_group"], t["last_group"], task["wide_groups"], kernel.rows, kernel.narrow_rows, row_group)

            if fresh is not None:
                groups()
            else:
                with f.when(rows * columns > 0):
                    groups()

        f.loop(t["first_tap"], t["last_tap"], 1, lambda number: tap(number, box["number"].equals(0)))
        with f.when(box["at_edge"] > 0):
            f.loop(t["first_edge"], t["last_edge"], 1, lambda number: tap(number, None))

    def add_bias(self, f: Function, task: Task, t: dict[str, Value], box: dict[str, Value]) -> None:
        """The piece's share of the gradient of the bias, of the task's rows."""
        size = self.numeric.compute_bytes
        ends = [self.start(f, task["wide_groups"], t[name], self.kernel.rows) for name in ("first_group", "last_group")]
        first, last = ends[0], f.minimum(ends[1], task["out_channels"])
        gy = box["gy"] + box["first_row"] * task["gy_row"] + box["first_column"] * task["gy_column"] + first * task["gy_channel"]
        at = (t["first_k"] + first) * size
        sizes = [last - first, box["images"], box["last_row"] - box["first_row"], box["last_column"] - box["first_column"]]
        pitches = [task[name] for name in ("gy_image", "gy_row", "gy_column", "gy_channel")]
        flags = [f.cast("zext", box["number"].equals(edge), "i64") for edge in (0, task["pieces"] - 1)]
        f.call(self.bias, [gy, task.workspace + task["bias_at"] + at, task.operand("bias") + at, *sizes, *pitches, *flags])

    @staticmethod
    def start(f: Function, wide: Value, index: Value, size: int) -> Value:
        """What lies before the index-th of ``wide`` pieces of ``size`` and others of one less."""
        return index * size - f.maximum(index - wide, 0)

    @staticmethod
    def each(f: Function, first: Value, last: Value, wide: Value, size: int, narrow: bool, body: Callable[[Value, int], None]) -> None:
        """``body(index, size)`` for pieces of which the ``wide`` first are of ``size``, the others of one less."""
        if not narrow:
            f.loop(first, last, 1, lambda i: body(i, size))
            return
        split = f.maximum(f.minimum(wide, last), first)
        f.loop(first, split, 1, lambda i: body(i, size))
        f.loop(split, last, 1, lambda i: body(i, size - 1))

    # -- stage 2

    def finish_stage(self, f: Function, task: Task) -> Callable[[Value], None]:
        """One output channel: its sums ``[tap][channel]`` as they lie in the weight."""
        numeric = self.numeric
        lanes, size = numeric.lanes, numeric.compute_bytes

        def body(k: Value) -> None:
            sums, out = task.workspace + k * task["sum_row"], task.operand("out") + k * task["weight_row"]
            channels, taps = task["group_channels"], task["taps"]

            def columns(t: Value) -> None:
                """``lanes`` taps of all channels."""
                rest = taps - t
                mask = f.lane_mask(rest, lanes)

                def block(c: Value) -> None:
                    loaded = [f.load(sums + f.minimum(t + i, taps - 1) * task["sum_tap"] + c * size, numeric.vector) for i in range(lanes)]
                    for i, vector in enumerate(f.transpose(loaded)):
                        with f.when(c + i < channels):
                            numeric.store(f, vector, out + ((c + i) * taps + t) * size, lanes, mask)

                f.loop(0, channels, lanes, block)

            f.loop(0, taps, lanes, columns)

        return body


def _entry(f: Function, table: Value, index: Value, names: tuple[str, ...]) -> dict[str, Value]:
    """The fields of a table's entry."""
    place = table + index * (8 * len(names))
    return {name: f.load(place + 8 * i) for i, name in enumerate(names)}
