"""The benchmark: its suites are the networks they are named after, its timing is fair, and it times nothing that is wrong."""

from __future__ import annotations

import csv
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from typer.testing import CliRunner

import faltung
from faltung.bench import contenders, report
from faltung.bench.check import LIMITS, Truth, bound_of, error_of, truth_of
from faltung.bench.contenders import Contender, ours, stock, stock_call
from faltung.bench.operands import TORCH_DTYPES, Operands, make_operands
from faltung.bench.peers import FROZEN, make_peers
from faltung.bench.rows import Environment, Row, read_csv, write_csv
from faltung.bench.runner import comparisons, run_case
from faltung.bench.suites import expand, load_suite, parse_layer, record, resolve, suite_names
from faltung.bench.table import geometric_mean, seconds, summary
from faltung.bench.timing import interleave
from faltung.cli import app
from faltung.problem import DIRECTIONS, FORMATS, ConvProblem

# Convolutions and 1e9 multiply-adds of one image, as published for these networks (their linear layers left out).
NETWORKS = {
    "convnext_tiny": (22, 0.293),
    "efficientnet_b0": (81, 0.385),
    "fcn_resnet50": (55, 34.592),
    "mobilenet_v2": (52, 0.299),
    "mobilenet_v3_large": (62, 0.214),
    "replknet31b": (154, 15.430),
    "resnet18": (20, 1.814),
    "resnet50": (53, 4.087),
    "resnext50_32x4d": (53, 4.228),
    "style_transfer": (16, 10.079),
    "unet": (19, 46.024),
    "vgg16": (13, 15.347),
    "yolo": (63, 14.301),
}
HERE = Environment("2026-01-01T00:00:00Z", "a processor", "avx2", 2, 100.0, 10.0, "3.11", "2.14", "0.50", "0.1.0", "abc")
SMALL = "n2c4h9w7k6r3s3 p1 bias"


def small_case(text: str = SMALL, **options: object):
    return expand([parse_layer(f"layer x3 {text}", "suite")], **options)  # type: ignore[arg-type]


def test_every_suite_can_be_read():
    assert set(suite_names()) == {*NETWORKS, "baselines", "digits", "quick"}
    for name in suite_names():
        layers = load_suite(name)
        assert layers
        for layer in layers:
            assert not layer.problem.empty, layer
            assert layer.problem.c % layer.problem.g == layer.problem.k % layer.problem.g == 0, layer
        distinct = Counter((layer.problem, layer.problem.direction) for layer in layers)
        assert max(distinct.values()) == 1, distinct.most_common(1)


@pytest.mark.parametrize("name", NETWORKS)
def test_suites_have_the_layers_of_their_networks(name):
    layers = load_suite(name)
    count, work = NETWORKS[name]
    assert sum(layer.count for layer in layers) == count
    assert sum(layer.count * layer.problem.flops() for layer in layers) / 2e9 == pytest.approx(work, abs=1e-3)


def test_suites_are_what_torchvision_runs():
    try:
        from torchvision.models import get_model
    except Exception as error:
        pytest.skip(f"no torchvision for this torch: {error}")
    for name in sorted(NETWORKS.keys() - {"replknet31b", "unet", "yolo", "style_transfer", "fcn_resnet50"}):
        found = {layer.problem: layer.count for layer in record(get_model(name, weights=None), (1, 3, 224, 224))}
        assert found == {layer.problem: layer.count for layer in load_suite(name)}, name


def test_digits_suite_is_the_network_of_the_demonstration():
    from faltung.cli.training import network

    found = [layer.problem for layer in record(network(nn.Conv2d, seed=0), (64, 1, 28, 28))]
    assert found == [layer.problem for layer in load_suite("digits")]


