"""The kernel of convolution on matrix tiles: an implicit GEMM like direct's, whose products are of 16 pixels by 16 output channels.

Loop nest (forward and grad_input, in phases as in :mod:`faltung.cpu.direct_kernel`)::

    stage 1, for each phase, group and panel of 32 (or 16) output channels:    pack the panel: [part][block of channels][tap][pair][width]
    stage 2, for each image, group, tile of output rows and columns, block of panels:
        pack the tile of the source, a plane for each part                     padding, stride, dilation, type, format end here
        for each phase, panel, 32 (or 64) pixels:                              the micro-kernel, over the whole reduction
        store                                                                  type, format, phases

Pixels of a tile are counted on from row to row (``linear``), so a matrix tile is full whatever the width of the image; the products of the few pixels between
two rows are not stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..codegen.emit import Function, Module, Value, vector_type
from ..codegen.entry import ArgumentBlock, Task, emit_entry
from ..codegen.numeric import Numeric
from . import matrix_tiles as tiles
from .amx_pack import PIXEL_ARGUMENTS, emit_pack_pairs_of_rows, emit_pack_pixels
from .bfloat import Rounded
from .checked import mark_unless_finite, still_finite
from .direct_kernel import TileBuilder
from .pack import TILE_ARGUMENTS
from .parts import PARTS, PRODUCTS
from .store import emit_store_panel
from .target import Target

__all__ = ["ARGUMENTS", "PANEL", "AmxKernel"]

PANEL = 2
"""Vectors of output channels of a wide panel; a narrow one has a single one."""

_SHAPES = {PANEL: 2, 1: 4}
"""Matrix tiles of pixels by vectors of channels: four sums, whose additions do not wait for each other."""

ARGUMENTS = ArgumentBlock(
    (
        *TILE_ARGUMENTS, *PIXEL_ARGUMENTS,
        "pack_tasks", "tasks", "phases", "row_phases", "column_phases", "p_tiles", "q_tiles", "tile_p", "tile_q", "k_blocks", "block_panels",
        "wide_panels", "panels", "groups", "source_channels", "out_channels", "source_image", "source_group", "out_image", "out_group", "out_row", "out_column",
        "out_channel", "weight_group", "weight_pitch", "weight_contiguous", "bias_at", "bias_group", "has_bias", "scratch_at", "scratch_size", "c_at",
        "column_advance", "palette", "pairs", "channel_blocks", "tap_major", "sum_rows", "terms", "flag_at",
    )
)  # fmt: skip
"""As in :data:`faltung.cpu.direct_kernel.ARGUMENTS`; ``palette``: address of the shapes of the matrix tiles; a step of the reduction is ``pairs`` pairs of a
tap, ``channel_blocks`` steps all channels of it; ``tap_major``: the weight's memory has the channels of a tap as neighbours; the sums of ``sum_rows`` rows are
stored at a time; ``terms``: channels of a tap, or of the joined taps of a row; ``flag_at``: where, counted from ``scratch_at``, a mark is left if a result is
not finite."""


@dataclass(frozen=True)
class AmxKernel:
    """What a kernel is made for; everything else is an argument.  ``step``, ``apart``: as in :class:`faltung.cpu.direct_kernel.DirectKernel`.

    ``packed``: the tile is copied to scratch; where it is not, the source is bfloat16, whose channels are neighbours and whose pixels are one long row.
    ``narrow``: the last panel has a single vector.  ``joined``: the taps of a row of the kernel are one, of a pixel's few channels times their number.
    """

    target: Target
    dtype: str
    format: str
    step: int
    narrow: bool
    packed: bool
    apart: int
    joined: bool
    layout: str = "linear"

    @property
    def name(self) -> str:
        flags = "".join(letter for letter, set_ in zip("vij", (self.narrow, not self.packed, self.joined)) if set_)
        return f"amx_{self.dtype}_{self.format}_st{self.step}{'_' if flags else ''}{flags}{f'_a{self.apart}' if self.apart else ''}_{self.target.isa}"

    @property
    def parts(self) -> int:
        return PARTS[self.dtype]

    @property
    def checked(self) -> bool:
        """Whether numbers that are not finite may give NaN where they should not (see :mod:`faltung.cpu.checked`)."""
        return self.joined or self.parts > 1

    def emit(self) -> Module:
        """The module's IR text; its entry point is ``entry``."""
        module = Module()
        # Weights and sums are float32 before and after the products.
        builder = _Builder(self, module, Numeric(self.dtype, replace(self.target, bfloat16_dot=False)))
        emit_entry(module, ARGUMENTS, [("pack_tasks", builder.pack_stage), ("tasks", builder.compute_stage)])
        return module


