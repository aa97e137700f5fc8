"""The kernel of convolution over planes: implicit GEMM for nchw that reads the weight of forward where it lies.

Loop nest (forward; grad_input at stride 1, whose weights are packed first)::

    stage 1, for each group and a few terms:                         pack the weight, ``[t][rows]`` for each piece of output channels   (grad_input only)
    stage 2, for each image, group, run of pixel blocks, block of output channels:
        for a few pixel blocks at a time (as many as the second-level cache holds):
            pack each:  panel[t][pixels] = source[channel of t][pixel moved by tap of t]             padding, stride, dilation end here
            for a few pieces of output channels at a time (whose weights the second-level cache holds as well):
                for each of these pixel blocks, piece of the reduction, piece of output channels:    micro-kernel, into the output itself

A term ``t`` of the reduction is a channel and a tap, in the order of the weight's memory: a row of the weight is one run.  A pixel block is one to four vectors
of pixels that follow each other in the plane, whatever their rows.  The last one begins early, so no store is masked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..codegen.emit import Function, Module, Value, vector_type
from ..codegen.entry import ArgumentBlock, Task, emit_entry
from ..codegen.numeric import Numeric
from .micro import Micro, call_micro, emit_micro
from .target import Target

__all__ = ["ARGUMENTS", "MOST_PIXELS", "PACK_TERMS", "PlanesKernel"]

PACK_TERMS = 64
"""Terms of the reduction that a task of the first stage packs."""

MOST_PIXELS = 64
"""Of a block: four vectors of 16 lanes."""

ARGUMENTS = ArgumentBlock(
    (
        "pack_tasks", "tasks", "groups", "runs", "run_blocks", "blocks", "wide_blocks", "held", "k_blocks", "block_pieces", "pieces", "wide_pieces",
        "held_pieces", "pixels", "source_image", "source_group", "source_channel", "channels", "taps", "columns", "row_table", "column_table", "column_step",
        "column_taps", "rows", "term_channel", "term_tap", "terms", "chunk", "out_image", "out_group", "out_channel", "out_channels", "weight_group",
        "weight_row", "weight_offsets", "has_bias", "zeros", "panel_pitch", "scratch_at", "scratch_size", "panels_at", "sums_at", "crowded", "pack_shares",
    )
)  # fmt: skip
"""Pitches are bytes, ``term_channel`` and ``term_tap`` too: in a panel of one vector.  ``rows x columns`` output pixels; ``row_table`` holds, for every
tap and output row, the source row's byte offset or -1 for zeros, ``column_table`` the same for columns.  ``wide_blocks`` (``wide_pieces``) come first, the
others are a vector (an output channel) narrower.  ``held`` blocks are packed at a time, ``panel_pitch`` apart, for ``held_pieces`` pieces.  ``sums_at``: where
the sums of a block are kept until they are whole, if ``crowded`` or where it ends in another's pixels; else in the output."""


@dataclass(frozen=True)
class PlanesKernel:
    """``rows`` output channels by ``vectors`` of pixels; ``narrow_rows``, ``narrow_vectors``: pieces one smaller are needed too.  ``joined``: 1x1, stride 1,
    no padding, so that pixels lie in memory as they are needed.  ``packed``: the weight's terms are no neighbours in memory and are packed."""

    target: Target
    dtype: str
    rows: int
    vectors: int
    narrow_rows: bool
    narrow_vectors: bool
    joined: bool
    packed: bool

    @property
    def name(self) -> str:
        flags = "".join(letter for letter, set_ in zip("rvjp", (self.narrow_rows, self.narrow_vectors, self.joined, self.packed)) if set_)
        return f"planes_{self.dtype}_{self.rows}x{self.vectors}{'_' if flags else ''}{flags}_{self.target.isa}"

    def emit(self) -> Module:
        """The module's IR text; its entry point is ``entry``."""
        module = Module()
        builder = _Builder(self, module, Numeric(self.dtype, self.target))
        emit_entry(module, ARGUMENTS, [("pack_tasks", builder.pack_stage), ("tasks", builder.compute_stage)], own_first=True)
        return module


