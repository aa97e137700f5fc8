"""Packing: a tile of the gathered operand into scratch, and the weight into panels, in the compute type.

The padding mode, the stride, the dilation, the element type and the memory format all end here.  Tiles come in two layouts:

* ``outer``: ``[channel][column slab][row][column]``, the natural one from nchw (and by transposition from nhwc);
* ``inner``: ``[row][column of every slab][channel]``, the natural one from nhwc.

Where bfloat16 is multiplied in pairs (:mod:`faltung.cpu.bfloat`), an element of a tile is a pair: of neighbouring channels, or of two tiles.
"""

from __future__ import annotations

from collections.abc import Callable

from ..codegen.emit import Function, Module, Scalar, Value, vector_type
from ..codegen.entry import ArgumentBlock
from ..codegen.numeric import Numeric
from .bfloat import Halves, Joined

__all__ = [
    "ANY_STEP", "COLUMN_FIELDS", "TILE_ARGUMENTS", "Arguments", "clamped_interior", "copy_run", "emit_pack_panel", "emit_pack_tile", "slab_fields",
    "step_kind", "zero_run",
]  # fmt: skip

_BYTES_AHEAD = 128  # weights are transposed in pieces of a cache line at distances of kilobytes, too short for the processor to foresee the next
_TERMS_AHEAD = 4
_ROWS_AHEAD = 32  # runs of a line or two, kilobytes apart and perhaps in memory: grad_input of 1x1 layers at 7x7 takes 0.7 to 0.9 of the time (AVX2)

TILE_ARGUMENTS = (
    "source_channel", "source_column", "source_step", "rows", "row_positions", "row_table", "slabs", "slab_table", "column_table",
    "tile_channel", "tile_row", "tile_column", "zeros",
)  # fmt: skip
"""Byte pitches of the source's channels and columns, the distance of neighbouring outputs' columns; scratch ``rows`` and their positions in the
row table (of byte offsets, -1 for zero); column ``slabs``, their facts (:data:`COLUMN_FIELDS`) and the column table (of indices, -1 for zero); byte pitches of
the tile's channels, rows and columns; the address of a few vectors of zeros."""

COLUMN_FIELDS = ("table_start", "start", "length", "interior_start", "interior_stop", "offset")
"""A column slab: its place in the column table; where it starts in the tile (bytes for ``outer``, columns for ``inner``); its columns; the
range of table entries inside the image; the source column of entry 0."""


ANY_STEP = 3


def step_kind(step: int) -> int:
    """1, 2 and 4, for which code is made, and :data:`ANY_STEP` for all other distances of columns."""
    return step if step in (1, 2, 4) else ANY_STEP


class Arguments:
    """Loads of a kernel's arguments by name, in a function that has the block's address."""

    def __init__(self, f: Function, arguments: ArgumentBlock, block: Value) -> None:
        self._f, self._arguments, self._block = f, arguments, block

    def __getitem__(self, name: str) -> Value:
        return self._arguments.load(self._f, self._block, name)

    def table(self, name: str) -> Value:
        return self._f.to_pointer(self[name])


def copy_run(f: Function, numeric: Numeric, source: Value, target: Value, count: Scalar) -> None:
    """``count`` neighbouring elements into the compute type; what is written may reach one vector past the end, what is read does not."""
    lanes, size, memory = numeric.lanes, numeric.compute_bytes, numeric.memory_bytes
    count = f.value(count)
    whole = f.integer("and", count, -lanes)

    def block(i: Value) -> None:
        f.store(numeric.load(f, source + i * memory, lanes), target + i * size)

    f.loop(0, whole, lanes, block)
    _tail(f, numeric, whole, count, lambda i, mask: f.store(numeric.load(f, source + i * memory, lanes, mask), target + i * size),
          lambda i: f.store(numeric.load(f, source + i * memory, 1), target + i * size))  # fmt: skip


def _tail(f: Function, numeric: Numeric, start: Value, stop: Value, masked: Callable[[Value, Value], None], single: Callable[[Value], None]) -> None:
    """The last few elements: one masked vector where the target has masks, else one by one."""
    if numeric.target.masks:
        with f.when(start < stop):
            masked(start, f.lane_mask(stop - start, numeric.lanes))
    else:
        f.loop(start, stop, 1, single)


