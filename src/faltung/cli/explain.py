"""``faltung explain``: which implementation runs a convolution, and why the others refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..problem import DIRECTIONS

if TYPE_CHECKING:
    from ..problem import Direction

__all__ = ["explain"]


def explain(
    names: Annotated[list[str], typer.Argument(help="problem strings such as 'n8c64h56w56k64r3s3 p1', suites, or torchvision models by name")],
    backward: Annotated[bool, typer.Option("--backward", help="also both gradients, where a text names no direction")] = False,
    measure: Annotated[bool, typer.Option("--measure", help="also time each on random operands")] = False,
) -> None:
    """Print who computes each convolution, with which tile, and why every other implementation refused."""
    import faltung

    from ..bench.suites import expand, resolve

    try:
        layers = resolve(names)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    directions: tuple[Direction, ...] = DIRECTIONS if backward else ("forward",)
    console = Console()
    for case in expand(layers, directions=directions, formats=("nchw",)):
        if len(layers) > 1:
            console.rule(f"{case.layer.name} x{case.layer.count}", align="left")
        for fmt in case.formats:
            explanation = faltung.explain(case.in_format(fmt), measure=measure)
            console.print(str(explanation), highlight=False, markup=False, soft_wrap=True)
