"""Few pixels: squeeze-and-excitation layers, heads, small batches of one pixel.  The weight is used once or a few times, so it is read where it lies.

Packing would read it, write it and read it again: 672 to 168 channels at one pixel took 30 us with packed panels.
"""

from __future__ import annotations

from .. import config as options
from ..codegen.load import load
from ..codegen.numeric import Numeric
from ..dispatch import Unsupported
from ..problem import DTYPES, ConvProblem
from . import target as targets
from .gemv_kernel import ARGUMENTS, GemvKernel
from .plan import CpuPlan
from .target import Target
from .tile import align
from .tiling import useful_threads

__all__ = ["GEMV", "Gemv", "choose_config"]

_MOST_PIXELS = {"forward": 32, "grad_input": 32, "grad_weight": 64}
_MOST_OF_LONG_ROWS = 64  # forward with AVX-512, twice as many input as output channels, and so few of those that panels share them out badly:
_FEW_ROWS = 192  # 672 to 160 at 7x7 takes 55 us here, 74 in packed panels
_CYCLE_BYTES = 24  # of the weight, measured where it comes from the second-level cache


def choose_config(problem: ConvProblem, target: Target, threads: int) -> tuple[int, int, float]:
    """Threads worth their start, rows (in grad_input columns) of a task, and the cycles of all threads.  No choice changes the bits."""
    numeric = Numeric(problem.dtype, target)
    pixels, rows, length = problem.n * problem.p * problem.q, problem.k, problem.c * problem.r * problem.s
    cycles = max(rows * length * numeric.memory_bytes / _CYCLE_BYTES, pixels * rows * length / numeric.lanes / 1.5)
    threads = useful_threads(threads, cycles, target)
    split, unit = (length, numeric.lanes) if problem.direction == "grad_input" else (rows, 8)
    tasks = 1 if threads == 1 else 2 * threads
    return threads, min(split, align(-(-split // tasks), unit)), cycles


class Gemv:
    """The implementation named ``gemv``, for all three directions."""

    name = "gemv"

    def plan(self, problem: ConvProblem, threads: int) -> CpuPlan:
        """A plan; raises :class:`Unsupported` where weight and pixels are no matrices in memory, or the pixels are many."""
        _check(problem)
        target = targets.target()
        threads, block, cycles = choose_config(problem, target, threads)
        numeric = Numeric(problem.dtype, target)
        memory, rows, length = DTYPES[problem.dtype], problem.k, problem.c * problem.r * problem.s
        kernel = GemvKernel(target, problem.dtype, problem.direction)
        to_input = problem.direction == "grad_input"
        scratch_pixel = align(block * numeric.compute_bytes) + 64
        scratch_size = align(2 * kernel.pixels * scratch_pixel, 4096) + 64 * 9 if to_input else 0
        tasks = -(-(length if to_input else rows) // block)
        values = {
            "tasks": tasks, "pixels": problem.n * problem.p * problem.q, "rows": rows, "length": length, "block": block, "weight_row": length * memory,
            "source_pixel": (rows if to_input else length) * memory, "other_pixel": rows * memory,
            "out_pixel": (length if to_input else rows) * memory, "has_bias": int(problem.epilogue.bias and not to_input),
            "scratch_at": 0, "scratch_size": scratch_size, "scratch_pixel": scratch_pixel, "segment": _segment(problem, target, length),
        }  # fmt: skip
        facts = {"tasks": tasks, "threads": threads, "predicted_cycles": cycles / threads}
        block_of_arguments = ARGUMENTS.pack(threads, values)
        return CpuPlan(problem, self.name, load(kernel.name, target, kernel.emit), block_of_arguments, [], threads * scratch_size, facts)


GEMV = Gemv()


def _segment(problem: ConvProblem, target: Target, length: int) -> int:
    """Columns of the weight's gradient that are computed for all rows of a task before the next ones: those of all pixels fill half of the first-level cache.
    Not measured with AVX-512, where rows are computed whole."""
    if target.vector_bytes >= 64:
        return length
    unit = 3 * Numeric(problem.dtype, target).lanes
    return max(1, target.l1 // 2 // (problem.n * problem.p * problem.q * DTYPES[problem.dtype] * unit)) * unit


def _check(problem: ConvProblem) -> None:
    if problem.g != 1:
        raise Unsupported(f"{problem.g} groups: the weight is no single matrix")
    if any(problem.padding):
        raise Unsupported("padding: the input is not the matrix")
    kernel, size = (problem.r, problem.s), (problem.h, problem.w)
    covers = kernel == size and (problem.dilation == (1, 1))
    if kernel == (1, 1) and not covers:
        if problem.stride != (1, 1):
            raise Unsupported("a stride: pixels do not follow each other")
        if problem.format == "nchw":
            raise Unsupported("nchw with several pixels an image: a pixel's channels are not neighbours")
    elif not covers:
        raise Unsupported(f"the kernel is {problem.r}x{problem.s}, neither 1x1 nor as large as the input")
    elif kernel != (1, 1) and problem.format != problem.weight_format:
        raise Unsupported("input and weight are in different formats")
    # Where results must be reproducible an image decides by itself, whatever the batch.
    images = 1 if options.current().reproducible and problem.direction != "grad_weight" else problem.n
    pixels = images * problem.p * problem.q
    long_rows = problem.direction == "forward" and problem.c >= 2 * problem.k and problem.k <= _FEW_ROWS and targets.target().vector_bytes >= 64
    most = _MOST_OF_LONG_ROWS if long_rows and problem.dtype == "f32" else _MOST_PIXELS[problem.direction]
    if pixels > most:
        raise Unsupported(f"{pixels} pixels: packing pays from {most + 1} on")
