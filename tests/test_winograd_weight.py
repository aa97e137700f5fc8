"""Winograd's weight gradient against a float64 oracle: sizes around the tiles, blocks, padding, formats, targets, accuracy, infinities."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

import cases
import harness
from faltung import config, dispatch, testing
from faltung.cpu import target as targets
from faltung.cpu import winograd_weight, winograd_weight_tiling
from faltung.cpu.winograd_transform import ERROR_LIMIT, F2, F4, Algorithm
from faltung.cpu.winograd_weight_tiling import WinogradWeightConfig
from faltung.problem import ConvProblem
from implementations import verify
from instruction_sets import each_isa

ALGORITHMS = {"F2": F2, "F4": F4}


def parse(text: str) -> ConvProblem:
    return replace(ConvProblem.parse(text), direction="grad_weight")


def launch(problem: ConvProblem, inputs: testing.Inputs, configuration: WinogradWeightConfig, threads: int = 2) -> tuple[torch.Tensor, ...]:
    """The result from a poisoned workspace into poisoned outputs between canaries."""
    with config.override(poison=True):
        plan = winograd_weight.build_plan(problem, targets.target(), threads, configuration, "winograd")
    return tuple(harness.launch(plan, inputs))


def relative(result: torch.Tensor, want: torch.Tensor) -> float:
    return float((result.double() - want).norm() / want.norm())


def configurations(problem: ConvProblem, algorithm: Algorithm) -> list[WinogradWeightConfig]:
    return sorted(winograd_weight_tiling.candidates(problem, targets.target(), algorithm), key=lambda c: c.cycles)


def check(problem: ConvProblem, algorithm: Algorithm, step: int = 0) -> None:
    """The best configuration, or every ``step``-th, is within its bound and gives the same bits on one thread and on two."""
    inputs = testing.make_inputs(problem, seed=3)
    want = tuple(testing.exact(problem, inputs))
    found = configurations(problem, algorithm)
    for configuration in found[::step] if step else found[:1]:
        result, other = launch(problem, inputs, configuration, 1), launch(problem, inputs, configuration, 2)
        assert all(torch.equal(one, two) for one, two in zip(result, other, strict=True)), configuration
        for got, true, bound in zip(result, want, (configuration.error_bound, 1e-6), strict=False):
            assert relative(got, true) <= bound, configuration


DILATED = (
    "n1c17h9w11k19r3s3 p2 d2 bias",
    "n2c33h16w33k32r3s3 p4 d4",
    "n1c16h7w40k16r3s3 p3,1,0,5 d1x5 bias",
    "n1c20h40w6k18r3s3 p1 d3x1 reflect",
    "n1c16h5w5k16r3s3 p12 d12 bias",  # residues of one output, and of none that reads the middle
    "n1c16h70w9k16r3s3 p64 d64x2",
    "n3c24h13w150k21r3s3 p2 d2 circular",
)


@pytest.mark.parametrize("memory_format", ["nchw", "nhwc"])
@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
@pytest.mark.parametrize("text", DILATED)
def test_dilated(text: str, algorithm: str, memory_format: str) -> None:
    problem = parse(f"grad_weight f32 {memory_format} {text}")
    check(problem, ALGORITHMS[algorithm], step=7)
    check(replace(problem, weight_format="nhwc"), ALGORITHMS[algorithm])


@pytest.mark.parametrize("memory_format", ["nchw", "nhwc"])
@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_sizes_around_the_tiles(algorithm: str, memory_format: str) -> None:
    for i, size in enumerate([1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 14, 15, 16, 17, 23, 31, 67]):
        other = [3, 14, 1, 7, 4][i % 5]
        h, w = (size, other) if i % 2 else (other, size)
        check(parse(f"{memory_format} n{1 + i % 3}c16h{h}w{w}k16r3s3 p1{' bias' * (i % 3 > 0)}"), ALGORITHMS[algorithm])


@pytest.mark.parametrize("weight_format", ["wnchw", "wnhwc"])
@pytest.mark.parametrize("memory_format", ["nchw", "nhwc"])
@pytest.mark.parametrize("channels", ["c16h9w7k16", "c17h8w9k40", "c40h6w11k17", "c33h7w5k80", "c80h5w7k65", "c64h14w14k96", "c130h6w6k144"])
def test_channels(channels: str, memory_format: str, weight_format: str) -> None:
    check(parse(f"{memory_format} {weight_format} n2{channels}r3s3 p1 bias"), F4)


@pytest.mark.parametrize("memory_format", ["nchw", "nhwc"])
@pytest.mark.parametrize(("mode", "padding"), cases.UNEVEN_PADDING)
def test_padding(mode: str, padding: str, memory_format: str) -> None:
    check(parse(f"{memory_format} n2c16h7w18k16r3s3 p{padding} {mode} bias"), F4)


@pytest.mark.parametrize("memory_format", ["nchw", "nhwc"])
@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_configurations(algorithm: str, memory_format: str) -> None:
    check(parse(f"{memory_format} n5c144h14w14k162r3s3 p1 bias"), ALGORITHMS[algorithm], step=5)
    check(parse(f"{memory_format} wnhwc n3c48h13w30k33r3s3 p1"), ALGORITHMS[algorithm], step=3)


@pytest.mark.parametrize("memory_format", ["nchw", "nhwc"])
def test_configurations_in_float64(memory_format: str) -> None:
    """Whole numbers come out exactly, and the error is within twice PyTorch's."""
    for text in ("n3c80h10w9k70r3s3 p1 bias", "wnhwc n1c48h7w30k33r3s3 p1"):
        problem = parse(f"f64 {memory_format} {text}")
        found = configurations(problem, F2)
        for configuration in (found[0], found[-1]):
            plan = winograd_weight.build_plan(problem, targets.target(), 2, configuration, "winograd")
            failure = verify(plan)
            assert not failure, failure