def emit_micro(module: Module, chunks: int, vectors: int, parts: int) -> Function:
    """``amx_micro(a, b, c, bias, table, steps, pixel, b_step, c_pitch, a_part, b_part, next...)``: ``chunks`` matrix tiles of 16 pixels by ``vectors``.

    ``a``: the first pixel, ``table``: where each step's channels are behind it; pixels are ``pixel`` bytes apart, parts ``a_part``.  ``next``: by how many
    pixels each further chunk is behind the first.  ``b``: the panel, ``b_step`` bytes a step.  ``c``: sums of float32, ``c_pitch`` bytes a pixel, that
    begin with the ``bias``.
    """
    names = ("steps", "pixel", "b_step", "c_pitch", "a_part", "b_part", *(f"next{i}" for i in range(1, chunks)))
    pointers = ("a", "b", "c", "bias", "table")
    f = module.function(f"amx_micro_{chunks}x{vectors}", [*(("ptr", name) for name in pointers), *(("i64", name) for name in names)])
    behind = [f.value(0), *(f[f"next{i}"] for i in range(1, chunks))]
    left, b_pitch = [f["a"] + pixels * f["pixel"] if i else f["a"] for i, pixels in enumerate(behind)], f.value(vectors * 64)
    for chunk in range(chunks):
        for v in range(vectors):
            tiles.load(f, chunk * vectors + v, f["bias"] + v * 64, f.value(0))

    def products(t: Value, chosen: tuple[tuple[int, int], ...]) -> None:
        offset, b = f.load_index(f["table"], t), f["b"] + t * f["b_step"]
        held: dict[int, tuple[int, int]] = {}

        def operand(tile: int, what: tuple[int, int], pointer: Value, part: Value, pitch: Value) -> int:
            if held.get(tile) != what:
                held[tile] = what
                tiles.load(f, tile, pointer + part * what[0] if what[0] else pointer, pitch)
            return tile

        for a_part, b_part in chosen:
            for chunk in range(chunks):
                a = operand(tiles.LEFT[chunk % 2], (a_part, chunk), left[chunk] + offset, f["a_part"], f["pixel"])
                for v in range(vectors):
                    tiles.dot(f, chunk * vectors + v, a, operand(tiles.RIGHT[v], (b_part, v), b + v * 64, f["b_part"], b_pitch))

    for chosen in PRODUCTS[parts]:
        f.loop(0, f["steps"], 1, lambda t, chosen=chosen: products(t, chosen))
    for chunk, pixels in enumerate(behind):
        for v in range(vectors):
            tiles.store(f, chunk * vectors + v, f["c"] + pixels * f["c_pitch"] + v * 64, f["c_pitch"])
    f.ret()
    return f


def emit_check(module: Module) -> Function:
    """``check(sums, rows, columns, valid, width, sums_row, flag)``: leaves a mark at ``flag`` where one of the sums to be stored is not finite."""
    names = ("rows", "columns", "valid", "width", "sums_row")
    f = module.function("check", [("ptr", "sums"), *(("i64", name) for name in names), ("ptr", "flag")])
    type_ = vector_type("float", 16)

    def row(p: Value, state: Value) -> list[Value]:
        def column(q: Value, state: Value) -> list[Value]:
            place = f["sums"] + p * f["sums_row"] + q * f["width"] * 4

            def vector(v: Value, state: Value) -> list[Value]:
                return [still_finite(f, state, f.load_masked(place + v * 4, f.lane_mask(f["valid"] - v, 16), type_))]

            return f.loop(0, f["valid"], 16, vector, [state])

        return f.loop(0, f["columns"], 1, column, [state])

    (state,) = f.loop(0, f["rows"], 1, row, [f.zero(type_)])
    mark_unless_finite(f, state, f["flag"], 16)
    f.ret()
    return f


