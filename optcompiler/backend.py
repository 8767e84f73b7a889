"""The contract of a backend: the kernels a program becomes, the artifact's code, running it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from optcompiler.errors import UnsupportedOperatorError

if TYPE_CHECKING:
    import numpy as np

    from optcompiler.choices import Choices
    from optcompiler.cost import DeviceProfile
    from optcompiler.program import Program
    from optcompiler.target import Target


@dataclass(frozen=True)
class Capabilities:
    """What a target can run fast, for the passes to read.

    `integer_ops` are the ONNX operator types that have an integer kernel when their inputs and
    output are quantised; `activation_dtype` is the ONNX type name those kernels want ("UINT8",
    "INT8") and `weight_dtype` that of weights, which are symmetric per output channel when
    `per_channel`. `fusions` names the kinds of region that the backend turns into one kernel:
    "contraction", "pointwise", "normalization", "softmax", "attention". `dynamic_shapes` says
    whether symbolic dimensions survive. `float_outputs` names those of `integer_ops` whose integer
    kernel may write float as well, so that their output need not be quantised; a target that fuses
    "contraction" can do so for every contraction. With `symmetric_multipliers` its kernels multiply
    two activations as integers when the second is symmetric around the middle of its type.
    `stored_weight_ops` names the operator types whose constant weight it multiplies with floats as
    it is stored, in integers behind a DequantizeLinear. `any_port` says whether inputs and outputs
    may be sequences, optionals and tensors of strings. `emulated` are precisions that it runs by
    computing with the floats that the levels stand for: allowed by name, no part of "auto".
    `reference` asks for one run, inputs and outputs, beside the code, by which it can be checked
    without Python.
    """

    precisions: frozenset[str]
    integer_ops: frozenset[str] = frozenset()
    activation_dtype: str = "UINT8"
    weight_dtype: str = "INT8"
    per_channel: bool = True
    fusions: frozenset[str] = frozenset()
    dynamic_shapes: bool = False
    float_outputs: frozenset[str] = frozenset()
    symmetric_multipliers: bool = False
    stored_weight_ops: frozenset[str] = frozenset()
    any_port: bool = False
    reference: bool = False
    emulated: frozenset[str] = frozenset()


def require_tensors(program: Program, backend: str) -> None:
    """Raise `UnsupportedOperatorError` for an input or output that is no tensor of numbers."""
    from optcompiler.program import port

    for value in (*program.graph.inputs, *program.graph.outputs):
        found = port(value)
        if found.kind == "tensor" and found.dtype != "STRING":
            continue
        node = value.producer() or next((n for n, _ in value.uses()), None)
        of = "a graph output" if node is None else f"{node.op_type} of node {node.name!r}"
        raise UnsupportedOperatorError(
            f"operator {of} takes or gives {found}, for which {backend} has no form; "
            f"choose a target that runs ONNX, or cut the model there."
        )


def require_determined(program: Program) -> None:
    """Raise `UnsupportedOperatorError` for an operator whose result its inputs do not fix."""
    from optcompiler.lowering.flatten import RANDOM

    for node in program.all_nodes():
        if node.domain == "" and node.op_type in RANDOM:
            raise UnsupportedOperatorError(
                f"operator {node.op_type} of node {node.name!r} draws random numbers, so nothing "
                f"can be compared with it; draw them outside of the model and pass them in."
            )


@dataclass(frozen=True)
class Kernel:
    """One launch of generated or library code, as the cost model sees it.

    `kind` is "gemm", "conv", "winograd", "depthwise", "pointwise", "reduction", "normalization",
    "softmax", "attention", "pooling", "movement" or "other"; `dtype` the type of the arithmetic
    ("fp32", "int8", "bf16"). `macs` counts multiply-accumulates, `flops` the pointwise operations
    beside them, `bytes_moved` activations read and written, `weight_bytes` constants read.
    `shape` distinguishes kernels of one kind in the table of measured kernels.
    """

    name: str
    kind: str
    dtype: str
    nodes: tuple[str, ...]
    macs: int = 0
    flops: int = 0
    bytes_moved: int = 0
    weight_bytes: int = 0
    shape: tuple[int, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def signature(self) -> str:
        """What two kernels share that take the same time: everything but names."""
        dims = "x".join(map(str, self.shape))
        return (
            f"{self.kind}/{self.dtype}/{dims}/{self.macs}/{self.flops}"
            f"/{self.bytes_moved}/{self.weight_bytes}"
        )


class Runner(ABC):
    """A loaded artifact. One runner serves one thread at a time; load twice for two."""

    @abstractmethod
    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Outputs in graph order. `inputs` have been checked: dtypes, shapes, C-contiguous.

        A sequence is a list of arrays and an empty optional None, where the backend has them.
        """

    timed: bool = True
    """False where the time of a run says nothing about the target, as under an interpreter."""

    def kernel_times_us(self, inputs: Mapping[str, np.ndarray]) -> dict[str, float] | None:
        """Microseconds by kernel name in one profiled run; None where the backend cannot tell."""
        return None

    def close(self) -> None:
        """Release what the runner holds. Calling it twice is harmless."""
        return


class Backend(ABC):
    """Turns programs into code. Instances are stateless and cheap; importing imports no torch."""

    name: ClassVar[str]
    summary: ClassVar[str] = ""

    @abstractmethod
    def capabilities(self, target: Target) -> Capabilities:
        """What `target` supports. Raises `InputError` for an option it does not know."""

    @abstractmethod
    def kernels(self, program: Program, target: Target) -> Sequence[Kernel]:
        """The kernels that `program` becomes, in execution order."""

    @abstractmethod
    def lower(
        self, program: Program, target: Target, directory: Path, choices: Choices | None = None
    ) -> Mapping[str, Any]:
        """Write code and weights into `directory` (exists, empty); return JSON for the manifest.

        What the backend measures to decide (which of two variants of a kernel is quicker here) it
        asks of `choices`, under keys that begin with its name and say what is decided on; None
        means that nothing is to be timed. Raises `UnsupportedOperatorError` naming operator and
        node, or `ToolchainError`. The bytes written depend on the program, the target, the choices
        and the versions of the tools alone.
        """

    @abstractmethod
    def load(self, directory: Path, info: Mapping[str, Any], *, threads: int) -> Runner:
        """Open what `lower` wrote; `info` is what it returned. Needs no torch and no compiler."""

    def spelled_out(self, target: Target) -> Target:
        """The target with every option stated that would else depend on this machine."""
        return target

    def name_for(self, text: str) -> str | None:
        """What an artifact calls itself that goes to a directory called `text`.

        A name that is fit for this is returned as it is; None where artifacts have no name.
        """
        return None

    def runs_here(self, target: Target) -> bool:
        """Whether `load` can run the artifact on this machine; if not, it is only written."""
        return True

    def profiled_as(self, target: Target) -> Target:
        """The target whose measured profile holds for this one too: itself, unless its artifacts
        pick at run time what others have alone."""
        return target

    def nominal_profile(self, target: Target) -> DeviceProfile | None:
        """The device by its data sheet, where it cannot be measured; None if unknown."""
        return None

    def versions(self) -> Mapping[str, str]:
        """Tools whose version can change the artifact or its speed."""
        return {}
