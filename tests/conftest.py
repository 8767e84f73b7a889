from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

# As many workers as cores run at once: threads of theirs, and of processes that tests start, would
# wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A process of a test that dies says where.
os.environ.setdefault("PYTHONFAULTHANDLER", "1")


def pytest_sessionfinish() -> None:
    """Save what coverage has traced: a worker that takes long to end is killed before it does."""
    if (coverage := sys.modules.get("coverage")) and (current := coverage.Coverage.current()):
        current.save()


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One cache of device profiles for the whole run, shared by parallel workers."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ["OPTCOMPILER_CACHE"] = str(Path(shared) / "optcompiler-cache")
    torch.set_num_threads(1)
