"""Plugins that misbehave: the compile goes on as if they were not there, or stops with exit code 5
and names distribution and version. No result is ever another one."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from optcompiler import Budget, Registry, overtime, plugins
from optcompiler.backend import Capabilities, Kernel
from optcompiler.compiler import compile as compile_model
from optcompiler.cost import CostModel
from optcompiler.errors import (
    INVALID,
    NONSENSE,
    NUMBERS,
    OVERTIME,
    RAISED,
    Declined,
    OptcompilerError,
    PluginError,
    QuarantineWarning,
)
from optcompiler.executor import to_torch
from optcompiler.ledger import FAULTY, TAKEN
from optcompiler.observers import Observer, observe
from optcompiler.ops.spec import OpSpec, Work
from optcompiler.program import Program
from optcompiler.rewriting import Candidate, Decline, Stage
from tests.misbehaving import OWNER, Entry, installed, offering, pass_of, rewriting
from tests.toy import Harden, ToyBackend, sigmoid_net

EXACT, LOSSY, LAST = Stage.CLEAN, Stage.REDUCE, Stage.FUSE


class Strange(BaseException):
    """No `Exception`, like `asyncio.CancelledError`."""


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def deep() -> None:
    deep()


def forever() -> None:
    while True:
        pass


def stubborn() -> None:
    """Swallows the first interruption and goes on as if nothing had happened."""
    try:
        forever()
    except BaseException:
        return


def raising(error: BaseException) -> Callable[..., Any]:
    def body(*_: Any) -> Any:
        raise error

    return body


# -- compiling with it and without -------------------------------------------------------------


def batches() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": 3 * rng.standard_normal((4, 8)).astype(np.float32)} for _ in range(5)]


def compiled(registry: Registry, **options: Any) -> Any:
    return compile_model(
        sigmoid_net((1.0, 0.05)), target="toy", registry=registry, calibration=batches(),
        damage="nmse", budget=Budget(max_damage=1e-2), **options,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optcompiler.device.measure", lambda *_: None)
    monkeypatch.setattr(
        "optcompiler.reproducer.write_reproducer", lambda session, pass_, fault, *_: fault
    )
    monkeypatch.setattr(overtime, "AGAIN_S", 0.05)


@pytest.fixture
def toy() -> Entry:
    return Entry("a", lambda: offering(backends=[ToyBackend()], passes=[Harden]), "toy")


@pytest.fixture(scope="module")
def without() -> Any:
    """The artifact of a compile that has no other plugin."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optcompiler.device.measure", lambda *_: None)
        plugin = offering(backends=[ToyBackend()], passes=[Harden])
        return compiled(installed(patch, Entry("a", lambda: plugin, "toy")))


@pytest.fixture
def quarantines(
    monkeypatch: pytest.MonkeyPatch, toy: Entry, without: Any
) -> Callable[..., tuple[str, str]]:
    """Compile with a pass that must be left out: what kind of fault it was, and its reason."""

    def run(evil: type[Any], **options: Any) -> tuple[str, str]:
        registry = installed(monkeypatch, toy, Entry("evil", lambda: offering(passes=[evil])))
        with pytest.warns(QuarantineWarning, match=OWNER) as caught:
            got = compiled(registry, **options)
        assert len([w for w in caught if w.category is QuarantineWarning]) == 1
        assert got.program.content_hash() == without.program.content_hash()
        assert got.manifest["code_hash"] == without.manifest["code_hash"]
        others = [r for r in got.ledger if r.pass_name != "evil"]
        assert others == list(without.ledger)
        mine = [r for r in got.ledger if r.pass_name == "evil"]
        assert mine
        assert {r.outcome for r in mine} <= set(FAULTY)
        (fault,) = got.manifest["options"]["quarantined"]
        assert (fault["pass"], fault["owner"]) == ("evil", OWNER)
        assert OWNER in got.summary()
        return fault["kind"], fault["reason"]

    return run


def test_without_any_fault_there_is_something_to_lose(without: Any) -> None:
    assert TAKEN in [r.outcome for r in without.ledger]
    assert "quarantined" not in without.manifest["options"]


# -- passes that propose ----------------------------------------------------------------------


