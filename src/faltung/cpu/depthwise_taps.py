"""The multiply-add loops of depthwise forward and grad_input: one output row of one vector of channels, out of scratch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..codegen.emit import Function, Module, Value
from .depthwise_tile import Lanes
from .target import Target

__all__ = ["block_pixels", "emit_taps"]

PARAMETERS = (
    ("ptr", "source"), ("ptr", "ring"), ("ptr", "weights"), ("ptr", "out"), ("ptr", "bias"), ("i64", "n"), ("i64", "low"), ("i64", "high"),
    ("i64", "ring_step"), ("i64", "pixel"), ("i64", "vectors"), ("i64", "vector_weights"), ("i64", "out_step"), ("i64", "lanes_left"),
    ("i64", "residues"), ("i64", "residue_plane"), ("i64", "residue_weights"),
)  # fmt: skip


def together(target: Target, columns: int) -> int:
    """Column taps whose weights stand in registers at one time."""
    return min(columns, 8 if target.registers >= 32 else 4)


def block_pixels(target: Target, pixels: int, columns: int) -> int:
    """Pixels of a register block: the least work for a row of ``pixels``, where the last block overlaps the one before it.

    A block needs a register for each pixel, one for each weight and one or two for a pixel's input.
    """
    taps = together(target, columns)
    most = target.registers - taps - (2 if target.fma else 3)
    most = max(1, min(most, 20, pixels))

    def cost(block: int) -> tuple[float, int]:
        return -(-pixels // block) * (block * taps * 1.0 + 0.4 * (block + 2 * taps) + 8), -block

    return min(range(1, most + 1), key=cost)


def emit_taps(module: Module, lanes: Lanes, columns: int, step: int, spacing: int, block: int, bias: bool, prefetch: bool) -> Function:
    """Emit ``taps_s{columns}``: ``out[q] = bias + sum over residues, rows low..high, columns of source[row][q * step + s * spacing] * weight``.

    Loop nest: blocks of pixels, vectors of channels, residues, kernel rows, groups of column taps; the block's accumulators stay in registers.
    Shapes: ``source`` vectors ``[row][column][vector]``, row ``r`` at the place that entry ``r`` of ``ring`` (entries ``ring_step`` bytes apart) says;
    ``weights`` vectors ``[vector][residue][row][column]``; ``out`` ``n`` pixels ``out_step`` bytes apart.  ``prefetch``: ask for the row that the next
    output row will need.
    """
    f = module.function(f"taps_s{columns}", PARAMETERS)
    numeric, entry = lanes.numeric, lanes.entry_bytes
    low, high = f["low"], f["high"]
    ring0 = f["ring"] + low * f["ring_step"]
    weights0 = f["weights"] + low * (columns * entry)

    def pixels(q: Value, count: int) -> None:
        def vector(v: Value, x: Value, w: Value, out: Value) -> list[Value]:
            def residue(_: Value, x: Value, w: Value, *sums: Value) -> list[Value]:
                def row(_: Value, ring: Value, w: Value, *sums: Value) -> list[Value]:
                    line = x + f.load(ring)
                    return [ring + f["ring_step"], w + columns * entry, *_row(f, lanes, line, w, sums, columns, step, spacing)]

                after = f.loop(low, high, 1, row, [ring0, w, *sums])[2:]
                return [x + f["residue_plane"], w + f["residue_weights"], *after]

            if prefetch and count > 1:
                ahead = x + f.load(f["ring"] + high * f["ring_step"])
                for _ in range(count * step):
                    f.prefetch(ahead)
                    ahead = ahead + f["pixel"]
            start = f.load(f["bias"] + v * entry, numeric.vector) if bias else f.zero(numeric.vector)
            sums: Sequence[Value] = [start] * count
            if columns and lanes.kind == "strided":
                sums = f.loop(0, f["residues"], 1, residue, [x, w, *sums])[2:]
            elif columns:
                sums = residue(f.value(0), x, w, *sums)[2:]
            _store(f, lanes, sums, out, f["lanes_left"] - v * numeric.lanes)
            return [x + entry, w + f["vector_weights"], out + numeric.lanes * numeric.memory_bytes]

        first = [f["source"] + q * step * lanes.pixel(f), weights0, f["out"] + q * f["out_step"]]
        if lanes.format == "nhwc":
            f.loop(0, f["vectors"], 1, vector, first)
        else:
            vector(f.value(0), *first)

    def blocks() -> None:
        f.loop(0, f["n"], block, lambda q: pixels(f.minimum(q, f["n"] - block), block))

    def singles() -> None:
        f.loop(0, f["n"], 1, lambda q: pixels(q, 1))

    if block > 1:
        f.branch(f["n"] >= block, blocks, singles)
    else:
        singles()
    f.ret()
    return f


def _row(f: Function, lanes: Lanes, x: Value, w: Value, sums: Sequence[Value], columns: int, step: int, spacing: int) -> list[Value]:
    """One kernel row for a block of pixels: groups of column taps in a loop, the remaining taps behind it."""
    entry, pixel = lanes.entry_bytes, lanes.pixel(f)
    size = together(lanes.numeric.target, columns)
    groups, rest = divmod(columns, size)
    current = list(sums)
    if groups > 1:

        def group(_: Value, x: Value, w: Value, *sums: Value) -> list[Value]:
            return [x + size * spacing * pixel, w + size * entry, *_taps(f, lanes, x, w, sums, size, step, spacing)]

        x, w, *current = f.loop(0, groups, 1, group, [x, w, *current])
    else:
        current = _taps(f, lanes, x, w, current, size, step, spacing)
        x, w = x + size * spacing * pixel, w + size * entry
    return _taps(f, lanes, x, w, current, rest, step, spacing) if rest else current


def _taps(f: Function, lanes: Lanes, x: Value, w: Value, sums: Sequence[Value], taps: int, step: int, spacing: int) -> list[Value]:
    """``taps`` column taps with their weights in registers; every input vector is loaded once and used by all taps that fall on it."""
    numeric, entry = lanes.numeric, lanes.entry_bytes
    result = list(sums)
    weights = [f.load(w + s * entry, numeric.vector) for s in range(taps)]
    uses: dict[int, list[tuple[int, int]]] = {}
    for q in range(len(result)):
        for s in range(taps):
            uses.setdefault(q * step + s * spacing, []).append((q, s))
    before = 0
    for position in sorted(uses):
        x = x + (position - before) * lanes.pixel(f)
        before = position
        value = f.load(x, numeric.vector)
        for q, s in uses[position]:
            result[q] = f.fma(value, weights[s], result[q], numeric.target.fma)
    return result


def _store(f: Function, lanes: Lanes, sums: Sequence[Value], target: Value, lanes_left: Value) -> None:
    """To nhwc memory in its type, under a mask for the last vector; to the scratch row of nchw as they are."""
    numeric = lanes.numeric

    def each(write: Callable[[Value, Value], None]) -> None:
        at = target
        for i, value in enumerate(sums):
            write(value, at)
            if i + 1 < len(sums):
                at = at + f["out_step"]

    if lanes.format == "nchw":
        each(f.store)
    elif not lanes.tail:
        each(lambda value, at: numeric.store(f, value, at, numeric.lanes))
    else:

        def partial() -> None:
            mask = f.lane_mask(lanes_left, numeric.lanes)
            each(lambda value, at: numeric.store(f, value, at, numeric.lanes, mask))

        f.branch(lanes_left >= numeric.lanes, lambda: each(lambda value, at: numeric.store(f, value, at, numeric.lanes)), partial)
