"""Correctness of the CUDA engine on a GPU, by worker processes: see device.py, which starts them."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE.parent / "tests")]

from faltung import config, dispatch, layout, testing  # noqa: E402
from faltung.arguments import Arguments  # noqa: E402
from faltung.prepared import prepare  # noqa: E402
from faltung.problem import DIRECTIONS, DTYPES, FORMATS, ConvProblem, Epilogue  # noqa: E402

ROWS = (
    "n64c3h224w224k64r3s3 p1",
    "n256c3h224w224k64r7s7 st2 p3",
    "n32c64h224w224k64r3s3 p1",
    "n256c64h56w56k64r3s3 p1",
    "n256c128h28w28k128r3s3 p1",
    "n256c256h14w14k256r3s3 p1",
    "n256c512h7w7k512r3s3 p1",
    "n256c128h56w56k128r3s3 st2 p1",
    "n256c1024h14w14k256r1s1",
    "n8c320h64w64k320r3s3 p1",
    "n4c512h256w256k512r3s3 p1",
    "n16c512h64w64k256r3s3 d12 p12",
    "n128c128h56w56k128r3s3 p1 g128",
    "n128c128h56w56k128r3s3 st2 p1 g128",
    "n128c240h28w28k240r5s5 p2 g240",
    "n128c96h56w56k96r7s7 p3 g96",
    "n128c384h14w14k384r7s7 p3 g384",
    "n64c256h28w28k256r13s13 p6 g256",
    "n32c128h56w56k128r31s31 p15 g128",
    "n128c256h28w28k256r3s3 p1 g32",
    "n128c128h28w28k128r3s3 p1 g8",
)
"""Layers that are timed; forward has a bias, grad_weight has not."""
LARGE = ("n130c64h512w512k8r3s3 p1", "n130c8h512w512k64r1s1", "n260c32h512w512k32r3s3 p1 g32")
SANITIZED = (
    "n2c19h9w10k17r3s3 p1",
    "n2c5h9w11k5r3s3 p1 g5",
    "n1c2h14w35k2r13s13 g2 p6",
    "n2c3h12w13k9r5s5 st2 p2",
    "n2c8h8w9k8r3s3 p1 g4",
    "n1c3h6w7k4r3s3 p1 reflect",
)
TORCH = testing.TORCH_DTYPES
CANDIDATES = 14
"""Configurations of an implementation that ``--tune`` compiles and times for a row."""


# --- operands and oracles -----------------------------------------------------------------------------------------------------------------------


def on_device(inputs: testing.Inputs) -> testing.Inputs:
    return testing.Inputs(*(t.cuda() for t in (inputs.x, inputs.w, inputs.bias, inputs.gy)))


def random_inputs(problem: ConvProblem) -> testing.Inputs:
    """Normally distributed operands made on the device."""
    torch.manual_seed(0)

    def make(shape: tuple[int, ...], fmt: Any) -> Tensor:
        return torch.empty_strided(shape, layout.strides_of(shape, fmt), dtype=TORCH[problem.dtype], device="cuda").normal_()

    bias = torch.randn(problem.k, device="cuda").to(TORCH[problem.dtype])
    x, y = make(problem.input_shape, problem.format), make(problem.output_shape, problem.format)
    return testing.Inputs(x, make(problem.weight_shape, problem.weight_format), bias, y)


def launch(plan: Any, inputs: testing.Inputs) -> testing.Result:
    """The plan's result, in memory of NaN."""
    problem = plan.problem
    source, other = inputs.read_by(problem)
    out = testing.empty_result(problem, source.device).fill_(float("nan"))
    forward = problem.direction == "forward"
    side = None if not problem.epilogue.bias else inputs.bias if forward else torch.full_like(inputs.bias, float("nan"))
    with config.override(poison=True):
        plan.launch(source, other, side, out)
    return testing.Result(out, None if forward else side)


