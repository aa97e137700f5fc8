"""Sizes of Winograd's weight gradient, and its predicted cost, as pure functions of the problem and the target (never of the threads)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from ..codegen.numeric import Numeric
from ..problem import ConvProblem
from .target import Target
from .tiling import split_count, step_cycles
from .winograd_gemm import gemm_rows
from .winograd_tiling import panel_vectors
from .winograd_transform import ERROR_LIMIT, F2, F4, Algorithm

__all__ = ["WinogradWeightConfig", "candidates", "choose_config", "direct_cycles", "predicted", "residues", "tile_counts"]

_CALL_CYCLES = 30.0  # of one call of the GEMM
_NEAR_BYTES = 32.0  # a cycle, of the sums, from and to the second-level cache
_FAR_BYTES = 14.0  # a cycle, of the sums, where they do not fit it
_WRITE_BYTES = 8.0  # a cycle, of partial sums, to the third-level cache
_TRANSFORM_CYCLES = {"input": 6.0, "lift": 5.0, "reduce": 3.5}
"""Cycles a point, for one vector of one tile, or of one row of weights."""
_NCHW_CYCLES = 5.0  # a pixel of one vector: the transpositions
_TASK_CYCLES = 1000.0
_SUM_BYTES = 5 << 19  # of S, a thread: workspaces stay small, and are kept from call to call
_DIRECT_EFFICIENCY = 0.85
_DIRECT_WEIGHT_CYCLES = 15.0  # a vector of weights
_PARTIAL_BYTES = 16 << 20
_THREADS = (2, 4, 8)
"""Threads that the blocks are chosen for: bits depend on the blocks, so they depend on no number of threads in force."""


@dataclass(frozen=True)
class WinogradWeightConfig:
    """One way to compute: algorithm, accumulators, blocks of channels, parts of the tiles.

    ``block_panels``: panels of input channels of a task; ``k_blocks``: blocks of output channels; ``block_tiles``: tiles that are transformed at once,
    and a piece of the sums.  ``cycles`` is the prediction for one thread, ``score`` the sum over several numbers of threads of all threads' cycles.
    """

    algorithm: Algorithm
    rows: int
    vectors: int
    block_panels: int
    c_blocks: int
    k_blocks: int
    parts: int
    part_tiles: int
    block_tiles: int
    cycles: float = math.inf
    score: float = math.inf

    @property
    def error_bound(self) -> float:
        """Bound on the relative L2 error, see :meth:`Algorithm.weight_error_bound`."""
        return self.algorithm.weight_error_bound(self.parts, -(-self.part_tiles // self.block_tiles), self.block_tiles)


def tile_counts(problem: ConvProblem, algorithm: Algorithm) -> tuple[int, int]:
    """Rows and columns of tiles of one image, of all residues."""
    rows, columns = (g * -(-size // (d * algorithm.m)) for g, size, d in zip(residues(problem), (problem.p, problem.q), problem.dilation))
    return rows, columns


def residues(problem: ConvProblem) -> tuple[int, int]:
    """Residues of the rows and of the columns of outputs, see :mod:`faltung.cpu.winograd_form`."""
    return min(problem.dilation[0], problem.p), min(problem.dilation[1], problem.q)


@lru_cache(maxsize=1024)
def choose_config(problem: ConvProblem, target: Target) -> WinogradWeightConfig | None:
    """The configuration predicted to be fastest over several numbers of threads, of those within the error limit; float64 takes exact algorithms only."""
    allowed = [algorithm for algorithm in (F4, F2) if algorithm.exact or problem.dtype != "f64"]
    found = [config for algorithm in allowed for config in candidates(problem, target, algorithm)]
    return next((config for config in sorted(found, key=lambda c: c.score) if config.error_bound <= ERROR_LIMIT), None)


def candidates(problem: ConvProblem, target: Target, algorithm: Algorithm) -> Iterator[WinogradWeightConfig]:
    """Configurations worth a prediction."""
    numeric = Numeric(problem.dtype, target)
    lanes = numeric.lanes
    across, k_vectors = -(-problem.c // lanes), problem.k // lanes
    vectors = panel_vectors(across, 4 if target.registers >= 32 else 3, problem.c % lanes != 0)
    panels, rows = -(-across // vectors), gemm_rows(target.registers, vectors)
    _, tiles_q = tile_counts(problem, algorithm)
    tiles = math.prod(tile_counts(problem, algorithm)) * problem.n
    k_choices = sorted({max(1, min(k_vectors, problem.k // k)) for k in (32, 64, 128, 256)})
    found = set()
    for block_panels in {-(-panels // -(-panels // size)) for size in (1, 2, 4, 8, panels) if size <= panels}:
        c_blocks = -(-panels // block_panels)
        for k_blocks in k_choices:
            if block_panels * vectors * target.vector_bytes * algorithm.n**2 * -(-problem.k // k_blocks) > _SUM_BYTES:
                continue
            for parts in {max(1, tasks // (c_blocks * k_blocks)) for tasks in (1, 4, 8, 16, 24)}:
                if parts > 1 and (parts * problem.c * problem.k * 9 * numeric.compute_bytes > _PARTIAL_BYTES or tiles < 8 * parts):
                    continue
                for size in (14, 28, 56):
                    part = -(-tiles // parts)
                    block = -(-part // -(-part // size))
                    if tiles_q <= block:  # whole rows of tiles: nchw transposes a row's tiles at once
                        block = -(-block // tiles_q) * tiles_q
                    elif problem.format == "nchw":  # and whole groups of residues
                        block = -(-block // residues(problem)[1]) * residues(problem)[1]
                    part_tiles = -(-part // block) * block
                    shape = -(-tiles // part_tiles), part_tiles, block
                    found.add(WinogradWeightConfig(algorithm, rows, vectors, block_panels, c_blocks, k_blocks, *shape))
    for config in sorted(found, key=lambda c: (c.block_panels, c.k_blocks, c.parts, c.block_tiles)):
        yield predicted(problem, target, config)


def predicted(problem: ConvProblem, target: Target, config: WinogradWeightConfig) -> WinogradWeightConfig:
    """The configuration with its cost."""
    numeric, points, size = Numeric(problem.dtype, target), config.algorithm.n**2, target.vector_bytes
    lanes = numeric.lanes
    slow = 1.0 if target.fma else 1.5
    tiles = math.prod(tile_counts(problem, config.algorithm)) * problem.n
    c_vectors, k_rows = -(-problem.c // lanes) / config.c_blocks, problem.k / config.k_blocks
    k_vectors = -(-problem.k // lanes) / config.k_blocks
    part = tiles / config.parts
    pieces = math.ceil(part / config.block_tiles)
    groups = math.ceil(k_rows / config.rows)
    narrow = min(groups, split_count(math.ceil(k_rows), config.rows)[1])
    steps = (groups - narrow) * step_cycles(config.rows, config.vectors) + narrow * step_cycles(max(1, config.rows - 1), config.vectors)
    sums = points * c_vectors * size * k_rows
    near = sums + config.block_tiles * points * (c_vectors + k_vectors) * size <= target.l2 * 1.25
    products = slow * points * c_vectors / config.vectors * (steps * part * 1.05 + groups * pieces * _CALL_CYCLES)
    products += (2 * pieces - 1) * sums / (_NEAR_BYTES if near else _FAR_BYTES)
    nchw = problem.format == "nchw"
    load = points * _TRANSFORM_CYCLES["input"] + config.algorithm.n * config.algorithm.m * _NCHW_CYCLES * nchw
    lift = points * _TRANSFORM_CYCLES["lift"] + config.algorithm.m**2 * _NCHW_CYCLES * nchw
    transforms = part * (c_vectors * load + k_vectors * lift)
    reduce = k_rows * c_vectors * (points * _TRANSFORM_CYCLES["reduce"] + (60.0 if problem.weight_format == "nchw" else 20.0))
    after = 0.0
    if config.parts > 1:
        reduce += sums / 4 / _WRITE_BYTES
        after = config.parts * problem.c * problem.k * 9 * numeric.compute_bytes / _WRITE_BYTES
    tasks, task = config.c_blocks * config.k_blocks * config.parts, transforms + products + reduce + _TASK_CYCLES
    waves = (tasks / t if tasks >= 16 * t else -(-tasks // t) for t in _THREADS)
    score = sum(after + t * count * task for t, count in zip(_THREADS, waves))
    return replace(config, cycles=after + tasks * task, score=score)


def direct_cycles(problem: ConvProblem, target: Target) -> float:
    """Cycles of direct convolution on one thread: products, slower with few vectors of output channels, and the way of its sums through memory."""
    numeric = Numeric(problem.dtype, target)
    vectors = -(-problem.k // numeric.lanes)
    products = numeric.elements(problem.n * problem.p * problem.q) / 2 / (_DIRECT_EFFICIENCY * (1 - 0.25 / vectors))
    return 9 * problem.c * vectors * (products + _DIRECT_WEIGHT_CYCLES)
