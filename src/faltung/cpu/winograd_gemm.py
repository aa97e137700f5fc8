"""The products of Winograd's algorithm: for every point t, M[t] += V[t] U[t], small matrices that stay in cache."""

from __future__ import annotations

from ..codegen.emit import Function, Module, Value
from ..codegen.numeric import Numeric

__all__ = ["emit_gemm", "emit_multiply", "gemm_rows"]

_ROWS = {32: {4: 6, 3: 9, 2: 10, 1: 14}, 16: {4: 2, 3: 3, 2: 6, 1: 8}}
"""Rows of accumulators by vector registers and vectors: the most that the register allocator places without a spill (counted in the assembly)."""
_MICRO = [("ptr", "source"), ("ptr", "panel"), ("ptr", "c"), ("ptr", "before"), ("ptr", "ahead"), ("i64", "pitch"), ("i64", "before_pitch"), ("i64", "count")]
MULTIPLY = [
    ("ptr", "v"), ("ptr", "u"), ("ptr", "m"), ("ptr", "zeros"), ("i64", "tiles"), ("i64", "count"), ("i64", "first"), ("i64", "chunk"),
    ("i64", "v_point"), ("i64", "v_pitch"), ("i64", "u_point"), ("i64", "m_point"),
    ("ptr", "block"), ("ptr", "out"), ("ptr", "source"), ("i64", "out_first"), ("i64", "source_first"), ("i64", "source_width"),
]  # fmt: skip
"""Parameters of a multiply function: three matrices, a vector of zeros, sizes, whether M starts at zero, byte pitches; for what is asked for
ahead: the argument block, output and source, first tiles of both, bytes of a source pixel."""


def gemm_rows(registers: int, vectors: int) -> int:
    """Rows of the largest GEMM block of ``vectors`` vectors."""
    return _ROWS[32 if registers >= 32 else 16][vectors]


def emit_gemm(module: Module, numeric: Numeric, rows: int, vectors: int) -> Function:
    """``c[row][vector] = sum over i < count of source[row][i] * panel[i][vector] + before[row][vector]``.

    The sum starts at zero and what was there ``before`` is added last: rounding errors grow with the length of a piece of the reduction, not
    with all of it (512 channels: error 2.2e-6 in one run, 0.9e-6 in pieces of 64).  ``rows`` x ``vectors`` accumulators, vectors over output
    channels, one broadcast of the source each row and step.  Each step asks for one cache line at ``ahead`` (the next panel), which hides its
    way from the second- or third-level cache.
    """
    name = f"gemm_{rows}x{vectors}"
    if module.has(name):
        return module._functions[name]
    f = module.function(name, _MICRO)
    size, lanes, fused = numeric.compute_bytes, numeric.lanes, numeric.target.fma
    vector_bytes = lanes * size
    # Two steps at once where they leave registers enough: with fewer vectors the scheduler hoists loads until it spills.
    unroll_steps = 2 if vectors == 4 and numeric.target.registers >= 32 else 1
    pitch, twice = f["pitch"], f["pitch"] * 2
    thrice = twice + pitch
    start = [f.zero(numeric.vector)] * (rows * vectors)

    def sources(base: Value) -> list[Value]:
        # Every third row has a pointer of its own; the two behind it are reached by the address modes base + pitch and base + 2 * pitch.
        pointers = []
        for row in range(rows):
            if row and row % 3 == 0:
                base = base + thrice
            pointers.append(base if row % 3 == 0 else base + (pitch if row % 3 == 1 else twice))
        return pointers

    def turn(unroll: int):  # type: ignore[no-untyped-def]
        def body(_: Value, source: Value, panel: Value, ahead: Value, *accumulators: Value) -> list[Value]:
            result = list(accumulators)
            pointers = sources(source)
            for u in range(unroll):
                columns = [f.load(panel + (u * vectors + v) * vector_bytes, numeric.vector) for v in range(vectors)]
                f.prefetch(ahead + u * 64, 2)
                for row in range(rows):
                    scalar = f.splat(f.load(pointers[row] + u * size, numeric.compute), lanes)
                    for v in range(vectors):
                        i = row * vectors + v
                        result[i] = f.fma(scalar, columns[v], result[i], fused)
            return [source + unroll * size, panel + unroll * vectors * vector_bytes, ahead + unroll * 64, *result]

        return body

    whole = f.integer("and", f["count"], -unroll_steps)
    source, panel, ahead, *values = f.loop(0, whole, unroll_steps, turn(unroll_steps), [f["source"], f["panel"], f["ahead"], *start])
    if unroll_steps > 1:
        _, _, _, *values = f.loop(whole, f["count"], 1, turn(1), [source, panel, ahead, *values])
    before = f["before"]
    for i, value in enumerate(values):
        row, v = divmod(i, vectors)
        if row and v == 0:
            before = before + f["before_pitch"]
        f.store(f.fadd(value, f.load(before + v * vector_bytes, numeric.vector)), f["c"] + i * vector_bytes)
    f.ret()
    return f


