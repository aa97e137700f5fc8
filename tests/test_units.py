"""A kernel's functions are compiled and placed one by one, and shared by all kernels that have them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from faltung import config
from faltung.codegen import compile as compiler
from faltung.codegen.compile import statistics
from faltung.codegen.emit import Module
from faltung.codegen.load import load, units
from faltung.cpu import direct, direct_weight
from faltung.cpu.target import TARGETS, Target, host_target, use_target
from faltung.problem import DIRECTIONS, FORMATS, ConvProblem, Direction, Format
from harness import plan_named

_HOST = host_target()
_serial = iter(range(1 << 30))


def module_of(step: int, factor: int, *, shared: int = 5, beside: bool = False) -> Module:
    """``entry(out)`` stores ``factor * (7 + step) + shared``: entry calls ``outer``, which calls ``inner``."""
    module = Module()
    inner = module.function("inner", [("i64", "x")], result="i64")
    inner.line(f"ret i64 {(inner['x'] + step).text}")
    outer = module.function("outer", [("i64", "x"), ("i64", "factor")], result="i64")
    found = outer.call(inner, [outer["x"]], "i64")
    assert found is not None
    outer.line(f"ret i64 {(found * outer['factor'] + shared).text}")
    if beside:
        outer.own(inner)
    entry = module.function("entry", [("ptr", "out")], public=True)
    result = entry.call(outer, [entry.value(7), entry.value(factor)], "i64")
    assert result is not None
    entry.store(result, entry["out"])
    entry.ret()
    return module


def value_of(emit: Callable[[], Module]) -> int:
    out = np.zeros(1, np.int64)
    load(f"unit test {next(_serial)}", _HOST, emit).function(1)(out.ctypes.data)
    return int(out[0])


def names(module: Module) -> list[str]:
    return [unit.symbol.rsplit("_", 1)[0] for unit in units(module, _HOST)]


def symbols(module: Module) -> dict[str, str]:
    return {unit.symbol.rsplit("_", 1)[0]: unit.symbol for unit in units(module, _HOST)}


def test_callees_come_first_and_the_entry_point_last() -> None:
    assert names(module_of(1, 2)) == ["inner", "outer", "entry"]


def test_a_function_that_nobody_else_calls_stays_with_its_caller() -> None:
    module = module_of(1, 2, beside=True)
    assert names(module) == ["outer", "entry"]
    assert value_of(lambda: module) == 21


def test_functions_that_share_memory_stay_together() -> None:
    module = module_of(1, 2)
    module.memory("shared", 64)
    assert names(module) == ["entry"]


def test_a_symbol_stands_for_a_text_those_it_calls_and_a_target() -> None:
    one, factor, step = symbols(module_of(1, 2)), symbols(module_of(1, 3)), symbols(module_of(2, 2))
    assert [one[name] == factor[name] for name in ("inner", "outer", "entry")] == [True, True, False]
    assert [one[name] == step[name] for name in ("inner", "outer", "entry")] == [False, False, False]
    elsewhere = {unit.symbol for unit in units(module_of(1, 2), TARGETS["neon"])}
    assert not elsewhere & {*one.values()}


def test_kernels_share_what_is_the_same_and_nothing_else(tmp_path: Path) -> None:
    with config.override(cache_dir=str(tmp_path / "kernels")):
        compiler._usable.cache_clear()
        before = statistics.misses
        assert value_of(lambda: module_of(100, 2)) == 219
        assert statistics.misses - before == 3
        assert value_of(lambda: module_of(100, 3)) == 326
        assert statistics.misses - before == 4  # the entry point alone
        assert value_of(lambda: module_of(101, 2)) == 221
        assert statistics.misses - before == 7
        assert value_of(lambda: module_of(100, 2)) == 219
        assert statistics.misses - before == 7
    compiler._usable.cache_clear()


def test_the_wrapper_is_no_part_of_it() -> None:
    """What makes kernels callable is compiled for each number of arguments, not for each kernel."""
    value_of(lambda: module_of(1, 2))
    before = statistics.misses + statistics.hits
    value_of(lambda: module_of(1, 2))
    assert statistics.misses + statistics.hits == before


def test_threads_that_load_kernels_at_once() -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: value_of(lambda: module_of(i % 3, 10 + i, shared=1000)), range(48)))
    assert found == [(10 + i) * (7 + i % 3) + 1000 for i in range(48)]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_layers_of_one_kind_share_what_packs_their_operands(direction: Direction, fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of other sizes have micro-kernels of their own; what packs their operands is the same."""

    class Generated(Exception):
        pass

    def load(name: str, target: Target, emit: Callable[[], Module]) -> None:
        raise Generated({unit.symbol for unit in units(emit(), target)})

    for module in (direct, direct_weight):
        monkeypatch.setattr(module, "load", load)
    found: list[set[str]] = []
    with use_target("avx2"):
        for case in ("n1c100h9w11k50r3s5 p1x2", "n1c90h9w12k75r3s5 p1x2"):
            problem = replace(ConvProblem.parse(case), direction=direction, format=fmt, weight_format=fmt)
            with pytest.raises(Generated) as caught:
                plan_named("direct", problem)
            found.append(caught.value.args[0])
    one, other = found
    assert one != other
    assert {symbol.rsplit("_", 1)[0] for symbol in one & other} >= {"pack_panel", "pack_tile"}
