"""A layer's repeated call skips the signature of its operands; whatever makes the call another one must be noticed."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import faltung
from faltung import functional
from support import outcome


@pytest.fixture
def longer_way(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that were looked up by their signature."""
    calls: list[Any] = []
    inner = functional._by_signature

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return inner(*args, **kwargs)

    monkeypatch.setattr(functional, "_by_signature", counted)
    monkeypatch.setattr(functional, "_repeated", {})
    return calls


def _layer(**kwargs: Any) -> faltung.Conv2d:
    torch.manual_seed(0)
    return faltung.Conv2d(4, 6, 3, padding=1, **kwargs)


def _x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 4, 7, 8)), generator=torch.Generator().manual_seed(1))


def _wanted(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return torch.nn.functional.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_a_repeated_call_skips_the_longer_way(bias: bool, grad: bool, longer_way: list[Any]) -> None:
    layer, x = _layer(bias=bias), _x().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        for _ in range(4):
            y = layer(x)
            torch.testing.assert_close(y, _wanted(layer, x))
    assert len(longer_way) == 1
    if grad:
        y.sum().backward()
        ours = x.grad
        x.grad = None
        _wanted(layer, x).sum().backward()
        torch.testing.assert_close(ours, x.grad)


def test_derivatives_are_those_of_each_call(longer_way: list[Any]) -> None:
    layer, x = _layer(), _x()
    layer(x)
    with torch.no_grad():
        assert not layer(x).requires_grad
    assert layer(x).requires_grad
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    layer.bias.requires_grad_()
    layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((6,), 2.0 * 7 * 8))
    layer.requires_grad_(False)
    assert layer(x.clone().requires_grad_()).requires_grad
    assert len(longer_way) == 4


class _Subclass(Tensor):
    pass


class _FunctionMode(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class _DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


_INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "size": lambda x: x[:, :, :5],
    "batch": lambda x: x[:1],
    "unbatched": lambda x: x[0],
    "strides": lambda x: x.transpose(2, 3),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "requires_grad": lambda x: x.clone().requires_grad_(),
    "negated": torch._neg_view,
    "subclass": lambda x: x.as_subclass(_Subclass),  # type: ignore[arg-type]
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("name", _INPUTS)
def test_another_input_is_noticed(name: str, longer_way: list[Any]) -> None:
    layer, x = _layer(), _x()
    layer(x)
    other = _INPUTS[name](x)
    ours, stock = layer(other), _wanted(layer, other)
    assert len(longer_way) == (3 if name == "subclass" else 2)  # a subclass's function calls it again
    assert type(ours) is type(stock)
    torch.testing.assert_close(ours, stock, check_stride=True)


_WITHOUT_STRIDES: dict[str, Callable[[Tensor], Any]] = {
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "mkldnn": lambda x: x.to_mkldnn(),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "csr": lambda x: x[0, 0].to_sparse_csr(),
    "none": lambda _: None,
    "number": lambda _: 1.0,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", _WITHOUT_STRIDES)
def test_operands_without_strides_after_a_known_call(name: str) -> None:
    """PyTorch's guard ends the process where it asks such a tensor for its sizes."""
    layer, x = _layer(), _x()
    operands = [x, layer.weight.detach(), layer.bias.detach()]
    for position in range(3):
        for _ in range(3):
            functional.conv2d(*operands)  # known
        other = list(operands)
        other[position] = _WITHOUT_STRIDES[name](operands[position] if operands[position].dim() == 4 else _x())
        ours, stock = outcome(functional.conv2d, *other), outcome(torch.conv2d, *other)
        assert type(ours) is type(stock), (ours, stock)


@contextmanager
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "function mode": _FunctionMode,
    "dispatch mode": _DispatchMode,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "threads": _threads,
    "options": lambda: faltung.config.override(reproducible=not faltung.config.reproducible),
    "dual level": forward_ad.dual_level,
    "device": lambda: torch.device("cpu"),
}


@pytest.mark.parametrize("name", _AROUND)
def test_what_is_around_a_call_is_noticed(name: str, longer_way: list[Any]) -> None:
    layer, x = _layer(), _x()
    layer(x)
    with _AROUND[name]():
        ours, stock = layer(x), _wanted(layer, x)
    assert len(longer_way) == 2
    assert ours.dtype == stock.dtype
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if ours.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(ours, stock, **tolerance)


def test_transforms_and_tangents_are_noticed(longer_way: list[Any]) -> None:
    layer, x = _layer(), _x()
    layer(x)
    one = x[:1]
    layer(one)
    mapped = torch.func.vmap(lambda image: layer(image[None])[0])(x)
    torch.testing.assert_close(mapped, _wanted(layer, x))
    gradient = torch.func.grad(lambda v: layer(v).sum())(x)
    torch.testing.assert_close(gradient, torch.func.grad(lambda v: _wanted(layer, v).sum())(x))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    torch.testing.assert_close(tangent, _wanted(layer, torch.ones_like(x)) - layer.bias[:, None, None])
    with pytest.warns(FutureWarning, match="trace"):
        traced = torch.jit.trace(layer.requires_grad_(False), x, check_trace=False)
    assert "faltung" in str(traced.graph)
    assert len(longer_way) == 6


def _half(layer: nn.Conv2d) -> None:
    layer.bfloat16()


def _data(layer: nn.Conv2d) -> None:
    layer.weight.data = torch.randn(6, 4, 1, 1)
    layer.padding = (0, 0)


def _format(layer: nn.Conv2d) -> None:
    layer.to(memory_format=torch.channels_last)


def _stride(layer: nn.Conv2d) -> None:
    layer.stride = (2, 1)


def _dilation(layer: nn.Conv2d) -> None:
    layer.dilation = (2, 1)


def _groups(layer: nn.Conv2d) -> None:
    layer.groups = 2
    layer.weight.data = layer.weight.data[:, :2].contiguous()


def _bias(layer: nn.Conv2d) -> None:
    layer.bias = None


def _weight(layer: nn.Conv2d) -> None:
    layer.weight = nn.Parameter(torch.randn(6, 4, 3, 5))


@pytest.mark.parametrize("change", [_half, _data, _format, _stride, _dilation, _groups, _bias, _weight], ids=lambda f: f.__name__[1:])
def test_another_layer_is_noticed(change: Callable[[nn.Conv2d], None], longer_way: list[Any]) -> None:
    layer, x = _layer(), _x()
    layer(x)
    layer(x)
    change(layer)
    x = x.to(layer.weight.dtype)
    ours, stock = layer(x), _wanted(layer, x)
    assert len(longer_way) == 2
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if x.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(ours, stock, check_stride=True, **tolerance)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_padding_mode_set_later_is_noticed(mode: str) -> None:
    layer, x = _layer(), _x()
    layer(x)
    layer.padding_mode = mode
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode=mode)
    torch.testing.assert_close(layer(x), torch.nn.functional.conv2d(padded, layer.weight, layer.bias))


