"""Frozen weights: the same bits without packing, changes that can be seen are seen, and nothing packed leaves the layer."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import faltung
from faltung.cpu import frozen

LAYERS: tuple[tuple[dict[str, Any], tuple[int, ...]], ...] = (
    ({"in_channels": 64, "out_channels": 64, "kernel_size": 3, "padding": 1}, (2, 64, 28, 28)),  # Winograd, U kept
    ({"in_channels": 64, "out_channels": 80, "kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, (1, 64, 9, 9)),
    ({"in_channels": 512, "out_channels": 512, "kernel_size": 3, "padding": 1, "bias": False}, (1, 512, 14, 14)),  # U is never written
    ({"in_channels": 24, "out_channels": 40, "kernel_size": 1}, (2, 24, 13, 11)),
    ({"in_channels": 24, "out_channels": 40, "kernel_size": (5, 3), "stride": 2, "padding": (2, 0)}, (3, 24, 15, 14)),
    ({"in_channels": 34, "out_channels": 38, "kernel_size": 3, "groups": 2, "dilation": 2}, (1, 34, 15, 14)),
    ({"in_channels": 3, "out_channels": 5, "kernel_size": 3, "padding": "same"}, (3, 9, 9)),  # unbatched
    ({"in_channels": 32, "out_channels": 32, "kernel_size": 3, "groups": 4}, (2, 32, 8, 8)),  # nothing to keep
    ({"in_channels": 16, "out_channels": 16, "kernel_size": 3, "groups": 16}, (2, 16, 8, 8)),
)


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every frozen plan made."""
    made: list[object] = []
    initialize = frozen.FrozenPlan.__init__

    def count(self: Any, *args: Any) -> None:
        made.append(self)
        initialize(self, *args)

    monkeypatch.setattr(frozen.FrozenPlan, "__init__", count)
    return made


def layer(**arguments: Any) -> faltung.Conv2d:
    values: dict[str, Any] = {"in_channels": 20, "out_channels": 24, "kernel_size": 3, **arguments}
    return faltung.Conv2d(**values).eval()


