"""Implicit GEMM on repacked operands: nchw images are transposed to nhwc first, and the weight so that its reduction is contiguous.

A bounded number of images at a time is transposed into a workspace, so that the GEMM reads them from there; what it computes is stored in the caller's
format directly.  A transposition costs one pass over its operand, where gathering from nchw by the element costs the GEMM its vector loads.

Groups of few channels are merged: a few of them are multiplied as one group whose weight has zeros beside its diagonal blocks.  Memory bounds such layers,
so the zeros are free; but an infinity or NaN that meets them spreads to the merged groups, so under ``config.precision = "strict"`` forward and grad_input
do without.  (The weight gradient's products beside the diagonal are never read.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import config as options
from ..dispatch import Unsupported
from ..problem import DTYPES, ConvProblem
from . import tiling
from .gather import MODES, phases
from .igemm import gather_launches, has_bias, require_gather
from .igemm_weight import partial_weight
from .launch import Launch
from .reduction import bias_gradient, reduce_splits
from .runtime import CudaPlan, cdiv, device, image_strides, part, weight_strides, workspace
from .tiling import IgemmConfig, WeightConfig
from .transpose import transpose

__all__ = ["IGEMM_PACKED", "IGEMM_PACKED_WEIGHT"]

_CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class _WeightForm:
    """How the kernel sees the weight: strides (group, output channel, source channel, r, s), and what is done for that.

    Either matrices (count, a, b) are transposed, or ``merged`` groups become one, or (1 and None) nothing is.
    """

    strides: tuple[int, int, int, int, int]
    matrices: tuple[int, int, int] | None
    merged: int = 1

    def packer(self, problem: ConvProblem) -> Callable[[Tensor], Tensor]:
        """What brings a weight into this form: itself, or a workspace."""
        elements = math.prod(problem.weight_shape) * self.merged
        if self.merged > 1:
            launch = merge(problem, self.merged)
        elif self.matrices is not None:
            launch = transpose(*self.matrices)
        else:
            return lambda weight: weight

        def pack(weight: Tensor) -> Tensor:
            packed = workspace((elements,), weight.dtype, weight)
            launch(weight, packed)
            return packed

        return pack


@triton.jit
def merge_kernel(weight, out, ELEMENTS, KG, CG, MERGED, TAPS, wk, wc, wt, BLOCK: tl.constexpr):
    """out[k, tap, c] for c below MERGED * CG: weight[k, c % CG, tap] where c belongs to k's group among the MERGED, 0 elsewhere."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = e % (MERGED * CG)
    rest = e // (MERGED * CG)
    tap = rest % TAPS
    k = rest // TAPS
    own = c // CG == k // KG % MERGED
    value = tl.load(weight + k * wk + c % CG * wc + tap * wt, mask=own & (e < ELEMENTS), other=0.0)
    tl.store(out + e, value, mask=e < ELEMENTS)


def merge(problem: ConvProblem, merged: int) -> Launch:
    """Called with a weight and what becomes the weight (k, r, s, merged * c/g) of ``merged`` groups as one."""
    elements = math.prod(problem.weight_shape) * merged
    wk, wc, _, ws = weight_strides(problem.weight_format, problem.cg, problem.r, problem.s)
    return Launch(merge_kernel, (cdiv(elements, 1024),), (elements, problem.kg, problem.cg, merged, problem.r * problem.s, wk, wc, ws), BLOCK=1024)


