"""The CUDA engine's arithmetic, on the CPU in Triton's interpreter: every kernel, direction, type, padding mode and format.

A section runs in a process of its own (see cuda_child.py): whether kernels are interpreted is decided when Triton is imported.  bfloat16 operands are
widened to float32 there, so the interpreter says nothing about how a GPU rounds bfloat16.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent

RAN = {
    "igemm": 100,
    "igemm_tiles": 62,
    "igemm_weight": 82,
    "packed": 43,
    "depthwise": 70,
    "depthwise_weight": 40,
    "banded": 46,
    "banded_weight": 20,
    "stem": 20,
    "folded": 38,
    "accuracy": 30,
    "nonfinite": 5,
    "engine": 17,
    "tuning": 5,
    "wide": 66,
}
"""Problems that each section runs: a check that silently runs none must not pass."""


def run_child(section: str) -> dict[str, Any]:
    """The outcome of one section."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    done = subprocess.run([sys.executable, str(HERE / "cuda_child.py"), section], capture_output=True, text=True, env=environment, timeout=540, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


def version(package: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in package.__version__.split(".")[:2])


@pytest.mark.skipif(
    version(triton) < (3, 7) and version(np) >= (2, 4),
    reason="before 3.7 Triton's interpreter turns loop bounds into integers in a way that NumPy 2.4 refuses (arrays of one dimension)",
)
@pytest.mark.parametrize("section", RAN)
def test_section(section: str) -> None:
    outcome = run_child(section)
    assert not outcome["failures"], f"{len(outcome['failures'])} failed:\n" + "\n".join(outcome["failures"][:20])
    assert outcome["ran"] == RAN[section]
    assert outcome["refused"] == 0


def test_without_the_interpreter_cpu_tensors_are_refused() -> None:
    script = (
        "import torch, faltung\n"
        "with faltung.config.override(engine='cuda'):\n"
        "    try:\n"
        "        faltung.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3))\n"
        "    except RuntimeError as error:\n"
        "        print(error)\n"
    )
    environment = {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120, check=True)
    assert "engine is set to 'cuda', but got a tensor on cpu" in done.stdout


def test_without_triton_the_package_works() -> None:
    script = (
        "import importlib.abc, importlib.util, sys\n"
        "class Hidden(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'triton':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "importlib.util.find_spec = lambda name, package=None, find=importlib.util.find_spec: None if name == 'triton' else find(name, package)\n"
        "import torch, faltung\n"
        "from faltung import dispatch\n"
        "y = faltung.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3))\n"
        "print(y.item(), dispatch.available('cuda'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.stdout == "9.0 False\n", done.stdout + done.stderr[-2000:]
