"""Interleaved timing of several calls in one process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Sample", "interleave"]

_SHORTEST_SAMPLE = 100e-6
"""Seconds; a faster call is repeated inside one sample, since reading the clock costs about 0.1 us and other processes interrupt."""


@dataclass(frozen=True)
class Sample:
    """Seconds a call: median, 20th and 80th percentile, over ``runs`` samples."""

    median: float
    p20: float
    p80: float
    runs: int


def interleave(calls: Sequence[Callable[[], object]], budget: float = 0.3, least: int = 3, most: int = 200) -> list[Sample]:
    """Time ``calls`` in turns, so that a slow spell of the machine meets all of them.

    Each call is warmed up, then sampled for about ``budget`` seconds, ``least`` to ``most`` times; a call that needs fewer samples than the others
    has them spread over the whole run.
    """
    repeats, quotas = [], []
    for call in calls:
        call()
        first = min(_time(call, 1) for _ in range(2))
        repeats.append(max(1, math.ceil(_SHORTEST_SAMPLE / max(first, 1e-9))))
        quotas.append(min(most, max(least, math.ceil(budget / (first * repeats[-1])))))
    rounds = max(quotas, default=0)
    samples: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds):
        for i in range(len(calls)):
            j = (i + turn) % len(calls)  # nobody always follows the same neighbour
            if (turn + 1) * quotas[j] // rounds > turn * quotas[j] // rounds:
                samples[j].append(_time(calls[j], repeats[j]))
    return [Sample(*(float(v) for v in np.percentile(values, [50, 20, 80])), runs=len(values)) for values in samples]


def _time(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
