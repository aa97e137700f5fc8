"""Function transforms, modes, subclasses and autocast see the registered operators."""

from __future__ import annotations

from itertools import product
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import faltung

X, W, B = torch.randn(3, 4, 6, 5), torch.randn(6, 2, 3, 3), torch.randn(6)
FORM: dict[str, Any] = {"padding": 1, "groups": 2, "stride": (1, 2)}


def _conv(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return faltung.conv2d(x, w, b, **FORM)


def _stock(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return torch.conv2d(x, w, b, **FORM)


def _close(ours: Any, stock: Any) -> None:
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("mapped", [(0,), (1,), (0, 1), (2,), (0, 2), (1, 2), (0, 1, 2)], ids=str)
def test_vmap(mapped: tuple[int, ...], axis: int) -> None:
    size = 2
    operands = [torch.randn(size, *t.shape).movedim(0, axis if t.dim() > 1 else 0) if i in mapped else t for i, t in enumerate((X, W, B))]
    in_dims = tuple((axis if t.dim() > 2 else 0) if i in mapped else None for i, t in enumerate(operands))
    ours = vmap(_conv, in_dims)(*operands)
    for sample in range(size):
        chosen = [t.select(d, sample) if d is not None else t for t, d in zip(operands, in_dims)]
        _close(ours[sample], _stock(*chosen))


def test_vmap_of_gradients_and_nested() -> None:
    def loss(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
        return _conv(x, w, b).square().sum()

    def stock_loss(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
        return _stock(x, w, b).square().sum()

    for sample in (X, X[:, None]):  # unbatched and batched per-sample gradients
        _close(vmap(grad(loss, (0, 1)), (None, None, 0))(W, B, sample), vmap(grad(stock_loss, (0, 1)), (None, None, 0))(W, B, sample))
    _close(vmap(grad(loss, 2), (None, None, 0))(W, B, X), vmap(grad(stock_loss, 2), (None, None, 0))(W, B, X))
    twice = torch.randn(2, 3, 4, 6, 5)
    _close(vmap(vmap(_conv, (0, None)), (0, None))(twice, W), vmap(vmap(_stock, (0, None)), (0, None))(twice, W))


def test_jacobian_vjp_and_jvp() -> None:
    _close(jacrev(_conv, 1)(X[:1], W, B), jacrev(_stock, 1)(X[:1], W, B))
    gy = torch.randn_like(_stock(X, W, B))
    _close(vjp(_conv, X, W, B)[1](gy), vjp(_stock, X, W, B)[1](gy))
    tangents = tuple(torch.randn_like(t) for t in (X, W, B))
    _close(jvp(_conv, (X, W, B), tangents), jvp(_stock, (X, W, B), tangents))
    for place in range(3):
        operands, tangent = [X, W, B], torch.randn_like((X, W, B)[place])

        def call(conv: Any, value: Tensor, place: int = place, operands: list[Tensor] = operands) -> Tensor:
            return conv(*operands[:place], value, *operands[place + 1 :])

        _close(*(jvp(lambda v, c=conv: call(c, v), (operands[place],), (tangent,)) for conv in (_conv, _stock)))


SMALL = torch.randn(1, 2, 3, 3, dtype=torch.float64), torch.randn(2, 1, 2, 2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)


def _cubes(conv: Any) -> Any:
    """Curved, so that a derivative that one level loses shows at the next."""
    return lambda x, w, b: conv(x, w, b, padding=(1, 0), groups=2).pow(3).sum()


@pytest.mark.parametrize("inner", [jacrev, jacfwd])
@pytest.mark.parametrize("outer", [jacrev, jacfwd])
def test_second_derivatives_by_nested_transforms(outer: Any, inner: Any) -> None:
    ours, stock = (outer(inner(_cubes(conv), (0, 1, 2)), (0, 1, 2))(*SMALL) for conv in (faltung.conv2d, torch.conv2d))
    for mine, theirs in zip(ours, stock):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("transforms", [(grad, grad, grad), (jacfwd, jacfwd, jacfwd), (jacfwd, jacrev, grad), (jacrev, jacfwd, jacrev)])
def test_third_derivatives_by_nested_transforms(transforms: tuple[Any, Any, Any]) -> None:
    results = []
    for conv in (faltung.conv2d, torch.conv2d):
        f = _cubes(conv)
        for transform, place in zip(transforms, (0, 1, 0)):
            f = transform(lambda x, w, b, f=f: f(x, w, b).square().sum(), place)
        results.append(f(*SMALL))
    torch.testing.assert_close(*results)


def test_a_transform_inside_autograd_and_without_derivatives() -> None:
    results = []
    for conv in (faltung.conv2d, torch.conv2d):
        x, w, b = (t.clone().requires_grad_() for t in SMALL)
        outer = torch.autograd.grad(grad(_cubes(conv))(x, w, b).square().sum(), (x, w, b))
        mixed = torch.autograd.grad(jvp(_cubes(conv), (x, w, b), tuple(map(torch.ones_like, (x, w, b))))[1], (x, w, b))

        def unseen(x: Tensor, w: Tensor, b: Tensor, conv: Any = conv) -> Tensor:
            with torch.no_grad():
                y = jvp(lambda v: conv(v, w, b, groups=2), (x,), (torch.ones_like(x),))[1]
            return (y * x[..., :2, :2]).sum()

        results.append((*outer, *mixed, *grad(unseen, (0, 1, 2))(x, w, b), grad(unseen)(x, w, b).requires_grad))
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs)


def _derivative(f: Any, kind: str, direction: Tensor) -> Any:
    """The derivative of a function to a number along ``direction``."""
    if kind == "forward":
        return lambda v: jvp(f, (v,), (direction,))[1]
    return lambda v: (grad(f)(v) * direction).sum()


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("order", [2, 3])
def test_transforms_of_transforms(order: int, place: int) -> None:
    operands = [t.double() for t in (X[:1], W, B)]
    generator = torch.Generator().manual_seed(order)
    directions = [torch.randn(operands[place].shape, generator=generator, dtype=torch.float64) for _ in range(order)]
    for kinds in product(("forward", "reverse"), repeat=order):
        results = []
        for conv in (_conv, _stock):

            def f(v: Tensor, conv: Any = conv) -> Tensor:
                return conv(*operands[:place], v.sin() * 0.5, *operands[place + 1 :]).sin().sum()

            for kind, direction in zip(kinds, directions):
                f = _derivative(f, kind, direction)
            results.append(f(operands[place]))
        torch.testing.assert_close(*results, msg=lambda text, kinds=kinds: f"{kinds}, innermost first: {text}")


def test_per_sample_gradients_of_a_converted_model() -> None:
    stock = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, stride=2, padding=1, padding_mode="circular"))
    model = faltung.convert(stock)
    x = torch.randn(4, 3, 6, 6)
    gradients = []
    for module in (model, stock):
        parameters = {name: p.detach() for name, p in module.named_parameters()}
        one = grad(lambda p, v, m=module: functional_call(m, p, (v[None],)).square().sum())
        gradients.append(vmap(one, (None, 0))(parameters, x))
    for name, value in gradients[0].items():
        _close(value, gradients[1][name])


class Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_see_the_operators() -> None:
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    expected = _stock(x, w)
    with Record() as record:
        y = _conv(x, w)
        y.sum().backward()
    assert [name for name in record.seen if name.startswith("faltung")] == [
        "faltung.conv2d_forward.default",
        "faltung.conv2d_grad_input.default",
        "faltung.conv2d_grad_weight.default",
    ]
    _close(y, expected)


def test_a_dispatch_mode_around_the_backward_alone_sees_the_operators() -> None:
    y = _conv(X.clone().requires_grad_(), W)
    with Record() as record:
        y.sum().backward()
    assert "faltung.conv2d_grad_input.default" in record.seen


def test_function_modes_see_the_function() -> None:
    seen: list[Any] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        y = _conv(X, W, B)
    assert faltung.conv2d in seen
    _close(y, _stock(X, W, B))
    with torch.device("cpu"):
        _close(_conv(X, W, B), _stock(X, W, B))


class Tagged(Tensor):
    pass


def test_subclasses_stay_subclasses() -> None:
    x = X.clone().as_subclass(Tagged)
    y = _conv(x, W, B)
    assert type(y) is Tagged
    _close(y.as_subclass(Tensor), _stock(X, W, B))
    assert type(_conv(X, W.as_subclass(Tagged))) is Tagged


class Logged(Tensor):
    """A wrapper with its own dispatch, as those of sharded and quantized tensors are."""

    seen: ClassVar[list[str]] = []
    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Logged:
        wrapper = Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device)
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))
        unwrapped = [a.inner if isinstance(a, Logged) else a for a in args]
        return Logged(func(*unwrapped, **(kwargs or {})))


