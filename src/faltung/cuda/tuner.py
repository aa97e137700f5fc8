"""Measured choices: every able implementation and configuration is checked against an oracle, and the fastest right one is remembered.

The store (:mod:`faltung.choices`) is one file for each device: its name carries the GPU's name and compute capability and the versions of PyTorch and
Triton, its keys are problem strings and the float32 precision.  ``tuned`` stands in front of the implementations and refuses what was never measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from .. import choices, config, layout
from ..dispatch import Implementation, Unsupported
from ..problem import ConvProblem
from . import tiling
from .runtime import INTERPRETED, TORCH_DTYPES, CudaPlan, device, fp32_precision

__all__ = ["TUNED", "Choice", "Measured", "Tuned", "candidates", "clear", "lookup", "remember", "sample", "tune"]

_CONFIGS = {c.__name__: c for c in (tiling.IgemmConfig, tiling.WeightConfig, tiling.DepthwiseConfig, tiling.BandedConfig)}
_FORMAT = 1


@dataclass(frozen=True)
class Choice:
    """An implementation and its configuration; ``seconds`` is what they took when they won."""

    implementation: str
    config: Any
    seconds: float


@dataclass(frozen=True)
class Measured:
    """One candidate of a search: ``error`` and ``bound`` are absolute, ``seconds`` is None where the result was wrong or the launch failed."""

    implementation: str
    config: Any
    error: float
    bound: float
    seconds: float | None
    failure: str = ""


def store_path() -> Path | None:
    """The file of this device's choices, or None where nothing can be kept on disk."""
    facts = device()
    return choices.store_path("cuda", f"{facts.name} {facts.capability} torch {torch.__version__} triton {triton.__version__} format {_FORMAT}")


_store = choices.ChoiceStore(store_path)


def _key(problem: ConvProblem) -> str:
    return f"{problem} {fp32_precision()}" if problem.dtype == "f32" else str(problem)


def lookup(problem: ConvProblem) -> Choice | None:
    """The remembered choice for exactly this problem on this device."""
    value = _store.lookup(_key(problem))
    try:
        return None if value is None else Choice(str(value["implementation"]), _CONFIGS[value["kind"]](**value["config"]), float(value["seconds"]))
    except (KeyError, TypeError, ValueError):  # a damaged store costs its choices, never a call
        return None


def remember(problem: ConvProblem, choice: Choice) -> None:
    """Keep a choice, on disk where that is possible."""
    record = {"implementation": choice.implementation, "kind": type(choice.config).__name__, "config": asdict(choice.config), "seconds": choice.seconds}
    _store.remember(_key(problem), record)


def clear() -> None:
    """Forget what was read from disk."""
    _store.clear()


class Tuned:
    """The implementation named ``tuned``: whatever was measured to be fastest for exactly this problem on this device."""

    name = "tuned"

    def plan(self, problem: ConvProblem, threads: int = 1) -> CudaPlan:
        """The plan of the remembered choice; raises :class:`Unsupported` where there is none."""
        if config.current().reproducible:
            raise Unsupported("what is measured decides bits, and results must be reproducible")
        choice = lookup(problem)
        if choice is None:
            raise Unsupported("was not measured on this device")
        for implementation in _candidates():
            if implementation.name == choice.implementation:
                return implementation.plan(problem, threads, choice.config)  # type: ignore[call-arg,return-value]
        raise Unsupported(f"the store names {choice.implementation}, which does not exist")


TUNED = Tuned()


def _candidates() -> Iterable[Implementation]:
    from . import IMPLEMENTATIONS

    return (i for i in IMPLEMENTATIONS if hasattr(i, "configs"))


_AHEAD = 2_000_000
"""Cycles, about a millisecond, that the device waits while the host queues a whole call: else gaps between its launches would count."""


def sample(call: Callable[[], object], flush: Tensor) -> float:
    """Seconds that the device takes for a call, by CUDA events, with the second-level cache overwritten by ``flush`` before."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    torch.cuda._sleep(_AHEAD)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _time(call: Callable[[], None], repeats: int) -> float:
    """Median of a launch's samples; one call in the interpreter."""
    call()
    if INTERPRETED:
        return 0.0
    flush = torch.empty(device().l2_bytes // 2, dtype=torch.int32, device="cuda")
    return statistics.median(sample(call, flush) for _ in range(repeats))


def candidates(problem: ConvProblem, limit: int) -> Iterator[tuple[Any, list[Any]]]:
    """Every implementation that takes ``problem`` by its own choice, with at most ``limit`` of its configurations, the heuristic's first."""
    for implementation in _candidates():
        try:
            implementation.plan(problem, 1)
        except Unsupported:
            continue
        yield implementation, implementation.configs(problem)[:limit]  # type: ignore[attr-defined]


def tune(
    problem: ConvProblem, oracle: tuple[Tensor, float], operands: tuple[Tensor, Tensor, Tensor | None], repeats: int = 15, limit: int = 24
) -> tuple[Choice | None, list[Measured]]:
    """Search the configurations of every implementation that takes ``problem``; the fastest right one is remembered.

    ``oracle``: the main result in float64 on the operands' device, and the largest absolute error allowed.  ``operands``: source, other and side as a
    plan takes them.  ``limit``: configurations an implementation, the heuristic's first.  A candidate that fails to launch counts as wrong.
    """
    expected, bound = oracle
    source, other, side = operands
    strides = layout.strides_of(problem.result_shape, problem.result_format)
    out = torch.empty_strided(problem.result_shape, strides, dtype=TORCH_DTYPES[problem.dtype], device=source.device)
    measured: list[Measured] = []
    for implementation, tried in candidates(problem, limit):
        measured += [_measure(implementation, candidate, problem, (source, other, side, out), expected, bound, repeats) for candidate in tried]
    right = [m for m in measured if m.seconds is not None]
    if not right:
        return None, measured
    best = min(right, key=lambda m: m.seconds or 0.0)
    choice = Choice(best.implementation, best.config, best.seconds or 0.0)
    remember(problem, choice)
    return choice, measured


def _measure(
    implementation: Any,
    candidate: Any,
    problem: ConvProblem,
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor],
    expected: Tensor,
    bound: float,
    repeats: int,
) -> Measured:
    out = tensors[3].fill_(float("nan"))
    try:
        with config.override(poison=True):
            launch = implementation.plan(problem, 1, candidate).launch
            launch(*tensors)
        error = (out.double() - expected).abs().max().item()
        if not error <= bound:
            return Measured(implementation.name, candidate, error, bound, None, "wrong")
        return Measured(implementation.name, candidate, error, bound, _time(lambda: launch(*tensors), repeats))
    except (Unsupported, RuntimeError, triton.TritonError) as failure:  # too much shared memory, for one
        return Measured(implementation.name, candidate, float("nan"), bound, None, f"{type(failure).__name__}: {str(failure)[:200]}")
