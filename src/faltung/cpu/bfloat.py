"""bfloat16 multiplied as it is: two neighbouring terms of a reduction make one 32-bit element, a *pair*.

Where the processor multiplies pairs (AVX512_BF16's ``vdpbf16ps``), the matrix-like algorithms keep their tiles, panels and tables of 32-bit
elements; an element then is a pair instead of a float32, and a reduction has half as many.  The terms of a pair are

* ``forward`` and ``grad_input``: two neighbouring channels of the gathered operand (the last one of an odd number has zero beside it);
* ``grad_weight``: the same pixel of two tiles (:func:`pair_tiles`), so no pixel at the end of an odd row lacks a partner.  A tile left over is
  paired with zeros on both sides: zero times a number that is not finite would be NaN.

The instruction takes subnormal numbers for zero and rounds after each of the two additions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..codegen.emit import Function, Module, Value, vector_type
from ..codegen.numeric import Numeric
from ..problem import ConvProblem

__all__ = [
    "TILE_FIELDS", "Halves", "Joined", "Rounded", "add_pairs", "dot",
    "emit_pack_pairs", "nearest", "pair_efficiency", "pair_offsets", "pair_tiles", "run_length",
]  # fmt: skip

_BOTH, _FIRST = -1, 0xFFFF
_LINES_AHEAD, _BYTES_AHEAD = 8, 128  # weights are read in pieces too short for the processor to foresee the next one


def dot(f: Function, left: Value, right: Value, total: Value) -> Value:
    """``total`` plus both products of every pair of lanes of ``left`` and ``right``, vectors of 16 pairs."""
    name, pairs = "llvm.x86.avx512bf16.dpbf16ps.512", vector_type("bfloat", 32)
    f.module.declare(name, f"{total.type} @{name}({total.type}, {pairs}, {pairs})")
    return f.define(total.type, f"call {total.type} @{name}({total}, {f.cast('bitcast', left, pairs)}, {f.cast('bitcast', right, pairs)})")


def add_pairs(f: Function, total: Value, pairs: Value) -> Value:
    """``total`` plus both halves of every pair, rounded as float32."""
    lanes = pairs.type.removeprefix("<").split(" ", 1)[0]
    bits = f.cast("bitcast", pairs, f"<{lanes} x i32>")
    halves = f.define(bits.type, f"shl {bits}, splat (i32 16)"), f.define(bits.type, f"and {bits}, splat (i32 -65536)")
    for half in halves:
        total = f.fadd(total, f.cast("bitcast", half, total.type))
    return total


@dataclass(frozen=True, eq=False)
class Halves(Numeric):
    """Copies 16-bit elements as they are: memory that holds pairs already."""

    @classmethod
    def of(cls, numeric: Numeric) -> Halves:
        return cls(numeric.dtype, numeric.target)

    @property
    def compute(self) -> str:
        return "i16"

    @property
    def compute_bytes(self) -> int:
        return 2

    @property
    def lanes(self) -> int:
        return self.target.vector_bytes // 2

    @property
    def converts(self) -> bool:
        return False


@dataclass(frozen=True, eq=False)
class Joined(Numeric):
    """Reads 16-bit elements ``distance`` bytes apart as pairs, ``keep`` being a mask of the halves that are wanted (i32)."""

    distance: Value
    keep: Value

    @classmethod
    def of(cls, f: Function, numeric: Numeric, distance: Value, second: Value) -> Joined:
        """Pairs with zero in the place of the second where ``second`` does not hold; it is not read then."""
        kept = f.select(second, f.value(_BOTH, "i32"), f.value(_FIRST, "i32"))
        return cls(numeric.dtype, numeric.target, f.select(second, distance, f.value(0)), kept)

    def load(self, f: Function, pointer: Value, lanes: int, mask: Value | None = None) -> Value:
        type_ = vector_type(self.memory, lanes)
        low, high = (f.load(p, type_) if mask is None else f.load_masked(p, mask, type_) for p in (pointer, pointer + self.distance))
        if lanes == 1:
            shifted = f.integer("shl", f.cast("zext", high, "i32"), 16)
            return f.cast("bitcast", f.integer("and", f.integer("or", f.cast("zext", low, "i32"), shifted), self.keep), "float")
        mixed = f.shuffle(low, high, [lane // 2 + (lane % 2) * lanes for lane in range(2 * lanes)])
        pairs = f.integer("and", f.cast("bitcast", mixed, vector_type("i32", lanes)), f.splat(self.keep, lanes))
        return f.cast("bitcast", pairs, vector_type("float", lanes))


def nearest(f: Function, value: Value, lanes: int) -> Value:
    """The bits of ``lanes`` float32 rounded to bfloat16 by the processor's instruction (ties to even), which takes subnormal numbers for zero."""
    return f.cast("bitcast", f.cast("fptrunc", value, vector_type("bfloat", lanes)), vector_type("i16", lanes))


