"""``taps``: the same bits for any tiles and threads, on every instruction set, in both formats; and where it is chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest

import harness
from faltung import config, dispatch, testing
from faltung.cpu import taps, target
from faltung.problem import ConvProblem
from implementations import verify
from instruction_sets import each_isa

# taps that meet nothing, a part, all; several pieces of channels; narrow panels and partial vectors; strides of both directions; turned images
PROBLEMS = (
    "forward f32 nhwc n2c37h9w11k24r3s3 p1 bias wnhwc",
    "forward f32 nhwc n2c37h9w11k21r3s3 p1 bias",
    "forward f32 nhwc n1c210h9w11k40r3s3 p4 d4 bias wnhwc",
    "forward f32 nhwc n2c37h9w11k8r5s2 st2x3 p2,3,0,1 wnhwc",
    "forward f32 nhwc n2c37h9w11k16r3s3 p7 d7 wnhwc",
    "forward f32 nhwc n1c16h5w40k72r1s7 p0x3 bias wnhwc",
    "grad_input f32 nhwc n2c40h9w11k24r3s3 wnhwc",
    "grad_input f32 nhwc n2c19h19w11k24r5s4 st2x3 p1,0,2,3",
    "grad_input f32 nhwc n1c3h19w11k200r3s3 p2 d2 wnhwc",
    "forward f32 nchw n3c37h9w11k24r3s3 p3 d3 bias",
    "grad_input f32 nchw n3c24h9w11k37r3s3 p3 d3",
    "forward f64 nhwc n2c16h19w11k24r5s4 d2 p3 bias wnhwc",
    "grad_input f64 nchw n2c13h7w5k24r5s3 st2",
)


@pytest.mark.parametrize("text", PROBLEMS)
def test_same_bits_for_any_tiles_and_threads(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = ConvProblem.parse(text)
    inputs = testing.make_inputs(problem)
    wanted = harness.launch(harness.plan_named("taps", problem, 1), inputs)
    with config.override(poison=True):
        plans = [harness.plan_named("taps", problem, threads) for threads in (2, 3)]
        if problem.format == "nhwc":
            chosen = taps.choose_config(problem, target.target(), 3)
            blocks = [replace(chosen, block_panels=panels, tile_rows=rows) for panels in (1, 2, 50) for rows in (1, 4, 5, 50)]
            plans += [taps.build_plan(problem, target.target(), 3, block, "taps") for block in blocks]
        else:
            monkeypatch.setattr(taps, "_TURNED_BYTES", 2 * 4 * (37 + 24) * 99)  # two of three images at once
            dispatch.clear()
            plans.append(harness.plan_named("taps", problem, 2))
            dispatch.clear()
            assert problem.n < 3 or plans[-1].describe()["images_at_once"] == 2
    for plan in plans:
        for _ in range(2):
            assert harness.equal_bits(wanted, harness.launch(plan, inputs)), plan.describe()


@each_isa(("avx512", "avx2", "sse2"))
@pytest.mark.parametrize("text", PROBLEMS)
def test_taps_on_every_instruction_set(text: str, isa: str) -> None:
    with target.use_target(isa):
        assert (failure := verify(harness.plan_named("taps", ConvProblem.parse(text)))) is None, failure


CHOSEN = (
    "forward f32 nhwc n1c2048h33w33k256r3s3 p18 d18 wnhwc",  # atrous spatial pyramid pooling
    "grad_input f32 nhwc n1c512h33w33k256r3s3 p18 d18 wnhwc",
    "forward f32 nchw n1c512h33w33k256r3s3 p18 d18",
    "grad_input f32 nchw n1c512h33w33k256r3s3 p18 d18",
)
CHOSEN_BY_ISA = {"avx2": ("forward f32 nhwc n8c64h14w14k64r7s7 p3 wnhwc",), "avx512": ()}
"""Predicted ahead of packed tiles by 1.18 with AVX2, by 1.05 to 1.1 with AVX-512, where more is asked since it was not measured."""
LEFT = (
    "forward f32 nhwc n1c512h33w33k512r3s3 p2 d2 wnhwc",  # Winograd
    "forward f32 nhwc n1c256h14w14k256r3s3 p1 wnhwc",
    "forward f32 nhwc n1c64h56w56k64r3s3 st2 p1 wnhwc",
    "forward f32 nchw n8c64h14w14k64r7s7 p3",
    "forward f32 nhwc n1c512h33w33k21r3s3 p18 d18 wnhwc",  # masks
)


@each_isa(("avx512", "avx2"))
def test_where_it_is_chosen(isa: str) -> None:
    chosen = (*CHOSEN, *CHOSEN_BY_ISA[isa])
    with target.use_target(isa):
        for threads in (1, 2, 7):
            with config.override(reproducible=True):
                assert {t: dispatch.plan(ConvProblem.parse(t), "cpu", threads).implementation == "taps" for t in chosen} == dict.fromkeys(chosen, True)
            assert {t: dispatch.plan(ConvProblem.parse(t), "cpu", threads).implementation == "taps" for t in LEFT} == dict.fromkeys(LEFT, False)


def test_refusals() -> None:
    for text, reason in (
        ("grad_weight nhwc n1c16h8w8k16r3s3", "direct_weight"),
        ("nhwc n1c16h8w8k16r3s3 p1 reflect", "zero padding"),
        ("nhwc n1c32h8w8k32r3s3 g2", "groups"),
        ("bf16 nhwc n1c16h8w8k16r3s3", "16-bit"),
        ("nhwc n1c16h8w8k16r1s1", "one tap"),
        ("nhwc n1c8h8w8k16r3s3", "channels"),
        ("nhwc n1c16h40w40k16r17s17", "taps"),
        ("nhwc n0c16h8w8k16r3s3", "nothing"),
    ):
        with pytest.raises(dispatch.Unsupported, match=reason):
            harness.plan_named("taps", ConvProblem.parse(text))
