"""A small decoder over bytes, trained on the source of Python's standard library."""

from __future__ import annotations

import functools
import math
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.zoo import BATCH, Batches, Subject, store

CONTEXT, WIDTH, HEADS, LAYERS = 128, 256, 4, 4
STEPS, PER_STEP, PEAK_RATE = 1800, 16, 2e-3
HELD_OUT = ("asyncio", "email", "json", "unittest", "xml", "logging")
"""Packages that no training sample comes from."""
SCORED_BYTES = 256_000


class Attention(nn.Module):
    """Causal self-attention written out, as most exporters want it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.register_buffer("mask", torch.full((CONTEXT, CONTEXT), -1e4).triu(1), False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def heads(t: torch.Tensor) -> torch.Tensor:
            return t.unflatten(2, (HEADS, -1)).transpose(1, 2)

        q, k, v = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        scores = q @ k.transpose(2, 3) / math.sqrt(WIDTH // HEADS)
        weights = torch.softmax(scores + self.mask[: x.shape[1], : x.shape[1]], -1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """Bytes int64 [N, 128] to logits of the next byte, float32 [N, 128, 256]."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.layers(self.bytes(ids) + self.places[: ids.shape[1]])))


@functools.cache
def source() -> tuple[np.ndarray, np.ndarray]:
    """Bytes to train on and bytes held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        first = path.relative_to(root).parts[0]
        if first in ("site-packages", "test", "idlelib", "lib2to3") or "tests" in path.parts:
            continue
        parts[first.removesuffix(".py") in HELD_OUT].append(path.read_bytes())
    train, held = (np.frombuffer(b"\n".join(p), np.uint8) for p in parts)
    return train, held[: SCORED_BYTES // CONTEXT * CONTEXT]


def windows(data: np.ndarray, count: int, generator: torch.Generator, more: int) -> torch.Tensor:
    """`count` pieces of `CONTEXT + more` bytes from anywhere, int64."""
    starts = torch.randint(len(data) - CONTEXT - more, (count,), generator=generator)
    return torch.stack(
        [torch.from_numpy(data[s : s + CONTEXT + more].astype(np.int64)) for s in starts.tolist()]
    )


def trained() -> tuple[nn.Module, list[dict[str, Any]]]:
    torch.manual_seed(0)
    net = Decoder()
    data, _ = source()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), PEAK_RATE, (0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_RATE, total_steps=STEPS, pct_start=0.1
    )
    log: list[dict[str, Any]] = []
    start, total = time.perf_counter(), 0.0
    for step in range(STEPS):
        ids = windows(data, PER_STEP, generator, 1)
        logits = net(ids[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += float(loss.detach())
        if step % 100 == 99:
            bits = total / 100 / math.log(2)
            seconds = time.perf_counter() - start
            log.append({"step": step, "bits": bits, "seconds": seconds})
            print(f"gpt: step {step + 1} of {STEPS}, {bits:.3f} bits a byte, {seconds:.0f} s",
                  file=sys.stderr, flush=True)  # fmt: skip
            total = 0.0
    return net.eval(), log


def bits(data: np.ndarray) -> Callable[[Callable[..., Any]], float]:
    """A metric: bits for each byte of `data` but the first of a window, given those before it."""
    ids = torch.from_numpy(data.astype(np.int64)).reshape(-1, CONTEXT)

    def score(model: Callable[..., Any]) -> float:
        total = 0.0
        with torch.no_grad():
            for part in ids.split(BATCH):
                given = model(part)
                given = given[0] if isinstance(given, (tuple, list)) else given
                logits = torch.as_tensor(np.asarray(given))[:, :-1]
                total += float(nn.functional.cross_entropy(
                    logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
                ))  # fmt: skip
        return total / math.log(2) / (len(ids) * (CONTEXT - 1))

    return score


def gpt() -> Subject:
    data, held = source()
    score = bits(held)

    def train() -> tuple[nn.Module, dict[str, Any]]:
        start = time.perf_counter()
        net, log = trained()
        minutes = (time.perf_counter() - start) / 60
        return net, {"log": log, "minutes": minutes, "score": score(net)}

    net, record = store.module(f"gpt-{store.key(Path(__file__))}", Decoder, train)

    def batches(count: int, seed: int) -> Batches:
        drawn = windows(data, count, torch.Generator().manual_seed(seed + 1000), 0)
        return [(part,) for part in drawn.split(BATCH)]

    return Subject(
        "gpt", "byte GPT", net, batches(1, 0)[0], score, False, "bits a byte", record["score"],
        batches, "tokens",
    )  # fmt: skip
