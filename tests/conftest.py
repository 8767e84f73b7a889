from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# As many workers as cores run at once: threads of theirs, and of processes that tests start, would
# wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One cache of device profiles for the whole run, shared by parallel workers."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ["OPTCOMPILER_CACHE"] = str(Path(shared) / "optcompiler-cache")
    torch.set_num_threads(1)
