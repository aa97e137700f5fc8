"""Winograd's minimal filtering F(m x m, t x t): the transforms as exact matrices, their code, and the bound on their rounding error.

The output of a filter of ``t`` taps at ``m`` neighbours is ``A^T [(G g) * (B^T d)]`` with ``m + t - 1`` products, one for each interpolation point
(Winograd, "Arithmetic Complexity of Computations", 1980; in two dimensions and over channels Lavin and Gray, "Fast Algorithms for
Convolutional Neural Networks", 2015).  With finite points ``p_j`` and the point at infinity last:

* row ``j`` of ``B^T``: coefficients of ``prod_{i != j} (x - p_i)``; the last row: of ``prod_i (x - p_i)``;
* row ``j`` of ``G``: ``(1, p_j, ..., p_j^(t-1)) / prod_{i != j} (p_j - p_i)``; the last row ``(0, ..., 0, 1)``;
* column ``j`` of ``A^T``: ``(1, p_j, ..., p_j^(m-1))``; the last column ``(0, ..., 0, 1)``.

With six points F(4x4, 3x3), F(5x5, 2x2), F(3x3, 4x4) and F(2x2, 5x5) share ``B^T``.  They use the points 0, +-3/4, +-3/2: half the error of the usual
0, +-1, +-2, since the largest entries of all three matrices are smaller, at the same number of operations; every coefficient of ``B^T`` and ``A^T`` is
exact in float32.

The points 0, +-1 and infinity need no product but those with 1/2 and 1/4: whole numbers stay exact, and the error is that of sums.  float64 takes no others.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import TypeVar

from ..codegen.emit import Function, Value

__all__ = [
    "ALGORITHMS", "ERROR_LIMIT", "F2", "F4", "Algorithm", "Transform1d", "emit_constant", "emit_filter_1d", "emit_input_1d",
    "emit_lift_1d", "emit_output_1d", "emit_reduce_1d", "reduction_piece", "sum_error", "transform_2d",
]  # fmt: skip

T = TypeVar("T", Value, "Value | None")
Transform1d = Callable[[Function, "Algorithm", Sequence[T], bool], list[T]]
Matrix = tuple[tuple[Fraction, ...], ...]
ERROR_LIMIT = 1e-5
"""The largest :meth:`Algorithm.error_bound` at which an algorithm is used, for sums in float32."""
_UNIT = 2.0**-24  # largest relative error of one rounding to float32
_DOUBLE = 2.0**-29  # that of float64, in units of it
_SAFETY = 3.0
Components = tuple[tuple[bool, bool], ...]
"""Parts of a filter that are summed up: whether each lacks the last row, and the last column, of its taps."""
WHOLE: Components = ((False, False),)


@dataclass(frozen=True)
class Algorithm:
    """F(m x m, taps x taps) on the points 0, ``+-pairs`` and infinity."""

    m: int
    taps: int
    pairs: tuple[Fraction, ...]

    @property
    def name(self) -> str:
        return f"F{self.m}" if self.taps == 3 else f"F{self.m}_{self.taps}"

    @property
    def n(self) -> int:
        """Points of one dimension, and rows of an input tile."""
        return self.m + self.taps - 1

    @property
    def finite(self) -> tuple[Fraction, ...]:
        """0, a, -a, b, -b, ..."""
        return (Fraction(0), *(sign * p for p in self.pairs for sign in (1, -1)))

    @property
    def exact(self) -> bool:
        """Whether all entries of the matrices are sums of few powers of two, so that whole numbers stay exact."""
        return all(p == 1 for p in self.pairs)

    @cached_property
    def input_matrix(self) -> Matrix:
        """``B^T``, n x n."""
        rows = [_product([q for q in self.finite if q != p]) for p in self.finite]
        rows.append(_product(list(self.finite)))
        return tuple(tuple(row + [Fraction(0)] * (self.n - len(row))) for row in rows)

    @cached_property
    def filter_matrix(self) -> Matrix:
        """``G``, n x taps."""
        rows = [tuple(self.weight(p) * p**i for i in range(self.taps)) for p in self.finite]
        return (*rows, tuple(Fraction(int(i == self.taps - 1)) for i in range(self.taps)))

    @cached_property
    def output_matrix(self) -> Matrix:
        """``A^T``, m x n."""
        return tuple((*(p**i for p in self.finite), Fraction(int(i == self.m - 1))) for i in range(self.m))

    def weight(self, point: Fraction) -> Fraction:
        """``1 / prod (point - others)``."""
        value = Fraction(1)
        for other in self.finite:
            if other != point:
                value /= point - other
        return value

    def error_bound(self, channels: int, components: Components = WHOLE) -> float:
        """Bound on the relative L2 error of an output for operands of independent entries, reduced over ``channels`` channels in ``components``, in float32.

        Rounding errors are taken as independent, of variance ``u^2 / 3`` relative to what is rounded (Higham and Mary, 2019).  With
        unit-variance operands the entry (i, j) of V has the variance ``b_i b_j`` (squared row norms of ``B^T``), that of U ``g_i g_j``, where a component
        that lacks the last tap has a smaller ``g``.  The sum over a piece of the terms errs by ``u^2/3 * sum_c c * b_i b_j g_i g_j`` (partial sums grow),
        that of the pieces likewise, each factor by ``t u^2/3`` for about ``t`` roundings of a transform, weighed with the coefficients' magnitudes; ``A``
        passes the errors on with its squared column norms.  The true output has the variance of the number of terms.  Three times the square root of the
        ratio is the bound.
        """
        squares, spread = _row_norms(self.input_matrix)
        filters = [[float(sum(x * x for x in row[: self.taps - short])) for row in self.filter_matrix] for short in (0, 1)]
        columns = [float(sum(row[j] ** 2 for row in self.output_matrix)) / self.m for j in range(self.n)]
        piece = reduction_piece(channels, len(components))
        pieces = -(-channels // piece)
        channels, piece = channels * len(components), piece * len(components)
        total = terms = 0.0
        for short in components:
            terms += (self.taps - short[0]) * (self.taps - short[1]) / len(components)
            for i in range(self.n):
                for j in range(self.n):
                    signal = squares[i] * squares[j] * filters[short[0]][i] * filters[short[1]][j] * columns[i] * columns[j] / len(components)
                    accumulate = channels * (piece + 1) / 2 + piece * pieces * (pieces + 1) / 2
                    transforms = channels * (4 + spread[i] + spread[j])
                    output = channels * 2 * math.log2(2 * self.n)
                    total += signal * (accumulate + transforms + output)
        return _SAFETY * _UNIT / math.sqrt(3) * math.sqrt(total / (terms * channels))

    def weight_error_bound(self, parts: int, pieces: int, tiles: int) -> float:
        """The same for the weight's gradient, summed over ``parts`` of ``pieces`` of ``tiles`` tiles each.

        Transposed: the matrices of :meth:`error_bound` with other roles.  With unit-variance operands the entry (i, j) of V has the variance
        ``b_i b_j``, that of W ``a_i a_j`` (squared row norms of ``A``); ``G^T`` passes errors on with ``g_i g_j``, spread over nine taps.  Sums
        over a piece, over a part's pieces and over the parts err by a length times half of it plus one.  The true sums have the variance ``m^2``
        a tile.
        """
        per_length, constant = self._weight_errors
        length = (tiles + 1) / 2 + (pieces + 1) / 2 + (parts + 1) / 2  # of one tile's product, in its units
        return _SAFETY * _UNIT / math.sqrt(3) * math.sqrt((per_length * length + constant) / self.m**2)

    @cached_property
    def _weight_errors(self) -> tuple[float, float]:
        """Squared errors of a tile's share of a weight: for each unit of the sums' length, and of the transforms."""
        squares, spread = _row_norms(self.input_matrix)
        lifted, lift_spread = _row_norms(tuple(tuple(row[j] for row in self.output_matrix) for j in range(self.n)))
        filters = [float(sum(x * x for x in row)) for row in self.filter_matrix]
        signal = [b * a * g for b, a, g in zip(squares, lifted, filters)]
        roundings = [b + a + math.log2(2 * self.n) for b, a in zip(spread, lift_spread)]
        one, weighed = sum(signal), sum(s * t for s, t in zip(signal, roundings))
        return one * one / 9, 2 * one * weighed / 9


_SIX, _FOUR = (Fraction(3, 4), Fraction(3, 2)), (Fraction(1),)
F4 = Algorithm(4, 3, _SIX)
F2 = Algorithm(2, 3, _FOUR)
ALGORITHMS = {2: (Algorithm(5, 2, _SIX), Algorithm(3, 2, _FOUR)), 3: (F4, F2), 4: (Algorithm(3, 4, _SIX),), 5: (Algorithm(2, 5, _SIX),)}
"""Algorithms by their taps, the one with more points first."""


def sum_error(bound: float, dtype: str) -> float:
    """The bound for sums in the type that ``dtype`` is computed in, from that for float32."""
    return bound * _DOUBLE if dtype == "f64" else bound


def _row_norms(matrix: Matrix) -> tuple[list[float], list[float]]:
    """Squared norms of the rows, and the squared sums of their magnitudes relative to these."""
    squares = [float(sum(x * x for x in row)) for row in matrix]
    return squares, [float(sum(abs(x) for x in row) ** 2) / s for row, s in zip(matrix, squares)]


def reduction_piece(channels: int, components: int = 1) -> int:
    """Channels that are summed, in all their components, before the sum is added to the total (the last piece takes the rest): about 64 terms, so a
    panel stays in the first-level cache.  Several components' pieces hold at least 16 channels, a vector.  It depends on nothing else, since it decides the
    bits."""
    return channels // max(1, (channels + 32) // 64 if components == 1 else channels * components // 64)


def _product(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients of ``prod (x - root)``, constant first."""
    result = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *result]
        result = [s - root * r for s, r in zip(shifted, [*result, Fraction(0)])]
    return result