def emit_store_pixels(module: Module, numeric: Numeric, vectors: int) -> Function:
    """``store_pixels(sums, out, rows, columns, valid, sums_row, out_row, out_column)``: sums ``[pixel][16 * vectors]`` to ``valid`` neighbouring channels.

    What :func:`faltung.cpu.store.emit_store_panel` does for nhwc, without its loop over a pixel's channels: 16 cycles a pixel and panel, and many a layer
    multiplies in less.
    """
    names = ("rows", "columns", "valid", "sums_row", "out_row", "out_column")
    f = module.function(f"store_pixels_{vectors}", [("ptr", "sums"), ("ptr", "out"), *(("i64", name) for name in names)])
    type_ = vector_type("float", 16)

    def pixels(masks: Sequence[Value | None]) -> None:
        def row(p: Value) -> None:
            def column(_: Value, source: Value, target: Value) -> list[Value]:
                for v, mask in enumerate(masks):
                    numeric.store(f, f.load(source + v * 64, type_), target + v * 16 * numeric.memory_bytes, 16, mask)
                return [source + 64 * vectors, target + f["out_column"]]

            f.loop(0, f["columns"], 1, column, [f["sums"] + p * f["sums_row"], f["out"] + p * f["out_row"]])

        f.loop(0, f["rows"], 1, row)

    f.branch(f["valid"] >= 16 * vectors, lambda: pixels([None] * vectors), lambda: pixels([f.lane_mask(f["valid"] - v * 16, 16) for v in range(vectors)]))
    f.ret()
    return f


