"""Convolution as a 1x1 convolution of columns (im2col, and col2im for grad_input), a few images at a time.

Multiplies exactly what meets, in long rows.  The other algorithms share the pixels under neighbouring outputs, and pay for it where there is little to share:
kernels that do not overlap (patch embeddings), few input channels, and grad_input of kernels nearly as large as the image, where almost all outputs that
they gather lie in the padding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import config as options
from .. import dispatch
from ..codegen.load import load
from ..codegen.numeric import Numeric
from ..dispatch import Unsupported
from ..problem import DTYPES, ConvProblem
from . import target as targets
from .columns_kernel import ARGUMENTS, SPAN, ColumnsKernel
from .geometry import padded_index
from .lay import AS_IT_IS, Laid, lay
from .plan import CpuPlan
from .target import Target
from .tile import PAGE, align, pitches
from .workspace import BETWEEN, KEPT_BYTES, workspace

__all__ = ["COLUMNS", "Columns", "ColumnsPlan"]

_BUFFER_BYTES = 4 << 20  # of a matrix, where an image's is no larger
_LONG_SUMS = 6  # rows and columns of a kernel from which on each of its rows is summed by itself
_FEW_PIXELS = 64  # of an image in nchw: rows of the matrix product would be short (3x300 kernels, 48 pixels: 0.28 ms; 0.18 where each pixel is a row)

# Where it is chosen (docs/engineering/cpu-columns.md).
_LEAST_WASTE = 2.5  # grad_input: inputs for each output, of those that a phase of the stride leaves: what the other algorithms multiply with zeros
_LEAST_OUTPUTS = 8  # channels: with fewer, writing the matrix takes longer than its products
_FEW_CHANNELS = 4  # of kernels that do not overlap
_LEAST_TAPS = 16
_LEAST_TERMS = 256
_MOST_OVERLAP = 3.0  # grad_input of one channel: kernels on each input (1x400 at stride 160, for sound: 1.1 to 1.5 times as fast)

_Table = npt.NDArray[np.int64]


class ColumnsPlan:
    """Lays out a few images' columns and multiplies, or multiplies and adds the columns up; of ``parts`` the second is for the last images."""

    def __init__(self, problem: ConvProblem, images: int, parts: list[_Part]) -> None:
        self.problem, self.implementation = problem, "columns"
        self._images, self._parts = images, parts
        memory = DTYPES[problem.dtype]
        self._x_image, self._y_image = problem.c * problem.h * problem.w * memory, problem.k * problem.p * problem.q * memory
        self._poison = options.current().poison
        self.launch: Callable[..., None] = {"forward": self._forward, "grad_input": self._grad_input, "grad_weight": self._grad_weight}[problem.direction]

    def _each(self) -> Iterator[tuple[int, _Part]]:
        for start in range(0, self.problem.n, self._images):
            yield start, self._parts[start + self._images > self.problem.n]

    def _forward(self, x: int, weight: int, bias: int, y: int) -> None:
        matrix, keep = workspace(self._parts[0].bytes, self._poison, BETWEEN)
        for start, part in self._each():
            part.multiply.launch(part.moved(x + start * self._x_image, matrix), weight, bias, y + start * self._y_image)
        del keep

    def _grad_input(self, gy: int, weight: int, _: int, gx: int) -> None:
        matrix, keep = workspace(self._parts[0].bytes, self._poison, BETWEEN)
        weight = self._parts[0].weight.laid(weight, matrix)
        for start, part in self._each():
            result = gx + start * self._x_image
            part.multiply.launch(part.gy.laid(gy + start * self._y_image, matrix), weight, 0, matrix if part.move else result)
            if part.move and part.image.plan:
                part.move.launch(matrix, 0, 0, matrix + part.image.at)
                part.image.plan.launch(matrix + part.image.at, 0, 0, result)
            elif part.move:
                part.move.launch(matrix, 0, 0, result)
        del keep

    def _grad_weight(self, x: int, gy: int, gbias: int, gw: int) -> None:
        matrix, keep = workspace(self._parts[0].bytes, self._poison, BETWEEN)
        self._parts[0].multiply.launch(self._parts[0].moved(x, matrix), gy, gbias, gw)
        del keep

    def describe(self) -> dict[str, Any]:
        facts = self._parts[0].multiply.describe()
        return {**facts, "multiplied_by": self._parts[0].multiply.implementation, "images_at_once": self._images, "buffer_bytes": self._parts[0].bytes}


