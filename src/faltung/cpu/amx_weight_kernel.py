"""The kernel of the weight's gradient on matrix tiles: a GEMM whose reduction runs over pixels, 32 of them an instruction.

Loop nest::

    stage 1, for each group, block of output channels, block of input channels, share of the pixels (a fixed number of shares):
        for each tile of the share (some images, output rows and columns):
            pack x                       [16 channels][plane][pair of pixels][16][2]
            pack the gradient of y       [16 channels][32 pixels][16][32]
            for each 32 output channels, 32 input channels, tap:
                sums[16 k][16 c][tap] += gy[k][pixel] * x[pixel + tap][c]          two by two matrix tiles, all pixels of the tile
            bias sums[k] += gy[k][pixel] * 1
    stage 2, for each block and 16 output channels:  add the shares in order, write the weight's memory format

Pixels stand in linear order, ``pitch`` a row, and a tap is an even offset into a *plane* of x: a plane holds the columns (and rows) that one or several
taps read.  With a single share stage 2 follows at once, in stage 1.  Numbers of several bfloat16 parts (:mod:`faltung.cpu.parts`) have operands for
each part; the sums of a tile start from zero then and are added to those before in float32.

Sums that are not finite leave a mark: see :mod:`faltung.cpu.checked`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..codegen.emit import Function, Module, Value, vector_type
from ..codegen.entry import ArgumentBlock, Task, emit_entry
from ..codegen.numeric import Numeric
from . import matrix_tiles as tiles
from .amx_weight_pack import UNIT, UNIT_ORDER, emit_left, emit_left_rows, emit_pointers, emit_right, emit_rows
from .checked import mark_unless_finite, still_finite
from .matrix_tiles import LEFT, RIGHT, ROWS, SUMS, TILE_BYTES
from .parts import PARTS, PRODUCTS
from .target import Target

__all__ = ["ARGUMENTS", "PLANE_FIELDS", "AmxWeightKernel"]

ARGUMENTS = ArgumentBlock(
    (
        "tasks", "finish_tasks", "shares", "share_tiles", "tiles", "c_blocks", "k_blocks", "block_c", "block_k", "in_channels", "out_channels",
        "p_tiles", "q_tiles", "tile_p", "tile_q", "tile_images", "images", "p", "q", "width", "folded", "pitch", "extent",
        "x_image", "x_channel", "x_row", "x_column", "gy_image", "gy_channel", "gy_row", "gy_column",
        "pixel_image", "x_pixel", "x_part", "gy_pixel", "gy_part", "row_spans", "row_table", "column_table", "planes", "plane_table",
        "gy_rows", "gy_columns", "gy_columns_pitch", "taps", "paired_taps", "tap_table", "right_tile", "right_part", "left_tile", "left_part",
        "sums_at", "sums_share", "sums_block", "sums_k", "sums_c", "bias_at", "bias_share", "bias_group", "has_bias", "ones", "zeros", "palette", "flag_at",
        "scratch_at", "scratch_size", "right_at", "left_at", "pointers_at", "rows_at", "gy_rows_at", "own_sums_at", "spill_at",
        "weight_k", "weight_c", "weight_tap",
    )
)  # fmt: skip
"""Pitches are bytes.  ``shares`` of ``share_tiles`` tiles each; a tile is ``tile_images`` images by ``tile_p`` rows by ``tile_q`` columns of outputs, its
linear pixels ``pitch`` a row; ``folded``: those of all images follow each other, else each image has matrix tiles of its own.  ``extent``: pixels that a
plane holds beyond a tile's.  ``row_spans``: first source row and number of them by tile of rows.  ``plane_table``: :data:`PLANE_FIELDS`."""

PLANE_FIELDS = ("row_start", "rows", "column_start", "offset")
"""A plane of x: its first entry in the row table, its rows beyond a tile's, its first entry in the column table, its place among a tile's planes in bytes."""


