"""grad_weight as an implicit GEMM over the outputs, split into a fixed number of pieces.

    for each group, tile of BM output channels k and of BN columns (tap, c), and each split:               one program
        acc[BM, BN] = 0
        for each block of BK outputs m = (n, p, q) of the split:                                           pipelined
            acc += gy[m, k]^T @ x[n, p * stride + r * dilation - top, q * stride + s * dilation - left, c]
        partial[split, k, tap, c] = acc
    gw[k, c, r, s] = sum of partial over the splits, in their order

A tile has one tap, or, with few input channels, any (tap, c) pairs (``FLAT``).  The number of splits follows from the problem and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import Unsupported
from ..problem import ConvProblem
from . import tiling
from .gather import MODES, Phase, phases
from .igemm import divided
from .indexing import divider, inside, padded, quotient
from .launch import Launch
from .reduction import bias_gradient, reduce_splits
from .runtime import CudaPlan, accumulator, cdiv, device, image_strides, is_wide, precision, weight_strides, workspace
from .tiling import WeightConfig

__all__ = ["IGEMM_WEIGHT", "IgemmWeight", "PartialWeight", "partial_weight"]


@triton.jit
def place_of(m, MQ, mq_multiplier, mq_shift, PQ, pq_multiplier, pq_shift, WIDE: tl.constexpr):
    """Image, row and column of the outputs ``m``: two divisions a row of a tile, which by themselves would take longer than the products."""
    if WIDE:
        n = m // PQ
        pixel = m - n * PQ
        p = pixel // MQ
    else:
        n = quotient(m, pq_multiplier, pq_shift)
        pixel = m - n * PQ
        p = quotient(pixel, mq_multiplier, mq_shift)
    return n, p, pixel - p * MQ


@triton.jit
def igemm_weight_kernel(
    x, gy, partial,
    M, MQ, mq_multiplier, mq_shift, PQ, pq_multiplier, pq_shift, CHUNK, H, W, C, K, pitch,
    sn, sc, sh, sw, yn, yk, yp, yq,
    step_h, step_w, offset_h, offset_w, shift_h, shift_w,
    TR: tl.constexpr, TS: tl.constexpr, MODE: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, XA: tl.constexpr, YA: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of one group's weight for one split; C and K are a group's channels, ``pitch`` the length of a split's partial weight.

    Where channels are contiguous, C and the other strides of x come divided by XA, K and those of gy by YA.
    """
    C, sn, sh, sw = C * XA, sn * XA, sh * XA, sw * XA
    K, yn, yp, yq = K * YA, yn * YA, yp * YA, yq * YA
    pid = tl.program_id(0)
    split = tl.program_id(1)
    blocks_k = tl.cdiv(K, BM)
    blocks_c = tl.cdiv(TR * TS * C, BN) if FLAT else tl.cdiv(C, BN)
    columns = blocks_c if FLAT else blocks_c * (TR * TS)
    # neighbours read the same outputs and the same taps
    group = pid // (blocks_k * columns)
    rest = pid - group * (blocks_k * columns)
    block_k = rest // columns
    column = rest - block_k * columns
    k = block_k * BM + tl.arange(0, BM)
    k_ok = k < K
    if FLAT:
        cc = column * BN + tl.arange(0, BN)
        tap = cc // C
        c = cc - tap * C
        c_ok = tap < TR * TS
    else:
        tap = column // blocks_c
        c = (column - tap * blocks_c) * BN + tl.arange(0, BN)
        c_ok = c < C
    r = tap // TS
    s = tap - r * TS
    down = r * shift_h + offset_h
    right = s * shift_w + offset_w
    # the bases carry 64 bits where an offset may need them, and with them everything that is added
    split_at = split * CHUNK
    if WIDE:
        group = group.to(tl.int64)
        split_at = split.to(tl.int64) * CHUNK
    x_columns = x + (group * C + c) * sc
    gy_rows = gy + (group * K + k) * yk
    acc = tl.zeros([BM, BN], ACC)
    for first in range(0, CHUNK, BK):
        m = split_at + first + tl.arange(0, BK)
        ok = m < M
        n, p, q = place_of(m, MQ, mq_multiplier, mq_shift, PQ, pq_multiplier, pq_shift, WIDE)
        if FLAT:
            h = (p * step_h)[:, None] + down[None, :]
            w = (q * step_w)[:, None] + right[None, :]
            x_ok = ok[:, None] & c_ok[None, :]
            if MODE == 0:
                x_ok = x_ok & inside(h, H) & inside(w, W)
            else:
                h = padded(h, H, MODE)
                w = padded(w, W, MODE)
            b = tl.load(x_columns[None, :] + (n * sn)[:, None] + (h * sh + w * sw), mask=x_ok, other=0.0)
        else:
            h = p * step_h + down
            w = q * step_w + right
            pixel_ok = ok
            if MODE == 0:
                pixel_ok = ok & inside(h, H) & inside(w, W)
            else:
                h = padded(h, H, MODE)
                w = padded(w, W, MODE)
            b = tl.load(x_columns[None, :] + (n * sn + h * sh + w * sw)[:, None], mask=pixel_ok[:, None] & c_ok[None, :], other=0.0)
        a = tl.load(gy_rows[None, :] + (n * yn + p * yp + q * yq)[:, None], mask=ok[:, None] & k_ok[None, :], other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION, out_dtype=ACC)
    place = (group * K + k).to(tl.int64) * (TR * TS * C)
    inner = cc if FLAT else tap * C + c
    tl.store(partial + split.to(tl.int64) * pitch + place[:, None] + inner[None, :], acc, mask=k_ok[:, None] & c_ok[None, :])


