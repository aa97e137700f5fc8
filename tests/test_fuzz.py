"""Random problems against float64: the output and both gradients, through the ordered list of implementations.

``FALTUNG_FUZZ_COUNT`` sets the number of convolutions (each in three directions), ``FALTUNG_FUZZ_SEED`` where they start::

    FALTUNG_FUZZ_COUNT=2000 python -m pytest tests/test_fuzz.py -n 2

A failure prints the problem string; a line with it belongs into the regressions of ``cases``.
"""

from __future__ import annotations

import os
import random

import pytest

from faltung import config, dispatch
from faltung.cpu import target
from faltung.problem import DIRECTIONS, FORMATS, PADDING_MODES, ConvProblem
from implementations import verify

COUNT = int(os.environ.get("FALTUNG_FUZZ_COUNT", "300"))
SEED = int(os.environ.get("FALTUNG_FUZZ_SEED", "1"))
SLICES = 12
DTYPES = ("f32", "f32", "f64", "bf16", "f16")
_MOST_FLOPS = 30_000_000


def random_problem(rng: random.Random) -> ConvProblem:
    """A convolution with elements, of moderate cost, forward."""
    while True:
        kind = rng.choice(("dense", "dense", "groups", "depthwise", "pointwise"))
        sizes = (1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 23, 31, 32, 33, 47, 64)
        g = 1 if kind in ("dense", "pointwise") else rng.choice((2, 3, 4, 8, 17, 33) if kind == "depthwise" else (2, 3, 4, 5))
        cg = 1 if kind == "depthwise" else rng.choice(sizes)
        kg = rng.choice((1, 1, 1, 2, 3)) if kind == "depthwise" else rng.choice(sizes)
        r = 1 if kind == "pointwise" else rng.choice((1, 2, 3, 3, 3, 4, 5, 7, 9, *((17, 31) if kind == "depthwise" else ())))
        s = rng.choice((r, r, r, 1, 2, 3, 5)) if kind != "pointwise" else 1
        stride = (1, 1) if rng.random() < 0.5 else (rng.choice((1, 2, 3, 4)), rng.choice((1, 2, 3, 4, 7)))
        dilation = (1, 1) if rng.random() < 0.7 else (rng.choice((1, 2, 3, 9)), rng.choice((1, 2, 4, 11)))
        h, w = rng.choice((1, 2, 3, 5, 7, 8, 13, 14, 16, 17, 31)), rng.choice((1, 2, 3, 7, 8, 14, 15, 16, 17, 29, 33, 65))
        mode = rng.choice(("zeros", "zeros", *PADDING_MODES))
        if rng.random() < 0.5:
            rows, columns = rng.choice((0, r // 2, dilation[0] * (r - 1) // 2)), rng.choice((0, s // 2, dilation[1] * (s - 1) // 2))
            padding = [columns, columns, rows, rows]
        else:
            padding = [rng.choice((0, 0, 1, 1, 2, 3, 6)) for _ in range(4)]
        most = {"reflect": (w - 1, h - 1), "circular": (w, h)}.get(mode, (99, 99))
        padding = [min(padding[0], most[0]), min(padding[1], most[0]), min(padding[2], most[1]), min(padding[3], most[1])]
        problem = ConvProblem(
            rng.choice((1, 1, 2, 3)), g * cg, h, w, g * kg, r, s, stride, (padding[0], padding[1], padding[2], padding[3]), dilation, g, mode,
            rng.choice(DTYPES), rng.choice(FORMATS), rng.choice(FORMATS),
        )  # fmt: skip
        span = problem.effective_kernel
        if h + padding[2] + padding[3] < span[0] or w + padding[0] + padding[1] < span[1] or problem.flops() > _MOST_FLOPS:
            continue
        return problem


def check(problem: ConvProblem, rng: random.Random) -> list[str]:
    """What is wrong with a convolution in its three directions; at random on another instruction set, thread count or reproducible."""
    failures = []
    threads, isa = rng.choice((1, 2, 2, 3)), rng.choice((None, None, *target.runnable_targets()))
    reproducible, bias, seed = rng.random() < 0.3, rng.random() < 0.5, rng.randrange(1 << 30)
    for direction in DIRECTIONS:
        stated = problem.with_direction(direction, bias=bias and direction != "grad_input")
        with target.use_target(target.TARGETS[isa] if isa else target.host_target()), config.override(poison=True, reproducible=reproducible):
            try:
                plan = dispatch.plan(stated, "cpu", threads)
                failure = verify(plan, seed=seed, any_size=True)
            except Exception as error:
                failure = f"'{stated}': {type(error).__name__}: {error}"
        if failure:
            failures.append(f"{failure} (isa {isa}, {threads} threads, reproducible {reproducible})")
    return failures


@pytest.mark.parametrize("part", range(SLICES))
def test_random_problems(part: int) -> None:
    ran, failures = 0, []
    for number in range(part, COUNT, SLICES):
        rng = random.Random(SEED * 1_000_003 + number)
        failures += check(random_problem(rng), rng)
        ran += 1
    assert not failures, f"{len(failures)} of {3 * ran} failed:\n" + "\n".join(failures[:10])
    assert ran == len(range(part, COUNT, SLICES))


def test_the_fuzz_reaches_everything() -> None:
    """The first thousand problems hold every type, format, mode, kind and stride, so that a slip of the generator is seen."""
    problems = [random_problem(random.Random(SEED * 1_000_003 + number)) for number in range(1000)]
    assert {p.dtype for p in problems} == set(DTYPES)
    assert {(p.format, p.weight_format) for p in problems} == {(a, b) for a in FORMATS for b in FORMATS}
    assert {p.padding_mode for p in problems} == set(PADDING_MODES)
    for holds in (
        lambda p: p.depthwise, lambda p: p.depthwise and p.k > p.c, lambda p: p.g > 1 and not p.depthwise, lambda p: (p.r, p.s) == (1, 1),
        lambda p: max(p.stride) > 2, lambda p: max(p.dilation) > 1, lambda p: len(set(p.padding)) > 2, lambda p: p.stride == (1, 1), lambda p: p.c > 32,
    ):  # fmt: skip
        assert sum(map(holds, problems)) >= 20
    assert len(set(map(str, problems))) >= 990
