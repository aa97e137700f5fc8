"""Winograd convolution against a float64 oracle: sizes around the tiles, padding, formats, targets, orders, accuracy, infinities."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cases
import harness
from faltung import config, dispatch, testing
from faltung.cpu import target as targets
from faltung.cpu import winograd, winograd_tiling
from faltung.cpu.winograd_form import Form, Roles
from faltung.cpu.winograd_transform import ALGORITHMS as BY_TAPS
from faltung.cpu.winograd_transform import ERROR_LIMIT, F2, F4, Algorithm, reduction_piece
from faltung.cpu.winograd_weight import WINOGRAD_WEIGHT
from faltung.problem import PADDING_MODES, ConvProblem, Epilogue
from implementations import verify
from instruction_sets import each_isa

CANARY = 12345.678
MARGIN = 64
ALGORITHMS = {"F2": F2, "F4": F4}


def operands(problem: ConvProblem, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, w, bias, gradient of y, row-major."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (problem.input_shape, problem.weight_shape, (problem.k,), problem.output_shape)
    x, w, b, gy = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, w, b, gy


def oracle(problem: ConvProblem, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, gy: torch.Tensor) -> torch.Tensor:
    mode = "constant" if problem.padding_mode == "zeros" else problem.padding_mode
    x = x.double().requires_grad_()
    bias = b.double() if problem.epilogue.bias else None
    y = F.conv2d(F.pad(x, problem.padding, mode=mode), w.double(), bias, problem.stride, 0, problem.dilation)
    if problem.direction == "forward":
        return y.detach()
    return torch.autograd.grad(y, x, gy.double())[0]


def in_memory(values: torch.Tensor, memory_format: str) -> torch.Tensor:
    """The elements in the order of a memory format, flat."""
    return (values.permute(0, 2, 3, 1) if memory_format == "nhwc" else values).contiguous().flatten()


def launch(problem: ConvProblem, data: tuple[torch.Tensor, ...], configuration: winograd_tiling.WinogradConfig, threads: int = 2) -> torch.Tensor:
    """The result, from a poisoned workspace into a poisoned output between canaries."""
    x, w, b, gy = data
    forward = problem.direction == "forward"
    n, c, h, width = problem.output_shape if forward else problem.input_shape
    source, weight = in_memory(x if forward else gy, problem.format), in_memory(w, problem.weight_format)
    size = n * c * h * width
    out = torch.full((size + 2 * MARGIN,), CANARY)
    out[MARGIN:-MARGIN] = torch.nan
    with config.override(poison=True):
        plan = winograd.build_plan(problem, targets.target(), threads, configuration, "winograd")
    plan.launch(source.data_ptr(), weight.data_ptr(), b.data_ptr() if problem.epilogue.bias else 0, out.data_ptr() + 4 * MARGIN)
    assert (out[:MARGIN] == CANARY).all()
    assert (out[-MARGIN:] == CANARY).all()
    inner = out[MARGIN:-MARGIN]
    return inner.view(n, h, width, c).permute(0, 3, 1, 2) if problem.format == "nhwc" else inner.view(n, c, h, width)


def relative(result: torch.Tensor, want: torch.Tensor) -> float:
    return float((result.double() - want).norm() / want.norm())


def configurations(problem: ConvProblem, algorithm: Algorithm, threads: int = 2) -> list[winograd_tiling.WinogradConfig]:
    return list(winograd_tiling.candidates(problem, targets.target(), threads, algorithm))


def bound(problem: ConvProblem, algorithm: Algorithm) -> float:
    roles = Roles(problem)
    sums = [(short,) for short in roles.form.short] if roles.form.phased else [roles.form.short]
    return max(algorithm.error_bound(roles.source_channels, short) for short in sums)


def check(problem: ConvProblem, algorithm: Algorithm, every: bool = False) -> None:
    """The best configuration of each order, or every one, is within the bound; all give the same bits, on one thread and on two."""
    data = operands(problem)
    want = oracle(problem, *data)
    found = sorted(configurations(problem, algorithm), key=lambda c: c.cycles)
    if not every:
        found = list({c.order: c for c in reversed(found)}.values())
    first = launch(problem, data, found[0], 1)
    assert relative(first, want) <= bound(problem, algorithm)
    for configuration in found:
        assert torch.equal(launch(problem, data, configuration, 2), first), configuration


def with_direction(text: str, direction: str) -> ConvProblem:
    problem = ConvProblem.parse(text)
    if direction == "forward":
        return problem
    return replace(problem, direction="grad_input", epilogue=Epilogue(), padding_mode="zeros")


@pytest.mark.parametrize("direction", ["forward", "grad_input"])
@pytest.mark.parametrize("memory_format", ["nchw", "nhwc"])
@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_sizes_around_the_tiles(algorithm: str, memory_format: str, direction: str) -> None:
    for i, size in enumerate([1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 14, 15, 16, 17, 23, 31, 67]):
        other = [3, 14, 1, 7, 4][i % 5]
        h, w = (size, other) if i % 2 else (other, size)
        check(with_direction(f"{memory_format} n{1 + i % 3}c16h{h}w{w}k16r3s3 p1 bias", direction), ALGORITHMS[algorithm])


@pytest.mark.parametrize("direction", ["forward", "grad_input"])
@pytest.mark.parametrize("weight_format", ["wnchw", "wnhwc"])
@pytest.mark.parametrize("memory_format", ["nchw", "nhwc"])
@pytest.mark.parametrize("channels", ["c16h9w7k16", "c17h8w9k40", "c40h6w11k17", "c33h7w5k80", "c80h5w7k65", "c64h14w14k96", "c130h6w6k144"])
def test_channels(channels: str, memory_format: str, weight_format: str, direction: str) -> None:
    check(with_direction(f"{memory_format} {weight_format} n2{channels}r3s3 p1 bias", direction), F4)


@pytest.mark.parametrize("memory_format", ["nchw", "nhwc"])
@pytest.mark.parametrize(("mode", "padding"), cases.UNEVEN_PADDING)
def test_padding(mode: str, padding: str, memory_format: str) -> None:
    problem = ConvProblem.parse(f"{memory_format} n2c16h7w18k16r3s3 p{padding} {mode} bias")
    check(problem, F4)
    if mode == "zeros":
        check(replace(problem, direction="grad_input", epilogue=Epilogue()), F4)


@pytest.mark.parametrize("direction", ["forward", "grad_input"])
@pytest.mark.parametrize("memory_format", ["nchw", "nhwc"])
@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_dilation(algorithm: str, memory_format: str, direction: str) -> None:
    """Residues of equal and unequal sizes, more of them than a strip has tiles, and more than there are outputs."""
    for sizes in (
        "n2c16h16w16k17r3s3 p2 d2", "n1c17h15w37k16r3s3 p2 d2 bias", "n1c16h9w70k16r3s3 p3 d3", "n2c16h11w13k20r3s3 p4 d1x4", "n1c16h21w8k16r3s3 p5x1 d5x1",
        "n1c18h40w41k16r3s3 p18 d18", "n2c16h5w6k16r3s3 p7 d7", "n1c16h3w90k16r3s3 p64 d64", "n1c16h19w45k16r3s3 d4x20 p1,3,0,2",
    ):  # fmt: skip
        check(with_direction(f"{memory_format} {sizes}", direction), ALGORITHMS[algorithm])


FORMS = (
    "n2c16h9w14k17r2s2", "n1c18h7w33k16r2s2 p1 d2x1", "n1c17h10w19k33r4s4 p1,2,1,2 bias", "n1c16h20w13k16r4s4 p3 d2", "n2c16h11w12k16r5s5 p2 bias",
    "n1c20h8w37k18r5s5 p4,0,1,3", "n1c16h13w22k16r5s5 p6 d3", "n2c16h15w16k17r3s3 st2 p1 bias", "n1c33h16w83k16r3s3 st2 p0,1,2,-1",
    "n1c70h9w12k40r3s4 st2 p1", "n1c17h16w17k16r5s5 st2 p2", "n1c16h13w15k20r8s7 st2 p3 bias", "n1c16h3w21k16r9s10 st2 p4",
    "n1c3h21w22k16r7s7 st2 p3 bias", "n2c1h14w61k33r5s6 st2 p2", "n2c2h9w150k16r7s7 st2 p3,0,2,5", "n1c4h40w9k17r8s8 st2 p3",
    "n1c3h12w225k16r3s3 st2 p-1,1,0,2",
)  # fmt: skip
"""Kernels, strides and few channels."""


@pytest.mark.parametrize("memory_format", ["nchw", "nhwc"])
@pytest.mark.parametrize("text", FORMS)
def test_forms(text: str, memory_format: str) -> None:
    weight_format = ("wnchw", "wnhwc")[(FORMS.index(text) + (memory_format == "nhwc")) % 2]
    problem = ConvProblem.parse(f"{memory_format} {weight_format} {text}")
    for algorithm in winograd.algorithms(problem):
        check(problem, algorithm)
        if problem.c >= 16:
            check(replace(problem, direction="grad_input", epilogue=Epilogue()), algorithm)


PHASES = (
    "h1w1k16r3s3 p1", "h2w3k17r3s3 p1", "h3w2k16r3s3 p2", "h1w24k16r3s3 p1x0", "h14w15k18r3s3", "h13w33k16r3s3 p0,1,1,0", "h15w7k16r4s4 p1",
    "h8w40k16r4s3 p2,1,0,3", "h11w12k16r5s5 p2", "h10w71k16r6s5 p2", "h19w16k20r7s7 p3", "h16w17k16r8s8 p9", "h30w161k16r3s3 p1", "h9w9k16r10s9 p4",
)  # fmt: skip
"""Sizes, kernels and paddings whose phases begin on either side of the first pixel, or have no pixel at all."""


@pytest.mark.parametrize("memory_format", ["nchw", "nhwc"])
@pytest.mark.parametrize("text", PHASES)
def test_phases(text: str, memory_format: str) -> None:
    weight_format = ("wnchw", "wnhwc")[(PHASES.index(text) + (memory_format == "nhwc")) % 2]
    problem = ConvProblem.parse(f"grad_input {memory_format} {weight_format} n2c{16 + PHASES.index(text)}{text} st2")
    for algorithm in winograd.algorithms(problem):
        check(problem, algorithm)


@pytest.mark.parametrize("memory_format", ["nchw", "nhwc"])
@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("text", ["n2c3h11w47k16r7s7 st2 p3,2,4,3", "n1c17h10w19k16r3s3 st2 p1,2,0,1", "n1c16h9w13k17r5s5 p2,3,1,4"])
def test_forms_in_every_padding_mode(text: str, mode: str, memory_format: str) -> None:
    problem = ConvProblem.parse(f"{memory_format} {text} {mode} bias")
    check(problem, winograd.algorithms(problem)[0])


@pytest.mark.parametrize(("r", "s", "stride"), [(3, 3, 1), (2, 2, 1), (3, 3, 2), (4, 3, 2), (7, 7, 2), (7, 8, 2), (10, 10, 2)])
def test_components(r: int, s: int, stride: int) -> None:
    """Every tap of the kernel is one of one component, and each point's components are neighbours and all that are not zero there."""
    form = Form(r, s, stride)
    rows, columns = form.taps
    found = [form.tap(component, i, j) for component in form.components for i in range(rows) for j in range(columns)]
    assert sorted(t for t in found if t is not None) == list(range(r * s))
    for row in (False, True):
        for column in (False, True):
            needed = [i for i, (a, b) in enumerate(form.short) if not (a and row) and not (b and column)]
            assert needed == list(range(*form.active(row, column)))


