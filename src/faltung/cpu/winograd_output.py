"""The output transform: y = A^T M A + bias for every tile, m x m pixels, cut at the image's edge."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..codegen.emit import Function, Module, Scalar, Value, vector_type
from ..codegen.entry import ArgumentBlock
from ..codegen.numeric import Numeric
from .pack import Arguments
from .winograd_form import PLAIN, Form, table_pitch
from .winograd_input import STRIP_TILES, Strips, channel_start, strip_groups, tile_rows
from .winograd_transform import Algorithm, emit_output_1d, transform_2d

__all__ = ["OUTPUT_ARGUMENTS", "PHASE_ARGUMENTS", "emit_output", "output_scratch_bytes"]

OUTPUT_ARGUMENTS = ("out_width", "out_image", "out_channel", "out_row_table", "out_column_table")
"""Columns of the output; byte pitches of its images and channels; for every row and column of tiles the byte offsets of the m rows or columns that it
writes, -1 for those outside (of phases, for all tiles of each)."""
PHASE_ARGUMENTS = ("out_column", "m_phase")
"""Of kernels for phases: the column that nchw's first one is (-1 or 0), and the byte pitch of their M."""


def output_scratch_bytes(algorithm: Algorithm, numeric: Numeric, vectors: int, out_format: str, spread: int = 1, group: int = 1) -> int:
    """Scratch of the output transform: where pixels outside the image go (nhwc), or a strip of tiles (nchw)."""
    pixel = numeric.lanes * numeric.compute_bytes
    return vectors * pixel if out_format == "nhwc" else (algorithm.m * algorithm.m * strip_groups(group) * spread + numeric.lanes) * pixel


def emit_output(
    module: Module, arguments: ArgumentBlock, numeric: Numeric, algorithm: Algorithm, out_format: str, dilated: bool = False, form: Form = PLAIN
) -> Function:
    """``output(block, m, out, bias, scratch, first, last, valid, m_point, m_pitch)``: one panel of channels of tiles ``first .. last - 1``.

    ``out`` and ``bias`` are those of the panel's first channel, ``valid`` its number of channels (at least one vector).  Of a form with phases, ``m`` is that
    of the first one.
    """
    pointers = [("ptr", "block"), ("ptr", "m"), ("ptr", "out"), ("ptr", "bias"), ("ptr", "scratch")]
    f = module.function("output", [*pointers, *(("i64", n) for n in ("first", "last", "valid", "m_point", "m_pitch"))])
    a = Arguments(f, arguments, f["block"])
    if out_format == "nhwc":
        _to_nhwc(f, a, numeric, algorithm, form)
    elif form.phased:
        _phases_to_nchw(f, a, numeric, algorithm, form)
    else:
        _to_nchw(f, a, numeric, algorithm, Strips(f, a, numeric, algorithm.m, dilated))
    f.ret()
    return f


def _transform(
    f: Function,
    numeric: Numeric,
    algorithm: Algorithm,
    source: Value,
    bias: Value,
    write: Callable[[int, int, Value], None],
    form: Form = PLAIN,
    phase: int = 0,
) -> None:
    """One vector of channels of one tile, of a phase; ``write(i, j, value)`` takes its pixels."""
    n = algorithm.n
    products = []
    for i in range(n):
        base = source + f["m_point"] * (i * n)
        used = [not form.phased or form.used(phase, i == n - 1, j == n - 1) for j in range(n)]
        products.append([f.load(base + f["m_point"] * j, numeric.vector) if used[j] else f.zero(numeric.vector) for j in range(n)])
    columns = [[products[i][j] for i in range(n)] for j in range(n)]
    for i, row in enumerate(transform_2d(f, emit_output_1d, algorithm, columns, numeric.target.fma)):
        for j, value in enumerate(row):
            write(i, j, f.fadd(value, bias))


