"""The kernels that lay out the pixels under the kernel as columns of a matrix, and add such columns back onto the image.

The matrix has one row for each of the kernel's terms (a tap of an input channel) and one column for each output pixel; an image's matrix is stored as a
1x1 convolution reads its input: nchw ``[term][p][q]``, nhwc ``[p][q][term]``, with the terms in the order of the weight's memory.

Loop nests::

    gather, nchw, for each image, channel and kernel row:    for s, p:  copy or pick a row of q
    gather, nhwc, for each image and output row:             for q, r:  copy the run of s and c, or place each element
    scatter, nchw, for each image, channel and input row:    for each kernel row r that reaches it, s:  add a row of q
    scatter, nhwc, for each image and input row:             for each kernel row r that reaches it, q:  add the run of s and c, or each element
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..codegen.emit import Function, Module, Value, vector_type
from ..codegen.entry import ArgumentBlock, Task, emit_entry
from ..codegen.numeric import Numeric
from .target import Target

__all__ = ["ARGUMENTS", "SPAN", "ColumnsKernel"]

ARGUMENTS = ArgumentBlock(
    ("tasks", "channels", "height", "width", "r", "s", "p", "q", "matrix_image", "image_bytes", "image_channel", "image_row", "term_channel", "term_row",
     "term_column", "row_table", "column_table", "span_table", "column_step", "run_first", "run_last", "part_at", "scratch_size")
)  # fmt: skip
"""``height`` to ``channels`` are the image's, ``image_*`` its byte pitches, ``matrix_image`` the matrix's; ``term_*``: terms from one channel, kernel row and
kernel column to the next.  ``row_table[r][p]``: byte offset of the image's row, or -1 for zeros (scatter: ``row_table[r][h]``: the output row, or -1);
``column_table[s][q]`` likewise.  ``span_table[s]``: see :data:`SPAN`; ``column_step``: bytes from one output's column to the next.  ``run_first`` to
``run_last``: the output columns whose taps are all inside the image and neighbours there, an element's channels included.  ``part_at``: where in a thread's
scratch the sums of one kernel row are, if it goes so far."""

SPAN = ("first", "last", "offset")
"""Output columns that meet the image under a kernel column, and the byte offset at which output column 0 reads (or would)."""


@dataclass(frozen=True)
class ColumnsKernel:
    """``scatter``: columns are added onto the image, in the compute type, and rounded once; otherwise elements are moved as they are.

    ``unit`` (nchw): neighbouring outputs read neighbouring columns.  ``runs`` (nhwc): terms are ordered as the image's memory is.
    """

    target: Target
    dtype: str
    format: str
    scatter: bool
    unit: bool
    runs: bool

    @property
    def name(self) -> str:
        flags = "".join(letter for letter, set_ in zip("ur", (self.unit, self.runs)) if set_)
        return f"columns_{'scatter' if self.scatter else 'gather'}_{self.dtype}_{self.format}{'_' + flags if flags else ''}_{self.target.isa}"

    def emit(self) -> Module:
        """The module's IR text; its entry point is ``entry``."""
        module = Module()
        builder = (_Scatter if self.scatter else _Gather)(self, Numeric(self.dtype, self.target))
        emit_entry(module, ARGUMENTS, [("tasks", builder.planes if self.format == "nchw" else builder.pixels)])
        return module


class _Mover:
    """Runs of elements from one place to another; ``step`` is what is done with a vector of them, or with one."""

    def __init__(self, kernel: ColumnsKernel, numeric: Numeric) -> None:
        self.kernel, self.numeric = kernel, numeric

    @property
    def size(self) -> int:
        """Bytes of an element where it is moved."""
        raise NotImplementedError

    def step(self, f: Function, source: Value, target: Value, lanes: int) -> None:
        raise NotImplementedError

    def run(self, f: Function, source: Value, target: Value, count: Value) -> None:
        """``count`` neighbours to neighbours."""
        lanes, size = self.numeric.lanes, self.size
        whole = f.integer("and", count, -lanes)
        f.loop(0, whole, lanes, lambda i: self.step(f, source + i * size, target + i * size, lanes))
        f.loop(whole, count, 1, lambda i: self.step(f, source + i * size, target + i * size, 1))

    def strided(self, f: Function, source: Value, source_step: Value | int, target: Value, target_step: Value | int, count: Value) -> None:
        """``count`` elements at distances in bytes."""
        f.loop(0, count, 1, lambda i: self.step(f, source + i * source_step, target + i * target_step, 1))

    def inside(self, f: Function, task: Task, q: Value) -> Value:
        """Whether all column taps of an output lie in the image, as neighbours."""
        return f.compare("ult", q - task["run_first"], task["run_last"] - task["run_first"])  # unsigned: columns before the first are far behind the last

    def run_at(self, f: Function, task: Task, q: Value) -> Value:
        """The byte offset of an output's first column tap."""
        return _span(f, task, f.value(0))["offset"] + q * task["column_step"]


