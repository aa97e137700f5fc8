"""The weight's gradient as sums of outer products: x and the gradient of y are read where they lie, but for x in nchw, a piece of which is transposed.

Packed panels cost ``direct`` and ``pointwise`` more than they save where pixels are few, and their sums are transposed at the end (vectors run over output
channels there).  Any kernel, stride, dilation, padding and number of groups; float32 and float64 (a broadcast that converts costs too much).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .. import config as options
from ..codegen.load import load
from ..codegen.numeric import Numeric
from ..dispatch import Unsupported
from ..problem import ConvProblem
from . import target as targets
from .direct_weight import choose_config as choose_packed
from .direct_weight import predicted_cycles as packed_cycles
from .geometry import padded_index
from .outer_kernel import ARGUMENTS, PIECE, TAP, OuterKernel
from .plan import CpuPlan
from .pointwise import joined
from .target import Rates, Target
from .tile import align, meets_itself, pitches
from .tiling import split, split_count, step_cycles, useful_threads

__all__ = ["OUTER", "Outer", "OuterConfig", "choose_config"]

_PIECE = 98  # 7 rows of 14, 2 images of 7x7: x of a panel of four vectors stays in the first-level cache; twice as many gain 1 to 4 %, at a larger error
_SEGMENT_BYTES = 64 << 10  # of x, that all rows of a task read before they pass over the next channels
_STREAM_BYTES = 80.0  # a cycle, of operands that are read from the outer caches, most of it beside the products
_FAR_BYTES = 16.0  # the same where they are larger than
_FAR = 8 << 20
_TRANSPOSE_CYCLES = 8.0  # a vector of pixels
_FEW_VECTORS = 1.15  # blocks of one or two vectors: measured over counted
_ROWS = {32: {4: 4, 3: 8, 2: 8, 1: 12}, 16: {3: 4, 2: 5, 1: 10}}
"""Rows of accumulators by vector registers and vectors: 6x4 is 5 to 10 % slower than 4x4, whose results are written in longer runs."""

# Where it is chosen, by memory format and bytes of a vector (docs/engineering/cpu-direct.md): predicted cycles of packed panels over those predicted here,
# at least; and outputs of an image (but for Zen 4 of all images), at most, up to which that holds.
_LEAST_RATIO = {"nchw": 0.6, "nhwc": 0.82}
_MOST_PIXELS = {("nchw", 64): 1600, ("nhwc", 64): 3200, ("nchw", 32): 400, ("nhwc", 32): 784}
_CLEAR_RATIO = 1.5  # beyond them
_FULL_RATE_CLEAR = 1.3  # with AVX-512 at full rate
_MANY_WEIGHTS = 128 << 10  # for the limits of AVX-512 at full rate
_FEW_ROWS = 4  # output channels of a group: packed panels waste most lanes (AVX2: 3x3 of 320 channels to 4 2.2 times as fast here, 128 to 2 2.5 times)
_ONE_TASK_PIXELS = {"nchw": 1 << 15, "nhwc": 1 << 17}  # of those: they are few tasks, and packed panels share out the pixels among any number of threads
_SHARED_TAPS = (
    49  # so many are shared out in nchw too, whose pixels each task transposes anew (9x9 with reflection, 32 channels to 3 at 256x256: 2.1 times as fast)
)
_MANY_TAPS = 64  # of kernels that do not overlap, whose pixels are used once however they are packed (8x8 of 32 channels: 1.7 times as fast here)
_GROUPED_PIXELS = 392  # AVX-512, groups of at most a vector's lanes: from so many outputs on lanes over groups are faster, 1.2 to 1.5 times at batch 8
_CROWDED_CHANNELS = 512  # nchw, AVX-512: of y with planes whole pages apart, whose elements, a row's each, meet in one set of the first-level cache
_CROWDED_PRODUCTS = 100_000_000  # nhwc, AVX-512, of an image: where pixels of x or y are whole pages apart, passes enough for it to matter
_KIB = 1024  # bytes from a pixel of x to the next, or a multiple: with AVX-512 at full rate, nhwc and 1x1 a piece's lines of a panel meet in few sets
_KIB_APART, _KIBS_APART = (392, 32), (784, 96)  # outputs of all images and output channels from which packed panels are faster then
_SMALL = 4096, 96, 16384  # nchw, AVX-512 at full rate: so many weights, output channels and pixels or fewer, whatever is predicted
_FAR_PIXELS = 2048  # bytes from a pixel to the next: with AVX2, panels of three short vectors of such pixels meet in few sets of the first-level cache

_Table = npt.NDArray[np.int64]


@dataclass(frozen=True)
class OuterConfig:
    """``rows`` x ``vectors`` accumulators; panels of input channels and groups of rows (output channels) of a task, and blocks of taps that are tasks;
    threads worth their start, and predicted cycles.  None of them decides bits: those depend on the pieces of the pixels, which are made from the problem's
    sizes alone."""

    rows: int
    vectors: int
    block_panels: int
    block_groups: int
    threads: int
    cycles: float
    tap_blocks: int = 1


def _joined(problem: ConvProblem) -> bool:
    """Whether the pixels of an image follow each other in x as in y."""
    return (problem.r, problem.s, problem.stride, problem.padding) == (1, 1, (1, 1), (0, 0, 0, 0))


def _grid(problem: ConvProblem) -> tuple[int, int, int]:
    """Images, rows and columns of outputs, rows (and in nhwc images) joined where they can be."""
    if not _joined(problem):
        return problem.n, problem.p, problem.q
    pixels = problem.p * problem.q
    return (1, 1, problem.n * pixels) if problem.format == "nhwc" else (problem.n, 1, pixels)


def _pieces(problem: ConvProblem) -> _Table:
    """Boxes of outputs, see :data:`faltung.cpu.outer_kernel.PIECE`; the parts of an axis are about equal."""
    n, p, q = _grid(problem)
    images = max(1, min(n, _PIECE // (p * q)))
    rows = p if p * q <= _PIECE else max(1, _PIECE // q)

    def parts(total: int, size: int) -> list[tuple[int, int]]:
        count = -(-total // size)
        ends = [total * i // count for i in range(count + 1)]
        return list(itertools.pairwise(ends))

    reads = None if _joined(problem) else _reads(problem)
    boxes = [(*i, *r, *c, *_pixels(problem, reads, r, c)) for i in parts(n, images) for r in parts(p, rows) for c in parts(q, _PIECE)]
    return np.array(boxes, dtype=np.int64).reshape(-1, len(PIECE))


@dataclass(frozen=True)
class _Reads:
    """Of every output of an axis: the first and the last index of x that its taps read, and whether one of them is in a padding that is not zeros."""

    first: _Table
    last: _Table
    at_edge: npt.NDArray[np.bool_]


def _reads(problem: ConvProblem) -> tuple[_Reads, _Reads]:
    """Of the rows and of the columns."""
    left, _, top, _ = problem.padding
    found = []
    for axis, size, outputs, taps, before in ((0, problem.h, problem.p, problem.r, top), (1, problem.w, problem.q, problem.s, left)):
        plain = np.arange(outputs)[:, None] * problem.stride[axis] + np.arange(taps) * problem.dilation[axis] - before
        index = np.clip(plain, 0, size - 1) if problem.padding_mode == "zeros" else padded_index(plain, size, problem.padding_mode)
        outside = (plain != index).any(axis=1) & (problem.padding_mode != "zeros")
        found.append(_Reads(index.min(axis=1), index.max(axis=1), outside))
    return found[0], found[1]


def _pixels(problem: ConvProblem, reads: tuple[_Reads, _Reads] | None, rows: tuple[int, int], columns: tuple[int, int]) -> tuple[int, int, bool]:
    """The run of an image's pixels of x that outputs of ``rows`` and ``columns`` read, and whether they read in the padding."""
    if reads is None:
        return *columns, False
    high, wide = slice(*rows), slice(*columns)
    start = int(reads[0].first[high].min()) * problem.w + int(reads[1].first[wide].min())
    stop = int(reads[0].last[high].max()) * problem.w + int(reads[1].last[wide].max()) + 1
    return start, stop, bool(reads[0].at_edge[high].any() or reads[1].at_edge[wide].any())


