"""The emitter: loops, branches, masks, transpositions, multiply-adds and conversions, compiled and run on every instruction set of the machine."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from emitted import build, module_text
from faltung.codegen.compile import assembly
from faltung.codegen.emit import Function, Module, Value
from faltung.codegen.numeric import Numeric
from faltung.cpu import target
from faltung.cpu.micro import Micro, emit_micro, largest_rows
from faltung.problem import DTYPES
from instruction_sets import each_isa

RUNNABLE = target.runnable_targets()
TYPES = {"float": np.float32, "double": np.float64}
isas = each_isa()


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def test_the_machine_runs_something() -> None:
    assert RUNNABLE
    assert set(RUNNABLE) <= set(target.TARGETS)
    assert target.host_target().isa in RUNNABLE


@isas
@pytest.mark.parametrize(("start", "stop", "step"), [(0, 10, 1), (3, 20, 4), (5, 5, 1), (7, 2, 3), (-6, 7, 5), (0, 1, 100)])
def test_loop_carries_values(isa: str, start: int, stop: int, step: int) -> None:
    def body(f: Function) -> None:
        total, count = f.loop(f["start"], f["stop"], step, lambda i, s, n: [s + i, n + 1], [f.value(100), f.value(0)])
        f.store(total, f["pout"])
        f.store(count, f["pout"] + 8)

    out = np.zeros(2, np.int64)
    build(target.TARGETS[isa], ["start", "stop", "pout"], body)(start, stop, address(out))
    turns = range(start, stop, step)
    assert out.tolist() == [100 + sum(turns), len(turns)]


@isas
def test_nested_loops_and_branches_inside_carried_loops(isa: str) -> None:
    """Blocks opened inside a body must not break the carried values' phis."""

    def body(f: Function) -> None:
        def outer(i: Value, total: Value) -> list[Value]:
            def even() -> None:
                f.store(f.load(f["pout"] + 8) + 1, f["pout"] + 8)

            def odd() -> None:
                with f.when(i > 4):
                    f.store(f.load(f["pout"] + 16) + 1, f["pout"] + 16)

            f.branch((i % 2).equals(0), even, odd)
            (inner,) = f.loop(0, i, 1, lambda j, s: [s + j * i], [total])
            return [inner]

        (total,) = f.loop(0, f["n"], 1, outer, [f.value(0)])
        f.store(total, f["pout"])

    out = np.zeros(3, np.int64)
    build(target.TARGETS[isa], ["n", "pout"], body)(9, address(out))
    assert out.tolist() == [sum(j * i for i in range(9) for j in range(i)), 5, 2]


def test_a_body_must_return_what_the_loop_carries() -> None:
    f = Module().function("g", [])
    with pytest.raises(ValueError, match="carries 1 values, its body returned 0"):
        f.loop(0, 3, 1, lambda i, v: None, [f.value(1)])


def test_a_name_is_emitted_once() -> None:
    module = Module()
    module.function("g", [])
    with pytest.raises(ValueError, match="already emitted"):
        module.function("g", [])


@isas
def test_integer_arithmetic(isa: str) -> None:
    operations = [
        lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b, lambda a, b: a // b, lambda a, b: a % b, lambda a, b: 7 - a, lambda a, b: a + 0,
        lambda a, b: a * 1, lambda a, b: a * 0 + b,
    ]  # fmt: skip

    def body(f: Function) -> None:
        results = [operation(f["a"], f["b"]) for operation in operations] + [
            f.minimum(f["a"], f["b"]),
            f.maximum(f["a"], f["b"]),
            f.select(f["a"] < f["b"], 1, 2),
        ]
        for i, result in enumerate(results):
            f.store(result, f["pout"] + 8 * i)

    function = build(target.TARGETS[isa], ["a", "b", "pout"], body)
    for a, b in ((17, 5), (-17, 5), (3, 8), (0, 1), (1 << 40, 12345)):
        out = np.zeros(len(operations) + 3, np.int64)
        function(a, b, address(out))
        quotient = abs(a) // abs(b) * (1 if a * b >= 0 else -1)  # division truncates, as in C
        assert out.tolist() == [a + b, a - b, a * b, quotient, a - quotient * b, 7 - a, a, a, b, min(a, b), max(a, b), 1 if a < b else 2]


