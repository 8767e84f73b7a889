"""What must hold for every program."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as runtime

from optcompiler import Registry
from optcompiler.errors import Declined
from optcompiler.executor import interpret
from optcompiler.ops import builtin_table
from optcompiler.ops.types import numpy_of
from optcompiler.pipeline import resolve
from optcompiler.program import Program
from optcompiler.rewriting import Candidate, Pass, PassContext, Patch, Stage, apply_candidate
from optcompiler.target import Target
from tests.fuzz.strategy import Case
from tests.support import INT8, Silent

EPSILON = float(np.finfo(np.float32).eps)
OWN_ERROR = 16
"""A rewritten program may be this many times as far from float64 as float32 itself is."""
AGREEMENT = 1e-4
"""How far two runtimes may be from float64, relative to the largest number in the graph."""
TYPICAL = 0.05
"""What pack-weights declares for biases that it quantises: the root mean square of the change."""

Arrays = Sequence[np.ndarray]


class Wrong(AssertionError):
    """An oracle that does not hold: `oracle` says which."""

    def __init__(self, oracle: str, message: str) -> None:
        super().__init__(f"{oracle}: {message}")
        self.oracle = oracle


@dataclass
class Statistics:
    """What a run has covered."""

    graphs: int = 0
    nodes: int = 0
    operators: Counter[str] = field(default_factory=Counter)
    taken: Counter[str] = field(default_factory=Counter)
    """Graphs in which a pass took a candidate."""
    candidates: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)
    not_run: int = 0
    """Graphs that ONNX Runtime has no kernel for; the executor alone judges those."""
    compiled: int = 0
    unsupported: Counter[str] = field(default_factory=Counter)

    def text(self) -> str:
        """What was covered, for people."""

        def table(counts: Mapping[str, int]) -> str:
            return ", ".join(f"{k} {v}" for k, v in sorted(counts.items()))

        refused = sum(v for k, v in self.steps.items() if k.endswith(" refused"))
        return "\n".join(
            [
                f"{self.graphs} graphs of {self.nodes / max(self.graphs, 1):.1f} nodes; "
                f"{refused} of {self.steps.total()} steps refused",
                f"passes took a candidate in: {table(self.taken)}",
                f"candidates taken: {table(self.candidates)}",
                f"compiled by cpu: {self.compiled}; without a kernel: {self.unsupported.total()}; "
                f"without a kernel in ONNX Runtime: {self.not_run}",
                f"{len(self.operators)} operators, in so many graphs: {table(self.operators)}",
            ]
        )


@dataclass(frozen=True)
class Judged:
    """A case that holds, its exactly optimised program, and the numbers of ONNX Runtime."""

    case: Case
    program: Program
    outputs: Arrays
    loose: bool
    """Whether biases were quantised: outputs are then compared by root mean square."""


@functools.cache
def exact_passes() -> tuple[Pass, ...]:
    passes = resolve(None, Registry())
    return tuple(p for p in passes if p.stage in (Stage.CLEAN, Stage.FUSE))


def context_of(program: Program) -> PassContext:
    return PassContext(
        target=Target("onnxruntime", threads=1), capabilities=INT8,
        precisions=frozenset({"fp32", "int8"}), teacher=program, calibration=(), holdout=(),
        ops=builtin_table(), seed=0, progress=Silent(), kernels=lambda p: (),
        price_us=lambda p: float(len(p.graph)),
    )  # fmt: skip


def optimised(program: Program) -> list[tuple[str, Patch, bool]]:
    """Every patch of the exact passes in order: the pass, the patch, whether it is judged loosely.

    What an exact compile does without a target: no candidate is too slow, and numbers are left to
    the oracles.
    """
    patches: list[tuple[str, Patch, bool]] = []
    now, context = program, context_of(program)
    for pass_ in exact_passes():
        for candidate in list(pass_.propose(now, context)):
            if not isinstance(candidate, Candidate):
                continue
            try:
                patch = apply_candidate(pass_.name, candidate, now)
            except Declined:
                continue
            if patch.empty:
                continue
            patch.after.verify(like=program)
            now = patch.after
            patches.append((pass_.name, patch, candidate.typical and bool(patch.added)))
    return patches


def judge(case: Case, statistics: Statistics) -> Judged:
    """Raises `Wrong`, or whatever a part of the compiler raises."""
    statistics.graphs += 1
    statistics.nodes += len(case.model.graph.node)
    statistics.operators.update({n.op_type for n in case.model.graph.node})
    statistics.steps.update(case.steps)
    program = Program.from_onnx(case.model)
    _interface(case.model, program)
    patches = optimised(program)
    statistics.candidates.update(name for name, *_ in patches)
    statistics.taken.update({name for name, *_ in patches})
    after = patches[-1][1].after if patches else program
    if (program.inputs, program.outputs) != (after.inputs, after.outputs):
        raise Wrong("interface", f"{program!r} became {after!r}")
    again = optimised(after)
    if again and again[-1][1].after.content_hash() != after.content_hash():
        raise Wrong("twice", _changes(again))
    executed = run_executor(program, case.inputs)
    agreement("executor", case, executed)
    stock = run_stock(case.model, case.inputs)
    if stock is None:
        statistics.not_run += 1
    else:
        agreement("onnxruntime", case, stock)
    bounds = tolerances(case, [executed, *([stock] if stock is not None else [])])
    loose = next((i for i, p in enumerate(patches) if p[2]), len(patches))
    strict = patches[loose - 1][1].after if loose else program
    exact = run_executor(strict, case.inputs) if loose else executed
    _close("exact", case, exact, bounds)
    if loose < len(patches):
        typical("exact", run_executor(after, case.inputs), exact)
    outputs = run_stock(after.to_proto(), case.inputs) if stock is not None else None
    if outputs is None:
        outputs = run_executor(after, case.inputs)
    elif loose < len(patches):
        typical("optimised in onnxruntime", outputs, exact)
    else:
        agreement("optimised in onnxruntime", case, outputs)
    return Judged(case, after, outputs, loose < len(patches))


def run_executor(program: Program, inputs: Mapping[str, np.ndarray]) -> Arrays:
    names = [p.name for p in program.outputs]
    found = interpret(program, inputs, names)
    return [numpy_of(found[v.name or ""], v.dtype) for v in program.graph.outputs]  # type: ignore[arg-type]


def run_stock(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> Arrays | None:
    """Outputs of ONNX Runtime without its own optimisations; None where it lacks a kernel."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except runtime.NotImplemented:
        return None
    return session.run(None, dict(inputs))