@lru_cache(maxsize=64)
def _even_product(pairs: tuple[Fraction, ...]) -> tuple[Fraction, ...]:
    """Coefficients of ``prod (y - p^2)``, constant first: the polynomials are even apart from a factor."""
    return tuple(_product([p * p for p in pairs]))


def emit_constant(f: Function, number: Fraction, type_: str) -> Value:
    """The number of the type's elements nearest to ``number``."""
    return f.constant(float(number) if "double" in type_ else struct.unpack("f", struct.pack("f", float(number)))[0], type_)


def _horner(f: Function, terms: Sequence[tuple[Fraction, Value]], fused: bool) -> Value:
    """``sum coefficient * value``; the last term has the coefficient 1."""
    *rest, (one, result) = terms
    assert one == 1
    for coefficient, value in reversed(rest):
        if coefficient == 1:
            result = f.fadd(result, value)
        elif coefficient == -1:
            result = f.fsub(result, value)
        else:
            result = f.fma(emit_constant(f, coefficient, value.type), value, result, fused)
    return result


def _scaled_pair(f: Function, even: Value, odd: Value, scale: Fraction, fused: bool) -> tuple[Value, Value]:
    """``even + scale * odd`` and ``even - scale * odd``."""
    if scale == 1:
        return f.fadd(even, odd), f.fsub(even, odd)
    plus, minus = emit_constant(f, scale, odd.type), emit_constant(f, -scale, odd.type)
    return f.fma(plus, odd, even, fused), f.fma(minus, odd, even, fused)


