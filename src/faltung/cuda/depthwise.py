"""Depthwise convolution, forward and grad_input: one output channel reads one input channel, without matrix units.

    for each phase, image n, block of TH output rows, BQ output columns, BC channels:                      one program
        acc[TH][BQ, BC] = 0
        for each kernel column s (and member e of the channel multiplier, for grad_input):
            weights[TR][BC] = w[channel, :, s]
            for each input row u that the block's rows reach:                                              unrolled
                row[BQ, BC] = source[n, u, q * step + offset + s * shift, channel]                         read once, used up to TR times
                acc[t] += row * weights[j]     for each output row t that reaches it by a kernel row j

Kernels of more than ``UNROLLED`` rows take one output row at a time and loop over the kernel's rows as well.
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
from .igemm import divided, has_bias, require_gather
from .indexing import inside, padded
from .launch import Launch
from .runtime import CudaPlan, accumulator, cdiv, device, image_strides, is_wide
from .tiling import UNROLLED, DepthwiseConfig

__all__ = ["DEPTHWISE", "Depthwise"]


@triton.constexpr_function
def kernel_row(u, t, step, shift, rows):
    """The row of the kernel by which output row ``t`` reads input row ``u`` of its block; -1 where it does not."""
    distance = u - t * step
    row = distance // shift
    return row if row * shift == distance and 0 <= row < rows else -1


@triton.jit
def block_of(pid, C, MP, MQ, TH: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr, WIDE: tl.constexpr):
    """The image, first output row, output columns and channels of a program, in 64 bits where ``WIDE``."""
    blocks_c = tl.cdiv(C, BC)
    blocks_q = tl.cdiv(MQ, BQ)
    blocks_p = tl.cdiv(MP, TH)
    c = pid % blocks_c * BC + tl.arange(0, BC)
    rest = pid // blocks_c
    q = rest % blocks_q * BQ + tl.arange(0, BQ)
    rest = rest // blocks_q
    p0 = rest % blocks_p * TH
    n = rest // blocks_p
    if WIDE:
        n = n.to(tl.int64)
        c = c.to(tl.int64)
        q = q.to(tl.int64)
        p0 = p0.to(tl.int64)
    return n, p0, q, c


@triton.jit
def depthwise_kernel(
    source, weight, bias, out,
    C, MP, MQ, SH, SW, DIVIDE, MULTIPLY, MEMBERS,
    sn, sc, sh, sw, on, oc, oh, ow, wk, wr, ws, TS,
    start_h, start_w, step_h, step_w, source_step_w, offset_h, offset_w, shift_w, first_r, first_s, tap_step_r, tap_step_s,
    SOURCE_STEP_H: tl.constexpr, SHIFT_H: tl.constexpr, TR: tl.constexpr, TH: tl.constexpr, LOOP_ROWS: tl.constexpr, MODE: tl.constexpr,
    SA: tl.constexpr, OA: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One block of output rows; output channel ``c`` reads source channels ``c // DIVIDE * MULTIPLY + e`` for e below MEMBERS.

    Where channels are contiguous, the other strides of the source come divided by SA, those of the output and C by OA.
    """
    C = C * OA
    sn = sn * SA
    sh = sh * SA
    sw = sw * SA
    on = on * OA
    oh = oh * OA
    ow = ow * OA
    n, p0, q, c = block_of(tl.program_id(0), C, MP, MQ, TH, BQ, BC, WIDE)
    c_ok = c < C
    q_ok = q < MQ
    channel = c // DIVIDE * MULTIPLY
    image = source + n * sn
    top = p0 * SOURCE_STEP_H + offset_h
    left = q * source_step_w + offset_w
    # rows of the source that the block reaches, relative to the first: a negative shift starts below
    LOW: tl.constexpr = (TR - 1) * SHIFT_H if SHIFT_H < 0 else 0
    HIGH: tl.constexpr = (TH - 1) * SOURCE_STEP_H + ((TR - 1) * SHIFT_H if SHIFT_H > 0 else 0)
    accs = ()
    for _t in tl.static_range(TH):
        accs = accs + (tl.zeros([BQ, BC], ACC),)

    if TR > 0:
        for step in range(TS * MEMBERS * LOOP_ROWS):
            tap = step // LOOP_ROWS
            if MEMBERS == 1:  # a constant for the compiler, which else cannot tell how far channels are aligned
                e = 0
                s = tap
            else:
                e = tap // TS
                s = tap - e * TS
            w = padded(left + s * shift_w, SW, MODE)
            member = channel + e
            at = member[None, :] * sc + (w * sw)[:, None]
            ok = q_ok[:, None] & c_ok[None, :]
            if MODE == 0:
                ok = ok & inside(w, SW)[:, None]
            weights_at = weight + (c * MULTIPLY + e) * wk + (first_s + s * tap_step_s) * ws
            if TH == 1 and TR == 1:  # the kernel's rows are looped over
                j0 = step - tap * LOOP_ROWS
                h = padded(top + j0 * SHIFT_H, SH, MODE)
                row = tl.load(image + h * sh + at, mask=ok & inside(h, SH), other=0.0).to(ACC)
                factor = tl.load(weights_at + (first_r + j0 * tap_step_r) * wr, mask=c_ok, other=0.0).to(ACC)
                accs = (accs[0] + row * factor[None, :],)
            else:
                factors = ()
                for j in tl.static_range(TR):
                    factors = factors + (tl.load(weights_at + (first_r + j * tap_step_r) * wr, mask=c_ok, other=0.0).to(ACC),)
                for u in tl.static_range(HIGH - LOW + 1):
                    h = padded(top + (u + LOW), SH, MODE)
                    # rows behind the last output's may lie outside even when mapped
                    row = tl.load(image + h * sh + at, mask=ok & inside(h, SH), other=0.0).to(ACC)
                    new = ()
                    for t in tl.static_range(TH):
                        if kernel_row(u + LOW, t, SOURCE_STEP_H, SHIFT_H, TR) >= 0:
                            new = new + (accs[t] + row * factors[kernel_row(u + LOW, t, SOURCE_STEP_H, SHIFT_H, TR)][None, :],)
                        else:
                            new = new + (accs[t],)
                    accs = new

    out_at = out + n * on + (c * oc)[None, :] + ((start_w + q * step_w) * ow)[:, None]
    if HAS_BIAS:
        added = tl.load(bias + c, mask=c_ok, other=0.0).to(ACC)
    for t in tl.static_range(TH):
        value = accs[t]
        if HAS_BIAS:
            value += added[None, :]
        ok = q_ok[:, None] & c_ok[None, :] & (p0 + t < MP)
        tl.store(out_at + (start_h + (p0 + t) * step_h) * oh, value.to(out.dtype.element_ty), mask=ok)


