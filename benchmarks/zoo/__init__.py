"""Trained models to lose accuracy on: two image networks and their twins, an encoder, a decoder.

    python -m benchmarks.zoo                    # trains what is not in the cache yet
    python -m benchmarks.zoo --only resnet,gpt

Data are drawn with Debian's fonts or read from Python's standard library; weights are trained here,
but for MiniLM's, which come in a package. Everything is seeded: the same number of threads gives
the same weights.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.zoo import store

Batches = list[tuple[torch.Tensor, ...]]
Model = Callable[..., Any]


@dataclass(frozen=True)
class Subject:
    """A trained model in eval mode, how it is scored, and where calibration samples come from.

    `metric` scores a callable with the module's signature that takes batches of any size;
    `batches(count, seed)` gives so many unlabelled samples in batches of at most 32. `reference` is
    the score of the module itself when it was made. `second` is another score with its name.
    """

    name: str
    title: str
    module: nn.Module
    inputs: tuple[torch.Tensor, ...]
    metric: Callable[[Model], float]
    larger_is_better: bool
    unit: str
    reference: float | None
    batches: Callable[[int, int], Batches]
    kind: str
    second: tuple[str, Callable[[Model], float]] | None = None


SUBJECTS = ("resnet", "resnet-twin", "mobilenet", "mobilenet-twin", "minilm", "gpt")
BATCH = 32
HERE = Path(__file__).parent


def subject(name: str) -> Subject:
    """One of `SUBJECTS`, trained first when the cache does not hold it."""
    if name not in SUBJECTS:
        raise SystemExit(f"zoo: no model {name!r}; there is {', '.join(SUBJECTS)}.")
    if name == "minilm":
        from benchmarks.zoo.retrieval import minilm

        return minilm()
    if name == "gpt":
        from benchmarks.zoo.language import gpt

        return gpt()
    return image_subject(name)


@functools.cache
def glyph_data() -> dict[str, Any]:
    """The arrays of `glyphs.made`, from the cache when they are there."""
    from benchmarks.zoo import glyphs

    return store.arrays(
        f"glyphs-{store.key(HERE / 'glyphs.py')}", lambda: glyphs.made(store.folder())
    )


def image_subject(name: str) -> Subject:
    from benchmarks.zoo import nets, training

    data = glyph_data()
    base, _, rescaled = name.partition("-")
    score = training.accuracy(data["test_images"], data["test_labels"])

    def train() -> tuple[nn.Module, dict[str, Any]]:
        start = time.perf_counter()
        net, log = training.trained(base, nets.NETS[base], data, training.EPOCHS[base])
        minutes = (time.perf_counter() - start) / 60
        return net, {"log": log, "minutes": minutes, "score": score(net)}

    sources = [HERE / f for f in ("glyphs.py", "nets.py", "training.py")]
    net, record = store.module(f"{base}-{store.key(*sources)}", nets.NETS[base], train)
    pool = training.inputs_of(data["pool_images"])

    def batches(count: int, seed: int) -> Batches:
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:count]
        return [(pool[rows],) for rows in order.split(BATCH)]

    title = {"resnet": "ResNet-style", "mobilenet": "MobileNetV2-style"}[base]
    if rescaled:
        net, title = nets.twin(net), f"{title}, rescaled"
    return Subject(
        name, title, net, (pool[:1],), score, True, "% right", record["score"], batches, "image"
    )
