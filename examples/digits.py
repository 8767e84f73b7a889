"""Train a small residual CNN on scikit-learn's digits, prune, quantise and distil it, and compare.

Run as a script it prints a table for each target. Its functions are also what the command line
takes:

    optcompiler compile examples/digits.py:model --calibration examples/digits.py:calibration \
        --metric examples/digits.py:accuracy --max-drop 0.5 --target cpu:size.batch=1 \
        --dynamic batch -o build/digits
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn


class Block(nn.Module):
    """Two 3×3 convolutions around a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(y)))


class DigitsNet(nn.Module):
    """[N, 1, 8, 8] grey images in [0, 1] to [N, 10] logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()
        )
        self.block1 = Block(32)
        self.down = nn.Sequential(
            nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()
        )
        self.block2 = Block(64)
        self.head = nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.block2(self.down(self.block1(self.stem(image))))
        return self.head(x.mean((2, 3)))


@functools.cache
def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images and labels, then test images and labels; the split is fixed."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    return images[train], labels[train], images[test], labels[test]


@functools.cache
def trained() -> DigitsNet:
    """The network after 12 epochs of AdamW; the same weights at every call."""
    torch.manual_seed(0)
    images, labels, _, _ = data()
    model = DigitsNet().train()
    epochs, size = 12, 64
    steps = epochs * (len(labels) // size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    generator = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for start in range(0, len(labels) - size + 1, size):
            batch = order[start : start + size]
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def model() -> tuple[nn.Module, tuple[torch.Tensor]]:
    """The trained network and example inputs."""
    return trained(), (data()[2][:2],)


def calibration() -> list[tuple[torch.Tensor]]:
    """512 training images without their labels, in batches of 64."""
    return [(batch,) for batch in data()[0][:512].split(64)]


def accuracy(model: Callable[..., Any]) -> float:
    """Per cent of the 597 test images that `model` gets right."""
    _, _, images, labels = data()
    with torch.no_grad():
        return 100 * float((model(images).argmax(1) == labels).float().mean())


def main() -> None:
    import optcompiler as oc
    from optcompiler.progress import ConsoleProgress

    start = time.perf_counter()
    network, example = model()
    print(f"trained in {time.perf_counter() - start:.0f} s: {accuracy(network):.2f} % right")
    for backend in ("cpu", "onnxruntime"):
        compiled = oc.compile(
            network,
            example,
            target=oc.Target(backend, threads=1, sizes={"batch": 1}),
            precision="int8",
            calibration=calibration(),
            budget=oc.Budget(max_drop=0.5, metric=accuracy),
            passes=["default", "prune-channels"],
            dynamic="batch",
            progress=ConsoleProgress(),
        )
        print(compiled.summary())
        path = compiled.save(f"build/digits-{backend}")
        restored = oc.load(path)
        image = data()[2][:1]
        assert torch.equal(restored(image), compiled(image))
        print(f"saved to {path}")


if __name__ == "__main__":
    main()
