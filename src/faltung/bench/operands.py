"""Tensors for a problem."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from ..problem import ConvProblem, Format

__all__ = ["TORCH_DTYPES", "Operands", "make_operands", "pad_stock"]

TORCH_DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class Operands:
    """The tensors of one problem in its format: x, weight, bias (or None) and the gradient of the output."""

    problem: ConvProblem
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    gradient: torch.Tensor

    def to(self, fmt: Format) -> Operands:
        """The same values with activations and weight in another memory format, as ``model.to(memory_format=...)`` leaves them."""
        layout = torch.channels_last if fmt == "nhwc" else torch.contiguous_format
        x, weight, gradient = (t.contiguous(memory_format=layout) for t in (self.x, self.weight, self.gradient))
        return Operands(replace(self.problem, format=fmt, weight_format=fmt), x, weight, self.bias, gradient)

    def astype(self, dtype: torch.dtype) -> Operands:
        """The same values in another element type, row-major."""
        bias = None if self.bias is None else self.bias.to(dtype)
        x, weight, gradient = (t.contiguous().to(dtype) for t in (self.x, self.weight, self.gradient))
        return Operands(self.problem, x, weight, bias, gradient)


def make_operands(problem: ConvProblem, seed: int = 0) -> Operands:
    """Normally distributed operands of ``problem`` in NCHW, scaled so that outputs are of order one, rounded to the problem's type."""
    generator = torch.Generator().manual_seed(seed)
    dtype = TORCH_DTYPES[problem.dtype]

    def normal(shape: Sequence[int], scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(tuple(shape), generator=generator) * scale).to(dtype)

    fan_in = problem.cg * problem.r * problem.s
    bias = normal((problem.k,)) if problem.epilogue.bias else None
    return Operands(problem, normal(problem.input_shape), normal(problem.weight_shape, 1 / math.sqrt(max(1, fan_in))), bias, normal(problem.output_shape))


def pad_stock(x: torch.Tensor, problem: ConvProblem) -> torch.Tensor:
    """The padded copy that PyTorch makes of an input for what its convolution itself cannot pad."""
    mode = "constant" if problem.padding_mode == "zeros" else problem.padding_mode
    return functional.pad(x, problem.padding, mode=mode)
