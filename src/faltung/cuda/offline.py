"""Compilation of a plan's kernels without a device: what they are made of, for tests and for a look at the machine code.

A plan is run on tensors of PyTorch's ``meta`` device while every launch is recorded and compiled for a target instead of started.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from .. import layout
from .runtime import TORCH_DTYPES, CudaPlan

__all__ = ["Compiled", "compile_plan"]

_TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
_OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Compiled:
    """One kernel of a plan: its name, assembly (PTX of NVIDIA's, AMDGCN of AMD's), registers a thread, bytes of stack a thread (where registers spill) and
    of shared memory a program."""

    name: str
    assembly: str
    registers: int
    stack: int
    shared: int

    def count(self, *words: str) -> int:
        """Occurrences of instructions in the assembly."""
        return sum(self.assembly.count(word) for word in words)


def compile_plan(plan: CudaPlan, architecture: int | str = 90) -> list[Compiled]:
    """Every launch of ``plan``, compiled for an NVIDIA GPU of this compute capability (80, 90, ...) or an AMD one of this name (``gfx942``, ...), in order,
    each kernel once."""
    problem = plan.problem
    dtype = TORCH_DTYPES[problem.dtype]
    shapes = {"x": problem.input_shape, "w": problem.weight_shape, "y": problem.output_shape}
    formats = {"x": problem.format, "w": problem.weight_format, "y": problem.format}
    tensors = {name: torch.empty_strided(shape, layout.strides_of(shape, formats[name]), dtype=dtype, device="meta") for name, shape in shapes.items()}
    first, second, last = {"forward": "xwy", "grad_input": "ywx", "grad_weight": "xyw"}[problem.direction]
    side = torch.empty(problem.k, dtype=dtype, device="meta") if problem.epilogue.bias else None
    with _recorded() as launches:
        plan.run(tensors[first], tensors[second], side, tensors[last])
    return [_compile(*launch, architecture) for launch in launches.values()]


@contextmanager
def _recorded() -> Iterator[dict[str, tuple[Any, ...]]]:
    """Launches inside of the ``with`` block are recorded by what tells their compiled kernels apart."""
    found: dict[str, tuple[Any, ...]] = {}
    original = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:  # noqa: ARG001
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        launch = (self, *_specialized(self, args, kwargs), options)
        found.setdefault(repr((self.__name__, *launch[1:])), launch)

    JITFunction.run = record
    try:
        yield found
    finally:
        JITFunction.run = original


def _specialized(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Signature, constants and attributes of a call, by the rules of Triton's launcher: 1 is a constant, multiples of 16 are known as such."""
    values = dict(zip((p.name for p in kernel.params), args)) | kwargs
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[Any, Any] = {}
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _compile(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], attributes: dict[Any, Any], options: dict[str, int], architecture: int | str
) -> Compiled:
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    if isinstance(architecture, str):
        compiled = triton.compile(source, target=GPUTarget("hip", architecture, 64), options=options)
        text = compiled.asm["amdgcn"]
        registers, stack = (int(re.findall(rf"\.{name}:\s*(\d+)", text)[0]) for name in ("vgpr_count", "private_segment_fixed_size"))
        return Compiled(kernel.__name__, text, registers, stack, compiled.metadata.shared)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, stack = _resources(compiled.asm["cubin"])
    return Compiled(kernel.__name__, compiled.asm["ptx"], registers, stack, compiled.metadata.shared)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack and local memory a thread, by the tool that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]
