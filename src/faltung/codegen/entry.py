"""The frame of a kernel: its constant arguments in one block of integers, its entry point, and tasks shared out among threads.

A kernel's entry point takes the address of its argument block, four operand addresses and a workspace.  It runs *stages* in turn; a stage
is a range of independent tasks, so no result depends on which thread computed it.

Each thread begins with a part of the range of its own, the same in every call, and then helps where tasks are left (work stealing: Blumofe and
Leiserson, 1999).
So the lines that it writes are in its own caches already when the layer is called again or the next layer reads them: a line that another core has written
takes a hundred nanoseconds and more to come over, and where threads took tasks in turn, half of them did, all the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from .emit import Function, Module, Value
from .threads import openmp_addresses

__all__ = ["ENTRY_ARGUMENTS", "OPERANDS", "THREADS", "ArgumentBlock", "Task", "emit_entry"]

OPERANDS = ("source", "other", "bias", "out")
ENTRY_ARGUMENTS = 6
_FIXED = ("gomp_parallel", "thread_number", "threads")
THREADS = _FIXED.index("threads")
"""Index of the number of threads in every argument block."""
_CONTEXT = ("block", *OPERANDS, "workspace", "parts", "counters")
_COUNTER_BYTES = 64  # a line for each thread's part


class ArgumentBlock:
    """Names of a kernel's constant 64-bit arguments, in order; packs values into memory that the kernel reads."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = (*_FIXED, *names)
        self._index = {name: i for i, name in enumerate(self.names)}
        if len(self._index) != len(self.names):
            raise ValueError("an argument's name stands twice")

    def pack(self, threads: int, values: dict[str, int]) -> npt.NDArray[np.int64]:
        """The block for ``threads`` threads; raises KeyError for a missing or unknown name."""
        parallel, number = openmp_addresses() if threads > 1 else (0, 0)
        every = {**values, "gomp_parallel": parallel, "thread_number": number, "threads": threads if parallel else 1}
        if set(every) != set(self.names):
            raise KeyError(f"arguments {sorted(set(every) ^ set(self.names))} are missing or unknown")
        return np.array([every[name] for name in self.names], dtype=np.int64)

    def value(self, block: npt.NDArray[np.int64], name: str) -> int:
        """An argument's value in a packed block."""
        return int(block[self._index[name]])

    def replaced(self, block: npt.NDArray[np.int64], values: dict[str, int]) -> npt.NDArray[np.int64]:
        """A copy of a packed block with some values replaced."""
        result = block.copy()
        for name, value in values.items():
            result[self._index[name]] = value
        return result

    def load(self, f: Function, block: Value, name: str) -> Value:
        return f.load(block + 8 * self._index[name])


class Task:
    """What the body of a stage sees: arguments by name (``task["h"]``), operands (``task.operand("out")``), workspace, thread number."""

    def __init__(self, f: Function, arguments: ArgumentBlock, context: Value, thread: Value, count: str) -> None:
        self.f, self._arguments, self._context = f, arguments, context
        self.thread, self._count = thread, count
        self._block = f.to_pointer(f.load(context))
        self._loaded: dict[str, Value] = {}

    def prepare(self, names: Sequence[str]) -> None:
        """Load arguments now, outside the loop over tasks."""
        for name in names:
            self._loaded[name] = self._arguments.load(self.f, self._block, name)

    def __getitem__(self, name: str) -> Value:
        """An argument; loaded in place where it was not prepared."""
        return self._loaded[name] if name in self._loaded else self._arguments.load(self.f, self._block, name)

    def table(self, name: str) -> Value:
        """An argument that is an address, as a pointer."""
        return self.f.to_pointer(self[name])

    def operand(self, name: str) -> Value:
        return self.f.to_pointer(self.f.load(self._context + 8 * _CONTEXT.index(name)))

    @property
    def workspace(self) -> Value:
        return self.operand("workspace")

    def after(self, index: Value) -> Value:
        """The task that this thread is likely to compute after ``index``, for what is asked for ahead."""
        return self.f.minimum(index + 1, self[self._count] - 1)


Body = Callable[[Function, Task, Value], None]
"""Emits one task: ``body(function, task, index)``."""


