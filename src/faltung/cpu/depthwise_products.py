"""The multiply-add loops of depthwise grad_weight: sums over the pixels of a tile for a block of taps, out of scratch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..codegen.emit import Function, Module, Value
from .depthwise_geometry import even_parts
from .depthwise_tile import Lanes
from .target import Target

__all__ = ["Edges", "Shape", "emit_bias_sum", "emit_products"]


@dataclass(frozen=True)
class Edges:
    """A row of pixels that is read from memory alone: entries ``left`` and ``right`` of it that are zeros, so that multiplications with them are left out.

    ``rest``: pixels of the last block, which may be shorter than the others; ``single``: there is no other block.
    """

    left: int
    right: int
    rest: int
    single: bool

    @property
    def name(self) -> str:
        return f"l{self.left}r{self.right}e{self.rest}{'s' if self.single else ''}"

    @classmethod
    def of(cls, count: int, width: int, step: int, left: int, right: int) -> Edges | None:
        """For ``count`` pixels in blocks of ``width``; None where the first and the last block do not hold all pixels that reach zeros."""
        rest = (count - 1) % width + 1
        if count <= width:
            return cls(left, right, rest, True)
        return cls(left, right, rest, False) if -(-left // step) <= width and -(-right // step) <= rest else None


@dataclass(frozen=True)
class Shape:
    """Blocks of taps (``row_most`` kernel rows by ``col_most`` columns at most), and pixels whose gradients stand in registers.

    ``rows`` and ``columns``: the sizes of blocks that occur, the larger first; ``step`` and ``spacing``: pixels and column taps in scratch entries.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    row_most: int
    col_most: int
    pixels: int
    step: int
    spacing: int

    @classmethod
    def choose(cls, target: Target, r: int, s: int, pixels: int, step: int, spacing: int, fits: Callable[[int], bool] = lambda _: True) -> Shape | None:
        """Blocks for an ``r x s`` kernel and rows of ``pixels``: accumulators take two thirds of the registers.  None where no block of pixels fits."""
        most = 21 if target.registers >= 32 else 8
        col_most = min(s, 16 if target.registers >= 32 else 7)
        columns = even_parts(s, col_most)
        row_most = min(r, max(1, most // columns[0]))
        rows = even_parts(r, row_most)
        taken = max(rows[0] * columns[0], 8 if target.registers >= 32 else 6)
        free = max(1, min(8, target.registers - taken - (2 if target.fma else 3)))

        def cost(count: int) -> tuple[float, int]:
            return -(-pixels // count) * (count * rows[0] * columns[0] + 0.5 * (count + columns[0]) + 6), -count

        found = [count for count in range(1, free + 1) if fits(count)]
        if not found:
            return None
        best = min(found, key=cost)
        return cls(tuple(dict.fromkeys(rows)), tuple(dict.fromkeys(columns)), row_most, col_most, best, step, spacing)

    def row_blocks(self, r: int) -> list[int]:
        return even_parts(r, self.row_most)

    def col_blocks(self, s: int) -> list[int]:
        return even_parts(s, self.col_most)

    @property
    def name(self) -> str:
        blocks = "_".join(map(str, self.rows)) + "x" + "_".join(map(str, self.columns))
        return f"t{blocks}u{self.pixels}st{self.step}d{self.spacing}"


PARAMETERS = (
    ("ptr", "source"), ("ptr", "ring"), ("ptr", "gradient"), ("ptr", "sums"), ("i64", "rows"), ("i64", "cols"), ("i64", "ring_row"), ("i64", "ring_tap"),
    ("i64", "gradient_pitch"), ("i64", "sums_row"), ("i64", "pixel"), ("i64", "gradient_pixel"), ("i64", "lanes_left"),
)  # fmt: skip


def emit_products(module: Module, lanes: Lanes, shape: Shape, rows: int, columns: int, direct: bool, edges: Edges | None, bias: bool = False) -> Function:
    """Emit ``sums[r][s] += sum over pixels p, q of source[p, r][q * step + s * spacing] * gradient[p][q]``.

    ``bias``: the sum of the gradients as well, behind those of all taps, which are one block then.

    Source row ``p, r`` lies where the entry of ``ring`` at ``p * ring_row + r * ring_tap`` bytes says.  ``direct``: the gradient is in the caller's memory;
    ``edges``: the source is as well, both in the type of memory.

    Loop nest: output rows, blocks of ``shape.pixels`` pixels (``cols`` is a multiple, but for ``edges``); the block of ``rows x columns`` taps stays in
    registers, in several copies where it is too small to hide the latency of an addition.
    """
    f = module.function(f"products_{rows}x{columns}", PARAMETERS)
    numeric, entry, pixel = lanes.numeric, lanes.entry_bytes, lanes.pixel(f)
    taps = rows * columns
    copies = min(shape.pixels, -(-8 // taps)) if numeric.target.registers >= 32 else min(shape.pixels, -(-6 // taps))
    kept = taps + bias
    zero = f.zero(numeric.vector)
    width = shape.pixels
    mask = f.lane_mask(f["lanes_left"], numeric.lanes) if edges and lanes.tail else None

    def read(pointer: Value) -> Value:
        return numeric.load(f, pointer, numeric.lanes, mask) if edges else f.load(pointer, numeric.vector)

    gradient_pixel = f["gradient_pixel"] if direct else pixel

    def block(g: Value, carried: Sequence[Value], count: int = width, left: int = 0, right: int = 0) -> list[Value]:
        source, result = list(carried[:rows]), list(carried[rows:])
        gradients = []
        for u in range(count):
            gradients.append(read(g))
            g = g + gradient_pixel
            if bias:
                at = u % copies * kept + taps
                result[at] = f.fadd(result[at], gradients[u])
        uses: dict[int, list[tuple[int, int]]] = {}
        for u in range(count):
            for s in range(columns):
                uses.setdefault(u * shape.step + s * shape.spacing, []).append((u, s))
        last = (count - 1) * shape.step + (columns - 1) * shape.spacing - right
        for r in range(rows):
            at_pixel, before = source[r], 0
            for position in sorted(uses):
                if not left <= position <= last:
                    continue
                at_pixel = at_pixel + (position - before) * pixel
                before = position
                value = read(at_pixel)
                for u, s in uses[position]:
                    at = u % copies * kept + r * columns + s
                    result[at] = f.fma(value, gradients[u], result[at], numeric.target.fma)
        return [g, *[x + count * shape.step * pixel for x in source], *result]

    def row(_: Value, ring: Value, g: Value, *sums: Value) -> list[Value]:
        carried = [g, *[f["source"] + f.load(ring + f["ring_tap"] * r) for r in range(rows)], *sums]
        if edges is None:
            carried = f.loop(0, f["cols"], width, lambda _, g, *rest: block(g, rest), carried)
        elif edges.single:
            carried = block(carried[0], carried[1:], edges.rest, edges.left, edges.right)
        else:
            carried = block(carried[0], carried[1:], width, edges.left)
            carried = f.loop(width, f["cols"] - edges.rest, width, lambda _, g, *rest: block(g, rest), carried)
            carried = block(carried[0], carried[1:], edges.rest, 0, edges.right)
        return [ring + f["ring_row"], g + f["gradient_pitch"], *carried[1 + rows :]]

    sums = f.loop(0, f["rows"], 1, row, [f["ring"], f["gradient"], *[zero] * (kept * copies)])[2:]
    places = [f["sums"] + f["sums_row"] * r + s * entry for r in range(rows) for s in range(columns)]
    for i, at in enumerate((*places, *([f["sums"] + taps * entry] if bias else []))):
        value = sums[i]
        for copy in range(1, copies):
            value = f.fadd(value, sums[copy * kept + i])
        f.store(f.fadd(f.load(at, numeric.vector), value), at)
    f.ret()
    return f


def emit_bias_sum(module: Module, lanes: Lanes, shape: Shape, direct: bool, edges: Edges | None) -> Function:
    """Emit ``sum += sum over pixels of gradient``, in as many accumulators as a block has pixels."""
    names = ("rows", "cols", "gradient_pitch", "pixel", "lanes_left")
    f = module.function("bias_sum", (("ptr", "gradient"), ("ptr", "sum"), *(("i64", name) for name in names)))
    numeric = lanes.numeric
    pixel = f["pixel"] if direct else lanes.pixel(f)
    mask = f.lane_mask(f["lanes_left"], numeric.lanes) if edges and lanes.tail else None

    def block(g: Value, sums: Sequence[Value], count: int) -> list[Value]:
        result = list(sums)
        for i in range(count):
            result[i] = f.fadd(result[i], numeric.load(f, g, numeric.lanes, mask) if edges else f.load(g, numeric.vector))
            g = g + pixel
        return [g, *result]

    def row(i: Value, *sums: Value) -> list[Value]:
        rest = edges.rest if edges else 0
        carried = [f["gradient"] + i * f["gradient_pitch"], *sums]
        carried = f.loop(0, f["cols"] - rest, shape.pixels, lambda _, g, *sums: block(g, sums, shape.pixels), carried)
        return (block(carried[0], carried[1:], rest) if rest else carried)[1:]

    sums = f.loop(0, f["rows"], 1, row, [f.zero(numeric.vector)] * shape.pixels)
    value = sums[0]
    for other in sums[1:]:
        value = f.fadd(value, other)
    f.store(f.fadd(f.load(f["sum"], numeric.vector), value), f["sum"])
    f.ret()
    return f