@dataclass(frozen=True)
class AmxWeightKernel:
    """What the kernel is made for.  ``planar``: a weight's taps are neighbours in memory, not its channels; ``single``: the pixels are one share."""

    target: Target
    dtype: str
    format: str
    planar: bool
    single: bool

    @property
    def name(self) -> str:
        flags = "".join(letter for letter, set_ in zip("p1", (self.planar, self.single)) if set_)
        return f"amx_weight_{self.dtype}_{self.format}{'_' + flags if flags else ''}_{self.target.isa}"

    @property
    def parts(self) -> int:
        return PARTS[self.dtype]

    @property
    def rows_first(self) -> tuple[bool, bool]:
        """Whether x and the gradient of y are written as rows of 16-bit units before they are packed; the gradient of y in nchw needs no such rows."""
        return self.format == "nchw" or self.parts > 1, self.format == "nhwc" and self.parts > 1

    def emit(self) -> Module:
        """The module's IR text; its entry point is ``entry``."""
        module = Module()
        builder = _Builder(self, module)
        stages = [("tasks", builder.main_stage)]
        if not self.single:
            stages.append(("finish_tasks", builder.finish_stage))
        emit_entry(module, ARGUMENTS, stages)
        return module


def _emit_products(module: Module, parts: int, lefts: int, rights: int) -> Function:
    """``products(left, left_far, left_part, left_run, right, ..., runs, chunks, sums, sums_k, sums_c, fresh, spill)``: a matrix tile of sums for each pair of
    ``lefts`` by ``rights`` tiles, ``*_far`` bytes apart, over ``runs`` runs of ``chunks`` matrix tiles.  ``fresh``: there are no sums yet."""
    names = ("left_far", "left_part", "left_run", "right_far", "right_part", "right_run", "runs", "chunks", "sums_k", "sums_c", "fresh")
    pointers = [("ptr", name) for name in ("left", "right", "sums", "spill")]
    f = module.function(f"products_{lefts}x{rights}", [*pointers, *(("i64", name) for name in names)])
    row = f.value(64)
    places = [(2 * i + j, f["sums"] + (f["sums_k"] if i else 0) + (f["sums_c"] if j else 0)) for i in range(lefts) for j in range(rights)]

    def clear() -> None:
        for tile, _ in places:
            tiles.zero(f, tile)

    def keep() -> None:
        for tile, place in places:
            tiles.store(f, tile, place, row)

    def reload() -> None:
        for tile, place in places:
            tiles.load(f, tile, place, row)

    def add() -> None:
        for tile, place in places:
            tiles.store(f, tile, f["spill"], row)
            for line in range(0, TILE_BYTES, 64):
                vector = vector_type("float", ROWS)
                f.store(f.fadd(f.load(place + line, vector), f.load(f["spill"] + line, vector)), place + line)

    fresh = f["fresh"] > 0
    if parts == 1:
        f.branch(fresh, clear, reload)
    else:
        clear()
    for products in PRODUCTS[parts]:

        def run(i: Value, products: tuple[tuple[int, int], ...] = products) -> None:
            left, right = f["left"] + i * f["left_run"], f["right"] + i * f["right_run"]

            def chunk(j: Value) -> None:
                at = j * TILE_BYTES
                held: tuple[int | None, int | None] = None, None
                for a, b in products:
                    new_left, new_right = a != held[0], b != held[1]
                    starts = [base + at + (f[pitch] * part if part else 0) for base, pitch, part in ((left, "left_part", a), (right, "right_part", b))]
                    for nth in range(max(lefts, rights)):
                        if new_left and nth < lefts:
                            tiles.load(f, LEFT[nth], starts[0] + (f["left_far"] if nth else 0), row)
                        if new_right and nth < rights:
                            tiles.load(f, RIGHT[nth], starts[1] + (f["right_far"] if nth else 0), row)
                        for x in range(lefts):
                            for y in range(rights):
                                if max(x, y) == nth:
                                    tiles.dot(f, 2 * x + y, LEFT[x], RIGHT[y])
                    held = a, b

            f.loop(0, f["chunks"], 1, chunk)

        f.loop(0, f["runs"], 1, run)
    if parts == 1:
        keep()
    else:
        f.branch(fresh, keep, add)
    f.ret()
    return f


