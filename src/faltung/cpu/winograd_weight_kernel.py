"""The kernel of Winograd's weight gradient.

S[t][k][c] = sum over tiles of W[t][tile][k] V[t][tile][c] for every point t, W = A gy A^T, V = B^T x B; then gw = G^T S G.  Loop nest::

    stage 1, for each block of output and input channels, part of the tiles:
        for each block of the part's tiles:
            transform V and W
            for each panel of input channels, point, group of output channels: gemm into S
        reduce S to weights, into the part's partial sums
    stage 2, for each output channel:  add the parts in order

V, W and S stay in the second-level cache, or S in the third; tasks that share V or W make it again.  A part is a slice of the tiles: parts
and blocks depend on the problem alone, so the bits do not depend on the threads.  With a single part the weights are written at once.
The bias gradient is summed up while W is made, block by block and part by part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..codegen.emit import Function, Module, Value
from ..codegen.entry import ArgumentBlock, Task, emit_entry
from ..codegen.numeric import Numeric
from .target import Target
from .winograd_gemm import Panels
from .winograd_input import GRADIENT_ARGUMENTS, INPUT, INPUT_ARGUMENTS, LIFT, LIFT_SUMS, STRIP_ARGUMENTS, channel_start, emit_input
from .winograd_transform import F2, F4
from .winograd_weight_gemm import emit_weight_multiply
from .winograd_weight_output import emit_reduce, emit_sum_parts

__all__ = ["ARGUMENTS", "WinogradWeightKernel"]

ARGUMENTS = ArgumentBlock(
    (
        *INPUT_ARGUMENTS, *GRADIENT_ARGUMENTS, *STRIP_ARGUMENTS,
        "tasks", "finish_tasks", "tiles", "parts", "part_tiles", "block_tiles", "c_blocks", "block_panels", "panels", "wide_panels", "k_blocks", "k_vectors",
        "sum_pitch", "v_point", "v_pitch", "w_point", "w_pitch", "s_point", "s_panel", "sums_at", "partial_at", "partial_part", "partial_k", "partial_tap",
        "k_pitch", "tap_pitch", "channel_pitch", "scratch_at", "scratch_size", "w_at", "s_at", "block_sums_at", "strip_at",
    )
)  # fmt: skip
"""Tasks of each stage; tiles in all, of a part, of a block; blocks of input channels and their panels; blocks of output channels and whole vectors of
those; byte pitches of the bias sums, V, W, S, the partial sums and the weight; places in the workspace and in a thread's scratch (from ``scratch_at``,
``scratch_size`` apart; V lies first)."""


@dataclass(frozen=True)
class WinogradWeightKernel:
    """What a kernel is made for; everything else is an argument.

    ``m``: pixels of a tile's side; ``rows`` x ``vectors`` accumulators; ``narrow``: panels one vector narrower are needed too;
    ``single``: the tiles are one part; ``bias``: the bias gradient is wanted; ``dilated``: nchw's tiles lie in groups of residues.
    """

    target: Target
    dtype: str
    m: int
    format: str
    weight_format: str
    rows: int
    vectors: int
    narrow: bool
    single: bool
    bias: bool
    dilated: bool = False

    @property
    def name(self) -> str:
        flags = "".join(letter for letter, set_ in zip("n1bd", (self.narrow, self.single, self.bias, self.dilated)) if set_)
        shape = f"{self.rows}x{self.vectors}{'_' + flags if flags else ''}"
        return f"winograd_F{self.m}_{self.dtype}_grad_weight_{self.format}_w{self.weight_format}_{shape}_{self.target.isa}"

    def emit(self) -> Module:
        """The module's IR text; its entry point is ``entry``."""
        module = Module()
        builder = _Builder(self, module)
        stages = [("tasks", builder.main_stage)]
        if self.bias or not self.single:
            stages.append(("finish_tasks", builder.finish_stage))
        emit_entry(module, ARGUMENTS, stages)
        return module


@dataclass
class _Block:
    """A task's channels: panels ``first .. last - 1`` of the input's, from channel ``c`` on; ``k_count`` output channels from ``k`` on."""

    first: Value
    last: Value
    c: Value
    channels: Value
    k: Value
    k_count: Value


