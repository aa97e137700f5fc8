"""grad_input in a padding mode other than zeros: the gradient of the padded input, folded back onto the input.

A few images at a time: the gradient of the padded input is computed into a bounded buffer by whichever implementation takes the zero-padded
problem, and a second kernel adds every padded position's gradient to the input position that it was read from, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import config, dispatch
from ..codegen.emit import Function, Module, Value
from ..codegen.entry import ArgumentBlock, Task, emit_entry
from ..codegen.load import load
from ..codegen.numeric import Numeric
from ..dispatch import Unsupported
from ..problem import DTYPES, ConvProblem
from . import target as targets
from .geometry import padded_index
from .plan import CpuPlan
from .target import Target

__all__ = ["FOLDED", "Folded"]

_BUFFER_BYTES = 4 << 20

ARGUMENTS = ArgumentBlock(
    ("tasks", "height", "width", "channels", "padded_height", "padded_width", "left", "row_starts", "row_sources", "column_starts", "column_sources", "extras",
     "extra_targets", "extra_sources")
)  # fmt: skip
"""``row_sources[row_starts[h] : row_starts[h + 1]]``: the padded rows that were read from input row ``h``, likewise columns; ``extras``: padded
columns outside the input's own, with their targets."""


@dataclass(frozen=True)
class FoldKernel:
    """Adds the gradient of the padded input onto the input: nchw plane by plane, nhwc row by row."""

    target: Target
    dtype: str
    format: str

    @property
    def name(self) -> str:
        return f"fold_{self.dtype}_{self.format}_{self.target.isa}"

    def emit(self) -> Module:
        """The module's IR text; its entry point is ``entry``."""
        module = Module()
        numeric = Numeric(self.dtype, self.target)
        stage = _fold_planes if self.format == "nchw" else _fold_rows
        emit_entry(module, ARGUMENTS, [("tasks", lambda f, task: stage(f, task, numeric))])
        return module


def _each(f: Function, starts: Value, sources: Value, index: Value, body: Callable[[Value, Value], Value], first: Value) -> Value:
    """``value = body(source, value)`` over the sources of ``index``."""
    begin, end = f.load_index(starts, index), f.load_index(starts, index + 1)
    (result,) = f.loop(begin, end, 1, lambda i, value: [body(f.load_index(sources, i), value)], [first])
    return result


def _fold_planes(f: Function, task: Task, numeric: Numeric) -> Callable[[Value], None]:
    """nchw, one plane a task: for each row, its own columns by vectors, then the columns of the padding one by one."""
    memory, lanes = numeric.memory_bytes, numeric.lanes
    starts, sources = task.table("row_starts"), task.table("row_sources")

    def body(index: Value) -> None:
        height, width, padded_width = task["height"], task["width"], task["padded_width"]
        plane = task.operand("source") + index * task["padded_height"] * padded_width * memory
        out = task.operand("out") + index * height * width * memory
        extras = task["extras"]

        def row(h: Value) -> None:
            def add(u: Value, value: Value, x: Value, count: int) -> Value:
                return f.fadd(value, numeric.load(f, plane + (u * padded_width + x) * memory, count))

            def total(x: Value, count: int) -> Value:
                zero = f.zero(numeric.vector if count == lanes else numeric.compute)
                return _each(f, starts, sources, h, lambda u, value: add(u, value, x, count), zero)

            def column(x: Value) -> None:
                # All padded columns that were read from this one, its own first.
                own = total(x + task["left"], 1)

                def extra(i: Value, value: Value) -> list[Value]:
                    more = total(f.load_index(task.table("extra_sources"), i), 1)
                    chosen = f.load_index(task.table("extra_targets"), i).equals(x)
                    return [f.fadd(value, f.select(chosen, more, f.zero(numeric.compute)))]

                (value,) = f.loop(0, extras, 1, extra, [own])
                numeric.store(f, value, out + (h * width + x) * memory, 1)

            touched = task.table("column_starts")

            def block(x: Value) -> None:
                numeric.store(f, total(x + task["left"], lanes), out + (h * width + x) * memory, lanes)

            def whole(x: Value) -> None:
                first, last = f.load_index(touched, x), f.load_index(touched, x + lanes)
                f.branch((last - first).equals(lanes), lambda: block(x), lambda: f.loop(x, x + lanes, 1, column))

            end = f.integer("and", width, -lanes)
            f.loop(0, end, lanes, whole)
            f.loop(end, width, 1, column)

        f.loop(0, height, 1, row)

    return body


def _fold_rows(f: Function, task: Task, numeric: Numeric) -> Callable[[Value], None]:
    """nhwc, one row of one image a task: vectors over channels."""
    memory, lanes = numeric.memory_bytes, numeric.lanes

    def body(index: Value) -> None:
        height, width, padded_width, channels = task["height"], task["width"], task["padded_width"], task["channels"]
        h, image = index % height, index // height
        source = task.operand("source") + image * task["padded_height"] * padded_width * channels * memory
        out = task.operand("out") + index * width * channels * memory

        def pixel(x: Value) -> None:
            def run(c: Value, count: int) -> None:
                def row(u: Value, value: Value) -> Value:
                    def column(v: Value, inner: Value) -> Value:
                        return f.fadd(inner, numeric.load(f, source + ((u * padded_width + v) * channels + c) * memory, count))

                    return _each(f, task.table("column_starts"), task.table("column_sources"), x, column, value)

                zero = f.zero(numeric.vector if count == lanes else numeric.compute)
                value = _each(f, task.table("row_starts"), task.table("row_sources"), h, row, zero)
                numeric.store(f, value, out + (x * channels + c) * memory, count)

            end = f.integer("and", channels, -lanes)
            f.loop(0, end, lanes, lambda c: run(c, lanes))
            f.loop(end, channels, 1, lambda c: run(c, 1))

        f.loop(0, width, 1, pixel)

    return body


