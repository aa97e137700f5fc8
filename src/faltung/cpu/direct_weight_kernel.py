"""The kernel of the weight's gradient: a GEMM whose reduction runs over pixels.

Loop nest::

    stage 1, for each group, block of output channels, block of input channels, part of the pixels (a fixed number of parts):
        for each tile of the part (some images, output rows and columns):
            pack the tile of x                     [channel][row][column] or [row][column][channel]
            pack the gradient of y                 [panel of output channels][pixel][lanes]
            for each panel, piece of the pixels, tap, rows of input channels:
                partial[tap][c][k] += x[pixel + tap][c] * gy[pixel][k]          micro-kernels, the pixels' offsets in a table
            partial bias[k] += gy[pixel][k]
    stage 2, for each block and vector of its weights:  add the parts in order, transpose into the weight's memory format

With a single part the sums stay in the thread's own cache and stage 2 follows at once, in stage 1.  The parts depend on the problem alone,
so the bits do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..codegen.emit import Function, Module, Value
from ..codegen.entry import ArgumentBlock, Task, emit_entry
from ..codegen.numeric import Numeric
from .bfloat import TILE_FIELDS, add_pairs
from .micro import Micro, call_micro, emit_micro
from .pack import TILE_ARGUMENTS, emit_pack_panel, emit_pack_tile
from .target import Target

__all__ = ["ARGUMENTS", "DirectWeightKernel"]

_WAYS = 4
"""Sums that the bias gradient of a piece is kept in: one alone waits for its own additions, and its error grows with the length of the piece."""

ARGUMENTS = ArgumentBlock(
    (
        *TILE_ARGUMENTS,
        "tasks", "finish_tasks", "parts", "part_tiles", "tiles", "k_blocks", "c_blocks", "block_panels", "block_channels", "groups",
        "p_tiles", "q_tiles", "tile_p", "tile_q", "tile_images", "images", "p", "q", "in_channels", "out_channels", "wide_panels", "panels",
        "x_image", "x_group", "gy_image", "gy_row", "gy_column", "gy_channel", "gy_offsets", "gy_contiguous", "whole_rows",
        "image_bytes", "pixel_offsets", "last_pixel_offsets", "taps", "tap_offsets", "chunk", "partial_at", "partial_part", "partial_block",
        "partial_tap", "partial_row", "bias_part_at", "bias_part", "bias_group", "has_bias", "scratch_at", "scratch_size", "panels_at", "sums_at",
        "panel_pixels", "weight_rows", "weight_pitch", "runs", "run_weights", "run_start", "run_pitch", "run_rows", "run_blocks", "column_advance",
        "tile_table",
    )
)  # fmt: skip
"""Pitches are bytes.  ``parts`` of ``part_tiles`` tiles each; a tile is ``tile_images`` images by ``tile_p`` rows by ``tile_q`` columns.
``pixel_offsets``: where the tile holds each pixel (``last_pixel_offsets``: in the last, narrower tile of columns).  ``partial_*``: the partial
sums' place and pitches, a block being ``[tap][c][k]``.  A block's weights of one output channel are ``runs`` runs of ``run_weights`` neighbours for
each of its channels; a run starts ``run_start`` bytes a channel and ``run_pitch`` bytes a run into the output channel's weights, and its rows
among the partial sums start at entry ``run_rows`` of ``weight_rows`` a run; ``run_blocks`` vectors hold a run.  ``tile_table``: in bfloat16 pairs,
the pairs of tiles (:data:`faltung.cpu.bfloat.TILE_FIELDS`)."""


@dataclass(frozen=True)
class DirectWeightKernel:
    """What a grad_weight kernel is made for: ``rows`` x ``vectors`` accumulators, with pieces one smaller where ``narrow_*`` say so;
    ``single``: the pixels are one part.  ``x_in_place``, ``gy_in_place``: pixels in one row of nhwc are read where they lie, not packed; of the gradient
    of y where a panel is all of its channels.  ``columns``: column taps that are rows of a block together, with the input channels inside (one piece
    of all of them, but for nhwc, where all are neighbours in memory).  ``across``: the input channels, where those are rows at a pitch."""

    target: Target
    dtype: str
    format: str
    step: int
    rows: int
    vectors: int
    narrow_rows: bool
    narrow_vectors: bool
    single: bool
    x_in_place: bool = False
    gy_in_place: bool = False
    columns: int = 1
    across: int = 0

    @property
    def name(self) -> str:
        chosen = (self.narrow_rows, self.narrow_vectors, self.single, self.x_in_place, self.gy_in_place)
        flags = "".join(letter for letter, set_ in zip("rv1xy", chosen) if set_)
        flags = (f"_c{self.columns}x{self.across}" if self.columns > 1 else "") + (f"_{flags}" if flags else "")
        return f"direct_weight_{self.dtype}_{self.format}_{self.rows}x{self.vectors}_st{self.step}{flags}_{self.target.isa}"

    @property
    def layout(self) -> str:
        return "inner" if self.format == "nhwc" else "outer"

    def emit(self) -> Module:
        """The module's IR text; its entry point is ``entry``."""
        module = Module()
        builder = _Builder(self, module, Numeric(self.dtype, self.target))
        stages = [("tasks", builder.main_stage)]
        if not self.single:
            stages.append(("finish_tasks", builder.finish_stage))
        emit_entry(module, ARGUMENTS, stages)
        return module


