"""Every CPU implementation by name over the table of problems: strict, counted, whole numbers exactly, others within the bound, memory watched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import cases
import harness
from faltung import config, cpu, dispatch, testing
from faltung.problem import DIRECTIONS, DTYPES, FORMATS, ConvProblem, Direction
from implementations import BOUNDS, MAY_TAKE, SWEPT_APART, TAKES, applicable, verify


def _names() -> list[str]:
    return list(dict.fromkeys(i.name for i in cpu.IMPLEMENTATIONS))


def test_every_implementation_is_in_the_sweep() -> None:
    assert sorted(_names()) == sorted({*TAKES, *MAY_TAKE, *SWEPT_APART})
    for modules in SWEPT_APART.values():
        assert all((Path(__file__).parent / f"{module}.py").exists() for module in modules)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("section", cases.SECTIONS)
@pytest.mark.parametrize("implementation", sorted(TAKES))
def test_table(implementation: str, section: str, direction: Direction, dtype: str) -> None:
    problems = list(cases.variants(section, direction, dtype))
    count = len(cases.CASES[section])
    shared = {"bf16": -(-count // 2), "f16": max(count // 2, 1)}.get(dtype, count)
    assert len(problems) == shared * (4 if dtype == "f32" else 2)
    taken = [p for p in problems if TAKES[implementation](p)]
    outcome = harness.sweep(problems, implementation, verify)
    assert (outcome.ran, outcome.refused) == (len(taken), len(problems) - len(taken))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("implementation", sorted(MAY_TAKE))
def test_table_of_those_that_may_refuse(implementation: str, direction: Direction, dtype: str) -> None:
    problems = [p for section in cases.SECTIONS for p in cases.variants(section, direction, dtype)]
    possible = [p for p in problems if MAY_TAKE[implementation](p)]

    def check(plan: dispatch.Plan) -> str | None:
        assert MAY_TAKE[implementation](plan.problem), f"{implementation} took '{plan.problem}'"
        return verify(plan)

    outcome = harness.sweep(problems, implementation, check)
    assert outcome.ran + outcome.refused == len(problems)
    share = 8 if (implementation, dtype) == ("grouped", "bf16") else 3  # pairs of bfloat16 leave 3 of 18 forward
    assert len(possible) // share <= outcome.ran <= len(possible)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", (1, 3))
def test_addresses_aligned_to_their_element_only(dtype: str, shift: int) -> None:
    ran = 0
    problems = [
        cases.problem(case, direction, dtype, fmt, "nchw", bias=direction != "grad_input")
        for case in cases.TARGET_CASES
        for direction in DIRECTIONS
        for fmt in FORMATS
    ]
    for implementation, takes in (TAKES | MAY_TAKE).items():
        taken = [p for p in problems if takes(p)]
        ran += harness.sweep(taken, implementation, lambda plan: verify(plan, shift=shift)).ran
        assert taken or dtype != "f32"
    assert ran >= len(cases.TARGET_CASES) * 6


def test_the_order_chooses_and_the_plan_says_who() -> None:
    """Without a name the ordered list decides; every problem of the table has a plan in every direction."""
    chosen: dict[str, int] = {}
    with config.override(precision="strict"):
        for section in cases.SECTIONS:
            for direction in DIRECTIONS:
                for case in cases.CASES[section]:
                    decision = dispatch.decide(cases.problem(case, direction, "f32", "nchw", "nchw"), "cpu", 2)
                    assert (TAKES | MAY_TAKE)[decision.plan.implementation](decision.plan.problem)
                    chosen[decision.plan.implementation] = chosen.get(decision.plan.implementation, 0) + 1
    assert sum(chosen.values()) == 3 * sum(map(len, cases.CASES.values()))
    assert set(chosen) == {*TAKES, *MAY_TAKE} - set(BOUNDS)  # precision is strict


def test_unknown_implementation_is_refused_by_name() -> None:
    problem = ConvProblem.parse("n1c1h4w4k1r1s1")
    with config.override(implementation="no such"), pytest.raises(ValueError, match="no such"):
        dispatch.plan(problem)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("case", ("n1c5h9w11k7r3s3 p1", "n1c3h9w21k17r3s3 p2 st2", "n1c5h7w9k6r1s1", "n1c6h9w9k6r3s3 p1 g6"))
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_nan_and_infinity_reach_what_they_touch(value: float, case: str, fmt: str, direction: Direction) -> None:
    """One value that is not finite: exactly the results that read it are not finite, and others of their tiles where an algorithm transforms these."""
    problem = cases.problem(case, direction, "f32", fmt, "nchw")  # type: ignore[arg-type]
    ran = 0
    for implementation in applicable(problem):
        inputs = testing.make_inputs(problem, integers=True)
        inputs = testing.Inputs(*(t + 3 for t in (inputs.x, inputs.w, inputs.bias, inputs.gy)))  # no zeros: infinity stays infinity
        source = inputs.gy if direction == "grad_input" else inputs.x
        where = tuple(size // 2 for size in source.shape)
        marks = torch.zeros_like(source)
        marks[where] = 1.0
        source[where] = value
        ones = testing.Inputs(*(torch.ones_like(t) for t in (inputs.x, inputs.w, inputs.bias, inputs.gy)))
        ones = replace(ones, **{"gy" if direction == "grad_input" else "x": marks})
        (got,) = harness.launch(harness.plan_named(implementation, problem), inputs)
        (touched,) = testing.exact(problem, ones)
        if implementation in BOUNDS:
            assert not got[touched != 0].isfinite().any(), f"{implementation} '{problem}'"
        else:
            assert torch.equal(~got.isfinite(), touched != 0), f"{implementation} '{problem}'"
        if np.isinf(value) and implementation not in BOUNDS:
            assert not got.isnan().any()
        ran += 1
    assert ran >= 1
