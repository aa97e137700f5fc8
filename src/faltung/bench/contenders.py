"""What is compared: faltung through its public path, and stock PyTorch.  A contender is a function without arguments that returns the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from ..problem import Format
from .operands import Operands, pad_stock

__all__ = ["Call", "Contender", "ours", "ours_call", "stock", "stock_call"]

Call = Callable[[], tuple[torch.Tensor, ...]]


@dataclass
class Contender:
    """One column of a comparison.  ``implementation`` names the algorithm, where it can be told; ``version`` that of the peer's package, ``pool``
    the threads that it runs on."""

    provider: str
    format: Format
    call: Call
    implementation: str = ""
    version: str = field(default_factory=lambda: torch.__version__)
    refused: bool = False
    pool: str = "openmp"


def ours(operands: Operands) -> Contender:
    """faltung; raises :class:`faltung.dispatch.Unsupported` where no implementation takes the problem."""
    from .. import __version__, dispatch

    decision = dispatch.decide(operands.problem, "cpu", torch.get_num_threads())
    return Contender("faltung", operands.problem.format, ours_call(operands), decision.plan.implementation, __version__)


def stock(operands: Operands) -> Contender:
    """PyTorch's own convolution."""
    return Contender("stock", operands.problem.format, stock_call(operands), "aten")


def stock_call(operands: Operands) -> Call:
    """The call that PyTorch's users and its autograd make.

    Padding that its convolution does not know is a padded copy, inside the time; a gradient through that copy is autograd's, its graph made
    beforehand.
    """
    problem = operands.problem
    left, right, top, bottom = problem.padding
    plain = problem.padding_mode == "zeros" and (left, top) == (right, bottom)
    x, weight, bias, gradient = operands.x, operands.weight, operands.bias, operands.gradient
    stride, dilation, groups = problem.stride, problem.dilation, problem.g

    if problem.direction == "forward":

        def forward() -> tuple[torch.Tensor, ...]:
            with torch.no_grad():
                padded = x if plain else pad_stock(x, problem)
                return (functional.conv2d(padded, weight, bias, stride, (top, left) if plain else 0, dilation, groups),)

        return forward
    if plain:
        to_input = problem.direction == "grad_input"
        with_bias = problem.epilogue.bias and not to_input
        mask = [to_input, not to_input, with_bias]
        sizes = [problem.k] if with_bias else None

        def backward() -> tuple[torch.Tensor, ...]:
            found = torch.ops.aten.convolution_backward(gradient, x, weight, sizes, stride, (top, left), dilation, False, (0, 0), groups, mask)
            return tuple(t for t, wanted in zip(found, mask) if wanted)

        return backward
    return _through_autograd(operands)


def _through_autograd(operands: Operands) -> Call:
    problem = operands.problem
    leaves = [operands.x] if problem.direction == "grad_input" else [operands.weight] + ([] if operands.bias is None else [operands.bias])
    leaves = [t.detach().requires_grad_() for t in leaves]
    if problem.direction == "grad_input":
        x, weight, bias = leaves[0], operands.weight, None
    else:
        x, weight, bias = operands.x, leaves[0], leaves[1] if len(leaves) > 1 else None
    output = functional.conv2d(pad_stock(x, problem), weight, bias, problem.stride, 0, problem.dilation, problem.g)
    return lambda: torch.autograd.grad(output, leaves, operands.gradient, retain_graph=True)


def ours_call(operands: Operands) -> Call:
    """Faltung's own call: the public function forward, the functions below autograd for the gradients."""
    import faltung

    problem = operands.problem
    x, weight, bias = operands.x, operands.weight, operands.bias
    left, right, top, bottom = problem.padding
    padding = (top, left) if (left, top) == (right, bottom) else (left, right, top, bottom)

    def forward() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return (faltung.conv2d(x, weight, bias, problem.stride, padding, problem.dilation, problem.g, padding_mode=problem.padding_mode),)

    if problem.direction == "forward":
        return forward
    return _ours_gradient(operands)


def _ours_gradient(operands: Operands) -> Call:
    """What the backward pass of a plain eager call runs, without autograd's own bookkeeping, which stock's call does not pay either."""
    from ..arguments import Arguments
    from ..prepared import prepare

    problem = operands.problem
    x, weight, gradient, with_bias = operands.x, operands.weight, operands.gradient, problem.epilogue.bias
    prepared = prepare(x, weight, operands.bias, Arguments(problem.stride, problem.padding, problem.dilation, problem.g, problem.padding_mode))
    if problem.direction == "grad_input":
        return lambda: (prepared.grad_input(gradient, weight),)

    def grad_weight() -> tuple[torch.Tensor, ...]:
        of_weight, of_bias = prepared.grad_weight(x, gradient, with_bias)
        return (of_weight,) if of_bias is None else (of_weight, of_bias)

    return grad_weight