class _Builder(Panels):
    kernel: WinogradWeightKernel

    def __init__(self, kernel: WinogradWeightKernel, module: Module) -> None:
        self.kernel, self.module = kernel, module
        self.numeric = numeric = Numeric(kernel.dtype, kernel.target)
        partial = Numeric("f64" if kernel.dtype == "f64" else "f32", kernel.target)
        self.algorithm = F4 if kernel.m == 4 else F2
        self.points = self.algorithm.n**2
        self.input, self.lift = (
            emit_input(module, ARGUMENTS, numeric, self.algorithm, kernel.format, gather, dilated=kernel.dilated)
            for gather in (INPUT, LIFT_SUMS if kernel.bias else LIFT)
        )
        self.multiply = {v: emit_weight_multiply(module, numeric, self.points, kernel.rows, v) for v in self.widths}
        self.reduce = emit_reduce(module, *((numeric, self.algorithm, kernel.weight_format) if kernel.single else (partial, self.algorithm, "nhwc")))
        self.sum_parts = None if kernel.single else emit_sum_parts(module, numeric, kernel.weight_format)

    def panel_start(self, f: Function, task: Task, index: Value) -> Value:
        """First input channel of a panel: panels are ``vectors`` vectors wide, then one less."""
        narrow = self.kernel.vectors - 1 if self.kernel.narrow else self.kernel.vectors
        vectors = index * narrow
        if self.kernel.narrow:
            vectors = vectors + f.minimum(index, task["wide_panels"])
        return vectors * self.numeric.lanes

    def out_block(self, f: Function, task: Task, index: Value) -> tuple[Value, Value]:
        """First output channel and number of them of a block; the last one has those that fill no vector too."""
        lanes, vectors, blocks = self.numeric.lanes, task["k_vectors"], task["k_blocks"]
        start = index * vectors // blocks * lanes
        stop = f.select((index + 1).equals(blocks), task["gradient_source_channels"], (index + 1) * vectors // blocks * lanes)
        return start, stop - start

    def block(self, f: Function, task: Task, index: Value) -> _Block:
        first = (index % task["c_blocks"]) * task["block_panels"]
        last = f.minimum(first + task["block_panels"], task["panels"])
        c = self.panel_start(f, task, first)
        stop = f.minimum(self.panel_start(f, task, last), task["source_channels"])
        return _Block(first, last, c, stop - c, *self.out_block(f, task, index // task["c_blocks"]))

    def panels(self, f: Function, task: Task, block: _Block, body: Callable[[Value, Value, int], None]) -> None:
        """``body(number, start, vectors)`` for the block's panels, both counted from the block's first."""

        def one(index: Value) -> None:
            start = self.panel_start(f, task, index) - block.c
            if self.kernel.narrow:
                wide, narrow = self.widths
                f.branch(index < task["wide_panels"], lambda: body(index - block.first, start, wide), lambda: body(index - block.first, start, narrow))
            else:
                body(index - block.first, start, self.kernel.vectors)

        f.loop(block.first, block.last, 1, one)

    def arguments(self, f: Function) -> Value:
        return f.to_pointer(f.load(f["context"]))

    def scratch(self, task: Task) -> Value:
        return task.scratch

    def call_input(self, f: Function, task: Task, v: Value, c: Value, channels: Value, first: Value, last: Value) -> None:
        source, strip = task.operand("source") + c * task["source_channel"], self.scratch(task) + task["strip_at"]
        f.call(self.input, [self.arguments(f), source, v, strip, first, last, channels, task["v_point"], task["v_pitch"]])

    def call_lift(self, f: Function, task: Task, w: Value, k: Value, count: Value, first: Value, last: Value, sums: Value) -> None:
        source, strip = task.operand("other") + k * task["gradient_source_channel"], self.scratch(task) + task["strip_at"]
        arguments = [self.arguments(f), source, w, strip, first, last, count, task["w_point"], task["w_pitch"]]
        f.call(self.lift, [*arguments, *([sums] if self.kernel.bias else [])])

    def clear(self, f: Function, sums: Value, count: Value) -> None:
        lanes, size = self.numeric.lanes, self.numeric.compute_bytes
        f.loop(0, count, lanes, lambda k: f.store(f.zero(self.numeric.vector), sums + k * size))

    def main_stage(self, f: Function, task: Task) -> Callable[[Value], None]:
        def body(index: Value) -> None:
            part = index % task["parts"]
            block = self.block(f, task, index // task["parts"])
            first = part * task["part_tiles"]
            last = f.minimum(first + task["part_tiles"], task["tiles"])
            s = self.scratch(task) + task["s_at"]
            self.blocks(f, task, block, part, first, last)
            if self.kernel.single:
                out, k_pitch, tap_pitch = task.operand("out"), task["k_pitch"], task["tap_pitch"]
                channel_pitch = task["channel_pitch"]
            else:
                out, k_pitch, tap_pitch = task.workspace + task["partial_at"] + part * task["partial_part"], task["partial_k"], task["partial_tap"]
                channel_pitch = f.value(self.numeric.compute_bytes)
            out = out + block.k * k_pitch + block.c * channel_pitch

            def reduce(number: Value, start: Value, vectors: int) -> None:
                width = vectors * self.vector_bytes
                channels = f.minimum(block.channels - start, vectors * self.numeric.lanes)
                source, target = s + number * task["s_panel"], out + start * channel_pitch
                f.call(self.reduce, [source, target, channels, block.k_count, task["s_point"], f.value(width), k_pitch, tap_pitch])

            self.panels(f, task, block, reduce)

        return body

    def blocks(self, f: Function, task: Task, block: _Block, part: Value, first: Value, last: Value) -> None:
        """Transforms and products of a part, a block of tiles at a time."""
        v = self.scratch(task)
        w, sums = v + task["w_at"], v + task["block_sums_at"]
        size = self.numeric.compute_bytes
        total = task.workspace + task["sums_at"] + part * task["sum_pitch"] + block.k * size
        wanted = block.c.equals(0)

        def turn(start: Value) -> None:
            stop = f.minimum(start + task["block_tiles"], last)
            fresh = start.equals(first)
            self.call_input(f, task, v, block.c, block.channels, start, stop)
            if self.kernel.bias:
                self.clear(f, sums, block.k_count)
            self.call_lift(f, task, w, block.k, block.k_count, start, stop, sums)
            if self.kernel.bias:
                with f.when(wanted):
                    self.add_sums(f, sums, total, block.k_count, fresh)
            self.products(f, task, block, v, w, stop - start, f.cast("zext", fresh, "i64"))

        f.loop(first, last, task["block_tiles"], turn)

    def add_sums(self, f: Function, sums: Value, total: Value, count: Value, fresh: Value) -> None:
        lanes, size, vector = self.numeric.lanes, self.numeric.compute_bytes, self.numeric.vector

        def one(k: Value) -> None:
            before = f.select(fresh, f.zero(vector), f.load(total + k * size, vector))
            f.store(f.fadd(f.load(sums + k * size, vector), before), total + k * size)

        f.loop(0, count, lanes, one)

    def products(self, f: Function, task: Task, block: _Block, v: Value, w: Value, tiles: Value, fresh: Value) -> None:
        s = self.scratch(task) + task["s_at"]
        size = self.numeric.compute_bytes
        pitches = [task[name] for name in ("v_point", "v_pitch", "w_point", "w_pitch", "s_point")]

        def panel(number: Value, start: Value, vectors: int) -> None:
            place = s + number * task["s_panel"]
            f.call(self.multiply[vectors], [v + start * size, w, place, task.table("zeros"), tiles, block.k_count, fresh, *pitches])

        self.panels(f, task, block, panel)

    def finish_stage(self, f: Function, task: Task) -> Callable[[Value], None]:
        """The last task is the bias's where it is wanted, the others are output channels."""

        def weights(k: Value) -> None:
            partial = task.workspace + task["partial_at"] + k * task["partial_k"]
            out = task.operand("out") + k * task["k_pitch"]
            sizes = [task[name] for name in ("source_channels", "parts", "partial_part", "partial_tap", "tap_pitch")]
            f.call(self.sum_parts, [partial, out, *sizes])  # type: ignore[arg-type]

        def body(index: Value) -> None:
            if self.kernel.bias:
                last = (index + 1).equals(task["finish_tasks"])
                f.branch(last, lambda: self.finish_bias(f, task), lambda: None if self.kernel.single else weights(index))
            else:
                weights(index)

        return body

    def finish_bias(self, f: Function, task: Task) -> None:
        """Sums of the parts in order, for each block of output channels that they were made for."""
        lanes, size, vector = self.numeric.lanes, self.numeric.compute_bytes, self.numeric.vector

        def block(index: Value) -> None:
            start, count = self.out_block(f, task, index)

            def one(k: Value) -> None:
                source = task.workspace + task["sums_at"] + (start + k) * size
                first = f.load(source, vector)
                (total,) = f.loop(1, task["parts"], 1, lambda i, s: [f.fadd(s, f.load(source + i * task["sum_pitch"], vector))], [first])
                place = task.operand("bias") + (start + channel_start(f, k, count, lanes)) * self.numeric.memory_bytes
                self.numeric.store(f, total, place, lanes)

            f.loop(0, count, lanes, one)

        f.loop(0, task["k_blocks"], 1, block)
