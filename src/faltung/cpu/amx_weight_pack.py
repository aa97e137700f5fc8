"""Packing for the weight's gradient on matrix tiles: pixels become rows of pairs (x) or columns of pairs (the gradient of y).

A tile's pixels stand in *linear* order, and both operands are gathered by tables of pixel addresses (:func:`emit_pointers`), so the padding mode, the
stride and the dilation end there.  Pixels are read as rows of *units* of 32 channels of 16 bits.  nhwc memory in bfloat16 holds them already; else they
are written to scratch first (:func:`emit_rows`): transposed from nchw, split into bfloat16 parts (:mod:`faltung.cpu.parts`), or both.

* Right operand, x: ``[tile of 16 channels][pair of pixels][16][2]`` (:func:`emit_right`).  The two tiles of a unit take its channels by fours in turn,
  as the instructions that interleave leave them: :data:`UNIT_ORDER`.  A last unit of 16 channels or fewer is one tile in the natural order.
* Left operand, the gradient of y: ``[tile of 16 channels][32 pixels][16][32]`` (:func:`emit_left`, :func:`emit_left_rows`), a kibibyte a matrix tile.

Every channel up to the end of a tile of x is written (with anything finite), of the gradient of y only those that there are: what stands in the others
ends up in sums that nobody reads.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..codegen.emit import Function, Module, Value, vector_type
from ..codegen.numeric import Numeric
from . import parts as parts_of
from .matrix_tiles import TILE_BYTES

__all__ = ["UNIT", "UNIT_ORDER", "emit_left", "emit_left_rows", "emit_pointers", "emit_right", "emit_rows"]

UNIT = 32
"""Channels of two tiles."""
_LANE = 8  # 16-bit elements of 128 bits
_HALVES = vector_type("i16", UNIT)
_LOW = tuple(lane * _LANE + i // 2 + (i % 2) * UNIT for lane in range(4) for i in range(8))
_HIGH = tuple(index + 4 for index in _LOW)
UNIT_ORDER = tuple(tuple(16 * (c // 4 % 2) + c // 8 * 4 + c % 4 for c in range(first, first + 16)) for first in (0, 16))
"""Where the first and the last 16 channels of a unit stand in its two tiles, one after the other."""


def emit_pointers(module: Module) -> Function:
    """``pixel_pointers(base, rows, count, columns, pitch, zeros, out, total)``: addresses of ``total`` pixels.

    Row ``i`` (of ``count``) starts at entry ``i * pitch`` of ``out``; its pixel ``j < pitch`` is at ``base + rows[i] + columns[j]``, at ``zeros`` where one
    of these is negative.  Behind the last row all pixels are zeros.  Up to 8 entries behind ``total`` may be written.
    """
    names = ("count", "pitch", "total")
    f = module.function("pixel_pointers", [("i64", "base"), ("i64", "zeros"), *(("ptr", n) for n in ("rows", "columns", "out")), *(("i64", n) for n in names)])
    vector = vector_type("i64", 8)
    zeros = f.splat(f["zeros"], 8)

    def row(i: Value) -> None:
        offset = f.load_index(f["rows"], i)
        line, out = f.splat(f["base"] + offset, 8), f["out"] + i * f["pitch"] * 8

        def columns(j: Value) -> None:
            column = f.load(f["columns"] + j * 8, vector)
            f.store(f.select(f.compare("sge", column, f.zero(vector)), f.integer("add", column, line), zeros), out + j * 8)

        def nothing(j: Value) -> None:
            f.store(zeros, out + j * 8)

        f.branch(offset >= 0, lambda: f.loop(0, f["pitch"], 8, columns), lambda: f.loop(0, f["pitch"], 8, nothing))

    f.loop(0, f["count"], 1, row)
    f.loop(f["count"] * f["pitch"], f["total"], 8, lambda i: f.store(zeros, f["out"] + i * 8))
    f.ret()
    return f


def _pointer(f: Function, table: Value, index: Value, after: int = 0) -> Value:
    return f.load(table + (index + after) * 8, "ptr")


def emit_right(module: Module, parts: int) -> Function:
    """``pack_right(pointers, pairs, target, channels, tile_pitch, part_pitch, source_part)``: pixels of ``channels`` channels as rows of pairs.

    A row of 64 bytes for every pair of the ``2 * pairs`` pixels, in each tile of channels (``tile_pitch`` bytes apart) and part (``part_pitch``; in a
    pixel ``source_part``).
    """
    names = ("pairs", "channels", "tile_pitch", "part_pitch", "source_part")
    f = module.function("pack_right", [("ptr", "pointers"), ("ptr", "target"), *(("i64", n) for n in names)])
    whole = f["channels"] // UNIT
    rest = f["channels"] % UNIT
    mask = f.lane_mask(rest, UNIT)
    last = whole * (2 * UNIT)
    wide, some = rest > 16, rest > 0
    tile_pitch = f["tile_pitch"]

    def pair(i: Value) -> None:
        first, second = _pointer(f, f["pointers"], i * 2), _pointer(f, f["pointers"], i * 2, 1)
        for part in range(parts):
            a, b = (p + f["source_part"] * part for p in (first, second)) if part else (first, second)
            row = f["target"] + i * 64 + (f["part_pitch"] * part if part else 0)

            def unit(u: Value, a: Value = a, b: Value = b, row: Value = row) -> None:
                one, other = (f.load(p + u * (2 * UNIT), _HALVES) for p in (a, b))
                place = row + u * (tile_pitch * 2)
                f.store(f.shuffle(one, other, _LOW), place, 4)
                f.store(f.shuffle(one, other, _HIGH), place + tile_pitch, 4)

            def end(a: Value = a, b: Value = b, row: Value = row) -> None:
                one, other = (f.load_masked(p + last, mask, _HALVES) for p in (a, b))
                place = row + whole * (tile_pitch * 2)

                def both() -> None:
                    f.store(f.shuffle(one, other, _LOW), place, 4)
                    f.store(f.shuffle(one, other, _HIGH), place + tile_pitch, 4)

                f.branch(wide, both, lambda: f.store(f.shuffle(one, other, [c // 2 + c % 2 * UNIT for c in range(UNIT)]), place, 4))

            f.loop(0, whole, 1, unit)
            with f.when(some):
                end()

    f.loop(0, f["pairs"], 1, pair)
    f.ret()
    return f


def _across(f: Function, rows: Sequence[Value]) -> list[Value]:
    """32 vectors of 8 16-bit elements to 8 vectors of 32: rows and columns exchanged."""
    quarters = []
    for i in range(8):
        low, high = (f.shuffle(rows[i + at], rows[i + at + 8], range(16)) for at in (0, 16))
        quarters.append(f.shuffle(low, high, range(UNIT)))

    def unpack(a: Value, b: Value, size: int) -> list[Value]:
        """Elements of ``size`` 16-bit ones of both, in turn: the low, then the high halves of every 128 bits."""
        picks: list[list[int]] = [[], []]
        for half in (0, 1):
            for lane in range(4):
                for i in range(4 // size):
                    start = lane * _LANE + half * 4 + i * size
                    picks[half] += [start + e for e in range(size)] + [start + e + UNIT for e in range(size)]
        return [f.shuffle(a, b, pick) for pick in picks]

    u = [v for i in (0, 2, 4, 6) for v in unpack(quarters[i], quarters[i + 1], 1)]
    v = [x for i in (0, 1, 4, 5) for x in unpack(u[i], u[i + 2], 2)]
    return [x for i in range(4) for x in unpack(v[i], v[i + 4], 4)]


def emit_left(module: Module, parts: int) -> Function:
    """``pack_left(pointers, chunks, target, channels, tile_pitch, part_pitch, source_part)``: pixels of ``channels`` channels, transposed.

    ``chunks`` matrix tiles of 32 pixels for every 16 channels; pitches as in :func:`emit_right`.
    """
    names = ("chunks", "channels", "tile_pitch", "part_pitch", "source_part")
    f = module.function("pack_left", [("ptr", "pointers"), ("ptr", "target"), *(("i64", n) for n in names)])
    whole = f["channels"] // 16
    eight = vector_type("i16", 8)

    def chunk(i: Value) -> None:
        pointers = f["pointers"] + i * (8 * UNIT)
        for part in range(parts):
            target = f["target"] + i * TILE_BYTES + (f["part_pitch"] * part if part else 0)

            def tile(t: Value, masks: Sequence[Value | None] = (None, None), part: int = part, target: Value = target) -> None:
                offset = t * 32 + (f["source_part"] * part if part else 0)
                loaded: list[list[Value]] = [[], []]
                for pixel in range(UNIT):
                    place = f.load(pointers + 8 * pixel, "ptr") + offset
                    for group, mask in enumerate(masks):
                        at = place + 16 * group
                        loaded[group].append(f.load(at, eight) if mask is None else f.load_masked(at, mask, eight))
                for group, rows in enumerate(loaded):
                    for j, row in enumerate(_across(f, rows)):
                        f.store(row, target + t * f["tile_pitch"] + (8 * group + j) * 64)

            f.loop(0, whole, 1, tile)
            rest = f["channels"] - whole * 16
            with f.when(rest > 0):
                tile(whole, [f.lane_mask(rest, 8), f.lane_mask(rest - 8, 8)])

    f.loop(0, f["chunks"], 1, chunk)
    f.ret()
    return f


def _split(f: Function, numeric: Numeric, pointer: Value, lanes: int, parts: int, mask: Value | None) -> list[Value]:
    """The parts' bits of ``lanes`` elements in memory."""
    if numeric.dtype == "bf16":
        type_ = vector_type("i16", lanes)
        return [f.load(pointer, type_) if mask is None else f.load_masked(pointer, mask, type_)]
    return parts_of.split(f, numeric.load(f, pointer, lanes, mask), lanes, parts)


