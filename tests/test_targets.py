"""Every instruction set: those of this machine run, AArch64 is assembled, and run on an emulated processor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cases
import emulated
import harness
from faltung import testing
from faltung.codegen.load import Kernel
from faltung.cpu import target
from faltung.cpu.plan import CpuPlan
from faltung.problem import DIRECTIONS, DTYPES, FORMATS, ConvProblem
from implementations import BOUNDS, MAY_TAKE, TAKES, applicable, families, verify
from instruction_sets import each_isa

RUNNABLE = target.runnable_targets()


def _problems(dtype: str) -> list[ConvProblem]:
    """Every case in both formats for f32, in one of them by turns for the other types; the one with a padding mode always in both."""
    return [
        cases.problem(case, direction, dtype, fmt, FORMATS[position % 2], bias=direction != "grad_input")
        for position, case in enumerate(cases.TARGET_CASES)
        for number, direction in enumerate(DIRECTIONS)
        for turn, fmt in enumerate(FORMATS)
        if dtype == "f32" or "reflect" in case or (position + number + turn + list(DTYPES).index(dtype)) % 2 == 0
    ]


@pytest.mark.parametrize("implementation", sorted(TAKES))
@pytest.mark.parametrize("dtype", DTYPES)
@each_isa()
def test_table_on_every_instruction_set(isa: str, dtype: str, implementation: str) -> None:
    taken = [p for p in _problems(dtype) if TAKES[implementation](p)]
    with target.use_target(isa):
        plans = []

        def check(plan: object) -> str | None:
            plans.append(plan.describe()["isa"])  # type: ignore[attr-defined]
            return verify(plan)  # type: ignore[arg-type]

        outcome = harness.sweep(taken, implementation, check)
    assert (outcome.ran, outcome.refused) == (len(taken), 0)
    assert set(plans) == ({isa} if taken else set())
    assert len(taken) >= 2 if implementation in families(dtype) else not taken


@each_isa()
def test_those_that_may_refuse_on_every_instruction_set(isa: str) -> None:
    with target.use_target(isa):
        for implementation, may_take in MAY_TAKE.items():
            outcome = harness.sweep([p for dtype in DTYPES for p in _problems(dtype) if may_take(p)], implementation, verify)
            assert outcome.ran >= 6


def test_the_targets_of_an_x86_machine_are_all_here() -> None:
    """On a machine with AVX-512 nothing of x86 goes unrun."""
    if "avx512" in RUNNABLE:
        assert tuple(name for name in RUNNABLE if name not in ("amx", "avx512_bf16")) == ("avx512", "avx2", "sse2")
    assert isinstance(harness.plan_named("direct", ConvProblem.parse(cases.TARGET_CASES[0])).kernel, Kernel)  # type: ignore[attr-defined]


def test_use_target_is_left_again() -> None:
    before = target.target()
    with target.use_target("sse2") as inside:
        assert target.target() == inside == target.TARGETS["sse2"]
    assert target.target() == before


# --- AArch64 --------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_aarch64_assembles_for_every_family(dtype: str) -> None:
    assembled, found = 0, set()
    with target.use_target("neon"), emulated.assembled() as objects:
        for problem in _problems(dtype):
            for implementation in applicable(problem, 1):
                harness.plan_named(implementation, problem, 1)
                assembled += 1
                found.add(implementation)
    assert assembled >= sum(takes(p) for p in _problems(dtype) for takes in TAKES.values())
    assert found == families(dtype)
    assert len(objects) >= 20
    for name, code in objects.items():
        assert code[:4] == b"\x7fELF", name
        assert int.from_bytes(code[18:20], "little") == 183, name  # EM_AARCH64
    assert target.target().isa != "neon"


@pytest.mark.skipif("neon" in RUNNABLE, reason="this machine runs AArch64 code itself")
@pytest.mark.skipif(not emulated.AVAILABLE, reason="needs the package unicorn")
@pytest.mark.parametrize("dtype", DTYPES)
def test_aarch64_runs_under_emulation(dtype: str) -> None:
    problems = _problems(dtype) if dtype == "f32" else _problems(dtype)[::3]
    ran, failures, composed = 0, [], set()
    with target.use_target("neon"), emulated.assembled():
        for problem in problems:
            for implementation in applicable(problem, 1):
                plan = harness.plan_named(implementation, problem, 1)
                if not isinstance(plan, CpuPlan):  # of several kernels, one after the other
                    composed.add(implementation)
                    continue
                inputs = testing.make_inputs(problem, integers=True)
                wanted = testing.rounded(problem, testing.exact(problem, inputs))
                found = emulated.run_emulated(plan, inputs)
                ran += 1
                bound = BOUNDS.get(implementation, 0.0)
                if not all(torch.equal(got, want) or torch.dist(got, want) <= bound * want.norm() for got, want in zip(found, wanted, strict=True)):
                    failures.append(f"{implementation} '{problem}'")
    assert not failures, "\n".join(failures)
    assert {"columns", "folded"} <= composed <= {"columns", "folded", "taps"}
    assert ran >= sum(takes(p) for p in problems for name, takes in TAKES.items() if name not in composed)
    assert ran >= len(problems) // 2


def test_a_target_changes_the_code_and_the_cache_key() -> None:
    """Two targets of one instruction set are two kernels."""
    from faltung.codegen.compile import object_key

    base = target.TARGETS["avx2"]
    others = [replace(base, cpu="znver3"), replace(base, features="-bmi2"), target.TARGETS["sse2"], target.TARGETS["neon"]]
    assert len({object_key("text", machine) for machine in (base, *others)}) == 5
