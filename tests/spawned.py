"""What a spawned process of test_threads calls."""

from __future__ import annotations

from torch import Tensor

import faltung


def convolve(operands: tuple[Tensor, Tensor]) -> Tensor:
    return faltung.conv2d(*operands)
