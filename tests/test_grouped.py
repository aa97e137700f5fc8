"""Grouped convolution whose vectors span several groups: edges of tiles and vectors, every argument, targets, threads, memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import harness
from faltung import config, testing
from faltung.codegen.compile import assembly
from faltung.codegen.emit import Module
from faltung.codegen.numeric import Numeric
from faltung.cpu import grouped, grouped_weight
from faltung.cpu import target as targets
from faltung.cpu.geometry import Tap, axes
from faltung.cpu.grouped_lanes import Chunk, Lanes, chunks, even
from faltung.cpu.plan import CpuPlan
from faltung.cpu.tiling import split
from faltung.dispatch import Unsupported
from faltung.problem import DIRECTIONS, DTYPES, FORMATS, ConvProblem, Direction, Epilogue, Format
from instruction_sets import each_isa

CASES = (
    # channels a group: 1, 2, 3, 4, 5, 6, 8, 16, and unequal ones; a last vector of few groups; one vector in all
    "n2c32h9w9k32r3s3 p1 g16", "n1c12h5w6k12r3s3 p1 g4", "n2c64h8w15k64r3s3 p1 g16", "n1c20h6w7k20r3s3 p1 g4", "n1c36h5w9k36r3s3 p1 g6",
    "n2c64h7w7k64r3s3 p1 g8", "n1c64h5w17k64r3s3 p1 g4", "n1c40h7w7k20r3s3 p1 g5", "n1c20h7w7k40r3s3 p1 g5", "n1c48h6w6k12r3s3 p1 g6", "n1c12h6w6k48r2s3 g6",
    "n1c34h6w6k34r3s3 p1 g17", "n3c4h4w4k8r3s3 p1 g2",
    # columns around the block and the vector, one row, one column
    "n1c16h3w1k16r3s3 p1 g4", "n1c16h1w13k16r1s3 p0x1 g4", "n1c16h3w14k16r3s3 p1 g4", "n1c16h2w16k16r3s3 p1 g4", "n1c16h3w27k16r3s3 p1 g4",
    "n1c16h2w29k16r3s3 p1 g4", "n1c16h4w33k16r1s1 g4", "n1c32h3w700k32r3s5 p1x2 g8",
    # a group a vector, two vectors a group, images of less and more than a vector of pixels, groups that read part of a vector and more than one
    "n2c32h7w7k32r3s3 p1 g2", "n1c48h14w14k48r3s3 p1 st2 g3", "n1c64h7w9k64r3s3 p1 st2 g2", "n2c64h3w3k64r3s3 p1 g2", "n1c40h6w7k32r3s3 p1 g2",
    "n1c24h5w35k48r3s3 p1 st3 g3", "n1c96h9w30k48r2s4 p1 d2 g3",
    # kernels, strides, dilations, padding
    "n2c32h11w13k32r5s5 p2 g8", "n1c32h9w16k32r1s7 p0x3 g8", "n1c32h19w19k32r7s7 p3 st2 g8", "n1c32h14w15k32r3s3 p1 st2 g8", "n1c32h13w29k32r3s3 p1 st3 g4",
    "n1c32h12w35k32r3s3 p1 st1x2 g8", "n1c32h9w9k32r1s1 st2 g8", "n1c32h9w9k32r2s2 st3 g8", "n1c32h11w12k32r3s3 p2 d2 g8", "n1c32h9w23k32r3s3 p9 d9 g8",
    "n1c32h9w9k32r3s3 p2,0,0,1 g8", "n1c32h9w9k32r4s4 p3,1,2,0 st2 g8",
)  # fmt: skip

OTHERS: tuple[tuple[str, Format], ...] = (("f32", "nhwc"), ("f16", "nchw"))
PADDED = ("n1c32h9w10k32r3s3 p2 g8", "n1c16h9w33k16r5s5 p4,1,2,3 st2 g4", "n2c12h7w18k24r3s3 p2 d2 g6")


def problem(case: str, direction: Direction, dtype: str, fmt: Format, weight_format: Format = "nchw") -> ConvProblem:
    parsed = replace(ConvProblem.parse(case), direction=direction, dtype=dtype, format=fmt, weight_format=weight_format)
    return replace(parsed, epilogue=Epilogue(bias=direction != "grad_input"))


def plan_of(p: ConvProblem, threads: int = 2) -> CpuPlan:
    with config.override(poison=True):
        return grouped.GROUPED.plan(p, threads)


def verified(problems: list[ConvProblem], fewest: int) -> None:
    failures, ran = [], 0
    for p in problems:
        try:
            plan = plan_of(p)
        except Unsupported:
            continue
        ran += 1
        failures.append(harness.verify(plan))
    assert not any(failures), "\n".join(filter(None, failures))
    assert ran >= fewest


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_numbers_are_exact_and_others_within_the_bound(dtype: str, direction: Direction, fmt: Format) -> None:
    cases = CASES if dtype == "f32" else CASES[:: 3 if dtype == "bf16" else 4]
    problems = [problem(case, direction, dtype, fmt) for case in cases]
    if dtype == "bf16" and targets.target().bfloat16_dot:
        # Where pairs are multiplied it leaves some of them to direct; on the same machine without pairs it takes them.
        verified(problems, len(cases) // 4)
        with targets.use_target("avx512"):
            verified(problems, len(cases) // 2)
        return
    verified(problems, len(cases) // 2)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_weights_in_channels_last(direction: Direction, fmt: Format) -> None:
    verified([problem(case, direction, "f32", fmt, "nhwc") for case in CASES[::4]], 6)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("direction", ("forward", "grad_weight"))
@pytest.mark.parametrize("mode", ("reflect", "replicate", "circular"))
def test_padding_modes(mode: str, direction: Direction, fmt: Format) -> None:
    verified([replace(problem(case, direction, "f32", fmt), padding_mode=mode) for case in PADDED], len(PADDED))


@pytest.mark.parametrize("direction", DIRECTIONS)
@each_isa(name for name in targets.TARGETS if name != "avx512")
def test_other_instruction_sets(isa: str, direction: Direction) -> None:
    with targets.use_target(isa):
        verified([problem(case, direction, dtype, fmt) for case in CASES[::5] for dtype, fmt in OTHERS], 4)


def assembly_of(p: ConvProblem, isa: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The assembly of a plan's kernel, which need not run here."""

    class Generated(Exception):
        pass

    def load(name: str, target: targets.Target, emit: Callable[[], Module]) -> None:
        assert name.endswith(isa)
        raise Generated(assembly(str(emit()), target))

    monkeypatch.setattr(grouped, "load", load)
    monkeypatch.setattr(grouped_weight, "load", load)
    with targets.use_target(isa), pytest.raises(Generated) as caught:
        plan_of(p)
    return str(caught.value)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_neon_is_generated(direction: Direction, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, fmt in OTHERS:
        assert "fmla" in assembly_of(problem("n1c32h9w9k32r3s3 p1 g8", direction, dtype, fmt), "neon", monkeypatch)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_threads_do_not_change_bits(direction: Direction, fmt: Format) -> None:
    for case in ("n4c64h14w14k64r3s3 p1 g8", "n1c96h15w15k96r3s3 p1 st2 g24", "n1c32h9w9k32r3s3 p4 d4 g8"):
        p = problem(case, direction, "f32", fmt)
        inputs = testing.make_inputs(p)
        results = [harness.launch(plan_of(p, threads), inputs) for threads in (1, 2, 7)]
        assert all(harness.equal_bits(results[0], result) for result in results[1:])


@pytest.mark.parametrize("direction", ("forward", "grad_input"))
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_batch_does_not_change_bits(direction: Direction, fmt: Format) -> None:
    p = problem("n5c64h20w21k64r3s3 p1 g16", direction, "f32", fmt)
    inputs = testing.make_inputs(p)
    (whole,) = harness.launch(plan_of(p), inputs)
    one = testing.Inputs(inputs.x[3:4], inputs.w, inputs.bias, inputs.gy[3:4])
    (single,) = harness.launch(plan_of(replace(p, n=1)), one)
    assert torch.equal(whole[3:4], single)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("case", ("n1c32h7w9k32r3s3 p1 g8", "n1c12h9w21k24r3s3 p2 st2 g3", "n1c32h5w7k32r1s1 g4"))
def test_infinity_reaches_what_it_touches(case: str, fmt: Format, direction: Direction) -> None:
    """One infinite value: exactly the results that read it are infinite, none is NaN; also at a corner, where taps pass by."""
    p = replace(problem(case, direction, "f32", fmt), epilogue=Epilogue())
    for corner in (False, True):
        inputs = testing.make_inputs(p, integers=True)
        inputs = testing.Inputs(*(t + 3 for t in (inputs.x, inputs.w, inputs.bias, inputs.gy)))  # no zeros: infinity stays infinity
        name = "gy" if direction == "grad_input" else "x"
        source = getattr(inputs, name)
        where = (0, source.shape[1] // 2, 0, 0) if corner else tuple(size // 2 for size in source.shape)
        marks = torch.zeros_like(source)
        marks[where], source[where] = 1.0, float("inf")
        ones = testing.Inputs(*(torch.ones_like(t) for t in (inputs.x, inputs.w, inputs.bias, inputs.gy)))
        (got,) = harness.launch(plan_of(p), inputs)
        (touched,) = testing.exact(p, replace(ones, **{name: marks}))
        assert torch.equal(got.isinf(), touched != 0)
        assert not got.isnan().any()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", ("f32", "f16"))
def test_nothing_behind_an_operand_is_touched(dtype: str, direction: Direction) -> None:
    for case in ("n1c12h5w17k12r3s3 p1 g6", "n2c32h9w33k32r3s3 p1 st2 g8", "n1c34h3w5k34r3s3 p1 g17", "n1c20h4w16k40r3s3 g5"):
        for fmt in FORMATS:
            p = problem(case, direction, dtype, fmt)
            inputs = testing.make_inputs(p, integers=True)
            operands = harness.operands(p, inputs)
            guards: list[testing.Guarded | None] = []
            for operand in operands:
                if operand is not None:
                    tensor = torch.empty_strided(operand.shape, operand.strides, dtype=testing.TORCH_DTYPES[dtype])
                    guards.append(testing.Guarded(tensor.fill_(float("nan")) if operand.tensor is None else tensor.copy_(operand.tensor)))
                else:
                    guards.append(None)
            plan_of(p).launch(*(0 if guard is None else guard.tensor.data_ptr() for guard in guards))
            assert all(guard is None or guard.intact() for guard in guards)
            out = guards[3]
            assert out is not None
            (wanted, *_) = testing.rounded(p, testing.exact(p, inputs))
            assert torch.equal(out.tensor, wanted)


@pytest.mark.parametrize(
    ("case", "reason"),
    (
        ("n1c16h5w5k16r3s3", "one group"),
        ("n1c16h5w5k16r3s3 g16", "depthwise"),
        ("n1c96h5w5k96r3s3 g2", "more than a vector"),
        ("n1c64h5w5k8r3s3 g2", "more than 16"),
        ("n1c4h5w5k4r3s3 g2", "too few groups"),
        ("n1c64h40w40k64r33s33 g64", "depthwise"),
        ("n1c64h40w40k64r33s33 g32", "longer than"),
        ("n1c64h5w5k8r3s3 g8", "more than four vectors"),
    ),
)
def test_refusals_say_why(case: str, reason: str) -> None:
    with targets.use_target("avx512"), pytest.raises(Unsupported, match=reason):
        grouped.GROUPED.plan(ConvProblem.parse(case), 1)
    with pytest.raises(Unsupported, match="padded_grad_input"):
        grouped.GROUPED.plan(ConvProblem.parse("grad_input n1c16h9w9k16r3s3 p1 g4 reflect"), 1)


def test_pairs_of_bfloat16_are_left_to_direct() -> None:
    with targets.use_target("avx512_bf16"):
        for case in ("nchw n1c32h5w5k32r3s3 p1 g4", "grad_input nchw n1c32h5w5k32r3s3 p1 g4", "nhwc n1c64h5w5k64r3s3 p1 g4"):
            with pytest.raises(Unsupported, match="pairs of bfloat16"):
                grouped.check(ConvProblem.parse(f"bf16 {case}"), targets.target())
        for case in ("nhwc n1c32h5w5k32r3s3 p1 g4", "grad_input nchw n1c32h9w9k32r3s3 st2 p1 g4", "grad_weight nchw n1c32h5w5k32r3s3 p1 g4"):
            grouped.check(ConvProblem.parse(f"bf16 {case}"), targets.target())
    with targets.use_target("avx512"):
        grouped.check(ConvProblem.parse("bf16 nchw n1c32h5w5k32r3s3 p1 g4"), targets.target())


def test_lanes_of_a_vector() -> None:
    numeric = Numeric("f32", targets.TARGETS["avx512"])
    lanes = Lanes.choose(numeric, 8, 8, 32)
    assert (lanes.interleaved, lanes.planes, lanes.per_vector, lanes.vectors, lanes.masked) == (True, 1, 2, 16, False)
    assert lanes.expansion().picks == ((0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15),)
    assert lanes.places[:3] == (0, 2, 4)
    assert lanes.order == lanes.expansion().picks[0]
    assert Lanes.choose(numeric, 16, 16, 4).single
    assert Lanes.choose(numeric, 32, 16, 4).parts == 2
    odd, threes = Lanes.choose(numeric, 3, 2, 6), Lanes.choose(numeric, 5, 4, 6)
    assert (odd.interleaved, odd.unit, odd.width, odd.per_vector, odd.masked) == (False, 1, 15, 5, True)
    assert (threes.interleaved, threes.unit, threes.width, threes.per_vector, threes.masked) == (False, 1, 15, 3, True)
    for choice in (odd, threes):
        for h, pick in enumerate(choice.expansion().picks):
            for j in range(choice.unit):
                found = [pick[lane] for lane in choice.broadcast(j)][: choice.width]
                assert found == [lane // choice.out * choice.source + h * choice.unit + j for lane in range(choice.width)]


@pytest.mark.parametrize("isa", ("avx512", "avx2", "sse2"))
@pytest.mark.parametrize(("out", "source"), ((2, 2), (4, 16), (6, 4), (7, 3), (8, 8), (12, 20), (2, 6), (4, 1)))
@pytest.mark.parametrize("dtype", ("f32", "f64"))
def test_interleaved_lanes_find_the_channels_of_their_groups(dtype: str, out: int, source: int, isa: str) -> None:
    """Every step repeats, in each lane, the next channel of the group whose result the lane is."""
    numeric = Numeric(dtype, targets.TARGETS[isa])
    lanes = Lanes.choose(numeric, out, source, 8)
    assert lanes.interleaved
    if out > lanes.lanes:  # several vectors a group, each in order
        assert lanes.single
        assert lanes.parts > 1
        return
    size, picks = numeric.compute_bytes, lanes.expansion().picks
    assert sorted(lanes.places) == sorted(set(lanes.places))
    assert [lanes.order[lane] for lane in lanes.places] == list(range(lanes.width))
    steps = lanes.steps(size)
    assert len(steps) == source
    for channel, (plane, place) in enumerate(steps):
        read = picks[plane][place // size : place // size + lanes.per_vector]
        repeated = [read[group] for group in lanes.repeated()]
        for result, lane in enumerate(lanes.places):
            assert repeated[lane] == result // out * source + channel


@pytest.mark.parametrize("groups", (8, 16, 32))
def test_channels_are_repeated_without_shuffles(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Intel's cores a shuffle of 512 bits takes the port of a multiply-add."""
    text = assembly_of(problem(f"n1c64h28w28k64r3s3 p1 g{groups}", "forward", "f32", "nhwc"), "avx512", monkeypatch)
    loops = re.findall(r"^block_\S+:.*?\tjl\t", text, re.S | re.M)
    assert loops
    for loop in loops:
        assert len(re.findall(r"vfmadd", loop)) > 30
        assert not re.findall(r"vperm|vshuf|vpshuf|vmovddup", loop)


def test_taps_share_loads_within_a_slab() -> None:
    assert [even(7, 3), even(4, 4), even(0, 3)] == [[3, 2, 2], [4], []]
    taps = [Tap(0, 0, 0), Tap(1, 1, 0), Tap(2, 0, 1), Tap(3, 1, 1), Tap(4, 0, 2)]
    assert chunks(taps, 2) == [Chunk((0, 1), 0, 0, (0, 2)), Chunk((0,), 0, 2, (4,)), Chunk((0, 1), 1, 0, (1, 3))]


@pytest.mark.parametrize("isa", ("avx512", "avx2", "sse2", "neon"))
def test_configurations_split_every_tile(isa: str) -> None:
    target = targets.TARGETS[isa]
    for case in ("n8c256h28w28k256r3s3 p1 g128", "n1c64h7w7k64r3s3 p1 g32", "n1c32h9w2000k32r3s3 p1 g16", "n2c32h57w57k32r3s3 st2 g16"):
        for direction in DIRECTIONS:
            p = problem(case, direction, "f32", "nhwc")
            lanes = grouped.check(p, target)
            if direction == "grad_weight":
                weight = grouped_weight.choose_weight_config(p, target, lanes)
                assert weight.parts * weight.part_tiles >= p.n
                continue
            chosen = grouped.choose_config(p, target, 2)
            assert chosen.block[0] * chosen.block[1] + 4 <= target.registers
            rows, columns = axes(p, chosen.tile)
            for axis, size in zip((rows, columns), chosen.block, strict=True):
                assert all(split(count, size) for count in grouped.counts(axis))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", ("n8c128h56w56k128r3s3 p1 g32", "n8c256h28w28k256r3s3 p1 g32"))
def test_blocks_keep_their_sums_in_registers(case: str, direction: Direction, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two common layers, 4 and 8 channels a group: hardly a vector register goes to the stack, and where it does then once in hundreds of products."""
    text = assembly_of(problem(case, direction, "f32", "nhwc"), "avx512", monkeypatch)
    functions = re.split(r"^(\w[\w.]*):", text, flags=re.MULTILINE)
    blocks = [body for name, body in zip(functions[1::2], functions[2::2], strict=True) if name.startswith(("block_", "pass_"))]
    assert blocks
    for block in blocks:
        spilled = [line for line in block.splitlines() if "zmm" in line and "(%rsp)" in line]
        assert 50 * len(spilled) <= block.count("vfmadd"), spilled