@pytest.mark.parametrize("stage", [EXACT, LOSSY])
@pytest.mark.parametrize(
    "error",
    [KeyError("oops"), SystemExit(0), GeneratorExit(), Strange("oops"), MemoryError(),
     Unprintable(), StopIteration(3)],
    ids=repr,
)  # fmt: skip
def test_raising_in_propose(quarantines: Any, error: BaseException, stage: Stage) -> None:
    kind, reason = quarantines(pass_of(raising(error), stage))
    assert kind == RAISED
    assert type(error).__name__ in reason


def offer(**changes: Any) -> Any:
    given = {"site": "s0", "choice": "c", "rewrite": print, "exact": True} | changes
    return lambda program, context: [Candidate(**given)]


@pytest.mark.parametrize(
    ("propose", "said"),
    [
        (lambda *_: None, "NoneType"),
        (lambda *_: 3, "int"),
        (lambda *_: ["s0"], "str"),
        (lambda *_: [Candidate], "yield Candidate or Decline"),
        (offer(site=""), "site is ''"),
        (offer(choice=None), "choice is None"),
        (offer(rewrite=None), "rewrite is None"),
        (offer(exact="yes"), "exact"),
        (offer(rtol=float("nan")), "rtol nan"),
        (offer(rtol=5.0), "rtol 5.0"),
        (offer(nodes="s0"), "no tuple of names"),
        (offer(nodes=(3,)), "no tuple of names"),
        (offer(details=None), "details"),
        (offer(exact=False), "not exact"),
        (lambda *_: [Decline("s0", "")], "reason is ''"),
        (lambda *_: 2 * offer()(None, None), "twice"),
        (lambda *_: (Decline("s0", "no") for _ in itertools.count()), "more than"),
    ],
)  # fmt: skip
def test_proposing_nonsense(quarantines: Any, propose: Any, said: str) -> None:
    kind, reason = quarantines(pass_of(propose))
    assert kind == NONSENSE
    assert said in reason


def endless(*_: Any) -> Iterator[Decline]:
    while True:
        yield from ()


@pytest.mark.parametrize("body", [lambda *_: forever(), lambda *_: stubborn() or [], endless])
def test_proposing_for_ever(quarantines: Any, body: Any) -> None:
    start = time.monotonic()
    kind, reason = quarantines(pass_of(body), time_limit_s=0.2)
    assert kind == OVERTIME
    assert "0.2 s" in reason
    assert time.monotonic() - start < 60


def test_recursing_for_ever(quarantines: Any) -> None:
    kind, reason = quarantines(pass_of(lambda *_: deep()))
    assert (kind, "RecursionError" in reason) == (RAISED, True)


def test_what_a_pass_finds_in_its_hands_is_its_own(
    monkeypatch: pytest.MonkeyPatch, toy: Entry, without: Any
) -> None:
    def spoil(program: Program, context: Any) -> list[Any]:
        for mine in (program, context.teacher):
            mine.node("s0").op_type = "Tanh"
            mine.graph.outputs.clear()
        context.calibration[0]["x"] = np.zeros((4, 8), np.float32)
        context.calibration.clear()
        context.holdout.clear()
        context.observers.clear()
        return []

    evil = Entry("evil", lambda: offering(passes=[pass_of(spoil)]))
    got = compiled(installed(monkeypatch, toy, evil))
    assert got.program.content_hash() == without.program.content_hash()
    assert list(got.ledger) == list(without.ledger)


def overwrite(array: np.ndarray) -> None:
    array[...] = 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda program, context: overwrite(program.weights()["k0"].numpy()),
        lambda program, context: overwrite(context.teacher.weights()["k0"].numpy()),
        lambda program, context: overwrite(context.calibration[0]["x"]),
        lambda program, context: overwrite(context.holdout[0]["x"]),
    ],
    ids=["weights", "teacher", "calibration", "holdout"],
)
def test_what_is_shared_is_read_only(quarantines: Any, spoil: Any) -> None:
    kind, reason = quarantines(pass_of(spoil, LOSSY))
    assert (kind, "read-only" in reason) == (RAISED, True)