@pytest.mark.parametrize("memory_format", ["nchw", "nhwc"])
@pytest.mark.parametrize("mode", PADDING_MODES)
def test_dilation_in_every_padding_mode(mode: str, memory_format: str) -> None:
    check(ConvProblem.parse(f"{memory_format} n2c16h10w19k16r3s3 p3,4,2,5 d3x2 {mode} bias"), F4)


@pytest.mark.parametrize("memory_format", ["nchw", "nhwc"])
@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_every_configuration_gives_the_same_bits(algorithm: str, memory_format: str) -> None:
    check(ConvProblem.parse(f"{memory_format} n3c144h14w14k160r3s3 p1 bias"), ALGORITHMS[algorithm], every=True)
    check(ConvProblem.parse(f"{memory_format} n2c80h14w26k160r3s3 p3 d3 bias"), ALGORITHMS[algorithm], every=True)
    check(ConvProblem.parse(f"{memory_format} n2c3h30w120k144r7s7 st2 p3 bias"), BY_TAPS[4][0], every=True)
    check(ConvProblem.parse(f"{memory_format} n2c50h14w26k144r3s3 st2 p1 bias"), BY_TAPS[2][algorithm == "F2"], every=True)
    check(ConvProblem.parse(f"grad_input {memory_format} n3c144h27w26k140r3s3 st2 p1"), BY_TAPS[2][algorithm == "F2"], every=True)


