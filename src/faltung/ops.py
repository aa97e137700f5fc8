"""The torch boundary: the registered operators, and the autograd function of plain eager calls.

``faltung::conv2d_forward``, ``conv2d_grad_input`` and ``conv2d_grad_weight`` are closed under differentiation: the gradients of each are calls of the
others, so any order of derivative exists.  Their inputs have four dimensions, paddings are (left, right, top, bottom).  ``channels_last`` states the
format of input, output and their gradients, ``weight_channels_last`` that of the weight's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import layout
from .arguments import Arguments, check, output_size
from .prepared import DTYPE_NAMES, Prepared, choose_weight_format, empty_output, engine_of, prepare, prepared
from .problem import Format

__all__ = ["Convolution", "autocast_to", "check_types", "forward", "grad_input", "grad_weight"]

_ARGUMENTS = "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups, str padding_mode"
# Inductor must hand over the strides that the fake kernels saw: they decide the format of the result
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

_library = torch.library.Library("faltung", "DEF")
_library.define(f"conv2d_forward(Tensor input, Tensor weight, Tensor? bias, {_ARGUMENTS}) -> Tensor", tags=_TAGS)
_library.define(f"conv2d_grad_input(Tensor grad_output, Tensor weight, SymInt[4] input_size, {_ARGUMENTS}, bool channels_last) -> Tensor", tags=_TAGS)
_library.define(
    f"conv2d_grad_weight(Tensor input, Tensor grad_output, SymInt[4] weight_size, {_ARGUMENTS}, "
    "bool bias, bool channels_last, bool weight_channels_last) -> (Tensor, Tensor)",
    tags=_TAGS,
)

forward: Callable[..., Tensor] = torch.ops.faltung.conv2d_forward.default
grad_input: Callable[..., Tensor] = torch.ops.faltung.conv2d_grad_input.default
grad_weight: Callable[..., tuple[Tensor, Tensor]] = torch.ops.faltung.conv2d_grad_weight.default


def check_types(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:  # noqa: A002
    """Raise RuntimeError where the operands differ in element type, TypeError where there are no kernels for it."""
    if bias is not None and bias.dtype != input.dtype:
        raise RuntimeError(f"Input type ({input.dtype}) and bias type ({bias.dtype}) should be the same")
    if weight.dtype != input.dtype:
        raise RuntimeError(f"Input type ({input.dtype}) and weight type ({weight.dtype}) should be the same")
    if input.dtype not in DTYPE_NAMES:
        raise TypeError(f"faltung has kernels for {', '.join(map(str, DTYPE_NAMES))}, not for {input.dtype}")


def autocast_to(device_type: str, *tensors: Tensor | None) -> list[Any]:
    """The tensors as PyTorch's autocast hands them to its convolution: those of the device and of a float type below float64 in autocast's type."""
    dtype = torch.get_autocast_dtype(device_type)
    return [t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 and t.device.type == device_type else t for t in tensors]


class Convolution(Function):
    """Forward and backward of plain eager tensors, on a prepared convolution.

    Where the backward is itself to be differentiated, or runs under a transform, it is made of the registered operators.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, call: Prepared) -> Tensor:  # noqa: A002
        needs = ctx.needs_input_grad
        ctx.save_for_backward(input if needs[1] else None, weight if needs[0] else None)
        ctx.call = call
        return call.forward(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:  # type: ignore[override]
        input, weight = ctx.saved_tensors  # noqa: A001
        needs_input, needs_weight, needs_bias, _ = ctx.needs_input_grad
        call: Prepared = ctx.call
        gx = gw = gb = None
        if torch.is_grad_enabled() or not _is_plain(grad_output):
            return *_differentiable_backward(call, grad_output, input, weight, needs_bias), None
        if needs_input:
            gx = call.grad_input(grad_output, weight)
        if needs_weight:
            gw, gb = call.grad_weight(input, grad_output, needs_bias)
        elif needs_bias:
            gb = _sum_to_bias(grad_output)
        return gx, gw, gb, None


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and not (torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack())


def _sum_to_bias(grad_output: Tensor) -> Tensor:
    return grad_output.sum((0, 2, 3) if grad_output.dim() == 4 else (1, 2))


def _differentiable_backward(
    call: Prepared, grad_output: Tensor, input: Tensor | None, weight: Tensor | None, needs_bias: bool  # noqa: A002
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    unbatched = grad_output.dim() == 3
    gy = grad_output.unsqueeze(0) if unbatched else grad_output
    channels_last, weight_channels_last = call.problem.format == "nhwc", call.problem.weight_format == "nhwc"
    gx = gw = gb = None
    if weight is not None:
        gx = grad_input(gy, weight, call.problem.input_shape, *call.arguments, channels_last)
        gx = gx.squeeze(0) if unbatched else gx
    if input is not None:
        x = input.unsqueeze(0) if unbatched else input
        gw, gb = grad_weight(x, gy, call.problem.weight_shape, *call.arguments, needs_bias, channels_last, weight_channels_last)
    if needs_bias and input is None:
        gb = _sum_to_bias(grad_output)
    return gx, gw, gb if needs_bias else None


# --- kernels on tensors -------------------------------------------------------------------------------------------------------------------------


def _arguments(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, padding_mode: str) -> Arguments:
    left, right, top, bottom = padding
    return Arguments((stride[0], stride[1]), (left, right, top, bottom), (dilation[0], dilation[1]), groups, padding_mode)


def _require_engine(tensor: Tensor) -> None:
    if engine_of(tensor.device) is None:
        raise NotImplementedError(f"faltung has no kernels for tensors on {tensor.device}")


def _forward_kernel(input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:  # noqa: A002
    arguments = _arguments(*rest)
    check_types(input, weight, bias)
    check(input.shape, weight.shape, None if bias is None else bias.shape, arguments)
    _require_engine(input)
    return prepare(input, weight, bias, arguments).forward(input, weight, bias)


def _format(channels_last: bool) -> Format:
    return "nhwc" if channels_last else "nchw"


def _check_grad_output(grad_output: Tensor, input_size: Sequence[int], weight_size: Sequence[int], arguments: Arguments) -> None:
    check(input_size, weight_size, None, arguments)
    p, q = output_size(input_size[2:], weight_size[2:], arguments.stride, arguments.padding, arguments.dilation)
    k = 0 if input_size[1] == 0 else weight_size[0]
    if tuple(grad_output.shape) != (input_size[0], k, p, q):
        raise RuntimeError(f"Expected a gradient of the output of size {[input_size[0], k, p, q]}, but got {list(grad_output.shape)}")


def _grad_input_kernel(grad_output: Tensor, weight: Tensor, input_size: Sequence[int], *rest: Any) -> Tensor:
    arguments, fmt = _arguments(*rest[:-1]), _format(rest[-1])
    check_types(grad_output, weight, None)
    _check_grad_output(grad_output, input_size, weight.shape, arguments)
    _require_engine(grad_output)
    weight_shape = tuple(weight.shape)
    weight_format = choose_weight_format(weight_shape, weight.stride(), fmt)
    call = prepared(tuple(input_size), weight_shape, arguments, weight.dtype, weight.device, fmt, weight_format, False)
    return call.grad_input(grad_output, weight)


def _grad_weight_kernel(input: Tensor, grad_output: Tensor, weight_size: Sequence[int], *rest: Any) -> tuple[Tensor, Tensor]:  # noqa: A002
    arguments, bias, fmt, weight_format = _arguments(*rest[:5]), rest[5], _format(rest[6]), _format(rest[7])
    check_types(input, grad_output, None)
    _check_grad_output(grad_output, input.shape, weight_size, arguments)
    _require_engine(input)
    call = prepared(tuple(input.shape), tuple(weight_size), arguments, input.dtype, input.device, fmt, weight_format, False)
    gw, gb = call.grad_weight(input, grad_output, bias)
    return gw, input.new_empty(0) if gb is None else gb


# --- kernels on shapes --------------------------------------------------------------------------------------------------------------------------


def _new(like: Tensor, shape: Sequence[int], fmt: Format) -> Tensor:
    memory_format = torch.channels_last if fmt == "nhwc" else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _new_result(like: Tensor, shape: Sequence[int], fmt: Format, groups: int) -> Tensor:
    return _new(like, shape, layout.joined_format(shape, fmt, dtype=DTYPE_NAMES[like.dtype], groups=groups))


def _forward_fake(input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:  # noqa: A002
    arguments = _arguments(*rest)
    check_types(input, weight, bias)
    check(input.shape, weight.shape, None if bias is None else bias.shape, arguments)
    p, q = output_size(input.shape[2:], weight.shape[2:], arguments.stride, arguments.padding, arguments.dilation)
    shape = (input.shape[0], weight.shape[0], p, q)
    if 0 in input.shape:
        return empty_output(input, shape)
    double_on_cuda = input.is_cuda and input.dtype == torch.float64
    fmt = layout.result_format(input.shape, input.stride(), weight.shape, weight.stride(), double_on_cuda=double_on_cuda)
    return _new_result(input, shape, fmt, arguments.groups)


def _grad_input_fake(grad_output: Tensor, weight: Tensor, input_size: Sequence[int], *rest: Any) -> Tensor:
    check_types(grad_output, weight, None)
    _check_grad_output(grad_output, input_size, weight.shape, _arguments(*rest[:-1]))
    return _new(weight, input_size, "nchw") if 0 in input_size else _new_result(weight, input_size, _format(rest[-1]), rest[3])


def _grad_weight_fake(input: Tensor, grad_output: Tensor, weight_size: Sequence[int], *rest: Any) -> tuple[Tensor, Tensor]:  # noqa: A002
    check_types(input, grad_output, None)
    _check_grad_output(grad_output, input.shape, weight_size, _arguments(*rest[:5]))
    fmt = "nchw" if 0 in input.shape else _format(rest[7])
    return _new(input, weight_size, fmt), input.new_empty(weight_size[0] if rest[5] else 0)


# --- derivatives --------------------------------------------------------------------------------------------------------------------------------


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, w, bias, *arguments = inputs
    needs = ctx.needs_input_grad
    ctx.save_for_backward(x if needs[1] else None, w if needs[0] else None)
    ctx.arguments, ctx.input_shape, ctx.weight_shape, ctx.has_bias = arguments, x.shape, w.shape, bias is not None
    double_on_cuda = x.is_cuda and x.dtype == torch.float64
    fmt = layout.result_format(x.shape, x.stride(), w.shape, w.stride(), double_on_cuda=double_on_cuda)
    ctx.formats = fmt == "nhwc", choose_weight_format(w.shape, w.stride(), fmt) == "nhwc"


def _forward_backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
    x, w = ctx.saved_tensors
    channels_last, weight_channels_last = ctx.formats
    needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    gx = gw = gb = None
    if needs_input:
        gx = grad_input(gy, w, ctx.input_shape, *ctx.arguments, channels_last)
    if needs_weight:
        gw, gb = grad_weight(x, gy, ctx.weight_shape, *ctx.arguments, needs_bias, channels_last, weight_channels_last)
    elif needs_bias:
        gb = _sum_to_bias(gy)
    return gx, gw, gb if needs_bias else None, *[None] * 5


def _save_grad_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    gy, w, _, *arguments, channels_last = inputs
    ctx.save_for_backward(gy, w)
    ctx.arguments, ctx.formats = arguments, (channels_last, choose_weight_format(w.shape, w.stride(), _format(channels_last)) == "nhwc")


def _grad_input_backward(ctx: Any, ggx: Tensor) -> tuple[Any, ...]:
    gy, w = ctx.saved_tensors
    ggy = gw = None
    if ctx.needs_input_grad[0]:
        ggy = forward(ggx, w, None, *ctx.arguments)
    if ctx.needs_input_grad[1]:
        gw, _ = grad_weight(ggx, gy, w.shape, *ctx.arguments, False, *ctx.formats)
    return ggy, gw, *[None] * 7


def _save_grad_weight(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ARG001
    x, gy, _, *arguments, bias, channels_last, _ = inputs
    ctx.save_for_backward(x, gy)
    ctx.arguments, ctx.bias, ctx.channels_last = arguments, bias, channels_last


def _grad_weight_backward(ctx: Any, ggw: Tensor, ggb: Tensor) -> tuple[Any, ...]:
    x, gy = ctx.saved_tensors
    gx = ggy = None
    if ctx.needs_input_grad[0]:
        gx = grad_input(gy, ggw, x.shape, *ctx.arguments, ctx.channels_last)
    if ctx.needs_input_grad[1]:
        ggy = forward(x, ggw, ggb if ctx.bias else None, *ctx.arguments)
    return gx, ggy, *[None] * 9


# --- function transforms and autocast -----------------------------------------------------------------------------------------------------------


def _front(tensor: Tensor, axis: int | None, size: int) -> Tensor:
    """``tensor`` with the mapped dimension first; one that is not mapped is expanded."""
    return tensor.expand(size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)


def _into_groups(tensor: Tensor, axis: int | None, size: int) -> Tensor:
    """(b, n, c, h, w) as (n, b * c, h, w): every mapped sample becomes its own groups."""
    moved = _front(tensor, axis, size).transpose(0, 1)
    return moved.reshape(moved.shape[0], moved.shape[1] * moved.shape[2], *moved.shape[3:])


def _into_batch(tensor: Tensor, axis: int) -> Tensor:
    """(b, n, c, h, w) as (b * n, c, h, w)."""
    moved = tensor.movedim(axis, 0)
    return moved.reshape(moved.shape[0] * moved.shape[1], *moved.shape[2:])


def _out_of_groups(tensor: Tensor, size: int) -> Tensor:
    """(n, b * c, h, w) as (n, b, c, h, w)."""
    return tensor.unflatten(1, (size, tensor.shape[1] // size))


def _forward_vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, w: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, int]:
    size = info.batch_size
    x_axis, w_axis, b_axis = in_dims[:3]
    if w_axis is None and (bias is None or b_axis is None):
        return forward(_into_batch(x, x_axis), w, bias, *rest).unflatten(0, (size, -1)), 0
    if w_axis is None and x_axis is not None:
        y = forward(_into_batch(x, x_axis), w, None, *rest).unflatten(0, (size, -1))
        return y + _front(bias, b_axis, size)[:, None, :, None, None], 0  # type: ignore[arg-type]
    stride, padding, dilation, groups, mode = rest
    weights = _front(w, w_axis, size).flatten(0, 1)
    biases = None if bias is None else _front(bias, b_axis, size).flatten()
    y = forward(_into_groups(x, x_axis, size), weights, biases, stride, padding, dilation, groups * size, mode)
    return _out_of_groups(y, size), 1


def _grad_input_vmap(info: Any, in_dims: tuple[Any, ...], gy: Tensor, w: Tensor, input_size: Sequence[int], *rest: Any) -> tuple[Tensor, int]:
    size = info.batch_size
    gy_axis, w_axis = in_dims[:2]
    n, c, *plane = input_size
    if w_axis is None:
        return grad_input(_into_batch(gy, gy_axis), w, [size * n, c, *plane], *rest).unflatten(0, (size, n)), 0
    stride, padding, dilation, groups, mode, channels_last = rest
    weights = _front(w, w_axis, size).flatten(0, 1)
    sizes = [n, size * c, *plane]
    gx = grad_input(_into_groups(gy, gy_axis, size), weights, sizes, stride, padding, dilation, groups * size, mode, channels_last)
    return _out_of_groups(gx, size), 1


def _grad_weight_vmap(
    info: Any, in_dims: tuple[Any, ...], x: Tensor, gy: Tensor, weight_size: Sequence[int], *rest: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int | None, int | None]]:
    size = info.batch_size
    stride, padding, dilation, groups, mode, bias, *formats = rest
    k, *others = weight_size
    arguments = stride, padding, dilation, groups * size, mode
    gw, gb = grad_weight(_into_groups(x, in_dims[0], size), _into_groups(gy, in_dims[1], size), [size * k, *others], *arguments, bias, *formats)
    return (gw.unflatten(0, (size, k)), gb.unflatten(0, (size, k)) if bias else gb), (0, 0 if bias else None)


def _forward_autocast(device_type: str, key: Any) -> Callable[..., Tensor]:
    keys = torch._C.DispatchKeySet(key)

    def cast_and_forward(input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:  # noqa: A002
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return forward(*autocast_to(device_type, input, weight, bias), *rest)

    return cast_and_forward


def _register() -> None:
    library = torch.library
    for name, kernel, fake, save, backward, vmap in (
        ("conv2d_forward", _forward_kernel, _forward_fake, _save_forward, _forward_backward, _forward_vmap),
        ("conv2d_grad_input", _grad_input_kernel, _grad_input_fake, _save_grad_input, _grad_input_backward, _grad_input_vmap),
        ("conv2d_grad_weight", _grad_weight_kernel, _grad_weight_fake, _save_grad_weight, _grad_weight_backward, _grad_weight_vmap),
    ):
        for key in ("CPU", "CUDA"):
            _library.impl(name, kernel, key)
        qualified = f"faltung::{name}"
        library.register_fake(qualified, fake, lib=_library)
        library.register_autograd(qualified, backward, setup_context=save, lib=_library)
        library.register_vmap(qualified, vmap, lib=_library)
    for device_type, key in (("cpu", torch._C.DispatchKey.AutocastCPU), ("cuda", torch._C.DispatchKey.AutocastCUDA)):
        _library.impl("conv2d_forward", _forward_autocast(device_type, key), key.name)


_register()
