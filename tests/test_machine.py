"""The machine's rates: measured once, kept, and used for predictions and floors only as far as they are certain."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch

import harness
from faltung import config, dispatch, testing
from faltung.cpu import machine as machines
from faltung.cpu.geometry import multiplications
from faltung.cpu.machine import CALL_SECONDS, FITTED, Floor, Machine
from faltung.cpu.target import TARGETS, Rates, host_target, use_target
from faltung.cpu.tiling import useful_threads
from faltung.problem import ConvProblem

REFERENCE = Machine(0.25e-9, FITTED["near"], FITTED["far"], FITTED["memory"], 40e9, FITTED["fork"] * 0.25e-9, 2)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder for records, and nothing remembered in memory, before and after."""

    def forget() -> None:
        machines.machine.cache_clear()
        machines.calibrated.cache_clear()
        machines._store.clear()

    forget()
    with config.override(cache_dir=str(tmp_path)):
        yield tmp_path
    forget()


def test_the_measured_rates_are_those_of_a_machine() -> None:
    found = machines.measure(host_target(), 2)
    assert all(math.isfinite(value) and value >= 0 for value in astuple(found))
    assert 0.05e-9 < found.cycle < 5e-9
    assert found.near > 1
    assert found.far > 0.5
    assert 1e8 < found.stream < 1e13
    assert found.fork < 1
    assert found.threads == 2


def test_one_thread_needs_no_start() -> None:
    assert machines.measure(host_target(), 1).fork == 0.0


def test_the_rates_are_measured_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "measure", lambda target, threads: REFERENCE)
    assert machines.machine() == REFERENCE
    (path,) = folder.glob("machine-*.json")

    def never(target: object, threads: int) -> Machine:
        raise AssertionError("measured twice")

    monkeypatch.setattr(machines, "measure", never)
    machines.machine.cache_clear()
    machines._store.clear()
    assert machines.machine() == REFERENCE

    records = json.loads(path.read_text())
    for damaged in ({}, {"cycle": "none"}, {**next(iter(records.values())), "stream": None}):
        path.write_text(json.dumps(dict.fromkeys(records, damaged)))
        monkeypatch.setattr(machines, "measure", lambda target, threads: replace(REFERENCE, stream=1e9))
        machines.machine.cache_clear()
        machines._store.clear()
        assert machines.machine().stream == 1e9


