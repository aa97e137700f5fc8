"""The demonstration's two pictures: learned kernels and feature maps."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

__all__ = ["feature_maps", "kernels"]

_DPI = 150


def kernels(layer: nn.Conv2d, path: Path) -> None:
    """Save the kernels of a layer with one input channel as a grid; blue is negative, red positive, white zero."""
    from matplotlib.figure import Figure

    weights = layer.weight.detach().float()[:, 0]
    largest = float(weights.abs().max())
    columns = 8
    rows = -(-len(weights) // columns)
    figure = Figure(figsize=(columns * 0.9, rows * 0.9 + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    picture = None
    for i, axis in enumerate(axes.flat):
        axis.set_axis_off()
        if i < len(weights):
            picture = axis.imshow(weights[i].numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest)
    figure.suptitle(f"The {len(weights)} learned {weights.shape[1]}x{weights.shape[2]} kernels of the first layer")
    if picture is not None:
        figure.colorbar(picture, ax=axes, shrink=0.8)
    _save(figure, path)


def feature_maps(model: nn.Sequential, image: torch.Tensor, label: int, path: Path) -> None:
    """Save one image of shape (1, 28, 28) and what the model's two blocks make of it, after each activation."""
    from matplotlib.figure import Figure

    model.eval()
    with torch.inference_mode():
        first = model[:3](image[None])
        second = model[3:7](first)
        named = int(model[7:](second).argmax(1))
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=[1.0, 1.1, 2.0], squeeze=False)[0]
    axis = left.subplots()
    axis.imshow(image[0].numpy(), cmap="gray")
    axis.set_axis_off()
    left.suptitle(f"A test image: {label}, named {named}")
    _grid(middle, first[0], 4, f"After the first layer: {first.shape[1]} maps of {first.shape[2]}x{first.shape[3]}")
    _grid(right, second[0], 8, f"After the second layer: {second.shape[1]} maps of {second.shape[2]}x{second.shape[3]}")
    _save(figure, path)


def _grid(figure: object, maps: torch.Tensor, columns: int, title: str) -> None:
    rows = -(-len(maps) // columns)
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"wspace": 0.05, "hspace": 0.05})  # type: ignore[attr-defined]
    for i, axis in enumerate(axes.flat):
        axis.set_axis_off()
        if i < len(maps):
            axis.imshow(maps[i].numpy(), cmap="magma")
    figure.suptitle(title)  # type: ignore[attr-defined]


def _save(figure: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)  # type: ignore[attr-defined]
