"""Runs the checks of how the CUDA engine starts its kernels, on a driver that starts nothing, and prints what went wrong as JSON.

The driver stands for an H100: it takes whatever is launched, and keeps the arguments.  It would be every other test's driver too, so this is a process of
its own; see test_cuda_launch.py.  Operands lie in the CPU's memory, and no kernel is compiled but in the last check.
"""

from __future__ import annotations

import gc
import json
import math
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import torch
import triton
import triton.compiler
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import jit

from faltung import layout
from faltung.cuda import banded, banded_weight, depthwise, depthwise_weight, folded, igemm, igemm_weight, offline, packed, stem
from faltung.cuda.runtime import TORCH_DTYPES, CudaPlan
from faltung.cuda.tiling import BandedConfig
from faltung.problem import ConvProblem

torch.set_num_threads(1)
torch.backends.cudnn.conv.fp32_precision = "ieee"


@dataclass
class Started:
    """One launch: its grid, stream, function and packed metadata; whether Triton's hooks came along; the kernel's arguments."""

    grid: tuple[int, int, int]
    stream: int
    function: Any
    metadata: Any
    hooked: bool
    arguments: tuple[Any, ...]

    def facts(self, operands: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
        """What must be the same when the same thing is launched again.  A workspace is another piece of memory each time."""
        memory = {t.untyped_storage().data_ptr() for t in operands if t is not None}
        arguments = [
            (a.dtype, tuple(a.shape), a.data_ptr() if a.untyped_storage().data_ptr() in memory else None) if isinstance(a, Tensor) else (type(a), a)
            for a in self.arguments
        ]
        return self.grid, self.stream, self.function, self.metadata, arguments


class Driver:
    """What Triton asks of a driver; ``started`` are the launches, ``looked_up`` counts those that went through Triton's cache of kernels, ``unloaded`` the
    modules that were given back."""

    def __init__(self) -> None:
        self.utils = self
        self.started: list[Started] = []
        self.looked_up = self.unloaded = 0
        self.device, self.stream, self.target = 0, 7, GPUTarget("cuda", 90, 32)
        self.handles = count(1)

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, stream: int, function: Any, packed: Any, facts: Any, before: Any, after: Any, *arguments: Any) -> None:
            if len(arguments) != len(src.fn.params):
                raise AssertionError(f"{len(arguments)} arguments for {len(src.fn.params)} parameters of {src.fn.__name__}")
            if before is not None:
                before(facts)
            self.started.append(Started((x, y, z), stream, function, packed, before is not None, arguments))
            if after is not None:
                after(facts)

        return launch

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream + 1000 * device

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        number = next(self.handles)
        return f"module {number}", f"{name} {number} on {device}", 32, 0, 1024

    def unload_module(self, module: Any) -> None:
        self.unloaded += 1

    def run(self, plan: CudaPlan, *operands: Any) -> list[Started]:
        """What a call of the plan launches."""
        self.started = []
        self.looked_up = 0
        plan.launch(*operands)
        return self.started


class Uncompiled(CompiledKernel):  # type: ignore[misc]
    """Triton's own class for what it compiled, without anything compiled; its metadata tell what would have been."""

    def __init__(self, src: Any, target: GPUTarget, options: dict[str, Any]) -> None:
        facts = {"target": target, "shared": 0, "num_warps": options["num_warps"], "name": src.fn.__name__}
        self.metadata = namedtuple("Metadata", facts)(**facts)
        self.packed_metadata = (options["num_warps"], options["num_stages"], str(src.attrs), str(src.signature), str(src.constants), options["debug"])
        self.src, self.name, self.kernel, self.hash, self.metadata_group = src, src.fn.__name__, b"", "", {}
        self.module = self.function = self._run = None


DRIVER = Driver()
triton.runtime.driver.set_active(DRIVER)
COMPILE = triton.compiler.compile
LOOK_UP = jit.compute_cache_key


def look_up(*arguments: Any) -> str:
    DRIVER.looked_up += 1
    return LOOK_UP(*arguments)


jit.compute_cache_key = look_up


def install(compiler: Callable[..., Any]) -> None:
    """Compile by this function from now on: kernels ask for it when they are first launched on a device."""
    triton.compiler.compile = compiler


def uncompiled(src: Any, target: Any = None, options: Any = None, **_: Any) -> CompiledKernel:
    return Uncompiled(src, target, options)


@contextmanager
def hooked(name: str, seen: list[Any]) -> Iterator[None]:
    chain = getattr(triton.knobs.runtime, name)
    chain.add(seen.append)
    try:
        yield
    finally:
        chain.remove(seen.append)


