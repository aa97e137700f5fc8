"""The kernel of direct convolution: implicit GEMM over tiles packed into cache.

Loop nest (forward and grad_input; a *phase* is one residue of the output index by the stride, forward has one)::

    stage 1, for each phase, group and panel of output channels:     pack the weight panel; convert the bias      (unless packed at use)
    stage 2, for each image, group, tile of output rows and columns, block of panels:
        pack the tile of the source                                  padding, stride, dilation, type, format end here
        for each phase of rows and columns, piece of the reduction:  pack the panel's piece (at use); micro-kernels
        store                                                        type, format, phases

``channels`` orientation: vectors over output channels, rows over pixels.  ``pixels``: vectors over pixels of whole rows (their gaps
included), rows over output channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..codegen.emit import Function, Module, Value, vector_type
from ..codegen.entry import ArgumentBlock, Task, emit_entry
from ..codegen.numeric import Numeric
from .bfloat import Rounded, emit_pack_pairs
from .micro import Micro, call_micro, emit_micro
from .pack import TILE_ARGUMENTS, emit_pack_panel, emit_pack_tile
from .store import emit_store_panel, emit_store_plane
from .target import Target
from .tile import block_room

__all__ = ["ARGUMENTS", "PHASE_FIELDS", "DirectKernel", "TileBuilder"]

PHASE_FIELDS = ("count", "tile_offsets", "weight_offsets", "packed", "row_start", "row_count", "column_start", "column_count")
"""A phase: length of its reduction, addresses of the tile's and the weight's byte offsets along it, place of its panels in the workspace,
and which outputs it covers."""

ARGUMENTS = ArgumentBlock(
    (
        *TILE_ARGUMENTS,
        "pack_tasks", "tasks", "phases", "row_phases", "column_phases", "p_tiles", "q_tiles", "tile_p", "tile_q", "k_blocks", "block_panels",
        "wide_panels", "panels", "groups", "source_channels", "out_channels", "source_image", "source_group", "out_image", "out_group", "out_row", "out_column",
        "out_channel", "chunk", "weight_group", "weight_pitch", "weight_contiguous", "bias_at", "bias_group", "has_bias",
        "scratch_at", "scratch_size", "start_at", "c_at", "c_channel", "column_advance", "weight_distance", "panel_at",
    )
)  # fmt: skip
"""Pitches are bytes.  ``weight_contiguous``: whether neighbouring terms of the reduction are neighbours in the weight's memory; in pairs of bfloat16,
whose halves are ``weight_distance`` apart there, how many are.  ``wide_panels`` come first, the others are one vector (``channels``) or one row
(``pixels``) narrower; ``start_at`` is where a thread's scratch has room for one micro-kernel's start values, ``c_at`` and ``c_channel`` place the
accumulators there, ``panel_at`` the bias and the piece of a panel that is packed at use."""


@dataclass(frozen=True)
class DirectKernel:
    """What a direct kernel is made for; everything else is an argument.

    ``step``: of neighbouring entries' source columns, see :func:`faltung.cpu.pack.step_kind`.  ``narrow_rows``, ``narrow_vectors``: pieces one smaller are
    needed too.  ``masked``: the last vector of channels is partial.  ``in_place``: accumulate in the output itself; in pairs of bfloat16 only the last
    piece of the reduction is added there, the others in scratch.
    ``phases``: column phases that the store interleaves (1, 2, or more).  ``packed``: the tile is copied to scratch; where it is not, the
    micro-kernels read the source itself (1x1 kernels over pixels in a row, whose channels are neighbours in memory).  ``spread``: see
    :func:`faltung.cpu.pack.emit_pack_tile`; ``apart``: :func:`faltung.cpu.pack.emit_pack_panel`.  ``at_use`` (``channels`` only): where one task uses a panel,
    it packs it itself, piece by piece, into the first-level cache: a packed weight of 16 MB would go to memory and come back.
    """

    target: Target
    dtype: str
    format: str
    orientation: str
    layout: str
    step: int
    rows: int
    vectors: int
    narrow_rows: bool
    narrow_vectors: bool
    masked: bool
    in_place: bool
    phases: int
    packed: bool = True
    spread: int = 0
    apart: int = 0
    at_use: bool = False

    @property
    def name(self) -> str:
        flags = "".join(
            letter for letter, set_ in zip("rvmiup", (self.narrow_rows, self.narrow_vectors, self.masked, self.in_place, not self.packed, self.at_use)) if set_
        )
        tail = (f"_{flags}" if flags else "") + (f"_c{self.spread}" if self.spread else "") + (f"_a{self.apart}" if self.apart else "")
        block = f"{self.rows}x{self.vectors}_st{self.step}_ph{self.phases}"
        return f"direct_{self.dtype}_{self.format}_{self.orientation}_{self.layout}_{block}{tail}_{self.target.isa}"

    def emit(self) -> Module:
        """The module's IR text; its entry point is ``entry``."""
        module = Module()
        numeric = Numeric(self.dtype, self.target)
        builder = _Channels(self, module, numeric) if self.orientation == "channels" else _Pixels(self, module, numeric)
        emit_entry(module, ARGUMENTS, [("pack_tasks", builder.pack_stage), ("tasks", builder.compute_stage)], own_first=True)
        return module