def _emit_row_sums(module: Module, parts: int) -> Function:
    """``row_sums(left, left_part, chunks, ones, sums, fresh, spill)``: the rows of one left tile summed up over all pixels, in every column of ``sums``."""
    f = module.function("row_sums", [*(("ptr", n) for n in ("left", "ones", "sums", "spill")), *(("i64", n) for n in ("left_part", "chunks", "fresh"))])
    row, vector = f.value(64), vector_type("float", ROWS)
    tiles.load(f, RIGHT[0], f["ones"], row)
    tiles.zero(f, SUMS[0])
    for part in reversed(range(parts)):
        left = f["left"] + (f["left_part"] * part if part else 0)

        def chunk(i: Value, left: Value = left) -> None:
            tiles.load(f, LEFT[0], left + i * TILE_BYTES, row)
            tiles.dot(f, SUMS[0], LEFT[0], RIGHT[0])

        f.loop(0, f["chunks"], 1, chunk)

    def add() -> None:
        tiles.store(f, SUMS[0], f["spill"], row)
        f.loop(0, TILE_BYTES, 64, lambda at: f.store(f.fadd(f.load(f["sums"] + at, vector), f.load(f["spill"] + at, vector)), f["sums"] + at))

    f.branch(f["fresh"] > 0, lambda: tiles.store(f, SUMS[0], f["sums"], row), add)
    f.ret()
    return f


