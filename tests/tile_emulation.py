"""Matrix tiles in memory: replacements for the instructions of :mod:`faltung.cpu.matrix_tiles` and of AVX512_BF16, for processors without them.

The tiles are one piece of the kernel's module, so kernels made with them run on one thread.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from faltung.codegen.emit import Function, Value, vector_type
from faltung.codegen.numeric import Numeric
from faltung.cpu import bfloat, matrix_tiles, target
from faltung.cpu.matrix_tiles import ROWS, TILE_BYTES
from faltung.cpu.target import Target

__all__ = ["add_products", "emulate_tiles", "nearest"]

_MEMORY, _SHAPES = "tile_registers", 64  # the palette's 64 bytes, then the tiles
_ROW = vector_type("i32", 16)


def add_products(f: Function, left: Value, right: Value, total: Value) -> Value:
    """``total`` plus both products of every pair of lanes, by two multiply-adds."""
    lanes = int(total.type[1:].split()[0])
    integers = vector_type("i32", lanes)

    def halves(pairs: Value) -> list[Value]:
        bits = f.cast("bitcast", pairs, integers)
        low, high = f.define(integers, f"shl {bits}, splat (i32 16)"), f.define(integers, f"and {bits}, splat (i32 -65536)")
        return [f.cast("bitcast", half, total.type) for half in (low, high)]

    for a, b in zip(halves(left), halves(right)):
        total = f.fma(a, b, total)
    return total


def nearest(f: Function, value: Value, lanes: int) -> Value:
    """The bits of the nearest bfloat16, by integers."""
    return Numeric("bf16", target.TARGETS["avx2"]).narrow(f, value, lanes)


def _memory(f: Function, at: int) -> Value:
    f.module.memory(_MEMORY, _SHAPES + 8 * TILE_BYTES)
    return Value(f, f"@{_MEMORY}", "ptr") + at


def _tile(f: Function, tile: int) -> Value:
    return _memory(f, _SHAPES + TILE_BYTES * tile)


def _shape(f: Function, tile: int) -> tuple[Value, Value]:
    """Rows of a tile, and its 32-bit columns."""
    rows, columns = f.load(_memory(f, 48 + tile), "i8"), f.load(_memory(f, 16 + 2 * tile), "i16")
    return f.cast("zext", rows, "i64"), f.cast("zext", columns, "i64") // 4


def _configure(f: Function, shapes: Value) -> None:
    eight = vector_type("i64", 8)
    f.store(f.load(shapes, eight), _memory(f, 0))
    f.loop(0, 8 * TILE_BYTES, 64, lambda at: f.store(f.zero(eight), _tile(f, 0) + at))


def _release(f: Function) -> None:
    f.store(f.zero(vector_type("i64", 8)), _memory(f, 0))


def _zero(f: Function, tile: int) -> None:
    f.loop(0, TILE_BYTES, 64, lambda at: f.store(f.zero(_ROW), _tile(f, tile) + at))


def _load(f: Function, tile: int, pointer: Value, pitch: Value) -> None:
    rows, columns = _shape(f, tile)
    mask = f.lane_mask(columns, 16)
    f.loop(0, rows, 1, lambda i: f.store(f.load_masked(pointer + i * pitch, mask, _ROW), _tile(f, tile) + i * 64))


def _store(f: Function, tile: int, pointer: Value, pitch: Value) -> None:
    rows, columns = _shape(f, tile)
    mask = f.lane_mask(columns, 16)
    f.loop(0, rows, 1, lambda i: f.store_masked(f.load(_tile(f, tile) + i * 64, _ROW), pointer + i * pitch, mask))


def _dot(f: Function, total: int, left: int, right: int) -> None:
    pairs, _ = _shape(f, right)
    single = vector_type("float", 16)

    def row(i: Value) -> None:
        place = _tile(f, total) + i * 64

        def pair(j: Value, sums: Value) -> list[Value]:
            one = f.splat(f.load(_tile(f, left) + (i * 64 + j * 4), "float"), 16)
            return [add_products(f, one, f.load(_tile(f, right) + j * 64, single), sums)]

        (sums,) = f.loop(0, pairs, 1, pair, [f.load(place, single)])
        f.store(sums, place)

    f.loop(0, ROWS, 1, row)


def emulate_tiles(monkeypatch: pytest.MonkeyPatch) -> Target:
    """Replace the instructions until the test ends; the target that kernels are made for meanwhile: vectors of 64 bytes, lowered for this processor."""
    for name, replacement in {"configure": _configure, "release": _release, "zero": _zero, "load": _load, "store": _store, "dot": _dot}.items():
        monkeypatch.setattr(matrix_tiles, name, replacement)
    monkeypatch.setattr(bfloat, "nearest", nearest)
    host = target.host_target()
    features = host.features + ",+sse2"  # a name of its own
    return replace(host, isa="amx", features=features.removeprefix(","), vector_bytes=64, registers=32, masks=True, bfloat16_dot=False, matrix_tiles=True)
