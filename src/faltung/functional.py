"""``conv2d``: every form of the arguments ends here.

A call on plain eager tensors takes the shortest way: a look at the operands, one allocation, one launch.  Whatever stands between PyTorch and such a
call (a compiler, a transform, a mode, a subclass of Tensor) gets a registered operator to see.

Where a call repeats the last one with its weight, the look is PyTorch's own guard, what ``torch.compile`` asks before it runs compiled code: it compares the
class, dispatch keys, dtype, device, sizes, strides and ``requires_grad`` of all operands, and what is active around the call (autocast, transforms, modes of
dispatch, tracing), in one call and a quarter of the time that a signature takes to be built and found.  It is no part of PyTorch's public interface.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import config, ops
from .arguments import Arguments, Padding, Sizes, check, conv2d_output_size, normalize
from .flops import tell_counters
from .prepared import DTYPE_NAMES, Prepared, bounded, has_engine, prepare, require_engine

__all__ = ["conv2d", "conv2d_output_size", "is_plain", "prepared_call", "reason_for_stock", "resolve"]

TensorGuards: Any
try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # pragma: no cover
    TensorGuards = None

_STRIDED = torch.strided
_PLAIN = frozenset({Tensor, Parameter})
_calls: dict[Any, tuple[Prepared, Any, Any, Any]] = {}
"""By signature: the convolution, and the stride, padding and dilation that its first call brought."""
_repeated: dict[int, _Repeated] = {}
"""By the weight's identity."""

# looked up once: a call makes about twenty of these, and each dot costs as much as a small kernel's inner loop
_function_modes = torch._C._len_torch_function_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state
_autocasting = torch._C._is_any_autocast_enabled
_grad_enabled = torch.is_grad_enabled
_threads = torch.get_num_threads
_compiling = torch.compiler.is_dynamo_compiling
_options = config.current
_apply = ops.apply


def conv2d(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
) -> Tensor:
    """Convolve ``input`` (n, c, h, w), or unbatched (c, h, w), with ``weight`` (k, c / groups, r, s), and add ``bias`` (k).

    All of one dtype: float32, float64, bfloat16 or float16 (other types go to PyTorch's own convolution).  The arguments are those of
    :func:`torch.nn.functional.conv2d`, with three additions: ``padding`` may be four numbers (left, right, top, bottom), ``'same'`` may come with
    a stride, and ``padding_mode`` is one of ``zeros``, ``reflect``, ``replicate``, ``circular``.

    Returns (n, k, p, q), or (k, p, q) for an unbatched input, in ``channels_last`` where input or weight is.

    Raises TypeError, ValueError or RuntimeError where ``torch.nn.functional.conv2d`` does.
    """
    if _compiling():
        return _general(input, weight, bias, stride, padding, dilation, groups, padding_mode)
    repeated = _repeated.get(id(weight))
    if repeated is not None and repeated.known is not None and repeated.weight() is weight:
        kind, bias_then, check, call, known_stride, known_padding, known_dilation, known_groups, mode, derivatives, threads, token = repeated.known
        if (
            (stride is known_stride or _same(stride, known_stride))
            and (padding is known_padding or _same(padding, known_padding))
            and (dilation is known_dilation or _same(dilation, known_dilation))
            and groups is known_groups
            and padding_mode == mode
            and bias_then() is bias
            and _threads() == threads
            and _options().token == token
            and not _function_modes()
            and not _transforms()
            and forward_ad._current_level < 0
            # the guard asks for sizes and strides first, and ends the process where there are none
            and type(input) is kind
            and input.layout is _STRIDED
            and not input.is_nested
            and (check(input, weight) if bias is None else check(input, weight, bias))
        ):
            return _apply(input, weight, bias, call) if derivatives and _grad_enabled() else call.forward(input, weight, bias)
    return _by_signature(input, weight, bias, stride, padding, dilation, groups, padding_mode)


