"""The kernel of the weight's gradient of a grouped convolution with few channels a group: lanes over several groups.

Loop nest::

    stage 1, for each block of vectors of output channels, part of the pixels (a fixed number of parts):
        for each tile of the part (one image, output rows and columns), vector:
            pack x into planes [column slab][plane][row][column][lanes], the gradient of y into [row][column][lanes]
            for each run of rows, pass (a few kernel rows, taps of one chunk, planes):
                for each pixel:  sum[row][tap][channel] += broadcast(x[pixel + tap]) * gy[pixel]        all sums in registers
                partial += sum
            partial bias += gy
    stage 2, for each vector and block of weights:  add the parts in order, transpose into the weight's memory format

The parts depend on the problem and the caches alone, so the bits do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..codegen.emit import Function, Module, Value
from ..codegen.entry import ArgumentBlock, Task, emit_entry
from ..codegen.numeric import Numeric
from .grouped_kernel import emit_channel, in_memory_order
from .grouped_lanes import TILE_FIELDS, Lanes
from .grouped_pack import emit_pack, emit_prefetch
from .target import Target

__all__ = ["ARGUMENTS", "GroupedWeightKernel", "Pass"]

ARGUMENTS = ArgumentBlock(
    (
        *("x_" + name for name in TILE_FIELDS), *("gy_" + name for name in TILE_FIELDS),
        "tasks", "finish_tasks", "vectors", "vector_blocks", "block_vectors", "parts", "part_tiles", "tiles", "p_tiles", "q_tiles", "tile_p",
        "tile_q", "run_rows", "p", "q", "in_channels", "out_channels", "x_image", "gy_image", "passes", "pass_records", "pass_bytes", "partial_part",
        "partial_vector", "bias_part_at", "has_bias", "scratch_at", "scratch_size", "gy_at", "weight_count", "weight_rows", "weight_pitch",
        "prefetch_rows",
    )
)  # fmt: skip
"""Pitches are bytes.  A task is ``block_vectors`` vectors and one of ``parts`` parts, of ``part_tiles`` tiles each; ``run_rows`` rows of a tile are summed in
registers at a time.  ``pass_records``: for each pass its kind, the place of its sums in a vector's partial sums, and the tile's byte offset of each of
its kernel rows.  ``partial_*``: pitches of the partial sums.  ``weight_rows``: for each weight of an output channel, in memory order, its place in a
vector's partial sums.  ``prefetch_rows``: scratch rows of the next tile of x that are asked for with each row of this one."""


@dataclass(frozen=True)
class Pass:
    """What is summed in registers together: ``rows`` kernel rows, the taps of ``shape`` (their shifts), ``steps`` (see :meth:`Lanes.steps`) that follow
    each other: planes, or channels of one interleaved plane."""

    rows: int
    shape: tuple[int, ...]
    steps: int

    def sums(self, unit: int) -> int:
        return self.rows * len(self.shape) * self.steps * unit

    @property
    def name(self) -> str:
        return f"{self.rows}x{'.'.join(map(str, self.shape))}x{self.steps}"