def stock_call(problem: ConvProblem, inputs: testing.Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """PyTorch's own convolution in this direction, for symmetric zero padding."""
    left, _, top, _ = problem.padding
    bias = inputs.bias if problem.epilogue.bias else None
    if problem.direction == "forward":
        return lambda: (functional.conv2d(inputs.x, inputs.w, bias, problem.stride, (top, left), problem.dilation, problem.g),)
    to_input = problem.direction == "grad_input"
    mask = [to_input, not to_input, bias is not None and not to_input]
    sizes = [problem.k] if mask[2] else None

    def backward() -> tuple[Tensor, ...]:
        found = torch.ops.aten.convolution_backward(
            inputs.gy, inputs.x, inputs.w, sizes, problem.stride, (top, left), problem.dilation, False, (0, 0), problem.g, mask
        )
        return tuple(t for t, wanted in zip(found, mask) if wanted)

    return backward


def ours_call(problem: ConvProblem, inputs: testing.Inputs) -> Callable[[], tuple[Tensor | None, ...]]:
    """What a plain eager call runs behind the front door: allocation, plan, launch."""
    bias = inputs.bias if problem.epilogue.bias else None
    form = Arguments(problem.stride, problem.padding, problem.dilation, problem.g, problem.padding_mode)
    call = prepare(inputs.x, inputs.w, bias, form)
    if problem.direction == "forward":
        return lambda: (call.forward(inputs.x, inputs.w, bias),)
    if problem.direction == "grad_input":
        return lambda: (call.grad_input(inputs.gy, inputs.w),)
    return lambda: call.grad_weight(inputs.x, inputs.gy, bias is not None)


def precise(problem: ConvProblem, inputs: testing.Inputs) -> tuple[Tensor, ...]:
    """The result for large operands: PyTorch's, in float32 without TF32 (in float64 for float32 and float64), which is far better than either contender."""
    wide = torch.float32 if DTYPES[problem.dtype] == 2 else torch.float64
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        return stock_call(problem, testing.Inputs(*(t.to(wide).contiguous() for t in (inputs.x, inputs.w, inputs.bias, inputs.gy))))()


# --- checks -------------------------------------------------------------------------------------------------------------------------------------


def small_problems(step: int) -> list[ConvProblem]:
    """Every case of the tests' table in every direction and both formats, types, weight formats and biases in turns."""
    import cases  # type: ignore[import-not-found]  # of the tests

    found = []
    turn = 0
    for section in cases.SECTIONS:
        for case in cases.CASES[section]:
            for direction in DIRECTIONS:
                for fmt in FORMATS:
                    turn += 1
                    bias = direction != "grad_input" and turn % 2 == 0
                    dtype = ("bf16", "f32", "f16", "f64")[(turn + turn // 4) % 4]
                    problem = replace(ConvProblem.parse(case), direction=direction, format=fmt, weight_format=FORMATS[turn // 3 % 2], dtype=dtype)
                    found.append(replace(problem, epilogue=Epilogue(bias=bias)))
    return found[::step]


def able(problem: ConvProblem) -> Iterator[Any]:
    """Plans of every implementation that takes the problem by its own choice, the dispatched one first."""
    for implementation in dispatch.implementations("cuda"):
        if implementation.name != "tuned":
            try:
                yield implementation.plan(problem, 1)
            except dispatch.Unsupported:
                continue


def check_small(problem: ConvProblem) -> list[str]:
    """What is wrong with any implementation's results."""
    failures = []
    whole, some = testing.make_inputs(problem, integers=True), testing.make_inputs(problem, seed=3)
    rounded, exact = testing.rounded(problem, testing.exact(problem, whole)), testing.exact(problem, some)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        own = [t.cpu() for t in testing.stock(problem, on_device(some))]
    for plan in able(problem):
        name = f"{plan.implementation} '{problem}' {plan.describe()}"
        for got, want in zip(launch(plan, on_device(whole)), rounded):
            if not torch.equal(got.cpu(), want):
                failures.append(f"{name}: {(got.cpu() != want).sum().item()} of {want.numel()} sums of whole numbers are off")
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
            first, second = launch(plan, on_device(some)), launch(plan, on_device(some))
        for got, again, want, theirs in zip(first, second, exact, own):
            error, bound = (got.cpu().double() - want).abs().max().item(), testing.error_bound(want, theirs)
            if not error <= bound:
                failures.append(f"{name}: error {error:.3g}, allowed {bound:.3g}")
            if not torch.equal(got, again):
                failures.append(f"{name}: two runs differ")
    return failures


def check_large(case: str) -> list[str]:
    """Tensors of more than 2^31 elements: the last images must be what they are in a small batch, and alone decide the weight's gradient."""
    failures = []
    for direction in DIRECTIONS:
        for fmt in FORMATS:
            problem = replace(ConvProblem.parse(case), dtype="bf16", direction=direction, format=fmt, weight_format=fmt)
            if max(math.prod(problem.input_shape), math.prod(problem.output_shape)) < 2**31:
                failures.append(f"'{problem}' is not large")
            torch.cuda.empty_cache()
            inputs = random_inputs(problem)
            last = testing.Inputs(inputs.x[-2:], inputs.w, inputs.bias, inputs.gy[-2:])
            if direction == "grad_weight":
                inputs.gy[:-2] = 0
            got = launch(dispatch.plan(problem, "cuda"), inputs).main
            got = got if direction == "grad_weight" else got[-2:]
            small = replace(problem, n=2)
            want, own = precise(small, last)[0], stock_call(small, last)()[0]
            error, bound = (got.double() - want.double()).abs().max().item(), testing.error_bound(want.double(), own)
            if not error <= bound:
                failures.append(f"'{problem}': error {error:.3g} in the last images, allowed {bound:.3g}")
    return failures


def timed_problems(dtypes: tuple[str, ...]) -> list[ConvProblem]:
    found = []
    for dtype in dtypes:
        for row in ROWS:
            for direction in DIRECTIONS:
                for fmt in FORMATS:
                    problem = replace(ConvProblem.parse(row), dtype=dtype, format=fmt, weight_format=fmt)
                    found.append(problem.with_direction(direction, bias=direction == "forward"))
    return found


def gate(problem: ConvProblem) -> tuple[float, float]:
    """Error and bound of the dispatched plan on the real sizes; compiles its kernels on the way."""
    inputs = random_inputs(problem)
    got, own, want = launch(dispatch.plan(problem, "cuda"), inputs), stock_call(problem, inputs)(), precise(problem, inputs)
    return (got.main.double() - want[0].double()).abs().max().item(), testing.error_bound(want[0].double(), own[0])


def compile_candidates(problem: ConvProblem) -> None:
    """Launch what the tuner will try once, for the kernels that this leaves on disk; what fails will fail again, and be reported, there."""
    from faltung.cuda import tuner

    inputs = random_inputs(problem)
    out = testing.empty_result(problem, "cuda")
    for implementation, configs in tuner.candidates(problem, CANDIDATES):
        for candidate in configs:
            try:
                implementation.plan(problem, 1, candidate).launch(*inputs.read_by(problem), inputs.bias if problem.epilogue.bias else None, out)
                torch.cuda.synchronize()
            except Exception as error:
                if "CUDA error" in str(error):
                    raise


# --- workers ------------------------------------------------------------------------------------------------------------------------------------


def tasks(kind: str, step: int, dtypes: tuple[str, ...]) -> list[str]:
    if kind == "small":
        return [str(problem) for problem in small_problems(step)]
    return [str(problem) for problem in timed_problems(dtypes)] if kind in ("gate", "compile") else list(LARGE) if kind == "large" else list(SANITIZED)


def perform(kind: str, task: str) -> dict[str, Any]:
    if kind == "small":
        return {"failures": check_small(ConvProblem.parse(task))}
    if kind == "large":
        return {"failures": check_large(task)}
    if kind == "compile":
        compile_candidates(ConvProblem.parse(task))
        return {"failures": []}
    if kind == "gate":
        error, bound = gate(ConvProblem.parse(task))
        return {"error": error, "bound": bound, "failures": [] if error <= bound else [f"'{task}': error {error:.3g}, allowed {bound:.3g}"]}
    failures = []
    for direction in DIRECTIONS:
        for fmt in FORMATS:
            failures += check_small(replace(ConvProblem.parse(task), direction=direction, format=fmt, weight_format=fmt, dtype="bf16"))
    return {"failures": failures}


def worker(kind: str, shard: int, shards: int, start: int, deadline: float, step: int, dtypes: tuple[str, ...], file: Path) -> None:
    """Perform every ``shards``-th task from number ``start`` on, a JSON line for each."""
    torch.set_num_threads(1)
    todo = tasks(kind, step, dtypes)[shard::shards]
    for number in range(start, len(todo)):
        if time.time() > deadline:
            return
        try:
            outcome = perform(kind, todo[number])
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # the device is shared by the workers
        except Exception as error:
            outcome = {"failures": [f"'{todo[number]}': {type(error).__name__}: {str(error)[:500]}"]}
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"task": todo[number], **outcome}) + "\n")
        if any("CUDA error" in failure for failure in outcome["failures"]):  # the context is dead
            os.execv(sys.executable, [sys.executable, *_worker_arguments(kind, shard, shards, number + 1, deadline, step, dtypes, file)])


def _worker_arguments(kind: str, shard: int, shards: int, start: int, deadline: float, step: int, dtypes: tuple[str, ...], file: Path) -> list[str]:
    return [str(Path(__file__).resolve()), kind, str(shard), str(shards), str(start), str(deadline), str(step), ",".join(dtypes), str(file)]


def in_workers(kind: str, seconds: float, step: int, dtypes: tuple[str, ...], scratch: Path) -> dict[str, dict[str, Any]]:
    """The outcome of every task that was reached in time."""
    count = {"large": 1, "gate": 8}.get(kind, 14)
    count = max(1, min(count, (os.cpu_count() or 2) - 1))
    deadline = time.time() + seconds
    files = [scratch / f"{kind}-{shard}.jsonl" for shard in range(count)]
    for file in files:
        file.unlink(missing_ok=True)
    started = [subprocess.Popen([sys.executable, *_worker_arguments(kind, shard, count, 0, deadline, step, dtypes, file)]) for shard, file in enumerate(files)]
    for process in started:
        try:
            process.wait(max(1.0, deadline + 45 - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
    lines = [line for file in files if file.exists() for line in file.read_text(encoding="utf-8").splitlines()]
    outcomes = [json.loads(line) for line in lines if line.endswith("}")]
    return {outcome["task"]: outcome for outcome in outcomes}


def sanitize(seconds: float) -> str:
    """The verdict of compute-sanitizer on a few problems, or why there is none."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return "compute-sanitizer is not installed"
    file = HERE / "results" / "sanitizer.jsonl"
    command = [
        tool,
        "--tool",
        "memcheck",
        "--error-exitcode",
        "9",
        sys.executable,
        *_worker_arguments("sanitize", 0, 1, 0, time.time() + seconds, 1, ("bf16",), file),
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds + 30, check=False, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        )
    except subprocess.TimeoutExpired:
        return f"compute-sanitizer was not done in {seconds:.0f} s"
    finally:
        file.unlink(missing_ok=True)
    return f"compute-sanitizer ended with {done.returncode}: {' '.join(done.stdout.splitlines()[-1:])}"


if __name__ == "__main__":
    _kind, _shard, _shards, _start, _deadline, _step, _dtypes, _file = sys.argv[1:]
    worker(_kind, int(_shard), int(_shards), int(_start), float(_deadline), int(_step), tuple(_dtypes.split(",")), Path(_file))
