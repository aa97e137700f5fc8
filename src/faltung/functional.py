"""``conv2d``: every form of the arguments ends here.

A call on plain eager tensors takes the shortest way: one look in a dictionary, one allocation, one launch.  Whatever stands between PyTorch and such a
call (a compiler, a transform, a mode, a subclass of Tensor) gets a registered operator to see.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import config, ops
from .arguments import Arguments, Padding, Sizes, check, conv2d_output_size, normalize
from .prepared import DTYPE_NAMES, Prepared, bounded, engine_of, prepare

__all__ = ["conv2d", "conv2d_output_size", "reason_for_stock"]

_PLAIN = frozenset({Tensor, Parameter})
_calls: dict[Any, Prepared] = {}

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
_apply = ops.Convolution.apply


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
    if (
        _compiling()
        or type(input) not in _PLAIN
        or type(weight) not in _PLAIN
        or (bias is not None and type(bias) not in _PLAIN)
        or _function_modes()
        or _dispatch_modes()
        or _transforms()
        or _autocasting()
        or _tracing() is not None
        or forward_ad._current_level >= 0
    ):
        return _general(input, weight, bias, stride, padding, dilation, groups, padding_mode)
    try:
        key = (
            (input.shape, input.stride(), input.dtype, input.device, weight.shape, weight.stride(), weight.dtype, weight.device)
            + ((bias.shape, bias.is_contiguous(), bias.dtype, bias.device) if bias is not None else ())
            + (stride, padding, dilation, groups, padding_mode, _threads(), _options().token)
        )
        call = _calls.get(key)
    except (TypeError, RuntimeError):  # an argument that is a list, or a tensor without strides
        key = call = None
    if call is None:
        return _general(input, weight, bias, stride, padding, dilation, groups, padding_mode)
    if _grad_enabled() and (input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        return _apply(input, weight, bias, call)
    return call.forward(input, weight, bias)
