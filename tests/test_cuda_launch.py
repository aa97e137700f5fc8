"""How the CUDA engine starts kernels: the first call Triton's way, later ones directly, with the same grid, kernel and arguments.

On a driver that starts nothing (see launch_child.py), so this says nothing about a GPU but what is handed to its driver.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
CHECKS = ("again", "alignment", "switches", "devices", "types", "debugging", "replaced", "forgotten", "other_makers", "truly")


@cache
def outcome() -> dict[str, list[str]]:
    """What went wrong in each check, from a process without the interpreter."""
    environment = {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    done = subprocess.run([sys.executable, str(HERE / "launch_child.py")], capture_output=True, text=True, env=environment, timeout=540, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    failures: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return failures


@pytest.mark.parametrize("check", CHECKS)
def test_launches(check: str) -> None:
    assert set(outcome()) == set(CHECKS)
    failures = outcome()[check]
    assert not failures, "\n".join(failures[:10])
