"""The torch boundary: the registered operators, and the autograd function of plain eager calls.

``faltung::conv2d_forward``, ``conv2d_grad_input`` and ``conv2d_grad_weight`` are closed under differentiation: the gradients of each are calls of the
others, so any order of derivative exists.  Their inputs have four dimensions, paddings are (left, right, top, bottom).  ``channels_last`` states the
format of input, output and their gradients, ``weight_channels_last`` that of the weight's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import Function, forward_ad
from torch.autograd.function import _SingleLevelFunction

from . import layout
from .arguments import Arguments, check, output_size
from .prepared import DTYPE_NAMES, Prepared, choose_weight_format, empty_output, joined_by_groups, prepare, prepared, require_engine
from .problem import Format

__all__ = ["Convolution", "autocast_to", "check_types", "forward", "grad_input", "grad_weight"]

_ARGUMENTS = "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups, str padding_mode"
# Inductor must hand over the strides that the fake kernels saw: they decide the format of the result
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

_grad_enabled = torch.is_grad_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_dispatch_keys = torch._C._dispatch_keys
with torch.inference_mode(False):
    _CPU_KEYS = _dispatch_keys(torch.empty(0, device="cpu"))

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


def check_types(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise RuntimeError where the operands differ in element type, TypeError where there are no kernels for it."""
    if bias is not None and bias.dtype != x.dtype:
        raise RuntimeError(f"Input type ({x.dtype}) and bias type ({bias.dtype}) should be the same")
    if weight.dtype != x.dtype:
        raise RuntimeError(f"Input type ({x.dtype}) and weight type ({weight.dtype}) should be the same")
    if x.dtype not in DTYPE_NAMES:
        raise TypeError(f"faltung has kernels for {', '.join(map(str, DTYPE_NAMES))}, not for {x.dtype}")


def autocast_to(device_type: str, *tensors: Tensor | None) -> list[Any]:
    """The tensors as PyTorch's autocast hands them to its convolution: those of the device and of a float type below float64 in autocast's type."""
    dtype = torch.get_autocast_dtype(device_type)
    return [t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 and t.device.type == device_type else t for t in tensors]


