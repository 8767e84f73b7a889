"""Where training runs, and that it runs the same way every time."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Generator

import torch

from optcompiler.errors import InputError


def device_of(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def device_named(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device={name!r} is not known; take cpu or cuda.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r} is not on this machine; take cpu.")
    return device


@contextlib.contextmanager
def deterministic() -> Generator[None]:
    """Deterministic algorithms while training, as before afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
