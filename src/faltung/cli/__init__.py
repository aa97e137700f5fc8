"""The command line: ``faltung demo``, ``bench``, ``explain``, ``info``."""

from __future__ import annotations

import typer

from . import bench, demo, explain, info

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, help="Convolutions on faltung's kernels.")
app.command("demo")(demo.demo)
app.command("bench")(bench.bench)
app.command("explain")(explain.explain)
app.command("info")(info.info)


def main() -> None:
    """The ``faltung`` command."""
    app()