@isas
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_access_touches_only_its_lanes(isa: str, dtype: str) -> None:
    machine = target.TARGETS[isa]
    numeric = Numeric(dtype, machine)
    lanes, width = numeric.lanes, numeric.memory_bytes

    def body(f: Function) -> None:
        mask = f.lane_mask(f["count"], lanes)
        numeric.store(f, numeric.load(f, f["psource"], lanes, mask), f["pout"], lanes, mask)
        f.store(numeric.load(f, f["psource"], lanes, mask), f["pwide"])

    function = build(machine, ["psource", "pout", "count", "pwide"], body)
    source = torch.arange(1, lanes + 1).to({"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}[dtype])
    content = source.view(torch.uint8).numpy()
    for count in range(-1, lanes + 2):
        out = np.full(lanes * width, 0xA5, np.uint8)
        wide = np.full(lanes, 77.0, TYPES[numeric.compute])
        function(address(content), address(out), count, address(wide))
        known = min(max(count, 0), lanes)
        assert np.array_equal(out[: known * width], content[: known * width])
        assert (out[known * width :] == 0xA5).all()
        assert wide.tolist() == [*range(1, known + 1), *[0.0] * (lanes - known)]


@isas
@pytest.mark.parametrize("element", TYPES)
def test_transpose_shuffle_sum_and_splat(isa: str, element: str) -> None:
    machine = target.TARGETS[isa]
    lanes = machine.lanes(element)
    size = np.dtype(TYPES[element]).itemsize
    type_ = f"<{lanes} x {element}>"

    def body(f: Function) -> None:
        rows = [f.load(f["psource"] + i * lanes * size, type_) for i in range(lanes)]
        for i, row in enumerate(f.transpose(rows)):
            f.store(row, f["pout"] + i * lanes * size)
        f.store(f.sum_lanes(rows[-1]), f["pextra"])
        f.store(f.extract(rows[0], lanes - 1), f["pextra"] + size)
        f.store(f.insert(f.splat(f.extract(rows[0], 1), lanes), f.extract(rows[0], 0), 1), f["pextra"] + 2 * size)

    source = np.random.default_rng(0).integers(-99, 99, (lanes, lanes)).astype(TYPES[element])
    out, extra = np.zeros_like(source), np.zeros(2 + lanes, TYPES[element])
    build(machine, ["psource", "pout", "pextra"], body)(address(source), address(out), address(extra))
    assert np.array_equal(out, source.T)
    expected = [source[-1].sum(), source[0, -1], *[source[0, 1]] * lanes]
    expected[3] = source[0, 0]
    assert extra.tolist() == expected


@isas
@pytest.mark.parametrize("element", TYPES)
def test_multiply_add_rounds_once_where_fused(isa: str, element: str) -> None:
    machine = target.TARGETS[isa]
    kind = TYPES[element]
    size = np.dtype(kind).itemsize

    def body(f: Function) -> None:
        a, b, c = (f.load(f["psource"] + i * size, element) for i in range(3))
        f.store(f.fma(a, b, c, machine.fma), f["pout"])

    epsilon = np.finfo(kind).eps
    source = np.array([1 + epsilon, 1 - epsilon, -1], kind)
    out = np.zeros(1, kind)
    build(machine, ["psource", "pout"], body)(address(source), address(out))
    assert out[0] == (-(epsilon**2) if machine.fma else 0.0)


# --- conversions: all 65,536 patterns both ways -------------------------------------------------------------------------------------------------


def _widened(isa: str, dtype: str, patterns: np.ndarray, lanes: int) -> np.ndarray:
    numeric = Numeric(dtype, target.TARGETS[isa])

    def body(f: Function) -> None:
        f.loop(0, f["count"], lanes, lambda i: f.store(numeric.load(f, f["psource"] + i * 2, lanes), f["pout"] + i * 4))

    out = np.zeros(len(patterns), np.float32)
    build(target.TARGETS[isa], ["psource", "pout", "count"], body)(address(patterns), address(out), len(patterns))
    return out


def _narrowed(isa: str, dtype: str, values: np.ndarray, lanes: int) -> np.ndarray:
    numeric = Numeric(dtype, target.TARGETS[isa])
    type_ = "float" if lanes == 1 else f"<{lanes} x float>"

    def body(f: Function) -> None:
        f.loop(0, f["count"], lanes, lambda i: numeric.store(f, f.load(f["psource"] + i * 4, type_), f["pout"] + i * 2, lanes))

    out = np.zeros(len(values), np.uint16)
    build(target.TARGETS[isa], ["psource", "pout", "count"], body)(address(values), address(out), len(values))
    return out


def _torch_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    kind = torch.bfloat16 if dtype == "bf16" else torch.float16
    return torch.from_numpy(values).to(kind).view(torch.int16).numpy().view(np.uint16)


def _is_nan(bits: np.ndarray, dtype: str) -> np.ndarray:
    return (bits & 0x7FFF) > (0x7F80 if dtype == "bf16" else 0x7C00)


lane_counts = pytest.mark.parametrize("vector", (False, True), ids=("scalar", "vector"))


@isas
@lane_counts
@pytest.mark.parametrize("dtype", ("bf16", "f16"))
def test_every_pattern_widens_exactly(isa: str, dtype: str, vector: bool) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    lanes = target.TARGETS[isa].lanes("float") if vector else 1
    got = _widened(isa, dtype, patterns, lanes)
    kind = torch.bfloat16 if dtype == "bf16" else torch.float16
    want = torch.from_numpy(patterns.view(np.int16).copy()).view(kind).float().numpy()
    nan = _is_nan(patterns, dtype)
    assert np.array_equal(np.isnan(got), nan)
    assert np.array_equal(got[~nan].view(np.uint32), want[~nan].view(np.uint32))
    assert np.array_equal(np.signbit(got), np.signbit(want))


@isas
@lane_counts
@pytest.mark.parametrize("dtype", ("bf16", "f16"))
def test_every_pattern_survives_the_way_there_and_back(isa: str, dtype: str, vector: bool) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    lanes = target.TARGETS[isa].lanes("float") if vector else 1
    back = _narrowed(isa, dtype, _widened(isa, dtype, patterns, lanes), lanes)
    nan = _is_nan(patterns, dtype)
    assert np.array_equal(back[~nan], patterns[~nan])
    assert _is_nan(back, dtype)[nan].all()


def _neighbourhood(dtype: str) -> np.ndarray:
    """For every finite value its float32 neighbours, and the middle to the next value with its neighbours: ties and what lies beside them."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    kind = torch.bfloat16 if dtype == "bf16" else torch.float16
    values = torch.from_numpy(patterns.view(np.int16).copy()).view(kind).double().numpy()
    with np.errstate(all="ignore"):
        following = np.append(values[1:], np.nan)
        middle = ((values + following) / 2).astype(np.float32)
        exact = values.astype(np.float32)
        every = [
            f(x) for x in (exact, middle) for f in (lambda x: x, lambda x: np.nextafter(x, np.float32(np.inf)), lambda x: np.nextafter(x, np.float32(-np.inf)))
        ]
    limits = np.array([65504, 65519.996, 65520, 65520.004, 65536, 1e30, 3.4028235e38, np.inf, np.nan, 2.0**-24, 2.0**-25, 2.0**-26, 1e-45, 0.0], np.float32)
    return np.concatenate([*every, limits, -limits, np.zeros(-(6 * 65536 + 2 * len(limits)) % 64, np.float32)]).astype(np.float32)


@isas
@lane_counts
@pytest.mark.parametrize("dtype", ("bf16", "f16"))
def test_narrowing_rounds_to_nearest_even(isa: str, dtype: str, vector: bool) -> None:
    values = _neighbourhood(dtype)
    assert len(values) > 6 * 65536
    lanes = target.TARGETS[isa].lanes("float") if vector else 1
    got, want = _narrowed(isa, dtype, values, lanes), _torch_bits(values, dtype)
    if dtype == "f16":
        with np.errstate(over="ignore", invalid="ignore"):
            numpy_bits = values.astype(np.float16).view(np.uint16)
        finite = ~np.isnan(values)
        assert np.array_equal(numpy_bits[finite], want[finite])
    nan = np.isnan(values)
    wrong = np.flatnonzero(got[~nan] != want[~nan])
    assert not len(wrong), [(values[~nan][i], hex(got[~nan][i]), hex(want[~nan][i])) for i in wrong[:5]]
    assert _is_nan(got, dtype)[nan].all()


# --- what the micro-kernels compile to -----------------------------------------------------------------------------------------------------------

_REGISTER = {"avx512": "zmm", "avx2": "ymm"}
BLOCKS = {"avx512": ((6, 4), (5, 4), (8, 3), (7, 3), (14, 2), (13, 2), (14, 1)), "avx2": ((2, 4), (4, 3), (3, 3), (6, 2), (5, 2), (8, 1))}
"""Blocks whose accumulators, vectors and broadcast just fit the registers."""


def _loop_body(text: str) -> list[str]:
    """The instructions of the longest loop without a loop inside: from a label to the jump back to it."""
    lines = [line.strip() for line in text.split("\n")]
    best: list[str] = []
    for at, line in enumerate(lines):
        found = re.match(r"(?:j\w+|b\.\w+|b|cbn?z\s+\w+,|tbn?z\s+\w+,\s*\S+)\s+(\.L\w+)$", line)
        if not found or f"{found[1]}:" not in lines[:at]:
            continue
        body = lines[len(lines[:at]) - 1 - lines[:at][::-1].index(f"{found[1]}:") + 1 : at]
        body = [b for b in body if b and not b.startswith((".", "#", "//"))]
        if len(body) > len(best):
            best = body
    return best


def _micro_assembly(isa: str, dtype: str, micro: Micro) -> str:
    module = Module()
    emit_micro(module, Numeric(dtype, target.TARGETS[isa]), micro)
    return assembly(str(module).replace("define internal", "define"), target.TARGETS[isa])


KINDS = (
    Micro("channels", 1, 1),
    Micro("channels", 1, 1, unit_pitch=True),
    Micro("pixels", 1, 1),
    Micro("pixels", 1, 1, run=True, apart=True),
)


@pytest.mark.parametrize("dtype", ("f32", "f64"))
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(("isa", "rows", "vectors"), [(isa, *block) for isa, blocks in BLOCKS.items() for block in blocks])
def test_micro_kernel_keeps_its_accumulators_in_registers(isa: str, rows: int, vectors: int, kind: Micro, dtype: str) -> None:
    machine, register = target.TARGETS[isa], _REGISTER[isa]
    assert rows <= largest_rows(vectors, machine.registers, machine.fma)
    body = _loop_body(_micro_assembly(isa, dtype, replace(kind, rows=rows, vectors=vectors)))
    on_stack = [line for line in body if "(%rsp" in line and register in line]
    assert not on_stack, on_stack
    steps = 2  # in one turn of the loop
    assert sum(line.startswith("vfmadd") for line in body) == steps * rows * vectors
    # Each vector and each broadcast is read once, whether by a load or as an operand of a multiply-add.
    reads = [line for line in body if register in line and re.search(r"\(%r", line)]
    assert len(reads) <= steps * (rows * (vectors if vectors == 1 else 1) + vectors)
    assert not any(line.startswith(("vmovup", "vmova")) and re.search(r",\s*-?\w*\(%r", line) for line in body), "a store inside of the loop"


def test_the_search_for_spills_finds_them() -> None:
    """One block that cannot fit."""
    body = _loop_body(_micro_assembly("avx2", "f32", Micro("channels", 9, 3)))
    assert any("(%rsp" in line and "ymm" in line for line in body)


@pytest.mark.parametrize("isa", target.TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_text_does_not_depend_on_the_run(isa: str, dtype: str) -> None:
    """The cache's key is the text: the same kernel must be the same text every time."""
    first, second = (_micro_text(isa, dtype) for _ in range(2))
    assert first == second


def _micro_text(isa: str, dtype: str) -> str:
    numeric = Numeric(dtype, target.TARGETS[isa])

    def body(f: Function) -> None:
        emit_micro(f.module, numeric, Micro("channels", 4, 1, masked=True))

    return module_text(["pa"], body)