@dataclass(frozen=True)
class PartialWeight:
    """Called with x and gy: the partial weight gradients (splits, pitch = groups * outputs * taps * channels) in a workspace of type ``memory``."""

    launch: Launch
    splits: int
    pitch: int
    memory: torch.dtype

    def __call__(self, x: Tensor, gy: Tensor) -> Tensor:
        partial = workspace((self.splits, self.pitch), self.memory, x)
        self.launch(x, gy, partial)
        return partial


def partial_weight(
    phase: Phase, dtype: str, *, images: int, groups: int, size: tuple[int, int], channels: int, outputs: int, x_strides: tuple[int, ...],
    gy_strides: tuple[int, ...], mode: int, config: WeightConfig,
) -> PartialWeight:  # fmt: skip
    """The launch of a weight gradient; ``channels``, ``outputs`` are a group's, strides those of dense images."""
    rows, columns = phase.rows, phase.columns
    memory, accumulate = accumulator(dtype)
    pixels = images * phase.pixels
    chunk = cdiv(cdiv(pixels, config.splits), config.bk) * config.bk
    splits = cdiv(pixels, chunk)
    pitch = groups * outputs * phase.taps * channels
    xa, divided_x, divided_channels = divided(x_strides, channels)
    ya, divided_gy, divided_outputs = divided(gy_strides, outputs)
    blocks = cdiv(phase.taps * channels, config.bn) if config.flat else phase.taps * cdiv(channels, config.bn)
    scalars = (
        pixels, columns.count, *divider(columns.count), phase.pixels, *divider(phase.pixels), chunk, *size, divided_channels, divided_outputs, pitch,
        *divided_x, *divided_gy, rows.source_step, columns.source_step, rows.offset, columns.offset, rows.shift, columns.shift,
    )  # fmt: skip
    launch = Launch(
        igemm_weight_kernel, (groups * cdiv(outputs, config.bm) * blocks, splits), scalars,
        TR=rows.taps, TS=columns.taps, MODE=mode, FLAT=config.flat, WIDE=is_wide(images * x_strides[0], images * gy_strides[0]), XA=xa, YA=ya, ACC=accumulate,
        PRECISION=precision(dtype, config.precision), BM=config.bm, BN=config.bn, BK=config.bk, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return PartialWeight(launch, splits, pitch, memory)


class IgemmWeight:
    """The implementation named ``igemm_weight``: every weight gradient, on tensors of either format as they are."""

    name = "igemm_weight"

    def configs(self, problem: ConvProblem) -> list[WeightConfig]:
        """What the tuner may choose from, the heuristic's choice first."""
        return tiling.weight_candidates(problem, device())

    def plan(self, problem: ConvProblem, threads: int = 1, config: WeightConfig | None = None) -> CudaPlan:  # noqa: ARG002
        """A plan for grad_weight; raises :class:`Unsupported` for the other directions."""
        if problem.direction != "grad_weight":
            raise Unsupported("computes grad_weight")
        chosen = config or tiling.choose_weight(problem, device())
        (phase,) = phases(problem)
        x_strides, gy_strides = (image_strides(problem.format, *sizes) for sizes in (problem.input_shape[1:], problem.output_shape[1:]))
        wk, wc, _, ws = weight_strides(problem.weight_format, problem.cg, problem.r, problem.s)

        taps = problem.r * problem.s
        first = partial_weight(
            phase, problem.dtype, images=problem.n, groups=problem.g, size=(problem.h, problem.w), channels=problem.cg, outputs=problem.kg,
            x_strides=x_strides, gy_strides=gy_strides, mode=MODES[problem.padding_mode], config=chosen,
        )  # fmt: skip
        second = reduce_splits(problem.dtype, splits=first.splits, pitch=first.pitch, sizes=(problem.k, taps, problem.cg), strides=(wk, ws, wc))
        to_bias = bias_gradient(problem)

        def run(source: Tensor, other: Tensor, side: Tensor | None, out: Tensor) -> None:
            second(first(source, other), out)
            if side is not None:
                to_bias(other, side)

        return CudaPlan(problem, self.name, run, {"config": chosen})


IGEMM_WEIGHT = IgemmWeight()