def _to_nhwc(f: Function, a: Arguments, numeric: Numeric, algorithm: Algorithm, form: Form) -> None:
    """::

    for row of tiles, phase, tile:
        addresses of its m x m pixels             (that of scratch outside the image)
        for vector of channels: transform
    """
    m, lanes, size = algorithm.m, numeric.lanes, numeric.compute_bytes
    out_image, row_table, column_table = a["out_image"], a.table("out_row_table"), a.table("out_column_table")
    wide = table_pitch(m)
    vector = vector_type("i64", wide)
    addresses = f.stack(8 * wide * m)
    nowhere = f.splat(f.cast("ptrtoint", f["scratch"], "i64"), wide)
    none = f.zero(vector)

    def row_of_tiles(image: Value, tile_row: Value, row_start: Value, start: Value, stop: Value) -> None:
        base = f.cast("ptrtoint", f["out"] + image * out_image, "i64")

        def phase(number: int, down: int, right: int) -> None:
            rows = [f.load_index(row_table, (tile_row + a["tiles_p"] * down) * wide + i) for i in range(m)]
            starts = [f.splat(base + row, wide) for row in rows]
            inside = [f.splat(row, wide) for row in rows]
            places = column_table + (a["tiles_q"] * right - row_start) * (8 * wide)
            first = f["m"] + a["m_phase"] * number if number else f["m"]

            def tile(index: Value) -> None:
                columns = f.load(places + index * (8 * wide), vector)
                for i in range(m):
                    valid = f.compare("sge", f.integer("or", columns, inside[i]), none)
                    f.store(f.select(valid, f.integer("add", starts[i], columns), nowhere), addresses + i * (8 * wide))
                source = first + (index - f["first"]) * f["m_pitch"]

                def block(k: Value) -> None:
                    channel = channel_start(f, k, f["valid"], lanes)
                    offset = channel * numeric.memory_bytes
                    bias = numeric.load(f, f["bias"] + offset, lanes)

                    def write(i: int, j: int, value: Value) -> None:
                        numeric.store(f, value, f.load(addresses + (i * wide + j) * 8, "ptr") + offset, lanes)

                    _transform(f, numeric, algorithm, source + channel * size, bias, write, form, number)

                f.loop(0, f["valid"], lanes, block)

            f.loop(start, stop, 1, tile)

        for number, (down, right) in enumerate(form.phases):
            phase(number, down, right)

    tile_rows(f, a, f["first"], f["last"], row_of_tiles)


def _to_nchw(f: Function, a: Arguments, numeric: Numeric, algorithm: Algorithm, strips: Strips) -> None:
    """::

    for row of tiles, strip of about STRIP_TILES of them, vector of channels:
        for tile of the strip: transform into scratch [row][column][lane]
        transpose m rows of the strip's columns into the output
    """
    m, lanes, size = algorithm.m, numeric.lanes, numeric.compute_bytes
    width, out_image, out_channel, row_table = a["out_width"], a["out_image"], a["out_channel"], a.table("out_row_table")
    pitch = strips.columns(strips.tiles, 0) * (lanes * size)
    unpack_row = _emit_unpack_row(f.module, numeric)

    def row_of_tiles(image: Value, tile_row: Value, row_start: Value, start: Value, stop: Value) -> None:
        def strip(first: Value) -> None:
            tiles = f.minimum(stop - first, strips.tiles)
            x = strips.column(first - row_start)
            count = f.minimum(strips.columns(tiles, 0), width - x)

            def block(k: Value) -> None:
                channel = channel_start(f, k, f["valid"], lanes)
                bias = numeric.load(f, f["bias"] + channel * numeric.memory_bytes, lanes)

                def tile(index: Value) -> None:
                    source = f["m"] + (index - f["first"]) * f["m_pitch"] + channel * size
                    origin = f["scratch"] + strips.origin(index - first)
                    _transform(f, numeric, algorithm, source, bias, partial(_write_in_strip, f, origin, pitch, strips.pitch))

                f.loop(first, first + tiles, 1, tile)
                target = f["out"] + image * out_image + channel * out_channel + x * numeric.memory_bytes

                def line(i: Value) -> None:
                    offset = f.load_index(row_table, tile_row * table_pitch(m) + i)
                    with f.when(offset >= 0):
                        f.call(unpack_row, [f["scratch"] + i * pitch, target + offset, count, out_channel])

                f.loop(0, m, 1, line)

            f.loop(0, f["valid"], lanes, block)

        f.loop(start, stop, strips.tiles, strip)

    tile_rows(f, a, f["first"], f["last"], row_of_tiles)


