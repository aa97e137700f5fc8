"""The products of Winograd's algorithm for the weight's gradient: for every point t, S[t] += W[t]^T V[t], summed over tiles."""

from __future__ import annotations

from ..codegen.emit import Function, Module, Value
from ..codegen.numeric import Numeric
from .winograd_gemm import emit_gemm, for_groups

__all__ = ["MULTIPLY", "emit_weight_multiply"]

MULTIPLY = [
    ("ptr", "v"), ("ptr", "w"), ("ptr", "s"), ("ptr", "zeros"), ("i64", "tiles"), ("i64", "rows"), ("i64", "first"),
    ("i64", "v_point"), ("i64", "v_pitch"), ("i64", "w_point"), ("i64", "w_pitch"), ("i64", "s_point"),
]  # fmt: skip
"""Parameters of a multiply function: three matrices, a vector of zeros, tiles, rows of S, whether S starts at zero, byte pitches."""


def emit_weight_multiply(module: Module, numeric: Numeric, points: int, rows: int, vectors: int) -> Function:
    """``multiply_<vectors>``: every point's product for one panel of input channels, a block of output channels and ``tiles`` tiles.

    V is ``[point][tile][channel]``, W ``[point][tile][output channel]``, S ``[point][output channel][vectors * lanes]``::

        for point, group of output channels:  gemm

    Output channels are split into groups of ``rows`` and ``rows - 1``; a last group may run over the end of W and S, into scratch.
    """
    f = module.function(f"multiply_{vectors}", MULTIPLY)
    size = numeric.compute_bytes
    width = vectors * numeric.lanes * size
    gemms = {count: emit_gemm(module, numeric, count, vectors, transposed=True) for count in (rows, rows - 1) if count}

    def point(t: Value) -> None:
        v, w, s = f["v"] + t * f["v_point"], f["w"] + t * f["w_point"], f["s"] + t * f["s_point"]

        def group(_: Value, row: Value, count: int) -> None:
            place = s + row * width
            before = f.select(f["first"] > 0, f["zeros"], place)
            before_pitch = f.select(f["first"] > 0, f.value(0), f.value(width))
            f.call(gemms[count], [w + row * size, v, place, before, place + count * width, f["w_pitch"], before_pitch, f["tiles"], f["v_pitch"]])

        for_groups(f, f["rows"], rows, group)

    f.loop(0, points, 1, point)
    f.ret()
    return f