@each_isa()
@pytest.mark.parametrize("memory_format", ["nchw", "nhwc"])
def test_targets(memory_format: str, isa: str) -> None:
    with targets.use_target(isa):
        for algorithm in (F2, F4):
            for direction in ("forward", "grad_input"):
                check(with_direction(f"{memory_format} n2c21h13w18k35r3s3 p1 bias", direction), algorithm)
                check(with_direction(f"{memory_format} wnhwc n1c16h6w19k48r3s3 p1 bias", direction), algorithm)
                check(with_direction(f"{memory_format} n1c17h11w23k33r3s3 p2 d2 bias", direction), algorithm)
        for text in ("c3h15w50k17r7s7 st2 p3", "c18h11w14k35r3s3 st2 p1 bias", "c16h9w21k20r5s5 p2", "c18h12w35k37r3s3 st2 p1 grad_input"):
            problem = ConvProblem.parse(f"{memory_format} n2{text}")
            check(problem, winograd.algorithms(problem)[0])


def test_neon_is_generated() -> None:
    from faltung.codegen.compile import assembly

    neon = targets.TARGETS["neon"]
    kernel = winograd.WinogradKernel(neon, "f32", 4, "nhwc", "nchw", False, "tiles", 6, 4, False)
    assert "fmla" in assembly(str(kernel.emit()), neon)


