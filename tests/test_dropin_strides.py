"""Strides of the output are PyTorch's for any strides of input and weight."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import faltung
from faltung.testing import thread_count

CASES = 300


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with thread_count(1):  # hundreds of tiny calls: threads would only wait for each other
        yield


def _odd(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of small whole numbers with strides of one of many kinds."""
    kind = rng.randrange(9)
    plain = torch.randint(-2, 3, shape).to(dtype)
    if kind == 0:
        return plain
    if kind == 1:
        return plain.contiguous(memory_format=torch.channels_last)
    if kind == 2:
        order = rng.sample(range(4), 4)
        inverse = [order.index(axis) for axis in range(4)]
        return torch.randint(-2, 3, [shape[axis] for axis in order]).to(dtype).permute(inverse)
    if kind == 3:
        return torch.randint(-2, 3, [2 * size for size in shape]).to(dtype)[::2, ::2, ::2, ::2]
    if kind in (4, 5):  # sizes of 1 with strides of anything
        base = plain if kind == 4 else plain.contiguous(memory_format=torch.channels_last)
        choices = [0, 1, 2, 3, 7, shape[1], shape[1] * shape[3], shape[1] * shape[2]]
        return base.as_strided(shape, [rng.choice(choices) if size == 1 else stride for size, stride in zip(shape, base.stride())])
    if kind == 6:
        return torch.randint(-2, 3, [rng.choice([1, size]) if size else 0 for size in shape]).to(dtype).expand(shape)
    if kind == 7:
        wide = torch.randint(-2, 3, (shape[0], shape[2], shape[3] + 1, shape[1] + 2)).to(dtype)
        return wide[:, :, :-1, 1:-1].permute(0, 3, 1, 2)
    return torch.randint(-2, 3, (2000,)).to(dtype).as_strided(shape, [rng.choice([0, 1, 2, 3, 5, 8, 40]) for _ in shape])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_strides_and_values_of_odd_operands(dtype: torch.dtype) -> None:
    rng = random.Random(11)
    empty = last = unbatched = 0
    for number in range(CASES):
        groups, cg, kg = rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 2, 3]), rng.choice([1, 2, 3])
        r, s = rng.choice([(1, 1), (3, 3), (1, 3), (2, 1)])
        shape = rng.choice([0, 1, 1, 2, 3]), cg * groups, rng.choice([r, r, 4, 5]), rng.choice([s, s, 4, 6])
        x, w = _odd(rng, shape, dtype), _odd(rng, (kg * groups, cg, r, s), dtype)
        if shape[0] == 1 and number % 2:
            x, unbatched = x[0], unbatched + 1
        stride = rng.choice([1, 2])
        stock = torch.conv2d(x, w, stride=stride, groups=groups)
        ours = faltung.conv2d(x, w, stride=stride, groups=groups)
        case = f"x {tuple(x.shape)} {x.stride()}, w {tuple(w.shape)} {w.stride()}, groups {groups}, stride {stride}"
        assert ours.shape == stock.shape, case
        assert ours.stride() == stock.stride(), case
        # not PyTorch's values: its result is wrong where a weight's size of 1 has a stride of 0
        assert torch.equal(ours.double(), torch.conv2d(x.double().contiguous(), w.double().contiguous(), stride=stride, groups=groups)), case
        if not stock.numel():
            empty += 1
            continue
        meta_x, meta_w = (torch.empty_strided(t.shape, t.stride(), dtype=dtype, device="meta") for t in (x, w))
        meta = faltung.conv2d(meta_x, meta_w, stride=stride, groups=groups)
        assert meta.stride() == ours.stride(), f"shapes alone: {case}"
        last += stock.dim() == 4 and not stock.is_contiguous()
    assert empty > CASES // 20
    assert last > CASES // 20
    assert unbatched > CASES // 20


@pytest.mark.parametrize("groups", [1, 2])
def test_gradient_of_the_input_has_the_format_of_the_output(groups: int) -> None:
    for x_last in (False, True):
        for w_last in (False, True):
            formats = [torch.channels_last if last else torch.contiguous_format for last in (x_last, w_last)]
            x = torch.randn(2, 4, 6, 5).contiguous(memory_format=formats[0]).requires_grad_()
            w = torch.randn(6, 4 // groups, 3, 3).contiguous(memory_format=formats[1]).requires_grad_()
            strides = []
            for conv in (faltung.conv2d, torch.conv2d):
                y = conv(x, w, groups=groups)
                strides.append(torch.autograd.grad(y, x, torch.ones_like(y))[0].stride())
            assert strides[0] == strides[1]


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "kwargs"),
    [
        ((0, 4, 6, 5), (6, 4, 3, 3), {}),
        ((0, 4, 6, 5), (6, 2, 3, 3), {"groups": 2}),
        ((2, 0, 6, 5), (6, 0, 3, 3), {}),
        ((2, 0, 6, 5), (6, 0, 3, 3), {"groups": 2}),
        ((0, 0, 6, 5), (6, 0, 3, 3), {"padding": 1}),
        ((0, 6, 5), (6, 0, 3, 3), {}),
        ((0, 4, 0, 5), (6, 4, 3, 3), {"padding": 3}),
        ((0, 4, 5, 0), (6, 4, 1, 1), {"padding": 1, "stride": 2}),
        ((0, 4, 5, 6), (6, 4, 3, 3), {"padding": "same"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
def test_without_elements_as_pytorch(x_shape: tuple[int, ...], w_shape: tuple[int, ...], kwargs: dict[str, object], bias: bool) -> None:
    x, w, b = (torch.randn(s, requires_grad=True) for s in (x_shape, w_shape, w_shape[:1]))
    leaves = [x, w, b] if bias else [x, w]
    results = []
    for conv in (faltung.conv2d, torch.conv2d):
        y = conv(x, w, b if bias else None, **kwargs)
        results.append((y, *torch.autograd.grad(y.sum(), leaves)))
    for ours, stock in zip(*results):
        assert ours.shape == stock.shape
        assert ours.stride() == stock.stride()
        assert torch.equal(ours, stock)
        assert not ours.isnan().any()
