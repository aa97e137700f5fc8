"""The kernel of Winograd convolution, forward and grad_input, in two orders of the same arithmetic (the bits are the same).

``tiles`` (few filters, many tiles: U is read once for each block of tiles, V and M never leave the second-level cache)::

    stage 1, for each panel of output channels, piece of the reduction:     filter transform into U
    stage 2, for each block of tiles, share of the panels:
        input transform into V
        for each panel:     for each point, piece of the reduction, group of tiles: gemm into M;     output transform
        (of several phases, grad_input with a stride: products of all of them, each with its M; then their output transform;
    of several components, where V is that many times as large:
        for each piece of the reduction:    input transform into V;     for each panel, point, group of tiles: gemm into M
        for each panel:                     output transform)

``filters`` (few tiles, many filters: U is made piece by piece where it is used, and never written to memory)::

    stage 1, for each piece of the tiles:       input transform into V
    stage 2, for each block of tiles, panel of output channels:
        for each piece of the reduction:        filter transform into U;    for each point, group of tiles: gemm into M
        output transform
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..codegen.emit import Function, Module, Value
from ..codegen.entry import ArgumentBlock, Task, emit_entry
from ..codegen.numeric import Numeric
from .target import Target
from .winograd_ahead import emit_touch
from .winograd_few import emit_few_input
from .winograd_filter import emit_filter
from .winograd_form import PLAIN, Form
from .winograd_gemm import Panels, emit_multiply
from .winograd_input import INPUT_ARGUMENTS, STRIP_ARGUMENTS, emit_input
from .winograd_output import OUTPUT_ARGUMENTS, PHASE_ARGUMENTS, emit_output
from .winograd_transform import ALGORITHMS

__all__ = ["ARGUMENTS", "LINE", "WinogradKernel"]

LINE = 64
"""Bytes added to power-of-two pitches, so that points do not meet in the same cache sets."""

ARGUMENTS = ArgumentBlock(
    (
        *INPUT_ARGUMENTS, *STRIP_ARGUMENTS, *OUTPUT_ARGUMENTS, *PHASE_ARGUMENTS,
        "filter_tasks", "input_tasks", "tasks", "tiles", "block_tiles", "input_pieces", "piece_tiles", "shares", "share_panels", "panels", "wide_panels",
        "out_channels", "reduced_pieces", "reduced_piece", "chunk", "reduced_pitch", "lane_pitch", "tap_pitch", "has_bias",
        "v_point", "v_pitch", "v_block", "u_phase",
        "m_point", "m_panel", "u_at", "v_at", "scratch_at", "scratch_size", "m_at", "strip_at",
    )
)  # fmt: skip
"""Tasks of each stage; tiles in all, of a block, of a piece of the input stage; shares of the panels and panels of a share; pieces of the
reduction that the filter transform works on (the last one longer) and of one first-level panel; byte pitches of weight, V, U and M
(``m_panel``: of panels whose M are kept at once); places in the workspace and in a thread's scratch (from ``scratch_at``, ``scratch_size`` apart)."""


@dataclass(frozen=True)
class WinogradKernel:
    """What a kernel is made for; everything else is an argument.

    ``m``: output pixels of a tile's side; ``rows`` x ``vectors`` accumulators; ``narrow``: panels one vector narrower are needed too; ``dilated``: nchw's
    tiles lie in groups of residues (for nhwc that is all in the tables); ``few``: the source has that few channels, else 0.
    """

    target: Target
    dtype: str
    m: int
    format: str
    weight_format: str
    flipped: bool
    order: str
    rows: int
    vectors: int
    narrow: bool
    dilated: bool = False
    form: Form = PLAIN
    few: int = 0

    @property
    def name(self) -> str:
        direction = "grad_input" if self.flipped else "forward"
        panels = f"{self.rows}x{self.vectors}{'n' if self.narrow else ''}_{self.target.isa}"
        kernel = "" if self.form == PLAIN else f"_{self.form.r}x{self.form.s}s{self.form.stride}" + (f"c{self.few}" if self.few else "")
        direction += "_dilated" if self.dilated else ""
        return f"winograd_F{self.m}{kernel}_{self.dtype}_{direction}_{self.format}_w{self.weight_format}_{self.order}_{panels}"

    def emit(self) -> Module:
        """The module's IR text; its entry point is ``entry``."""
        module = Module()
        builder = _Builder(self, module)
        if self.order == "tiles":
            tiles_stage = builder.pieces_stage if builder.by_pieces else builder.tiles_stage
            emit_entry(module, ARGUMENTS, [("filter_tasks", builder.filter_stage), ("tasks", tiles_stage)])
        else:
            emit_entry(module, ARGUMENTS, [("input_tasks", builder.input_stage), ("tasks", builder.filters_stage)])
        return module


