"""The registered operators: their schemas, fake kernels and derivatives, and that nothing of PyTorch's convolution is reached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import faltung
from faltung import functional, ops
from faltung.functional import reason_for_stock

OPERATORS = torch.ops.faltung
FORMS: list[tuple[Any, ...]] = [
    ((1, 1), (0, 0, 0, 0), (1, 1), 1, "zeros"),
    ((2, 1), (1, 1, 1, 1), (1, 2), 2, "zeros"),
    ((1, 2), (2, 1, 0, 1), (1, 1), 2, "reflect"),
]
SHAPE, KERNEL = (2, 4, 7, 6), (3, 2)


def _operands(form: tuple[Any, ...], dtype: torch.dtype = torch.float32, last: bool = False, grad: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, w, b = torch.randn(SHAPE, dtype=dtype), torch.randn(6, 4 // form[3], *KERNEL, dtype=dtype), torch.randn(6, dtype=dtype)
    if last:
        x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    gy = torch.randn_like(OPERATORS.conv2d_forward(x, w, b, *form))
    return tuple(t.requires_grad_(grad) for t in (x, w, b, gy))  # type: ignore[return-value]


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_opcheck(form: tuple[Any, ...], last: bool) -> None:
    x, w, b, gy = _operands(form, last=last)
    torch.library.opcheck(OPERATORS.conv2d_forward.default, (x, w, b, *form))
    torch.library.opcheck(OPERATORS.conv2d_forward.default, (x, w, None, *form))
    torch.library.opcheck(OPERATORS.conv2d_grad_input.default, (gy, w, list(x.shape), *form, last))
    for bias in (False, True):
        torch.library.opcheck(OPERATORS.conv2d_grad_weight.default, (x, gy, list(w.shape), *form, bias, last, last))


def test_every_overload_is_checked() -> None:
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("faltung::")]
    assert sorted(names) == ["faltung::conv2d_forward", "faltung::conv2d_grad_input", "faltung::conv2d_grad_weight"]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_derivatives_of_every_operator(form: tuple[Any, ...]) -> None:
    x, w, b, gy = _operands(form, torch.float64)
    calls: list[tuple[Any, tuple[Tensor, ...]]] = [
        (lambda x, w, b: ops.forward(x, w, b, *form), (x, w, b)),
        (lambda gy, w: ops.grad_input(gy, w, list(x.shape), *form, False), (gy, w)),
        (lambda x, gy: ops.grad_weight(x, gy, list(w.shape), *form, True, False, False), (x, gy)),
        (lambda x, gy: ops.grad_weight(x, gy, list(w.shape), *form, False, False, False)[0], (x, gy)),
    ]
    for call, operands in calls:
        assert torch.autograd.gradcheck(call, operands, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, operands, fast_mode=True)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_derivatives_of_the_function(mode: str) -> None:
    x, w, b = torch.randn(2, 4, 5, 4, dtype=torch.float64), torch.randn(6, 2, 3, 2, dtype=torch.float64), torch.randn(6, dtype=torch.float64)

    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return faltung.conv2d(x, w, b, (2, 1), (1, 2, 2, 1), (1, 2), 2, padding_mode=mode)

    operands = tuple(t.requires_grad_() for t in (x, w, b))
    assert torch.autograd.gradcheck(call, operands, fast_mode=True, check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, operands, fast_mode=True, check_fwd_over_rev=True)
    assert torch.autograd.gradgradcheck(lambda w: call(x.detach(), w, b.detach()), (w,), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: faltung.conv2d(x, w[:, :, :1, :1], groups=2), (x[0].detach().requires_grad_(),), fast_mode=True)


def test_third_derivative_is_pytorchs() -> None:
    results = []
    for conv in (faltung.conv2d, torch.conv2d):
        torch.manual_seed(0)
        x, w = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True), torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
        value = conv(x, w, padding=1).pow(4).sum()
        for _ in range(3):
            (value,) = torch.autograd.grad(value, w, create_graph=True)
            value = value.pow(2).sum()
        results.append(value.detach())
    torch.testing.assert_close(*results)


def test_operators_refuse_bad_operands() -> None:
    form = FORMS[0]
    x, w, b, gy = _operands(form, grad=False)
    with pytest.raises(RuntimeError, match="should be the same"):
        ops.forward(x, w.double(), None, *form)
    with pytest.raises(RuntimeError, match="expected bias to be 1-dimensional"):
        ops.forward(x, w, b[1:], *form)
    with pytest.raises(TypeError, match="kernels for"):
        ops.forward(x.int(), w.int(), None, *form)
    with pytest.raises(RuntimeError, match="gradient of the output of size"):
        ops.grad_input(gy[:, 1:], w, list(x.shape), *form, False)
    with pytest.raises(RuntimeError, match="gradient of the output of size"):
        ops.grad_weight(x, gy[..., 1:], list(w.shape), *form, True, False, False)


FORBIDDEN = ("convolution", "conv2d_cpu", "conv_dilated", "conv_depthwise", "mkldnn", "mm", "matmul", "im2col", "col2im", "unfold", "pad", "thnn", "einsum")


def _reached(call: Any) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return [event.key for event in profile.key_averages() if event.key.startswith("aten::")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_nothing_of_pytorchs_convolution_is_reached(dtype: torch.dtype) -> None:
    cases = 0
    for mode in ("zeros", "reflect", "replicate", "circular"):
        for kwargs in ({"padding": 1}, {"padding": "same", "stride": 2}, {"padding": (0, 2, 1, 0), "groups": 2}, {"padding": 2, "dilation": 2, "groups": 4}):
            for last in (False, True):
                groups = kwargs.get("groups", 1)
                x, w, b = torch.randn(2, 4, 6, 5).to(dtype), torch.randn(4, 4 // groups, 3, 3).to(dtype), torch.randn(4).to(dtype)
                if last:
                    x = x.contiguous(memory_format=torch.channels_last)
                operands = [t.requires_grad_() for t in (x, w, b)]
                reached = _reached(lambda o=operands, k=kwargs, m=mode: faltung.conv2d(*o, **k, padding_mode=m).sum().backward())
                assert reached, "the profiler saw nothing"
                bad = [key for key in reached if any(word in key for word in FORBIDDEN)]
                assert not bad, f"{mode} {kwargs} {dtype}: {bad}"
                cases += 1
    assert cases == 32


def test_the_profiler_would_see_pytorchs_convolution() -> None:
    x, w = torch.randn(1, 2, 5, 5, requires_grad=True), torch.randn(2, 2, 3, 3)
    reached = _reached(lambda: torch.conv2d(x, w).sum().backward())
    assert any("convolution" in key for key in reached)


def test_what_goes_to_pytorch_and_why() -> None:
    x, w = torch.randn(1, 2, 5, 5), torch.randn(2, 2, 3, 3)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert reason_for_stock(x.to(dtype), w.to(dtype), None) is None
    assert "complex64" in str(reason_for_stock(x.to(torch.complex64), w.to(torch.complex64), None))
    assert "layout" in str(reason_for_stock(x.to_sparse(), w, None))
    assert "meta" in str(reason_for_stock(x, w.to("meta"), None))


def test_a_plain_call_launches_without_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.randn(1, 2, 5, 5), torch.randn(2, 2, 3, 3, requires_grad=True)

    def fail(*_: Any) -> Tensor:
        raise AssertionError("the registered operator was called")

    for name in ("forward", "grad_input", "grad_weight"):
        monkeypatch.setattr(ops, name, fail)
    for _ in range(2):
        faltung.conv2d(x, w, stride=[1, 1]).sum().backward()
        faltung.conv2d(x, w).sum().backward()
    with pytest.raises(AssertionError, match="registered operator"):
        torch.vmap(lambda v: faltung.conv2d(v, w))(x[None])


def test_options_and_thread_counts_are_part_of_a_signature() -> None:
    x, w = torch.randn(1, 2, 5, 61), torch.randn(2, 2, 3, 3)
    before = len(functional._calls)
    with faltung.config.override(precision="strict"):
        faltung.conv2d(x, w)
    with faltung.config.override(precision="default"):
        faltung.conv2d(x, w)
    assert len(functional._calls) == before + 2


def test_an_implementation_by_name_is_strict() -> None:
    x, w = torch.randn(1, 2, 5, 5), torch.randn(2, 2, 3, 3)
    with faltung.config.override(implementation="no such thing"), pytest.raises(ValueError, match="no such thing"):
        faltung.conv2d(x, w)


def test_an_engine_that_is_not_the_tensors_is_refused() -> None:
    x, w = torch.randn(1, 2, 5, 5), torch.randn(2, 2, 3, 3)
    with faltung.config.override(engine="cuda"), pytest.raises(RuntimeError, match="engine is set to 'cuda'"):
        faltung.conv2d(x, w)


def _flops(model: torch.nn.Module, x: torch.Tensor) -> tuple[int, dict[str, int]]:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return counter.get_total_flops(), {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}


def test_flops_are_counted_as_pytorchs_own() -> None:
    stock = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 8, (3, 5), stride=2, dilation=2))
    x = torch.randn(2, 3, 21, 22, requires_grad=True)
    total, by_operator = _flops(faltung.convert(stock), x)
    assert total == _flops(stock, x)[0] > 0
    assert len(by_operator) == 3
    assert len(set(by_operator.values())) == 1
    # one group's share of a grouped layer in each direction, where PyTorch counts the weight's gradient as if there were one group
    grouped = faltung.Conv2d(8, 8, 3, groups=4)
    assert _flops(grouped, torch.randn(1, 8, 6, 6, requires_grad=True))[0] == 3 * 2 * 16 * 8 * 2 * 9


@pytest.mark.parametrize("which", [0, 1, 2])
def test_tensors_of_zeros_without_memory(which: int) -> None:
    operands = [torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(4)]
    faltung.conv2d(*operands)  # the call is known
    operands[which] = torch._efficientzerotensor(operands[which].shape)
    torch.testing.assert_close(faltung.conv2d(*operands), torch.conv2d(*operands))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(faltung.conv2d(x, torch.randn(4, 3, 3, 3)), x, torch._efficientzerotensor((2, 4, 6, 6)))
    assert torch.equal(gradient, torch.zeros_like(x))
