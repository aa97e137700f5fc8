"""Convolution over planes: nchw without packed weights.  Forward with any kernel, grad_input with stride 1, in float32 and float64.

Vectors run over pixels, so what is packed is the image, a few pixels at a time, and the weight of forward is read where it lies.  Packing and transposing a
weight pays where many pixels use it; layers with hundreds of channels and small images have more weights than pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from .. import config as options
from ..codegen.load import load
from ..codegen.numeric import Numeric
from ..dispatch import Unsupported
from ..problem import ConvProblem
from . import target as targets
from .direct import DIRECT, Roles, choose_config
from .frozen import Packing
from .geometry import padded_index
from .plan import CpuPlan
from .planes_kernel import ARGUMENTS, PACK_TERMS, PlanesKernel
from .pointwise import POINTWISE, joined
from .target import Target
from .tile import PAGE, align, odd_lines, pitches, weight_strides
from .tiling import Block, choose_block, piece_length, place_scratch, useful_threads

__all__ = ["PLANES", "Planes", "PlanesConfig", "offered_configs"]

_SLACK = 4096
_CROWDED = 1024  # planes this many bytes apart crowd in few sets of the second-level cache, which loses the sums between pieces of the reduction
_CROWDED_PIECES = 64
_HELD_PIECES = 256
_PANEL_CACHES = 2  # the largest panel, in second-level caches: every thread holds one
_MOST_PLACES = 1 << 17
_TASK_CYCLES = 400.0
_COSTS = {"row_cycles": 1 / 8, "latency": 4.5}  # 4x3 is 5 to 10 % faster than 6x2, which reads the weight at one and a half times its rate, and than 2x4
_FAR_CYCLES = 1 / 12  # of a byte of the weight that no cache of the core holds, for each time that it is read; where the shared cache is fast it costs nothing
_UNEVEN = 0.1  # of a task: cores are never equally fast, and the last task is waited for
_ADVANTAGE = {32: 0.85, 64: 0.9}  # by bytes of a vector; the other model leaves out the packing of weights and transposed stores: below these ratios lie losses
_MANY_PIXELS = 3, 0.78  # with AVX2, 1x1 layers with stride 1 of a third as many pixels as output channels
_STRIDED = 64, 0.73  # with AVX2 and from so many source channels on, layers with a stride: the other model leaves out the picking of every second pixel too
_FEW_PIXELS = 64  # several images of 7x7, 1x1 layers: up to 0.75 of the packed kernel's speed, which packs once and reads weights once for each image
_FROZEN_ADVANTAGE = {32: 0.93, 64: 0.9}  # with weights that are packed already, by bytes of a vector: with AVX2 7x7 layers take 0.8 of the time, 14x14 ones 1.1
_WEIGHT_CYCLES = 1.2  # grad_input: to pack a weight, from and to the caches beyond the first
_PIXEL_CYCLES = 4.0  # to find the place of one pixel for one tap
_COPY_CYCLES = 2.0  # a vector of pixels that follow each other
_PICK_CYCLES = 6.0  # a vector of pixels picked one by one


@dataclass(frozen=True)
class PlanesConfig:
    """``block``: output channels by vectors of pixels, in ``blocks`` of which the first ``wide_blocks`` have all vectors; ``run``: pixel blocks of a
    task, ``k_blocks``: tasks that share the output channels of a run; ``chunk``: terms of a piece of the reduction; ``cycles``: the predicted total of all
    cores."""

    block: Block
    blocks: int
    wide_blocks: int
    run: int
    k_blocks: int
    chunk: int
    cycles: float

    @property
    def label(self) -> str:
        return f"{self.block.rows}x{self.block.vectors} run{self.run} k{self.k_blocks}"


class Planes:
    """The implementation named ``planes``."""

    name = "planes"

    def configs(self, problem: ConvProblem, threads: int) -> list[PlanesConfig]:
        """What the tuner may choose from, beside the predicted choice."""
        return [] if _refusal(problem, targets.target()) else list(offered_configs(problem, targets.target(), threads))

    def plan(self, problem: ConvProblem, threads: int, config: PlanesConfig | None = None) -> CpuPlan:
        """A plan; raises :class:`Unsupported` for what it does not take, and, where it is not asked for by name, where another one is predicted faster."""
        target = targets.target()
        reason = _refusal(problem, target)
        if reason is not None:
            raise Unsupported(reason)
        if config is not None:
            return _build_plan(problem, target, threads, config, self.name)
        rival = math.inf if options.current().implementation == self.name else _rival(problem, target, threads)
        config = offered_configs(problem, target, threads)[0]
        if rival < _least_ratio(problem, target) * config.cycles:
            raise Unsupported(f"packed weights are predicted to be faster ({rival:.3g} cycles; {config.cycles:.3g})")
        useful = useful_threads(threads, config.cycles, target)
        plan = _build_plan(problem, target, useful, config if useful == threads else offered_configs(problem, target, useful)[0], self.name)
        if rival < _FROZEN_ADVANTAGE.get(target.vector_bytes, 0.0) * config.cycles:
            plan.when_frozen = lambda: (POINTWISE if _Sizes(problem, target).joined else DIRECT).plan(problem, threads)
        return plan


PLANES = Planes()
_PACKING = Packing(ARGUMENTS, "pack_tasks", "tasks")


def _refusal(problem: ConvProblem, target: Target) -> str | None:
    """Why the algorithm does not apply."""
    roles, numeric = Roles(problem), Numeric(problem.dtype, target)
    if problem.format != "nchw":
        return "nhwc: a pixel's channels follow each other there, not a plane's pixels"
    if problem.direction == "grad_weight":
        return "grad_weight is direct_weight's"
    if numeric.converts:
        return "16-bit results cannot be summed where they are stored"
    if problem.direction == "grad_input" and (problem.stride != (1, 1) or problem.padding_mode != "zeros"):
        return "grad_input with stride 1 and zero padding only"
    if math.prod(roles.out_size) < numeric.lanes:
        return f"fewer than {numeric.lanes} pixels an image: vectors run over them"
    if problem.empty:
        return "nothing to compute"
    sizes = _Sizes(problem, target)
    if sizes.panel_bytes(min(2, sizes.pixels // numeric.lanes)) > _PANEL_CACHES * target.l2:
        return f"{sizes.terms} terms: a block of pixels with all of them leaves the second-level cache"
    if not sizes.joined and sum(taps * size for taps, size in zip((problem.r, problem.s), roles.out_size)) > _MOST_PLACES:
        return f"more than {_MOST_PLACES} places of rows and columns under the kernel"
    return None


def _least_ratio(problem: ConvProblem, target: Target) -> float:
    """The packed kernels' predicted cycles over its own that are enough to be chosen."""
    sizes = _Sizes(problem, target)
    if target.vector_bytes == 32 and problem.stride != (1, 1) and sizes.roles.source_channels >= _STRIDED[0]:
        return _STRIDED[1]
    if target.vector_bytes == 32 and sizes.joined and _MANY_PIXELS[0] * sizes.pixels >= sizes.roles.out_channels:
        return _MANY_PIXELS[1]
    return _ADVANTAGE.get(target.vector_bytes, 0.0)


