"""Operands and gradients in odd memory: expanded, misaligned, negated, offloaded, without storage; threads and sharing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import faltung
from faltung import functional, prepared
from faltung.testing import Guarded, thread_count


def _expected(x: Tensor, w: Tensor, b: Tensor | None, gy: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
    leaves = [t.detach().double().clone().contiguous().requires_grad_() for t in (x, w, b) if t is not None]
    y = torch.conv2d(*leaves, **kwargs)
    return y, *torch.autograd.grad(y, leaves, gy.double())


def _check(x: Tensor, w: Tensor, b: Tensor | None = None, gy: Tensor | None = None, **kwargs: Any) -> None:
    leaves = [t.detach().requires_grad_() for t in (x, w, b) if t is not None]
    y = faltung.conv2d(*leaves, **kwargs)
    gy = torch.randn(y.shape) if gy is None else gy
    ours = (y, *torch.autograd.grad(y, leaves, gy))
    for mine, exact in zip(ours, _expected(x, w, b, gy, **kwargs)):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-4)


def _pattern(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape)


OPERANDS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "transposed": lambda: (_pattern((2, 4, 5, 6)).transpose(2, 3), _pattern((4, 6, 3, 3)).transpose(0, 1)),
    "sliced": lambda: (_pattern((4, 8, 12, 10))[::2, ::2, ::2, ::2], _pattern((12, 4, 6, 3))[::2, :, 1::2]),
    "expanded": lambda: (_pattern((1, 1, 6, 1)).expand(2, 4, 6, 5), _pattern((1, 4, 1, 1)).expand(6, 4, 3, 3)),
    "overlapping": lambda: (_pattern((100,)).as_strided((2, 4, 6, 5), (3, 5, 2, 1)), _pattern((90,)).as_strided((6, 4, 3, 3), (4, 2, 1, 1))),
    "offset": lambda: (_pattern((241,))[1:].view(2, 4, 6, 5), _pattern((219,))[3:].view(6, 4, 3, 3)),
    "flipped": lambda: (_pattern((2, 4, 6, 5)).flip(3), _pattern((6, 4, 3, 3)).flip(2, 3)),
    "dense negated view": lambda: (torch._neg_view(_pattern((2, 4, 6, 5))), torch._neg_view(_pattern((6, 4, 3, 3)))),
    "negated view": lambda: (torch.randn(2, 4, 6, 5, dtype=torch.complex64).conj().imag, torch.randn(6, 4, 3, 3, dtype=torch.complex64).conj().imag),
}


@pytest.mark.parametrize("name", OPERANDS)
def test_odd_operands(name: str) -> None:
    x, w = OPERANDS[name]()
    for _ in range(2):  # first and remembered call
        _check(x, w, torch.randn(12)[::2], padding=1)


def test_a_dense_negated_operand_after_the_same_without_its_sign() -> None:
    x, w, b = torch.randn(2, 4, 6, 5), torch.randn(6, 4, 3, 3), torch.randn(6)
    module = faltung.Conv2d(4, 6, 3).eval()
    for place in (0, 1, 2):
        operands = [x, w, b]
        faltung.conv2d(*operands)  # remembered: the signature of the next call is the same
        expected = torch.conv2d(*[-t if i == place else t for i, t in enumerate(operands)])
        operands[place] = torch._neg_view(operands[place])
        torch.testing.assert_close(faltung.conv2d(*operands), expected, rtol=1e-4, atol=1e-4)
    faltung.freeze(module)
    with torch.inference_mode():
        module(x)
        torch.testing.assert_close(module(torch._neg_view(x)), torch.conv2d(-x, module.weight, module.bias), rtol=1e-4, atol=1e-4)


def test_an_expanded_gradient_is_copied_once() -> None:
    x, w = torch.randn(2, 4, 6, 5, requires_grad=True), torch.randn(6, 4, 3, 3, requires_grad=True)
    faltung.conv2d(x, w, padding=1).sum().backward()
    y = faltung.conv2d(x, w, padding=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(y.sum(), (x, w))
    assert [event.count for event in profile.key_averages() if event.key == "aten::copy_"] == [1]


def test_single_negated_elements() -> None:
    x = torch.randn(1, 1, 1, 1, dtype=torch.complex64).conj().imag
    w = torch.randn(1, 1, 1, 1, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    _check(x, w, torch.randn(1, dtype=torch.complex64).conj().imag)
    dense = torch.conv2d(x, w)
    torch.testing.assert_close(faltung.conv2d(x.resolve_neg(), w), dense)
    torch.testing.assert_close(faltung.conv2d(x, w), dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_addresses_that_are_not_multiples_of_the_element(dtype: torch.dtype) -> None:
    def misaligned(values: Tensor) -> Tensor:
        size = values.numel() * values.element_size()
        buffer = bytearray(size + 1)
        tensor = torch.frombuffer(buffer, dtype=dtype, count=values.numel(), offset=1).view(values.shape)
        return tensor.copy_(values)

    x, w = torch.randint(-2, 3, (2, 4, 6, 19)).to(dtype), torch.randint(-2, 3, (6, 4, 3, 3)).to(dtype)
    odd_x, odd_w = misaligned(x), misaligned(w)
    assert odd_x.data_ptr() % 2 == 1
    assert torch.equal(faltung.conv2d(odd_x, odd_w, padding=1), faltung.conv2d(x, w, padding=1))


def test_nothing_is_read_or_written_outside_the_operands() -> None:
    guards = [Guarded(t) for t in (torch.randn(1, 3, 9, 11), torch.randn(5, 3, 3, 3), torch.randn(5))]
    x, w, b = (g.tensor.requires_grad_() for g in guards)
    faltung.conv2d(x, w, b, stride=2, padding=1, padding_mode="replicate").sum().backward()
    assert all(g.intact() for g in guards)


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded scalar": lambda y: torch.randn(()).expand_as(y),
    "expanded": lambda y: torch.randn(1, y.shape[1], 1, 1).expand_as(y),
    "transposed": lambda y: torch.randn(y.shape[0], y.shape[1], y.shape[3], y.shape[2]).transpose(2, 3),
    "channels_last": lambda y: torch.randn(y.shape).contiguous(memory_format=torch.channels_last),
    "sliced": lambda y: torch.randn(*y.shape[:3], 2 * y.shape[3])[..., ::2],
    "negated": lambda y: torch.randn(y.shape, dtype=torch.complex64).conj().imag,
}


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_of_the_output_in_any_memory(name: str, last: bool) -> None:
    x, w, b = torch.randn(2, 4, 6, 5), torch.randn(6, 2, 3, 3), torch.randn(6)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    y = torch.conv2d(x, w, b, padding=1, groups=2)
    _check(x, w, b, GRADIENTS[name](y), padding=1, groups=2)


def test_an_output_that_gets_no_gradient() -> None:
    x, w = torch.randn(1, 2, 4, 4, requires_grad=True), torch.randn(2, 2, 3, 3, requires_grad=True)

    class Drop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:  # type: ignore[override]
            return None

    y = Drop.apply(faltung.conv2d(x, w)).sum() + x.sum()
    y.backward()
    assert torch.equal(x.grad, torch.ones_like(x))  # type: ignore[arg-type]


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("unbatched", [False, True])
def test_only_the_wanted_gradients(wanted: tuple[int, ...], unbatched: bool) -> None:
    results = []
    torch.manual_seed(0)
    values = [torch.randn(s) for s in ((4, 6, 5) if unbatched else (2, 4, 6, 5), (6, 4, 3, 3), (6,))]
    for conv in (faltung.conv2d, torch.conv2d):
        operands = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(values)]
        conv(*operands, padding=1).square().sum().backward()
        results.append([t.grad for t in operands])
    for ours, stock in zip(*results):
        assert (ours is None) == (stock is None)
        if ours is not None:
            torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-3)


def test_a_frozen_weight_keeps_no_input_alive() -> None:
    x, w = torch.randn(1, 2, 4, 4, requires_grad=True), torch.randn(2, 2, 3, 3)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        faltung.conv2d(x, w)
    assert [t.data_ptr() for t in saved] == [w.data_ptr()]


def test_saved_tensors_that_come_back_with_other_strides() -> None:
    x = torch.randn(2, 4, 6, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(6, 4, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    results = []
    for unpack in (lambda t: t, lambda t: t.contiguous().clone(memory_format=torch.contiguous_format)):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = faltung.conv2d(x, w, padding=1)
        results.append(torch.autograd.grad(y.square().sum(), (x, w)))
    for plain, offloaded in zip(*results):
        torch.testing.assert_close(offloaded, plain)


def test_saved_tensors_changed_in_place_are_noticed() -> None:
    x, w = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3, requires_grad=True)
    y = faltung.conv2d(x, w)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_tensor_whose_storage_was_freed_is_refused() -> None:
    x, w = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3)
    faltung.conv2d(x, w)
    w.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="no memory"):
        faltung.conv2d(x, w)


def test_one_tensor_as_input_and_weight() -> None:
    t = torch.randn(3, 3, 3, 3, requires_grad=True)
    gradients = [torch.autograd.grad(conv(t, t, padding=1).square().sum(), t)[0] for conv in (faltung.conv2d, torch.conv2d)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)


def test_inference_tensors_and_modes() -> None:
    module = faltung.Conv2d(3, 4, 3)
    x = torch.randn(1, 3, 6, 6)
    expected = torch.conv2d(x, module.weight, module.bias)
    with torch.inference_mode():
        y = module(torch.randn_like(x).copy_(x))
        assert y.is_inference()
        torch.testing.assert_close(y, expected)
    with torch.no_grad():
        assert not module(x).requires_grad
    assert module(x).requires_grad
    with torch.autograd.set_detect_anomaly(True):
        module(x).sum().backward()


def test_operands_in_shared_memory() -> None:
    x, w = torch.randn(1, 3, 6, 6).share_memory_(), torch.randn(4, 3, 3, 3).share_memory_()
    torch.testing.assert_close(faltung.conv2d(x, w), torch.conv2d(x, w))


def test_many_threads_at_once_and_changing_thread_counts() -> None:
    w = torch.randint(-2, 3, (5, 3, 3, 3)).float().requires_grad_()
    inputs = [torch.randint(-2, 3, (1, 3, 5 + i, 6)).float().requires_grad_() for i in range(6)]
    expected = []
    for x in inputs:
        y = torch.conv2d(x, w, padding=1)
        expected.append((y, *torch.autograd.grad(y.sum(), (x, w))))
    failures: list[str] = []

    def work(start: int) -> None:
        for round_ in range(8):
            number = (start + round_) % len(inputs)
            x = inputs[number]
            y = faltung.conv2d(x, w, padding=1)
            for mine, exact in zip((y, *torch.autograd.grad(y.sum(), (x, w))), expected[number]):
                if not torch.equal(mine, exact):
                    failures.append(f"input {number}")

    for count in (1, 2, 3):
        with thread_count(count):
            workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
    assert not failures


def test_caches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "CACHE_LIMIT", 5)
    owners = ((functional, "_calls"), (prepared, "_prepared"), (prepared, "_signatures"))
    for owner, name in owners:
        monkeypatch.setattr(owner, name, {})
    w = torch.randn(2, 2, 1, 1)
    for size in range(1, 9):
        for _ in range(2):
            torch.testing.assert_close(faltung.conv2d(torch.ones(1, 2, size, 3), w), torch.conv2d(torch.ones(1, 2, size, 3), w))
    assert [len(getattr(owner, name)) for owner, name in owners] == [5, 5, 5]
