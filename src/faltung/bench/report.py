"""Tables and plots from CSV files: ``python -m faltung.bench.report benchmarks/results/*.csv --readme README.md``.

Nothing in a table is typed by hand: what stands between the markers of a document is replaced.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..problem import DIRECTIONS, FORMATS, ConvProblem
from .peers import FROZEN
from .rows import Row, read_csv
from .runner import comparisons
from .table import NOISE, geometric_mean, seconds

__all__ = ["BEGIN", "END", "detail_table", "insert", "layer_grid", "loss_table", "overview_table", "suite_table", "summary_lines"]

BEGIN = "<!-- benchmark: begin (generated, see `make report`) -->"
END = "<!-- benchmark: end -->"

_NOTHING = "Nothing was measured yet."
_TITLES = {"forward": "forward", "grad_input": "input gradient", "grad_weight": "weight gradient"}


def report(
    files: Annotated[list[Path], typer.Argument(help="CSV files of `faltung bench`")],
    readme: Annotated[Path | None, typer.Option(help="document whose marked part becomes the table of one suite")] = None,
    docs: Annotated[
        Path | None, typer.Option(help="document whose marked part becomes the table of every row of that suite, and a summary of the others")
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="folder for the pictures")] = None,
    suite: Annotated[str, typer.Option(help="the suite of the README's tables")] = "baselines",
    layers: Annotated[str, typer.Option(help="the instruction set whose every layer the README shows; the first measured where that is none of them")] = "",
) -> None:
    """Write tables into documents, and plots: a column (README) or a part for each instruction set that was measured."""
    rows = [row for file in files for row in read_csv(file)]
    machines = _by_machine(rows)
    if readme is not None:
        isa = layers if layers in machines else next(iter(machines), "")
        insert(readme, "\n".join(_readme_lines(machines, suite, isa, _pictures(readme, plots, isa))) if machines else _NOTHING)
    if docs is not None:
        insert(docs, _joined(_docs_part(part, suite, _pictures(docs, plots, isa)) for isa, part in machines.items()))
    if plots is not None:
        from .plots import ratios, roofline

        for isa, part in machines.items():
            ratios(part, plots / f"ratios-{isa}.png")
            roofline(part, plots / f"roofline-{isa}.png")


def _by_machine(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by instruction set, in the order of the files: times of two machines do not belong into one mean."""
    return {isa: [row for row in rows if row.isa == isa] for isa in dict.fromkeys(row.isa for row in rows)}


def _joined(parts: Iterable[Sequence[str]]) -> str:
    return "\n\n".join("\n".join(part) for part in parts) or _NOTHING


def _readme_lines(machines: Mapping[str, Sequence[Row]], suite: str, isa: str, pictures: Sequence[str]) -> list[str]:
    chosen = {name: [row for row in rows if row.suite == suite] or rows for name, rows in machines.items()}
    return [*overview_table(chosen), "", f"Every layer, with {isa}:", "", *layer_grid(chosen[isa]), *pictures]


def _docs_part(rows: Sequence[Row], suite: str, pictures: Sequence[str]) -> list[str]:
    chosen = [row for row in rows if row.suite == suite] or rows
    rest = [row for row in rows if row.suite != suite] if len(chosen) < len(rows) else []
    parts = [f"## {rows[0].isa}", "", *summary_lines(chosen), *pictures, "", *detail_table(chosen)]
    if rest:
        parts += ["", "### Every network", "", *summary_lines(rest), "", *suite_table(rest), "", "#### Slower than PyTorch", "", *loss_table(rest)]
    return parts


def _pictures(document: Path, plots: Path | None, isa: str) -> list[str]:
    if plots is None:
        return []
    folder = os.path.relpath(plots, document.parent)
    ratios_title, roof_title = "Stock PyTorch's time over faltung's, every row, sorted", "GFLOP/s against flops a byte, float32"
    return ["", f"![{ratios_title}]({folder}/ratios-{isa}.png)", "", f"![{roof_title}]({folder}/roofline-{isa}.png)"]


def insert(document: Path, text: str) -> None:
    """Replace what stands between the markers of ``document``; raises ValueError where it has none."""
    old = document.read_text(encoding="utf-8")
    if BEGIN not in old or END not in old:
        raise ValueError(f"{document} has no lines {BEGIN!r} and {END!r}")
    head, rest = old.split(BEGIN, 1)
    document.write_text(head + BEGIN + "\n" + text + "\n" + END + rest.split(END, 1)[1], encoding="utf-8")


