"""Plans of the weight's gradient (and the bias's) for grouped convolutions with few channels a group."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..codegen.load import load
from ..codegen.numeric import Numeric
from ..problem import DTYPES, ConvProblem
from .geometry import Axis, Phase, Slab, Tap, axes
from .grouped_lanes import Chunk, GroupedTile, Lanes, chunks, even
from .grouped_weight_kernel import ARGUMENTS, GroupedWeightKernel, Pass
from .plan import CpuPlan
from .target import Target
from .tile import align, pitches
from .tiling import split, split_count, tile_candidates

__all__ = ["GroupedWeightConfig", "build_weight_plan", "choose_weight_config"]

_SLACK = 4096
_RUN_PIXELS = 224  # summed in registers before they join the partial sums: short chains of roundings, and operands in the first-level cache
_TASKS = 24  # enough to share out evenly, whatever the number of threads: the parts must not depend on it
_BLOCK_VECTORS = 4  # of a task: their channels share cache lines or neighbours of them
_UNROLLED = 400  # multiply-adds in the code of one piece


@dataclass(frozen=True)
class GroupedWeightConfig:
    """Tile (rows, columns of pixels), rows summed at a time, pixels of an unrolled piece, most taps, steps and kernel rows of a pass,
    vectors of a task, and parts."""

    tile: tuple[int, int]
    run_rows: int
    columns: int
    taps: int
    steps: int
    rows: int
    vectors: int
    parts: int
    part_tiles: int


def choose_weight_config(problem: ConvProblem, target: Target, lanes: Lanes) -> GroupedWeightConfig:
    """Blocks from sizes and caches alone (not from the number of threads)."""
    numeric = Numeric(problem.dtype, target)
    # Sums, a load or two, a broadcast and the gradients of a chunk's taps fill the registers.
    limit = target.registers * 3 // 4
    together = _together(lanes)
    taps = max(1, min(4, limit // min(together * lanes.unit, 8)))
    taps = min(taps, max(len(c.shape) for c in chunks(axes(problem, (1, 1))[1].phases[0].taps, taps)))
    steps = even(together, max(1, limit // (taps * lanes.unit)))[0]
    kernel_rows = even(problem.r, max(1, limit // (taps * steps * lanes.unit)))[0]
    vector = numeric.lanes * numeric.compute_bytes
    budget = target.l2 * 2 // 5

    def fits(p: int, q: int) -> bool:
        rows, columns = axes(problem, (p, q))
        return (rows.scratch_starts[-1] * columns.scratch_starts[-1] * lanes.planes + p * q) * vector <= budget

    tile_q = next((q for q in tile_candidates(problem.q) if fits(1, q)), 1)
    # Some tiles are wanted even from one image, so that there are parts to share out.
    vectors = min(_BLOCK_VECTORS, lanes.vectors)
    blocks = -(-lanes.vectors // vectors)
    fewest = max(1, min(problem.p, -(-_TASKS // (problem.n * blocks))))
    tile_p = next((p for p in tile_candidates(problem.p) if fits(p, tile_q) and -(-problem.p // p) >= fewest), 1)
    p_tiles, q_tiles = -(-problem.p // tile_p), -(-problem.q // tile_q)
    totals = {tile_q, problem.q - (q_tiles - 1) * tile_q}
    most = max(1, _UNROLLED // (kernel_rows * taps * steps * lanes.unit))
    sizes = [m for m in range(1, min(most, tile_q) + 1) if all(split(total, m) for total in totals)]
    columns = min(sizes, key=lambda m: (sum(-(-total // m) for total in totals), m))
    tiles = problem.n * p_tiles * q_tiles
    part_tiles = -(-tiles // max(1, min(tiles, -(-_TASKS // blocks))))
    run_rows = even(tile_p, max(1, _RUN_PIXELS // tile_q))[0]
    return GroupedWeightConfig((tile_p, tile_q), run_rows, columns, taps, steps, kernel_rows, vectors, -(-tiles // part_tiles), part_tiles)


class _Passes:
    """The passes as records of the kernel, and where each weight's sum lies among them."""

    def __init__(self, problem: ConvProblem, lanes: Lanes, config: GroupedWeightConfig, tile: GroupedTile, rows: Axis, columns: Axis) -> None:
        place = np.zeros((problem.cg, problem.r, problem.s), np.int64)
        size = tile.vector // lanes.lanes
        kinds: list[Pass] = []
        records = []
        self.bytes = 0
        for chunk in chunks(columns.phases[0].taps, config.taps):
            taps = list(rows.phases[0].taps)
            for count in even(len(taps), config.rows):
                mine, taps = taps[:count], taps[count:]
                first = 0
                for steps in _runs(lanes, config.steps):
                    kind = Pass(count, chunk.shape, steps)
                    if kind not in kinds:
                        kinds.append(kind)
                    plane, inside = lanes.steps(size)[first]
                    offsets = [tile.offset(tap, chunk, plane) + inside for tap in mine]
                    records.append([kinds.index(kind), self.bytes, *offsets, *[0] * (config.rows - count)])
                    self._place(place, mine, chunk, first * lanes.unit, steps * lanes.unit, tile.vector)
                    self.bytes += kind.sums(lanes.unit) * tile.vector
                    first += steps
        self.kinds = tuple(kinds)
        self.records = np.array(records, dtype=np.int64)
        order = place if problem.weight_format == "nchw" else place.transpose(1, 2, 0)
        self.weight_rows: npt.NDArray[np.int64] = np.ascontiguousarray(order.reshape(-1))

    def _place(self, place: npt.NDArray[np.int64], mine: list[Tap], chunk: Chunk, first: int, channels: int, vector: int) -> None:
        index = 0
        for row in mine:
            for s in chunk.kernel:
                for c in range(first, first + channels):
                    place[c, row.kernel_index, s] = self.bytes + index * vector
                    index += 1


