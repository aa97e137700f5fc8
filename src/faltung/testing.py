"""Help for tests: operands, oracles, an error bound, and memory that tells who wrote where.  Nothing here is dispatched.

The oracles are :mod:`faltung.reference` (float64, exact for small integers) and PyTorch's own convolution on an explicitly padded copy.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, layout, reference
from .problem import ConvProblem, Format

__all__ = ["TORCH_DTYPES", "Guarded", "Inputs", "Result", "error_bound", "exact", "guarded_run", "make_inputs", "rounded", "run", "stock"]

TORCH_DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
_GUARD = 4096
_CANARY = 0xA5


@dataclass(frozen=True)
class Inputs:
    """The operands of every direction, each dense in its format: x (n, c, h, w), w (k, c/g, r, s), bias (k), gy (n, k, p, q)."""

    x: Tensor
    w: Tensor
    bias: Tensor
    gy: Tensor

    def read_by(self, problem: ConvProblem) -> tuple[Tensor, Tensor]:
        """The two that the problem's direction reads, in the order in which a plan takes them."""
        return {"forward": (self.x, self.w), "grad_input": (self.gy, self.w), "grad_weight": (self.x, self.gy)}[problem.direction]


@dataclass(frozen=True)
class Result:
    """What a direction writes: ``main`` is y, the gradient of x or the gradient of w; ``bias`` the gradient of the bias, where asked for."""

    main: Tensor
    bias: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.main,) if self.bias is None else (self.main, self.bias))


def make_inputs(problem: ConvProblem, seed: int = 0, integers: bool = False) -> Inputs:
    """Random operands of a problem, the same for the same seed.

    ``integers``: whole numbers from -2 to 2, so that every sum of fewer than four million products is exact in float32.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = TORCH_DTYPES[problem.dtype]

    def make(shape: tuple[int, ...], fmt: Format) -> Tensor:
        if integers:
            values = torch.randint(-2, 3, shape, generator=generator).to(dtype)
        else:
            values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        return _in_format(values, fmt)

    return Inputs(
        make(problem.input_shape, problem.format),
        make(problem.weight_shape, problem.weight_format),
        make((problem.k,), "nchw"),
        make(problem.output_shape, problem.format),
    )


def _in_format(values: Tensor, fmt: Format) -> Tensor:
    if values.dim() != 4:
        return values
    strides = layout.strides_of(values.shape, fmt)
    return torch.empty_strided(values.shape, strides, dtype=values.dtype).copy_(values)


def exact(problem: ConvProblem, inputs: Inputs) -> Result:
    """The problem's result in float64, by its definition, summed up in more bits where the problem is itself of float64."""
    precision = np.longdouble if problem.dtype == "f64" else np.float64
    x, w, bias, gy = (t.double().numpy().astype(precision) for t in (inputs.x, inputs.w, inputs.bias, inputs.gy))
    results: tuple[reference.Array, ...]
    if problem.direction == "forward":
        results = (reference.forward(problem, x, w, bias if problem.epilogue.bias else None),)
    elif problem.direction == "grad_input":
        results = (reference.grad_input(problem, gy, w),)
    else:
        results = reference.grad_weight(problem, x, gy)[: 2 if problem.epilogue.bias else 1]
    return Result(*(torch.from_numpy(r.astype(np.float64)) for r in results))


def rounded(problem: ConvProblem, result: Result) -> Result:
    """A float64 result rounded once to the problem's type: what a kernel must give exactly for whole numbers."""
    dtype = TORCH_DTYPES[problem.dtype]
    return Result(*(t.to(dtype) for t in result))


