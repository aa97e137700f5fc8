"""The kernel of products with few pixels: the weight, a matrix ``[k][length]`` in memory, is read (or written) once, where it lies.

Loop nests, with ``m`` over pixels; tasks are blocks of output channels, in ``grad_input`` of input channels::

    forward       for blocks of rows k, of pixels:  y[m][k] = bias[k] + sum over c of w[k][c] * x[m][c]       vectors along c, added up at the end
    grad_input    for blocks of pixels, of rows k:  gx[m][c] += gy[m][k] * w[k][c]                             vectors along c, sums in scratch
    grad_weight   for segments of c, rows k:        gw[k][c] = sum over m of gy[m][k] * x[m][c]                vectors along c

The order in which the terms of a result are added depends on the length of the sum alone: not on the blocks of rows and pixels that share a pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..codegen.emit import Function, Module, Value, vector_type
from ..codegen.entry import ArgumentBlock, Task, emit_entry
from ..codegen.numeric import Numeric
from .bfloat import Rounded, dot
from .target import Target

__all__ = ["ARGUMENTS", "GemvKernel"]

ARGUMENTS = ArgumentBlock(
    ("tasks", "pixels", "rows", "length", "block", "weight_row", "source_pixel", "other_pixel", "out_pixel", "has_bias", "scratch_at", "scratch_size",
     "scratch_pixel", "segment")
)  # fmt: skip
"""``rows`` x ``length``: the weight; ``block``: rows (in grad_input columns) of it in a task.  Pitches are bytes: of rows of the weight and of pixels of the
operands, and in a thread's scratch (grad_input).  ``segment`` (grad_weight): columns whose pixels stay in the first-level cache while the rows pass."""

_PIECE = 64  # vectors of a sum along c, and rows of one over rows times two, that are added up from zero: the error stays that of short sums


@dataclass(frozen=True)
class GemvKernel:
    """What the code depends on; every size is an argument."""

    target: Target
    dtype: str
    direction: str

    @property
    def name(self) -> str:
        return f"gemv_{self.dtype}_{self.direction}_{self.target.isa}"

    @property
    def pixels(self) -> int:
        """Pixels that share a pass over the weight."""
        return 4 if self.target.registers >= 32 else 2

    @property
    def rows(self) -> int:
        """Rows of the weight that a task takes at a time."""
        return 8 if self.target.registers >= 32 else 4

    def emit(self) -> Module:
        """The module's IR text; its entry point is ``entry``."""
        module = Module()
        numeric = Numeric(self.dtype, self.target)
        stage = {"forward": _forward, "grad_input": _grad_input, "grad_weight": _grad_weight}[self.direction]
        emit_entry(module, ARGUMENTS, [("tasks", lambda f, task: stage(self, module, numeric, f, task))])
        return module


def _written(numeric: Numeric) -> Numeric:
    """What rounds results: the processor's instruction where it has one."""
    return Rounded(numeric.dtype, numeric.target) if numeric.pairs else numeric


def _each_block(f: Function, total: Value, size: int, block: Callable[[Value, int], None]) -> None:
    """``block(start, size)`` as often as it fits ``total``, then ``block(start, 1)`` for the rest."""
    whole = f.integer("and", total, -size)
    f.loop(0, whole, size, lambda i: block(i, size))
    f.loop(whole, total, 1, lambda i: block(i, 1))


def _lengthwise(f: Function, numeric: Numeric, count: Value, body: Callable[[Value, int, Value | None], None]) -> None:
    """``body(i, lanes, mask)`` for every vector of ``count`` elements, the mask being None but for the last, partial one."""
    lanes = numeric.lanes
    whole = f.integer("and", count, -lanes)
    f.loop(0, whole, lanes, lambda i: body(i, lanes, None))
    with f.when(whole < count):
        body(whole, lanes, f.lane_mask(count - whole, lanes))


# --- forward


