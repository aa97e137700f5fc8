"""``faltung.Conv2d`` is a ``torch.nn.Conv2d``: state, copies, parametrizations, padding modes, lazy modules."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import faltung
from support import compare_with_stock


def _pair(*args: Any, **kwargs: Any) -> tuple[faltung.Conv2d, nn.Conv2d]:
    ours, stock = faltung.Conv2d(*args, **kwargs), nn.Conv2d(*args, **kwargs)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def _compare(ours: nn.Module, stock: nn.Module, x: torch.Tensor, strides: bool = True) -> None:
    operands = [x.detach().requires_grad_(), stock.weight.detach().requires_grad_()]
    if stock.bias is not None:
        operands.append(stock.bias.detach().requires_grad_())

    def call(module: nn.Module) -> Any:
        return lambda v, *parameters: torch.func.functional_call(module, dict(zip(("weight", "bias"), parameters)), (v,))

    compare_with_stock(call(ours), call(stock), operands, repr(stock), strides=strides)


CONFIGURATIONS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((4, 6, 3), {}),
    ((4, 6, (3, 2)), {"stride": (2, 1), "bias": False}),
    ((4, 6, 3), {"padding": (2, 1), "dilation": 2, "groups": 2}),
    ((4, 6, (3, 4)), {"padding": "same", "dilation": (1, 3)}),
    ((4, 6, 3), {"padding": "valid", "stride": 3}),
    *(
        ((4, 6, kernel), {"padding": padding, "padding_mode": mode, **more})
        for mode in ("reflect", "replicate", "circular")
        for kernel, padding, more in ((3, 1, {}), ((2, 4), "same", {}), (5, (2, 3), {"stride": 2, "groups": 2}), (3, 0, {}))
    ),
]


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("args", "kwargs"), CONFIGURATIONS, ids=str)
def test_module_computes_what_pytorch_computes(args: tuple[Any, ...], kwargs: dict[str, Any], channels_last: bool) -> None:
    ours, stock = _pair(*args, **kwargs)
    x = torch.randn(2, 4, 9, 8)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    # PyTorch's circular padding loses channels_last: here the format is kept
    _compare(ours, stock, x, strides=not (channels_last and stock.padding_mode == "circular"))
    assert ours(x).is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_unbatched_input(mode: str) -> None:
    ours, stock = _pair(4, 6, 3, padding=1, padding_mode=mode)
    _compare(ours, stock, torch.randn(4, 7, 6))


def test_is_a_torch_module_in_every_other_respect() -> None:
    ours, stock = _pair(4, 6, 3, stride=2, padding=1, padding_mode="circular", groups=2, bias=False)
    assert isinstance(ours, nn.Conv2d)
    assert repr(ours) == repr(stock)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert [name for name, _ in ours.named_parameters()] == ["weight"]
    torch.manual_seed(3)
    ours = faltung.Conv2d(4, 6, 3)
    torch.manual_seed(3)
    stock = nn.Conv2d(4, 6, 3)
    assert torch.equal(ours.weight, stock.weight)
    assert torch.equal(ours.bias, stock.bias)


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_copies(how: str) -> None:
    ours = faltung.Conv2d(4, 6, 3, padding="same", padding_mode="reflect")
    x = torch.randn(1, 4, 6, 6)
    if how == "pickle":
        copied = pickle.loads(pickle.dumps(ours))
    elif how == "deepcopy":
        copied = copy.deepcopy(ours)
    else:
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    assert type(copied) is faltung.Conv2d
    assert copied.weight is not ours.weight
    assert torch.equal(copied(x), ours(x))


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal, nn.utils.weight_norm])
def test_parametrized_weight(wrap: Any) -> None:
    stock = nn.Conv2d(4, 6, 3, padding=1)
    ours = faltung.Conv2d(4, 6, 3, padding=1)
    ours.load_state_dict(stock.state_dict())
    torch.manual_seed(5)
    stock = wrap(stock).eval()
    torch.manual_seed(5)
    ours = wrap(ours).eval()
    assert set(ours.state_dict()) == set(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(2, 4, 6, 6)
    ours(x).square().sum().backward()
    stock(x).square().sum().backward()
    for (name, mine), (_, theirs) in zip(ours.named_parameters(), stock.named_parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_lazy_module_becomes_ours() -> None:
    lazy = faltung.LazyConv2d(6, 3, padding=1, padding_mode="reflect")
    y = lazy(torch.randn(2, 5, 6, 6))
    assert type(lazy) is faltung.Conv2d
    assert y.shape == (2, 6, 6, 6)


def test_padding_mode_changed_on_a_made_module() -> None:
    ours, stock = _pair(4, 6, 3, padding=1)
    ours.padding_mode = stock.padding_mode = "circular"
    _compare(ours, stock, torch.randn(1, 4, 6, 6))


def test_four_numbers_pad_left_right_top_bottom() -> None:
    x, w = torch.randn(1, 3, 6, 7), torch.randn(4, 3, 3, 3)
    torch.testing.assert_close(faltung.conv2d(x, w, padding=(1, 0, 2, 3)), torch.conv2d(F.pad(x, (1, 0, 2, 3)), w))
    torch.testing.assert_close(faltung.conv2d(x, w, padding=[2, 1, 0, 3], padding_mode="reflect"), torch.conv2d(F.pad(x, (2, 1, 0, 3), mode="reflect"), w))
    module = faltung.Conv2d(3, 4, 3, padding=(1, 0, 2, 3))
    torch.testing.assert_close(module(x), torch.conv2d(F.pad(x, (1, 0, 2, 3)), module.weight, module.bias))


@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 5)])
def test_same_with_a_stride_takes_every_nth_output(kernel: tuple[int, int]) -> None:
    x, w = torch.randn(2, 3, 9, 8), torch.randn(4, 3, *kernel)
    dense = torch.conv2d(x, w, padding="same", dilation=(1, 2))
    torch.testing.assert_close(faltung.conv2d(x, w, stride=(2, 3), padding="same", dilation=(1, 2)), dense[:, :, ::2, ::3])


def test_negative_padding_of_a_mode_crops_as_pad_does() -> None:
    x, w = torch.randn(1, 3, 6, 7), torch.randn(4, 3, 2, 2)
    for mode in ("reflect", "replicate", "circular"):
        padding = (2, -3, -1, 1)
        torch.testing.assert_close(faltung.conv2d(x, w, padding=padding, padding_mode=mode), torch.conv2d(F.pad(x, padding, mode=mode), w))


def test_training_step_changes_parameters_as_stock() -> None:
    ours, stock = _pair(3, 8, 3, padding=1)
    x = torch.randn(4, 3, 8, 8)
    for module in (ours, stock):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, stock.weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.bias, stock.bias, rtol=1e-4, atol=1e-6)


def test_gradient_of_a_channels_last_weight_is_stolen_not_copied() -> None:
    module = faltung.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    module(torch.randn(1, 4, 6, 6)).sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.stride() == module.weight.stride()