def test_refused_arguments_are_refused_when_the_call_was_known() -> None:
    layer, x = _layer(), _x()
    layer(x)
    layer.stride = (1.0, 1.0)
    with pytest.raises(TypeError):
        layer(x)
    layer.stride = (1, 1)
    with pytest.raises(RuntimeError, match="expected input"):
        layer(_x(2, 5, 7, 8))
    with pytest.raises(TypeError):
        layer(None)
    torch.testing.assert_close(layer(x), _wanted(layer, x))


def test_calls_that_alternate_make_no_guards_but_the_first(monkeypatch: pytest.MonkeyPatch, longer_way: list[Any]) -> None:
    made: list[Any] = []
    inner = functional.TensorGuards
    monkeypatch.setattr(functional, "TensorGuards", lambda *args, **kwargs: made.append(args) or inner(*args, **kwargs))
    layer, sizes = _layer(), [_x(1, 4, 5 + i, 6) for i in range(5)]
    for _ in range(40):
        for x in sizes:
            torch.testing.assert_close(layer(x), _wanted(layer, x))
    assert len(made) == 1
    assert len(longer_way) == 1 + 40 * 4  # the first size stays known
    for x in (sizes[1], sizes[2]) * 3:  # each for a while, as in training and validation
        longer_way.clear()
        for _ in range(5):
            layer(x)
        assert len(longer_way) == 2
    assert len(made) == 7


def test_without_pytorchs_guard_every_call_goes_the_longer_way(monkeypatch: pytest.MonkeyPatch, longer_way: list[Any]) -> None:
    monkeypatch.setattr(functional, "TensorGuards", None)
    layer, x = _layer(), _x()
    for _ in range(3):
        torch.testing.assert_close(layer(x), _wanted(layer, x))
    assert len(longer_way) == 3


def test_copies_begin_empty() -> None:
    layer, x = _layer(), _x()
    layer(x)
    layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert other.state_dict().keys() == layer.state_dict().keys()
        other.weight = nn.Parameter(other.weight.detach() * 2)
        torch.testing.assert_close(other(x), _wanted(other, x))
        torch.testing.assert_close(layer(x), _wanted(layer, x))


def test_threads_that_share_a_layer_get_their_own_results() -> None:
    layer, inputs = _layer(), [_x(1 + i, 4, 5 + i, 6) for i in range(4)]
    wanted = [_wanted(layer, x).detach() for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(200) if not torch.allclose(layer(inputs[i]).detach(), wanted[i], atol=1e-5))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