@each_isa()
@pytest.mark.parametrize("memory_format", ["nchw", "nhwc"])
def test_targets(memory_format: str, isa: str) -> None:
    with targets.use_target(isa):
        for algorithm in (F2, F4):
            check(parse(f"{memory_format} n2c21h13w18k35r3s3 p1 bias"), algorithm, step=20)
            check(parse(f"{memory_format} wnhwc n1c48h6w19k16r3s3 p1 bias"), algorithm)
            check(parse(f"{memory_format} n3c16h7w7k48r3s3 p1"), algorithm)


def test_neon_is_generated() -> None:
    from faltung.codegen.compile import assembly

    neon = targets.TARGETS["neon"]
    kernel = winograd_weight.WinogradWeightKernel(neon, "f32", 4, "nhwc", "nchw", 6, 4, False, False, True)
    assert "fmla" in assembly(str(kernel.emit()), neon)


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_transforms_are_exact(algorithm: str) -> None:
    """The transposed matrices compute the gradient of three taps exactly, in rational arithmetic."""
    a = ALGORITHMS[algorithm]
    x = [Fraction(i * i - 3 * i + 1, 7) for i in range(a.n)]
    gradient = [Fraction(3 * i - 4, 5) for i in range(a.m)]
    image = [sum(b * value for b, value in zip(row, x)) for row in a.input_matrix]
    lifted = [sum(a.output_matrix[i][point] * gradient[i] for i in range(a.m)) for point in range(a.n)]
    taps = [sum(a.filter_matrix[point][t] * lifted[point] * image[point] for point in range(a.n)) for t in range(3)]
    assert taps == [sum(x[i + t] * gradient[i] for i in range(a.m)) for t in range(3)]


