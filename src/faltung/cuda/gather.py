"""Index arithmetic of a convolution along one axis, as a handful of integers that a kernel takes.

Every direction that writes an image gathers: output index ``start + i * step`` of a phase reads, for its tap ``j``, source index
``i * source_step + offset + j * shift`` with the weight of kernel index ``first_tap + j * tap_step``.  ``forward`` has one phase.  ``grad_input`` has one
for every residue of the stride, with the taps that reach it: they form an arithmetic progression, so no table is needed and no tap is wasted.
This module imports no tensor library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..problem import ConvProblem

__all__ = ["MODES", "AxisPhase", "Phase", "phases"]

MODES = {"zeros": 0, "reflect": 1, "replicate": 2, "circular": 3}
"""The padding mode as a kernel's constant."""


@dataclass(frozen=True)
class AxisPhase:
    """Outputs ``start, start + step, ...`` (``count`` of them) of one axis and the ``taps`` that reach them."""

    start: int
    step: int
    count: int
    taps: int
    first_tap: int
    tap_step: int
    source_step: int
    offset: int
    shift: int

    def source(self, i: int, j: int) -> int:
        """The source index that output ``i`` of the phase reads for tap ``j`` (possibly outside of the image)."""
        return i * self.source_step + self.offset + j * self.shift

    @property
    def spread(self) -> int:
        """Source indices between the first and the last tap."""
        return (self.taps - 1) * abs(self.shift)


@dataclass(frozen=True)
class Phase:
    """One phase of both axes."""

    rows: AxisPhase
    columns: AxisPhase

    @property
    def pixels(self) -> int:
        """Outputs of the phase in one image."""
        return self.rows.count * self.columns.count

    @property
    def taps(self) -> int:
        return self.rows.taps * self.columns.taps


def phases(problem: ConvProblem) -> tuple[Phase, ...]:
    """The phases of a forward or grad_input problem; those of ``grad_weight`` are the forward's, since it gathers from x as well.

    ``grad_input`` stands for zero padding: in another mode it is asked for the gradient of the padded input.
    """
    left, _, top, _ = problem.padding
    rows = (problem.h, problem.p, problem.r, problem.stride[0], problem.dilation[0], top)
    columns = (problem.w, problem.q, problem.s, problem.stride[1], problem.dilation[1], left)
    if problem.direction == "grad_input":
        return tuple(Phase(a, b) for a in _grad_input_axis(*rows) for b in _grad_input_axis(*columns))
    return (Phase(_forward_axis(*rows), _forward_axis(*columns)),)


def _forward_axis(size: int, outputs: int, kernel: int, stride: int, dilation: int, before: int) -> AxisPhase:  # noqa: ARG001
    return AxisPhase(0, 1, outputs, kernel, 0, 1, stride, -before, dilation)


def _grad_input_axis(size: int, outputs: int, kernel: int, stride: int, dilation: int, before: int) -> list[AxisPhase]:  # noqa: ARG001
    """Input index ``h = start + i * stride`` is reached by tap ``t`` from output ``(h + before - t * dilation) / stride``, where whole."""
    tap_step = stride // math.gcd(stride, dilation)
    found = []
    for start in range(min(stride, size)):
        first = next((t for t in range(min(kernel, tap_step)) if (start + before - t * dilation) % stride == 0), None)
        taps = 0 if first is None else (kernel - 1 - first) // tap_step + 1
        offset = 0 if first is None else (start + before - first * dilation) // stride
        count = (size - start + stride - 1) // stride
        found.append(AxisPhase(start, stride, count, taps, first or 0, tap_step, 1, offset, -(tap_step * dilation // stride)))
    return found
