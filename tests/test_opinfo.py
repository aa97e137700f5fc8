"""PyTorch's own inputs for conv2d and Conv2d, taken from the installed PyTorch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.testing._internal import common_nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import faltung
from faltung.testing import thread_count
from support import DTYPES, compare_with_stock, double
from upstream import substitute

CONV2D = next(op for op in op_db if op.name == "nn.functional.conv2d")
MODULE = next(info for info in module_db if info.module_cls is torch.nn.Conv2d)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with thread_count(1):  # hundreds of tiny calls: threads would only wait for each other
        yield


def _samples(dtype: torch.dtype) -> list[Any]:
    return list(CONV2D.sample_inputs("cpu", dtype, requires_grad=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples(dtype: torch.dtype) -> None:
    samples = _samples(dtype)
    assert len(samples) >= 30
    for number, sample in enumerate(samples):
        operands = [sample.input, *sample.args]
        compare_with_stock(
            lambda *o, kwargs=sample.kwargs: faltung.conv2d(*o, **kwargs),
            lambda *o, kwargs=sample.kwargs: torch.conv2d(*o, **kwargs),
            operands,
            f"sample {number}",
        )


def test_noncontiguous_samples() -> None:
    samples = [sample.noncontiguous() for sample in _samples(torch.float32)]
    assert sum(not s.input.is_contiguous() for s in samples) >= 20
    for number, sample in enumerate(samples):
        compare_with_stock(
            lambda *o, kwargs=sample.kwargs: faltung.conv2d(*o, **kwargs),
            lambda *o, kwargs=sample.kwargs: torch.conv2d(*o, **kwargs),
            [sample.input, *sample.args],
            f"sample {number}",
        )


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.int64], ids=str)
def test_samples_of_other_types_are_pytorchs(dtype: torch.dtype) -> None:
    samples = list(CONV2D.sample_inputs("cpu", dtype, requires_grad=False))
    assert len(samples) >= 30
    for sample in samples:
        assert torch.equal(faltung.conv2d(sample.input, *sample.args, **sample.kwargs), torch.conv2d(sample.input, *sample.args, **sample.kwargs))


def test_error_inputs() -> None:
    errors = list(CONV2D.error_inputs("cpu"))
    assert len(errors) >= 9
    for error in errors:
        sample = error.sample_input
        with pytest.raises(error.error_type) as caught:
            faltung.conv2d(sample.input, *sample.args, **sample.kwargs)
        assert re.search(error.error_regex, str(caught.value)), f"{caught.value} does not match {error.error_regex}"
        with pytest.raises(error.error_type):
            torch.conv2d(sample.input, *sample.args, **sample.kwargs)


@pytest.mark.parametrize("order", ["first", "second"])
def test_derivatives_of_samples(order: str) -> None:
    samples = [sample for number, sample in enumerate(_samples(torch.float64)) if number % 4 in (0, 1)]
    assert len(samples) >= 14
    check = torch.autograd.gradcheck if order == "first" else torch.autograd.gradgradcheck
    for sample in samples:
        operands = [t for t in (sample.input, *sample.args) if t is not None]
        assert check(lambda *o, kwargs=sample.kwargs: faltung.conv2d(*o, **kwargs), operands, fast_mode=True)


def test_forward_mode_of_samples() -> None:
    samples = _samples(torch.float64)[::5]
    assert len(samples) >= 6
    for sample in samples:
        operands = [t for t in (sample.input, *sample.args) if t is not None]
        assert torch.autograd.gradcheck(
            lambda *o, kwargs=sample.kwargs: faltung.conv2d(*o, **kwargs), operands, fast_mode=True, check_forward_ad=True, check_batched_grad=True
        )


def _module_inputs(dtype: torch.dtype, training: bool) -> Iterator[Any]:
    yield from MODULE.module_inputs_func(MODULE, device="cpu", dtype=dtype, requires_grad=True, training=training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_module_inputs(dtype: torch.dtype, training: bool) -> None:
    inputs = list(_module_inputs(dtype, training))
    assert len(inputs) >= 4
    for module_input in inputs:
        make = module_input.constructor_input
        stock = torch.nn.Conv2d(*make.args, **make.kwargs, dtype=dtype).train(training)
        ours = faltung.Conv2d(*make.args, **make.kwargs, dtype=dtype).train(training)
        ours.load_state_dict(stock.state_dict())
        x = module_input.forward_input.args[0].detach().requires_grad_()
        exact = torch.nn.Conv2d(*make.args, **make.kwargs, dtype=torch.float64)
        exact.load_state_dict({name: value.double() for name, value in stock.state_dict().items()})
        assert repr(ours) == repr(stock)
        compare_with_stock(
            lambda v, w, b, m=ours: torch.func.functional_call(m, {"weight": w, "bias": b}, (v,)),
            lambda v, w, b, m=stock: torch.func.functional_call(m, {"weight": w, "bias": b}, (v,)),
            [x, stock.weight.detach().requires_grad_(), stock.bias.detach().requires_grad_()],
            repr(stock),
        )
        assert torch.allclose(exact(double(x)), ours(x).double(), rtol=3e-2, atol=3e-2)


class _Case(common_nn.NNTestCase):
    """What the module tests ask of the test case around them."""

    def _forward(self, module: torch.nn.Module, operands: Any) -> torch.Tensor:
        return module(*operands) if isinstance(operands, tuple) else module(operands)

    def _backward(self, _: torch.nn.Module, operand: torch.Tensor, y: torch.Tensor, gy: torch.Tensor, create_graph: bool = False) -> torch.Tensor:
        y.backward(gy, retain_graph=True, create_graph=create_graph)
        return operand.grad

    def _zero_grad_parameters(self, module: torch.nn.Module) -> None:
        module.zero_grad(set_to_none=False)

    def _get_parameters(self, module: torch.nn.Module) -> tuple[list[Any], list[Any]]:
        return list(module.parameters()), [p.grad for p in module.parameters()]

    def runTest(self) -> None:  # noqa: N802
        """What makes an instance of a test case without a test."""


def test_module_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The older tests of modules: first and second derivatives in both modes, casts, and each padding mode against a padded copy."""
    for name in ("torch", "nn", "F"):
        monkeypatch.setattr(common_nn, name, getattr(common_nn, name))
    substitute(common_nn)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    ran = 0
    for parameters in [*common_nn.get_new_module_tests(), *common_nn.module_tests]:
        name = parameters.get("fullname", parameters.get("module_name", ""))
        if not name.startswith("Conv2d"):
            continue
        constructor = parameters.get("constructor", faltung.Conv2d)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            test = common_nn.NewModuleTest(**{**parameters, "constructor": constructor})
            assert isinstance(test.constructor(*test.constructor_args), faltung.Conv2d)
            test(_Case())
        finally:
            torch.set_default_dtype(default)
        ran += 1
    assert ran >= 20
