"""Packing for matrix tiles: pixels as runs of bfloat16 channels, and panels of weights as pairs of channels, in one plane (of panels: block) per part.

A pixel has ``room`` channels, the last ones zero: as many as the blocks of pairs that a tile's row holds.  Where a pixel has few channels, the taps of a
row of the kernel are *joined*: pixels lie without gaps, and what neighbouring columns hold is one run of terms.
"""

from __future__ import annotations

from ..codegen.emit import Function, Module, Value, vector_type
from ..codegen.entry import ArgumentBlock
from ..codegen.numeric import Numeric
from .pack import Arguments, clamped_interior, slab_fields
from .parts import interleave, split

__all__ = ["PIXEL_ARGUMENTS", "READ_BEYOND", "emit_pack_pairs_of_rows", "emit_pack_pixels"]

PIXEL_ARGUMENTS = ("room", "tile_part")
"""Channels of a packed pixel, and how far apart the planes of its parts are (bytes)."""

READ_BEYOND = 128
"""Bytes behind the last pixel that steps of joined taps may read."""

_PIXELS = 16  # that are transposed at a time


class _Pixels:
    """Emits ``pack_pixels``; ``load`` gives what is stored of a run of channels: raw 16-bit halves, or vectors of float32 that are split."""

    def __init__(self, f: Function, a: Arguments, numeric: Numeric, parts: int, step: int, joined: bool) -> None:
        self.f, self.a, self.numeric, self.parts, self.step, self.joined = f, a, numeric, parts, step, joined
        self.raw = numeric.dtype == "bf16"
        self.lanes = 32 if self.raw else 16
        self.memory = numeric.memory_bytes
        self.room, self.part, self.pixel = a["room"], a["tile_part"], a["tile_column"]
        self.channels = f["channels"]
        together = f.define("i1", f"and i1 {a['source_column'].equals(self.channels * self.memory).text}, {self.pixel.equals(self.channels * 2).text}")
        self.dense = f.define("i1", f"and i1 {together.text}, {self.room.equals(self.channels).text}")

    def load(self, pointer: Value, lanes: int, mask: Value | None = None) -> Value:
        if not self.raw:
            return self.numeric.load(self.f, pointer, lanes, mask)
        type_ = vector_type("i16", lanes)
        return self.f.load(pointer, type_) if mask is None else self.f.load_masked(pointer, mask, type_)

    def store(self, value: Value, place: Value, lanes: int, mask: Value | None = None) -> None:
        """One run of channels, every part of it."""
        f = self.f
        for index, part in enumerate([value] if self.raw else split(f, value, lanes, self.parts)):
            at = place + self.part * index if index else place
            if mask is None:
                f.store(part, at)
            else:
                f.store_masked(part, at, mask)

    def zero(self, place: Value, count: Value) -> None:
        """``count`` pixels of zeros, one behind the other."""
        self.zero_bytes(place, self.pixel * count)

    def zero_bytes(self, place: Value, size: Value) -> None:
        f, zeros = self.f, self.f.zero(vector_type("i16", 32))
        whole = f.integer("and", size, -64)
        for index in range(self.parts):
            start = place + self.part * index if index else place
            f.loop(0, whole, 64, lambda i, start=start: f.store(zeros, start + i))
            with f.when(whole < size):
                f.store_masked(zeros, start + whole, f.lane_mask(f.integer("lshr", size - whole, 1), 32))

    def run(self, source: Value, place: Value, count: Value, room: Value) -> None:
        """``count`` neighbouring elements, followed by zeros up to ``room``."""
        f, lanes, memory = self.f, self.lanes, self.memory
        whole = f.integer("and", count, -lanes)
        f.loop(0, whole, lanes, lambda c: self.store(self.load(source + c * memory, lanes), place + c * 2, lanes))

        def rest(c: Value) -> None:
            self.store(self.load(source + c * memory, lanes, f.lane_mask(count - c, lanes)), place + c * 2, lanes, f.lane_mask(room - c, lanes))

        f.loop(whole, room, lanes, rest)

    def neighbours(self, source: Value, place: Value) -> None:
        """One pixel whose channels are neighbours in memory."""
        self.run(source, place, self.channels, self.room)

    def apart(self, source: Value, place: Value) -> None:
        """One pixel whose channels are planes apart, one by one: columns at the border."""
        f, distance = self.f, self.a["source_channel"]
        f.loop(0, self.channels, 1, lambda c: self.store(self.load(source + c * distance, 1), place + c * 2, 1))
        nothing = f.cast("trunc", f.value(0), "i16") if self.raw else f.zero("float")
        f.loop(self.channels, self.room, 1, lambda c: self.store(nothing, place + c * 2, 1))

    def line_block(self, source: Value, place: Value, count: Value) -> None:
        """Up to 16 pixels of one row of nchw, all channels, transposed in registers."""
        f, zeros = self.f, self.a.table("zeros")
        rows, wide = 16, 32 if self.raw else 16
        mask = f.lane_mask(count, _PIXELS)

        def row(c: Value) -> Value:
            pointer = f.select(c < self.channels, source + c * self.a["source_channel"], zeros)
            if self.step == 1:
                return self.load(pointer, _PIXELS, mask)
            reach = count * 2 - 1
            low = self.load(pointer, _PIXELS, f.lane_mask(reach, _PIXELS))
            high = self.load(pointer + _PIXELS * self.memory, _PIXELS, f.lane_mask(reach - _PIXELS, _PIXELS))
            return f.shuffle(low, high, [2 * lane for lane in range(_PIXELS)])

        def channel_block(c: Value) -> None:
            if self.raw:
                vectors = [interleave(f, row(c + 2 * i), row(c + (2 * i + 1)), _PIXELS) for i in range(rows)]
            else:
                vectors = [row(c + i) for i in range(rows)]
            written = f.lane_mask(self.room - c, wide)
            found = [f.cast("bitcast", v, vector_type("i16", wide)) if self.raw else v for v in f.transpose(vectors)]

            def write(i: int, vector: Value) -> None:
                self.store(vector, place + self.pixel * i + c * 2, wide, written)

            def whole() -> None:
                for i, vector in enumerate(found):
                    write(i, vector)

            def some() -> None:
                for i, vector in enumerate(found):
                    with f.when(count > i):
                        write(i, vector)

            f.branch(count >= _PIXELS, whole, some)

        f.loop(0, self.room, wide, channel_block)

    def slab(self, slab: dict[str, Value], line: Value, place: Value, nhwc: bool) -> None:
        """The columns of one row of the tile that fall into a slab."""
        f, a = self.f, self.a
        columns, column_pitch = a.table("column_table") + (slab["table_start"] + f["q0"]) * 8, a["source_column"]
        one = self.neighbours if nhwc else self.apart

        def border(x: Value) -> None:
            column, target = f.load_index(columns, x), place + x * self.pixel
            f.branch(column >= 0, lambda: one(line + column * column_pitch, target), lambda: self.zero(target, f.value(1)))

        if self.step > 2 or (nhwc and self.step > 1):
            f.loop(0, slab["length"], 1, border)
            return
        start, stop = clamped_interior(f, slab)
        first = line + (slab["offset"] + (f["q0"] + start) * self.step) * column_pitch
        f.loop(0, start, 1, border)
        if nhwc:
            count = stop - start
            f.branch(
                self.dense,
                lambda: self.run(first, place + start * self.pixel, count * self.channels, count * self.channels),
                lambda: f.loop(start, stop, 1, lambda x: one(first + (x - start) * column_pitch, place + x * self.pixel)),
            )
        else:
            f.loop(
                start, stop, _PIXELS,
                lambda x: self.line_block(first + (x - start) * (self.step * self.memory), place + x * self.pixel, f.minimum(stop - x, _PIXELS)),
            )  # fmt: skip
        f.loop(stop, slab["length"], 1, border)