def emit_multiply(module: Module, numeric: Numeric, points: int, rows: int, vectors: int, touch: tuple[Function, Function] | None = None) -> Function:
    """``multiply_<vectors>``: every point's product for one panel of U and ``tiles`` tiles.

    The reduction is cut into pieces of ``chunk`` channels, the last one up to twice as long.  ``touch``: functions that ask for the pixels of the
    output, then of the source of tiles to come (see :func:`emit_touch`); each point asks for its share.

    V is ``[point][tile][channel]``, U ``[point][channel][vectors * lanes]``, M ``[point][tile][vectors * lanes]``::

        for point, piece of channels (of a panel that fits the first-level cache), group of tiles:  gemm

    Tiles are split into groups of ``rows`` and ``rows - 1``; a last group may run over the end of V and M, into scratch.
    """
    f = module.function(f"multiply_{vectors}", MULTIPLY)
    size = numeric.compute_bytes
    width = vectors * numeric.lanes * size
    wide_gemm = emit_gemm(module, numeric, rows, vectors)
    narrow_gemm = emit_gemm(module, numeric, rows - 1, vectors) if rows > 1 else None
    groups = (f["tiles"] + (rows - 1)) // rows
    narrow = f.minimum(groups * rows - f["tiles"], groups) if narrow_gemm is not None else f.value(0)
    wide = groups - narrow

    def point(t: Value) -> None:
        v, u, m = f["v"] + t * f["v_point"], f["u"] + t * f["u_point"], f["m"] + t * f["m_point"]

        def piece(c: Value) -> None:
            rest = f["count"] - c
            length = f.select(rest < f["chunk"] * 2, rest, f["chunk"])
            panel = u + c * width
            fresh = f.integer("and", f["first"], f.cast("zext", c.equals(0), "i64"))
            following = panel + length * width

            def group(index: Value, tile: Value, gemm: Function) -> None:
                place = m + tile * width
                before = f.select(fresh > 0, f["zeros"], place)
                before_pitch = f.select(fresh > 0, f.value(0), f.value(width))
                ahead = following + f.minimum(index, vectors - 1) * length * 64
                f.call(gemm, [v + tile * f["v_pitch"] + c * size, panel, place, before, ahead, f["v_pitch"], before_pitch, length])

            f.loop(0, wide, 1, lambda i: group(i, i * rows, wide_gemm))
            if narrow_gemm is not None:
                f.loop(wide, groups, 1, lambda i: group(i, i * (rows - 1) + wide, narrow_gemm))

        f.loop(0, f["count"] - (f["chunk"] - 1), f["chunk"], piece)
        if touch is not None:
            share = f["tiles"]
            start, stop = t * share // points, (t + 1) * share // points
            f.call(touch[0], [f["block"], f["out"], f["out_first"] + start, f["out_first"] + stop, f.value(width)])
            f.call(touch[1], [f["block"], f["source"], f["source_first"] + start, f["source_first"] + stop, f["source_width"]])

    f.loop(0, points, 1, point)
    f.ret()
    return f
