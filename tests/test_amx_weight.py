"""The weight's gradient on matrix tiles (AMX)."""

from __future__ import annotations

from dataclasses import replace

import pytest

import cases
import harness
from faltung import config, dispatch, testing
from faltung.cpu import target
from faltung.problem import FORMATS, ConvProblem
from instruction_sets import needs_isa
from test_guard import run_child
from tile_emulation import emulate_tiles

AMX = "amx"

CASES = (
    *(f"n2c{c}h5w6k3r3s3 p1" for c in (1, 2, 15, 16, 17, 31, 32, 33, 48, 49, 66, 100)),  # units of 32 channels, with one tile or two in the last
    *(f"n1c4h6w5k{k}r3s3 p1" for k in (1, 16, 17, 32, 47, 65)),
    *(f"n{n}c3h5w{w}k6r3s3 p1" for n, w in ((1, 1), (1, 7), (2, 16), (3, 2), (3, 17), (3, 33), (5, 31), (1, 70))),  # odd numbers of pixels
    "n1c3h1w1k4r1s1",
    "n1c32h2w2k4r2s2",
    "n5c6h7w7k9r3s3 p1",
    "n4c33h3w3k35r3s3 p1",
    "n3c7h9w12k5r3s3 st2 p1",
    "n2c6h9w70k5r3s3 st2 p1",
    "n1c40h8w8k6r2s2 st2",
    "n2c5h10w13k8r5s5 st3x2 p2",
    "n2c5h10w23k8r4s4 st4",
    "n1c5h9w9k7r1s1 st3",
    "n1c2h4w5k3r4s5",  # one output
    "n2c5h9w11k7r3s3 d2x3 p2x3",
    "n2c5h11w13k7r3s3 d3x2 p3x2 st2",
    "n2c6h6w7k10r3s3 p1 g2",
    "n2c8h6w7k66r3s3 p1 g2",
    "n1c70h4w6k40r3s3 p1 g2",
    "n2c3h5w6k4r4s4 p1,2,1,2",
    "n2c3h2w3k4r3s3 p7",  # outputs that see nothing but padding
    *(f"n2c5h6w7k6r3s3 p2,1,1,2 {mode}" for mode in ("reflect", "replicate", "circular")),
    *(f"n2c5h9w12k6r3s5 p1x2 st2 {mode}" for mode in ("reflect", "replicate", "circular")),
    "n2c6h6w8k4r7s7 p3",
    "n2c3h3w40k2r1s31 p0x15",
    "n2c400h3w5k18r3s3 p1",
    "n1c61h7w7k66r3s3 p1",
    "n1c450h1w20k20r1s1",
    "n2c700h3w3k9r1s1",
    "n2c64h5w5k40r1s1",
    "n2c64h24w40k32r3s3 p1",  # several tiles of pixels, and shares of them
    "n3c35h40w41k20r3s3 st2 p1",
    "n2c20h70w70k18r1s1",
    "n1c6h3w1700k5r1s3 p0x1",  # a row of several tiles
    *(f"n{n}c{c}h{h}w5k{k}r1s1" for n, c, h, k in ((1, 6, 3, 5), (2, 7, 3, 17), (3, 8, 3, 16), (1, 9, 1, 4), (3, 5, 1, 33))),
    "n2c6h5w4k8r1s1 g2",
    "n2c64h5w4k128r1s1 g2",
)


def _problems(dtype: str, cases_: tuple[str, ...] = CASES) -> list[ConvProblem]:
    return [
        cases.problem(case, "grad_weight", dtype, fmt, weight_format, bias=cases.biased(position + turn, "grad_weight"))
        for position, case in enumerate(cases_)
        for turn, fmt in enumerate(FORMATS)
        for weight_format in FORMATS
    ]


@needs_isa(AMX)
@pytest.mark.parametrize("dtype", ("bf16", "f16", "f32"))
def test_results(dtype: str) -> None:
    """Whole numbers exactly, others within twice PyTorch's error, from workspaces of NaN."""
    with target.use_target(AMX):
        outcome = harness.sweep(_problems(dtype), "amx", harness.verify)
    assert outcome.ran == 4 * len(CASES)
    assert not outcome.refused


