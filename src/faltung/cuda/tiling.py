"""Configurations of the kernels as pure functions of problem and device: no tensor library, no hardware.

Every family has a frozen Config, a ``choose_*`` (the heuristic), ``*_candidates`` (what a tuner may try, the heuristic's choice first) and
``supports`` (whether a configuration can run at all), which serves both.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..dispatch import Unsupported
from ..problem import DTYPES, ConvProblem
from .gather import phases

if TYPE_CHECKING:
    from .runtime import Device

__all__ = [
    "UNROLLED",
    "BandedConfig",
    "DepthwiseConfig",
    "IgemmConfig",
    "WeightConfig",
    "banded_candidates",
    "banded_pays",
    "banded_weight_candidates",
    "choose_banded",
    "choose_banded_weight",
    "choose_depthwise",
    "choose_depthwise_weight",
    "choose_igemm",
    "choose_stem",
    "choose_stem_weight",
    "choose_weight",
    "depthwise_candidates",
    "depthwise_weight_candidates",
    "igemm_candidates",
    "merged_groups",
    "power_of_two",
    "split_count",
    "stem_candidates",
    "stem_weight_candidates",
    "supports",
    "weight_candidates",
]


def power_of_two(value: int, least: int = 1, most: int = 1 << 30) -> int:
    """The smallest power of two from ``value`` on, within ``least`` and ``most`` (powers of two themselves)."""
    return min(max(1 << max(0, value - 1).bit_length(), least), most)


@dataclass(frozen=True)
class IgemmConfig:
    """Tile of an implicit GEMM: ``bm`` outputs x ``bn`` channels, in steps of ``bk``.

    ``flat``: steps run over (tap, channel) pairs, for few channels.  ``precision``: of float32 products; empty for PyTorch's switches.
    """

    bm: int
    bn: int
    bk: int
    warps: int = 4
    stages: int = 3
    flat: bool = False
    group_m: int = 8
    precision: str = ""


@dataclass(frozen=True)
class WeightConfig:
    """Tile of a weight gradient: ``bm`` output channels x ``bn`` (tap, input channel) columns, in steps of ``bk`` outputs, by ``splits``."""

    bm: int
    bn: int
    bk: int
    splits: int
    warps: int = 4
    stages: int = 3
    flat: bool = False
    precision: str = ""


def supports(config: IgemmConfig | WeightConfig, dtype: str, device: Device) -> bool:
    """Whether the pipeline's tiles fit shared memory, with the accumulators in registers."""
    size = DTYPES[dtype]
    tiles = config.stages * (config.bm + config.bn) * config.bk * size
    accumulators = config.bm * config.bn * (2 if dtype == "f64" else 1) // (32 * config.warps)
    return tiles <= device.shared_bytes and accumulators <= 160 and min(config.bm, config.bn, config.bk) >= 16


def _roles(problem: ConvProblem) -> tuple[int, int, int]:
    """Outputs of the largest phase in all images, output channels and source channels of a group."""
    pixels = problem.n * max(phase.pixels for phase in phases(problem))
    return (pixels, problem.kg, problem.cg) if problem.direction == "forward" else (pixels, problem.cg, problem.kg)


_H100_16 = ((128, 64, 64, 4, 3), (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 256, 64, 8, 3), (256, 64, 64, 8, 3), (64, 64, 64, 4, 4), (128, 32, 64, 4, 4),
            (128, 64, 32, 4, 4), (64, 128, 64, 4, 3), (64, 32, 64, 4, 4))  # fmt: skip
"""bm, bn, bk, warps, stages: those that were fastest for some dense layer on an H100 in 16-bit types."""