def _span(f: Function, task: Task, s: Value) -> dict[str, Value]:
    address = task.table("span_table") + s * (8 * len(SPAN))
    return {name: f.load(address + 8 * i) for i, name in enumerate(SPAN)}


class _Gather(_Mover):
    """Image to matrix."""

    @property
    def size(self) -> int:
        return self.numeric.memory_bytes

    def step(self, f: Function, source: Value, target: Value, lanes: int) -> None:
        f.store(f.load(source, vector_type(self.numeric.memory, lanes)), target)

    def zeros(self, f: Function, target: Value, step: Value | int, count: Value) -> None:
        f.loop(0, count, 1, lambda i: f.store(self.zero(f), target + i * step))

    def zero(self, f: Function) -> Value:
        """A zero in memory: 16-bit types are moved as whole numbers."""
        return f.value(0, "i16") if self.numeric.converts else f.zero(self.numeric.memory)

    def planes(self, f: Function, task: Task) -> Callable[[Value], None]:
        size = self.size

        def body(index: Value) -> None:
            rows, columns, outputs, width = task["r"], task["s"], task["p"], task["q"]
            r, rest = index % rows, index // rows
            c, image = rest % task["channels"], rest // task["channels"]
            plane = task.operand("source") + image * task["image_bytes"] + c * task["image_channel"]
            first = task.operand("out") + image * task["matrix_image"] + (c * task["term_channel"] + r * task["term_row"]) * outputs * width * size

            def column(s: Value) -> None:
                span = _span(f, task, s)
                target = first + s * task["term_column"] * outputs * width * size
                table = task.table("column_table") + s * width * 8

                def row(p: Value) -> None:
                    row_at = f.load_index(task.table("row_table"), r * outputs + p)
                    to = target + p * width * size

                    def edge(source: Value, begin: Value, end: Value) -> None:
                        def one(q: Value) -> None:
                            at = f.load_index(table, q)
                            f.branch(at < 0, lambda: f.store(self.zero(f), to + q * size), lambda: self.step(f, source + at, to + q * size, 1))

                        f.loop(begin, end, 1, one)

                    def known() -> None:
                        source = plane + row_at
                        edge(source, f.value(0), span["first"])
                        count, start = span["last"] - span["first"], source + span["offset"] + span["first"] * task["column_step"]
                        if self.kernel.unit:
                            self.run(f, start, to + span["first"] * size, count)
                        else:
                            self.strided(f, start, task["column_step"], to + span["first"] * size, size, count)
                        edge(source, span["last"], width)

                    f.branch(row_at < 0, lambda: self.zeros(f, to, size, width), known)

                f.loop(0, outputs, 1, row)

            f.loop(0, columns, 1, column)

        return body

    def pixels(self, f: Function, task: Task) -> Callable[[Value], None]:
        size, runs = self.size, self.kernel.runs

        def body(index: Value) -> None:
            rows, columns, channels, width = task["r"], task["s"], task["channels"], task["q"]
            p, image = index % task["p"], index // task["p"]
            source = task.operand("source") + image * task["image_bytes"]
            terms = rows * columns * channels * size
            first = task.operand("out") + image * task["matrix_image"] + p * width * terms
            channel_step = task["term_channel"] * size

            def kernel_row(r: Value) -> None:
                row_at = f.load_index(task.table("row_table"), r * task["p"] + p)
                target = first + r * task["term_row"] * size

                def pixel(q: Value) -> None:
                    to = target + q * terms

                    def column(s: Value) -> None:
                        at = f.select(row_at < 0, f.value(-1), f.load_index(task.table("column_table"), s * width + q))
                        place = to + s * task["term_column"] * size

                        def move() -> None:
                            if runs:
                                self.run(f, source + row_at + at, place, channels)
                            else:
                                self.strided(f, source + row_at + at, size, place, channel_step, channels)

                        f.branch(at < 0, lambda: self.zeros(f, place, channel_step, channels), move)

                    def each() -> None:
                        f.loop(0, columns, 1, column)

                    if not runs:
                        each()
                        return
                    inside = f.integer("and", self.inside(f, task, q), row_at >= 0)
                    f.branch(inside, lambda: self.run(f, source + row_at + self.run_at(f, task, q), to, columns * channels), each)

                f.loop(0, width, 1, pixel)

            f.loop(0, rows, 1, kernel_row)

        return body


