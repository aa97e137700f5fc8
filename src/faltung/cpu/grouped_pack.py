"""Packing for vectors over several groups: a tile of the gathered operand into planes, and planes of results back to nchw.

The padding mode, the stride, the dilation, the element type and the memory format of the source all end here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..codegen.emit import Function, Module, Value
from ..codegen.entry import ArgumentBlock
from ..codegen.numeric import Numeric
from .grouped_lanes import Expansion, Lanes
from .pack import COLUMN_FIELDS

__all__ = ["emit_flush", "emit_pack", "emit_prefetch"]

_LINE = 64


class _Pack:
    """A function ``pack(block, source, tile, p0, q0, valid)`` under construction: the tile at output row ``p0`` and column ``q0`` of one image.

    ``source`` is the first of ``valid`` source channels in the image.
    """

    def __init__(self, module: Module, arguments: ArgumentBlock, numeric: Numeric, expansion: Expansion, prefix: str) -> None:
        parameters = [("ptr", "block"), ("ptr", "source"), ("ptr", "tile"), ("i64", "p0"), ("i64", "q0"), ("i64", "valid")]
        self.f = module.function(f"pack_{prefix}tile", parameters)
        self._arguments, self.numeric, self.expansion, self._prefix = arguments, numeric, expansion, prefix
        self.vector = numeric.lanes * numeric.compute_bytes
        self.plane = self["plane"]

    def __getitem__(self, name: str) -> Value:
        return self._arguments.load(self.f, self.f["block"], self._prefix + name)

    def table(self, name: str) -> Value:
        return self.f.to_pointer(self[name])

    def put(self, loaded: Sequence[Value], target: Value, picked: bool = False) -> None:
        """The planes of one pixel from its vectors of channels; ``picked``: these are the planes already."""
        for h, pick in enumerate(self.expansion.picks):
            self.f.store(loaded[h] if picked else self._picked(loaded, pick), target + self.plane * h if h else target)

    def sources(self) -> tuple[list[Sequence[int]], bool]:
        """Which channels to transpose to vectors, and whether they are the planes then: as many of those as there would be vectors."""
        lanes, expansion = self.numeric.lanes, self.expansion
        if expansion.planes == expansion.loads:
            return list(expansion.picks), True
        return [range(v * lanes, (v + 1) * lanes) for v in range(expansion.loads)], False

    def _picked(self, loaded: Sequence[Value], pick: tuple[int, ...]) -> Value:
        lanes = self.numeric.lanes
        number = pick[0] // lanes
        if pick == tuple(range(number * lanes, (number + 1) * lanes)):
            return loaded[number]
        if len(loaded) == 1:
            return self.f.shuffle(loaded[0], None, pick)
        value = self.f.shuffle(loaded[0], loaded[1], [i if i < 2 * lanes else 0 for i in pick])
        for number, vector in enumerate(loaded[2:], 2):
            chosen = [lanes + i - number * lanes if i // lanes == number else lane for lane, i in enumerate(pick)]
            value = self.f.shuffle(value, vector, chosen)
        return value

    def zero(self, target: Value) -> None:
        for h in range(self.expansion.planes):
            self.f.store(self.f.zero(self.numeric.vector), target + self.plane * h if h else target)

    def rows(self, body: Callable[[Value, Value, dict[str, Value]], None], source: Value | None = None, scale: int = 1) -> None:
        """``body(line, target, slab)`` for each row of each slab that is not zero; the others are filled here.

        Rows lie in ``source``, ``scale`` times as far apart as in memory."""
        f = self.f
        source = source or f["source"]
        positions, row_table, column_table, row_pitch = self.table("positions"), self.table("row_table"), self.table("column_table"), self["row"]
        slab_table, slabs = self.table("slab_table"), self["slabs"]

        def row(j: Value) -> None:
            offset = f.load_index(row_table, f.load_index(positions, j) + f["p0"])
            line, tile = source + offset * scale, f["tile"] + j * row_pitch

            def slab_body(index: Value) -> None:
                at = slab_table + index * (8 * len(COLUMN_FIELDS))
                slab = {name: f.load(at + 8 * i) for i, name in enumerate(COLUMN_FIELDS)}
                target = tile + slab["start"]
                slab["columns"] = column_table + (slab["table_start"] + f["q0"]) * 8
                slab["first"] = f.minimum(f.maximum(slab["interior_start"] - f["q0"], 0), slab["length"])
                slab["last"] = f.maximum(f.minimum(slab["interior_stop"] - f["q0"], slab["length"]), slab["first"])

                def zeros() -> None:
                    f.loop(0, slab["length"], 1, lambda x: self.zero(target + x * self.vector))

                f.branch(offset >= 0, lambda: body(line, target, slab), zeros)

            f.loop(0, slabs, 1, slab_body)

        f.loop(0, self["rows"], 1, row)

    def border(self, slab: dict[str, Value], target: Value, start: Value | int, stop: Value, pixel: Callable[[Value, Value], None]) -> None:
        """Entries whose source column is looked up; ``pixel(column, target)`` fills one."""
        f = self.f

        def entry(x: Value) -> None:
            column, place = f.load_index(slab["columns"], x), target + x * self.vector
            f.branch(column >= 0, lambda: pixel(column, place), lambda: self.zero(place))

        f.loop(start, stop, 1, entry)


def emit_pack(
    module: Module, arguments: ArgumentBlock, numeric: Numeric, expansion: Expansion, source_format: str, step: int, prefix: str, whole: bool = False
) -> Function:
    """Emit :class:`_Pack`'s function; ``step`` is the distance of the columns that neighbouring outputs read: 1, 2, or 3 for any.

    ``whole`` (nchw): the tile is the whole image, whose planes are first transposed as they lie in memory, without regard to rows.
    """
    pack = _Pack(module, arguments, numeric, expansion, prefix)
    if source_format == "nhwc":
        _from_nhwc(pack, step)
    elif whole:
        _from_planes(pack, step)
    else:
        _from_nchw(pack, step)
    pack.f.ret()
    return pack.f


def _from_nhwc(pack: _Pack, step: int) -> None:
    """A pixel's channels are neighbours: loaded, permuted and stored."""
    f, numeric, expansion = pack.f, pack.numeric, pack.expansion
    lanes, memory = numeric.lanes, numeric.memory_bytes
    masks = [f.lane_mask(f["valid"] - v * lanes, lanes) if expansion.masked else None for v in range(expansion.loads)]

    def pixel(pointer: Value, target: Value) -> None:
        pack.put([numeric.load(f, pointer + v * lanes * memory, lanes, mask) for v, mask in enumerate(masks)], target)

    _pixel_by_pixel(pack, step, pack["column"], pixel)


