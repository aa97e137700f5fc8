"""Rows as a table for people."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from rich.table import Table

from .rows import Row
from .runner import comparisons

__all__ = ["NOISE", "geometric_mean", "layer_table", "seconds", "summary"]

NOISE = 0.97
"""A ratio above this is no loss: repeated medians of one call differ by about 3 % on a shared machine."""


def layer_table(rows: Sequence[Row], title: str = "") -> Table:
    """One line for each of faltung's rows, with stock's time over its own: more than 1 is faster than PyTorch.

    A result outside its bound is shown as such, in place of a time.
    """
    peers = sorted({r.provider for r in rows} - {"faltung", "stock"})
    table = Table(title=title or None, caption=_caption(rows), caption_justify="left", title_justify="left")
    for heading in ["layer", "problem", "by"]:
        table.add_column(heading, overflow="fold")
    for heading in ["time", "p20-p80", "GFLOP/s", "error", "x stock", "x best stock", *(f"x {peer}" for peer in peers)]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row, same, best in comparisons(rows):
        others = [_ratio(_best_of(rows, row, peer) / row.median) for peer in peers]
        if row.status == "refused":
            cells = ["[bold red]refused[/]", "", "", "", "", "", *("" for _ in peers)]
        elif row.status != "ok":
            cells = ["[bold red]wrong[/]", "", "", f"[bold red]{row.error:.1e} > {row.bound:.0e}[/]", "", "", *("" for _ in peers)]
        else:
            spread = f"{seconds(row.p20)}-{seconds(row.p80)}"
            cells = [seconds(row.median), spread, f"{row.gflops:.0f}", f"{row.error:.0e}", _ratio(same), _ratio(best), *others]
        table.add_row(row.layer + (f" x{row.count}" if row.count > 1 else ""), row.problem.removesuffix(" wnhwc"), row.implementation, *cells)
    return table


def summary(rows: Sequence[Row]) -> str:
    """Geometric means and losses, in a sentence."""
    found = comparisons(rows)
    timed = [(same, best) for row, same, best in found if row.status == "ok" and math.isfinite(same)]
    parts = [f"{len(timed)} rows with a time"]
    if timed:
        same, best = [s for s, _ in timed], [b for _, b in timed]
        parts.append(f"geometric mean {geometric_mean(same):.2f}x stock in the same format, {geometric_mean(best):.2f}x stock in its best format")
        parts.append(f"slower than stock in the same format: {sum(s < NOISE for s in same)}")
    counts = Counter(row.status for row, _, _ in found)
    return "; ".join([*parts, *(f"{status.upper()}: {counts[status]}" for status in ("wrong", "refused") if counts[status])])


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of positive numbers; NaN of none."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def seconds(value: float) -> str:
    """A time with three digits and its unit."""
    for unit, scale in [("s", 1.0), ("ms", 1e3), ("us", 1e6)]:
        if value * scale >= 1 or unit == "us":
            return f"{value * scale:.3g} {unit}"
    raise AssertionError


def _best_of(rows: Sequence[Row], row: Row, provider: str) -> float:
    return min((r.median for r in rows if r.provider == provider and r.key == row.key and r.status == "ok"), default=math.nan)


def _ratio(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"[red]{value:.2f}[/]" if value < NOISE else f"[green]{value:.2f}[/]"


def _caption(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    r = rows[0]
    checked = ", ".join(sorted({row.reference for row in rows}))
    release = f"{r.faltung} ({r.commit})" if r.commit else r.faltung
    return (
        f"{r.device} ({r.isa}), {r.threads} threads; faltung {release}, torch {r.torch}, Python {r.python}. Medians of interleaved runs; x stock: "
        f"PyTorch's time over ours, in the same memory format and in its better one. Each result was checked first, against: {checked}."
    )