def _by_signature(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes, padding: Padding, dilation: Sizes, groups: int, padding_mode: str) -> Tensor:
    """A call that is not known to be the same as the last one with its weight."""
    if not is_plain(x, weight, bias):
        return _general(x, weight, bias, stride, padding, dilation, groups, padding_mode)
    key: tuple[Any, ...] | None
    try:
        key = (
            (x.shape, x.stride(), x.dtype, x.device, weight.shape, weight.stride(), weight.dtype, weight.device)
            + ((bias.shape, bias.is_contiguous(), bias.dtype, bias.device) if bias is not None else ())
            + (stride, padding, dilation, groups, padding_mode, _threads(), _options().token)
        )
        found = _calls.get(key)
    except (TypeError, RuntimeError):  # an argument that is a list, or a tensor without strides
        key, found = None, None
    if found is None:
        return _first(key, x, weight, bias, stride, padding, dilation, groups, padding_mode)
    call, known_stride, known_padding, known_dilation = found
    # 1.0 and True find the entry of 1, and must be refused as on their first call; a layer brings the same objects each time
    same = stride is known_stride and padding is known_padding and dilation is known_dilation
    if not ((same or (_is_exact(stride) and _is_exact(padding) and _is_exact(dilation))) and type(groups) is int):
        normalize((1, 1), stride, padding, dilation, groups, padding_mode)
    _remember(call, x, weight, bias, stride, padding, dilation, groups, padding_mode)
    if _grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        return _apply(x, weight, bias, call)
    return call.forward(x, weight, bias)


class _Repeated:
    """What is known of the calls with one weight: the last one that was worth a guard, and the last one that was not known."""

    __slots__ = ("known", "missed", "weight")

    def __init__(self, weight: Tensor) -> None:
        self.known: tuple[Any, ...] | None = None
        self.missed: tuple[Prepared, bool] | None = None
        self.weight = weakref.ref(weight)


