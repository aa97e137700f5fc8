"""Paddings that PyTorch's convolution does not know: four sides, 'same' with a stride, and modes without a padded copy."""

import torch

import faltung


def main() -> None:
    """Print the shapes of a few outputs."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 31, 45), torch.randn(8, 3, 4, 4)
    causal = faltung.conv2d(x, weight, padding=(3, 0, 3, 0))  # left, right, top, bottom, as in torch.nn.functional.pad
    halved = faltung.conv2d(x, weight, stride=2, padding="same")
    mirrored = faltung.conv2d(x, weight, padding=2, padding_mode="reflect")
    for name, output in [("above and left only", causal), ("same, stride 2", halved), ("reflect", mirrored)]:
        print(f"{name}: {tuple(output.shape)}")


if __name__ == "__main__":
    main()