class Convolution(Function):
    """Forward and backward of plain eager tensors, on a prepared convolution.

    Where the backward is itself to be differentiated, or runs under a transform, it is made of the registered operators.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: Prepared) -> Tensor:
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[1] else None, weight if needs[0] else None)
        ctx.call = call
        return call.forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, _ = ctx.needs_input_grad
        call: Prepared = ctx.call
        gx = gw = gb = None
        saved = weight if x is None else x
        if saved is None:
            return None, None, _sum_to_bias(grad_output), None
        if _grad_enabled() or not _is_plain(grad_output, saved):
            return *_differentiable_backward(call, grad_output, x, weight, needs_bias), None
        if needs_input:
            grad_output = call.dense_gradient(grad_output)
            gx = call.grad_input(grad_output, weight)
        if needs_weight:
            gw, gb = call.grad_weight(x, grad_output, needs_bias)
        elif needs_bias:
            gb = _sum_to_bias(grad_output)
        return gx, gw, gb, None


# Both skip Python of PyTorch's that has nothing to do here, a twentieth of a tiny layer's forward and backward: ``Function.apply`` looks for function
# transforms, which no plain call is under, and the node's own ``apply`` looks up which of ``backward`` and ``vjp`` there is.
apply: Callable[..., Tensor] = super(Function, Convolution).apply
Convolution._backward_cls.apply = Convolution.backward  # type: ignore[attr-defined]


def _is_plain(grad_output: Tensor, saved: Tensor) -> bool:
    """Whether the gradient has memory to launch on, as the plain tensor that the forward saved: batched gradients, for one, have none."""
    if type(grad_output) is not Tensor or _dispatch_modes():
        return False
    return bool(_dispatch_keys(grad_output) == (_CPU_KEYS if saved.is_cpu else _dispatch_keys(saved)))


def _sum_to_bias(grad_output: Tensor) -> Tensor:
    return grad_output.sum((0, 2, 3) if grad_output.dim() == 4 else (1, 2))


def _differentiable_backward(
    call: Prepared, grad_output: Tensor, x: Tensor | None, weight: Tensor | None, needs_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    unbatched = grad_output.dim() == 3
    gy = grad_output.unsqueeze(0) if unbatched else grad_output
    channels_last, weight_channels_last = call.problem.format == "nhwc", call.problem.weight_format == "nhwc"
    gx = gw = gb = None
    if weight is not None:
        gx = grad_input(gy, weight, call.problem.input_shape, *call.arguments, channels_last)
        gx = gx.squeeze(0) if unbatched else gx
    if x is not None:
        images = x.unsqueeze(0) if unbatched else x
        gw, gb = grad_weight(images, gy, call.problem.weight_shape, *call.arguments, needs_bias, channels_last, weight_channels_last)
    elif needs_bias:
        gb = _sum_to_bias(grad_output)
    return gx, gw, gb if needs_bias else None


# --- kernels on tensors -------------------------------------------------------------------------------------------------------------------------


def _arguments(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, padding_mode: str) -> Arguments:
    left, right, top, bottom = padding
    return Arguments((stride[0], stride[1]), (left, right, top, bottom), (dilation[0], dilation[1]), groups, padding_mode)


def _forward_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    arguments = _arguments(*rest)
    check_types(x, weight, bias)
    check(x.shape, weight.shape, None if bias is None else bias.shape, arguments)
    require_engine(x.device)
    return prepare(x, weight, bias, arguments).forward(x, weight, bias)


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
    require_engine(grad_output.device)
    weight_shape = tuple(weight.shape)
    weight_format = choose_weight_format(weight_shape, weight.stride(), fmt)
    call = prepared(tuple(input_size), weight_shape, arguments, weight.dtype, weight.device, fmt, weight_format, False)
    return call.grad_input(grad_output, weight)


def _grad_weight_kernel(x: Tensor, grad_output: Tensor, weight_size: Sequence[int], *rest: Any) -> tuple[Tensor, Tensor]:
    arguments, bias, fmt, weight_format = _arguments(*rest[:5]), rest[5], _format(rest[6]), _format(rest[7])
    check_types(x, grad_output, None)
    _check_grad_output(grad_output, x.shape, weight_size, arguments)
    require_engine(x.device)
    call = prepared(tuple(x.shape), tuple(weight_size), arguments, x.dtype, x.device, fmt, weight_format, False)
    gw, gb = call.grad_weight(x, grad_output, bias)
    return gw, x.new_empty(0) if gb is None else gb


# --- kernels on shapes --------------------------------------------------------------------------------------------------------------------------


def _new(like: Tensor, shape: Sequence[int], fmt: Format) -> Tensor:
    memory_format = torch.channels_last if fmt == "nhwc" else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _new_result(like: Tensor, shape: Sequence[int], fmt: Format, groups: int) -> Tensor:
    return _new(like, shape, layout.joined_format(shape, fmt, by_groups=joined_by_groups(like.dtype, like.device), groups=groups))


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    arguments = _arguments(*rest)
    check_types(x, weight, bias)
    check(x.shape, weight.shape, None if bias is None else bias.shape, arguments)
    p, q = output_size(x.shape[2:], weight.shape[2:], arguments.stride, arguments.padding, arguments.dilation)
    shape = (x.shape[0], weight.shape[0], p, q)
    if 0 in x.shape:
        return empty_output(x, shape)
    double_on_cuda = x.is_cuda and x.dtype == torch.float64
    fmt = layout.result_format(x.shape, x.stride(), weight.shape, weight.stride(), double_on_cuda=double_on_cuda)
    return _new_result(x, shape, fmt, arguments.groups)


def _grad_input_fake(grad_output: Tensor, weight: Tensor, input_size: Sequence[int], *rest: Any) -> Tensor:
    check_types(grad_output, weight, None)
    _check_grad_output(grad_output, input_size, weight.shape, _arguments(*rest[:-1]))
    return _new(weight, input_size, "nchw") if 0 in input_size else _new_result(weight, input_size, _format(rest[-1]), rest[3])


def _grad_weight_fake(x: Tensor, grad_output: Tensor, weight_size: Sequence[int], *rest: Any) -> tuple[Tensor, Tensor]:
    check_types(x, grad_output, None)
    _check_grad_output(grad_output, x.shape, weight_size, _arguments(*rest[:5]))
    fmt = "nchw" if 0 in x.shape else _format(rest[7])
    return _new(x, weight_size, fmt), x.new_empty(weight_size[0] if rest[5] else 0)


# --- derivatives --------------------------------------------------------------------------------------------------------------------------------

_Call: TypeAlias = tuple[Any, bool, bool]
"""How autograd's kernel was called: the dispatch keys, and whether derivatives were recorded, reverse and forward."""


