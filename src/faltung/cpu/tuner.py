"""Measured choices: every able implementation and configuration is checked against a trusted result, and the fastest right one is remembered.

With ``config.autotune`` the first call of a problem searches: each implementation's own choice, the other configurations that it offers (``configs``), and one
thread for small problems.  The trusted result is that of direct convolution in float64 (for a gradient that is folded, of the folded one).  The store
(:mod:`faltung.choices`) is one file for each machine: its name carries the processor, its instruction set and caches, and faltung's and LLVM's versions; its
keys are problem strings, threads, and the options that decide who may compute.  A choice that was remembered holds from then on, in every process.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import choices, config, dispatch
from ..dispatch import Decision, Implementation, Plan, Unsupported
from ..problem import DTYPES, ConvProblem
from . import target as targets
from .machine import processor, versions

__all__ = ["Choice", "Measured", "clear", "decide", "lookup", "remember", "tune"]

_FORMAT = 1
_MOST_BYTES = 1 << 29  # of operands: larger problems keep the predicted choice, since the search holds them in float64 too
_SMALL_FLOPS = 50_000_000  # one thread is tried below
_ROUNDS = 15
_LEAST_ROUNDS = 3
_BUDGET = 0.2  # seconds for the timing of all candidates, after the least rounds
_HOPELESS = 1.5  # candidates this much slower than the fastest after the least rounds are not timed further
_MARGIN = 0.97  # the predicted choice gives way to what takes less than this part of its time
_TOLERANCE = {"f32": 1e-4, "f64": 1e-11, "bf16": 1.6e-2, "f16": 2e-3}
"""Of an element's error, relative to the element's magnitude and the root mean square of all together: far above rounding, far below a wrong index."""

_lock = threading.RLock()


@dataclass(frozen=True)
class Choice:
    """An implementation, the label of its configuration ("" for its own choice), threads, and the seconds that they took when they won."""

    implementation: str
    config: str
    threads: int
    seconds: float
    refusals: tuple[tuple[str, str], ...] = ()
    slower: tuple[tuple[str, str], ...] = ()
    """The candidates that did not win, and why."""


@dataclass(frozen=True)
class Measured:
    """One candidate of a search: ``error`` and ``bound`` are relative, ``seconds`` is None where the result was wrong or it was given up."""

    implementation: str
    config: str
    threads: int
    error: float
    bound: float
    seconds: float | None
    failure: str = ""


def store_path() -> Path | None:
    """The file of this machine's choices, or None where nothing can be kept on disk."""
    return choices.store_path("cpu", f"{processor()} {targets.target()} {versions()} format {_FORMAT}")


_store = choices.ChoiceStore(store_path)


def _key(problem: ConvProblem, threads: int) -> str:
    options = config.current()
    wanted = f" {options.implementation}" if options.implementation else ""
    return f"{problem} threads {threads} precision {options.precision}{wanted}"


def lookup(problem: ConvProblem, threads: int) -> Choice | None:
    """The remembered choice for exactly this problem on this machine, under the options in force."""
    value = _store.lookup(_key(problem, threads))
    try:
        if value is None:
            return None
        told = {part: tuple((str(name), str(reason)) for name, reason in value[part]) for part in ("refusals", "slower")}
        return Choice(str(value["implementation"]), str(value["config"]), int(value["threads"]), float(value["seconds"]), **told)
    except (KeyError, TypeError, ValueError):  # a damaged store costs its choices, never a call
        return None


def remember(problem: ConvProblem, threads: int, choice: Choice) -> None:
    """Keep a choice, on disk where that is possible."""
    _store.remember(_key(problem, threads), asdict(choice))


def clear() -> None:
    """Forget what was read from disk."""
    _store.clear()


def decide(problem: ConvProblem, threads: int) -> Decision | None:
    """The decision by measurement, which is searched for where nothing is remembered; None where there is nothing to choose."""
    with _lock:
        found = lookup(problem, threads)
        if found is not None:
            plan = _plan(found, problem)
            if plan is not None:
                return Decision(plan, found.refusals, found.seconds, found.slower)
        if problem.bytes() > _MOST_BYTES:
            return None
        choice, _ = tune(problem, threads)
        plan = None if choice is None else _plan(choice, problem)
        return None if choice is None or plan is None else Decision(plan, choice.refusals, choice.seconds, choice.slower)


