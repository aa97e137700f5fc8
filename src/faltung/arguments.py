"""Argument forms of a convolution, their checks, and the size of its output.

Everything that PyTorch refuses is refused here with the same exception class, and with its message up to details.  Sizes may be symbolic.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from .problem import DTYPES, PADDING_MODES, ConvProblem, same_padding

__all__ = ["Arguments", "Padding", "Sizes", "check", "check_problem", "conv2d_output_size", "normalize", "output_size"]

Sizes: TypeAlias = int | Sequence[int]
"""One number for rows and columns, or two."""
Padding: TypeAlias = int | Sequence[int] | str
"""One number, two (rows, columns), four (left, right, top, bottom), ``'same'`` or ``'valid'``."""

LIMIT = 2**31 - 1
"""Largest size of a padded input or dilated kernel, in rows or columns."""


class Arguments(NamedTuple):
    """The arguments of a convolution in one form; ``padding`` is (left, right, top, bottom), pairs are (rows, columns)."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str


def normalize(kernel: Sequence[int], stride: Sizes, padding: Padding, dilation: Sizes, groups: int, padding_mode: str) -> Arguments:
    """One form for every form of the arguments; ``kernel`` is (rows, columns).

    Raises TypeError for a value that is no number, ValueError for one beyond 64 bits or an unknown padding mode, RuntimeError for the rest.
    """
    groups = _integer(groups, "groups")
    if groups <= 0:
        raise RuntimeError(f"non-positive groups is not supported: expected groups to be greater than 0, but got groups={groups}")
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode must be one of {set(PADDING_MODES)}, but got padding_mode='{padding_mode}'")
    stride_pair, dilation_pair = _pair(stride, "stride"), _pair(dilation, "dilation")
    for value in stride_pair:
        if value <= 0:
            raise RuntimeError(f"non-positive stride is not supported; got stride={list(stride_pair)}")
    for value in dilation_pair:
        if value < 0:
            raise RuntimeError(f"dilation should be greater than zero; got dilation={list(dilation_pair)}")
        if value == 0:
            raise RuntimeError(f"non-positive dilation is not supported: dilation should be greater than zero; got dilation={list(dilation_pair)}")
    return Arguments(stride_pair, _four(padding, (kernel[0], kernel[1]), dilation_pair), dilation_pair, groups, padding_mode)


def _integer(value: Any, name: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, bool) or not hasattr(value, "__index__") or (isinstance(value, Tensor) and (value.dim() or value.is_floating_point())):
        raise TypeError(f"conv2d(): argument '{name}' must be int or a tuple of ints, not {type(value).__name__}")
    else:
        number = operator.index(value)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"Overflow when unpacking long long: argument '{name}' of conv2d() is {number}")
    return number


def _numbers(value: Any, name: str) -> list[int]:
    return [_integer(v, name) for v in value] if isinstance(value, (tuple, list)) else [_integer(value, name)]


def _pair(value: Any, name: str) -> tuple[int, int]:
    numbers = _numbers(value, name)
    if len(numbers) not in (1, 2):
        raise RuntimeError(f"expected {name} to be a single integer value or a list of 2 values to match the convolution dimensions, but got {name}={numbers}")
    return numbers[0], numbers[-1]


def _four(padding: Any, kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int, int, int]:
    if isinstance(padding, bytes):
        padding = padding.decode(errors="replace")
    if isinstance(padding, str):
        if padding == "valid":
            return 0, 0, 0, 0
        if padding == "same":
            return same_padding(kernel, dilation)
        raise RuntimeError(f"Invalid padding string: '{padding}'")
    numbers = _numbers(padding, "padding")
    if len(numbers) == 4:
        return numbers[0], numbers[1], numbers[2], numbers[3]
    if len(numbers) not in (1, 2):
        raise RuntimeError(
            "expected padding to be a single integer value or a list of 2 values to match the convolution dimensions, or of 4 values "
            f"(left, right, top, bottom), but got padding={numbers}"
        )
    rows, columns = numbers[0], numbers[-1]
    return columns, columns, rows, rows


def check(input_shape: Sequence[int], weight_shape: Sequence[int], bias_shape: Sequence[int] | None, arguments: Arguments) -> None:
    """Raise RuntimeError where the shapes (n, c, h, w) or (c, h, w), (k, c/g, r, s) and (k) do not make a convolution."""
    padding, groups = arguments.padding, arguments.groups
    if len(input_shape) not in (3, 4):
        raise RuntimeError(f"Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: {list(input_shape)}")
    if len(weight_shape) < 3:
        raise RuntimeError("weight should have at least three dimensions")
    if len(weight_shape) != 4:
        ndim = len(weight_shape)
        raise RuntimeError(
            f"Expected {ndim}-dimensional input for {ndim}-dimensional weight {list(weight_shape)}, but got 4-dimensional input of size "
            f"{list(input_shape)} instead"
        )
    if arguments.padding_mode == "zeros" and (padding[0] < 0 or padding[1] < 0 or padding[2] < 0 or padding[3] < 0):
        raise RuntimeError(f"negative padding is not supported; got padding={list(padding)} (left, right, top, bottom)")
    if weight_shape[0] < groups:
        raise RuntimeError(
            f"Given groups={groups}, expected weight to be at least {groups} at dimension 0, but got weight of size {list(weight_shape)} instead"
        )
    if weight_shape[0] % groups != 0:
        raise RuntimeError(
            f"Given groups={groups}, expected weight to be divisible by {groups} at dimension 0, but got weight of size [{list(weight_shape)}] instead"
        )
    if input_shape[-3] != weight_shape[1] * groups:
        raise RuntimeError(
            f"Given groups={groups}, weight of size {list(weight_shape)}, expected input{list(input_shape)} to have {weight_shape[1] * groups} "
            f"channels, but got {input_shape[-3]} channels instead"
        )
    if bias_shape is not None and (len(bias_shape) != 1 or bias_shape[0] != weight_shape[0]):
        raise RuntimeError(
            f"Given weight of size {list(weight_shape)}, expected bias to be 1-dimensional with {weight_shape[0]} elements, but got bias of size "
            f"{list(bias_shape)} instead"
        )
    if weight_shape[2] == 0 or weight_shape[3] == 0:
        raise RuntimeError(f"kernel size should be greater than zero, but got weight of size {list(weight_shape)}")
    _check_extent(input_shape, weight_shape, arguments)


