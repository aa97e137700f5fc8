"""The frozen statement of one convolution.

Letters, the same everywhere: ``n c h w`` input, ``k`` output channels, ``r s`` kernel rows and columns, ``p q`` output rows and
columns, ``g`` groups.  This module is a leaf: it imports nothing of ours and no tensor library.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

__all__ = ["DIRECTIONS", "DTYPES", "FORMATS", "PADDING_MODES", "ConvProblem", "Direction", "Epilogue", "Format", "same_padding"]

Direction = Literal["forward", "grad_input", "grad_weight"]
Format = Literal["nchw", "nhwc"]

DIRECTIONS: tuple[Direction, ...] = ("forward", "grad_input", "grad_weight")
FORMATS: tuple[Format, ...] = ("nchw", "nhwc")
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
DTYPES: dict[str, int] = {"f32": 4, "f64": 8, "bf16": 2, "f16": 2}
"""Element types of a tensor and their size in bytes."""


@dataclass(frozen=True)
class Epilogue:
    """What is fused behind the accumulators.  ``bias``: add ``bias[k]`` (forward); write the bias gradient (grad_weight)."""

    bias: bool = False


@dataclass(frozen=True)
class ConvProblem:
    """One convolution in one direction: sizes, arguments, element type, memory formats and epilogue.

    ``padding`` is ``(left, right, top, bottom)``, the order of ``torch.nn.functional.pad``.  ``stride`` and ``dilation`` are
    ``(rows, columns)``.  ``format`` is the memory format of input and output (and their gradients), ``weight_format`` that of the
    weight and its gradient: ``nchw`` is row-major ``(k, c/g, r, s)``, ``nhwc`` is ``channels_last``, that is ``(k, r, s, c/g)`` in memory.

    Direction and operands: ``forward`` reads x (n, c, h, w) and w (k, c/g, r, s), writes y (n, k, p, q); ``grad_input`` reads the
    gradient of y and w, writes the gradient of x; ``grad_weight`` reads x and the gradient of y, writes the gradient of w (and of the bias).
    """

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    g: int = 1
    padding_mode: str = "zeros"
    dtype: str = "f32"
    format: Format = "nchw"
    weight_format: Format = "nchw"
    direction: Direction = "forward"
    epilogue: Epilogue = field(default_factory=Epilogue)

    @cached_property
    def _hash(self) -> int:
        return hash(
            (self.n, self.c, self.h, self.w, self.k, self.r, self.s, self.stride, self.padding, self.dilation, self.g)
            + (self.padding_mode, self.dtype, self.format, self.weight_format, self.direction, self.epilogue)
        )

    def __hash__(self) -> int:
        return self._hash

    @property
    def effective_kernel(self) -> tuple[int, int]:
        """Rows and columns that the dilated kernel spans: ``dilation * (kernel - 1) + 1``."""
        return self.dilation[0] * (self.r - 1) + 1, self.dilation[1] * (self.s - 1) + 1

    @cached_property
    def p(self) -> int:
        """Output rows, ``floor((h + top + bottom - dilation * (r - 1) - 1) / stride) + 1``, at least 0."""
        return max(0, (self.h + self.padding[2] + self.padding[3] - self.effective_kernel[0]) // self.stride[0] + 1)

    @cached_property
    def q(self) -> int:
        """Output columns, by the formula of :attr:`p`."""
        return max(0, (self.w + self.padding[0] + self.padding[1] - self.effective_kernel[1]) // self.stride[1] + 1)

    @property
    def cg(self) -> int:
        """Input channels of one group."""
        return self.c // self.g

    @property
    def kg(self) -> int:
        """Output channels of one group."""
        return self.k // self.g

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return self.n, self.c, self.h, self.w

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.k, self.cg, self.r, self.s

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return self.n, self.k, self.p, self.q

    @property
    def result_shape(self) -> tuple[int, int, int, int]:
        """The shape of what the direction produces: the output, or the gradient of input or weight."""
        return {"forward": self.output_shape, "grad_input": self.input_shape, "grad_weight": self.weight_shape}[self.direction]

    @property
    def result_format(self) -> Format:
        """The format of what the direction produces."""
        return self.weight_format if self.direction == "grad_weight" else self.format

    @property
    def depthwise(self) -> bool:
        """One input channel a group (any channel multiplier), and more than one group."""
        return self.g > 1 and self.cg == 1

    @property
    def empty(self) -> bool:
        """Whether any operand has no element."""
        return 0 in self.input_shape or 0 in self.weight_shape or 0 in self.output_shape

    def flops(self) -> int:
        """Floating-point operations of the direct algorithm, two for each multiply-add (taps in the padding counted)."""
        return 2 * self.n * self.k * self.p * self.q * self.cg * self.r * self.s

    def bytes(self) -> int:
        """Bytes of the operands, each read or written once."""
        elements = self.n * self.c * self.h * self.w + self.k * self.cg * self.r * self.s + self.n * self.k * self.p * self.q
        return (elements + (self.k if self.epilogue.bias else 0)) * DTYPES[self.dtype]

    def with_direction(self, direction: Direction, *, bias: bool = False) -> ConvProblem:
        """The same convolution in another direction."""
        return replace(self, direction=direction, epilogue=Epilogue(bias=bias))

    def __str__(self) -> str:
        parts = [self.direction, self.dtype, self.format, f"n{self.n}c{self.c}h{self.h}w{self.w}k{self.k}r{self.r}s{self.s}"]
        if self.stride != (1, 1):
            parts.append("st" + _pair(self.stride))
        if self.padding != (0, 0, 0, 0):
            left, right, top, bottom = self.padding
            parts.append("p" + (_pair((top, left)) if (left, top) == (right, bottom) else f"{left},{right},{top},{bottom}"))
        if self.dilation != (1, 1):
            parts.append("d" + _pair(self.dilation))
        if self.g != 1:
            parts.append(f"g{self.g}")
        if self.padding_mode != "zeros":
            parts.append(self.padding_mode)
        if self.epilogue.bias:
            parts.append("bias")
        if self.weight_format != "nchw":
            parts.append("w" + self.weight_format)
        return " ".join(parts)

    @classmethod
    def parse(cls, text: str) -> ConvProblem:
        """The problem that ``str(problem)`` printed; the direction, type and format may be left out (forward, f32, nchw).

        ``n8c64h56w56k64r3s3 st2 p1 d1 g1 reflect bias``; ``st``, ``p`` and ``d`` take one number or ``rows x columns``, as in ``st2x1``;
        ``p`` also ``left,right,top,bottom``.  Raises ValueError for a text of another form.
        """
        values: dict[str, object] = {}
        for token in text.split():
            if token in DIRECTIONS:
                values["direction"] = token
            elif token in DTYPES:
                values["dtype"] = token
            elif token in FORMATS:
                values["format"] = token
            elif token in PADDING_MODES:
                values["padding_mode"] = token
            elif token == "bias":
                values["epilogue"] = Epilogue(bias=True)
            elif token in ("wnchw", "wnhwc"):
                values["weight_format"] = token[1:]
            elif found := re.fullmatch(r"n(\d+)c(\d+)h(\d+)w(\d+)k(\d+)r(\d+)s(\d+)", token):
                values.update(zip("nchwkrs", map(int, found.groups())))
            elif found := re.fullmatch(r"(st|p|d)(\d+)(?:x(\d+))?", token):
                rows = int(found[2])
                columns = int(found[3]) if found[3] else rows
                name = {"st": "stride", "p": "padding", "d": "dilation"}[found[1]]
                values[name] = (columns, columns, rows, rows) if name == "padding" else (rows, columns)
            elif found := re.fullmatch(r"p(-?\d+),(-?\d+),(-?\d+),(-?\d+)", token):
                values["padding"] = tuple(map(int, found.groups()))
            elif found := re.fullmatch(r"g(\d+)", token):
                values["g"] = int(found[1])
            else:
                raise ValueError(f"not a part of a convolution problem: {token!r} in {text!r}; example: 'forward f32 nhwc n8c64h56w56k64r3s3 st2 p1 bias'")
        if "n" not in values:
            raise ValueError(f"a convolution problem needs its sizes, as in 'n8c64h56w56k64r3s3'; got {text!r}")
        return cls(**values)  # type: ignore[arg-type]


def _pair(value: tuple[int, int]) -> str:
    return str(value[0]) if value[0] == value[1] else f"{value[0]}x{value[1]}"


def same_padding(kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int, int, int]:
    """``padding='same'`` as ``(left, right, top, bottom)``: ``dilation * (kernel - 1)`` in all, the smaller half before.

    The rule of ``torch.nn.functional.conv2d``; with a stride the output has ``floor((size - 1) / stride) + 1`` rows or columns.
    """
    rows, columns = dilation[0] * (kernel[0] - 1), dilation[1] * (kernel[1] - 1)
    return columns // 2, columns - columns // 2, rows // 2, rows - rows // 2
