"""The same bits on every run, for any number of threads, and for an image alone or in a batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cases
import harness
from faltung import config, dispatch, testing
from faltung.problem import DIRECTIONS, DTYPES, FORMATS, ConvProblem, Direction, Format
from implementations import applicable

CASES = (
    "n3c5h9w17k37r3s3 p1",
    "n3c16h12w12k16r3s3 p1",
    "n3c3h16w33k16r7s7 st2 p3",
    "n3c64h6w6k40r3s3 p1",
    "n3c9h8w9k10r1s1",
    "n3c5h9w11k7r3s3 st3x2 p1 d2",
    "n3c6h6w7k10r3s3 p1 g2",
    "n3c9h6w19k9r3s3 p1 g9",
    "n3c3h5w6k4r3s3 p1,2,0,1 reflect",
    "n3c8h33w35k8r3s3 p1",
    "n3c48h20w20k48r3s3 p1",
    "n3c67h1w1k37r1s1",
    "n7c700h1w1k300r1s1",
)
THREADS = (2, 3, 4)


def _problems(direction: Direction, dtype: str) -> list[ConvProblem]:
    formats: tuple[Format, ...] = FORMATS
    return [cases.problem(case, direction, dtype, fmt, "nchw", bias=direction != "grad_input") for case in CASES for fmt in formats]


def _bits(problem: ConvProblem, implementation: str, threads: int, inputs: testing.Inputs) -> testing.Result:
    with config.override(reproducible=True):
        return harness.launch(harness.plan_named(implementation, problem, threads), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_same_bits_on_every_run(direction: Direction, dtype: str) -> None:
    """Without any option: threads take tasks in another order each time, the results do not change."""
    ran = 0
    for problem in _problems(direction, dtype):
        inputs = testing.make_inputs(problem)
        for implementation in applicable(problem):
            plan = harness.plan_named(implementation, problem, threads=4)
            first = harness.launch(plan, inputs)
            assert all(harness.equal_bits(first, harness.launch(plan, inputs)) for _ in range(4)), f"{implementation} '{problem}'"
            ran += 1
    assert ran >= 2 * len(CASES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_same_bits_for_any_number_of_threads(direction: Direction, dtype: str) -> None:
    ran = 0
    for problem in _problems(direction, dtype):
        inputs = testing.make_inputs(problem)
        for implementation in applicable(problem):
            alone = _bits(problem, implementation, 1, inputs)
            for threads in THREADS:
                assert harness.equal_bits(alone, _bits(problem, implementation, threads, inputs)), f"{implementation} '{problem}', {threads} threads"
            ran += 1
    assert ran >= 2 * len(CASES)


def _image(problem: ConvProblem, inputs: testing.Inputs, index: int) -> testing.Inputs:
    def part(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[index : index + 1].contiguous(memory_format=torch.channels_last if problem.format == "nhwc" else torch.contiguous_format)

    return replace(inputs, x=part(inputs.x), gy=part(inputs.gy))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", ("forward", "grad_input"))
@pytest.mark.parametrize("threads", (1, 2))
def test_an_image_in_a_batch_is_the_image_alone(threads: int, direction: Direction, dtype: str) -> None:
    ran = 0
    for problem in _problems(direction, dtype):
        inputs = testing.make_inputs(problem)
        single = replace(problem, n=1)
        for implementation in applicable(problem):
            (batch,) = _bits(problem, implementation, threads, inputs)
            for index in range(problem.n):
                (alone,) = _bits(single, implementation, threads, _image(problem, inputs, index))
                assert harness.equal_bits(testing.Result(batch[index : index + 1]), testing.Result(alone)), f"{implementation} '{problem}', image {index}"
            ran += 1
    assert ran >= 2 * len(CASES)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_chosen_implementation_keeps_both_promises(direction: Direction) -> None:
    """Through the ordered list: reproducible must not let the choice of algorithm depend on the batch or on the threads."""
    for problem in _problems(direction, "f32"):
        inputs = testing.make_inputs(problem)
        with config.override(reproducible=True, poison=True):
            results = [harness.launch(dispatch.plan(problem, "cpu", threads), inputs) for threads in (1, *THREADS)]
            assert all(harness.equal_bits(results[0], other) for other in results[1:]), f"'{problem}'"
            if direction != "grad_weight":
                (alone,) = harness.launch(dispatch.plan(replace(problem, n=1), "cpu", 2), _image(problem, inputs, 1))
                assert harness.equal_bits(testing.Result(results[0].main[1:2]), testing.Result(alone)), f"'{problem}'"