def depthwise_launches(
    found: Iterable[Phase], dtype: str, bias: bool, *, images: int, channels: int, source_size: tuple[int, int], divide: int, multiply: int, members: int,
    source_strides: tuple[int, ...], out_strides: tuple[int, ...], weight_strides: tuple[int, ...], mode: int, config: DepthwiseConfig,
) -> tuple[Launch, ...]:  # fmt: skip
    """The launches of phases, called with source, weight, bias (anything without one) and out; the weight's strides are (k, r, s)."""
    sa, divided_source, _ = divided(source_strides, 0)
    oa, divided_out, divided_channels = divided(out_strides, channels)
    launches = []
    for phase in found:
        rows, columns = phase.rows, phase.columns
        if phase.pixels == 0:
            continue
        looped = rows.taps > UNROLLED
        th = 1 if looped else min(config.th, rows.count)
        scalars = (
            divided_channels, rows.count, columns.count, *source_size, divide, multiply, members,
            *divided_source, *divided_out, *weight_strides, columns.taps,
            rows.start, columns.start, rows.step, columns.step, columns.source_step, rows.offset, columns.offset, columns.shift,
            rows.first_tap, columns.first_tap, rows.tap_step, columns.tap_step,
        )  # fmt: skip
        launches.append(Launch(
            depthwise_kernel, (images * cdiv(rows.count, th) * cdiv(columns.count, config.bq) * cdiv(channels, config.bc),), scalars,
            SOURCE_STEP_H=rows.source_step, SHIFT_H=rows.shift or 1, TR=1 if looped else rows.taps, TH=th, LOOP_ROWS=rows.taps if looped else 1, MODE=mode,
            SA=sa, OA=oa, HAS_BIAS=bias, WIDE=is_wide(images * source_strides[0], images * out_strides[0]), ACC=accumulator(dtype)[1],
            BQ=config.bq, BC=config.bc, num_warps=config.warps, num_stages=config.stages,
        ))  # fmt: skip
    return tuple(launches)


class Depthwise:
    """The implementation named ``depthwise``."""

    name = "depthwise"

    def configs(self, problem: ConvProblem) -> list[DepthwiseConfig]:
        """What the tuner may choose from, the heuristic's choice first."""
        return tiling.depthwise_candidates(problem, device())

    def plan(self, problem: ConvProblem, threads: int = 1, config: DepthwiseConfig | None = None) -> CudaPlan:  # noqa: ARG002
        """A plan for one input channel a group, any multiplier; raises :class:`Unsupported` for others."""
        require_gather(problem)
        if problem.cg != 1:
            raise Unsupported(f"needs one input channel in each group, not {problem.cg}")
        if problem.kg > 1 and problem.g == 1:
            raise Unsupported("one input channel for all outputs is a matrix product")
        chosen = config or tiling.choose_depthwise(problem, device())
        forward = problem.direction == "forward"
        found = phases(problem)
        taps = problem.r * problem.s
        arguments: dict[str, Any] = {
            "images": problem.n,
            "channels": problem.k if forward else problem.c,
            "source_size": (problem.h, problem.w) if forward else (problem.p, problem.q),
            "divide": problem.kg if forward else 1,
            "multiply": 1 if forward else problem.kg,
            "members": 1 if forward else problem.kg,
            "source_strides": image_strides(problem.format, *(problem.input_shape if forward else problem.output_shape)[1:]),
            "out_strides": image_strides(problem.format, *(problem.output_shape if forward else problem.input_shape)[1:]),
            "weight_strides": (taps, problem.s, 1),  # the same in both formats
            "mode": MODES[problem.padding_mode] if forward else 0,
            "config": chosen,
        }

        bias = has_bias(problem)
        launches = depthwise_launches(found, problem.dtype, bias, **arguments)

        def run(source: Tensor, other: Tensor, side: Tensor | None, out: Tensor) -> None:
            added = side if bias else out
            for launch in launches:
                launch(source, other, added, out)

        return CudaPlan(problem, self.name, run, {"config": chosen, "launches": len(found)})


DEPTHWISE = Depthwise()