@pytest.mark.parametrize("transposed", [False, True])
def test_gemm_has_no_spills(transposed: bool) -> None:
    from faltung.codegen.compile import assembly
    from faltung.codegen.emit import Module
    from faltung.codegen.numeric import Numeric
    from faltung.cpu.winograd_gemm import emit_gemm, gemm_rows

    for isa, most in (("avx512", 4), ("avx2", 3)):
        target = targets.TARGETS[isa]
        for vectors in range(1 if transposed else 2, most + 1):
            module = Module()
            emit_gemm(module, Numeric("f32", target), gemm_rows(target.registers, vectors), vectors, transposed=transposed).public = True
            lines = [line for line in assembly(str(module), target).splitlines() if "(%rsp)" in line and "mm" in line]
            assert not lines, (isa, vectors)


@pytest.mark.parametrize("algorithm", [a.name for found in BY_TAPS.values() for a in found])
def test_transforms_are_exact(algorithm: str) -> None:
    """The matrices compute a correlation exactly, in rational arithmetic."""
    a = next(a for found in BY_TAPS.values() for a in found if a.name == algorithm)
    d = [Fraction(i * i - 3 * i + 1, 7) for i in range(a.n)]
    g = [Fraction(2), Fraction(-3, 5), Fraction(1, 3), Fraction(7, 4), Fraction(-5, 6)][: a.taps]
    transformed = [sum(x * y for x, y in zip(row, d)) * sum(x * y for x, y in zip(filters, g)) for row, filters in zip(a.input_matrix, a.filter_matrix)]
    result = [sum(x * y for x, y in zip(row, transformed)) for row in a.output_matrix]
    assert result == [sum(g[t] * d[i + t] for t in range(a.taps)) for i in range(a.m)]
    for matrix in (a.input_matrix, a.output_matrix):
        assert all(float(np.float32(float(x))) == x for row in matrix for x in row)