@dataclass(frozen=True)
class _Part:
    """For some images at once: the plan that moves between image and matrix (none where one is the other), the plan that multiplies, the buffer's bytes, and
    for grad_input the product's operands and, where its result is in nhwc, the image in nhwc and the plan that turns that into the problem's."""

    move: CpuPlan | None
    multiply: dispatch.Plan
    bytes: int
    gy: Laid = AS_IT_IS
    weight: Laid = AS_IT_IS
    image: Laid = AS_IT_IS

    def moved(self, x: int, matrix: int) -> int:
        """The address of the columns of the images at ``x``."""
        if self.move is None:
            return x
        self.move.launch(x, 0, 0, matrix)
        return matrix


class Columns:
    """The implementation named ``columns``."""

    name = "columns"

    def plan(self, problem: ConvProblem, threads: int) -> ColumnsPlan:
        """A plan for any direction; raises :class:`Unsupported` for groups, for matrices that are too large, and where it is predicted to be slower."""
        if problem.g != 1:
            raise Unsupported("several groups: their columns are short")
        if problem.direction == "grad_input" and problem.padding_mode != "zeros":
            raise Unsupported("grad_input in this padding mode is folded's")
        if (problem.r, problem.s) == (1, 1):
            raise Unsupported("a 1x1 kernel: the image is its columns already")
        if problem.empty:
            raise Unsupported("nothing to compute")
        image_bytes = math.prod(_matrix(problem).input_shape[1:]) * DTYPES[_matrix(problem).dtype]
        all_images = problem.direction == "grad_weight" or _whole(problem)
        images = problem.n if all_images else max(1, min(problem.n, _BUFFER_BYTES // image_bytes))
        if images * image_bytes > KEPT_BYTES and not _whole(problem):
            raise Unsupported(f"a matrix of {images * image_bytes >> 20} MiB, more than {KEPT_BYTES >> 20}")
        named = options.current().implementation == self.name
        if not named:
            _refuse(problem, targets.target())
        with options.override(implementation=None if named else options.current().implementation):
            parts = [_part(replace(problem, n=n), threads) for n in dict.fromkeys((images, problem.n % images or images))]
        return ColumnsPlan(problem, images, parts if len(parts) > 1 else parts * 2)


COLUMNS = Columns()


def _refuse(problem: ConvProblem, target: Target) -> None:
    """Raises :class:`Unsupported` where another implementation was measured to be faster."""
    if problem.p * problem.q == 1 and (problem.r, problem.s) == (problem.h, problem.w):
        return
    gradient = problem.direction == "grad_input"
    if gradient and problem.k >= _LEAST_OUTPUTS:
        waste = problem.h * problem.w / (problem.p * problem.q * math.prod(problem.stride))
        # 16-bit products by matrix instructions are that much faster than those of float32
        faster = (8 if target.matrix_tiles else 2 if target.bfloat16_dot else 1) if problem.dtype == "bf16" else 1
        if waste >= _LEAST_WASTE * faster:
            return
    overlap = problem.r * problem.s / math.prod(problem.stride)
    if gradient and problem.c == 1 and problem.r * problem.s >= _LEAST_TERMS and overlap <= _MOST_OVERLAP:
        return
    if problem.stride[0] < problem.r or problem.stride[1] < problem.s or problem.c > _FEW_CHANNELS or problem.r * problem.s < _LEAST_TAPS:
        raise Unsupported("kernels overlap, or have many channels or few taps: pixels are shared, and little is multiplied with zeros")
    if not gradient and problem.c * problem.r * problem.s < _LEAST_TERMS:
        raise Unsupported(f"{problem.c * problem.r * problem.s} terms: fewer than {_LEAST_TERMS} were measured to be slower")
    if problem.direction == "forward" and problem.format == "nhwc":
        raise Unsupported("nhwc: pixels that follow each other are packed as fast")


def _matrix(problem: ConvProblem) -> ConvProblem:
    """The 1x1 convolution of the columns.  Those of a gradient are summed after it, so 16-bit types are computed in float32."""
    wide = _sums(problem) and problem.dtype in ("bf16", "f16")
    return replace(
        problem, c=problem.c * problem.r * problem.s, h=problem.p, w=problem.q, r=1, s=1, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1),
        padding_mode="zeros", weight_format="nchw", dtype="f32" if wide else problem.dtype,
        # of one pixel an image both are the same, and in nhwc images are pixels of one row
        format="nhwc" if problem.p * problem.q == 1 or _turned(problem) else problem.format,
    )  # fmt: skip


def _whole(problem: ConvProblem) -> bool:
    """Whether the kernel is as large as the image, whose memory then is its one column."""
    same = problem.format == problem.weight_format or problem.c == 1
    return (problem.r, problem.s) == (problem.h, problem.w) and not any(problem.padding) and problem.dilation == (1, 1) and same


def _sums(problem: ConvProblem) -> bool:
    """Whether products are added up after the matrix product."""
    return problem.direction == "grad_input" and not _whole(problem)


def _turned(problem: ConvProblem) -> bool:
    """Whether a gradient in nchw is computed in nhwc."""
    return _sums(problem) and problem.format == "nchw" and 1 < problem.p * problem.q < _FEW_PIXELS


def _part(problem: ConvProblem, threads: int) -> _Part:
    matrix = _matrix(problem)
    multiply = dispatch.plan(matrix, "cpu", threads)
    if _whole(problem):
        return _Part(None, multiply, 0)
    wide, turned, size = matrix.dtype != problem.dtype, _turned(problem), DTYPES[matrix.dtype]
    # Of fewer images, at the end, all but the weight lie further ahead, and the image may come to lie on the weight, whose last use is the product before it.
    at = list(itertools.accumulate(align(math.prod(shape) * size, PAGE) for shape in (matrix.input_shape, problem.output_shape, problem.weight_shape)))
    gy = weight = image = AS_IT_IS
    end, moved = at[0], problem
    if wide or turned:
        gy, end = Laid(lay(problem, problem.n, problem.k, problem.p * problem.q, threads, turned), at[0]), at[1]
    if turned and problem.c > 1:
        image = Laid(lay(problem, problem.n, problem.h * problem.w, problem.c, threads, True, back=True), at[2])
        end = at[2] + math.prod(problem.input_shape) * size
        moved = replace(problem, dtype=matrix.dtype)
    if turned:
        moved = replace(moved, format="nhwc", weight_format="nhwc")
    if wide or (turned and problem.weight_format == "nchw" and problem.c > 1):
        by_channels = turned and problem.weight_format == "nchw"
        taps = problem.r * problem.s
        shape = (problem.k, problem.c, taps) if by_channels else (1, problem.k, problem.c * taps)
        weight, end = Laid(lay(problem, *shape, threads, by_channels), at[1]), max(end, at[2])
    return _Part(_move(moved, threads), multiply, end, gy, weight, image)


def _move(problem: ConvProblem, threads: int) -> CpuPlan:
    """The plan that lays out the columns, or adds them up."""
    target, scatter, nchw = targets.target(), problem.direction == "grad_input", problem.format == "nchw"
    numeric = Numeric(problem.dtype, target)
    x_image, x_channel, x_row, x_column = pitches(problem, True)
    column = x_column // numeric.memory_bytes * numeric.compute_bytes if scatter else x_column
    matrix = _matrix(problem)
    runs = problem.weight_format == "nhwc" or problem.c == 1
    by_channels = problem.weight_format == "nhwc"
    kernel = ColumnsKernel(target, problem.dtype, problem.format, scatter, nchw and problem.stride[1] == 1, runs and not nchw)
    rows, columns, spans, run = _tables(problem, x_row, column, scatter)
    tasks = problem.n * (problem.h if scatter else problem.r if nchw else problem.p) * (problem.c if nchw else 1)
    row_bytes = align((problem.w * (1 if nchw else problem.c)) * numeric.compute_bytes + 64)
    part_at = row_bytes if scatter and numeric.converts else 0
    scratch = part_at + (row_bytes if scatter and min(problem.r, problem.s) >= _LONG_SUMS else 0)
    values = {
        "tasks": tasks, "channels": problem.c, "height": problem.h, "width": problem.w, "r": problem.r, "s": problem.s, "p": problem.p, "q": problem.q,
        "matrix_image": math.prod(matrix.input_shape[1:]) * DTYPES[matrix.dtype], "image_bytes": x_image, "image_channel": x_channel, "image_row": x_row,
        "term_channel": 1 if by_channels else problem.r * problem.s, "term_row": problem.s * (problem.c if by_channels else 1),
        "term_column": problem.c if by_channels else 1, "row_table": rows.ctypes.data, "column_table": columns.ctypes.data,
        "span_table": spans.ctypes.data, "column_step": problem.stride[1] * column, "run_first": run[0], "run_last": run[1], "part_at": part_at,
        "scratch_size": scratch,
    }  # fmt: skip
    block = ARGUMENTS.pack(threads, values)
    return CpuPlan(problem, "columns", load(kernel.name, target, kernel.emit), block, [rows, columns, spans], threads * scratch, {})


def _tables(problem: ConvProblem, row: int, column: int, scatter: bool) -> tuple[_Table, _Table, _Table, tuple[int, int]]:
    """Row, column and span tables, see :data:`faltung.cpu.columns_kernel.ARGUMENTS`, and the run of output columns whose taps all lie inside the image."""
    left, _, top, _ = problem.padding
    taps = np.arange(problem.r)[:, None], np.arange(problem.s)[:, None]
    if scatter:
        reached = np.arange(problem.h) + top - taps[0] * problem.dilation[0]
        p = reached // problem.stride[0]
        rows = np.where((reached % problem.stride[0] == 0) & (p >= 0) & (p < problem.p), p, -1)
    else:
        index = padded_index(np.arange(problem.p) * problem.stride[0] + taps[0] * problem.dilation[0] - top, problem.h, problem.padding_mode)
        rows = np.where(index >= 0, index * row, -1)
    places = np.arange(problem.q) * problem.stride[1] + taps[1] * problem.dilation[1] - left
    index = padded_index(places, problem.w, problem.padding_mode)
    columns = np.where(index >= 0, index * column, -1)
    inside = (places >= 0) & (places < problem.w)
    last = np.where(inside, np.arange(problem.q) + 1, 0).max(axis=1)
    first = np.minimum(last, np.where(inside, np.arange(problem.q), problem.q).min(axis=1))
    spans = np.stack([first, last, (taps[1][:, 0] * problem.dilation[1] - left) * column], axis=1)
    neighbours = problem.s == 1 or problem.dilation[1] == 1
    run = (int(first.max()), max(int(first.max()), int(last.min()))) if neighbours else (0, 0)
    tables = [np.ascontiguousarray(table, dtype=np.int64) for table in (rows, columns, spans)]
    assert tables[2].shape[1] == len(SPAN)
    return tables[0], tables[1], tables[2], run
