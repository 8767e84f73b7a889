"""Real architectures the whole way: every program on it is valid ONNX that ONNX Runtime runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

import optcompiler as oc
from optcompiler.executor import WEIGHTS_KEY, to_torch
from optcompiler.frontend import import_model
from optcompiler.rewriting import Patch
from optcompiler.session import Session
from tests.nets import NETS
from tests.support import assert_close, run_onnx

PASSES = ["default", "prune-channels:keep_ratio=0.5", "distill:steps=3"]


@pytest.fixture
def patches(monkeypatch: pytest.MonkeyPatch) -> list[Patch]:
    """Every patch that a compile made, taken or not."""
    seen: list[Patch] = []
    original = Session.patch

    def recorded(self: Session, *args: Any) -> Patch:
        seen.append(original(self, *args))
        return seen[-1]

    monkeypatch.setattr(Session, "patch", recorded)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_every_intermediate_program_is_valid_and_runs(name: str, patches: list[Patch]) -> None:
    module, x = NETS[name]()
    compiled = oc.compile(
        module, (x[:4],), target=oc.Target("onnxruntime", threads=1), precision="int8",
        calibration=[(x[:4],), (x[4:],)], passes=PASSES,
        budget=oc.Budget(max_damage=float("inf")),
    )  # fmt: skip
    with torch.no_grad():
        expected = module(x[:4]).numpy()
    (port,) = compiled.inputs
    names = {p.label.partition("[")[0] for p in patches}
    assert {"simplify", "insert-qdq", "prune-channels"} <= names
    for patch in patches:
        program = patch.after
        onnx.checker.check_model(program.to_proto(), full_check=True)
        (got,) = run_onnx(program, {port.name: x[:4].numpy()})
        assert got.shape == expected.shape, patch.label
        assert np.isfinite(got).all(), patch.label


@pytest.mark.parametrize("name", NETS)
def test_exact_compile_equals_eager(name: str) -> None:
    module, x = NETS[name]()
    compiled = oc.compile(
        module, (x[:4],), target=oc.Target("onnxruntime", threads=1), precision="fp32"
    )
    with torch.no_grad():
        expected = module(x[4:])
    got = compiled(x[4:])
    assert isinstance(got, torch.Tensor)
    assert_close([got.numpy()], [expected.numpy()], 1e-4)


def only_cast_to_integers(program: oc.Program) -> set[str]:
    """Float initializers that no derivative can reach."""
    return {
        name
        for name, value in program.graph.initializers.items()
        if value.dtype == ir.DataType.FLOAT
        and all(n.op_type == "Cast" and n.outputs[0].dtype != ir.DataType.FLOAT
                for n, _ in value.uses())
    }  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_torch_to_program_to_torch_to_onnxruntime(name: str) -> None:
    module, x = NETS[name]()
    program = import_model(module, (x[:4],)).program
    student = to_torch(program)
    with torch.no_grad():
        expected = module(x[:4])
    outputs = student(x[:4])
    assert_close([outputs[0].detach().numpy()], [expected.numpy()], 1e-4)

    outputs[0].square().mean().backward()
    weights = student.meta[WEIGHTS_KEY]
    missing = {weights[n] for n, p in student.named_parameters() if p.grad is None}
    assert missing == only_cast_to_integers(program)

    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.01)
        changed = student(x[:4])
    again = program.refit(student)
    feed = {program.inputs[0].name: x[:4].numpy()}
    assert_close(run_onnx(again, feed), [changed[0].numpy()], 1e-4)
    assert again.content_hash() != program.content_hash()