def zero_run(f: Function, numeric: Numeric, target: Value, count: Scalar) -> None:
    """Zeros; what is written may reach one vector past the end."""
    f.loop(0, count, numeric.lanes, lambda i: f.store(f.zero(numeric.vector), target + i * numeric.compute_bytes))


def emit_pack_tile(
    module: Module, arguments: ArgumentBlock, numeric: Numeric, source_format: str, layout: str, step: int, second: bool = False, spread: int = 0
) -> Function:
    """``pack_tile(block, source, tile, p0, q0, channels)``: the tile that starts at output row ``p0`` and column ``q0``, of one image.

    ``source`` is the first of ``channels`` channels in the image.  ``step`` is the distance of the columns read by neighbouring outputs, as
    :func:`step_kind` says it: what is ``ANY_STEP`` is an argument.

    ``second``: pairs are made with a second tile, given by two more parameters: ``second_row``, its first row of outputs (-1: zeros), and ``distance``, how
    many bytes its image is behind ``source``.  Pairs are of neighbouring channels otherwise; of a few channels, odd in number and all of a pixel, ``spread``
    says how many, and several pixels are moved at a time.
    """
    parameters = [("ptr", "block"), ("ptr", "source"), ("ptr", "tile"), ("i64", "p0"), ("i64", "q0"), ("i64", "channels")]
    f = module.function("pack_tile", [*parameters, *([("i64", "second_row"), ("i64", "distance")] if second else [])])
    a = Arguments(f, arguments, f["block"])
    if source_format == "nchw":
        _pack_rows(f, a, numeric, step, second)
    elif layout == "inner":
        # Pairs of channels are neighbours in memory.
        _pack_pixels(f, a, Halves.of(numeric) if numeric.pairs and not second else numeric, step, second, spread)
    else:
        _pack_transposed(f, a, numeric)
    f.ret()
    return f


def slab_fields(f: Function, a: Arguments, index: Value) -> dict[str, Value]:
    base = a.table("slab_table") + index * (8 * len(COLUMN_FIELDS))
    return {name: f.load(base + 8 * i) for i, name in enumerate(COLUMN_FIELDS)}


def clamped_interior(f: Function, slab: dict[str, Value]) -> tuple[Value, Value]:
    """Columns of the tile at hand that lie inside the image: ``start <= x < stop``."""
    start = f.minimum(f.maximum(slab["interior_start"] - f["q0"], 0), slab["length"])
    return start, f.maximum(f.minimum(slab["interior_stop"] - f["q0"], slab["length"]), start)


def _row(f: Function, positions: Value, table: Value, numeric: Numeric, j: Value, second: bool) -> tuple[Value, Numeric]:
    """The byte offset of scratch row ``j`` in the source, -1 for zeros, and what reads it."""
    position = f.load_index(positions, j)
    first = f.load_index(table, position + f["p0"])
    if not second:
        return first, numeric
    # Where one of both rows is zeros, the other one is read twice, and half of it cleared.
    other = f.load_index(table, position + f.maximum(f["second_row"], 0))
    other = f.select(f["second_row"] >= 0, other, f.value(-1))
    here, there = first >= 0, other >= 0
    at = f.select(here, first, f.select(there, other + f["distance"], f.value(-1)))
    both = f.define("i1", f"and i1 {here.text}, {there.text}")
    kept = f.integer("or", f.select(here, f.value(0xFFFF, "i32"), f.value(0, "i32")), f.select(there, f.value(-1 << 16, "i32"), f.value(0, "i32")))
    return at, Joined(numeric.dtype, numeric.target, f.select(both, other + f["distance"] - first, f.value(0)), kept)