def emit_entry(module: Module, arguments: ArgumentBlock, stages: Sequence[tuple[str, Callable[[Function, Task], Callable[[Value], None]]]]) -> None:
    """Emit the public function ``entry``.

    ``stages`` are ``(count, prologue)``: the name of the argument that holds the stage's number of tasks, and a function
    ``prologue(f, task)`` that emits what is done once a thread and returns ``body(index)``, which emits one task.
    """
    workers = [_emit_worker(module, arguments, i, count, prologue) for i, (count, prologue) in enumerate(stages)]
    f = module.function("entry", [("i64", "block"), *(("i64", name) for name in OPERANDS), ("i64", "workspace")], public=True)
    f.own(workers[-1][0])  # as good as never the same in two kernels
    context = f.stack(8 * len(_CONTEXT))
    for i, name in enumerate(_CONTEXT[:-2]):
        f.store(f[name], context + 8 * i)
    block = f.to_pointer(f["block"])
    threads = arguments.load(f, block, "threads")
    parallel = f.to_pointer(arguments.load(f, block, "gomp_parallel"))
    counters = f.reserve(threads * _COUNTER_BYTES)
    f.store(f.cast("ptrtoint", counters, "i64"), context + 8 * _CONTEXT.index("counters"))
    for (count, _), (worker, adapter) in zip(stages, workers):
        tasks = arguments.load(f, block, count)
        wanted = f.minimum(threads, tasks)
        f.store(wanted, context + 8 * _CONTEXT.index("parts"))

        def begin(part: Value, tasks: Value = tasks, wanted: Value = wanted) -> None:
            f.store(tasks * part // wanted, counters + part * _COUNTER_BYTES)

        f.loop(0, wanted, 1, begin)

        def alone(worker: Function = worker) -> None:
            f.call(worker, [context, f.value(0)])

        def together(adapter: Function = adapter, wanted: Value = wanted) -> None:
            number = f.cast("trunc", wanted, "i32")
            f.call(parallel.text, [f.address_of(adapter), context, number, f.value(0, "i32")])

        f.branch(wanted > 1, together, alone)
    f.ret()


def _emit_worker(
    module: Module, arguments: ArgumentBlock, index: int, count: str, prologue: Callable[[Function, Task], Callable[[Value], None]]
) -> tuple[Function, Function]:
    f = module.function(f"stage{index}", [("ptr", "context"), ("i64", "thread")])
    task = Task(f, arguments, f["context"], f["thread"], count)
    total, parts, counters = task[count], f.load(f["context"] + 8 * _CONTEXT.index("parts")), task.operand("counters")
    body = prologue(f, task)

    def turn(k: Value) -> None:
        """What is left of the part of thread ``thread + k``."""
        part = f["thread"] + k
        part = f.select(part < parts, part, part - parts)
        stop, counter = total * (part + 1) // parts, counters + part * _COUNTER_BYTES
        with f.when(f.load_shared(counter) < stop):

            def one(_: Value, current: Value) -> list[Value]:
                body(current)
                return [f.fetch_add(counter, 1)]

            _loop_while(f, f.fetch_add(counter, 1), stop, one)

    f.loop(0, parts, 1, turn)
    f.ret()
    adapter = module.function(f"stage{index}_thread", [("ptr", "context")])
    block = adapter.to_pointer(adapter.load(adapter["context"]))
    number = adapter.to_pointer(arguments.load(adapter, block, "thread_number"))
    thread = adapter.call(number.text, [], "i32")
    assert thread is not None
    adapter.call(f, [adapter["context"], adapter.cast("sext", thread, "i64")])
    adapter.ret()
    return f, adapter


def _loop_while(f: Function, first: Value, stop: Value, turn: Callable[[Value, Value], list[Value]]) -> None:
    """Turns with ``current`` as long as ``current < stop``; each turn returns the next ``current``."""
    head, inside, after = f._label("task"), f._label("run"), f._label("end")
    before = f.block
    f.line(f"br label %{head}")
    f._start(head)
    current = Value(f, f._fresh("t"), "i64")
    position = len(f._lines)
    condition = f.compare("slt", current, stop)
    f.line(f"br {condition}, label %{inside}, label %{after}")
    f._start(inside)
    (following,) = turn(current, current)
    f._lines.insert(position, f"  {current.text} = phi i64 [ {first.text}, %{before} ], [ {following.text}, %{f.block} ]")
    f.line(f"br label %{head}")
    f._start(after)
