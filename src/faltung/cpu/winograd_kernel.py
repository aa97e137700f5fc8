"""The kernel of Winograd convolution, forward and grad_input, in two orders of the same arithmetic (the bits are the same).

``tiles`` (few filters, many tiles: U is read once for each block of tiles, V and M never leave the second-level cache)::

    stage 1, for each panel of output channels, piece of the reduction:     filter transform into U
    stage 2, for each block of tiles, share of the panels:
        input transform into V
        for each panel:     for each point, piece of the reduction, group of tiles: gemm into M;     output transform

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
from .winograd_filter import emit_filter
from .winograd_gemm import Panels, emit_multiply
from .winograd_input import INPUT_ARGUMENTS, STRIP_ARGUMENTS, emit_input
from .winograd_output import OUTPUT_ARGUMENTS, emit_output
from .winograd_transform import F2, F4

__all__ = ["ARGUMENTS", "LINE", "WinogradKernel"]

LINE = 64
"""Bytes added to power-of-two pitches, so that points do not meet in the same cache sets."""

ARGUMENTS = ArgumentBlock(
    (
        *INPUT_ARGUMENTS, *STRIP_ARGUMENTS, *OUTPUT_ARGUMENTS,
        "filter_tasks", "input_tasks", "tasks", "tiles", "block_tiles", "input_pieces", "piece_tiles", "shares", "share_panels", "panels", "wide_panels",
        "out_channels", "reduced_pieces", "reduced_piece", "chunk", "reduced_pitch", "lane_pitch", "tap_pitch", "has_bias", "v_point", "v_pitch", "v_block",
        "m_point", "u_at", "v_at", "scratch_at", "scratch_size", "m_at", "strip_at",
    )
)  # fmt: skip
"""Tasks of each stage; tiles in all, of a block, of a piece of the input stage; shares of the panels and panels of a share; pieces of the
reduction that the filter transform works on (the last one longer) and of one first-level panel; byte pitches of weight, V and M; places in
the workspace and in a thread's scratch (from ``scratch_at``, ``scratch_size`` apart)."""