def _phases_to_nchw(f: Function, a: Arguments, numeric: Numeric, algorithm: Algorithm, form: Form) -> None:
    """::

    for row of tiles, strip of STRIP_TILES of them, vector of channels, every second row:
        for phase of columns, tile of the strip: transform into scratch [row][column][lane], every second column
        transpose m rows of the strip's columns into the output
    """
    m, lanes, size = algorithm.m, numeric.lanes, numeric.compute_bytes
    width, out_image, out_channel, row_table = a["out_width"], a["out_image"], a["out_channel"], a.table("out_row_table")
    pixel = lanes * size
    pitch = STRIP_TILES * 2 * m * pixel
    unpack_row = _emit_unpack_row(f.module, numeric)

    def row_of_tiles(image: Value, tile_row: Value, row_start: Value, start: Value, stop: Value) -> None:
        def strip(first: Value) -> None:
            tiles = f.minimum(stop - first, STRIP_TILES)
            x = (first - row_start) * (2 * m) + a["out_column"]
            outside = f.maximum(0 - x, 0)  # a column left of the image
            count = f.minimum(tiles * (2 * m), width - x) - outside

            def block(k: Value) -> None:
                channel = channel_start(f, k, f["valid"], lanes)
                bias = numeric.load(f, f["bias"] + channel * numeric.memory_bytes, lanes)
                target = f["out"] + image * out_image + channel * out_channel + (x + outside) * numeric.memory_bytes

                def rows(down: int) -> None:
                    def tile(index: Value) -> None:
                        source = f["m"] + (index - f["first"]) * f["m_pitch"] + channel * size
                        for number, (part, right) in enumerate(form.phases):
                            if part == down:
                                origin = f["scratch"] + ((index - first) * (2 * m) + (1 - right)) * pixel
                                write = partial(_write_in_strip, f, origin, pitch, 2 * pixel)
                                _transform(f, numeric, algorithm, source + a["m_phase"] * number, bias, write, form, number)

                    f.loop(first, first + tiles, 1, tile)

                    def line(i: Value) -> None:
                        offset = f.load_index(row_table, (tile_row + a["tiles_p"] * down) * table_pitch(m) + i)
                        with f.when(offset >= 0):
                            f.call(unpack_row, [f["scratch"] + i * pitch + outside * pixel, target + offset, count, out_channel])

                    f.loop(0, m, 1, line)

                for down in (0, 1):
                    rows(down)

            f.loop(0, f["valid"], lanes, block)

        f.loop(start, stop, STRIP_TILES, strip)

    tile_rows(f, a, f["first"], f["last"], row_of_tiles)


def _write_in_strip(f: Function, origin: Value, pitch: Scalar, column: Scalar, i: int, j: int, value: Value) -> None:
    """The pixel in row ``i`` and column ``j`` of a tile that begins at ``origin`` in a strip."""
    f.store(value, origin + (i * pitch + j * column))


def _emit_unpack_row(module: Module, numeric: Numeric) -> Function:
    """``unpack_row(source, target, count, channel)``: ``count`` columns of ``lanes`` channels to rows of the output, transposed."""
    f = module.function("unpack_row", [("ptr", "source"), ("ptr", "target"), ("i64", "count"), ("i64", "channel")])
    lanes, size, memory = numeric.lanes, numeric.compute_bytes, numeric.memory_bytes

    def rows(x: Value) -> list[tuple[Value, Value]]:
        loaded = [f.load(f["source"] + (x + i) * (lanes * size), numeric.vector) for i in range(lanes)]
        target, result = f["target"] + x * memory, []
        for vector in f.transpose(loaded):
            result.append((vector, target))
            target = target + f["channel"]
        return result

    whole = f.integer("and", f["count"], -lanes)

    def block(x: Value) -> None:
        for vector, place in rows(x):
            numeric.store(f, vector, place, lanes)

    f.loop(0, whole, lanes, block)
    if numeric.target.masks:
        with f.when(whole < f["count"]):
            mask = f.lane_mask(f["count"] - whole, lanes)
            for vector, place in rows(whole):
                numeric.store(f, vector, place, lanes, mask)
    else:

        def column(x: Value) -> None:
            source = f["source"] + x * (lanes * size)
            target = f["target"] + x * memory
            f.loop(0, lanes, 1, lambda i: numeric.store(f, f.load(source + i * size, numeric.compute), target + i * f["channel"], 1))

        f.loop(whole, f["count"], 1, column)
    f.ret()
    return f