class _Builder(TileBuilder):
    kernel: AmxKernel  # type: ignore[assignment]

    def __init__(self, kernel: AmxKernel, module: Module, numeric: Numeric) -> None:
        super().__init__(kernel, module, numeric)  # type: ignore[arg-type]
        self.pair_rows = emit_pack_pairs_of_rows(module, kernel.parts)
        stored = Rounded(numeric.dtype, numeric.target) if numeric.dtype == "bf16" else numeric
        widths, nhwc = (PANEL, 1) if kernel.narrow else (PANEL,), kernel.format == "nhwc"
        self.store_pixels = {vectors: emit_store_pixels(module, stored, vectors) for vectors in widths if nhwc}
        self.store_panel = None if nhwc else emit_store_panel(module, stored, kernel.format)
        self.check = emit_check(module) if kernel.checked else None
        self.micros = {vectors: emit_micro(module, _SHAPES[vectors], vectors, kernel.parts) for vectors in widths}

    def emit_pack_tile(self) -> Function:
        return emit_pack_pixels(self.module, ARGUMENTS, self.numeric, self.kernel.format, self.kernel.parts, self.kernel.step, self.kernel.joined)

    @property
    def widths(self) -> tuple[int, int]:
        return PANEL * 16, 16

    def steps(self, task: Task, count: Value) -> Value:
        """Steps of a reduction of ``count`` elements, those of all parts together."""
        return count // (task["pairs"] * self.kernel.parts)

    def pack_piece(self, f: Function, task: Task, group: Value, start: Value, width: Value, target: Value, offsets: Value, count: Value) -> None:
        """Pack a panel: blocks of channels by way of rows of float32 in this thread's scratch."""
        pairs, total, table = task["pairs"], task["terms"], f.to_pointer(offsets)
        rows = task.scratch
        steps, line = self.steps(task, count), width * 4
        taps = steps // task["channel_blocks"]
        source = task.operand("other") + group * task["weight_group"] + start * task["weight_pitch"]
        limit = task["out_channels"] - start

        def gather(table: Value, rows: Value, terms: Value) -> None:
            f.call(self.pack_panel, [source, rows, table, terms, limit, width, task["weight_pitch"], task["weight_contiguous"]])

        def block(index: Value) -> None:
            first = index * pairs * 2
            channels = f.maximum(f.minimum(total - first, pairs * 2), 0)
            place = target + index * taps * pairs * line
            panel_part = steps * pairs * line

            def by_taps() -> None:
                f.loop(0, taps, 1, lambda t: gather(table + (t * total + first) * 8, rows + t * pairs * 2 * line, channels))
                f.call(self.pair_rows, [rows, place, taps, pairs, channels, pairs * 2, f.value(1), width, panel_part])

            def by_channels() -> None:
                gather(table + first * taps * 8, rows, channels * taps)
                f.call(self.pair_rows, [rows, place, taps, pairs, channels, f.value(1), taps, width, panel_part])

            f.branch(task["tap_major"] > 0, by_taps, by_channels)

        f.loop(0, task["channel_blocks"], 1, block)

    def compute_stage(self, f: Function, task: Task) -> Callable[[Value], None]:
        multiply = super().compute_stage(f, task)
        flag = task.workspace + task["scratch_at"] + task["flag_at"]

        def body(index: Value) -> None:
            self.flag = flag
            tiles.configure(f, task.table("palette"))
            multiply(index)
            tiles.release(f)

        return body

    def row_phase(self, f: Function, task: Task, t: dict[str, Value], row_index: Value) -> None:
        def column_phase(column_index: Value) -> None:
            phase = self.phase(f, task, t, row_index, column_index)
            row, column = t["p0"] * task["row_phases"] + phase["row_start"], t["q0"] * task["column_phases"] + phase["column_start"]
            out = t["out"] + row * task["out_row"] + column * task["out_column"]
            both = f.define("i1", f"and i1 {(phase['rows'] > 0).text}, {(phase['columns'] > 0).text}")
            with f.when(both):
                split = f.maximum(f.minimum(task["wide_panels"], t["last_panel"]), t["first_panel"])
                f.loop(t["first_panel"], split, 1, lambda i: self.panel(f, task, t, phase, out, i, PANEL))
                if self.kernel.narrow:
                    f.loop(split, t["last_panel"], 1, lambda i: self.panel(f, task, t, phase, out, i, 1))

        f.loop(0, task["column_phases"], 1, column_phase)

    def panel(self, f: Function, task: Task, t: dict[str, Value], phase: dict[str, Value], out: Value, index: Value, vectors: int) -> None:
        """Every pixel of the tile for one panel of output channels."""
        width, chunks = vectors * 16, _SHAPES[vectors]
        start = self.panel_start(f, task["wide_panels"], index)
        bias, panel = t["bias"] + start * 4, phase["panels"] + start * phase["count"] * 4
        pixel, steps, b_step = task["tile_column"] * task["column_advance"], self.steps(task, phase["count"]), task["pairs"] * (width * 4)
        row_pixels, c_pitch = task["tile_row"] // pixel, f.value(width * 4)
        valid, out = f.minimum(task["out_channels"] - start, width), out + start * task["out_channel"]
        step_row, step_column = task["out_row"] * task["row_phases"], task["out_column"] * task["column_phases"]

        def group(p: Value) -> None:
            rows = f.minimum(phase["rows"] - p, task["sum_rows"])
            total, source = (rows - 1) * row_pixels + phase["columns"], t["tile"] + p * task["tile_row"]

            def placed(pixel: Value) -> Value:
                """The last matrix tiles begin early, so that nothing behind the last pixel is read."""
                return f.maximum(f.minimum(pixel, total - tiles.ROWS), 0)

            def block(i: Value) -> None:
                first = placed(i)
                behind = [placed(i + chunk * tiles.ROWS) - first for chunk in range(1, chunks)]
                f.call(self.micros[vectors], [
                    source + first * pixel, panel, t["c"] + first * c_pitch, bias, f.to_pointer(phase["tile_offsets"]), steps, pixel, b_step, c_pitch,
                    task["tile_part"], steps * b_step, *behind,
                ])  # fmt: skip

            f.loop(0, total, chunks * tiles.ROWS, block)
            target = out + p * step_row
            if self.check is not None:
                f.call(self.check, [t["c"], rows, phase["columns"], valid, f.value(width), row_pixels * c_pitch, self.flag])
            sums_row, columns = row_pixels * c_pitch, phase["columns"]
            if self.store_panel is None:
                f.call(self.store_pixels[vectors], [t["c"], target, rows, columns, valid, sums_row, step_row, step_column])
            else:
                f.call(self.store_panel, [t["c"], target, rows, columns, valid, f.value(width), sums_row, step_row, step_column, task["out_channel"]])

        f.loop(0, phase["rows"], task["sum_rows"], group)
