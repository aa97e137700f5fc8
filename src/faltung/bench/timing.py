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


_SETTLE = 0.01
"""Seconds for one engine's threads to fall asleep before another engine is timed: idle workers spin for a while, on the cores that the next one needs."""


def interleave(calls: Sequence[Callable[[], object]], budget: float = 0.3, least: int = 3, most: int = 200, pools: Sequence[str] | None = None) -> list[Sample]:
    """Time ``calls`` in turns, so that a slow spell of the machine meets all of them; each was made once before, to warm it up.

    Next in turn is always the call that has had the least time so far: calls of like duration alternate, and a slow one has its samples spread
    over the whole run.  A call is done after ``budget`` seconds or ``most`` samples, but not before ``least``.

    ``pools`` names the pool of threads that each call runs on, where there are several: a change of pools costs a pause and a call that is not
    timed, so that a turn then takes a tenth of the budget.
    """
    pools = pools or [""] * len(calls)
    repeats = [1] * len(calls)
    samples: list[list[float]] = [[] for _ in calls]
    spent = [0.0] * len(calls)
    for i, call in enumerate(calls):
        first = _time(call, 1)
        if first >= budget:
            samples[i].append(first)
            spent[i] = first
        else:
            repeats[i] = max(1, math.ceil(_SHORTEST_SAMPLE / max(1e-9, min(first, _time(call, 1)))))
    turn = budget / 10 if len(set(pools)) > 1 else 0.0
    running = None
    waiting = set(range(len(calls)))
    while waiting:
        i = min(waiting, key=lambda j: (spent[j], j))
        if running not in (None, pools[i]):
            time.sleep(_SETTLE)
            calls[i]()
        running = pools[i]
        until = spent[i] + turn
        while i in waiting:
            samples[i].append(_time(calls[i], repeats[i]))
            spent[i] += samples[i][-1] * repeats[i]
            if len(samples[i]) >= least and (spent[i] >= budget or len(samples[i]) >= most):
                waiting.remove(i)
            elif spent[i] >= until:
                break
    return [_summary(values) for values in samples]


def _summary(values: Sequence[float]) -> Sample:
    p20, median, p80 = (float(value) for value in np.percentile(values, [20, 50, 80]))
    return Sample(median, p20, p80, len(values))


def _time(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