def _plan(choice: Choice, problem: ConvProblem) -> Plan | None:
    """The plan of a choice; None where it is not offered any more."""
    for candidate in _candidates(problem, choice.threads, choice.implementation):
        if (candidate.implementation, candidate.label, candidate.threads) == (choice.implementation, choice.config, choice.threads):
            return candidate.make()
    return None


@dataclass(frozen=True)
class _Candidate:
    implementation: str
    label: str
    threads: int
    make: Callable[[], Plan]


def _planned(implementation: Implementation, problem: ConvProblem, threads: int, *chosen: Any) -> Plan:
    # Asked for by name, an implementation does not refuse for its predicted time.
    with config.override(autotune=False, implementation=implementation.name):
        return implementation.plan(problem, threads, *chosen)


def _candidates(problem: ConvProblem, threads: int, wanted: str | None, refusals: list[tuple[str, str]] | None = None) -> Iterator[_Candidate]:
    """Every candidate of the implementation ``wanted``, or of all: each one's own choice before its other configurations."""
    for implementation in (i for i in dispatch.implementations("cpu") if wanted in (None, i.name)):

        def make(implementation: Implementation = implementation, count: int = threads, chosen: tuple[Any, ...] = ()) -> Plan:
            return _planned(implementation, problem, count, *chosen)

        try:
            make()
        except Unsupported as refusal:
            if refusals is not None:
                refusals.append((implementation.name, str(refusal)))
            continue
        yield _Candidate(implementation.name, "", threads, make)
        for chosen in implementation.configs(problem, threads) if hasattr(implementation, "configs") else ():
            yield _Candidate(implementation.name, chosen.label, threads, lambda make=make, chosen=chosen: make(chosen=(chosen,)))  # type: ignore[misc]
        if threads > 1 and problem.flops() < _SMALL_FLOPS:
            yield _Candidate(implementation.name, "", 1, lambda make=make: make(count=1))  # type: ignore[misc]


def tune(problem: ConvProblem, threads: int, rounds: int = _ROUNDS) -> tuple[Choice | None, list[Measured]]:
    """Search the candidates for ``problem`` on at most ``threads`` threads; the fastest right one is remembered.

    Random operands, float64 operands of the same values and two results are held meanwhile.  A candidate that fails to compile counts as wrong.
    """
    operands = _Operands(problem, threads)
    refusals: list[tuple[str, str]] = []
    candidates = _candidates(problem, threads, config.current().implementation, refusals)
    tried = [_check(candidate, operands) for candidate in candidates]
    right = [(i, plan) for i, (_, plan) in enumerate(tried) if plan is not None]
    measured = [said for said, _ in tried]
    if not right:
        return None, measured
    for (i, _), seconds in zip(right, _time([operands.call(plan) for _, plan in right], rounds)):
        measured[i] = replace(measured[i], seconds=seconds)
    best = _fastest([m for m in measured if m.seconds is not None], _predicted(problem, threads))
    assert best.seconds is not None
    slower = tuple((_name(m, threads), _verdict(m, best.seconds)) for m in measured if m is not best)
    choice = Choice(best.implementation, best.config, best.threads, best.seconds, tuple(refusals), slower)
    remember(problem, threads, choice)
    return choice, measured


def _predicted(problem: ConvProblem, threads: int) -> str:
    with config.override(autotune=False):
        return dispatch.plan(problem, "cpu", threads).implementation


def _fastest(measured: list[Measured], predicted: str) -> Measured:
    """The fastest, where it beats the predicted choice by more than the clock's noise."""
    best = min(measured, key=lambda m: m.seconds or 0.0)
    own = next((m for m in measured if m.implementation == predicted and not m.config), best)
    assert best.seconds is not None
    assert own.seconds is not None
    return best if best.seconds < _MARGIN * own.seconds else own


def _name(measured: Measured, threads: int) -> str:
    return " ".join(part for part in (measured.implementation, measured.config, "" if measured.threads == threads else "on one thread") if part)


def _verdict(measured: Measured, best: float) -> str:
    return measured.failure if measured.seconds is None else f"{measured.seconds * 1e6:.4g} us, {measured.seconds / best:.2f} times the choice's time"