def _forward(kernel: GemvKernel, module: Module, numeric: Numeric, f: Function, task: Task) -> Callable[[Value], None]:
    shared = _emit_dots(module, numeric, 4, kernel.pixels)
    single = _emit_dots(module, numeric, kernel.rows, 1)
    memory = numeric.memory_bytes
    # A masked load takes hundreds of cycles where the page is missing, even of no lane at all: some memory stands in for a bias that is not there.
    biases = f.select(task["has_bias"] > 0, task.operand("bias"), task.operand("source"))

    def body(index: Value) -> None:
        first = index * task["block"]
        last = f.minimum(first + task["block"], task["rows"])

        def rows(k: Value) -> None:
            def pixels(m: Value, count: int) -> None:
                def dots(function: Function, k: Value) -> None:
                    source, out = task.operand("source") + m * task["source_pixel"], task.operand("out") + m * task["out_pixel"] + k * memory
                    weight, bias = task.operand("other") + k * task["weight_row"], biases + k * memory
                    sizes = [task[name] for name in ("length", "weight_row", "source_pixel", "out_pixel", "has_bias")]
                    f.call(function, [weight, source, bias, out, last - k, *sizes])

                if count == 1:
                    dots(single, k)
                    return
                f.loop(k, f.minimum(k + kernel.rows, last), 4, lambda j: dots(shared, j))

            _each_block(f, task["pixels"], kernel.pixels, pixels)

        f.loop(first, last, kernel.rows, rows)

    return body


