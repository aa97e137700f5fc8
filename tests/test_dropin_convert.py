"""Putting faltung under existing models."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import faltung


class Scaled(nn.Conv2d):
    """Keeps forward and adds something else."""

    def scale(self) -> float:
        return 2.0


class OwnForward(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight * 2, bias)


def _model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="reflect"), nn.Conv2d(8, 4, 1)),
        nn.ConvTranspose2d(4, 4, 2, stride=2),
    )


def _computed_by_faltung(model: nn.Module) -> int:
    return sum(isinstance(m, faltung.Conv2d) for m in model.modules())


@pytest.mark.parametrize("inplace", [False, True])
def test_every_conv2d_is_converted_and_shares_parameters(inplace: bool) -> None:
    model = _model().eval()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    converted = faltung.convert(model, inplace=inplace)
    assert (converted is model) == inplace
    assert _computed_by_faltung(converted) == 3
    assert _computed_by_faltung(model) == (3 if inplace else 0)
    assert all(p is parameters[name] for name, p in converted.named_parameters())
    assert all(b is buffers[name] for name, b in converted.named_buffers())
    assert not converted.training
    torch.testing.assert_close(converted(x), expected, rtol=1e-4, atol=1e-5)
    assert list(converted.state_dict()) == list(model.state_dict())


def test_report() -> None:
    model = nn.ModuleDict(
        {
            "plain": nn.Conv2d(3, 4, 3),
            "scaled": Scaled(3, 4, 3),
            "own": OwnForward(3, 4, 3),
            "own_conv": OwnConvForward(3, 4, 3),
            "transposed": nn.ConvTranspose2d(3, 4, 3),
            "one": nn.Conv1d(3, 4, 3),
            "patched": nn.Conv2d(3, 4, 3),
            "linear": nn.Linear(3, 4),
        }
    )
    model["patched"].forward = lambda x: x  # type: ignore[method-assign]
    before = faltung.conversion_report(model)
    assert not before.converted
    assert {e.name for e in before.kept if not e.reason} == {"plain", "scaled"}
    report = faltung.conversion_report(faltung.convert(model))
    assert {e.name for e in report.converted} == {"plain", "scaled"}
    reasons = {e.name: e.reason for e in report.kept}
    assert set(reasons) == {"own", "own_conv", "transposed", "one", "patched"}
    assert "overrides forward" in reasons["own"]
    assert "overrides _conv_forward" in reasons["own_conv"]
    assert "transposed" in reasons["transposed"]
    assert "two-dimensional" in reasons["one"]
    assert "replaced" in reasons["patched"]
    text = str(report)
    assert text.startswith("2 of 7 convolutions run on faltung")
    assert all(name in text for name in reasons)


def test_subclass_keeps_its_class_and_its_methods() -> None:
    module = faltung.convert(Scaled(3, 4, 3, padding=1))
    assert isinstance(module, Scaled)
    assert isinstance(module, faltung.Conv2d)
    assert module.scale() == 2.0
    x = torch.randn(1, 3, 5, 5)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(copied) is type(module)
        assert torch.equal(copied(x), module(x))
    assert type(faltung.convert(Scaled(3, 4, 3))) is type(module)


class Locked(nn.Conv2d):
    """Leaves its lock out of its state, as one that is to be copied must."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock = threading.Lock()


def test_subclass_decides_on_its_state() -> None:
    module = faltung.convert(Locked(3, 4, 3))
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(copied) is type(module)
        assert copied.lock is not module.lock
        assert torch.equal(copied.weight, module.weight)


def test_hooks_and_training_flag_are_kept() -> None:
    seen: list[str] = []
    model = _model()
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    model[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    model[0].weight.register_hook(lambda grad: seen.append("weight"))
    converted = faltung.convert(model)
    assert converted.training
    converted(torch.randn(2, 3, 6, 6, requires_grad=True)).sum().backward()
    assert seen == ["forward", "weight", "backward"]
    assert model[0].weight.grad is converted[0].weight.grad


def test_parametrized_modules_are_converted_and_can_be_undone() -> None:
    module = parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    x = torch.randn(1, 3, 5, 5)
    expected = module(x)
    converted = faltung.convert(module)
    assert isinstance(converted, faltung.Conv2d)
    assert parametrize.is_parametrized(converted, "weight")
    torch.testing.assert_close(converted(x), expected)
    assert converted.parametrizations.weight.original0 is module.parametrizations.weight.original0
    parametrize.remove_parametrizations(converted, "weight")
    assert type(converted) is faltung.Conv2d
    torch.testing.assert_close(converted(x), expected)


def test_lazy_modules_are_converted() -> None:
    model = faltung.convert(nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU()))
    model(torch.randn(1, 3, 5, 5))
    assert type(model[0]) is faltung.Conv2d


def test_converting_twice_changes_nothing() -> None:
    model = faltung.convert(_model())
    classes = [type(m) for m in model.modules()]
    assert [type(m) for m in faltung.convert(model, inplace=True).modules()] == classes


def test_a_module_used_twice_stays_one_module() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    model = faltung.convert(nn.Sequential(conv, nn.ReLU(), conv))
    assert model[0] is model[2]
    assert isinstance(model[0], faltung.Conv2d)


@pytest.mark.filterwarnings("ignore")
def test_scripted_modules_are_left() -> None:
    model = nn.Sequential(torch.jit.script(nn.Conv2d(3, 4, 3)))
    report = faltung.conversion_report(faltung.convert(model, inplace=True))
    assert [e.converted for e in report.entries] == [False]
    assert "script" in report.entries[0].reason


def _ran_on_faltung(function: Any) -> bool:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return not any("convolution" in event.key for event in profile.key_averages())


def test_accelerate_catches_calls_of_the_function_and_modules() -> None:
    x, w, b = torch.randn(1, 3, 6, 6), torch.randn(4, 3, 3, 3), torch.randn(4)
    module = nn.Conv2d(3, 4, 3, padding="same")
    calls: list[Any] = [
        lambda: torch.conv2d(x, w, b, 1, 1),
        lambda: F.conv2d(x, w, bias=b, padding="same", dilation=2),
        lambda: F.conv2d(input=x, weight=w),
        lambda: module(x),
    ]
    for call in calls:
        expected = call()
        assert not _ran_on_faltung(call)
        with faltung.accelerate():
            assert _ran_on_faltung(call)
            torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-5)
        assert not _ran_on_faltung(call)


def test_accelerate_trains_and_leaves_other_functions_and_types_alone() -> None:
    x, w = torch.randn(1, 2, 5, 5), torch.randn(2, 2, 3, 3, requires_grad=True)
    with faltung.accelerate():
        F.conv2d(x, w).sum().backward()
        integers = torch.conv2d(torch.ones(1, 1, 3, 3, dtype=torch.int64), torch.ones(1, 1, 2, 2, dtype=torch.int64))
        volume = F.conv3d(torch.ones(1, 1, 3, 3, 3), torch.ones(1, 1, 2, 2, 2))
    assert w.grad is not None
    assert integers.tolist() == [[[[4, 4], [4, 4]]]]
    assert volume.shape == (1, 1, 2, 2, 2)
