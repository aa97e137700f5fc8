"""Winograd's filtering F(4, 4) along rows: four outputs of a filter of four taps by seven products, at the points 0, +-1, +-1/2, 2 and infinity.

``y = A^T [(G g) * (B^T d)]`` as in :mod:`faltung.cpu.winograd_transform`, in one dimension.  Outputs and taps come in fours, so that the inputs of block ``b``
of outputs and group ``g`` of taps are those of block ``b + g`` of inputs: one transform serves them all.  These points err by 1.5 times the error of a plain
sum of a 31x31 filter; F(5, 5) by five times, F(6, 6) by thirty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from ..codegen.emit import Function, Value
from .winograd_transform import Algorithm, emit_constant

__all__ = ["ALONG_ROWS", "BLOCK", "POINTS", "emit_filter", "emit_input", "emit_output", "error_bound"]

BLOCK = 4
"""Outputs of a block, and taps of a group."""
POINTS = 2 * BLOCK - 1
_UNIT = 2.0**-24
_SAFETY = 3.0


class _AlongRows(Algorithm):
    """The matrices of F(4, 4), whose sixth finite point has no partner of the other sign."""

    @property
    def finite(self) -> tuple[Fraction, ...]:
        return (*super().finite, Fraction(2))


ALONG_ROWS = _AlongRows(BLOCK, BLOCK, (Fraction(1), Fraction(1, 2)))


def emit_input(f: Function, x: Sequence[Value], fused: bool) -> list[Value]:
    """``B^T x``: row ``j`` has the coefficients of ``prod_{i != j} (t - p_i)``, the last one those of ``prod_i (t - p_i)``.

    The factor ``t - 2``, which all but its own point share, is taken first; what is left is even but for a factor.
    """
    type_ = x[0].type

    def plus(value: Value, factor: float, other: Value) -> Value:
        return f.fma(other, f.constant(factor, type_), value, fused)

    z = [plus(x[i + 1], -2.0, x[i]) for i in range(POINTS - 1)]
    even, odd = plus(z[4], -0.25, z[2]), plus(z[3], -0.25, z[1])
    even_half, odd_half = f.fsub(z[4], z[2]), f.fsub(z[3], z[1])
    return [
        plus(plus(z[4], -1.25, z[2]), 0.25, z[0]),
        f.fadd(even, odd),
        f.fsub(even, odd),
        plus(even_half, 0.5, odd_half),
        plus(even_half, -0.5, odd_half),
        plus(plus(x[5], -1.25, x[3]), 0.25, x[1]),
        plus(plus(z[5], -1.25, z[3]), 0.25, z[1]),
    ]


def emit_filter(f: Function, w: Sequence[Value], fused: bool) -> list[Value]:
    """``G w``: at a finite point ``p`` the filter's polynomial over ``prod (p - others)``, at infinity its last coefficient."""
    results = []
    for row in ALONG_ROWS.filter_matrix[:-1]:
        result = f.fmul(w[0], emit_constant(f, row[0], w[0].type))
        for tap, factor in zip(w[1:], row[1:]):
            result = f.fma(tap, emit_constant(f, factor, w[0].type), result, fused) if factor else result
        results.append(result)
    return [*results, w[-1]]


def emit_output(f: Function, m: Sequence[Value], fused: bool) -> list[Value]:
    """``A^T m``: powers of the points."""
    type_ = m[0].type

    def plus(value: Value, factor: float, other: Value) -> Value:
        return f.fma(other, f.constant(factor, type_), value, fused)

    one, minus_one = f.fadd(m[1], m[2]), f.fsub(m[1], m[2])
    half, minus_half = f.fadd(m[3], m[4]), f.fsub(m[3], m[4])
    return [
        f.fadd(f.fadd(m[0], m[5]), f.fadd(one, half)),
        plus(plus(minus_one, 0.5, minus_half), 2.0, m[5]),
        plus(plus(one, 0.25, half), 4.0, m[5]),
        f.fadd(plus(plus(minus_one, 0.125, minus_half), 8.0, m[5]), m[6]),
    ]


def error_bound(rows: int, columns: int) -> float:
    """Bound on the relative L2 error of a filter of ``rows x columns`` taps, for operands of independent entries, in float32.

    As :meth:`faltung.cpu.winograd_transform.Algorithm.error_bound`: rounding errors are independent, of variance ``u^2 / 3`` (Higham and Mary, 2019).  Point
    ``i`` adds up ``N`` products of variance ``b_i g_i``, whose partial sums grow; each factor errs by the roundings of its transform; ``A`` passes all on.
    """
    inputs, filters, outputs = ALONG_ROWS.input_matrix, ALONG_ROWS.filter_matrix, ALONG_ROWS.output_matrix
    count = rows * -(-columns // BLOCK)
    total = 0.0
    for i in range(POINTS):
        magnitude, squares = sum(abs(float(v)) for v in inputs[i]), sum(float(v) ** 2 for v in inputs[i])
        signal = squares * sum(float(v) ** 2 for v in filters[i]) * sum(float(row[i]) ** 2 for row in outputs) / BLOCK
        total += signal * (count * (count + 1) / 2 + count * (2 + magnitude**2 / squares) + count * math.log2(2 * POINTS))
    return _SAFETY * _UNIT / math.sqrt(3) * math.sqrt(total / (rows * columns))
