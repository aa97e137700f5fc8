"""The multiply-add loops of depthwise forward and grad_input: one output row of one vector of channels, out of scratch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..codegen.emit import Function, Module, Value
from ..codegen.numeric import Numeric
from .depthwise_tile import Lanes
from .target import Target

__all__ = ["Reach", "block_pixels", "emit_taps"]

_LONG_COLUMNS = 16
_PIECE_ROWS = 8

PARAMETERS = (
    ("ptr", "source"), ("ptr", "ring"), ("ptr", "weights"), ("ptr", "out"), ("ptr", "bias"), ("i64", "n"), ("i64", "low"), ("i64", "high"),
    ("i64", "ring_step"), ("i64", "pixel"), ("i64", "vectors"), ("i64", "vector_weights"), ("i64", "out_step"), ("i64", "lanes_left"),
    ("i64", "residues"), ("i64", "residue_plane"), ("i64", "residue_weights"),
)  # fmt: skip


def together(target: Target, columns: int) -> int:
    """Column taps whose weights stand in registers at one time."""
    return min(columns, 8 if target.registers >= 32 else 4)


@dataclass(frozen=True, order=True)
class Reach:
    """The column taps of an output row's pixels: how many, and how many entries ``left`` and ``right`` of the row they reach that are zeros.

    ``whole``: entries are the caller's memory, where those zeros do not exist: multiplications with them are left out.  ``single``: the row is one block.
    """

    columns: int
    left: int = 0
    right: int = 0
    whole: bool = False
    single: bool = False

    @property
    def name(self) -> str:
        return f"{self.columns}l{self.left}r{self.right}{'s' if self.single else ''}" if self.whole else str(self.columns)

    def pixels(self, step: int) -> tuple[int, int]:
        """Pixels at the left and at the right end that reach zeros."""
        return -(-self.left // step), -(-self.right // step)

    def fits(self, target: Target, count: int, block: int, step: int) -> bool:
        """Whether ``count`` pixels can be blocks of which one alone reaches the left zeros, and one the right ones."""
        left, right = self.pixels(step)
        if self.columns >= 2 * together(target, self.columns):
            return False
        if block >= count or block < left + right:
            return block == count
        return count - block >= max(left, right) and (count <= 2 * block or count - block >= left + right)


def block_pixels(target: Target, pixels: int, columns: int, fits: Callable[[int], bool] = lambda _: True, abreast: int = 1) -> int:
    """Pixels of a register block: the least work for a row of ``pixels``, where the last block overlaps the one before it; 0 where none fits.

    A block needs a register for each pixel, one for each weight and one or two for a pixel's input; pixels' and weights' are ``abreast`` vectors.
    """
    taps = together(target, columns)
    most = (target.registers - taps * abreast - (2 if target.fma else 3)) // abreast
    most = max(1, min(most, 20, pixels))

    def cost(block: int) -> tuple[float, int]:
        return -(-pixels // block) * (block * taps * 1.0 + 0.4 * (block + 2 * taps) + 8), -block

    return min((block for block in range(1, most + 1) if fits(block)), key=cost, default=0)


def emit_taps(module: Module, lanes: Lanes, reach: Reach, step: int, spacing: int, block: int, bias: bool, prefetch: bool, abreast: int = 1) -> Function:
    """Emit ``taps_s{reach}``: ``out[q] = bias + sum over residues, rows low..high, columns of source[row][q * step + s * spacing] * weight``.

    Loop nest: blocks of pixels, vectors of channels, residues, kernel rows, groups of column taps; the block's accumulators stay in registers.
    Shapes: ``source`` vectors ``[row][column][vector]``, row ``r`` at the place that entry ``r`` of ``ring`` (entries ``ring_step`` bytes apart) says;
    ``weights`` vectors ``[vector][residue][row][column]``; ``out`` ``n`` pixels ``out_step`` bytes apart.  ``prefetch``: ask for the rows that the next
    output row will need.  Where ``reach`` is whole, ``source`` is memory in its own type.
    """
    f = module.function(f"taps_s{reach.name}", PARAMETERS)
    numeric, entry, columns = lanes.numeric, lanes.entry_bytes, reach.columns
    vector_bytes = numeric.lanes * numeric.memory_bytes if reach.whole else entry
    low, high = f["low"], f["high"]
    ring0 = f["ring"] + low * f["ring_step"]
    weights0 = f["weights"] + low * (columns * entry)

    def pixels(q: Value, count: int, left: int = 0, right: int = 0) -> None:
        last = (count - 1) * step + (columns - 1) * spacing - right

        def vector(v: Value, x: Value, w: Value, out: Value, mask: Value | None = None, wide: int = 1) -> list[Value]:
            cells = _Cells(f, lanes, step, spacing, left, last, reach.whole, mask, wide)

            def residue(_: Value, x: Value, w: Value, *sums: Value) -> list[Value]:
                def row(_: Value, ring: Value, w: Value, *sums: Value) -> list[Value]:
                    line = x + f.load(ring)
                    return [ring + f["ring_step"], w + columns * entry, *cells.row(line, w, sums, columns)]

                if numeric.dtype == "f64" and columns >= _LONG_COLUMNS:
                    after = _in_pieces(f, numeric, ring0, w, sums, row)
                else:
                    after = f.loop(low, high, 1, row, [ring0, w, *sums])[2:]
                return [x + f["residue_plane"], w + f["residue_weights"], *after]

            if prefetch and count > 1:
                _ask_ahead(f, x, step, count * step, wide)
            starts = [f.load(f["bias"] + v * entry + i * entry, numeric.vector) if bias else f.zero(numeric.vector) for i in range(wide)]
            sums: Sequence[Value] = starts * count
            if columns and lanes.kind == "strided":
                sums = f.loop(0, f["residues"], 1, residue, [x, w, *sums])[2:]
            elif columns:
                sums = residue(f.value(0), x, w, *sums)[2:]
            _store(f, lanes, sums, out, None if reach.whole else f["lanes_left"] - v * numeric.lanes, mask, wide)
            return [x + wide * vector_bytes, w + wide * f["vector_weights"], out + wide * numeric.lanes * numeric.memory_bytes]

        first = [f["source"] + q * step * lanes.pixel(f), weights0, f["out"] + q * f["out_step"]]
        if lanes.format == "nchw":
            vector(f.value(0), first[0], first[1], first[2])
        else:
            _each_vector(f, lanes, reach.whole and lanes.tail, abreast, vector, first)

    def blocks() -> None:
        f.loop(0, f["n"], block, lambda q: pixels(f.minimum(q, f["n"] - block), block))

    def singles() -> None:
        f.loop(0, f["n"], 1, lambda q: pixels(q, 1))

    def whole_row() -> None:
        if reach.single:
            pixels(f.value(0), block, reach.left, reach.right)
            return
        if reach.left:
            pixels(f.value(0), block, reach.left, 0)
        stop = f["n"] - block if reach.right else f["n"]
        limit = f["n"] - (block + reach.pixels(step)[1])
        f.loop(block if reach.left else 0, stop, block, lambda q: pixels(f.minimum(q, limit), block))
        if reach.right:
            pixels(stop, block, 0, reach.right)

    if reach.whole:
        whole_row()
    elif block > 1:
        f.branch(f["n"] >= block, blocks, singles)
    else:
        singles()
    f.ret()
    return f


def _in_pieces(f: Function, numeric: Numeric, ring: Value, w: Value, sums: Sequence[Value], row: Callable[..., list[Value]]) -> list[Value]:
    """The sums of a few rows at a time, added to those of the rows before: one chain of 961 additions has more than twice the error of PyTorch's sums."""
    places = [f.stack(numeric.target.vector_bytes) for _ in sums]
    for place, value in zip(places, sums):
        f.store(value, place)

    def piece(first: Value, ring: Value, w: Value) -> list[Value]:
        zeros = [f.zero(numeric.vector)] * len(sums)
        ring, w, *part = f.loop(first, f.minimum(first + _PIECE_ROWS, f["high"]), 1, row, [ring, w, *zeros])
        for place, value in zip(places, part):
            f.store(f.fadd(f.load(place, numeric.vector), value), place)
        return [ring, w]

    f.loop(f["low"], f["high"], _PIECE_ROWS, piece, [ring, w])
    return [f.load(place, numeric.vector) for place in places]


