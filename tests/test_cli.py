"""The command line, on the real engine."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import faltung
from faltung.cli import app

PROBLEM = "n1c8h12w12k8r3s3 p1"


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize("command", ["demo", "bench", "explain", "info"])
def test_every_command_has_help(command):
    assert "Usage" in run(command, "--help")


def test_info_names_machine_versions_and_cache(tmp_path):
    with faltung.config.override(cache_dir=str(tmp_path)):
        text = " ".join(run("info").split())
    for wanted in [
        "instruction set",
        "vector registers",
        "L1",
        f"threads {torch.get_num_threads()}",
        torch.__version__,
        faltung.__version__,
        "llvmlite",
        "GPU",
    ]:
        assert wanted in text, wanted
    assert tmp_path.name in text.replace(" ", "")


def test_info_without_a_cache():
    with faltung.config.override(cache_dir=""):
        assert "kernel cache" in run("info")


def test_explain_prints_what_the_function_says():
    assert str(faltung.explain(PROBLEM)) in run("explain", PROBLEM)


def test_explain_of_several_names_each():
    text = run("explain", "digits", "--backward")
    for wanted in ["conv1 x1", "conv2 x1", "forward f32 nchw", "grad_input f32 nchw", "grad_weight f32 nchw"]:
        assert wanted in text, wanted


@pytest.mark.parametrize(
    "arguments",
    [
        ("explain", "nothing-of-the-kind"),
        ("explain", "n1c3h8w8k4r3s3 st0"),
        ("bench", "nothing-of-the-kind"),
        ("bench", "n1c3h2w2k4r3s3"),
        ("bench", PROBLEM, "--batch", "1,0"),
        ("bench", PROBLEM, "--direction", "sideways"),
        ("bench", PROBLEM, "--dtype", "f12"),
        ("bench", PROBLEM, "--format", "nchwc"),
        ("bench", PROBLEM, "--peers", "nobody"),
        ("demo", "--data", "letters"),
    ],
    ids=" ".join,
)
def test_what_is_not_known_is_refused(arguments):
    assert "Invalid value" in run(*arguments, code=2)


def test_bench_lists_its_suites():
    assert "resnet50" in run("bench", "--list").split()


def test_bench_prints_a_table_and_writes_rows(tmp_path):
    file = tmp_path / "folder" / "rows.csv"
    text = run("bench", PROBLEM, "--direction", "forward,grad_input", "--format", "nchw", "--batch", "1,2", "--budget", "0.001", "--csv", str(file))
    assert "x stock" in text
    assert "4 rows with a time; geometric mean" in text
    assert "forward f32 nchw n2c8h12w12k8r3s3 p1" in text
    lines = file.read_text().splitlines()
    assert len(lines) == 1 + 2 * 2 * 3  # batches, directions, ours in one format and stock in both


def test_bench_takes_another_number_of_threads(tmp_path):
    before = torch.get_num_threads()
    try:
        text = run("bench", PROBLEM, "--direction", "forward", "--threads", "1", "--budget", "0.001")
    finally:
        torch.set_num_threads(before)
    assert "1 threads" in " ".join(text.split())


def test_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "faltung", "bench", "--list"], capture_output=True, text=True, check=True, timeout=120)
    assert "baselines" in done.stdout.split()


def test_matplotlib_is_loaded_only_to_draw():
    code = "import sys, faltung.cli; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False"