def stock(problem: ConvProblem, inputs: Inputs) -> Result:
    """PyTorch's own result, on a padded copy where its convolution has no such padding."""
    with torch.enable_grad():
        x, w, bias = (t.detach().requires_grad_() for t in (inputs.x, inputs.w, inputs.bias))
        left, right, top, bottom = problem.padding
        # PyTorch 2.14 writes outside of its buffers in the weight's gradient of some 1x1 layers with a stride, and the process dies
        stride, sliced = problem.stride, (problem.r, problem.s) == (1, 1) and problem.stride != (1, 1)
        if problem.padding_mode == "zeros" and (left, top) == (right, bottom) and not sliced:
            padded, padding = x, (top, left)
        else:
            padded, padding = F.pad(x, problem.padding, mode="constant" if problem.padding_mode == "zeros" else problem.padding_mode), (0, 0)
        if sliced:
            padded, stride = padded[:, :, :: stride[0], :: stride[1]], (1, 1)
        y = F.conv2d(padded, w, bias if problem.epilogue.bias else None, stride, padding, problem.dilation, problem.g)
        if problem.direction == "forward":
            return Result(y.detach())
        wanted = {"grad_input": (x,), "grad_weight": (w, bias) if problem.epilogue.bias else (w,)}[problem.direction]
        return Result(*torch.autograd.grad(y, wanted, inputs.gy))


def empty_result(problem: ConvProblem, device: torch.device | str = "cpu") -> Tensor:
    """Memory, not written yet, for what the problem's direction produces."""
    shape = problem.result_shape
    return torch.empty_strided(shape, layout.strides_of(shape, problem.result_format), dtype=TORCH_DTYPES[problem.dtype], device=device)


def error_bound(exact_result: Tensor, stock_result: Tensor) -> float:
    """The largest absolute error allowed to a direct algorithm: twice PyTorch's own, and four units in the last place of the largest element.

    ``exact_result`` is float64, ``stock_result`` has the type whose precision counts; both have one shape.
    """
    if exact_result.numel() == 0:
        return 0.0
    own = (stock_result.double() - exact_result).abs().max().item()
    return 2 * own + 4 * torch.finfo(stock_result.dtype).eps * exact_result.abs().max().item()


def run(problem: ConvProblem, inputs: Inputs, *, threads: int = 1) -> Result:
    """The problem's result from the implementation that is chosen for it under the options in force."""
    return guarded_run(problem, inputs, threads=threads, guard=False)


def guarded_run(problem: ConvProblem, inputs: Inputs, *, threads: int = 1, guard: bool = True) -> Result:
    """As :func:`run`, with every operand at the end of readable memory, the outputs NaN before the launch and canaries in front of them.

    A read or write behind an operand ends the process with a segmentation fault; a write in front of an output, or an output element that is
    not written where the exact result is a number, raises AssertionError.
    """
    plan = dispatch.decide(problem, "cpu", threads).plan
    bias = inputs.bias
    first, second = inputs.read_by(problem)
    out = empty_result(problem).fill_(float("nan"))
    side = None if not problem.epilogue.bias else bias.clone() if problem.direction == "forward" else torch.full_like(bias, float("nan"))
    guards = [Guarded(t) for t in (first, second, out, side) if t is not None] if guard else []
    if guards:
        first, second, out = (g.tensor for g in guards[:3])
        side = guards[3].tensor if side is not None else None
    plan.launch(first.data_ptr(), second.data_ptr(), 0 if side is None else side.data_ptr(), out.data_ptr())
    assert all(g.intact() for g in guards), f"{plan.implementation} wrote in front of an operand of '{problem}'"
    return Result(out, side if problem.direction == "grad_weight" else None)


class Guarded:
    """A copy of a dense tensor whose last byte lies before a page that must not be touched, with canaries in front of its first."""

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        pages = -(-(size + _GUARD) // mmap.PAGESIZE)
        memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        base = ctypes.addressof((ctypes.c_char * len(memory)).from_buffer(memory))
        end = pages * mmap.PAGESIZE
        ctypes.memset(base, _CANARY, end)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(base + end), ctypes.c_size_t(mmap.PAGESIZE), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
        self._address = base + end - size - _GUARD
        flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=end - size)
        self.tensor = flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    def intact(self) -> bool:
        """Whether the canaries live."""
        return ctypes.string_at(self._address, _GUARD) == bytes([_CANARY]) * _GUARD


@contextmanager
def thread_count(count: int) -> Iterator[None]:
    """PyTorch's number of threads inside the ``with`` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