class _Forward(_SingleLevelFunction):
    """``conv2d_forward`` under autograd: linear in the input and in the weight, and the bias is added."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, w: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
        needs = ctx.needs_input_grad[1:]
        ctx.save_for_backward(x if needs[1] else None, w if needs[0] else None)
        ctx.save_for_forward(x, w)
        ctx.arguments, ctx.input_shape, ctx.weight_shape = arguments, x.shape, w.shape
        double_on_cuda = x.is_cuda and x.dtype == torch.float64
        fmt = layout.result_format(x.shape, x.stride(), w.shape, w.stride(), double_on_cuda=double_on_cuda)
        ctx.formats = fmt == "nhwc", choose_weight_format(w.shape, w.stride(), fmt) == "nhwc"
        return _in_modes_of(call, forward, x, w, bias, *arguments)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
        x, w = ctx.saved_tensors
        channels_last, weight_channels_last = ctx.formats
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[1:4]
        gx = gw = gb = None
        if needs_input:
            gx = grad_input(gy, w, ctx.input_shape, *ctx.arguments, channels_last)
        if needs_weight:
            gw, gb = grad_weight(x, gy, ctx.weight_shape, *ctx.arguments, needs_bias, channels_last, weight_channels_last)
        elif needs_bias:
            gb = _sum_to_bias(gy)
        return None, gx, gw, gb if needs_bias else None, *[None] * 5

    @staticmethod
    def jvp(ctx: Any, _: None, dx: Tensor | None, dw: Tensor | None, db: Tensor | None, *rest: None) -> Tensor:  # noqa: ARG004
        # a jvp is called with tangents turned off, those of function transforms around it too
        with forward_ad._set_fwd_grad_enabled(True):
            x, w = _primals(ctx)
            parts = [] if dx is None else [forward(dx, w, db, *ctx.arguments)]
            parts += [] if dw is None else [forward(x, dw, db if dx is None else None, *ctx.arguments)]
            return _sum(parts) if parts else forward(torch.zeros_like(x), w, db, *ctx.arguments)


class _GradInput(_SingleLevelFunction):
    """``conv2d_grad_input`` under autograd: bilinear in the gradient of the output and the weight."""

    @staticmethod
    def forward(ctx: Any, call: _Call, gy: Tensor, w: Tensor, input_size: Sequence[int], *rest: Any) -> Tensor:
        ctx.save_for_backward(gy, w)
        ctx.save_for_forward(gy, w)
        ctx.input_size, ctx.rest, ctx.arguments = input_size, rest, rest[:-1]
        ctx.formats = rest[-1], choose_weight_format(w.shape, w.stride(), _format(rest[-1])) == "nhwc"
        return _in_modes_of(call, grad_input, gy, w, input_size, *rest)

    @staticmethod
    def backward(ctx: Any, ggx: Tensor) -> tuple[Any, ...]:
        gy, w = ctx.saved_tensors
        ggy = gw = None
        if ctx.needs_input_grad[1]:
            ggy = forward(ggx, w, None, *ctx.arguments)
        if ctx.needs_input_grad[2]:
            gw, _ = grad_weight(ggx, gy, w.shape, *ctx.arguments, False, *ctx.formats)
        return None, ggy, gw, *[None] * 7

    @staticmethod
    def jvp(ctx: Any, _: None, dgy: Tensor | None, dw: Tensor | None, *rest: None) -> Tensor:  # noqa: ARG004
        with forward_ad._set_fwd_grad_enabled(True):
            gy, w = _primals(ctx)
            parts = [] if dgy is None else [grad_input(dgy, w, ctx.input_size, *ctx.rest)]
            return _sum(parts + ([] if dw is None else [grad_input(gy, dw, ctx.input_size, *ctx.rest)]))


class _GradWeight(_SingleLevelFunction):
    """``conv2d_grad_weight`` under autograd: bilinear in the input and the gradient of the output."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, gy: Tensor, weight_size: Sequence[int], *rest: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, gy)
        ctx.save_for_forward(x, gy)
        ctx.weight_size, ctx.rest, ctx.arguments, ctx.bias, ctx.channels_last = weight_size, rest, rest[:5], rest[5], rest[6]
        return _in_modes_of(call, grad_weight, x, gy, weight_size, *rest)

    @staticmethod
    def backward(ctx: Any, ggw: Tensor, ggb: Tensor) -> tuple[Any, ...]:
        x, gy = ctx.saved_tensors
        gx = ggy = None
        if ctx.needs_input_grad[1]:
            gx = grad_input(gy, ggw, x.shape, *ctx.arguments, ctx.channels_last)
        if ctx.needs_input_grad[2]:
            ggy = forward(x, ggw, ggb if ctx.bias else None, *ctx.arguments)
        return None, gx, ggy, *[None] * 9

    @staticmethod
    def jvp(ctx: Any, _: None, dx: Tensor | None, dgy: Tensor | None, *rest: None) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        with forward_ad._set_fwd_grad_enabled(True):
            x, gy = _primals(ctx)
            by_x = None if dx is None else grad_weight(dx, gy, ctx.weight_size, *ctx.rest)
            by_gy = None if dgy is None else grad_weight(x, dgy, ctx.weight_size, *ctx.rest)
            if by_gy is None:
                assert by_x is not None
                return by_x[0], torch.zeros_like(by_x[1])
            return by_gy[0] if by_x is None else by_x[0] + by_gy[0], by_gy[1]


