"""The filter transform: U[point][reduced channel][out channel] = G g G^T for every pair of channels.

Vectors run over output channels.  The four places that a filter's taps can be in memory are gathered by transposes in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..codegen.emit import Function, Module, Value
from ..codegen.numeric import Numeric
from .winograd_form import FEW, Form
from .winograd_transform import Algorithm, emit_filter_1d, transform_2d

__all__ = ["FILTER_PARAMETERS", "emit_filter", "filter_scratch_bytes"]

FILTER_PARAMETERS = ("weight", "u", "scratch", "count", "valid", "reduced_pitch", "lane_pitch", "tap_pitch", "u_point", "u_channel", "u_phase")


def filter_scratch_bytes(numeric: Numeric, form: Form) -> int:
    """Scratch of the filter transform: ``lanes`` reduced channels' taps (or those of a few channels) for one vector of output channels."""
    return form.r * form.s * max(FEW, numeric.lanes) * numeric.lanes * numeric.compute_bytes


def emit_filter(module: Module, numeric: Numeric, algorithm: Algorithm, form: Form, flipped: bool, weight_format: str, few: int = 0) -> Function:
    """``filter(weight, u, scratch, count, valid, reduced_pitch, lane_pitch, tap_pitch, u_point, u_channel, u_phase)``.

    ``count`` reduced channels (at least one vector) of ``valid`` output channels (at least one vector) from ``weight`` on.  Byte pitches of
    the weight: from one reduced channel to the next, from one output channel to the next, from tap to tap; of U: points, reduced channels, phases.
    ``flipped`` (grad_input): reduced are the weight's first channels, and the taps are turned by 180 degrees.  ``few``: there are so few reduced channels,
    less than a vector.  The rows of a component follow those of the one before it::

        for vector of output channels, vector of reduced channels:
            gather taps into scratch                  [reduced channel][tap][lane]
            for reduced channel: transform
    """
    pointers = [("ptr", name) for name in FILTER_PARAMETERS[:3]]
    f = module.function("filter", [*pointers, *(("i64", name) for name in FILTER_PARAMETERS[3:])])
    lanes, size = numeric.lanes, numeric.compute_bytes
    every = form.r * form.s
    gather = _gathers(f, numeric, every)[flipped, weight_format]
    tap_pitch, channel_pitch = (few, 1) if few and weight_format == "nhwc" else (1, every)  # vectors of scratch

    def transform(source: Value, target: Value) -> None:
        def tap(index: int) -> Value:
            place = every - 1 - index if flipped else index
            return f.load(source + place * (tap_pitch * lanes * size), numeric.vector)

        part_pitch = f["u_phase"] if form.phased else f["count"] * f["u_channel"]
        for number, part in enumerate(form.parts):
            place = target + part_pitch * number if number else target
            taps = [[None if (t := form.tap(part, i, j)) is None else tap(t) for i in range(algorithm.taps)] for j in range(algorithm.taps)]
            _transform(f, numeric, algorithm, form, number, taps, place)

    def out_block(k: Value) -> None:
        out = f.minimum(k, f["valid"] - lanes)

        def reduced_block(c: Value) -> None:
            first = f.minimum(c, f["count"] - lanes)
            gather(f["weight"] + out * f["lane_pitch"] + first * f["reduced_pitch"])

            def one(i: Value) -> None:
                transform(f["scratch"] + i * (channel_pitch * lanes * size), f["u"] + (first + i) * f["u_channel"] + out * size)

            f.loop(0, lanes, 1, one)

        if few:
            _gather_whole(f, numeric, f["weight"] + out * f["lane_pitch"], every * few)
            for i in range(few):
                transform(f["scratch"] + i * (channel_pitch * lanes * size), f["u"] + f["u_channel"] * i + out * size)
        else:
            f.loop(0, f["count"], lanes, reduced_block)

    f.loop(0, f["valid"], lanes, out_block)
    f.ret()
    return f


def _transform(f: Function, numeric: Numeric, algorithm: Algorithm, form: Form, number: int, columns: Sequence[Sequence[Value | None]], target: Value) -> None:
    """One part of a vector of filters; its zeros are stored where the products do not leave them out."""
    last = algorithm.n - 1
    for i, row in enumerate(transform_2d(f, emit_filter_1d, algorithm, columns, numeric.target.fma)):
        base = target + f["u_point"] * (i * algorithm.n)
        for j, value in enumerate(row):
            if form.used(number, i == last, j == last):
                f.store(f.zero(numeric.vector) if value is None else value, base + f["u_point"] * j)