def test_record_counts_equal_layers_and_keeps_their_arguments():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same", dilation=2),
        nn.Conv2d(8, 8, (2, 3), padding=(1, 0), padding_mode="reflect", groups=2, bias=False),
        nn.Sequential(nn.Conv2d(8, 3, 1, stride=2), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1)),
    )
    assert [str(layer) for layer in record(model, (2, 3, 8, 8))] == [
        "0 x1 forward f32 nchw n2c3h8w8k8r3s3 p2 d2 bias",
        "1 x1 forward f32 nchw n2c8h8w8k8r2s3 p1x0 g2 reflect",
        "2.0 x1 forward f32 nchw n2c8h9w6k3r1s1 st2 bias",
        "2.1 x2 forward f32 nchw n2c3h5w3k8r1s1 bias",
        "2.2 x1 forward f32 nchw n2c8h5w3k3r1s1 bias",
    ]


def test_expand_fills_in_what_a_line_leaves_open():
    cases = small_case(dtypes=("f32", "f16"), batches=(1, 8))
    assert len(cases) == 2 * 2 * len(DIRECTIONS)
    assert {(c.problem.n, c.problem.dtype, c.problem.direction, c.formats) for c in cases} == {
        (n, dtype, direction, FORMATS) for n in (1, 8) for dtype in ("f32", "f16") for direction in DIRECTIONS
    }
    assert all(c.problem.epilogue.bias == (c.problem.direction != "grad_input") for c in cases)
    (fixed,) = small_case("grad_weight f64 nhwc " + SMALL, dtypes=("f32", "f16"))
    assert str(fixed.in_format("nhwc")) == "grad_weight f64 nhwc n2c4h9w7k6r3s3 p1 bias wnhwc"
    assert fixed.formats == ("nhwc",)


def test_resolve_names_what_it_knows():
    assert resolve(["n1c3h8w8k4r3s3 p1"])[0].problem.k == 4
    with pytest.raises(ValueError, match="baselines"):
        resolve(["no-such-thing"])
    with pytest.raises(ValueError, match="name xCOUNT problem"):
        parse_layer("conv1 n1c3h8w8k4r3s3")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("text", [SMALL, "n2c4h9w7k6r3s3 p1,0,2,1 st2 bias", "n2c4h9w7k4r3s2 p1 g2 reflect", "n1c4h9w7k4r3s3 p2 d2 circular bias"])
def test_contenders_compute_the_same(text, direction):
    (case,) = small_case(text, directions=[direction], dtypes=["f64"])
    operands = make_operands(case.problem)
    x, weight, bias = (None if t is None else t.clone().requires_grad_() for t in (operands.x, operands.weight, operands.bias))
    left, right, top, bottom = case.problem.padding
    mode = case.problem.padding_mode.replace("zeros", "constant")
    padded = functional.pad(x, (left, right, top, bottom), mode=mode)
    output = functional.conv2d(padded, weight, bias, case.problem.stride, 0, case.problem.dilation, case.problem.g)
    leaves = {"forward": [], "grad_input": [x], "grad_weight": [weight, *([] if bias is None else [bias])]}[direction]
    expected = torch.autograd.grad(output, leaves, operands.gradient) if leaves else (output.detach(),)
    for fmt in FORMATS:
        for contender in (stock(operands.to(fmt)), ours(operands.to(fmt))):
            torch.testing.assert_close(contender.call(), tuple(expected), rtol=1e-12, atol=1e-12)
            assert contender.format == fmt


def test_operands_lie_in_the_problems_format():
    operands = make_operands(ConvProblem.parse(SMALL)).to("nhwc")
    assert str(operands.problem).endswith("wnhwc")
    for tensor in (operands.x, operands.weight, operands.gradient):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_error_sees_one_wrong_element_and_what_is_no_number():
    exact = torch.randn(1000, 1000, dtype=torch.float64)
    truth = Truth((exact,), ((1000, 1000),))
    assert error_of([exact], truth) == 0.0
    for dtype, limit in LIMITS.items():
        assert error_of([exact.to(TORCH_DTYPES[dtype])], truth) < limit
        broken = exact.clone()
        broken[500, 500] += 1.0
        assert error_of([broken], truth) > limit
    broken = exact.clone()
    broken[0, 0] = math.nan
    assert error_of([broken], truth) == math.inf
    assert error_of([exact[:1]], truth) == error_of([], truth) == math.inf


def test_bound_is_the_limit_or_twice_the_error_of_stock():
    problem = ConvProblem.parse(SMALL)
    assert bound_of(problem, 1e-7) == 1e-5
    assert bound_of(problem, 1e-3) == 2e-3
    assert bound_of(problem, math.inf) == 1e-5


