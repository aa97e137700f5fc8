"""The filter transform: U[point][reduced channel][out channel] = G g G^T for every pair of channels.

Vectors run over output channels.  The four places that a filter's taps can be in memory are gathered by transposes in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..codegen.emit import Function, Module, Value
from ..codegen.numeric import Numeric
from .winograd_transform import Algorithm, emit_filter_1d, transform_2d

__all__ = ["FILTER_PARAMETERS", "emit_filter", "filter_scratch_bytes"]

FILTER_PARAMETERS = ("weight", "u", "scratch", "count", "valid", "reduced_pitch", "lane_pitch", "tap_pitch", "u_point", "u_channel")
_TAPS = 9


def filter_scratch_bytes(numeric: Numeric) -> int:
    """Scratch of the filter transform: ``lanes`` reduced channels' taps for one vector of output channels."""
    return _TAPS * numeric.lanes * numeric.lanes * numeric.compute_bytes


def emit_filter(module: Module, numeric: Numeric, algorithm: Algorithm, flipped: bool, weight_format: str) -> Function:
    """``filter(weight, u, scratch, count, valid, reduced_pitch, lane_pitch, tap_pitch, u_point, u_channel)``.

    ``count`` reduced channels (at least one vector) of ``valid`` output channels (at least one vector) from ``weight`` on.  Byte pitches of
    the weight: from one reduced channel to the next, from one output channel to the next, from tap to tap; of U: points, reduced channels.
    ``flipped`` (grad_input): reduced are the weight's first channels, and the taps are turned by 180 degrees::

        for vector of output channels, vector of reduced channels:
            gather taps into scratch                  [reduced channel][tap][lane]
            for reduced channel: transform
    """
    pointers = [("ptr", name) for name in FILTER_PARAMETERS[:3]]
    f = module.function("filter", [*pointers, *(("i64", name) for name in FILTER_PARAMETERS[3:])])
    lanes, size = numeric.lanes, numeric.compute_bytes
    gather = _gathers(f, numeric)[flipped, weight_format]
    order = range(_TAPS - 1, -1, -1) if flipped else range(_TAPS)

    def out_block(k: Value) -> None:
        out = f.minimum(k, f["valid"] - lanes)

        def reduced_block(c: Value) -> None:
            first = f.minimum(c, f["count"] - lanes)
            gather(f["weight"] + out * f["lane_pitch"] + first * f["reduced_pitch"])

            def transform(i: Value) -> None:
                source = f["scratch"] + i * (_TAPS * lanes * size)
                taps = [f.load(source + tap * (lanes * size), numeric.vector) for tap in order]
                _transform(f, numeric, algorithm, taps, f["u"] + (first + i) * f["u_channel"] + out * size)

            f.loop(0, lanes, 1, transform)

        f.loop(0, f["count"], lanes, reduced_block)

    f.loop(0, f["valid"], lanes, out_block)
    f.ret()
    return f


def _transform(f: Function, numeric: Numeric, algorithm: Algorithm, taps: Sequence[Value], target: Value) -> None:
    columns = [[taps[3 * i + j] for i in range(3)] for j in range(3)]
    for i, row in enumerate(transform_2d(f, emit_filter_1d, algorithm, columns, numeric.target.fma)):
        base = target + f["u_point"] * (i * algorithm.n)
        for j, value in enumerate(row):
            f.store(value, base + f["u_point"] * j)


def _gathers(f: Function, numeric: Numeric) -> dict[tuple[bool, str], Callable[[Value], None]]:
    """Gathers of ``lanes`` reduced by ``lanes`` output channels' taps into ``scratch`` [reduced channel][tap][lane]."""
    lanes, size = numeric.lanes, numeric.compute_bytes
    vector_bytes = lanes * size

    def pointers(base: Value, pitch: Value) -> list[Value]:
        found = [base]
        for _ in range(lanes - 1):
            found.append(found[-1] + pitch)
        return found

    def rows_of_lanes(base: Value) -> None:
        """(k, c, r, s): the taps of ``lanes`` reduced channels are one run of each output channel."""

        def block(i: Value) -> None:
            loaded = [f.load(p + i * vector_bytes, numeric.vector) for p in pointers(base, f["lane_pitch"])]
            for j, vector in enumerate(f.transpose(loaded)):
                f.store(vector, f["scratch"] + (i * lanes + j) * vector_bytes)

        f.loop(0, _TAPS, 1, block)

    def taps_of_lanes(base: Value) -> None:
        """(k, r, s, c): for each tap a square of channels."""

        def tap(t: Value) -> None:
            loaded = []
            for p in pointers(base, f["lane_pitch"]):
                place = p + t * f["tap_pitch"]
                loaded.append(f.load(place, numeric.vector))
                f.prefetch(place + 64, 3)  # the next block's: lines this far apart are out of the hardware's sight
            for j, vector in enumerate(f.transpose(loaded)):
                f.store(vector, f["scratch"] + (t + j * _TAPS) * vector_bytes)

        f.loop(0, _TAPS, 1, tap)

    def lanes_apart(base: Value) -> None:
        """(k, c, r, s), flipped: lanes are ``taps`` apart; squares of lanes by taps, the taps left over one by one."""

        def reduced(i: Value) -> None:
            source = base + i * f["reduced_pitch"]
            target = f["scratch"] + i * (_TAPS * vector_bytes)
            for line in range(_TAPS * vector_bytes // 64):
                f.prefetch(source + (_TAPS * vector_bytes + line * 64), 2)  # the same of the next vector of output channels
            done = 0
            while done < _TAPS:
                some = min(lanes, _TAPS - done)
                if some == lanes or numeric.target.masks:
                    mask = None if some == lanes else f.lane_mask(some, lanes)
                    loaded = []
                    for lane in range(lanes):
                        place = source + (lane * _TAPS + done) * size
                        loaded.append(f.load(place, numeric.vector) if mask is None else f.load_masked(place, mask, numeric.vector))
                    for j, vector in enumerate(f.transpose(loaded)[:some]):
                        f.store(vector, target + (done + j) * vector_bytes)
                else:
                    for j in range(some):
                        for lane in range(lanes):
                            f.store(f.load(source + (lane * _TAPS + done + j) * size, numeric.compute), target + (done + j) * vector_bytes + lane * size)
                done += some

        f.loop(0, lanes, 1, reduced)

    def in_place(base: Value) -> None:
        """(k, r, s, c), flipped: lanes are neighbours."""

        def reduced(i: Value) -> None:
            source, target = base + i * f["reduced_pitch"], f["scratch"] + i * (_TAPS * vector_bytes)
            for tap in range(_TAPS):
                f.store(f.load(source + f["tap_pitch"] * tap, numeric.vector), target + tap * vector_bytes)

        f.loop(0, lanes, 1, reduced)

    return {(False, "nchw"): rows_of_lanes, (False, "nhwc"): taps_of_lanes, (True, "nchw"): lanes_apart, (True, "nhwc"): in_place}
