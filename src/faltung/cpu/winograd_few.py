"""The input transform of layers with stride 2 and a few channels: a vector holds all components of all channels of a pixel.

An image with 3 channels has 12 virtual ones.  Their pixels are gathered once for a strip of tiles, where the tiles overlap, and then transformed.
"""

from __future__ import annotations

from functools import partial

from ..codegen.emit import Function, Module, Scalar, Value, vector_type
from ..codegen.entry import ArgumentBlock
from ..codegen.numeric import Numeric
from .pack import Arguments, zero_run
from .winograd_form import Form, table_pitch
from .winograd_input import INPUT, STRIP_TILES, in_strip, tile_rows, transform_tile
from .winograd_transform import Algorithm

__all__ = ["PIXEL", "emit_few_input", "few_strip_bytes"]

PIXEL = 16
"""Elements of a virtual pixel, of which the first 4 * channels are used."""


def few_strip_bytes(algorithm: Algorithm, numeric: Numeric) -> int:
    """Scratch: n rows of a strip's virtual pixels, and a block of them run over."""
    return (algorithm.n * (STRIP_TILES * algorithm.m + algorithm.n - algorithm.m) + numeric.lanes) * PIXEL * numeric.compute_bytes


def emit_few_input(module: Module, arguments: ArgumentBlock, numeric: Numeric, algorithm: Algorithm, form: Form, source_format: str, channels: int) -> Function:
    """``input``, with the parameters of :func:`emit_input`::

    for row of tiles, strip of STRIP_TILES of them:
        n rows of virtual pixels into scratch     [row][column][component][channel]
        for tile of the strip: transform
    """
    names = ("first", "last", "channels", "v_point", "v_pitch")
    pointers = [("ptr", "block"), ("ptr", "source"), ("ptr", "v"), ("ptr", "scratch")]
    f = module.function("input", [*pointers, *(("i64", name) for name in names)])
    a = Arguments(f, arguments, f["block"])
    n, m, lanes, size = algorithm.n, algorithm.m, numeric.lanes, numeric.compute_bytes
    pixel, wide = PIXEL * size, table_pitch(n)
    pitch = (STRIP_TILES * m + n - m) * pixel
    pack = _emit_pack(module, numeric, form, source_format, channels)
    row_table = a.table("row_table")
    zero_run(f, numeric, f["scratch"], few_strip_bytes(algorithm, numeric) // size)  # what lies behind the channels

    def row_of_tiles(image: Value, tile_row: Value, row_start: Value, start: Value, stop: Value) -> None:
        def strip(first: Value) -> None:
            tiles, x = f.minimum(stop - first, STRIP_TILES), (first - row_start) * m
            source = f["source"] + image * a["source_image"]

            def line(i: Value) -> None:
                rows: list[Value] = []
                for down in range(2):
                    offset = f.load_index(row_table, (tile_row + a["tiles_p"] * down) * wide + i)
                    rows += f.select(offset >= 0, source + offset, a.table("zeros")), f.select(offset >= 0, a["source_channel"], f.value(0))
                columns = a.table("column_table") + x * 16
                sizes = [x, tiles * m + (n - m), a["column_before"], a["source_width"]]
                f.call(pack, [*rows, a.table("zeros"), columns, f["scratch"] + i * pitch, *sizes])

            f.loop(0, n, 1, line)

            def tile(index: Value) -> None:
                for vector in range(-(-4 * channels // lanes)):
                    origin = f["scratch"] + (index - first) * (m * pixel) + vector * (lanes * size)
                    target = f["v"] + (index - f["first"]) * f["v_pitch"] + vector * (lanes * size)
                    transform_tile(f, numeric, algorithm, INPUT, partial(in_strip, f, numeric, origin, pitch, pixel), target, None)

            f.loop(first, first + tiles, 1, tile)

        f.loop(start, stop, STRIP_TILES, strip)

    tile_rows(f, a, f["first"], f["last"], row_of_tiles)
    f.ret()
    return f


def _emit_pack(module: Module, numeric: Numeric, form: Form, source_format: str, channels: int) -> Function:
    """``pack(row0, channel0, row1, channel1, zeros, columns, target, x, count, before, width)``: ``count`` virtual pixels from the column ``x`` on.

    ``row0`` and ``row1`` are the even and the odd row (of zeros outside the image) and ``channel0``, ``channel1`` the distances of their channels (nchw);
    ``columns`` the byte offset of every column of the padded image from ``2 x`` on, -1 for zero.  Blocks of columns inside the image are moved at once.
    """
    pointers = [("ptr", "row0"), ("i64", "channel0"), ("ptr", "row1"), ("i64", "channel1"), ("ptr", "zeros"), ("ptr", "columns"), ("ptr", "target")]
    f = module.function("pack", [*pointers, *(("i64", name) for name in ("x", "count", "before", "width"))])
    size, nhwc = numeric.compute_bytes, source_format == "nhwc"
    pixel, order = PIXEL * size, form.components
    rows = f["row0"], f["row1"]
    pitches: tuple[Scalar, Scalar] = (size, size) if nhwc else (f["channel0"], f["channel1"])

    def border(v: Value) -> None:
        for b in range(2):
            column = f.load_index(f["columns"], v * 2 + b)
            for down in range(2):
                place = f.select(column >= 0, rows[down] + column, f["zeros"])
                pitch = f.select(column >= 0, pitches[down], 0)
                for c in range(channels):
                    target = f["target"] + v * pixel + (order.index((down, b)) * channels + c) * size
                    f.store(f.load(place + pitch * c, numeric.compute), target)

    low = f.minimum(f.maximum((f["before"] + 1) // 2 - f["x"], 0), f["count"])
    high = (f["before"] + f["width"]) // 2 - f["x"]  # the first pair of columns that is not all inside
    offset = f["x"] * 2 - f["before"]
    if nhwc:
        # Whole vectors are read, up to 8 elements from a pair's first on.
        stop = f.maximum(f.minimum(high - -(-(8 - 2 * channels) // (2 * channels)), f["count"]), low)

        def pair(v: Value) -> None:
            at, target = (offset + v * 2) * (channels * size), f["target"] + v * pixel
            four, eight = vector_type(numeric.compute, 4), vector_type(numeric.compute, 8)
            # In the order of the components, each over what the one before it wrote too much.
            f.store(f.load(rows[1] + at, four), target)
            f.store(f.load(rows[0] + at, eight), target + channels * size)
            f.store(f.load(rows[1] + at + channels * size, four), target + 3 * channels * size)

        f.loop(low, stop, 1, pair)
    else:
        blocks = f.maximum(f.minimum(f["count"], high - (numeric.lanes - 1)) - low + (numeric.lanes - 1), 0) // numeric.lanes
        stop = low + blocks * numeric.lanes
        f.loop(low, stop, numeric.lanes, lambda v: _transpose_block(f, numeric, form, channels, (offset + v * 2) * size, f["target"] + v * pixel))
    f.loop(stop, f["count"], 1, border)
    f.loop(0, low, 1, border)
    f.ret()
    return f


def _transpose_block(f: Function, numeric: Numeric, form: Form, channels: int, at: Value, target: Value) -> None:
    """``lanes`` virtual pixels from the planes of the channels, ``at`` bytes from the rows' starts on."""
    lanes, size = numeric.lanes, numeric.compute_bytes
    streams = [f.zero(numeric.vector)] * (-(-4 * channels // lanes) * lanes)
    for down in range(2):
        place = f[f"row{down}"] + at
        for c in range(channels):
            left, right = f.load(place, numeric.vector), f.load(place + lanes * size, numeric.vector)
            for b in range(2):
                streams[form.components.index((down, b)) * channels + c] = f.shuffle(left, right, range(b, 2 * lanes, 2))
            place = place + f[f"channel{down}"]
    for start in range(0, len(streams), lanes):
        for i, vector in enumerate(f.transpose(streams[start : start + lanes])):
            f.store(vector, target + (i * PIXEL + start) * size)
