"""Convolutions of an image with few channels (the first layer of a network): forward and grad_weight of a problem with up to 8 input channels.

    for a bounded number of images at a time:
        padded[n, u, v, CP] = x with its padding in place and its channels filled up to CP = 4 or 8 (one pass over x)
        the implicit GEMM of :mod:`.igemm`, for which a run of S pixels is one pixel of S * CP channels

One kernel row is then a contiguous run, 28 elements for a 7x7 kernel of three channels, and no load needs a mask for the padding.  Where pixels are read at
distances of 16 bytes, forward takes runs of whole 16 bytes (32 elements), with zeros in the weight: not under ``config.precision = "strict"``, since an
infinity that meets them becomes NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import config as options
from ..dispatch import Unsupported
from ..problem import DTYPES, ConvProblem
from . import tiling
from .gather import MODES, AxisPhase, Phase
from .igemm import gather_launches, has_bias
from .igemm_weight import partial_weight
from .indexing import inside, padded
from .launch import Launch
from .reduction import bias_gradient, reduce_splits
from .runtime import CudaPlan, accumulator, cdiv, device, image_strides, is_wide, part, weight_strides, workspace
from .tiling import IgemmConfig, WeightConfig

__all__ = ["STEM", "STEM_WEIGHT"]

_BUFFER_BYTES = 64 << 20


@triton.jit
def pad_kernel(
    x, out, ELEMENTS, C, H, W, PH, PW, sn, sc, sh, sw, top, left, CP: tl.constexpr, MODE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[n, u, v, c] (PH, PW, CP) = x[n, c, u - top, v - left] by the padding mode, 0 for channels from C on."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    e = pid * BLOCK + tl.arange(0, BLOCK)
    c = e % CP
    rest = e // CP
    w = padded(rest % PW - left, W, MODE)
    rest = rest // PW
    h = padded(rest % PH - top, H, MODE)
    n = rest // PH
    ok = (e < ELEMENTS) & (c < C) & inside(h, H) & inside(w, W)
    tl.store(out + e, tl.load(x + n * sn + c * sc + h * sh + w * sw, mask=ok, other=0.0), mask=e < ELEMENTS)


@triton.jit
def pack_kernel(weight, out, ELEMENTS, C, R, S, RUN, wk, wc, wt, CP: tl.constexpr, BLOCK: tl.constexpr):
    """out[k, r, s * CP + c] (runs of RUN) = weight[k, c, r, s], 0 for channels from C and columns from S on."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = e % RUN
    row = e // RUN
    c = at % CP
    s = at // CP
    ok = (e < ELEMENTS) & (c < C) & (s < S)
    tl.store(out + e, tl.load(weight + row // R * wk + (row % R * S + s) * wt + c * wc, mask=ok, other=0.0), mask=e < ELEMENTS)


@dataclass(frozen=True)
class _Form:
    """The padded image of a problem: its size and channels, the elements of a kernel row, the distance of the pixels that neighbouring outputs read, and
    the phase in which a kernel row is one tap."""

    rows: int
    columns: int
    channels: int
    run: int
    distance: int
    phase: Phase

    @property
    def image(self) -> int:
        return self.rows * self.columns * self.channels


def _form(problem: ConvProblem) -> _Form:
    """The form of a problem; raises :class:`Unsupported` where it has none."""
    if problem.g != 1 or problem.c > 8:
        raise Unsupported("needs one group of at most 8 input channels")
    if problem.dilation[1] != 1:
        raise Unsupported("a dilated kernel row is no contiguous run")
    if problem.s == 1:
        raise Unsupported("a kernel of one column gains nothing")
    rows = (problem.p - 1) * problem.stride[0] + problem.effective_kernel[0]
    channels = 4 if problem.c <= 4 else 8
    vector = 16 // DTYPES[problem.dtype]
    run, distance = problem.s * channels, problem.stride[1] * channels
    if problem.direction == "forward" and distance % vector == 0 and options.current().precision != "strict":
        run += -run % vector
    columns = (problem.q - 1) * problem.stride[1] + run // channels
    if distance % vector == 0:
        columns += -columns % max(1, vector // channels)
    # neighbouring outputs are neighbouring pixels ``distance`` apart, so that the kernel sees what divides their addresses
    phase = Phase(AxisPhase(0, 1, problem.p, problem.r, 0, 1, problem.stride[0], 0, problem.dilation[0]), AxisPhase(0, 1, problem.q, 1, 0, 1, 1, 0, 1))
    return _Form(rows, columns, channels, run, distance, phase)


def _images_at_once(problem: ConvProblem, form: _Form) -> int:
    return max(1, min(problem.n, _BUFFER_BYTES // (form.image * DTYPES[problem.dtype])))


def pad(problem: ConvProblem, form: _Form, images: int) -> Launch:
    """Called with x (images, c, h, w) and the padded images."""
    left, _, top, _ = problem.padding
    elements = images * form.image
    strides = image_strides(problem.format, *problem.input_shape[1:])
    return Launch(
        pad_kernel, (cdiv(elements, 1024),), (elements, problem.c, problem.h, problem.w, form.rows, form.columns, *strides, top, left),
        CP=form.channels, MODE=MODES[problem.padding_mode], WIDE=is_wide(images * strides[0], elements), BLOCK=1024,
    )  # fmt: skip


def _strides(form: _Form) -> tuple[int, int, int, int]:
    return form.image, 1, form.columns * form.channels, form.distance


class Stem:
    """The implementation named ``stem``: forward."""

    name = "stem"

    def configs(self, problem: ConvProblem) -> list[IgemmConfig]:
        """What the tuner may choose from, the heuristic's choice first."""
        return tiling.stem_candidates(problem, device())

    def plan(self, problem: ConvProblem, threads: int = 1, config: IgemmConfig | None = None) -> CudaPlan:  # noqa: ARG002
        """A plan for forward with few input channels; raises :class:`Unsupported` for others."""
        if problem.direction != "forward":
            raise Unsupported("computes forward")
        form = _form(problem)
        chosen = config or tiling.choose_stem(problem, device())
        images = _images_at_once(problem, form)
        wk, wc, _, ws = weight_strides(problem.weight_format, problem.c, problem.r, problem.s)
        arguments: dict[str, Any] = {
            "groups": 1,
            "source_size": (form.rows, form.columns),
            "source_channels": form.run,
            "out_channels": problem.k,
            "source_strides": _strides(form),
            "out_strides": image_strides(problem.format, *problem.output_shape[1:]),
            "weight_strides": (0, problem.r * form.run, 1, form.run, 0),
            "mode": 0,
            "config": chosen,
        }

        bias = has_bias(problem)
        counts = {images, problem.n % images or images}
        pads = {count: pad(problem, form, count) for count in counts}
        launches = {count: gather_launches((form.phase,), problem.dtype, bias, images=count, **arguments) for count in counts}
        elements = problem.k * problem.r * form.run
        scalars = elements, problem.c, problem.r, problem.s, form.run, wk, wc, ws
        pack = Launch(pack_kernel, (cdiv(elements, 1024),), scalars, CP=form.channels, BLOCK=1024)

        def run(source: Tensor, other: Tensor, side: Tensor | None, out: Tensor) -> None:
            weight = workspace((elements,), other.dtype, other)
            pack(other, weight)
            buffer = workspace((images * form.image,), source.dtype, source)
            for start in range(0, problem.n, images):
                count = min(images, problem.n - start)
                pads[count](part(source, start, count), buffer)
                written = part(out, start, count)
                for launch in launches[count]:
                    launch(buffer, weight, side if bias else written, written)

        return CudaPlan(problem, self.name, run, {"config": chosen, "images_at_once": images})


class StemWeight:
    """The implementation named ``stem_weight``: grad_weight."""

    name = "stem_weight"

    def configs(self, problem: ConvProblem) -> list[WeightConfig]:
        """What the tuner may choose from, the heuristic's choice first."""
        return tiling.stem_weight_candidates(problem, device())

    def plan(self, problem: ConvProblem, threads: int = 1, config: WeightConfig | None = None) -> CudaPlan:  # noqa: ARG002
        """A plan for grad_weight with few input channels; raises :class:`Unsupported` for others."""
        if problem.direction != "grad_weight":
            raise Unsupported("computes grad_weight")
        form = _form(problem)
        chosen = config or tiling.choose_stem_weight(problem, device())
        images = _images_at_once(problem, form)
        pitch = problem.k * problem.r * form.run
        wk, wc, _, ws = weight_strides(problem.weight_format, problem.c, problem.r, problem.s)
        gy_strides = image_strides(problem.format, *problem.output_shape[1:])

        counts = {images, problem.n % images or images}
        pads = {count: pad(problem, form, count) for count in counts}
        products = {
            count: partial_weight(
                form.phase, problem.dtype, images=count, groups=1, size=(form.rows, form.columns), channels=form.run, outputs=problem.k,
                x_strides=_strides(form), gy_strides=gy_strides, mode=0, config=chosen,
            )
            for count in counts
        }  # fmt: skip
        splits = sum(products[min(images, problem.n - start)].splits for start in range(0, problem.n, images))
        sizes, strides = (problem.k, problem.r * problem.s, problem.c), (wk, ws, wc)
        last = reduce_splits(problem.dtype, splits=splits, pitch=pitch, sizes=sizes, strides=strides, row=form.channels)
        to_bias = bias_gradient(problem)

        def run(source: Tensor, other: Tensor, side: Tensor | None, out: Tensor) -> None:
            buffer = workspace((images * form.image,), source.dtype, source)
            parts: list[Tensor] = []
            for start in range(0, problem.n, images):
                count = min(images, problem.n - start)
                pads[count](part(source, start, count), buffer)
                parts.append(products[count](buffer, part(other, start, count)))
            last(parts[0] if len(parts) == 1 else torch.cat(parts), out)
            if side is not None:
                to_bias(other, side)

        memory = accumulator(problem.dtype)[0].itemsize
        facts = {"config": chosen, "images_at_once": images, "partial_bytes": chosen.splits * cdiv(problem.n, images) * pitch * memory}
        return CudaPlan(problem, self.name, run, facts)


STEM = Stem()
STEM_WEIGHT = StemWeight()