@pytest.mark.parametrize("channels", [16, 64, 256, 600])
def test_error_is_bounded_and_near_the_direct_one(channels: int) -> None:
    problem = ConvProblem.parse(f"nhwc n1c{channels}h16w16k32r3s3 p1")
    data = operands(problem, 1)
    want = oracle(problem, *data)
    for algorithm in (F2, F4):
        error = relative(launch(problem, data, configurations(problem, algorithm)[0]), want)
        assert bound(problem, algorithm) / 20 < error <= bound(problem, algorithm) / 1.5 <= ERROR_LIMIT


@pytest.mark.parametrize(
    "text", ["n1c3h60w62k64r7s7 st2 p3", "n1c64h32w32k32r3s3 st2 p1", "n1c512h20w20k32r3s3 st2 p1", "n1c64h20w20k32r5s5 p2", "n1c256h16w16k16r4s4"]
)
def test_error_of_forms_is_bounded(text: str) -> None:
    problem = ConvProblem.parse(f"nhwc {text}")
    for direction in ("forward", "grad_input") if problem.c >= 16 else ("forward",):
        problem = replace(problem, direction=direction)
        data = operands(problem, 1)
        want = oracle(problem, *data)
        for algorithm in winograd.algorithms(problem):
            error = relative(launch(problem, data, configurations(problem, algorithm)[0]), want)
            assert bound(problem, algorithm) / 20 < error <= bound(problem, algorithm) / 1.5 <= ERROR_LIMIT


def test_bound_holds_for_positive_operands() -> None:
    """Means far from zero make partial sums grow faster than random ones do."""
    problem = ConvProblem.parse("nhwc n1c256h12w12k32r3s3 p1")
    x, w, b, gy = (t.abs() for t in operands(problem))
    for algorithm in (F2, F4):
        result = launch(problem, (x, w, b, gy), configurations(problem, algorithm)[0])
        assert relative(result, oracle(problem, x, w, b, gy)) <= ERROR_LIMIT


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_never_becomes_finite(value: float) -> None:
    problem = ConvProblem.parse("nhwc n1c16h12w12k16r3s3 p1")
    x, w, b, gy = operands(problem)
    x[0, 3, 5, 6] = value
    for algorithm in (F2, F4):
        result = launch(problem, (x, w, b, gy), configurations(problem, algorithm)[0])
        reached = ~torch.isfinite(oracle(problem, x, w, b, gy))
        assert not torch.isfinite(result[reached]).any()
        m = algorithm.m
        # Only tiles whose input holds the value are touched.
        touched = torch.zeros(12, 12, dtype=torch.bool)
        for p in range(0, 12, m):
            for q in range(0, 12, m):
                if p - 1 <= 5 < p + m + 1 and q - 1 <= 6 < q + m + 1:
                    touched[p : p + m, q : q + m] = True
        assert torch.isfinite(result[:, :, ~touched]).all()