def load_phase(f: Function, phase: Value) -> dict[str, Value]:
    return {name: f.load(phase + 8 * i) for i, name in enumerate(PHASE_FIELDS)}


class TileBuilder:
    """What kernels that multiply packed tiles share: weight packing, task decoding, tiles."""

    def __init__(self, kernel: DirectKernel, module: Module, numeric: Numeric) -> None:
        self.kernel, self.module, self.numeric = kernel, module, numeric
        self.pack_panel = emit_pack_pairs(module, numeric) if numeric.pairs else emit_pack_panel(module, numeric, apart=kernel.apart)
        self.stored = Rounded(numeric.dtype, numeric.target) if numeric.pairs else numeric
        self.pack_tile = self.emit_pack_tile() if kernel.packed and kernel.layout != "blocked" else None

    def emit_pack_tile(self) -> Function:
        """``pack_tile(block, source, tile, p0, q0, channels)``, see :func:`faltung.cpu.pack.emit_pack_tile`."""
        kernel = self.kernel
        return emit_pack_tile(self.module, ARGUMENTS, self.numeric, kernel.format, kernel.layout, kernel.step, spread=kernel.spread)

    @property
    def widths(self) -> tuple[int, int]:
        """Entries of a wide and of a narrow panel."""
        raise NotImplementedError

    def panel_start(self, f: Function, wide_panels: Value, index: Value) -> Value:
        """First output channel (of the group) of a panel."""
        wide, narrow = self.widths
        return index * narrow + f.minimum(index, wide_panels) * (wide - narrow)

    def pack_stage(self, f: Function, task: Task) -> Callable[[Value], None]:
        numeric = self.numeric
        wide, narrow = self.widths
        workspace = task.workspace

        def body(index: Value) -> None:
            panels, groups = task["panels"], task["groups"]
            panel, rest = index % panels, index // panels
            group, phase_index = rest % groups, rest // groups
            phase = load_phase(f, task.table("phases") + phase_index * (8 * len(PHASE_FIELDS)))
            start = self.panel_start(f, task["wide_panels"], panel)
            width = f.select(panel < task["wide_panels"], f.value(wide), f.value(narrow))
            target = workspace + phase["packed"] + (group * self.padded(f, task) + start) * phase["count"] * numeric.compute_bytes
            self.pack_piece(f, task, group, start, width, target, phase["weight_offsets"], phase["count"])
            with f.when(phase_index.equals(0)):
                self.pack_bias(f, task, workspace + task["bias_at"] + group * task["bias_group"] + start * numeric.compute_bytes, group, start, width)

        return body

    def pack_piece(self, f: Function, task: Task, group: Value, start: Value, width: Value, target: Value, offsets: Value, count: Value) -> None:
        """Pack ``count`` terms, whose weights' offsets are at the address ``offsets``, of the panel that begins at output channel ``start``."""
        source = task.operand("other") + group * task["weight_group"] + start * task["weight_pitch"]
        distance = [task["weight_distance"]] if self.numeric.pairs else []
        arguments = [source, target, f.to_pointer(offsets), count, task["out_channels"] - start, width, task["weight_pitch"]]
        f.call(self.pack_panel, [*arguments, *distance, task["weight_contiguous"]])

    def padded(self, f: Function, task: Task) -> Value:
        """Output channels of a group, rounded up to whole panels."""
        return self.panel_start(f, task["wide_panels"], task["panels"])

    def pack_bias(self, f: Function, task: Task, target: Value, group: Value, start: Value, width: Value) -> None:
        """The bias of ``width`` output channels in the compute type, zeros where there is none."""
        numeric, total = self.numeric, task["out_channels"]
        source = task.operand("bias") + (group * total + start) * numeric.memory_bytes
        known = f.select(task["has_bias"] > 0, f.maximum(f.minimum(total - start, width), 0), f.value(0))
        size, memory = numeric.compute_bytes, numeric.memory_bytes
        f.loop(0, known, 1, lambda j: f.store(numeric.load(f, source + j * memory, 1), target + j * size))
        f.loop(known, width, 1, lambda j: f.store(f.zero(numeric.compute), target + j * size))

    def compute_stage(self, f: Function, task: Task) -> Callable[[Value], None]:
        scratch = task.scratch
        packed = f.stack(8)  # the tile that scratch holds: neighbouring tasks share one
        f.store(f.value(-1), packed)

        def body(index: Value) -> None:
            t: dict[str, Value] = {"scratch": scratch, "c": scratch + task["c_at"]}
            t["k_block"], index = index % task["k_blocks"], index // task["k_blocks"]
            number = index
            t["q0"], index = (index % task["q_tiles"]) * task["tile_q"], index // task["q_tiles"]
            t["p0"], index = (index % task["p_tiles"]) * task["tile_p"], index // task["p_tiles"]
            t["group"], t["image"] = index % task["groups"], index // task["groups"]
            source = task.operand("source") + t["image"] * task["source_image"] + t["group"] * task["source_group"]
            t["tile"] = scratch
            if not self.kernel.packed:
                t["tile"] = source + t["q0"] * task["tile_column"]
            else:
                with f.when(f.compare("ne", f.load(packed), number)):
                    f.store(number, packed)
                    if self.pack_tile is None:
                        self.pack_blocks(f, task, t, source + t["q0"] * task["tile_column"])
                    else:
                        first_column = t["q0"] * task["column_advance"]
                        f.call(self.pack_tile, [f.to_pointer(f.load(f["context"])), source, scratch, t["p0"], first_column, task["source_channels"]])
            t["first_panel"] = t["k_block"] * task["block_panels"]
            t["last_panel"] = f.minimum(t["first_panel"] + task["block_panels"], task["panels"])
            t["bias"] = task.workspace + task["bias_at"] + t["group"] * task["bias_group"]
            t["out"] = task.operand("out") + t["image"] * task["out_image"] + t["group"] * task["out_group"]
            f.loop(0, task["row_phases"], 1, lambda i: self.row_phase(f, task, t, i))

        return body

    def pack_blocks(self, f: Function, task: Task, t: dict[str, Value], source: Value) -> None:
        """Copy a tile of one row so that what a block reads, of all channels, is one run: [block][channel][column]."""
        columns = self.phase(f, task, t, f.value(0), f.value(0))
        rest, room, size = columns["column_count"] - t["q0"], block_room(self.kernel.rows), self.numeric.compute_bytes
        type_ = vector_type(self.numeric.compute, room)

        def channel(c: Value) -> None:
            row, tile = source + c * task["source_channel"], t["tile"] + c * (room * size)

            def piece(q: Value, _: int, index: Value) -> None:
                place, target = row + q * size, tile + index * task["tile_row"]

                def last() -> None:  # nothing is read behind the row, which may be the end of memory
                    f.store(f.load_masked(place, f.lane_mask(rest - q, room), type_), target)

                f.branch(q + room <= rest, lambda: f.store(f.load(place, type_), target), last)

            self.pieces(f, columns["columns"], self.kernel.rows, self.kernel.narrow_rows, piece)

        f.loop(0, task["source_channels"], 1, channel)

    def row_phase(self, f: Function, task: Task, t: dict[str, Value], row_index: Value) -> None:
        raise NotImplementedError

    def phase(self, f: Function, task: Task, t: dict[str, Value], row_index: Value, column_index: Value) -> dict[str, Value]:
        """The phase's facts, with the rows and columns of it in this tile and its panels for this group."""
        address = task.table("phases") + (row_index * task["column_phases"] + column_index) * (8 * len(PHASE_FIELDS))
        phase = load_phase(f, address)
        phase["rows"] = f.minimum(phase["row_count"] - t["p0"], task["tile_p"])
        phase["columns"] = f.minimum(phase["column_count"] - t["q0"], task["tile_q"])
        group_bytes = self.padded(f, task) * phase["count"] * self.numeric.compute_bytes
        phase["panels"] = task.workspace + phase["packed"] + t["group"] * group_bytes
        return phase

    def chunks(self, f: Function, task: Task, phase: dict[str, Value], body: Callable[[Value, Value, Value, Value], None]) -> None:
        """``body(t0, length, table, first)`` for each piece of the reduction, at least one (of length 0: the start values alone)."""
        table = f.to_pointer(phase["tile_offsets"])

        def piece(t0: Value) -> None:
            length = f.minimum(phase["count"] - t0, task["chunk"])
            body(t0, length, table + t0 * 8, t0.equals(0))

        f.loop(0, f.maximum(phase["count"], 1), task["chunk"], piece)

    def pieces(self, f: Function, total: Value, size: int, narrow: bool, body: Callable[[Value, int, Value], None]) -> None:
        """``body(start, size, index)`` for ``total`` split into pieces of ``size`` and, where ``narrow``, ``size - 1``."""
        count = (total + (size - 1)) // size
        rest = count * size - total
        wide = (count - rest) if narrow else count
        f.loop(0, wide, 1, lambda i: body(i * size, size, i))
        if narrow:
            f.loop(wide, count, 1, lambda i: body(i * (size - 1) + wide, size - 1, i))


