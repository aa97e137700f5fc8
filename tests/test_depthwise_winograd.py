"""Depthwise convolution with transformed rows: the transforms against their definition, accuracy, tiles, threads, and where it is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

import harness
from emitted import build
from faltung import config, dispatch, testing
from faltung.codegen.emit import Function
from faltung.codegen.numeric import Numeric
from faltung.cpu import depthwise_winograd
from faltung.cpu import target as targets
from faltung.cpu.depthwise_winograd import Config
from faltung.cpu.depthwise_winograd_transform import ALONG_ROWS, BLOCK, POINTS, emit_filter, emit_input, emit_output, error_bound
from faltung.cpu.winograd_transform import ERROR_LIMIT
from faltung.problem import FORMATS, PADDING_MODES, ConvProblem
from implementations import verify
from instruction_sets import each_isa

NAME = "depthwise_winograd"
MATRICES = ALONG_ROWS.input_matrix, ALONG_ROWS.filter_matrix, ALONG_ROWS.output_matrix


def test_the_matrices_compute_a_filter_exactly() -> None:
    inputs, filters, outputs = MATRICES
    x, w = [Fraction(i * i - 5, 7) for i in range(POINTS)], [Fraction(3 * i - 4, 5) for i in range(BLOCK)]

    def times(matrix: Sequence[Sequence[Fraction]], vector: Sequence[Fraction]) -> list[Fraction]:
        return [sum((a * b for a, b in zip(row, vector, strict=True)), Fraction(0)) for row in matrix]

    products = [a * b for a, b in zip(times(inputs, x), times(filters, w), strict=True)]
    assert times(outputs, products) == [sum(x[i + j] * w[j] for j in range(BLOCK)) for i in range(BLOCK)]


@pytest.mark.parametrize(("emit", "which"), [(emit_input, 0), (emit_filter, 1), (emit_output, 2)], ids=["input", "filter", "output"])
def test_the_code_of_a_transform_is_its_matrix(emit: object, which: int) -> None:
    matrix = np.array(MATRICES[which], float)
    numeric = Numeric("f32", targets.host_target())
    entry = numeric.lanes * 4

    def body(f: Function) -> None:
        values = [f.load(f["pin"] + i * entry, numeric.vector) for i in range(matrix.shape[1])]
        for i, value in enumerate(emit(f, values, numeric.target.fma)):  # type: ignore[operator]
            f.store(value, f["pout"] + i * entry)

    function = build(numeric.target, ("pin", "pout"), body)
    x = np.random.default_rng(0).standard_normal((matrix.shape[1], numeric.lanes)).astype(np.float32)
    out = np.zeros((matrix.shape[0], numeric.lanes), np.float32)
    function(x.ctypes.data, out.ctypes.data)
    np.testing.assert_allclose(out, matrix @ x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kernel", "size"), [(31, 40), (13, 16), (51, 30), (5, 9)])
@pytest.mark.parametrize("direction", ["forward", "grad_input"])
def test_errors_are_within_the_bound_that_is_stated(kernel: int, size: int, direction: str) -> None:
    problem = ConvProblem.parse(f"{direction} f32 nchw n1c32h{size}w{size}k32r{kernel}s{kernel} p{kernel // 2} g32")
    inputs = testing.make_inputs(problem)
    (got,) = harness.launch(harness.plan_named(NAME, problem), inputs)
    (want,) = testing.exact(problem, inputs)
    error = ((got.double() - want).norm() / want.norm()).item()
    stated = harness.plan_named(NAME, problem).describe()["error_bound"]
    assert stated == error_bound(kernel, kernel) <= ERROR_LIMIT
    # zeros of the padding are exact, so the error may be well below the bound, which knows of none
    assert stated / 30 < error <= stated


def _plan(problem: ConvProblem, config_of: Config) -> dispatch.Plan:
    return depthwise_winograd.build_plan(problem, targets.target(), 2, config_of, NAME)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("direction", ["forward", "grad_input"])
def test_tiles_change_no_bit(direction: str, fmt: str) -> None:
    problem = ConvProblem.parse(f"{direction} f32 {fmt} n2c19h13w26k19r7s9 p3,5,2,4 g19")
    inputs = testing.make_inputs(problem)
    whole = Config(block=4, abreast=2, pieces=(3,), blocks=8, rows=14, chunk=7, cycles=1.0)
    results = [harness.launch(_plan(problem, whole), inputs)]
    for changes in (
        {"rows": 4}, {"rows": 2, "blocks": 4}, {"abreast": 1, "rows": 5}, {"abreast": 3, "rows": 6, "block": 2, "blocks": 2}, {"block": 8, "abreast": 1},
        {"chunk": 2}, {"block": 1, "abreast": 5, "rows": 15, "blocks": 7},
    ):  # fmt: skip
        plan = _plan(problem, replace(whole, **changes))  # type: ignore[arg-type]
        results.append(harness.launch(plan, inputs))
        assert verify(plan) is None
    assert all(harness.equal_bits(results[0], other) for other in results)


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("padding", ["4,3,2,1", "0,0,0,0", "6,0,0,4"])
def test_padding_modes_and_sides(mode: str, padding: str) -> None:
    for fmt in FORMATS:
        problem = ConvProblem.parse(f"forward f32 {fmt} n1c5h9w17k5r5s7 p{padding} {mode} g5".replace(" zeros", ""))
        assert verify(harness.plan_named(NAME, problem)) is None


@each_isa()
def test_every_instruction_set(isa: str) -> None:
    with targets.use_target(targets.TARGETS[isa]):
        for case in ("n2c17h9w30k17r5s17 p8,8,2,2 g17", "n1c5h7w131k5r5s33 p16,16,2,2 g5"):
            for direction in ("forward", "grad_input"):
                for dtype in ("f32", "bf16", "f16"):
                    for fmt in FORMATS:
                        problem = replace(ConvProblem.parse(case), direction=direction, dtype=dtype, format=fmt)  # type: ignore[arg-type]
                        assert verify(harness.plan_named(NAME, problem)) is None


def test_threads_and_batch_change_no_bit() -> None:
    problem = ConvProblem.parse("forward f32 nhwc n3c40h20w23k40r17s17 p8 g40 bias")
    inputs = testing.make_inputs(problem)
    results = [harness.launch(harness.plan_named(NAME, problem, threads), inputs) for threads in (1, 2, 3, 16)]
    assert all(harness.equal_bits(results[0], other) for other in results)
    one = testing.Inputs(inputs.x[1:2].contiguous(memory_format=torch.channels_last), inputs.w, inputs.bias, inputs.gy[1:2])
    (single,) = harness.launch(harness.plan_named(NAME, replace(problem, n=1), 4), one)
    assert torch.equal(single[0], next(iter(results[0]))[1])


@pytest.mark.parametrize(
    ("case", "taken"),
    [
        ("n1c128h56w56k128r31s31 p15 g128", True),
        ("n1c256h28w28k256r29s29 p14 g256", True),
        ("n1c512h14w14k512r27s27 p13 g512", True),
        ("n1c1024h7w7k1024r13s13 p6 g1024", False),
        ("n1c96h56w56k96r7s7 p3 g96", False),
        ("n1c128h56w56k128r5s51 p25,25,2,2 g128", True),
        ("n1c128h56w56k128r1s31 p15,15,0,0 g128", False),
    ],
)
@pytest.mark.parametrize("fmt", FORMATS)
def test_where_it_is_chosen(case: str, taken: bool, fmt: str) -> None:
    problem = replace(ConvProblem.parse(case), format=fmt)  # type: ignore[arg-type]
    for direction in ("forward", "grad_input"):
        for batch in (1, 8):
            chosen = dispatch.plan(replace(problem, direction=direction, n=batch), "cpu", 2)  # type: ignore[arg-type]
            assert (chosen.implementation == NAME) is taken


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("grad_weight f32 nchw n1c8h40w40k8r31s31 p15 g8", "forward and grad_input only"),
        ("forward f64 nchw n1c8h40w40k8r31s31 p15 g8", "not float64"),
        ("forward f32 nchw n1c8h40w40k16r31s31 p15 g8", "one output channel a group"),
        ("forward f32 nchw n1c8h40w40k8r31s31 p15 st2 g8", "stride 1"),
        ("forward f32 nchw n1c8h70w70k8r31s31 p30 d2 g8", "dilation 1"),
        ("forward f32 nchw n1c8h40w40k8r31s3 p1 g8", "columns of taps"),
        ("forward f32 nhwc n1c8h40w40k8r3s3 p1 g8", "columns of taps"),
        ("forward f32 nchw n1c8h99w99k8r99s99 p49 g8", "error bound"),
        ("forward f32 nchw n1c8h9w9k8r9s9 p4", "not depthwise"),
    ],
)
def test_refusals_say_why(case: str, reason: str) -> None:
    with config.override(implementation=NAME), pytest.raises(Exception, match=reason):
        depthwise_winograd.DEPTHWISE_WINOGRAD.plan(ConvProblem.parse(case), 2)


def test_strict_precision_sums_plain_products() -> None:
    problem = ConvProblem.parse("forward f32 nchw n1c8h40w40k8r31s31 p15 g8")
    assert dispatch.plan(problem, "cpu", 2).implementation == NAME
    with config.override(precision="strict"):
        plan = dispatch.plan(problem, "cpu", 2)
        assert plan.implementation == "depthwise"
        assert verify(plan) is None
