"""The convolution by its definition: the oracle of the tests, never dispatched.

Arrays are NumPy's, in any memory order, of float64 or, to judge float64 itself, ``numpy.longdouble``: results have the type of the operands.  No
convolution of another library is used.  The padding modes are index maps: every padded row or column names the row or column of the input that it
reads, or none.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .problem import ConvProblem

__all__ = ["Array", "forward", "grad_input", "grad_weight", "source_indices"]

Array: TypeAlias = npt.NDArray[np.floating]


def source_indices(size: int, before: int, after: int, mode: str) -> npt.NDArray[np.int64]:
    """For every index of a padded axis the index of the axis that it reads; -1 for a zero.  Negative padding crops."""
    index = np.arange(-before, size + after)
    if mode == "zeros":
        return np.where((index < 0) | (index >= size), -1, index)
    if mode == "replicate":
        return np.clip(index, 0, size - 1)
    if mode == "circular":
        return index % size
    if mode == "reflect":
        index = np.abs(index)
        return np.where(index >= size, 2 * (size - 1) - index, index)
    raise ValueError(f"unknown padding mode {mode!r}")


def _maps(problem: ConvProblem) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    left, right, top, bottom = problem.padding
    return source_indices(problem.h, top, bottom, problem.padding_mode), source_indices(problem.w, left, right, problem.padding_mode)


def _padded(problem: ConvProblem, x: Array) -> Array:
    """(n, g, c/g, padded h, padded w)."""
    rows, columns = _maps(problem)
    padded = x[:, :, rows][:, :, :, columns]
    padded[:, :, rows < 0] = 0
    padded[:, :, :, columns < 0] = 0
    return padded.reshape(problem.n, problem.g, problem.cg, len(rows), len(columns))


def _window(problem: ConvProblem, i: int, j: int) -> tuple[slice, slice]:
    """The padded rows and columns that meet tap (i, j) of the kernel."""
    top, left = i * problem.dilation[0], j * problem.dilation[1]
    return (
        slice(top, top + (problem.p - 1) * problem.stride[0] + 1, problem.stride[0]),
        slice(left, left + (problem.q - 1) * problem.stride[1] + 1, problem.stride[1]),
    )


def forward(problem: ConvProblem, x: Array, w: Array, bias: Array | None = None) -> Array:
    """Output (n, k, p, q) of x (n, c, h, w), w (k, c/g, r, s) and bias (k)."""
    padded = _padded(problem, x)
    weight = w.reshape(problem.g, problem.kg, problem.cg, problem.r, problem.s)
    y = np.zeros((problem.n, problem.g, problem.kg, problem.p * problem.q), x.dtype)
    for i in range(problem.r):
        for j in range(problem.s):
            rows, columns = _window(problem, i, j)
            taken = padded[:, :, :, rows, columns].reshape(problem.n, problem.g, problem.cg, -1)
            y += weight[:, :, :, i, j] @ taken
    output: Array = y.reshape(problem.output_shape)
    return output if bias is None else output + bias[:, None, None]


def grad_input(problem: ConvProblem, grad_output: Array, w: Array) -> Array:
    """The gradient (n, c, h, w) of x: every padded element's share, added up where it was read from."""
    rows, columns = _maps(problem)
    gy = grad_output.reshape(problem.n, problem.g, problem.kg, problem.p * problem.q)
    weight = w.reshape(problem.g, problem.kg, problem.cg, problem.r, problem.s)
    padded = np.zeros((problem.n, problem.g, problem.cg, len(rows), len(columns)), w.dtype)
    for i in range(problem.r):
        for j in range(problem.s):
            share = weight[:, :, :, i, j].transpose(0, 2, 1) @ gy
            window = _window(problem, i, j)
            padded[:, :, :, window[0], window[1]] += share.reshape(problem.n, problem.g, problem.cg, problem.p, problem.q)
    flat = padded.reshape(problem.n, problem.c, len(rows), len(columns))
    by_rows = np.zeros((problem.n, problem.c, problem.h, len(columns)), w.dtype)
    for at, source in enumerate(rows):
        if source >= 0:
            by_rows[:, :, source] += flat[:, :, at]
    result = np.zeros(problem.input_shape, w.dtype)
    for at, source in enumerate(columns):
        if source >= 0:
            result[..., source] += by_rows[..., at]
    return result


def grad_weight(problem: ConvProblem, x: Array, grad_output: Array) -> tuple[Array, Array]:
    """The gradients (k, c/g, r, s) of w and (k) of the bias."""
    padded = _padded(problem, x)
    gy = grad_output.reshape(problem.n, problem.g, problem.kg, problem.p * problem.q)
    result = np.zeros((problem.g, problem.kg, problem.cg, problem.r, problem.s), x.dtype)
    for i in range(problem.r):
        for j in range(problem.s):
            rows, columns = _window(problem, i, j)
            taken = padded[:, :, :, rows, columns].reshape(problem.n, problem.g, problem.cg, -1)
            result[..., i, j] = (gy @ taken.transpose(0, 1, 3, 2)).sum(axis=0)
    return result.reshape(problem.weight_shape), grad_output.sum(axis=(0, 2, 3))