class _Scatter(_Mover):
    """Matrix (of the compute type) to image."""

    @property
    def size(self) -> int:
        return self.numeric.compute_bytes

    def step(self, f: Function, source: Value, target: Value, lanes: int) -> None:
        type_ = vector_type(self.numeric.compute, lanes)
        f.store(f.fadd(f.load(target, type_), f.load(source, type_)), target)

    def rows(self, f: Function, task: Task, image_row: Value, elements: Value, add: Callable[[Value, Value, Value], None], h: Value) -> None:
        """Zeros, then ``add(r, p, sums)`` for each kernel row that reaches row ``h``, then, where elements are converted, the row's one rounding.

        Of large kernels each row is summed by itself, since one long sum has a larger error (961 taps: four times PyTorch's).
        """
        numeric, size = self.numeric, self.numeric.compute_bytes
        scratch = task.workspace + task.thread * task["scratch_size"]
        sums = scratch if numeric.converts else image_row
        part = scratch + task["part_at"]
        lanes = numeric.lanes
        whole = f.integer("and", elements, -lanes)

        def clear(row: Value) -> None:
            f.loop(0, whole, lanes, lambda i: f.store(f.zero(numeric.vector), row + i * size))
            f.loop(whole, elements, 1, lambda i: f.store(f.zero(numeric.compute), row + i * size))

        clear(sums)

        def kernel_row(r: Value) -> None:
            p = f.load_index(task.table("row_table"), r * task["height"] + h)

            def apart() -> None:
                clear(part)
                add(r, p, part)
                self.run(f, part, sums, elements)

            with f.when(p >= 0):
                f.branch(task["scratch_size"] > task["part_at"], apart, lambda: add(r, p, sums))

        f.loop(0, task["r"], 1, kernel_row)
        if numeric.converts:

            def write(i: Value, count: int) -> None:
                numeric.store(f, f.load(sums + i * size, vector_type(numeric.compute, count)), image_row + i * numeric.memory_bytes, count)

            f.loop(0, whole, lanes, lambda i: write(i, lanes))
            f.loop(whole, elements, 1, lambda i: write(i, 1))

    def planes(self, f: Function, task: Task) -> Callable[[Value], None]:
        size = self.size

        def body(index: Value) -> None:
            outputs, width = task["p"], task["q"]
            h, rest = index % task["height"], index // task["height"]
            c, image = rest % task["channels"], rest // task["channels"]
            image_row = task.operand("out") + image * task["image_bytes"] + c * task["image_channel"] + h * task["image_row"]
            matrix = task.operand("source") + image * task["matrix_image"]
            plane = outputs * width * size

            def add(r: Value, p: Value, sums: Value) -> None:
                first = matrix + (c * task["term_channel"] + r * task["term_row"]) * plane + p * width * size

                def column(s: Value) -> None:
                    span = _span(f, task, s)
                    source = first + s * task["term_column"] * plane + span["first"] * size
                    count, target = span["last"] - span["first"], sums + span["offset"] + span["first"] * task["column_step"]
                    if self.kernel.unit:
                        self.run(f, source, target, count)
                    else:
                        self.strided(f, source, size, target, task["column_step"], count)

                f.loop(0, task["s"], 1, column)

            self.rows(f, task, image_row, task["width"], add, h)

        return body

    def pixels(self, f: Function, task: Task) -> Callable[[Value], None]:
        size, runs = self.size, self.kernel.runs

        def body(index: Value) -> None:
            columns, channels, width = task["s"], task["channels"], task["q"]
            h, image = index % task["height"], index // task["height"]
            image_row = task.operand("out") + image * task["image_bytes"] + h * task["image_row"]
            terms = task["r"] * columns * channels * size
            matrix = task.operand("source") + image * task["matrix_image"]

            def add(r: Value, p: Value, sums: Value) -> None:
                first = matrix + p * width * terms + r * task["term_row"] * size

                def pixel(q: Value) -> None:
                    source = first + q * terms

                    def column(s: Value) -> None:
                        at = f.load_index(task.table("column_table"), s * width + q)
                        with f.when(at >= 0):
                            if runs:
                                self.run(f, source + s * channels * size, sums + at, channels)
                            else:
                                self.strided(f, source + s * task["term_column"] * size, task["term_channel"] * size, sums + at, size, channels)

                    def each() -> None:
                        f.loop(0, columns, 1, column)

                    if not runs:
                        each()
                        return
                    f.branch(self.inside(f, task, q), lambda: self.run(f, source, sums + self.run_at(f, task, q), columns * channels), each)

                f.loop(0, width, 1, pixel)

            self.rows(f, task, image_row, task["width"] * channels, add, h)

        return body