def _check(candidate: _Candidate, operands: _Operands) -> tuple[Measured, Plan | None]:
    bound = _TOLERANCE[operands.problem.dtype]

    def said(error: float, failure: str = "") -> Measured:
        return Measured(candidate.implementation, candidate.label, candidate.threads, error, bound, None, failure)

    try:
        with config.override(poison=True):
            error = operands.error(candidate.make())
        if not error <= bound:
            return said(error, f"wrong by {error:.2g}"), None
        with config.override(poison=False):
            return said(error), candidate.make()
    except (Unsupported, RuntimeError) as failure:  # LLVM's, for one
        return said(math.nan, f"{type(failure).__name__}: {str(failure)[:200]}"), None


def _time(calls: list[Callable[[], None]], rounds: int) -> list[float]:
    """Least seconds of each call, in turns: what interrupts a call only adds.  Those far slower than the fastest after a few turns are left out of the rest."""

    def run(call: Callable[[], None]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    for call in calls:
        call()
    times = [math.inf] * len(calls)
    start = time.perf_counter()
    for turn in range(rounds):
        if turn >= _LEAST_ROUNDS and time.perf_counter() - start > _BUDGET:
            break
        limit = math.inf if turn < _LEAST_ROUNDS else _HOPELESS * min(times)
        for i, call in enumerate(calls):
            if times[i] <= limit:
                times[i] = min(times[i], run(call))
    return times


class _Operands:
    """Random operands of a problem, flat (which element is which does not matter), and the trusted result."""

    def __init__(self, problem: ConvProblem, threads: int) -> None:
        self.problem = problem
        random = np.random.default_rng(1)
        shapes = {"x": problem.input_shape, "w": problem.weight_shape, "y": problem.output_shape, "b": (problem.k,)}
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        self._names = {"forward": "xwby", "grad_input": "yw-x", "grad_weight": "xybw"}[problem.direction]
        self._bias = problem.epilogue.bias and problem.direction != "grad_input"
        self._arrays: dict[str, npt.NDArray[Any]] = {}
        exact: dict[str, npt.NDArray[np.float64]] = {}
        for name in self._names.replace("-", ""):
            values = random.standard_normal(sizes[name], np.float32)
            self._arrays[name] = _stored(values, problem.dtype)
            exact[name] = _loaded(self._arrays[name], problem.dtype)
        trusted = _trusted(replace(problem, dtype="f64"), threads)
        trusted.launch(*self._addresses(exact))
        self._expected = {name: exact[name] for name in self._results}
        self._rms = {name: float(np.sqrt(np.mean(values**2))) for name, values in self._expected.items()}

    @property
    def _results(self) -> str:
        return self._names[3] + ("b" if self.problem.direction == "grad_weight" and self._bias else "")

    def _addresses(self, arrays: dict[str, npt.NDArray[Any]]) -> list[int]:
        return [0 if name == "-" or (name == "b" and not self._bias) else arrays[name].ctypes.data for name in self._names]

    def call(self, plan: Plan) -> Callable[[], None]:
        addresses = self._addresses(self._arrays)
        return lambda: plan.launch(*addresses)

    def error(self, plan: Plan) -> float:
        """The largest error of an element of a plan's results, see ``_TOLERANCE``; NaN or infinite where one is not finite."""
        for name in self._results:
            self._arrays[name].view(np.uint8).fill(0xFF)
        self.call(plan)()
        worst = 0.0
        for name in self._results:
            found, expected = _loaded(self._arrays[name], self.problem.dtype), self._expected[name]
            with np.errstate(all="ignore"):
                worst = max(
                    worst,
                    float(np.max(np.abs(found - expected) / (np.abs(expected) + self._rms[name] + 1e-300))),
                    key=lambda e: math.inf if math.isnan(e) else e,
                )
        return worst


def _trusted(problem: ConvProblem, threads: int) -> Plan:
    """The plan of the last implementation that takes a problem: the direct one, or the one that folds a direct one's result."""
    with config.override(autotune=False, precision="strict", implementation=None):
        for implementation in reversed(dispatch.implementations("cpu")):
            try:
                return implementation.plan(problem, threads)
            except Unsupported:
                continue
    raise Unsupported(f"no implementation takes '{problem}'")


def _stored(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """Numbers as a type lies in memory; bfloat16, which NumPy lacks, as 16-bit integers."""
    if dtype == "bf16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype({"f32": np.float32, "f64": np.float64, "f16": np.float16}[dtype])


def _loaded(stored: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float64]:
    if dtype == "bf16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


assert set(_TOLERANCE) == set(DTYPES)