def test_frozen_weights_stand_beside_the_peers():
    operands = {"nhwc": make_operands(ConvProblem.parse("n2c16h9w9k32r3s3 st2 p1 bias")).to("nhwc")}
    (frozen,) = make_peers(operands, ("onnxruntime",))  # which runs in NCHW alone
    assert (frozen.provider, frozen.format) == (FROZEN, "nhwc")
    assert error_of(frozen.call(), truth_of(operands["nhwc"])) < 1e-6
    assert list(make_peers(operands, ())) == []


def test_all_means_every_network_with_each_layer_once():
    layers = resolve(["all"])
    assert len(layers) >= 250
    assert len({str(replace(layer.problem, n=1)) for layer in layers}) == len(layers)
    assert {layer.suite for layer in layers} >= {"vgg16", "resnet50", "unet", "replknet31b"}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layer", ["n2c12h9w8k20r3s3 p1 bias", "n2c12h9w8k24r3s2 st2 g6 bias", "n1c10h7w7k20r3s3 p1 g10 bias"])
def test_reference_of_a_huge_problem_is_of_some_channels_and_says_so(layer, direction):
    problem = ConvProblem.parse(layer)
    operands = make_operands(problem.with_direction(direction, bias=direction != "grad_input"))
    whole, some = truth_of(operands), truth_of(operands, 0.0)
    assert (whole.source, some.source) == ("float64", "float64 (some channels)")
    result = [t.clone() for t in stock_call(operands)()]
    assert 0 < error_of(result, some) <= 1e-6
    first, last, size = int(some.channels[0]), int(some.channels[-1]), result[0].shape[some.axis]
    assert (first, last) == (0, size - 1)
    assert len(some.channels) < size
    for tensor in result:  # each of the last channels is looked at, and a number that is none anywhere
        broken = [t.clone() for t in result]
        place = next(i for i, t in enumerate(result) if t is tensor)
        broken[place].select(some.axis, size - 1).add_(1.0)
        assert error_of(broken, some) > 1e-3
        broken[place] = tensor.clone()
        broken[place].select(some.axis, size // 2).fill_(math.nan)
        assert error_of(broken, some) == math.inf


def test_rows_of_a_right_result_have_times():
    (case,) = small_case(directions=["grad_weight"])
    rows = run_case(case, HERE, budget=0.001)
    assert [(row.provider, row.format) for row in rows] == [("faltung", "nchw"), ("faltung", "nhwc"), ("stock", "nchw"), ("stock", "nhwc")]
    for row in rows:
        assert row.status == "ok"
        assert 0 < row.p20 <= row.median <= row.p80
        assert row.runs >= 3
        assert row.error <= row.bound
    first, same, best = comparisons(rows)[0]
    assert same == rows[2].median / first.median
    assert best == min(rows[2].median, rows[3].median) / first.median


def broken_ours(operands: Operands) -> Contender:
    """An implementation that gets one element slightly wrong, in NHWC."""
    right = stock_call(operands)

    def call() -> tuple[torch.Tensor, ...]:
        result = right()
        if operands.problem.format == "nhwc":
            result[0][0, 1, 2, 3] += 0.01
        return result

    return Contender("faltung", operands.problem.format, call, "broken", "0")


def test_wrong_results_get_no_time():
    (case,) = small_case(directions=["forward"])
    rows = run_case(case, HERE, budget=0.001, make_ours=broken_ours)
    assert [row.status for row in rows] == ["ok", "wrong", "ok", "ok"]
    wrong = rows[1]
    assert wrong.error > wrong.bound
    assert wrong.runs == 0
    assert all(math.isnan(value) for value in (wrong.median, wrong.p20, wrong.p80, wrong.gflops))
    assert "WRONG: 1" in summary(rows)
    assert any("**wrong**" in line for line in report.layer_grid(rows))


def refusing_ours(operands: Operands) -> Contender:
    raise faltung.Unsupported("not today")


def test_refused_problems_keep_their_row():
    (case,) = small_case(directions=["forward"])
    rows = run_case(case, HERE, budget=0.001, make_ours=refusing_ours)
    assert [row.status for row in rows] == ["refused", "refused", "ok", "ok"]
    assert rows[0].implementation == "not today"
    assert math.isnan(rows[0].median)
    assert summary(rows) == "0 rows with a time; REFUSED: 2"


def test_command_refuses_wrong_results(monkeypatch, tmp_path):
    monkeypatch.setattr(contenders, "ours", broken_ours)
    arguments = ["bench", SMALL, "--direction", "forward", "--budget", "0.001", "--csv", str(tmp_path / "rows.csv")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.output.splitlines() if "nhwc" in line]
    assert "wrong" in line
    assert " ms" not in line
    assert " us" not in line
    with (tmp_path / "rows.csv").open() as file:
        assert [row["median"] for row in csv.DictReader(file) if row["status"] == "wrong"] == ["nan"]


def test_interleaving_gives_each_call_its_turns():
    order: list[str] = []

    def call(name: str, cost: int) -> object:
        def work() -> None:
            order.append(name)
            sum(range(cost))

        return work

    samples = interleave([call("a", 30_000), call("b", 30_000), call("c", 600_000)], budget=0.05, least=3, most=20)  # type: ignore[list-item]
    assert all(3 <= sample.runs <= 20 for sample in samples)
    assert samples[2].median > samples[0].median
    first_c = order.index("c", order.index("c") + 2)
    assert {"a", "b"} <= set(order[first_c:]), "the slow call had all its samples after the others"


def test_a_change_of_pools_is_not_timed(monkeypatch):
    calls: list[str] = []
    pauses: list[int] = []
    monkeypatch.setattr("faltung.bench.timing.time.sleep", lambda _: pauses.append(len(calls)))
    work = [lambda name=name: (calls.append(name), sum(range(20_000))) for name in "ab"]
    samples = interleave(work, budget=0.02, most=20, pools=["one", "two"])
    assert len(pauses) >= 2
    assert len(calls) > sum(sample.runs for sample in samples) + 2 * len(work)


def make_rows() -> list[Row]:
    (case,) = small_case("n8c64h56w56k64r3s3 p1", directions=["forward"], formats=["nchw"])
    base = Row(
        "baselines", "dense", 1, str(case.problem), "forward", "f32", "nchw", "faltung", "direct", "0.1.0", "ok", 0.002, 0.0019, 0.0021, 9, 900.0, 1e-7, 1e-5,
        "float64", *vars(HERE).values(),
    )  # fmt: skip
    other = str(case.in_format("nhwc"))
    return [
        base,
        replace(base, provider="stock", median=0.006),
        replace(base, provider="stock", median=0.001, format="nhwc", problem=other),
        replace(base, provider="onnxruntime", provider_version="1.2.3", median=0.004),
    ]


def test_rows_survive_the_file(tmp_path):
    rows = make_rows()
    write_csv(tmp_path / "rows.csv", rows)
    assert read_csv(tmp_path / "rows.csv") == rows
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns"):
        read_csv(tmp_path / "other.csv")


def test_report_replaces_the_marked_part_and_shows_losses(tmp_path):
    document = tmp_path / "README.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    write_csv(tmp_path / "rows.csv", make_rows())
    report.report([tmp_path / "rows.csv"], readme=document, docs=None, plots=tmp_path / "plots", suite="baselines")
    text = document.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n")
    assert text.endswith(f"\n{report.END}\nafter\n")
    assert "old" not in text
    assert "| f32 8x64x56x56 to 64, 3x3 | 3.00x (2 ms) |" in text
    assert f"](plots/ratios-{HERE.isa}.png)" in text
    assert f"| rows | number | {HERE.isa} |" in text
    assert "| f32, forward, NCHW | 1 | 3.00 / 0.50 |" in text
    assert "| all | 1 | 3.00 / 0.50 |" in text
    assert "| slower in the same format |  | 0 |" in text
    summary = report.summary_lines(make_rows())
    assert "| all | 1 | 3.00 | 0.50 | 0 |" in summary
    assert "Forward against onnxruntime 1.2.3, each in its best format: 2.00x on 1 rows, slower on 0; least 2.00x." in summary
    assert "Forward against the best of these and stock PyTorch, each in its best format: 0.50x on 1 rows, slower on 1; least 0.50x." in summary
    slower = [replace(row, median=0.01) if row.provider == "faltung" else row for row in make_rows()]
    assert "**0.60x (10 ms)**" in report.layer_grid(slower)[-1]
    for name in (f"ratios-{HERE.isa}.png", f"roofline-{HERE.isa}.png"):
        assert (tmp_path / "plots" / name).stat().st_size > 10_000
    with pytest.raises(ValueError, match="benchmark: begin"):
        report.insert(tmp_path / "rows.csv", "")


def test_report_sums_up_the_other_suites(tmp_path):
    document = tmp_path / "benchmarks.md"
    document.write_text(f"{report.BEGIN}\n{report.END}\n")
    slow = [replace(row, suite="unet", median=row.median * (2 if row.provider == "stock" else 8)) for row in make_rows()]
    frozen = replace(slow[0], provider=FROZEN, median=0.001)
    write_csv(tmp_path / "rows.csv", [*make_rows(), *slow, frozen])
    report.report([tmp_path / "rows.csv"], readme=None, docs=document, plots=None, suite="baselines")
    first, second = document.read_text().split("### Every network")
    assert "| baselines | dense |" in first
    assert "unet" not in first
    assert "| unet | 1 | 0.75 |  |  |  |  |  | 1 |" in second
    assert "| **0.75** | `forward f32 nchw n8c64h56w56k64r3s3 p1` | direct | 16 ms | 1e-07 |" in second
    assert "stock PyTorch, each in its best format: 2.00x on 1 rows" in second  # of the frozen weights


def test_report_keeps_instruction_sets_apart(tmp_path):
    document = tmp_path / "README.md"
    document.write_text(f"{report.BEGIN}\n{report.END}\n")
    other = [replace(row, isa="sse2", time="2026-01-02T00:00:00Z", median=row.median * (2 if row.provider == "stock" else 1)) for row in make_rows()]
    write_csv(tmp_path / "a.csv", make_rows())
    write_csv(tmp_path / "b.csv", other)
    report.report([tmp_path / "a.csv", tmp_path / "b.csv"], readme=document, docs=None, plots=None, suite="baselines")
    text = document.read_text()
    assert f"| f32, forward, NCHW | 1 | 3.00 / 0.50 | {2 * 3.0:.2f} / 1.00 |" in text
    assert "| f32 8x64x56x56 to 64, 3x3 | 3.00x (2 ms) |" in text
    assert "6.00x (2 ms)" not in text
    report.report([tmp_path / "a.csv", tmp_path / "b.csv"], readme=document, docs=None, plots=None, suite="baselines", layers="sse2")
    assert "Every layer, with sse2:" in document.read_text()
    assert "| f32 8x64x56x56 to 64, 3x3 | 6.00x (2 ms) |" in document.read_text()
    report.report([tmp_path / "a.csv", tmp_path / "b.csv"], readme=None, docs=document, plots=None, suite="baselines")
    first, second = document.read_text().split("## sse2")
    assert f"## {HERE.isa}" in first
    assert "| 6.00 |" not in first
    assert "| 6.00 |" in second


def test_documents_have_the_reports_markers():
    root = Path(__file__).parent.parent
    for name in ("README.md", "docs/benchmarks.md"):
        text = (root / name).read_text(encoding="utf-8")
        assert text.count(report.BEGIN) == text.count(report.END) == 1, name


def test_figures_for_people():
    assert [seconds(v) for v in (2.0, 0.00123456, 4.2e-6)] == ["2 s", "1.23 ms", "4.2 us"]
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert math.isnan(geometric_mean([]))


def test_ours_is_timed_through_the_public_function(monkeypatch):
    operands = make_operands(ConvProblem.parse(SMALL))
    seen = []
    monkeypatch.setattr(faltung, "conv2d", lambda *arguments, **options: seen.append((arguments, options)) or operands.x)
    ours(operands).call()
    assert len(seen) == 1
