"""Ordered implementations, stated refusals, and the cache of plans.

An implementation takes a problem and returns a plan, or raises :class:`Unsupported` with its reason.  The first one that accepts
is used; asking for one by name is strict.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from . import config
from .problem import ConvProblem

__all__ = ["Decision", "Freezable", "FrozenPlan", "Implementation", "Plan", "Unsupported", "available", "decide", "implementations", "plan", "serves"]


class Unsupported(RuntimeError):
    """An implementation's refusal of a problem; the text is the reason, for people."""


@runtime_checkable
class Plan(Protocol):
    """An implementation bound to a problem, ready to launch.

    A CPU plan is called with four addresses (integers, 0 for none): ``forward``: x, w, bias, y; ``grad_input``: gradient of y, w, 0,
    gradient of x; ``grad_weight``: x, gradient of y, gradient of the bias, gradient of w.  A CUDA plan is called with tensors in that order.
    """

    problem: ConvProblem
    implementation: str

    @property
    def launch(self) -> Callable[..., None]: ...

    def describe(self) -> dict[str, Any]:
        """Facts for ``explain``: tile, workspace in bytes, kernel name, predicted seconds, ..."""
        ...


class FrozenPlan(Protocol):
    """A plan with the weights that it was frozen with, launched as the plan is; ``bytes`` is what keeping them takes."""

    @property
    def launch(self) -> Callable[..., None]: ...

    @property
    def bytes(self) -> int: ...

    def share(self, other: Any) -> bool:
        """Use the memory of another frozen plan's weights where they are the same; whether they are."""
        ...

    def shares(self, other: Any) -> bool:
        """Whether both use the same memory."""
        ...


@runtime_checkable
class Freezable(Protocol):
    """A plan that can keep its weights as its kernel reads them, packed or transformed."""

    def freeze(self, other: int, bias: int) -> FrozenPlan | None:
        """The plan for the weights (and the bias) at these addresses; None where there is nothing to keep."""
        ...

    def describe_frozen(self) -> dict[str, Any]:
        """Facts of the frozen plan, ``frozen_bytes`` among them: what keeping the weights takes."""
        ...


class Implementation(Protocol):
    """One algorithm for some problems."""

    name: str

    def plan(self, problem: ConvProblem, threads: int) -> Plan:
        """A plan for ``problem`` on ``threads`` threads (CPU; others ignore it); raises :class:`Unsupported`."""
        ...


@dataclass(frozen=True)
class Decision:
    """A plan, and what was said on the way: ``refusals`` holds ``(implementation, reason)`` in the order asked.

    Where the choice was measured (``config.autotune``): ``seconds`` that the plan took then, and what was ``slower``, as (candidate, verdict).
    """

    plan: Plan
    refusals: tuple[tuple[str, str], ...]
    seconds: float | None = None
    slower: tuple[tuple[str, str], ...] = ()


_ENGINES = {"cpu": "faltung.cpu", "cuda": "faltung.cuda"}
_TUNERS = {"cpu": "faltung.cpu.tuner"}
_CACHE_LIMIT = 4096
_decisions: dict[tuple[ConvProblem, str, config.Options, int], Decision] = {}
_lock = threading.Lock()


def available(engine: str) -> bool:
    """Whether there are implementations for tensors of this device type.  The CPU's are part of every installation: a broken one must not pass unseen."""
    if engine == "cpu" or engine not in _ENGINES:
        return engine == "cpu"
    try:
        return bool(getattr(importlib.import_module(_ENGINES[engine]), "IMPLEMENTATIONS", ()))
    except ImportError:
        return False


def serves(engine: str, device_type: str) -> bool:
    """Whether an engine takes tensors of this device type: its own, and the CPU's where Triton's interpreter runs the CUDA kernels."""
    if (engine, device_type) == ("cuda", "cpu"):
        return available(engine) and bool(importlib.import_module(_ENGINES[engine] + ".runtime").INTERPRETED)
    return engine == device_type


def implementations(engine: str) -> tuple[Implementation, ...]:
    """The implementations of an engine (``cpu`` or ``cuda``), in order of preference."""
    module = importlib.import_module(_ENGINES[engine])
    return tuple(module.IMPLEMENTATIONS)


def decide(problem: ConvProblem, engine: str = "cpu", threads: int = 1) -> Decision:
    """The decision for ``problem`` under the options in force, from the cache where it was taken before.

    ``threads``: the number of threads that a CPU plan may use.  Raises :class:`Unsupported`, with every reason, where no implementation accepts.
    """
    options = config.current()
    entry = (problem, engine, options, threads)
    found = _decisions.get(entry)
    if found is None:
        found = _decide(problem, engine, options, threads)
        with _lock:  # two threads must not drop the same oldest entry
            if len(_decisions) >= _CACHE_LIMIT:
                del _decisions[next(iter(_decisions))]
            _decisions[entry] = found
    return found


def plan(problem: ConvProblem, engine: str = "cpu", threads: int = 1) -> Plan:
    """The plan for ``problem``: :func:`decide` without the story."""
    return decide(problem, engine, threads).plan


def clear() -> None:
    """Forget every cached plan."""
    _decisions.clear()


def _decide(problem: ConvProblem, engine: str, options: config.Options, threads: int) -> Decision:
    candidates = implementations(engine)
    wanted = options.implementation
    if wanted is not None:
        named = tuple(i for i in candidates if i.name == wanted)
        if not named:
            raise ValueError(f"faltung has no {engine} implementation named {wanted!r}; there are {', '.join(i.name for i in candidates)}")
        candidates = named
    if options.autotune and not options.reproducible and engine in _TUNERS:
        measured: Decision | None = importlib.import_module(_TUNERS[engine]).decide(problem, threads)
        if measured is not None:
            return measured
    refusals: list[tuple[str, str]] = []
    for implementation in candidates:
        try:
            return Decision(implementation.plan(problem, threads), tuple(refusals))
        except Unsupported as refusal:
            refusals.append((implementation.name, str(refusal)))
    raise Unsupported(f"no {engine} implementation takes '{problem}': " + "; ".join(f"{name}: {reason}" for name, reason in refusals))