def test_refusals_name_their_reason() -> None:
    def reason(text: str) -> str:
        with pytest.raises(dispatch.Unsupported) as caught:
            winograd.WINOGRAD.plan(ConvProblem.parse(text), 2)
        return str(caught.value)

    base = "n8c64h56w56k64r3s3 p1"
    assert "stride" in reason(base + " st3")
    assert "stride" in reason(base + " st1x2 grad_input")
    assert "stride" in reason(base + " st2 d2")
    assert "channels" in reason("n8c8h56w56k64r3s3 p1 st2")
    assert "channels" in reason("n8c3h56w56k8r7s7 p3 st2")
    assert "dilation" in reason(base + " p65 d65")
    for text, wanted in ((" st2", "stride 1"), (" p65 d65", "dilation above")):
        with pytest.raises(dispatch.Unsupported, match=wanted):
            WINOGRAD_WEIGHT.plan(ConvProblem.parse(base + text + " grad_weight"), 2)
    assert "group" in reason(base + " g2")
    assert "float64" in reason("n8c64h56w56k64r5s5 p2 f64")
    assert "few channels" in reason("n8c3h56w56k64r5s5 p2 st2 f64")
    assert "channels" in reason("n8c8h56w56k64r3s3 p1")
    assert "padding mode" in reason(base + " reflect grad_input")
    assert "square" in reason("n8c64h56w56k64r7s7 p3")
    assert "square" in reason("n8c64h56w56k64r3s5 p1x2")
    with config.override(precision="strict"):
        assert "strict" in reason(base)


@pytest.mark.parametrize("direction", ["forward", "grad_input"])
def test_choice(direction: str) -> None:
    """Large layers are taken with F(4x4); under ``reproducible`` the choice depends on neither batch nor threads."""
    for text in ("n8c64h56w56k64r3s3 p1", "n8c256h14w14k256r3s3 p1", "nhwc n1c512h28w28k512r3s3 p1"):
        plan = winograd.WINOGRAD.plan(replace(ConvProblem.parse(text), direction=direction), 2)
        assert plan.describe()["tile"] == "4x4"
    with config.override(reproducible=True):
        for text in ("c64h14w14k64r3s3 p1", "c256h7w7k256r3s3 p1", "c32h6w6k512r3s3 p1"):
            chosen = set()
            for n in (1, 2, 8, 64):
                for threads in (1, 2, 16):
                    try:
                        chosen.add(str(winograd.WINOGRAD.plan(replace(ConvProblem.parse(f"n{n}{text}"), direction=direction), threads).describe()["tile"]))
                    except dispatch.Unsupported:
                        chosen.add("direct")
            assert len(chosen) == 1


def test_pieces_of_the_reduction() -> None:
    for channels in range(16, 3000):
        piece = reduction_piece(channels)
        count = channels // piece
        assert 16 <= piece <= 96
        assert piece <= channels - (count - 1) * piece < 2 * piece


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f64"])
@pytest.mark.parametrize("memory_format", ["nchw", "nhwc"])
@pytest.mark.parametrize("text", ["n1c64h9w8k64r3s3 st2 p1", "n2c100h7w10k80r3s3 p1 bias"])
def test_pieces_in_other_types(text: str, memory_format: str, dtype: str) -> None:
    """Several pieces of the reduction, whatever the planner thinks of so small a layer; every configuration gives the bits of the first."""
    problem = ConvProblem.parse(f"forward {dtype} {memory_format} {text} w{memory_format}")
    algorithms = winograd.algorithms(problem)
    assert algorithms
    inputs = testing.make_inputs(problem)
    for algorithm in algorithms:
        found = configurations(problem, algorithm)
        assert all(c.chunk < problem.c for c in found)
        plans = [winograd.build_plan(problem, targets.target(), 2, c, "winograd") for c in found]
        failure = verify(plans[0])
        assert not failure, failure
        first = harness.launch(plans[0], inputs)
        for plan in plans[1:]:
            assert harness.equal_bits(harness.launch(plan, inputs), first), plan.describe()