class _Builder:
    def __init__(self, kernel: PlanesKernel, module: Module, numeric: Numeric) -> None:
        self.kernel, self.numeric = kernel, numeric
        self.widths = (kernel.vectors, kernel.vectors - 1)[: 2 if kernel.narrow_vectors else 1]
        self.heights = (kernel.rows, kernel.rows - 1)[: 2 if kernel.narrow_rows else 1]
        self.micros = {
            (rows, vectors): emit_micro(module, numeric, Micro("pixels", rows, vectors, run=True, apart=not kernel.packed))
            for rows in self.heights
            for vectors in self.widths
        }
        self.pack = {vectors: self._emit_pack(module, vectors) for vectors in self.widths}

    def channel(self, task: Task, piece: Value) -> Value:
        """First output channel of a piece."""
        return piece * (self.kernel.rows - 1) + task.f.minimum(piece, task["wide_pieces"])

    def pack_stage(self, f: Function, task: Task) -> Callable[[Value], None]:
        """A task takes some terms for all output channels, so that lines of the weight which several pieces need are read once."""
        size = self.numeric.compute_bytes

        def copy(source: Value, target: Value, height: int) -> None:
            def neighbours() -> None:
                f.store(f.load(source, vector_type(self.numeric.compute, height)), target)

            def apart() -> None:
                for m in range(height):
                    f.store(f.load(source + task["weight_row"] * m, self.numeric.compute), target + m * size)

            f.branch(task["weight_row"].equals(size), neighbours, apart)

        def body(index: Value) -> None:
            shares = task["pack_shares"]
            share, group = index % shares, index // shares
            start = share * PACK_TERMS
            stop = f.minimum(start + PACK_TERMS, task["terms"])
            offsets, weight = task.table("weight_offsets"), task.operand("other") + group * task["weight_group"]

            def piece(index: Value, height: int) -> None:
                channel = self.channel(task, index)
                source = weight + channel * task["weight_row"]
                target = task.workspace + (group * task["out_channels"] + channel) * task["terms"] * size
                f.loop(start, stop, 1, lambda t: copy(source + f.load_index(offsets, t), target + t * (height * size), height))

            f.loop(0, task["wide_pieces"], 1, lambda i: piece(i, self.kernel.rows))
            if self.kernel.narrow_rows:
                f.loop(task["wide_pieces"], task["pieces"], 1, lambda i: piece(i, self.kernel.rows - 1))

        return body if self.kernel.packed else lambda _: None

    def compute_stage(self, f: Function, task: Task) -> Callable[[Value], None]:
        def body(index: Value) -> None:
            t: dict[str, Value] = {"scratch": task.scratch}
            k_block, index = index % task["k_blocks"], index // task["k_blocks"]
            run, index = index % task["runs"], index // task["runs"]
            t["group"], image = index % task["groups"], index // task["groups"]
            t["first"] = k_block * task["block_pieces"]
            t["last"] = f.minimum(t["first"] + task["block_pieces"], task["pieces"])
            t["source"] = task.operand("source") + image * task["source_image"] + t["group"] * task["source_group"]
            t["out"] = task.operand("out") + image * task["out_image"] + t["group"] * task["out_group"]
            t["panels"] = t["scratch"] + task["panels_at"]
            begin = run * task["run_blocks"]
            end = f.minimum(begin + task["run_blocks"], task["blocks"])

            def some(block: Value) -> None:
                stop = f.minimum(block + task["held"], end)
                self.each_block(f, task, block, stop, lambda i, vectors: self.pack_block(f, task, t, i - block, i, vectors))

                def pieces(piece: Value) -> None:
                    last = f.minimum(piece + task["held_pieces"], t["last"])
                    self.each_block(f, task, block, stop, lambda i, vectors: self.products(f, task, t, i - block, i, vectors, piece, last))

                f.loop(t["first"], t["last"], task["held_pieces"], pieces)

            f.loop(begin, end, task["held"], some)

        return body

    def each_block(self, f: Function, task: Task, start: Value, stop: Value, body: Callable[[Value, int], None]) -> None:
        """``body(index, vectors)`` for the blocks from ``start`` on, the wide ones first."""
        split = f.maximum(f.minimum(task["wide_blocks"], stop), start)
        f.loop(start, split, 1, lambda i: body(i, self.kernel.vectors))
        if self.kernel.narrow_vectors:
            f.loop(split, stop, 1, lambda i: body(i, self.kernel.vectors - 1))

    def pixel(self, f: Function, task: Task, index: Value, vectors: int) -> tuple[Value, Value]:
        """First pixel of a block, and how many of its pixels are another block's: the last one begins early rather than run over the end."""
        lanes = self.numeric.lanes
        start = (index * (self.kernel.vectors - 1) + f.minimum(index, task["wide_blocks"])) * lanes
        early = f.minimum(start, task["pixels"] - vectors * lanes)
        return early, start - early

    def pack_block(self, f: Function, task: Task, t: dict[str, Value], place: Value, index: Value, vectors: int) -> None:
        panel = t["panels"] + place * task["panel_pitch"]
        f.call(self.pack[vectors], [f.to_pointer(f.load(f["context"])), t["source"], panel, self.pixel(f, task, index, vectors)[0]])

    def products(
        self, f: Function, task: Task, t: dict[str, Value], place: Value, index: Value, vectors: int, first: Value, last: Value
    ) -> None:  # fmt: skip
        """One pixel block, output channels of the pieces from ``first`` to ``last``."""
        kernel, numeric = self.kernel, self.numeric
        size, vector = numeric.compute_bytes, numeric.lanes * numeric.compute_bytes
        panel = t["panels"] + place * task["panel_pitch"]
        pixel, others = self.pixel(f, task, index, vectors)
        out = t["out"] + pixel * size
        # Pixels that are another block's may be another thread's: what is no whole sum must not be seen there.
        aside = f.integer("or", task["crowded"], f.select(task["terms"] > task["chunk"], others, f.value(0))) > 0
        out_pitch = f.select(aside, f.value(vectors * vector), task["out_channel"])
        origin = self.channel(task, first)
        sums = f.select(aside, t["scratch"] + task["sums_at"], out + origin * task["out_channel"])

        def chunk(term: Value) -> None:
            count, starts = f.minimum(task["terms"] - term, task["chunk"]), term.equals(0)
            init_pitch = f.select(starts, f.value(vectors * vector), out_pitch)

            def rows(piece: Value, height: int) -> None:
                channel = self.channel(task, piece)
                c = sums + (channel - origin) * out_pitch
                if kernel.packed:
                    weight = task.workspace + ((t["group"] * task["out_channels"] + channel) * task["terms"] + term * height) * size
                else:
                    weight = task.operand("other") + t["group"] * task["weight_group"] + channel * task["weight_row"] + term * size
                with f.when(starts):  # the bias is each sum's first term, as in every direct kernel, so that all give the same bits
                    known = task["has_bias"] > 0
                    bias = f.select(known, task.operand("bias") + (t["group"] * task["out_channels"] + channel) * size, task.table("zeros"))
                    step = f.select(known, f.value(size), f.value(0))
                    for m in range(height):
                        value = f.splat(f.load(bias + step * m, numeric.compute), numeric.lanes)
                        f.prefetch(out + (channel + m) * task["out_channel"] + vectors * vector, 2)
                        for v in range(vectors):
                            f.store(value, t["scratch"] + (m * vectors + v) * vector)
                call_micro(
                    f, self.micros[height, vectors], source=panel + term * (vectors * vector), panel=weight, c=c, init=f.select(starts, t["scratch"], c),
                    table=panel, count=count, pitch=task["weight_row"], c_pitch=out_pitch, init_pitch=init_pitch, lanes_last=f.value(numeric.lanes),
                )  # fmt: skip

            split = f.maximum(f.minimum(task["wide_pieces"], last), first)
            f.loop(first, split, 1, lambda i: rows(i, kernel.rows))
            if kernel.narrow_rows:
                f.loop(split, last, 1, lambda i: rows(i, kernel.rows - 1))

        f.loop(0, task["terms"], task["chunk"], chunk)

        def copy(channel: Value) -> None:
            source, target = sums + (channel - origin) * out_pitch, out + channel * task["out_channel"]

            def whole() -> None:
                for v in range(vectors):
                    f.store(f.load(source + v * vector, numeric.vector), target + v * vector)

            def own() -> None:
                f.loop(others, vectors * numeric.lanes, 1, lambda i: f.store(f.load(source + i * size, numeric.compute), target + i * size))

            f.branch(others > 0, own, whole)

        with f.when(aside):
            f.loop(origin, f.minimum(self.channel(task, last), task["out_channels"]), 1, copy)

    def _emit_pack(self, module: Module, vectors: int) -> Function:
        """``pack_pixels(block, source, panel, pixel)``: the panel of the block that starts at output ``pixel``, of one image and group."""
        f = module.function(f"pack_pixels{vectors}", [("ptr", "block"), ("ptr", "source"), ("ptr", "panel"), ("i64", "pixel")])
        (self._pack_joined if self.kernel.joined else self._pack_gathered)(f, vectors)
        f.ret()
        return f

    def _argument(self, f: Function, name: str) -> Value:
        return ARGUMENTS.load(f, f["block"], name)

    def _pack_joined(self, f: Function, vectors: int) -> None:
        size, vector = self.numeric.compute_bytes, self.numeric.lanes * self.numeric.compute_bytes

        def channel(_: Value, source: Value, panel: Value) -> list[Value]:
            for v in range(vectors):
                f.store(f.load(source + v * vector, self.numeric.vector), panel + v * vector)
            f.prefetch(source + vectors * vector, 2)  # the next block's: a line of each plane is no stream that the processor sees
            return [source + self._argument(f, "source_channel"), panel + vectors * vector]

        f.loop(0, self._argument(f, "channels"), 1, channel, [f["source"] + f["pixel"] * size, f["panel"]])

    def _pack_gathered(self, f: Function, vectors: int) -> None:
        size, lanes = self.numeric.compute_bytes, self.numeric.lanes
        columns, rows, channels = (self._argument(f, name) for name in ("columns", "rows", "channels"))
        row_table, column_table = (f.to_pointer(self._argument(f, name)) for name in ("row_table", "column_table"))
        column_taps, source_channel = self._argument(f, "column_taps"), self._argument(f, "source_channel")
        term_channel, term_tap = (self._argument(f, name) * vectors for name in ("term_channel", "term_tap"))
        places = f.stack(2 * 8 * MOST_PIXELS)  # row and column of each pixel
        offsets, kept = f.stack(8 * MOST_PIXELS), f.stack(8 * MOST_PIXELS)
        integer, strided = "i64" if size == 8 else "i32", self._argument(f, "column_step") - 1

        def place(i: Value) -> None:
            pixel = f["pixel"] + i
            row = pixel // columns
            f.store(row, places + i * 16)
            f.store(pixel - row * columns, places + i * 16 + 8)

        f.loop(0, vectors * lanes, 1, place)

        def tap(index: Value) -> None:
            r, s = index // column_taps, index % column_taps
            row_places, column_places = row_table + r * rows * 8, column_table + s * columns * 8

            def move(i: Value, inside: Value) -> list[Value]:
                row = f.load_index(row_places, f.load(places + i * 16))
                column = f.load_index(column_places, f.load(places + i * 16 + 8))
                either = f.integer("or", row, column)
                zero = f.integer("ashr", either, 63)
                f.store(f.select(either >= 0, row + column, f.value(0)), offsets + i * 8)
                mask = f.integer("xor", zero, -1)
                f.store(mask if size == 8 else f.cast("trunc", mask, "i32"), kept + i * size)
                return [f.integer("or", inside, zero)]

            target = f["panel"] + index * term_tap
            for v in range(vectors):
                (outside,) = f.loop(v * lanes, (v + 1) * lanes, 1, move, [f.value(0)])
                first, last = (f.load(offsets + i * 8) for i in (v * lanes, (v + 1) * lanes - 1))
                same = f.load(places + v * lanes * 16).equals(f.load(places + ((v + 1) * lanes - 1) * 16))
                # Pixels of one source row whose ends are as far apart as they are many follow each other, where none is further than one from the last.
                run = f.define("i1", f"and i1 {same.text}, {(last - first).equals((lanes - 1) * size).text}")
                run = f.define("i1", f"and i1 {run.text}, {f.integer('or', outside, strided).equals(0).text}")
                to = target + v * lanes * size

                def copied(first: Value = first, to: Value = to) -> None:
                    def channel(_: Value, source: Value, target: Value) -> list[Value]:
                        f.store(f.load(source, self.numeric.vector), target)
                        return [source + source_channel, target + term_channel]

                    f.loop(0, channels, 1, channel, [f["source"] + first, to])

                def picked(v: int = v, to: Value = to) -> None:
                    moved = [f.load(offsets + (v * lanes + i) * 8) for i in range(lanes)]
                    mask = f.load(kept + v * lanes * size, vector_type(integer, lanes))

                    def channel(_: Value, source: Value, target: Value) -> list[Value]:
                        found = Value(f, "poison", self.numeric.vector)
                        for i, offset in enumerate(moved):
                            found = f.insert(found, f.load(source + offset, self.numeric.compute), i)
                        bits = f.integer("and", f.cast("bitcast", found, vector_type(integer, lanes)), mask)
                        f.store(f.cast("bitcast", bits, self.numeric.vector), target)
                        return [source + source_channel, target + term_channel]

                    f.loop(0, channels, 1, channel, [f["source"], to])

                f.branch(run, copied, picked)

        f.loop(0, self._argument(f, "taps"), 1, tap)
