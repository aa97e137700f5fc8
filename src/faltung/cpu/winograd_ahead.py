"""Asking for cache lines ahead of their use: pixels of the tiles to be read or written next, a few tiles at every point of the products.

The products leave the outer caches idle and the transforms wait for them: on 8x64x56x56 the misses of the two transforms took a fifth of the time.
"""

from __future__ import annotations

from functools import partial

from ..codegen.emit import Function, Module, Value
from ..codegen.entry import ArgumentBlock
from .pack import Arguments
from .winograd_form import Form, table_pitch
from .winograd_transform import Algorithm

__all__ = ["emit_touch"]

_LINE = 64


def emit_touch(module: Module, arguments: ArgumentBlock, algorithm: Algorithm, form: Form, source: bool) -> Function:
    """``touch_<source or out>(block, base, first, last, width)``: ``width`` bytes of each of the m x m pixels of tiles ``first .. last - 1`` (nhwc)."""
    f = module.function(f"touch_{'source' if source else 'out'}", [("ptr", "block"), ("ptr", "base"), ("i64", "first"), ("i64", "last"), ("i64", "width")])
    a = Arguments(f, arguments, f["block"])
    m, tiles_p, tiles_q = algorithm.m, a["tiles_p"], a["tiles_q"]
    side = "source" if source else "out"
    rows, columns = (a.table(f"{'' if source else 'out_'}{axis}_table") for axis in ("row", "column"))
    wide = table_pitch(algorithm.n if source else m)
    first = (algorithm.n - m) // 2 if source else 0  # the middle of what a tile reads: its neighbours read the rest

    def ask(pixel: Value, offset: Value) -> None:
        f.prefetch(pixel + offset, 2)

    def tile(index: Value) -> None:
        row, q = index // tiles_q, index % tiles_q
        image = f["base"] + (row // tiles_p) * a[f"{side}_image"]

        def line(row_places: Value, places: list[Value], i: Value) -> None:
            start = image + f.load_index(row_places, i)
            for place in places:  # those outside lie a byte before the image
                f.loop(0, f["width"], _LINE, partial(ask, start + place))

        for down, right in form.components if source else form.phases:
            places = [f.load_index(columns, (q + tiles_q * right) * wide + first + j) for j in range(m)]
            row_places = rows + ((row % tiles_p + tiles_p * down) * wide + first) * 8
            f.loop(0, m, 1, partial(line, row_places, places))

    f.loop(f["first"], f["last"], 1, tile)
    f.ret()
    return f
