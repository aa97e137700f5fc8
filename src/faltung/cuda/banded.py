"""Depthwise convolution with large kernels as products with banded matrices, on matrix units.

A kernel row r of a channel is a banded matrix T[i, o] = w[r, s] where output column o reads input column i by tap s, 0 elsewhere.  Then

    for each channel, group of RPT output rows in all images (BM of them), block of BQ output columns:      one program
        acc[BM, RPT * BQ] = 0
        for each input row u that the group's rows reach, and block of BK input columns i of the window:     one loop, pipelined
            acc += source[n, u, i] @ (T[row of the kernel by which output row t reaches u][i, o] for t in RPT)
        out[n, rows, o] = acc + bias

T depends on the distance of i and o alone, so one window serves every block of columns; it is built per call for a bounded number of channels, with
matrices of zeros around it for rows that an output row does not reach.  The zeros meet every column of the window: an infinity or NaN there spreads
further than in a direct sum, so this implementation steps aside under ``config.precision = "strict"``.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .. import config
from ..dispatch import Unsupported
from ..problem import DTYPES, ConvProblem
from . import tiling
from .gather import MODES, Phase, phases
from .igemm import has_bias, require_gather
from .indexing import inside, padded
from .launch import Launch
from .runtime import CudaPlan, accumulator, alignment, cdiv, device, image_strides, is_wide, part, precision, workspace
from .tiling import BandedConfig, power_of_two
from .transpose import transpose

__all__ = ["BANDED", "Band", "Banded", "band_of", "require_banded"]

_BAND_BYTES = 64 << 20


@dataclass(frozen=True)
class Band:
    """The window of source columns that a block of ``bq`` output columns reads: ``first + block * advance .. + width``.

    Tap ``s`` joins source column i and output column o where ``s * dilation == alpha * i + beta * o + left``.
    """

    bq: int
    first: int
    advance: int
    width: int
    alpha: int
    beta: int

    def alignment(self, size: int) -> int:
        """What divides every window's first column, and the ``size`` of a row."""
        return alignment(self.first, self.advance, size)


def band_of(problem: ConvProblem, bq: int, columns: int) -> Band:
    """The window for ``columns`` output columns (of y, or of x for grad_input).  One block alone is cut to the image where the padding is zero."""
    stride, dilation, left = problem.stride[1], problem.dilation[1], problem.padding[0]
    reach = (problem.s - 1) * dilation
    if problem.direction == "grad_input":
        size, first, last, advance = problem.q, cdiv(left - reach, stride), (bq - 1 + left) // stride, bq // stride
        alpha, beta = -stride, 1
    else:
        size, first, last, advance = problem.w, -left, (bq - 1) * stride - left + reach, bq * stride
        alpha, beta = 1, -stride
    if columns <= bq and problem.padding_mode == "zeros":
        first, last = max(first, 0), min(last, size - 1)
    elif problem.padding_mode == "zeros" and size % 8 == 0 == advance % 8:
        first -= first % 8  # so that vectors of eight elements can be loaded
    width = max(1, last - first + 1)
    return Band(bq, first, advance, width + -width % alignment(first, advance, size), alpha, beta)