def emit_left_rows(module: Module, numeric: Numeric, parts: int) -> Function:
    """``pack_left_rows(source, target, channels, channel_pitch, images, image_pitch, image_linear, runs, length, run_pitch, run_linear, chunks, ...)``: as
    :func:`emit_left`, from nchw.

    Every image has ``runs`` runs of ``length`` neighbouring pixels, ``run_pitch`` bytes apart in memory and ``run_linear`` pixels apart in linear order.
    Pixels of the ``chunks`` that no run holds are zeros.
    """
    names = (
        "channels", "channel_pitch", "images", "image_pitch", "image_linear", "runs", "length", "run_pitch", "run_linear", "chunks", "tile_pitch", "part_pitch",
    )  # fmt: skip
    f = module.function("pack_left_rows", [("ptr", "source"), ("ptr", "target"), *(("i64", n) for n in names)])
    lanes = UNIT if parts == 1 else UNIT // 2
    places, mask_type = "<" + ", ".join(f"i64 {n}" for n in range(lanes)) + ">", vector_type("i1", lanes)

    def channel(k: Value) -> None:
        rows = [f["target"] + k // 16 * f["tile_pitch"] + k % 16 * 64 + (f["part_pitch"] * part if part else 0) for part in range(parts)]
        for row in rows:
            f.loop(0, f["chunks"], 1, lambda i, row=row: f.store(f.zero(_HALVES), row + i * TILE_BYTES))

        def run(line: Value, linear: Value) -> None:
            def piece(j: Value) -> None:
                count, start = f.minimum(f["length"] - j, lanes), linear + j
                column = start % UNIT
                room = UNIT - column
                at = start // UNIT * TILE_BYTES + column * 2
                values = _split(f, numeric, line + j * numeric.memory_bytes, lanes, parts, f.lane_mask(count, lanes))
                here = f.lane_mask(f.minimum(count, room), lanes)
                for row, value in zip(rows, values):
                    f.store_masked(value, row + at, here)
                with f.when(count > room):
                    # The rest stands at the beginning of the same row of the next matrix tile.
                    late = f.define(mask_type, f"icmp sge <{lanes} x i64> {places}, {f.splat(room, lanes).text}")
                    beyond = f.define(mask_type, f"and {late}, {f.lane_mask(count, lanes).text}")
                    for row, value in zip(rows, values):
                        f.store_masked(value, row + at + (TILE_BYTES - 64), beyond)

            f.loop(0, f["length"], lanes, piece)

        def image(i: Value) -> None:
            source = f["source"] + k * f["channel_pitch"] + i * f["image_pitch"]
            f.loop(0, f["runs"], 1, lambda j: run(source + j * f["run_pitch"], i * f["image_linear"] + j * f["run_linear"]))

        f.loop(0, f["images"], 1, image)

    f.loop(0, f["channels"], 1, channel)
    f.ret()
    return f


def emit_rows(module: Module, numeric: Numeric, source_format: str, parts: int) -> Function:
    """``pixel_rows(source, target, pixels, channels, pitch, target_pixel, target_part)``: pixels as rows of units of 32 channels, in bfloat16 parts.

    ``pixels`` neighbours; ``pitch`` bytes are between neighbouring channels (nchw) or pixels (nhwc) of the source.  Whole units are written, and of nchw
    blocks of 8 pixels: up to 7 behind the last.
    """
    names = ("pixels", "channels", "pitch", "target_pixel", "target_part")
    f = module.function("pixel_rows", [("ptr", "source"), ("ptr", "target"), *(("i64", n) for n in names)])
    (_rows_nchw if source_format == "nchw" else _rows_nhwc)(f, numeric, parts)
    f.ret()
    return f


def _rows_nchw(f: Function, numeric: Numeric, parts: int) -> None:
    memory, channels = numeric.memory_bytes, f["channels"]

    def unit(c: Value) -> None:
        starts = [f["source"] + f.minimum(c + i, channels - 1) * f["pitch"] for i in range(UNIT)]
        target = f["target"] + c * 2

        def block(j: Value, mask: Value | None = None) -> None:
            loaded = [_split(f, numeric, start + j * memory, _LANE, parts, mask) for start in starts]
            for part in range(parts):
                for i, row in enumerate(_across(f, [values[part] for values in loaded])):
                    f.store(row, target + (j + i) * f["target_pixel"] + (f["target_part"] * part if part else 0))

        whole = f.integer("and", f["pixels"], -_LANE)
        f.loop(0, whole, _LANE, block)
        with f.when(whole < f["pixels"]):
            block(whole, f.lane_mask(f["pixels"] - whole, _LANE))

    f.loop(0, channels, UNIT, unit)


def _rows_nhwc(f: Function, numeric: Numeric, parts: int) -> None:
    memory, lanes = numeric.memory_bytes, UNIT // 2
    whole = f.integer("and", f["channels"], -UNIT)
    rest = f["channels"] - whole
    masks = [f.lane_mask(rest - lanes * half, lanes) for half in (0, 1)]

    def pixel(i: Value) -> None:
        source, target = f["source"] + i * f["pitch"], f["target"] + i * f["target_pixel"]

        def unit(c: Value, masks: Sequence[Value | None] = (None, None)) -> None:
            halves = [_split(f, numeric, source + (c + lanes * half) * memory, lanes, parts, mask) for half, mask in enumerate(masks)]
            for part, (low, high) in enumerate(zip(*halves)):
                f.store(f.shuffle(low, high, range(UNIT)), target + c * 2 + (f["target_part"] * part if part else 0))

        f.loop(0, whole, UNIT, unit)
        with f.when(rest > 0):
            unit(whole, masks)

    f.loop(0, f["pixels"], 1, pixel)
