"""``faltung demo``: a network learns real digits on faltung's kernels, and then on PyTorch's."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from torch import nn

    from .training import Digits, Run

__all__ = ["LEAST_ACCURACY", "demo", "largest_difference", "run_both"]

LEAST_ACCURACY = 0.97


def demo(
    data: Annotated[str, typer.Option(help="digits (scikit-learn's, no network needed) or mnist (torchvision's, fetched)")] = "digits",
    epochs: Annotated[int | None, typer.Option(help="passes over the training images; 16 for digits, 1 for mnist", min=1, show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="of the split, the weights and the order of the images")] = 0,
    output: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("demo-output"),
    bench: Annotated[bool, typer.Option(help="end with the table of `faltung bench --quick`")] = True,
) -> None:
    """Train a small network on digits twice, on faltung and on stock PyTorch, from the same weights, and compare.

    Exits with 1 where either stays below 97 % test accuracy.
    """
    from . import pictures
    from .training import load

    console = Console()
    try:
        digits = load(data, seed, output)
    except ImportError as error:
        console.print(f"the demonstration needs scikit-learn and matplotlib (torchvision for mnist): pip install 'faltung[demo]' ({error})", highlight=False)
        raise typer.Exit(2) from None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    count = epochs or (1 if data == "mnist" else 16)
    console.print(f"{len(digits.train_x)} images of 28x28 to learn from, {len(digits.test_x)} to test on, {count} epochs", highlight=False)

    model, ours, stock = run_both(digits, epochs=count, seed=seed, console=console)
    console.print(comparison(ours, stock))
    pictures.kernels(model[0], output / "kernels.png")  # type: ignore[arg-type]
    pictures.feature_maps(model, digits.test_x[0], int(digits.test_y[0]), output / "feature-maps.png")
    console.print(f"learned kernels: {output / 'kernels.png'}\nfeature maps of one digit: {output / 'feature-maps.png'}", highlight=False)
    if bench:
        _layer_table(console)
    if min(ours.accuracy, stock.accuracy) < LEAST_ACCURACY:
        console.print(f"[bold red]test accuracy is below {LEAST_ACCURACY:.0%}[/]")
        raise typer.Exit(1)


def run_both(digits: Digits, *, epochs: int, seed: int, console: Console | None = None) -> tuple[nn.Sequential, Run, Run]:
    """Train on faltung and on stock PyTorch from equal weights: the model that faltung trained, and both runs.

    The two take turns by epochs: a machine that slows down meanwhile, or memory that is touched for the first time, costs both alike.
    """
    from torch import nn

    import faltung

    from .training import network, training

    models = []
    trainings = []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
        console=console,
        disable=console is None,
    ) as bar:
        for name, layer in [("faltung", faltung.Conv2d), ("stock PyTorch", nn.Conv2d)]:
            model = network(layer, seed)
            steps = epochs * -(-len(digits.train_x) // 64)
            task = bar.add_task(f"{name:<14}", total=steps, loss="")

            def advance(epoch: int, loss: float, task: object = task) -> None:
                bar.update(task, advance=1, loss=f"epoch {epoch}, loss {loss:.4f}")  # type: ignore[arg-type]

            trainings.append(training(model, digits, epochs=epochs, seed=seed, advance=advance))
            models.append(model)
        *_, (ours, stock) = zip(*trainings)
    return models[0], ours, stock


def comparison(ours: Run, stock: Run) -> Table:
    """Accuracy, time and agreement of two runs, for printing."""
    table = Table(title="The same training, twice", title_justify="left")
    table.add_column("")
    for name in ("faltung", "stock PyTorch"):
        table.add_column(name, justify="right")
    table.add_row("test accuracy", f"{ours.accuracy:.2%}", f"{stock.accuracy:.2%}")
    (first, *rest), (stock_first, *stock_rest) = ours.seconds, stock.seconds
    columns = (rest, stock_rest)
    table.add_row("first step, kernels made or loaded", f"{first:.2f} s", f"{stock_first:.2f} s")
    table.add_row(f"the other {len(rest)} steps", *(f"{sum(seconds):.2f} s" for seconds in columns))
    # what else the machine did meanwhile shows in the sum, hardly in the median
    table.add_row("median of those steps", *(f"{1e3 * median(seconds):.1f} ms" if seconds else "" for seconds in columns))
    table.add_row("loss of the last step", f"{ours.losses[-1]:.6f}", f"{stock.losses[-1]:.6f}")
    table.add_row("largest difference of the loss curves", f"{largest_difference(ours, stock):.1e}", "")
    return table


def largest_difference(ours: Run, stock: Run) -> float:
    """The largest difference of two runs' losses at one step."""
    return max(abs(a - b) for a, b in zip(ours.losses, stock.losses))


def _layer_table(console: Console) -> None:
    from ..bench.suites import expand, load_suite
    from .bench import QUICK_BUDGET, measure, show

    console.print()
    show(console, measure(expand(load_suite("quick")), budget=QUICK_BUDGET), title="Single layers, faltung against stock PyTorch")