def _each_vector(f: Function, lanes: Lanes, tail: bool, abreast: int, body: Callable[..., list[Value]], first: list[Value]) -> None:
    """``body`` for the task's vectors, ``abreast`` at a time as long as there are so many; ``tail``: the last one under a mask where it is partial."""
    full, rest = f["vectors"], first
    if tail:
        full = f.minimum(full, f["lanes_left"] // lanes.numeric.lanes)
    done: Value = f.value(0)
    if abreast > 1:
        done = full // abreast * abreast
        rest = f.loop(0, done, abreast, lambda v, x, w, out: body(v, x, w, out, wide=abreast), rest)
    rest = f.loop(done, full, 1, body, rest)
    if tail:
        with f.when(full < f["vectors"]):
            x, w, out = rest
            body(full, x, w, out, f.lane_mask(f["lanes_left"] - full * lanes.numeric.lanes, lanes.numeric.lanes))


def _ask_ahead(f: Function, x: Value, rows: int, entries: int, wide: int) -> None:
    """Prefetch ``entries``, ``wide`` vectors of each, of each row that the next output row reads and this one does not."""
    new = f["ring"] + (f.maximum(f["high"], 1) - 1) * f["ring_step"] + 8
    for row in range(rows):
        ahead = x + f.load(new + 8 * row)
        for _ in range(entries):
            for i in range(wide):
                f.prefetch(ahead + i * 64)
            ahead = ahead + f["pixel"]


@dataclass(frozen=True)
class _Cells:
    """A block of pixels over a row of entries, of which those from ``first`` to ``last`` exist; the others are zeros.  ``mask``: lanes that exist.

    ``wide``: neighbouring vectors of channels of each pixel; sums are ``[pixel][vector]``."""

    f: Function
    lanes: Lanes
    step: int
    spacing: int
    first: int
    last: int
    memory: bool
    mask: Value | None
    wide: int = 1

    def row(self, x: Value, w: Value, sums: Sequence[Value], columns: int) -> list[Value]:
        """One kernel row: groups of column taps in a loop, the remaining taps behind it."""
        entry, pixel = self.lanes.entry_bytes, self.lanes.pixel(self.f)
        size = together(self.lanes.numeric.target, columns)
        groups, rest = divmod(columns, size)
        current = list(sums)
        if groups > 1:

            def group(_: Value, x: Value, w: Value, *sums: Value) -> list[Value]:
                return [x + size * self.spacing * pixel, w + size * entry, *self.taps(x, w, sums, size)]

            x, w, *current = self.f.loop(0, groups, 1, group, [x, w, *current])
        else:
            current = self.taps(x, w, current, size)
            x, w = x + size * self.spacing * pixel, w + size * entry
        return self.taps(x, w, current, rest, size * self.spacing) if rest else current

    def taps(self, x: Value, w: Value, sums: Sequence[Value], taps: int, start: int = 0) -> list[Value]:
        """``taps`` column taps with their weights in registers; every input vector is loaded once and used by all taps that fall on it.

        ``x`` is entry ``start`` of the row.
        """
        f, numeric, entry = self.f, self.lanes.numeric, self.lanes.entry_bytes
        result = list(sums)
        wide, vector_bytes = self.wide, numeric.lanes * numeric.memory_bytes if self.memory else entry
        weights = [[f.load(w + (f["vector_weights"] * i if i else 0) + s * entry, numeric.vector) for i in range(wide)] for s in range(taps)]
        uses: dict[int, list[tuple[int, int]]] = {}
        for q in range(len(result) // wide):
            for s in range(taps):
                uses.setdefault(q * self.step + s * self.spacing, []).append((q, s))
        before = 0
        for position in sorted(uses):
            if self.memory and not self.first <= position + start <= self.last:
                continue
            x = x + (position - before) * self.lanes.pixel(f)
            before = position
            for i in range(wide):
                at = x + i * vector_bytes if i else x
                value = numeric.load(f, at, numeric.lanes, self.mask) if self.memory else f.load(at, numeric.vector)
                for q, s in uses[position]:
                    result[q * wide + i] = f.fma(value, weights[s][i], result[q * wide + i], numeric.target.fma)
        return result


def _store(f: Function, lanes: Lanes, sums: Sequence[Value], target: Value, lanes_left: Value | None, mask: Value | None, wide: int) -> None:
    """To nhwc memory in its type, under a mask for the last vector (where ``lanes_left`` is given, under one of its own); to the scratch row of nchw as
    they are."""
    numeric = lanes.numeric

    def each(write: Callable[[Value, Value], None]) -> None:
        at = target
        for i in range(0, len(sums), wide):
            for j in range(wide):
                write(sums[i + j], at + j * (numeric.lanes * numeric.memory_bytes) if j else at)
            if i + wide < len(sums):
                at = at + f["out_step"]

    def to_memory(mask: Value | None) -> None:
        each(lambda value, at: numeric.store(f, value, at, numeric.lanes, mask))

    if lanes.format == "nchw":
        each(f.store)
    elif not lanes.tail or lanes_left is None:
        to_memory(mask)
    else:
        f.branch(lanes_left >= numeric.lanes, lambda: to_memory(None), lambda: to_memory(f.lane_mask(lanes_left, numeric.lanes)))