@triton.jit
def band_kernel(
    weight, band, K0, TR, JG, GUARD, WIDTH, R, S, first, alpha, beta, left, dilation, first_r, tap_step_r,
    BW: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """band[channel, guarded row, i, o] for one channel, row and run of BW columns i of the window; zero outside of the band."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(WIDTH, BW)
    i = pid % blocks * BW + tl.arange(0, BW)
    rest = pid // blocks
    j = rest % JG - GUARD
    channel = rest // JG
    o = tl.arange(0, BQ)
    reach = ((first + i) * alpha + left)[:, None] + (o * beta)[None, :]
    s = reach // dilation
    ok = (reach >= 0) & (s * dilation == reach) & (s < S) & (j >= 0) & (j < TR) & (i < WIDTH)[:, None]
    value = tl.load(weight + (K0 + channel) * (R * S) + (first_r + j * tap_step_r) * S + s, mask=ok, other=0.0)
    place = (rest.to(tl.int64) * WIDTH + i)[:, None] * BQ + o[None, :]
    tl.store(band + place, value, mask=(i < WIDTH)[:, None] & (o >= 0)[None, :])


@triton.jit
def banded_kernel(
    source, band, bias, out,
    M, GROUPS_P, MP, COLUMNS, SH, SW, K0, DIVIDE, JG, GUARD, WIDTH, first, advance,
    sn, sc, sh, sw, on, oc, oh, ow, start_h, step_h, source_step_h, offset_h, low, ROWS, direction,
    MODE: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, DIRECT_ROWS: tl.constexpr,
    SHIFT_H: tl.constexpr, A: tl.constexpr, OA: tl.constexpr, RPT: tl.constexpr, BM: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of one channel; see the module's loop nest.  DIRECT_ROWS: RPT is 1 and row j lies ``j * SHIFT_H`` from the first.

    SW, WIDTH, ``first``, ``advance`` and the strides of source planes and rows come divided by A, COLUMNS and those of the output by OA.
    """
    SW = SW * A
    WIDTH = WIDTH * A
    sn = sn * A
    sc = sc * A
    sh = sh * A
    COLUMNS = COLUMNS * OA
    on = on * OA
    oc = oc * OA
    oh = oh * OA
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BM)
    blocks_q = tl.cdiv(COLUMNS, BQ)
    block_m = pid % blocks_m
    rest = pid // blocks_m
    block_q = rest % blocks_q
    local = rest // blocks_q
    channel = K0 + local
    m = block_m * BM + tl.arange(0, BM)
    m_ok = m < M
    n = m // GROUPS_P
    p0 = (m - n * GROUPS_P) * RPT
    if WIDE:
        n = n.to(tl.int64)
        p0 = p0.to(tl.int64)
        channel = channel.to(tl.int64)
    h0 = p0 * source_step_h + offset_h + low
    image = source + n * sn + channel // DIVIDE * sc
    N: tl.constexpr = RPT * BQ
    t = tl.arange(0, N) // BQ
    o = tl.arange(0, N) % BQ
    acc = tl.zeros([BM, N], ACC)
    blocks_k = tl.cdiv(WIDTH, BK)
    band_columns = band + local.to(tl.int64) * JG * WIDTH * BQ + o
    for step in range(ROWS * blocks_k):
        u = step // blocks_k
        i = (step - u * blocks_k) * BK + tl.arange(0, BK)
        i_ok = i < WIDTH
        if DIRECT_ROWS:
            h = padded(h0 + u * SHIFT_H, SH, MODE)
            j = u + t * 0
        else:
            h = padded(h0 + u, SH, MODE)
            j = (u + low - t * source_step_h) * direction + GUARD
        w = padded((first + block_q * advance) * A + i, SW, MODE)
        ok = (m_ok & inside(h, SH))[:, None] & (i_ok & inside(w, SW))[None, :]
        a = tl.load(image[:, None] + (h * sh)[:, None] + (w * sw)[None, :], mask=ok, other=0.0)
        b = tl.load(band_columns[None, :] + (j * WIDTH * BQ)[None, :] + (i * BQ)[:, None], mask=i_ok[:, None] & (j >= 0)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
    if HAS_BIAS:
        acc += tl.load(bias + channel).to(ACC)
    column = block_q * BQ + o
    row = p0[:, None] + t[None, :]
    place = (n * on + channel * oc)[:, None] + (start_h + row * step_h) * oh + (column * ow)[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=m_ok[:, None] & (row < MP) & (column < COLUMNS)[None, :])


@dataclass(frozen=True)
class BandedRows:
    """Called with source, weight, bias (anything without one) and out, writes the rows of one phase: bands and products of as many channels at a time as
    a workspace of ``elements`` holds."""

    elements: int
    launches: tuple[tuple[Launch, Launch], ...]

    def __call__(self, source: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        bands = workspace((self.elements,), source.dtype, source)
        for band, product in self.launches:
            band(weight, bands)
            product(source, bands, bias, out)


def banded_rows(
    problem: ConvProblem, phase: Phase, *, images: int, source_strides: tuple[int, ...], out_strides: tuple[int, ...], config: BandedConfig
) -> BandedRows:
    """The launches of the rows' phase.  Columns have no phases: the band has their stride."""
    forward = problem.direction == "forward"
    rows = phase.rows
    source_size, columns = ((problem.h, problem.w), problem.q) if forward else ((problem.p, problem.q), problem.w)
    channels = problem.k if forward else problem.c
    rpt = config.rpt if abs(rows.shift) == 1 else 1
    direct = rpt == 1
    direction = 1 if rows.shift >= 0 else -1
    low = 0 if direct else min(0, rows.shift * (rows.taps - 1))
    reached = (rpt - 1) * rows.source_step + rows.taps if not direct else rows.taps
    guard = 0 if direct else (rpt - 1) * rows.source_step
    jg = rows.taps + 2 * guard
    band = band_of(problem, config.bq, columns)
    by = band.alignment(source_size[1])
    oa = alignment(columns, *out_strides[:3])
    sn, sc, sh, sw = source_strides
    on, oc, oh, ow = out_strides
    if rows.taps == 0:  # nothing reaches these rows
        jg, reached = 1, 0
    matrix = band.width * band.bq
    at_once = max(1, min(channels, _BAND_BYTES // (jg * matrix * DTYPES[problem.dtype])))
    groups_p = cdiv(rows.count, rpt)
    bw = power_of_two(band.width, 1, max(1, 2048 // band.bq))
    launches = []
    for k0 in range(0, channels, at_once):
        count = min(at_once, channels - k0)
        scalars = (
            k0, rows.taps, jg, guard, band.width, problem.r, problem.s, band.first, band.alpha, band.beta, problem.padding[0],
            problem.dilation[1], rows.first_tap, rows.tap_step,
        )  # fmt: skip
        first = Launch(band_kernel, (count * jg * cdiv(band.width, bw),), scalars, BW=bw, BQ=band.bq)
        scalars = (
            images * groups_p, groups_p, rows.count, columns // oa, source_size[0], source_size[1] // by, k0, problem.kg if forward else 1, jg, guard,
            band.width // by, band.first // by, band.advance // by, sn // by, sc // by, sh // by, sw, on // oa, oc // oa, oh // oa, ow,
            rows.start, rows.step, rows.source_step, rows.offset, low, reached, direction,
        )  # fmt: skip
        second = Launch(
            banded_kernel, (cdiv(images * groups_p, config.bm) * cdiv(columns, band.bq) * count,), scalars,
            MODE=MODES[problem.padding_mode] if forward else 0, HAS_BIAS=has_bias(problem), WIDE=is_wide(images * sn, images * on),
            ACC=accumulator(problem.dtype)[1], PRECISION=precision(problem.dtype), DIRECT_ROWS=direct, SHIFT_H=rows.shift, A=by, OA=oa, RPT=rpt,
            BM=config.bm, BQ=band.bq, BK=config.bk, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        launches.append((first, second))
    return BandedRows(at_once * jg * matrix, tuple(launches))


def require_banded(problem: ConvProblem) -> None:
    """Raise :class:`Unsupported` for what the banded products do not take."""
    if config.current().precision == "strict" and problem.direction != "grad_weight":  # whose products with zeros are never read
        raise Unsupported("products with zeros of the band would spread infinities; precision is strict")
    if problem.cg != 1 or problem.g == 1:
        raise Unsupported("needs one input channel in each group, and more than one group")
    if problem.direction != "forward" and problem.kg != 1:
        raise Unsupported("gradients need a channel multiplier of 1")
    if problem.dtype == "f64":
        raise Unsupported("float64 gains nothing from zeros multiplied")


class Banded:
    """The implementation named ``banded``: forward and grad_input, nchw as it is and nhwc by transposition."""

    name = "banded"

    def configs(self, problem: ConvProblem) -> list[BandedConfig]:
        """What the tuner may choose from, the heuristic's choice first."""
        return tiling.banded_candidates(problem, device())

    def plan(self, problem: ConvProblem, threads: int = 1, config: BandedConfig | None = None) -> CudaPlan:  # noqa: ARG002
        """A plan for depthwise forward and zero-padded grad_input; raises :class:`Unsupported` for others."""
        require_gather(problem)
        require_banded(problem)
        if config is None:
            tiling.banded_pays(problem)
        chosen = config or tiling.choose_banded(problem, device())
        if problem.direction == "grad_input" and chosen.bq % problem.stride[1]:
            raise Unsupported(f"a stride of {problem.stride[1]} does not divide a block of {chosen.bq} columns")
        forward = problem.direction == "forward"
        found = tuple({phase.rows: phase for phase in phases(problem)}.values())
        source_shape, out_shape = (problem.input_shape, problem.output_shape) if forward else (problem.output_shape, problem.input_shape)
        source_image, out_image = (shape[1] * shape[2] * shape[3] for shape in (source_shape, out_shape))
        turn = problem.format == "nhwc"
        images = max(1, min(problem.n, (256 << 20) // (max(source_image, out_image) * DTYPES[problem.dtype]))) if turn else problem.n
        strides = {"source_strides": image_strides("nchw", *source_shape[1:]), "out_strides": image_strides("nchw", *out_shape[1:])}

        counts = {images, problem.n % images or images}
        rows = {count: [banded_rows(problem, phase, images=count, config=chosen, **strides) for phase in found] for count in counts}
        bias = has_bias(problem)

        def run(source: Tensor, other: Tensor, side: Tensor | None, out: Tensor) -> None:
            for launch in rows[images]:
                launch(source, other, side if bias else out, out)

        def run_turned(source: Tensor, other: Tensor, side: Tensor | None, out: Tensor) -> None:
            planes, results = workspace((images * source_image,), source.dtype, source), workspace((images * out_image,), out.dtype, out)
            for start in range(0, problem.n, images):
                count = min(images, problem.n - start)
                there, back = turns[count]
                there(part(source, start, count), planes)
                for launch in rows[count]:
                    launch(planes, other, side if bias else results, results)
                back(results, part(out, start, count))

        if turn:
            (_, c, h, w), (_, k, p, q) = source_shape, out_shape
            turns = {count: (transpose(count, h * w, c), transpose(count, k, p * q)) for count in counts}
            run = run_turned
        return CudaPlan(problem, self.name, run, {"config": chosen, "launches": len(found), "images_at_once": images if turn else 0})


BANDED = Banded()