def _remember(call: Prepared, x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> None:
    """Know this plain call from now on, if it is the weight's first or repeats the last one that was not known: a guard takes as long as two signatures."""
    repeated = _repeated.get(id(weight))
    if repeated is None or repeated.weight() is not weight:
        repeated = bounded(_repeated, id(weight), _Repeated(weight))
    tensors = (x, weight) if bias is None else (x, weight, bias)
    derivatives = any(t.requires_grad for t in tensors)
    again, repeated.missed = repeated.missed == (call, derivatives), (call, derivatives)
    if not (repeated.known is None or again) or TensorGuards is None or not all(map(_is_exact, arguments[:4])):
        return
    guard = TensorGuards(*tensors, dynamic_dims_sizes=[list(t.shape) for t in tensors], dynamic_dims_strides=[list(t.stride()) for t in tensors])
    bias_then = _no_bias if bias is None else weakref.ref(bias)
    repeated.known = type(x), bias_then, guard.check, call, *arguments, derivatives, _threads(), _options().token


def _no_bias() -> None:
    return None


def _same(value: Any, known: Any) -> bool:
    """Whether an argument is what it was, in value and kind: 1.0 is not 1."""
    return _is_exact(value) and bool(value == known)


def is_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether nothing stands between PyTorch and a call with these operands: no compiler, transform, mode, subclass of Tensor, lazy sign or zeros."""
    return not (
        _compiling()
        or type(x) not in _PLAIN
        or type(weight) not in _PLAIN
        or (bias is not None and type(bias) not in _PLAIN)
        or _function_modes()
        or _dispatch_modes()
        or _transforms()
        or _autocasting()
        or _tracing() is not None
        or forward_ad._current_level >= 0
        # the sign of a lazily negated tensor is not in its memory, and a tensor of zeros may have none: the registered operator gets copies that have both
        or x.is_neg()
        or x._is_zerotensor()
        or weight.is_neg()
        or weight._is_zerotensor()
        or (bias is not None and (bias.is_neg() or bias._is_zerotensor()))
    )


def _is_exact(value: Any) -> bool:
    kind = type(value)
    if kind is tuple:
        if len(value) == 2:
            return type(value[0]) is int and type(value[1]) is int
        return all(type(v) is int for v in value)
    return kind is int or kind is str


def _first(key: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    """A plain eager call of a signature that was not met before, remembered under ``key`` where that is possible."""
    if reason_for_stock(x, weight, bias) is not None:
        return _stock(x, weight, bias, *arguments)
    form = resolve(x, weight, bias, *arguments)
    if x.is_meta or _crops_before_wrapping(form):
        return _operator(x, weight, bias, form)
    require_engine(x.device)
    call = prepare(x, weight, bias, form)
    if key is not None:
        bounded(_calls, key, (call, *arguments[:3]))
        _remember(call, x, weight, bias, *arguments)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _apply(x, weight, bias, call)
    return call.forward(x, weight, bias)


def prepared_call(x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Prepared | None:
    """The convolution that a plain eager call launches; None where it does something else (PyTorch's own convolution, a registered operator)."""
    if reason_for_stock(x, weight, bias) is not None or x.is_meta:
        return None
    form = resolve(x, weight, bias, *arguments)
    if _crops_before_wrapping(form):
        return None
    require_engine(x.device)
    return prepare(x, weight, bias, form)


def _general(x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    """Every other call: by the registered operator, after whoever asks for ``__torch_function__`` had it."""
    stride, padding, dilation, groups, padding_mode = arguments
    if has_torch_function_variadic(x, weight, bias):
        tensors = (x, weight, bias)
        return handle_torch_function(conv2d, tensors, x, weight, bias, stride, padding, dilation, groups, padding_mode=padding_mode)
    for name, value in (("input", x), ("weight", weight), ("bias", bias)):
        if not isinstance(value, Tensor) and not (name == "bias" and value is None):
            raise TypeError(f"conv2d(): argument '{name}' must be Tensor, not {type(value).__name__}")
    device_type = x.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        x, weight, bias = ops.autocast_to(device_type, x, weight, bias)
    if reason_for_stock(x, weight, bias) is not None or _exporting_to_onnx():
        return _stock(x, weight, bias, *arguments)
    if not _compiling() and _dispatch_modes():
        tell_counters()
    form = resolve(x, weight, bias, *arguments)
    return _operator(x, weight, bias, form)


def _exporting_to_onnx() -> bool:
    """Whether the caller is one of PyTorch's exporters to ONNX, whose graphs have a node for PyTorch's convolution and none for ours."""
    onnx = sys.modules.get("torch.onnx")  # importing it takes longer than importing faltung
    return onnx is not None and bool(onnx.is_in_onnx_export())


_exporting_to_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined] # torch.compile need not look into the modules loaded


def resolve(x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Arguments:
    """The one form of ``stride, padding, dilation, groups, padding_mode``, checked against the operands.  Raises as :func:`conv2d`."""
    ops.check_types(x, weight, bias)
    kernel = weight.shape[2:] if weight.dim() == 4 else (1, 1)
    form = normalize(kernel, *arguments)
    check(x.shape, weight.shape, None if bias is None else bias.shape, form)
    return form


def _crops_before_wrapping(form: Arguments) -> bool:
    return form.padding_mode == "circular" and min(form.padding) < 0


def _operator(x: Tensor, weight: Tensor, bias: Tensor | None, form: Arguments) -> Tensor:
    if _crops_before_wrapping(form):
        # PyTorch crops by negative padding first, and wraps around what is left
        left, right, top, bottom = form.padding
        x = x[..., max(-top, 0) : x.shape[-2] + min(bottom, 0), max(-left, 0) : x.shape[-1] + min(right, 0)]
        form = form._replace(padding=(max(left, 0), max(right, 0), max(top, 0), max(bottom, 0)))
        check(x.shape, weight.shape, None, form)
    if x.dim() == 3:
        return ops.forward(x.unsqueeze(0), weight, bias, *form).squeeze(0)
    return ops.forward(x, weight, bias, *form)


def reason_for_stock(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why these operands go to PyTorch's own convolution, or None where faltung has kernels for them.

    CPU and CUDA tensors of float32, float64, bfloat16 and float16 in PyTorch's strided layout never go there.
    """
    for tensor in (x, weight, bias):
        if tensor is None:
            continue
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
            return f"a tensor of layout {tensor.layout}{', nested' if tensor.is_nested else ', quantized' if tensor.is_quantized else ''}"
        if tensor.device != x.device:
            return f"tensors on {x.device} and {tensor.device}"
    if x.dtype not in DTYPE_NAMES:
        return f"{x.dtype} has no kernels"
    if x.device.type != "meta" and not has_engine(x.device.type):
        return f"{x.device.type} tensors have no kernels"
    return None


def _stock(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: Any, padding_mode: str) -> Tensor:
    """PyTorch's own convolution, with a padded copy for what only faltung's arguments can say."""
    strided_same = padding == "same" and stride not in (1, (1,), (1, 1), [1], [1, 1])
    if padding_mode == "zeros" and not strided_same and (isinstance(padding, (str, bytes)) or not hasattr(padding, "__len__") or len(padding) != 4):
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    form = normalize(weight.shape[2:] if weight.dim() == 4 else (1, 1), stride, padding, dilation, groups, padding_mode)
    mode = "constant" if padding_mode == "zeros" else padding_mode
    return torch.conv2d(torch.nn.functional.pad(x, form.padding, mode=mode), weight, bias, form.stride, 0, form.dilation, form.groups)