def _preimages(size: int, before: int, after: int, mode: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For each input index, the padded indices that the mode reads from it, its own first: starts and sources."""
    mapped = padded_index(np.arange(-before, size + after, dtype=np.int64), size, mode)
    lists: list[list[int]] = [[before + i] for i in range(size)]
    for padded, index in enumerate(mapped):
        if padded != index + before:
            lists[index].append(padded)
    starts = np.concatenate([[0], np.cumsum([len(x) for x in lists])]).astype(np.int64)
    return starts, np.array([i for x in lists for i in x], dtype=np.int64)


class FoldedPlan:
    """Runs the zero-padded plan and the fold for a few images at a time."""

    def __init__(self, problem: ConvProblem, inner: list[dispatch.Plan], fold: list[CpuPlan], images: int) -> None:
        self.problem, self.implementation = problem, "folded"
        self._inner, self._fold, self._images = inner, fold, images
        memory = DTYPES[problem.dtype]
        self._source_image = problem.k * problem.p * problem.q * memory
        self._out_image = problem.c * problem.h * problem.w * memory
        padded = inner[0].problem
        self._buffer_bytes = padded.n * padded.c * padded.h * padded.w * memory
        self._poison = config.current().poison
        self.launch: Callable[..., None] = self._launch

    def _launch(self, source: int, other: int, bias: int, out: int) -> None:  # noqa: ARG002
        buffer = np.full(self._buffer_bytes, 0xFF, np.uint8) if self._poison else np.empty(self._buffer_bytes, np.uint8)
        address = buffer.ctypes.data
        for start in range(0, self.problem.n, self._images):
            last = start + self._images > self.problem.n
            self._inner[last].launch(source + start * self._source_image, other, 0, address)
            self._fold[last].launch(address, 0, 0, out + start * self._out_image)

    def describe(self) -> dict[str, Any]:
        facts = self._inner[0].describe()
        return {**facts, "padded_by": self._inner[0].implementation, "images_at_once": self._images, "buffer_bytes": self._buffer_bytes}


class Folded:
    """The implementation named ``folded``."""

    name = "folded"

    def plan(self, problem: ConvProblem, threads: int) -> FoldedPlan:
        """A plan for grad_input with reflect, replicate or circular padding; raises :class:`Unsupported` for others."""
        if problem.direction != "grad_input" or problem.padding_mode == "zeros":
            raise Unsupported("only for grad_input in a padding mode other than zeros")
        left, right, top, bottom = problem.padding
        padded = replace(problem, h=problem.h + top + bottom, w=problem.w + left + right, padding=(0, 0, 0, 0), padding_mode="zeros")
        image_bytes = padded.c * padded.h * padded.w * DTYPES[problem.dtype]
        images = max(1, min(problem.n, _BUFFER_BYTES // max(1, image_bytes)))
        inner, fold = [], []
        for count in (images, problem.n % images or images):
            with config.override(implementation=None if config.current().implementation == self.name else config.current().implementation):
                inner.append(dispatch.plan(replace(padded, n=count), "cpu", threads))
            fold.append(_fold_plan(replace(problem, n=count), padded, threads))
        return FoldedPlan(problem, inner, fold, images)


FOLDED = Folded()


def _fold_plan(problem: ConvProblem, padded: ConvProblem, threads: int) -> CpuPlan:
    left, right, top, bottom = problem.padding
    rows, columns = _preimages(problem.h, top, bottom, problem.padding_mode), _preimages(problem.w, left, right, problem.padding_mode)
    extras = [(x, v) for x in range(problem.w) for v in columns[1][columns[0][x] + 1 : columns[0][x + 1]]]
    targets_, sources_ = (np.array([e[i] for e in extras], dtype=np.int64) for i in (0, 1))
    kernel = FoldKernel(targets.target(), problem.dtype, problem.format)
    values = {
        "tasks": problem.n * (problem.c if problem.format == "nchw" else problem.h), "height": problem.h, "width": problem.w, "channels": problem.c,
        "padded_height": padded.h, "padded_width": padded.w, "left": left, "row_starts": rows[0].ctypes.data, "row_sources": rows[1].ctypes.data,
        "column_starts": columns[0].ctypes.data, "column_sources": columns[1].ctypes.data, "extras": len(extras),
        "extra_targets": targets_.ctypes.data, "extra_sources": sources_.ctypes.data,
    }  # fmt: skip
    block = ARGUMENTS.pack(threads, values)
    return CpuPlan(problem, "folded", load(kernel.name, kernel.target, kernel.emit), block, [*rows, *columns, targets_, sources_], 0, {})
