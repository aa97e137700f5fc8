"""Index arithmetic of a depthwise convolution along one axis: which source entries a tile's scratch holds, and which taps read them.

Every direction reads, for output ``i`` of a phase and its tap ``j``, scratch entry ``i * step + shift + j * spacing``; scratch entry ``e``
is source index ``base + e * unit``, mapped by the padding mode.  ``forward`` and ``grad_weight`` have one phase; ``grad_input`` has one for
each residue of its output modulo the stride, whose taps are the ones that reach it, in reversed order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import gcd

import numpy as np
import numpy.typing as npt

from ..problem import ConvProblem
from .geometry import multiplications, padded_index

__all__ = ["Line", "LinePhase", "context_rows", "even_parts", "lines", "predicted_cycles"]

_MOVE_CYCLES = {"nchw": 14.0, "nhwc": 7.0}
"""Cycles that one vector of input or output costs beside its multiply-adds; fitted to 3x3 and 5x5 layers with strides 1 and 2."""


@dataclass(frozen=True)
class LinePhase:
    """Outputs ``start, start + output_step, ...`` (``count`` of them), their first scratch entry, and the kernel indices of their taps."""

    start: int
    count: int
    shift: int
    taps: tuple[int, ...]


@dataclass(frozen=True)
class Line:
    """One axis; see the module's text.  ``size`` source entries, ``outputs`` output entries."""

    size: int
    outputs: int
    mode: str
    base: int
    unit: int
    step: int
    spacing: int
    output_step: int
    phases: tuple[LinePhase, ...]

    @cached_property
    def count(self) -> int:
        """The largest count of any phase."""
        return max((phase.count for phase in self.phases), default=0)

    @cached_property
    def extent(self) -> int:
        """Scratch entries behind the first one that an output's taps reach."""
        return max((phase.shift + (len(phase.taps) - 1) * self.spacing for phase in self.phases if phase.taps), default=0)

    def length(self, tile: int) -> int:
        """Scratch entries of a tile of ``tile`` outputs of each phase."""
        return (tile - 1) * self.step + self.extent + 1

    def table(self, slack: int = 0) -> npt.NDArray[np.int64]:
        """Source index, or -1 for zero, of each scratch entry of the whole line, and ``slack`` entries of -1 behind them."""
        index = np.arange(self.length(self.count), dtype=np.int64) * self.unit + self.base
        return np.concatenate([padded_index(index, self.size, self.mode), np.full(slack, -1, np.int64)])

    def inside(self) -> tuple[int, int]:
        """The range of scratch entries of the whole line that lie in the image, where entry ``e`` is ``base + e * unit``."""
        first = max(0, -(self.base // self.unit))
        last = (self.size - 1 - self.base) // self.unit + 1
        return first, max(first, min(last, self.length(self.count)))

    def direct(self, phase: LinePhase) -> tuple[int, int]:
        """The range of a phase's outputs all of whose taps read entries of :meth:`inside`."""
        if not phase.taps:
            return 0, phase.count
        low, high = self.inside()
        first = max(0, -((phase.shift - low) // self.step))
        last = (high - 1 - (len(phase.taps) - 1) * self.spacing - phase.shift) // self.step + 1
        last = max(0, min(last, phase.count))
        return (first, last) if first < last else (0, 0)

    def tap_ranges(self) -> npt.NDArray[np.int64]:
        """``[phase, i] -> (first, last + 1)`` of the taps whose source lies in the image (all of them where the padding is not zero)."""
        ranges = np.zeros((len(self.phases), self.count, 2), np.int64)
        for number, phase in enumerate(self.phases):
            if self.mode != "zeros":
                ranges[number, :, 1] = len(phase.taps)
                continue
            entries = (np.arange(self.count)[:, None] * self.step + phase.shift + np.arange(len(phase.taps)) * self.spacing) * self.unit + self.base
            valid = (entries >= 0) & (entries < self.size)
            some = valid.any(axis=1)
            if some.any():
                ranges[number, some, 0] = valid[some].argmax(axis=1)
                ranges[number, some, 1] = len(phase.taps) - valid[some, ::-1].argmax(axis=1)
        return ranges


def lines(problem: ConvProblem, reduce_columns: bool) -> tuple[Line, Line]:
    """Rows and columns of ``problem``; ``reduce_columns``: scratch columns may skip source columns that no tap reads."""
    left, _, top, _ = problem.padding
    rows = (problem.h, problem.p, problem.r, problem.stride[0], problem.dilation[0], top)
    columns = (problem.w, problem.q, problem.s, problem.stride[1], problem.dilation[1], left)
    if problem.direction == "grad_input":
        return _backward(*rows), _backward(*columns)
    return _forward(*rows, problem.padding_mode, True), _forward(*columns, problem.padding_mode, reduce_columns)


def _forward(size: int, outputs: int, kernel: int, stride: int, dilation: int, before: int, mode: str, reduce: bool) -> Line:
    spacing = stride if kernel == 1 else dilation
    unit = gcd(stride, spacing) if reduce else 1
    return Line(size, outputs, mode, -before, unit, stride // unit, spacing // unit, 1, (LinePhase(0, outputs, 0, tuple(range(kernel))),))


def _backward(size: int, outputs: int, kernel: int, stride: int, dilation: int, before: int) -> Line:
    """Input entry ``start + i * stride`` is reached by tap ``t`` from output ``i + (start + before - t * dilation) / stride``, where whole."""
    found: list[tuple[int, tuple[int, ...], int]] = []
    for start in range(min(stride, size)):
        taps = tuple(t for t in reversed(range(kernel)) if (start + before - t * dilation) % stride == 0)
        found.append((start, taps, (start + before - taps[0] * dilation) // stride if taps else 0))
    base = min((offset for _, taps, offset in found if taps), default=0)
    phases = tuple(LinePhase(start, -(-(size - start) // stride), offset - base if taps else 0, taps) for start, taps, offset in found)
    return Line(outputs, size, "zeros", base, 1, 1, dilation // gcd(dilation, stride), stride, phases)


def even_parts(total: int, most: int) -> list[int]:
    """``total`` split into as few parts as ``most`` allows, as even as can be, the larger ones first."""
    parts = -(-total // most)
    small, larger = divmod(total, parts)
    return [small + 1] * larger + [small] * (parts - larger)


def context_rows(rows: Line) -> int:
    """Source rows that a ring holds before an output row's own new ones."""
    return max(0, rows.extent + 1 - rows.step)


def predicted_cycles(problem: ConvProblem, lanes: int, threads: int) -> float:
    """Cycles of one of ``threads`` threads: half a cycle for a vector's multiply-add, and what it takes to move inputs and outputs."""
    moved = problem.n * (problem.c * problem.h * problem.w + problem.k * problem.p * problem.q)
    return (multiplications(problem) / 2 + moved * _MOVE_CYCLES[problem.format]) / lanes / threads
