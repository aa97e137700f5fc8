"""``planes``, which packs no weights, and panels that are packed where they are used: the same bits as packed weights, whatever the threads and tiles."""

from __future__ import annotations

from dataclasses import replace

import pytest

import harness
from faltung import config, dispatch, testing
from faltung.codegen.numeric import Numeric
from faltung.cpu import direct, planes, pointwise, target
from faltung.problem import ConvProblem
from implementations import verify
from instruction_sets import each_isa

# several pieces of the reduction; a last block of pixels that begins in another's; planes a page apart, whose sums are kept aside; all kinds of windows
PROBLEMS = (
    "forward f32 nchw n2c400h9w9k30r1s1 bias",
    "forward f32 nchw n1c230h32w32k21r1s1 bias",
    "forward f32 nchw n2c30h16w32k21r3s3 p1 bias",
    "forward f32 nchw n2c67h13w11k34r3s3 st2 p1 wnhwc",
    "forward f32 nchw n2c24h9w17k40r5s3 st1x2 p2,0,1,3 reflect g2 bias",
    "forward f32 nchw n1c26h12w9k13r3s3 p2 d2 circular",
    "forward f64 nchw n2c201h7w5k10r1s1 st2",
    "forward f64 nchw n1c70h6w7k11r2s4 p1 replicate bias",
    "grad_input f32 nchw n2c30h9w9k400r1s1",
    "grad_input f32 nchw n1c21h16w16k230r1s1 wnhwc",
    "grad_input f32 nchw n2c26h13w12k66r3s3 p1 d2 g2",
    "grad_input f64 nchw n1c9h5w6k40r3s2 p1",
)


def _packed(problem: ConvProblem) -> str:
    pointwise_too = (problem.r, problem.s, problem.stride) == (1, 1, (1, 1)) and not any(problem.padding)
    return "pointwise" if pointwise_too else "direct"


@pytest.mark.parametrize("text", PROBLEMS)
def test_same_bits_as_with_packed_weights(text: str) -> None:
    problem = ConvProblem.parse(text)
    inputs = testing.make_inputs(problem)
    wanted = harness.launch(harness.plan_named(_packed(problem), problem), inputs)
    offered = planes.offered_configs(problem, target.target(), 3)
    plans = [harness.plan_named("planes", problem, threads) for threads in (1, 2, 3)]
    with config.override(poison=True, implementation="planes"):
        plans += [planes.PLANES.plan(problem, 3, chosen) for chosen in offered]
        plans += [planes.PLANES.plan(problem, 3, replace(chosen, run=1, k_blocks=3)) for chosen in offered]
    assert len(plans) > 3
    for plan in plans:
        for _ in range(3):  # threads meet in another order each time
            assert harness.equal_bits(wanted, harness.launch(plan, inputs)), plan.describe()


@each_isa(("avx512", "avx2", "sse2"))
@pytest.mark.parametrize("text", PROBLEMS)
def test_planes_on_every_instruction_set(text: str, isa: str) -> None:
    with target.use_target(isa):
        assert (failure := verify(harness.plan_named("planes", ConvProblem.parse(text)))) is None, failure


@pytest.mark.parametrize("isa", ("avx512", "avx2"))
def test_planes_are_chosen_where_weights_would_be_packed_for_one_image(isa: str) -> None:
    with target.use_target(isa):
        for text in ("forward f32 nchw n1c512h56w56k128r1s1", "forward f32 nchw n1c512h28w28k1024r1s1 st2", "forward f64 nchw n1c256h14w14k256r3s3 st2 p1"):
            assert dispatch.plan(ConvProblem.parse(text), "cpu", 2).implementation == "planes"
        for text in ("forward f32 nchw n1c3h64w64k16r3s3 st2 p1", "grad_input f32 nchw n1c1024h7w7k512r1s1"):
            refusals = dict(dispatch.decide(ConvProblem.parse(text), "cpu", 2).refusals)
            assert "predicted to be faster" in refusals["planes"]
        refusals = dict(dispatch.decide(ConvProblem.parse("forward f32 nchw n8c512h7w7k512r1s1"), "cpu", 2).refusals)
        assert "several images" in refusals["planes"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("forward f32 nhwc n1c8h9w9k8r1s1", "nhwc"),
        ("grad_weight f32 nchw n1c8h9w9k8r1s1", "grad_weight"),
        ("forward bf16 nchw n1c8h9w9k8r1s1", "16-bit"),
        ("grad_input f32 nchw n1c8h9w9k8r1s1 st2", "stride 1"),
        ("forward f32 nchw n1c8h1w2k8r1s1", "pixels"),
    ],
)
def test_what_planes_refuse(text: str, reason: str) -> None:
    with config.override(implementation="planes"), pytest.raises(dispatch.Unsupported, match=reason):
        dispatch.plan(ConvProblem.parse(text), "cpu", 1)


ONE_TILE = (
    "forward f32 nchw n1c200h7w7k70r1s1 bias",
    "forward f32 nhwc n1c200h7w7k70r1s1 bias wnhwc",
    "forward f32 nhwc n1c120h7w7k70r3s3 st2 p1 bias",
    "forward f64 nhwc n1c60h6w7k66r3s3 p1 g3 bias wnhwc",
    "forward bf16 nhwc n1c61h7w7k66r3s3 p1 bias",
    "forward f16 nchw n1c60h7w7k66r3s3 p1 bias",
    "grad_input f32 nchw n1c70h7w7k220r1s1",
    "grad_input f32 nchw n1c52h7w7k270r3s3 st2 p1",
    "grad_input f32 nhwc n1c52h7w8k270r3s3 st2 p1 wnhwc",
    "grad_input bf16 nhwc n1c40h5w6k90r2s2 g2 wnhwc",
)


@each_isa(("avx512_bf16", "avx512", "avx2", "sse2"))
@pytest.mark.parametrize("text", ONE_TILE)
def test_panels_packed_at_use(text: str, isa: str) -> None:
    """One tile of one image: no stage packs weights, and the bits are those of a stage that does."""
    problem = ConvProblem.parse(text)
    with target.use_target(isa), config.override(poison=True):
        host = target.target()
        rows = pointwise.joined(problem) if _packed(problem) == "pointwise" else problem
        found = direct.choose_config(rows, host, 2, "channels")
        found = replace(found, tile=(rows.p, rows.q) if problem.direction == "forward" else (rows.h, rows.w), k_blocks=2)
        plan, kept = (direct.build_plan(rows, host, 2, found, "direct", kept=kept) for kept in (False, True))
        if Numeric(problem.dtype, host).pairs:  # packed in whole runs
            assert plan.packing is not None
            return
        assert plan.packing is None
        assert kept.packing is not None
        assert (failure := verify(plan)) is None, failure
        inputs = testing.make_inputs(rows)
        assert harness.equal_bits(harness.launch(plan, inputs), harness.launch(kept, inputs))
        frozen = plan.describe_frozen()
        assert frozen["frozen_bytes"] > 0
