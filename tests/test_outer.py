"""``outer``, which packs nothing: the same bits whatever the blocks and threads, on every instruction set; and where it is chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest

import harness
from faltung import config, dispatch, testing
from faltung.cpu import outer, target
from faltung.problem import ConvProblem
from implementations import verify
from instruction_sets import each_isa

# several pieces and panels, narrow ones and partial vectors; few rows; taps that never meet x; more taps than lanes; images that share a piece
PROBLEMS = (
    "grad_weight f32 nchw n1c150h13w11k37r1s1 bias",
    "grad_weight f32 nhwc n1c150h13w11k37r1s1 bias wnhwc",
    "grad_weight f32 nhwc n2c70h9w23k2r1s1 bias wnhwc",
    "grad_weight f32 nchw n5c33h7w7k21r1s1 st2 bias",
    "grad_weight f32 nchw n5c33h7w7k21r3s3 p1 bias",
    "grad_weight f32 nhwc n5c33h7w7k21r3s3 p1 bias",
    "grad_weight f32 nhwc n5c33h7w7k21r3s3 p1 bias wnhwc",
    "grad_weight f32 nchw n1c17h9w12k19r5s5 st2 p2 bias",
    "grad_weight f32 nhwc n1c17h9w12k19r5s5 st1x2 p2 bias",
    "grad_weight f32 nhwc n2c20h5w4k11r3s3 p4 d4 wnhwc",
    "grad_weight f32 nchw n2c20h5w4k11r3s3 p3 d4 bias",
    "grad_weight f32 nhwc n1c40h3w210k13r1s3 p1,2,0,1 bias wnhwc",
    "grad_weight f32 nchw n1c40h3w210k13r2s1 p1,2,0,1 bias",
    "grad_weight f32 nhwc n2c64h9w9k36r3s3 p1 g2 bias wnhwc",
    "grad_weight f32 nchw n2c64h9w9k36r3s3 p1 g2 bias",
    "grad_weight f64 nhwc n1c70h13w11k37r1s1 bias wnhwc",
    "grad_weight f64 nchw n2c35h8w9k9r3s2 st2 p1 bias wnhwc",
    # paddings other than zeros: runs of outputs that read backwards, one pixel again and again, the other end
    "grad_weight f32 nhwc n1c40h13w17k3r9s9 p4 reflect bias wnhwc",
    "grad_weight f32 nchw n1c40h13w17k3r9s9 p4 reflect bias",
    "grad_weight f32 nhwc n2c20h9w8k4r5s3 p3,2,1,4 circular st2 bias",
    "grad_weight f32 nhwc n2c20h9w8k4r5s3 p3,2,1,4 replicate st2x3 bias wnhwc",
    "grad_weight f32 nchw n5c20h6w5k21r3s3 p2 replicate bias",
    "grad_weight f64 nchw n1c19h7w210k2r3s4 p2,3,1,2 reflect d2x1 bias",
    "grad_weight f32 nhwc n1c17h2w3k2r3s3 p1,2,1,0 reflect d1 bias wnhwc",
    "grad_weight f32 nhwc n3c48h7w7k6r3s3 p6 d4 circular g3 wnhwc",
)


@pytest.mark.parametrize("text", PROBLEMS)
def test_same_bits_for_any_blocks_and_threads(text: str) -> None:
    problem = ConvProblem.parse(text)
    inputs = testing.make_inputs(problem)
    wanted = harness.launch(harness.plan_named("outer", problem, 1), inputs)
    chosen, taps = outer.choose_config(problem, target.target(), 3), problem.r * problem.s
    assert chosen.block_groups * chosen.block_panels > 0
    plans = [harness.plan_named("outer", problem, threads) for threads in (2, 3)]
    with config.override(poison=True):
        blocks = [replace(chosen, block_groups=groups, block_panels=panels, threads=3) for groups in (1, 2, 3) for panels in (1, 2)]
        blocks += [replace(chosen, tap_blocks=count, threads=3) for count in {1, min(2, taps), min(5, taps), taps}]
        plans += [outer.build_plan(problem, target.target(), block, "outer") for block in blocks]
    for plan in plans:
        for _ in range(3):  # threads meet in another order each time
            assert harness.equal_bits(wanted, harness.launch(plan, inputs)), plan.describe()


@each_isa(("avx512", "avx2", "sse2"))
@pytest.mark.parametrize("text", PROBLEMS)
def test_outer_on_every_instruction_set(text: str, isa: str) -> None:
    with target.use_target(isa):
        assert (failure := verify(harness.plan_named("outer", ConvProblem.parse(text)))) is None, failure


@each_isa(("avx512", "avx2", "sse2"))
def test_where_it_is_chosen(isa: str) -> None:
    """Few pixels, in vectors that it was measured with; the choice does not depend on the number of threads."""
    few = (
        "grad_weight f32 nchw n2c320h64w64k4r3s3 p1 bias",  # few output channels
        "grad_weight f32 nhwc n4c128h32w32k2r3s3 p1 bias wnhwc",
        "grad_weight f32 nhwc n1c32h64w64k3r9s9 p4 reflect bias wnhwc",
        "grad_weight f32 nchw n1c32h256w256k3r9s9 p4 reflect bias",
        "grad_weight f32 nchw n4c32h56w56k32r8s8 st8 bias",  # kernels that do not overlap
        "grad_weight f32 nchw n1c256h14w14k1024r1s1",
        "grad_weight f64 nchw n1c512h7w7k512r1s1",
        "grad_weight f32 nhwc n1c184h14w14k80r1s1 wnhwc",
    )
    many = (
        "grad_weight f32 nchw n8c64h56w56k64r1s1",
        "grad_weight f32 nhwc n1c64h9w9k64r3s3 p1 reflect wnhwc",
        "grad_weight f32 nchw n1c64h56w56k128r3s3 st2 p1",
        "grad_weight bf16 nhwc n1c256h14w14k512r1s1 wnhwc",
        "grad_weight f32 nchw n1c512h32w32k1024r1s1",  # planes, and pixels, a page apart
        "grad_weight f32 nhwc n1c1024h14w14k1024r1s1 wnhwc",
    )
    with target.use_target(isa):
        for threads in (1, 2, 7):
            chosen = {text: dispatch.plan(ConvProblem.parse(text), "cpu", threads).implementation for text in (*few, *many)}
            assert [chosen[text] == "outer" for text in few] == [isa != "sse2"] * len(few)
            assert "outer" not in [chosen[text] for text in many]
