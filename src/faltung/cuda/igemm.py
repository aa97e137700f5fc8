"""Implicit GEMM: forward and grad_input of any convolution, gathering from the image by pointers.

    for each phase, group, tile of BM outputs (n, i, j) and of BN output channels o:                  one program
        acc[BM, BN] = 0
        for each tap (r, s) and block of BK source channels:                                          one loop, pipelined
            A[BM, BK] = source[n, i * step + offset + r * shift, j * step + offset + s * shift, channels], 0 outside of the image
            B[BK, BN] = weight[o, channels, tap]
            acc += A @ B
        out[n, start + i * step, start + j * step, o] = acc + bias[o]

``source`` (n, groups * SC, SH, SW) is x, or the gradient of y for grad_input; formats are strides.  With few source channels the loop runs over
(tap, channel) pairs instead (``FLAT``), so that a block holds several taps.  Implicit GEMM is due to cuDNN (Chetlur et al., arXiv 1410.0759).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import Unsupported
from ..problem import ConvProblem
from . import tiling
from .gather import MODES, Phase, phases
from .indexing import inside, padded
from .launch import Launch
from .runtime import CudaPlan, accumulator, alignment, cdiv, device, image_strides, is_wide, precision, weight_strides
from .tiling import IgemmConfig

__all__ = ["IGEMM", "Igemm", "divided", "gather_launches", "has_bias", "require_gather"]


@triton.jit
def tile_of(pid, blocks_m, blocks_n, GROUP_M: tl.constexpr):
    """The group, row block and column block of a program: GROUP_M row blocks share the weight's columns while those are in the second-level cache."""
    group = pid // (blocks_m * blocks_n)
    rest = pid - group * (blocks_m * blocks_n)
    first = rest // (GROUP_M * blocks_n) * GROUP_M
    height = tl.minimum(blocks_m - first, GROUP_M)
    within = rest - first * blocks_n
    return group, first + within % height, within // height


