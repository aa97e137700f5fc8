"""The last transform of Winograd's weight gradient, gw = G^T S G, the sum of the parts, and the weight's memory formats."""

from __future__ import annotations

from collections.abc import Sequence

from ..codegen.emit import Function, Module, Value
from ..codegen.numeric import Numeric
from .winograd_input import channel_start
from .winograd_transform import Algorithm, emit_reduce_1d, transform_2d

__all__ = ["emit_reduce", "emit_sum_parts"]

_TAPS = 9


def emit_reduce(module: Module, numeric: Numeric, algorithm: Algorithm, weight_format: str) -> Function:
    """``reduce(s, out, channels, rows, s_point, s_pitch, k_pitch, tap_pitch)``: ``rows`` output channels by ``channels`` input channels (at least a vector).

    ``numeric``: of what is written, as in :func:`emit_sum_parts`.
    """
    names = ("channels", "rows", "s_point", "s_pitch", "k_pitch", "tap_pitch")
    f = module.function("reduce", [("ptr", "s"), ("ptr", "out"), *(("i64", n) for n in names)])
    n, lanes, size = algorithm.n, numeric.lanes, numeric.compute_bytes

    def row(k: Value) -> None:
        source, out = f["s"] + k * f["s_pitch"], f["out"] + k * f["k_pitch"]

        def block(c: Value) -> None:
            channel = channel_start(f, c, f["channels"], lanes)
            sums = []
            for i in range(n):
                base = source + channel * size + f["s_point"] * (i * n)
                sums.append([f.load(base + f["s_point"] * j, numeric.vector) for j in range(n)])
            columns = [[sums[i][j] for i in range(n)] for j in range(n)]
            taps = [tap for line in transform_2d(f, emit_reduce_1d, algorithm, columns, numeric.target.fma) for tap in line]
            _place(f, numeric, weight_format, taps, out, channel)

        f.loop(0, f["channels"], lanes, block)

    f.loop(0, f["rows"], 1, row)
    f.ret()
    return f


def emit_sum_parts(module: Module, numeric: Numeric, weight_format: str) -> Function:
    """``sum_parts(partial, out, channels, parts, part_pitch, partial_tap, tap_pitch)``: the weights of one output channel, parts in their order."""
    names = ("channels", "parts", "part_pitch", "partial_tap", "tap_pitch")
    f = module.function("sum_parts", [("ptr", "partial"), ("ptr", "out"), *(("i64", n) for n in names)])
    lanes, size = numeric.lanes, numeric.compute_bytes

    def block(c: Value) -> None:
        channel = channel_start(f, c, f["channels"], lanes)

        def part(i: Value, *sums: Value) -> list[Value]:
            source = f["partial"] + i * f["part_pitch"] + channel * size
            return [f.fadd(total, f.load(source + f["partial_tap"] * tap, numeric.vector)) for tap, total in enumerate(sums)]

        first = [f.load(f["partial"] + f["partial_tap"] * tap + channel * size, numeric.vector) for tap in range(_TAPS)]
        _place(f, numeric, weight_format, f.loop(1, f["parts"], 1, part, first), f["out"], channel)

    f.loop(0, f["channels"], lanes, block)
    f.ret()
    return f


def _place(f: Function, numeric: Numeric, weight_format: str, taps: Sequence[Value], out: Value, channel: Value) -> None:
    """The taps of ``lanes`` input channels of one output channel, from ``channel`` on."""
    lanes, size = numeric.lanes, numeric.memory_bytes
    if weight_format == "nhwc":
        for tap, value in enumerate(taps):
            numeric.store(f, value, out + f["tap_pitch"] * tap + channel * size, lanes)
        return
    place = out + channel * (_TAPS * size)
    done = 0
    while done < _TAPS:
        some = min(lanes, _TAPS - done)
        if some == lanes or numeric.target.masks:
            mask = None if some == lanes else f.lane_mask(some, lanes)
            rows = [taps[done + j] if j < some else f.zero(numeric.vector) for j in range(lanes)]
            for lane, vector in enumerate(f.transpose(rows)):
                numeric.store(f, vector, place + (lane * _TAPS + done) * size, lanes, mask)
        else:
            for j in range(some):
                for lane in range(lanes):
                    numeric.store(f, f.extract(taps[done + j], lane), place + (lane * _TAPS + done + j) * size, 1)
        done += some
