"""Convolutions prepared for one signature: everything that does not depend on the data is decided once.

A :class:`Prepared` owns the launch of each direction, found when first asked for, and the sizes and strides of what it allocates.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import config, dispatch, layout
from .arguments import Arguments, output_size
from .problem import ConvProblem, Direction, Epilogue, Format

__all__ = [
    "DTYPE_NAMES",
    "Prepared",
    "bounded",
    "build_problem",
    "choose_weight_format",
    "dense",
    "engine_for",
    "has_engine",
    "joined_by_groups",
    "kind_of",
    "prepare",
    "prepared",
    "require_engine",
]

DTYPE_NAMES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}
CACHE_LIMIT = 4096
V = TypeVar("V")

try:  # what Inductor's generated code allocates with: half the time of torch.empty_strided, and no part of PyTorch's public interface
    from torch._C._dynamo.guards import _empty_strided_cpu  # type: ignore[attr-defined]
except ImportError:  # pragma: no cover

    def _empty_strided_cpu(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype)


_lock = threading.Lock()


def bounded(cache: dict[Any, V], key: Any, value: V) -> V:
    """Put ``value`` into ``cache``, dropping the oldest entry of a full one.  Safe with threads."""
    with _lock:
        if len(cache) >= CACHE_LIMIT:
            del cache[next(iter(cache))]
        cache[key] = value
    return value


def has_engine(device_type: str) -> bool:
    """Whether there are kernels for tensors of this device type."""
    return dispatch.available(device_type)


# All that torch.compiler.assume_constant_result does; but it imports Dynamo first, which takes a third of the time of `import faltung`.
has_engine._dynamo_marked_constant = True  # type: ignore[attr-defined]


def require_engine(device: torch.device) -> None:
    """Raise NotImplementedError where ``device`` has no kernels, RuntimeError where ``config.engine`` asks for another engine than its."""
    wanted = config.current().engine
    if wanted not in ("auto", device.type) and engine_for(device) != wanted:
        raise RuntimeError(f"faltung's engine is set to '{wanted}', but got a tensor on {device}")
    if not has_engine(device.type):
        raise NotImplementedError(f"faltung has no kernels for tensors on {device}")


def engine_for(device: torch.device) -> str:
    """The engine for tensors on ``device``: the one asked for where it serves them, else its type's."""
    wanted = config.current().engine
    return wanted if wanted != "auto" and dispatch.serves(wanted, device.type) else device.type


def build_problem(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    arguments: Arguments,
    dtype: torch.dtype,
    fmt: Format,
    weight_format: Format,
    bias: bool = False,
) -> ConvProblem:
    """The forward problem for checked shapes (n, c, h, w) and (k, c/g, r, s).

    A stride beyond the only output row or column is shortened to it, and the dilation of a kernel of one row or column is dropped: neither
    shows in a result, and kernels stay free of huge numbers.
    """
    (n, c, h, w), (k, _, r, s) = input_shape, weight_shape
    dilation = arguments.dilation[0] if r > 1 else 1, arguments.dilation[1] if s > 1 else 1
    places = output_size((h, w), (r, s), (1, 1), arguments.padding, dilation)
    return ConvProblem(
        n=n,
        c=c,
        h=h,
        w=w,
        k=k,
        r=r,
        s=s,
        stride=(min(arguments.stride[0], max(places[0], 1)), min(arguments.stride[1], max(places[1], 1))),
        padding=arguments.padding,
        dilation=dilation,
        g=arguments.groups,
        padding_mode=arguments.padding_mode if any(arguments.padding) else "zeros",
        dtype=DTYPE_NAMES[dtype],
        format=fmt,
        weight_format=weight_format,
        epilogue=Epilogue(bias=bias),
    )


def choose_weight_format(shape: Sequence[int], strides: Sequence[int], fmt: Format) -> Format:
    """The format in which a weight is dense already, else that of input and output."""
    if layout.is_dense(shape, strides, "nchw"):
        return "nchw"
    return "nhwc" if layout.is_dense(shape, strides, "nhwc") else fmt