@pytest.mark.parametrize("text", ["n1c32h16w16k32r3s3 p1", "n8c32h28w28k32r3s3 p1", "n8c16h224w112k16r3s3 p1"])
def test_error_is_bounded_and_near_the_direct_one(text: str) -> None:
    problem = parse(f"nhwc {text}")
    inputs = testing.make_inputs(problem, seed=1)
    (want,) = testing.exact(problem, inputs)
    for algorithm in (F2, F4):
        configuration = configurations(problem, algorithm)[0]
        error = relative(launch(problem, inputs, configuration)[0], want)
        assert configuration.error_bound / 40 < error <= configuration.error_bound / 1.5 <= ERROR_LIMIT


def test_bound_holds_for_positive_operands() -> None:
    """Means far from zero make partial sums grow faster than random ones do."""
    problem = parse("nhwc n8c32h28w28k32r3s3 p1")
    inputs = testing.make_inputs(problem)
    inputs = testing.Inputs(*(t.abs() for t in (inputs.x, inputs.w, inputs.bias, inputs.gy)))
    (want,) = testing.exact(problem, inputs)
    for algorithm in (F2, F4):
        assert relative(launch(problem, inputs, configurations(problem, algorithm)[0])[0], want) <= ERROR_LIMIT


def test_too_many_tiles_for_the_bound_are_refused() -> None:
    shape = WinogradWeightConfig(F4, 6, 4, 1, 1, 1, 24, 28 * 4000, 28)
    assert shape.error_bound > ERROR_LIMIT
    assert replace(shape, part_tiles=28 * 100).error_bound < ERROR_LIMIT
    chosen = winograd_weight_tiling.choose_config(parse("n4096c64h224w224k64r3s3 p1"), targets.target())
    assert chosen is None or chosen.error_bound <= ERROR_LIMIT


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["x", "gy"])
def test_what_is_not_finite_never_becomes_finite(name: str, value: float) -> None:
    """Weights of other channels are not touched."""
    problem = parse("nhwc n1c16h12w12k16r3s3 p1 bias")
    inputs = testing.make_inputs(problem)
    getattr(inputs, name)[0, 3, 5, 6] = value
    for algorithm in (F2, F4):
        weight, bias = launch(problem, inputs, configurations(problem, algorithm)[0])
        touched = torch.zeros(16, 16, dtype=torch.bool)
        touched[(slice(None), 3) if name == "x" else (3, slice(None))] = True
        assert not torch.isfinite(weight[touched]).any()
        assert torch.isfinite(weight[~touched]).all()
        assert torch.isfinite(bias).sum() == (16 if name == "x" else 15)


def test_refusals_name_their_reason() -> None:
    def reason(text: str) -> str:
        with pytest.raises(dispatch.Unsupported) as caught:
            winograd_weight.WINOGRAD_WEIGHT.plan(parse(text), 2)
        return str(caught.value)

    base = "n8c64h56w56k64r3s3 p1"
    assert "stride" in reason(base + " st2")
    assert "channels" in reason("n8c8h56w56k64r3s3 p1")
    assert "direct convolution is predicted" in reason("n1c16h4w4k16r3s3 p1")
    with pytest.raises(dispatch.Unsupported, match="grad_weight only"):
        winograd_weight.WINOGRAD_WEIGHT.plan(ConvProblem.parse(base), 2)
    with config.override(precision="strict"):
        assert "strict" in reason(base)


def test_choice_depends_on_no_threads() -> None:
    for text in ("n8c64h56w56k64r3s3 p1", "nhwc n8c256h14w14k256r3s3 p1", "n1c128h28w28k128r3s3 p1", "n8c512h7w7k512r3s3 p1"):
        plans = [winograd_weight.WINOGRAD_WEIGHT.plan(parse(text), threads).describe() for threads in (1, 2, 16)]
        facts = [{name: value for name, value in plan.items() if name != "workspace_bytes" and not name.startswith(("predicted", "floor"))} for plan in plans]
        assert facts[0] == facts[1] == facts[2]
        assert facts[0]["tile"] == "4x4"
