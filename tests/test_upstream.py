"""What runs PyTorch's own tests on faltung: its substitution of names, its choice of tests, its exit status."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import faltung
from upstream import fetch, main, substitute

SCRIPT = Path(__file__).with_name("upstream.py")
HEAD = """
import unittest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import Conv2d

class TestSome(unittest.TestCase):
"""
GOOD = """
    def test_names(self):
        classes = torch.nn.Conv2d, nn.Conv2d, Conv2d
        functions = torch.conv2d, F.conv2d, nn.functional.conv2d, torch.nn.functional.conv2d, getattr(F, "conv2d")
        assert {c.__module__ for c in classes} == {"faltung.nn"}
        assert {f.__module__ for f in functions} == {"faltung.functional"}

    def test_layer(self):
        y = nn.Conv2d(2, 3, 3)(torch.ones(1, 2, 4, 4))
        assert isinstance(y, torch.Tensor) and y.shape == (1, 3, 2, 2)

    def test_functional_grad_conv2d(self):
        assert F.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2)).dtype == torch.float64

    def test_conv3d(self):
        raise AssertionError("another dimension")

    def test_ConvTranspose2d_output_size_downsample(self):
        assert nn.ConvTranspose2d is torch.nn.modules.conv.ConvTranspose2d
"""
BAD = """
    def test_wrong(self):
        assert F.conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)).item() == 5
"""


def test_every_way_to_the_names_leads_to_faltung_and_torch_is_left_alone() -> None:
    module = ModuleType("some")
    module.__dict__.update(torch=torch, n=torch.nn, F=torch.nn.functional, Conv2d=torch.nn.Conv2d, conv=torch.conv2d, Linear=torch.nn.Linear, numbers=[1])
    substitute(module)
    classes = {module.torch.nn.Conv2d, module.n.Conv2d, module.Conv2d}
    functions = {module.torch.conv2d, module.torch.nn.functional.conv2d, module.n.functional.conv2d, module.F.conv2d, module.conv}
    assert classes == {faltung.Conv2d}
    assert functions == {faltung.conv2d}
    assert module.torch.nn.LazyConv2d is module.n.LazyConv2d is faltung.LazyConv2d
    assert (module.Linear, module.numbers) == (torch.nn.Linear, [1])
    assert module.F.conv3d is torch.conv3d
    assert module.torch.float32 is torch.float32
    assert torch.nn.Conv2d is not faltung.Conv2d
    assert torch.nn.functional.conv2d is torch.conv2d is not faltung.conv2d


@pytest.mark.parametrize(("tests", "status", "result"), [(GOOD, 0, "4 passed, 1 deselected"), (GOOD + BAD, 1, "1 failed, 4 passed, 1 deselected")])
def test_a_file_of_tests_runs_on_faltung(tests: str, status: int, result: str, tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(HEAD + tests)
    run = subprocess.run([sys.executable, str(SCRIPT), str(file)], capture_output=True, text=True, check=False)
    assert run.returncode == status, run.stdout + run.stderr
    assert result in run.stdout
    assert "1 left out: one or three dimensions" in run.stdout
    assert "1 in float64" in run.stdout
    assert "2 of 4 tests that passed launched kernels of faltung" in run.stdout


def test_a_run_without_faltung_fails(tmp_path: Path) -> None:
    file = tmp_path / "test_none.py"
    file.write_text(HEAD + "    def test_nothing(self):\n        pass\n")
    run = subprocess.run([sys.executable, str(SCRIPT), str(file), "-k", "nothing"], capture_output=True, text=True, check=False)
    assert "1 passed" in run.stdout
    assert run.returncode == 1


def test_what_cannot_be_fetched_or_read_says_what_to_do(tmp_path: Path) -> None:
    version = torch.__version__.partition("+")[0]
    with pytest.raises(SystemExit, match=rf"(?s)cannot fetch file:.*none-{version}.*run: .*upstream\.py FILE"):
        fetch(tmp_path, tmp_path.as_uri() + "/none-{version}")
    (tmp_path / f"there-{version}").write_text("text")
    assert fetch(tmp_path, tmp_path.as_uri() + "/there-{version}").read_text() == "text"
    with pytest.raises(FileNotFoundError):
        main([str(tmp_path / "missing.py")])