def _pack_rows(f: Function, a: Arguments, numeric: Numeric, step: int, second: bool) -> None:
    """nchw to ``outer``: for each channel, slab and row, a run of columns."""
    size, memory = numeric.compute_bytes, numeric.memory_bytes
    rows, positions, row_table, column_table = a["rows"], a.table("row_positions"), a.table("row_table"), a.table("column_table")
    source_channel, tile_channel, tile_row = a["source_channel"], a["tile_channel"], a["tile_row"]
    terms = 2 if numeric.pairs and not second else 1
    distance = a["source_step"] if step == ANY_STEP else step

    def channel(c: Value) -> None:
        plane, tile = f["source"] + c * (source_channel * terms), f["tile"] + c * tile_channel
        reader = numeric if terms == 1 else Joined.of(f, numeric, source_channel, c * 2 + 1 < f["channels"])

        def slab_body(index: Value) -> None:
            slab = slab_fields(f, a, index)
            start, stop = clamped_interior(f, slab)
            columns = column_table + (slab["table_start"] + f["q0"]) * 8
            first = (slab["offset"] + f["q0"] * distance) * memory

            def row(j: Value) -> None:
                offset, numeric = _row(f, positions, row_table, reader, j, second)
                target = tile + slab["start"] + j * tile_row

                def copy() -> None:
                    line = plane + offset

                    def border(x: Value) -> None:
                        column = f.load_index(columns, x)

                        def inside() -> None:
                            f.store(numeric.load(f, line + column * memory, 1), target + x * size)

                        f.branch(column >= 0, inside, lambda: f.store(f.zero(numeric.compute), target + x * size))

                    f.loop(0, start, 1, border)
                    _copy_columns(f, numeric, line + first, target, start, stop, distance, source_channel * 2)
                    f.loop(stop, slab["length"], 1, border)

                f.branch(offset >= 0, copy, lambda: zero_run(f, numeric, target, slab["length"]))

            f.loop(0, rows, 1, row)

        f.loop(0, a["slabs"], 1, slab_body)

    f.loop(0, f["channels"] if terms == 1 else (f["channels"] + 1) // 2, 1, channel)


def _copy_columns(f: Function, numeric: Numeric, line: Value, target: Value, start: Value, stop: Value, step: Scalar, ahead: Value) -> None:
    """Columns ``start .. stop - 1``, ``step`` source elements apart; entry ``x`` is at ``line + x * step``."""
    size, memory, lanes = numeric.compute_bytes, numeric.memory_bytes, numeric.lanes
    if isinstance(step, int) and step == 1:
        copy_run(f, numeric, line + start * memory, target + start * size, stop - start)
        return

    def single(x: Value) -> None:
        f.store(numeric.load(f, line + x * (step * memory), 1), target + x * size)

    if isinstance(step, Value) or lanes < step:
        f.loop(start, stop, 1, single)
        return

    count = stop - start
    first = line + start * (step * memory)
    place = target + start * size
    # A block's last vector ends behind the last column wanted, so the last block is read under a mask, or, where there are none, begins early.
    blocks = f.maximum(count - 1, 0) // lanes
    done = blocks * lanes

    def pick(source: Value, offset: int, at: Value, wanted: Value | None = None) -> None:
        """Every ``step``-th element of as many vectors, from ``offset`` on; of the first ``wanted``."""
        masks = [None if wanted is None else f.lane_mask(wanted - v * lanes, lanes) for v in range(step)]
        vectors = [numeric.load(f, source + v * lanes * memory, lanes, mask) for v, mask in enumerate(masks)]
        if step == 4:
            vectors = [f.shuffle(low, high, range(offset, 2 * lanes, step)) for low, high in zip(vectors[::2], vectors[1::2])]
        picked = range(lanes) if step == 4 else range(offset, 2 * lanes, step)
        f.store(f.shuffle(vectors[0], vectors[1], picked), place + at * size)

    def vectors() -> None:
        for line_ahead in range(0, step * 64, 64):
            f.prefetch(first + ahead + line_ahead)
        f.loop(0, blocks, 1, lambda i: pick(first + i * (step * lanes * memory), 0, i * lanes))

    def early() -> None:
        begin = count - lanes
        pick(first + (begin * step - (step - 1)) * memory, step - 1, begin)

    def whole() -> None:
        vectors()
        early()

    if not numeric.target.masks:
        f.branch(blocks > 0, whole, lambda: f.loop(start, stop, 1, single))
        return
    vectors()
    with f.when(done < count):
        pick(first + done * (step * memory), 0, done, (count - done) * step - (step - 1))


def _pack_pixels(f: Function, a: Arguments, numeric: Numeric, step: int, second: bool, spread: int) -> None:
    """nhwc to ``inner``: for each row, slab and column, a run of channels; whole runs of columns where they are neighbours in memory."""
    size, memory = numeric.compute_bytes, numeric.memory_bytes
    channels, source_column, pixel = f["channels"], a["source_column"], a["tile_column"]
    positions, row_table, column_table = a.table("row_positions"), a.table("row_table"), a.table("column_table")
    reader = numeric
    dense = f.define("i1", f"and i1 {source_column.equals(channels * memory).text}, {pixel.equals(channels * size).text}")

    def row(j: Value) -> None:
        offset, numeric = _row(f, positions, row_table, reader, j, second)
        line, tile = f["source"] + offset, f["tile"] + j * a["tile_row"]

        def slab_body(index: Value) -> None:
            slab = slab_fields(f, a, index)
            target = tile + slab["start"] * pixel
            columns = column_table + (slab["table_start"] + f["q0"]) * 8

            def border(x: Value) -> None:
                column = f.load_index(columns, x)
                f.branch(
                    column >= 0,
                    lambda: copy_run(f, numeric, line + column * source_column, target + x * pixel, channels),
                    lambda: zero_run(f, numeric, target + x * pixel, channels),
                )

            def copy() -> None:
                if step != 1:
                    f.loop(0, slab["length"], 1, border)
                    return
                start, stop = clamped_interior(f, slab)
                first = line + (slab["offset"] + f["q0"] + start) * source_column
                f.loop(0, start, 1, border)
                if spread:
                    _spread_run(f, numeric, first, target + start * pixel, stop - start, spread)
                else:
                    f.branch(
                        dense,
                        lambda: copy_run(f, numeric, first, target + start * pixel, (stop - start) * channels),
                        lambda: f.loop(start, stop, 1, border),
                    )
                f.loop(stop, slab["length"], 1, border)

            f.branch(offset >= 0, copy, lambda: zero_run(f, numeric, target, slab["length"] * (pixel // size)))

        f.loop(0, a["slabs"], 1, slab_body)

    f.loop(0, a["rows"], 1, row)


def _spread_run(f: Function, numeric: Numeric, source: Value, target: Value, count: Value, channels: int) -> None:
    """``count`` pixels of ``channels`` neighbouring elements, each with a zero behind it."""
    lanes, memory, wide = numeric.lanes, numeric.memory_bytes, channels + 1
    pixels = lanes // wide
    picks = [lane // wide * channels + lane % wide if lane % wide < channels and lane < pixels * wide else lanes for lane in range(lanes)]
    zero = f.zero(vector_type(numeric.memory, lanes))

    def block(i: Value) -> None:
        rest = f.minimum(count - i, pixels)
        value = numeric.load(f, source + i * (channels * memory), lanes, f.lane_mask(rest * channels, lanes))
        f.store_masked(f.shuffle(value, zero, picks), target + i * (wide * memory), f.lane_mask(rest * wide, lanes))

    f.loop(0, count, pixels, block)


def _pack_transposed(f: Function, a: Arguments, numeric: Numeric) -> None:
    """nhwc to ``outer``: blocks of ``lanes`` columns by ``lanes`` channels, transposed in registers."""
    size, memory, lanes = numeric.compute_bytes, numeric.memory_bytes, numeric.lanes
    channels = (f["channels"] + 1) // 2 if numeric.pairs else f["channels"]
    source_column, tile_channel = a["source_column"], a["tile_channel"]
    positions, row_table, column_table, zeros = a.table("row_positions"), a.table("row_table"), a.table("column_table"), a.table("zeros")

    def row(j: Value) -> None:
        offset = f.load_index(row_table, f.load_index(positions, j) + f["p0"])
        line = f["source"] + offset

        def slab_body(index: Value) -> None:
            slab = slab_fields(f, a, index)
            target = f["tile"] + slab["start"] + j * a["tile_row"]
            columns = column_table + (slab["table_start"] + f["q0"]) * 8
            last = slab["length"] - 1

            def column_block(x: Value) -> None:
                pointers = []
                for i in range(lanes):
                    column = f.load_index(columns, f.minimum(x + i, last))
                    inside = f.define("i1", f"and i1 {(column >= 0).text}, {(offset >= 0).text}")
                    pointers.append((inside, line + column * source_column))
                written = f.lane_mask(slab["length"] - x, lanes)

                def channel_block(c: Value) -> None:
                    if numeric.pairs:
                        halves, read = vector_type(numeric.memory, 2 * lanes), f.lane_mask(f["channels"] - c * 2, 2 * lanes)
                        raw = [f.load_masked(f.select(inside, p + c * size, zeros), read, halves) for inside, p in pointers]
                        loaded = [f.cast("bitcast", vector, numeric.vector) for vector in raw]
                    else:
                        read = f.lane_mask(channels - c, lanes)
                        loaded = [numeric.load(f, f.select(inside, p + c * memory, zeros), lanes, read) for inside, p in pointers]
                    for _, pointer in pointers:  # the same channels of the next pixels
                        f.prefetch(pointer + c * (size if numeric.pairs else memory) + source_column * lanes)
                    for i, vector in enumerate(f.transpose(loaded)):
                        with f.when(c + i < channels):
                            numeric.put(f, vector, target + (c + i) * tile_channel + x * size, lanes, written)

                f.loop(0, channels, lanes, channel_block)

            f.loop(0, slab["length"], lanes, column_block)

        f.loop(0, a["slabs"], 1, slab_body)

    f.loop(0, a["rows"], 1, row)


def emit_pack_panel(module: Module, numeric: Numeric, second: bool = False, apart: int = 0) -> Function:
    """``pack_panel(weight, panel, offsets, count, limit, width, pitch, contiguous)``: panel ``[t][width]`` of the weight.

    Entry ``(t, j)`` is at ``weight + offsets[t] + j * pitch`` (bytes), zero for ``j >= limit``.  ``contiguous``: entries of neighbouring ``t``
    are neighbours in memory; then blocks are transposed in registers, which reads every cache line once.  ``second``: entries are pairs, given by two
    more parameters: ``distance`` of a pair's halves, and ``second_row``, negative where the second halves are zeros.  ``apart``: entries of one ``t`` are
    known to be this many elements apart, and vectors of them are picked out of that many vectors.
    """
    parameters = [("ptr", "weight"), ("ptr", "panel"), ("ptr", "offsets"), ("i64", "count"), ("i64", "limit"), ("i64", "width"), ("i64", "pitch")]
    f = module.function("pack_panel", [*parameters, ("i64", "contiguous"), *([("i64", "distance"), ("i64", "second_row")] if second else [])])
    if second:
        numeric = Joined.of(f, numeric, f["distance"], f["second_row"] >= 0)
    size, memory, lanes = numeric.compute_bytes, numeric.memory_bytes, numeric.lanes
    limit = f.minimum(f["limit"], f["width"])

    def element(t: Value, j: Value) -> Value:
        return numeric.load(f, f["weight"] + f.load_index(f["offsets"], t) + j * f["pitch"], 1)

    def place(t: Value, j: Value) -> Value:
        return f["panel"] + (t * f["width"] + j) * size

    def by_rows() -> None:
        def line(t: Value) -> None:
            source, target = f["weight"] + f.load_index(f["offsets"], t), place(t, f.value(0))
            ahead = f["weight"] + f.load_index(f["offsets"], f.minimum(t + _TERMS_AHEAD, f["count"] - 1))

            def neighbours() -> None:
                soon = f["weight"] + f.load_index(f["offsets"], f.minimum(t + _ROWS_AHEAD, f["count"] - 1))
                for line_ahead in (0, 64):
                    f.prefetch(soon + line_ahead)
                _copy_exact(f, numeric, source, target, limit)

            f.branch(
                f["pitch"].equals(memory),
                neighbours,
                lambda: _copy_apart(f, numeric, source, target, limit, ahead, apart),
            )
            f.loop(limit, f["width"], 1, lambda j: f.store(f.zero(numeric.compute), target + j * size))

        f.loop(0, f["count"], 1, line)

    def transposed() -> None:
        whole_t, whole_j = f.integer("and", f["count"], -lanes), f.integer("and", limit, -lanes)

        def row_block(t: Value) -> None:
            start = f["weight"] + f.load_index(f["offsets"], t)

            def block(j: Value) -> None:
                rows = []
                for i in range(lanes):
                    pointer = start + (j + i) * f["pitch"]
                    f.prefetch(pointer + _BYTES_AHEAD)
                    rows.append(numeric.load(f, pointer, lanes))
                for i, vector in enumerate(f.transpose(rows)):
                    f.store(vector, place(t + i, j))

            f.loop(0, whole_j, lanes, block)
            f.loop(t, t + lanes, 1, lambda u: rest(u, whole_j))

        def rest(t: Value, first: Value) -> None:
            f.loop(first, limit, 1, lambda j: f.store(element(t, j), place(t, j)))
            f.loop(limit, f["width"], 1, lambda j: f.store(f.zero(numeric.compute), place(t, j)))

        f.loop(0, whole_t, lanes, row_block)
        f.loop(whole_t, f["count"], 1, lambda t: rest(t, f.value(0)))

    f.branch(f["contiguous"] > 0, transposed, by_rows)
    f.ret()
    return f


def _copy_apart(f: Function, numeric: Numeric, source: Value, target: Value, count: Value, ahead: Value, apart: int) -> None:
    """``count`` elements at a pitch, ``f["pitch"]`` bytes, which is ``apart`` elements where that is known; what is at ``ahead`` is to be copied soon."""
    size, memory, lanes, pitch = numeric.compute_bytes, numeric.memory_bytes, numeric.lanes, f["pitch"]
    picked = f.integer("and", count, -lanes) if apart else f.value(0)

    def pick(j: Value) -> None:
        for line in range(0, lanes * apart * memory, 64):
            f.prefetch(ahead + j * (apart * memory) + line)
        f.store(_pick(f, numeric, source + j * (apart * memory), apart), target + j * size)

    if apart:
        f.loop(0, picked, lanes, pick)
    whole = f.integer("and", count, -4)

    def four(j: Value, pointer: Value) -> list[Value]:
        for u in range(4):
            f.store(numeric.load(f, pointer, 1), target + j * size + u * size)
            pointer = pointer + pitch
        return [pointer]

    def one(j: Value, pointer: Value) -> list[Value]:
        f.store(numeric.load(f, pointer, 1), target + j * size)
        return [pointer + pitch]

    (rest,) = f.loop(picked, whole, 4, four, [source + picked * pitch])
    f.loop(whole, count, 1, one, [rest])


def _pick(f: Function, numeric: Numeric, source: Value, apart: int) -> Value:
    """The elements at ``source`` and at multiples of ``apart`` elements behind it, one vector of them; nothing behind the last is read."""
    lanes, memory = numeric.lanes, numeric.memory_bytes
    last = apart * (lanes - 1)
    result: Value | None = None
    for v in range(last // lanes + 1):
        mask = f.lane_mask(last + 1 - v * lanes, lanes) if last < (v + 1) * lanes - 1 else None
        loaded = numeric.load(f, source + v * lanes * memory, lanes, mask)
        here = [i * apart - v * lanes for i in range(lanes)]
        if result is None:
            result = f.shuffle(loaded, None, [min(place, lanes - 1) for place in here])
        else:
            result = f.shuffle(result, loaded, [lanes + place if 0 <= place < lanes else i for i, place in enumerate(here)])
    assert result is not None
    return result


def _copy_exact(f: Function, numeric: Numeric, source: Value, target: Value, count: Value) -> None:
    """Like :func:`copy_run`, writing nothing past the end."""
    lanes, size, memory = numeric.lanes, numeric.compute_bytes, numeric.memory_bytes
    whole = f.integer("and", count, -lanes)
    f.loop(0, whole, lanes, lambda i: f.store(numeric.load(f, source + i * memory, lanes), target + i * size))
    f.loop(whole, count, 1, lambda i: f.store(numeric.load(f, source + i * memory, 1), target + i * size))