def _gather_whole(f: Function, numeric: Numeric, base: Value, count: int) -> None:
    """The ``count`` weights of each of ``lanes`` output channels (at least a vector) into ``scratch`` [weight][lane]."""
    lanes, size, memory = numeric.lanes, numeric.compute_bytes, numeric.memory_bytes
    if count < lanes:

        def lane(i: Value) -> None:
            place, target = base + i * f["lane_pitch"], f["scratch"] + i * size
            for weight in range(count):
                f.store(numeric.load(f, place + weight * memory, 1), target + weight * (lanes * size))

        f.loop(0, lanes, 1, lane)
        return

    def block(c: Value) -> None:
        first = f.minimum(c, count - lanes)
        loaded, place = [], base + first * memory
        for _ in range(lanes):
            loaded.append(numeric.load(f, place, lanes))
            place = place + f["lane_pitch"]
        for j, vector in enumerate(f.transpose(loaded)):
            f.store(vector, f["scratch"] + (first + j) * (lanes * size))

    f.loop(0, count, lanes, block)


def _gathers(f: Function, numeric: Numeric, every: int) -> dict[tuple[bool, str], Callable[[Value], None]]:
    """Gathers of ``lanes`` reduced by ``lanes`` output channels' taps, ``every`` of them, into ``scratch`` [reduced channel][tap][lane]."""
    lanes, size, memory = numeric.lanes, numeric.compute_bytes, numeric.memory_bytes
    vector_bytes, run_bytes = lanes * size, lanes * memory

    def pointers(base: Value, pitch: Value) -> list[Value]:
        found = [base]
        for _ in range(lanes - 1):
            found.append(found[-1] + pitch)
        return found

    def rows_of_lanes(base: Value) -> None:
        """(k, c, r, s): the taps of ``lanes`` reduced channels are one run of each output channel."""

        def block(i: Value) -> None:
            loaded = [numeric.load(f, p + i * run_bytes, lanes) for p in pointers(base, f["lane_pitch"])]
            for j, vector in enumerate(f.transpose(loaded)):
                f.store(vector, f["scratch"] + (i * lanes + j) * vector_bytes)

        f.loop(0, every, 1, block)

    def taps_of_lanes(base: Value) -> None:
        """(k, r, s, c): for each tap a square of channels."""

        def tap(t: Value) -> None:
            loaded = []
            for p in pointers(base, f["lane_pitch"]):
                place = p + t * f["tap_pitch"]
                loaded.append(numeric.load(f, place, lanes))
                f.prefetch(place + 64, 3)  # the next block's: lines this far apart are out of the hardware's sight
            for j, vector in enumerate(f.transpose(loaded)):
                f.store(vector, f["scratch"] + (t + j * every) * vector_bytes)

        f.loop(0, every, 1, tap)

    def lanes_apart(base: Value) -> None:
        """(k, c, r, s), flipped: lanes are ``taps`` apart; squares of lanes by taps, the taps left over one by one."""

        def reduced(i: Value) -> None:
            source = base + i * f["reduced_pitch"]
            target = f["scratch"] + i * (every * vector_bytes)
            for line in range(every * run_bytes // 64):
                f.prefetch(source + (every * run_bytes + line * 64), 2)  # the same of the next vector of output channels
            done = 0
            while done < every:
                some = min(lanes, every - done)
                if some == lanes or numeric.target.masks:
                    mask = None if some == lanes else f.lane_mask(some, lanes)
                    loaded = [numeric.load(f, source + (lane * every + done) * memory, lanes, mask) for lane in range(lanes)]
                    for j, vector in enumerate(f.transpose(loaded)[:some]):
                        f.store(vector, target + (done + j) * vector_bytes)
                else:
                    for j in range(some):
                        for lane in range(lanes):
                            value = numeric.load(f, source + (lane * every + done + j) * memory, 1)
                            f.store(value, target + (done + j) * vector_bytes + lane * size)
                done += some

        f.loop(0, lanes, 1, reduced)

    def in_place(base: Value) -> None:
        """(k, r, s, c), flipped: lanes are neighbours."""

        def reduced(i: Value) -> None:
            source, target = base + i * f["reduced_pitch"], f["scratch"] + i * (every * vector_bytes)
            for tap in range(every):
                f.store(numeric.load(f, source + f["tap_pitch"] * tap, lanes), target + tap * vector_bytes)

        f.loop(0, lanes, 1, reduced)

    return {(False, "nchw"): rows_of_lanes, (False, "nhwc"): taps_of_lanes, (True, "nchw"): lanes_apart, (True, "nhwc"): in_place}
