"""Measured choices: every able implementation and configuration is checked against an oracle, and the fastest right one is remembered.

The store is one JSON file for each device in the folder of compiled kernels (``config.cache_dir``): its name carries the GPU's name and compute
capability and the versions of PyTorch and Triton, its keys are problem strings and the float32 precision.  A file that is corrupt, foreign or
unreadable is a store without entries; it is replaced by rename.  ``tuned`` stands in front of the implementations and refuses what was never measured.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from .. import config, layout
from ..dispatch import Implementation, Unsupported
from ..problem import ConvProblem
from . import tiling
from .runtime import INTERPRETED, TORCH_DTYPES, CudaPlan, device, fp32_precision

__all__ = ["TUNED", "Choice", "Measured", "Tuned", "clear", "lookup", "remember", "tune"]

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


_loaded: dict[Path, dict[str, Choice]] = {}


def store_path() -> Path | None:
    """The file of this device's choices, or None where nothing can be kept on disk."""
    try:
        from ..codegen.compile import cache_folder
    except ImportError:  # a machine for CUDA alone may lack what the CPU engine needs
        return None
    folder = cache_folder()
    facts = device()
    versions = f"{facts.name} {facts.capability} torch {torch.__version__} triton {triton.__version__} format {_FORMAT}"
    return None if folder is None else folder / f"cuda-{hashlib.sha256(versions.encode()).hexdigest()[:16]}.json"


def _key(problem: ConvProblem) -> str:
    return f"{problem} {fp32_precision()}" if problem.dtype == "f32" else str(problem)


def _parse(text: str) -> dict[str, Choice]:
    found = {}
    for key, value in json.loads(text).items():
        found[key] = Choice(str(value["implementation"]), _CONFIGS[value["kind"]](**value["config"]), float(value["seconds"]))
    return found


def _choices() -> dict[str, Choice]:
    path = store_path()
    if path is None:
        return _loaded.setdefault(Path(), {})
    if path not in _loaded:
        _loaded[path] = {}
        # a damaged store costs its choices, never a call
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            if not hasattr(os, "getuid") or path.stat().st_uid == os.getuid():
                _loaded[path] = _parse(path.read_text(encoding="utf-8"))
    return _loaded[path]


def lookup(problem: ConvProblem) -> Choice | None:
    """The remembered choice for exactly this problem on this device."""
    return _choices().get(_key(problem))


def remember(problem: ConvProblem, choice: Choice) -> None:
    """Keep a choice, on disk where that is possible."""
    choices = _choices()
    choices[_key(problem)] = choice
    path = store_path()
    if path is None:
        return
    values = {
        key: {"implementation": c.implementation, "kind": type(c.config).__name__, "config": asdict(c.config), "seconds": c.seconds}
        for key, c in sorted(choices.items())
    }
    with contextlib.suppress(OSError):
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(values, file, indent=1)
        Path(name).replace(path)


def clear() -> None:
    """Forget what was read from disk."""
    _loaded.clear()


class Tuned:
    """The implementation named ``tuned``: whatever was measured to be fastest for exactly this problem on this device."""

    name = "tuned"

    def plan(self, problem: ConvProblem, threads: int = 1) -> CudaPlan:
        """The plan of the remembered choice; raises :class:`Unsupported` where there is none."""
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


def _time(call: Callable[[], None], repeats: int) -> float:
    """Median seconds of a launch, by CUDA events, with the second-level cache overwritten before each; one call in the interpreter."""
    call()
    if INTERPRETED:
        return 0.0
    flush = torch.empty(device().l2_bytes // 2, dtype=torch.int32, device="cuda")
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def tune(
    problem: ConvProblem, oracle: tuple[Tensor, float], operands: tuple[Tensor, Tensor, Tensor | None], repeats: int = 15, limit: int = 24
) -> tuple[Choice | None, list[Measured]]:
    """Search the configurations of every implementation that takes ``problem``; the fastest right one is remembered.

    ``oracle``: the main result in float64 on the operands' device, and the largest absolute error allowed.  ``operands``: source, other and side as a
    plan takes them.  ``limit``: configurations an implementation, the heuristic's first.  A candidate that fails to launch counts as wrong.
    """
    expected, bound = oracle
    source, other, side = operands
    shape, fmt = {
        "forward": (problem.output_shape, problem.format),
        "grad_input": (problem.input_shape, problem.format),
        "grad_weight": (problem.weight_shape, problem.weight_format),
    }[problem.direction]
    out = torch.empty_strided(shape, layout.strides_of(shape, fmt), dtype=TORCH_DTYPES[problem.dtype], device=source.device)
    measured: list[Measured] = []
    for implementation in _candidates():
        try:
            implementation.plan(problem, 1)
        except Unsupported:
            continue
        tried = implementation.configs(problem)[:limit]  # type: ignore[attr-defined]
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