def write_through(array: np.ndarray) -> None:
    """What numpy refuses and torch does, with a warning."""
    import torch

    torch.from_numpy(array).zero_()


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("and_then", [list, lambda: deep() or []], ids=["ends", "raises"])
@pytest.mark.parametrize("stage", [EXACT, LOSSY, LAST])
@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda program, context: write_through(program.weights()["k0"].numpy()), "weight 'k0'"),
        (lambda program, context: write_through(context.calibration[0]["x"]), "input 'x'"),
    ],
    ids=["weights", "calibration"],
)
def test_writing_past_numpy_stops_the_compile(
    monkeypatch: pytest.MonkeyPatch, toy: Entry, spoil: Any, what: str, stage: Stage,
    and_then: Callable[[], list[Any]],
) -> None:  # fmt: skip
    def propose(program: Program, context: Any) -> list[Any]:
        spoil(program, context)
        return and_then()

    evil = Entry("evil", lambda: offering(passes=[pass_of(propose, stage)]))
    with pytest.raises(PluginError, match=f"{what} was written to.*pass evil of {OWNER}"):
        compiled(installed(monkeypatch, toy, evil))


# -- passes that rewrite ----------------------------------------------------------------------


def dangle(program: Program) -> None:
    lost = ir.val("nowhere", ir.DataType.FLOAT, ir.Shape([4, 8]))
    program.node("out").replace_input_with(0, lost)


def name_nodes_alike(program: Program) -> None:
    program.node("s1").name = "s0"


def name_values_alike(program: Program) -> None:
    program.node("s1").outputs[0].name = program.node("s0").outputs[0].name


def leave_a_name_out(program: Program) -> None:
    program.node("s1").name = ""


def change_a_type(program: Program) -> None:
    program.node("s0").op_type = "IsNaN"


def change_the_output_type(program: Program) -> None:
    program.graph.outputs[0].dtype = ir.DataType.DOUBLE


def change_the_output_shape(program: Program) -> None:
    program.graph.outputs[0].shape = ir.Shape([8, 4])


def rename_the_input(program: Program) -> None:
    program.graph.inputs[0].name = "z"


def drop_the_output(program: Program) -> None:
    program.graph.outputs.clear()


def add_an_output(program: Program) -> None:
    program.graph.outputs.append(program.node("s0").outputs[0])


def tie_a_knot(program: Program) -> None:
    program.node("s0").replace_input_with(0, program.node("out").outputs[0])


def invent_an_operator(program: Program) -> None:
    program.node("s0").op_type = "Nonsense"


def change_the_opset(program: Program) -> None:
    program.graph.opset_imports[""] = 999


def lose_the_model(program: Program) -> None:
    program.model = None  # type: ignore[assignment]


def lose_the_nodes(program: Program) -> None:
    for node in list(program.graph):
        program.graph.remove(node)


def lie_about_a_weight(program: Program) -> None:
    program.graph.initializers["k0"].const_value = ir.tensor(np.zeros(3, np.float32), name="k0")


def lose_a_weight(program: Program) -> None:
    program.graph.initializers["k0"].const_value = None


CORRUPTIONS = [
    dangle, name_nodes_alike, name_values_alike, leave_a_name_out, change_a_type,
    change_the_output_type, change_the_output_shape, rename_the_input, drop_the_output,
    add_an_output, tie_a_knot, invent_an_operator, change_the_opset, lose_the_model,
    lose_the_nodes, lie_about_a_weight, lose_a_weight,
]  # fmt: skip


@pytest.mark.parametrize("stage", [EXACT, LOSSY, LAST])
@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_corrupting_the_graph(quarantines: Any, corrupt: Any, stage: Stage) -> None:
    kind, reason = quarantines(rewriting(corrupt, stage))
    assert kind == INVALID
    assert reason.startswith("evil[program=rewrite]: ")


