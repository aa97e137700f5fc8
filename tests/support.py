"""Comparisons that the tests of the drop-in share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.testing._internal.common_dtype import floating_types_and

from faltung.testing import error_bound

DTYPES = tuple(floating_types_and(torch.bfloat16, torch.float16))
assert len(DTYPES) == 4


def outcome(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of a call, or the exception that it raised."""
    try:
        return call(*args, **kwargs)
    except Exception as error:
        return error


def double(value: Any) -> Any:
    """A float64 leaf for every tensor in a list or tuple, other values as they are."""
    if isinstance(value, Tensor):
        return value.detach().double().requires_grad_(value.requires_grad)
    return [double(v) for v in value] if isinstance(value, (list, tuple)) else value


def leaves(value: Sequence[Any]) -> list[Tensor]:
    return [v for v in value if isinstance(v, Tensor) and v.requires_grad]


def assert_as_close_as_stock(ours: Tensor, stocks: Tensor, exact: Tensor, what: str = "") -> None:
    """Shape, strides of dense results and dtype as PyTorch's, and an error within the bound of twice PyTorch's."""
    assert ours.shape == stocks.shape, f"{what}: shape {tuple(ours.shape)}, PyTorch's {tuple(stocks.shape)}"
    assert ours.dtype == stocks.dtype, f"{what}: {ours.dtype}, PyTorch's {stocks.dtype}"
    if ours.numel():
        error = (ours.detach().double() - exact.detach()).abs().max().item()
        bound = error_bound(exact.detach(), stocks.detach())
        if ours.dtype == torch.float64:  # here `exact` is itself a rounded sum
            bound += 64 * torch.finfo(torch.float64).eps * exact.abs().max().item()
        assert error <= bound, f"{what}: error {error:.3g} above {bound:.3g}"


def compare_with_stock(ours: Callable[..., Tensor], stock: Callable[..., Tensor], operands: Sequence[Any], what: str = "", strides: bool = True) -> None:
    """Output and every gradient of ``ours(*operands)`` against ``stock``, in the operands' type and in float64."""
    results = []
    for function, arguments in ((ours, list(operands)), (stock, list(operands)), (stock, double(list(operands)))):
        output = function(*arguments)
        torch.manual_seed(7)
        grad = torch.randn(output.shape, dtype=torch.float64)
        if output.dtype != torch.float64 or arguments is not operands:
            grad = grad.to(operands[0].dtype).to(output.dtype)
        wanted = leaves(arguments)
        results.append((output, *(torch.autograd.grad(output, wanted, grad) if wanted else ())))
    if strides:
        assert results[0][0].stride() == results[1][0].stride(), f"{what}: strides {results[0][0].stride()}, PyTorch's {results[1][0].stride()}"
    for place, (mine, theirs, exact) in enumerate(zip(*results)):
        assert_as_close_as_stock(mine, theirs, exact, f"{what} {'output' if place == 0 else f'gradient {place}'}")
