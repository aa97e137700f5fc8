"""No byte outside of an operand or of the workspace is read or written: each lies against a page whose touch ends the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cases
from faltung.problem import DIRECTIONS, DTYPES, FORMATS, ConvProblem
from implementations import applicable, families

HERE = Path(__file__).parent
EDGES = (
    "n1c1h1w1k1r1s1",
    "n1c3h7w9k4r2s2",
    "n1c5h4w15k3r3s3 p1",
    "n1c5h4w17k9r3s3 p1",
    "n1c15h3w16k17r3s3 p1",
    "n1c17h3w5k15r3s3 p0,1,1,0",
    "n2c9h5w7k10r1s1",
    "n1c9h5w10k40r1s1",
    "n1c4h9w33k5r3s3 st2 p1",
    "n1c4h9w19k5r3s3 st3x4 p1",
    "n1c3h9w34k3r2s3 st2 d1x3",
    "n1c4h5w6k6r3s3 p1 g2",
    "n1c18h5w17k17r3s3 p1",
    "n1c4h9w40k16r5s5 st2",
    "n1c1h7w75k17r4s3 st2 p0,1,0,1",
    "n1c34h5w6k34r3s3 p1 g17",
    "n1c7h6w9k7r3s3 p1 g7",
    "n1c3h9w17k3r5s5 p2 st2 g3",
    "n1c3h9w33k6r3s3 p1 g3",
    "n1c3h5w6k4r3s3 p2,1,1,2 reflect",
    "n1c3h5w17k4r3s3 p1 st2 circular",
    "n1c4h5w17k4r3s3 p1 g4 replicate",
)
"""Sizes whose last vector is partial, or whole up to the last byte."""


def run_child(side: str, runs: list[tuple[str, str]], threads: int = 1) -> None:
    """Runs of ``guard_child``; raises AssertionError that names the problem at which it ended."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    order = json.dumps({"side": side, "threads": threads, "runs": runs})
    done = subprocess.run(
        [sys.executable, str(HERE / "guard_child.py")], input=order, capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    lines = done.stdout.split("\n")[:-1] or ["nothing was run"]
    assert done.returncode == 0, f"ended with {done.returncode} at: {lines[-1]}\n{done.stderr[-3000:]}"
    assert lines[-1] == f"done {len(runs)}", lines[-1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ("end", "start"))
def test_operands_against_forbidden_pages(side: str, dtype: str) -> None:
    runs = []
    for position, case in enumerate((*EDGES, *cases.TARGET_CASES)):
        for direction in DIRECTIONS:
            for turn, fmt in enumerate(FORMATS):
                problem = cases.problem(case, direction, dtype, fmt, FORMATS[(position + turn) % 2], bias=direction != "grad_input")
                runs += [(name, str(problem)) for name in applicable(problem)]
    assert len(runs) > 6 * (len(EDGES) + len(cases.TARGET_CASES))
    assert {name for name, _ in runs} >= families(dtype) - (set() if dtype == "f32" else {"winograd"})
    run_child(side, runs, threads=2)


def test_the_guard_would_be_seen() -> None:
    """A kernel that is told of a larger image than it has reads the forbidden page: the child must die, and say where."""
    script = (
        "import guard_child, harness\n"
        "from faltung.problem import ConvProblem\n"
        "plan = harness.plan_named('direct', ConvProblem.parse('n1c8h32w32k8r3s3'))\n"
        "small = guard_child.Guarded(4096, 'end')\n"
        "rest = [guard_child.Guarded(1 << 16, 'end') for _ in range(2)]\n"
        "print('reached', flush=True)\n"
        "plan.launch(small.address, rest[0].address, 0, rest[1].address)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.stdout == "reached\n", done.stderr
    assert done.returncode == -11


def test_problem_strings_survive_the_way_to_the_child() -> None:
    for case in EDGES:
        problem = cases.problem(case, "grad_weight", "bf16", "nhwc", "nhwc", bias=True)
        assert ConvProblem.parse(str(problem)) == problem
