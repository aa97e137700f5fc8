"""bfloat16 in pairs: two terms of a reduction at a time, where the processor has such products."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
import harness
import tile_emulation
from faltung import dispatch, testing
from faltung.codegen.compile import assembly
from faltung.codegen.numeric import Numeric
from faltung.cpu import bfloat, direct, direct_weight, gemv_kernel, micro, pointwise, target
from faltung.problem import DIRECTIONS, FORMATS, ConvProblem, Direction
from implementations import verify
from instruction_sets import needs_isa

PAIRS = "avx512_bf16"
runs_pairs = needs_isa(PAIRS)

CASES = (
    *(f"n2c{c}h5w6k3r3s3 p1" for c in (1, 2, 31, 33)),  # odd channels, whole and partial vectors of 16-bit and 32-bit elements
    *(f"n1c4h6w5k{k}r3s3 p1" for k in (1, 17, 47)),
    *(f"n{n}c3h5w{w}k6r3s3 p1" for n, w in ((1, 1), (1, 7), (2, 16), (3, 2), (3, 17), (3, 33))),  # pixels with and without a partner
    "n1c3h2w9k4r3s3 p1",
    "n5c6h7w7k9r3s3 p1",
    "n3c7h9w12k5r3s3 st2 p1",
    "n2c6h9w70k5r3s3 st2 p1",
    "n2c5h10w13k8r5s5 st3x2 p2",
    "n2c5h9w11k7r3s3 d2x3 p2x3",
    "n2c6h6w7k10r3s3 p1 g2",  # an odd number of channels in a group
    "n2c8h6w7k20r3s3 p1 g2",
    "n2c3h5w6k4r4s4 p1,2,1,2",
    *(f"n2c5h6w7k6r3s3 p2,1,1,2 {mode}" for mode in ("reflect", "replicate", "circular")),
    "n2c6h6w8k4r7s7 p3",  # runs of taps longer than a vector
    "n2c400h3w5k18r3s3 p1",  # more than one piece of the reduction
    "n1c61h7w7k66r3s3 p1",  # an image that is one tile
    "n1c450h1w20k20r1s1",
    "n2c700h3w3k9r1s1",
    *(f"n{n}c{c}h{h}w5k{k}r1s1" for n, c, h, k in ((1, 6, 3, 5), (1, 6, 4, 5), (2, 7, 3, 17), (3, 8, 3, 16), (1, 9, 1, 4), (3, 5, 1, 33))),
    "n2c6h5w4k8r1s1 g2",
    "n2c8h5w4k12r1s1 g2",
)


def _problems(direction: Direction) -> list[ConvProblem]:
    return [
        cases.problem(case, direction, "bf16", fmt, weight_format, bias=cases.biased(position, direction))
        for position, case in enumerate(CASES)
        for turn, fmt in enumerate(FORMATS)
        for weight_format in (FORMATS[(position + turn) % 2],)
    ]


@needs_isa("avx2")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("implementation", ("direct", "pointwise", "gemv"))
def test_pairs_with_an_emulated_product(implementation: str, direction: Direction, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the one instruction: vectors of 64 bytes and their masks, lowered by LLVM for this processor."""
    for module in (bfloat, micro, gemv_kernel):
        monkeypatch.setattr(module, "dot", tile_emulation.add_products)
    monkeypatch.setattr(bfloat, "nearest", tile_emulation.nearest)
    host = target.host_target()
    lowered = replace(host, isa=PAIRS, features=host.features + ",+sse2", vector_bytes=64, registers=32, masks=True, bfloat16_dot=True)  # a name of its own
    with target.use_target(lowered):
        outcome = harness.sweep(_problems(direction), implementation, verify)
    assert outcome.ran >= {"direct": 60, "pointwise": 20, "gemv": 4}[implementation]


@runs_pairs
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("implementation", ("direct", "pointwise", "folded"))
def test_results(implementation: str, direction: Direction) -> None:
    """Whole numbers exactly, others within twice PyTorch's error, from workspaces of NaN."""
    with target.use_target(PAIRS):
        outcome = harness.sweep(_problems(direction), implementation, harness.verify)
    if implementation != "folded" or direction == "grad_input":
        assert outcome.ran >= 6
    assert outcome.ran + outcome.refused == 2 * len(CASES)


@runs_pairs
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_addresses_aligned_to_their_element_only(direction: Direction) -> None:
    with target.use_target(PAIRS):
        for implementation in ("direct", "pointwise"):
            harness.sweep(_problems(direction)[::3], implementation, lambda plan: harness.verify(plan, shift=1))


@runs_pairs
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_same_bits_for_any_number_of_threads(direction: Direction) -> None:
    with target.use_target(PAIRS):
        for problem in _problems(direction)[::5]:
            if direction == "grad_input" and problem.padding_mode != "zeros":
                continue
            inputs = testing.make_inputs(problem)
            alone, *others = (harness.launch(harness.plan_named("direct", problem, threads), inputs) for threads in (1, 2, 3))
            assert all(harness.equal_bits(alone, other) for other in others), str(problem)


@runs_pairs
@pytest.mark.parametrize("direction", ("forward", "grad_input"))
def test_both_orientations_give_the_same_bits(direction: Direction) -> None:
    machine = target.TARGETS[PAIRS]
    for problem in _problems(direction)[::3]:
        zeros = replace(problem, padding_mode="zeros")
        inputs = testing.make_inputs(zeros)
        plans = [direct.build_plan(zeros, machine, 2, direct.choose_config(zeros, machine, 2, orientation), "direct") for orientation in ("channels", "pixels")]
        left, right = (harness.launch(plan, inputs) for plan in plans)
        assert harness.equal_bits(left, right), str(zeros)


