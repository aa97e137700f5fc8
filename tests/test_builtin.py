"""Kernels as built-in functions of Python: arguments, errors, what they keep alive, and that they release the interpreter's lock."""

from __future__ import annotations

import gc
import sys
import threading
import weakref

import numpy as np
import pytest
from numpy.typing import NDArray

from emitted import build, module_of
from faltung.codegen.builtin import STACK_BYTES, builtin_on_stack
from faltung.codegen.compile import compile_object
from faltung.codegen.emit import Function
from faltung.codegen.load import Kernel, load
from faltung.codegen.place import place
from faltung.cpu.target import host_target

_HOST = host_target()


def _numbers(count: int) -> NDArray[np.int64]:
    return np.zeros(count, np.int64)


def _store(f: Function) -> None:
    for i, name in enumerate(("a", "b", "c")):
        f.store(f[name], f["p"] + 8 * i)


def test_arguments_arrive_in_order_and_in_full() -> None:
    out = _numbers(3)
    function = build(_HOST, ("p", "a", "b", "c"), _store)
    assert function(out.ctypes.data, 1, -2, (1 << 63) - 1) is None
    assert out.tolist() == [1, -2, (1 << 63) - 1]
    function(out.ctypes.data, 0, (1 << 64) - 1, 1 << 63)
    assert out.tolist() == [0, -1, -(1 << 63)]


@pytest.mark.parametrize("wrong", [(), (1, 2), (1, 2, 3, 4), (1, 2.5, 3), (1, None, 3), (1, "2", 3), (1, 2, 1 << 65)], ids=str)
def test_other_arguments_are_refused_before_the_kernel_runs(wrong: tuple[object, ...]) -> None:
    out = _numbers(3)
    function = build(_HOST, ("p", "a", "b", "c"), _store)
    with pytest.raises((TypeError, OverflowError)):
        function(out.ctypes.data, *wrong)
    with pytest.raises(TypeError):
        function(out.ctypes.data, 1, 2, 3, keyword=4)
    assert out.tolist() == [0, 0, 0]


def test_calls_neither_gain_nor_lose_references() -> None:
    out = _numbers(3)
    function = build(_HOST, ("p", "a", "b", "c"), _store)
    address, large = out.ctypes.data, 1 << 40
    before = sys.getrefcount(None), sys.getrefcount(large), sys.getrefcount(function)
    for _ in range(10_000):
        function(address, large, large, large)
    after = sys.getrefcount(None), sys.getrefcount(large), sys.getrefcount(function)
    assert all(abs(a - b) < 1_000 for a, b in zip(before, after))


def test_a_function_keeps_its_code_and_gives_it_back() -> None:
    kernel = load("kept", _HOST, lambda: module_of(("p", "a", "b", "c"), _store))
    alone = Kernel("alone", _HOST, kernel._engine, kernel._entry)
    seen = weakref.ref(alone)
    function = alone.function(4)
    del alone
    gc.collect()
    assert seen() is not None
    out = _numbers(3)
    function(out.ctypes.data, 4, 5, 6)
    assert out.tolist() == [4, 5, 6]
    del function
    gc.collect()
    assert seen() is None


def test_a_workspace_on_the_stack_is_aligned_and_wholly_usable() -> None:
    def fill(f: Function) -> None:
        f.store(f["pwork"], f["pout"])
        f.store(f.load(f["pblock"]), f["pout"] + 8)
        f.loop(0, STACK_BYTES, 8, lambda i: f.store(i, f["pwork"] + i))
        f.store(f.load(f["pwork"] + (STACK_BYTES - 8)), f["pout"] + 16)

    kernel = load("on_stack", _HOST, lambda: module_of(("pblock", "pout", "pwork"), fill))
    block, out = np.array([77], np.int64), _numbers(3)
    function = kernel.function_on_stack(1, block, STACK_BYTES, None)
    del block
    gc.collect()
    for _ in range(3):
        out.fill(0)
        function(out.ctypes.data)
        assert out[0] % 4096 == 0
        assert out[1:].tolist() == [77, STACK_BYTES - 8]
    with pytest.raises(ValueError, match="too many for a stack"):
        builtin_on_stack(kernel.address, 1, 0, STACK_BYTES + 1, kernel, _HOST)


def test_other_threads_run_while_a_kernel_does() -> None:
    text = """
define void @entry(ptr %flag, i64 %most) {
start:
  br label %spin
spin:
  %turn = phi i64 [ 0, %start ], [ %next, %spin ]
  %next = add i64 %turn, 1
  %value = load atomic i64, ptr %flag monotonic, align 8
  %told = icmp ne i64 %value, 0
  %over = icmp sge i64 %next, %most
  %end = or i1 %told, %over
  br i1 %end, label %done, label %spin
done:
  %where = getelementptr i64, ptr %flag, i64 1
  store i64 %value, ptr %where
  ret void
}
"""
    flag = _numbers(2)
    function = Kernel("spin", _HOST, place([compile_object(text, _HOST)]), "entry").function(2)
    teller = threading.Timer(0.05, lambda: flag.__setitem__(0, 1))
    teller.start()
    function(flag.ctypes.data, 1 << 34)
    teller.join()
    assert flag[1] == 1, "the kernel ended before another thread could write"
