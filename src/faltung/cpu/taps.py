"""Convolution tap by tap: a sum of 1x1 convolutions, each of the pixels that its tap meets inside the image.  Forward and grad_input, zero padding.

The other algorithms multiply with the padding's zeros.  Here a tap costs what it meets, which is little where the kernel spans much of the image: dilated
kernels of many channels (a quarter to a half of the products of 3x3 with dilation 12 or 18 at 33x33), and gradients of kernels without padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import config as options
from ..codegen.load import load
from ..codegen.numeric import Numeric
from ..dispatch import Unsupported
from ..problem import DTYPES, ConvProblem
from . import target as targets
from . import winograd
from .direct import Roles
from .direct import choose_config as direct_config
from .lay import lay
from .plan import CpuPlan
from .taps_kernel import ARGUMENTS, TAP, TapsKernel
from .target import Rates, Target
from .tile import PAGE, align, pitches, weight_strides
from .tiling import piece_length, split_count, step_cycles, useful_threads
from .winograd_tiling import choose_config as winograd_config
from .workspace import BETWEEN, KEPT_BYTES, workspace

__all__ = ["TAPS", "Taps", "TapsConfig", "TurnedPlan", "build_plan", "choose_config"]

_BLOCKS = {32: ((6, 4), (8, 3), (9, 3), (14, 2)), 16: ((6, 2), (4, 3))}
"""Rows and vectors of accumulators that are tried, by vector registers."""
_CALL_CYCLES = 40.0
_ROW_CYCLES = 1 / 6  # of reading a pixel in place, in a step
_PANEL_CYCLES = 1.43  # of a panel's vector, from the second-level cache
_PACK_CYCLES = 1.2  # of a weight
_TURNED_BYTES = 16 << 20  # of images in nhwc at once
_TILE_PIXELS = 256  # outputs of a tile, at least, where there are as many: each tile packs the weights anew

_MOST_TAPS = 256  # with 961 of 64 channels the error is twice PyTorch's
_SHORTEST_SUM = 16  # channels of the source

# Where it is chosen, by bytes of a vector: predicted cycles of the others over those predicted here, at least (docs/engineering/cpu-columns.md).
_LEAST_CHANNELS = 64  # of the source
_AHEAD_OF_DIRECT = {32: 1.04, 64: 1.1}
_AHEAD_OF_STRIDED = {32: 1.15, 64: 1.2}
_FAR_AHEAD = 1.5  # nchw, where weights of many taps are packed in short pieces; forward in float64 (11x11: 0.8 times as fast at a ratio of 1.15)
_PHASED_CHANNELS, _PHASED_PIXELS = 384, 1024  # with AVX2, grad_input in nchw of 2x2 kernels with stride 2, whose rows are written every second element
# at a time: 28x28 and 14x14 1.05 to 1.2 times as fast here, 64x64 0.92 times
_TURN_CYCLES = 1.5  # of an element, from nchw to nhwc or back
_AHEAD_OF_WINOGRAD = {32: 1.0, 64: 1.2}
_MANY_CHANNELS = 1024  # forward: Winograd's transformed weights, 16 or 36 for 9, go through memory
_AHEAD_OF_MANY = {32: 0.8, 64: 1.0}

_Table = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TapsConfig:
    """``rows`` x ``vectors`` accumulators; panels of a block of output channels, and rows of a tile; predicted ``cycles`` of all cores."""

    rows: int
    vectors: int
    block_panels: int
    tile_rows: int
    chunk: int
    cycles: float


@dataclass(frozen=True)
class _Reach:
    """What a tap meets along one axis: first output and source index, and how many."""

    out: int
    source: int
    count: int


def _reaches(problem: ConvProblem, axis: int) -> list[_Reach]:
    """For each tap of an axis; in grad_input outputs are x's and the source the gradient of y."""
    size, outputs, taps = (problem.h, problem.p, problem.r) if axis == 0 else (problem.w, problem.q, problem.s)
    stride, dilation, before = problem.stride[axis], problem.dilation[axis], problem.padding[2 if axis == 0 else 0]
    found = []
    for tap in range(taps):
        offset = tap * dilation - before
        first = min(outputs, max(0, -(offset // stride)))
        count = max(0, min(outputs, (size - 1 - offset) // stride + 1) - first)
        inside = first * stride + offset
        found.append(_Reach(first, inside, count) if problem.direction == "forward" else _Reach(inside, first, count))
    return found


def _products(problem: ConvProblem) -> int:
    """Pixels that taps meet, of one image."""
    return math.prod(sum(reach.count for reach in _reaches(problem, axis)) for axis in (0, 1))


@lru_cache(maxsize=1024)
def choose_config(problem: ConvProblem, target: Target, threads: int) -> TapsConfig:
    """The configuration predicted to be fastest; none of its choices but the chunk, which is the same for all, decides bits."""
    return min(_configs(problem, target, threads), key=lambda config: config.cycles)


def _configs(problem: ConvProblem, target: Target, threads: int) -> Iterator[TapsConfig]:
    roles, numeric = Roles(problem), Numeric(problem.dtype, target)
    size, channels = numeric.compute_bytes, roles.source_channels
    out_vectors = -(-roles.out_channels // numeric.lanes)
    chunk = piece_length(channels, out_vectors, target.vector_bytes)
    height, width = roles.out_size
    rows, columns = _reaches(problem, 0), _reaches(problem, 1)
    row_hits = sum(reach.count for reach in rows)
    for tall, wanted in _BLOCKS[32 if target.registers >= 32 else 16]:
        most, vectors = tall - (0 if target.fma else 1), min(wanted, out_vectors)
        wide, narrow = split_count(out_vectors, vectors)
        if wide < 0:
            continue

        def steps(run: int, vectors: int = vectors, wide: int = wide, narrow: int = narrow) -> float:
            """Cycles of a step of all channels for a run of columns."""

            def one(v: int) -> float:
                return max(step_cycles(run, v), _PANEL_CYCLES * v) + _ROW_CYCLES * run + (_CALL_CYCLES + 2.0 * run * v) / chunk

            return wide * one(vectors) + (narrow * one(vectors - 1) if narrow else 0.0)

        each = 0.0
        for reach in columns:
            if reach.count:
                pieces = -(-reach.count // most)
                longer = reach.count % pieces
                each += longer * steps(reach.count // pieces + 1) + (pieces - longer) * steps(reach.count // pieces)
        products = problem.n * row_hits * each * channels
        panels = wide + narrow
        panel_bytes = chunk * vectors * numeric.lanes * size
        most_panels = max(1, target.l2 // 2 // panel_bytes)
        tiles = max(1, height * width // _TILE_PIXELS)
        weights = len(rows) * len(columns) * channels * roles.out_channels * _PACK_CYCLES
        for row_tiles in sorted({1, *(min(height, t) for t in (2, 4, 8, 16, 32) if t <= tiles)}):
            for k_blocks in range(-(-panels // most_panels), min(panels, 4 * threads + panels // most_panels + 1) + 1):
                block_panels = -(-panels // k_blocks)
                if -(-panels // block_panels) != k_blocks:
                    continue
                tasks = problem.n * row_tiles * k_blocks
                share = math.ceil(tasks / threads) * threads / tasks * (block_panels * k_blocks / panels)
                store = problem.n * height * width * out_vectors
                cycles = share * (products + problem.n * row_tiles * weights + store)
                yield TapsConfig(most, vectors, block_panels, -(-height // row_tiles), chunk, cycles)


class TurnedPlan:
    """An nchw problem computed in nhwc, a few images at a time; of ``parts`` the second is for the last images."""

    def __init__(self, problem: ConvProblem, images: int, parts: list[tuple[CpuPlan, CpuPlan, CpuPlan]]) -> None:
        self.problem, self.implementation = problem, parts[0][1].implementation
        self._images, self._parts = images, parts
        inner, memory = parts[0][1].problem, DTYPES[problem.dtype]
        forward = problem.direction == "forward"
        source, out = (inner.input_shape, inner.output_shape) if forward else (inner.output_shape, inner.input_shape)
        self._source_image, self._out_image = math.prod(source[1:]) * memory, math.prod(out[1:]) * memory
        self._out_at = align(images * self._source_image, PAGE)
        self._bytes = self._out_at + images * self._out_image
        self._poison = options.current().poison
        self.launch: Callable[..., None] = self._launch

    def _launch(self, source: int, other: int, bias: int, out: int) -> None:
        buffer, keep = workspace(self._bytes, self._poison, BETWEEN)
        for start in range(0, self.problem.n, self._images):
            before, inner, behind = self._parts[start + self._images > self.problem.n]
            before.launch(source + start * self._source_image, 0, 0, buffer)
            inner.launch(buffer, other, bias, buffer + self._out_at)
            behind.launch(buffer + self._out_at, 0, 0, out + start * self._out_image)
        del keep

    def describe(self) -> dict[str, Any]:
        return {**self._parts[0][1].describe(), "images_at_once": self._images, "buffer_bytes": self._bytes}


class Taps:
    """The implementation named ``taps``."""

    name = "taps"

    def plan(self, problem: ConvProblem, threads: int) -> CpuPlan | TurnedPlan:
        """A plan; raises :class:`Unsupported` for what it does not take, and where another implementation is predicted to be faster."""
        target = targets.target()
        if problem.direction == "grad_weight":
            raise Unsupported("grad_weight is direct_weight's")
        if problem.padding_mode != "zeros" and (any(problem.padding) or problem.direction == "grad_input"):
            raise Unsupported("zero padding only: what is outside the image is left out")
        if problem.g != 1:
            raise Unsupported("several groups: their channels are few")
        if Numeric(problem.dtype, target).converts:
            raise Unsupported("16-bit results cannot be summed where they are stored")
        if problem.empty:
            raise Unsupported("nothing to compute")
        if (problem.r, problem.s) == (1, 1):
            raise Unsupported("one tap: it meets everything")
        if problem.r * problem.s > _MOST_TAPS or Roles(problem).source_channels < _SHORTEST_SUM:
            raise Unsupported(f"more than {_MOST_TAPS} taps or fewer than {_SHORTEST_SUM} channels: the sum of their sums would be long, and its error large")
        image_bytes = (math.prod(problem.input_shape) + math.prod(problem.output_shape)) // problem.n * DTYPES[problem.dtype]
        if problem.format == "nchw" and image_bytes > KEPT_BYTES:
            raise Unsupported("nchw: images too large to be turned into nhwc")
        if options.current().implementation != self.name:
            _refuse(problem, target, threads)
        if problem.format == "nhwc":
            return self._inner(problem, target, threads)
        images = max(1, min(problem.n, _TURNED_BYTES // image_bytes))
        parts = [self._turned(replace(problem, n=n), target, threads) for n in dict.fromkeys((images, problem.n % images or images))]
        return TurnedPlan(problem, images, parts * (3 - len(parts)))

    def _inner(self, problem: ConvProblem, target: Target, threads: int) -> CpuPlan:
        config = choose_config(problem, target, threads)
        if (useful := useful_threads(threads, config.cycles, target)) < threads:
            threads, config = useful, choose_config(problem, target, useful)
        return build_plan(problem, target, threads, config, self.name)

    def _turned(self, problem: ConvProblem, target: Target, threads: int) -> tuple[CpuPlan, CpuPlan, CpuPlan]:
        """The plans that turn the source, compute, and turn the result back."""
        roles = Roles(problem)
        before = lay(problem, problem.n, roles.source_channels, math.prod(roles.source_size), threads, True)
        behind = lay(problem, problem.n, math.prod(roles.out_size), roles.out_channels, threads, True, back=True)
        return before, self._inner(replace(problem, format="nhwc"), target, threads), behind


def _refuse(problem: ConvProblem, target: Target, threads: int) -> None:
    """Raises :class:`Unsupported` where another implementation is predicted, or was measured, to be faster.

    As it decides bits it does not look at the machine's measured rates, and where results must be reproducible at neither batch size nor threads.
    """
    target = replace(target, rates=Rates())
    if options.current().reproducible:
        problem, threads = replace(problem, n=1), 1
    nhwc = replace(problem, format="nhwc")
    if Roles(problem).source_channels < _LEAST_CHANNELS:
        raise Unsupported(f"{Roles(problem).source_channels} channels: micro-kernels of few steps")
    if Roles(problem).out_channels % Numeric(problem.dtype, target).lanes:
        raise Unsupported("output channels that fill no vectors: sums are stored once a tap and piece, through masks")
    if target.vector_bytes not in _AHEAD_OF_DIRECT:
        raise Unsupported(f"not measured with vectors of {target.vector_bytes} bytes")
    by_winograd = winograd.refusal(nhwc) is None
    if by_winograd and problem.dilation == (1, 1):
        raise Unsupported("Winograd's algorithm multiplies less")
    own = choose_config(nhwc, target, threads).cycles
    if problem.format == "nchw":
        own += (math.prod(problem.input_shape) + math.prod(problem.output_shape)) * _TURN_CYCLES
    if by_winograd and (allowed := winograd.allowed_algorithms(nhwc)):
        transformed = winograd_config(nhwc, target, threads, allowed).cycles * threads
        many = problem.direction == "forward" and problem.c >= _MANY_CHANNELS
        if transformed < own * (_AHEAD_OF_MANY if many else _AHEAD_OF_WINOGRAD)[target.vector_bytes]:
            raise Unsupported(f"Winograd's algorithm is predicted to be faster ({transformed:.3g} cycles; {own:.3g})")
    halves = problem.direction == "grad_input" and problem.stride == (problem.r, problem.s) == (2, 2) and problem.dtype == "f32"
    small = problem.k >= _PHASED_CHANNELS and problem.h * problem.w <= _PHASED_PIXELS
    if problem.format == "nchw" and halves and small and target.vector_bytes == 32:
        return
    packed = direct_config(problem, target, threads).cycles
    least = (_AHEAD_OF_DIRECT if problem.stride == (1, 1) else _AHEAD_OF_STRIDED)[target.vector_bytes]
    far = problem.format == "nchw" or (problem.dtype == "f64" and problem.direction == "forward")
    if packed < own * (_FAR_AHEAD if far else least):
        raise Unsupported(f"packed tiles are predicted to be faster ({packed:.3g} cycles; {own:.3g})")


TAPS = Taps()


def build_plan(problem: ConvProblem, target: Target, threads: int, config: TapsConfig, name: str) -> CpuPlan:
    """Tables, kernel and argument block for a configuration."""
    roles, numeric = Roles(problem), Numeric(problem.dtype, target)
    size, forward = numeric.compute_bytes, roles.forward
    wide, narrow = split_count(-(-roles.out_channels // numeric.lanes), config.vectors)
    panels = wide + narrow
    kernel = TapsKernel(target, problem.dtype, config.rows, config.vectors, narrow > 0, roles.out_channels % numeric.lanes > 0)
    source, out, strides = pitches(problem, forward), pitches(problem, not forward), weight_strides(problem)
    term, produced = strides[1 if forward else 0], strides[0 if forward else 1]
    taps = np.array(
        [
            (r * strides[2] + s * strides[3], row.out, row.count, row.source * source[2] + column.source * source[3], column.out, column.count)
            for r, row in enumerate(_reaches(problem, 0))
            for s, column in enumerate(_reaches(problem, 1))
            if row.count and column.count
        ],
        dtype=np.int64,
    ).reshape(-1, len(TAP))
    offsets = np.arange(roles.source_channels, dtype=np.int64) * size
    weight_offsets = np.arange(roles.source_channels, dtype=np.int64) * term
    out_step, source_step = ((1, 1), problem.stride) if forward else (problem.stride, (1, 1))
    row_tiles, k_blocks = -(-roles.out_size[0] // config.tile_rows), -(-panels // config.block_panels)
    scratch = align(config.block_panels * config.vectors * numeric.lanes * config.chunk * size) + 64 * 9
    values = {
        "tasks": problem.n * row_tiles * k_blocks, "k_blocks": k_blocks, "block_panels": config.block_panels, "panels": panels, "wide_panels": wide,
        "row_tiles": row_tiles, "tile_rows": config.tile_rows, "out_rows": roles.out_size[0], "out_columns": roles.out_size[1],
        "out_image": out[0], "out_row": out[2], "out_column": out[3], "row_step": out_step[0], "c_pitch": out_step[1] * out[3],
        "source_image": source[0], "source_row": source_step[0] * source[2], "source_pitch": source_step[1] * source[3],
        "channels": roles.source_channels, "chunk": config.chunk, "taps": len(taps), "tap_table": taps.ctypes.data, "offsets": offsets.ctypes.data,
        "weight_offsets": weight_offsets.ctypes.data, "weight_pitch": produced, "weight_contiguous": int(term == size), "out_channels": roles.out_channels,
        "has_bias": int(problem.epilogue.bias and forward), "scratch_size": scratch,
    }  # fmt: skip
    facts = {
        "block": f"{config.rows}x{config.vectors}", "chunk": config.chunk, "tasks": values["tasks"], "tile_rows": config.tile_rows,
        "predicted_cycles": config.cycles / threads, "products": problem.n * problem.c * problem.k * _products(problem),
    }  # fmt: skip
    block = ARGUMENTS.pack(threads, values)
    return CpuPlan(problem, name, load(kernel.name, target, kernel.emit), block, [taps, offsets, weight_offsets], threads * scratch, facts)