def memory(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, shift: int = 0) -> Tensor:
    """A tensor whose address is a multiple of 16 bytes and ``shift`` elements."""
    storage = torch.zeros(math.prod(shape) + 64, dtype=dtype)
    first = -storage.data_ptr() % 64 // storage.element_size()
    return storage.as_strided(shape, strides, first + shift)


def operands(problem: ConvProblem, shifts: tuple[int, int, int, int] = (0, 0, 0, 0), out_dtype: torch.dtype | None = None) -> tuple[Tensor | None, ...]:
    """Source, other, side and out of a plan, the addresses of each shifted by so many elements."""
    dtype = TORCH_DTYPES[problem.dtype]
    shapes = {"x": problem.input_shape, "w": problem.weight_shape, "y": problem.output_shape}
    formats = {"x": problem.format, "w": problem.weight_format, "y": problem.format}
    names = {"forward": "xwy", "grad_input": "ywx", "grad_weight": "xyw"}[problem.direction]
    places = zip(names, (shifts[0], shifts[1], shifts[3]), (dtype, dtype, out_dtype or dtype))
    first, second, last = (memory(shapes[name], layout.strides_of(shapes[name], formats[name]), kind, shift) for name, shift, kind in places)
    return first, second, memory((problem.k,), (1,), dtype, shifts[2]) if problem.epilogue.bias else None, last


def make(case: str, direction: str, dtype: str, fmt: str, bias: bool = False) -> ConvProblem:
    problem = replace(ConvProblem.parse(case), dtype=dtype, format=fmt, weight_format=fmt)
    return problem.with_direction(direction, bias=bias)


DENSE, DEPTHWISE, LARGE, FIRST = "n3c16h9w10k24r3s3 st2 p1", "n2c5h9w9k5r3s3 g5 p1", "n3c4h9w9k4r5s5 g4 p2", "n3c3h9w9k5r3s3 p1"
TILES = BandedConfig(16, 16, 16, 2)
PLANS: tuple[tuple[Any, Any, ConvProblem], ...] = (
    (igemm.IGEMM, None, make(DENSE, "forward", "bf16", "nhwc", True)),
    (igemm.IGEMM, None, make(DENSE, "forward", "f32", "nchw")),
    (igemm.IGEMM, None, make(DENSE, "grad_input", "bf16", "nchw")),
    (igemm.IGEMM, None, make(DENSE, "grad_input", "f32", "nhwc")),
    (igemm_weight.IGEMM_WEIGHT, None, make(DENSE, "grad_weight", "f32", "nchw", True)),
    (igemm_weight.IGEMM_WEIGHT, None, make(DENSE, "grad_weight", "bf16", "nhwc")),
    (packed.IGEMM_PACKED, None, make(DENSE, "forward", "bf16", "nchw", True)),
    (packed.IGEMM_PACKED, None, make("n2c32h6w7k32r3s3 p1 g4", "grad_input", "f16", "nhwc")),
    (packed.IGEMM_PACKED_WEIGHT, None, make(DENSE, "grad_weight", "f32", "nchw")),
    (depthwise.DEPTHWISE, None, make(DEPTHWISE, "forward", "bf16", "nhwc", True)),
    (depthwise.DEPTHWISE, None, make(DEPTHWISE + " st2", "grad_input", "f64", "nchw")),
    (depthwise_weight.DEPTHWISE_WEIGHT, None, make(DEPTHWISE, "grad_weight", "f32", "nhwc", True)),
    (banded.BANDED, TILES, make(LARGE, "forward", "f32", "nchw", True)),
    (banded.BANDED, TILES, make(LARGE, "grad_input", "bf16", "nhwc")),
    (banded_weight.BANDED_WEIGHT, TILES, make(LARGE, "grad_weight", "bf16", "nhwc", True)),
    (stem.STEM, None, make(FIRST, "forward", "bf16", "nhwc", True)),
    (stem.STEM_WEIGHT, None, make(FIRST, "grad_weight", "f32", "nchw", True)),
    (folded.FOLDED, None, make("n3c16h6w7k16r3s3 p1 reflect", "grad_input", "bf16", "nhwc")),
)
"""Implementation, configuration (None: its own choice), problem."""


def plan_of(implementation: Any, config: Any, problem: ConvProblem) -> CudaPlan:
    return implementation.plan(problem, 1, config) if config else implementation.plan(problem, 1)


