"""1x1 convolution with stride 1 and no padding: pixels have no neighbours, so rows (and in nhwc images too) are joined into one long row.

Joined, no lane and no register is wasted at the ends of rows; in nhwc the micro-kernels read the source in place.
"""

from __future__ import annotations

from dataclasses import replace

from ..codegen.numeric import Numeric
from ..dispatch import Unsupported
from ..problem import ConvProblem
from . import target as targets
from .direct import DirectConfig, build_plan, choose_config, offered_configs
from .direct_weight import build_plan as build_weight_plan
from .direct_weight import choose_config as choose_weight_config
from .plan import CpuPlan
from .tile import meets_itself
from .tiling import useful_threads

__all__ = ["POINTWISE", "Pointwise", "joined"]


def joined(problem: ConvProblem) -> ConvProblem:
    """The same multiplications as a problem of one row (of all images in nhwc, where they follow each other in memory)."""
    if problem.direction == "grad_weight" and Numeric(problem.dtype, targets.target()).pairs:
        return _halved(problem)
    if problem.format == "nhwc":
        return replace(problem, n=1, h=1, w=problem.n * problem.h * problem.w, stride=(1, 1), dilation=(1, 1))
    return replace(problem, h=1, w=problem.h * problem.w, stride=(1, 1), dilation=(1, 1))


def _halved(problem: ConvProblem) -> ConvProblem:
    """Joined into two rows, so that each pixel of the one has its partner in the other (see :mod:`faltung.cpu.bfloat`)."""
    plain = replace(problem, stride=(1, 1), dilation=(1, 1))
    image, pixels = problem.h * problem.w, problem.n * problem.h * problem.w
    if problem.format == "nhwc" and pixels % 2 == 0:
        return replace(plain, n=1, h=2, w=pixels // 2)
    if problem.n == 1:
        return replace(plain, h=2, w=image // 2) if image % 2 == 0 else plain
    return replace(plain, h=1, w=image)


class Pointwise:
    """The implementation named ``pointwise``, for all three directions."""

    name = "pointwise"

    def configs(self, problem: ConvProblem, threads: int) -> list[DirectConfig]:
        """What the tuner may choose from, beside the predicted choice."""
        return [] if problem.direction == "grad_weight" else offered_configs(joined(problem), targets.target(), threads)

    def plan(self, problem: ConvProblem, threads: int, config: DirectConfig | None = None) -> CpuPlan:
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
            if config is None:
                # In nhwc pixels would be transposed for one use: 64 to 24 channels at 56x56 took 1.4 times as long so, 64 to 2 at 256x256 twice as long.
                orientation = "channels" if problem.format == "nhwc" else None
                config = choose_config(row, target, threads, orientation)
                if (useful := useful_threads(threads, config.cycles, target)) < threads:
                    threads, config = useful, choose_config(row, target, useful, orientation)
            numeric = Numeric(problem.dtype, target)
            channels = problem.cg if problem.direction == "forward" else problem.kg
            in_place = config.layout == "inner" and (channels % 2 == 0 if numeric.pairs else not numeric.converts)
            in_place = in_place and not meets_itself(problem.g * channels * numeric.memory_bytes)
            if config.layout == "outer" and config.orientation == "channels" and target.isa == "avx2" and not numeric.converts:
                # A block of AVX2 is 6 or 4 pixels: read row by row of the image, a piece's rows and its panel do not fit 32 KiB, and the micro-kernel runs
                # at 0.6 to 0.8 of its speed.
                config = replace(config, layout="blocked")
            chosen = replace(config, packed=not in_place)
            found = build_plan(row, target, threads, chosen, self.name)
            if found.when_frozen is not None:
                found.when_frozen = lambda: self._kept(problem, build_plan(row, target, threads, chosen, self.name, kept=True))
        return self._kept(problem, found)

    @staticmethod
    def _kept(problem: ConvProblem, found: CpuPlan) -> CpuPlan:
        """A plan of the joined row as one of the problem."""
        found.problem = problem
        return found


POINTWISE = Pointwise()
