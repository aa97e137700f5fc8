"""The statement of a convolution: sizes, text form, counts."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch

from faltung import ConvProblem
from faltung.problem import DIRECTIONS, DTYPES, FORMATS, PADDING_MODES, Epilogue, same_padding


def _random_problem(rng: random.Random) -> ConvProblem:
    g = rng.choice([1, 1, 2, 5])
    pad = rng.choice([0, 1, 3])
    return ConvProblem(
        n=rng.randrange(4),
        c=g * rng.randrange(4),
        h=rng.randrange(8, 12),
        w=rng.randrange(8, 12),
        k=g * rng.randrange(1, 4),
        r=rng.choice([1, 3]),
        s=rng.choice([1, 2]),
        stride=(rng.choice([1, 2]), rng.choice([1, 3])),
        padding=rng.choice([(0, 0, 0, 0), (pad, pad, pad, pad), (pad, pad, 2, 2), (1, 0, pad, 2), (-1, 0, 0, 2)]),
        dilation=(rng.choice([1, 2]), rng.choice([1, 3])),
        g=g,
        padding_mode=rng.choice(PADDING_MODES),
        dtype=rng.choice(list(DTYPES)),
        format=rng.choice(FORMATS),
        weight_format=rng.choice(FORMATS),
        direction=rng.choice(DIRECTIONS),
        epilogue=Epilogue(bias=rng.random() < 0.5),
    )


def test_text_form_says_everything() -> None:
    rng = random.Random(0)
    texts = set()
    for _ in range(500):
        problem = _random_problem(rng)
        text = str(problem)
        assert ConvProblem.parse(text) == problem, text
        assert hash(ConvProblem.parse(text)) == hash(problem)
        texts.add(text)
    assert len(texts) > 450


def test_text_form_has_defaults_and_any_order() -> None:
    problem = ConvProblem.parse("n8c64h56w57k128r3s1 st2 p1x2 bias")
    assert problem == ConvProblem(8, 64, 56, 57, 128, 3, 1, stride=(2, 2), padding=(2, 2, 1, 1), epilogue=Epilogue(bias=True))
    assert ConvProblem.parse("p1x2 bias n8c64h56w57k128r3s1 f32 st2 nchw forward") == problem
    assert str(ConvProblem.parse("n1c2h3w4k5r1s1")) == "forward f32 nchw n1c2h3w4k5r1s1"


@pytest.mark.parametrize("text", ["", "f32", "n1c2h3w4k5r1", "n1c2h3w4k5r1s1 st", "n1c2h3w4k5r1s1 q3", "n1c2h3w4k5r1s1 int8", "n1c2h3w4k5r1s1 p1,2,3"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="convolution problem"):
        ConvProblem.parse(text)


def test_output_size_is_pytorchs() -> None:
    cases = 0
    for h, r, stride, padding, dilation in itertools.product((5, 8), (1, 2, 3), (1, 2, 3), (0, 1, 2), (1, 2)):
        problem = ConvProblem(1, 1, h, h + 1, 1, r, r, (stride, 1), (padding,) * 4, (dilation, 1))
        expected = torch.conv2d(torch.zeros(1, 1, h, h + 1), torch.zeros(1, 1, r, r), None, (stride, 1), padding, (dilation, 1)).shape
        assert problem.output_shape == tuple(expected)
        cases += 1
    assert cases == 108


def test_same_padding_is_pytorchs() -> None:
    for r, s, dilation in itertools.product(range(1, 6), range(1, 6), (1, 2, 3)):
        left, right, top, bottom = same_padding((r, s), (dilation, 1))
        module = torch.nn.Conv2d(1, 1, (r, s), padding="same", dilation=(dilation, 1))
        assert [left, right, top, bottom] == module._reversed_padding_repeated_twice


def test_counts() -> None:
    problem = ConvProblem(2, 6, 8, 8, 12, 3, 3, padding=(1, 1, 1, 1), g=3, epilogue=Epilogue(bias=True))
    assert (problem.cg, problem.kg, problem.p, problem.q) == (2, 4, 8, 8)
    assert problem.flops() == 2 * 2 * 12 * 8 * 8 * 2 * 9
    assert problem.bytes() == 4 * (2 * 6 * 64 + 12 * 2 * 9 + 2 * 12 * 64 + 12)
    assert replace(problem, dtype="f16").bytes() * 2 == problem.bytes()
    assert not problem.depthwise
    assert ConvProblem(1, 4, 4, 4, 8, 3, 3, g=4).depthwise
    assert ConvProblem(0, 4, 4, 4, 8, 3, 3).empty
    assert problem.with_direction("grad_weight", bias=True).direction == "grad_weight"