def emit_pack_pixels(module: Module, arguments: ArgumentBlock, numeric: Numeric, source_format: str, parts: int, step: int, joined: bool) -> Function:
    """``pack_pixels(block, source, tile, p0, q0, channels)``: a tile in the ``linear`` layout, as :func:`faltung.cpu.pack.emit_pack_tile` makes others.

    ``step``: the distance of the columns read by neighbouring outputs, 3 for any from 3 on.  ``joined``: pixels are read beyond their channels, and beyond
    their row, to be multiplied by zero: what is there is set to zero where it is no pixel.
    """
    names = [("ptr", "block"), ("ptr", "source"), ("ptr", "tile"), ("i64", "p0"), ("i64", "q0"), ("i64", "channels")]
    f = module.function("pack_pixels", names)
    a = Arguments(f, arguments, f["block"])
    pixels = _Pixels(f, a, numeric, parts, step, joined)
    positions, row_table = a.table("row_positions"), a.table("row_table")

    def row(j: Value) -> None:
        offset = f.load_index(row_table, f.load_index(positions, j) + f["p0"])
        line, tile = f["source"] + offset, f["tile"] + j * a["tile_row"]

        def slab(index: Value) -> None:
            facts = slab_fields(f, a, index)
            place = tile + facts["start"]
            f.branch(offset >= 0, lambda: pixels.slab(facts, line, place, source_format == "nhwc"), lambda: pixels.zero(place, facts["length"]))
            if joined:  # rows follow in order: the next one writes over the last of these zeros
                end = facts["length"] * pixels.pixel
                pixels.zero_bytes(place + end, a["tile_row"] - end + READ_BEYOND)

        f.loop(0, a["slabs"], 1, slab)

    f.loop(0, a["rows"], 1, row)
    f.ret()
    return f


def emit_pack_pairs_of_rows(module: Module, parts: int) -> Function:
    """``pair_rows(rows, panel, taps, pairs, channels, tap_rows, channel_rows, width, panel_part)``: ``[tap][pair][width]`` pairs from rows of float32.

    Row ``tap * tap_rows + c * channel_rows`` of ``rows`` has ``width`` numbers (bytes / 4) of channel ``c < channels``; channels behind are zero.  Parts
    of the panel are ``panel_part`` bytes apart.
    """
    names = ("taps", "pairs", "channels", "tap_rows", "channel_rows", "width", "panel_part")
    f = module.function("pair_rows", [("ptr", "rows"), ("ptr", "panel"), *(("i64", name) for name in names)])
    line = f["width"] * 4
    type_ = vector_type("float", 16)

    def tap(t: Value) -> None:
        def pair(j: Value) -> None:
            first = f["rows"] + (t * f["tap_rows"] + j * 2 * f["channel_rows"]) * line
            second, target = first + f["channel_rows"] * line, f["panel"] + (t * f["pairs"] + j) * line

            def vector(v: Value) -> None:
                def number(place: Value, there: Value) -> Value:
                    return f.choose(there, lambda: f.load(place + v * 4, type_), lambda: f.zero(type_))

                low, high = number(first, j * 2 < f["channels"]), number(second, j * 2 + 1 < f["channels"])
                for index, (a, b) in enumerate(zip(split(f, low, 16, parts), split(f, high, 16, parts))):
                    f.store(interleave(f, a, b, 16), target + f["panel_part"] * index + v * 4)

            f.loop(0, f["width"], 16, vector)

        f.loop(0, f["pairs"], 1, pair)

    f.loop(0, f["taps"], 1, tap)
    f.ret()
    return f
