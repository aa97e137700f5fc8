"""Runs one section of the CUDA engine's checks in this process and prints its outcome as JSON.

``TRITON_INTERPRET=1`` must be set before Triton is imported, so each section runs in a process of its own; see test_cuda_interpreter.py.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.runtime import interpreter

import faltung
from faltung import config, dispatch, layout, testing
from faltung.cuda import banded, banded_weight, depthwise, depthwise_weight, folded, igemm, igemm_weight, packed, reduction, stem, transpose, tuner
from faltung.cuda.tiling import BandedConfig, DepthwiseConfig, IgemmConfig, WeightConfig
from faltung.problem import FORMATS, ConvProblem, Direction, Epilogue, Format

torch.set_num_threads(1)
_MARGIN = 64
_CANARY = 7.0
_DTYPES = ("f32", "f16", "bf16", "f64")


@dataclass(frozen=True)
class Sweep:
    """Cases for one implementation, in each direction and in both formats of the images; types and formats of the weight take turns."""

    implementation: Any
    directions: tuple[Direction, ...]
    config: Any
    cases: tuple[str, ...]
    formats: tuple[Format, ...] = FORMATS
    dtypes: tuple[str, ...] = _DTYPES

    def problems(self) -> Iterator[ConvProblem]:
        turn = 0
        for case in self.cases:
            for direction in self.directions:
                for fmt in self.formats:
                    turn += 1
                    bias = turn % 3 == 0 and direction != "grad_input"
                    weight_format = FORMATS[turn // 2 % 2]
                    yield replace(
                        ConvProblem.parse(case), direction=direction, format=fmt, weight_format=weight_format,
                        dtype=self.dtypes[(turn + turn // 4) % len(self.dtypes)], epilogue=Epilogue(bias=bias),
                    )  # fmt: skip


GATHER: tuple[Direction, ...] = ("forward", "grad_input")
WEIGHT: tuple[Direction, ...] = ("grad_weight",)

_DENSE = (
    "n1c1h1w1k1r1s1",
    "n2c3h8w8k8r3s3 p1",
    "n1c17h6w5k19r3s3 p1",  # channels at tile + 1 and + 3
    "n3c16h4w4k16r1s1",
    "n2c15h5w7k31r3s3 p1",
    "n1c33h5w5k17r2s2 st2",
    "n1c5h9w11k7r3s3 st3x2 p1 d2",
    "n1c3h13w12k5r3s3 d3 st2 p3",
    "n1c3h12w13k5r2s2 d2 st4",
    "n1c3h12w13k5r2s2 st3",  # columns that no output reads
    "n2c4h6w6k4r3s3 st6",
    "n1c3h2w2k4r5s5 p2",  # a kernel larger than the image
    "n1c3h6w7k4r3s3 p3,1,2,5",
    "n1c3h6w7k4r4s4 p1,2,1,2",
    "n1c2h4w40k3r1s31 p0x15",
    "n1c18h9w10k18r6s6 p2",  # more taps than bits
    "n1c6h6w7k9r3s3 p1 g3",
    "n1c34h5w6k34r3s3 p1 g2",
    "n1c5h6w7k5r3s3 p1 g5",
)
_MODES = tuple(
    f"{sizes} {mode}"
    for mode in ("reflect", "replicate", "circular")
    for sizes in ("n1c3h6w7k4r3s3 p1", "n2c17h5w6k4r5s5 p2,1,1,2", "n1c3h7w8k4r3s3 p3,0,0,2 st3x2", "n1c4h6w6k4r3s3 p1 g2")
)
_DEPTHWISE = (
    "n2c3h9w9k3r3s3 p1 g3",
    "n1c17h5w9k17r3s3 p1 g17",
    "n2c5h9w9k5r3s3 g5 st2 p1",
    "n1c3h9w10k3r5s5 g3 st2 p2",
    "n1c3h13w14k3r3s3 g3 st3x1 p1",
    "n1c3h12w12k3r2s2 g3 st4",
    "n1c3h9w9k3r5s5 g3 p2 d2x1",
    "n1c3h12w13k3r3s3 g3 p2 d2 st2",
    "n1c4h6w7k8r3s3 g4 p1",  # a multiplier
    "n1c3h8w7k3r7s7 g3 p3",
    "n1c2h9w6k2r9s3 g2 p4x1",  # more rows than are unrolled
    "n1c3h6w7k6r3s3 g3 p2,0,1,3",
    "n1c3h8w8k3r1s1 g3",
)
_LARGE = (
    "n2c3h9w9k3r3s3 p1 g3",
    "n1c2h9w9k2r5s5 g2 st2 p2",
    "n1c2h13w14k2r3s3 g2 st3x1 p1",
    "n1c2h5w40k2r5s7 g2 p2x3",
    "n1c2h6w48k2r3s9 g2 p1x4",  # rows of a multiple of 8: windows are aligned
    "n1c2h9w9k2r5s5 g2 p2 d2x1",
    "n1c2h12w13k2r3s3 g2 p2 d2 st2",
    "n1c2h9w9k2r15s15 g2 p7",
)
_GATHERED_MODES = tuple(case for case in _MODES)

SWEEPS: dict[str, tuple[Sweep, ...]] = {
    "igemm": (Sweep(igemm.IGEMM, GATHER, None, _DENSE), Sweep(igemm.IGEMM, ("forward",), None, _GATHERED_MODES)),
    "igemm_tiles": (
        Sweep(igemm.IGEMM, GATHER, IgemmConfig(16, 16, 16), _DENSE[1:8]),
        Sweep(igemm.IGEMM, GATHER, IgemmConfig(32, 16, 32, flat=True), _DENSE[1:8]),
        Sweep(igemm.IGEMM, ("forward",), IgemmConfig(16, 16, 16, flat=True), _GATHERED_MODES[1::4]),
    ),
    "igemm_weight": (
        Sweep(igemm_weight.IGEMM_WEIGHT, WEIGHT, None, _DENSE + _MODES[:9:2]),
        Sweep(igemm_weight.IGEMM_WEIGHT, WEIGHT, WeightConfig(16, 16, 16, splits=3), _DENSE[1:8] + _MODES[1::4]),
        Sweep(igemm_weight.IGEMM_WEIGHT, WEIGHT, WeightConfig(16, 32, 32, splits=2, flat=True), _DENSE[1:5] + _MODES[2::4]),
    ),
    "packed": (
        Sweep(packed.IGEMM_PACKED, GATHER, IgemmConfig(32, 16, 16), _DENSE[1:9], formats=("nchw",)),
        Sweep(packed.IGEMM_PACKED_WEIGHT, WEIGHT, WeightConfig(16, 16, 16, splits=2), _DENSE[1:9], formats=("nchw",)),
        Sweep(packed.IGEMM_PACKED, GATHER, IgemmConfig(32, 16, 16), ("n2c8h6w7k8r3s3 p1 g4", "n2c12h5w6k6r3s3 st2 p1 g6", "n1c6h5w5k9r2s3 g3")),
        Sweep(packed.IGEMM_PACKED_WEIGHT, WEIGHT, WeightConfig(16, 16, 16, splits=2), ("n2c8h6w7k8r3s3 p1 g4", "n2c12h5w6k6r3s3 st2 p1 g6")),
        Sweep(packed.IGEMM_PACKED, ("forward",), IgemmConfig(32, 16, 16), _MODES[1::4], formats=("nchw",)),
    ),
    "depthwise": (
        Sweep(depthwise.DEPTHWISE, GATHER, None, _DEPTHWISE),
        Sweep(depthwise.DEPTHWISE, GATHER, DepthwiseConfig(3, 4, 2), _DEPTHWISE[:3]),
        Sweep(depthwise.DEPTHWISE, ("forward",), None, tuple(f"n1c3h7w6k3r3s3 g3 p2 st1x2 {mode}" for mode in ("reflect", "replicate", "circular"))),
    ),
    "depthwise_weight": (
        Sweep(depthwise_weight.DEPTHWISE_WEIGHT, WEIGHT, None, _DEPTHWISE),
        Sweep(depthwise_weight.DEPTHWISE_WEIGHT, WEIGHT, DepthwiseConfig(2, 8, 2, splits=3, taps=2), _DEPTHWISE[:4]),
        Sweep(depthwise_weight.DEPTHWISE_WEIGHT, WEIGHT, None, tuple(f"n1c3h7w6k3r3s3 g3 p2 {mode}" for mode in ("reflect", "replicate", "circular"))),
    ),
    "banded": (
        Sweep(banded.BANDED, GATHER, BandedConfig(16, 16, 16, 2), _LARGE, dtypes=("f32", "f16", "bf16")),
        Sweep(banded.BANDED, GATHER, BandedConfig(16, 32, 16, 4), _LARGE[:4], dtypes=("f32", "f16", "bf16"), formats=("nchw",)),
        Sweep(banded.BANDED, ("forward",), BandedConfig(16, 16, 16, 1), ("n1c2h14w35k2r7s7 g2 p3 reflect",
              "n1c2h7w40k2r3s3 g2 p2 circular st2", "n1c2h6w7k4r3s3 g2 p1"),
              dtypes=("f32",)),
    ),
    "banded_weight": (
        Sweep(banded_weight.BANDED_WEIGHT, WEIGHT, BandedConfig(2, 16, 16, 2, splits=2), _LARGE, dtypes=("f32", "f16", "bf16")),
        Sweep(banded_weight.BANDED_WEIGHT, WEIGHT, BandedConfig(4, 16, 16, 4), ("n1c2h14w35k2r7s7 g2 p3 reflect",
              "n1c2h7w40k2r3s3 g2 p2 circular st2"), dtypes=("f32",)),
    ),
    "stem": (
        Sweep(stem.STEM, ("forward",), IgemmConfig(32, 16, 16), ("n2c3h9w9k5r3s3 p1", "n3c1h9w11k7r5s5 st2 p2", "n1c4h13w14k8r3s3 st3x1 p1",
              "n1c6h9w9k5r4s4 st4 p1,2,0,1",
              "n1c2h9w10k18r3s2 d2x1 circular p1", "n1c3h12w13k5r7s7 st2 p3 reflect")),
        Sweep(stem.STEM_WEIGHT, WEIGHT, WeightConfig(16, 32, 16, splits=2, flat=True), ("n2c3h9w9k5r3s3 p1", "n3c1h9w11k7r5s5 st2 p2",
              "n1c6h9w9k5r4s4 st4 p1,2,0,1",
              "n1c3h12w13k5r7s7 st2 p3 reflect")),
    ),
    "folded": (
        Sweep(folded.FOLDED, ("grad_input",), None, (*_MODES, "n1c2h1w1k3r3s3 p1 replicate", "n1c2h1w1k3r3s3 p1 circular", "n1c2h3w3k3r3s3 p9 replicate",
              "n1c2h3w4k3r3s3 p3x4 circular", "n1c2h5w6k3r3s3 p-1,2,1,0 reflect", "n1c2h5w6k3r3s3 p-1,2,1,-1 replicate", "n1c3h7w6k3r3s3 g3 p2 reflect")),
    ),
}  # fmt: skip
"""Sweeps by section.  Every case is run on whole numbers, whose sums must come out exactly."""


def launch(plan: Any, inputs: testing.Inputs) -> testing.Result:
    """The plan's result, in memory of NaN with canaries around it."""
    problem = plan.problem
    first, second = inputs.read_by(problem)
    copies = first.clone(), second.clone()
    shape = problem.result_shape
    memory, out = _poisoned(shape, layout.strides_of(shape, problem.result_format), first.dtype)
    side, side_memory = None, None
    if problem.epilogue.bias:
        side_memory, side = _poisoned((problem.k,), (1,), first.dtype)
        if problem.direction == "forward":
            side.copy_(inputs.bias)
    with config.override(poison=True):
        plan.launch(first, second, side, out)
    for buffer in (memory, side_memory):
        if buffer is not None and not ((buffer[:_MARGIN] == _CANARY).all() and (buffer[-_MARGIN:] == _CANARY).all()):
            raise AssertionError("wrote outside of an output")
    if not (torch.equal(first.nan_to_num(), copies[0].nan_to_num()) and torch.equal(second.nan_to_num(), copies[1].nan_to_num())):
        raise AssertionError("wrote into an operand")
    return testing.Result(out, side if problem.direction == "grad_weight" else None)