@lru_cache(maxsize=64)
def joined_by_groups(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether PyTorch computes a grouped convolution of this type group by group and joins the results.

    float64 everywhere; on a CPU also the types of 16 bits where its oneDNN has no kernels for them on this processor (bfloat16 without AVX-512, say).
    """
    if device.type == "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return dtype == torch.float64
    if not torch.backends.mkldnn.is_available():
        return True
    return not (torch.ops.mkldnn._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else torch.ops.mkldnn._is_mkldnn_fp16_supported())


def dense(tensor: Tensor, fmt: Format) -> Tensor:
    """``tensor`` (three or four dimensions) with its elements in memory in this format's order: itself where they are."""
    if tensor.numel() == 1:
        return tensor.resolve_neg()
    if fmt == "nchw":
        return tensor.contiguous()
    return (tensor if tensor.dim() == 4 else tensor.unsqueeze(0)).contiguous(memory_format=torch.channels_last)


class Prepared:
    """One convolution in every direction, for dense CPU operands of one format and dtype, none of them empty.

    Input (n, c, h, w) or, unbatched, (c, h, w); weight (k, c/g, r, s); bias (k).  Gradients have the sizes of what they are gradients of; that of
    the input has the format of input and output, that of the weight the weight's.
    """

    def __init__(self, problem: ConvProblem, arguments: Arguments, dtype: torch.dtype, device: torch.device, threads: int, *, unbatched: bool = False) -> None:
        self.problem, self.arguments, self.dtype, self.device, self.threads = problem, arguments, dtype, device, threads
        self.options = config.current()
        skip = 1 if unbatched else 0
        self.input_shape, self.output_shape, self.weight_shape = problem.input_shape[skip:], problem.output_shape[skip:], problem.weight_shape
        self.input_strides, self.output_strides = self._strides_of_result(self.input_shape), self._strides_of_result(self.output_shape)
        self.weight_strides = layout.strides_of(self.weight_shape, problem.weight_format)
        self._allocate: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor] = self._poisoned if self.options.poison else self._empty
        self._forward: Callable[..., None] | None = None
        self._grad_input: Callable[..., None] | None = None
        self._grad_weight: dict[bool, Callable[..., None]] = {}

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output of dense operands."""
        launch = self._forward
        if launch is None:
            launch = self._forward = self._launcher("forward", self.problem.epilogue.bias)
        output = self._allocate(self.output_shape, self.output_strides, self.dtype)
        self._run(launch, x, weight, bias, output)
        return output

    def freeze(self, weight: Tensor, bias: Tensor | None) -> dispatch.FrozenPlan | None:
        """The forward plan with these dense weights packed; None where it keeps nothing."""
        plan = self._plan("forward", self.problem.epilogue.bias)
        return plan.freeze(weight.data_ptr(), 0 if bias is None else bias.data_ptr()) if isinstance(plan, dispatch.Freezable) else None

    def forward_frozen(self, plan: dispatch.FrozenPlan, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """:meth:`forward` by a plan of :meth:`freeze`, for the operands that it was made for."""
        output = self._allocate(self.output_shape, self.output_strides, self.dtype)
        self._run(plan.launch, x, weight, bias, output)
        return output

    def dense_gradient(self, grad_output: Tensor) -> Tensor:
        """The gradient of the output as the kernels read it; a backward pass that needs it twice asks here first, so that it is copied once."""
        return grad_output if grad_output.stride() == self.output_strides else dense(grad_output, self.problem.format)

    def grad_input(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the input; the operands may have any strides (what autograd saved may come back with others)."""
        launch = self._grad_input
        if launch is None:
            launch = self._grad_input = self._launcher("grad_input", False)
        grad_output = self.dense_gradient(grad_output)
        if weight.stride() != self.weight_strides:
            weight = dense(weight, self.problem.weight_format)
        grad_input = self._allocate(self.input_shape, self.input_strides, self.dtype)
        self._run(launch, grad_output, weight, None, grad_input)
        return grad_input

    def grad_weight(self, x: Tensor, grad_output: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
        """The gradient of the weight and, where asked for, of the bias; the operands may have any strides."""
        launch = self._grad_weight.get(bias)
        if launch is None:
            launch = self._grad_weight[bias] = self._launcher("grad_weight", bias)
        grad_output = self.dense_gradient(grad_output)
        if x.stride() != self.input_strides:
            x = dense(x, self.problem.format)
        grad_weight = self._allocate(self.weight_shape, self.weight_strides, self.dtype)
        grad_bias = self._allocate(self.weight_shape[:1], (1,), self.dtype) if bias else None
        self._run(launch, x, grad_output, grad_bias, grad_weight)
        return grad_weight, grad_bias

    def _plan(self, direction: Direction, bias: bool) -> dispatch.Plan:
        # the backward pass may run on a thread of autograd's, where the caller's options are not in force
        with config.applied(self.options):
            return dispatch.plan(self.problem.with_direction(direction, bias=bias), engine_for(self.device), self.threads)

    def _launcher(self, direction: Direction, bias: bool) -> Callable[..., None]:
        return self._plan(direction, bias).launch

    def _strides_of_result(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return layout.strides_of(
            shape, layout.joined_format(shape, self.problem.format, by_groups=joined_by_groups(self.dtype, self.device), groups=self.problem.g)
        )

    _empty = staticmethod(_empty_strided_cpu)

    def _poisoned(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._empty(shape, strides, dtype).fill_(float("nan"))

    def _run(self, launch: Callable[..., None], source: Tensor, other: Tensor, side: Tensor | None, out: Tensor) -> None:
        first, second, third = source.data_ptr(), other.data_ptr(), 0 if side is None else side.data_ptr()
        if not (first and second and (third or side is None)):
            raise RuntimeError("an operand of the convolution has elements but no memory: its storage was resized to nothing")
        launch(first, second, third, out.data_ptr())


class PreparedOnDevice(Prepared):
    """The same for an accelerator's tensors, which its plans take as they are, with four dimensions."""

    def _empty(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device=self.device)

    def _run(self, launch: Callable[..., None], source: Tensor, other: Tensor, side: Tensor | None, out: Tensor) -> None:
        source, other, out = (t.unsqueeze(0) if t.dim() == 3 else t for t in (source, other, out))
        if self.device.type == "cpu":  # in Triton's interpreter
            launch(source, other, side, out)
            return
        with torch.get_device_module(self.device.type).device(self.device):
            launch(source, other, side, out)


class Normalizing(Prepared):
    """The same for operands of any strides: each is copied into its format where it is not dense."""

    def __init__(self, inner: Prepared) -> None:
        self.dense = inner
        self.problem, self.arguments, self.input_shape = inner.problem, inner.arguments, inner.input_shape

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        problem = self.problem
        bias = None if bias is None else dense(bias, "nchw")
        return self.dense.forward(dense(x, problem.format), dense(weight, problem.weight_format), bias)

    def freeze(self, weight: Tensor, bias: Tensor | None) -> dispatch.FrozenPlan | None:
        return self.dense.freeze(dense(weight, self.problem.weight_format), None if bias is None else dense(bias, "nchw"))

    def forward_frozen(self, plan: dispatch.FrozenPlan, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.dense.forward_frozen(plan, dense(x, self.problem.format), weight, bias)

    def dense_gradient(self, grad_output: Tensor) -> Tensor:
        return dense(grad_output, self.problem.format)

    def grad_input(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        return self.dense.grad_input(self.dense_gradient(grad_output), dense(weight, self.problem.weight_format))

    def grad_weight(self, x: Tensor, grad_output: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
        return self.dense.grad_weight(dense(x, self.problem.format), self.dense_gradient(grad_output), bias)


class Empty(Prepared):
    """The same for a convolution without batch, channels, rows or columns: its output has no elements, its gradients are zeros.

    With no input channels PyTorch gives an output with no channels; with an input and output of one size it keeps the input's strides.
    """

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG002
        return empty_output(x, self.output_shape)

    def freeze(self, weight: Tensor, bias: Tensor | None) -> None:  # noqa: ARG002
        return None

    def dense_gradient(self, grad_output: Tensor) -> Tensor:
        return grad_output

    def grad_input(self, grad_output: Tensor, weight: Tensor) -> Tensor:  # noqa: ARG002
        return grad_output.new_zeros(self.input_shape)

    def grad_weight(self, x: Tensor, grad_output: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:  # noqa: ARG002
        return x.new_zeros(self.weight_shape), x.new_zeros(self.weight_shape[:1]) if bias else None


def empty_output(x: Tensor, shape: Sequence[int]) -> Tensor:
    """An output without elements for ``input``, whose channels it lacks where ``input`` has none."""
    shape = (*shape[:-3], 0 if x.shape[-3] == 0 else shape[-3], *shape[-2:])
    if x.shape[-3] != 0 and tuple(x.shape) == shape:
        return x * 1
    return x.new_empty(shape)


def kind_of(device: torch.device) -> type[Prepared]:
    """The class for tensors on ``device``."""
    return Prepared if engine_for(device) == "cpu" else PreparedOnDevice


_prepared: dict[Any, Prepared] = {}


def prepared(
    input_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    arguments: Arguments,
    dtype: torch.dtype,
    device: torch.device,
    fmt: Format,
    weight_format: Format,
    bias: bool,
) -> Prepared:
    """The convolution of checked sizes and stated formats under the options and thread count in force, from the cache where it was asked for before."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    key = (input_shape, weight_shape, arguments, dtype, device, fmt, weight_format, bias, threads, config.current().token)
    found = _prepared.get(key)
    if found is not None:
        return found
    unbatched = len(input_shape) == 3
    problem = build_problem((1, *input_shape) if unbatched else input_shape, weight_shape, arguments, dtype, fmt, weight_format, bias)
    kind = Empty if problem.empty else kind_of(device)
    return bounded(_prepared, key, kind(problem, arguments, dtype, device, threads, unbatched=unbatched))


_signatures: dict[Any, Prepared] = {}


def prepare(x: Tensor, weight: Tensor, bias: Tensor | None, arguments: Arguments) -> Prepared:
    """The convolution for operands of checked sizes, with whatever copies their strides need."""
    signature = x.shape, x.stride(), weight.shape, weight.stride(), bias is None or bias.is_contiguous(), bias is None
    key = (*signature, arguments, x.dtype, x.device, torch.get_num_threads(), config.current().token)
    found = _signatures.get(key)
    return bounded(_signatures, key, _prepare(x, weight, bias, arguments)) if found is None else found


def _prepare(x: Tensor, weight: Tensor, bias: Tensor | None, arguments: Arguments) -> Prepared:
    shape, strides = layout.batched(x.shape, x.stride())
    weight_shape, weight_strides = tuple(weight.shape), weight.stride()
    fmt = layout.result_format(shape, strides, weight_shape, weight_strides, double_on_cuda=x.is_cuda and x.dtype == torch.float64)
    weight_format = choose_weight_format(weight_shape, weight_strides, fmt)
    found = prepared(tuple(x.shape), weight_shape, arguments, x.dtype, x.device, fmt, weight_format, bias is not None)
    if isinstance(found, Empty):
        return found
    single = x.numel() == 1 or weight.numel() == 1 or (bias is not None and bias.numel() == 1)  # may be negated views: see dense()
    dense_already = layout.is_dense(shape, strides, fmt) and layout.is_dense(weight_shape, weight_strides, weight_format)
    return found if dense_already and not single and (bias is None or bias.is_contiguous()) else Normalizing(found)


def clear() -> None:
    """Forget everything prepared."""
    _signatures.clear()
    _prepared.clear()
