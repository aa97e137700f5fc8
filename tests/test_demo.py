"""The demonstration's training, shortened: faltung learns what stock PyTorch learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import faltung
from faltung.cli import app, pictures
from faltung.cli.demo import comparison, largest_difference, run_both
from faltung.cli.training import Digits, Run, load, network

EPOCHS = 4


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load("digits", 0, Path("unused"))


@pytest.fixture(scope="module")
def trained(digits) -> tuple[nn.Sequential, Run, Run]:
    return run_both(digits, epochs=EPOCHS, seed=0)


def test_data_is_all_digits_split_80_to_20(digits):
    assert digits.train_x.shape == (1438, 1, 28, 28)
    assert digits.test_x.shape == (359, 1, 28, 28)
    assert torch.cat([digits.train_y, digits.test_y]).bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert digits.train_x.mean().abs() < 1e-5
    assert torch.equal(load("digits", 0, Path("unused")).test_x, digits.test_x)
    assert not torch.equal(load("digits", 1, Path("unused")).test_x, digits.test_x)


def test_networks_start_from_equal_weights():
    ours, stock = network(faltung.Conv2d, seed=3), network(nn.Conv2d, seed=3)
    assert type(ours[0]) is faltung.Conv2d
    assert type(stock[0]) is nn.Conv2d
    for name, tensor in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def test_both_learn(trained):
    _, ours, stock = trained
    assert min(ours.accuracy, stock.accuracy) >= 0.95
    assert ours.losses[-1] < 0.3 * ours.losses[0]


def test_loss_curves_agree(trained):
    _, ours, stock = trained
    assert len(ours.losses) == len(stock.losses) == EPOCHS * 23
    assert largest_difference(ours, stock) < 0.02


def test_loss_curves_start_together(trained):
    """The first loss is of one forward pass, and differs by rounding alone; every step of training then enlarges what differs."""
    _, ours, stock = trained
    assert abs(ours.losses[0] - stock.losses[0]) < 1e-5
    assert max(abs(a - b) for a, b in zip(ours.losses[:10], stock.losses[:10])) < 1e-3


def test_table_names_both(trained):
    _, ours, stock = trained
    table = comparison(ours, stock)
    assert [column.header for column in table.columns] == ["", "faltung", "stock PyTorch"]
    assert table.row_count == 6


def test_pictures_are_drawn(trained, digits, tmp_path):
    model, _, _ = trained
    pictures.kernels(model[0], tmp_path / "kernels.png")
    pictures.feature_maps(model, digits.test_x[0], int(digits.test_y[0]), tmp_path / "new folder" / "maps.png")
    for path in (tmp_path / "kernels.png", tmp_path / "new folder" / "maps.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000


def test_command_tells_when_the_network_learned_too_little(tmp_path, monkeypatch, digits):
    few = Digits(digits.train_x[:64], digits.train_y[:64], digits.test_x, digits.test_y)
    monkeypatch.setattr("faltung.cli.training.load", lambda *_: few)
    result = CliRunner().invoke(app, ["demo", "--epochs", "1", "--no-bench", "--output", str(tmp_path)])
    assert result.exit_code == 1, result.output
    assert "test accuracy is below 97%" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["feature-maps.png", "kernels.png"]
