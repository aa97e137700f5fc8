"""An existing model on faltung: one line, then training as before."""

import torch
from torch import nn

import faltung


def main() -> None:
    """Convert a small classifier, take one step of training, and print what runs where."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1, groups=4), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    images, labels = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
    before = model(images).detach()

    model = faltung.convert(model)

    print(faltung.conversion_report(model))
    print(f"largest difference of an output: {float((model(images).detach() - before).abs().max()):.1e}")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    print(faltung.explain(model, images))


if __name__ == "__main__":
    main()