def _emit_dots(module: Module, numeric: Numeric, rows: int, pixels: int) -> Function:
    """``dots(weight, source, bias, out, rest, length, weight_row, source_pixel, out_pixel, has_bias)``: ``rows`` outputs of ``pixels`` pixels.

    Of the rows ``rest`` exist; the last of those is read in place of each that does not.
    """
    names = ("rest", "length", "weight_row", "source_pixel", "out_pixel", "has_bias")
    f = module.function(f"dots_{rows}x{pixels}", [*(("ptr", name) for name in ("weight", "source", "bias", "out")), *(("i64", name) for name in names)])
    memory, lanes = numeric.memory_bytes, numeric.lanes
    taken = 2 * lanes if numeric.pairs else lanes  # terms of the sum in a vector
    weights = [f["weight"] + f.minimum(f["rest"] - 1, i) * f["weight_row"] for i in range(rows)]
    sources = [f["source"] + f["source_pixel"] * m for m in range(pixels)]

    def read(pointer: Value, mask: Value | None) -> Value:
        if not numeric.pairs:
            return numeric.load(f, pointer, lanes, mask)
        halves = vector_type("i16", taken)
        return f.load(pointer, halves) if mask is None else f.load_masked(pointer, mask, halves)

    def add(at: Value, sums: list[Value], mask: Value | None = None) -> list[Value]:
        right = [read(source + at, mask) for source in sources]
        result = []
        for i, weight in enumerate(weights):
            left = read(weight + at, mask)
            for m in range(pixels):
                total = sums[i * pixels + m]
                result.append(dot(f, left, right[m], total) if numeric.pairs else f.fma(left, right[m], total, numeric.target.fma))
        return result

    zeros = [f.zero(numeric.vector)] * (rows * pixels)
    step = taken * memory
    stop = f["length"] * memory
    whole = f.integer("and", f["length"], -taken) * memory

    def piece(start: Value, *totals: Value) -> list[Value]:
        sums = f.loop(start, f.minimum(start + _PIECE * step, whole), step, lambda at, *sums: add(at, list(sums)), zeros)
        return [f.fadd(total, value) for total, value in zip(totals, sums)]

    totals = f.loop(0, whole, _PIECE * step, piece, zeros)
    totals = f.loop(whole, stop, step, lambda at, *totals: add(at, list(totals), f.lane_mask(f["length"] - whole // memory, taken)), totals)
    _store_dots(f, _written(numeric), totals, rows, pixels)
    f.ret()
    return f


def _store_dots(f: Function, numeric: Numeric, totals: list[Value], rows: int, pixels: int) -> None:
    memory = numeric.memory_bytes
    width = min(rows, numeric.lanes)
    for start in range(0, rows, width):
        mask = f.lane_mask(f["rest"] - start, width)
        with f.when(f["rest"] > start):
            known = f.lane_mask(f.select(f["has_bias"] > 0, f["rest"] - start, f.value(0)), width)
            bias = numeric.load(f, f["bias"] + start * memory, width, known)
            for m in range(pixels):
                total = _sum_each(f, [totals[(start + i) * pixels + m] for i in range(width)], numeric.lanes)
                numeric.store(f, f.fadd(bias, total), f["out"] + f["out_pixel"] * m + start * memory, width, mask)


def _sum_each(f: Function, vectors: list[Value], lanes: int) -> Value:
    """The sums of each vector's lanes (at most ``lanes`` vectors, a power of two), by halves: the order is that of one vector alone."""
    segment = lanes
    while segment > 1:
        half = segment // 2
        if len(vectors) > 1:
            segments = range(0, 2 * lanes, segment)
            pairs = [(left, right) for left, right in zip(vectors[::2], vectors[1::2])]
            low = [f.shuffle(a, b, [s + i for s in segments for i in range(half)]) for a, b in pairs]
            high = [f.shuffle(a, b, [s + half + i for s in segments for i in range(half)]) for a, b in pairs]
            vectors = [f.fadd(a, b) for a, b in zip(low, high)]
        else:
            segments = range(0, lanes, segment)
            low_lanes, high_lanes = ([s + offset + i for s in segments for i in range(half)] for offset in (0, half))
            vectors = [f.fadd(f.shuffle(vectors[0], None, low_lanes), f.shuffle(vectors[0], None, high_lanes))]
            lanes = half * (lanes // segment)
        segment = half
    return vectors[0]


# --- grad_input


def _grad_input(kernel: GemvKernel, module: Module, numeric: Numeric, f: Function, task: Task) -> Callable[[Value], None]:
    functions = {pixels: _emit_columns(module, numeric, kernel, pixels) for pixels in (kernel.pixels, 1)}
    memory = numeric.memory_bytes
    scratch = task.scratch

    def body(index: Value) -> None:
        start = index * task["block"]
        width = f.minimum(task["length"] - start, task["block"])

        def pixels(m: Value, count: int) -> None:
            source, out = task.operand("source") + m * task["source_pixel"], task.operand("out") + m * task["out_pixel"] + start * memory
            sizes = [task[name] for name in ("rows", "weight_row", "source_pixel", "out_pixel", "scratch_pixel")]
            f.call(functions[count], [task.operand("other") + start * memory, source, out, scratch, width, *sizes])

        _each_block(f, task["pixels"], kernel.pixels, pixels)

    return body


def _emit_columns(module: Module, numeric: Numeric, kernel: GemvKernel, pixels: int) -> Function:
    """``columns(weight, source, out, scratch, width, rows, weight_row, source_pixel, out_pixel, scratch_pixel)``: ``width`` columns of the weight.

    Scratch: for each pixel the sums of the piece at hand, behind them those of all pieces before.
    """
    names = ("width", "rows", "weight_row", "source_pixel", "out_pixel", "scratch_pixel")
    f = module.function(f"columns_{pixels}", [*(("ptr", name) for name in ("weight", "source", "out", "scratch")), *(("i64", name) for name in names)])
    size, memory, lanes = numeric.compute_bytes, numeric.memory_bytes, numeric.lanes
    zero = f.zero(numeric.vector)
    places = [f["scratch"] + f["scratch_pixel"] * (2 * m) for m in range(pixels)]
    totals = [place + f["scratch_pixel"] for place in places]

    def everywhere(body: Callable[[Value], None]) -> None:
        f.loop(0, f["width"], lanes, body)

    def clear(c: Value) -> None:
        for place in (*places, *totals):
            f.store(zero, place + c * size)

    def rows(k: Value, count: int) -> None:
        weights = [f["weight"] + (k + i) * f["weight_row"] for i in range(count)]
        scalars = [[f.splat(numeric.load(f, f["source"] + f["source_pixel"] * m + (k + i) * memory, 1), lanes) for i in range(count)] for m in range(pixels)]

        def vector(c: Value, _: int, mask: Value | None) -> None:
            loaded = [numeric.load(f, weight + c * memory, lanes, mask) for weight in weights]
            for m, place in enumerate(places):
                total = f.load(place + c * size, numeric.vector)
                for i in range(count):
                    total = f.fma(scalars[m][i], loaded[i], total, numeric.target.fma)
                f.store(total, place + c * size)

        _lengthwise(f, numeric, f["width"], vector)

    def add_up(c: Value) -> None:
        for place, total in zip(places, totals):
            f.store(f.fadd(f.load(total + c * size, numeric.vector), f.load(place + c * size, numeric.vector)), total + c * size)
            f.store(zero, place + c * size)

    def piece(k0: Value) -> None:
        _each_block(f, f.minimum(f["rows"] - k0, 2 * _PIECE), kernel.rows // (1 if pixels == 1 else 2), lambda k, count: rows(k0 + k, count))
        everywhere(add_up)

    def write(c: Value, _: int, mask: Value | None) -> None:
        for m, total in enumerate(totals):
            _written(numeric).store(f, f.load(total + c * size, numeric.vector), f["out"] + f["out_pixel"] * m + c * memory, lanes, mask)

    everywhere(clear)
    f.loop(0, f["rows"], 2 * _PIECE, piece)
    _lengthwise(f, numeric, f["width"], write)
    f.ret()
    return f


# --- grad_weight


def _grad_weight(kernel: GemvKernel, module: Module, numeric: Numeric, f: Function, task: Task) -> Callable[[Value], None]:  # noqa: ARG001
    memory, lanes, written = numeric.memory_bytes, numeric.lanes, _written(numeric)
    count, wide = 4, 4 if numeric.target.registers >= 32 else 3

    def body(index: Value) -> None:
        first = index * task["block"]
        last = f.minimum(first + task["block"], task["rows"])

        def segment(start: Value) -> None:
            stop = f.minimum(start + task["segment"], task["length"])
            f.loop(first, last, count, lambda k: rows(k, start, stop))

        def rows(k: Value, start: Value, stop: Value) -> None:
            numbers = [f.minimum(k + i, last - 1) for i in range(count)]
            out = [task.operand("out") + number * task["weight_row"] for number in numbers]
            gradients = [task.operand("other") + number * memory for number in numbers]

            def block(c: Value, vectors: int, mask: Value | None = None) -> None:
                def pixel(m: Value, *sums: Value) -> list[Value]:
                    source = task.operand("source") + m * task["source_pixel"] + c * memory
                    loaded = [numeric.load(f, source + v * lanes * memory, lanes, mask) for v in range(vectors)]
                    scalars = [f.splat(numeric.load(f, pointer + m * task["other_pixel"], 1), lanes) for pointer in gradients]
                    return [f.fma(scalars[i // vectors], loaded[i % vectors], total, numeric.target.fma) for i, total in enumerate(sums)]

                sums = f.loop(0, task["pixels"], 1, pixel, [f.zero(numeric.vector)] * (count * vectors))
                for i, total in enumerate(sums):
                    written.store(f, total, out[i // vectors] + (c + i % vectors * lanes) * memory, lanes, mask)

            whole = start + (stop - start) // (wide * lanes) * (wide * lanes)
            f.loop(start, whole, wide * lanes, lambda c: block(c, wide))
            f.loop(whole, stop, lanes, lambda c: block(c, 1, f.lane_mask(stop - c, lanes)))

        f.loop(0, task["length"], task["segment"], segment)
        with f.when(task["has_bias"] > 0):
            f.loop(first, last, lanes, lambda k: _bias(f, numeric, task, k, f.lane_mask(last - k, lanes)))

    return body


def _bias(f: Function, numeric: Numeric, task: Task, k: Value, mask: Value) -> None:
    """The gradient of the bias: sums over pixels."""

    def pixel(m: Value, total: Value) -> list[Value]:
        return [f.fadd(total, numeric.load(f, task.operand("other") + m * task["other_pixel"] + k * numeric.memory_bytes, numeric.lanes, mask))]

    (total,) = f.loop(0, task["pixels"], 1, pixel, [f.zero(numeric.vector)])
    _written(numeric).store(f, total, task.operand("bias") + k * numeric.memory_bytes, numeric.lanes, mask)