def _changes(patches: Sequence[tuple[str, Patch, bool]]) -> str:
    """Which nodes the passes added and removed, by operator."""
    lines: list[str] = []
    for name, patch, _ in patches:
        added = [str(n.op_type) for n in patch.after.graph if n.name in patch.added]
        removed = [str(n.op_type) for n in patch.before.graph if n.name in patch.removed]
        weights = len(patch.changed_weights)
        lines.append(f"{name} (nodes {removed} became {added}, {weights} new weights)")
    return f"changed again by {'; '.join(lines)}"


def _interface(model: onnx.ModelProto, program: Program) -> None:
    for kind, infos, ports in (
        ("input", model.graph.input, program.inputs),
        ("output", model.graph.output, program.outputs),
    ):
        given = [
            (
                i.name,
                onnx.TensorProto.DataType.Name(i.type.tensor_type.elem_type),
                tuple(x.dim_value for x in i.type.tensor_type.shape.dim),
            )
            for i in infos
        ]
        found = [(p.name, p.dtype, p.shape) for p in ports]
        if given != found:
            raise Wrong("interface", f"{kind}s {given} were imported as {found}")


def tolerances(case: Case, runs: Sequence[Arrays]) -> list[float]:
    """`OWN_ERROR` times the error of float32, at least a rounding of the largest number."""
    bounds: list[float] = []
    for i, (expected, largest) in enumerate(zip(case.expected, case.largest, strict=True)):
        own = max(_distance(run[i], expected) for run in runs)
        bounds.append(OWN_ERROR * (own + 2 * EPSILON * largest))
    return bounds


def _distance(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference; infinite where kinds, shapes, NaNs or infinities differ."""
    if got.shape != expected.shape or (got.dtype.kind == "f") != (expected.dtype.kind == "f"):
        return float("inf")
    if expected.dtype.kind != "f":
        return 0.0 if np.array_equal(got, expected) else float("inf")
    finite = np.isfinite(expected)
    if not np.array_equal(got[~finite], expected[~finite], equal_nan=True):
        return float("inf")
    return float(np.max(np.abs(got[finite].astype(np.float64) - expected[finite]), initial=0.0))


def _close(oracle: str, case: Case, got: Arrays, bounds: Sequence[float]) -> None:
    for i, (g, e, bound) in enumerate(zip(got, case.expected, bounds, strict=True)):
        distance = _distance(g, e)
        if not distance <= bound:
            name = case.model.graph.output[i].name
            raise Wrong(
                oracle,
                f"output {name!r} is {distance:.3g} from float64, bound {bound:.3g}; "
                f"{_where(g, e)}",
            )


def agreement(oracle: str, case: Case, got: Arrays) -> None:
    _close(oracle, case, got, [AGREEMENT * max(x, 1e-3) for x in case.largest])


def typical(oracle: str, got: Arrays, expected: Arrays) -> None:
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        if g.shape != e.shape or g.dtype != e.dtype:
            raise Wrong(oracle, f"output {i} is {g.dtype}{g.shape}, not {e.dtype}{e.shape}")
        if not e.size or e.dtype == np.bool_:
            continue
        rest = ~np.isfinite(e)
        if not np.array_equal(g[rest], e[rest], equal_nan=True):
            raise Wrong(oracle, f"output {i} has other infinities; {_where(g, e)}")
        g, e = g[~rest].astype(np.float64), e[~rest].astype(np.float64)
        if not e.size:
            continue
        change = np.sqrt(np.mean((g - e) ** 2))
        size = np.sqrt(np.mean(e**2))
        if not change <= TYPICAL * size + 1e-2:
            raise Wrong(oracle, f"output {i} changed by {change:.3g}, its size is {size:.3g}")


def _where(got: np.ndarray, expected: np.ndarray) -> str:
    if got.shape != expected.shape or got.dtype.kind != expected.dtype.kind:
        return f"{got.dtype}{list(got.shape)}, not {expected.dtype}{list(expected.shape)}"
    wide = [a.astype(np.float64) for a in (got, expected)]
    worst = np.unravel_index(
        np.argmax(np.nan_to_num(np.abs(wide[0] - wide[1]), nan=np.inf)), got.shape
    )
    return f"{got[worst]} where {expected[worst]} is right, at {list(map(int, worst))}"
