"""``columns``: each way through its plans, the same bits for any number of threads and images, on every instruction set; and where it is chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest

import harness
from faltung import config, dispatch, testing
from faltung.cpu import columns, target
from faltung.problem import DTYPES, ConvProblem
from implementations import verify
from instruction_sets import each_isa

# kernels as large as the image, or nearly; several images at a time and fewer at the end; strides, dilations, edges; every order of terms
PROBLEMS = (
    "forward n3c2h9w11k10r3s11 bias",
    "forward nhwc n3c2h9w11k10r3s11 bias wnhwc",
    "forward n5c4h6w5k9r6s5 bias",
    "forward nhwc n3c5h13w11k7r4s3 st2 p1 d2 bias",
    "forward nhwc n3c5h13w11k7r4s3 st1x2 p1 reflect bias wnhwc",
    "forward n3c5h13w11k7r4s3 p1,2,0,3 circular wnhwc",
    "grad_input n3c2h9w11k10r3s11",
    "grad_input nhwc n3c9h9w11k10r3s11 wnhwc",
    "grad_input nhwc n3c9h9w11k10r3s11",
    "grad_input n5c4h6w5k9r6s5",
    "grad_input nhwc n5c4h6w5k9r6s5",
    "grad_input n3c5h13w11k7r4s3 st2 p1 d2",
    "grad_input n3c5h13w11k7r4s3 st1x2 p1,2,0,3 wnhwc",
    "grad_input nhwc n3c5h13w11k7r4s3 st2 p1 wnhwc",
    "grad_input n2c3h20w21k8r7s7 st2 p3",  # more than 64 pixels: planes of columns
    "grad_input n1c1h9w33k8r6s30 p1",
    "grad_input nhwc n1c3h19w18k9r8s7",
    "grad_weight n3c3h21w22k10r7s7 st7 bias",
    "grad_weight nhwc n3c3h21w22k10r7s7 st7 bias wnhwc",
    "grad_weight n5c4h6w5k9r6s5 bias",
    "grad_weight nhwc n3c5h13w11k7r4s3 p1 replicate bias",
)


def _typed(text: str, dtype: str) -> ConvProblem:
    return replace(ConvProblem.parse(text), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", PROBLEMS)
def test_same_bits_for_any_threads_and_images_at_once(text: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _typed(text, dtype)
    inputs = testing.make_inputs(problem)
    with config.override(reproducible=True):  # or few images at once would be multiplied by another implementation
        wanted = harness.launch(harness.plan_named("columns", problem, 1), inputs)
        found = []
        for room in (columns._BUFFER_BYTES, 1, 20_000):
            monkeypatch.setattr(columns, "_BUFFER_BYTES", room)
            dispatch.clear()
            with config.override(poison=True):
                found += [harness.plan_named("columns", problem, threads) for threads in (1, 2, 3)]
    dispatch.clear()
    assert problem.direction == "grad_weight" or columns._whole(problem) or len({plan.describe()["images_at_once"] for plan in found}) > 1 or problem.n == 1
    for plan in found:
        assert harness.equal_bits(wanted, harness.launch(plan, inputs)), plan.describe()


@each_isa(("avx512", "avx2", "sse2"))
@pytest.mark.parametrize("text", PROBLEMS)
def test_columns_on_every_instruction_set(text: str, isa: str) -> None:
    with target.use_target(isa):
        for dtype in DTYPES:
            assert (failure := verify(harness.plan_named("columns", _typed(text, dtype)))) is None, failure


CHOSEN = (
    "grad_input n32c1h50w300k100r3s300",  # words of a sentence: almost all that direct convolution gathers is padding
    "grad_input nhwc n8c64h10w10k64r7s7 wnhwc",
    "grad_input n16c128h5w5k128r3s3",
    "forward n64c128h7w7k256r7s7",
    "grad_input n64c128h7w7k256r7s7",
    "grad_input n4c3h224w224k768r16s16 st16",
    "grad_weight nhwc n4c3h224w224k768r16s16 st16 wnhwc",
    "forward n4c3h224w224k768r16s16 st16",
)
LEFT = (
    "forward nhwc n4c3h224w224k768r16s16 st16 wnhwc",
    "grad_input n8c64h28w28k64r3s3 p1",
    "grad_input n8c64h28w28k64r3s3",
    "grad_weight n1c3h224w224k64r7s7 st2 p3",
    "forward n8c64h28w28k64r2s2 st2",
    "grad_input n16c512h5w5k1r4s4",
    "forward n1c512h7w7k512r7s7",  # gemv
)


@each_isa(("avx512", "avx2", "sse2"))
def test_where_it_is_chosen(isa: str) -> None:
    """By the shape alone: neither threads nor, where results must be reproducible, the batch decide."""
    with target.use_target(isa):
        for threads in (1, 2, 7):
            assert {t: dispatch.plan(ConvProblem.parse(t), "cpu", threads).implementation == "columns" for t in CHOSEN} == dict.fromkeys(CHOSEN, True)
            assert {t: dispatch.plan(ConvProblem.parse(t), "cpu", threads).implementation == "columns" for t in LEFT} == dict.fromkeys(LEFT, False)


@each_isa(("amx", "avx512_bf16"))
def test_matrix_instructions_come_first_for_bfloat16(isa: str) -> None:
    """Gradients are summed in float32, whose products are slower; what is almost all padding is still left out."""
    with target.use_target(isa):
        few, much = ("grad_input bf16 n16c128h5w5k128r3s3", "grad_input bf16 n32c1h50w300k100r3s300")
        assert dispatch.plan(ConvProblem.parse(few), "cpu", 2).implementation != "columns"
        assert dispatch.plan(ConvProblem.parse(much), "cpu", 2).implementation == "columns"


def test_refusals() -> None:
    for text, reason in (
        ("n1c4h8w8k4r3s3 g2", "groups"),
        ("n1c4h8w8k4r1s1", "1x1"),
        ("grad_input n1c4h8w8k4r3s3 p1 reflect", "folded"),
        ("n1c64h300w300k4r9s9", "MiB"),
        ("n0c4h8w8k4r3s3", "nothing"),
    ):
        with pytest.raises(dispatch.Unsupported, match=reason):
            harness.plan_named("columns", ConvProblem.parse(text))
