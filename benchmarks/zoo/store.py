"""What the zoo keeps between runs: files in the user's cache, each under a hash of what made it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn


def folder() -> Path:
    """$OPTCOMPILER_ZOO, or `optcompiler/zoo` in the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "optcompiler/zoo"
    place = Path(os.environ.get("OPTCOMPILER_ZOO") or default)
    place.mkdir(parents=True, exist_ok=True)
    return place


def key(*parts: Any) -> str:
    """A short hash of what is in `parts`: the text of source files, settings."""
    texts = [p.read_text() if isinstance(p, Path) else json.dumps(p) for p in parts]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def arrays(name: str, make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays kept as `name`, made when they are not there."""
    path = folder() / f"{name}.npz"
    if not path.exists():
        fresh = path.with_name(f".{os.getpid()}-{path.name}")
        np.savez(fresh, **make())
        fresh.rename(path)
    with np.load(path, allow_pickle=False) as archive:
        return {entry: archive[entry] for entry in archive.files}


def module(
    name: str,
    build: Callable[[], nn.Module],
    train: Callable[[], tuple[nn.Module, dict[str, Any]]],
) -> tuple[nn.Module, dict[str, Any]]:
    """The module kept as `name` in eval mode with its record, trained when it is not there."""
    weights, record = folder() / f"{name}.safetensors", folder() / f"{name}.json"
    if not (weights.exists() and record.exists()):
        made, told = train()
        told |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
        for path, write in (
            (weights, lambda p: save_file(made.state_dict(), p)),
            (record, lambda p: p.write_text(json.dumps(told, indent=1) + "\n")),
        ):
            fresh = path.with_name(f".{os.getpid()}-{path.name}")
            write(fresh)
            fresh.rename(path)
    net = build()
    net.load_state_dict(load_file(weights))
    return net.eval(), json.loads(record.read_text())