def test_wrapper_subclasses_see_the_operator() -> None:
    Logged.seen.clear()
    y = _conv(Logged(X), W, B)
    assert Logged.seen == ["faltung.conv2d_forward.default"]
    _close(y.inner, _stock(X, W, B))


def test_fx_traces_a_call_of_the_function() -> None:
    model = faltung.convert(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()))
    traced = torch.fx.symbolic_trace(model)
    assert faltung.conv2d in [node.target for node in traced.graph.nodes]
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_autocast(dtype: torch.dtype, bias: bool) -> None:
    for x in (X, X.to(dtype)):
        operands = [x.clone().requires_grad_(), W.clone().requires_grad_(), *([B.clone().requires_grad_()] if bias else [])]
        results = []
        for conv in (_conv, _stock):
            with torch.autocast("cpu", dtype=dtype):
                y = conv(*operands)
            results.append((y, *torch.autograd.grad(y.float().square().mean(), operands)))
        for ours, stock in zip(*results):
            assert ours.dtype == stock.dtype
            torch.testing.assert_close(ours, stock, rtol=2e-2, atol=2e-2)


def test_autocast_of_the_operator_itself_and_of_float64() -> None:
    form = ((1, 2), (1, 1, 1, 1), (1, 1), 2, "zeros")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.ops.faltung.conv2d_forward(X, W, B, *form).dtype == torch.bfloat16
        assert _conv(X.double(), W.double()).dtype == _stock(X.double(), W.double()).dtype
        with torch.autocast("cpu", enabled=False):
            assert _conv(X, W).dtype == torch.float32
        with pytest.raises(RuntimeError, match="should be the same"):
            _conv(X.double(), W)


def test_gradients_of_a_batch_of_vectors() -> None:
    x = X.clone().requires_grad_()
    y = _conv(x, W)
    vectors = torch.randn(3, *y.shape)
    (ours,) = torch.autograd.grad(y, x, vectors, is_grads_batched=True)
    for sample in range(3):
        _close(ours[sample], torch.autograd.grad(_stock(x, W), x, vectors[sample])[0])


def test_checkpoint_and_module_transforms() -> None:
    module = faltung.Conv2d(4, 4, 3, padding=1)
    x = X.clone().requires_grad_()
    gradients = []
    for reentrant in (False, True, None):
        y = module(x) if reentrant is None else torch.utils.checkpoint.checkpoint(module, x, use_reentrant=reentrant)
        gradients.append(torch.autograd.grad(y.square().sum(), [x, *module.parameters()]) if reentrant is not True else None)
    _close(gradients[0], gradients[2])