def _check_extent(input_shape: Sequence[int], weight_shape: Sequence[int], arguments: Arguments) -> None:
    left, right, top, bottom = arguments.padding
    h, w = input_shape[-2], input_shape[-1]
    padded = h + top + bottom, w + left + right
    kernel = arguments.dilation[0] * (weight_shape[2] - 1) + 1, arguments.dilation[1] * (weight_shape[3] - 1) + 1
    if padded[0] > LIMIT or padded[1] > LIMIT:
        raise RuntimeError(f"Given padding={list(arguments.padding)} (left, right, top, bottom), expected a padded input of at most {LIMIT} rows and columns")
    if padded[0] < kernel[0] or padded[1] < kernel[1]:
        raise RuntimeError(
            f"Calculated padded input size per channel: ({padded[0]} x {padded[1]}). Kernel size: ({kernel[0]} x {kernel[1]}). "
            "Kernel size can't be greater than actual input size"
        )
    if (h == 0 or w == 0) and input_shape[-3] != 0 and (len(input_shape) == 3 or input_shape[0] != 0):
        raise RuntimeError(f"Only zero batch or zero channel inputs are supported, but got input shape: {list(input_shape)}")
    if arguments.padding_mode != "zeros":
        _check_mode(input_shape, arguments)


def _check_mode(input_shape: Sequence[int], arguments: Arguments) -> None:
    """A reflection needs more elements than it copies, a wrap at least as many, an edge at least one."""
    left, right, top, bottom = arguments.padding
    if arguments.padding_mode != "circular" and (input_shape[-3] == 0 or input_shape[-2] == 0 or input_shape[-1] == 0):
        raise RuntimeError(
            f"Expected 3D or 4D (batch mode) tensor with possibly 0 batch size and other non-zero dimensions for input, but got: {list(input_shape)}"
        )
    for before, after, axis, position in ((left, right, -1, 4), (top, bottom, -2, 6)):
        size = input_shape[axis]
        if arguments.padding_mode == "reflect" and (before >= size or after >= size):
            raise RuntimeError(
                f"Argument #{position}: Padding size should be less than the corresponding input dimension, but got: padding "
                f"({before}, {after}) at dimension {len(input_shape) + axis} of input {list(input_shape)}"
            )
        if arguments.padding_mode == "circular" and (before > size or after > size):
            raise RuntimeError("Padding value causes wrapping around more than once.")


def check_problem(problem: ConvProblem) -> None:
    """Raise ValueError where a problem, whose text may say anything, is no convolution of tensors that 64 bits can address."""
    arguments = Arguments(problem.stride, problem.padding, problem.dilation, problem.g, problem.padding_mode)
    try:
        arguments = normalize((problem.r, problem.s), *arguments)
        check(problem.input_shape, problem.weight_shape, None, arguments)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"not a convolution: '{problem}': {error}") from None
    for shape in (problem.input_shape, problem.weight_shape, problem.output_shape):
        if math.prod(shape) * DTYPES[problem.dtype] >= 2**63:
            raise ValueError(f"not a convolution: '{problem}': a tensor of size {list(shape)} is beyond 64 bits")


def output_size(input_size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> tuple[int, int]:
    """Output (rows, columns) of arguments in one form: ``(size + padding - dilation * (kernel - 1) - 1) // stride + 1``."""
    left, right, top, bottom = padding
    return (
        (input_size[0] + top + bottom - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1,
        (input_size[1] + left + right - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1,
    )


def conv2d_output_size(input_size: Sizes, kernel_size: Sizes, stride: Sizes = 1, padding: Padding = 0, dilation: Sizes = 1) -> tuple[int, int]:
    """Rows and columns that a convolution of an input of ``input_size`` has.

    Takes the argument forms of :func:`faltung.conv2d`.  Raises what it raises: TypeError, ValueError, RuntimeError.
    """
    size, kernel = _pair(input_size, "input_size"), _pair(kernel_size, "kernel_size")
    arguments = normalize(kernel, stride, padding, dilation, 1, "zeros")
    check((1, 1, *size), (1, 1, *kernel), None, arguments)
    return output_size(size, kernel, arguments.stride, arguments.padding, arguments.dilation)