def test_a_busy_machine_is_measured_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What interrupts a measurement only worsens it: the better of each rate is kept, and after four turns what there is is believed."""
    busy = replace(REFERENCE, cycle=2 * REFERENCE.cycle, near=1.9 * REFERENCE.near, fork=20 * REFERENCE.fork)
    better = replace(REFERENCE, stream=REFERENCE.stream / 2, fork=9 * REFERENCE.fork)
    assert busy.doubtful
    assert better.doubtful
    assert not REFERENCE.doubtful
    measured = []

    def process(found: Machine) -> Machine:
        machines.machine.cache_clear()
        machines._store.clear()
        monkeypatch.setattr(machines, "measure", lambda target, threads: measured.append(found) or found)
        return machines.machine()

    assert process(busy) == busy
    for found, expected in ((better, replace(better, stream=REFERENCE.stream)), (REFERENCE, REFERENCE), (busy, REFERENCE)):
        assert astuple(process(found)) == pytest.approx(astuple(expected), rel=1e-12)
    assert measured == [busy, better, REFERENCE]

    for path in folder.glob("machine-*.json"):
        path.unlink()
    measured.clear()
    for _ in range(6):
        assert process(busy) == busy
    assert len(measured) == 4


def test_noise_changes_no_rate() -> None:
    assert REFERENCE.rates == Rates()
    noisy = replace(REFERENCE, near=REFERENCE.near * 1.3, far=REFERENCE.far / 1.3, memory=REFERENCE.memory / 1.9, fork=REFERENCE.fork * 1.9)
    assert noisy.rates == Rates()
    other = replace(REFERENCE, near=REFERENCE.near / 2.2, far=REFERENCE.far * 3, memory=REFERENCE.memory * 4, fork=REFERENCE.fork * 5)
    assert other.rates == Rates(near=0.5, far=4.0, memory=4.0, fork=4.0)
    assert replace(REFERENCE, fork=0.0).rates == Rates()
    busy = replace(REFERENCE, memory=REFERENCE.memory / 100, fork=0.01)
    assert busy.rates == Rates(memory=0.25, fork=4.0)


def test_the_floor_is_arithmetic_or_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "machine", lambda: REFERENCE)
    target = TARGETS["avx512"]
    dense = ConvProblem.parse("n8c64h56w56k64r3s3 p1")
    one, two = machines.floor(dense, target, 1), machines.floor(dense, target, 2)
    # Of the 9 taps of 56 x 56 pixels, (3 * 56 - 2)^2 lie inside the image.
    assert one == Floor(8 * 64 * 64 * 166**2 / 32 * 0.25e-9, "arithmetic")
    assert two.seconds == one.seconds / 2
    assert machines.floor(dense, target, 64) == two  # no more than there are
    assert machines.floor(dense, target, 1, 1e9).seconds == 1e9 / 32 * 0.25e-9
    assert machines.floor(replace(dense, dtype="f64"), target, 1).seconds == 2 * one.seconds
    assert machines.floor(replace(dense, dtype="bf16"), TARGETS["avx512_bf16"], 1).seconds == one.seconds / 2
    assert machines.floor(replace(dense, dtype="bf16"), TARGETS["avx512_bf16"], 1, 1e9).seconds == 1e9 / 32 * 0.25e-9
    assert machines.floor(replace(dense, dtype="bf16"), TARGETS["amx"], 1).seconds == one.seconds / 16
    assert machines.floor(dense, TARGETS["amx"], 1) == one
    large = ConvProblem.parse("n8c256h112w112k256r3s3 p1 g256")
    assert machines.floor(large, target, 2) == Floor(large.bytes() / 40e9, "memory")
    small = ConvProblem.parse("n1c256h14w14k256r3s3 p1 g256")
    assert machines.floor(small, target, 2) == Floor(small.bytes() / (FITTED["far"] / 0.25e-9) / 2, "memory")


def test_multiplications_are_those_inside_the_image() -> None:
    for text in ("n2c4h9w7k6r3s5 st2x1 p1x3 d2x1 g2", "n1c2h5w5k2r7s7 p3", "n1c1h4w4k1r2s2 p-1,0,3,0", "n1c3h8w8k4r3s3 p1 reflect"):
        problem = ConvProblem.parse(text)
        ones = torch.nn.functional.pad(torch.ones(1, problem.c, problem.h, problem.w), problem.padding, mode=problem.padding_mode.replace("zeros", "constant"))
        taps = torch.conv2d(ones, torch.ones(problem.weight_shape), None, problem.stride, 0, problem.dilation, problem.g)
        assert multiplications(problem) == problem.n * taps.sum().item(), text


def test_predictions_are_not_below_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "machine", lambda: REFERENCE)
    assert machines.predicted_seconds(4000, 1, Floor(1e-9, "memory")) == pytest.approx(1e-6 + CALL_SECONDS)
    assert machines.predicted_seconds(4000, 1, Floor(1e-3, "memory")) == 1e-3 + CALL_SECONDS
    assert machines.predicted_seconds(4000, 2, Floor(1e-9, "memory")) == pytest.approx(1e-6 + CALL_SECONDS + REFERENCE.fork)


def test_rates_change_no_bits() -> None:
    slow = Rates(near=0.25, far=0.25, memory=0.25, fork=4.0)
    texts = ("n2c64h14w14k96r3s3 p1", "n1c40h7w9k24r1s1", "n2c32h20w20k32r3s3 st2 p1", "grad_weight n2c32h14w14k32r3s3 p1", "grad_input n2c64h14w14k64r3s3 p1")
    for text in texts:
        problem = ConvProblem.parse(text)
        inputs = testing.make_inputs(problem)
        results, chosen = [], set()
        for rates in (Rates(), slow):
            with use_target(replace(host_target(), rates=rates)):
                plan = dispatch.plan(problem, "cpu", 2)
                chosen.add(plan.implementation)
                results.append(harness.launch(plan, inputs))
        assert len(chosen) == 1, text
        assert harness.equal_bits(*results), text


def test_slow_starts_keep_small_work_on_one_thread() -> None:
    target = TARGETS["avx512"]
    assert useful_threads(2, 30_000, target) == 2
    assert useful_threads(2, 30_000, replace(target, rates=Rates(fork=4.0))) == 1


def test_plans_tell_prediction_and_floor() -> None:
    for text in (
        "n1c32h14w14k32r3s3 p1",
        "n1c32h14w14k32r1s1",
        "n1c16h14w14k16r3s3 p1 g16",
        "grad_weight n1c16h14w14k16r3s3 p1 g16",
        "grad_weight n1c32h14w14k32r3s3 st2 p1",
        "n1c32h14w14k32r3s3 p1 g4",
    ):
        facts = dispatch.plan(ConvProblem.parse(text), "cpu", 2).describe()
        assert facts["predicted_seconds"] >= facts["floor_seconds"] > 0, text
        assert facts["floor_set_by"] in ("arithmetic", "memory")