def _weight_form(problem: ConvProblem) -> _WeightForm:
    """The weight with the reduction contiguous where one transposition gets there: (k, r, s, c) for forward, (g, c, r, s, k) for grad_input.

    A channels_last weight is already good for both in 16-bit types: the tensor cores take that operand in either order.
    """
    k, cg, r, s = problem.weight_shape
    taps = r * s
    forward = problem.direction == "forward"
    merged = 1 if options.current().precision == "strict" else tiling.merged_groups(problem)
    if merged > 1:
        wk, wc = taps * cg * merged, 1
        return _WeightForm((problem.kg * merged * wk, *((wk, wc) if forward else (wc, wk)), s * cg * merged, cg * merged), None, merged)
    if problem.weight_format == "nhwc" or cg == 1 or taps == 1:
        wk, wc, wr, ws = weight_strides(problem.weight_format, cg, r, s)
        return _WeightForm((problem.kg * wk, *((wk, wc) if forward else (wc, wk)), wr, ws), None)
    if forward:
        return _WeightForm((problem.kg * taps * cg, taps * cg, 1, s * cg, cg), (k, cg, taps))
    return _WeightForm((problem.kg * taps * cg, taps * problem.kg, 1, s * problem.kg, problem.kg), (problem.g, problem.kg, cg * taps))