@runs_pairs
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_nan_and_infinity_do_not_leak_into_partners(fmt: str, direction: Direction, value: float) -> None:
    """What is not finite stays with its pixel and channel, whichever half of a pair it stands in."""
    for case in ("n1c5h7w9k7r3s3 p1", "n3c5h7w7k3r3s3 p1", "n2c4h5w5k6r3s3 st2", "n1c3h5w5k3r1s1", "n3c3h3w3k5r1s1"):
        problem = cases.problem(case, direction, "bf16", fmt, "nchw")  # type: ignore[arg-type]
        inputs = testing.make_inputs(problem, integers=True)
        x, w, bias, gy = (t + 3 for t in (inputs.x, inputs.w, inputs.bias, inputs.gy))  # no zeros: infinity stays infinity
        source = gy if direction == "grad_input" else x
        for where in (tuple(size - 1 for size in source.shape), tuple(size // 2 for size in source.shape)):
            before = source[where].clone()
            source[where] = value
            marks = torch.zeros_like(source)
            marks[where] = 1.0
            ones = [torch.ones_like(t) for t in (x, w, bias, gy)]
            ones[3 if direction == "grad_input" else 0] = marks
            (touched,) = testing.exact(problem, testing.Inputs(*ones))
            for implementation in ("direct", "pointwise"):
                with target.use_target(PAIRS):
                    try:
                        plan = harness.plan_named(implementation, problem)
                    except dispatch.Unsupported:
                        continue
                    (got,) = harness.launch(plan, testing.Inputs(x, w, bias, gy))
                assert torch.equal(~got.isfinite(), touched != 0), f"{implementation} '{problem}' at {where}"
            source[where] = before


def test_only_processors_with_pair_products_get_them() -> None:
    problem = ConvProblem.parse("bf16 nhwc n2c8h9w10k16r3s3 p1")
    for name in ("avx512", PAIRS):
        machine = target.TARGETS[name]
        assert machine.bfloat16_dot == (name == PAIRS)
        for dtype in ("bf16", "f16", "f32", "f64"):
            assert Numeric(dtype, machine).pairs == (name == PAIRS and dtype == "bf16")
            one = replace(problem, dtype=dtype)
            config = direct.choose_config(one, machine, 2)
            numeric = Numeric(dtype, machine)
            _, columns = direct.axes(one, config.tile, dense=config.layout == "inner")
            kernel = direct._kernel(one, direct.Roles(one), numeric, config, columns, False)
            code = assembly(str(kernel.emit()), machine)
            assert ("vdpbf16ps" in code) == numeric.pairs
    assert not any(machine.bfloat16_dot for name, machine in target.TARGETS.items() if name != PAIRS)


_tiles = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))


@given(n=st.integers(1, 7), p=st.integers(1, 9), q=st.integers(1, 9), tile=_tiles)
@settings(max_examples=200, deadline=None)
def test_pairs_of_tiles_hold_every_pixel_once(n: int, p: int, q: int, tile: tuple[int, int, int]) -> None:
    problem = ConvProblem(n, 1, p, q, 1, 1, 1)
    seen = np.zeros((n, p, q), np.int64)
    taken = 0
    for record in bfloat.pair_tiles(problem, tile, 1000, (100, 10)):
        image, row, column, images, rows, columns, second, x_distance, gy_distance = record.tolist()
        area = np.s_[:, :, column : column + columns]
        seen[image : image + images, row : row + rows][area] += 1
        taken += 2 * images * rows * columns
        if second >= 0:
            other = image + x_distance // 1000
            assert gy_distance == (other - image) * 100 + (second - row) * 10
            assert other + images <= n
            assert second + rows <= p
            seen[other : other + images, second : second + rows][area] += 1
    assert (seen == 1).all()
    assert bfloat.pair_efficiency(problem, tile) == pytest.approx(n * p * q / taken)


@given(n=st.integers(1, 9), h=st.integers(1, 30), w=st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_most_pixels_of_a_weight_gradient_have_partners(n: int, h: int, w: int) -> None:
    machine = target.TARGETS[PAIRS]
    for fmt in FORMATS:
        problem = replace(ConvProblem(n, 16, h, w, 16, 3, 3, padding=(1, 1, 1, 1)), dtype="bf16", direction="grad_weight", format=fmt)
        config = direct_weight.choose_config(problem, machine)
        least = 0.5 if n == 1 and h < 3 else 2 / 3
        assert bfloat.pair_efficiency(problem, config.tile) >= least - 1e-9
        with target.use_target(machine):
            row = pointwise.joined(replace(problem, r=1, s=1, padding=(0, 0, 0, 0)))
        assert row.n * row.p * row.q == n * h * w


def test_offsets_of_pairs() -> None:
    assert bfloat.pair_offsets(4, 18).tolist() == [0, 36]
    assert bfloat.pair_offsets(5, 18).tolist() == [0, 36, 73]
    taps = np.arange(9) * 2
    assert bfloat.run_length((bfloat.pair_offsets(5, 18)[:, None] + taps).reshape(-1), 18) == 9
    assert bfloat.run_length(bfloat.pair_offsets(6, 2), 2) == 3
    assert bfloat.run_length(bfloat.pair_offsets(5, 2), 2) == 1