def _places(rows: Sequence[Row]) -> list[str]:
    """Where and with what rows were measured, in words."""
    return sorted(
        {f"{r.device} ({r.isa}), {r.threads} threads, torch {r.torch}, faltung {r.faltung}{f' ({r.commit})' if r.commit else ''}, {r.time[:10]}" for r in rows}
    )


def overview_table(machines: Mapping[str, Sequence[Row]]) -> list[str]:
    """Where it was measured, and a Markdown table with a column for each machine: geometric means of stock's time over ours, in the same format and in its
    best one, by element type, direction and format; and how many rows are slower in the same format."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for isa, rows in machines.items():
        for row, same, best in comparisons(rows):
            if row.status == "ok" and math.isfinite(same):
                for name in (f"{row.dtype}, {_TITLES[row.direction]}, {row.format.upper()}", "all"):
                    found.setdefault(name, {}).setdefault(isa, []).append((same, best))
    lines = [*(f"- {place}" for rows in machines.values() for place in _places(rows)), ""]
    lines += ["| rows | number | " + " | ".join(machines) + " |", "|---" * (len(machines) + 2) + "|"]
    for name in sorted(found, key="all".__eq__):  # in their order, all of them last
        cells = [_means(found[name].get(isa, [])) for isa in machines]
        lines.append(f"| {name} | {max(map(len, found[name].values()))} | " + " | ".join(cells) + " |")
    slower = [str(sum(same < NOISE for same, _ in found.get("all", {}).get(isa, []))) for isa in machines]
    return [*lines, "| slower in the same format |  | " + " | ".join(slower) + " |"]


def _means(ratios: Sequence[tuple[float, float]]) -> str:
    return f"{geometric_mean([same for same, _ in ratios]):.2f} / {geometric_mean([best for _, best in ratios]):.2f}" if ratios else ""


def summary_lines(rows: Sequence[Row]) -> list[str]:
    """Where it was measured, and geometric means with the number of losses, by element type, direction and format."""
    lines = [*(f"Measured on: {place}." for place in _places(rows)), ""]
    lines += ["| rows | number | x stock, same format | x stock, its best format | slower than stock, same format |", "|---|---|---|---|---|"]
    compared = [(row, same, best) for row, same, best in comparisons(rows) if row.status == "ok" and math.isfinite(same)]
    for dtype in dict.fromkeys(row.dtype for row, _, _ in compared):
        for direction in DIRECTIONS:
            for fmt in FORMATS:
                part = [(s, b) for row, s, b in compared if (row.dtype, row.direction, row.format) == (dtype, direction, fmt)]
                if part:
                    lines.append(_summary_line(f"{dtype}, {_TITLES[direction]}, {fmt.upper()}", part))
    lines.append(_summary_line("all", [(s, b) for _, s, b in compared]))
    reasons = {"refused": "no implementation takes it", "wrong": "its result was outside the bound"}
    untimed = [f"No time is shown for {row.provider} on `{row.problem}`: {reasons[row.status]}." for row in rows if row.status != "ok"]
    return lines + (["", *untimed] if untimed else []) + _peer_lines(rows)


def _summary_line(name: str, ratios: Sequence[tuple[float, float]]) -> str:
    same, best = [s for s, _ in ratios], [b for _, b in ratios]
    return f"| {name} | {len(ratios)} | {geometric_mean(same):.2f} | {geometric_mean(best):.2f} | {sum(s < NOISE for s in same)} |"


def _peer_lines(rows: Sequence[Row]) -> list[str]:
    """Forward against each peer, and against the best of all; on each side the better format, on ours with frozen weights where that is faster."""
    best: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.status == "ok":
            times = best.setdefault(row.key, {})
            provider = "faltung" if row.provider == FROZEN else row.provider
            times[provider] = min(row.median, times.get(provider, math.inf))
    peers = sorted({row.provider for row in rows} - {"faltung", FROZEN, "stock"})
    lines = []
    for peer in peers:
        version = next(row.provider_version for row in rows if row.provider == peer)
        lines += _peer_line(f"{peer} {version}", [times[peer] / times["faltung"] for times in best.values() if {peer, "faltung"} <= set(times)])
    compared = [times for times in best.values() if "faltung" in times and set(times) & set(peers)]
    rivals = [min(time for name, time in times.items() if name != "faltung") / times["faltung"] for times in compared]
    return lines + _peer_line("the best of these and stock PyTorch", rivals)


def _peer_line(name: str, ratios: Sequence[float]) -> list[str]:
    if not ratios:
        return []
    slower = sum(ratio < NOISE for ratio in ratios)
    return [
        "",
        f"Forward against {name}, each in its best format: {geometric_mean(ratios):.2f}x on {len(ratios)} rows, slower on {slower}; least {min(ratios):.2f}x.",
    ]


def suite_table(rows: Sequence[Row]) -> list[str]:
    """A Markdown table with a line for each suite: geometric means in the same format by direction, and the number of slower rows."""
    headings = [f"{_TITLES[direction]}, {fmt.upper()}" for direction in DIRECTIONS for fmt in FORMATS]
    lines = ["| suite | rows | " + " | ".join(headings) + " | slower |", "|---" * (len(headings) + 3) + "|"]
    compared = [(row, same) for row, same, _ in comparisons(rows) if row.status == "ok" and math.isfinite(same)]
    for suite in dict.fromkeys(row.suite for row, _ in compared):
        own = [(row, same) for row, same in compared if row.suite == suite]
        means = [geometric_mean([same for row, same in own if (row.direction, row.format) == (d, f)]) for d in DIRECTIONS for f in FORMATS]
        cells = ["" if math.isnan(mean) else f"{mean:.2f}" for mean in means]
        lines.append(f"| {suite} | {len(own)} | " + " | ".join(cells) + f" | {sum(same < NOISE for _, same in own)} |")
    return lines


def loss_table(rows: Sequence[Row]) -> list[str]:
    """A Markdown table of the rows that are slower than stock PyTorch in the same format, the slowest first."""
    losses = [(same, row) for row, same, _ in comparisons(rows) if row.status == "ok" and same < NOISE]
    if not losses:
        return ["No row is slower than stock PyTorch in the same format."]
    lines = ["| x stock | problem | by | time | error |", "|---|---|---|---|---|"]
    for same, row in sorted(losses, key=lambda loss: loss[0]):
        lines.append(f"| **{same:.2f}** | `{row.problem.removesuffix(' wnhwc')}` | {row.implementation} | {seconds(row.median)} | {row.error:.0e} |")
    return lines


def layer_grid(rows: Sequence[Row]) -> list[str]:
    """A Markdown table with a line for each layer: stock's time over ours in the same format, and our time; losses are bold."""
    cells: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for row, same, _ in comparisons(rows):
        text = f"{same:.2f}x ({seconds(row.median)})" if row.status == "ok" else row.status
        cells.setdefault((row.layer, _label(row)), {})[row.direction, row.format] = f"**{text}**" if row.status != "ok" or same < NOISE else text
    columns = [(direction, fmt) for direction in DIRECTIONS for fmt in FORMATS]
    lines = ["| layer | " + " | ".join(f"{_TITLES[d]}, {f.upper()}" for d, f in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for (_, label), found in cells.items():
        lines.append(f"| {label} | " + " | ".join(found.get(column, "") for column in columns) + " |")
    return lines


def detail_table(rows: Sequence[Row]) -> list[str]:
    """A Markdown table with a line for every one of our rows."""
    lines = ["| suite | layer | problem | by | time | p20-p80 | GFLOP/s | error | x stock | x best stock |", "|---|---|---|---|---|---|---|---|---|---|"]
    for row, same, best in comparisons(rows):
        name = row.layer + (f" x{row.count}" if row.count > 1 else "")
        if row.status == "ok":
            figures = f"{seconds(row.median)} | {seconds(row.p20)}-{seconds(row.p80)} | {row.gflops:.0f} | {row.error:.0e} | {_bold(same)} | {_bold(best)}"
        else:
            figures = f"**{row.status}** | | | {row.error:.0e} | | "
        lines.append(f"| {row.suite} | {name} | `{row.problem.removesuffix(' wnhwc')}` | {row.implementation} | {figures} |")
    return lines


def _bold(ratio: float) -> str:
    return f"**{ratio:.2f}**" if ratio < NOISE else f"{ratio:.2f}"


def _label(row: Row) -> str:
    at = ConvProblem.parse(row.problem)
    kind = f"{at.dtype} {at.n}x{at.c}x{at.h}x{at.w}"
    kernel = f"{at.r}x{at.s}"
    if at.depthwise and at.k == at.c:
        kind += f", depthwise {kernel}"
    else:
        kind += f" to {at.k}, {kernel}" + (f", {at.g} groups" if at.g > 1 else "")
    if at.stride != (1, 1):
        kind += f", stride {at.stride[0]}"
    if at.dilation != (1, 1):
        kind += f", dilation {at.dilation[0]}"
    return kind + ("" if at.padding_mode == "zeros" else f", {at.padding_mode}")


if __name__ == "__main__":
    typer.run(report)