@dataclass(frozen=True, eq=False)
class Rounded(Numeric):
    """Rounds to bfloat16 by :func:`nearest`."""

    def narrow(self, f: Function, value: Value, lanes: int) -> Value:
        return nearest(f, value, lanes)


def _pack_runs(
    f: Function,
    numeric: Numeric,
    limit: Value,
    entry: Callable[[Value], tuple[Value, Joined]],
    place: Callable[[Value, Value], Value],
    adjacent: bool,
) -> None:
    """Runs of ``t`` in blocks of vectors, transposed in registers; ``adjacent``: the halves of a pair are neighbours in memory."""
    memory, lanes = numeric.memory_bytes, numeric.lanes
    # The next pair of channels is behind both halves of this one.
    ahead = f.value(_BYTES_AHEAD) if adjacent else f.maximum(f["distance"] * 2, _BYTES_AHEAD)

    def run(first: Value) -> None:
        start, reader = entry(first)

        def row_block(t: Value) -> None:
            rest = f["run"] - t
            mask = f.lane_mask(rest, lanes)

            def block(j: Value) -> None:
                rows = []
                for i in range(lanes):
                    pointer = start + f.minimum(j + i, limit - 1) * f["pitch"] + t * (2 * memory if adjacent else memory)
                    f.prefetch(pointer + ahead)
                    if not adjacent:
                        f.prefetch(pointer + ahead + f["distance"])
                    rows.append(f.load_masked(pointer, mask, numeric.vector) if adjacent else reader.load(f, pointer, lanes, mask))
                written = f.lane_mask(limit - j, lanes)
                for i, vector in enumerate(f.transpose(rows)):
                    with f.when(rest > i):
                        f.store_masked(vector, place(first + t + i, j), written)

            f.loop(0, limit, lanes, block)

        f.loop(0, f["run"], lanes, row_block)

    f.loop(0, f["count"], f["run"], run)


def emit_pack_pairs(module: Module, numeric: Numeric) -> Function:
    """``pack_pairs(weight, panel, offsets, count, limit, width, pitch, distance, run)``: panel ``[t][width]`` of pairs of weights.

    The first half of entry ``(t, j)`` is at ``weight + offsets[t] + j * pitch`` (bytes), the second ``distance`` behind it, zero where the offset is
    odd (then it is one too large).  Entries for ``j >= limit`` are of no use to anyone.  ``run``: neighbouring ``t`` that are neighbours in memory, in
    whole runs from the first ``t`` on.
    """
    names = ("count", "limit", "width", "pitch", "distance", "run")
    f = module.function("pack_pairs", [("ptr", "weight"), ("ptr", "panel"), ("ptr", "offsets"), *(("i64", name) for name in names)])
    size, memory, lanes = numeric.compute_bytes, numeric.memory_bytes, numeric.lanes
    limit = f.minimum(f["limit"], f["width"])

    def entry(t: Value) -> tuple[Value, Joined]:
        """Where the pairs of ``t`` start, and what reads them."""
        offset = f.load_index(f["offsets"], t)
        odd = f.integer("and", offset, 1)
        return f["weight"] + (offset - odd), Joined.of(f, numeric, f["distance"], odd.equals(0))

    def place(t: Value, j: Value) -> Value:
        return f["panel"] + (t * f["width"] + j) * size

    def neighbours() -> None:
        """Entries of one ``t`` are neighbours in memory."""

        def line(t: Value) -> None:
            start, reader = entry(t)
            ahead = f["weight"] + f.load_index(f["offsets"], f.minimum(t + _LINES_AHEAD, f["count"] - 1))
            for place_ahead in (ahead, ahead + f["distance"]):
                f.prefetch(place_ahead)
                f.prefetch(place_ahead + limit * memory)

            def block(j: Value) -> None:
                mask = f.lane_mask(limit - j, lanes)
                f.store_masked(reader.load(f, start + j * memory, lanes, mask), place(t, j), mask)

            f.loop(0, limit, lanes, block)

        f.loop(0, f["count"], 1, line)

    def single() -> None:
        def line(t: Value) -> None:
            start, reader = entry(t)
            target = place(t, f.value(0))

            def element(j: Value, pointer: Value) -> list[Value]:
                f.store(reader.load(f, pointer, 1), target + j * size)
                return [pointer + f["pitch"]]

            f.loop(0, limit, 1, element, [start])

        f.loop(0, f["count"], 1, line)

    def by_runs() -> None:
        f.branch(
            f["distance"].equals(memory), lambda: _pack_runs(f, numeric, limit, entry, place, True), lambda: _pack_runs(f, numeric, limit, entry, place, False)
        )

    # Shorter runs than this cost more to transpose, in blocks mostly empty, than to move one by one.
    f.branch(f["pitch"].equals(memory), neighbours, lambda: f.branch(f["run"] > 4, by_runs, single))
    f.ret()
    return f


