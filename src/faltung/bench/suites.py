"""Which convolutions are measured: suites in text files, problem strings, and the layers of a model.

A suite's file has one layer a line, ``name xCOUNT problem``, where ``COUNT`` says how often the layer occurs in its network and the problem is
what :meth:`ConvProblem.parse` reads.  A line that names a direction, an element type or a format is measured in that one only; what a line
leaves open is filled in by :func:`expand`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import TYPE_CHECKING

from ..arguments import check_problem
from ..problem import DIRECTIONS, DTYPES, FORMATS, ConvProblem, Direction, Format

if TYPE_CHECKING:
    from importlib.abc import Traversable

    import torch

__all__ = ["EVERY", "Case", "Layer", "expand", "load_suite", "parse_layer", "record", "resolve", "suite_names"]


EVERY = "all"
"""The name for the layers of all suites."""


@dataclass(frozen=True)
class Layer:
    """One line of a suite.  ``fixed``: the parts of the problem that its text named (directions, types, formats)."""

    suite: str
    name: str
    count: int
    problem: ConvProblem
    fixed: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"{self.name} x{self.count} {self.problem}"


@dataclass(frozen=True)
class Case:
    """What is timed together: one layer in one direction and type, in each of ``formats``."""

    layer: Layer
    problem: ConvProblem
    formats: tuple[Format, ...]

    def in_format(self, fmt: Format) -> ConvProblem:
        """The problem with activations and weights in ``fmt``, as ``model.to(memory_format=...)`` leaves them."""
        return replace(self.problem, format=fmt, weight_format=fmt)


def suite_names() -> tuple[str, ...]:
    """The suites that come with the package."""
    return tuple(sorted(entry.name[: -len(".txt")] for entry in _folder().iterdir() if entry.name.endswith(".txt")))


def load_suite(name: str) -> list[Layer]:
    """The layers of a suite.  Raises ValueError for an unknown name or a line that cannot be read."""
    if name not in suite_names():
        raise ValueError(f"no suite is named {name!r}; there are {', '.join(suite_names())}")
    lines = (_folder() / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [parse_layer(line, name) for line in lines if line.strip() and not line.startswith("#")]


def parse_layer(line: str, suite: str = "") -> Layer:
    """The layer of one line; raises ValueError where it has another form."""
    found = re.fullmatch(r"(\S+)\s+x(\d+)\s+(.+)", line.strip())
    if not found:
        raise ValueError(f"a layer is written 'name xCOUNT problem'; got {line!r}")
    return _layer(suite, found[1], int(found[2]), found[3])


def resolve(names: Iterable[str]) -> list[Layer]:
    """The layers that the command line asks for: suites by name, ``all`` of them, problem strings, torchvision models by name, in this order of trial.

    Raises ValueError for a text that is none of them.
    """
    layers: list[Layer] = []
    for name in names:
        if name in suite_names():
            layers += load_suite(name)
        elif name == EVERY:
            layers += _every_layer()
        elif re.search(r"\bn\d+c\d+h\d+w\d+k\d+r\d+s\d+\b", name):
            layers.append(_layer("command line", "problem", 1, name))
        else:
            layers += _torchvision_layers(name)
    return layers


def expand(
    layers: Iterable[Layer],
    *,
    directions: Sequence[Direction] = DIRECTIONS,
    dtypes: Sequence[str] = ("f32",),
    formats: Sequence[Format] = FORMATS,
    batches: Sequence[int] = (),
) -> list[Case]:
    """Every case of ``layers``: each direction, type and batch size that a layer's text does not fix itself; no batches: as written.

    Raises ValueError for a batch size that is not positive.
    """
    if any(n < 1 for n in batches):
        raise ValueError(f"batch sizes must be positive; got {', '.join(map(str, batches))}")
    cases: list[Case] = []
    for layer in layers:
        at = layer.problem
        for n in batches or (at.n,):
            for dtype in [at.dtype] if layer.fixed & set(DTYPES) else dtypes:
                for direction in [at.direction] if layer.fixed & set(DIRECTIONS) else directions:
                    bias = at.epilogue.bias and direction != "grad_input"
                    problem = replace(at, n=n, dtype=dtype, format="nchw", weight_format="nchw").with_direction(direction, bias=bias)
                    cases.append(Case(layer, problem, (at.format,) if layer.fixed & set(FORMATS) else tuple(formats)))
    return cases


def record(model: torch.nn.Module, input_shape: Sequence[int], suite: str = "model") -> list[Layer]:
    """Each distinct convolution that ``model`` runs on an input of ``input_shape``, named after its first module, with its repeat count.

    Runs on the ``meta`` device: no arithmetic, no memory.  The model is moved there; pass one that is not needed any more.
    """
    import torch

    found: dict[ConvProblem, tuple[str, int]] = {}

    def hook(name: str) -> object:
        def see(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            assert isinstance(module, torch.nn.Conv2d)
            problem = _problem_of(module, inputs[0])
            first, count = found.get(problem, (name, 0))
            found[problem] = (first, count + 1)

        return see

    handles = [m.register_forward_pre_hook(hook(name)) for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)]  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            model.to("meta").eval()(torch.empty(tuple(input_shape), device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    return [Layer(suite, name or "conv", count, problem) for problem, (name, count) in found.items()]


def _problem_of(module: torch.nn.Conv2d, x: torch.Tensor) -> ConvProblem:
    from ..problem import Epilogue, same_padding

    n, c, h, w = x.shape
    r, s = module.kernel_size
    dilation = (module.dilation[0], module.dilation[1])
    if module.padding == "same":
        padding = same_padding((r, s), dilation)
    elif isinstance(module.padding, str):
        padding = (0, 0, 0, 0)
    else:
        rows, columns = module.padding
        padding = (columns, columns, rows, rows)
    return ConvProblem(
        n, c, h, w, module.out_channels, r, s, (module.stride[0], module.stride[1]), padding, dilation, module.groups,
        padding_mode=module.padding_mode, epilogue=Epilogue(bias=module.bias is not None),
    )  # fmt: skip


def _every_layer() -> list[Layer]:
    """The layers of every network's suite; what several networks have, once, under the first one's name."""
    found: dict[str, Layer] = {}
    for suite in suite_names():
        if suite not in ("baselines", "quick"):  # made for other ends, of layers that most networks have
            for layer in load_suite(suite):
                found.setdefault(str(replace(layer.problem, n=1)), layer)
    return list(found.values())


def _torchvision_layers(name: str) -> list[Layer]:
    try:
        from torchvision.models import get_model, list_models
    except Exception as error:  # a torchvision built for another torch fails with RuntimeError
        raise ValueError(f"{name!r} is no suite ({', '.join(suite_names())}) and no problem string, and torchvision cannot be imported: {error}") from error
    if name not in list_models():
        raise ValueError(f"{name!r} is no suite ({', '.join(suite_names())}), no problem string and no model of torchvision")
    options = {"weights_backbone": None} if "fcn" in name or "deeplab" in name or "lraspp" in name else {}
    return record(get_model(name, weights=None, **options), (1, 3, 224, 224), name)


def _layer(suite: str, name: str, count: int, text: str) -> Layer:
    fixed = frozenset(text.split()) & {*DIRECTIONS, *DTYPES, *FORMATS}
    problem = ConvProblem.parse(text)
    check_problem(problem)
    return Layer(suite, name, count, problem, fixed)


def _folder() -> Traversable:
    return resources.files(__package__) / "shapes"