@dataclass
class _Panel:
    """A panel of output channels: its vectors (known when code is generated), its first channel, its channels, its place in U."""

    vectors: int
    start: Value
    valid: Value
    u: Value
    u_point: Value


class _Builder(Panels):
    kernel: WinogradKernel

    def __init__(self, kernel: WinogradKernel, module: Module) -> None:
        self.kernel, self.module = kernel, module
        self.numeric = Numeric(kernel.dtype, kernel.target)
        form, self.components = kernel.form, len(kernel.form.components)
        self.algorithm = next(a for a in ALGORITHMS[form.taps[0]] if a.m == kernel.m)
        self.points = self.algorithm.n**2
        self.by_pieces = self.components > 1 and not kernel.few
        self.filter = emit_filter(module, self.numeric, self.algorithm, form, kernel.flipped, kernel.weight_format, kernel.few)
        if kernel.few:
            self.input = emit_few_input(module, ARGUMENTS, self.numeric, self.algorithm, form, kernel.format, kernel.few)
        else:
            read = PLAIN if form.phased else form
            self.input = emit_input(module, ARGUMENTS, self.numeric, self.algorithm, kernel.format, form=read, dilated=kernel.dilated)
        self.output = emit_output(module, ARGUMENTS, self.numeric, self.algorithm, kernel.format, kernel.dilated, form)
        self.touch = None
        if kernel.format == "nhwc" and not self.by_pieces:
            self.touch = emit_touch(module, ARGUMENTS, self.algorithm, form, False), emit_touch(module, ARGUMENTS, self.algorithm, form, True)
        self.multiply = {v: emit_multiply(module, self.numeric, self.algorithm.n, form, kernel.rows, v, self.touch) for v in self.widths}

    def with_panel(self, f: Function, task: Task, index: Value, reduced: Value, body: Callable[[_Panel], None]) -> None:
        """``body(panel)`` for the panel ``index``, emitted for each width; ``reduced`` channels of it are kept in U."""
        wide, lanes = task["wide_panels"], self.numeric.lanes
        before = f.minimum(index, wide)
        narrow_before = index - before

        def emit(vectors: int) -> None:
            start = (before * self.kernel.vectors + narrow_before * (self.kernel.vectors - 1)) * lanes
            size = [self.points * (reduced * (v * self.vector_bytes) + LINE) for v in (self.kernel.vectors, self.kernel.vectors - 1)]
            u = before * size[0] + narrow_before * size[1] if self.kernel.narrow else before * size[0]
            body(_Panel(vectors, start, f.minimum(task["out_channels"] - start, vectors * lanes), u, reduced * (vectors * self.vector_bytes) + LINE))

        if self.kernel.narrow:
            f.branch(index < wide, lambda: emit(self.kernel.vectors), lambda: emit(self.kernel.vectors - 1))
        else:
            emit(self.kernel.vectors)

    def call_filter(self, f: Function, task: Task, panel: _Panel, u: Value, scratch: Value, first: Value, count: Value) -> None:
        weight = task.operand("other") + panel.start * task["lane_pitch"] + first * task["reduced_pitch"]
        width = f.value(panel.vectors * self.vector_bytes)
        pitches = [*(task[name] for name in ("reduced_pitch", "lane_pitch", "tap_pitch")), panel.u_point, width, task["u_phase"]]
        f.call(self.filter, [weight, u, scratch, count, panel.valid, *pitches])

    def call_multiply(self, f: Function, task: Task, panel: _Panel, v: Value, u: Value, m: Value, sizes: list[Value], touch: list[Value]) -> None:
        """The products of a panel."""
        pitches = [panel.u_point, task["m_point"]]
        phases = [task["u_phase"], task["m_phase"]] if self.kernel.form.phased else []
        f.call(self.multiply[panel.vectors], [v, u, m, task.table("zeros"), *sizes, *pitches, *touch, *phases])

    def call_output(self, f: Function, task: Task, panel: _Panel, m: Value, scratch: Value, first: Value, last: Value) -> None:
        size = self.numeric.memory_bytes
        bias = f.select(task["has_bias"] > 0, task.operand("bias"), task.table("zeros")) + panel.start * size
        out = task.operand("out") + panel.start * task["out_channel"]
        block = f.to_pointer(f.load(f["context"]))
        pitch = f.value(panel.vectors * self.vector_bytes)
        f.call(self.output, [block, m, out, bias, scratch, first, last, panel.valid, task["m_point"], pitch])

    def call_input(
        self, f: Function, task: Task, v: Value, scratch: Value, first: Value, last: Value, channel: Value | None = None, count: Value | None = None
    ) -> None:
        """All channels, or ``count`` from ``channel`` on."""
        block, source = f.to_pointer(f.load(f["context"])), task.operand("source")
        if channel is not None:
            source = source + channel * (self.numeric.memory_bytes if self.kernel.format == "nhwc" else task["source_channel"])
        f.call(self.input, [block, source, v, scratch, first, last, task["source_channels"] if count is None else count, task["v_point"], task["v_pitch"]])

    def scratch(self, task: Task) -> tuple[Value, Value, Value]:
        """A thread's scratch: V or U, M, and strips."""
        base = task.scratch
        return base, base + task["m_at"], base + task["strip_at"]

    def reduced(self, f: Function, task: Task, piece: Value) -> tuple[Value, Value]:
        """First channel and length of a piece of the reduction; the last piece takes the rest, so that none is shorter than a vector."""
        first = piece * task["reduced_piece"]
        last = (piece + 1).equals(task["reduced_pieces"])
        return first, f.select(last, task["source_channels"] - first, task["reduced_piece"])

    def filter_stage(self, f: Function, task: Task) -> Callable[[Value], None]:
        _, _, strip = self.scratch(task)

        def body(index: Value) -> None:
            first, count = self.reduced(f, task, index % task["reduced_pieces"])

            def transform(panel: _Panel) -> None:
                u = task.workspace + task["u_at"] + panel.u + first * (self.components * panel.vectors * self.vector_bytes)
                self.call_filter(f, task, panel, u, strip, first, count)

            self.with_panel(f, task, index // task["reduced_pieces"], task["source_channels"] * self.components, transform)

        return body

    def tiles_stage(self, f: Function, task: Task) -> Callable[[Value], None]:
        v, m, strip = self.scratch(task)

        def body(index: Value) -> None:
            first = (index // task["shares"]) * task["block_tiles"]
            last = f.minimum(first + task["block_tiles"], task["tiles"])
            self.call_input(f, task, v, strip, first, last)
            first_panel = (index % task["shares"]) * task["share_panels"]
            last_panel = f.minimum(first_panel + task["share_panels"], task["panels"])

            def one(i: Value) -> None:
                def products(panel: _Panel) -> None:
                    u = task.workspace + task["u_at"] + panel.u
                    sizes = [last - first, task["source_channels"] * self.components, f.value(1), task["chunk"], task["v_point"], task["v_pitch"]]
                    out = task.operand("out") + panel.start * task["out_channel"]
                    block = f.to_pointer(f.load(f["context"]))
                    ahead = f.minimum(first + task["block_tiles"], task["tiles"] - task["block_tiles"])
                    wide = f.value(0) if self.kernel.few else f.select(i.equals(first_panel), task["source_channels"] * self.numeric.memory_bytes, f.value(0))
                    touch = [block, out, task.operand("source"), first, f.maximum(ahead, 0), wide]
                    self.call_multiply(f, task, panel, v, u, m, sizes, touch)
                    self.call_output(f, task, panel, m, strip, first, last)

                self.with_panel(f, task, i, task["source_channels"] * self.components, products)

            f.loop(first_panel, last_panel, 1, one)

        return body

    def pieces_stage(self, f: Function, task: Task) -> Callable[[Value], None]:
        v, m, strip = self.scratch(task)

        def body(index: Value) -> None:
            first = (index // task["shares"]) * task["block_tiles"]
            last = f.minimum(first + task["block_tiles"], task["tiles"])
            first_panel = (index % task["shares"]) * task["share_panels"]
            last_panel = f.minimum(first_panel + task["share_panels"], task["panels"])
            out = task.operand("out")

            def piece(i: Value) -> None:
                channel, count = self.reduced(f, task, i)
                self.call_input(f, task, v, strip, first, last, channel, count)
                fresh = f.cast("zext", i.equals(0), "i64")

                def one(number: Value) -> None:
                    def products(panel: _Panel) -> None:
                        u = task.workspace + task["u_at"] + panel.u + channel * (self.components * panel.vectors * self.vector_bytes)
                        sizes = [last - first, count * self.components, fresh, task["chunk"], task["v_point"], task["v_pitch"]]
                        place = m + (number - first_panel) * task["m_panel"]
                        touch = [out, out, out, first, first, f.value(0)]
                        self.call_multiply(f, task, panel, v, u, place, sizes, touch)

                    self.with_panel(f, task, number, task["source_channels"] * self.components, products)

                f.loop(first_panel, last_panel, 1, one)

            f.loop(0, task["reduced_pieces"], 1, piece)

            def result(number: Value) -> None:
                def store(panel: _Panel) -> None:
                    self.call_output(f, task, panel, m + (number - first_panel) * task["m_panel"], strip, first, last)

                self.with_panel(f, task, number, task["source_channels"] * self.components, store)

            f.loop(first_panel, last_panel, 1, result)

        return body

    def input_stage(self, f: Function, task: Task) -> Callable[[Value], None]:
        _, _, strip = self.scratch(task)

        def body(index: Value) -> None:
            block, piece = index // task["input_pieces"], index % task["input_pieces"]
            start = block * task["block_tiles"]
            stop = f.minimum(start + task["block_tiles"], task["tiles"])
            first = f.minimum(start + piece * task["piece_tiles"], stop)
            last = f.minimum(first + task["piece_tiles"], stop)
            v = task.workspace + task["v_at"] + block * task["v_block"] + (first - start) * task["v_pitch"]
            with f.when(first < last):
                self.call_input(f, task, v, strip, first, last)

        return body

    def filters_stage(self, f: Function, task: Task) -> Callable[[Value], None]:
        u, m, strip = self.scratch(task)

        def body(index: Value) -> None:
            block = index // task["panels"]
            first = block * task["block_tiles"]
            last = f.minimum(first + task["block_tiles"], task["tiles"])
            v = task.workspace + task["v_at"] + block * task["v_block"]
            longest = (task["source_channels"] - (task["reduced_pieces"] - 1) * task["reduced_piece"]) * self.components

            def products(panel: _Panel) -> None:
                def piece(i: Value) -> None:
                    channel, count = self.reduced(f, task, i)
                    self.call_filter(f, task, panel, u, strip, channel, count)
                    fresh = f.cast("zext", i.equals(0), "i64")
                    sizes = [last - first, count * self.components, fresh, task["chunk"], task["v_point"], task["v_pitch"]]
                    out = task.operand("out") + panel.start * task["out_channel"]
                    touch = [f.to_pointer(f.load(f["context"])), out, out, first, first, f.value(0)]
                    place = v + channel * (self.components * self.numeric.compute_bytes)
                    self.call_multiply(f, task, panel, place, u, m, sizes, touch)

                f.loop(0, task["reduced_pieces"], 1, piece)
                self.call_output(f, task, panel, m, strip, first, last)

            self.with_panel(f, task, index % task["panels"], longest, products)

        return body
