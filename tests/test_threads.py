"""Calls from several Python threads, thread counts that change, and child processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import cases
import faltung
import harness
from faltung import dispatch, testing
from faltung.problem import DIRECTIONS, ConvProblem

HERE = Path(__file__).parent


def _stated(direction: str) -> list[ConvProblem]:
    return [cases.problem(case, direction, "f32", fmt, "nchw") for case in cases.TARGET_CASES for fmt in ("nchw", "nhwc")]  # type: ignore[arg-type]


def test_many_python_threads_at_once() -> None:
    """Eight threads plan and launch the same problems at the same time; each must get the bits of a call by itself."""
    problems = [p for direction in DIRECTIONS for p in _stated(direction) if not (p.direction == "grad_input" and p.padding_mode != "zeros")]
    inputs = {p: testing.make_inputs(p) for p in problems}
    alone = {p: harness.launch(harness.plan_named("direct", p), inputs[p]) for p in problems}
    failures: list[str] = []
    barrier = threading.Barrier(8)
    ran = []

    def work(number: int) -> None:
        barrier.wait()
        for p in problems[number:] + problems[:number]:
            if not harness.equal_bits(alone[p], harness.launch(harness.plan_named("direct", p), inputs[p])):
                failures.append(str(p))
            ran.append(1)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert not failures
    assert len(ran) == 8 * len(problems)


@pytest.mark.parametrize("order", ("torch, sklearn.datasets", "sklearn.datasets, torch"))
def test_the_threads_are_those_of_pytorch(order: str) -> None:
    """With the OpenMP library of another package, which scikit-learn brings, every call would wake a second pool of threads."""
    code = (
        f"import {order}\n"
        "import ctypes, faltung\n"
        "from pathlib import Path\n"
        "from faltung.codegen.threads import openmp_addresses\n"
        "lines = Path('/proc/self/maps').read_text().splitlines()\n"
        "def owner(address):\n"
        "    for line in lines:\n"
        "        start, stop = (int(end, 16) for end in line.split()[0].split('-'))\n"
        "        if start <= address < stop:\n"
        "            return line.split()[-1]\n"
        "print(len({line.split()[-1] for line in lines if 'libgomp' in line}))\n"
        "print(*[owner(address) for address in openmp_addresses()], sep='\\n')\n"
        "torch.set_num_threads(3)\n"
        "torch.randn(1 << 20).exp()\n"
        "before = len(list(Path('/proc/self/task').iterdir()))\n"
        "faltung.conv2d(torch.randn(8, 16, 64, 64), torch.randn(16, 16, 3, 3))\n"
        "print(len(list(Path('/proc/self/task').iterdir())) - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    libraries, *owners, grown = done.stdout.splitlines()
    assert int(libraries) >= 2, "nothing to confuse"
    assert all(Path(owner).parent.name == "lib" and "torch" in owner for owner in owners), owners
    assert grown == "0"


def test_threads_that_compile_at_once(tmp_path: Path) -> None:
    """The first calls of all threads meet in an empty cache."""
    code = (
        "import threading, torch, faltung\n"
        "x, w = torch.randn(1, 5, 9, 11), torch.randn(7, 5, 3, 3)\n"
        "results = []\n"
        "threads = [threading.Thread(target=lambda: results.append(faltung.conv2d(x, w))) for _ in range(6)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "print(len(results), all(torch.equal(r, results[0]) for r in results), torch.allclose(results[0], torch.conv2d(x, w), atol=1e-4))\n"
    )
    assert _python(code, FALTUNG_CACHE_DIR=str(tmp_path)) == "6 True True\n"


def test_the_number_of_threads_may_change_between_calls() -> None:
    x, w = torch.randn(2, 5, 33, 35), torch.randn(9, 5, 3, 3)
    before = torch.get_num_threads()
    want = torch.conv2d(x, w, padding=1)
    results = []
    try:
        for count in (1, 2, 3, 1, 4, 2):
            torch.set_num_threads(count)
            results.append(faltung.conv2d(x, w, padding=1))
    finally:
        torch.set_num_threads(before)
    for result in results:
        torch.testing.assert_close(result, want)


def test_the_number_of_threads_may_change_while_others_call() -> None:
    x, w = torch.randn(2, 5, 33, 35), torch.randn(9, 5, 3, 3)
    want = torch.conv2d(x, w, padding=1)
    before = torch.get_num_threads()
    stop, failures, calls = threading.Event(), [], []

    def work() -> None:
        while not stop.is_set():
            if not torch.allclose(faltung.conv2d(x, w, padding=1), want, atol=1e-4):
                failures.append(1)
            calls.append(1)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    try:
        for count in (1, 2, 3, 4) * 10:
            torch.set_num_threads(count)
            stop.wait(0.01)
    finally:
        stop.set()
        for worker in workers:
            worker.join(60)
        torch.set_num_threads(before)
    assert not failures
    assert len(calls) >= 3


def _python(code: str, **environment: str) -> str:
    paths = os.pathsep.join([str(HERE), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths, **environment}, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("parent_calls_first", (True, False))
def test_a_forked_child_with_one_thread(parent_calls_first: bool) -> None:
    """OpenMP's threads do not survive a fork; with one thread the child needs none of them."""
    code = (
        "import os, torch, faltung\n"
        "x, w = torch.randn(2, 5, 33, 35), torch.randn(9, 5, 3, 3)\n"
        f"first = faltung.conv2d(x, w) if {parent_calls_first} else None\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    torch.set_num_threads(1)\n"
        "    y = faltung.conv2d(x, w)\n"
        "    ok = torch.allclose(y, torch.conv2d(x, w), atol=1e-4) and (first is None or torch.equal(y, first))\n"
        "    os._exit(7 if ok else 8)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), torch.allclose(faltung.conv2d(x, w), torch.conv2d(x, w), atol=1e-4))\n"
    )
    assert _python(code) == "7 True\n"


def test_a_spawned_child() -> None:
    code = (
        "import multiprocessing, sys\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        "import torch\n"
        "import spawned\n"
        "if __name__ == '__main__':\n"
        "    x, w = torch.randn(2, 5, 33, 35), torch.randn(9, 5, 3, 3)\n"
        "    with multiprocessing.get_context('spawn').Pool(2) as pool:\n"
        "        results = pool.map(spawned.convolve, [(x, w)] * 4)\n"
        "    print(all(torch.allclose(r, torch.conv2d(x, w), atol=1e-4) for r in results))\n"
    )
    assert _python(code) == "True\n"


def test_more_threads_than_tasks_and_than_cores() -> None:
    problem = ConvProblem.parse("n1c1h3w3k1r3s3 p1")
    inputs = testing.make_inputs(problem)
    one = harness.launch(harness.plan_named("direct", problem, 1), inputs)
    for threads in (2, 5, 16):
        assert harness.equal_bits(one, harness.launch(harness.plan_named("direct", problem, threads), inputs))


def test_threads_that_fill_the_cache_of_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_CACHE_LIMIT", 4)
    dispatch.clear()
    before = sys.getswitchinterval()

    def work(first: int) -> None:
        for i in range(first, first + 300):
            dispatch.decide(ConvProblem(1, 2, 4 + i % 23, 4, 2, 1, 1))

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(work, range(0, 84, 7)))
    finally:
        sys.setswitchinterval(before)
    assert len(dispatch._decisions) <= 4
    dispatch.clear()
