"""The kernel of depthwise convolution by Winograd's filtering along rows; see :mod:`faltung.cpu.depthwise_winograd`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ..codegen.emit import Function, Module, Value
from ..codegen.entry import ArgumentBlock, Task, emit_entry
from ..codegen.numeric import Numeric
from .depthwise_tile import Lanes, emit_filters, emit_flush, emit_load
from .depthwise_winograd_transform import BLOCK, POINTS, emit_filter, emit_input, emit_output
from .target import Target

__all__ = ["ARGUMENTS", "DepthwiseWinogradKernel"]

ARGUMENTS = ArgumentBlock((
    "tasks", "vectors", "tiles", "slice_tiles", "lanes_total", "kernel_size", "place_table", "r", "groups", "scratch_size",
    "row_tiles", "col_tiles", "tile_rows", "tile_blocks", "row_count", "col_count", "parts", "chunk", "range_table",
    "row_table", "zero_table", "col_table", "inside_first", "inside_last", "source_image", "source_row", "source_channel",
    "out_image", "out_row", "out_channel", "u_at", "v_at", "v_point", "v_row", "m_at", "m_point", "m_row", "out_at",
))  # fmt: skip
"""``slice_tiles``: tiles of a task, for which it transforms its weights once, to ``[point][r][group]``; ``tile_blocks``: blocks of four outputs in a tile's
row, in ``parts`` of a register block each; ``chunk``: kernel rows whose inputs and weights stay in the first-level cache; ``range_table``: for each register
block's output rows the first kernel row that meets the image and the one after the last; ``row_table``: the source row of each row of the padded image, -1 for
zeros, -2 where nobody reads them; ``v_...``: transformed inputs ``[point][row][block]``, ``m_...``: sums, likewise."""


@dataclass(frozen=True)
class _Functions:
    """What a task calls."""

    load: Function
    flush: Function | None
    transform: Function
    products: tuple[Function, ...]
    outputs: Function


@dataclass(frozen=True)
class DepthwiseWinogradKernel:
    """``block``: blocks of outputs in registers, ``abreast``: output rows; ``pieces``: groups of taps in registers, one after the other; ``reach``: the blocks
    of inputs that are not all zeros, where they are known: a row is one register block then."""

    target: Target
    dtype: str
    format: str
    tail: bool
    bias: bool
    block: int
    abreast: int
    pieces: tuple[int, ...]
    reach: tuple[int, int] | None

    @property
    def name(self) -> str:
        pieces = "_".join(map(str, self.pieces))
        reach = f"_w{self.reach[0]}to{self.reach[1]}" if self.reach else ""
        return f"depthwise_winograd_{self.dtype}_{self._lanes.name}_{self.abreast}x{self.block}g{pieces}{reach}{'_bias' if self.bias else ''}_{self.target.isa}"

    @property
    def _numeric(self) -> Numeric:
        return Numeric(self.dtype, self.target)

    @property
    def _lanes(self) -> Lanes:
        return Lanes(self._numeric, self.format, "same", self.tail)

    def emit(self) -> Module:
        """The module's IR text; its entry point is ``entry``.

        A task, for each vector of channels and slice of the tiles: weights to lanes, and transformed.  Then for each tile: each source row to scratch
        with channels in lanes, and transformed; for each point, chunk of kernel rows and block of output rows: the products, added to the sums; then each
        output row.
        """
        module = Module()
        starts = [sum(self.pieces[:i]) for i in range(len(self.pieces))]
        functions = _Functions(
            emit_load(module, self._lanes, "load_row", zero_rows=False),
            emit_flush(module, self._lanes, "flush_row") if self.format == "nchw" else None,
            self._emit_transform(module),
            tuple(self._emit_products(module, *piece) for piece in zip(starts, self.pieces)),
            self._emit_outputs(module),
        )
        emit_entry(module, ARGUMENTS, [("tasks", partial(self._stage, functions))])
        return module

    def _filters(self, f: Function, task: Task, vector: Value, raw: Value, target: Value) -> None:
        """The weights of a vector of channels, transformed; ``raw`` is room for them as they are."""
        numeric, entry = self._numeric, self._lanes.entry_bytes
        f.loop(0, task["r"] * task["groups"] * (BLOCK * entry), entry, lambda i: f.store(f.zero(numeric.vector), raw + i))
        last, places = task["lanes_total"] - 1, task.table("place_table")
        numbers = [f.minimum(vector * numeric.lanes + i, last) for i in range(numeric.lanes)]
        filters = [task.operand("other") + number * task["kernel_size"] * numeric.memory_bytes for number in numbers]
        emit_filters(f, numeric, filters, task["kernel_size"], lambda value, tap: f.store(value, raw + f.load_index(places, tap)))
        point = task["r"] * task["groups"] * entry

        def group(i: Value) -> None:
            taps = [f.load(raw + i * (BLOCK * entry) + j * entry, numeric.vector) for j in range(BLOCK)]
            for c, value in enumerate(emit_filter(f, taps, self.target.fma)):
                f.store(value, target + point * c + i * entry)

        f.loop(0, task["r"] * task["groups"], 1, group)

    def _bias(self, f: Function, task: Task, vector: Value) -> Value:
        """The bias of a vector of channels; lanes behind the last one repeat it."""
        numeric, last = self._numeric, task["lanes_total"] - 1
        values = f.zero(numeric.vector)
        for i in range(numeric.lanes):
            number = f.minimum(vector * numeric.lanes + i, last)
            values = f.insert(values, numeric.load(f, task.operand("bias") + number * numeric.memory_bytes, 1), i)
        return values

    def _emit_transform(self, module: Module) -> Function:
        """``transform(row, v, blocks, v_point)``: a row of the source, transformed."""
        f = module.function("transform_row", [("ptr", "row"), ("ptr", "v"), ("i64", "blocks"), ("i64", "v_point")])
        entry, vector = self._lanes.entry_bytes, self._numeric.vector

        def block(i: Value) -> None:
            x = [f.load(f["row"] + i * (BLOCK * entry) + j * entry, vector) for j in range(POINTS)]
            for c, value in enumerate(emit_input(f, x, self.target.fma)):
                f.store(value, f["v"] + i * entry + f["v_point"] * c)

        f.loop(0, f["blocks"], 1, block)
        f.ret()
        return f

    def _emit_products(self, module: Module, first: int, groups: int) -> Function:
        """``products(v, u, m, rows, v_row, u_row, m_row)``: the products of the groups of taps from ``first`` on, in so many kernel rows, added to ``m``."""
        names = ("rows", "v_row", "u_row", "m_row")
        f = module.function(f"products_{first}", [("ptr", "v"), ("ptr", "u"), ("ptr", "m"), *(("i64", name) for name in names)])
        entry, vector = self._lanes.entry_bytes, self._numeric.vector
        low, high = self.reach or (0, 1 << 30)
        places = [f["m"] + f["m_row"] * q + b * entry for q in range(self.abreast) for b in range(self.block)]

        def row(_: Value, v: Value, u: Value, *sums: Value) -> list[Value]:
            result = list(sums)
            weights = [f.load(u + (first + g) * entry, vector) for g in range(groups)]
            for q in range(self.abreast):
                line = v + f["v_row"] * q
                for position in range(self.block + groups - 1):
                    if not low <= first + position < high:
                        continue
                    value = f.load(line + (first + position) * entry, vector)
                    for g in range(max(0, position - self.block + 1), min(groups, position + 1)):
                        at = q * self.block + position - g
                        result[at] = f.fma(value, weights[g], result[at], self.target.fma)
            return [v + f["v_row"], u + f["u_row"], *result]

        start = [f.load(place, vector) for place in places]
        for value, place in zip(f.loop(0, f["rows"], 1, row, [f["v"], f["u"], *start])[2:], places):
            f.store(value, place)
        f.ret()
        return f

    def _emit_outputs(self, module: Module) -> Function:
        """``outputs(m, row, blocks, m_point, bias)``: a row of sums to a row of outputs with channels in lanes."""
        f = module.function("output_row", [("ptr", "m"), ("ptr", "row"), ("i64", "blocks"), ("i64", "m_point"), ("ptr", "bias")])
        entry, vector = self._lanes.entry_bytes, self._numeric.vector
        bias = f.load(f["bias"], vector) if self.bias else None

        def block(i: Value) -> None:
            sums = [f.load(f["m"] + i * entry + f["m_point"] * c, vector) for c in range(POINTS)]
            for j, value in enumerate(emit_output(f, sums, self.target.fma)):
                f.store(value if bias is None else f.fadd(value, bias), f["row"] + i * (BLOCK * entry) + j * entry)

        f.loop(0, f["blocks"], 1, block)
        f.ret()
        return f

    def _stage(self, functions: _Functions, f: Function, task: Task) -> Callable[[Value], None]:
        def body(index: Value) -> None:
            vector, first = index % task["vectors"], index // task["vectors"] * task["slice_tiles"]
            scratch = task.workspace + task.thread * task["scratch_size"]
            self._filters(f, task, vector, scratch, scratch + task["u_at"])
            bias = scratch + task["out_at"]
            if self.bias:
                f.store(self._bias(f, task, vector), bias)
            last = f.minimum(first + task["slice_tiles"], task["tiles"])
            f.loop(first, last, 1, lambda tile: self._tile(functions, f, task, (vector, tile), scratch))

        return body

    def _tile(self, functions: _Functions, f: Function, task: Task, place: tuple[Value, Value], scratch: Value) -> None:
        numeric, entry = self._numeric, self._lanes.entry_bytes
        vector, tile = place
        col0, rest = tile % task["col_tiles"] * (task["tile_blocks"] * BLOCK), tile // task["col_tiles"]
        row0, image = rest % task["row_tiles"] * task["tile_rows"], rest // task["row_tiles"]
        rows = f.minimum(task["tile_rows"], task["row_count"] - row0)
        v, m = scratch + task["v_at"], scratch + task["m_at"]
        turns = (rows + self.abreast - 1) // self.abreast
        self._read(functions, f, task, (image, vector, row0, col0), scratch, v, turns * self.abreast + task["r"] - 1)
        zero = f.zero(numeric.vector)
        f.loop(0, task["m_point"] * POINTS, entry, lambda i: f.store(zero, m + i))
        self._multiply(functions, f, task, scratch + task["u_at"], v, m, row0, turns)
        out = task.operand("out") + image * task["out_image"] + row0 * task["out_row"]
        cols = f.minimum(task["tile_blocks"] * BLOCK, task["col_count"] - col0)
        bias, row = scratch + task["out_at"], scratch + (task["out_at"] + entry)

        def finish(i: Value) -> None:
            f.call(functions.outputs, [m + i * task["m_row"], row, task["tile_blocks"], task["m_point"], bias])
            self._write(functions, f, task, row, out + i * task["out_row"], col0, cols, vector * numeric.lanes)

        f.loop(0, rows, 1, finish)

    def _read(self, functions: _Functions, f: Function, task: Task, place: Sequence[Value], row: Value, v: Value, count: Value) -> None:
        """The source rows of a tile, transformed; those outside the image are zeros where they are read."""
        numeric, entry = self._numeric, self._lanes.entry_bytes
        image, vector, row0, col0 = place
        blocks = task["tile_blocks"] + task["groups"] - 1
        cols = blocks * BLOCK + (BLOCK - 1)
        low = f.minimum(f.maximum(task["inside_first"] - col0, 0), cols)
        high = f.maximum(f.minimum(task["inside_last"] - col0, cols), low)
        source, one = task.operand("source") + image * task["source_image"], f.value(1)

        def each(i: Value) -> None:
            table, to = task.table("row_table") + (row0 + i) * 8, v + i * task["v_row"]

            def present() -> None:
                f.call(functions.load, [
                    source, row, table, task.table("zero_table"), one, task.table("col_table") + col0 * 8, cols, low, high, vector * numeric.lanes, one,
                    task["lanes_total"], one, f.value(0), f.value(entry), task["source_row"], task["source_channel"],
                ])  # fmt: skip
                f.call(functions.transform, [row, to, blocks, task["v_point"]])

            def absent() -> None:
                zero = f.zero(numeric.vector)
                for c in range(POINTS):
                    f.loop(0, blocks, 1, lambda j, c=c: f.store(zero, to + j * entry + task["v_point"] * c))

            at = f.load(table)
            f.branch(at >= 0, present, lambda: f.branch(at.equals(-1), absent, lambda: None))

        f.loop(0, count, 1, each)

    def _multiply(self, functions: _Functions, f: Function, task: Task, u: Value, v: Value, m: Value, row0: Value, turns: Value) -> None:
        """All products of a tile, point by point."""
        entry = self._lanes.entry_bytes
        u_row = task["groups"] * entry
        ranges = task.table("range_table") + row0 // self.abreast * 16

        def point(c: Value) -> None:
            from_, with_, to = v + c * task["v_point"], u + c * (task["r"] * u_row), m + c * task["m_point"]

            def chunk(first: Value) -> None:
                def turn(i: Value) -> None:
                    low = f.maximum(f.load(ranges + i * 16), first)
                    count = f.minimum(f.load(ranges + i * 16 + 8), first + task["chunk"]) - low

                    def part(j: Value) -> None:
                        at = j * (self.block * entry)
                        line = from_ + (i * self.abreast + low) * task["v_row"] + at
                        sums = to + i * self.abreast * task["m_row"] + at
                        for function in functions.products:
                            f.call(function, [line, with_ + low * u_row, sums, count, task["v_row"], u_row, task["m_row"]])

                    with f.when(count > 0):
                        f.loop(0, task["parts"], 1, part)

                f.loop(0, turns, 1, turn)

            f.loop(0, task["r"], task["chunk"], chunk)

        f.loop(0, POINTS, 1, point)

    def _write(self, functions: _Functions, f: Function, task: Task, row: Value, out: Value, col0: Value, cols: Value, lane0: Value) -> None:
        numeric, entry = self._numeric, self._lanes.entry_bytes
        if functions.flush is not None:
            f.call(functions.flush, [row, out + col0 * numeric.memory_bytes, cols, lane0, task["lanes_total"], task["out_channel"]])
            return
        to = out + col0 * task["out_channel"] + lane0 * numeric.memory_bytes
        mask = f.lane_mask(task["lanes_total"] - lane0, numeric.lanes) if self.tail else None

        def pixel(j: Value) -> None:
            numeric.store(f, f.load(row + j * entry, numeric.vector), to + j * task["out_channel"], numeric.lanes, mask)

        f.loop(0, cols, 1, pixel)
