"""The frame of a kernel: its constant arguments in one block of integers, its entry point, and tasks shared out among threads.

A kernel's entry point takes the address of its argument block, four operand addresses and a workspace.  It runs *stages* in turn; a stage
is a range of independent tasks, so no result depends on which thread computed it.

Each thread begins with a part of the range of its own, the same in every call, and then helps where tasks are left (work stealing: Blumofe and
Leiserson, 1999).
So the lines that it writes are in its own caches already when the layer is called again or the next layer reads them: a line that another core has written
takes a hundred nanoseconds and more to come over, and where threads took tasks in turn, half of them did, all the time.

For the same reason a first stage that makes little (packed weights) may be each thread's own: with ``front_pitch``, every thread runs all of its tasks into a
part of the workspace of its own, at the start of the second stage.
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
_FIXED = ("gomp_parallel", "thread_number", "threads", "front_pitch")
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

    def pack(self, threads: int, values: dict[str, int], front_pitch: int = 0) -> npt.NDArray[np.int64]:
        """The block for ``threads`` threads; raises KeyError for a missing or unknown name.

        ``front_pitch``: bytes between what the threads' own first stages make, 0 where they share one; for kernels that are emitted so.
        """
        parallel, number = openmp_addresses() if threads > 1 else (0, 0)
        every = {**values, "gomp_parallel": parallel, "thread_number": number, "threads": threads if parallel else 1, "front_pitch": front_pitch}
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
    """What the body of a stage sees: arguments by name (``task["h"]``), operands (``task.operand("out")``), workspace, scratch, thread number."""

    def __init__(self, f: Function, arguments: ArgumentBlock, context: Value, thread: Value, count: str, *, own_front: bool) -> None:
        self.f, self._arguments, self._context = f, arguments, context
        self.thread, self._count = thread, count
        self._block = f.to_pointer(f.load(context))
        self._loaded: dict[str, Value] = {}
        self._front = self.operand("workspace") + thread * self["front_pitch"] if own_front else None

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
        """Where stages leave what later ones need; of the thread's own where the first stage is."""
        return self.operand("workspace") if self._front is None else self._front

    @property
    def scratch(self) -> Value:
        """What only this thread uses."""
        return self.operand("workspace") + self["scratch_at"] + self.thread * self["scratch_size"]

    def after(self, index: Value) -> Value:
        """The task that this thread is likely to compute after ``index``, for what is asked for ahead."""
        return self.f.minimum(index + 1, self[self._count] - 1)


Body = Callable[[Function, Task, Value], None]
"""Emits one task: ``body(function, task, index)``."""


def emit_entry(
    module: Module,
    arguments: ArgumentBlock,
    stages: Sequence[tuple[str, Callable[[Function, Task], Callable[[Value], None]]]],
    *,
    own_first: bool = False,
) -> None:
    """Emit the public function ``entry``.

    ``stages`` are ``(count, prologue)``: the name of the argument that holds the stage's number of tasks, and a function
    ``prologue(f, task)`` that emits what is done once a thread and returns ``body(index)``, which emits one task.  ``own_first``: of two stages
    the first may be each thread's own (it has no scratch, then).
    """
    workers = [_emit_worker(module, arguments, i, *stage, own_front=own_first and i > 0) for i, stage in enumerate(stages)]
    f = module.function("entry", [("i64", "block"), *(("i64", name) for name in OPERANDS), ("i64", "workspace")], public=True)
    f.own(workers[-1])  # as good as never the same in two kernels
    if own_first:
        workers[1] = _emit_own_first(module, arguments, *workers)
        f.own(workers[1])
    adapters = [_emit_adapter(module, arguments, i, worker) for i, worker in enumerate(workers)]
    context = f.stack(8 * len(_CONTEXT))
    for i, name in enumerate(_CONTEXT[:-2]):
        f.store(f[name], context + 8 * i)
    block = f.to_pointer(f["block"])
    threads = arguments.load(f, block, "threads")
    parallel = f.to_pointer(arguments.load(f, block, "gomp_parallel"))
    counters = f.reserve(threads * _COUNTER_BYTES)
    _set(f, context, "counters", f.cast("ptrtoint", counters, "i64"))

    def stage(index: int) -> None:
        tasks, worker, adapter = arguments.load(f, block, stages[index][0]), workers[index], adapters[index]
        wanted = f.minimum(threads, tasks)
        _set(f, context, "parts", wanted)
        f.loop(0, wanted, 1, lambda part: f.store(tasks * part // wanted, counters + part * _COUNTER_BYTES))

        def together() -> None:
            f.call(parallel.text, [f.address_of(adapter), context, f.cast("trunc", wanted, "i32"), f.value(0, "i32")])

        f.branch(wanted > 1, together, lambda: f.call(worker, [context, f.value(0)]))

    for i in range(len(stages)):
        if i == 0 and own_first:
            with f.when(arguments.load(f, block, "front_pitch").equals(0)):
                stage(i)
        else:
            stage(i)
    f.ret()


def _set(f: Function, context: Value, name: str, value: Value) -> None:
    f.store(value, context + 8 * _CONTEXT.index(name))


def _emit_worker(
    module: Module, arguments: ArgumentBlock, index: int, count: str, prologue: Callable[[Function, Task], Callable[[Value], None]], *, own_front: bool
) -> Function:
    """``stage(context, thread)``: what one thread does in a stage."""
    f = module.function(f"stage{index}", [("ptr", "context"), ("i64", "thread")])
    task = Task(f, arguments, f["context"], f["thread"], count, own_front=own_front)
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
    return f


def _emit_own_first(module: Module, arguments: ArgumentBlock, first: Function, second: Function) -> Function:
    """The second stage, with all tasks of the first one before it where that is each thread's own."""
    f = module.function("own_first", [("ptr", "context"), ("i64", "thread")])
    context, thread = f["context"], f["thread"]
    front = arguments.load(f, f.to_pointer(f.load(context)), "front_pitch")
    own, counter = f.stack(8 * len(_CONTEXT)), f.stack(8)
    with f.when(front > 0):
        for i in range(len(_CONTEXT)):
            f.store(f.load(context + 8 * i), own + 8 * i)
        _set(f, own, "workspace", f.load(own + 8 * _CONTEXT.index("workspace")) + thread * front)
        _set(f, own, "parts", f.value(1))
        _set(f, own, "counters", f.cast("ptrtoint", counter, "i64"))
        f.store(f.value(0), counter)
        f.call(first, [own, f.value(0)])
    f.call(second, [context, thread])
    f.ret()
    return f


def _emit_adapter(module: Module, arguments: ArgumentBlock, index: int, worker: Function) -> Function:
    """What the runtime's threads call, with the context alone."""
    f = module.function(f"stage{index}_thread", [("ptr", "context")])
    block = f.to_pointer(f.load(f["context"]))
    number = f.to_pointer(arguments.load(f, block, "thread_number"))
    thread = f.call(number.text, [], "i32")
    assert thread is not None
    f.call(worker, [f["context"], f.cast("sext", thread, "i64")])
    f.ret()
    return f


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