@torch.no_grad()
def fresh(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The output by the function, which knows of nothing frozen."""
    return faltung.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups, padding_mode="zeros")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_same_bits(dtype: torch.dtype, memory_format: torch.memory_format, packings: list[object]) -> None:
    kept = in_place = 0
    for arguments, shape in LAYERS:
        conv = faltung.Conv2d(**arguments).to(dtype).to(memory_format=memory_format).eval()
        x = torch.randn(shape).to(dtype)
        x = x.contiguous(memory_format=memory_format) if x.dim() == 4 else x
        with torch.no_grad():
            expected = conv(x)
            assert faltung.freeze(conv) is conv
            for _ in range(3):
                output = conv(x)
                assert torch.equal(output, expected), arguments
                assert output.stride() == expected.stride()
            twice = conv(x * 2)
            assert torch.equal(faltung.unfreeze(conv)(x * 2), twice)
        # nothing is kept of weights that are read where they lie
        told = faltung.explain(faltung.freeze(conv), x).parts[0]
        assert len(packings) == (told.facts["frozen_bytes"] > 0)
        in_place += told.implementation == "planes" and not packings
        kept += len(packings)
        packings.clear()
    assert kept + in_place >= 5


def test_any_strides_of_input_and_weight() -> None:
    conv = layer()
    conv.weight = nn.Parameter(torch.randn(24, 20, 3, 6)[..., ::2])
    x = torch.randn(2, 20, 9, 22)[..., ::2]
    with torch.inference_mode():
        expected = conv(x)
        faltung.freeze(conv)
        assert torch.equal(conv(x), expected)
        assert torch.equal(conv(x), expected)


def test_weights_are_not_read_again_until_something_can_be_seen(packings: list[object]) -> None:
    conv = faltung.freeze(layer())
    x = torch.randn(1, 20, 8, 8)
    with torch.no_grad():
        before = conv(x)
        conv.weight.data.zero_()  # leaves no trace, which is why freezing is asked for
        assert torch.equal(conv(x), before)
        assert len(packings) == 1
        assert torch.equal(faltung.unfreeze(conv)(x), fresh(conv, x))
        assert not torch.equal(conv(x), before)


def _change_bias(conv: nn.Conv2d) -> None:
    assert conv.bias is not None
    with torch.no_grad():
        conv.bias.add_(1)


def _change_in_place(conv: nn.Conv2d) -> None:
    with torch.no_grad():
        conv.weight.mul_(2)


def _step(conv: nn.Conv2d) -> None:
    for parameter in conv.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(conv.parameters(), lr=0.1).step()


CHANGES = {
    "in place": _change_in_place,
    "bias": _change_bias,
    "optimizer": _step,
    "data": lambda conv: setattr(conv.weight, "data", torch.randn_like(conv.weight)),
    "parameter": lambda conv: setattr(conv, "weight", nn.Parameter(torch.randn_like(conv.weight))),
    "bias removed": lambda conv: setattr(conv, "bias", None),
    "load_state_dict": lambda conv: conv.load_state_dict({name: torch.randn_like(value) for name, value in conv.state_dict().items()}),
    "channels_last": lambda conv: conv.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_seen(name: str) -> None:
    conv = faltung.freeze(layer())
    x = torch.randn(2, 20, 8, 8)
    for _ in range(2):
        with torch.no_grad():
            before = conv(x)
        CHANGES[name](conv)
        with torch.no_grad():
            assert torch.equal(conv(x), fresh(conv, x))
            assert name in ("channels_last", "bias removed") or not torch.equal(conv(x), before)


def test_memory_that_is_freed_does_not_come_back_as_another_weight() -> None:
    conv = faltung.freeze(layer())
    x = torch.randn(1, 20, 8, 8)
    with torch.no_grad():
        for _ in range(20):
            conv(x)
            conv.weight.data = torch.randn_like(conv.weight)
            conv.weight.data = torch.randn_like(conv.weight)
            assert torch.equal(conv(x), fresh(conv, x))


def test_another_type() -> None:
    conv, x = faltung.freeze(layer()), torch.randn(1, 20, 8, 8)
    with torch.no_grad():
        conv(x)
        conv.double()
        assert torch.equal(conv(x.double()), fresh(conv, x.double()))
        with pytest.raises(RuntimeError, match="should be the same"):
            conv(x)


def test_training_mode_ends_it() -> None:
    model = nn.Sequential(layer(), nn.ReLU(), nn.Sequential(layer(in_channels=24)))
    faltung.freeze(model)
    assert model[0].frozen
    model.eval()
    assert model[0].frozen
    model.train()
    assert not model[0].frozen
    assert not model[2][0].frozen
    with pytest.raises(RuntimeError, match="call its eval"):
        faltung.freeze(model)
    assert not model[0].frozen
    with pytest.raises(ValueError, match=r"faltung\.convert"):
        faltung.freeze(nn.Sequential(nn.Conv2d(3, 3, 3)).eval())
    assert faltung.unfreeze(model) is model


def test_derivatives_do_not_use_it(packings: list[object]) -> None:
    conv, x = layer(), torch.randn(1, 20, 8, 8, requires_grad=True)
    expected = torch.autograd.grad(conv(x).square().sum(), [x, *conv.parameters()])
    faltung.freeze(conv)
    for a, b in zip(torch.autograd.grad(conv(x).square().sum(), [x, *conv.parameters()]), expected):
        assert torch.equal(a, b)
    assert not packings
    conv.requires_grad_(False)
    assert torch.equal(conv(x.detach()), fresh(conv, x))
    assert len(packings) == 1


def test_what_stands_between_does_not_use_it(packings: list[object]) -> None:
    conv, x = faltung.freeze(layer()), torch.randn(2, 20, 8, 8)
    with torch.no_grad():
        expected = fresh(conv, x)
        torch.testing.assert_close(torch.vmap(conv)(x[:, None])[:, 0], expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert conv(x).dtype == torch.bfloat16
        assert not packings
        other = {name: torch.randn_like(value) for name, value in conv.named_parameters()}
        for _ in range(3):
            output = torch.func.functional_call(conv, other, (x,))
            assert torch.equal(output, faltung.conv2d(x, other["weight"], other["bias"]))
        assert torch.equal(conv(x), expected)


def test_computed_weights_are_not_kept(packings: list[object]) -> None:
    conv = nn.utils.parametrizations.weight_norm(layer())
    old = prune.random_unstructured(layer(), "weight", 0.5)
    x = torch.randn(1, 20, 8, 8)
    faltung.freeze(nn.Sequential(conv, old))
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(conv(x), fresh(conv, x))
            conv.parametrizations.weight.original0.data.mul_(2)
            assert torch.equal(old(x), fresh(old, x))
            old.weight_orig.data.mul_(2)
    assert not packings


def test_copies_pack_anew(packings: list[object]) -> None:
    conv, x = faltung.freeze(layer()), torch.randn(1, 20, 8, 8)
    with torch.no_grad():
        expected = conv(x)
        assert set(conv.state_dict()) == {"weight", "bias"}
        saved = io.BytesIO()
        torch.save(conv, saved)
        assert len(pickle.dumps(conv)) < 24 * 20 * 9 * 4 + 6000  # the weight alone
        for twin in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv)), torch.load(io.BytesIO(saved.getvalue()), weights_only=False)):
            packings.clear()
            twin.weight.data.mul_(3)
            twin.bias.data.mul_(3)
            assert twin.frozen
            torch.testing.assert_close(twin(x), 3 * expected)
            assert len(packings) == 1
        shared = faltung.convert(nn.Sequential(conv))
        assert torch.equal(shared(x), expected)
        assert torch.equal(conv(x), expected)


def test_converted_subclasses_and_lazy_layers() -> None:
    class Scaled(nn.Conv2d):
        calls = 0

        def train(self, mode: bool = True) -> Scaled:
            self.calls += 1
            return super().train(mode)  # type: ignore[return-value]

    model = faltung.convert(nn.Sequential(Scaled(20, 24, 3), faltung.LazyConv2d(16, 1))).eval()
    x = torch.randn(1, 20, 8, 8)
    with torch.no_grad():
        expected = model(x)
        faltung.freeze(model)
        assert torch.equal(model(x), expected)
        calls = model[0].calls
        model.train()
        assert model[0].calls == calls + 1
        assert not any(part.frozen for part in model)
        lazy = faltung.freeze(faltung.LazyConv2d(16, 1).eval())
        assert torch.equal(lazy(x), fresh(lazy, x))
        assert lazy.frozen


def test_sizes_share_their_weights_and_their_number_is_bounded(packings: list[object]) -> None:
    conv = faltung.freeze(layer(in_channels=64, out_channels=64, kernel_size=1, bias=False))
    with torch.no_grad():
        conv(torch.randn(1, 64, 16, 16).to(memory_format=torch.channels_last))
        assert conv._frozen is not None
        once = conv._frozen.bytes
        assert once >= 64 * 64 * 4
        for n in range(1, 24):
            x = torch.randn(n, 64, 16, 16).to(memory_format=torch.channels_last)
            assert torch.equal(conv(x), fresh(conv, x))
        assert len(conv._frozen._entries) == 16
        assert len(packings) == 23
        assert conv._frozen.bytes <= 2 * once


def test_many_threads_serve_one_layer() -> None:
    convs = [faltung.freeze(layer(in_channels=64, out_channels=64, padding=1)), faltung.freeze(layer(in_channels=64, out_channels=72, stride=2))]
    inputs = [torch.randn(1, 64, size, 10) for size in (8, 9, 8, 10)]
    expected = [[fresh(conv, x) for x in inputs] for conv in convs]
    wrong: list[str] = []
    start = threading.Barrier(4)

    def serve(index: int) -> None:
        start.wait()
        with torch.inference_mode():
            for turn in range(60):
                for i, conv in enumerate(convs):
                    if not torch.equal(conv(inputs[index]), expected[i][index]):
                        wrong.append(f"thread {index}, turn {turn}, layer {i}")

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_do_not_change_bits() -> None:
    conv, x = faltung.freeze(layer(in_channels=64, out_channels=64)), torch.randn(2, 64, 20, 20)
    threads = torch.get_num_threads()
    with torch.no_grad():
        expected = conv(x)
        try:
            for count in (1, 3):
                torch.set_num_threads(count)
                assert torch.equal(conv(x), expected)
        finally:
            torch.set_num_threads(threads)


def test_explanation_has_the_memory() -> None:
    conv, x = layer(in_channels=64, out_channels=64), torch.randn(1, 64, 20, 20)
    assert "frozen_bytes" not in faltung.explain(conv, x).parts[0].facts
    faltung.freeze(conv)
    parts = faltung.explain(conv, x, measure=True).parts
    with torch.no_grad():
        conv(x)
    assert conv._frozen is not None
    assert parts[0].facts["frozen_bytes"] == conv._frozen.bytes > 0
    assert parts[0].measured_seconds is not None
    assert all("frozen_bytes" not in part.facts for part in parts[1:])