def emit_input_1d(f: Function, algorithm: Algorithm, d: Sequence[Value], fused: bool) -> list[Value]:
    """``B^T d``: 12 operations for F4, 4 for F2, from the even and the odd half of each pair's polynomial."""
    n = algorithm.n
    full = _even_product(algorithm.pairs)
    result = [_horner(f, [(c, d[2 * i]) for i, c in enumerate(full)], fused)]
    for p in algorithm.pairs:
        part = _even_product(tuple(q for q in algorithm.pairs if q != p))
        even = _horner(f, [(c, d[2 * i + 2]) for i, c in enumerate(part)], fused)
        odd = _horner(f, [(c, d[2 * i + 1]) for i, c in enumerate(part)], fused)
        result += _scaled_pair(f, even, odd, p, fused)
    result.append(_horner(f, [(c, d[2 * i + 1]) for i, c in enumerate(full)], fused))
    assert len(result) == n
    return result


def emit_filter_1d(f: Function, algorithm: Algorithm, g: Sequence[Value | None], fused: bool) -> list[Value | None]:
    """``G g``: 9 operations for F4.  None stands for a tap, or a result, that is zero; the first tap never is, unless all are."""
    if g[0] is None:
        return [None] * algorithm.n

    def scaled(value: Value, factor: Fraction) -> Value:
        return value if factor == 1 else f.fmul(value, emit_constant(f, factor, value.type))

    def half(p: Fraction, first: int) -> Value | None:
        terms = [(p ** (i - first), tap) for i in range(first, algorithm.taps, 2) if (tap := g[i]) is not None]
        return _horner(f, terms[::-1], fused) if terms else None

    result: list[Value | None] = [scaled(g[0], algorithm.weight(Fraction(0)))]
    for p in algorithm.pairs:
        weight = algorithm.weight(p)
        even, odd = half(p, 0), half(p, 1)
        assert even is not None
        even = scaled(even, weight)
        result += (even, even) if odd is None else _scaled_pair(f, even, odd, weight * p, fused)
    return [*result, g[-1]]


