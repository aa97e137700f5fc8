"""Direct convolution: any kernel, stride, dilation, groups, padding mode and type; forward and grad_input."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise

import numpy as np
import numpy.typing as npt

from ..codegen.load import load
from ..codegen.numeric import Numeric
from ..dispatch import Unsupported
from ..problem import DTYPES, ConvProblem
from . import target as targets
from .bfloat import pair_offsets, run_length
from .direct_kernel import ARGUMENTS, PHASE_FIELDS, DirectKernel
from .frozen import Packing
from .geometry import Axis, axes
from .pack import step_kind
from .plan import CpuPlan
from .target import Target
from .tile import PAGE, Tile, align, meets_itself, pitches, row_pitch, weight_strides
from .tiling import MOST_VECTORS, Block, choose_block, least_cycles, piece_length, place_scratch, split_count, tile_candidates, useful_threads

__all__ = ["DIRECT", "Direct", "DirectConfig", "choose_config", "elements_apart", "offered_configs", "packs_at_use"]

_PAIR_CHUNK = 192  # bfloat16 pairs take half the time: longer pieces, for fewer trips of the sums through memory
_ROW_CYCLES = 1 / 8  # nhwc: pixels come from the second-level cache, at distances that may share a cache set: 6x4 beats 14x2 by 2 to 15 %
_PAIR_ROW_CYCLES = 1 / 64  # a row of a pair's tile comes from the second-level cache late: 8x3 and 6x4 beat 14x2 by 1 to 19 % where both fit
_PAIR_LATENCY = 9.0  # measured: blocks of 12 sums run at three quarters of the speed of blocks of 21
_PIXELS = 1.06  # nhwc: rows are channels there, and cost nothing; the other orientation pays for them, and the balance was right
_PAIR_PIXELS = 1.15  # vectors over pixels lose this much more than float32's to the trip of the sums through scratch
_CROWDED, _CROWDED_STORE = 12, 0.65  # so many planes whole pages apart, whose lines meet in one set of the first-level cache: cycles more to store an element
_PACK, _COME = 0.08, 0.2  # cycles to pack a byte of weights, and to read one that another core packed
_SPLIT = 80.0  # cycles for each plane of which two threads write parts: the lines between them go back and forth
_SLACK = 4096
_PLANE_BYTES = 512 << 10
_PIXELS_CHUNK = 128
_TILE_BYTES = 256 << 10  # of pixels that are read in place (1x1 in nhwc), at most: 2 to 35 % faster than half of a second-level cache of 2 MiB
_ALONE_BYTES = 1 << 20  # of one small image as one tile, at most: from 2 MiB on it costs up to 1.7 times the time (AVX-512, 32x32 pixels)
_UNEVEN = 0.5  # of such a tile's task: on a shared machine cores are never equally fast, and four tasks on two threads took 1.3 times as long as ten
_CANDIDATES = 8  # tile widths and heights tried, the largest that fit the cache first


@dataclass(frozen=True)
class Roles:
    """A problem as its gather sees it: ``forward`` gathers x for y, ``grad_input`` gathers the gradient of y for that of x."""

    problem: ConvProblem

    @property
    def forward(self) -> bool:
        return self.problem.direction == "forward"

    @property
    def source_channels(self) -> int:
        """Channels of a group that are gathered."""
        return self.problem.cg if self.forward else self.problem.kg

    @property
    def out_channels(self) -> int:
        """Channels of a group that are produced."""
        return self.problem.kg if self.forward else self.problem.cg

    @property
    def source_size(self) -> tuple[int, int]:
        return (self.problem.h, self.problem.w) if self.forward else (self.problem.p, self.problem.q)

    @property
    def out_size(self) -> tuple[int, int]:
        return (self.problem.p, self.problem.q) if self.forward else (self.problem.h, self.problem.w)


@dataclass(frozen=True)
class DirectConfig:
    """Tile and block sizes of one direct convolution; ``cycles`` is the predicted total of all cores, ``shared`` what of it goes into packing the weights and
    into lines that two cores need."""

    orientation: str
    layout: str
    tile: tuple[int, int]
    block: Block
    chunk: int
    k_blocks: int
    cycles: float
    shared: float = 0.0
    packed: bool = True

    @property
    def label(self) -> str:
        return f"{self.orientation} {self.tile[0]}x{self.tile[1]} k{self.k_blocks}"


def _counts(axis: Axis) -> tuple[int, ...]:
    """Outputs in a tile: of every phase, in a whole and in the last tile."""
    found = set()
    for phase in axis.phases:
        found.add(min(axis.tile, phase.count))
        found.add(phase.count - (phase.count - 1) // axis.tile * axis.tile if phase.count else 0)
        # A phase may end in the tile before the last one of the longest phase.
    return tuple(sorted(found - {0}))


@lru_cache(maxsize=1024)
def choose_config(problem: ConvProblem, target: Target, threads: int, orientation: str | None = None) -> DirectConfig:
    """The configuration predicted to be fastest.  No choice but that of the pieces' length, which is the same for all, changes the bits."""
    lines = _Lines(problem)
    best: DirectConfig | None = None
    for wanted in (orientation,) if orientation else ("channels", "pixels"):
        best = _Search(problem, target, threads, wanted, lines).best(best)
    assert best is not None
    return best


