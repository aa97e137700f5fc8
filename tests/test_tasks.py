"""How a kernel's threads share its tasks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from faltung.codegen.emit import Function, Module, Value
from faltung.codegen.entry import ENTRY_ARGUMENTS, ArgumentBlock, Task, emit_entry
from faltung.codegen.load import load
from faltung.cpu.target import host_target

_ARGUMENTS = ArgumentBlock(("first_tasks", "tasks", "turns", "scratch_at", "scratch_size"))
_FRONT = 5  # tasks of the first stage
_RECORD = 4 * 8  # bytes for each task: how often it ran, its thread, when, the sum that its thread's front has


def _emit() -> Module:
    """Task ``i`` of the first stage leaves ``i + 1`` in the workspace; one of the second writes its record and lasts a while."""
    module = Module()

    def first(f: Function, task: Task) -> Callable[[Value], None]:
        return lambda i: f.store(f.load(task.workspace + i * 8) + (i + 1), task.workspace + i * 8)

    def second(f: Function, task: Task) -> Callable[[Value], None]:
        f.store(f.load(task.scratch) + 1, task.scratch)  # once a thread and call

        def body(index: Value) -> None:
            record = task.operand("out") + index * _RECORD
            f.store(f.load(record) + 1, record)
            f.store(task.thread, record + 8)
            f.store(f.fetch_add(task.operand("other"), 1), record + 16)
            (total,) = f.loop(0, _FRONT, 1, lambda i, s: [s + f.load(task.workspace + i * 8)], [f.value(0)])
            f.store(total, record + 24)
            f.loop(0, task["turns"], 1, lambda _: f.barrier())

        return body

    emit_entry(module, _ARGUMENTS, [("first_tasks", first), ("tasks", second)], own_first=True)
    return module


def _run(tasks: int, threads: int, *, own: bool) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The tasks' records, and the workspace: fronts of eight numbers, then the threads' scratch."""
    call = load("tasks_test", host_target(), _emit).function(ENTRY_ARGUMENTS)
    fronts = threads if own else 1
    values = {"first_tasks": _FRONT, "tasks": tasks, "turns": 3000, "scratch_at": fronts * 64, "scratch_size": 64}
    block = _ARGUMENTS.pack(threads, values, front_pitch=64 if own else 0)
    out, clock, workspace = np.zeros((tasks, 4), np.int64), np.zeros(1, np.int64), np.zeros((fronts + threads, 8), np.int64)
    call(block.ctypes.data, 0, clock.ctypes.data, 0, out.ctypes.data, workspace.ctypes.data)
    assert clock[0] == tasks
    return out, workspace


@pytest.mark.parametrize("own", (False, True))
@pytest.mark.parametrize("threads", (1, 2, 3, 8))
@pytest.mark.parametrize("tasks", (0, 1, 2, 3, 7, 8, 64, 1001))
def test_every_task_runs_once(tasks: int, threads: int, own: bool) -> None:
    records, workspace = _run(tasks, threads, own=own)
    assert (records[:, 0] == 1).all()
    assert ((records[:, 1] >= 0) & (records[:, 1] < min(threads, max(tasks, 1)))).all()
    assert sorted(records[:, 2]) == list(range(tasks))
    assert (records[:, 3] == 15).all()
    fronts = workspace[: threads if own else 1]
    started = workspace[len(fronts) :, 0]
    assert set(started) <= {0, 1}
    assert started[0] == 1
    if own:  # each thread that began has a front of its own, the others have none
        assert (fronts[:, :_FRONT] == started[:, None] * np.arange(1, _FRONT + 1)).all()
    else:
        assert fronts[0].tolist() == [1, 2, 3, 4, 5, 0, 0, 0]


def test_threads_begin_with_tasks_of_their_own_and_then_help() -> None:
    tasks, threads = 1000, 8
    helped = 0
    for _ in range(20):
        records, _ = _run(tasks, threads, own=False)
        for thread in range(threads):
            own = range(tasks * thread // threads, tasks * (thread + 1) // threads)
            order = [int(i) for i in np.argsort(records[:, 2]) if records[i, 1] == thread]
            mine = [i for i in order if i in own]
            assert order[: len(mine)] == mine == sorted(mine)
            helped += len(order) - len(mine)
    assert helped  # eight threads are never all at one speed


def test_an_argument_block_is_shared_by_default() -> None:
    block = _ARGUMENTS.pack(2, {"first_tasks": 1, "tasks": 1, "turns": 1, "scratch_at": 0, "scratch_size": 64})
    assert _ARGUMENTS.value(block, "front_pitch") == 0
    assert _ARGUMENTS.value(_ARGUMENTS.replaced(block, {"front_pitch": 64}), "front_pitch") == 64
