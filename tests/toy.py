"""A backend and passes small enough to see through, for testing the driver."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import onnxruntime

from optcompiler import Registry, hookimpl
from optcompiler.backend import Backend, Capabilities, Kernel, Runner
from optcompiler.choices import Choices
from optcompiler.cost import DeviceProfile
from optcompiler.errors import Declined
from optcompiler.ops import builtin_table
from optcompiler.program import Program
from optcompiler.rewriting import Candidate, Decline, Pass, PassContext, Stage
from optcompiler.target import Target

PRICES_US = {"Sigmoid": 100, "HardSigmoid": 10, "Tanh": 100, "HardTanh": 10}
"""What the toy backend says each operator costs."""


class ToyRunner(Runner):
    def __init__(self, path: Path, timed: bool, delays_us: Mapping[str, float]) -> None:
        self.timed = timed
        program = Program.from_onnx(path)
        self.delay = sum(delays_us.get(n.op_type, 0.0) for n in program.graph) / 1e6
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        time.sleep(self.delay)
        return self.session.run(None, dict(inputs))


@dataclass
class ToyBackend(Backend):
    """ONNX Runtime with invented prices; `delays_us` are really slept, when `timed`.

    The probes of a device know Tanh, which costs what Sigmoid does: without a delay of its own a
    timed toy is measured to be as quick at it as at anything cheap, and Sigmoid is priced so.
    """

    name = "toy"
    timed: bool = False
    delays_us: Mapping[str, float] | None = None
    corrupt: bool = False

    def capabilities(self, target: Target) -> Capabilities:
        return Capabilities(frozenset({"fp32", "int8"}), dynamic_shapes=True)

    def kernels(self, program: Program, target: Target) -> Sequence[Kernel]:
        table = builtin_table()
        found = []
        for node in program.inlined().graph:
            spec = table.get(node)
            work = spec.cost(node) if spec else None
            flops = 1000 * PRICES_US.get(node.op_type, 1)
            found.append(
                Kernel(str(node.name), "pointwise", "fp32", (str(node.name),), flops=flops,
                       macs=work.macs if work else 0)
            )  # fmt: skip
        return found

    def lower(
        self, program: Program, target: Target, directory: Path, choices: Choices | None = None
    ) -> Mapping[str, Any]:
        program.inlined().save(directory / "model.onnx")
        return {}

    def load(self, directory: Path, info: Mapping[str, Any], *, threads: int) -> Runner:
        runner = ToyRunner(directory / "model.onnx", self.timed, self.delays_us or {})
        if self.corrupt:
            run = runner.run
            runner.run = lambda inputs: [a + 1 for a in run(inputs)]  # type: ignore[method-assign]
        return runner

    def versions(self) -> Mapping[str, str]:
        return {"toy": repr((self.timed, sorted((self.delays_us or {}).items())))}

    def nominal_profile(self, target: Target) -> DeviceProfile:
        return DeviceProfile(
            name="toy", backend="toy", threads=1, mac_rate={"gemm/fp32": ((1.0, 1e9),)},
            flop_rate={"pointwise/fp32": ((1.0, 1e9),)}, bandwidth=((1.0, 1e12),),
            launch_us=0.0, overhead_us=0.0, estimated=True,
        )  # fmt: skip


@dataclass(frozen=True)
class Harden(Pass):
    """Sigmoid becomes HardSigmoid: lossy, one candidate a node."""

    name: ClassVar[str] = "harden"
    stage: ClassVar[Stage] = Stage.REDUCE

    def propose(self, program: Program, context: PassContext) -> Iterable[Candidate | Decline]:
        for node in program.graph:
            if node.op_type == "Tanh":
                yield Decline(str(node.name), "a tanh is no sigmoid", (str(node.name),))
            if node.op_type == "Sigmoid":
                name = str(node.name)
                yield Candidate(name, "hard", lambda p, n=name: harden(p, n), False, (name,))


def harden(program: Program, name: str) -> None:
    node = program.node(name)
    if node is None:
        raise Declined("the node is gone")
    node.op_type = "HardSigmoid"


@dataclass(frozen=True)
class Rewrite(Pass):
    """An exact pass with one candidate, whose rewrite is given."""

    name: ClassVar[str] = "rewrite"
    stage: ClassVar[Stage] = Stage.CLEAN
    rewrite: Any = None

    def propose(self, program: Program, context: PassContext) -> Iterable[Candidate | Decline]:
        yield Candidate("program", "rewrite", self.rewrite, True)


def registry(backend: Backend | None = None, *passes: type[Pass]) -> Registry:
    """A registry holding the toy backend and the given passes alone."""

    class Plugin:
        @hookimpl
        def optcompiler_backends(self) -> list[Backend]:
            return [backend or ToyBackend()]

        @hookimpl
        def optcompiler_passes(self) -> list[type[Pass]]:
            return list(passes)

    return Registry(load=[], extra=[Plugin()])


def sigmoid_net(scales: Sequence[float]) -> Program:
    """A sum of `scale * Sigmoid(x)` terms: the larger the scale, the more hardening it damages."""
    terms = []
    for i in range(len(scales)):
        terms.append(f"[s{i}] a{i} = Sigmoid (x)\n[m{i}] b{i} = Mul (a{i}, k{i})")
    total = "b0"
    for i in range(1, len(scales)):
        terms.append(f"[add{i}] t{i} = Add ({total}, b{i})")
        total = f"t{i}"
    terms.append(f"[out] y = Identity ({total})")
    constants = ", ".join(f"float[8] k{i}" for i in range(len(scales)))
    text = (
        f'<ir_version: 10, opset_import: ["" : 20]>\nnet (float[4,8] x, {constants}) '
        f"=> (float[4,8] y) {{\n" + "\n".join(terms) + "\n}"
    )
    model = ir.from_onnx_text(text)
    rng = np.random.default_rng(0)
    for value in list(model.graph.inputs)[1:]:
        model.graph.inputs.remove(value)
        scale = scales[int(str(value.name)[1:])]
        array = (scale * rng.uniform(0.5, 1.5, 8)).astype(np.float32)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.register_initializer(value)
    return Program.from_onnx(model)
