"""The products of Winograd's algorithm for the weight's gradient: for every point t, S[t] += W[t]^T V[t], summed over tiles."""

from __future__ import annotations

from ..codegen.emit import Function, Module, Value
from ..codegen.numeric import Numeric

__all__ = ["MULTIPLY", "emit_weight_gemm", "emit_weight_multiply"]

_MICRO = [("ptr", "source"), ("ptr", "panel"), ("ptr", "c"), ("ptr", "before"), ("ptr", "ahead"), ("i64", "pitch"), ("i64", "panel_pitch"),
          ("i64", "before_pitch"), ("i64", "count")]  # fmt: skip
MULTIPLY = [
    ("ptr", "v"), ("ptr", "w"), ("ptr", "s"), ("ptr", "zeros"), ("i64", "tiles"), ("i64", "rows"), ("i64", "first"),
    ("i64", "v_point"), ("i64", "v_pitch"), ("i64", "w_point"), ("i64", "w_pitch"), ("i64", "s_point"),
]  # fmt: skip
"""Parameters of a multiply function: three matrices, a vector of zeros, tiles, rows of S, whether S starts at zero, byte pitches."""


def emit_weight_gemm(module: Module, numeric: Numeric, rows: int, vectors: int) -> Function:
    """``c[row][vector] = sum over i < count of source[i][row] * panel[i][vector] + before[row][vector]``.

    ``rows`` x ``vectors`` accumulators; each sum starts at zero and what was there ``before`` is added last, so that errors grow with the length of a
    piece.  Each step asks for one cache line at ``ahead`` (the sums of the next rows).
    """
    name = f"gemm_{rows}x{vectors}"
    if module.has(name):
        return module._functions[name]
    f = module.function(name, _MICRO)
    size, lanes, fused = numeric.compute_bytes, numeric.lanes, numeric.target.fma
    vector_bytes = lanes * size
    unroll_steps = 2 if vectors == 4 and numeric.target.registers >= 32 else 1
    pitch, panel_pitch = f["pitch"], f["panel_pitch"]
    start = [f.zero(numeric.vector)] * (rows * vectors)

    def turn(unroll: int):  # type: ignore[no-untyped-def]
        def body(_: Value, source: Value, panel: Value, ahead: Value, *accumulators: Value) -> list[Value]:
            result = list(accumulators)
            for u in range(unroll):
                columns = [f.load(panel + v * vector_bytes, numeric.vector) for v in range(vectors)]
                f.prefetch(ahead + u * 64, 3)
                for row in range(rows):
                    scalar = f.splat(f.load(source + row * size, numeric.compute), lanes)
                    for v in range(vectors):
                        i = row * vectors + v
                        result[i] = f.fma(scalar, columns[v], result[i], fused)
                source, panel = source + pitch, panel + panel_pitch
            return [source, panel, ahead + unroll * 64, *result]

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


def emit_weight_multiply(module: Module, numeric: Numeric, points: int, rows: int, vectors: int) -> Function:
    """``multiply_<vectors>``: every point's product for one panel of input channels, a block of output channels and ``tiles`` tiles.

    V is ``[point][tile][channel]``, W ``[point][tile][output channel]``, S ``[point][output channel][vectors * lanes]``::

        for point, group of output channels:  gemm

    Output channels are split into groups of ``rows`` and ``rows - 1``; a last group may run over the end of W and S, into scratch.
    """
    f = module.function(f"multiply_{vectors}", MULTIPLY)
    size = numeric.compute_bytes
    width = vectors * numeric.lanes * size
    wide_gemm = emit_weight_gemm(module, numeric, rows, vectors)
    narrow_gemm = emit_weight_gemm(module, numeric, rows - 1, vectors) if rows > 1 else None
    groups = (f["rows"] + (rows - 1)) // rows
    narrow = f.minimum(groups * rows - f["rows"], groups) if narrow_gemm is not None else f.value(0)
    wide = groups - narrow

    def point(t: Value) -> None:
        v, w, s = f["v"] + t * f["v_point"], f["w"] + t * f["w_point"], f["s"] + t * f["s_point"]

        def group(row: Value, count: int, gemm: Function) -> None:
            place = s + row * width
            before = f.select(f["first"] > 0, f["zeros"], place)
            before_pitch = f.select(f["first"] > 0, f.value(0), f.value(width))
            f.call(gemm, [w + row * size, v, place, before, place + count * width, f["w_pitch"], f["v_pitch"], before_pitch, f["tiles"]])

        f.loop(0, wide, 1, lambda i: group(i * rows, rows, wide_gemm))
        if narrow_gemm is not None:
            f.loop(wide, groups, 1, lambda i: group(i * (rows - 1) + wide, rows - 1, narrow_gemm))

    f.loop(0, points, 1, point)
    f.ret()
    return f
