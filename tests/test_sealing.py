"""Writes to shared arrays are noticed; what is mapped from files is not even read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from optcompiler import sealing, spilling
from optcompiler.errors import PluginError
from optcompiler.program import Program
from optcompiler.sealing import Seal
from tests.support import MLP

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")


def test_a_change_of_order_is_a_change() -> None:
    batch = {"x": np.arange(8, dtype=np.float32)}
    seal = Seal([batch])
    seal.check(["nobody"])
    batch["x"][:] = batch["x"][::-1].copy()
    with pytest.raises(PluginError, match=r"calibration input 'x' was written to.* by a or b;"):
        seal.check(["a", "b"])


def test_only_what_is_held_counts() -> None:
    program, other = Program.from_text(MLP), Program.from_text(MLP)
    seal = Seal([], program)
    seal.hold(other)
    torch.from_numpy(program.weights()["w"].numpy()).zero_()
    seal.check(["nobody"])
    torch.from_numpy(other.weights()["b"].numpy()).zero_()
    with pytest.raises(PluginError, match="weight 'b'"):
        seal.check(["somebody"])


def test_odd_types_and_shapes() -> None:
    batch = {"s": np.array(["a", "b"], object), "e": np.zeros((0, 3)), "n": np.array(3),
             "t": np.arange(6).reshape(2, 3).T}  # fmt: skip
    Seal([batch]).check(["nobody"])


def test_what_is_mapped_is_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    read: list[object] = []
    original = sealing._checksum
    monkeypatch.setattr(sealing, "_checksum", lambda s: read.append(s) or original(s))
    monkeypatch.setattr(spilling, "SPILL_ABOVE_BYTES", 16)
    program = Program.from_text(MLP)
    program.set_weight(program.graph.initializers["w"], np.ones((4, 3), np.float32))
    ir.save(program.model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    Seal([], program, Program(ir.load(tmp_path / "m.onnx")))
    assert [getattr(shared, "name", None) for shared in read] == ["b"]
