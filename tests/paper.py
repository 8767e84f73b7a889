"""A compile on paper: what every operator costs and damages is written down, nothing is run.

For tests of what is decided on such figures. Programs are nodes side by side or in a chain, passes
replace the operator of one node by another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from optcompiler.backend import Backend, Capabilities, Kernel, Runner
from optcompiler.choices import Choices
from optcompiler.cost import CostModel, DeviceProfile
from optcompiler.errors import UnsupportedOperatorError
from optcompiler.program import Program
from optcompiler.rewriting import Candidate, Decline, Pass, Stage
from optcompiler.session import Session
from optcompiler.target import Target
from tests.support import Silent, make_context

HEAD = '<ir_version: 10, opset_import: ["" : 20]>'

PRICES_US = {"Relu": 100.0, "Abs": 40.0, "Neg": 10.0, "Sin": 10.0, "Cos": 10.0, "Exp": 300.0}


def side_by_side(**operators: str) -> Program:
    """Nodes by name with their operator, all of which read `x` and give an output."""
    nodes = "\n".join(f"[{name}] y_{name} = {op} (x)" for name, op in operators.items())
    outputs = ", ".join(f"float[2] y_{name}" for name in operators)
    return Program.from_text(f"{HEAD}\nnet (float[2] x) => ({outputs}) {{\n{nodes}\n}}")


def chain(**operators: str) -> Program:
    """Nodes by name with their operator, each of which reads the one before."""
    names = list(operators)
    values = ["x", *(f"y_{name}" for name in names)]
    nodes = "\n".join(
        f"[{name}] {values[i + 1]} = {operators[name]} ({values[i]})"
        for i, name in enumerate(names)
    )
    return Program.from_text(f"{HEAD}\nnet (float[2] x) => (float[2] {values[-1]}) {{\n{nodes}\n}}")


def operators(program: Program) -> dict[str, str]:
    """The operator of each node by name."""
    return {str(n.name): n.op_type for n in program.graph}


def replace_operator(site: str, op_type: str) -> Callable[[Program], None]:
    """A rewrite."""

    def rewrite(program: Program) -> None:
        node = program.node(site)
        assert node is not None
        node.op_type = op_type

    return rewrite


def swap(site: str, choice: str, **options: Any) -> Candidate:
    """Replace the operator of node `site` by `choice`."""
    options = {"exact": False, "nodes": (site,)} | options
    return Candidate(site, choice, replace_operator(site, choice), **options)


def paper_pass(
    offers: Sequence[Candidate | Decline] | Callable[[Program], Iterable[Any]],
    name: str = "swap",
    stage: Stage = Stage.REDUCE,
) -> Pass:
    """A pass that offers what is given: always, or for a program."""

    def propose(self: Pass, program: Program, context: Any) -> Iterable[Any]:
        return offers(program) if callable(offers) else list(offers)

    made = type(name, (Pass,), {"name": name, "stage": stage, "propose": propose})
    return dataclass(frozen=True, eq=False)(made)()


@dataclass
class PaperBackend(Backend):
    """A kernel a node; none for the operators in `lacks`."""

    name = "paper"
    lacks: frozenset[str] = frozenset()

    def capabilities(self, target: Target) -> Capabilities:
        return Capabilities(frozenset({"fp32", "int8"}))

    def kernels(self, program: Program, target: Target) -> Sequence[Kernel]:
        for node in program.graph:
            if node.op_type in self.lacks:
                raise UnsupportedOperatorError(f"no {node.op_type}")
        return [Kernel(str(n.name), n.op_type, "fp32", (str(n.name),)) for n in program.graph]

    def lower(
        self, program: Program, target: Target, directory: Path, choices: Choices | None = None
    ) -> Mapping[str, Any]:
        raise AssertionError("nothing is lowered on paper")

    def load(self, directory: Path, info: Mapping[str, Any], *, threads: int) -> Runner:
        raise AssertionError("nothing is loaded on paper")


@dataclass
class PaperCosts(CostModel):
    """Microseconds by operator, and `seam_us` wherever the `cheap` operators begin or end."""

    name = "paper"
    prices: Mapping[str, float] = field(default_factory=lambda: PRICES_US)
    seam_us: float = 0.0
    cheap: frozenset[str] = frozenset()
    priced: list[list[str]] = field(default_factory=list)

    def kernel_us(self, kernel: Kernel, profile: DeviceProfile) -> float:
        return profile.measured.get(kernel.kind, self.prices[kernel.kind])

    def program_us(self, kernels: Sequence[Kernel], profile: DeviceProfile) -> float:
        self.priced.append([k.kind for k in kernels])
        inside = [False, *(k.kind in self.cheap for k in kernels), False]
        seams = sum(a != b for a, b in pairwise(inside))
        return super().program_us(kernels, profile) + self.seam_us * seams


@dataclass
class PaperJudge:
    """Damage is the sum of what is written down for (node, operator); `tried` lists programs."""

    damages: Mapping[tuple[str, str], float] = field(default_factory=dict)
    cannot_run: frozenset[str] = frozenset()
    tried: list[dict[str, str]] = field(default_factory=list)

    def damage(self, program: Program) -> float:
        found = operators(program)
        self.tried.append(found)
        if not self.cannot_run.isdisjoint(found.values()):
            raise RuntimeError("no such kernel")
        return sum(self.damages.get(item, 0.0) for item in found.items())


class Notes(Silent):
    """A progress reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.tracked: list[tuple[str, int]] = []

    def track(self, items: Sequence[Any], description: str) -> Any:
        self.tracked.append((description, len(items)))
        return super().track(items, description)

    def note(self, message: str) -> None:
        self.notes.append(message)


PROFILE = DeviceProfile("paper", "paper", 1, {}, {}, ((1.0, 1.0),), 0.0, 0.0)


def paper_session(
    program: Program,
    costs: PaperCosts | None = None,
    backend: Backend | None = None,
    **options: Any,
) -> Session:
    """A session whose teacher is `program`."""
    context = make_context(program, calibration=[], holdout=[], progress=Notes())
    check = options.pop("check", {})
    return Session(
        program, backend or PaperBackend(), Target("paper", threads=1), costs or PaperCosts(),
        PROFILE, context, check, **options,
    )  # fmt: skip