@pytest.mark.parametrize("stage", [EXACT, LOSSY, Stage.QUANTIZE, Stage.TUNE, LAST])
def test_raising_in_a_rewrite(
    quarantines: Any, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optcompiler.planner.NEGLIGIBLE", 0)
    kind, reason = quarantines(rewriting(raising(Strange("oops")), stage))
    assert (kind, "Strange: oops" in reason) == (RAISED, True)


@pytest.mark.parametrize("body", [forever, stubborn])
def test_rewriting_for_ever(quarantines: Any, body: Callable[[], None]) -> None:
    kind, _ = quarantines(rewriting(lambda program: body(), LOSSY), time_limit_s=0.2)
    assert kind == OVERTIME


def another_function(program: Program) -> None:
    program.node("out").op_type = "Neg"


def not_a_number(program: Program) -> None:
    program.set_weight(program.graph.initializers["k0"], np.full(8, np.nan, np.float32))


@pytest.mark.parametrize("stage", [EXACT, LAST])
@pytest.mark.parametrize("lie", [another_function, not_a_number])
def test_calling_exact_what_is_not(quarantines: Any, lie: Any, stage: Stage) -> None:
    kind, reason = quarantines(rewriting(lie, stage))
    assert (kind, "outputs differ" in reason) == (NUMBERS, True)


def test_what_it_had_done_before_is_undone_too(quarantines: Any) -> None:
    def rename(program: Program) -> None:
        program.node("s1").outputs[0].name = "renamed"

    def propose(program: Program, context: Any) -> Iterator[Candidate]:
        yield Candidate("s1", "rename", rename, True, ("s1",))
        yield Candidate("out", "negate", another_function, True, ("out",))

    kind, reason = quarantines(pass_of(propose))
    assert kind == NUMBERS
    assert "evil[out=negate]" in reason


def test_failing_only_after_another_candidate(quarantines: Any) -> None:
    """As it is priced together with the others, or in a plan that takes them."""

    def rewrite(program: Program, name: str, other: str) -> None:
        if program.node(other).op_type == "HardSigmoid":
            raise RuntimeError("not after the other one")
        program.node(name).op_type = "HardSigmoid"

    def propose(program: Program, context: Any) -> Iterator[Candidate]:
        for name, other in (("s0", "s1"), ("s1", "s0")):
            yield Candidate(
                name, "hard", lambda p, n=name, o=other: rewrite(p, n, o), False, (name,)
            )

    for stage in (LOSSY, Stage.QUANTIZE):
        kind, _ = quarantines(pass_of(propose, stage), passes=["default"])
        assert kind == RAISED


def test_a_second_thought_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, toy: Entry, without: Any
) -> None:
    evil = rewriting(raising(Declined("not here")))
    got = compiled(installed(monkeypatch, toy, Entry("b", lambda: offering(passes=[evil]))))
    assert got.ledger[0].reason == "not here"
    assert got.program.content_hash() == without.program.content_hash()


def test_ctrl_c_is_the_users(monkeypatch: pytest.MonkeyPatch, toy: Entry) -> None:
    evil = pass_of(raising(KeyboardInterrupt()))
    registry = installed(monkeypatch, toy, Entry("evil", lambda: offering(passes=[evil])))
    with pytest.raises(KeyboardInterrupt):
        compiled(registry)


def test_stopping_at_a_fault(monkeypatch: pytest.MonkeyPatch, toy: Entry) -> None:
    evil = rewriting(dangle)
    registry = installed(monkeypatch, toy, Entry("evil", lambda: offering(passes=[evil])))
    with pytest.raises(PluginError, match=f"evil of {OWNER}") as caught:
        compiled(registry, on_fault="stop")
    assert caught.value.exit_code == 5


# -- everything else stops the compile --------------------------------------------------------


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch, toy: Entry) -> Callable[..., str]:
    """Compile with entries that must stop it; what is said."""

    def run(*entries: Entry, exit_code: int = 5, **options: Any) -> str:
        with pytest.raises(OptcompilerError) as caught:
            compiled(installed(monkeypatch, *entries or (toy,)), **options)
        assert OWNER in str(caught.value)
        assert caught.value.exit_code == exit_code
        return str(caught.value)

    return run