def _images_at_once(problem: ConvProblem, image: int) -> int:
    return max(1, min(problem.n, _CHUNK_BYTES // max(1, image * DTYPES[problem.dtype])))


class IgemmPacked:
    """The implementation named ``igemm_packed``: forward and grad_input."""

    name = "igemm_packed"

    def configs(self, problem: ConvProblem) -> list[IgemmConfig]:
        """What the tuner may choose from, the heuristic's choice first."""
        return tiling.igemm_candidates(problem, device())

    def plan(self, problem: ConvProblem, threads: int = 1, config: IgemmConfig | None = None) -> CudaPlan:  # noqa: ARG002
        """A plan for forward or zero-padded grad_input where there is something to repack; raises :class:`Unsupported` for others."""
        require_gather(problem)
        forward = problem.direction == "forward"
        form = _weight_form(problem)
        source_shape, out_shape = (problem.input_shape, problem.output_shape) if forward else (problem.output_shape, problem.input_shape)
        _, channels, rows, columns = source_shape
        turn = problem.format == "nchw" and channels > 1 and rows * columns > 1
        if form.matrices is None and not turn and form.merged == 1:
            raise Unsupported("nothing to repack")
        groups = problem.g // form.merged
        if config is None and turn and channels // groups < 8:
            raise Unsupported(f"vector loads need 8 source channels a group, not {channels // groups}")
        chosen = config or tiling.choose_igemm(replace(problem, g=groups), device())
        found = phases(problem)
        image = channels * rows * columns
        images = _images_at_once(problem, image) if turn else problem.n
        arguments: dict[str, Any] = {
            "groups": groups,
            "source_size": (rows, columns),
            "source_channels": channels // groups,
            "out_channels": out_shape[1] // groups,
            "source_strides": image_strides("nhwc", channels, rows, columns),
            "out_strides": image_strides(problem.format, *out_shape[1:]),
            "weight_strides": form.strides,
            "mode": MODES[problem.padding_mode] if forward else 0,
            "config": chosen,
        }

        bias = has_bias(problem)
        counts = {images, problem.n % images or images}
        launches = {count: gather_launches(found, problem.dtype, bias, images=count, **arguments) for count in counts}
        turns = {count: transpose(count, channels, rows * columns) for count in counts}
        pack = form.packer(problem)

        def run(source: Tensor, other: Tensor, side: Tensor | None, out: Tensor) -> None:
            weight = pack(other)
            if not turn:
                for launch in launches[images]:
                    launch(source, weight, side if bias else out, out)
                return
            buffer = workspace((images * image,), source.dtype, source)
            for start in range(0, problem.n, images):
                count = min(images, problem.n - start)
                turns[count](part(source, start, count), buffer)
                written = part(out, start, count)
                for launch in launches[count]:
                    launch(buffer, weight, side if bias else written, written)

        facts = {"config": chosen, "launches": len(found), "images_at_once": images if turn else 0, "merged_groups": form.merged}
        return CudaPlan(problem, self.name, run, facts)


class IgemmPackedWeight:
    """The implementation named ``igemm_packed_weight``: grad_weight from nchw images, and of merged groups."""

    name = "igemm_packed_weight"

    def configs(self, problem: ConvProblem) -> list[WeightConfig]:
        """What the tuner may choose from, the heuristic's choice first."""
        return tiling.weight_candidates(problem, device())

    def plan(self, problem: ConvProblem, threads: int = 1, config: WeightConfig | None = None) -> CudaPlan:  # noqa: ARG002
        """A plan for grad_weight of nchw images or of groups that can be merged; raises :class:`Unsupported` for others."""
        if problem.direction != "grad_weight":
            raise Unsupported("computes grad_weight")
        merged = tiling.merged_groups(problem)
        turn = problem.format == "nchw"
        if not turn and merged == 1:
            raise Unsupported("nothing to repack")
        groups = problem.g // merged
        if config is None and min(problem.c, problem.k) // groups < 8:
            raise Unsupported(f"vector loads need 8 channels a group, not {min(problem.c, problem.k) // groups}")
        chosen = config or tiling.choose_weight(replace(problem, g=groups), device())
        (phase,) = phases(problem)
        x_shape, gy_shape = problem.input_shape[1:], problem.output_shape[1:]
        x_image, gy_image = problem.c * problem.h * problem.w, problem.k * problem.p * problem.q
        images = _images_at_once(problem, max(x_image, gy_image)) if turn else problem.n
        wk, wc, _, ws = weight_strides(problem.weight_format, problem.cg, problem.r, problem.s)
        taps = problem.r * problem.s
        row = problem.c // groups
        pitch = problem.k * taps * row
        sizes, strides = (problem.k, taps, problem.cg), (wk, ws, wc)

        counts = {images, problem.n % images or images}
        products = {
            count: partial_weight(
                phase, problem.dtype, images=count, groups=groups, size=(problem.h, problem.w), channels=row, outputs=problem.k // groups,
                x_strides=image_strides("nhwc", *x_shape), gy_strides=image_strides("nhwc", *gy_shape), mode=MODES[problem.padding_mode], config=chosen,
            )
            for count in counts
        }  # fmt: skip
        turns = {count: (transpose(count, problem.c, problem.h * problem.w), transpose(count, problem.k, problem.p * problem.q)) for count in counts}
        whole = {count: reduce_splits(problem.dtype, splits=products[count].splits, pitch=pitch, sizes=(1, 1, pitch), strides=(0, 0, 1)) for count in counts}
        splits = products[images].splits if images == problem.n else cdiv(problem.n, images)  # one partial weight for each part of the batch
        last = reduce_splits(problem.dtype, splits=splits, pitch=pitch, sizes=sizes, strides=strides, row=row, group=problem.kg, merged=merged)
        to_bias = bias_gradient(problem)

        def run(source: Tensor, other: Tensor, side: Tensor | None, out: Tensor) -> None:
            x_buffer, gy_buffer = source, other
            if turn:
                x_buffer, gy_buffer = (workspace((images * size,), source.dtype, source) for size in (x_image, gy_image))
            parts: list[Tensor] = []
            for start in range(0, problem.n, images):
                count = min(images, problem.n - start)
                if turn:
                    turn_x, turn_gy = turns[count]
                    turn_x(part(source, start, count), x_buffer)
                    turn_gy(part(other, start, count), gy_buffer)
                product = products[count]
                partial = product(x_buffer, gy_buffer)
                if images < problem.n:
                    partial, pieces = workspace((pitch,), product.memory, source), partial
                    whole[count](pieces, partial)
                parts.append(partial)
            last(parts[0] if len(parts) == 1 else torch.stack(parts), out)
            if side is not None:
                to_bias(other, side)

        return CudaPlan(problem, self.name, run, {"config": chosen, "images_at_once": images if turn else 0, "merged_groups": merged})


IGEMM_PACKED = IgemmPacked()
IGEMM_PACKED_WEIGHT = IgemmPackedWeight()