@dataclass(frozen=True)
class WinogradKernel:
    """What a kernel is made for; everything else is an argument.

    ``m``: output pixels of a tile's side; ``rows`` x ``vectors`` accumulators; ``narrow``: panels one vector narrower are needed too; ``dilated``: nchw's
    tiles lie in groups of residues (for nhwc that is all in the tables).
    """

    target: Target
    m: int
    format: str
    weight_format: str
    flipped: bool
    order: str
    rows: int
    vectors: int
    narrow: bool
    dilated: bool = False

    @property
    def name(self) -> str:
        direction = "grad_input" if self.flipped else "forward"
        panels = f"{self.rows}x{self.vectors}{'n' if self.narrow else ''}"
        return f"winograd_F{self.m}_{direction}{'_dilated' if self.dilated else ''}_{self.format}_w{self.weight_format}_{self.order}_{panels}_{self.target.isa}"

    def emit(self) -> str:
        """The module's IR text; its entry point is ``entry``."""
        module = Module()
        builder = _Builder(self, module)
        if self.order == "tiles":
            emit_entry(module, ARGUMENTS, [("filter_tasks", builder.filter_stage), ("tasks", builder.tiles_stage)])
        else:
            emit_entry(module, ARGUMENTS, [("input_tasks", builder.input_stage), ("tasks", builder.filters_stage)])
        return str(module)


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
        self.numeric = Numeric("f32", kernel.target)
        self.algorithm = F4 if kernel.m == 4 else F2
        self.points = self.algorithm.n**2
        self.filter = emit_filter(module, self.numeric, self.algorithm, kernel.flipped, kernel.weight_format)
        self.input = emit_input(module, ARGUMENTS, self.numeric, self.algorithm, kernel.format, dilated=kernel.dilated)
        self.output = emit_output(module, ARGUMENTS, self.numeric, self.algorithm, kernel.format, kernel.dilated)
        self.touch = None
        if kernel.format == "nhwc":
            self.touch = emit_touch(module, ARGUMENTS, self.algorithm, False), emit_touch(module, ARGUMENTS, self.algorithm, True)
        self.multiply = {v: emit_multiply(module, self.numeric, self.points, kernel.rows, v, self.touch) for v in self.widths}

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
        f.call(self.filter, [weight, u, scratch, count, panel.valid, task["reduced_pitch"], task["lane_pitch"], task["tap_pitch"], panel.u_point, width])

    def call_output(self, f: Function, task: Task, panel: _Panel, m: Value, scratch: Value, first: Value, last: Value) -> None:
        size = self.numeric.compute_bytes
        bias = f.select(task["has_bias"] > 0, task.operand("bias"), task.table("zeros")) + panel.start * size
        out = task.operand("out") + panel.start * task["out_channel"]
        block = f.to_pointer(f.load(f["context"]))
        pitch = f.value(panel.vectors * self.vector_bytes)
        f.call(self.output, [block, m, out, bias, scratch, first, last, panel.valid, task["m_point"], pitch])

    def call_input(self, f: Function, task: Task, v: Value, scratch: Value, first: Value, last: Value) -> None:
        block = f.to_pointer(f.load(f["context"]))
        f.call(self.input, [block, task.operand("source"), v, scratch, first, last, task["source_channels"], task["v_point"], task["v_pitch"]])

    def scratch(self, task: Task) -> tuple[Value, Value, Value]:
        """A thread's scratch: V or U, M, and strips."""
        base = task.workspace + task["scratch_at"] + task.thread * task["scratch_size"]
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
                u = task.workspace + task["u_at"] + panel.u + first * (panel.vectors * self.vector_bytes)
                self.call_filter(f, task, panel, u, strip, first, count)

            self.with_panel(f, task, index // task["reduced_pieces"], task["source_channels"], transform)

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
                    sizes = [last - first, task["source_channels"], f.value(1), task["chunk"], task["v_point"], task["v_pitch"]]
                    out = task.operand("out") + panel.start * task["out_channel"]
                    block = f.to_pointer(f.load(f["context"]))
                    ahead = f.minimum(first + task["block_tiles"] * task["threads"], task["tiles"] - task["block_tiles"])
                    wide = f.select(i.equals(first_panel), task["source_channels"] * 4, f.value(0))
                    touch = [block, out, task.operand("source"), first, f.maximum(ahead, 0), wide]
                    f.call(self.multiply[panel.vectors], [v, u, m, task.table("zeros"), *sizes, panel.u_point, task["m_point"], *touch])
                    self.call_output(f, task, panel, m, strip, first, last)

                self.with_panel(f, task, i, task["source_channels"], products)

            f.loop(first_panel, last_panel, 1, one)

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
            longest = task["source_channels"] - (task["reduced_pieces"] - 1) * task["reduced_piece"]

            def products(panel: _Panel) -> None:
                def piece(i: Value) -> None:
                    channel, count = self.reduced(f, task, i)
                    self.call_filter(f, task, panel, u, strip, channel, count)
                    fresh = f.cast("zext", i.equals(0), "i64")
                    sizes = [last - first, count, fresh, task["chunk"], task["v_point"], task["v_pitch"], panel.u_point, task["m_point"]]
                    out = task.operand("out") + panel.start * task["out_channel"]
                    touch = [f.to_pointer(f.load(f["context"])), out, out, first, first, f.value(0)]
                    f.call(self.multiply[panel.vectors], [v + channel * self.numeric.compute_bytes, u, m, task.table("zeros"), *sizes, *touch])

                f.loop(0, task["reduced_pieces"], 1, piece)
                self.call_output(f, task, panel, m, strip, first, last)

            self.with_panel(f, task, index % task["panels"], longest, products)

        return body
