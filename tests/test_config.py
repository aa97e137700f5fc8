"""Options: environment, context manager, the whole process."""

from __future__ import annotations

import threading

import pytest

import faltung
from faltung import config
from faltung.config import Options, from_environment


def test_environment() -> None:
    options = from_environment(
        {"FALTUNG_PRECISION": "strict", "FALTUNG_REPRODUCIBLE": "1", "FALTUNG_CACHE_LIMIT_MB": "7", "FALTUNG_CACHE_DIR": "", "OTHER": "x"}
    )
    assert options == Options(precision="strict", reproducible=True, cache_limit_mb=7, cache_dir="")
    assert from_environment({}) == Options()


@pytest.mark.parametrize(
    "environment", [{"FALTUNG_PRECISION": "high"}, {"FALTUNG_REPRODUCIBLE": "yes"}, {"FALTUNG_CACHE_LIMIT_MB": "many"}, {"FALTUNG_ENGINE": "tpu"}], ids=str
)
def test_bad_environment(environment: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=next(iter(environment)).removeprefix("FALTUNG_").lower() + "|" + next(iter(environment))):
        from_environment(environment)


def test_a_token_is_no_option() -> None:
    assert from_environment({"FALTUNG_TOKEN": "3"}) == Options()
    assert Options().token == Options().token
    assert Options().token != Options(precision="strict").token
    assert Options(precision="strict").token == Options(precision="strict").token


def test_override_nests_and_ends() -> None:
    before = config.current()
    with config.override(precision="strict") as outer:
        assert config.current() is outer
        with config.override(reproducible=True):
            assert (config.current().precision, config.current().reproducible) == ("strict", True)
        assert config.current() == outer
    assert config.current() == before
    with pytest.raises(KeyError), config.override(precision="strict"):
        raise KeyError
    assert config.current() == before


def test_override_refuses_unknown_names_and_choices() -> None:
    with pytest.raises(TypeError), config.override(speed=3):
        pass
    with pytest.raises(ValueError, match="precision must be one of default, strict"), config.override(precision="high"):
        pass


@pytest.mark.parametrize(
    "values",
    [{"reproducible": "no"}, {"autotune": 1}, {"cache_limit_mb": "1"}, {"cache_limit_mb": -1}, {"implementation": ["direct"]}, {"cache_dir": 3}],
    ids=str,
)
def test_override_refuses_values_of_another_kind(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"faltung option {next(iter(values))} must be"), config.override(**values):
        pass


def test_override_holds_in_its_own_thread_only() -> None:
    seen: list[str] = []
    with config.override(precision="strict"):
        thread = threading.Thread(target=lambda: seen.append(config.current().precision))
        thread.start()
        thread.join()
    assert seen == ["default"]


def test_options_as_attributes_of_the_module() -> None:
    assert faltung.config.precision == config.current().precision
    with config.override(precision="strict"):
        assert faltung.config.precision == "strict"
    with pytest.raises(AttributeError, match=r"no option 'speed'\. There are autotune, cache_dir"):
        _ = faltung.config.speed
    with pytest.raises(AttributeError, match="did you mean 'precision'"):
        faltung.config.precison = "strict"
    default = config._default
    seen: list[bool] = []
    try:
        faltung.config.reproducible = True
        thread = threading.Thread(target=lambda: seen.append(faltung.config.reproducible))
        thread.start()
        thread.join()
        with pytest.raises(ValueError, match="precision"):
            faltung.config.precision = "high"
    finally:
        config._default = default
    assert seen == [True]
