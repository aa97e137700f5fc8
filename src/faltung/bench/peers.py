"""Other engines' forward pass of one float32 layer, where their packages are installed: torch.compile, ONNX Runtime, OpenVINO.

Each runs a model of that one layer with its weights frozen, on as many threads as PyTorch has.  So beside them stands faltung with frozen weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch

from ..problem import Format
from .contenders import Contender
from .operands import Operands, pad_stock

__all__ = ["FROZEN", "PEERS", "available", "make_peers"]

FROZEN = "frozen"
"""The provider of rows of :func:`faltung.freeze`."""


def available() -> tuple[str, ...]:
    """The peers whose packages are installed."""
    needs = {"compile": (), "onnxruntime": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}
    return tuple(name for name, packages in needs.items() if all(find_spec(package) for package in packages))


def make_peers(operands: Mapping[Format, Operands], names: tuple[str, ...]) -> Iterator[Contender]:
    """The contenders of ``names`` for float32 forward problems; nothing for another direction, type or padding mode.

    ``operands``: the same values in each format; frozen faltung and torch.compile run in every one of them, the others in NCHW.
    """
    problem = next(iter(operands.values())).problem
    if problem.direction != "forward" or problem.dtype != "f32" or problem.padding_mode != "zeros":
        return
    if names:
        yield from map(_frozen, operands.values())
    for name in names:
        if name == "compile":
            for fmt, tensors in operands.items():
                yield Contender("compile", fmt, _compiled(tensors), "inductor, frozen")
        elif "nchw" in operands:
            yield PEERS[name](operands["nchw"])


def _layer(operands: Operands, kind: type[torch.nn.Conv2d]) -> tuple[torch.nn.Module, bool]:
    """The layer in evaluation mode, and whether it pads by itself."""
    problem = operands.problem
    left, right, top, bottom = problem.padding
    plain = (left, top) == (right, bottom)
    padding = (top, left) if plain else 0
    layer = kind(problem.c, problem.k, (problem.r, problem.s), problem.stride, padding, problem.dilation, problem.g, operands.bias is not None)
    with torch.no_grad():
        layer.weight = torch.nn.Parameter(operands.weight)
        if operands.bias is not None:
            layer.bias = torch.nn.Parameter(operands.bias)
    return layer.eval(), plain


def _frozen(operands: Operands) -> Contender:
    import faltung

    layer, plain = _layer(operands, faltung.Conv2d)
    faltung.freeze(layer)

    def call() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return (layer(operands.x if plain else pad_stock(operands.x, operands.problem)),)

    return Contender(FROZEN, operands.problem.format, call, "", faltung.__version__)


def _compiled(operands: Operands) -> Callable[[], tuple[torch.Tensor, ...]]:
    import torch._inductor.config as inductor

    problem = operands.problem
    model, plain = _layer(operands, torch.nn.Conv2d)
    torch._dynamo.reset()
    run = torch.compile(model if plain else lambda x: model(pad_stock(x, problem)))
    with inductor.patch(freezing=True), torch.no_grad():
        run(operands.x)

    def call() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return (run(operands.x),)

    return call


def _onnx_model(operands: Operands) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    problem = operands.problem
    left, right, top, bottom = problem.padding
    weights = [numpy_helper.from_array(operands.weight.numpy(), "w")]
    if operands.bias is not None:
        weights.append(numpy_helper.from_array(operands.bias.numpy(), "b"))
    node = helper.make_node(
        "Conv", ["x", *(w.name for w in weights)], ["y"],
        kernel_shape=[problem.r, problem.s], strides=list(problem.stride), pads=[top, left, bottom, right], dilations=list(problem.dilation), group=problem.g,
    )  # fmt: skip
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(problem.input_shape))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, list(problem.output_shape))
    graph = helper.make_graph([node], "layer", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


def _onnxruntime(operands: Operands) -> Contender:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(_onnx_model(operands), options, providers=["CPUExecutionProvider"])
    feed = {"x": operands.x.numpy()}
    return Contender("onnxruntime", "nchw", lambda: (torch.from_numpy(session.run(None, feed)[0]),), "", onnxruntime.__version__, pool="onnxruntime")


def _openvino(operands: Operands) -> Contender:
    import openvino

    core = openvino.Core()
    # Without the hint OpenVINO may compute float32 layers in bfloat16.
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(core.read_model(_onnx_model(operands)), "CPU", settings).create_infer_request()
    feed = [operands.x.numpy()]
    return Contender(
        "openvino",
        "nchw",
        lambda: (torch.from_numpy(request.infer(feed, share_inputs=True, share_outputs=True)[0]),),
        "",
        openvino.__version__.split("-")[0],
        pool="openvino",
    )


PEERS: dict[str, Callable[[Operands], Contender]] = {"onnxruntime": _onnxruntime, "openvino": _openvino}
