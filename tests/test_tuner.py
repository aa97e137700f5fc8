"""Measured choices: the fastest right candidate is used, remembered on disk, and never where results must be reproducible."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import faltung
from faltung import ConvProblem, choices, config, dispatch, testing
from faltung.codegen.entry import THREADS
from faltung.cpu import tuner
from faltung.cpu.direct import DIRECT

SMALL = ConvProblem.parse("forward f32 nchw n1c16h9w10k24r3s3 p1 bias")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with config.override(cache_dir=str(tmp_path), autotune=True):
        dispatch.clear()
        tuner.clear()
        yield tmp_path
    dispatch.clear()
    tuner.clear()


def _take(monkeypatch: pytest.MonkeyPatch, times: Callable[[int], list[float]]) -> None:
    """Let the clock say what a test wants: seconds of so many candidates."""
    monkeypatch.setattr(tuner, "_time", lambda calls, rounds: times(len(calls)))


def _no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("searched")

    monkeypatch.setattr(tuner, "tune", fail)


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16", "f16"])
def test_every_candidate_is_right(dtype: str) -> None:
    searched = 0
    for text in (
        "n2c32h9w8k24r3s3 p1 bias", "nhwc n1c20h7w7k17r1s1 bias", "n1c5h9w9k8r5s3 st2 p2", "nhwc n1c8h9w9k8r3s3 g8 p1", "n1c12h9w8k12r3s3 g3 p1",
        "grad_input n2c32h9w8k24r3s3 p1", "grad_input n1c4h9w8k6r3s3 p1 circular", "grad_weight nhwc n2c8h9w8k24r3s3 p1 bias", "grad_weight n2c8h9w8k4r1s1",
    ):  # fmt: skip
        problem = replace(ConvProblem.parse(text), dtype=dtype)
        choice, measured = tuner.tune(problem, 2, rounds=1)
        assert choice is not None
        assert all(m.failure == "" and m.seconds and m.error <= m.bound / 2 for m in measured), measured
        assert tuner.lookup(problem, 2) == choice
        searched += len(measured)
    assert searched >= 30


def test_the_fastest_is_used_and_found_again(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    _, measured = tuner.tune(SMALL, 2, rounds=1)
    names = [(m.implementation, m.config) for m in measured]
    wanted = next(i for i, (name, label) in enumerate(names) if name == "direct" and label.startswith("pixels"))
    (folder / tuner.store_path().name).unlink()  # type: ignore[union-attr]
    tuner.clear()
    _take(monkeypatch, lambda count: [1e-3 - 1e-4 * (i == wanted) for i in range(count)])
    decision = dispatch.decide(SMALL, "cpu", 2)
    assert decision.plan.implementation == "direct"
    assert decision.plan.describe()["orientation"] == "pixels"
    assert decision.seconds == 9e-4
    assert len(decision.slower) == len(names) - 1
    assert ("depthwise", "not depthwise: it takes one input channel a group, and more than one group") in decision.refusals
    _no_search(monkeypatch)
    dispatch.clear()
    tuner.clear()
    again = dispatch.decide(SMALL, "cpu", 2)
    assert again.plan.describe() == decision.plan.describe()
    assert (again.refusals, again.seconds, again.slower) == (decision.refusals, decision.seconds, decision.slower)
    with testing.thread_count(2):
        shown = str(faltung.explain(SMALL))
    assert "tuned_seconds: 900 us" in shown
    assert "was slower: 1000 us, 1.11 times" in shown


def test_the_predicted_choice_stays_where_the_clock_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    with config.override(autotune=False):
        predicted = dispatch.plan(SMALL, "cpu", 2).describe()
    _take(monkeypatch, lambda count: [1e-3 - 1e-5 * (i == count - 1) for i in range(count)])
    assert dispatch.plan(SMALL, "cpu", 2).describe() == predicted


def test_one_thread_may_win(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = ConvProblem.parse("n1c16h48w48k16r3s3")
    _take(monkeypatch, lambda count: [1e-3 - 1e-4 * (i == count - 1) for i in range(count)])
    choice, measured = tuner.tune(problem, 2)
    assert measured[-1].threads == 1
    assert choice is not None
    assert (choice.threads, choice.config) == (1, "")
    plan = dispatch.plan(problem, "cpu", 2)
    assert plan.block[THREADS] == 1  # type: ignore[attr-defined]


class _Wrong:
    """An implementation that is as fast as can be."""

    name = "wrong"

    def plan(self, problem: ConvProblem, threads: int) -> dispatch.Plan:
        inner = DIRECT.plan(problem, 1)
        inner.launch = lambda *addresses: None
        return inner


class _Broken:
    """An implementation with a configuration that does not compile."""

    name = "broken"

    def configs(self, problem: ConvProblem, threads: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(label="too large")]

    def plan(self, problem: ConvProblem, threads: int, chosen: object = None) -> dispatch.Plan:
        if problem.dtype == "f64":
            raise dispatch.Unsupported("not float64")
        if chosen is not None:
            raise RuntimeError("LLVM said no")
        return DIRECT.plan(problem, threads)


def test_what_is_wrong_never_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = dispatch.implementations("cpu")
    monkeypatch.setattr(dispatch, "implementations", lambda engine: (_Wrong(), *listed))
    _take(monkeypatch, lambda count: [1e-3] * count)
    choice, measured = tuner.tune(SMALL, 2)
    assert choice is not None
    assert choice.implementation != "wrong"
    wrong = [m for m in measured if m.implementation == "wrong"]
    assert wrong
    assert all(m.seconds is None and m.failure.startswith("wrong") for m in wrong)
    assert any(name.startswith("wrong") and verdict.startswith("wrong") for name, verdict in choice.slower)


def test_a_candidate_that_cannot_be_made_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = dispatch.implementations("cpu")
    monkeypatch.setattr(dispatch, "implementations", lambda engine: (*listed, _Broken()))
    choice, measured = tuner.tune(SMALL, 1, rounds=1)
    assert choice is not None
    assert [m.failure for m in measured if m.implementation == "broken"] == ["", "RuntimeError: LLVM said no"]


@pytest.mark.parametrize("values", [{"reproducible": True}, {"autotune": False}], ids=str)
def test_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, values: dict[str, bool]) -> None:
    _no_search(monkeypatch)
    with config.override(**values):
        assert dispatch.decide(SMALL, "cpu", 2).seconds is None


def test_reproducible_results_do_not_depend_on_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    with config.override(reproducible=True):
        before = dispatch.plan(SMALL, "cpu", 2).describe()
    _take(monkeypatch, lambda count: [1e-3 / (i + 1) for i in range(count)])
    dispatch.plan(SMALL, "cpu", 2)
    dispatch.clear()
    with config.override(reproducible=True):
        assert dispatch.plan(SMALL, "cpu", 2).describe() == before


def test_options_decide_who_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = ConvProblem.parse("n1c32h12w12k32r3s3 p1")
    _take(monkeypatch, lambda count: [1e-3 / (i + 1) for i in range(count)])
    with config.override(precision="strict"):
        assert dispatch.plan(problem, "cpu", 1).implementation == "direct"
    with config.override(implementation="winograd"):
        assert dispatch.plan(problem, "cpu", 1).implementation == "winograd"
    with config.override(implementation="grouped"), pytest.raises(dispatch.Unsupported, match="one group"):
        dispatch.plan(problem, "cpu", 1)


@pytest.mark.parametrize("content", ["", "[]", '{"n1": 3}', "nonsense", None], ids=str)
def test_a_damaged_store_is_an_empty_one(content: str | None) -> None:
    tuner.tune(SMALL, 1, rounds=1)
    path = tuner.store_path()
    assert path is not None
    if content is None:
        content = json.dumps({key: {"implementation": "direct"} for key in json.loads(path.read_text())})
    path.write_text(content)
    tuner.clear()
    assert tuner.lookup(SMALL, 1) is None
    assert dispatch.decide(SMALL, "cpu", 1).seconds is not None
    tuner.clear()
    assert tuner.lookup(SMALL, 1) is not None


def test_a_choice_that_is_not_offered_any_more_is_searched_anew() -> None:
    choice, _ = tuner.tune(SMALL, 1, rounds=1)
    assert choice is not None
    for stale in (replace(choice, implementation="gone"), replace(choice, config="channels 999x1 k1")):
        tuner.remember(SMALL, 1, stale)
        dispatch.clear()
        assert dispatch.decide(SMALL, "cpu", 1).seconds is not None
        assert tuner.lookup(SMALL, 1) != stale


def test_without_a_folder_choices_hold_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with config.override(cache_dir=""):
        assert tuner.store_path() is None
        decision = dispatch.decide(SMALL, "cpu", 1)
        assert decision.seconds is not None
        _no_search(monkeypatch)
        dispatch.clear()
        assert dispatch.decide(SMALL, "cpu", 1).seconds == decision.seconds


def test_processes_add_to_one_file(tmp_path: Path) -> None:
    first, second = (choices.ChoiceStore(lambda: tmp_path / "x.json") for _ in range(2))
    assert first.lookup("a") is None
    assert second.lookup("b") is None
    first.remember("a", {"n": 1})
    second.remember("b", {"n": 2})
    third = choices.ChoiceStore(lambda: tmp_path / "x.json")
    assert [third.lookup(key) for key in "ab"] == [{"n": 1}, {"n": 2}]


def test_random_numbers_of_others_stay() -> None:
    state = torch.get_rng_state()
    tuner.tune(SMALL, 1, rounds=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_calls_from_many_threads_search_once(monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[ConvProblem] = []
    search = tuner.tune

    def count(problem: ConvProblem, *rest: Any) -> Any:
        searches.append(problem)
        return search(problem, *rest)

    monkeypatch.setattr(tuner, "tune", count)
    conv, x = faltung.Conv2d(16, 24, 3, padding=1), torch.randn(1, 16, 9, 10)
    options = config.current()
    outputs: list[torch.Tensor] = []

    def call() -> None:
        with config.applied(options), torch.no_grad():
            outputs.append(conv(x))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(searches) == 1
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    torch.testing.assert_close(outputs[0], torch.nn.functional.conv2d(x, conv.weight.detach(), conv.bias, padding=1))


def test_training_with_it() -> None:
    conv, x = faltung.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"), torch.randn(2, 16, 9, 9, requires_grad=True)
    stock = torch.nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")
    stock.load_state_dict(conv.state_dict())
    for ours, theirs in zip(
        torch.autograd.grad(conv(x).square().sum(), [x, *conv.parameters()]), torch.autograd.grad(stock(x).square().sum(), [x, *stock.parameters()])
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_the_environment_turns_it_on() -> None:
    assert config.from_environment({"FALTUNG_AUTOTUNE": "1"}).autotune
    assert not config.Options().autotune
