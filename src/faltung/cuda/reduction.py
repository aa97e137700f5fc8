"""Sums of fixed shape: the second stage of every split sum, and the bias gradient.

No atomics: partial sums lie in a workspace and are added in the order of their splits, so the same call gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..problem import ConvProblem
from .launch import Launch
from .runtime import accumulator, cdiv, image_strides, is_wide, workspace
from .tiling import power_of_two, split_count

__all__ = ["bias_gradient", "reduce_splits"]


@triton.jit
def reduce_kernel(
    partial, out, ELEMENTS, SPLITS, pitch, T, C, row, KG, MERGED, sk, st, sc, ACC: tl.constexpr, BS: tl.constexpr, BE: tl.constexpr
):  # fmt: skip
    """out[k * sk + t * st + c * sc] = sum over splits of partial[split * pitch + (k * T + t) * row + own + c], BE elements a program.

    ``pitch`` is the distance of the splits, C the length of the innermost axis, ``row`` the one that it has in the workspace.  Where MERGED groups of KG
    output channels were multiplied as one, ``own`` leads to the input channels of k's own group: ``k // KG % MERGED * C``.
    """
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    ok = e < ELEMENTS
    c = e % C
    kt = e // C
    k = kt // T
    t = kt - k * T
    at = (kt * row + k // KG % MERGED * C + c).to(tl.int64)
    acc = tl.zeros([BE], ACC)
    for first in range(0, SPLITS, BS):
        split = (first + tl.arange(0, BS)).to(tl.int64)
        values = tl.load(partial + (split * pitch)[:, None] + at[None, :], mask=(split < SPLITS)[:, None] & ok[None, :], other=0.0)
        acc += tl.sum(values, axis=0)
    tl.store(out + (k * sk + t * st + c * sc), acc.to(out.dtype.element_ty), mask=ok)


def reduce_splits(
    dtype: str, *, splits: int, pitch: int, sizes: Sequence[int], strides: Sequence[int], row: int | None = None, group: int = 1, merged: int = 1
) -> Launch:
    """Called with ``partial`` (splits, k, t, c) and ``out`` of strides (k, t, c): sums over the splits; rows of the workspace are ``row`` long (c by default).

    ``dtype`` is the problem's; see the kernel for ``group`` (KG) and ``merged``.
    """
    k, t, c = sizes
    elements = k * t * c
    block = 128 if elements >= 1 << 14 else 32
    return Launch(
        reduce_kernel, (cdiv(elements, block),), (elements, splits, pitch, t, c, row or c, group, merged, *strides),
        ACC=accumulator(dtype)[1], BS=power_of_two(splits, 1, 32), BE=block, num_warps=4,
    )  # fmt: skip


@triton.jit
def bias_kernel(gy, partial, M, PQ, K, CHUNK, sn, sk, sp, WIDE: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """partial[split, k] = sum of gy[n, k, pixel] over the outputs ``split * CHUNK .. + CHUNK``."""
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    split = tl.program_id(1)
    start = split.to(tl.int64) * CHUNK if WIDE else split * CHUNK
    acc = tl.zeros([BM, BK], ACC)
    for first in range(0, CHUNK, BM):
        m = start + first + tl.arange(0, BM)
        n = m // PQ
        ok = (m < M) & (first + tl.arange(0, BM) < CHUNK)
        acc += tl.load(gy + (n * sn + (m % PQ) * sp)[:, None] + (k * sk)[None, :], mask=ok[:, None] & (k < K)[None, :], other=0.0).to(ACC)
    tl.store(partial + split * K + k, tl.sum(acc, axis=0), mask=k < K)


def bias_gradient(problem: ConvProblem) -> Callable[[Tensor, Tensor], None]:
    """Called with ``gy`` (n, k, p, q), a dense tensor of the problem's format, and ``out`` (k): its sum over everything else."""
    memory, accumulate = accumulator(problem.dtype)
    pixels = problem.n * problem.p * problem.q
    sn, sk, _, sp = image_strides(problem.format, problem.k, problem.p, problem.q)
    bm, bk = (32, power_of_two(problem.k, 16, 64)) if problem.format == "nhwc" else (power_of_two(problem.p * problem.q, 32, 512), 4)
    blocks = cdiv(problem.k, bk)
    splits = split_count(pixels, bm, blocks, programs=1056)
    chunk = cdiv(cdiv(pixels, splits), bm) * bm
    splits = cdiv(pixels, chunk)
    first = Launch(
        bias_kernel, (blocks, splits), (pixels, problem.p * problem.q, problem.k, chunk, sn, sk, sp),
        WIDE=is_wide(pixels * problem.k), ACC=accumulate, BM=bm, BK=bk, num_warps=4,
    )  # fmt: skip
    second = reduce_splits(problem.dtype, splits=splits, pitch=problem.k, sizes=(problem.k, 1, 1), strides=(1, 0, 0))

    def run(gy: Tensor, out: Tensor) -> None:
        partial = workspace((splits, problem.k), memory, gy)
        first(gy, partial)
        second(partial, out)

    return run
