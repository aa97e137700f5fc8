"""Plots of rows: the ratio of every layer, losses included, and a roofline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ..problem import DIRECTIONS, ConvProblem
from .rows import Row
from .runner import comparisons
from .table import NOISE, geometric_mean

__all__ = ["ratios", "roofline"]

_COLOURS = {"forward": "#3b6fb6", "grad_input": "#d1822b", "grad_weight": "#4f9a4b"}
_TITLES = {"forward": "forward", "grad_input": "input gradient", "grad_weight": "weight gradient"}
_MARKS = {"f32": "o", "f64": "s", "bf16": "^", "f16": "v"}


def ratios(rows: Sequence[Row], path: Path) -> None:
    """Save stock's time over ours in the same format, one bar a row, sorted, for each direction; what is below 1 is a loss and is red."""
    compared = [(row, same) for row, same, _ in comparisons(rows) if row.status == "ok" and math.isfinite(same)]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, len(DIRECTIONS), sharey=True)
    for axis, direction in zip(axes, DIRECTIONS):
        values = sorted((same for row, same in compared if row.direction == direction), reverse=True)
        colours = [_COLOURS[direction] if value >= NOISE else "#c0392b" for value in values]
        axis.bar(range(len(values)), [value - 1 for value in values], bottom=1, width=0.9, color=colours)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axis.set_xticks([])
        losses = sum(value < NOISE for value in values)
        axis.set_title(
            f"{_TITLES[direction]}: {geometric_mean(values):.2f}x of {len(values)} rows, {losses} slower" if values else _TITLES[direction], fontsize=10
        )
        axis.set_xlabel("layers, sorted")
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("stock PyTorch's time over faltung's")
    figure.suptitle(_place(rows), fontsize=9)
    _save(figure, path)


def roofline(rows: Sequence[Row], path: Path) -> None:
    """Save float32 GFLOP/s against flops a byte, for faltung and for stock, under the measured peak of a matrix product and of a copy.

    Flops are those of the direct algorithm, so a fast algorithm may stand above the roof.
    """
    chosen = [row for row in rows if row.status == "ok" and row.dtype == "f32" and row.provider in ("faltung", "stock")]
    if not chosen:
        return
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axis = figure.subplots()
    for provider, colour in [("stock", "#999999"), ("faltung", "#3b6fb6")]:
        points = [(_intensity(row), row.gflops) for row in chosen if row.provider == provider]
        label = "stock PyTorch" if provider == "stock" else provider
        axis.scatter([x for x, _ in points], [y for _, y in points], s=14, color=colour, alpha=0.7, label=label, marker=_MARKS["f32"], linewidths=0)
    peak, bandwidth = max(row.roof_gflops for row in chosen), max(row.roof_gbs for row in chosen)
    low, high = min(_intensity(row) for row in chosen) / 2, max(_intensity(row) for row in chosen) * 2
    knee = peak / bandwidth
    axis.plot(
        [low, knee, high], [low * bandwidth, peak, peak], color="black", linewidth=1, label=f"copy {bandwidth:.0f} GB/s, matrix product {peak:.0f} GFLOP/s"
    )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("flops of the direct algorithm a byte of operands")
    axis.set_ylabel("GFLOP/s")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", fontsize=8)
    axis.set_title(_place(rows), fontsize=9)
    _save(figure, path)


def _intensity(row: Row) -> float:
    problem = ConvProblem.parse(row.problem)
    return problem.flops() / problem.bytes()


def _place(rows: Sequence[Row]) -> str:
    return f"{rows[0].device} ({rows[0].isa}), {rows[0].threads} threads, torch {rows[0].torch}, {rows[0].time[:10]}" if rows else ""


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
