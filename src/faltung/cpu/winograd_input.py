"""The input transform: V[point][tile][channel] = B^T d B for the n x n input pixels d of every tile, neighbouring tiles m pixels apart; and for the
weight's gradient A d A^T for the m x m pixels d of every tile of the gradient of y.

Padding of every mode ends here: rows and columns are looked up in tables of source offsets, -1 for zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ..codegen.emit import Function, Module, Scalar, Value, vector_type
from ..codegen.entry import ArgumentBlock
from ..codegen.numeric import Numeric
from .pack import Arguments, zero_run
from .winograd_form import PLAIN, Form, Table, table_pitch, tile_starts
from .winograd_transform import Algorithm, Transform1d, emit_input_1d, emit_lift_1d, transform_2d

__all__ = [
    "GRADIENT_ARGUMENTS", "INPUT", "INPUT_ARGUMENTS", "LIFT", "LIFT_SUMS", "STRIP_ARGUMENTS", "STRIP_TILES", "Strips", "channel_start", "emit_input",
    "in_strip", "strip_bytes", "strip_groups", "strip_table", "tile_rows", "transform_tile",
]  # fmt: skip

INPUT_ARGUMENTS = (
    "tiles_p", "tiles_q", "source_channels", "source_image", "source_channel", "source_width", "column_before", "row_table", "column_table", "zeros",
)  # fmt: skip
"""Tiles of one image; channels; byte pitches of the source's images and channels; its columns; padded columns before it; for every row of tiles the byte
offsets of the rows that it reads, -1 for zero; the same of columns for nhwc, and the column of every position of the padded image for nchw; the address of
zeros, one for each channel."""

STRIP_ARGUMENTS = ("column_group", "column_spread", "strip_tiles", "strip_table")
"""Of kernels for dilated layers in nchw: residues of columns, the distance of a tile's columns, tiles of a strip (whole groups of residues), and for each of
them how many bytes behind the first one's its first pixel lies."""

_SHARED = ("tiles_p", "tiles_q", "zeros", *STRIP_ARGUMENTS)
GRADIENT_ARGUMENTS = tuple(f"gradient_{name}" for name in INPUT_ARGUMENTS if name not in _SHARED)
"""The same of the gradient of y."""

STRIP_TILES = 16  # neighbouring tiles of an image that nchw transposes at once


