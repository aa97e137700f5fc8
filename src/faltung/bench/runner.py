"""Measures cases: makes the contenders, checks each result, times those that were right, in turns."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict

from ..dispatch import Unsupported
from ..problem import FORMATS
from . import contenders
from .check import REFERENCE_SECONDS, Truth, bound_of, error_of, truth_of
from .contenders import Contender, stock
from .operands import Operands, make_operands
from .peers import make_peers
from .rows import Environment, Row
from .suites import Case
from .timing import Sample, interleave

__all__ = ["Ours", "comparisons", "run", "run_case"]

Ours = Callable[[Operands], Contender]


def run(
    cases: Iterable[Case],
    environment: Environment,
    *,
    budget: float = 0.3,
    peers: tuple[str, ...] = (),
    make_ours: Ours | None = None,
    reference: float = REFERENCE_SECONDS,
) -> Iterator[list[Row]]:
    """The rows of one case after another; see :func:`run_case`."""
    for case in cases:
        yield run_case(case, environment, budget=budget, peers=peers, make_ours=make_ours, reference=reference)
        gc.collect()


def run_case(
    case: Case,
    environment: Environment,
    *,
    budget: float = 0.3,
    peers: tuple[str, ...] = (),
    make_ours: Ours | None = None,
    reference: float = REFERENCE_SECONDS,
) -> list[Row]:
    """One layer in one direction and type: faltung in the case's formats, stock in both, and ``peers``.

    Every result is compared with the truth just before it is timed; one that is outside its bound gets a row without a time.  ``budget``: seconds
    of measuring for each contender; ``reference``: of computing the truth in float64, see :func:`truth_of`.
    """
    row_major = make_operands(case.problem)
    truth = truth_of(row_major, reference)
    operands = {fmt: row_major.to(fmt) for fmt in FORMATS}
    columns = [_or_refused(make_ours or contenders.ours, operands[fmt]) for fmt in case.formats]
    columns += [stock(operands[fmt]) for fmt in FORMATS]
    columns += list(make_peers({fmt: operands[fmt] for fmt in case.formats}, peers))

    errors = [math.nan if c.refused else error_of(c.call(), truth) for c in columns]
    of_stock = max((e for c, e in zip(columns, errors) if c.provider == "stock"), default=0.0)
    bound = bound_of(case.problem, of_stock)
    # Stock is what users have: its own error is shown, and held to no bound but that of being a number.
    right = [error <= bound or (c.provider == "stock" and math.isfinite(error)) for c, error in zip(columns, errors)]
    timed = [c for c, good in zip(columns, right) if good]
    samples = iter(interleave([c.call for c in timed], budget, pools=[c.pool for c in timed]))
    return [_row(case, c, environment, error, bound, truth, next(samples) if good else None) for c, error, good in zip(columns, errors, right)]


def _or_refused(make: Ours, operands: Operands) -> Contender:
    """A contender, or one that stands for the refusal: no row is left out because nothing takes its problem."""
    try:
        return make(operands)
    except Unsupported as refusal:
        return Contender("faltung", operands.problem.format, tuple, str(refusal), "", refused=True)


def _row(case: Case, contender: Contender, environment: Environment, error: float, bound: float, truth: Truth, sample: Sample | None) -> Row:
    problem = case.in_format(contender.format)
    timed = sample or Sample(math.nan, math.nan, math.nan, 0)
    return Row(
        suite=case.layer.suite,
        layer=case.layer.name,
        count=case.layer.count,
        problem=str(problem),
        direction=problem.direction,
        dtype=problem.dtype,
        format=problem.format,
        provider=contender.provider,
        implementation=contender.implementation,
        provider_version=contender.version,
        status="ok" if timed.runs else "refused" if contender.refused else "wrong",
        median=timed.median,
        p20=timed.p20,
        p80=timed.p80,
        runs=timed.runs,
        gflops=problem.flops() / timed.median * 1e-9,
        error=error,
        bound=bound,
        reference=truth.source,
        **asdict(environment),
    )


def comparisons(rows: Sequence[Row]) -> list[tuple[Row, float, float]]:
    """Each of faltung's rows with stock's time over its own: in the same format, and in the better of stock's formats; NaN without a time."""
    found = []
    for row in rows:
        if row.provider != "faltung":
            continue
        times = {r.format: r.median for r in rows if r.provider == "stock" and r.key == row.key and r.status == "ok" and r.time == row.time}  # of the same run
        same, best = times.get(row.format, math.nan), min(times.values(), default=math.nan)
        found.append((row, same / row.median, best / row.median))
    return found
