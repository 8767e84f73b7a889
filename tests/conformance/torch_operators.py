"""PyTorch's own operator samples through the front end, the exact passes and two executors.

    python -m tests.conformance.torch_operators [--resume results.json] [name ...]

takes the first float32 sample of every operator in PyTorch's OpInfo database and prints how far
each came. `torch_operators.toml` beside this file lists what is not expected to come all the way.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo
from torch.utils import _pytree as pytree

from optcompiler.backend import require_determined
from optcompiler.errors import InputError, UnsupportedOperatorError
from optcompiler.executor import to_torch
from optcompiler.frontend import import_model
from optcompiler.ops.types import numpy_of
from tests.conformance.exact import apply_exact_passes, run_by_backend

RIGHT, WRONG, REFUSED, UNSUPPORTED, BROKEN = "right", "wrong", "refused", "unsupported", "broken"
"""`refused`: torch.export cannot trace it. `unsupported`: an error that says so and names the
operator. `broken`: any other exception, or a patch that had to be rolled back."""

STAGES = ("traced", "executor", "runtime")

EXPECTED = Path(__file__).with_suffix(".toml")


@dataclass
class Outcome:
    """How far an operator came; the first stage that is not right has the reason."""

    name: str
    traced: str = "-"
    executor: str = "-"
    runtime: str = "-"
    reason: str = ""

    @property
    def stages(self) -> tuple[str, ...]:
        return self.traced, self.executor, self.runtime


def all_right(name: str) -> Outcome:
    return Outcome(name, *[RIGHT] * len(STAGES))


class Operator(torch.nn.Module):
    """One call of an operator; the tensors of a sample are arguments, everything else is fixed."""

    def __init__(self, op: OpInfo, sample: Any) -> None:
        super().__init__()
        self.op = op
        leaves, self.spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        self.fixed = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        self.tensors = tuple(leaves[i].detach() for i in self.places)

    def forward(self, *tensors: torch.Tensor) -> Any:
        leaves = list(self.fixed)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        given, args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.op(given, *args, **kwargs)


class Together(torch.nn.Module):
    """Several operators in one graph."""

    def __init__(self, parts: Sequence[Operator]) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)
        self.tensors = tuple(tensor for part in parts for tensor in part.tensors)

    def forward(self, *tensors: torch.Tensor) -> list[Any]:
        stream = iter(tensors)
        return [part(*itertools.islice(stream, len(part.tensors))) for part in self.parts]


@functools.cache
def operators() -> dict[str, OpInfo]:
    """Every operator that takes float32 on a CPU, by name and variant."""
    return {
        op.full_name: op
        for op in op_db
        if torch.float32 in op.dtypes and not op.name.startswith("jiterator")
    }


def first_sample(op: OpInfo) -> Operator:
    seed(0)
    # a generator left to the collector would end during a trace, and disturb it
    first, *_ = op.sample_inputs("cpu", torch.float32, requires_grad=False)
    return Operator(op, first)


def seed(value: int) -> None:
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


@dataclass(frozen=True)
class Expectation:
    """How far some operators come instead of all the way, and why."""

    stage: str
    outcome: str
    reason: str
    operators: tuple[str, ...]


def expectations() -> list[Expectation]:
    """What `torch_operators.toml` lists; every other operator is right at every stage."""
    sections = tomllib.loads(EXPECTED.read_text())["expected"]
    return [Expectation(**section | {"operators": tuple(section["operators"])})
            for section in sections]  # fmt: skip


def expected() -> dict[str, Outcome]:
    """The outcome of every operator that is not right at every stage."""
    found: dict[str, Outcome] = {}
    for section in expectations():
        before = STAGES[: STAGES.index(section.stage)]
        stages = dict.fromkeys(before, RIGHT) | {section.stage: section.outcome}
        found |= {name: Outcome(name, **stages, reason=section.reason)
                  for name in section.operators}  # fmt: skip
    return found


def run_all(ops: Mapping[str, OpInfo], known: Mapping[str, Outcome]) -> list[Outcome]:
    """The outcome of each operator; those that `known` does not name share one graph if they can.

    Tracing costs the same for one and for many. What goes wrong together is run again alone.
    """
    modules = {name: first_sample(op) for name, op in ops.items()}
    steady = [n for n, m in modules.items() if n not in known and determined(m)]
    together = run("together", Together([modules[n] for n in steady]))
    if together.runtime == RIGHT:
        alone = [n for n in modules if n not in steady]
        return [all_right(n) for n in steady] + [run_alone(n, ops[n]) for n in alone]
    return [run_alone(name, op) for name, op in ops.items()]


def run_alone(name: str, op: OpInfo) -> Outcome:
    """The outcome of one operator; only shapes count where two calls give different numbers."""
    return run(name, first_sample(op), compare=determined(first_sample(op)))


def run(name: str, module: Operator | Together, *, compare: bool = True) -> Outcome:
    """Trace, rewrite and run; `compare` is off where outputs are not determined."""
    outcome = Outcome(name)
    seed(1)
    wanted = call_eagerly(module)
    try:
        imported = import_model(module, copies(module))
    except (InputError, UnsupportedOperatorError) as error:
        refused = "torch.export cannot trace it" in str(error)
        return stopped(outcome, "traced", REFUSED if refused else UNSUPPORTED, error)
    except Exception as error:
        return stopped(outcome, "traced", BROKEN, error)
    outcome.traced = RIGHT
    try:
        require_determined(imported.program)
        inputs = imported.signature.bind(copies(module), {})
        with torch.random.fork_rng():
            program, undone = apply_exact_passes(imported.program, inputs)
        if undone:
            raise AssertionError("; ".join(undone))
        arguments = [torch.from_numpy(inputs[p.name].copy()) for p in program.inputs]
        with torch.no_grad():
            outputs = to_torch(program, trainable=False)(*arguments)
        arrays = [
            numpy_of(o, ir.DataType[p.dtype]) for o, p in zip(outputs, program.outputs, strict=True)
        ]
        got = imported.signature.restore(arrays, like_torch=True)
        difference = differs(got, wanted, values=compare)
        outcome.executor = WRONG if difference else RIGHT
        outcome.reason = difference
    except UnsupportedOperatorError as error:
        return stopped(outcome, "executor", UNSUPPORTED, error)
    except Exception as error:
        return stopped(outcome, "executor", BROKEN, error)
    try:
        got = imported.signature.restore(run_by_backend(program, inputs), like_torch=True)
        difference = differs(got, wanted, values=compare)
        outcome.runtime = WRONG if difference else RIGHT
        outcome.reason = outcome.reason or difference
    except UnsupportedOperatorError as error:
        return stopped(outcome, "runtime", UNSUPPORTED, error)
    except Exception as error:
        return stopped(outcome, "runtime", BROKEN, error)
    return outcome


def call_eagerly(module: Operator | Together) -> Any:
    with torch.no_grad():
        return module(*copies(module))


def copies(module: Operator | Together) -> tuple[torch.Tensor, ...]:
    return tuple(t.clone() for t in module.tensors)


def determined(module: Operator | Together) -> bool:
    """Whether two calls give the same: not for random numbers and uninitialised memory."""
    if module.op.name.removeprefix("new_").startswith("empty"):
        return False
    seed(1)
    first = call_eagerly(module)
    seed(2)
    return not differs(call_eagerly(module), first)


def differs(got: Any, wanted: Any, *, values: bool = True) -> str:
    """What is different about two results, or ""."""
    found, known = pytree.tree_leaves(got), pytree.tree_leaves(wanted)
    if len(found) != len(known):
        return f"{len(found)} results, {len(known)} expected"
    for f, k in zip(found, known, strict=True):
        if not isinstance(k, torch.Tensor):
            if f != k and not (f != f and k != k) and values:
                return f"{f!r}, {k!r} expected"
            continue
        if (f.dtype, f.shape) != (k.dtype, k.shape):
            return f"{f.dtype}{list(f.shape)}, {k.dtype}{list(k.shape)} expected"
        try:
            if values:
                torch.testing.assert_close(f, k, rtol=1e-4, atol=1e-5, equal_nan=True)
        except AssertionError as error:
            return one_line(error)
    return ""


def stopped(outcome: Outcome, stage: str, how: str, error: Exception) -> Outcome:
    setattr(outcome, stage, how)
    outcome.reason = outcome.reason or f"{type(error).__name__}: {one_line(error)}"
    return outcome


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


# -- the table ------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="operators; default: all")
    parser.add_argument("--resume", type=Path, help="file of outcomes to go on from")
    options = parser.parse_args()
    torch.set_num_threads(1)
    outcomes: dict[str, Outcome] = {}
    if options.resume and options.resume.exists():
        lines = options.resume.read_text().splitlines()
        outcomes = {o.name: o for line in lines for o in [Outcome(**json.loads(line))]}
    known = operators()
    for name in options.names or known:
        if name not in outcomes:
            outcomes[name] = run_alone(name, known[name])
            if options.resume:
                with options.resume.open("a") as file:
                    file.write(json.dumps(asdict(outcomes[name])) + "\n")
        print(
            "{name}: {traced} {executor} {runtime} {reason}".format(**asdict(outcomes[name])),
            flush=True,
        )
    print_table(list(outcomes.values()))


def print_table(outcomes: list[Outcome]) -> None:
    for stage in STAGES:
        counts = Counter(getattr(o, stage) for o in outcomes)
        print(f"{stage:9}", ", ".join(f"{n} {how}" for how, n in sorted(counts.items())))


if __name__ == "__main__":
    main()