def strip_groups(group: int, stride: int = 1) -> int:
    """Groups of tiles of a strip, for ``group`` residues of columns; with a stride a tile has that many times the rows and columns."""
    return max(1, STRIP_TILES // (group * stride * stride))


def strip_bytes(algorithm: Algorithm, numeric: Numeric, step: int = 1, group: int = 1, stride: int = 1) -> int:
    """Scratch of nchw's input transform: n rows of the columns of a strip, ``lanes`` channels, and a block of columns run over."""
    columns = (strip_groups(group, stride) * algorithm.m + algorithm.n - algorithm.m) * step
    return (algorithm.n * stride * columns + numeric.lanes) * numeric.lanes * numeric.compute_bytes


def strip_table(m: int, numeric: Numeric, step: int, group: int, stride: int = 1) -> Table:
    """Bytes from the first pixel of a strip's scratch to that of each of its tiles."""
    return tile_starts(strip_groups(group, stride) * group, m, step, group) * (numeric.lanes * numeric.compute_bytes)


class Strips:
    """How the tiles of a row of tiles lie in nchw's strips: side by side, or (``spread``) in groups of residues and with pixels apart."""

    def __init__(self, f: Function, a: Arguments, numeric: Numeric, m: int, spread: bool) -> None:
        self._f, self._m, self._spread = f, m, spread
        self._pixel = numeric.lanes * numeric.compute_bytes
        self.tiles: Scalar = a["strip_tiles"] if spread else STRIP_TILES
        self._step: Scalar = a["column_spread"] if spread else 1
        self._group: Scalar = a["column_group"] if spread else 1
        self._table = a.table("strip_table") if spread else None
        self.pitch: Scalar = self._step * self._pixel
        """Bytes from column to column of a tile."""

    def column(self, tile: Value) -> Value:
        """First column of a tile that begins a group (of outputs; of what is read, in the padded image)."""
        return tile * self._m if not self._spread else tile // self._group * self._m * self._step

    def columns(self, tiles: Scalar, more: int) -> Scalar:
        """Columns of whole groups of ``tiles`` tiles and of ``more`` to the right of every tile."""
        return tiles * self._m + more if isinstance(tiles, int) or not self._spread else (tiles // self._group * self._m + more) * self._step

    def origin(self, tile: Value) -> Value:
        """Bytes from the first tile's first pixel to that of a tile of the strip."""
        return tile * (self._m * self._pixel) if self._table is None else self._f.load_index(self._table, tile)


def tile_rows(f: Function, a: Arguments, first: Value, last: Value, body: Callable[[Value, Value, Value, Value, Value], None]) -> None:
    """``body(image, tile_row, row_start, start, stop)`` for each row of tiles in ``first .. last - 1``: its first tile and those wanted of it."""
    tiles_p, tiles_q = a["tiles_p"], a["tiles_q"]

    def row(index: Value) -> None:
        row_start = index * tiles_q
        start, stop = f.maximum(first, row_start), f.minimum(last, row_start + tiles_q)
        body(index // tiles_p, index % tiles_p, row_start, start, stop)

    f.loop(first // tiles_q, (last + (tiles_q - 1)) // tiles_q, 1, row)


def channel_start(f: Function, index: Value, channels: Value, lanes: int) -> Value:
    """Start of a vector of channels: the last one begins early, so that none needs a mask."""
    return f.minimum(index, channels - lanes)


@dataclass(frozen=True)
class Gather:
    """What is read of a tile and what becomes of it: ``whole`` n x n pixels, or m x m; ``sums``: their sum is added to a vector of each channel."""

    name: str
    whole: bool
    transform: Transform1d[Value]
    prefix: str = ""
    sums: bool = False

    def extent(self, algorithm: Algorithm) -> int:
        """Rows and columns of pixels."""
        return algorithm.n if self.whole else algorithm.m


INPUT = Gather("input", True, emit_input_1d)
LIFT = Gather("lift", False, emit_lift_1d, "gradient_")
LIFT_SUMS = Gather("lift", False, emit_lift_1d, "gradient_", sums=True)


class _Source(Arguments):
    """The arguments of a gather's source."""

    def __init__(self, f: Function, arguments: ArgumentBlock, block: Value, prefix: str) -> None:
        super().__init__(f, arguments, block)
        self._prefix = prefix

    def __getitem__(self, name: str) -> Value:
        return super().__getitem__(name if name in _SHARED else self._prefix + name)


def emit_input(
    module: Module,
    arguments: ArgumentBlock,
    numeric: Numeric,
    algorithm: Algorithm,
    source_format: str,
    gather: Gather = INPUT,
    form: Form = PLAIN,
    dilated: bool = False,
) -> Function:
    """``input(block, source, v, scratch, first, last, channels, v_point, v_pitch)``: tiles ``first .. last - 1`` into V, tile ``first`` first.

    ``channels``: at least a vector, from ``source`` on.  With ``gather.sums`` also ``sums``: a vector for each vector of channels that the sums of pixels
    are added to (where 16 does not divide the channels, the last vector's are those it starts early with).  ``dilated``: tiles are of residues, and
    nchw's tiles are whole groups of them.  A component's channels follow those of the one before it.
    """
    names = ("first", "last", "channels", "v_point", "v_pitch")
    pointers = [("ptr", "block"), ("ptr", "source"), ("ptr", "v"), ("ptr", "scratch")]
    f = module.function(gather.name, [*pointers, *(("i64", n) for n in names), *([("ptr", "sums")] if gather.sums else [])])
    a = _Source(f, arguments, f["block"], gather.prefix)
    if source_format == "nhwc":
        _from_nhwc(f, a, numeric, algorithm, gather, form)
    else:
        _from_nchw(f, a, numeric, algorithm, gather, form, Strips(f, a, numeric, algorithm.m, dilated or form.stride > 1))
    f.ret()
    return f


def transform_tile(
    f: Function,
    numeric: Numeric,
    algorithm: Algorithm,
    gather: Gather,
    pixel: Callable[[int, int], Value],
    target: Value,
    sums: Value | None,
    form: Form = PLAIN,
    component: int = 0,
) -> None:
    """One vector of channels of one tile; ``pixel(i, j)`` is its pixel, ``sums`` where their sum is added.  Points that the component is not
    multiplied at are left out."""
    n, extent = algorithm.n, gather.extent(algorithm)
    columns = [[pixel(i, j) for i in range(extent)] for j in range(extent)]
    if sums is not None:
        every = [value for column in columns for value in column]
        while len(every) > 1:
            every = [f.fadd(left, right) for left, right in zip(every[::2], every[1::2])]
        f.store(f.fadd(f.load(sums, numeric.vector), every[0]), sums)
    for i, row in enumerate(transform_2d(f, gather.transform, algorithm, columns, numeric.target.fma)):
        base = target + f["v_point"] * (i * n)
        for j, value in enumerate(row):
            first, stop = form.active(i == n - 1, j == n - 1)
            if first <= component < stop:
                f.store(value, base + f["v_point"] * j)


def _from_nhwc(f: Function, a: Arguments, numeric: Numeric, algorithm: Algorithm, gather: Gather, form: Form) -> None:
    """::

    for row of tiles, component, tile:
        addresses of its n x n pixels             (n vectors of n addresses; that of zeros outside the image)
        for vector of channels: transform
    """
    n, lanes, size = gather.extent(algorithm), numeric.lanes, numeric.compute_bytes
    channels, row_table, column_table, zeros = f["channels"], a.table("row_table"), a.table("column_table"), a["zeros"]
    source_image = a["source_image"]
    wide = table_pitch(n)
    addresses = f.stack(8 * wide * n)
    vector = vector_type("i64", wide)

    def row_of_tiles(image: Value, tile_row: Value, row_start: Value, start: Value, stop: Value) -> None:
        base = f.cast("ptrtoint", f["source"] + image * source_image, "i64")
        nowhere = f.splat(zeros, wide)
        none = f.zero(vector)

        def component(number: int, down: int, right: int) -> None:
            row_places = row_table + (tile_row + a["tiles_p"] * down) * (8 * wide)
            rows = [f.load(row_places + i * 8) for i in range(n)]
            starts = [f.splat(base + row, wide) for row in rows]
            inside = [f.splat(row, wide) for row in rows]
            places = column_table + (a["tiles_q"] * right - row_start) * (8 * wide)
            behind = channels * (number * size)

            def tile(index: Value) -> None:
                columns = f.load(places + index * (8 * wide), vector)
                for i in range(n):
                    valid = f.compare("sge", f.integer("or", columns, inside[i]), none)
                    f.store(f.select(valid, f.integer("add", starts[i], columns), nowhere), addresses + i * (8 * wide))
                target = f["v"] + (index - f["first"]) * f["v_pitch"]

                def block(c: Value) -> None:
                    channel = channel_start(f, c, channels, lanes)
                    offset = channel * numeric.memory_bytes

                    def pixel(i: int, j: int) -> Value:
                        return numeric.load(f, f.load(addresses + (i * wide + j) * 8, "ptr") + offset, lanes)

                    sums = f["sums"] + c * size if gather.sums else None
                    transform_tile(f, numeric, algorithm, gather, pixel, target + behind + channel * size, sums, form, number)

                f.loop(0, channels, lanes, block)

            f.loop(start, stop, 1, tile)

        for number, (down, right) in enumerate(form.components):
            component(number, down, right)

    tile_rows(f, a, f["first"], f["last"], row_of_tiles)


def _from_nchw(f: Function, a: Arguments, numeric: Numeric, algorithm: Algorithm, gather: Gather, form: Form, strips: Strips) -> None:
    """::

    for row of tiles, strip of about STRIP_TILES of them, vector of channels:
        transpose n rows of the strip's columns into scratch [row][column][lane]
        for tile of the strip: transform
    """
    n, m, lanes, size = gather.extent(algorithm), algorithm.m, numeric.lanes, numeric.compute_bytes
    channels, row_table = f["channels"], a.table("row_table")
    source_image, source_channel = a["source_image"], a["source_channel"]
    pixel_bytes = lanes * size
    more = n - m
    pitch = strips.columns(strips.tiles, algorithm.n - m) * pixel_bytes
    pack_row = _emit_pack_row(f.module, numeric)

    def row_of_tiles(image: Value, tile_row: Value, row_start: Value, start: Value, stop: Value) -> None:
        def strip(first: Value) -> None:
            tiles = f.minimum(stop - first, strips.tiles)
            x = strips.column(first - row_start)
            count = f.value(strips.columns(tiles, more))
            low = f.minimum(f.maximum(a["column_before"] - x, 0), count)
            high = f.maximum(f.minimum(a["source_width"] + a["column_before"] - x, count), low)

            def block(c: Value) -> None:
                channel = channel_start(f, c, channels, lanes)
                plane = f["source"] + image * source_image + channel * source_channel

                def line(down: int, i: Value) -> None:
                    offset = f.load_index(row_table, (tile_row + a["tiles_p"] * down) * table_pitch(n) + i)
                    target = f["scratch"] + (i + down * n) * pitch

                    def copy() -> None:
                        columns = a.table("column_table") + x * 8
                        f.call(pack_row, [plane + offset, target, columns, x - a["column_before"], low, high, count, source_channel])

                    f.branch(offset >= 0, copy, lambda: zero_run(f, numeric, target, count * lanes))

                for down in range(form.stride):
                    f.loop(0, n, 1, partial(line, down))

                def tile(index: Value) -> None:
                    target = f["v"] + (index - f["first"]) * f["v_pitch"] + channel * size
                    sums = f["sums"] + c * size if gather.sums else None
                    for number, (down, right) in enumerate(form.components):
                        origin = f["scratch"] + strips.origin(index - first) + (right * pixel_bytes + down * n * pitch)
                        pixel = partial(in_strip, f, numeric, origin, pitch, strips.pitch)
                        transform_tile(f, numeric, algorithm, gather, pixel, target + channels * (number * size), sums, form, number)

                f.loop(first, first + tiles, 1, tile)

            f.loop(0, channels, lanes, block)

        f.loop(start, stop, strips.tiles, strip)

    tile_rows(f, a, f["first"], f["last"], row_of_tiles)


def in_strip(f: Function, numeric: Numeric, origin: Value, pitch: Scalar, column: Scalar, i: int, j: int) -> Value:
    """The pixel in row ``i`` and column ``j`` of a tile that begins at ``origin`` in a strip."""
    return f.load(origin + (i * pitch + j * column), numeric.vector)


def _emit_pack_row(module: Module, numeric: Numeric) -> Function:
    """``pack_row(source, target, columns, x, low, high, count, channel)``: ``count`` columns of ``lanes`` channels, transposed.

    Columns ``low .. high - 1`` lie inside the image, at ``x + column``; the others are looked up in ``columns``.
    """
    names = ("x", "low", "high", "count", "channel")
    if module.has("pack_row"):
        return module._functions["pack_row"]
    f = module.function("pack_row", [("ptr", "source"), ("ptr", "target"), ("ptr", "columns"), *(("i64", n) for n in names)])
    lanes, size, memory = numeric.lanes, numeric.compute_bytes, numeric.memory_bytes
    pixel = lanes * size
    low, high = f["low"], f["high"]

    def pointers(x: Value) -> list[Value]:
        first = f["source"] + (f["x"] + x) * memory
        found = [first]
        for _ in range(lanes - 1):
            found.append(found[-1] + f["channel"])
        return found

    def place(vectors: Sequence[Value], x: Value) -> None:
        for i, vector in enumerate(f.transpose(vectors)):
            f.store(vector, f["target"] + (x + i) * pixel)

    def block(x: Value) -> None:
        place([numeric.load(f, p, lanes) for p in pointers(x)], x)

    def border(x: Value) -> None:
        column = f.load_index(f["columns"], x)

        def gather() -> None:
            source = f["source"] + column * memory
            f.loop(0, lanes, 1, lambda i: f.store(numeric.load(f, source + i * f["channel"], 1), f["target"] + x * pixel + i * size))

        f.branch(column >= 0, gather, lambda: f.store(f.zero(numeric.vector), f["target"] + x * pixel))

    whole = low + f.integer("and", high - low, -lanes)
    f.loop(low, whole, lanes, block)
    if numeric.target.masks:
        with f.when(whole < high):
            mask = f.lane_mask(high - whole, lanes)
            place([numeric.load(f, p, lanes, mask) for p in pointers(whole)], whole)
        f.loop(high, f["count"], 1, border)
    else:
        f.loop(whole, f["count"], 1, border)
    f.loop(0, low, 1, border)
    f.ret()
    return f