def _sum(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _primals(ctx: Any) -> list[Tensor]:
    """What a function saved for its ``jvp``, without the tangents that the ``jvp`` is given."""
    return [forward_ad.unpack_dual(tensor).primal for tensor in ctx.saved_tensors]


def _in_modes_of(call: _Call, operator: Any, *args: Any) -> Any:
    """The operator's kernel below autograd, with derivatives as they were where autograd was called.

    ``apply`` turns them off, at every level; but a function transform around the one at hand has its own to take of the same call.
    """
    keyset, grad, tangents = call
    if not torch._C._are_functorch_transforms_active():
        return _below_autograd(operator, keyset, *args)
    with torch.set_grad_enabled(grad), forward_ad._set_fwd_grad_enabled(tangents):
        return _below_autograd(operator, keyset, *args)


def _below_autograd(operator: Any, keyset: Any, *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _autograd_kernel(operator: Any, function: Any) -> Callable[..., Any]:
    """The operator's kernel for autograd, reverse and forward.

    Function transforms come here with their own wrappers around tensors, as for PyTorch's built-in functions.  A ``Function`` would take such a call
    for one from outside and start the transforms anew, so the functions are of the class behind it, which serves one level only.
    """
    apply = function.apply

    def kernel(keyset: Any, *args: Any) -> Any:
        grad, tangents = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()
        if not (grad and torch._C._any_requires_grad(*args)) and not (forward_ad._current_level >= 0 and tangents):
            return _below_autograd(operator, keyset, *args)
        with enable_single_level_autograd_function():
            return apply((keyset, grad, tangents), *args)

    return kernel


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

    def cast_and_forward(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return forward(*autocast_to(device_type, x, weight, bias), *rest)

    return cast_and_forward


def _register() -> None:
    library = torch.library
    for name, kernel, fake, operator, function, vmap in (
        ("conv2d_forward", _forward_kernel, _forward_fake, forward, _Forward, _forward_vmap),
        ("conv2d_grad_input", _grad_input_kernel, _grad_input_fake, grad_input, _GradInput, _grad_input_vmap),
        ("conv2d_grad_weight", _grad_weight_kernel, _grad_weight_fake, grad_weight, _GradWeight, _grad_weight_vmap),
    ):
        for key in ("CPU", "CUDA"):
            _library.impl(name, kernel, key)
        library.register_fake(f"faltung::{name}", fake, lib=_library)
        library.register_vmap(f"faltung::{name}", vmap, lib=_library)
        _library.impl(name, _autograd_kernel(operator, function), "Autograd", with_keyset=True)
    for device_type, autocast in (("cpu", torch._C.DispatchKey.AutocastCPU), ("cuda", torch._C.DispatchKey.AutocastCUDA)):
        _library.impl("conv2d_forward", _forward_autocast(device_type, autocast), autocast.name)


_register()
