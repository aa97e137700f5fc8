"""Tiles of a depthwise convolution: from an image in either format into scratch with channels in vector lanes, and back.

A scratch entry is one vector of the compute type: ``lanes`` channels of one pixel.  Pixels are ``pixel`` bytes apart and hold their vectors side
by side; a table says where each row begins, so that a scratch can be a ring of rows.  All accesses to the caller's memory are made here and
in the kernels' final stores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..codegen.emit import Function, Module, Value
from ..codegen.numeric import Numeric
from .depthwise_geometry import Line

__all__ = ["Lanes", "emit_filters", "emit_flush", "emit_load", "emit_load_planes", "image_strides", "inside", "odd_lines"]


@dataclass(frozen=True)
class Lanes:
    """How vector lanes lie in an image.

    ``kind``: lane ``l`` reads channel ``l`` (``same``), ``l // multiplier`` (``shared``) or ``l * multiplier + residue`` (``strided``).
    ``tail``: the number of lanes in all is no multiple of the vector's.
    """

    numeric: Numeric
    format: str
    kind: str
    tail: bool

    @property
    def entry_bytes(self) -> int:
        return self.numeric.lanes * self.numeric.compute_bytes

    def pixel(self, f: Function) -> Value | int:
        """Bytes between pixels in scratch."""
        return f["pixel"] if self.format == "nhwc" else self.entry_bytes

    def channel(self, f: Function, lane: Value) -> Value:
        """The source channel of a lane; lanes behind the last one read the last one's."""
        if self.tail:
            lane = f.minimum(lane, f["lanes_total"] - 1)
        if self.kind == "shared":
            return lane // f["multiplier"]
        return lane * f["multiplier"] + f["residue"] if self.kind == "strided" else lane

    @property
    def name(self) -> str:
        return self.format + ("" if self.kind == "same" else self.kind) + ("t" if self.tail else "")


LOAD_PARAMETERS = (
    ("ptr", "source"), ("ptr", "scratch"), ("ptr", "row_table"), ("ptr", "ring"), ("i64", "rows"), ("ptr", "col_table"), ("i64", "cols"), ("i64", "first"),
    ("i64", "last"), ("i64", "start"), ("i64", "vectors"), ("i64", "lanes_total"), ("i64", "multiplier"), ("i64", "residue"), ("i64", "pixel"),
    ("i64", "row_bytes"), ("i64", "channel_bytes"),
)  # fmt: skip


def emit_load(module: Module, lanes: Lanes, name: str, zero_rows: bool) -> Function:
    """Emit a function that fills ``rows x cols`` pixels of ``vectors`` entries of scratch from one image.

    ``row_table`` and ``col_table`` give the source row and column of each pixel, -1 for zero, ``ring`` the place of each row in bytes; pixels of
    columns ``first`` to ``last - 1`` are never zero, and for nchw their source columns are consecutive.  Zero rows are filled only where ``zero_rows``.
    ``start`` is the first lane; ``channel_bytes`` the distance of pixels (nhwc) or planes (nchw).  For nchw ``vectors`` is 1, and a row needs a
    vector's lanes of pixels of slack.
    """
    f = module.function(name, LOAD_PARAMETERS)
    numeric = lanes.numeric
    source = f["source"]
    if lanes.format == "nhwc" and lanes.kind == "same":
        source = source + f["start"] * numeric.memory_bytes
    pointers = _lane_pointers(f, lanes, source) if lanes.format == "nchw" or lanes.kind != "same" else []

    def row(i: Value) -> None:
        at = f.load_index(f["row_table"], i)
        target = f["scratch"] + f.load_index(f["ring"], i)
        distance = at * f["row_bytes"]

        def present() -> None:
            if lanes.format == "nhwc":
                _row_nhwc(f, lanes, source, pointers, distance, target)
            else:
                _row_nchw(f, lanes, pointers, distance, target)

        def absent() -> None:
            f.loop(0, f["cols"], 1, lambda j: _store_zeros(f, lanes, target + j * lanes.pixel(f)))

        f.branch(at >= 0, present, absent if zero_rows else lambda: None)

    f.loop(0, f["rows"], 1, row)
    f.ret()
    return f


def _store_zeros(f: Function, lanes: Lanes, target: Value) -> None:
    zero = f.zero(lanes.numeric.vector)
    if lanes.format == "nchw":
        f.store(zero, target)
    else:
        f.loop(0, f["vectors"], 1, lambda v: f.store(zero, target + v * lanes.entry_bytes))


