"""The products of Winograd's algorithm: for every point t, M[t] += V[t] U[t], small matrices that stay in cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from ..codegen.emit import Function, Module, Value
from ..codegen.numeric import Numeric
from .micro import Pitches
from .winograd_form import Form

__all__ = ["Panels", "emit_gemm", "emit_multiply", "for_groups", "gemm_rows"]

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

PHASES = [("i64", "u_phase"), ("i64", "m_phase")]
"""More of a form with phases: from one to the next, in U and M."""


class Panelled(Protocol):
    """A kernel whose output is cut into panels of ``vectors`` vectors and, where ``narrow``, of one less."""

    @property
    def vectors(self) -> int: ...

    @property
    def narrow(self) -> bool: ...


class Panels:
    """What the builders of such kernels know of their panels."""

    kernel: Panelled
    numeric: Numeric

    @property
    def widths(self) -> tuple[int, ...]:
        """Vectors of the panels there are."""
        return (self.kernel.vectors, self.kernel.vectors - 1) if self.kernel.narrow else (self.kernel.vectors,)

    @property
    def vector_bytes(self) -> int:
        return self.numeric.lanes * self.numeric.compute_bytes


def gemm_rows(registers: int, vectors: int) -> int:
    """Rows of the largest GEMM block of ``vectors`` vectors."""
    return _ROWS[32 if registers >= 32 else 16][vectors]


def emit_gemm(module: Module, numeric: Numeric, rows: int, vectors: int, *, transposed: bool = False) -> Function:
    """``c[row][vector] = sum over i < count of source[row][i] * panel[i][vector] + before[row][vector]``; ``transposed``: of ``source[i][row]``,
    and the panel's steps lie ``panel_pitch`` bytes apart.

    The sum starts at zero and what was there ``before`` is added last: rounding errors grow with the length of a piece of the reduction, not
    with all of it (512 channels: error 2.2e-6 in one run, 0.9e-6 in pieces of 64).  ``rows`` x ``vectors`` accumulators, vectors over output
    channels, one broadcast of the source each row and step.  Each step asks for one cache line at ``ahead`` (the next panel; ``transposed``, the sums
    of the next rows), which hides its way from the second- or third-level cache.
    """
    name = f"gemm_{rows}x{vectors}{'t' if transposed else ''}"
    if module.has(name):
        return module._functions[name]
    f = module.function(name, [*_MICRO, *([("i64", "panel_pitch")] if transposed else [])])
    size, lanes, fused = numeric.compute_bytes, numeric.lanes, numeric.target.fma
    vector_bytes = lanes * size
    # Two steps at once where they leave registers enough: with fewer vectors the scheduler hoists loads until it spills.
    unroll_steps = 2 if vectors == 4 and numeric.target.registers >= 32 else 1
    pitch = f["pitch"]
    pitches = None if transposed else Pitches(pitch)
    start = [f.zero(numeric.vector)] * (rows * vectors)

    def sources(base: Value) -> list[Value]:
        return [base + row * size for row in range(rows)] if pitches is None else pitches.rows(base, rows)

    def turn(unroll: int):  # type: ignore[no-untyped-def]
        def body(_: Value, source: Value, panel: Value, ahead: Value, *accumulators: Value) -> list[Value]:
            result = list(accumulators)
            pointers = sources(source)
            for u in range(unroll):
                step = 0 if transposed else u  # of a source and a panel that were moved on, or not
                columns = [f.load(panel + (step * vectors + v) * vector_bytes, numeric.vector) for v in range(vectors)]
                f.prefetch(ahead + u * 64, 3 if transposed else 2)
                for row in range(rows):
                    scalar = f.splat(f.load(pointers[row] + step * size, numeric.compute), lanes)
                    for v in range(vectors):
                        i = row * vectors + v
                        result[i] = f.fma(scalar, columns[v], result[i], fused)
                if transposed:
                    source, panel = source + pitch, panel + f["panel_pitch"]
                    pointers = sources(source)
            if not transposed:
                source, panel = source + unroll * size, panel + unroll * vectors * vector_bytes
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


def _active(f: Function, form: Form, t: Value, n: int) -> tuple[Value, Value]:
    """The components that the point ``t`` multiplies."""
    last_row, last_column = t >= n * (n - 1), (t % n).equals(n - 1)

    def choose(i: int) -> Value:
        values = [[f.value(form.active(row, column)[i]) for column in (False, True)] for row in (False, True)]
        return f.select(last_row, *(f.select(last_column, yes, no) for no, yes in values[::-1]))

    return choose(0), choose(1)


def for_groups(f: Function, total: Value, rows: int, body: Callable[[Value, Value, int], None]) -> None:
    """``body(index, start, size)`` for ``total`` split into groups of ``rows`` and ``rows - 1``, as few as possible; the last may run over the end."""
    groups = (total + (rows - 1)) // rows
    narrow = f.minimum(groups * rows - total, groups) if rows > 1 else f.value(0)
    wide = groups - narrow
    f.loop(0, wide, 1, lambda i: body(i, i * rows, rows))
    if rows > 1:
        f.loop(wide, groups, 1, lambda i: body(i, i * (rows - 1) + wide, rows - 1))


def emit_multiply(module: Module, numeric: Numeric, n: int, form: Form, rows: int, vectors: int, touch: tuple[Function, Function] | None = None) -> Function:
    """``multiply_<vectors>``: every point's product for one panel of U and ``tiles`` tiles, n x n points.

    The reduction is cut into pieces of ``chunk`` virtual channels, the last one up to twice as long.  Of a piece, a point multiplies the components that are
    not zero there; and it multiplies the phases that are not zero there, ``u_phase`` and ``m_phase`` bytes apart, while its part of V is near.  ``touch``:
    functions that ask for the pixels of the output, then of the source of tiles to come (see :func:`emit_touch`); each point asks for its share.

    V is ``[point][tile][channel]``, U ``[point][channel][vectors * lanes]``, M ``[point][tile][vectors * lanes]``::

        for point, phase, piece of channels (of a panel that fits the first-level cache), group of tiles:  gemm

    Tiles are split into groups of ``rows`` and ``rows - 1``; a last group may run over the end of V and M, into scratch.
    """
    f = module.function(f"multiply_{vectors}", [*MULTIPLY, *(PHASES if form.phased else [])])
    points, components = n * n, len(form.components)
    size = numeric.compute_bytes
    width = vectors * numeric.lanes * size
    gemms = {size: emit_gemm(module, numeric, size, vectors) for size in (rows, rows - 1) if size}

    def product(t: Value, v: Value, u: Value, m: Value, after: Value) -> None:
        """Of one phase; ``after``: what will be read of U when it is done."""
        begin, stop = _active(f, form, t, n) if components > 1 else (f.value(0), f.value(1))

        def piece(start_of_piece: Value) -> None:
            c = start_of_piece
            rest = f["count"] - c
            whole = rest < f["chunk"] * 2
            length = f.select(whole, rest, f["chunk"])
            following = f.select(whole, after, u + (c + length) * width)
            if components > 1:
                each = length // components
                c, length = c + each * begin, each * (stop - begin)
            panel = u + c * width
            fresh = f.integer("and", f["first"], f.cast("zext", start_of_piece.equals(0), "i64"))

            def group(index: Value, tile: Value, count: int) -> None:
                place = m + tile * width
                before = f.select(fresh > 0, f["zeros"], place)
                before_pitch = f.select(fresh > 0, f.value(0), f.value(width))
                ahead = following + f.minimum(index, vectors - 1) * length * 64
                f.call(gemms[count], [v + tile * f["v_pitch"] + c * size, panel, place, before, ahead, f["v_pitch"], before_pitch, length])

            for_groups(f, f["tiles"], rows, group)

        f.loop(0, f["count"] - (f["chunk"] - 1), f["chunk"], piece)

    def point(t: Value) -> None:
        v, u, m = f["v"] + t * f["v_point"], f["u"] + t * f["u_point"], f["m"] + t * f["m_point"]
        if form.phased:
            last_row, last_column = t >= n * (n - 1), (t % n).equals(n - 1)
            for number, (row, column) in enumerate(form.short):
                after = u + (f["u_phase"] * (number + 1) if number + 1 < len(form.phases) else f["u_point"])
                zero = [last for short, last in ((row, last_row), (column, last_column)) if short]
                place = u + f["u_phase"] * number, m + f["m_phase"] * number, after
                _unless(f, zero, partial(product, t, v, *place))
        else:
            product(t, v, u, m, u + f["count"] * width)
        if touch is not None:
            share = f["tiles"]
            start, stop = t * share // points, (t + 1) * share // points
            f.call(touch[0], [f["block"], f["out"], f["out_first"] + start, f["out_first"] + stop, f.value(width * numeric.memory_bytes // size)])
            with f.when(f["source_width"] > 0):
                f.call(touch[1], [f["block"], f["source"], f["source_first"] + start, f["source_first"] + stop, f["source_width"]])

    f.loop(0, points, 1, point)
    f.ret()
    return f


def _unless(f: Function, conditions: list[Value], body: Callable[[], None]) -> None:
    """``body()``, but where one of the conditions holds."""
    if not conditions:
        body()
        return
    f.branch(conditions[0], lambda: None, lambda: _unless(f, conditions[1:], body))