def emit_output_1d(f: Function, algorithm: Algorithm, m: Sequence[Value], fused: bool) -> list[Value]:
    """``A^T m``: sums and differences of each pair, then powers of its point; 12 operations for F4, 4 for F2."""
    sums, differences = [], []
    for i in range(len(algorithm.pairs)):
        sums.append(f.fadd(m[2 * i + 1], m[2 * i + 2]))
        differences.append(f.fsub(m[2 * i + 1], m[2 * i + 2]))
    result = []
    for i in range(algorithm.m):
        value = m[0] if i == 0 else m[-1] if i == algorithm.m - 1 else None
        for p, part in zip(algorithm.pairs, differences if i % 2 else sums):
            factor = p**i
            if value is None:
                value = part if factor == 1 else f.fmul(part, emit_constant(f, factor, part.type))
            elif factor == 1:
                value = f.fadd(value, part)
            else:
                value = f.fma(emit_constant(f, factor, part.type), part, value, fused)
        assert value is not None
        result.append(value)
    return result


def emit_lift_1d(f: Function, algorithm: Algorithm, g: Sequence[Value], fused: bool) -> list[Value]:
    """``A g``: the polynomial of m coefficients at every point; 8 operations for F4, 2 for F2."""
    result = [g[0]]
    for p in algorithm.pairs:
        even, odd = (_horner(f, [(p**i, g[first + i]) for i in range(0, algorithm.m - first, 2)][::-1], fused) for first in (0, 1))
        result += _scaled_pair(f, even, odd, p, fused)
    return [*result, g[-1]]


def emit_reduce_1d(f: Function, algorithm: Algorithm, s: Sequence[Value], fused: bool) -> list[Value]:
    """``G^T s``: the three taps from the sums at every point; 13 operations for F4."""

    def weighted(start: Value, terms: Sequence[tuple[Fraction, Value]]) -> Value:
        for factor, value in terms:
            start = f.fma(emit_constant(f, factor, value.type), value, start, fused)
        return start

    pairs = [(p, algorithm.weight(p), s[2 * i + 1], s[2 * i + 2]) for i, p in enumerate(algorithm.pairs)]
    sums = [(p, weight, f.fadd(plus, minus)) for p, weight, plus, minus in pairs]
    odd = [(weight * p, f.fsub(plus, minus)) for p, weight, plus, minus in pairs]
    zero = f.fmul(s[0], emit_constant(f, algorithm.weight(Fraction(0)), s[0].type))
    one = f.fmul(odd[0][1], emit_constant(f, odd[0][0], s[0].type))
    return [weighted(zero, [(weight, total) for _, weight, total in sums]), weighted(one, odd[1:]),
            weighted(s[-1], [(weight * p * p, total) for p, weight, total in sums])]  # fmt: skip


def transform_2d(f: Function, emit_1d: Transform1d[T], algorithm: Algorithm, columns: Sequence[Sequence[T]], fused: bool) -> list[list[T]]:
    """``T d T^T`` where ``columns[j][i]`` is ``d[i][j]``; the result is ``[row][column]``."""
    first = [emit_1d(f, algorithm, column, fused) for column in columns]
    return [emit_1d(f, algorithm, [column[i] for column in first], fused) for i in range(len(first[0]))]
