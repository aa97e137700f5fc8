"""1x1 convolution with stride 1 and no padding: pixels have no neighbours, so rows (and in nhwc images too) are joined into one long row.

Joined, no lane and no register is wasted at the ends of rows; in nhwc the micro-kernels read the source in place.
"""

from __future__ import annotations

from dataclasses import replace

from ..codegen.numeric import Numeric
from ..dispatch import Unsupported
from ..problem import ConvProblem
from . import target as targets
from .direct import build_plan, choose_config
from .direct_weight import build_plan as build_weight_plan
from .direct_weight import choose_config as choose_weight_config
from .plan import CpuPlan
from .tiling import useful_threads

__all__ = ["POINTWISE", "Pointwise", "joined"]


def joined(problem: ConvProblem) -> ConvProblem:
    """The same multiplications as a problem of one row (of all images in nhwc, where they follow each other in memory)."""
    if problem.format == "nhwc":
        return replace(problem, n=1, h=1, w=problem.n * problem.h * problem.w, stride=(1, 1), dilation=(1, 1))
    return replace(problem, h=1, w=problem.h * problem.w, stride=(1, 1), dilation=(1, 1))


class Pointwise:
    """The implementation named ``pointwise``, for all three directions."""

    name = "pointwise"

    def plan(self, problem: ConvProblem, threads: int) -> CpuPlan:
        """A plan; raises :class:`Unsupported` for another kernel size, a stride, or padding."""
        if (problem.r, problem.s) != (1, 1):
            raise Unsupported(f"the kernel is {problem.r}x{problem.s}, not 1x1")
        if problem.stride != (1, 1) or problem.padding != (0, 0, 0, 0):
            raise Unsupported("a stride or padding: pixels cannot be joined into one row")
        target = targets.target()
        row = joined(problem)
        if problem.direction == "grad_weight":
            found = build_weight_plan(row, target, threads, choose_weight_config(row, target), self.name)
        else:
            config = choose_config(row, target, threads)
            if (useful := useful_threads(threads, config.cycles)) < threads:
                threads, config = useful, choose_config(row, target, useful)
            in_place = config.layout == "inner" and not Numeric(problem.dtype, target).converts
            found = build_plan(row, target, threads, replace(config, packed=not in_place), self.name)
        found.problem = problem
        return found


POINTWISE = Pointwise()
