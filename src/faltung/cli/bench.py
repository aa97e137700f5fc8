"""``faltung bench``: layers against stock PyTorch and other engines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..problem import DIRECTIONS, DTYPES, FORMATS

if TYPE_CHECKING:
    from ..bench.rows import Row
    from ..bench.suites import Case

__all__ = ["bench", "measure"]

T = TypeVar("T", bound=str)

_WRITE_SECONDS = 5.0
QUICK_BUDGET = 0.08
"""Seconds of measuring for each contender of ``--quick``: ten rows of three contenders stay well under 20 s."""


def bench(
    names: Annotated[
        list[str] | None, typer.Argument(help="suites (all: the layers of every network), problem strings, or torchvision models by name", show_default=False)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="ten rows in a few seconds")] = False,
    listing: Annotated[bool, typer.Option("--list", help="name the suites and stop")] = False,
    direction: Annotated[list[str] | None, typer.Option(help=f"one or more of {', '.join(DIRECTIONS)}; all where left out", show_default=False)] = None,
    dtype: Annotated[list[str] | None, typer.Option(help=f"one or more of {', '.join(DTYPES)}; f32 where left out", show_default=False)] = None,
    fmt: Annotated[list[str] | None, typer.Option("--format", help="nchw, nhwc; both where left out", show_default=False)] = None,
    batch: Annotated[str, typer.Option(help="batch sizes in place of the suite's, as in 1,8", show_default=False)] = "",
    peers: Annotated[str, typer.Option(help="compile, onnxruntime, openvino, or all; forward float32 only", show_default=False)] = "",
    threads: Annotated[int | None, typer.Option(help="threads of every engine; PyTorch's own number where left out", min=1, show_default=False)] = None,
    budget: Annotated[float, typer.Option(help="seconds of measuring for each contender of a row", min=0.0)] = 0.3,
    reference: Annotated[float, typer.Option(help="longest estimated time of a float64 reference; beyond it some channels are compared", min=0.0)] = 4.0,
    csv: Annotated[Path | None, typer.Option(help="file for the rows", show_default=False)] = None,
) -> None:
    """Time layers on faltung and on PyTorch, in turns in one process, after checking each result.

    Exits with 1 where a result was wrong: such a row has no time.
    """
    from ..bench.suites import expand, resolve, suite_names

    console = Console()
    if listing:
        console.print("\n".join(suite_names()), highlight=False)
        return
    if quick:
        names = [*(names or []), "quick"]
        budget = min(budget, QUICK_BUDGET)
    try:
        layers = resolve(names or ["baselines"])
        cases = expand(
            layers,
            directions=_choices("direction", direction, DIRECTIONS),
            dtypes=_choices("dtype", dtype or ["f32"], tuple(DTYPES)),
            formats=_choices("format", fmt, FORMATS),
            batches=[int(n) for n in batch.split(",") if n],
        )
        chosen = _peers(peers)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    rows = measure(cases, threads=threads, budget=budget, peers=chosen, csv=csv, reference=reference)
    show(console, rows)
    if csv is not None:
        console.print(f"{len(rows)} rows written to {csv}")
    if any(row.status != "ok" for row in rows):
        raise typer.Exit(1)


def measure(
    cases: Sequence[Case],
    *,
    threads: int | None = None,
    budget: float = 0.3,
    peers: tuple[str, ...] = (),
    csv: Path | None = None,
    reference: float = 4.0,
) -> list[Row]:
    """The rows of ``cases`` behind a progress bar; ``csv`` is written every few seconds, so an interrupted run keeps its rows."""
    import torch

    from ..bench.rows import environment, write_csv
    from ..bench.runner import run

    if threads is not None:
        torch.set_num_threads(threads)
    rows: list[Row] = []
    written = 0.0
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=Console(stderr=True), transient=True
    )  # fmt: skip
    with bar:
        task = bar.add_task("measuring", total=len(cases))
        for case, found in zip(cases, run(cases, environment(), budget=budget, peers=peers, reference=reference)):
            rows += found
            if csv is not None and (len(rows) == len(found) or time.monotonic() - written > _WRITE_SECONDS):
                write_csv(csv, rows)
                written = time.monotonic()
            bar.update(task, advance=1, description=f"{case.layer.name} {case.problem.direction} {case.problem.dtype}")
    if csv is not None:
        write_csv(csv, rows)
    return rows


def show(console: Console, rows: Sequence[Row], title: str = "") -> None:
    """Print the table of ``rows`` and its summary."""
    from ..bench.table import layer_table, summary

    table = layer_table(rows, title)
    if not console.is_terminal:  # a file or a pipe has no width: fold nothing
        console = Console(width=max(console.width, console.measure(table, options=console.options.update(width=400)).maximum))
    console.print(table)
    console.print(summary(rows), highlight=False)


def _choices(name: str, given: Sequence[str] | None, known: tuple[T, ...]) -> tuple[T, ...]:
    wanted = [part for text in given or known for part in text.split(",")]
    for text in wanted:
        if text not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {text!r}")
    return tuple(value for value in known if value in wanted)


def _peers(text: str) -> tuple[str, ...]:
    if not text:
        return ()
    from ..bench.peers import available

    names = available() if text == "all" else tuple(part for part in text.split(",") if part)
    missing = [name for name in names if name not in available()]
    if missing:
        raise ValueError(f"not installed, or no peer: {', '.join(missing)}; there are {', '.join(available())}; pip install 'faltung[bench]' brings the others")
    return names