class _Channels(TileBuilder):
    """Vectors over output channels."""

    def __init__(self, kernel: DirectKernel, module: Module, numeric: Numeric) -> None:
        super().__init__(kernel, module, numeric)
        self.store = None if kernel.in_place else emit_store_panel(module, self.stored, kernel.format)
        self.micros: dict[tuple[int, int], Function] = {}
        self.last_micros: dict[tuple[int, int], Function] = {}
        for vectors in (kernel.vectors, kernel.vectors - 1)[: 2 if kernel.narrow_vectors else 1]:
            for rows in (kernel.rows, kernel.rows - 1)[: 2 if kernel.narrow_rows else 1]:
                micro = Micro("channels", rows, vectors, unit_pitch=kernel.layout != "inner", masked=kernel.masked and kernel.in_place, ahead=not kernel.at_use)
                self.micros[rows, vectors] = emit_micro(module, numeric, micro)
                if kernel.in_place and numeric.pairs:
                    self.last_micros[rows, vectors] = emit_micro(module, numeric, replace(micro, rounded=True))

    @property
    def widths(self) -> tuple[int, int]:
        lanes = self.numeric.lanes
        return self.kernel.vectors * lanes, max(1, self.kernel.vectors - 1) * lanes

    def row_phase(self, f: Function, task: Task, t: dict[str, Value], row_index: Value) -> None:
        def column_phase(column_index: Value) -> None:
            phase = self.phase(f, task, t, row_index, column_index)
            row = t["p0"] * task["row_phases"] + phase["row_start"]
            column = t["q0"] * task["column_phases"] + phase["column_start"]
            out = t["out"] + row * task["out_row"] + column * task["out_column"]
            split = f.maximum(f.minimum(task["wide_panels"], t["last_panel"]), t["first_panel"])
            f.loop(t["first_panel"], split, 1, lambda i: self.panel(f, task, t, phase, out, i, self.kernel.vectors))
            if self.kernel.narrow_vectors:
                f.loop(split, t["last_panel"], 1, lambda i: self.panel(f, task, t, phase, out, i, self.kernel.vectors - 1))

        f.loop(0, task["column_phases"], 1, column_phase)

    def panel(self, f: Function, task: Task, t: dict[str, Value], phase: dict[str, Value], out: Value, index: Value, vectors: int) -> None:
        """Every pixel of the tile for one panel of output channels."""
        numeric, kernel = self.numeric, self.kernel
        size, width = numeric.compute_bytes, vectors * numeric.lanes
        start = self.panel_start(f, task["wide_panels"], index)
        bias, panel = t["bias"] + start * size, phase["panels"] + start * phase["count"] * size
        if kernel.at_use:
            bias = t["scratch"] + task["panel_at"]
            panel = bias + width * size
            self.pack_bias(f, task, bias, t["group"], start, f.value(width))
        valid = f.minimum(task["out_channels"] - start, width)
        out = out + start * task["out_channel"]
        if kernel.in_place:
            last = c, c_row, c_column = out, task["out_row"] * task["row_phases"], task["out_column"] * task["column_phases"]
        if self.last_micros or not kernel.in_place:
            c, c_row, c_column = t["c"], task["tile_q"] * (width * size), f.value(width * size)
        tile_row = task["tile_row"]
        pitch = f.value(size) if kernel.layout != "inner" else task["tile_column"] * task["column_advance"]
        lanes_last = valid - (vectors - 1) * numeric.lanes

        def start_of(p: Value, q: Value, index_of_piece: Value) -> Value:
            return t["tile"] + index_of_piece * tile_row if kernel.layout == "blocked" else t["tile"] + p * tile_row + q * pitch

        def chunk(t0: Value, length: Value, table: Value, first: Value) -> None:
            init_pitch = f.select(first, f.value(0), c_column)
            piece_panel = panel
            if kernel.at_use:
                self.pack_piece(f, task, t["group"], start, f.value(width), panel, phase["weight_offsets"] + t0 * 8, length)
            else:
                piece_panel = panel + t0 * (width * size)

            def rows_to(micros: dict[tuple[int, int], Function], to: Value, to_row: Value, to_column: Value) -> None:
                def row(p: Value) -> None:
                    def piece(q: Value, rows: int, index_of_piece: Value) -> None:
                        place = c + p * c_row + q * c_column
                        number = q // kernel.rows
                        # the next piece of the panel, each line once: where a layer's weights lie in the third-level cache, up to 20 % of its time
                        ahead = panel + (t0 + length) * (width * size) + f.minimum(number, vectors - 1) * length * 64
                        if not kernel.packed and not kernel.at_use:
                            ahead = self.tile_ahead(f, task, t, phase, (index - t["first_panel"]) * phase["count"] + t0, number * length, ahead)
                        call_micro(
                            f, micros[rows, vectors], source=start_of(p, q, index_of_piece), panel=piece_panel,
                            c=place if to is c else to + p * to_row + q * to_column, init=f.select(first, bias, place), table=table, count=length, pitch=pitch,
                            c_pitch=to_column, init_pitch=init_pitch, lanes_last=lanes_last, ahead=ahead,
                        )  # fmt: skip

                    self.pieces(f, phase["columns"], kernel.rows, kernel.narrow_rows, piece)

                f.loop(0, phase["rows"], 1, row)

            if self.last_micros:
                f.branch(t0 + length < phase["count"], lambda: rows_to(self.micros, c, c_row, c_column), lambda: rows_to(self.last_micros, *last))
            else:
                rows_to(self.micros, c, c_row, c_column)

        self.chunks(f, task, phase, chunk)
        if self.store is not None:
            step_row, step_column = task["out_row"] * task["row_phases"], task["out_column"] * task["column_phases"]
            arguments = [c, out, phase["rows"], phase["columns"], valid, f.value(width), c_row, step_row, step_column, task["out_channel"]]
            with f.when(phase["rows"] > 0):
                f.call(self.store, arguments)

    def tile_ahead(self, f: Function, task: Task, t: dict[str, Value], phase: dict[str, Value], terms: Value, steps: Value, otherwise: Value) -> Value:
        """What a call of the micro-kernel asks for where the tile is read in place: towards the end of a task the lines of the tile that this thread is
        likely to compute next, each once; ``otherwise`` before.

        Such a tile is read in pieces too short for the hardware to see a stream: 256 to 64 channels at 56x56 take a quarter less time.
        ``terms`` of the reduction that came before in this task, in all panels, and ``steps`` of the micro-kernel since then.
        """
        pieces = (phase["columns"] + (self.kernel.rows - 1)) // self.kernel.rows
        lines = phase["columns"] * task["tile_column"] // 64
        total = (t["last_panel"] - t["first_panel"]) * phase["count"] * pieces
        position = terms * pieces + steps - f.maximum(total - lines, 0)
        following = t["tile"] + task["tile_q"] * task["tile_column"]
        ends = f.select(t["last_panel"] < task["panels"], f.value(-1), position)  # the next task has another tile
        return f.select(ends >= 0, following + position * 64, otherwise)


