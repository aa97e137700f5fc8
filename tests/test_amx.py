"""Convolution on matrix tiles (AMX), forward and grad_input."""

from __future__ import annotations

import pytest
import torch

import cases
import faltung
import harness
from faltung import config, testing
from faltung.cpu import target
from faltung.cpu.checked import CheckedPlan
from faltung.problem import FORMATS, ConvProblem, Direction
from instruction_sets import needs_isa
from test_guard import run_child
from tile_emulation import emulate_tiles

AMX = "amx"

CASES = (
    *(f"n2c{c}h5w6k3r3s3 p1" for c in (1, 2, 31, 33, 64, 66, 100)),  # odd channels, one and several blocks of pairs
    *(f"n1c4h6w5k{k}r3s3 p1" for k in (1, 16, 17, 32, 47, 65)),  # wide and narrow panels
    *(f"n{n}c3h5w{w}k6r3s3 p1" for n, w in ((1, 1), (1, 7), (2, 16), (3, 2), (3, 17), (3, 33), (1, 70))),
    "n1c3h1w1k4r1s1",
    "n1c32h2w2k4r2s2",
    "n5c6h7w7k9r3s3 p1",
    "n3c7h9w12k5r3s3 st2 p1",
    "n2c6h9w70k5r3s3 st2 p1",
    "n1c40h8w8k6r2s2 st2",
    "n2c5h10w13k8r5s5 st3x2 p2",
    "n2c5h10w23k8r4s4 st4",
    "n1c5h9w9k7r1s1 st3",  # phases of grad_input without taps
    "n2c5h9w11k7r3s3 d2x3 p2x3",
    "n2c6h6w7k10r3s3 p1 g2",
    "n2c8h6w7k66r3s3 p1 g2",
    "n2c3h5w6k4r4s4 p1,2,1,2",
    *(f"n2c5h6w7k6r3s3 p2,1,1,2 {mode}" for mode in ("reflect", "replicate", "circular")),
    "n2c6h6w8k4r7s7 p3",
    "n2c400h3w5k18r3s3 p1",
    "n1c61h7w7k66r3s3 p1",
    "n1c450h1w20k20r1s1",
    "n2c700h3w3k9r1s1",
    "n2c64h5w5k40r1s1",  # read in place in nhwc
    "n1c96h4w4k33r1s1",
    "n1c64h3w5k33r1s1",
    "n2c2048h4w4k8r1s1",
    *(f"n{n}c{c}h{h}w5k{k}r1s1" for n, c, h, k in ((1, 6, 3, 5), (2, 7, 3, 17), (3, 8, 3, 16), (1, 9, 1, 4), (3, 5, 1, 33))),
    "n2c6h5w4k8r1s1 g2",
    "n2c64h5w4k128r1s1 g2",
)


def _problems(direction: Direction, dtype: str) -> list[ConvProblem]:
    return [
        cases.problem(case, direction, dtype, fmt, weight_format, bias=cases.biased(position, direction))
        for position, case in enumerate(CASES)
        for turn, fmt in enumerate(FORMATS)
        for weight_format in (FORMATS[(position + turn) % 2],)
    ]


@needs_isa(AMX)
@pytest.mark.parametrize("dtype", ("bf16", "f16", "f32"))
@pytest.mark.parametrize("direction", ("forward", "grad_input"))
def test_results(direction: Direction, dtype: str) -> None:
    """Whole numbers exactly, others within twice PyTorch's error, from workspaces of NaN."""
    with target.use_target(AMX):
        outcome = harness.sweep(_problems(direction, dtype), "amx", harness.verify)
    assert outcome.ran >= 80


@needs_isa(AMX)
@pytest.mark.parametrize("side", ("end", "start"))
def test_operands_against_forbidden_pages(side: str) -> None:
    runs = [("amx", str(problem)) for dtype in ("bf16", "f16", "f32") for problem in _problems("forward", dtype)[:: 2 if dtype == "bf16" else 5]]
    run_child(side, runs, threads=2)


@needs_isa(AMX)
@pytest.mark.parametrize("dtype", ("bf16", "f16", "f32"))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), 3e38))
@pytest.mark.parametrize("direction", ("forward", "grad_input"))
def test_nan_and_infinity_do_not_leak_into_neighbours(direction: Direction, value: float, dtype: str) -> None:
    """Joined taps end in zeros, which meet channels of the next pixel; parts of infinity are NaN: what is not finite is what it is for direct."""
    with target.use_target(AMX):
        for case in ("n1c3h7w9k5r3s3 p1", "n2c2h6w5k3r2s5 p1x2", "n2c5h7w7k18r3s3 st2", "n1c33h4w5k40r1s1", "n2c6h5w6k4r3s3 p1 g2"):
            for fmt in FORMATS:
                problem = cases.problem(case, direction, dtype, fmt, fmt, bias=direction == "forward")
                inputs = testing.make_inputs(problem)
                source = inputs.x if direction == "forward" else inputs.gy
                for where in (tuple(size - 1 for size in source.shape), tuple(size // 2 for size in source.shape)):
                    before = source[where].clone()
                    source[where] = value
                    got, wanted = (harness.launch(harness.plan_named(name, problem), inputs) for name in ("amx", "direct"))
                    assert harness.equal_where_not_finite(got, wanted), f"'{problem}' at {where}"
                    source[where] = before


@needs_isa(AMX)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
@torch.no_grad()
def test_nan_and_infinity_in_frozen_layers(memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 9, 10).to(dtype).to(memory_format=memory_format)
    conv = faltung.Conv2d(3, 8, 3, padding=1).to(dtype).to(memory_format=memory_format).eval()
    with target.use_target(AMX):
        for value in (None, float("inf"), float("nan")):
            if value is not None:
                x[1, 2, 4, 5] = value
            with config.override(implementation="direct"):
                wanted = conv(x)
            with config.override(implementation="amx"):
                plain = conv(x)
                frozen = faltung.freeze(conv)(x)
                assert conv._frozen is not None
                assert conv._frozen.bytes > 0
            faltung.unfreeze(conv)
            for got in (plain, frozen):
                assert harness.equal_where_not_finite(testing.Result(got), testing.Result(wanted))
                torch.testing.assert_close(got, wanted, equal_nan=True)
            assert wanted.isfinite().all() == (value is None)


@needs_isa(AMX)
def test_joined_taps_are_checked() -> None:
    with target.use_target(AMX):
        for case, checked in (("n1c3h7w9k5r3s3 p1", True), ("n1c64h7w9k5r3s3 p1", False)):
            plan = harness.plan_named("amx", cases.problem(case, "forward", "bf16", "nhwc", "nhwc"))
            assert isinstance(plan, CheckedPlan) == checked


@needs_isa("avx2")
@pytest.mark.parametrize(("dtype", "every"), (("bf16", 1), ("f16", 8), ("f32", 6)))
@pytest.mark.parametrize("direction", ("forward", "grad_input"))
def test_results_with_emulated_tiles(direction: Direction, dtype: str, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the tile instructions."""
    with target.use_target(emulate_tiles(monkeypatch)):
        outcome = harness.sweep(_problems(direction, dtype)[::every], "amx", harness.verify, threads=1)
    assert outcome.ran >= 80 // every
