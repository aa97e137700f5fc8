"""Pieces of index arithmetic that the kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["divider", "inside", "padded", "quotient"]


def divider(divisor: int) -> tuple[int, int]:
    """The multiplier and the shift by which :func:`quotient` divides by ``divisor``, both as signed integers of 32 bits.

    Granlund and Montgomery, Division by invariant integers using multiplication (PLDI 1994), figure 4.1.
    """
    shift = (divisor - 1).bit_length()
    multiplier = (1 << 32) * ((1 << shift) - divisor) // divisor + 1
    return multiplier - (multiplier >> 31 << 32), shift


@triton.jit
def quotient(index, multiplier, shift):
    """``index`` over the divisor that ``multiplier`` and ``shift`` stand for, for 0 <= index < 2^31: three instructions where a division takes twenty."""
    unsigned = index.to(tl.uint32)
    high = tl.umulhi(unsigned, tl.cast(multiplier, tl.uint32))
    return ((high + unsigned) >> tl.cast(shift, tl.uint32)).to(tl.int32)


@triton.jit
def padded(index, size, MODE: tl.constexpr):
    """The index of the image that position ``index`` of the padded image reads; in mode 0 (zeros) itself, possibly outside.

    At most one reflection or one turn is needed: PyTorch allows no more padding than that.
    """
    if MODE == 1:
        index = tl.abs(index)
        index = tl.where(index >= size, 2 * (size - 1) - index, index)
    elif MODE == 2:
        index = tl.minimum(tl.maximum(index, 0), size - 1)
    elif MODE == 3:
        index = tl.where(index < 0, index + size, index)
        index = tl.where(index >= size, index - size, index)
    return index


@triton.jit
def inside(index, size):
    """Whether ``0 <= index < size``."""
    return (index >= 0) & (index < size)