class _Builder:
    def __init__(self, kernel: DirectWeightKernel, module: Module, numeric: Numeric) -> None:
        self.kernel, self.module, self.numeric = kernel, module, numeric
        self.pack_tile = emit_pack_tile(module, ARGUMENTS, numeric, kernel.format, kernel.layout, kernel.step, second=numeric.pairs)
        self.pack_panel = emit_pack_panel(module, numeric, second=numeric.pairs)
        self.micros: dict[tuple[int, int], Function] = {}
        for vectors in (kernel.vectors, kernel.vectors - 1)[: 2 if kernel.narrow_vectors else 1]:
            for rows in (kernel.rows, kernel.rows - 1)[: 2 if kernel.narrow_rows else 1]:
                self.micros[rows, vectors] = emit_micro(module, numeric, Micro("channels", rows, vectors, kernel.layout == "inner", across=kernel.across))

    def panel_start(self, f: Function, wide_panels: Value, index: Value) -> Value:
        """First output channel (of the group) of a panel; panels are ``vectors`` vectors wide, then one less."""
        lanes = self.numeric.lanes
        wide, narrow = self.kernel.vectors * lanes, max(1, self.kernel.vectors - 1) * lanes
        return index * narrow + f.minimum(index, wide_panels) * (wide - narrow)

    def decode(self, f: Function, task: Task, index: Value) -> dict[str, Value]:
        """Group and block of channels of block ``index``, with the block's place among the partial sums of part 0."""
        size = self.numeric.compute_bytes
        t = {"block": index}
        t["c_block"], index = index % task["c_blocks"], index // task["c_blocks"]
        t["k_block"], t["group"] = index % task["k_blocks"], index // task["k_blocks"]
        t["c0"] = t["c_block"] * task["block_channels"]
        t["channels"] = f.minimum(task["in_channels"] - t["c0"], task["block_channels"])
        t["first_panel"] = t["k_block"] * task["block_panels"]
        t["last_panel"] = f.minimum(t["first_panel"] + task["block_panels"], task["panels"])
        t["k0"] = self.panel_start(f, task["wide_panels"], t["first_panel"])
        k_end = f.minimum(self.panel_start(f, task["wide_panels"], t["last_panel"]), task["out_channels"])
        t["out_channels"] = k_end - t["k0"]
        t["partial"] = task.workspace + task["partial_at"] + t["block"] * task["partial_block"]
        t["bias"] = task.workspace + task["bias_part_at"] + t["group"] * task["bias_group"] + t["k0"] * size
        t["wants_bias"] = f.define("i1", f"and i1 {(task['has_bias'] > 0).text}, {t['c_block'].equals(0).text}")
        return t

    def main_stage(self, f: Function, task: Task) -> Callable[[Value], None]:
        scratch = task.scratch

        def body(index: Value) -> None:
            part = index % task["parts"]
            t = self.decode(f, task, index // task["parts"])
            t |= {"tile": scratch, "panels": scratch + task["panels_at"]}
            t["partial"] = scratch + task["sums_at"] if self.kernel.single else t["partial"] + part * task["partial_part"]
            t["bias"] = t["bias"] + part * task["bias_part"]
            first = part * task["part_tiles"]
            last = f.minimum(first + task["part_tiles"], task["tiles"])
            f.loop(first, last, 1, lambda tile: self.tile(f, task, t, tile, tile.equals(first)))
            if self.kernel.single:
                pieces = task["runs"] * task["run_blocks"]
                # Output channels outside: each of them is then written from front to back.
                f.loop(0, t["out_channels"], self.numeric.lanes, lambda k: f.loop(0, pieces, 1, lambda i: self.finish_block(f, task, t, i, k)))
                with f.when(t["wants_bias"]):
                    self.finish_bias(f, task, t)

        return body

    def tile(self, f: Function, task: Task, t: dict[str, Value], index: Value, first: Value) -> None:
        """One tile of pixels (or pair of tiles) for the task's channels."""
        place = self.pair_of_tiles(f, task, index) if self.numeric.pairs else self.single_tile(f, task, index)
        q0, p0, image0, rows, columns, images = (place[name] for name in ("q", "p", "image", "rows", "columns", "images"))
        x = task.operand("source") + image0 * task["x_image"] + t["group"] * task["x_group"] + t["c0"] * task["source_channel"]
        block = f.to_pointer(f.load(f["context"]))

        def pack_image(i: Value) -> None:
            second = [place["second_p"], place["x_distance"]] if self.numeric.pairs else []
            source, tile = x + i * task["x_image"], t["tile"] + i * task["image_bytes"]
            f.call(self.pack_tile, [block, source, tile, p0, q0 * task["column_advance"], t["channels"], *second])

        if self.kernel.x_in_place:
            t["tile"] = x + q0 * task["source_column"]
        else:
            f.loop(0, images, 1, pack_image)
        offset = p0 * task["gy_row"] + q0 * task["gy_column"] + t["group"] * task["out_channels"] * task["gy_channel"]
        gy = task.operand("other") + image0 * task["gy_image"] + offset
        image_pixels = rows * columns
        pixels = images * image_pixels
        if self.kernel.gy_in_place:
            t["panels"] = gy
        else:
            self.panels(f, task, t, lambda panel, vectors: self.pack_gradient(f, task, t, panel, vectors, gy, place))
        if self.asks_ahead:
            run = image_pixels * self.numeric.memory_bytes
            t["next"] = gy + t["k0"] * task["gy_channel"] + run
            alone = f.define("i1", f"and i1 {(task['whole_rows'] > 0).text}, {images.equals(1).text}")
            t["run"] = f.select(alone, run, f.value(0))
        table = f.to_pointer(f.select(columns.equals(task["tile_q"]), task["pixel_offsets"], task["last_pixel_offsets"]))
        self.panels(f, task, t, lambda panel, vectors: self.panel(f, task, t, panel, vectors, table, pixels, first))

    @staticmethod
    def single_tile(f: Function, task: Task, index: Value) -> dict[str, Value]:
        """First image, row and column of a tile, and how many of each it has."""
        q_tile, index = index % task["q_tiles"], index // task["q_tiles"]
        p_tile, image_tile = index % task["p_tiles"], index // task["p_tiles"]
        q0, p0, image0 = q_tile * task["tile_q"], p_tile * task["tile_p"], image_tile * task["tile_images"]
        rows = f.minimum(task["p"] - p0, task["tile_p"])
        columns = f.minimum(task["q"] - q0, task["tile_q"])
        images = f.minimum(task["images"] - image0, task["tile_images"])
        return {"q": q0, "p": p0, "image": image0, "rows": rows, "columns": columns, "images": images}

    @staticmethod
    def pair_of_tiles(f: Function, task: Task, index: Value) -> dict[str, Value]:
        record = task.table("tile_table") + index * (8 * len(TILE_FIELDS))
        return {name: f.load(record + 8 * i) for i, name in enumerate(TILE_FIELDS)}

    def panels(self, f: Function, task: Task, t: dict[str, Value], body: Callable[[Value, int], None]) -> None:
        """``body(index, vectors)`` for the panels of the task's block of output channels."""
        split = f.maximum(f.minimum(task["wide_panels"], t["last_panel"]), t["first_panel"])
        f.loop(t["first_panel"], split, 1, lambda i: body(i, self.kernel.vectors))
        if self.kernel.narrow_vectors:
            f.loop(split, t["last_panel"], 1, lambda i: body(i, self.kernel.vectors - 1))

    def panel_place(self, f: Function, task: Task, t: dict[str, Value], index: Value) -> tuple[Value, Value]:
        """First output channel of a panel relative to the block, and the panel's place in scratch."""
        start = self.panel_start(f, task["wide_panels"], index) - t["k0"]
        return start, t["panels"] + start * task["panel_pixels"] * self.numeric.compute_bytes

    def pack_gradient(self, f: Function, task: Task, t: dict[str, Value], index: Value, vectors: int, gy: Value, tile: dict[str, Value]) -> None:
        """The gradient of y as ``[pixel][width]``: whole images where the tile spans whole rows, else row by row."""
        images, rows, columns = tile["images"], tile["rows"], tile["columns"]
        width = vectors * self.numeric.lanes
        start, place = self.panel_place(f, task, t, index)
        limit = task["out_channels"] - t["k0"] - start
        source = gy + (start + t["k0"]) * task["gy_channel"]
        whole = task["whole_rows"] > 0
        runs = f.select(whole, f.value(1), rows)
        length = f.select(whole, rows * columns, columns)

        def image(i: Value) -> None:
            def run(j: Value) -> None:
                target = place + (i * rows * columns + j * length) * (width * self.numeric.compute_bytes)
                pointer = source + i * task["gy_image"] + j * task["gy_row"]
                arguments = [pointer, target, task.table("gy_offsets"), length, limit, f.value(width), task["gy_channel"], task["gy_contiguous"]]
                if self.numeric.pairs:
                    arguments += [tile["gy_distance"], tile["second_p"]]
                f.call(self.pack_panel, arguments)

            f.loop(0, runs, 1, run)

        f.loop(0, images, 1, image)

    def panel(self, f: Function, task: Task, t: dict[str, Value], index: Value, vectors: int, table: Value, pixels: Value, first: Value) -> None:
        """Every weight of one panel of output channels."""
        numeric = self.numeric
        size, width = numeric.compute_bytes, vectors * numeric.lanes
        start, place = self.panel_place(f, task, t, index)
        partial = t["partial"] + start * size
        row_pitch, pitch = task["partial_row"], task["tile_channel"]
        zeros = task.table("zeros")

        def chunk(t0: Value) -> None:
            length = f.minimum(pixels - t0, task["chunk"])
            panel = place + t0 * (width * size)
            fresh = f.define("i1", f"and i1 {first.text}, {t0.equals(0).text}")
            init_pitch = f.select(fresh, f.value(0), row_pitch)

            def tap(index: Value) -> None:
                if self.asks_ahead:
                    self.ask_ahead(f, task, t, index, start, width, f.select(t0.equals(0), t["run"], f.value(0)))
                source = t["tile"] + f.load_index(task.table("tap_offsets"), index)
                c = partial + index * (task["partial_tap"] * self.kernel.columns)

                def piece(m: Value, rows: int) -> None:
                    out = c + m * row_pitch
                    call_micro(
                        f, self.micros[rows, vectors], source=source + m * pitch, panel=panel, c=out, init=f.select(fresh, zeros, out), table=table + t0 * 8,
                        count=length, pitch=pitch, c_pitch=row_pitch, init_pitch=init_pitch, lanes_last=f.value(0),
                    )  # fmt: skip

                self.pieces(f, t["channels"] * self.kernel.columns, piece)

            f.loop(0, task["taps"], 1, tap)
            with f.when(t["wants_bias"]):
                self.add_bias(f, t["bias"] + start * size, panel, length, vectors, fresh)

        f.loop(0, pixels, task["chunk"], chunk)

    @property
    def asks_ahead(self) -> bool:
        """Whether a tile's products ask for the gradient of the next one: in nchw it is a run of each plane, and with several taps there is time."""
        return self.kernel.format == "nchw" and not self.numeric.pairs

    def ask_ahead(self, f: Function, task: Task, t: dict[str, Value], tap: Value, start: Value, width: int, run: Value) -> None:
        """A tap's share of a panel's planes: ``run`` bytes of each of them (of a single tap that is all at once, and nothing is asked for)."""
        taps = task["taps"]
        run = f.select(taps > 1, run, f.value(0))

        def plane(k: Value) -> None:
            place = t["next"] + f.minimum(start + k, t["out_channels"] - 1) * task["gy_channel"]
            f.loop(0, run, 64, lambda at: f.prefetch(place + at, 2))

        with f.when(run > 0):
            f.loop(tap * width // taps, (tap + 1) * width // taps, 1, plane)

    def pieces(self, f: Function, total: Value, body: Callable[[Value, int], None]) -> None:
        size = self.kernel.rows
        count = (total + (size - 1)) // size
        wide = (total - count * (size - 1)) if self.kernel.narrow_rows else count
        f.loop(0, wide, 1, lambda i: body(i * size, size))
        if self.kernel.narrow_rows:
            f.loop(wide, count, 1, lambda i: body(i * (size - 1) + wide, size - 1))

    def add_bias(self, f: Function, target: Value, panel: Value, length: Value, vectors: int, fresh: Value) -> None:
        """``target[k] += sum over pixels``: each piece is summed for itself first, in ``_WAYS`` sums, which keeps the error of long sums small."""
        numeric = self.numeric
        step = numeric.lanes * numeric.compute_bytes

        def pixels(i: Value, *sums: Value) -> list[Value]:
            line = panel + i * (vectors * step)
            lines = [f.load(line + at * step, numeric.vector) for at in range(len(sums))]
            return [add_pairs(f, s, value) if numeric.pairs else f.fadd(s, value) for s, value in zip(sums, lines)]

        whole = length // _WAYS * _WAYS
        sums = f.loop(0, whole, _WAYS, pixels, [f.zero(numeric.vector)] * (_WAYS * vectors))
        sums = [*f.loop(whole, length, 1, pixels, sums[:vectors]), *sums[vectors:]]
        while len(sums) > vectors:
            half = len(sums) // 2
            sums = [f.fadd(a, b) for a, b in zip(sums[:half], sums[half:])]
        for v, total in enumerate(sums):
            place = target + v * step
            before = f.select(fresh, f.zero(numeric.vector), f.load(place, numeric.vector))
            f.store(f.fadd(before, total), place)

    def finish_stage(self, f: Function, task: Task) -> Callable[[Value], None]:
        def body(index: Value) -> None:
            blocks = task["runs"] * task["run_blocks"]
            piece = index % blocks
            t = self.decode(f, task, index // blocks)
            f.loop(0, t["out_channels"], self.numeric.lanes, lambda k: self.finish_block(f, task, t, piece, k))
            wanted = f.define("i1", f"and i1 {piece.equals(0).text}, {t['wants_bias'].text}")
            with f.when(wanted):
                self.finish_bias(f, task, t)

        return body

    def finish_block(self, f: Function, task: Task, t: dict[str, Value], piece: Value, k: Value) -> None:
        """``lanes`` weights, neighbours in memory, of ``lanes`` output channels of the block, the first one ``k``."""
        numeric = self.numeric
        size, memory, lanes = numeric.compute_bytes, numeric.memory_bytes, numeric.lanes
        run, j0 = piece // task["run_blocks"], (piece % task["run_blocks"]) * lanes
        count = t["channels"] * task["run_weights"]
        rows = task.table("weight_rows") + run * task["run_rows"] * 8
        partial = t["partial"] + k * size
        pitch = task["weight_pitch"]
        at = t["c0"] * task["run_start"] + run * task["run_pitch"] + j0 * memory
        out = task.operand("out") + (t["group"] * task["out_channels"] + t["k0"]) * pitch + at
        mask = f.lane_mask(count - j0, lanes)

        with f.when(j0 < count):
            places = [partial + f.load_index(rows, f.minimum(j0 + i, count - 1)) for i in range(lanes)]
            summed = [self.sum_parts(f, task, place, task["partial_part"]) for place in places]
            for i, vector in enumerate(f.transpose(summed)):
                with f.when(k + i < t["out_channels"]):
                    numeric.store(f, vector, out + (k + i) * pitch, lanes, mask)

    def sum_parts(self, f: Function, task: Task, place: Value, pitch: Value) -> Value:
        """The sum over the parts, in order."""
        numeric = self.numeric
        first = f.load(place, numeric.vector)
        if self.kernel.single:
            return first
        (total,) = f.loop(1, task["parts"], 1, lambda i, s: [f.fadd(s, f.load(place + i * pitch, numeric.vector))], [first])
        return total

    def finish_bias(self, f: Function, task: Task, t: dict[str, Value]) -> None:
        numeric = self.numeric
        out = task.operand("bias") + (t["group"] * task["out_channels"] + t["k0"]) * numeric.memory_bytes

        def block(k: Value) -> None:
            total = self.sum_parts(f, task, t["bias"] + k * numeric.compute_bytes, task["bias_part"])
            mask = f.lane_mask(t["out_channels"] - k, numeric.lanes)
            numeric.store(f, total, out + k * numeric.memory_bytes, numeric.lanes, mask)

        f.loop(0, t["out_channels"], numeric.lanes, block)
