"""PyTorch's own convolution tests, with faltung in the place of PyTorch's two-dimensional convolution.

``python tests/upstream.py [FILE] [options of pytest]`` runs the CPU tests of FILE, a copy of PyTorch's ``test/nn/test_convolution.py``; without one
it fetches the file that belongs to the installed PyTorch.  The exit status is pytest's, or 1 where no test reached a kernel of faltung's.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import faltung
from faltung.prepared import Prepared

URL = "https://raw.githubusercontent.com/pytorch/pytorch/v{version}/test/nn/test_convolution.py"

LEFT_OUT = {
    r"[cC]onv_?(1d|3d|tbc)|3D_input": "one or three dimensions, which faltung leaves to PyTorch",
    r"[cC]onv_?[tT]ranspose(?!2d_output_size_downsample)": "transposed convolutions, which faltung leaves to PyTorch (one of them builds on Conv2d, and runs)",
    r"conv_backend": "asks which of PyTorch's own backends is chosen, and calls aten.convolution by name",
    r"backcompat": "downloads a module that PyTorch 1.0 saved",
}
"""Why a test whose name matches is not run.  Those that need a GPU skip themselves."""

IN_FLOAT64 = {
    r"functional_grad_conv2d": "compares sums of up to 4096 products with those of torch.nn.grad more closely than float32 keeps sums in another order",
}
"""Why a test whose name matches runs with float64 as the default type."""


class Names:
    """A module in which some names mean something else."""

    def __init__(self, module: ModuleType, **names: Any) -> None:
        vars(self).update(names, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def substitute(module: ModuleType) -> None:
    """Let every name of ``module`` that leads to PyTorch's ``Conv2d`` or ``conv2d`` lead to faltung's; torch itself stays as it is."""
    functional = Names(torch.nn.functional, conv2d=faltung.conv2d)
    nn = Names(torch.nn, Conv2d=faltung.Conv2d, LazyConv2d=faltung.LazyConv2d, functional=functional)
    ours = {torch: Names(torch, nn=nn, conv2d=faltung.conv2d), torch.nn: nn, torch.nn.functional: functional}
    ours |= {torch.conv2d: faltung.conv2d, torch.nn.Conv2d: faltung.Conv2d, torch.nn.LazyConv2d: faltung.LazyConv2d}
    for name, value in list(vars(module).items()):
        try:
            setattr(module, name, ours.get(value, value))
        except TypeError:  # what has no hash is none of these
            continue


def _reason(reasons: dict[str, str], name: str) -> str | None:
    return next((why for pattern, why in reasons.items() if re.search(pattern, name)), None)


class Substitution:
    """The plugin of pytest that puts faltung into the collected modules, chooses the tests, and counts launches of faltung's kernels."""

    def __init__(self) -> None:
        self.notes: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.passed: list[str] = []

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[Any]) -> None:
        for module in {item.module for item in items}:
            substitute(module)
        left_out = [item for item in items if _reason(LEFT_OUT, item.name)]
        self.notes.update(f"left out: {_reason(LEFT_OUT, item.name)}" for item in left_out)
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        run, dtype, wider = Prepared._run, torch.get_default_dtype(), _reason(IN_FLOAT64, item.name)

        def counted(*args: Any) -> None:
            self.launches[item.name] += 1
            run(*args)

        Prepared._run = counted  # type: ignore[method-assign]
        torch.set_default_dtype(torch.float64 if wider else dtype)
        self.notes.update([f"in float64: {wider}"] if wider else [])
        try:
            yield
        finally:
            Prepared._run = run  # type: ignore[method-assign]
            torch.set_default_dtype(dtype)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.passed.append(report.nodeid.rpartition("::")[2])

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for note, count in self.notes.items():
            terminalreporter.write_line(f"{count} {note}")
        without = [name for name in self.passed if not self.launches[name]]
        ran = f"{len(self.passed) - len(without)} of {len(self.passed)} tests that passed launched kernels of faltung, {sum(self.launches.values())} times"
        names = ", ".join(sorted({name.partition("_cpu")[0] for name in without}))
        terminalreporter.write_line(f"{ran}; the others are about errors, empty tensors, or types without kernels{names and ': '}{names}")


def fetch(folder: Path, url: str = URL) -> Path:
    """The file of the installed PyTorch's release; SystemExit where it cannot be had."""
    url, path = url.format(version=torch.__version__.partition("+")[0]), folder / "test_convolution.py"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            path.write_bytes(answer.read())
    except OSError as error:
        sys.exit(f"cannot fetch {url}: {error}\nGet the file elsewhere, and run: {sys.executable} {__file__} FILE   (make upstream UPSTREAM=FILE)")
    return path


def main(arguments: list[str]) -> int:
    given = Path(arguments.pop(0)) if arguments and not arguments[0].startswith("-") else None
    with tempfile.TemporaryDirectory() as folder:
        # a copy, so that no settings of the place where it lies count
        path = fetch(Path(folder)) if given is None else Path(shutil.copy(given, folder))
        # both are read while PyTorch's test utilities are imported: tests of the CPU would run on a GPU too
        os.environ.update(CUDA_VISIBLE_DEVICES="", PYTORCH_TESTING_DEVICE_ONLY_FOR="cpu")
        plugin = Substitution()
        options = ["-c", os.devnull, "--rootdir", folder, "--noconftest", "-p", "no:cacheprovider", "-q", "-rs", "--disable-warnings"]
        status = int(pytest.main([*options, *arguments, str(path)], [plugin]))
    return status or int(not plugin.launches)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
