"""grad_input in a padding mode other than zeros: the gradient of the padded input, folded back onto the input.

A few images at a time: the gradient of the padded input goes into a bounded buffer (float32 for 16-bit types), by whichever implementation takes the
zero-padded problem; then every input element adds up the padded positions that were read from it, in a fixed order.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from .. import config, dispatch
from ..dispatch import Unsupported
from ..problem import DTYPES, ConvProblem
from .gather import MODES
from .indexing import inside
from .launch import Launch
from .runtime import CudaPlan, accumulator, cdiv, image_strides, is_wide, part, workspace

__all__ = ["FOLDED", "Folded"]

_BUFFER_BYTES = 32 << 20  # stays in the second-level cache of an H100


@triton.jit
def preimage(index, candidate, size, before, padded_size, MODE: tl.constexpr):
    """Padded position number ``candidate`` of those that read ``index``, and whether there is one; position 0 is its own."""
    own = index + before
    if MODE == 1:
        position = tl.where(candidate == 0, own, tl.where(candidate == 1, before - index, 2 * (size - 1) - index + before))
        ok = (candidate == 0) | ((candidate == 1) & (index > 0)) | ((candidate == 2) & (index < size - 1))
    elif MODE == 2:
        position = tl.where(index == 0, candidate, own + candidate)
        ok = (candidate == 0) & (index > 0) | (index == size - 1) | ((index == 0) & (candidate <= before))
    else:
        position = tl.where(candidate == 0, own, tl.where(candidate == 1, own - size, own + size))
        ok = candidate >= 0
    return position, ok & inside(position, padded_size)


@triton.jit
def fold_kernel(
    source, out, ELEMENTS, C, H, W, PH, PW, sn, sc, sh, sw, top, left, rows, columns,
    CHANNELS_LAST: tl.constexpr, MODE: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n, c, h, w] = sum of source[n, c, u, v] over the ``rows`` x ``columns`` candidates; ``out`` is dense, source (n, c, PH, PW) has strides."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    e = pid * BLOCK + tl.arange(0, BLOCK)
    ok = e < ELEMENTS
    if CHANNELS_LAST:
        c = e % C
        rest = e // C
        w = rest % W
        rest = rest // W
        h = rest % H
        n = rest // H
    else:
        w = e % W
        rest = e // W
        h = rest % H
        rest = rest // H
        c = rest % C
        n = rest // C
    base = source + n * sn + c * sc
    acc = tl.zeros([BLOCK], ACC)
    for a in range(rows):
        u, u_ok = preimage(h, a, H, top, PH, MODE)
        for b in range(columns):
            v, v_ok = preimage(w, b, W, left, PW, MODE)
            acc += tl.load(base + u * sh + v * sw, mask=ok & u_ok & v_ok, other=0.0).to(ACC)
    tl.store(out + e, acc.to(out.dtype.element_ty), mask=ok)


def _candidates(size: int, before: int, after: int, mode: str) -> int:
    if mode != "replicate":
        return 3
    return max(1, size + before + after) if size == 1 else max(before, after, 0) + 1


def fold(problem: ConvProblem, images: int) -> Launch:
    """Called with a source (images, c, h + top + bottom, w + left + right) and out (images, c, h, w), both dense in the problem's format: adds it up."""
    left, right, top, bottom = problem.padding
    ph, pw = problem.h + top + bottom, problem.w + left + right
    elements = images * problem.c * problem.h * problem.w
    scalars = (
        elements, problem.c, problem.h, problem.w, ph, pw, *image_strides(problem.format, problem.c, ph, pw), top, left,
        _candidates(problem.h, top, bottom, problem.padding_mode), _candidates(problem.w, left, right, problem.padding_mode),
    )  # fmt: skip
    return Launch(
        fold_kernel, (cdiv(elements, 1024),), scalars, CHANNELS_LAST=problem.format == "nhwc", MODE=MODES[problem.padding_mode],
        WIDE=is_wide(images * problem.c * ph * pw, elements), ACC=accumulator(problem.dtype)[1], BLOCK=1024,
    )  # fmt: skip


class Folded:
    """The implementation named ``folded``."""

    name = "folded"

    def plan(self, problem: ConvProblem, threads: int = 1) -> CudaPlan:
        """A plan for grad_input with reflect, replicate or circular padding; raises :class:`Unsupported` for others."""
        if problem.direction != "grad_input" or problem.padding_mode == "zeros":
            raise Unsupported("only for grad_input in a padding mode other than zeros")
        left, right, top, bottom = problem.padding
        padded = replace(problem, h=problem.h + top + bottom, w=problem.w + left + right, padding=(0, 0, 0, 0), padding_mode="zeros")
        image = padded.c * padded.h * padded.w
        images = max(1, min(problem.n, _BUFFER_BYTES // (image * max(4, DTYPES[problem.dtype]))))
        wanted = config.current().implementation
        with config.override(implementation=None if wanted == self.name else wanted):
            inner = {count: dispatch.plan(replace(padded, n=count), "cuda", threads) for count in {images, problem.n % images or images}}

        memory = accumulator(problem.dtype)[0]
        folds = {count: fold(problem, count) for count in inner}

        def run(source: Tensor, other: Tensor, side: Tensor | None, out: Tensor) -> None:
            buffer = workspace((images * image,), memory, out)
            for start in range(0, problem.n, images):
                count = min(images, problem.n - start)
                padded_plan: CudaPlan = inner[count]  # type: ignore[assignment]
                padded_plan.run(part(source, start, count), other, side, buffer)
                folds[count](buffer, part(out, start, count))

        facts = next(iter(inner.values())).describe()
        return CudaPlan(problem, self.name, run, {"padded_by": next(iter(inner.values())).implementation, "images_at_once": images, **facts})


FOLDED = Folded()