def _lane_pointers(f: Function, lanes: Lanes, source: Value) -> list[Value]:
    """The source of each lane of the first vector: element of a pixel (nhwc), or plane (nchw)."""
    size: Value | int = f["channel_bytes"] if lanes.format == "nchw" else lanes.numeric.memory_bytes
    return [source + lanes.channel(f, f["start"] + lane) * size for lane in range(lanes.numeric.lanes)]


def _gather(f: Function, lanes: Lanes, pointers: list[Value], distance: Value) -> Value:
    """One vector from a scalar load a lane."""
    vector = f.zero(lanes.numeric.vector)
    for lane, pointer in enumerate(pointers):
        vector = f.insert(vector, lanes.numeric.load(f, pointer + distance, 1), lane)
    return vector


def _row_nhwc(f: Function, lanes: Lanes, source: Value, pointers: list[Value], row: Value, target: Value) -> None:
    numeric = lanes.numeric
    count = numeric.lanes

    def pixel(j: Value, column: Value) -> None:
        distance = row + column * f["channel_bytes"]
        to = target + j * lanes.pixel(f)
        if lanes.kind != "same":
            # One vector a task: its lanes come from scattered channels.
            f.store(_gather(f, lanes, pointers, distance), to)
            return
        at = source + distance
        full: Value = f["vectors"]
        if lanes.tail:
            full = f.minimum(full, (f["lanes_total"] - f["start"]) // count)

        def vector(_: Value, p: Value, to: Value) -> list[Value]:
            f.store(numeric.load(f, p, count), to)
            return [p + count * numeric.memory_bytes, to + lanes.entry_bytes]

        rest, last = f.loop(0, full, 1, vector, [at, to])
        if lanes.tail:
            with f.when(full < f["vectors"]):
                mask = f.lane_mask(f["lanes_total"] - f["start"] - full * count, count)
                f.store(numeric.load(f, rest, count, mask), last)

    def border(j: Value) -> None:
        column = f.load_index(f["col_table"], j)
        f.branch(column >= 0, lambda: pixel(j, column), lambda: _store_zeros(f, lanes, target + j * lanes.pixel(f)))

    f.loop(0, f["first"], 1, border)
    f.loop(f["first"], f["last"], 1, lambda j: pixel(j, f.load_index(f["col_table"], j)))
    f.loop(f["last"], f["cols"], 1, border)


def _row_nchw(f: Function, lanes: Lanes, pointers: list[Value], row: Value, target: Value) -> None:
    """Blocks of ``lanes`` columns are transposed; the last block overlaps the one before it, a line of less than a block is read under a mask."""
    numeric = lanes.numeric
    count = numeric.lanes
    first, inner = f["first"], f["last"] - f["first"]

    def block(begin: Value, mask: Value | None) -> None:
        distance = row + (f.load_index(f["col_table"], first) + begin) * numeric.memory_bytes
        vectors = f.transpose([numeric.load(f, p + distance, count, mask) for p in pointers])
        to = target + (first + begin) * lanes.entry_bytes
        for i, vector in enumerate(vectors):
            f.store(vector, to + i * lanes.entry_bytes)

    def border(j: Value) -> None:
        column = f.load_index(f["col_table"], j)
        to = target + j * lanes.entry_bytes

        def gathered() -> None:
            f.store(_gather(f, lanes, pointers, row + column * numeric.memory_bytes), to)

        f.branch(column >= 0, gathered, lambda: f.store(f.zero(numeric.vector), to))

    def blocks() -> None:
        f.loop(0, inner, count, lambda i: block(f.minimum(i, inner - count), None))

    def short() -> None:
        with f.when(inner > 0):
            block(f.value(0), f.lane_mask(inner, count))

    # The interior first: a short block writes zeros behind its end, over entries that are written after it.
    f.branch(inner >= count, blocks, short)
    f.loop(0, first, 1, border)
    f.loop(f["last"], f["cols"], 1, border)


def emit_load_planes(module: Module, lanes: Lanes, name: str) -> Function:
    """Emit a function that transposes ``pixels`` of nchw planes, as they lie in memory, to entries of scratch: ``[pixel][lanes]`` of the lanes from ``start``.

    Scratch holds a vector's lanes of entries at least.
    """
    names = ("pixels", "start", "lanes_total", "multiplier", "channel_bytes")
    f = module.function(name, (("ptr", "source"), ("ptr", "scratch"), *(("i64", name) for name in names)))
    numeric = lanes.numeric
    count, pixels = numeric.lanes, f["pixels"]
    pointers = _lane_pointers(f, lanes, f["source"])

    def block(begin: Value, mask: Value | None) -> None:
        vectors = f.transpose([numeric.load(f, p + begin * numeric.memory_bytes, count, mask) for p in pointers])
        for i, vector in enumerate(vectors):
            f.store(vector, f["scratch"] + (begin + i) * lanes.entry_bytes)

    def blocks() -> None:
        f.loop(0, pixels, count, lambda i: block(f.minimum(i, pixels - count), None))

    f.branch(pixels >= count, blocks, lambda: block(f.value(0), f.lane_mask(pixels, count)))
    f.ret()
    return f


def emit_filters(f: Function, numeric: Numeric, filters: Sequence[Value], length: Value, put: Callable[[Value, Value], None]) -> None:
    """Call ``put(vector, tap)`` for each of the ``length`` taps of filters that are runs of memory, one for each lane: blocks of them are transposed."""
    count, memory = numeric.lanes, numeric.memory_bytes

    def block(first: Value, wanted: Value | None) -> None:
        mask = None if wanted is None else f.lane_mask(wanted, count)
        for i, value in enumerate(f.transpose([numeric.load(f, row + first * memory, count, mask) for row in filters])):
            if wanted is None:
                put(value, first + i)
            else:
                with f.when(wanted > i):
                    put(value, f.value(i))

    def many() -> None:
        f.loop(0, length, count, lambda i: block(f.minimum(i, length - count), None))

    f.branch(length >= count, many, lambda: block(f.value(0), length))


FLUSH_PARAMETERS = (("ptr", "scratch"), ("ptr", "out"), ("i64", "cols"), ("i64", "start"), ("i64", "lanes_total"), ("i64", "channel_bytes"))


def emit_flush(module: Module, lanes: Lanes, name: str) -> Function:
    """Emit a function that writes ``cols`` entries of scratch as rows of nchw planes ``start ..``; ``out`` is the row in plane 0."""
    f = module.function(name, FLUSH_PARAMETERS)
    numeric = lanes.numeric
    count = numeric.lanes

    def block(begin: Value, mask: Value | None) -> None:
        at = f["scratch"] + begin * lanes.entry_bytes
        rows = f.transpose([f.load(at + i * lanes.entry_bytes, numeric.vector) for i in range(count)])
        to = f["out"] + f["start"] * f["channel_bytes"] + begin * numeric.memory_bytes
        for lane, vector in enumerate(rows):
            pointer = to + f["channel_bytes"] * lane
            if lanes.tail and lane:
                with f.when(f["start"] + lane < f["lanes_total"]):
                    numeric.store(f, vector, pointer, count, mask)
            else:
                numeric.store(f, vector, pointer, count, mask)

    cols = f["cols"]

    def blocks() -> None:
        f.loop(0, cols, count, lambda i: block(f.minimum(i, cols - count), None))

    f.branch(cols >= count, blocks, lambda: block(f.value(0), f.lane_mask(cols, count)))
    f.ret()
    return f


def inside(line: Line, format_: str) -> tuple[int, int]:
    """Scratch entries of a line of columns that are never zero; for nchw, only those whose source columns are consecutive."""
    if format_ == "nhwc" and line.mode != "zeros":
        return 0, line.length(line.count)
    return line.inside()


def odd_lines(size: int) -> int:
    """``size`` rounded up to an odd number of cache lines, so that rows and planes do not fall on the same cache sets."""
    return (-(-size // 64) | 1) * 64


def image_strides(name: str, format_: str, channels: int, rows: int, cols: int, size: int) -> dict[str, int]:
    """Bytes between images, rows, and channels (nchw: planes; nhwc: pixels) of a tensor with elements of ``size`` bytes."""
    nhwc = format_ == "nhwc"
    return {
        f"{name}_image": channels * rows * cols * size,
        f"{name}_row": (channels if nhwc else 1) * cols * size,
        f"{name}_channel": (channels if nhwc else rows * cols) * size,
    }
