"""The demonstration's data, network and training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

__all__ = ["Digits", "Run", "accuracy", "load", "network", "training"]


@dataclass(frozen=True)
class Digits:
    """Images of shape (count, 1, 28, 28), zero mean and unit variance over the training images, and their labels."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor


@dataclass
class Run:
    """One training: the loss and the seconds of every step, and the test accuracy."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: float = 0.0


def load(data: str, seed: int, folder: Path) -> Digits:
    """``digits``: scikit-learn's 1,797 scanned digits, enlarged from 8x8 to 28x28, a fifth of them held back for the test.
    ``mnist``: torchvision's, fetched into ``folder``, with its own test images.  Raises ValueError for another name.
    """  # fmt: skip
    if data == "digits":
        from sklearn.datasets import load_digits

        found = load_digits()
        images = torch.from_numpy(found.images).float()[:, None]
        images = functional.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False)
        labels = torch.from_numpy(found.target).long()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        images, labels = images[order], labels[order]
        held_back = len(images) // 5
        return _normalised(images[held_back:], labels[held_back:], images[:held_back], labels[:held_back])
    if data == "mnist":
        from torchvision.datasets import MNIST

        parts = [MNIST(str(folder), train=train, download=True) for train in (True, False)]
        (train_x, train_y), (test_x, test_y) = [(part.data[:, None].float(), part.targets.long()) for part in parts]
        return _normalised(train_x, train_y, test_x, test_y)
    raise ValueError(f"data must be digits or mnist; got {data!r}")


def _normalised(train_x: torch.Tensor, train_y: torch.Tensor, test_x: torch.Tensor, test_y: torch.Tensor) -> Digits:
    mean, deviation = train_x.mean(), train_x.std()
    return Digits((train_x - mean) / deviation, train_y, (test_x - mean) / deviation, test_y)


def network(convolution: type[nn.Conv2d], seed: int) -> nn.Sequential:
    """The network, made of ``convolution`` layers; the same seed gives the same weights for every class of layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            convolution(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2, 2),
            convolution(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2, 2),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 10),
        )


def training(
    model: nn.Module,
    data: Digits,
    *,
    epochs: int,
    seed: int,
    batch: int = 64,
    rate: float = 0.005,
    advance: Callable[[int, float], object] | None = None,
) -> Iterator[Run]:
    """Train ``model`` by gradient descent with momentum on ``data``; the seed fixes the order and the shifts of the images.

    Goes on by one epoch for each ``next``, so that two trainings can take turns, and yields the same run, longer each time.
    ``advance`` is called after every step with the epoch, from 1, and the step's loss.
    """
    run = Run()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(data.train_x) // batch))
    for epoch in range(1, epochs + 1):
        model.train()
        for picked in torch.randperm(len(data.train_x), generator=generator).split(batch):
            start = time.perf_counter()
            loss = functional.cross_entropy(model(_shifted(data.train_x[picked], generator)), data.train_y[picked])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            run.losses.append(loss.item())
            run.seconds.append(time.perf_counter() - start)
            if advance is not None:
                advance(epoch, run.losses[-1])
        if epoch == epochs:
            run.accuracy = accuracy(model, data)
        yield run


def _shifted(images: torch.Tensor, generator: torch.Generator, most: int = 2) -> torch.Tensor:
    """``images`` moved by up to ``most`` pixels down and across, all of them alike; without this, one split in four stays below 97 %."""
    down, across = (int(v) for v in torch.randint(2 * most + 1, (2,), generator=generator))
    rows, columns = images.shape[-2:]
    padded = functional.pad(images, (most, most, most, most), value=float(images.min()))
    return padded[..., down : down + rows, across : across + columns].contiguous()


def accuracy(model: nn.Module, data: Digits) -> float:
    """The share of the test images that ``model``, set to evaluation, names rightly."""
    model.eval()
    with torch.inference_mode():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(data.test_x.split(256), data.test_y.split(256)))
    return right / len(data.test_y)