@dataclass(frozen=True)
class GroupedWeightKernel:
    """What a kernel is made for; everything else is an argument.

    ``out``, ``source``, ``unit``, ``partial``, ``interleaved``: see :class:`Lanes`.  ``columns``: pixels of an unrolled piece of a row, with pieces one
    smaller where ``narrow``.  ``step``: of the columns of x, 3 for any above 2.
    """

    target: Target
    dtype: str
    format: str
    out: int
    source: int
    unit: int
    partial: bool
    kinds: tuple[Pass, ...]
    step: int
    columns: int
    narrow: bool
    interleaved: bool

    @property
    def name(self) -> str:
        kinds = "_".join(kind.name for kind in self.kinds)
        flags = "".join(letter for letter, set_ in zip("pc", (self.partial, self.narrow)) if set_)
        block = f"{self.columns}{'_' + flags if flags else ''}"
        channels = f"{self.source}to{self.out}_u{'i' if self.interleaved else self.unit}"
        return f"grouped_weight_{self.dtype}_{self.format}_{channels}_{kinds}_st{self.step}_{block}_{self.target.isa}"

    @property
    def lanes(self) -> Lanes:
        """The lanes, of as many groups as fill one vector (one more where the last vector is partial)."""
        lanes = Numeric(self.dtype, self.target).lanes
        return Lanes(lanes, self.out, self.source, lanes // self.out + (1 if self.partial else 0), self.unit, self.interleaved)

    def emit(self) -> Module:
        """The module's IR text; its entry point is ``entry``."""
        module = Module()
        builder = _Builder(self, module, Numeric(self.dtype, self.target))
        emit_entry(module, ARGUMENTS, [("tasks", builder.main_stage), ("finish_tasks", builder.finish_stage)])
        return module


def _emit_pass(module: Module, numeric: Numeric, lanes: Lanes, kind: Pass, sizes: tuple[int, ...]) -> Function:
    """``pass(x, gy, partial, offsets, rows, columns, x_row, x_plane, gy_row, fresh)``: the sums of one pass over some rows of a tile.

    ``offsets``: the tile's byte offset of each kernel row.  ``fresh``: the partial sums have no value yet.
    """
    parameters = [("ptr", name) for name in ("x", "gy", "partial", "offsets")]
    parameters += [("i64", name) for name in ("rows", "columns", "x_row", "x_plane", "gy_row", "fresh")]
    f = module.function(f"pass_{kind.name}", parameters)
    vector, fused, unit, taps = numeric.lanes * numeric.compute_bytes, numeric.target.fma, lanes.unit, len(kind.shape)
    bases = [f["x"] + f.load_index(f["offsets"], r) for r in range(kind.rows)]
    size, columns = sizes[0], f["columns"]
    count = (columns + (size - 1)) // size
    wide = count - (count * size - columns) if len(sizes) > 1 else count

    def piece(lines: list[list[Value]], gy: Value, size: int, carried: tuple[Value, ...]) -> list[Value]:
        sums = list(carried)
        for x in range(size + kind.shape[-1]):
            if x:
                # Gradients are loaded anew for each column: held in registers, or loaded early, they would crowd out the sums.
                f.barrier()
            used = [(t, x - shift) for t, shift in enumerate(kind.shape) if 0 <= x - shift < size]
            gradients = [(t, f.load(gy + q * vector, numeric.vector)) for t, q in used]
            for r, steps in enumerate(lines if used else []):
                for h, line in enumerate(steps):
                    for j in range(unit):
                        value = emit_channel(f, numeric, lanes, line + x * vector, j)
                        for t, gradient in gradients:
                            i = ((r * taps + t) * kind.steps + h) * unit + j
                            sums[i] = f.fma(value, gradient, sums[i], fused)
        return sums

    def row(p: Value, *carried: Value) -> list[Value]:
        step = lanes.per_vector * numeric.compute_bytes if lanes.interleaved else f["x_plane"]
        lines = [[base + p * f["x_row"] + (step * h if h else 0) for h in range(kind.steps)] for base in bases]
        gy = f["gy"] + p * f["gy_row"]

        def at(first: Value, size: int, values: tuple[Value, ...]) -> list[Value]:
            offset = first * vector
            return piece([[line + offset for line in planes] for planes in lines], gy + offset, size, values)

        sums = f.loop(0, wide, 1, lambda i, *values: at(i * size, size, values), list(carried))
        if len(sizes) > 1:
            sums = f.loop(wide, count, 1, lambda i, *values: at(i * (size - 1) + wide, size - 1, values), sums)
        return sums

    sums = f.loop(0, f["rows"], 1, row, [f.zero(numeric.vector)] * kind.sums(unit))

    def store() -> None:
        for i, value in enumerate(sums):
            f.store(value, f["partial"] + i * vector)

    def add() -> None:
        for i, value in enumerate(sums):
            f.store(f.fadd(f.load(f["partial"] + i * vector, numeric.vector), value), f["partial"] + i * vector)

    f.branch(f["fresh"] > 0, store, add)
    f.ret()
    return f


class _Builder:
    def __init__(self, kernel: GroupedWeightKernel, module: Module, numeric: Numeric) -> None:
        self.kernel, self.numeric, self.lanes = kernel, numeric, kernel.lanes
        self.vector = numeric.lanes * numeric.compute_bytes
        self.pack_x = emit_pack(module, ARGUMENTS, numeric, self.lanes.expansion(), kernel.format, kernel.step, "x_")
        self.pack_gy = emit_pack(module, ARGUMENTS, numeric, self.lanes.result_expansion(), kernel.format, 1, "gy_")
        self.prefetch_x = emit_prefetch(module, ARGUMENTS, numeric, self.lanes.source_width, kernel.format, "x_")
        self.prefetch_gy = emit_prefetch(module, ARGUMENTS, numeric, self.lanes.width, kernel.format, "gy_")
        sizes = (kernel.columns, kernel.columns - 1)[: 2 if kernel.narrow else 1]
        self.passes = [_emit_pass(module, numeric, self.lanes, kind, sizes) for kind in kernel.kinds]

    def main_stage(self, f: Function, task: Task) -> Callable[[Value], None]:
        lanes = self.lanes
        scratch = task.scratch

        def body(index: Value) -> None:
            t = self.place(f, task, index)
            after = self.place(f, task, task.after(index))

            def tile(index: Value) -> None:
                fresh, more_tiles = index.equals(t["first_tile"]), index + 1 < t["last_tile"]
                after_v = f.select(more_tiles, t["first"], after["first"])
                after_tile = f.select(more_tiles, index + 1, after["first_tile"])

                def vector(v: Value) -> None:
                    more = v + 1 < t["last"]
                    following = self.operands(task, f.select(more, v + 1, after_v), f.select(more, index, after_tile))
                    here: dict[str, Value] = {"x": scratch, "gy": scratch + task["gy_at"], **self.operands(task, v, index)}
                    here["in_valid"] = f.minimum(task["in_channels"] - v * lanes.source_width, lanes.source_width)
                    here["out_valid"] = f.minimum(task["out_channels"] - v * lanes.width, lanes.width)
                    here["partial"] = task.workspace + t["part"] * task["partial_part"] + v * task["partial_vector"]
                    here["bias"] = task.workspace + task["bias_part_at"] + (t["part"] * task["vectors"] + v) * self.vector
                    self.tile(f, task, here, following, fresh)

                f.loop(t["first"], t["last"], 1, vector)

            f.loop(t["first_tile"], t["last_tile"], 1, tile)

        return body

    def place(self, f: Function, task: Task, index: Value) -> dict[str, Value]:
        """A task's vectors, part and tiles (the last ones exclusive)."""
        t: dict[str, Value] = {"part": index // task["vector_blocks"]}
        t["first"] = (index % task["vector_blocks"]) * task["block_vectors"]
        t["last"] = f.minimum(t["first"] + task["block_vectors"], task["vectors"])
        t["first_tile"] = t["part"] * task["part_tiles"]
        t["last_tile"] = f.minimum(t["first_tile"] + task["part_tiles"], task["tiles"])
        return t

    def operands(self, task: Task, v: Value, tile: Value) -> dict[str, Value]:
        """Where a tile begins: its first output row and column, x and the gradient of y for a vector in its image."""
        t: dict[str, Value] = {}
        t["q0"], tile = (tile % task["q_tiles"]) * task["tile_q"], tile // task["q_tiles"]
        t["p0"], image = (tile % task["p_tiles"]) * task["tile_p"], tile // task["p_tiles"]
        t["x_source"] = task.operand("source") + image * task["x_image"] + v * task["x_channel"] * self.lanes.source_width
        t["gy_source"] = task.operand("other") + image * task["gy_image"] + v * task["gy_channel"] * self.lanes.width
        return t

    def tile(self, f: Function, task: Task, t: dict[str, Value], following: dict[str, Value], first: Value) -> None:
        """One tile of pixels for the task's vector; ``following`` is the tile that this thread packs next."""
        rows = f.minimum(task["p"] - t["p0"], task["tile_p"])
        columns = f.minimum(task["q"] - t["q0"], task["tile_q"])
        block = f.to_pointer(f.load(f["context"]))
        f.call(self.pack_x, [block, t["x_source"], t["x"], t["p0"], t["q0"], t["in_valid"]])
        f.call(self.pack_gy, [block, t["gy_source"], t["gy"], t["p0"], t["q0"], t["out_valid"]])
        x_row, gy_row = task["x_row"], task["gy_row"]

        def prefetch(start: Value, stop: Value) -> None:
            ahead = task["prefetch_rows"]
            f.call(self.prefetch_x, [block, following["x_source"], following["p0"], following["q0"], start * ahead, stop * ahead])
            f.call(self.prefetch_gy, [block, following["gy_source"], following["p0"], following["q0"], start, stop])

        def run(p: Value) -> None:
            count = f.minimum(rows - p, task["run_rows"])
            fresh = f.define("i1", f"and i1 {first.text}, {p.equals(0).text}")
            gy = t["gy"] + p * gy_row

            def one(i: Value) -> None:
                record = task.table("pass_records") + i * task["pass_bytes"]
                kind, partial = f.load(record), t["partial"] + f.load(record + 8)
                arguments = [t["x"] + p * x_row, gy, partial, record + 16, count, columns, x_row, task["x_plane"], gy_row, f.cast("zext", fresh, "i64")]
                prefetch(p + count * i // task["passes"], p + count * (i + 1) // task["passes"])
                for number, function in enumerate(self.passes):
                    with f.when(kind.equals(number)):
                        f.call(function, arguments)

            f.loop(0, task["passes"], 1, one)
            with f.when(task["has_bias"] > 0):
                self.add_bias(f, t["bias"], gy, count, columns, gy_row, fresh)

        f.loop(0, rows, task["run_rows"], run)

    def add_bias(self, f: Function, target: Value, gy: Value, rows: Value, columns: Value, gy_row: Value, fresh: Value) -> None:
        """``target += sum over pixels``, in four chains."""
        numeric, vector = self.numeric, self.vector
        whole = f.integer("and", columns, -4)

        def row(p: Value, *sums: Value) -> list[Value]:
            line = gy + p * gy_row

            def four(q: Value, *values: Value) -> list[Value]:
                return [f.fadd(value, f.load(line + q * vector + i * vector, numeric.vector)) for i, value in enumerate(values)]

            first, *rest = f.loop(0, whole, 4, four, list(sums))
            (first,) = f.loop(whole, columns, 1, lambda q, value: [f.fadd(value, f.load(line + q * vector, numeric.vector))], [first])
            return [first, *rest]

        a, b, c, d = f.loop(0, rows, 1, row, [f.zero(numeric.vector)] * 4)
        total = f.fadd(f.fadd(a, b), f.fadd(c, d))
        before = f.select(fresh, f.zero(numeric.vector), f.load(target, numeric.vector))
        f.store(f.fadd(before, total), target)

    def finish_stage(self, f: Function, task: Task) -> Callable[[Value], None]:
        """``lanes`` weights (neighbours in memory) of every output channel of a vector; the first task of a vector also finishes its bias."""
        numeric, lanes = self.numeric, self.lanes
        count, memory = numeric.lanes, numeric.memory_bytes

        def body(index: Value) -> None:
            v, block = index % task["vectors"], index // task["vectors"]
            valid = f.minimum(task["out_channels"] - v * lanes.width, lanes.width)
            j0, total, pitch, rows = block * count, task["weight_count"], task["weight_pitch"], task.table("weight_rows")
            parts = task.workspace + v * task["partial_vector"]
            places = [parts + f.load_index(rows, f.minimum(j0 + i, total - 1)) for i in range(count)]
            out = task.operand("out") + v * pitch * lanes.width + j0 * memory
            mask = f.lane_mask(total - j0, count)
            summed = [self.sum_parts(f, task, place, task["partial_part"]) for place in places]
            transposed = f.transpose(summed)
            for result, lane in enumerate(lanes.places):
                with f.when(valid > result):
                    numeric.store(f, transposed[lane], out + pitch * result, count, mask)
            wanted = f.define("i1", f"and i1 {block.equals(0).text}, {(task['has_bias'] > 0).text}")
            with f.when(wanted):
                bias = self.sum_parts(f, task, task.workspace + task["bias_part_at"] + v * self.vector, task["vectors"] * self.vector)
                target = task.operand("bias") + v * (lanes.width * memory)
                bias = bias if lanes.in_order else f.shuffle(bias, None, in_memory_order(lanes))
                numeric.store(f, bias, target, count, f.lane_mask(valid, count))

        return body

    def sum_parts(self, f: Function, task: Task, place: Value, pitch: Value) -> Value:
        """The sum over the parts, in order."""
        vector = self.numeric.vector
        (total,) = f.loop(1, task["parts"], 1, lambda i, s: [f.fadd(s, f.load(place + i * pitch, vector))], [f.load(place, vector)])
        return total