def _rival(problem: ConvProblem, target: Target, threads: int) -> float:
    """The cycles that ``direct`` or ``pointwise`` is predicted to take, with the same bits, but for what it shares between cores: so :data:`_ADVANTAGE` was
    measured."""
    if target.vector_bytes not in _ADVANTAGE:
        raise Unsupported("vectors are not of 256 or 512 bits: measured with AVX2 and AVX-512 only")
    if problem.r * problem.s > 1 and problem.stride == (1, 1):
        raise Unsupported("several taps at stride 1: rows that are packed once serve all of them")
    sizes = _Sizes(problem, target)
    if problem.n > 1 and sizes.joined and sizes.pixels < _FEW_PIXELS:
        raise Unsupported("several images of few pixels: their blocks would read the weight more often than packed panels are read")
    # asked as pointwise asks, so that the search is done once
    config = choose_config(joined(problem), target, threads, None) if sizes.joined else choose_config(problem, target, threads)
    return config.cycles - config.shared


@dataclass(frozen=True)
class _Sizes:
    """What every configuration of a problem shares."""

    problem: ConvProblem
    target: Target

    @property
    def roles(self) -> Roles:
        return Roles(self.problem)

    @property
    def numeric(self) -> Numeric:
        return Numeric(self.problem.dtype, self.target)

    @property
    def taps(self) -> int:
        return self.problem.r * self.problem.s

    @property
    def terms(self) -> int:
        return self.roles.source_channels * self.taps

    @property
    def pixels(self) -> int:
        return math.prod(self.roles.out_size)

    @property
    def joined(self) -> bool:
        return self.taps == 1 and self.problem.stride == (1, 1) and not any(self.problem.padding)

    def panel_bytes(self, vectors: int) -> int:
        """From one pixel block's panel to the next."""
        return odd_lines(self.terms * vectors * self.numeric.lanes * self.numeric.compute_bytes)

    def held(self, run: int, vectors: int) -> int:
        """Pixel blocks of a task's ``run`` that are packed at a time and share what is read of the weight."""
        return max(1, min(run, self.target.l2 // 4 // self.panel_bytes(vectors)))


@lru_cache(maxsize=1024)
def offered_configs(problem: ConvProblem, target: Target, threads: int) -> tuple[PlanesConfig, ...]:
    """What a tuner may try, the predicted choice first: one configuration for each number of vectors.  All have the same bits."""
    sizes = _Sizes(problem, target)
    return tuple(sorted(_configurations(sizes, threads), key=lambda config: config.cycles))


def _configurations(sizes: _Sizes, threads: int) -> Iterator[PlanesConfig]:
    roles, numeric, target = sizes.roles, sizes.numeric, sizes.target
    channels, pixels, terms = roles.out_channels, sizes.pixels, sizes.terms
    chunk = piece_length(terms, -(-channels // numeric.lanes), target.vector_bytes)
    pixel_vectors = -(-pixels // numeric.lanes)
    weights = 0.0 if roles.forward else sizes.problem.g * channels * terms * _WEIGHT_CYCLES
    images = sizes.problem.n * sizes.problem.g
    weight_bytes = channels * terms * numeric.compute_bytes
    reread = weight_bytes * _FAR_CYCLES * max(0.0, 1 / target.rates.far - 1) if weight_bytes > target.l2 // 2 else 0.0
    most = min(4, pixels // numeric.lanes)
    for vectors in range(min(2, most), most + 1):  # blocks of one vector read the weight at twice the rate of two: half the speed and less
        if vectors > 2 and sizes.panel_bytes(vectors) > _PANEL_CACHES * target.l2:
            break
        wide, narrow = _blocks(pixel_vectors, vectors)
        block = choose_block(target, (channels,), vectors, chunk, round_vectors=False, least_vectors=vectors, **_COSTS)
        pack = _pack_cycles(sizes, vectors)
        blocks, pieces = wide + narrow, -(-channels // block.rows)
        # of all output channels, in the mean of wide and narrow blocks
        products = (block.cycles * terms + pack) * (wide + narrow * (vectors - 1) / vectors) / blocks - pack

        def cycles(
            run: int, k_blocks: int, vectors: int = vectors, pieces: int = pieces, blocks: int = blocks, pack: float = pack, products: float = products
        ) -> float:
            tasks, share = images * -(-blocks // run) * k_blocks, -(-pieces // k_blocks) / pieces
            task = run * (pack + products * share) + -(-run // sizes.held(run, vectors)) * reread * share + _TASK_CYCLES
            return (math.ceil(tasks / threads) + _UNEVEN) * threads * task + weights

        choices = [(run, k_blocks) for k_blocks in _shares(pieces, 4 * threads) for run in {-(-blocks // runs) for runs in _shares(blocks, 8 * threads)}]
        run, k_blocks = min(choices, key=lambda choice: (cycles(*choice), choice[1], -choice[0]))
        yield PlanesConfig(block, blocks, wide, run, k_blocks, chunk, cycles(run, k_blocks))


def _shares(total: int, most: int) -> list[int]:
    """Into how many equal parts to divide ``total``: up to 8, then powers of two and the numbers half way to the next, at most ``most``."""
    found = [*range(1, 9), *(n for power in range(3, 20) for n in (1 << power, 3 << (power - 1)))]
    return sorted({n for n in found if n <= min(total, most)})


def _blocks(total: int, vectors: int) -> tuple[int, int]:
    """Blocks of ``vectors`` and of one fewer that cover ``total`` vectors, as few as possible."""
    blocks = -(-total // vectors)
    narrow = blocks * vectors - total
    return (blocks - narrow, narrow) if narrow <= blocks and vectors > 1 else (blocks, 0)


def _pack_cycles(sizes: _Sizes, vectors: int) -> float:
    """To pack the panel of one block."""
    if sizes.joined:
        return sizes.terms * vectors * _COPY_CYCLES
    channels, unit = sizes.roles.source_channels, sizes.problem.stride[1] == 1
    lanes = sizes.numeric.lanes
    return sizes.taps * vectors * (lanes * _PIXEL_CYCLES + channels * (_COPY_CYCLES if unit and sizes.roles.out_size[1] >= 2 * lanes else _PICK_CYCLES) + 20)


def _build_plan(problem: ConvProblem, target: Target, threads: int, config: PlanesConfig, name: str) -> CpuPlan:
    sizes = _Sizes(problem, target)
    roles, numeric, block = sizes.roles, sizes.numeric, config.block
    size = numeric.compute_bytes
    channels, terms, packed = roles.out_channels, sizes.terms, not roles.forward
    pieces = -(-channels // block.rows)
    narrow_pieces = pieces * block.rows - channels
    kernel = PlanesKernel(
        target, problem.dtype, block.rows, block.vectors, narrow_pieces > 0, config.wide_blocks < config.blocks, sizes.joined, packed
    )  # fmt: skip
    tables = _tables(sizes)
    weight, source, out = weight_strides(problem), pitches(problem, roles.forward), pitches(problem, not roles.forward)
    panel = sizes.panel_bytes(block.vectors)
    held = sizes.held(config.run, block.vectors)
    block_pieces = -(-pieces // config.k_blocks)
    held_pieces = pieces if held == 1 else max(1, target.l2 // 4 // (terms * block.rows * size))
    summed = terms > config.chunk  # in pieces
    crowded = summed and out[1] % _CROWDED == 0
    held_pieces = min(held_pieces, _CROWDED_PIECES if crowded else _HELD_PIECES)
    sums_at = align(block.rows * block.vectors * target.vector_bytes)
    panels_at = sums_at + (align(held_pieces * block.rows * block.vectors * target.vector_bytes) if summed else 0)
    front = align(problem.g * channels * terms * size, PAGE) if packed else 0
    scratch_size = align(panels_at + held * panel + _SLACK) + 64 * 9
    runs, k_blocks = -(-config.blocks // config.run), -(-pieces // block_pieces)
    by_taps = roles.forward and problem.weight_format == "nhwc"  # the order of the weight's memory
    vector, pack_shares = target.vector_bytes, -(-terms // PACK_TERMS)
    tasks = problem.n * problem.g * runs * k_blocks
    workers = min(threads, tasks)
    front_pitch, scratch_at = place_scratch(front, workers, target)
    values = {
        "pack_tasks": problem.g * pack_shares if packed else 0, "pack_shares": pack_shares,
        "tasks": tasks, "groups": problem.g, "runs": runs,
        "run_blocks": config.run, "blocks": config.blocks, "wide_blocks": config.wide_blocks, "held": held, "k_blocks": k_blocks,
        "block_pieces": block_pieces, "pieces": pieces, "wide_pieces": pieces - narrow_pieces, "held_pieces": held_pieces, "pixels": sizes.pixels,
        "source_image": source[0], "source_group": source[1] * roles.source_channels, "source_channel": source[1], "channels": roles.source_channels,
        "taps": sizes.taps, "rows": roles.out_size[0], "columns": roles.out_size[1], "row_table": tables[0].ctypes.data,
        "column_table": tables[1].ctypes.data, "column_step": problem.stride[1], "column_taps": problem.s,
        "term_channel": vector * (1 if by_taps else sizes.taps), "term_tap": vector * (roles.source_channels if by_taps else 1), "terms": terms,
        "chunk": config.chunk, "out_image": out[0], "out_group": out[1] * channels, "out_channel": out[1], "out_channels": channels,
        "weight_group": weight[0] * problem.kg, "weight_row": weight[0 if roles.forward else 1], "weight_offsets": tables[2].ctypes.data,
        "has_bias": int(problem.epilogue.bias and roles.forward), "zeros": tables[3].ctypes.data, "panel_pitch": panel, "scratch_at": scratch_at,
        "scratch_size": scratch_size, "panels_at": panels_at, "sums_at": sums_at, "crowded": int(crowded),
    }  # fmt: skip
    facts = {
        "block": f"{block.rows}x{block.vectors}", "chunk": config.chunk, "tasks": values["tasks"], "run": config.run, "held": held,
        "held_pieces": held_pieces, "predicted_cycles": config.cycles / threads,
    }  # fmt: skip
    loaded, packing_of = load(kernel.name, target, kernel.emit), _PACKING if packed else None
    block_of_arguments = ARGUMENTS.pack(threads, values, front_pitch)
    return CpuPlan(problem, name, loaded, block_of_arguments, tables, scratch_at + workers * scratch_size, facts, packing_of)


def _tables(sizes: _Sizes) -> list[npt.NDArray[np.generic]]:
    """Source rows' and columns' byte offsets for every tap, -1 for zeros; the weight's byte offset of every term; a zero.  Empty is what no kernel reads."""
    problem, roles = sizes.problem, sizes.roles
    left, _, top, _ = problem.padding
    source = pitches(problem, roles.forward)
    found: list[npt.NDArray[np.generic]] = []
    for axis, taps, before, pitch in ((0, problem.r, top, source[2]), (1, problem.s, left, source[3])):
        outputs, tap = np.arange(0 if sizes.joined else roles.out_size[axis]), np.arange(taps)[:, None] * problem.dilation[axis]
        if roles.forward:
            index = padded_index(outputs * problem.stride[axis] + tap - before, roles.source_size[axis], problem.padding_mode)
        else:
            index = padded_index(outputs + before - tap, roles.source_size[axis], "zeros")
        found.append(np.ascontiguousarray(np.where(index >= 0, index * pitch, -1)))
    strides = weight_strides(problem)
    channel = np.arange(0 if roles.forward else roles.source_channels)[:, None, None] * strides[0]
    offsets = channel + np.arange(problem.r)[:, None] * strides[2] + np.arange(problem.s) * strides[3]
    return [*found, np.sort(offsets.ravel()), np.zeros(8, np.float64)]
