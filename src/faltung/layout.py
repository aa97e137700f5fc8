"""Memory formats: what a tensor's strides say, and which format a convolution's result has.

Pure functions of sizes and strides, by PyTorch's rules, so that eager calls and shape propagation give the same answer.  Sizes may be
symbolic.  A leaf: it imports nothing of ours and no tensor library.
"""

from __future__ import annotations

from collections.abc import Sequence

from .problem import Format

__all__ = ["batched", "format_of", "is_dense", "joined_format", "result_format", "strides_of"]


def strides_of(shape: Sequence[int], fmt: Format) -> tuple[int, ...]:
    """Strides of a newly allocated tensor of this shape (n, c, h, w) or (c, h, w) in this format."""
    c, h, w = shape[-3:]
    if fmt == "nhwc":
        strides = (h * w * c, 1, w * c, c)
    else:
        rows, plane = max(w, 1), max(w, 1) * max(h, 1)
        strides = (plane * max(c, 1), plane, rows, 1)
    return strides[-len(shape) :]


def format_of(shape: Sequence[int], strides: Sequence[int]) -> Format:
    """The format that a four-dimensional tensor asks its results to have.

    ``nhwc`` where the strides grow in the order channels, columns, rows, samples; ambiguous strides (a tensor without elements, channels of
    stride 0, a size of 1 whose stride could belong to either format) count as ``nchw``.
    """
    if strides[1] == 0:
        return "nchw"
    least = 0
    for axis in (1, 3, 2, 0):
        if shape[axis] == 0 or strides[axis] < least:
            return "nchw"
        if axis == 0 and least == strides[1]:
            return "nchw"
        least = strides[axis]
        if shape[axis] > 1:
            least = least * shape[axis]
    return "nhwc"


def batched(shape: Sequence[int], strides: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of an input (c, h, w) seen as (1, c, h, w); those of four dimensions pass through."""
    if len(shape) == 3:
        return (1, *shape), (shape[0] * strides[0], *strides)
    return tuple(shape), tuple(strides)


def is_dense(shape: Sequence[int], strides: Sequence[int], fmt: Format) -> bool:
    """Whether the elements lie in memory in this format's order without gaps; strides of sizes 1 do not count."""
    expected = 1
    for axis in (3, 2, 1, 0) if fmt == "nchw" else (1, 3, 2, 0):
        if shape[axis] != 1:
            if strides[axis] != expected:
                return False
            expected *= shape[axis]
    return True


def result_format(
    input_shape: Sequence[int], input_strides: Sequence[int], weight_shape: Sequence[int], weight_strides: Sequence[int], *, double_on_cuda: bool = False
) -> Format:
    """The format of the convolution's output, and of the gradient of its input: ``nhwc`` where the input or the weight has it.

    PyTorch asks twice, the second time after it has brought both operands into the first answer's format, and a copy of a tensor whose sizes are
    mostly 1 may say ``nchw`` again.  ``double_on_cuda``: float64 on a CUDA device has ``nchw`` results only.
    """
    if double_on_cuda or "nhwc" not in (format_of(input_shape, input_strides), format_of(weight_shape, weight_strides)):
        return "nchw"
    return "nhwc" if "nhwc" in (_after_copy(input_shape, input_strides), _after_copy(weight_shape, weight_strides)) else "nchw"


def joined_format(shape: Sequence[int], fmt: Format, *, by_groups: bool, groups: int) -> Format:
    """The format in which a result (n, k, p, q) or (k, p, q) is allocated, where :func:`result_format` gave ``fmt``.

    ``by_groups``: PyTorch joins the results of this type from one tensor a group, and tensors (n, 1, 1, 1) join to a row-major one.
    """
    return "nchw" if by_groups and groups > 1 and shape[-3] == groups and shape[-2] == 1 and shape[-1] == 1 else fmt


def _after_copy(shape: Sequence[int], strides: Sequence[int]) -> Format:
    return format_of(shape, strides if is_dense(shape, strides, "nhwc") else strides_of(shape, "nhwc"))