class _Builder:
    def __init__(self, kernel: AmxWeightKernel, module: Module) -> None:
        self.kernel, self.module, self.numeric = kernel, module, Numeric(kernel.dtype, kernel.target)
        parts = kernel.parts
        self.pointers, self.pack_right = emit_pointers(module), emit_right(module, parts)
        self.pack_left = emit_left(module, parts) if kernel.format == "nhwc" else emit_left_rows(module, self.numeric, parts)
        if any(kernel.rows_first):
            self.pixel_rows = emit_rows(module, self.numeric, kernel.format, parts)
        self.products = {(l, r): _emit_products(module, parts, l, r) for l in (1, 2) for r in (1, 2)}
        self.row_sums = _emit_row_sums(module, parts)

    def decode(self, f: Function, task: Task, index: Value) -> dict[str, Value]:
        """Group and channels of block ``index``, with the block's place among the sums of share 0."""
        t = {"block": index}
        c_block, index = index % task["c_blocks"], index // task["c_blocks"]
        k_block, t["group"] = index % task["k_blocks"], index // task["k_blocks"]
        t["c0"], t["k0"] = c_block * task["block_c"], k_block * task["block_k"]
        t["channels"] = f.minimum(task["in_channels"] - t["c0"], task["block_c"])
        t["out_channels"] = f.minimum(task["out_channels"] - t["k0"], task["block_k"])
        t["sums"] = task.workspace + task["sums_at"] + t["block"] * task["sums_block"]
        t["bias"] = task.workspace + task["bias_at"] + t["group"] * task["bias_group"] + t["k0"] * 64
        t["wants_bias"] = f.define("i1", f"and i1 {(task['has_bias'] > 0).text}, {c_block.equals(0).text}")
        return t

    def main_stage(self, f: Function, task: Task) -> Callable[[Value], None]:
        scratch = task.scratch

        def body(index: Value) -> None:
            share = index % task["shares"]
            t = self.decode(f, task, index // task["shares"])
            t |= {name: scratch + task[name + "_at"] for name in ("right", "left", "pointers", "rows", "gy_rows", "spill")}
            t["sums"] = scratch + task["own_sums_at"] if self.kernel.single else t["sums"] + share * task["sums_share"]
            t["bias"] = t["bias"] + share * task["bias_share"]
            first = share * task["share_tiles"]
            last = f.minimum(first + task["share_tiles"], task["tiles"])
            tiles.configure(f, task.table("palette"))
            f.loop(first, last, 1, lambda tile: self.tile(f, task, t, tile, tile.equals(first)))
            tiles.release(f)
            if self.kernel.single:
                f.loop(0, (t["out_channels"] + (ROWS - 1)) // ROWS, 1, lambda k: self.finish(f, task, t, k))

        return body

    def tile(self, f: Function, task: Task, t: dict[str, Value], index: Value, first: Value) -> None:
        """One tile of pixels for the task's channels."""
        q_tile, index = index % task["q_tiles"], index // task["q_tiles"]
        p_tile, image_tile = index % task["p_tiles"], index // task["p_tiles"]
        p0, q0, image0 = p_tile * task["tile_p"], q_tile * task["tile_q"], image_tile * task["tile_images"]
        rows, columns = f.minimum(task["p"] - p0, task["tile_p"]), f.minimum(task["q"] - q0, task["tile_q"])
        images = f.minimum(task["images"] - image0, task["tile_images"])
        folded = task["folded"] > 0
        image_pixels = rows * task["pitch"]
        chunks = (f.select(folded, images, f.value(1)) * image_pixels + (UNIT - 1)) // UNIT
        entries = f.integer("and", chunks * UNIT + task["extent"] + 1, -2)  # of x, in one run
        z = {
            "p_tile": p_tile, "q_tile": q_tile, "p0": p0, "q0": q0, "image0": image0, "rows": rows, "columns": columns, "images": images,
            "runs": f.select(folded, f.value(1), images), "chunks": chunks, "entries": entries, "image_pixels": image_pixels,
        }  # fmt: skip
        self.pack_x(f, task, t, z, folded)
        (self.gradient_pixels if self.kernel.format == "nhwc" else self.gradient_rows)(f, task, t, z, folded)
        self.multiply(f, task, t, z, f.select(first, f.value(1), f.value(0)))

    def pack_x(self, f: Function, task: Task, t: dict[str, Value], z: dict[str, Value], folded: Value) -> None:
        offset = (t["group"] * task["in_channels"] + t["c0"]) * task["x_channel"]
        source = task.operand("source") + z["image0"] * task["x_image"] + offset
        if self.kernel.rows_first[0]:
            spans = task.table("row_spans") + z["p_tile"] * 16
            first, count = f.load(spans), f.load(spans + 8)
            pixel_rows, pitch = self.pixel_rows, task["x_channel"] if self.kernel.format == "nchw" else task["x_column"]

            def image_rows(i: Value) -> None:
                place = source + i * task["x_image"] + first * task["x_row"]
                sizes = [count * task["width"], t["channels"], pitch, task["x_pixel"], task["x_part"]]
                f.call(pixel_rows, [place, t["rows"] + i * task["pixel_image"], *sizes])

            f.loop(0, z["images"], 1, image_rows)
            base = t["rows"] + (0 - first) * task["width"] * task["x_pixel"]
        else:
            base = source

        def plane(index: Value) -> None:
            record = task.table("plane_table") + index * (8 * len(PLANE_FIELDS))
            row_start, more, column_start, at = (f.load(record + 8 * i) for i in range(len(PLANE_FIELDS)))
            rows = task.table("row_table") + (row_start + z["p0"]) * 8
            columns = task.table("column_table") + (column_start + z["q0"]) * 8
            self.addresses(f, task, t, z, folded, base, task["pixel_image"], rows, z["rows"] + more, columns, z["entries"])
            pairs = z["runs"] * (z["entries"] // 2)
            f.call(self.pack_right, [t["pointers"], t["right"] + at, pairs, t["channels"], task["right_tile"], task["right_part"], task["x_part"]])

        f.loop(0, task["planes"], 1, plane)

    def addresses(
        self, f: Function, task: Task, t: dict[str, Value], z: dict[str, Value], folded: Value, base: Value, image_pitch: Value, rows: Value, count: Value,
        columns: Value, total: Value,
    ) -> None:  # fmt: skip
        """Addresses of the pixels of every run, ``total`` of them a run, in linear order."""
        step = f.select(folded, z["image_pixels"], total)

        def image(i: Value) -> None:
            inner = f.define("i1", f"and i1 {folded.text}, {(i < z['images'] - 1).text}")
            wanted = f.select(inner, z["image_pixels"], f.select(folded, total - i * z["image_pixels"], total))
            address = f.cast("ptrtoint", base + i * image_pitch, "i64")
            zeros = task["zeros"]
            f.call(self.pointers, [address, zeros, rows, columns, t["pointers"] + i * step * 8, count, task["pitch"], wanted])

        f.loop(0, z["images"], 1, image)

    def gradient(self, task: Task, t: dict[str, Value], z: dict[str, Value]) -> Value:
        offset = (t["group"] * task["out_channels"] + t["k0"]) * task["gy_channel"] + z["p0"] * task["gy_row"] + z["q0"] * task["gy_column"]
        return task.operand("other") + z["image0"] * task["gy_image"] + offset

    def gradient_pixels(self, f: Function, task: Task, t: dict[str, Value], z: dict[str, Value], folded: Value) -> None:
        """The gradient of y from nhwc."""
        base, image_pitch = self.gradient(task, t, z), task["gy_image"]
        if self.kernel.rows_first[1]:
            pixel_rows, image_bytes = self.pixel_rows, task["tile_p"] * task["tile_q"] * task["gy_pixel"]

            def row(i: Value, j: Value) -> None:
                target = t["gy_rows"] + i * image_bytes + j * task["tile_q"] * task["gy_pixel"]
                source = self.gradient(task, t, z) + i * task["gy_image"] + j * task["gy_row"]
                f.call(pixel_rows, [source, target, z["columns"], t["out_channels"], task["gy_column"], task["gy_pixel"], task["gy_part"]])

            f.loop(0, z["images"], 1, lambda i: f.loop(0, z["rows"], 1, lambda j: row(i, j)) and None)
            base, image_pitch = t["gy_rows"], image_bytes
        rows, columns = task.table("gy_rows"), task.table("gy_columns") + z["q_tile"] * task["gy_columns_pitch"]
        self.addresses(f, task, t, z, folded, base, image_pitch, rows, z["rows"], columns, z["chunks"] * UNIT)
        chunks = z["runs"] * z["chunks"]
        f.call(self.pack_left, [t["pointers"], t["left"], chunks, t["out_channels"], task["left_tile"], task["left_part"], task["gy_part"]])

    def gradient_rows(self, f: Function, task: Task, t: dict[str, Value], z: dict[str, Value], folded: Value) -> None:
        """The gradient of y from nchw: rows that follow each other in memory and in linear order are one run."""
        whole = f.define("i1", f"and i1 {task['pitch'].equals(task['q']).text}, {task['tile_q'].equals(task['q']).text}")
        runs = f.select(whole, f.value(1), z["rows"])
        length = f.select(whole, z["image_pixels"], z["columns"])
        linear = f.select(folded, z["image_pixels"], z["chunks"] * UNIT)
        images = [z["images"], task["gy_image"], linear]
        lines = [runs, length, task["gy_row"], task["pitch"]]
        sides = [z["runs"] * z["chunks"], task["left_tile"], task["left_part"]]
        f.call(self.pack_left, [self.gradient(task, t, z), t["left"], t["out_channels"], task["gy_channel"], *images, *lines, *sides])

    def multiply(self, f: Function, task: Task, t: dict[str, Value], z: dict[str, Value], fresh: Value) -> None:
        """Every weight of the block, and the bias.

        Two taps of one plane are multiplied together where there are such: the second one finds in the first-level cache what the first one read.
        """
        left_run, right_run = z["chunks"] * TILE_BYTES, z["entries"] * 32
        paired, taps = task["paired_taps"], task["taps"]

        def place(i: Value) -> tuple[Value, Value]:
            """Where tap ``i`` of the table reads x, and where its sums are."""
            entry = task.table("tap_table") + i * 16
            return f.load(entry), f.load(entry + 8)

        def block(k: Value, c: Value, lefts: int, rights: int, read: Value, sums: Value, read_far: Value, sums_far: Value) -> None:
            pointers = [t["left"] + k * task["left_tile"], t["right"] + c * task["right_tile"] + read]
            pointers += [t["sums"] + k * task["sums_k"] + c * task["sums_c"] + sums, t["spill"]]
            sides = [task["left_tile"], task["left_part"], left_run, read_far, task["right_part"], right_run]
            f.call(self.products[lefts, rights], [*pointers, *sides, z["runs"], z["chunks"], task["sums_k"], sums_far, fresh])

        def two_taps(k: Value, c: Value, lefts: int, i: Value) -> None:
            (read, sums), (second, second_sums) = place(i), place(i + 1)
            block(k, c, lefts, 2, read, sums, second - read, second_sums - sums)

        def columns(k: Value, lefts: int) -> None:
            count = (t["channels"] + (ROWS - 1)) // ROWS
            f.loop(0, count, 1, lambda c: f.loop(0, paired, 2, lambda i: two_taps(k, c, lefts, i)) and None)

            def two_tiles(c: Value) -> None:
                f.loop(paired, taps, 1, lambda i: block(k, c, lefts, 2, *place(i), task["right_tile"], task["sums_c"]))

            f.loop(0, count - 1, 2, two_tiles)
            with f.when((count % 2).equals(1)):
                f.loop(paired, taps - 1, 2, lambda i: two_taps(k, count - 1, lefts, i))
                with f.when(((taps - paired) % 2).equals(1)):
                    block(k, count - 1, lefts, 1, *place(taps - 1), f.value(0), f.value(0))

        k_count = (t["out_channels"] + (ROWS - 1)) // ROWS
        f.loop(0, k_count - 1, 2, lambda k: columns(k, 2))
        with f.when((k_count % 2).equals(1)):
            columns(k_count - 1, 1)

        def bias(k: Value) -> None:
            pointers = [t["left"] + k * task["left_tile"], task.table("ones"), t["bias"] + k * TILE_BYTES, t["spill"]]
            f.call(self.row_sums, [*pointers, task["left_part"], z["runs"] * z["chunks"], fresh])

        with f.when(t["wants_bias"]):
            f.loop(0, k_count, 1, bias)

    def finish_stage(self, f: Function, task: Task) -> Callable[[Value], None]:
        def body(index: Value) -> None:
            pieces = (task["block_k"] + (ROWS - 1)) // ROWS
            t = self.decode(f, task, index // pieces)
            with f.when(index % pieces * ROWS < t["out_channels"]):
                self.finish(f, task, t, index % pieces)

        return body

    def sum_shares(self, f: Function, task: Task, place: Value, type_: str, pitch: Value) -> Value:
        """The sum over the shares, in order."""
        first = f.load(place, type_)
        if self.kernel.single:
            return first
        (total,) = f.loop(1, task["shares"], 1, lambda i, s: [f.fadd(s, f.load(place + i * pitch, type_))], [first])
        return total

    def finish(self, f: Function, task: Task, t: dict[str, Value], k_tile: Value) -> None:
        """The weights (and the bias) of 16 output channels of a block."""
        lanes, vector = ROWS, vector_type("float", ROWS)
        k0 = k_tile * ROWS
        count = f.minimum(t["out_channels"] - k0, ROWS)
        first = t["group"] * task["out_channels"] + t["k0"] + k0
        out = task.operand("out") + first * task["weight_k"] + t["c0"] * task["weight_c"]
        sums = t["sums"] + k_tile * task["sums_k"]
        write = self.write_planar if self.kernel.planar else self.write_channels

        def row(k: Value, state: Value) -> list[Value]:
            return [write(f, task, t, sums + k * 64, out + k * task["weight_k"], state)]

        (state,) = f.loop(0, count, 1, row, [f.zero(vector)])
        mark_unless_finite(f, state, task.workspace + task["flag_at"], lanes)

        def bias() -> None:
            side = task.operand("bias") + first * self.numeric.memory_bytes

            def one(k: Value, state: Value) -> list[Value]:
                place = t["bias"] + k_tile * TILE_BYTES + k * 64
                total = self.sum_shares(f, task, place, "float", task["bias_share"])
                self.numeric.store(f, total, side + k * self.numeric.memory_bytes, 1)
                return [still_finite(f, state, total)]

            (state,) = f.loop(0, count, 1, one, [f.zero("float")])
            mark_unless_finite(f, state, task.workspace + task["flag_at"], 1)

        with f.when(t["wants_bias"]):
            bias()

    def unit_sums(self, f: Function, task: Task, place: Value) -> list[Value]:
        """The 32 sums of a unit of input channels in their natural order."""
        vector = vector_type("float", ROWS)
        first, second = (self.sum_shares(f, task, place + at, vector, task["sums_share"]) for at in (f.value(0), task["sums_c"]))
        return [f.shuffle(first, second, order) for order in UNIT_ORDER]

    def write_channels(self, f: Function, task: Task, t: dict[str, Value], sums: Value, out: Value, state: Value) -> Value:
        """One output channel's weights, channels of each tap being neighbours."""
        memory, vector = self.numeric.memory_bytes, vector_type("float", ROWS)

        def tap(i: Value, state: Value) -> list[Value]:
            line, target = sums + i * TILE_BYTES, out + i * task["weight_tap"]
            whole = (t["channels"] + (ROWS - 1)) // UNIT  # a last one of 16 or fewer channels is not

            def unit(u: Value, state: Value) -> list[Value]:
                for half, value in enumerate(self.unit_sums(f, task, line + u * 2 * task["sums_c"])):
                    c = u * UNIT + ROWS * half
                    self.numeric.store(f, value, target + c * memory, ROWS, f.lane_mask(t["channels"] - c, ROWS))
                    state = still_finite(f, state, value)
                return [state]

            (state,) = f.loop(0, whole, 1, unit, [state])

            def last(c: Value, state: Value) -> list[Value]:
                value = self.sum_shares(f, task, line + whole * 2 * task["sums_c"], vector, task["sums_share"])
                self.numeric.store(f, value, target + c * memory, ROWS, f.lane_mask(t["channels"] - c, ROWS))
                return [still_finite(f, state, value)]

            return f.loop(whole * UNIT, t["channels"], ROWS, last, [state])

        (state,) = f.loop(0, task["taps"], 1, tap, [state])
        return state

    def write_planar(self, f: Function, task: Task, t: dict[str, Value], sums: Value, out: Value, state: Value) -> Value:
        """One output channel's weights, taps of each channel being neighbours: 16 channels by 16 taps are transposed in registers."""
        memory, vector = self.numeric.memory_bytes, vector_type("float", ROWS)
        whole = (t["channels"] + (ROWS - 1)) // UNIT

        def taps(at: Value, c: Value, halves: int, state: Value) -> Value:
            """``halves`` times 16 channels from ``c`` on, whose sums begin at ``at``."""

            def some(i: Value, state: Value) -> list[Value]:
                read: list[list[Value]] = []
                for tap in range(ROWS):
                    place = at + f.minimum(i + tap, task["taps"] - 1) * TILE_BYTES
                    read.append(self.unit_sums(f, task, place) if halves == 2 else [self.sum_shares(f, task, place, vector, task["sums_share"])])
                mask = f.lane_mask(task["taps"] - i, ROWS)
                for half in range(halves):
                    for values in read:
                        state = still_finite(f, state, values[half])
                    for j, value in enumerate(f.transpose([values[half] for values in read])):
                        channel = c + (half * ROWS + j)
                        with f.when(channel < t["channels"]):
                            self.numeric.store(f, value, out + channel * task["weight_c"] + i * memory, ROWS, mask)
                return [state]

            (state,) = f.loop(0, task["taps"], ROWS, some, [state])
            return state

        (state,) = f.loop(0, whole, 1, lambda u, s: [taps(sums + u * 2 * task["sums_c"], u * UNIT, 2, s)], [state])
        (state,) = f.loop(whole * UNIT, t["channels"], ROWS, lambda c, s: [taps(sums + whole * 2 * task["sums_c"], c, 1, s)], [state])
        return state