def offered_configs(problem: ConvProblem, target: Target, threads: int) -> list[DirectConfig]:
    """What a tuner may try: for each orientation the three tiles predicted to be fastest.  All have the same bits."""
    lines = _Lines(problem)
    found: list[DirectConfig] = []
    for orientation in ("channels", "pixels"):
        search = _Search(problem, target, threads, orientation, lines)
        every = [search.configure(rows, columns, math.inf) for rows, columns in search.tiles()]
        found += sorted((c for c in every if c is not None), key=lambda config: config.cycles)[:3]
    return found


class _Line:
    """What the cost of a tile takes from one of its axes, as plain numbers."""

    __slots__ = ("counts", "row_pitch", "scratch", "slabs", "tile", "tiles")

    def __init__(self, axis: Axis) -> None:
        self.tile, self.tiles = axis.tile, -(-axis.count // axis.tile)
        self.scratch, self.slabs = axis.scratch_starts[-1], len(axis.slabs)
        self.counts, self.row_pitch = _counts(axis), row_pitch(axis)


class _Lines:
    """The axes of a problem for every size of tile, each made once."""

    def __init__(self, problem: ConvProblem) -> None:
        self._problem = problem
        self.whole = axes(problem, (1, 1))
        self._rows: dict[int, _Line] = {}
        self._columns: tuple[dict[int, _Line], dict[int, _Line]] = {}, {}

    def rows(self, tile: int) -> _Line:
        if tile not in self._rows:
            self._rows[tile] = _Line(axes(self._problem, (tile, 1))[0])
        return self._rows[tile]

    def columns(self, tile: int, dense: bool = False) -> _Line:
        found = self._columns[dense]
        if tile not in found:
            found[tile] = _Line(axes(self._problem, (1, tile), dense=dense)[1])
        return found[tile]


class _Search:
    """The search for one orientation's configuration: the sizes that all of its tiles share."""

    def __init__(self, problem: ConvProblem, target: Target, threads: int, orientation: str, lines: _Lines) -> None:
        self.problem, self.target, self.threads, self.orientation, self.lines = problem, target, threads, orientation, lines
        roles, numeric = Roles(problem), Numeric(problem.dtype, target)
        self.layout = "inner" if problem.format == "nhwc" and orientation == "channels" else "outer"
        self.lanes, self.size, self.pairs = numeric.lanes, numeric.compute_bytes, numeric.pairs
        self.source_channels, self.out_channels = numeric.elements(roles.source_channels), roles.out_channels
        rows, columns = lines.whole
        self.row_count, self.column_count = rows.count, columns.count
        self.column_phases, self.phases = len(columns.phases), len(rows.phases) * len(columns.phases)
        self.reduction = sum(len(p.taps) for p in rows.phases) * sum(len(p.taps) for p in columns.phases) * self.source_channels
        self.out_vectors = -(-self.out_channels // self.lanes)
        longest = max((len(p.taps) for p in rows.phases), default=0) * max((len(p.taps) for p in columns.phases), default=0) * self.source_channels
        self.chunk = _PAIR_CHUNK if self.pairs else piece_length(longest, self.out_vectors, target.vector_bytes)
        # Every task reads all packed weights: from the second-level cache at no cost, from the third-level one at about 12 bytes a cycle.
        packed_bytes = self.reduction * self.out_channels * self.size
        self.reread = packed_bytes / 12 if packed_bytes > target.l2 // 2 else packed_bytes / 64
        self.slow = _PAIR_PIXELS if self.pairs else 1.0 if problem.format == "nchw" else _PIXELS
        self.plain = self.layout == "inner" and (problem.r, problem.s, *problem.stride) == (1, 1, 1, 1)
        # One small image with many channels: as one tile its weights are packed at use, which saves more than the tile, read from the third-level cache, costs.
        self.alone = problem.n == 1 and orientation == "channels" and packed_bytes > target.l2 and not self.pairs
        rows_out, columns_out = roles.out_size
        crowded = meets_itself(rows_out * columns_out * numeric.memory_bytes) and self.out_channels >= _CROWDED
        self.store = 0.5 if problem.format == "nhwc" else 2.0 + (_CROWDED_STORE * self.lanes if crowded else 0.0)
        """Cycles to store a vector of channels, in nchw by transposition."""
        weights = packed_bytes * problem.g
        self.at_use = weights * _PACK
        """Cycles of all cores to pack the weights, each panel where it is used, and (``packing``) before."""
        if place_scratch(int(weights), threads, target)[0]:
            self.packing = threads * weights * _PACK
        else:
            self.packing = weights * (_PACK + (threads - 1) * _COME)
        self.split = _SPLIT * self.out_channels * problem.g if problem.format == "nchw" and problem.n < threads else 0.0
        self.least = 0.0 if orientation == "channels" else least_cycles(target, (self.out_channels,), _PIXELS_CHUNK)

    def fits(self, tile_p: int, tile_q: int) -> bool:
        scratch = self.lines.rows(tile_p).scratch * self.lines.columns(tile_q).scratch * self.source_channels * self.size
        if self.alone and tile_p >= self.row_count and tile_q >= self.column_count:
            return scratch <= min(self.target.l2 * 2, _ALONE_BYTES)
        return scratch <= (min(self.target.l2 // 2, _TILE_BYTES) if self.plain else self.target.l2 // 2)

    def best(self, best: DirectConfig | None) -> DirectConfig:
        """The first of the fastest configurations, or ``best`` where none is faster."""
        for rows, columns in self.tiles():
            config = self.configure(rows, columns, best.cycles if best else math.inf)
            if config is not None and (best is None or config.cycles < best.cycles):
                best = config
        assert best is not None
        return best

    def tiles(self) -> Iterator[tuple[_Line, _Line]]:
        """The tiles worth a prediction."""
        wide = list(islice((q for q in tile_candidates(self.column_count) if self.fits(1, q)), _CANDIDATES)) or [1]
        for tile_q in wide:
            high = list(islice((p for p in tile_candidates(self.row_count) if self.fits(p, tile_q)), _CANDIDATES)) or [1]
            for tile_p in high:
                yield self.lines.rows(tile_p), self.lines.columns(tile_q, self.layout == "inner")
                # Smaller tiles would only add packing once there are tasks enough to share out evenly.
                if self.problem.n * self.problem.g * self.lines.rows(tile_p).tiles * self.lines.columns(tile_q).tiles >= 16 * self.threads:
                    break

    def configure(self, rows: _Line, columns: _Line, limit: float) -> DirectConfig | None:
        """The best block for a tile, and the cost of the whole problem with it; None where that is known to be above ``limit`` before."""
        nchw = self.problem.format == "nchw"
        tasks = self.problem.n * self.problem.g * rows.tiles * columns.tiles
        scratch = rows.scratch * columns.scratch * self.source_channels
        pack = (
            scratch / self.lanes * (2.0 if nchw == (self.layout == "outer") else 6.0)
            + rows.scratch * columns.slabs * (self.source_channels if nchw else 1) * 20.0
        )
        mean_rows = self.row_count / rows.tiles
        mean = self.reduction / max(1, self.phases)
        k_blocks, single = 1, False
        if self.orientation == "channels":
            costs = {"row_cycles": _PAIR_ROW_CYCLES, "latency": _PAIR_LATENCY} if self.pairs else {"row_cycles": 0.0 if nchw else _ROW_CYCLES}
            single = tasks == 1 and not self.pairs
            sizes = range(1, min(MOST_VECTORS, self.out_vectors) + 1) if single and self.threads > 1 else (MOST_VECTORS,)
            blocks = [
                choose_block(self.target, columns.counts, self.out_vectors, 192, round_vectors=False, piece=self.chunk, most_vectors=most, **costs)
                for most in sizes
            ]
            block = min(blocks, key=lambda b: b.cycles * _largest_share(self.out_vectors, b.vectors, self.threads))
            # The block was chosen for the distinct counts of columns; a row of a tile has the mean one.
            per_step = block.cycles * (self.column_count / columns.tiles) / sum(columns.counts) * mean_rows
            store = mean_rows * columns.tile * self.phases * self.out_vectors * self.store
            panels = -(-self.out_vectors // block.vectors)
        else:
            pixels = (rows.tile - 1) * columns.row_pitch + columns.tile
            whole = -(-pixels // self.lanes)
            slow = mean_rows / rows.tile * self.slow
            store = rows.tile * columns.tile * self.phases * self.out_channels / self.lanes * (1.0 if nchw else 3.0) + self.out_channels * rows.tile * 8
            if tasks * (pack + whole * self.least * slow * mean * self.phases + store + self.reread) > limit * 1.001:
                return None
            block = choose_block(self.target, (self.out_channels,), whole, _PIXELS_CHUNK, round_vectors=True)
            per_step = block.cycles * mean_rows / rows.tile * self.slow
            panels = -(-self.out_channels // block.rows)
            plane = self.column_phases * self.out_channels * (pixels + 4 * self.lanes) * self.size
            k_blocks = min(panels, -(-plane // _PLANE_BYTES))
        each = per_step * mean * self.phases + store + self.reread
        if tasks < 2 * self.threads:
            k_blocks = max(k_blocks, min(panels, -(-2 * self.threads // tasks)))
            k_blocks = _even_blocks(tasks, panels, k_blocks, self.threads)
        turns = math.ceil(tasks * k_blocks / self.threads)
        share = turns / k_blocks
        if single:
            k_blocks, turns, share = panels, math.ceil(panels / self.threads), _largest_share(self.out_vectors, block.vectors, self.threads)
        # A thread packs a tile once for all of its blocks of panels that it computes in a row; one that is read in place is read for each of them.
        packs = turns if self.plain and not single else math.ceil(tasks / self.threads)
        cycles = (packs * pack + share * each + turns * 300.0) * self.threads
        cycles += _UNEVEN * (pack + each / k_blocks + 300.0) if self.threads > 1 and self.plain else 0.0
        shared = self.at_use if single else self.packing + (self.split if tasks > self.problem.n * self.problem.g else 0.0)
        return DirectConfig(self.orientation, self.layout, (rows.tile, columns.tile), block, self.chunk, k_blocks, cycles + shared, shared)


def _largest_share(vectors: int, panel: int, threads: int) -> float:
    """Of ``vectors`` in panels of ``panel`` and one fewer, the share of the thread that has most of them."""
    wide, narrow = split_count(vectors, panel)
    panels = wide + narrow
    ends = [part * panels // threads for part in range(threads + 1)]
    return max((b - a) * (panel - 1) + min(b, wide) - min(a, wide) for a, b in pairwise(ends)) / vectors


def _even_blocks(tasks: int, panels: int, blocks: int, threads: int) -> int:
    """The least number of blocks from ``blocks`` on that gives each thread as many tasks, or ``blocks``: 6 panels make 2, 3 or 6 blocks, never 4."""
    for wanted in range(blocks, panels + 1):
        found = -(-panels // -(-panels // wanted))
        if found >= blocks and tasks * found % threads == 0:
            return found
    return blocks


class Direct:
    """The implementation named ``direct``."""

    name = "direct"

    def configs(self, problem: ConvProblem, threads: int) -> list[DirectConfig]:
        """What the tuner may choose from, beside the predicted choice."""
        return offered_configs(problem, targets.target(), threads)

    def plan(self, problem: ConvProblem, threads: int, config: DirectConfig | None = None) -> CpuPlan:
        """A plan for forward or grad_input; raises :class:`Unsupported` for what it does not take."""
        if problem.direction == "grad_weight":
            raise Unsupported("grad_weight is direct_weight's")
        if problem.direction == "grad_input" and problem.padding_mode != "zeros":
            raise Unsupported("grad_input in this padding mode is padded_grad_input's")
        target = targets.target()
        if config is None:
            config = choose_config(problem, target, threads)
            if (useful := useful_threads(threads, config.cycles, target)) < threads:
                threads, config = useful, choose_config(problem, target, useful)
        return build_plan(problem, target, threads, config, self.name)


DIRECT = Direct()
_PACKING = Packing(ARGUMENTS, "pack_tasks", "tasks")


def packs_at_use(problem: ConvProblem, target: Target, config: DirectConfig) -> bool:
    """Whether a panel of weights is used by one task only, which packs it itself."""
    rows, columns = axes(problem, config.tile, dense=config.layout == "inner")
    one_tile = problem.n * -(-rows.count // config.tile[0]) * -(-columns.count // config.tile[1]) == 1
    pairs = Numeric(problem.dtype, target).pairs  # are packed in whole runs of the weight's memory
    return one_tile and config.orientation == "channels" and not pairs


def build_plan(problem: ConvProblem, target: Target, threads: int, config: DirectConfig, name: str, kept: bool = False) -> CpuPlan:
    """Tables, kernel and argument block for a configuration; ``kept``: with a stage that packs all weights, for a plan that keeps them."""
    roles, numeric = Roles(problem), Numeric(problem.dtype, target)
    rows, columns = axes(problem, config.tile, dense=config.layout == "inner")
    at_use = not kept and packs_at_use(problem, target, config)
    kernel = _kernel(problem, roles, numeric, config, columns, at_use)
    size = numeric.compute_bytes
    # Where the source is read in place, the tile's pixels are as far apart as its channels are many, those of other groups included.
    channels = numeric.elements(roles.source_channels) * (1 if config.packed else problem.g)
    tile = Tile(rows, columns, config.layout, channels, size, pitches(problem, roles.forward), config.packed, config.block.rows)
    layout = _Layout(roles, numeric, config, kernel, tile, len(columns.phases))
    phases = _Phases(problem, roles, numeric, layout, tile, rows, columns)
    front = 0 if at_use else align(phases.packed_bytes + problem.g * layout.padded * size + 64, PAGE)
    front_pitch, scratch_at = (0, front) if kept else place_scratch(front, threads, target)
    values = _values(problem, roles, numeric, config, layout, tile, phases, rows, columns, at_use) | {"scratch_at": scratch_at}
    block = ARGUMENTS.pack(threads, values, front_pitch)
    facts = {
        "orientation": config.orientation, "block": f"{config.block.rows}x{config.block.vectors}", "tile": f"{config.tile[0]}x{config.tile[1]}",
        "chunk": config.chunk, "tasks": values["tasks"], "predicted_cycles": config.cycles / threads,
    }  # fmt: skip
    workspace_bytes = values["scratch_at"] + threads * values["scratch_size"]
    tables = [*tile.tables, *phases.tables, phases.records]
    plan = CpuPlan(problem, name, load(kernel.name, target, kernel.emit), block, tables, workspace_bytes, facts, None if at_use else _PACKING)
    if at_use:
        plan.when_frozen = lambda: build_plan(problem, target, threads, config, name, kept=True)
    return plan


def _kernel(problem: ConvProblem, roles: Roles, numeric: Numeric, config: DirectConfig, columns: Axis, at_use: bool) -> DirectKernel:
    lanes, block = numeric.lanes, config.block
    partial = roles.out_channels % lanes != 0
    channels = config.orientation == "channels"
    # Without cheap masks a partial vector goes through scratch.
    converts = numeric.converts and not numeric.pairs
    in_place = channels and problem.format == "nhwc" and not converts and (not partial or numeric.target.masks or numeric.target.isa == "avx2")
    if channels:
        narrow_rows = any(split_count(count, block.rows)[1] for count in _counts(columns))
        narrow_vectors = bool(split_count(-(-roles.out_channels // lanes), block.vectors)[1])
    else:
        narrow_rows = bool(split_count(roles.out_channels, block.rows)[1])
        narrow_vectors = block.vectors > 1
    return DirectKernel(
        numeric.target, problem.dtype, problem.format, config.orientation, config.layout, step_kind(columns.step), block.rows, block.vectors,
        narrow_rows, narrow_vectors, partial and in_place, in_place, 1 if channels else max(1, len(columns.phases)), config.packed,
        _spread(problem, roles, numeric, config), elements_apart(problem, numeric.target) if channels and not numeric.converts else 0, at_use,
    )  # fmt: skip


def _spread(problem: ConvProblem, roles: Roles, numeric: Numeric, config: DirectConfig) -> int:
    """A few channels, odd in number, that packing spreads to whole pairs."""
    channels = roles.source_channels
    return channels if numeric.pairs and config.layout == "inner" and problem.g == 1 and channels in (1, 3, 5, 7) else 0


def elements_apart(problem: ConvProblem, target: Target) -> int:
    """How many elements apart neighbouring input channels' weights are in grad_input, where vectors of them can be picked out of a few vectors; else 0
    (512x512x3x3 take 1.0 ms one by one)."""
    taps = problem.r * problem.s
    vectors = target.masks or target.vector_bytes == 32  # with AVX2 layers of 512 channels at 14x14 take 0.9 of the time
    picks = problem.direction == "grad_input" and problem.weight_format == "nchw" and vectors
    return taps if picks and 1 < taps <= 9 else 0


class _Layout:
    """A thread's scratch (the tile, then accumulators) and the packed panels."""

    def __init__(self, roles: Roles, numeric: Numeric, config: DirectConfig, kernel: DirectKernel, tile: Tile, phases: int) -> None:
        size, lanes = numeric.compute_bytes, numeric.lanes
        self.start_at = align(tile.bytes + _SLACK) if config.packed else 0
        self.c_at = self.start_at + align(kernel.rows * kernel.vectors * lanes * size)
        if kernel.orientation == "channels":
            vectors = -(-roles.out_channels // lanes)
            self.panels, self.wide = -(-vectors // kernel.vectors), split_count(vectors, kernel.vectors)[0]
            self.padded = vectors * lanes
            self.c_channel = 0
            # The transposing store reads whole blocks of pixels, up to one vector past the last.
            c = 0 if kernel.in_place and not numeric.pairs else (config.tile[0] * config.tile[1] + lanes) * kernel.vectors * lanes * size
        else:
            self.panels, self.wide = -(-roles.out_channels // kernel.rows), split_count(roles.out_channels, kernel.rows)[0]
            self.padded = roles.out_channels
            pixels = (config.tile[0] - 1) * tile.pixels + config.tile[1]
            # Not a multiple of the page, where neighbouring planes would fall into the same cache sets.
            self.c_channel = align((pixels + 4 * lanes) * size) + 64
            c = max(1, phases) * self.padded * self.c_channel
        self.panel_at = align(self.c_at + c + _SLACK)
        panel = (config.chunk + 1) * kernel.vectors * lanes * size + _SLACK if kernel.at_use else 0
        self.scratch_size = align(self.panel_at + panel) + 64 * 9


class _Phases:
    """The phases' reductions: where the tile and the weight hold each term, and where the packed panels lie."""

    def __init__(self, problem: ConvProblem, roles: Roles, numeric: Numeric, layout: _Layout, tile: Tile, rows: Axis, columns: Axis) -> None:
        weight, size = weight_strides(problem), numeric.compute_bytes
        weight_channel = weight[1 if roles.forward else 0]
        channel = np.arange(numeric.elements(roles.source_channels), dtype=np.int64)
        # A pair of channels starts at the first one's weight; an odd offset says that there is no second.
        channel_weights = pair_offsets(roles.source_channels, weight_channel) if numeric.pairs else channel * weight_channel
        self.runs: list[int] = []
        self.tables: list[npt.NDArray[np.int64]] = []
        self.contiguous = True
        self.packed_bytes = 0
        records = []
        for row in rows.phases:
            for column in columns.phases:
                tile_parts, weight_parts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
                for a in row.taps:
                    for b in column.taps:
                        tile_parts.append(tile.offset(a, b) + channel * tile.channel)
                        weight_parts.append(a.kernel_index * weight[2] + b.kernel_index * weight[3] + channel_weights)
                weight_offsets = np.concatenate(weight_parts)
                # In the order of the weight's memory, so that packing it is a transposition of whole cache lines.
                order = np.argsort(weight_offsets, kind="stable")
                tile_offsets, weight_offsets = np.concatenate(tile_parts)[order], weight_offsets[order]
                self.tables += [tile_offsets, weight_offsets]
                self.contiguous &= bool((np.diff(weight_offsets) == DTYPES[problem.dtype]).all())
                if numeric.pairs:
                    self.runs.append(run_length(weight_offsets, weight_channel))
                count = len(tile_offsets)
                spans = (row.start, row.count, column.start, column.count)
                records.append((count, tile_offsets.ctypes.data, weight_offsets.ctypes.data, self.packed_bytes, *spans))
                self.packed_bytes = align(self.packed_bytes + problem.g * layout.padded * count * size)
        self.records = np.array(records, dtype=np.int64).reshape(-1, len(PHASE_FIELDS))


def _values(
    problem: ConvProblem,
    roles: Roles,
    numeric: Numeric,
    config: DirectConfig,
    layout: _Layout,
    tile: Tile,
    phases: _Phases,
    rows: Axis,
    columns: Axis,
    at_use: bool,
) -> dict[str, int]:
    """The argument block's values by name."""
    source, out = pitches(problem, roles.forward), pitches(problem, not roles.forward)
    strides = weight_strides(problem)
    p_tiles, q_tiles = -(-rows.count // config.tile[0]), -(-columns.count // config.tile[1])
    block_panels = -(-layout.panels // config.k_blocks)
    k_blocks = -(-layout.panels // block_panels)
    bias_group = layout.padded * numeric.compute_bytes
    return {
        **tile.arguments(),
        "pack_tasks": 0 if at_use else len(phases.records) * problem.g * layout.panels, "tasks": problem.n * problem.g * p_tiles * q_tiles * k_blocks,
        "phases": phases.records.ctypes.data, "row_phases": len(rows.phases), "column_phases": len(columns.phases),
        "p_tiles": p_tiles, "q_tiles": q_tiles, "tile_p": config.tile[0], "tile_q": config.tile[1], "k_blocks": k_blocks, "block_panels": block_panels,
        "wide_panels": layout.wide, "panels": layout.panels, "groups": problem.g, "source_channels": roles.source_channels,
        "out_channels": roles.out_channels, "source_image": source[0], "source_group": source[1] * roles.source_channels,
        "out_image": out[0], "out_group": out[1] * roles.out_channels, "out_row": out[2], "out_column": out[3], "out_channel": out[1],
        "chunk": config.chunk, "weight_group": strides[0] * problem.kg, "weight_pitch": strides[0 if roles.forward else 1],
        "weight_contiguous": (phases.runs[0] if len(set(phases.runs)) == 1 else 1) if numeric.pairs else int(phases.contiguous),
        "weight_distance": strides[1 if roles.forward else 0], "bias_at": phases.packed_bytes, "bias_group": bias_group,
        "has_bias": int(problem.epilogue.bias and roles.forward),
        "scratch_size": layout.scratch_size,
        "start_at": layout.start_at, "c_at": layout.c_at, "c_channel": layout.c_channel, "column_advance": columns.advance,
        "panel_at": layout.panel_at,
    }  # fmt: skip
