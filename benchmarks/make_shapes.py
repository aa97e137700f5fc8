"""Writes the suites under src/faltung/bench/shapes from the networks they are named after.

    python benchmarks/make_shapes.py [name ...]

Networks that torchvision has are recorded from it; the others are listed below, from their papers.  The baselines, the quick suite and the digit
network's suite are written by hand and are not touched.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from faltung.bench.suites import Layer, record
from faltung.problem import ConvProblem, Epilogue

FOLDER = Path(__file__).parent.parent / "src" / "faltung" / "bench" / "shapes"

TORCHVISION = {
    "resnet18": 224,
    "resnet50": 224,
    "vgg16": 224,
    "resnext50_32x4d": 224,
    "mobilenet_v2": 224,
    "mobilenet_v3_large": 224,
    "efficientnet_b0": 224,
    "convnext_tiny": 224,
    "fcn_resnet50": 256,
}


def conv(
    name: str,
    count: int,
    c: int,
    size: int,
    k: int,
    r: int,
    *,
    stride: int = 1,
    padding: int | None = None,
    g: int = 1,
    mode: str = "zeros",
    bias: bool = False,
) -> Layer:
    """A square layer at batch 1; the padding is half the kernel unless it is given."""
    p = r // 2 if padding is None else padding
    problem = ConvProblem(1, c, size, size, k, r, r, (stride, stride), (p, p, p, p), g=g, padding_mode=mode, epilogue=Epilogue(bias))
    return Layer("", name, count, problem)


def replknet31b() -> Iterator[Layer]:
    """RepLKNet-31B at 224x224: four stages of large depthwise kernels; the 5x5 branch exists in training and is folded in for inference."""
    yield conv("stem.conv3x3", 1, 3, 224, 128, 3, stride=2)
    yield conv("stem.dw3x3", 1, 128, 112, 128, 3, g=128)
    yield conv("stem.conv1x1", 1, 128, 112, 128, 1)
    yield conv("stem.dw3x3s2", 1, 128, 112, 128, 3, stride=2, g=128)
    stages = [(128, 56, 31, 2), (256, 28, 29, 2), (512, 14, 27, 18), (1024, 7, 13, 2)]
    for i, (c, size, kernel, blocks) in enumerate(stages):
        yield conv(f"stages.{i}.pw", 2 * blocks, c, size, c, 1)
        yield conv(f"stages.{i}.large", blocks, c, size, c, kernel, g=c)
        yield conv(f"stages.{i}.branch5x5", blocks, c, size, c, 5, g=c)
        yield conv(f"stages.{i}.ffn.up", blocks, c, size, 4 * c, 1)
        yield conv(f"stages.{i}.ffn.down", blocks, 4 * c, size, c, 1)
        if i < 3:
            yield conv(f"transitions.{i}.pw", 1, c, size, 2 * c, 1)
            yield conv(f"transitions.{i}.dw", 1, 2 * c, size, 2 * c, 3, stride=2, g=2 * c)


def unet() -> Iterator[Layer]:
    """U-Net with padded 3x3 layers at 256x256, 64 to 1024 channels; its transposed convolutions are not convolutions of this kind."""
    c, size = 3, 256
    for i, k in enumerate([64, 128, 256, 512, 1024]):
        yield conv(f"down{i}.conv1", 1, c, size, k, 3, bias=True)
        yield conv(f"down{i}.conv2", 1 if i == 4 else 2, k, size, k, 3, bias=True)  # the way up has the same second layer
        c, size = k, size // 2
    for i, k in enumerate([512, 256, 128, 64]):
        yield conv(f"up{3 - i}.conv1", 1, 2 * k, 32 << i, k, 3, bias=True)
    yield conv("head", 1, 64, 256, 2, 1, bias=True)


def yolo() -> Iterator[Layer]:
    """A small YOLO-style detector at 640x640: cross-stage-partial backbone, pyramid neck and a decoupled head with 80 classes."""
    yield conv("stem", 1, 3, 640, 32, 3, stride=2)
    size, c = 320, 32
    for i, (k, blocks) in enumerate([(64, 1), (128, 2), (256, 2), (512, 1)]):
        yield conv(f"stage{i}.down", 1, c, size, k, 3, stride=2)
        size, c = size // 2, k
        yield conv(f"stage{i}.in", 1, k, size, k, 1)
        yield conv(f"stage{i}.block", 2 * blocks, k // 2, size, k // 2, 3)
        yield conv(f"stage{i}.out", 1, (2 + blocks) * k // 2, size, k, 1)
    yield conv("pool.in", 1, 512, 20, 256, 1)
    yield conv("pool.out", 1, 1024, 20, 512, 1)
    for name, wide, k, size in [("neck.p4", 768, 256, 40), ("neck.p3", 384, 128, 80), ("neck.n4", 384, 256, 40), ("neck.n5", 768, 512, 20)]:
        yield conv(f"{name}.in", 1, wide, size, k, 1)
        yield conv(f"{name}.block", 2, k // 2, size, k // 2, 3)
        yield conv(f"{name}.out", 1, 3 * k // 2, size, k, 1)
    yield conv("neck.n4.down", 1, 128, 80, 128, 3, stride=2)
    yield conv("neck.n5.down", 1, 256, 40, 256, 3, stride=2)
    for c, size in [(128, 80), (256, 40), (512, 20)]:
        yield conv(f"head{size}.box.in", 1, c, size, 64, 3)
        yield conv(f"head{size}.box.mid", 1, 64, size, 64, 3)
        yield conv(f"head{size}.box.out", 1, 64, size, 64, 1, bias=True)
        yield conv(f"head{size}.class.in", 1, c, size, 128, 3)
        yield conv(f"head{size}.class.mid", 1, 128, size, 128, 3)
        yield conv(f"head{size}.class.out", 1, 128, size, 80, 1, bias=True)


def style_transfer() -> Iterator[Layer]:
    """A feed-forward style-transfer network at 256x256, padded by reflection throughout."""
    yield conv("in", 1, 3, 256, 32, 9, mode="reflect", bias=True)
    yield conv("down1", 1, 32, 256, 64, 3, stride=2, mode="reflect", bias=True)
    yield conv("down2", 1, 64, 128, 128, 3, stride=2, mode="reflect", bias=True)
    yield conv("residual", 10, 128, 64, 128, 3, mode="reflect", bias=True)
    yield conv("up1", 1, 128, 128, 64, 3, mode="reflect", bias=True)
    yield conv("up2", 1, 64, 256, 32, 3, mode="reflect", bias=True)
    yield conv("out", 1, 32, 256, 3, 9, mode="reflect", bias=True)


WRITTEN = {"replknet31b": replknet31b, "unet": unet, "yolo": yolo, "style_transfer": style_transfer}


def layers_of(name: str) -> list[Layer]:
    """The layers of a network, equal ones counted together under the first one's name."""
    if name in WRITTEN:
        layers = list(WRITTEN[name]())
    elif name == "fcn_resnet50":
        from torchvision.models.segmentation import fcn_resnet50

        layers = record(fcn_resnet50(weights=None, weights_backbone=None), (1, 3, TORCHVISION[name], TORCHVISION[name]))
    else:
        from torchvision.models import get_model

        layers = record(get_model(name, weights=None), (1, 3, TORCHVISION[name], TORCHVISION[name]))
    merged: dict[ConvProblem, Layer] = {}
    for layer in layers:
        known = merged.get(layer.problem)
        merged[layer.problem] = Layer("", known.name if known else layer.name, layer.count + (known.count if known else 0), layer.problem)
    return list(merged.values())


def write(name: str) -> None:
    """Write the file of one suite."""
    layers = layers_of(name)
    source = "recorded from torchvision" if name in TORCHVISION else "after its paper"
    head = f"# {name}, batch 1, {source}: {sum(layer.count for layer in layers)} convolutions, {len(layers)} distinct; see benchmarks/make_shapes.py\n"
    rows = [(layer.name, f"x{layer.count}", str(layer.problem).removeprefix("forward f32 nchw ")) for layer in layers]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    body = "".join(f"{a:<{widths[0]}} {b:<{widths[1]}} {c}\n" for a, b, c in rows)
    (FOLDER / f"{name}.txt").write_text(head + body, encoding="utf-8")


if __name__ == "__main__":
    for suite in sys.argv[1:] or [*TORCHVISION, *WRITTEN]:
        write(suite)
