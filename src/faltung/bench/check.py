"""The truth of a result, and the bound that a result is held to before it may be timed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..problem import ConvProblem
from .contenders import stock_call
from .operands import Operands

__all__ = ["LIMITS", "REFERENCE_SECONDS", "Truth", "bound_of", "error_of", "truth_of"]

LIMITS = {"f32": 1e-5, "f64": 1e-13, "bf16": 2**-7, "f16": 2**-10}
"""Largest relative error of a result, by element type: float32 leaves room for Winograd, the 16-bit types round once when they are stored."""

REFERENCE_SECONDS = 4.0
"""A float64 reference estimated to take longer is replaced by stock PyTorch in float32 (float64 for float64)."""


@dataclass(frozen=True)
class Truth:
    """What results are compared with.  ``source``: ``float64``, or ``stock`` where float64 would take too long."""

    tensors: tuple[torch.Tensor, ...]
    source: str


def truth_of(operands: Operands, longest: float = REFERENCE_SECONDS) -> Truth:
    """The result in float64 of operands that are first rounded to the problem's type; by stock PyTorch where that takes more than ``longest`` seconds."""
    problem = operands.problem
    # Stock float64 on one core: about 2 GFLOP/s for depthwise and grouped layers, 20 for dense ones.
    estimate = problem.flops() / (2e9 if problem.g > 1 else 2e10)
    if estimate <= longest:
        return Truth(stock_call(operands.astype(torch.float64))(), "float64")
    wide = torch.float64 if problem.dtype == "f64" else torch.float32
    return Truth(tuple(t.double() for t in stock_call(operands.astype(wide))()), "stock")


def error_of(result: Sequence[torch.Tensor], truth: Truth) -> float:
    """Relative error, the larger one of L2 over L2 and maximum over maximum, worst tensor; infinite for another shape or a NaN."""
    worst = 0.0
    for ours, exact in zip(result, truth.tensors):
        if ours.shape != exact.shape:
            return math.inf
        if exact.numel() == 0:
            continue
        difference = ours.detach().double() - exact
        for norm in (2, math.inf):
            size = float(torch.linalg.vector_norm(exact, norm))
            distance = float(torch.linalg.vector_norm(difference, norm))
            error = distance / size if size > 0 else distance
            worst = max(worst, error) if math.isfinite(error) else math.inf
    return worst if len(result) == len(truth.tensors) else math.inf


def bound_of(problem: ConvProblem, stock_error: float) -> float:
    """The largest error accepted: the type's limit, or twice stock's own error where that is larger."""
    return max(LIMITS[problem.dtype], 2 * stock_error if math.isfinite(stock_error) else 0.0)