@triton.jit
def sum_of_pairs(
    acc, source, corner, weight_columns, row_ok, o_ok, h0, w0,
    SH, SW, SC, sc, sh, sw, wi, wr, ws, shift_h, shift_w, first_r, first_s, tap_step_r, tap_step_s,
    TR: tl.constexpr, TS: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``acc`` and the products over all (tap, channel) pairs; ``corner`` is the offset of each row's image and group."""
    for step in range(tl.cdiv(TR * TS * SC, BK)):
        kk = step * BK + tl.arange(0, BK)
        tap = kk // SC
        c = kk - tap * SC
        r = tap // TS
        s = tap - r * TS
        k_ok = tap < TR * TS
        h = h0[:, None] + (r * shift_h)[None, :]
        w = w0[:, None] + (s * shift_w)[None, :]
        ok = row_ok[:, None] & k_ok[None, :]
        if MODE == 0:
            ok = ok & inside(h, SH) & inside(w, SW)
            moved = r * shift_h * sh + s * shift_w * sw + c * sc
            a = tl.load(source + (corner + h0 * sh + w0 * sw)[:, None] + moved[None, :], mask=ok, other=0.0)
        else:
            h = padded(h, SH, MODE)
            w = padded(w, SW, MODE)
            a = tl.load(source + corner[:, None] + h * sh + w * sw + (c * sc)[None, :], mask=ok, other=0.0)
        b_rows = c * wi + (first_r + r * tap_step_r) * wr + (first_s + s * tap_step_s) * ws
        b = tl.load(weight_columns[None, :] + b_rows[:, None], mask=k_ok[:, None] & o_ok[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def sum_of_taps(
    acc, source, corner, weight_columns, row_ok, o_ok, h0, w0,
    SH, SW, SC, sc, sh, sw, wi, wr, ws, shift_h, shift_w, first_r, first_s, tap_step_r, tap_step_s,
    TR: tl.constexpr, TS: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``acc`` and the products over all taps and, within a tap, blocks of source channels."""
    base = corner + h0 * sh + w0 * sw
    # a bit for every tap that reads inside of the image: measured 7 to 14 % faster than comparing in the loop
    BITS: tl.constexpr = MODE == 0 and TR * TS <= 32
    if BITS:
        valid = tl.zeros(h0.shape, tl.int32)
        for t in tl.static_range(TR * TS):
            reached = row_ok & inside(h0 + (t // TS) * shift_h, SH) & inside(w0 + (t % TS) * shift_w, SW)
            valid = valid | (reached.to(tl.int32) << t)
    blocks_c = tl.cdiv(SC, BK)
    for step in range(TR * TS * blocks_c):
        tap = step // blocks_c
        c = (step - tap * blocks_c) * BK + tl.arange(0, BK)
        r = tap // TS
        s = tap - r * TS
        c_ok = c < SC
        if BITS:
            ok = ((valid >> tap) & 1) != 0
        elif MODE == 0:
            ok = row_ok & inside(h0 + r * shift_h, SH) & inside(w0 + s * shift_w, SW)
        else:
            ok = row_ok
        if MODE == 0:
            at = base + (r * shift_h * sh + s * shift_w * sw)
        else:
            at = corner + padded(h0 + r * shift_h, SH, MODE) * sh + padded(w0 + s * shift_w, SW, MODE) * sw
        a = tl.load(source + at[:, None] + (c * sc)[None, :], mask=ok[:, None] & c_ok[None, :], other=0.0)
        b_rows = c * wi + ((first_r + r * tap_step_r) * wr + (first_s + s * tap_step_s) * ws)
        b = tl.load(weight_columns[None, :] + b_rows[:, None], mask=c_ok[:, None] & o_ok[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def igemm_kernel(
    source, weight, bias, out,
    M, MQ, PQ, SH, SW, SC, OC,
    sn, sc, sh, sw, on, oc, oh, ow, wg, wo, wi, wr, ws,
    start_h, start_w, step_h, step_w, source_step_h, source_step_w, offset_h, offset_w, shift_h, shift_w, first_r, first_s, tap_step_r, tap_step_s,
    TR: tl.constexpr, TS: tl.constexpr, MODE: tl.constexpr, FLAT: tl.constexpr, PLANE: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
    SA: tl.constexpr, WA: tl.constexpr, OA: tl.constexpr, INNER: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of outputs of one group; see the module's loop nest.

    Where channels are contiguous, SC and the other strides of the source come divided by SA, OC and those of the output by OA, and those of the weight by
    WA (INNER: its source channels are contiguous, otherwise its output channels are): so the compiler knows what divides them.
    """
    SC, sn, sh, sw = SC * SA, sn * SA, sh * SA, sw * SA
    OC, on, oh, ow = OC * OA, on * OA, oh * OA, ow * OA
    wg, wr, ws = wg * WA, wr * WA, ws * WA
    if INNER:
        wo = wo * WA
    else:
        wi = wi * WA
    group, block_m, block_n = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(OC, BN), GROUP_M)
    if WIDE:
        block_m = block_m.to(tl.int64)
        group = group.to(tl.int64)
    m = block_m * BM + tl.arange(0, BM)
    row_ok = m < M
    n = m // PQ
    pixel = m - n * PQ
    i = pixel // MQ
    j = pixel - i * MQ
    h0 = i * source_step_h + offset_h
    w0 = j * source_step_w + offset_w
    corner = n * sn + group * SC * sc
    o = block_n * BN + tl.arange(0, BN)
    o_ok = o < OC
    acc = tl.zeros([BM, BN], ACC)
    if FLAT:
        acc = sum_of_pairs(
            acc, source, corner, weight + group * wg + o * wo, row_ok, o_ok, h0, w0,
            SH, SW, SC, sc, sh, sw, wi, wr, ws, shift_h, shift_w, first_r, first_s, tap_step_r, tap_step_s, TR, TS, MODE, PRECISION, BK,
        )  # fmt: skip
    else:
        acc = sum_of_taps(
            acc, source, corner, weight + group * wg + o * wo, row_ok, o_ok, h0, w0,
            SH, SW, SC, sc, sh, sw, wi, wr, ws, shift_h, shift_w, first_r, first_s, tap_step_r, tap_step_s, TR, TS, MODE, PRECISION, BK,
        )  # fmt: skip
    channel = group * OC + o
    if HAS_BIAS:
        acc += tl.load(bias + channel, mask=o_ok, other=0.0).to(ACC)[None, :]
    if PLANE:  # the outputs of an image are a dense run: the remainder by PQ shows the compiler how far they are contiguous
        place = n * on + (m % PQ) * ow
    else:
        place = n * on + (start_h + i * step_h) * oh + (start_w + j * step_w) * ow
    tl.store(out + place[:, None] + (channel * oc)[None, :], acc.to(out.dtype.element_ty), mask=row_ok[:, None] & o_ok[None, :])


def divided(strides: tuple[int, ...], channels: int) -> tuple[int, tuple[int, ...], int]:
    """What divides the strides (n, c, h, w) and the channels, and both divided by it; 1 where channels are not contiguous."""
    n, c, h, w = strides
    if c != 1:
        return 1, strides, channels
    by = alignment(n, h, w, channels)
    return by, (n // by, 1, h // by, w // by), channels // by


def divided_weight(strides: tuple[int, ...]) -> tuple[int, bool, tuple[int, ...]]:
    """What divides the strides (group, output channel, source channel, r, s) beside the contiguous one, whether source channels are contiguous, and
    the strides divided by it."""
    g, o, i, r, s = strides
    inner = i == 1
    if not inner and o != 1:
        return 1, True, strides
    by = alignment(g, o if inner else i, r, s)
    return by, inner, (g // by, *((o // by, i) if inner else (o, i // by)), r // by, s // by)


def gather_launches(
    found: Iterable[Phase], dtype: str, bias: bool, *, images: int, groups: int, source_size: tuple[int, int], source_channels: int, out_channels: int,
    source_strides: tuple[int, ...], out_strides: tuple[int, ...], weight_strides: tuple[int, ...], mode: int, config: IgemmConfig,
) -> tuple[Launch, ...]:  # fmt: skip
    """The launches of phases, called with source, weight, bias (anything without one) and out.

    Strides are (n, c, h, w) of dense tensors; those of the weight (group, output channel, source channel, r, s); channels are a group's.
    """
    sa, divided_source, divided_channels = divided(source_strides, source_channels)
    oa, divided_out, divided_outputs = divided(out_strides, out_channels)
    wa, inner, divided_weights = divided_weight(weight_strides)
    launches = []
    for phase in found:
        rows, columns = phase.rows, phase.columns
        pixels = images * phase.pixels
        if pixels == 0:
            continue
        plane = rows.step == columns.step == 1 and rows.start == columns.start == 0 and out_strides[2] == out_strides[3] * columns.count
        scalars = (
            pixels, columns.count, phase.pixels, *source_size, divided_channels, divided_outputs,
            *divided_source, *divided_out, *divided_weights,
            rows.start, columns.start, rows.step, columns.step, rows.source_step, columns.source_step, rows.offset, columns.offset, rows.shift, columns.shift,
            rows.first_tap, columns.first_tap, rows.tap_step, columns.tap_step,
        )  # fmt: skip
        launches.append(Launch(
            igemm_kernel, (cdiv(pixels, config.bm) * cdiv(out_channels, config.bn) * groups,), scalars,
            TR=rows.taps if columns.taps else 0, TS=max(columns.taps, 1), MODE=mode, FLAT=config.flat, PLANE=plane, HAS_BIAS=bias,
            WIDE=is_wide(images * source_strides[0], images * out_strides[0]), SA=sa, WA=wa, OA=oa, INNER=inner, ACC=accumulator(dtype)[1],
            PRECISION=precision(dtype, config.precision), BM=config.bm, BN=config.bn, BK=config.bk, GROUP_M=config.group_m,
            num_warps=config.warps, num_stages=config.stages,
        ))  # fmt: skip
    return tuple(launches)


class Igemm:
    """The implementation named ``igemm``: always able, on tensors of either format as they are."""

    name = "igemm"

    def configs(self, problem: ConvProblem) -> list[IgemmConfig]:
        """What the tuner may choose from, the heuristic's choice first."""
        return tiling.igemm_candidates(problem, device())

    def plan(self, problem: ConvProblem, threads: int = 1, config: IgemmConfig | None = None) -> CudaPlan:  # noqa: ARG002
        """A plan for forward or zero-padded grad_input; raises :class:`Unsupported` for others."""
        require_gather(problem)
        config = config or tiling.choose_igemm(problem, device())
        forward = problem.direction == "forward"
        found = phases(problem)
        sources = image_strides(problem.format, *((problem.c, problem.h, problem.w) if forward else (problem.k, problem.p, problem.q)))
        outs = image_strides(problem.format, *((problem.k, problem.p, problem.q) if forward else (problem.c, problem.h, problem.w)))
        wk, wc, wr, ws = weight_strides(problem.weight_format, problem.cg, problem.r, problem.s)
        arguments: dict[str, Any] = {
            "groups": problem.g,
            "source_size": (problem.h, problem.w) if forward else (problem.p, problem.q),
            "source_channels": problem.cg if forward else problem.kg,
            "out_channels": problem.kg if forward else problem.cg,
            "source_strides": sources,
            "out_strides": outs,
            "weight_strides": (problem.kg * wk, *((wk, wc) if forward else (wc, wk)), wr, ws),
            "mode": MODES[problem.padding_mode] if forward else 0,
            "config": config,
        }

        bias = has_bias(problem)
        launches = gather_launches(found, problem.dtype, bias, images=problem.n, **arguments)

        def run(source: Tensor, other: Tensor, side: Tensor | None, out: Tensor) -> None:
            added = side if bias else out
            for launch in launches:
                launch(source, other, added, out)

        return CudaPlan(problem, self.name, run, {"config": config, "launches": len(found)})


def has_bias(problem: ConvProblem) -> bool:
    """Whether a plan that writes an image adds a bias to it."""
    return problem.direction == "forward" and problem.epilogue.bias


def require_gather(problem: ConvProblem) -> None:
    """Raise :class:`Unsupported` for what is no gather from zero padding or by an index map."""
    if problem.direction == "grad_weight":
        raise Unsupported("computes forward and grad_input")
    if problem.direction == "grad_input" and problem.padding_mode != "zeros":
        raise Unsupported("grad_input for zero padding only")


IGEMM = Igemm()