class _Pixels(TileBuilder):
    """Vectors over pixels: whole rows of the tile, one after the other at the scratch's row pitch."""

    def __init__(self, kernel: DirectKernel, module: Module, numeric: Numeric) -> None:
        super().__init__(kernel, module, numeric)
        self.store = emit_store_plane(module, self.stored, kernel.format, kernel.phases)
        self.micros: dict[tuple[int, int], Function] = {}
        for vectors in (kernel.vectors, kernel.vectors - 1)[: 2 if kernel.narrow_vectors else 1]:
            for rows in (kernel.rows, kernel.rows - 1)[: 2 if kernel.narrow_rows else 1]:
                self.micros[rows, vectors] = emit_micro(module, numeric, Micro("pixels", rows, vectors))

    @property
    def widths(self) -> tuple[int, int]:
        return self.kernel.rows, max(1, self.kernel.rows - 1)

    def row_phase(self, f: Function, task: Task, t: dict[str, Value], row_index: Value) -> None:
        first = self.panel_start(f, task["wide_panels"], t["first_panel"])
        last = f.minimum(self.panel_start(f, task["wide_panels"], t["last_panel"]), task["out_channels"])
        planes = last - first
        scratch_phase = self.padded(f, task) * task["c_channel"]

        def column_phase(column_index: Value) -> None:
            phase = self.phase(f, task, t, row_index, column_index)
            with f.when(phase["rows"] > 0):
                self.compute(f, task, t, phase, t["c"] + column_index * scratch_phase, first)

        f.loop(0, task["column_phases"], 1, column_phase)
        phase = self.phase(f, task, t, row_index, f.value(0))
        row = t["p0"] * task["row_phases"] + phase["row_start"]
        column = t["q0"] * task["column_phases"]
        out = t["out"] + row * task["out_row"] + column * task["out_column"] + first * task["out_channel"]
        columns = f.value(0)
        for_all = task["column_phases"]

        def total(i: Value, sum_: Value) -> list[Value]:
            return [sum_ + f.maximum(self.phase(f, task, t, row_index, i)["columns"], 0)]

        (columns,) = f.loop(0, for_all, 1, total, [columns])
        arguments = [t["c"], out, phase["rows"], columns, planes, task["c_channel"], task["tile_row"]]
        with f.when(phase["rows"] > 0):
            f.call(self.store, [*arguments, scratch_phase, task["out_row"] * task["row_phases"], task["out_column"], task["out_channel"]])

    def compute(self, f: Function, task: Task, t: dict[str, Value], phase: dict[str, Value], c: Value, first: Value) -> None:
        """Every output channel of the block for the pixels of one phase."""
        numeric, kernel = self.numeric, self.kernel
        size, lanes = numeric.compute_bytes, numeric.lanes
        pixels = (phase["rows"] - 1) * (task["tile_row"] // size) + phase["columns"]
        vectors = (pixels + (lanes - 1)) // lanes
        c_channel, wide_panels = task["c_channel"], task["wide_panels"]
        start_values = t["scratch"] + task["start_at"]

        def pixel_panel(start: Value, width: int) -> None:
            def chunk(t0: Value, length: Value, table: Value, is_first: Value) -> None:
                source = t["tile"] + start * (lanes * size)
                init_pitch = f.select(is_first, f.value(width * lanes * size), c_channel)

                def channel_panel(index: Value, rows: int) -> None:
                    channel = self.panel_start(f, wide_panels, index)
                    panel = phase["panels"] + (channel * phase["count"] + t0 * rows) * size
                    place = c + (channel - first) * c_channel + start * (lanes * size)
                    with f.when(is_first):
                        # The bias is each sum's first term in both orientations, so that both give the same bits.
                        for m in range(rows):
                            vector = f.splat(f.load(t["bias"] + (channel + m) * size, numeric.compute), lanes)
                            for v in range(width):
                                f.store(vector, start_values + (m * width + v) * lanes * size)
                    call_micro(
                        f, self.micros[rows, width], source=source, panel=panel, c=place, init=f.select(is_first, start_values, place), table=table,
                        count=length, pitch=f.value(0), c_pitch=c_channel, init_pitch=init_pitch, lanes_last=f.value(lanes),
                    )  # fmt: skip

                split = f.maximum(f.minimum(wide_panels, t["last_panel"]), t["first_panel"])
                f.loop(t["first_panel"], split, 1, lambda i: channel_panel(i, kernel.rows))
                if kernel.narrow_rows:
                    f.loop(split, t["last_panel"], 1, lambda i: channel_panel(i, kernel.rows - 1))

            self.chunks(f, task, phase, chunk)

        self.vector_pieces(f, vectors, pixel_panel)

    def vector_pieces(self, f: Function, total: Value, body: Callable[[Value, int], None]) -> None:
        """Like :meth:`pieces`, where the last piece may run over the end."""
        size = self.kernel.vectors
        count = (total + (size - 1)) // size
        if not self.kernel.narrow_vectors:
            f.loop(0, count, 1, lambda i: body(i * size, size))
            return
        narrow = f.minimum(count * size - total, count)
        wide = count - narrow
        f.loop(0, wide, 1, lambda i: body(i * size, size))
        f.loop(wide, count, 1, lambda i: body(i * (size - 1) + wide, size - 1))