@pytest.mark.parametrize(
    "load",
    [raising(ImportError("no torchvision")), raising(SyntaxError("bad")), raising(SystemExit(0)),
     raising(Strange("oops")), raising(GeneratorExit()), deep, forever, stubborn],
)  # fmt: skip
def test_failing_to_import(stops: Any, toy: Entry, load: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(plugins, "LIMIT_S", 0.2)
    assert "plugin 'evil'" in stops(toy, Entry("evil", load))


def claiming(**members: Any) -> type[Any]:
    return pass_of(lambda *_: [], **members)


class Oracle(CostModel):
    name = "oracle"

    def __init__(self, answer: Any = 1.0) -> None:
        self.answer = answer

    def kernel_us(self, kernel: Any, profile: Any) -> float:
        return self.answer() if callable(self.answer) else self.answer


def costless(node: Any) -> Work:
    return Work()


@pytest.mark.parametrize(
    "offered",
    [
        {"passes": raising(RuntimeError("oops"))},
        {"passes": raising(Strange("oops"))},
        {"passes": None},
        {"passes": [None]},
        {"passes": [int]},
        {"passes": [Harden()]},
        {"passes": lambda: itertools.repeat(Harden)},
        {"passes": lambda: forever()},
        {"passes": [claiming(name="harden")]},
        {"passes": [claiming(name="")]},
        {"passes": [claiming(stage="clean")]},
        {"passes": [claiming(after="simplify")]},
        {"passes": [claiming(time_limit_s=-1)]},
        {"passes": [claiming(__init__=raising(Strange("oops")))]},
        {"passes": [claiming(options=raising(ValueError("oops")))]},
        {"passes": [claiming(options=lambda self: 3)]},
        {"backends": [ToyBackend()]},
        {"backends": [ToyBackend]},
        {"cost_models": [type("Twice", (Oracle,), {"name": "roofline"})()]},
        {"cost_models": [3]},
        {"ops": [3]},
        {"ops": [OpSpec("Relu", print, costless)]},
        {"observers": [3]},
    ],
    ids=lambda v: next(iter(v)),
)
def test_offering_nonsense(stops: Any, toy: Entry, offered: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(plugins, "LIMIT_S", 0.5)
    stops(toy, Entry("evil", lambda: offering(**offered)))


class Evil(ToyBackend):
    """A toy backend with some methods replaced."""

    def __init__(self, **methods: Any) -> None:
        super().__init__()
        for name, method in methods.items():
            setattr(self, name, method)


def kernels_with(**changes: Any) -> Any:
    def kernels(program: Program, target: Any) -> list[Kernel]:
        return [replace(k, **changes) for k in ToyBackend().kernels(program, target)]

    return kernels


def kernels_that_rewrite(program: Program, target: Any) -> list[Kernel]:
    program.node("s0").op_type = "Tanh"
    return []


def lowering_to_a_link(
    program: Program, target: Any, directory: Any, choices: Any
) -> dict[str, Any]:
    (directory / "model.onnx").symlink_to("/etc/hostname")
    return {}


def lowering_to_nowhere(
    program: Program, target: Any, directory: Any, choices: Any
) -> dict[str, Any]:
    directory.rmdir()
    return {}


def running(change: Callable[[list[Any]], Any], **members: Any) -> Any:
    """A `load` whose runner's outputs are changed."""

    def load(directory: Any, info: Any, *, threads: int) -> Any:
        runner = ToyBackend().load(directory, info, threads=threads)
        run = runner.run
        runner.run = lambda inputs: change(run(inputs))  # type: ignore[method-assign]
        vars(runner).update(members)
        return runner

    return load


@pytest.mark.parametrize(
    "methods",
    [
        *({m: raising(ZeroDivisionError("oops"))} for m in
          ("capabilities", "kernels", "lower", "load", "runs_here", "versions")),
        {"lower": raising(SystemExit(0))},
        {"capabilities": lambda target: None},
        {"capabilities": lambda target: Capabilities},
        {"kernels": lambda program, target: None},
        {"kernels": lambda program, target: ["gemm"]},
        {"kernels": kernels_with(flops=float("nan"))},
        {"kernels": kernels_with(macs=-1)},
        {"kernels": kernels_with(bytes_moved="many")},
        {"kernels": kernels_that_rewrite},
        {"lower": lambda program, target, directory, choices: None},
        {"lower": lowering_to_a_link},
        {"lower": lowering_to_nowhere},
        {"load": lambda directory, info, threads: None},
        {"load": running(lambda outputs: None)},
        {"load": running(lambda outputs: ["text"])},
        {"load": running(raising(RuntimeError("oops")))},
        {"load": running(lambda outputs: outputs, close=raising(RuntimeError("oops")))},
        {"runs_here": lambda target: "perhaps"},
        {"versions": lambda: 3},
        {"nominal_profile": lambda target: 3},
        {"profiled_as": lambda target: 3},
    ],
    ids=lambda v: next(iter(v)),
)  # fmt: skip
def test_backends(stops: Any, methods: dict[str, Any]) -> None:
    plugin = offering(backends=[Evil(**methods)], passes=[Harden])
    assert "backend 'toy'" in stops(Entry("evil", lambda: plugin))


@pytest.mark.parametrize(
    "change",
    [
        lambda outputs: [a + 1 for a in outputs],
        lambda outputs: [np.full_like(a, np.nan) for a in outputs],
        lambda outputs: [],
        lambda outputs: 2 * outputs,
        lambda outputs: [a[:1] for a in outputs],
        lambda outputs: [a.astype(np.float64) for a in outputs],
    ],
)
def test_backends_that_compute_something_else(stops: Any, change: Any) -> None:
    plugin = offering(backends=[Evil(load=running(change))], passes=[Harden])
    assert "fault of the backend" in stops(Entry("evil", lambda: plugin), exit_code=1)


@pytest.mark.parametrize(
    "answer", [raising(KeyError("oops")), float("nan"), float("inf"), -1.0, "cheap", None]
)
def test_cost_models(stops: Any, toy: Entry, answer: Any) -> None:
    evil = Entry("evil", lambda: offering(cost_models=[Oracle(answer)]))
    assert "cost model 'oracle'" in stops(toy, evil, cost_model="oracle")


class Watcher(Observer):
    name = "watcher"

    def update(self, array: Any) -> None:
        pass

    def range(self, bits: int, symmetric: bool) -> tuple[float, float]:
        return -1.0, 1.0


def watching(program: Program, context: Any) -> Iterator[Decline]:
    make = context.observers["watcher"]
    seen = observe(program, ["a0"], context.calibration, make, context.ops)
    yield Decline("s0", f"it ranges over {seen['a0'].range(8, True)}")


@pytest.mark.parametrize(
    "members",
    [
        {"__init__": raising(RuntimeError("oops"))},
        {"update": raising(Strange("oops"))},
        {"update": lambda self, array: overwrite(array)},
        {"range": raising(RuntimeError("oops"))},
        {"range": lambda self, bits, symmetric: None},
        {"range": lambda self, bits, symmetric: (1.0, -1.0)},
        {"range": lambda self, bits, symmetric: (float("-inf"), 0.0)},
        {"range": lambda self, bits, symmetric: (float("nan"), 0.0)},
    ],
)
def test_observers(stops: Any, toy: Entry, members: Any) -> None:
    """The pass that asks the observer is not to blame."""
    watcher = type("Evil", (Watcher,), members)
    evil = Entry("evil", lambda: offering(observers=[watcher]))
    asking = pass_of(watching, LOSSY, name="watching")
    user = Entry("user", lambda: offering(passes=[asking]), "innocent")
    assert "observer 'watcher'" in stops(toy, evil, user)


CUSTOM = """
<ir_version: 10, opset_import: ["" : 20, "evil" : 1]>
net (float[2,4] x) => (float[2,4] y) { [odd] h = evil.Odd (x) [out] y = Relu (h) }
"""


@pytest.mark.parametrize(
    "torch",
    [raising(RuntimeError("oops")), raising(SystemExit(1)), lambda x: "text", lambda x: x.numpy()],
)
def test_operators(monkeypatch: pytest.MonkeyPatch, torch: Any) -> None:
    spec = OpSpec("Odd", torch, costless, domain="evil")
    registry = installed(monkeypatch, Entry("evil", lambda: offering(ops=[spec])))
    program = Program.from_onnx(ir.from_onnx_text(CUSTOM))
    module = to_torch(program, registry.ops, trainable=False)
    import torch as library

    with pytest.raises(PluginError, match=f"operator 'evil::Odd' of {OWNER}: torch"):
        module(library.zeros(2, 4))


@pytest.mark.parametrize("field", ["cost", "channels", "facts"])
@pytest.mark.parametrize("answer", [raising(RuntimeError("oops")), lambda *_: 3])
def test_rules_of_operators(monkeypatch: pytest.MonkeyPatch, field: str, answer: Any) -> None:
    given = {"cost": costless, field: answer}
    spec = OpSpec("Odd", lambda x: x, domain="evil", **given)
    registry = installed(monkeypatch, Entry("evil", lambda: offering(ops=[spec])))
    node = Program.from_onnx(ir.from_onnx_text(CUSTOM)).node("odd")
    assert node is not None
    with pytest.raises(PluginError, match=f"operator 'evil::Odd' of {OWNER}: {field}"):
        getattr(registry.ops.require(node), field)(node)
