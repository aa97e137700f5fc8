"""Depthwise convolution of few channels in nhwc, as in filters of colour images: lanes run over pixels and channels together, as they lie in memory.

A vector of whole channels would be filled by 3 of 8 or 16 lanes.  Here a row is a run of elements, a column tap reads it some channels further on, and
weights repeat every few vectors.  Forward and grad_input with stride 1 and no channel multiplier.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

import numpy as np

from ..codegen.emit import Function, Module, Value
from ..codegen.entry import ArgumentBlock, Task, emit_entry
from ..codegen.load import load
from ..codegen.numeric import Numeric
from ..problem import ConvProblem
from . import target as targets
from .depthwise_geometry import predicted_cycles
from .geometry import padded_index
from .plan import CpuPlan
from .target import Target
from .tile import align, odd_lines, pitches
from .tiling import place_scratch, useful_threads

__all__ = ["plan_few", "takes_few"]

ARGUMENTS = ArgumentBlock((
    "pack_tasks", "channels", "taps", "flipped", "bias_at", "has_bias", "tasks", "row_tiles", "tile_rows", "out_rows", "elements", "scratch_at",
    "scratch_size", "row_pitch", "source_image", "source_row", "out_image", "out_row", "r", "s", "row_spacing", "tap_pitch", "context", "row_table",
    "column_table", "left", "width", "right",
))  # fmt: skip
"""``elements`` of an output row; ``row_pitch``: bytes of a row in scratch, which has ``left`` and ``right`` pixels beside the image's ``width``;
``column_table``: the image columns of these, ``row_table``: the image row of every row of the padded image, -1 for zeros; ``context``: rows that an output
row reads beside its first; ``row_spacing``: bytes from one row tap to the next, ``tap_pitch`` from one column tap to the next."""

_MOST_PERIOD = 7
_MOST_TAPS = 256  # are one sum


def _period(channels: int, lanes: int) -> int:
    """Vectors after which the channels of lanes repeat."""
    return channels // gcd(channels, lanes)


def takes_few(problem: ConvProblem, target: Target) -> bool:
    """Whether a depthwise problem is computed here."""
    lanes = Numeric(problem.dtype, target).lanes
    plain = problem.format == "nhwc" and problem.kg == 1 and problem.stride == (1, 1) and problem.direction != "grad_weight"
    few = problem.c < lanes and _period(problem.c, lanes) <= _MOST_PERIOD and problem.r * problem.s <= _MOST_TAPS
    return plain and few and min(_padding(problem)) >= 0


def _padding(problem: ConvProblem) -> tuple[int, int, int, int]:
    """Left, right, top and bottom of what is gathered: in grad_input the gradient of y."""
    if problem.direction == "forward":
        return problem.padding
    (tall, wide), (left, right, top, bottom) = problem.effective_kernel, problem.padding
    return wide - 1 - left, wide - 1 - right, tall - 1 - top, tall - 1 - bottom


@dataclass(frozen=True)
class _Kernel:
    """``period``: vectors after which weights repeat; ``repeats``: periods of a block of accumulators."""

    target: Target
    dtype: str
    period: int
    repeats: int

    @property
    def name(self) -> str:
        return f"depthwise_few_{self.dtype}_{self.period}x{self.repeats}_{self.target.isa}"

    def emit(self) -> Module:
        """The module's IR text; its entry point is ``entry``.

        Stage 0: each tap's weights (and the bias) for the lanes of a period.  Stage 1, for each image and tile of output rows: copy the rows that it reads
        to scratch, with their padding; then for each output row, block of elements: all taps.
        """
        module = Module()
        emit_entry(module, ARGUMENTS, [("pack_tasks", self._pack), ("tasks", self._stage)], own_first=True)
        return module

    @property
    def _numeric(self) -> Numeric:
        return Numeric(self.dtype, self.target)

    def _pack(self, f: Function, task: Task) -> Callable[[Value], None]:
        numeric = self._numeric
        size, memory = numeric.compute_bytes, numeric.memory_bytes

        def body(tap: Value) -> None:
            taps, channels = task["taps"], task["channels"]
            number = f.select(task["flipped"] > 0, taps - 1 - tap, tap)
            target = task.workspace + tap * (self.period * numeric.lanes * size)

            def lane(i: Value) -> None:
                value = numeric.load(f, task.operand("other") + (i % channels * taps + number) * memory, 1)
                f.store(value, target + i * size)

            f.loop(0, self.period * numeric.lanes, 1, lane)

            def bias(i: Value) -> None:
                zero = f.zero(numeric.compute)
                value = f.choose(task["has_bias"] > 0, lambda: numeric.load(f, task.operand("bias") + i % channels * memory, 1), lambda: zero)
                f.store(value, task.workspace + task["bias_at"] + i * size)

            with f.when(tap.equals(0)):
                f.loop(0, self.period * numeric.lanes, 1, bias)

        return body

    def _stage(self, f: Function, task: Task) -> Callable[[Value], None]:
        scratch = task.scratch

        def body(index: Value) -> None:
            tile, image = index % task["row_tiles"], index // task["row_tiles"]
            first = tile * task["tile_rows"]
            count = f.minimum(task["tile_rows"], task["out_rows"] - first)
            source = task.operand("source") + image * task["source_image"]

            def copy(i: Value) -> None:
                self._copy(f, task, source, f.load_index(task.table("row_table"), first + i), scratch + i * task["row_pitch"])

            f.loop(0, count + task["context"], 1, copy)
            out = task.operand("out") + image * task["out_image"] + first * task["out_row"]
            f.loop(0, count, 1, lambda i: self._row(f, task, scratch + i * task["row_pitch"], out + i * task["out_row"]))

        return body

    def _copy(self, f: Function, task: Task, image: Value, row: Value, target: Value) -> None:
        """A row with its padding to scratch; zeros for row -1."""
        numeric, channels = self._numeric, task["channels"]
        lanes, size, memory = numeric.lanes, numeric.compute_bytes, numeric.memory_bytes
        source, middle = image + row * task["source_row"], task["width"] * channels
        inside = target + task["left"] * channels * size

        def run(from_: Value, to: Value, count: Value) -> None:
            whole = f.integer("and", count, -lanes)
            f.loop(0, whole, lanes, lambda i: f.store(numeric.load(f, from_ + i * memory, lanes), to + i * size))
            f.loop(whole, count, 1, lambda i: f.store(numeric.load(f, from_ + i * memory, 1), to + i * size))

        def zeros(to: Value, count: Value) -> None:
            f.loop(0, count, 1, lambda i: f.store(f.zero(numeric.compute), to + i * size))

        def edge(first: Value, count: Value, to: Value) -> None:
            def pixel(j: Value) -> None:
                column, place = f.load_index(task.table("column_table"), first + j), to + j * channels * size
                f.branch(column < 0, lambda: zeros(place, channels), lambda: run(source + column * channels * memory, place, channels))

            f.loop(0, count, 1, pixel)

        def present() -> None:
            edge(f.value(0), task["left"], target)
            run(source, inside, middle)
            edge(task["left"], task["right"], inside + middle * size)

        f.branch(row < 0, lambda: zeros(target, (task["left"] + task["width"] + task["right"]) * channels), present)

    def _row(self, f: Function, task: Task, source: Value, out: Value) -> None:
        """All elements of an output row."""
        numeric = self._numeric
        lanes, size, period = numeric.lanes, numeric.compute_bytes, self.period
        entry, elements = lanes * size, task["elements"]
        weights, bias = task.workspace, task.workspace + task["bias_at"]

        def sums(at: Value, repeats: int) -> list[Value]:
            """Those of ``repeats`` periods from element ``at`` on."""
            start = [f.load(bias + v * entry, numeric.vector) for v in range(period)]

            def row(i: Value, *values: Value) -> list[Value]:
                def column(j: Value, weight: Value, *values: Value) -> list[Value]:
                    place, result = source + at * size + i * task["row_spacing"] + j * task["tap_pitch"], list(values)
                    for v in range(period):
                        vector = f.load(weight + v * entry, numeric.vector)
                        for u in range(repeats):
                            n = u * period + v
                            result[n] = f.fma(f.load(place + n * entry, numeric.vector), vector, result[n], numeric.target.fma)
                    return [weight + period * entry, *result]

                return f.loop(0, task["s"], 1, column, [weights + i * task["s"] * (period * entry), *values])[1:]

            return f.loop(0, task["r"], 1, row, [start[n % period] for n in range(repeats * period)])

        def block(at: Value, repeats: int) -> None:
            for n, value in enumerate(sums(at, repeats)):
                numeric.store(f, value, out + (at + n * lanes) * numeric.memory_bytes, lanes)

        def last(at: Value) -> None:
            for n, value in enumerate(sums(at, 1)):
                first = at + n * lanes
                with f.when(first < elements):
                    numeric.store(f, value, out + first * numeric.memory_bytes, lanes, f.lane_mask(elements - first, lanes))

        wide, narrow = period * lanes * self.repeats, period * lanes
        many, few = elements // wide * wide, elements // narrow * narrow
        f.loop(0, many, wide, lambda at: block(at, self.repeats))
        f.loop(many, few, narrow, lambda at: block(at, 1))
        with f.when(few < elements):
            last(few)


def plan_few(name: str, problem: ConvProblem, threads: int) -> CpuPlan:
    """The plan for a problem that :func:`takes_few`."""
    target = targets.target()
    numeric = Numeric(problem.dtype, target)
    forward, size, channels = problem.direction == "forward", numeric.compute_bytes, problem.c
    source_size, out_size = ((problem.h, problem.w), (problem.p, problem.q))[:: 1 if forward else -1]
    left, right, top, bottom = _padding(problem)
    period = _period(channels, numeric.lanes)
    kernel = _Kernel(target, problem.dtype, period, max(1, (24 if target.registers >= 32 else 12) // period))
    mode = problem.padding_mode if forward else "zeros"
    columns = padded_index(np.arange(-left, source_size[1] + right), source_size[1], mode)
    columns = np.ascontiguousarray(np.concatenate([columns[:left], columns[left + source_size[1] :]]))
    rows = np.ascontiguousarray(padded_index(np.arange(-top, source_size[0] + bottom), source_size[0], mode))
    context = problem.effective_kernel[0] - 1
    entry = period * numeric.lanes * size
    # a last block of elements reads a period of vectors, some of them behind the row
    row_pitch = odd_lines((source_size[1] + left + right) * channels * size + entry)
    most = max(1, target.l2 // 2 // row_pitch - context)
    tiles = max(-(-out_size[0] // most), min(out_size[0], -(-4 * threads // problem.n)) if out_size[0] > 4 * context else 1)
    tile_rows = -(-out_size[0] // tiles)
    row_tiles = -(-out_size[0] // tile_rows)
    taps = problem.r * problem.s
    bias_at = taps * entry
    predicted = predicted_cycles(problem, numeric.lanes, threads)
    threads = useful_threads(threads, predicted * threads, target)
    front_pitch, scratch_at = place_scratch(align(bias_at + entry, 4096), threads, target)
    scratch_size = align((tile_rows + context) * row_pitch, 4096) + 64
    source, out = pitches(problem, forward), pitches(problem, not forward)
    values = {
        "pack_tasks": taps, "channels": channels, "taps": taps, "flipped": int(not forward), "bias_at": bias_at,
        "has_bias": int(problem.epilogue.bias and forward), "tasks": problem.n * row_tiles, "row_tiles": row_tiles, "tile_rows": tile_rows,
        "out_rows": out_size[0], "elements": out_size[1] * channels, "scratch_at": scratch_at, "scratch_size": scratch_size, "row_pitch": row_pitch,
        "source_image": source[0], "source_row": source[2], "out_image": out[0], "out_row": out[2], "r": problem.r, "s": problem.s,
        "row_spacing": problem.dilation[0] * row_pitch, "tap_pitch": problem.dilation[1] * channels * size, "context": context,
        "row_table": rows.ctypes.data, "column_table": columns.ctypes.data, "left": left, "width": source_size[1], "right": right,
    }  # fmt: skip
    facts = {"tile": (tile_rows, out_size[1]), "block": f"{kernel.repeats}x{period}", "predicted_cycles": predicted}
    block = ARGUMENTS.pack(threads, values, front_pitch)
    return CpuPlan(problem, name, load(kernel.name, target, kernel.emit), block, [rows, columns], scratch_at + threads * scratch_size, facts)