def _runs(size: int, outputs: int, first: int, step: int, mode: str) -> list[tuple[int, int, int, int]]:
    """What a tap reads along an axis, ``first`` for output 0 were it inside: where output 0 would read, its step, first and last output of a run of
    equal steps.  The first run is what is inside, and may be empty; in zero padding there are no others."""
    low = min(outputs, max(0, -(first // step)))
    high = min(outputs, max(0, (size - 1 - first) // step + 1))
    found = [(first, step, low, high)]
    if mode != "zeros":
        index = padded_index(first + step * np.arange(outputs), size, mode).tolist()
        for begin, stop in ((0, low), (high, outputs)):
            start = begin
            while start < stop:
                own = index[start + 1] - index[start] if start + 1 < stop else 0
                end = start + 1
                while end < stop and index[end] - index[end - 1] == own:
                    end += 1
                found.append((index[start] - own * start, own, start, end))
                start = end
    return found


def _taps(problem: ConvProblem, row: int, column: int, blocks: int) -> tuple[_Table, _Table]:
    """See :data:`faltung.cpu.outer_kernel.TAP`, and where the entries of each block of taps in the padding begin; ``row`` and ``column``: bytes from one
    of x to the next."""
    _, p, q = _grid(problem)
    left, _, top, _ = problem.padding
    if _joined(problem):
        return np.array([[0, 0, row, column, 0, p, 0, q]], dtype=np.int64), np.ones(2, np.int64)
    inside: list[tuple[int, ...]] = []
    edges: list[tuple[int, ...]] = []
    starts: list[int] = []
    taps = problem.r * problem.s
    for tap in range(taps):
        if tap in (taps * b // blocks for b in range(len(starts), blocks)):
            starts.append(taps + len(edges))
        r, s = divmod(tap, problem.s)
        rows = _runs(problem.h, p, r * problem.dilation[0] - top, problem.stride[0], problem.padding_mode)
        columns = _runs(problem.w, q, s * problem.dilation[1] - left, problem.stride[1], problem.padding_mode)
        entries = [(tap, y * row + x * column, y_step * row, x_step * column, *spans, *span) for y, y_step, *spans in rows for x, x_step, *span in columns]
        inside.append(entries[0])
        edges += entries[1:]
    return np.array(inside + edges, dtype=np.int64).reshape(-1, len(TAP)), np.array([*starts, taps + len(edges)], np.int64)


def _block(rows: int, vectors: int, target: Target) -> tuple[int, int]:
    """Rows and vectors of accumulators: ``rows`` and ``vectors`` split into as many, and one fewer."""
    most = _ROWS[32 if target.registers >= 32 else 16]
    wide = next(v for v in most if split_count(vectors, v)[0] > 0)
    high = most[wide] - (0 if target.fma else 1)
    return next(r for r in (high, high + 1, *range(high - 1, 0, -1)) if split(rows, r)), wide


def choose_config(problem: ConvProblem, target: Target, threads: int) -> OuterConfig:
    """Blocks whose sums stay in the second-level cache, shared out evenly among the threads."""
    numeric = Numeric(problem.dtype, target)
    lanes, size, taps, nchw = numeric.lanes, numeric.compute_bytes, problem.r * problem.s, problem.format == "nchw"
    rows, vectors = _block(problem.kg, -(-problem.cg // lanes), target)
    panels, groups = -(-problem.cg // (lanes * vectors)), -(-problem.kg // rows)
    pixels = problem.n * problem.p * problem.q
    step = step_cycles(rows, vectors) * (_FEW_VECTORS if vectors < 3 else 1.0)
    threads = useful_threads(threads, step * panels * groups * pixels * taps * problem.g, target)
    wanted = 1 if threads == 1 else 4 * threads
    source = problem.h * problem.w / (problem.p * problem.q)  # pixels of x for one of y
    stream = _FAR_BYTES if (problem.c * source + problem.k) * pixels * size > _FAR else _STREAM_BYTES

    def busiest(blocks: tuple[int, int]) -> tuple[float, int]:
        """Cycles a pixel of the thread that has most to do; of equals, few blocks of channels, whose rows of the result are longer."""
        c_blocks, k_blocks = blocks
        high, wide = -(-groups // k_blocks), -(-panels // c_blocks)
        one = taps * high * wide * step + (wide * vectors * _TRANSPOSE_CYCLES if nchw else 0.0)
        one += (wide * vectors * target.vector_bytes * source + max(64, high * rows * size)) / stream
        return -(-problem.g * c_blocks * k_blocks // threads) * one, c_blocks

    found = []
    for c_blocks in range(1, min(panels, wanted) + 1):
        least = -(-groups // max(1, target.l2 // 4 // (-(-panels // c_blocks) * vectors * lanes * taps * size * rows)))
        enough = max(least, min(groups, -(-wanted // (problem.g * c_blocks))))
        most = min(groups, enough + threads)
        few = {min(most, max(least, -(-count // (problem.g * c_blocks)))) for count in (1, threads, 2 * threads)}
        found += [(c_blocks, k) for k in sorted({least, *few, *range(enough, most + 1)})]
    c_blocks, k_blocks = min(found, key=busiest)
    # Channels too few to share out: the taps are, whose sums are apart.  In nchw each block of them transposes x anew.
    tasks = problem.g * c_blocks * k_blocks
    tap_blocks = min(taps, -(-(threads if nchw else wanted) // tasks)) if tasks < threads else 1
    cycles = busiest((c_blocks, k_blocks))[0] * pixels
    if tap_blocks > 1:
        cycles /= min(tap_blocks, threads)
    return OuterConfig(rows, vectors, -(-panels // c_blocks), -(-groups // k_blocks), threads, cycles, tap_blocks)


class Outer:
    """The implementation named ``outer``."""

    name = "outer"

    def plan(self, problem: ConvProblem, threads: int) -> CpuPlan:
        """A plan for grad_weight; raises :class:`Unsupported` for another direction, type or padding, and where packed panels are faster."""
        if problem.direction != "grad_weight":
            raise Unsupported("only grad_weight")
        target = targets.target()
        if Numeric(problem.dtype, target).converts:
            raise Unsupported("float32 and float64 only: elements would be converted each time that they are broadcast")
        if problem.padding_mode == "circular" and any(problem.padding) and problem.format == "nchw":
            raise Unsupported("circular padding in nchw: a piece would transpose both ends of the image and all between")
        if problem.empty:
            raise Unsupported("nothing to compute")
        if options.current().implementation != self.name:
            _refuse(problem, replace(target, rates=Rates()))
        return build_plan(problem, target, choose_config(problem, target, threads), self.name)


def _refuse(problem: ConvProblem, target: Target) -> None:
    """Raises :class:`Unsupported` where packed panels are predicted, or were measured, to be faster.  As it decides bits, it is made for two threads always."""
    lanes, taps = Numeric(problem.dtype, target).lanes, problem.r * problem.s
    if problem.padding_mode != "zeros" and any(problem.padding) and problem.kg > _FEW_ROWS:
        raise Unsupported(f"a padding other than zeros: measured with {_FEW_ROWS} output channels and fewer only")
    pixels = problem.p * problem.q * (problem.n if target.vector_bytes == 32 or target.full_rate else 1)
    most = _most_at_full_rate(problem) if target.full_rate else _MOST_PIXELS.get((problem.format, target.vector_bytes))
    if most is None:
        raise Unsupported(f"not measured with vectors of {target.vector_bytes} bytes")
    if problem.cg < lanes:
        raise Unsupported(f"{problem.cg} input channels a group fill no vector of {lanes}")
    if problem.cg % lanes and target.vector_bytes == 32:
        raise Unsupported("a partial vector of input channels: AVX2's masked accesses take half of the speed")
    all_pixels = problem.n * problem.p * problem.q
    far = _ONE_TASK_PIXELS["nhwc" if taps >= _SHARED_TAPS else problem.format]
    if problem.kg <= _FEW_ROWS and (taps > 1 or problem.format == "nhwc") and all_pixels <= far:
        return
    apart = problem.stride[0] >= problem.r and problem.stride[1] >= problem.s
    if problem.format == "nchw" and apart and taps >= _MANY_TAPS and all_pixels <= _ONE_TASK_PIXELS["nchw"]:
        return
    if taps > 1 and (problem.format == "nchw" or target.vector_bytes == 32):
        raise Unsupported("several taps: packed panels, which serve all of them, were measured to be faster")
    if target.vector_bytes == 32 and problem.format == "nhwc" and problem.c * Numeric(problem.dtype, target).memory_bytes >= _FAR_PIXELS:
        raise Unsupported("pixels are too far apart: they meet in few sets of the first-level cache")
    if problem.g > 1 and max(problem.cg, problem.kg) <= lanes and all_pixels >= _GROUPED_PIXELS:
        raise Unsupported("a group's channels fit into a vector: lanes over groups were measured to be faster")
    if _crowded(problem, target):
        raise Unsupported("planes or pixels are whole pages or KiB apart: they meet in few sets of the first-level cache")
    small = problem.k * problem.cg <= _SMALL[0] and problem.k <= _SMALL[1] and pixels > most and all_pixels <= _SMALL[2] and problem.g == 1
    if small and problem.format == "nchw" and target.full_rate:
        return
    config = choose_config(problem, target, 2)
    row = joined(problem) if _joined(problem) else problem
    ratio = packed_cycles(row, target, choose_packed(row, target)) / config.threads / config.cycles
    if ratio < (_LEAST_RATIO[problem.format] if pixels <= most else _FULL_RATE_CLEAR if target.full_rate else _CLEAR_RATIO):
        raise Unsupported(f"packed panels are predicted to be faster ({ratio:.2f} times the cycles, {pixels} pixels)")


def _most_at_full_rate(problem: ConvProblem) -> int:
    """Outputs of all images, at most, with AVX-512 at full rate: packed panels are the faster ones the more pixels share what packing them costs."""
    few_weights = problem.k * problem.cg < _MANY_WEIGHTS
    if problem.format == "nchw":
        return 1700 if few_weights else 800
    if problem.r * problem.s > 1 or not few_weights:
        return 200
    return 3300 if problem.n == 1 else 1600


def _crowded(problem: ConvProblem, target: Target) -> bool:
    """Whether what is read side by side falls into one set of the first-level cache, often enough to be slower than packed panels (AVX-512)."""
    size = Numeric(problem.dtype, target).memory_bytes
    if target.vector_bytes != 64 or problem.p * problem.q <= _PIECE:
        return False
    if problem.format == "nchw":
        return meets_itself(problem.p * problem.q * size) and problem.kg >= _CROWDED_CHANNELS
    if target.full_rate and problem.r * problem.s == 1 and problem.c * size % _KIB == 0:
        pixels, rows = _KIB_APART if problem.c * size == _KIB else _KIBS_APART
        if problem.n * problem.p * problem.q >= pixels and problem.kg >= rows:
            return True
    return (meets_itself(problem.c * size) or meets_itself(problem.k * size)) and problem.cg * problem.kg * problem.p * problem.q >= _CROWDED_PRODUCTS


OUTER = Outer()


def build_plan(problem: ConvProblem, target: Target, config: OuterConfig, name: str) -> CpuPlan:
    """Tables, kernel and argument block for a configuration."""
    numeric = Numeric(problem.dtype, target)
    lanes, size, taps, nchw = numeric.lanes, numeric.compute_bytes, problem.r * problem.s, problem.format == "nchw"
    rows, vectors = config.rows, config.vectors
    wide_panels, narrow_panels = split_count(-(-problem.cg // lanes), vectors)
    wide_groups, narrow_groups = split_count(problem.kg, rows)
    panels, groups = wide_panels + narrow_panels, wide_groups + narrow_groups
    c_blocks, k_blocks = -(-panels // config.block_panels), -(-groups // config.block_groups)
    gathered = problem.weight_format == "nchw" and taps > 1
    kernel = OuterKernel(
        target, problem.dtype, problem.format, rows, vectors, narrow_groups > 0, narrow_panels > 0, problem.cg % lanes != 0, gathered
    )  # fmt: skip
    x_image, x_channel, _, x_pixel = pitches(problem, True)
    gy_image, gy_channel, gy_row, gy_column = pitches(problem, False)
    panel = vectors * lanes * size
    pixel = panel if nchw else x_pixel
    pieces, zeros = _pieces(problem), np.zeros(panel, np.uint8)
    tap_table, edge_table = _taps(problem, problem.w * pixel, pixel, config.tap_blocks)
    # What a piece reads of a panel in nchw; a last block of pixels is stored whole.
    piece = {name: pieces[:, i] for i, name in enumerate(PIECE)}
    transposed = align((int((piece["last_pixel"] - piece["first_pixel"]).max()) + lanes) * panel)
    scratch_size = align(int((piece["last_image"] - piece["first_image"]).max()) * transposed, 4096) + 9 * 64 if nchw else 0
    sum_tap = (align(problem.cg, lanes) if gathered else problem.cg) * size
    bias_at = align(problem.k * taps * sum_tap + 64, 4096) if gathered else 0
    scratch_at = bias_at + (align(problem.k * size + 64, 4096) if problem.epilogue.bias else 0)
    segment = max(1, _SEGMENT_BYTES // (min(_PIECE, math.prod(_grid(problem))) * panel))
    values = {
        "tasks": problem.g * config.tap_blocks * c_blocks * k_blocks, "finish_tasks": problem.k if gathered else 0,
        "has_bias": int(problem.epilogue.bias), "bias_at": bias_at,
        "source_image": x_image, "source_channel": x_channel, "x_image": transposed if nchw else x_image, "x_pixel": pixel, "x_group": problem.cg * x_channel,
        "gy_image": gy_image, "gy_row": gy_row, "gy_column": gy_column, "gy_channel": gy_channel,
        "pieces": len(pieces), "piece_table": pieces.ctypes.data, "taps": taps, "tap_table": tap_table.ctypes.data,
        "tap_blocks": config.tap_blocks, "edge_table": edge_table.ctypes.data, "zeros": zeros.ctypes.data,
        "c_blocks": c_blocks, "block_panels": config.block_panels, "segment_panels": segment, "panels": panels, "wide_panels": wide_panels,
        "k_blocks": k_blocks, "block_groups": config.block_groups, "row_groups": groups, "wide_groups": wide_groups, "out_channels": problem.kg,
        "group_channels": problem.cg, "sum_row": taps * sum_tap, "sum_tap": sum_tap, "weight_row": taps * problem.cg * size,
        "scratch_at": scratch_at, "scratch_size": scratch_size,
    }  # fmt: skip
    facts = {"block": f"{rows}x{vectors}", "pieces": len(pieces), "tasks": values["tasks"], "predicted_cycles": config.cycles}
    block = ARGUMENTS.pack(config.threads, values)
    workspace_bytes = scratch_at + config.threads * scratch_size
    return CpuPlan(problem, name, load(kernel.name, target, kernel.emit), block, [pieces, tap_table, edge_table, zeros], workspace_bytes, facts)
