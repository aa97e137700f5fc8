"""Bad and odd arguments: PyTorch's result, or a clean exception of PyTorch's class; never a crash, a hang or garbage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import faltung
from support import outcome

X, W, B = torch.randn(2, 4, 6, 5), torch.randn(6, 2, 3, 2), torch.randn(6)
HUGE = (2**29, 2**31, 2**55, 2**62, 2**63 - 5, 2**63 - 1, 2**63, 2**80)


def _values(*more: Any) -> list[Any]:
    return [0, -1, [], (1,), [1], (1, 2), (1, 2, 3), 1.0, 2.5, True, None, "1", (1.0, 1), (True, 2), [None, 1], range(1, 3), (0, 1), torch.Size([1, 2]), *more]


ARGUMENTS: list[tuple[str, Any]] = [
    *(("stride", v) for v in _values(torch.tensor(2), torch.tensor(1.0), torch.tensor([1, 1]), (torch.tensor(1), 2), *HUGE)),
    *(("padding", v) for v in _values((0, -1), "same", "valid", "SAME", "foo", b"same", 7, torch.tensor(1), *HUGE[2:])),
    *(("dilation", v) for v in _values(4, *HUGE)),
    *(("groups", v) for v in (0, -1, 1, 3, 4, 5, 6, 7, 2**63 - 1, 2**63, 1.0, None, True, "2", (2,), torch.tensor(2))),
]


def _same_outcome(ours: Any, stock: Any, case: object) -> None:
    if isinstance(stock, Exception):
        assert isinstance(ours, Exception), f"{case}: {ours.shape}, PyTorch raises {stock!r}"
        assert type(ours) is type(stock), f"{case}: {ours!r}, PyTorch raises {stock!r}"
    else:
        assert isinstance(ours, Tensor), f"{case}: {ours!r}, PyTorch gives {tuple(stock.shape)}"
        rounding = max(1e-4, torch.finfo(stock.dtype).eps) if stock.is_floating_point() else 1e-4  # of 16 bits: one unit in the last place
        torch.testing.assert_close(ours, stock, rtol=rounding, atol=rounding, msg=lambda m: f"{case}: {m}")


@pytest.mark.parametrize("remembered", [False, True], ids=["first call", "after good calls"])
def test_values_of_arguments(remembered: bool) -> None:
    kinds = {"accepted": 0, "refused": 0}
    for name, value in ARGUMENTS:
        kwargs = {"groups": 2, name: value}
        if remembered:  # 1.0 and True must not be taken for the 1 that was met before
            for good in (1, (1, 1), (1, 2), 2):
                outcome(faltung.conv2d, X, W, B, **{"groups": 2, name: good})
        stock = outcome(torch.conv2d, X, W, B, **kwargs)
        _same_outcome(outcome(faltung.conv2d, X, W, B, **kwargs), stock, kwargs)
        kinds["refused" if isinstance(stock, Exception) else "accepted"] += 1
    assert kinds["accepted"] >= 15
    assert kinds["refused"] >= 60


@pytest.mark.parametrize("dilation", [0, -1, 2**62, 2**63 - 1, (1, 0), (2, 3)])
def test_dilation_with_same_padding(dilation: Any) -> None:
    stock = outcome(torch.conv2d, X, W, B, 1, "same", dilation, 2)
    _same_outcome(outcome(faltung.conv2d, X, W, B, 1, "same", dilation, 2), stock, dilation)


def test_messages_that_people_search_for() -> None:
    for kwargs, message in (
        ({"stride": 0}, "non-positive stride is not supported"),
        ({"padding": -1}, "negative padding is not supported"),
        ({"dilation": -1}, "dilation should be greater than zero"),
        ({"dilation": 0}, "dilation should be greater than zero"),
        ({"groups": 0}, "expected groups to be greater than 0, but got groups=0"),
        ({"groups": 3}, r"Given groups=3, weight of size \[6, 2, 3, 2\], expected input\[2, 4, 6, 5\] to have 6 channels, but got 4 channels instead"),
        ({"groups": 4}, "expected weight to be divisible by 4 at dimension 0"),
        ({"groups": 7}, r"expected weight to be at least 7 at dimension 0, but got weight of size \[6, 2, 3, 2\] instead"),
        ({"padding": "foo"}, "Invalid padding string: 'foo'"),
        ({"dilation": 4}, r"Calculated padded input size per channel: \(6 x 5\). Kernel size: \(9 x 5\). Kernel size can't be greater than actual input size"),
        ({"stride": (1, 2, 3)}, "expected stride to be a single integer value or a list of 2 values to match the convolution dimensions"),
    ):
        with pytest.raises(RuntimeError, match=message):
            faltung.conv2d(X, W, B, **{"groups": 2, **kwargs})
    with pytest.raises(RuntimeError, match=r"Expected 3D \(unbatched\) or 4D \(batched\) input to conv2d, but got input of size: \[6, 5\]"):
        faltung.conv2d(X[0, 0], W, B)
    with pytest.raises(RuntimeError, match="expected bias to be 1-dimensional with 6 elements"):
        faltung.conv2d(X, W, B[:5], groups=2)
    with pytest.raises(RuntimeError, match="should be the same"):
        faltung.conv2d(X, W.double(), None, groups=2)
    with pytest.raises(ValueError, match="padding_mode must be one of"):
        faltung.conv2d(X, W, B, groups=2, padding_mode="mirror")


def _operands() -> list[tuple[str, tuple[Any, Any, Any]]]:
    shapes_x = [
        (),
        (5,),
        (6, 5),
        (4, 6, 5),
        (0, 4, 6, 5),
        (2, 6, 6, 5),
        (2, 4, 2, 5),
        (2, 4, 6, 1),
        (1, 2, 4, 6, 5),
        (1, 1, 1, 1, 2, 4, 6),
        (2, 0, 6, 5),
        (2, 4, 0, 5),
    ]
    shapes_w = [
        (),
        (6,),
        (6, 2),
        (6, 2, 3),
        (6, 2, 3, 2, 1),
        (7, 2, 3, 2),
        (6, 3, 3, 2),
        (1, 2, 3, 2),
        (6, 2, 7, 2),
        (6, 2, 0, 2),
        (6, 2, 0, 0),
        (0, 2, 3, 2),
        (6, 0, 3, 2),
    ]
    shapes_b = [(), (1,), (7,), (0,), (6, 1), (1, 6), (6,)]
    cases: list[tuple[str, tuple[Any, Any, Any]]] = []
    cases += [(f"input {s}", (torch.randn(s), W, B)) for s in shapes_x]
    cases += [(f"weight {s}", (X, torch.randn(s), B)) for s in shapes_w]
    cases += [(f"bias {s}", (X, W, torch.randn(s))) for s in shapes_b]
    cases += [(f"{i} not a tensor: {v!r}", tuple(v if i == j else t for j, t in enumerate((X, W, B)))) for i in (0, 1) for v in (None, 1.0, [1], "x")]
    cases += [(f"bias not a tensor: {v!r}", (X, W, v)) for v in (0, [1.0], "x")]
    for dtype in (torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float64, torch.float16):
        cases += [(f"input {dtype}", (X.to(dtype), W, B)), (f"weight {dtype}", (X, W.to(dtype), B)), (f"bias {dtype}", (X, W, B.to(dtype)))]
        cases.append((f"all {dtype}", (X.to(dtype), W.to(dtype), B.to(dtype))))
    cases += [("sparse input", (X.to_sparse(), W, B)), ("sparse weight", (X, W.to_sparse(), B)), ("mkldnn weight", (X, W.to_mkldnn(), B))]
    cases.append(("nested", (torch.nested.nested_tensor([X[0], X[1]]), W, B)))
    cases.append(("quantized", (torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), W, B)))
    return cases


OPERANDS = _operands()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("case", "operands"), OPERANDS, ids=[name for name, _ in OPERANDS])
def test_operands(case: str, operands: tuple[Any, Any, Any]) -> None:
    stock = outcome(torch.conv2d, *operands, groups=2)
    ours = outcome(faltung.conv2d, *operands, groups=2)
    if case.startswith("weight (6, 2, 0") and isinstance(stock, Exception):
        assert isinstance(ours, RuntimeError)  # PyTorch's class depends on its backend here
        return
    _same_outcome(ours, stock, case)


def test_mkldnn_tensors_are_pytorchs() -> None:
    operands = [t.to_mkldnn() for t in (X, W, B)]
    torch.testing.assert_close(faltung.conv2d(*operands, groups=2).to_dense(), torch.conv2d(*operands, groups=2).to_dense())


@pytest.mark.parametrize("meta", [(0,), (1,), (2,), (0, 1, 2)])
def test_meta_tensors(meta: tuple[int, ...]) -> None:
    operands = [t.to("meta") if i in meta else t for i, t in enumerate((X, W, B))]
    ours, stock = faltung.conv2d(*operands, groups=2), torch.conv2d(*operands, groups=2)
    assert ours.device == stock.device
    assert ours.shape == stock.shape


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes_refuse_what_pad_refuses(mode: str) -> None:
    accepted = refused = 0
    weight = torch.randn(2, 3, 2, 2)
    for shape in ((2, 3, 4, 5), (3, 4, 5), (0, 3, 4, 5), (2, 3, 1, 1), (2, 3, 0, 5), (2, 0, 4, 5)):
        for padding in (
            (0, 0, 0, 0),
            (1, 1, 1, 1),
            (4, 0, 3, 0),
            (5, 0, 4, 0),
            (0, 5, 0, 3),
            (6, 0, 0, 0),
            (0, 0, 0, 5),
            (-1, 2, 0, -1),
            (-5, 0, 0, 0),
            (0, 0, -6, 0),
        ):
            x, w = torch.randn(shape), weight[:, : shape[-3]]
            stock = outcome(lambda x=x, w=w, padding=padding: torch.conv2d(F.pad(x, padding, mode=mode), w))
            ours = outcome(faltung.conv2d, x, w, padding=padding, padding_mode=mode)
            _same_outcome(ours, stock, (shape, padding))
            accepted += not isinstance(stock, Exception)
            refused += isinstance(stock, Exception)
    assert accepted >= 10
    assert refused >= 15


def test_constructor_refuses_what_pytorchs_refuses() -> None:
    for kwargs in ({"groups": 0}, {"groups": 3}, {"padding": "foo"}, {"padding_mode": "foo"}, {"kernel_size": -1}, {"padding": "same", "stride": 2}):
        arguments = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **kwargs}
        stock = outcome(torch.nn.Conv2d, **arguments)
        assert isinstance(stock, Exception)
        ours = outcome(faltung.Conv2d, **arguments)
        assert type(ours) is type(stock)
        assert str(ours) == str(stock)


def test_a_stride_or_dilation_that_does_not_show_may_be_huge() -> None:
    x, w = torch.randn(1, 2, 4, 5, requires_grad=True), torch.randn(3, 2, 1, 2, requires_grad=True)
    y = faltung.conv2d(x, w, stride=(2**40, 2**62), dilation=(2**50, 1))
    torch.testing.assert_close(y, torch.conv2d(x, w)[:, :, :1, :1])
    y.sum().backward()
    assert x.grad is not None
    assert x.grad[:, :, 1:].abs().max() == 0


def test_same_padding_of_a_kernel_that_reaches_far_outside() -> None:
    y = faltung.conv2d(X, W, B, padding="same", dilation=2**29, groups=2)
    torch.testing.assert_close(y, torch.conv2d(X, W, B, padding="same", dilation=2**29, groups=2))


def test_output_size() -> None:
    for size, kernel, stride, padding, dilation in (
        (8, 3, 1, 0, 1),
        ((9, 8), (3, 2), (2, 3), (1, 0), (1, 2)),
        ((9, 8), (3, 2), 1, "same", (2, 3)),
        ((9, 8), 4, 3, "valid", 2),
        ((9, 8), 1, 4, (1, 2), 1),
    ):
        rows, columns = (size, size) if isinstance(size, int) else size
        r, s = (kernel, kernel) if isinstance(kernel, int) else kernel
        expected = torch.conv2d(torch.zeros(1, 1, rows, columns), torch.zeros(1, 1, r, s), None, stride, padding, dilation).shape[2:]
        assert faltung.conv2d_output_size(size, kernel, stride, padding, dilation) == tuple(expected)
    assert faltung.conv2d_output_size((9, 8), 3, 2, "same") == (5, 4)
    assert faltung.conv2d_output_size((9, 8), 3, padding=(1, 0, 2, 3)) == (12, 7)
    for arguments, error in (
        ((8, 3, 0), RuntimeError),
        ((2, 3), RuntimeError),
        ((8, 3.0), TypeError),
        ((8, 3, 1, 2**63), ValueError),
        ((8, 3, 1, "foo"), RuntimeError),
    ):
        with pytest.raises(error):
            faltung.conv2d_output_size(*arguments)