def again() -> Iterator[str]:
    """The second call starts what the first one compiled, exactly as Triton would."""
    for row in PLANS:
        plan, tensors, seen = plan_of(*row), operands(row[2]), []
        first = DRIVER.run(plan, *tensors)
        if not first or not DRIVER.looked_up or not first[0].hooked:
            yield f"{row}: the first call does not go Triton's way"
        second, looked_up = DRIVER.run(plan, *tensors), DRIVER.looked_up
        if looked_up or any(started.hooked for started in second):
            yield f"{row}: {looked_up} of {len(second)} launches are looked up again"
        for hook in ("launch_exit_hook", "launch_enter_hook"):
            seen.clear()
            with hooked(hook, seen):
                third = DRIVER.run(plan, *tensors)
            if DRIVER.looked_up != len(third) or len(seen) != len(third):
                yield f"{row}: {hook} sees {len(seen)} of {len(third)} launches"
        wanted = [started.facts(tensors) for started in third]
        for name, got in (("first", first), ("second", second)):
            if [started.facts(tensors) for started in got] != wanted:
                yield f"{row}: the {name} call differs from Triton's: {[g for g, w in zip(got, third) if g.facts(tensors) != w.facts(tensors)]}"


def functions(plan: CudaPlan, tensors: tuple[Tensor | None, ...]) -> list[Any]:
    return [started.function for started in DRIVER.run(plan, *tensors)]


def _kept_apart(case: str, one: Callable[[], list[Any]], other: Callable[[], list[Any]], differs: int = 1) -> Iterator[str]:
    """Two ways of calling start different kernels, each the one that Triton takes, and each without looking it up when it comes again."""
    found = one(), other()
    looked_up = []
    for call, before in zip((one, other), found):
        if call() != before:
            yield f"{case}: another kernel than before"
        looked_up.append(DRIVER.looked_up)
        with hooked("launch_exit_hook", []):
            if call() != before:
                yield f"{case}: another kernel than Triton's"
    if any(looked_up):
        yield f"{case}: looked up again, {looked_up}"
    if sum(a != b for a, b in zip(*found)) < differs:
        yield f"{case}: the same kernels, {found}"


def alignment() -> Iterator[str]:
    """An address that is no multiple of 16 takes a kernel of its own, whichever operand has it."""
    problem = make(DENSE, "forward", "bf16", "nhwc", True)
    plan, straight, aligned = igemm.IGEMM.plan(problem), operands(problem), set()
    aligned.update(functions(plan, straight))
    for place in range(4):
        shifted = operands(problem, tuple(int(i == place) for i in range(4)))
        yield from _kept_apart(f"operand {place}", partial(functions, plan, straight), partial(functions, plan, shifted))
        aligned.update(functions(plan, shifted))
    if len(aligned) != 5:
        yield f"{len(aligned)} kernels for 5 kinds of operands"
    even = operands(problem, (8, 8, 8, 8))
    if functions(plan, even) != functions(plan, straight) or DRIVER.looked_up:
        yield "another multiple of 16 takes another kernel"


def switches() -> Iterator[str]:
    """PyTorch's switch for float32 products is looked at in each call, and in no other type."""

    def called(plan: CudaPlan, tensors: Any, precision: str) -> list[Any]:
        torch.backends.cudnn.conv.fp32_precision = precision
        found = functions(plan, tensors)
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        named = {value for started in DRIVER.started for value in started.arguments if isinstance(value, str)}
        return [(function, named) for function in found]

    for row in PLANS:
        plan, tensors = plan_of(*row), operands(row[2])
        functions(plan, tensors)
        ieee, tf32 = (partial(called, plan, tensors, precision) for precision in ("ieee", "tf32"))
        if row[2].dtype == "f32" and row[0] is not depthwise_weight.DEPTHWISE_WEIGHT:
            if any("tf32" in named for _, named in ieee()) or not any("tf32" in named for _, named in tf32()):
                yield f"{row}: the switch does not arrive"
            yield from _kept_apart(str(row), ieee, tf32)
        elif ieee() != tf32() or DRIVER.looked_up:
            yield f"{row}: another kernel by a switch that is not for it"


def devices() -> Iterator[str]:
    """A device has kernels of its own, and its own stream."""
    problem = make(DENSE, "grad_input", "f16", "nchw")
    plan, tensors = igemm.IGEMM.plan(problem), operands(problem)

    def on(device: int, stream: int = 7) -> list[Any]:
        DRIVER.device, DRIVER.stream = device, stream
        found = [(started.function, started.stream) for started in DRIVER.run(plan, *tensors)]
        DRIVER.device, DRIVER.stream = 0, 7
        return found

    yield from _kept_apart("devices", partial(on, 0), partial(on, 1), 4)
    if {stream for _, stream in on(1, 8)} != {1008} or DRIVER.looked_up:
        yield "the stream is not that of the call"


