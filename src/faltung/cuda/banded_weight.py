"""grad_weight of depthwise convolutions with large kernels, on matrix units: the transposed products of :mod:`.banded`.

    for each channel, run of RG kernel rows, and each split:                                                one program
        acc[RG][BQ, WINDOW] = 0
        for each run of BK triples (image n, output row p, block b of BQ output columns):
            acc[j] += gy[n, p, b, :]^T @ x[n, p * stride + j * dilation - top, window of b]                 for j in RG
        partial[split, channel, j] = acc[j]
    gw[k, r, s] = sum over splits and output columns o of partial[split, k, r][o, o * stride + s * dilation - left - first]

The last step sums along diagonals: what lies beside them is computed in vain, and never read.
"""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import Unsupported
from ..problem import DTYPES, ConvProblem
from . import tiling
from .banded import Band, band_of, require_banded
from .gather import MODES, phases
from .indexing import inside, padded
from .launch import Launch
from .reduction import bias_gradient
from .runtime import CudaPlan, accumulator, alignment, cdiv, device, image_strides, is_wide, precision, workspace
from .tiling import BandedConfig, power_of_two
from .transpose import transpose

__all__ = ["BANDED_WEIGHT", "BandedWeight"]

_SCRATCH_BYTES = 128 << 20


@triton.jit
def banded_weight_kernel(
    x, gy, partial,
    M, BLOCKS_Q, P, Q, H, W, K0, COUNT, DIVIDE, R, WIDTH, CHUNK, first, advance,
    sn, sc, sh, sw, yn, yk, yp, yq, step_h, offset_h, shift_h,
    MODE: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, XA: tl.constexpr, YA: tl.constexpr,
    RG: tl.constexpr, BQ: tl.constexpr, WINDOW: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """One run of kernel rows of one channel for one split of the (n, p, block of columns) triples.

    W, WIDTH, ``first``, ``advance`` and the strides of planes and rows of x come divided by XA, Q and those of gy by YA.
    """
    W = W * XA
    WIDTH = WIDTH * XA
    sn = sn * XA
    sc = sc * XA
    sh = sh * XA
    Q = Q * YA
    yn = yn * YA
    yk = yk * YA
    yp = yp * YA
    pid = tl.program_id(0)
    split = tl.program_id(1)
    runs = tl.cdiv(R, RG)
    j0 = pid % runs * RG
    local = pid // runs
    channel = K0 + local
    if WIDE:
        channel = channel.to(tl.int64)
    o = tl.arange(0, BQ)
    i = tl.arange(0, WINDOW)
    x_plane = x + channel // DIVIDE * sc
    gy_plane = gy + channel * yk
    accs = ()
    for _j in tl.static_range(RG):
        accs = accs + (tl.zeros([BQ, WINDOW], ACC),)
    for start in range(0, CHUNK, BK):
        m = split * CHUNK + start + tl.arange(0, BK)
        m_ok = m < M
        row = m // BLOCKS_Q
        block = m - row * BLOCKS_Q
        n = row // P
        p = row - n * P
        if WIDE:
            n = n.to(tl.int64)
            p = p.to(tl.int64)
        q = (block * BQ)[:, None] + o[None, :]
        a = tl.load(gy_plane + (n * yn + p * yp)[:, None] + q * yq, mask=m_ok[:, None] & (q < Q), other=0.0)
        a = tl.trans(a)
        w = padded(((first + block * advance) * XA)[:, None] + i[None, :], W, MODE)
        w_ok = m_ok[:, None] & inside(w, W) & (i < WIDTH)[None, :]
        new = ()
        for j in tl.static_range(RG):
            h = padded(p * step_h + offset_h + (j0 + j) * shift_h, H, MODE)
            b = tl.load(x_plane + (n * sn + h * sh)[:, None] + w * sw, mask=w_ok & inside(h, H)[:, None], other=0.0)
            new = new + (tl.dot(a, b, accs[j], input_precision=PRECISION, out_dtype=ACC),)
        accs = new
    for j in tl.static_range(RG):
        place = ((split * COUNT + local) * R + j0 + j).to(tl.int64) * (BQ * WINDOW)
        tl.store(partial + place + o[:, None] * WINDOW + i[None, :], accs[j], mask=((o >= 0)[:, None] & (i >= 0)[None, :]) & (j0 + j < R))


@triton.jit
def diagonal_kernel(
    partial, out, SPLITS, COUNT, K0, R, S, WIDTH, offset, step, dilation,
    ACC: tl.constexpr, BQ: tl.constexpr, WINDOW: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """One kernel row of one channel: out[k, r, s] = sum over splits and o of partial[split, k, r][o, o * step + s * dilation + offset]."""
    pid = tl.program_id(0)
    o = tl.arange(0, BQ)
    s = tl.arange(0, BS)
    i = (o * step)[:, None] + (s * dilation)[None, :] + offset
    ok = (i >= 0) & (i < WIDTH) & (s < S)[None, :]
    acc = tl.zeros([BQ, BS], ACC)
    for split in range(SPLITS):
        matrix = ((pid + split * COUNT * R) + tl.zeros([1, 1], tl.int64)) * (BQ * WINDOW)
        acc += tl.load(partial + matrix + o[:, None] * WINDOW + i, mask=ok, other=0.0)
    tl.store(out + (K0 * R + pid) * S + s, tl.sum(acc, axis=0).to(out.dtype.element_ty), mask=s < S)


def banded_weight(
    problem: ConvProblem, *, band: Band, x_strides: tuple[int, ...], gy_strides: tuple[int, ...], config: BandedConfig
) -> Callable[[Tensor, Tensor, Tensor], None]:
    """Called with x, gy and out: the whole weight gradient, for as many channels at a time as the scratch of products holds."""
    (phase,) = phases(problem)
    rows = phase.rows
    memory, accumulate = accumulator(problem.dtype)
    window = power_of_two(band.width, 16)
    blocks_q = cdiv(problem.q, band.bq)
    total = problem.n * problem.p * blocks_q
    chunk = cdiv(cdiv(total, config.splits), config.bk) * config.bk
    splits = cdiv(total, chunk)
    group = min(config.rpt, power_of_two(problem.r))
    channel_bytes = splits * problem.r * band.bq * window * 4
    at_once = max(1, min(problem.k, _SCRATCH_BYTES // channel_bytes))
    xa, ya = band.alignment(problem.w), alignment(problem.q)
    (sn, sc, sh, sw), (yn, yk, yp, yq) = x_strides, gy_strides
    launches = []
    for k0 in range(0, problem.k, at_once):
        count = min(at_once, problem.k - k0)
        scalars = (
            total, blocks_q, problem.p, problem.q // ya, problem.h, problem.w // xa, k0, count, problem.kg, problem.r, band.width // xa, chunk,
            band.first // xa, band.advance // xa, sn // xa, sc // xa, sh // xa, sw, yn // ya, yk // ya, yp // ya, yq, rows.source_step, rows.offset, rows.shift,
        )  # fmt: skip
        products = Launch(
            banded_weight_kernel, (count * cdiv(problem.r, group), splits), scalars,
            MODE=MODES[problem.padding_mode], WIDE=is_wide(problem.n * sn, problem.n * yn), ACC=accumulate, PRECISION=precision(problem.dtype),
            XA=xa, YA=ya, RG=group, BQ=band.bq, WINDOW=window, BK=config.bk, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        scalars = splits, count, k0, problem.r, problem.s, band.width, -problem.padding[0] - band.first, problem.stride[1], problem.dilation[1]
        sums = Launch(diagonal_kernel, (count * problem.r,), scalars, ACC=accumulate, BQ=band.bq, WINDOW=window, BS=power_of_two(problem.s))
        launches.append((products, sums))

    def run(x: Tensor, gy: Tensor, out: Tensor) -> None:
        partial = workspace((at_once * channel_bytes // 4,), memory, x)
        for products, sums in launches:
            products(x, gy, partial)
            sums(partial, out)

    return run


class BandedWeight:
    """The implementation named ``banded_weight``: nchw as it is and nhwc by transposition, which is not bounded by parts of the batch."""

    name = "banded_weight"

    def configs(self, problem: ConvProblem) -> list[BandedConfig]:
        """What the tuner may choose from, the heuristic's choice first."""
        return tiling.banded_weight_candidates(problem, device())

    def plan(self, problem: ConvProblem, threads: int = 1, config: BandedConfig | None = None) -> CudaPlan:  # noqa: ARG002
        """A plan for depthwise grad_weight; raises :class:`Unsupported` for others."""
        if problem.direction != "grad_weight":
            raise Unsupported("computes grad_weight")
        require_banded(problem)
        if config is None:
            tiling.banded_pays(problem)
        chosen = config or tiling.choose_banded_weight(problem, device())
        band = band_of(problem, chosen.bq, problem.q)
        if power_of_two(band.width, 16) > 256:
            raise Unsupported(f"a window of {band.width} columns overflows the registers")
        turn = problem.format == "nhwc"
        x_image, gy_image = problem.c * problem.h * problem.w, problem.k * problem.p * problem.q
        if turn and problem.n * max(x_image, gy_image) * DTYPES[problem.dtype] > 1 << 30:
            raise Unsupported("transposed operands would take more than 1 GiB")
        strides = {"x_strides": image_strides("nchw", *problem.input_shape[1:]), "gy_strides": image_strides("nchw", *problem.output_shape[1:])}

        whole, to_bias = banded_weight(problem, band=band, config=chosen, **strides), bias_gradient(problem)
        turn_x, turn_gy = transpose(problem.n, problem.h * problem.w, problem.c), transpose(problem.n, problem.p * problem.q, problem.k)

        def run(source: Tensor, other: Tensor, side: Tensor | None, out: Tensor) -> None:
            x, gy = source, other
            if turn:
                x, gy = workspace((problem.n * x_image,), source.dtype, source), workspace((problem.n * gy_image,), other.dtype, other)
                turn_x(source, x)
                turn_gy(other, gy)
            whole(x, gy, out)
            if side is not None:
                to_bias(other, side)

        return CudaPlan(problem, self.name, run, {"config": chosen, "window": band.width})


BANDED_WEIGHT = BandedWeight()
