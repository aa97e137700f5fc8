"""Sizes of Winograd convolution, and its predicted cost, as pure functions of the problem and the target."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from ..codegen.numeric import Numeric
from ..problem import DTYPES, ConvProblem
from .target import Target
from .tiling import split_count, step_cycles
from .winograd_form import Form, Roles
from .winograd_gemm import gemm_rows
from .winograd_transform import Algorithm, reduction_piece

__all__ = ["WinogradConfig", "candidates", "choose_config", "density", "direct_cycles", "panel_vectors"]

_CALL_CYCLES = 25.0  # of one call of the GEMM: arguments, start of the pipeline
_NEAR_BYTES = 40.0  # a cycle, from the second-level cache
_READ_BYTES = 30.0  # a cycle, streamed from the third-level cache during the products
_PIECES = {("nhwc", 64): 0.965, ("nchw", 64): 0.885, ("nhwc", 32): 1.12, ("nchw", 32): 0.885}
"""By pieces: measured over predicted, beside direct convolution's; by format and bytes of a vector (shorter ones as of 32)."""
_SUM_BYTES = 64.0  # a cycle, of M from and to the second-level cache, beside the products
_STREAM_BYTES = 16.0  # a cycle, of U from memory: each panel is asked for ahead
_WRITE_BYTES = 8.0  # a cycle, to the third-level cache and back into the second
_MEMORY_BYTES = 4.0  # a cycle, from memory, where a matrix does not fit the caches
_WEIGHT_BYTES = 3.0  # a cycle, of direct convolution's weights: read, packed, read again
_AT_USE_BYTES = {64: 8.0}  # of those that are packed where they are used, by bytes of a vector (AVX2: no difference was measured)
_SHARED_CACHE = 24 << 20
_TASK_CYCLES = 400.0
_FORK_CYCLES = 6000.0
_TRANSFORM_CYCLES = {"input": 5.3, "output": 4.2, "filter": 4.0}
"""Cycles a point, for one vector of one tile (input, output) or of one row of filters: bound by moving V, M and U between the first two caches."""
_CONVERTED_FILTERS = 2.0  # of a 16-bit type: each tap is converted
_NCHW_CYCLES = 5.0  # a pixel of one vector: the transpositions


@dataclass(frozen=True)
class WinogradConfig:
    """One way to compute: algorithm, order of the loops, tiles of a block, accumulators, panels' shares, pieces of the reduction.

    ``chunk``: channels of a piece of the sums; ``piece``: channels that the filter transform works on at once; ``input_tiles``: tiles of a task
    of the input stage (order ``filters``).  ``cycles`` is the prediction, of the thread that is busy longest.
    """

    algorithm: Algorithm
    order: str
    tiles: int
    rows: int
    vectors: int
    shares: int
    chunk: int
    piece: int
    input_tiles: int
    cycles: float = math.inf

    @property
    def label(self) -> str:
        return f"{self.algorithm.name} {self.order}"