def types() -> Iterator[str]:
    """A result of another type than the problem's, as the fold's buffer is, takes another kernel."""
    problem = make(DENSE, "grad_input", "bf16", "nhwc")
    plan, same, wider = igemm.IGEMM.plan(problem), operands(problem), operands(problem, out_dtype=torch.float32)
    yield from _kept_apart("types", partial(functions, plan, same), partial(functions, plan, wider), 4)


def debugging() -> Iterator[str]:
    """Triton's debug mode takes kernels of its own, and what is called before a kernel is called."""
    problem = make(DENSE, "forward", "f16", "nhwc")
    plan, tensors, seen = igemm.IGEMM.plan(problem), operands(problem), []

    def debug(on: bool) -> list[Any]:
        triton.knobs.runtime.debug = on
        found = functions(plan, tensors)
        triton.knobs.runtime.debug = False
        return found

    yield from _kept_apart("debug", partial(debug, False), partial(debug, True))
    igemm.igemm_kernel.pre_run_hooks.append(lambda *arguments, **constants: seen.append(arguments))
    functions(plan, tensors)
    igemm.igemm_kernel.pre_run_hooks.clear()
    if len(seen) != 1 or seen[0][0] is not tensors[0]:
        yield f"a hook before a kernel's run saw {len(seen)} launches"


def replaced() -> Iterator[str]:
    """Whoever replaces what launches kernels, as compilation without a device does, gets every launch."""
    for row in PLANS:
        plan, tensors = plan_of(*row), operands(row[2])
        names = [started.function.split()[0] for _ in range(2) for started in DRIVER.run(plan, *tensors)][len(DRIVER.started) :]
        DRIVER.started = []
        with offline._recorded() as found:
            plan.launch(*(None if t is None else t.to("meta") for t in tensors))
        if DRIVER.started or {launch[0].__name__ for launch in found.values()} != set(names):
            yield f"{row}: started {DRIVER.started} and recorded {list(found)} of {names}"


def forgotten() -> Iterator[str]:
    """What a plan starts stays loaded when Triton forgets it, and no longer than the plan."""
    problem = make(DENSE, "forward", "f16", "nchw")
    DRIVER.device = 4
    plan, tensors = igemm.IGEMM.plan(problem), operands(problem)
    found, before = functions(plan, tensors), DRIVER.unloaded
    del igemm.igemm_kernel.device_caches[4]
    gc.collect()
    if functions(plan, tensors) != found or DRIVER.looked_up or DRIVER.unloaded != before:
        yield f"{DRIVER.unloaded - before} modules were unloaded while a plan has them"
    del plan
    gc.collect()
    if DRIVER.unloaded != before + hasattr(CompiledKernel, "__del__"):  # Triton 3.6 never unloads
        yield f"{DRIVER.unloaded - before} modules were unloaded with the plan"
    DRIVER.device = 0


def other_makers() -> Iterator[str]:
    """On AMD's GPUs the size of a tensor's memory counts as well: every call goes Triton's way."""
    problem = make(DENSE, "forward", "bf16", "nhwc")
    DRIVER.target, DRIVER.device = GPUTarget("hip", "gfx942", 64), 5
    plan, tensors = igemm.IGEMM.plan(problem), operands(problem)
    for _ in range(3):
        DRIVER.run(plan, *tensors)
        if DRIVER.looked_up != 1:
            yield "not looked up"
    DRIVER.target, DRIVER.device = GPUTarget("cuda", 90, 32), 0


def truly() -> Iterator[str]:
    """What Triton itself compiles is started so as well."""
    install(COMPILE)
    problem = make(DEPTHWISE, "grad_weight", "bf16", "nchw")
    DRIVER.device = 6
    plan, tensors = depthwise_weight.DEPTHWISE_WEIGHT.plan(problem), operands(problem)
    first = [started.facts(tensors) for started in DRIVER.run(plan, *tensors)]
    second = [started.facts(tensors) for started in DRIVER.run(plan, *tensors)]
    if DRIVER.looked_up or first != second or len(first) != 2:
        yield f"looked up {DRIVER.looked_up} of {len(second)}"
    if not any(isinstance(value, CompiledKernel) and value.asm["ptx"] for value in depthwise_weight.depthwise_weight_kernel.device_caches[6][0].values()):
        yield "nothing was compiled"


CHECKS = (again, alignment, switches, devices, types, debugging, replaced, forgotten, other_makers, truly)


def main() -> None:
    install(uncompiled)
    # small workspaces: several parts of a batch, several runs of channels
    packed._CHUNK_BYTES, stem._BUFFER_BYTES, banded._BAND_BYTES, banded_weight._SCRATCH_BYTES, folded._BUFFER_BYTES = 8000, 3000, 4000, 100000, 8000
    print(json.dumps({check.__name__: list(check()) for check in CHECKS}))


if __name__ == "__main__":
    main()