def _together(lanes: Lanes) -> int:
    """The most steps that a pass may take: all planes, or the channels of one interleaved plane."""
    return min(lanes.source, lanes.plane_channels) if lanes.interleaved else lanes.planes


def _runs(lanes: Lanes, most: int) -> list[int]:
    """All steps in runs of at most ``most``, none over the end of an interleaved plane."""
    together, total = _together(lanes), len(lanes.steps(1))
    return [run for first in range(0, total, together) for run in even(min(together, total - first), most)]


def _gradient_axis(size: int, tile: int) -> Axis:
    return Axis(size, 1, size, tile, 1, "zeros", (Slab(0, 0),), (Phase(0, size, (Tap(0, 0, 0),)),))


def build_weight_plan(problem: ConvProblem, target: Target, threads: int, lanes: Lanes, name: str = "grouped") -> CpuPlan:
    """Tables, kernel and argument block."""
    numeric = Numeric(problem.dtype, target)
    config = choose_weight_config(problem, target, lanes)
    tile_p, tile_q = config.tile
    rows, columns = axes(problem, config.tile)
    vector = numeric.lanes * numeric.compute_bytes
    x, gy = pitches(problem, True), pitches(problem, False)
    tile = GroupedTile(rows, columns, lanes.planes, vector, x)
    gradient = GroupedTile(_gradient_axis(problem.p, tile_p), _gradient_axis(problem.q, tile_q), 1, vector, gy)
    passes = _Passes(problem, lanes, config, tile, rows, columns)
    p_tiles, q_tiles = -(-problem.p // tile_p), -(-problem.q // tile_q)
    totals = {tile_q, problem.q - (q_tiles - 1) * tile_q}
    kernel = GroupedWeightKernel(
        target, problem.dtype, problem.format, lanes.out, lanes.source, lanes.unit, lanes.partial, passes.kinds, min(columns.step, 3), config.columns,
        any(split_count(total, config.columns)[1] for total in totals), lanes.interleaved,
    )  # fmt: skip
    gy_at = align(tile.bytes + vector) + 64
    bias_at = align(config.parts * lanes.vectors * passes.bytes)
    scratch_at = align(bias_at + config.parts * lanes.vectors * vector, 4096)
    scratch_size = align(gy_at + gradient.bytes + _SLACK) + 64 * 9
    count = len(passes.weight_rows)
    vector_blocks = -(-lanes.vectors // config.vectors)
    tasks = vector_blocks * config.parts
    values = {
        **tile.arguments("x_"), **gradient.arguments("gy_"),
        "tasks": tasks, "finish_tasks": lanes.vectors * -(-count // numeric.lanes), "vectors": lanes.vectors,
        "vector_blocks": vector_blocks, "block_vectors": config.vectors, "parts": config.parts,
        "part_tiles": config.part_tiles, "tiles": problem.n * p_tiles * q_tiles, "p_tiles": p_tiles, "q_tiles": q_tiles, "tile_p": tile_p,
        "tile_q": tile_q, "run_rows": config.run_rows, "p": problem.p, "q": problem.q, "in_channels": problem.c, "out_channels": problem.k,
        "x_image": x[0], "gy_image": gy[0], "passes": len(passes.records), "pass_records": passes.records.ctypes.data,
        "pass_bytes": passes.records.strides[0], "partial_part": lanes.vectors * passes.bytes, "partial_vector": passes.bytes,
        "bias_part_at": bias_at, "has_bias": int(problem.epilogue.bias), "scratch_at": scratch_at, "scratch_size": scratch_size, "gy_at": gy_at,
        "weight_count": count, "weight_rows": passes.weight_rows.ctypes.data, "weight_pitch": count * DTYPES[problem.dtype],
        "prefetch_rows": -(-rows.scratch_starts[-1] // tile_p),
    }  # fmt: skip
    facts = {
        "block": "+".join(kind.name for kind in passes.kinds), "piece": config.columns, "tile": f"{tile_p}x{tile_q}", "run_rows": config.run_rows,
        "parts": config.parts, "unit": lanes.unit, "tasks": tasks,
    }  # fmt: skip
    tables = [*tile.tables, *gradient.tables, passes.records, passes.weight_rows]
    return CpuPlan(problem, name, load(kernel.name, target, kernel.emit), ARGUMENTS.pack(threads, values), tables, scratch_at + threads * scratch_size, facts)