def pair_offsets(channels: int, pitch: int) -> npt.NDArray[np.int64]:
    """Byte offsets of the first weights of pairs of channels, one too large where the last channel has no partner."""
    offsets = np.arange(0, channels, 2, dtype=np.int64) * pitch
    if channels % 2:
        offsets[-1] += 1
    return offsets


def run_length(offsets: npt.NDArray[np.int64], distance: int) -> int:
    """The length of the runs of neighbours in memory among pairs at ``offsets``; 1 where runs are of several lengths."""
    step = 4 if distance == 2 else 2
    ends = np.flatnonzero(np.diff(offsets, append=-1) != step)
    lengths = set(np.diff(ends, prepend=-1).tolist())
    return lengths.pop() if len(lengths) == 1 else 1


TILE_FIELDS = ("image", "p", "q", "images", "rows", "columns", "second_p", "x_distance", "gy_distance")
"""Two tiles of pixels that make pairs: the first one's place and the size of both; the second one's first row of outputs (-1: there is none), and how
many bytes its image of x, and its first pixel of the gradient of y, are behind the first one's."""


def _groups(problem: ConvProblem, tile: tuple[int, int, int]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """First (image, row) of the tiles of a column, by their size in images and rows."""
    images, rows, _ = tile
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for image in range(0, problem.n, images):
        for p in range(0, problem.p, rows):
            found.setdefault((min(images, problem.n - image), min(rows, problem.p - p)), []).append((image, p))
    return found


def pair_efficiency(problem: ConvProblem, tile: tuple[int, int, int]) -> float:
    """The part of the halves of pairs that hold pixels."""
    taken = sum(2 * -(-len(starts) // 2) * images * rows for (images, rows), starts in _groups(problem, tile).items())
    return problem.n * problem.p / max(1, taken)


def pair_tiles(problem: ConvProblem, tile: tuple[int, int, int], x_image: int, gy: tuple[int, int]) -> npt.NDArray[np.int64]:
    """Tiles of ``tile`` (images, rows, columns) in pairs of equal size, as rows of :data:`TILE_FIELDS`; ``gy``: pitches of its images and rows."""
    groups = _groups(problem, tile)
    records = []
    for q in range(0, problem.q, tile[2]):
        columns = min(tile[2], problem.q - q)
        for (images, rows), starts in groups.items():
            for first, second in zip(starts[::2], [*starts[1::2], None]):
                image, p = first
                if second is None:
                    records.append((image, p, q, images, rows, columns, -1, 0, 0))
                    continue
                apart = second[0] - image
                records.append((image, p, q, images, rows, columns, second[1], apart * x_image, apart * gy[0] + (second[1] - p) * gy[1]))
    return np.array(records, dtype=np.int64).reshape(-1, len(TILE_FIELDS))