def _poisoned(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    size = 1
    for length in shape:
        size *= length
    memory = torch.full((size + 2 * _MARGIN,), _CANARY, dtype=dtype)
    memory[_MARGIN : _MARGIN + size] = float("nan")
    return memory, memory.as_strided(shape, strides, _MARGIN)


def _wrong(plan: Any) -> str | None:
    problem = plan.problem
    inputs = testing.make_inputs(problem, integers=True)
    wanted = testing.rounded(problem, testing.exact(problem, inputs))
    for got, want in zip(launch(plan, inputs), wanted, strict=True):
        if not torch.equal(got, want):
            return f"{(got != want).sum().item()} of {got.numel()} wrong, by up to {(got.double() - want.double()).abs().max().item()}"
    return None


def sweep(section: str) -> tuple[int, int, list[str]]:
    """Problems run, problems refused, and what went wrong."""
    ran, refused, failures = 0, 0, []
    for part in SWEEPS[section]:
        for problem in part.problems():
            try:
                plan = part.implementation.plan(problem, 1, part.config) if part.config else part.implementation.plan(problem, 1)
            except dispatch.Unsupported:
                refused += 1
                continue
            ran += 1
            try:
                failure = _wrong(plan)
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
            if failure:
                failures.append(f"{part.implementation.name} {part.config} '{problem}': {failure}")
    return ran, refused, failures


def accuracy() -> tuple[int, int, list[str]]:
    """Every implementation on normally distributed numbers, in each type, within twice stock's error."""
    ran, failures = 0, []
    for case, dtype in (
        ("n2c19h8w9k17r3s3 p1", "f32"), ("n2c19h8w9k17r3s3 p1", "bf16"), ("n2c19h8w9k17r3s3 p1", "f16"), ("n2c19h8w9k17r3s3 p1", "f64"),
        ("n2c3h12w13k9r5s5 p2 st2", "f32"), ("n2c5h9w11k5r3s3 g5 p1", "f32"), ("n2c5h9w11k5r3s3 g5 p1", "bf16"), ("n1c2h15w17k2r11s11 g2 p5", "f32"),
        ("n1c2h15w17k2r11s11 g2 p5", "f16"), ("n2c8h8w9k8r3s3 p1 g4", "f32"),
    ):  # fmt: skip
        for direction in ("forward", "grad_input", "grad_weight"):
            problem = replace(ConvProblem.parse(case), direction=direction, dtype=dtype, epilogue=Epilogue(bias=direction != "grad_input"))
            inputs = testing.make_inputs(problem, seed=3)
            plan = dispatch.plan(problem, "cuda")
            ran += 1
            for got, want, own in zip(launch(plan, inputs), testing.exact(problem, inputs), testing.stock(problem, inputs), strict=True):
                error, bound = (got.double() - want).abs().max().item(), testing.error_bound(want, own)
                if not error <= bound:
                    failures.append(f"{plan.implementation} '{problem}': error {error:.3g}, allowed {bound:.3g}")
    return ran, 0, failures


def nonfinite() -> tuple[int, int, list[str]]:
    """An infinity and a NaN in the input go exactly where PyTorch puts them, for direct sums."""
    ran, failures = 0, []
    for case, implementation in (
        ("n1c5h7w8k6r3s3 p1", igemm.IGEMM),
        ("n1c17h7w8k6r3s3 st2 p1", igemm.IGEMM),
        ("n1c3h7w8k6r3s3 p1", stem.STEM),
        ("n1c4h7w8k4r3s3 g4 p1", depthwise.DEPTHWISE),
        ("n1c6h7w8k6r3s3 p1 g3", igemm.IGEMM),
    ):
        problem = ConvProblem.parse(case)
        inputs = testing.make_inputs(problem, seed=5)
        inputs.x[0, 0, 3, 3], inputs.x[0, 1, 5, 6] = float("inf"), float("nan")
        got, want = launch(implementation.plan(problem, 1), inputs).main, testing.stock(problem, inputs).main
        ran += 1
        if not torch.equal(got.isnan(), want.isnan()) or not torch.equal(got.isinf(), want.isinf()):
            failures.append(f"{implementation.name} '{case}': NaN or infinity elsewhere than PyTorch's")
    return ran, 0, failures


def engine() -> tuple[int, int, list[str]]:
    """The public functions on CPU tensors with ``engine='cuda'``: output and gradients against PyTorch, the same bits twice."""
    ran, failures = 0, []
    layers: list[dict[str, Any]] = [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False},
        {"kernel_size": (3, 2), "padding": "same", "dilation": 2},
        {"kernel_size": 3, "padding": 1, "groups": 3},
        *({"kernel_size": 3, "padding": (2, 1), "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
    ]
    for options in layers:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            torch.manual_seed(1)
            ours = faltung.Conv2d(3, 6, **options).to(memory_format=memory_format)
            stock = torch.nn.Conv2d(3, 6, **options)
            stock.load_state_dict(ours.state_dict())
            x = torch.randn(2, 3, 7, 8).to(memory_format=memory_format).requires_grad_()
            y = x.detach().clone().requires_grad_()
            gradient = torch.randn(stock(y).shape)
            results = []
            with config.override(engine="cuda"):
                for _ in range(2):
                    output = ours(x)
                    results.append((output, *torch.autograd.grad(output, [x, *ours.parameters()], gradient)))
            expected = stock(y)
            expected_all = (expected, *torch.autograd.grad(expected, [y, *stock.parameters()], gradient))
            ran += 1
            for first, second, want in zip(results[0], results[1], expected_all, strict=True):
                if not torch.equal(first, second):
                    failures.append(f"{options} {memory_format}: two runs differ")
                if not torch.allclose(first, want, atol=2e-4, rtol=1e-5):
                    failures.append(f"{options} {memory_format}: off by {(first - want).abs().max().item()}")
    with config.override(engine="cuda"):
        if "cuda implementation: igemm_packed" not in str(faltung.explain("n1c16h8w8k8r3s3 p1")):
            failures.append("explain() does not name the implementation")
        unbatched = faltung.conv2d(torch.ones(3, 5, 5), torch.ones(2, 3, 3, 3))
        if unbatched.shape != (2, 3, 3) or not (unbatched == 27).all():
            failures.append("an unbatched input went wrong")
        double = torch.randn(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
        if not torch.autograd.gradgradcheck(lambda a, b: faltung.conv2d(a, b, padding=1), (double, weight)):
            failures.append("second derivatives are wrong")
    return ran + 3, 0, failures


def tuning() -> tuple[int, int, list[str]]:
    """The search checks its candidates, remembers the fastest right one on disk, and takes a damaged store for an empty one."""
    problem = ConvProblem.parse("n2c8h6w7k8r3s3 p1")
    inputs = testing.make_inputs(problem, integers=True)
    wanted = testing.exact(problem, inputs).main
    failures = []
    with tempfile.TemporaryDirectory() as folder, config.override(cache_dir=folder):
        choice, measured = tuner.tune(problem, (wanted, 1e-6), (inputs.x, inputs.w, None), limit=2)
        if choice is None or any(m.failure for m in measured) or len(measured) < 3:
            failures.append(f"search: {choice} of {measured}")
        rejected, wrong = tuner.tune(replace(problem, k=8, n=1), (wanted[:1] + 1, 1e-6), (inputs.x[:1], inputs.w, None), limit=1)
        if rejected is not None or {m.failure for m in wrong} != {"wrong"}:
            failures.append(f"a wrong result was accepted: {wrong}")
        tuner.clear()
        if tuner.lookup(problem) != choice:
            failures.append("the store does not give back what was put in")
        dispatch.clear()
        plan = dispatch.plan(problem, "cuda")
        if choice is None or plan.implementation != choice.implementation or plan.describe()["config"] != choice.config:
            failures.append(f"the choice is not used: {plan.implementation} {plan.describe()}")
        for path in Path(folder).glob("cuda-*.json"):
            path.write_text('{"n1": {"implementation": 3')
        tuner.clear()
        if tuner.lookup(problem) is not None:
            failures.append("a damaged store gave an answer")
        tuner.clear()
    dispatch.clear()
    return 5, 0, failures


def wide() -> tuple[int, int, list[str]]:
    """The kernels' variants for tensors beyond 2^31 elements, on small ones."""
    for module in (igemm, igemm_weight, depthwise, depthwise_weight, banded, banded_weight, folded, stem, transpose, reduction):
        module.is_wide = lambda *_: True
    ran, failures = 0, []
    for parts in SWEEPS.values():
        for part in parts:
            few = replace(part, cases=part.cases[1:2] or part.cases[:1], dtypes=("f32",))
            for problem in few.problems():
                ran += 1
                failure = _wrong(few.implementation.plan(problem, 1, few.config) if few.config else few.implementation.plan(problem, 1))
                if failure:
                    failures.append(f"{few.implementation.name} '{problem}': {failure}")
    return ran, 0, failures


CHECKS: dict[str, Callable[[], tuple[int, int, list[str]]]] = {"accuracy": accuracy, "nonfinite": nonfinite, "engine": engine, "tuning": tuning, "wide": wide}


def quicken() -> None:
    """Spare the interpreter half of its work, which has no effect on any result."""
    # It checks every integer operation for overflows, with several others, and outside of Triton's debug mode throws the outcome away.
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    # It builds the same table of types for every operation, and replaces all functions of Triton's language in every call, one within another too.
    patched, patch, type_of = set(), interpreter._patch_lang, cache(interpreter._get_np_dtype)

    def scalar_type(kind: Any) -> np.dtype:
        return np.dtype(np.uint64) if kind.scalar.is_ptr() else type_of(kind.scalar)

    def patch_once(function: Any) -> Any:
        seen = {id(value) for value in function.__globals__.values()}
        languages = id(triton.language) in seen, id(triton.language.core) in seen
        if languages not in patched:
            patched.add(languages)
            patch(function)
        return interpreter._LangPatchScope()  # nothing to restore: no kernel is compiled in this process

    interpreter._get_np_dtype, interpreter._patch_lang = scalar_type, patch_once


def main(section: str) -> None:
    quicken()
    start = time.perf_counter()
    # small workspaces: several parts of a batch, several runs of channels
    packed._CHUNK_BYTES, stem._BUFFER_BYTES, banded._BAND_BYTES, banded_weight._SCRATCH_BYTES, folded._BUFFER_BYTES = 4000, 3000, 4000, 100000, 1000
    ran, refused, failures = CHECKS[section]() if section in CHECKS else sweep(section)
    print(json.dumps({"ran": ran, "refused": refused, "failures": failures, "seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main(sys.argv[1])