@needs_isa(AMX)
@pytest.mark.parametrize("dtype", ("bf16", "f32"))
def test_addresses_aligned_to_their_element_only(dtype: str) -> None:
    with target.use_target(AMX):
        harness.sweep(_problems(dtype, CASES[::5]), "amx", lambda plan: harness.verify(plan, shift=1))


@needs_isa(AMX)
@pytest.mark.parametrize("side", ("end", "start"))
def test_operands_against_forbidden_pages(side: str) -> None:
    runs = [("amx", str(problem)) for dtype in ("bf16", "f16", "f32") for problem in _problems(dtype)[:: 2 if dtype == "bf16" else 5]]
    run_child(side, runs, threads=2)


@needs_isa(AMX)
@pytest.mark.parametrize("dtype", ("bf16", "f16", "f32"))
def test_same_bits_for_any_number_of_threads(dtype: str) -> None:
    large = tuple(case for case in CASES if ConvProblem.parse(case).flops() > 2e6)
    with target.use_target(AMX):
        for problem in _problems(dtype, (*CASES[::9], *large)):
            inputs = testing.make_inputs(problem)
            alone, *others = (harness.launch(harness.plan_named("amx", problem, threads), inputs) for threads in (1, 2, 3))
            assert all(harness.equal_bits(alone, other) for other in others), str(problem)


NON_FINITE = ("n1c5h7w9k7r3s3 p1", "n3c5h7w7k3r3s3 p1", "n2c4h5w5k6r3s3 st2", "n1c3h5w5k3r1s1", "n3c33h3w3k35r2s2", "n2c6h5w6k4r3s3 p1 g2 reflect")


@needs_isa(AMX)
@pytest.mark.parametrize("dtype", ("bf16", "f16", "f32"))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), 3e38))
@pytest.mark.parametrize("operand", ("x", "gy"))
def test_nan_infinity_and_overflow(operand: str, value: float, dtype: str) -> None:
    """What is not finite, or overflows, gives what the direct algorithm gives."""
    with target.use_target(AMX):
        for problem in _problems(dtype, NON_FINITE):
            inputs = testing.make_inputs(problem)
            source = getattr(inputs, operand)
            for where in (tuple(size - 1 for size in source.shape), tuple(size // 2 for size in source.shape)):
                before = source[where].clone()
                source[where] = value
                got, wanted = (harness.launch(harness.plan_named(name, problem), inputs) for name in ("amx", "direct"))
                assert value == 3e38 or not wanted.main.isfinite().all()
                assert harness.equal_where_not_finite(got, wanted), f"'{problem}' at {where}"
                source[where] = before


@needs_isa(AMX)
def test_chosen_in_bfloat16_where_predicted_faster() -> None:
    """By sizes alone: which algorithm it is decides bits."""
    slow, fast = (replace(target.TARGETS[AMX], rates=target.Rates(rate, rate, rate, rate)) for rate in (0.25, 4.0))
    found = []
    for case in ("n8c256h14w14k256r3s3 p1", "n1c64h56w56k64r1s1", "n2c3h40w40k8r3s3 p1", "n1c512h7w7k512r3s3 p1", "n1c4h5w5k3r3s3"):
        problem = cases.problem(case, "grad_weight", "bf16", "nhwc", "nhwc")
        chosen = set()
        for machine in (slow, fast):
            with target.use_target(machine):
                chosen |= {dispatch.plan(problem, "cpu", threads).implementation for threads in (1, 2, 16)}
        found += chosen
        assert len(chosen) == 1, case
    assert {"amx"} < {*found}
    for dtype in ("f16", "f32"):
        with target.use_target(AMX):
            problem = cases.problem(CASES[-1], "grad_weight", dtype, "nhwc", "nhwc")
            assert dispatch.plan(problem, "cpu", 2).implementation != "amx"
            with config.override(precision="strict"), pytest.raises(dispatch.Unsupported, match="strict"):
                harness.plan_named("amx", problem)


@needs_isa("avx2")
@pytest.mark.parametrize(("dtype", "every"), (("bf16", 1), ("f16", 13), ("f32", 9)))
def test_results_with_emulated_tiles(dtype: str, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the tile instructions."""
    with target.use_target(emulate_tiles(monkeypatch)):
        outcome = harness.sweep(_problems(dtype)[::every], "amx", harness.verify, threads=1)
    assert outcome.ran == len(_problems(dtype)[::every])
