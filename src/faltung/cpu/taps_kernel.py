"""The kernel of convolution tap by tap: each tap is a 1x1 convolution of the pixels that it meets inside the image, summed where results are stored.

The source is read where it lies (nhwc), so a tap in the padding costs nothing and no tile has a margin::

    for each image, tile of output rows, block of output channels:
        bias or zeros to every output
        for each tap, piece of the input channels:
            pack the piece of the tap's weights                                       panels of the block, for the second-level cache
            for each output row that the tap reaches, run of columns, panel:          micro-kernel
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..codegen.emit import Function, Module, Value
from ..codegen.entry import ArgumentBlock, Task, emit_entry
from ..codegen.numeric import Numeric
from .micro import Micro, call_micro, emit_micro
from .pack import emit_pack_panel
from .target import Target

__all__ = ["ARGUMENTS", "TAP", "TapsKernel"]

ARGUMENTS = ArgumentBlock(
    (
        "tasks", "k_blocks", "block_panels", "panels", "wide_panels", "row_tiles", "tile_rows", "out_rows", "out_columns", "out_image", "out_row", "out_column",
        "row_step", "c_pitch", "source_image", "source_row", "source_pitch", "channels", "chunk", "taps", "tap_table", "offsets", "weight_offsets",
        "weight_pitch", "weight_contiguous", "out_channels", "has_bias", "scratch_size",
    )
)  # fmt: skip
"""Pitches are bytes; ``row_step``: output rows from one that a tap reaches to the next, ``c_pitch`` and ``source_pitch``: from column to column of these in
the output and in the source, ``source_row`` from row to row.  ``offsets`` and ``weight_offsets``: byte offsets of a pixel's channels, and of a tap's
weights."""

TAP = ("weight", "out_row", "rows", "source", "out_column", "columns")
"""An entry of the tap table: byte offset of its weights, first output row and column that it reaches and how many of each, and the byte offset of what it reads
for the first of them."""


@dataclass(frozen=True)
class TapsKernel:
    """``rows`` x ``vectors`` accumulators at most; ``narrow``: panels of one vector less are needed too; ``masked``: output channels fill no vectors."""

    target: Target
    dtype: str
    rows: int
    vectors: int
    narrow: bool
    masked: bool

    @property
    def name(self) -> str:
        flags = "".join(letter for letter, set_ in zip("vm", (self.narrow, self.masked)) if set_)
        return f"taps_{self.dtype}_{self.rows}x{self.vectors}{'_' + flags if flags else ''}_{self.target.isa}"

    def emit(self) -> Module:
        """The module's IR text; its entry point is ``entry``."""
        module = Module()
        emit_entry(module, ARGUMENTS, [("tasks", _Builder(self, module).stage)])
        return module


