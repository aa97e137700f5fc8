"""``explain``: who computes what, and why nobody else does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import faltung
from faltung import ConvProblem, dispatch


def test_problem_and_its_text() -> None:
    text = "forward f32 nhwc n2c16h14w14k32r3s3 p1 bias"
    explanation = faltung.explain(text)
    (part,) = explanation.parts
    assert part.problem == ConvProblem.parse(text)
    names = [i.name for i in dispatch.implementations("cpu")]
    assert part.implementation in names
    assert [name for name, _ in part.refusals] == names[: names.index(part.implementation)]
    assert all(reason for _, reason in part.refusals)
    assert part.facts
    shown = str(explanation)
    assert text in shown
    assert part.implementation in shown
    assert all(reason in shown for _, reason in part.refusals)
    assert str(faltung.explain(ConvProblem.parse(text))) == shown


def test_layer_in_every_direction() -> None:
    for conv in (nn.Conv2d(3, 8, 3, padding="same", padding_mode="reflect"), faltung.Conv2d(3, 8, 3, padding=1)):
        parts = faltung.explain(conv, torch.randn(2, 3, 8, 8)).parts
        assert [p.problem.direction for p in parts if p.problem] == ["forward", "grad_input", "grad_weight"]
        assert all(p.problem.padding == (1, 1, 1, 1) for p in parts if p.problem)
        assert all(p.implementation for p in parts)
        assert [p.problem.epilogue.bias for p in parts if p.problem] == [True, False, True]


def test_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 4, 1, bias=False)))
    explanation = faltung.explain(model, torch.randn(1, 3, 8, 8))
    assert [p.layer for p in explanation.parts] == ["0"] * 3 + ["2.0"] * 3
    assert "2.0: forward f32 nchw n1c8h6w6k4r1s1" in str(explanation)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_measured_time() -> None:
    for direction in ("forward", "grad_input", "grad_weight"):
        (part,) = faltung.explain(f"{direction} bf16 nhwc n1c4h8w8k4r3s3", measure=True).parts
        assert part.measured_seconds is not None
        assert 0 < part.measured_seconds < 1
        assert "GFLOP/s" in str(part)


def test_what_pytorch_computes_says_why() -> None:
    conv = nn.Conv2d(3, 8, 3, dtype=torch.complex64)
    (part,) = faltung.explain(conv, torch.randn(1, 3, 8, 8, dtype=torch.complex64)).parts
    assert part.implementation is None
    assert "PyTorch's own convolution: torch.complex64 has no kernels" in str(part)


def test_without_elements() -> None:
    (part,) = faltung.explain(nn.Conv2d(3, 8, 3), torch.randn(0, 3, 8, 8)).parts
    assert "nothing is launched" in str(part)


def test_refusals() -> None:
    with pytest.raises(TypeError, match="needs an input"):
        faltung.explain(nn.Conv2d(3, 8, 3))
    with pytest.raises(ValueError, match="convolution problem"):
        faltung.explain("three by three")
    for text in ("st0", "d0", "g0", "g2", "p-5,-5,-5,-5", "d99999999999999999999", "reflect p8"):
        with pytest.raises(ValueError, match="not a convolution: "):
            faltung.explain(f"n1c3h8w8k4r3s3 {text}")
    for text in ("n1c3h2w2k4r3s3", "n1c3h8w8k4r0s3", "n99999999999999999999c3h8w8k4r3s3", "n0c0h0w0k0r0s0"):
        with pytest.raises(ValueError, match="not a convolution: "):
            faltung.explain(text)
    assert "without elements" in str(faltung.explain("n0c3h8w8k4r3s3"))
    with pytest.raises(ValueError, match="no cpu implementation named"), faltung.config.override(implementation="none such"):
        faltung.explain("n1c1h4w4k1r1s1")
    with pytest.raises(RuntimeError, match="expected input"):
        faltung.explain(nn.Conv2d(3, 8, 3), torch.randn(1, 4, 8, 8))
