"""Pieces of index arithmetic that the kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["inside", "padded"]


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