def panel_vectors(total: int, largest: int, partial: bool) -> int:
    """Vectors of a panel: at most ``largest``, such that ``total`` splits into panels of as many and one fewer.

    ``partial``: the last vector is partial; it begins early to avoid a mask, so its panel needs another vector before it.
    """
    for vectors in range(min(largest, total), 1, -1):
        panels = -(-total // vectors)
        if panels * vectors - total <= panels and (vectors > 2 or total % vectors == 0 or not partial):
            return vectors
    return 1


def choose_config(problem: ConvProblem, target: Target, threads: int, allowed: tuple[Algorithm, ...]) -> WinogradConfig:
    """The configuration predicted to be fastest."""
    return min((_best(problem, target, threads, algorithm) for algorithm in allowed), key=lambda c: c.cycles)


@lru_cache(maxsize=1024)
def _best(problem: ConvProblem, target: Target, threads: int, algorithm: Algorithm) -> WinogradConfig:
    return min(candidates(problem, target, threads, algorithm), key=lambda c: c.cycles)


def choose_kept(problem: ConvProblem, target: Target, threads: int, algorithm: Algorithm) -> WinogradConfig:
    """The configuration predicted to be fastest where U was made before; in order ``filters`` it would not be used."""
    found = [replace(c, cycles=predict(problem, target, threads, c, kept=True)) for c in candidates(problem, target, threads, algorithm)]
    return min(found, key=lambda c: c.cycles)


def direct_cycles(problem: ConvProblem, target: Target, cycles: float, threads: int, at_use: bool) -> float:
    """Cycles of direct convolution from its own prediction (of all cores), and the way of its weights, packed before or ``at_use``, through memory."""
    rate = _AT_USE_BYTES.get(target.vector_bytes, _WEIGHT_BYTES) if at_use else _WEIGHT_BYTES
    return cycles / threads + problem.c * problem.k * problem.r * problem.s * DTYPES[problem.dtype] / rate


def _tile_count(roles: Roles, algorithm: Algorithm) -> int:
    tiles_p, tiles_q = roles.grid(algorithm.m)
    return roles.problem.n * tiles_p * tiles_q


def density(form: Form, n: int) -> float:
    """The share of the parts that a point multiplies, on average."""
    counts = [sum(form.used(part, row, column) for part in range(len(form.parts))) for row in (False, True) for column in (False, True)]
    weights = [(n - 1) ** 2, n - 1, n - 1, 1]
    return sum(c * w for c, w in zip(counts, weights)) / (n * n * len(form.parts))


def _even(total: int, size: int, threads: int, group: int = 1) -> int:
    """A size of blocks at most about ``size``, of whole groups, that shares ``total`` out evenly among the threads."""
    if group > 1:
        return group * _even(total // group, max(1, size // group), threads)
    blocks = -(-total // size)
    if blocks < 8 * threads:
        blocks = -(-blocks // threads) * threads
    return -(-total // max(1, blocks))


def candidates(problem: ConvProblem, target: Target, threads: int, algorithm: Algorithm) -> Iterator[WinogradConfig]:
    """Configurations worth a prediction."""
    roles, numeric = Roles(problem), Numeric(problem.dtype, target)
    lanes = numeric.lanes
    tiles, points = _tile_count(roles, algorithm), algorithm.n**2
    channel = points * numeric.compute_bytes
    total_vectors = -(-roles.out_channels // lanes)
    most = 4 if target.registers > 16 else 3
    source = roles.source_channels
    group = roles.groups[1] if problem.format == "nchw" else 1  # tiles of neighbouring columns are stored together
    components, phases = len(roles.form.components), len(roles.form.phases)
    chunk = reduction_piece(source, components)
    virtual = roles.virtual
    piece = 16 if components == 1 else chunk
    for largest in range(most, 1, -1):
        vectors = panel_vectors(total_vectors, largest, roles.out_channels % lanes != 0)
        if largest not in {vectors, most}:
            continue
        width = vectors * lanes
        rows = gemm_rows(target.registers, vectors)
        sizes = {target.l2 * 3 // 5 // (channel * (virtual + 16 + width * phases)), target.l2 * 3 // 5 // (channel * width * phases) * 4 // 5}
        panels = -(-total_vectors // vectors)
        if roles.by_pieces:
            yield from _by_pieces(problem, target, threads, WinogradConfig(algorithm, "tiles", 0, rows, vectors, 1, chunk, piece, 4), tiles, panels)
            continue
        for size in sorted({min(tiles, max(rows, s)) for s in sizes} | {min(tiles, 16)}):
            for shares in sorted({1, min(panels, threads), panels}):
                base = WinogradConfig(algorithm, "tiles", _even(tiles, size, threads if shares == 1 else 1, group), rows, vectors, shares, chunk, piece, 4)
                yield replace(base, cycles=predict(problem, target, threads, base))
        if roles.few:
            continue
        fitting = max(rows, target.l2 * 3 // 5 // (channel * width * phases))
        for size in sorted({min(tiles, fitting), min(tiles, 2 * fitting)}):
            block = _even(tiles, size, 1, group)
            base = WinogradConfig(algorithm, "filters", block, rows, vectors, 1, chunk, chunk, group * max(1, min(4, block) // group))
            yield replace(base, cycles=predict(problem, target, threads, base))


def _by_pieces(problem: ConvProblem, target: Target, threads: int, base: WinogradConfig, tiles: int, panels: int) -> Iterator[WinogradConfig]:
    """Order ``tiles`` with pieces of the reduction outside: blocks such that one piece of V and the share's M fit the second-level cache."""
    numeric, virtual = Numeric(problem.dtype, target), base.chunk * len(Roles(problem).form.components)
    channel, width = base.algorithm.n**2 * numeric.compute_bytes, base.vectors * numeric.lanes
    for shares in sorted({1, -(-panels // 4), -(-panels // 2), panels}):
        fitting = target.l2 * 7 // 10 // (channel * (virtual + 16 + width * -(-panels // shares)))
        for size in {min(tiles, max(base.rows, fitting)), min(tiles, max(base.rows, fitting // base.rows * base.rows))}:
            config = replace(base, tiles=_even(tiles, size, threads if shares == 1 else 1), shares=shares)
            yield replace(config, cycles=predict(problem, target, threads, config))


def predict(problem: ConvProblem, target: Target, threads: int, config: WinogradConfig, kept: bool = False) -> float:
    """Cycles until the last thread is done: work of a task, times tasks of the busiest thread, and what the stages before cost.

    ``kept``: U is there already, in memory (order ``tiles``).
    """
    roles, algorithm, rates = Roles(problem), config.algorithm, target.rates
    near_bytes, read_bytes, write_bytes = _NEAR_BYTES * rates.near, _READ_BYTES * rates.far, _WRITE_BYTES * rates.far
    memory_bytes, stream_bytes = _MEMORY_BYTES * rates.memory, _STREAM_BYTES * rates.memory
    numeric, points = Numeric(problem.dtype, target), algorithm.n**2
    lanes = numeric.lanes
    source, out = -(-roles.source_channels // lanes) * len(roles.form.components), -(-roles.out_channels // lanes)
    phases = len(roles.form.phases)
    if roles.few:
        source = -(-roles.virtual // lanes)
    depth = roles.virtual * density(roles.form, algorithm.n)  # terms of a point, on average
    tiles = _tile_count(roles, algorithm)
    blocks = -(-tiles // config.tiles)
    panels = -(-out // config.vectors)
    groups, narrow = -(-config.tiles // config.rows), 0
    narrow = max(0, min(groups, split_count(config.tiles, config.rows)[1]))
    wide_panels = max(0, out - panels * (config.vectors - 1)) if out % config.vectors else panels
    # Half the vector width has half the work a point: the transforms' loads and stores cost the same a line.
    slow = 1.0 if target.fma else 1.5
    pieces = roles.source_channels // config.chunk

    def product(vectors: int, count: int) -> float:
        """One panel's products for a block of tiles."""
        steps = (groups - narrow) * step_cycles(config.rows, vectors) + narrow * step_cycles(max(1, config.rows - 1), vectors)
        calls = groups * pieces * (_CALL_CYCLES + config.rows * vectors)
        return count * points * slow * (steps * 1.05 * depth + calls)

    gemm = phases * (product(config.vectors, wide_panels) + product(max(1, config.vectors - 1), panels - wide_panels))
    transpose = (algorithm.n * algorithm.m * 0.75 * _NCHW_CYCLES) if problem.format == "nchw" else 0.0
    unpack = (algorithm.m**2 * _NCHW_CYCLES) if problem.format == "nchw" else 0.0
    line = algorithm.m**2 * target.vector_bytes / 16.0  # pixels come from the outer caches
    load = source * (points * _TRANSFORM_CYCLES["input"] + transpose + line)
    store = phases * out * (points * _TRANSFORM_CYCLES["output"] + unpack + line)
    filters = phases * depth * out * points * _TRANSFORM_CYCLES["filter"] * (_CONVERTED_FILTERS if numeric.converts else 1.0)
    filters += roles.source_channels * roles.out_channels * problem.r * problem.s * numeric.compute_bytes / write_bytes
    u = phases * points * depth * out * target.vector_bytes
    v = config.tiles * points * source * target.vector_bytes
    m = phases * config.tiles * points * config.vectors * target.vector_bytes
    gemm += phases * panels * v / near_bytes
    if config.order == "tiles":
        share_panels = -(-panels // config.shares)
        shares = -(-panels // share_panels)
        part = share_panels / panels
        read = read_bytes if u < _SHARED_CACHE else memory_bytes if kept or roles.by_pieces else stream_bytes
        streamed = u * part + (v * share_panels * (1.0 if kept else read / read_bytes) if v + m > target.l2 * 3 // 4 else 0.0)
        task = gemm * part + config.tiles * (load + store * part) + streamed / read + _TASK_CYCLES
        if roles.by_pieces:
            streamed = 3 * u * part
            task = (gemm - panels * v / near_bytes) * part + config.tiles * (1.25 * load + store * part) + streamed / read + _TASK_CYCLES
            task = (task + 2 * m * share_panels * pieces / _SUM_BYTES) * _PIECES[problem.format, max(32, target.vector_bytes)]
            m = 0
        if m > target.l2:
            task += 2 * m * share_panels / read_bytes
        tasks = blocks * shares
        before = 0.0 if kept else filters / threads + u / (write_bytes if u < _SHARED_CACHE else memory_bytes) / (threads if u < target.l2 * 2 else 1)
    else:
        read = read_bytes if blocks * v < _SHARED_CACHE * 2 // 3 else memory_bytes  # every panel reads V again
        task = (gemm + filters + v * panels / read) / panels + config.tiles * store / panels + _TASK_CYCLES
        if m > target.l2 * 3 // 4:
            task += 2 * m * pieces / read_bytes
        tasks = blocks * panels
        before = (tiles * load + blocks * v / write_bytes) / threads
    waves = tasks / threads if tasks >= 16 * threads else -(-tasks // threads)
    return before + waves * task + (_FORK_CYCLES * rates.fork if threads > 1 else 0.0)
