"""``torch.compile`` and ``torch.export`` of models on faltung."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import faltung

BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def _model() -> nn.Module:
    return faltung.convert(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding="same", groups=8, padding_mode="reflect"),
            nn.Conv2d(8, 4, (3, 2), stride=2, bias=False),
        )
    )


def _gradients(model: Any, x: torch.Tensor, parameters: list[nn.Parameter]) -> tuple[torch.Tensor, ...]:
    x = x.detach().requires_grad_()
    y = model(x)
    return y, *torch.autograd.grad(y.square().sum(), [x, *parameters])


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
def test_converted_model_compiles_to_one_graph(last: bool) -> None:
    model = _model()
    if last:
        model = model.to(memory_format=torch.channels_last)
    compiled = torch.compile(model, backend=BACKEND, fullgraph=True)
    parameters = list(model.parameters())
    x = torch.randn(2, 3, 8, 7)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    for ours, eager in zip(_gradients(compiled, x, parameters), _gradients(model, x, parameters)):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
        assert ours.stride() == eager.stride()


def test_graph_holds_the_registered_operator() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = _model().eval()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(torch.randn(1, 3, 8, 8))
    assert len(graphs) == 1
    targets = [node.target for node in graphs[0].graph.nodes]
    assert targets.count(torch.ops.faltung.conv2d_forward.default) == 3


def test_dynamic_shapes_compile_once() -> None:
    model = _model().eval()
    counter = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for shape in ((2, 3, 8, 7), (3, 3, 9, 12), (5, 3, 16, 11)):
        x = torch.randn(shape)
        parameters = list(model.parameters())
        for ours, eager in zip(_gradients(compiled, x, parameters), _gradients(model, x, parameters)):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1], "another shape was compiled anew"


@pytest.mark.slow
def test_inductor() -> None:
    model = _model()
    compiled = torch.compile(model, fullgraph=True)
    parameters = list(model.parameters())
    for last in (False, True):
        x = torch.randn(2, 3, 8, 7)
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        for ours, eager in zip(_gradients(compiled, x, parameters), _gradients(model, x, parameters)):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
        assert compiled(x).stride() == model(x).stride()


def test_function_compiles_with_every_form_of_arguments() -> None:
    w, b = torch.randn(4, 3, 3, 3), torch.randn(4)
    cases: list[dict[str, Any]] = [
        {"stride": 2},
        {"padding": "same", "stride": [2, 1]},
        {"padding": (1, 0, 2, 1), "padding_mode": "replicate"},
        {"dilation": (2, 1), "padding": (2,)},
    ]
    for kwargs in cases:
        for x in (torch.randn(1, 3, 8, 8), torch.randn(3, 8, 8)):
            compiled = torch.compile(lambda x, w, b, kwargs=kwargs: faltung.conv2d(x, w, b, **kwargs).relu(), backend=BACKEND, fullgraph=True)
            torch.testing.assert_close(compiled(x, w, b), faltung.conv2d(x, w, b, **kwargs).relu())


def test_compiling_refuses_what_eager_refuses() -> None:
    compiled = torch.compile(lambda x, w: faltung.conv2d(x, w, stride=0), backend=BACKEND)
    with pytest.raises(RuntimeError, match="non-positive stride"):
        compiled(torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3))


def test_compiled_autocast() -> None:
    model = _model().eval()

    def call(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    x = torch.randn(2, 3, 8, 8)
    eager = call(x)
    assert eager.dtype == torch.bfloat16
    compiled = torch.compile(call, backend=BACKEND, fullgraph=True)(x)
    assert compiled.dtype == torch.bfloat16
    torch.testing.assert_close(compiled, eager, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    model = _model().eval()
    x = torch.randn(2, 3, 8, 7)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    assert sum(node.target is torch.ops.faltung.conv2d_forward.default for node in exported.graph.nodes) == 3
    other = torch.randn(5, 3, 8, 7)
    torch.testing.assert_close(exported.module()(other), model(other), rtol=1e-4, atol=1e-5)


def test_fake_tensors_have_the_strides_of_real_ones() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    w = torch.randn(4, 3, 3, 3)
    for x in (torch.randn(2, 3, 8, 7), torch.randn(2, 3, 8, 7).contiguous(memory_format=torch.channels_last), torch.randn(3, 8, 7)):
        real = faltung.conv2d(x, w, padding=1)
        with FakeTensorMode() as mode:
            fake = faltung.conv2d(mode.from_tensor(x), mode.from_tensor(w), padding=1)
        assert fake.shape == real.shape
        assert fake.stride() == real.stride()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx(dynamo: bool, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    if dynamo:
        pytest.importorskip("onnxscript")
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1, padding_mode="reflect"), nn.Conv2d(8, 4, 2))
    x = torch.randn(2, 3, 12, 13)
    nodes = []
    for number, form in enumerate((faltung.convert(model.eval()), model)):
        file = tmp_path / f"{number}.onnx"
        torch.onnx.export(form, (x,), file, dynamo=dynamo)
        nodes.append([node.op_type for node in onnx.load(file).graph.node])
    assert nodes[0].count("Conv") == nodes[1].count("Conv") == 3
    assert set(nodes[0]) == set(nodes[1])
