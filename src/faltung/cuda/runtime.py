"""What the launchers share: the device's facts, PyTorch's precision switches, workspaces, and the plan that takes tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import config
from ..problem import ConvProblem

__all__ = [
    "INTERPRETED",
    "TORCH_DTYPES",
    "CudaPlan",
    "Device",
    "accumulator",
    "alignment",
    "cdiv",
    "device",
    "fp32_precision",
    "image_strides",
    "is_wide",
    "part",
    "precision",
    "weight_strides",
    "workspace",
]

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels of this process run in Triton's interpreter, on CPU tensors."""

TORCH_DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}

Run = Callable[[Tensor, Tensor, "Tensor | None", Tensor], None]


@dataclass(frozen=True)
class Device:
    """The facts of a GPU that choices of configurations depend on.  The defaults are those of an H100, for compilation without a device."""

    name: str = "NVIDIA H100 80GB HBM3"
    capability: tuple[int, int] = (9, 0)
    multiprocessors: int = 132
    shared_bytes: int = 232448
    l2_bytes: int = 50 << 20


DEFAULT = Device()
"""What is chosen for where there is no device."""


@lru_cache(maxsize=64)
def _device(index: int) -> Device:
    facts = torch.cuda.get_device_properties(index)
    shared = int(getattr(facts, "shared_memory_per_block_optin", 99 << 10))
    return Device(facts.name, (facts.major, facts.minor), facts.multi_processor_count, shared, int(getattr(facts, "L2_cache_size", 6 << 20)))


def device() -> Device:
    """The current CUDA device, or :data:`DEFAULT` where there is none."""
    if INTERPRETED:  # one program at a time: large tiles
        return Device("interpreter", multiprocessors=1)
    return _device(torch.cuda.current_device()) if torch.cuda.is_available() else DEFAULT


def fp32_precision() -> str:
    """``tf32`` or ``ieee``: what PyTorch's switches allow to a float32 convolution on CUDA, now."""
    return "tf32" if torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32" else "ieee"


def precision(dtype: str, fixed: str = "") -> str | None:
    """The PRECISION of a launch's products: the one that is asked for, or what PyTorch's switches say at each call (None)."""
    return fixed or (None if dtype == "f32" else "ieee")


def cdiv(a: int, b: int) -> int:
    """The quotient rounded up."""
    return -(-a // b)


def accumulator(dtype: str) -> tuple[torch.dtype, tl.dtype]:
    """The type in which a problem's sums are kept, as PyTorch's and as Triton's: float64 for itself, float32 for the others."""
    return (torch.float64, tl.float64) if dtype == "f64" else (torch.float32, tl.float32)


def is_wide(*elements: int) -> bool:
    """Whether an offset into a tensor of one of these sizes may need 64 bits (with room for a tile beyond the end)."""
    return any(n + 65536 >= 2**31 for n in elements)


def part(tensor: Tensor, start: int, count: int) -> Tensor:
    """Images ``start .. + count`` of a batch; the tensor itself where that is all of them."""
    return tensor if count == tensor.shape[0] else tensor[start : start + count]


def image_strides(fmt: str, c: int, h: int, w: int) -> tuple[int, int, int, int]:
    """Strides (n, c, h, w) of a dense image tensor of this format, whatever a tensor's own strides say of sizes of 1."""
    return (h * w * c, 1, w * c, c) if fmt == "nhwc" else (c * h * w, h * w, w, 1)


def alignment(*numbers: int) -> int:
    """The largest of 1, 2, 4 and 8 that divides every number: Triton's launcher itself sees only multiples of 16."""
    return math.gcd(8, *numbers)


def weight_strides(fmt: str, cg: int, r: int, s: int) -> tuple[int, int, int, int]:
    """Strides (k, c, r, s) of a dense weight of this format."""
    return image_strides(fmt, cg, r, s)


def workspace(shape: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Memory from PyTorch's allocator on the tensor's device, for the current stream; NaN under ``config.poison``."""
    memory = torch.empty(tuple(shape), dtype=dtype, device=like.device)
    return memory.fill_(float("nan")) if config.current().poison else memory


class CudaPlan:
    """Callable by ``launch(source, other, side, out)`` with dense tensors; see :class:`faltung.dispatch.Plan` for which operand is which.

    The interpreter cannot multiply bfloat16 matrices and rounds carries wrongly: there, bfloat16 operands are widened to float32, and the result
    is rounded by PyTorch.
    """

    def __init__(self, problem: ConvProblem, implementation: str, run: Run, facts: dict[str, Any]) -> None:
        self.problem, self.implementation = problem, implementation
        self._facts = facts
        self.run = run
        self.launch: Run = self._emulated if INTERPRETED and problem.dtype == "bf16" else run

    def _emulated(self, source: Tensor, other: Tensor, side: Tensor | None, out: Tensor) -> None:
        written = self.problem.direction == "grad_weight"
        result = torch.empty_like(out, dtype=torch.float32)
        third = None if side is None else torch.empty_like(side, dtype=torch.float32) if written else side.float()
        self.run(source.float(), other.float(), third, result)
        out.copy_(result)
        if side is not None and written:
            assert third is not None
            side.copy_(third)

    def describe(self) -> dict[str, Any]:
        return dict(self._facts)
