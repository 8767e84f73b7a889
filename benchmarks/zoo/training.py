"""Training the image networks: deterministic, minutes on two cores."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

EPOCHS = {"resnet": 8, "mobilenet": 12}
BATCH = 64
PEAK_RATE = 4e-3
SHIFT = 2


def inputs_of(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, 32, 32] as float32 [N, 1, 32, 32], about in [-2, 2]."""
    return (torch.from_numpy(images).float().unsqueeze(1) - 127.5) / 64


def trained(name: str, build: Callable[[], nn.Module], data: Mapping[str, np.ndarray],
            epochs: int) -> tuple[nn.Module, list[dict[str, Any]]]:  # fmt: skip
    """The network in eval mode, and loss and seconds of each epoch."""
    torch.manual_seed(0)
    net = build()
    images = inputs_of(data["training_images"])
    labels = torch.from_numpy(data["training_labels"])
    steps = len(labels) // BATCH
    optimizer = torch.optim.AdamW(net.parameters(), lr=PEAK_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_RATE, total_steps=epochs * steps, pct_start=0.2
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=0.05)
    generator = torch.Generator().manual_seed(0)
    log: list[dict[str, Any]] = []
    for epoch in range(epochs):
        start, total = time.perf_counter(), 0.0
        order = torch.randperm(len(labels), generator=generator)
        for step in range(steps):
            rows = order[step * BATCH : (step + 1) * BATCH]
            shift = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=generator).tolist()
            batch = torch.roll(images[rows], shift, (2, 3))
            batch = batch.contiguous(memory_format=torch.channels_last)
            loss = criterion(net(batch), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        seconds = time.perf_counter() - start
        log.append({"epoch": epoch, "loss": total / steps, "seconds": seconds})
        print(f"{name}: epoch {epoch + 1} of {epochs}, loss {total / steps:.3f}, "
              f"{steps * BATCH / seconds:.0f} images/s", file=sys.stderr, flush=True)  # fmt: skip
    return net.eval(), log


def accuracy(images: np.ndarray, labels: np.ndarray) -> Callable[[Callable[..., Any]], float]:
    """A metric: per cent of images whose greatest logit is that of their class."""
    inputs = inputs_of(images)

    def score(model: Callable[..., Any]) -> float:
        right = 0
        with torch.no_grad():
            for start in range(0, len(labels), 250):
                part = slice(start, start + 250)
                given = model(inputs[part])
                given = given[0] if isinstance(given, (tuple, list)) else given
                found = np.asarray(given).argmax(1)
                right += int((found == labels[part]).sum())
        return 100 * right / len(labels)

    return score