def _pixel_by_pixel(
    pack: _Pack, step: int, column_pitch: Value | int, pixel: Callable[[Value, Value], None], source: Value | None = None, scale: int = 1
) -> None:
    """``pixel(pointer, target)`` for every entry; columns are ``column_pitch`` bytes apart.  ``source`` and ``scale``: see :meth:`_Pack.rows`."""
    f = pack.f
    distance = (pack["step"] if step == 3 else f.value(step)) * column_pitch

    def row(line: Value, target: Value, slab: dict[str, Value]) -> None:
        def looked_up(column: Value, place: Value) -> None:
            pixel(line + column * column_pitch, place)

        def inside(x: Value, pointer: Value) -> list[Value]:
            pixel(pointer, target + x * pack.vector)
            return [pointer + distance]

        pack.border(slab, target, 0, slab["first"], looked_up)
        start = line + slab["offset"] * column_pitch + (slab["first"] + f["q0"]) * distance
        f.loop(slab["first"], slab["last"], 1, inside, [start])
        pack.border(slab, target, slab["last"], slab["length"], looked_up)

    pack.rows(row, source, scale)


def _from_planes(pack: _Pack, step: int) -> None:
    """All pixels of the image by ``lanes`` channels are transposed into a copy behind the tile, from which it is then packed as from nhwc."""
    f, numeric = pack.f, pack.numeric
    lanes, memory, vector = numeric.lanes, numeric.memory_bytes, pack.vector
    channel, pixels, last_channel = pack["channel"], pack["pixels"], f["valid"] - 1
    copy, plane = f["tile"] + pack["copy"], (pixels + lanes) * vector

    sources, picked = pack.sources()
    for v, channels in enumerate(sources):
        planes = [f["source"] + f.minimum(last_channel, c) * channel for c in channels]

        def block(x: Value, mask: Value | None, planes: list[Value] = planes, target: Value = copy + plane * v) -> None:
            for i, value in enumerate(f.transpose([numeric.load(f, p + x * memory, lanes, mask) for p in planes])):
                f.store(value, target + (x + i) * vector)

        def many(block: Callable[[Value, Value | None], None] = block) -> None:
            f.loop(0, pixels, lanes, lambda x: block(f.minimum(x, pixels - lanes), None))

        def few(block: Callable[[Value, Value | None], None] = block) -> None:
            block(f.value(0), f.lane_mask(pixels, lanes))

        f.branch(pixels >= lanes, many, few)

    def pixel(pointer: Value, target: Value) -> None:
        pack.put([f.load(pointer + plane * v if v else pointer, numeric.vector) for v in range(len(sources))], target, picked)

    _pixel_by_pixel(pack, step, vector, pixel, copy, vector // memory)


def _from_nchw(pack: _Pack, step: int) -> None:
    """Blocks of ``lanes`` columns by ``lanes`` channels are transposed; the last block overlaps the one before it."""
    f, numeric = pack.f, pack.numeric
    lanes, memory = numeric.lanes, numeric.memory_bytes
    channel, last_channel = pack["channel"], f["valid"] - 1
    sources, picked = pack.sources()
    # Lanes behind the last channel read the last one again: nothing reads them.
    places = [[f.minimum(last_channel, c) * channel for c in channels] for channels in sources]

    def gathered(pointer: Value, target: Value) -> None:
        loaded = []
        for offsets in places:
            vector = f.zero(numeric.vector)
            for lane, offset in enumerate(offsets):
                vector = f.insert(vector, numeric.load(f, pointer + offset, 1), lane)
            loaded.append(vector)
        pack.put(loaded, target, picked)

    def read(pointer: Value, count: Value | None) -> Value:
        """``count`` columns (``lanes`` where None), ``step`` elements apart; nothing behind the last one is touched."""
        mask = None if count is None else f.lane_mask(count, lanes)
        if step == 1:
            return numeric.load(f, pointer, lanes, mask)
        elements = f.value(2 * lanes - 1) if count is None else count * 2 - 1
        low = numeric.load(f, pointer, lanes, None if count is None else f.lane_mask(elements, lanes))
        high = numeric.load(f, pointer + lanes * memory, lanes, f.lane_mask(elements - lanes, lanes))
        return f.shuffle(low, high, range(0, 2 * lanes, 2))

    def block(pointer: Value, target: Value, count: Value | None) -> None:
        columns = [f.transpose([read(pointer + offset, count) for offset in offsets]) for offsets in places]
        for i in range(lanes):
            place = target + i * pack.vector
            if count is None:
                pack.put([vectors[i] for vectors in columns], place, picked)
            else:
                with f.when(count > i):
                    pack.put([vectors[i] for vectors in columns], place, picked)

    def row(line: Value, target: Value, slab: dict[str, Value]) -> None:
        def looked_up(column: Value, place: Value) -> None:
            gathered(line + column * memory, place)

        if step > 2:
            pack.border(slab, target, 0, slab["length"], looked_up)
            return
        first, count = slab["first"], slab["last"] - slab["first"]
        start = line + (slab["offset"] + (first + f["q0"]) * step) * memory
        inner = target + first * pack.vector

        def many() -> None:
            def at(i: Value) -> None:
                x = f.minimum(i, count - lanes)
                block(start + x * (step * memory), inner + x * pack.vector, None)

            f.loop(0, count, lanes, at)

        def few() -> None:
            with f.when(count > 0):
                block(start, inner, count)

        f.branch(count >= lanes, many, few)
        pack.border(slab, target, 0, first, looked_up)
        pack.border(slab, target, slab["last"], slab["length"], looked_up)

    pack.rows(row)


def emit_prefetch(module: Module, arguments: ArgumentBlock, numeric: Numeric, channels: int, source_format: str, prefix: str) -> Function:
    """``prefetch(block, source, p0, q0, first, last)``: ask for what packing would read for the tile's scratch rows ``first .. last - 1``.

    A tile reads a few channels of each pixel, cache lines far apart that no hardware prefetcher foresees.  ``channels``: of the source, at most.
    """
    parameters = [("ptr", "block"), ("ptr", "source"), *(("i64", name) for name in ("p0", "q0", "first", "last"))]
    f = module.function(f"prefetch_{prefix}tile", parameters)

    def argument(name: str) -> Value:
        return arguments.load(f, f["block"], prefix + name)

    positions, row_table = f.to_pointer(argument("positions")), f.to_pointer(argument("row_table"))
    column_pitch, channel_pitch, rows = argument("column"), argument("channel"), argument("rows")
    begin = argument("first_column") + f["q0"] * argument("step")
    start = f.maximum(begin, 0) * column_pitch
    stop = f.minimum(begin + argument("column_span"), argument("columns")) * column_pitch

    def row(j: Value) -> None:
        offset = f.load_index(row_table, f.load_index(positions, j) + f["p0"])
        line = f["source"] + offset
        with f.when(offset >= 0):
            if source_format == "nhwc":
                size = channels * numeric.memory_bytes

                def pixel(x: Value) -> None:
                    for at in range(0, size, _LINE):
                        f.prefetch(line + x + at, 2)

                f.loop(start, stop, column_pitch, pixel)
            else:
                f.loop(0, channels, 1, lambda c: f.loop(start, stop, _LINE, lambda x: f.prefetch(line + c * channel_pitch + x, 2)) and None)

    f.loop(f["first"], f.minimum(f["last"], rows), 1, row)
    f.ret()
    return f


def emit_flush(module: Module, numeric: Numeric, own: Lanes) -> Function:
    """``flush(scratch, out, runs, length, scratch_run, out_run, out_channel, valid)``: ``[run][pixel][lanes]`` to ``valid`` planes of nchw."""
    names = ("runs", "length", "scratch_run", "out_run", "out_channel", "valid")
    f = module.function("flush", [("ptr", "scratch"), ("ptr", "out"), *(("i64", name) for name in names)])
    lanes, memory, vector = numeric.lanes, numeric.memory_bytes, numeric.lanes * numeric.compute_bytes
    length = f["length"]

    def block(source: Value, target: Value, mask: Value | None) -> None:
        loaded = [f.load(source + i * vector, numeric.vector) for i in range(lanes)]
        transposed = f.transpose(loaded)
        for result, lane in enumerate(own.places):
            place = target + f["out_channel"] * result
            if own.masked and result:
                with f.when(f["valid"] > result):
                    numeric.store(f, transposed[lane], place, lanes, mask)
            else:
                numeric.store(f, transposed[lane], place, lanes, mask)

    def run(i: Value) -> None:
        source, target = f["scratch"] + i * f["scratch_run"], f["out"] + i * f["out_run"]

        def many() -> None:
            def at(j: Value) -> None:
                x = f.minimum(j, length - lanes)
                block(source + x * vector, target + x * memory, None)

            f.loop(0, length, lanes, at)

        # A short block reads scratch behind the last pixel, which the workspace's slack allows.
        f.branch(length >= lanes, many, lambda: block(source, target, f.lane_mask(length, lanes)))

    f.loop(0, f["runs"], 1, run)
    f.ret()
    return f
