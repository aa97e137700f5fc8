"""grad_weight of depthwise convolutions, without matrix units.

for each block of BC output channels k, run of kernel rows (TR of them) and columns (TS), and each split:          one program
acc[TR * TS][BQ, BC] = 0
for each block of TH output rows x BQ columns of the split:
gy[TH][BQ, BC]
for each kernel column s and input row u that the block's rows reach:                                       unrolled
row[BQ, BC] = x[n, u, q * stride + s * dilation - left, channel]
acc[j, s] += gy[t] * row           for each output row t that reaches it by a kernel row j
partial[split, k, j, s] = sum of acc over BQ
gw = sum of partial over the splits, in their order
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import Unsupported
from ..problem import ConvProblem
from . import tiling
from .gather import MODES, phases
from .igemm import divided
from .indexing import inside, padded
from .launch import Launch
from .reduction import bias_gradient, reduce_splits
from .runtime import CudaPlan, accumulator, cdiv, device, image_strides, is_wide, workspace
from .tiling import UNROLLED, DepthwiseConfig

__all__ = ["DEPTHWISE_WEIGHT", "DepthwiseWeight"]


@triton.jit
def depthwise_weight_kernel(
    x, gy, partial,
    K, BLOCKS, PER_SPLIT, MP, MQ, H, W, R, S, DIVIDE,
    sn, sc, sh, sw, yn, yk, yp, yq, step_w, offset_h, offset_w, shift_w,
    STEP_H: tl.constexpr, SHIFT_H: tl.constexpr, TR: tl.constexpr, TS: tl.constexpr, TH: tl.constexpr, MODE: tl.constexpr, WIDE: tl.constexpr,
    XA: tl.constexpr, YA: tl.constexpr, ACC: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One run of kernel rows and columns of a block of channels for one split: blocks ``split * PER_SPLIT .. + PER_SPLIT`` of output rows.

    Where channels are contiguous, the other strides of x come divided by XA, those of gy and K by YA.
    """
    K = K * YA
    sn = sn * XA
    sh = sh * XA
    sw = sw * XA
    yn = yn * YA
    yp = yp * YA
    yq = yq * YA
    pid = tl.program_id(0)
    split = tl.program_id(1)
    runs_s = tl.cdiv(S, TS)
    runs = tl.cdiv(R, TR) * runs_s
    run = pid % runs
    j0 = run // runs_s * TR
    s0 = run % runs_s * TS
    k = pid // runs * BC + tl.arange(0, BC)
    k_ok = k < K
    blocks_q = tl.cdiv(MQ, BQ)
    blocks_p = tl.cdiv(MP, TH)
    if WIDE:
        k = k.to(tl.int64)
    channel = k // DIVIDE
    accs = ()
    for _t in tl.static_range(TR * TS):
        accs = accs + (tl.zeros([BQ, BC], ACC),)
    for step in range(PER_SPLIT):
        block = split * PER_SPLIT + step
        rest = block // blocks_q
        q = (block - rest * blocks_q) * BQ + tl.arange(0, BQ)
        n = rest // blocks_p
        p0 = (rest - n * blocks_p) * TH
        ok = k_ok[None, :] & ((q < MQ) & (block < BLOCKS))[:, None]
        if WIDE:
            n = n.to(tl.int64)
            q = q.to(tl.int64)
            p0 = p0.to(tl.int64)
        gy_at = gy + n * yn + (k * yk)[None, :] + (q * yq)[:, None]
        grads = ()
        for t in tl.static_range(TH):
            grads = grads + (tl.load(gy_at + (p0 + t) * yp, mask=ok & (p0 + t < MP), other=0.0).to(ACC),)
        image = x + n * sn + (channel * sc)[None, :]
        top = p0 * STEP_H + offset_h + j0 * SHIFT_H
        for s in tl.static_range(TS):
            w = padded(q * step_w + offset_w + (s0 + s) * shift_w, W, MODE)
            w_ok = ok & inside(w, W)[:, None]
            for u in tl.static_range((TH - 1) * STEP_H + (TR - 1) * SHIFT_H + 1):
                h = padded(top + u, H, MODE)
                row = tl.load(image + h * sh + (w * sw)[:, None], mask=w_ok & inside(h, H), other=0.0).to(ACC)
                new = ()
                for a in tl.static_range(TR * TS):
                    value = accs[a]
                    if a % TS == s:
                        for t in tl.static_range(TH):
                            if u == t * STEP_H + (a // TS) * SHIFT_H:
                                value += grads[t] * row
                    new = new + (value,)
                accs = new
    for a in tl.static_range(TR * TS):
        r = j0 + a // TS
        s = s0 + a % TS
        place = partial + (split.to(tl.int64) * K + k) * (R * S) + r * S + s
        tl.store(place, tl.sum(accs[a], axis=0), mask=k_ok & (r < R) & (s < S))


class DepthwiseWeight:
    """The implementation named ``depthwise_weight``."""

    name = "depthwise_weight"

    def configs(self, problem: ConvProblem) -> list[DepthwiseConfig]:
        """What the tuner may choose from, the heuristic's choice first."""
        return tiling.depthwise_weight_candidates(problem, device())

    def plan(self, problem: ConvProblem, threads: int = 1, config: DepthwiseConfig | None = None) -> CudaPlan:  # noqa: ARG002
        """A plan for grad_weight with one input channel a group; raises :class:`Unsupported` for others."""
        if problem.direction != "grad_weight":
            raise Unsupported("computes grad_weight")
        if problem.cg != 1 or (problem.kg > 1 and problem.g == 1):
            raise Unsupported("needs one input channel in each group, and more than one group")
        chosen = config or tiling.choose_depthwise_weight(problem, device())
        (phase,) = phases(problem)
        th = min(chosen.th, problem.p)
        blocks = problem.n * cdiv(problem.p, th) * cdiv(problem.q, chosen.bq)
        per_split = cdiv(blocks, chosen.splits)
        splits = cdiv(blocks, per_split)
        tr = min(problem.r, UNROLLED)
        ts = min(chosen.taps, problem.s)
        taps = problem.r * problem.s
        x_strides, gy_strides = (image_strides(problem.format, *sizes) for sizes in (problem.input_shape[1:], problem.output_shape[1:]))
        xa, divided_x, _ = divided(x_strides, 0)
        ya, divided_gy, channels = divided(gy_strides, problem.k)
        grid = (cdiv(problem.k, chosen.bc) * cdiv(problem.r, tr) * cdiv(problem.s, ts), splits)

        memory, accumulate = accumulator(problem.dtype)
        first = Launch(
            depthwise_weight_kernel, grid,
            (channels, blocks, per_split, problem.p, problem.q, problem.h, problem.w, problem.r, problem.s, problem.kg,
             *divided_x, *divided_gy, phase.columns.source_step, phase.rows.offset, phase.columns.offset, phase.columns.shift),
            STEP_H=phase.rows.source_step, SHIFT_H=phase.rows.shift, TR=tr, TS=ts, TH=th, MODE=MODES[problem.padding_mode],
            WIDE=is_wide(problem.n * x_strides[0], problem.n * gy_strides[0]), XA=xa, YA=ya, ACC=accumulate, BQ=chosen.bq, BC=chosen.bc,
            num_warps=chosen.warps, num_stages=chosen.stages,
        )  # fmt: skip
        second = reduce_splits(problem.dtype, splits=splits, pitch=problem.k * taps, sizes=(problem.k, taps, 1), strides=(taps, 1, 0))
        to_bias = bias_gradient(problem)

        def run(source: Tensor, other: Tensor, side: Tensor | None, out: Tensor) -> None:
            partial = workspace((splits, problem.k * taps), memory, source)
            first(source, other, partial)
            second(partial, out)
            if side is not None:
                to_bias(other, side)

        return CudaPlan(problem, self.name, run, {"config": chosen, "splits": splits})


DEPTHWISE_WEIGHT = DepthwiseWeight()
