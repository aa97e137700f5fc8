"""The truth of a result, and the bound that a result is held to before it may be timed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..problem import ConvProblem
from .contenders import stock_call
from .operands import Operands

__all__ = ["LIMITS", "REFERENCE_SECONDS", "Truth", "bound_of", "error_of", "truth_of"]

LIMITS = {"f32": 1e-5, "f64": 1e-13, "bf16": 2**-7, "f16": 2**-10}
"""Largest relative error of a result, by element type: float32 leaves room for Winograd, the 16-bit types round once when they are stored."""

REFERENCE_SECONDS = 4.0
"""A float64 reference estimated to take longer is made of some channels only."""

_LEAST_CHANNELS = 2  # the first and the last


@dataclass(frozen=True)
class Truth:
    """What results are compared with: float64 in ``shapes``, the whole or the ``channels`` (indices along ``axis``) of it that ``tensors`` have."""

    tensors: tuple[torch.Tensor, ...]
    shapes: tuple[tuple[int, ...], ...]
    axis: int = 0
    channels: torch.Tensor | None = None

    @property
    def source(self) -> str:
        """In words: ``float64``, or ``float64 (some channels)``."""
        return "float64" if self.channels is None else "float64 (some channels)"


def truth_of(operands: Operands, longest: float = REFERENCE_SECONDS) -> Truth:
    """The result in float64 of operands that are first rounded to the problem's type; of some of its channels where all take more than ``longest`` seconds."""
    problem = operands.problem
    # Stock float64 on one core: about 2 GFLOP/s for depthwise and grouped layers, 20 for dense ones.
    estimate = problem.flops() / (2e9 if problem.g > 1 else 2e10)
    channels = None
    if estimate > longest:
        operands, channels = _some_channels(operands, longest / estimate)
    exact = stock_call(operands.astype(torch.float64))()
    shapes = (problem.result_shape, (problem.k,))[: len(exact)]
    return Truth(exact, shapes, 0 if problem.direction == "grad_weight" else 1, channels)


def _some_channels(operands: Operands, share: float) -> tuple[Operands, torch.Tensor]:
    """The operands of about that share of the result's channels, the first and the last among them, and which these are.

    Whole groups; of one group the channels that the direction produces (the outer ones of a weight).  Their values are those in the whole result.
    """
    problem = operands.problem
    to_input = problem.direction == "grad_input"
    x, weight, bias, gradient = operands.x, operands.weight, operands.bias, operands.gradient
    if problem.g > 1:
        chosen = _spread(problem.g, share)
        c, k = ((chosen[:, None] * width + torch.arange(width)).flatten() for width in (problem.cg, problem.kg))
        smaller = replace(problem, c=len(c), k=len(k), g=len(chosen))
        x, weight = x[:, c], weight[k]
    else:
        c = k = _spread(problem.c if to_input else problem.k, share)
        smaller = replace(problem, c=len(c)) if to_input else replace(problem, k=len(k))
        x, weight = (x[:, c], weight[:, c]) if to_input else (x, weight[k])
    if problem.g > 1 or not to_input:
        bias, gradient = None if bias is None else bias[k], gradient[:, k]
    return Operands(smaller, x, weight, bias, gradient), c if to_input else k


def _spread(count: int, share: float) -> torch.Tensor:
    """Indices of about that share of ``count``, evenly spread from the first to the last."""
    return torch.linspace(0, count - 1, min(count, max(_LEAST_CHANNELS, int(count * share)))).round().long().unique()


def error_of(result: Sequence[torch.Tensor], truth: Truth) -> float:
    """Relative error, the larger one of L2 over L2 and maximum over maximum, worst tensor; infinite for another shape or a NaN anywhere."""
    worst = 0.0
    for whole, exact, shape in zip(result, truth.tensors, truth.shapes):
        if tuple(whole.shape) != shape or not whole.isfinite().all():
            return math.inf
        if exact.numel() == 0:
            continue
        ours = whole.detach() if truth.channels is None else whole.detach().index_select(truth.axis, truth.channels)
        difference = ours.double() - exact
        for norm in (2, math.inf):
            size = float(torch.linalg.vector_norm(exact, norm))
            distance = float(torch.linalg.vector_norm(difference, norm))
            error = distance / size if size > 0 else distance
            worst = max(worst, error) if math.isfinite(error) else math.inf
    return worst if len(result) == len(truth.tensors) else math.inf


def bound_of(problem: ConvProblem, stock_error: float) -> float:
    """The largest error accepted: the type's limit, or twice stock's own error where that is larger."""
    return max(LIMITS[problem.dtype], 2 * stock_error if math.isfinite(stock_error) else 0.0)