class _Builder:
    def __init__(self, kernel: TapsKernel, module: Module) -> None:
        self.kernel, self.numeric = kernel, Numeric(kernel.dtype, kernel.target)
        self.pack_panel = emit_pack_panel(module, self.numeric)
        counts = (kernel.vectors, kernel.vectors - 1) if kernel.narrow else (kernel.vectors,)
        self.micros = {
            (r, v): emit_micro(module, self.numeric, Micro("channels", r, v, masked=kernel.masked)) for r in range(1, kernel.rows + 1) for v in counts
        }

    def start(self, f: Function, task: Task, panel: Value) -> Value:
        """First output channel of a panel: the wide ones come first."""
        lanes, wide = self.numeric.lanes, self.kernel.vectors
        if not self.kernel.narrow:
            return panel * (wide * lanes)
        return panel * ((wide - 1) * lanes) + f.minimum(panel, task["wide_panels"]) * lanes

    def panels(self, f: Function, task: Task, first: Value, last: Value, body: Callable[[Value, int], None]) -> None:
        """``body(panel, vectors)`` for the panels of a block."""
        split = f.maximum(f.minimum(task["wide_panels"], last), first)
        f.loop(first, split, 1, lambda i: body(i, self.kernel.vectors))
        if self.kernel.narrow:
            f.loop(split, last, 1, lambda i: body(i, self.kernel.vectors - 1))

    def stage(self, f: Function, task: Task) -> Callable[[Value], None]:
        numeric, size = self.numeric, self.numeric.compute_bytes
        scratch = task.workspace + task.thread * task["scratch_size"]

        def body(index: Value) -> None:
            k_block, rest = index % task["k_blocks"], index // task["k_blocks"]
            tile, image = rest % task["row_tiles"], rest // task["row_tiles"]
            top = tile * task["tile_rows"]
            bottom = f.minimum(top + task["tile_rows"], task["out_rows"])
            first = k_block * task["block_panels"]
            last = f.minimum(first + task["block_panels"], task["panels"])
            out = task.operand("out") + image * task["out_image"]
            source = task.operand("source") + image * task["source_image"]
            channel = self.start(f, task, first)
            self.begin(f, task, out, top, bottom, channel, f.minimum(self.start(f, task, last), task["out_channels"]))

            def tap(index: Value) -> None:
                address = task.table("tap_table") + index * (8 * len(TAP))
                facts = {name: f.load(address + 8 * i) for i, name in enumerate(TAP)}
                step = task["row_step"]
                before = f.maximum(top - facts["out_row"] + (step - 1), 0) // step
                behind = f.minimum(f.maximum(bottom - facts["out_row"] + (step - 1), 0) // step, facts["rows"])
                weight = task.operand("other") + facts["weight"]

                def piece(t0: Value) -> None:
                    length = f.minimum(task["channels"] - t0, task["chunk"])

                    def panel_at(panel: Value) -> Value:
                        return scratch + (self.start(f, task, panel) - channel) * task["chunk"] * size

                    def pack(panel: Value, vectors: int) -> None:
                        start = self.start(f, task, panel)
                        offsets = f.to_pointer(task["weight_offsets"] + t0 * 8)
                        width = f.value(vectors * numeric.lanes)
                        arguments = [weight + start * task["weight_pitch"], panel_at(panel), offsets, length, task["out_channels"] - start, width]
                        f.call(self.pack_panel, [*arguments, task["weight_pitch"], task["weight_contiguous"]])

                    self.panels(f, task, first, last, pack)
                    table = f.to_pointer(task["offsets"] + t0 * 8)

                    def row(j: Value) -> None:
                        to = out + (facts["out_row"] + j * step) * task["out_row"] + facts["out_column"] * task["out_column"]
                        read = source + facts["source"] + j * task["source_row"]

                        def run(q: Value, rows: int) -> None:
                            def multiply(panel: Value, vectors: int) -> None:
                                start = self.start(f, task, panel)
                                c = to + q * task["c_pitch"] + start * size
                                call_micro(
                                    f, self.micros[rows, vectors], source=read + q * task["source_pitch"], panel=panel_at(panel), c=c, init=c, table=table,
                                    count=length, pitch=task["source_pitch"], c_pitch=task["c_pitch"], init_pitch=task["c_pitch"],
                                    lanes_last=task["out_channels"] - start - (vectors - 1) * numeric.lanes,
                                )  # fmt: skip

                            self.panels(f, task, first, last, multiply)

                        self.runs(f, facts["columns"], run)

                    f.loop(before, behind, 1, row)

                with f.when(before < behind):
                    f.loop(0, task["channels"], task["chunk"], piece)

            f.loop(0, task["taps"], 1, tap)

        return body

    def begin(self, f: Function, task: Task, out: Value, top: Value, bottom: Value, first: Value, last: Value) -> None:
        """The bias, or zeros, to every output of a tile in the channels ``first`` to ``last``."""
        numeric, size, lanes = self.numeric, self.numeric.compute_bytes, self.numeric.lanes

        def channels(k: Value, mask: Value | None = None) -> None:
            zero = f.zero(numeric.vector)
            value = f.choose(task["has_bias"] > 0, lambda: numeric.load(f, task.operand("bias") + k * size, lanes, mask), lambda: zero)

            def row(h: Value) -> None:
                line = out + h * task["out_row"] + k * size
                f.loop(0, task["out_columns"], 1, lambda w: numeric.put(f, value, line + w * task["out_column"], lanes, mask))

            f.loop(top, bottom, 1, row)

        whole = first + f.integer("and", last - first, -lanes)
        f.loop(first, whole, lanes, channels)
        if self.kernel.masked:
            with f.when(whole < last):
                channels(whole, f.lane_mask(last - whole, lanes))

    def runs(self, f: Function, total: Value, body: Callable[[Value, int], None]) -> None:
        """``body(start, length)`` for ``total`` columns in the fewest runs of at most ``rows``, as even as possible."""
        pieces = (total + (self.kernel.rows - 1)) // self.kernel.rows
        least = total // f.maximum(pieces, 1)
        longer = total - least * pieces
        for length in range(1, self.kernel.rows + 1):
            with f.when(least.equals(length)):
                if length < self.kernel.rows:
                    f.loop(0, longer, 1, lambda i, length=length: body(i * (length + 1), length + 1))
                f.loop(longer, pieces, 1, lambda i, length=length: body(i * length + longer, length))