def choose_igemm(problem: ConvProblem, device: Device) -> IgemmConfig:
    """The heuristic: the widest tile of channels that is not mostly empty, then enough programs for every multiprocessor."""
    pixels, out_channels, source_channels = _roles(problem)
    size = DTYPES[problem.dtype]
    flat = source_channels < 16 and problem.r * problem.s > 1
    reduction = source_channels * (problem.r * problem.s if flat else 1)
    most_n = {2: 256, 4: 128, 8: 64}[size]
    bn = power_of_two(out_channels, 16, most_n)
    if bn > 128 and out_channels % 256:
        bn = 128
    bm = power_of_two(pixels, 16, 128 if size < 8 else 64)
    bk = power_of_two(reduction, 16, {2: 64, 4: 32, 8: 16}[size])
    while bm > 32 and -(-pixels // bm) * -(-out_channels // bn) * problem.g < device.multiprocessors:
        bm //= 2
    while bn > 32 and -(-pixels // bm) * -(-out_channels // bn) * problem.g < device.multiprocessors:
        bn //= 2
    config = IgemmConfig(bm, bn, bk, 8 if bm * bn >= 128 * 128 else 4, 3, flat)
    while not supports(config, problem.dtype, device) and config.stages > 1:
        config = replace(config, stages=config.stages - 1)
    return config


def igemm_candidates(problem: ConvProblem, device: Device) -> list[IgemmConfig]:
    """The heuristic's choice and the tiles that won elsewhere, with steps that fit the type."""
    first = choose_igemm(problem, device)
    _, out_channels, _ = _roles(problem)
    scale = DTYPES[problem.dtype] // 2
    others = [IgemmConfig(bm, bn, max(16, bk // scale), warps, stages, first.flat) for bm, bn, bk, warps, stages in _H100_16]
    useful = [c for c in others if c.bn < 2 * max(out_channels, 16)]
    return _distinct([first, *useful, *(replace(c, stages=4) for c in useful)], problem.dtype, device)


def _distinct(configs: Iterable[IgemmConfig], dtype: str, device: Device) -> list[IgemmConfig]:
    return [c for c in dict.fromkeys(configs) if supports(c, dtype, device)]


def choose_weight(problem: ConvProblem, device: Device) -> WeightConfig:
    """The heuristic: tiles of the weight, and as many splits as two waves of programs need.

    The splits shape the sum, so they follow from the problem alone: 264 programs, two for each multiprocessor of an H100, and of small tiles, whose
    registers and shared memory leave room for four, 528.
    """
    size = DTYPES[problem.dtype]
    flat = problem.cg < 16 and problem.r * problem.s > 1
    columns = problem.cg * problem.r * problem.s if flat else problem.cg
    bm = power_of_two(problem.kg, 16, 128 if size < 8 else 64)
    bn = power_of_two(columns, 16, 128 if size < 8 else 64)
    bk = {2: 64, 4: 32, 8: 16}[size]
    blocks = -(-problem.kg // bm) * -(-columns // bn) * (1 if flat else problem.r * problem.s) * problem.g
    splits = split_count(problem.n * problem.p * problem.q, bk, blocks, programs=264 if bm * bn > 64 * 64 else 528)
    config = WeightConfig(bm, bn, bk, splits, 8 if bm * bn >= 128 * 128 else 4, 3, flat)
    while not supports(config, problem.dtype, device) and config.stages > 1:
        config = replace(config, stages=config.stages - 1)
    return config


def split_count(outputs: int, step: int, blocks: int, programs: int = 264, least_steps: int = 4) -> int:
    """Pieces of a sum over ``outputs`` in steps: enough for ``programs`` with ``blocks`` other ones, but each at least ``least_steps`` long."""
    steps = -(-outputs // step)
    return max(1, min(-(-programs // max(1, blocks)), steps // least_steps))


def weight_candidates(problem: ConvProblem, device: Device) -> list[WeightConfig]:
    """The heuristic's choice, half and twice its splits, then other tiles, and those with twice its splits; what is more likely to win comes first."""
    first = choose_weight(problem, device)
    found = [first, replace(first, splits=first.splits * 2), replace(first, splits=max(1, first.splits // 2))]
    tiles = ((128, 128, 8, 3), (64, 64, 4, 3), (128, 256, 8, 3), (128, 128, 4, 3), (64, 128, 4, 3), (128, 128, 8, 4), (64, 64, 4, 4), (128, 64, 4, 3))
    for factor in (1, 2):
        found += [replace(first, bm=bm, bn=bn, warps=warps, stages=stages, splits=first.splits * factor) for bm, bn, warps, stages in tiles]
    found += [replace(c, bk=first.bk * 2, stages=2) for c in found[:5]]
    return [c for c in dict.fromkeys(found) if supports(c, problem.dtype, device)]


UNROLLED = 8
"""Kernel rows that a depthwise kernel unrolls; more are looped over."""


@dataclass(frozen=True)
class DepthwiseConfig:
    """``th`` output rows in registers, ``bq`` columns x ``bc`` channels; ``splits`` and ``taps`` (kernel columns a program) for grad_weight only."""

    th: int
    bq: int
    bc: int
    warps: int = 4
    stages: int = 2
    splits: int = 1
    taps: int = 1


def _sizes(problem: ConvProblem) -> tuple[int, int, int]:
    """Rows and columns of the largest phase of what is written, and its channels; those of the outputs for grad_weight."""
    largest = max(phases(problem), key=lambda phase: phase.pixels)
    return largest.rows.count, largest.columns.count, problem.c if problem.direction == "grad_input" else problem.k


def choose_depthwise(problem: ConvProblem, device: Device) -> DepthwiseConfig:  # noqa: ARG001
    """Seven output rows, four elements a thread: the best or within 10 % of it for 3x3 to 7x7 on an H100.

    nhwc: 8 columns x 64 channels.  nchw: 64 columns of two planes (of more where rows are short).
    """
    rows, columns, channels = _sizes(problem)
    th = min(7, rows)
    if problem.format == "nhwc":
        bc = power_of_two(channels, 8, 64)
        return DepthwiseConfig(th, max(8, 512 // bc) if channels < 64 else 8, bc, 4)
    bq = power_of_two(columns, 8, 64)
    return DepthwiseConfig(th, bq, max(1, min(power_of_two(channels), 128 // bq)), 2 if bq < 64 else 1)


def depthwise_candidates(problem: ConvProblem, device: Device) -> list[DepthwiseConfig]:
    """The heuristic's choice, and fewer and more rows, elements and warps."""
    first = choose_depthwise(problem, device)
    found = [first]
    shapes = (
        ((8, 64, 4), (8, 32, 2), (8, 32, 4), (16, 32, 4), (4, 64, 2), (8, 128, 8))
        if problem.format == "nhwc"
        else ((64, 2, 1), (64, 2, 2), (32, 4, 1), (64, 1, 1))
    )
    for th in (4, 7, 14):
        found += [replace(first, th=th, bq=bq, bc=bc, warps=warps) for bq, bc, warps in shapes]
    return list(dict.fromkeys(found))


def choose_depthwise_weight(problem: ConvProblem, device: Device) -> DepthwiseConfig:
    """The tile of :func:`choose_depthwise`, all kernel columns in a program while the accumulators fit registers, and 264 programs by splits.

    Rows that dilation holds apart are read for one kernel row each, so there few output rows suffice.
    """
    first = choose_depthwise(problem, device)
    rows = min(problem.r, UNROLLED)
    taps = problem.s if rows * problem.s <= 25 else max(1, 16 // rows)
    th = first.th if problem.dilation[0] == 1 else min(2, first.th)
    if rows * taps > 9 and problem.format == "nhwc":
        first = replace(first, bq=8, bc=min(first.bc, 32))
    blocks = problem.n * -(-problem.p // th) * -(-problem.q // first.bq)
    programs = -(-problem.k // first.bc) * -(-problem.r // rows) * -(-problem.s // taps)
    return replace(first, th=th, taps=taps, splits=max(1, min(-(-1056 // programs), blocks // 2)))


def depthwise_weight_candidates(problem: ConvProblem, device: Device) -> list[DepthwiseConfig]:
    """The heuristic's choice, other tiles, then other kernel columns, then fewer splits."""
    first = choose_depthwise_weight(problem, device)
    found = [first]
    for splits in (first.splits, first.splits // 2, first.splits // 4):
        for taps in dict.fromkeys((first.taps, 1, problem.s)):
            if min(problem.r, UNROLLED) * taps <= 49:
                found += [replace(other, taps=taps, splits=max(1, splits)) for other in depthwise_candidates(problem, device)]
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class BandedConfig:
    """``bm`` groups of ``rpt`` output rows x ``bq`` columns, in steps of ``bk`` input columns; ``splits`` for grad_weight only."""

    bm: int
    bq: int
    bk: int
    rpt: int
    warps: int = 8
    stages: int = 3
    splits: int = 1


def banded_pays(problem: ConvProblem) -> None:
    """Raise :class:`Unsupported` where a direct sum is faster: for few taps, and for kernels of 5x5 to 9x9 in nhwc, which is transposed twice."""
    least = 5 if problem.format == "nchw" else 11
    if min(problem.r, problem.s) < least or problem.r * problem.s < least * least:
        raise Unsupported(f"a direct sum is faster below {least}x{least} in {problem.format}")
    if problem.dilation[1] > 2:
        raise Unsupported("dilated columns leave the band mostly zero")


def choose_banded(problem: ConvProblem, device: Device) -> BandedConfig:
    """64 columns, two output rows (four for kernels from 13 rows on), 128 row groups: the best for 7x7, 13x13 and 31x31 on an H100.

    Three stages, fewer where shared memory does not hold them.
    """
    columns = problem.w if problem.direction == "grad_input" else problem.q
    rows = (problem.h if problem.direction == "grad_input" else problem.p) if problem.stride[0] == 1 else problem.p
    bq = power_of_two(columns, 16, 64)
    rpt = 1 if rows == 1 or problem.dilation[0] > 1 else 2 if problem.r < 13 and bq == 64 else 4
    bm = power_of_two(problem.n * -(-rows // rpt), 16, 128 if DTYPES[problem.dtype] == 2 else 64)
    bk = 32 if DTYPES[problem.dtype] == 4 else 64 if columns > 32 else 32
    size = DTYPES[problem.dtype]
    stages = max(1, min(3, (device.shared_bytes - bm * bk * size) // (rpt * bk * bq * size)))  # a stage holds a band for each output row
    return BandedConfig(bm, bq, bk, rpt, 8 if bm * bq * rpt >= 128 * 128 else 4, stages)


def banded_candidates(problem: ConvProblem, device: Device) -> list[BandedConfig]:
    """The heuristic's choice, other counts of rows, tiles and stages."""
    first = choose_banded(problem, device)
    found = [first]
    for rpt in (1, 2, 4):
        for bm, warps in ((64, 4), (128, 4), (128, 8)):
            found += [replace(first, rpt=rpt, bm=bm, warps=warps, stages=stages) for stages in (2, 3, 4)]
    return list(dict.fromkeys(found))


def choose_banded_weight(problem: ConvProblem, device: Device) -> BandedConfig:
    """Four kernel rows a program share the gradients of the output; splits give 1056 programs, eight for each multiprocessor of an H100.

    Without asynchronous matrix units (before capability 9) operands take registers as well: two rows.  Three stages, fewer where shared memory does not
    hold them.
    """
    bq = power_of_two(problem.q, 16, 64)
    rpt = min(4 if device.capability[0] >= 9 else 2, power_of_two(problem.r))
    programs = problem.k * -(-problem.r // rpt)
    rows = problem.n * problem.p * -(-problem.q // bq)
    size = DTYPES[problem.dtype]
    bk = 64 if rows >= 64 and size == 2 else 32
    window = (bq - 1) * problem.stride[1] + problem.effective_kernel[1]
    if problem.q <= bq and problem.padding_mode == "zeros":  # the window is cut to the image
        window = min(window, problem.w)
    stages = max(1, min(3 if size == 2 else 2, device.shared_bytes // (bk * (bq + rpt * power_of_two(window, 16)) * size)))
    return BandedConfig(rpt, bq, bk, rpt, 8 if bq >= 32 else 4, stages, split_count(rows, bk, programs, programs=1056))


def banded_weight_candidates(problem: ConvProblem, device: Device) -> list[BandedConfig]:
    """The heuristic's choice, other runs of kernel rows, steps and splits."""
    first = choose_banded_weight(problem, device)
    found = [first]
    for rpt in (1, 2, 4):
        for bk, stages in ((32, 2), (32, 3), (64, 2), (64, 3)):
            splits = (first.splits, first.splits * 2, max(1, first.splits // 2))
            found += [replace(first, bm=rpt, rpt=rpt, bk=bk, stages=stages, splits=s) for s in splits]
    return list(dict.fromkeys(found))


def merged_groups(problem: ConvProblem) -> int:
    """How many neighbouring groups are multiplied as one: as many as give at most 64 channels (32 in 32 and 64 bits) where a group has fewer than half of
    that (1: none are)."""
    widest = max(problem.cg, problem.kg)
    most = 64 if DTYPES[problem.dtype] == 2 else 32
    if widest >= most // 2 or problem.cg == 1:
        return 1
    return max(d for d in range(1, most // widest + 1) if problem.g % d == 0)


def _stem_run(problem: ConvProblem) -> int:
    """Elements of one kernel row with its channels filled up."""
    return problem.s * (4 if problem.c <= 4 else 8)


def choose_stem(problem: ConvProblem, device: Device) -> IgemmConfig:
    """128 outputs in steps of one kernel row: the best for 7x7 on an H100 with four warps and four stages."""
    first = choose_igemm(problem, device)
    return replace(first, flat=False, bk=power_of_two(_stem_run(problem), 16, first.bk if first.bk > 32 else 32), stages=4, warps=4)


def stem_candidates(problem: ConvProblem, device: Device) -> list[IgemmConfig]:
    """The heuristic's choice, other tiles and stages."""
    first = choose_stem(problem, device)
    tiles = [replace(first, bm=bm, bn=bn) for bm in (64, 128, 256) for bn in (32, 64, 128)]
    return _distinct([first, *(replace(c, stages=s, warps=w) for c in tiles for s in (3, 5) for w in (4, 8))], problem.dtype, device)


def choose_stem_weight(problem: ConvProblem, device: Device) -> WeightConfig:
    """All columns of all kernel rows in few tiles, so that the gradient of the output is read few times."""
    first = choose_weight(problem, device)
    columns = problem.r * _stem_run(problem)
    bn = power_of_two(columns, 16, 128)
    blocks = -(-problem.k // first.bm) * -(-columns // bn)
    return replace(first, bn=bn, flat=True, splits=split_count(problem.n * problem.p * problem.q, first.bk, blocks, programs=528))


def stem_weight_candidates(problem: ConvProblem, device: Device) -> list[WeightConfig]:
    """The heuristic's choice, other tiles, steps and splits."""
    first = choose_stem_weight(problem, device)
    found = [first]
    for bn in (32, 64, 128, 256):
        found += [replace(first, bn=bn, bk=bk, warps=w, stages=s) for bk in (32, 64, 128) for w in (4, 8) for s in (2, 3)]
    return [c for c in dict.fromkeys(found) if supports(c, problem.dtype, device)]
