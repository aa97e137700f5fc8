"""``faltung explain``: which implementation runs a convolution, and why the others refused."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

__all__ = ["explain"]


def explain(
    names: Annotated[list[str], typer.Argument(help="problem strings such as 'n8c64h56w56k64r3s3 p1', suites, or torchvision models by name")],
) -> None:
    """Print who computes each convolution, with which tile, and why every other implementation refused."""
    import faltung

    from ..bench.suites import resolve

    try:
        layers = resolve(names)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    console = Console()
    for layer in layers:
        if len(layers) > 1:
            console.rule(f"{layer.name} x{layer.count}", align="left")
        console.print(str(faltung.explain(layer.problem)), highlight=False, markup=False, soft_wrap=True)
