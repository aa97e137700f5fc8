"""Numbers as sums of bfloat16 *parts*, so that matrix tiles of bfloat16 multiply float32 and float16.

A float32 has 24 significant bits, a bfloat16 has 8: rounded to bfloat16, what is left over rounded again, and so on, three parts make the number exactly
(two for float16's 11 bits).  Of the nine products of two such numbers three are below the last place of a float32 product (2**-24) and are left out:
the second part times the third, and the third times the third.

===== ===== ======== ==========================================================================
type  parts products left out, at most, relative to the product of the numbers
===== ===== ======== ==========================================================================
bf16  1     1        nothing
f16   2     4        nothing
f32   3     6        2 * 2**-8 * 2**-16 + 2**-32, about 2**-23; of either sign, so far less in a sum
===== ===== ======== ==========================================================================

The small products are summed first, the products of the first parts last: roundings of the former are then relative to sums 2**-8 as large, and the
error is that of summing float32 products.

Numbers that are not finite, or round to infinity, have parts whose products are NaN where they should not be: whoever multiplies parts looks for
results that are not finite and computes them in another way.  Parts below 2**-126 are lost: numbers below 2**-110 keep 16 or 8 bits.

Source: G. Henry, P. T. P. Tang, A. Heinecke, *Leveraging the bfloat16 Artificial Intelligence Datatype for Higher-Precision Computations*, ARITH 2019.
"""

from __future__ import annotations

from ..codegen.emit import Function, Value, vector_type
from . import bfloat

__all__ = ["BY_NAME_ONLY", "PARTS", "PRODUCTS", "interleave", "split"]

PARTS = {"bf16": 1, "f16": 2, "f32": 3}
"""bfloat16 parts of a number, by type."""

PRODUCTS: dict[int, tuple[tuple[tuple[int, int], ...], ...]] = {
    1: (((0, 0),),),
    2: (((0, 1), (1, 1), (1, 0)), ((0, 0),)),
    3: (((0, 1), (0, 2), (1, 1), (1, 0), (2, 0)), ((0, 0),)),
}
"""By number of parts: passes over the whole reduction, each the products (left part, right part) that it adds, in an order that changes few operands."""


BY_NAME_ONLY = "products of several parts are not faster on every machine: ask by name, or for autotune"
"""Why a type of several parts is refused where the algorithm is not asked for."""


def split(f: Function, value: Value, lanes: int, parts: int) -> list[Value]:
    """The bits of the ``parts`` of ``lanes`` float32, as vectors of i16."""
    wide, single = vector_type("i32", lanes), vector_type("float", lanes)
    found: list[Value] = []
    for index in range(parts):
        bits = bfloat.nearest(f, value, lanes)
        found.append(bits)
        if index + 1 < parts:
            back = f.cast("bitcast", f.define(wide, f"shl {f.cast('zext', bits, wide)}, {'16' if lanes == 1 else 'splat (i32 16)'}"), single)
            value = f.fsub(value, back)
    return found


def interleave(f: Function, first: Value, second: Value, lanes: int) -> Value:
    """Pairs of 16-bit halves: ``lanes`` of i32, ``first`` the low halves."""
    mixed = f.shuffle(first, second, [lane // 2 + (lane % 2) * lanes for lane in range(2 * lanes)])
    return f.cast("bitcast", mixed, vector_type("i32", lanes))
