"""The driver with a toy backend: planning under budgets, verification, never slower, gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from optcompiler import Budget, Program, finish
from optcompiler.compiler import compile as compile_model
from optcompiler.errors import (
    Declined,
    GateError,
    InputError,
    PluginError,
    QuarantineWarning,
    VerificationError,
)
from optcompiler.ledger import DECLINED, REJECTED, REVERTED, ROLLED_BACK, TAKEN
from tests.support import assert_close, op_types, random_inputs, run_onnx
from tests.toy import Harden, Rewrite, ToyBackend, registry, sigmoid_net

SCALES = (8.0, 0.05, 1.0, 0.2)


def batches(count: int = 4) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": 3 * rng.standard_normal((4, 8)).astype(np.float32)} for _ in range(count)]


def compiled(
    program: Program, *, backend: ToyBackend | None = None, passes: Any = None, **options: Any
) -> Any:
    found = registry(backend, Harden)
    return compile_model(
        program, target="toy", registry=found, passes=passes, calibration=batches(),
        damage="nmse", **options,
    )  # fmt: skip


def outcomes(ledger: Any) -> dict[str, str]:
    return {row.site: row.outcome for row in ledger}


def test_no_budget_left_takes_the_least_harmful_first() -> None:
    net = sigmoid_net(SCALES)
    got = compiled(net, budget=Budget(max_damage=1e-4))
    kept = outcomes(got.ledger)
    assert kept["s1"] == TAKEN
    assert kept["s0"] == REJECTED
    damages = {row.site: row.damage for row in got.ledger}
    assert damages["s1"] < damages["s3"] < damages["s2"] < damages["s0"]
    assert got.measurements["damage"] <= 1e-4
    assert all(row.saving_us == pytest.approx(90, rel=0.01) for row in got.ledger)


def test_wide_budget_takes_all_and_narrow_none() -> None:
    net = sigmoid_net(SCALES)
    assert set(outcomes(compiled(net, budget=Budget(max_damage=1.0)).ledger).values()) == {TAKEN}
    none = compiled(net, budget=Budget(max_damage=0.0))
    assert set(outcomes(none.ledger).values()) == {REJECTED}
    inputs = random_inputs(net)
    assert_close(none.run(inputs), run_onnx(net, inputs), 1e-6)


def test_nothing_is_lost_where_no_data_says_how_much() -> None:
    net = sigmoid_net(SCALES)
    found = registry(None, Harden)
    got = compile_model(net, target="toy", registry=found)
    rows = [row for row in got.ledger if row.pass_name == "harden"]
    assert {row.outcome for row in rows} == {DECLINED}
    assert all(row.reason.startswith("no calibration data to measure damage on") for row in rows)
    assert got.measurements["damage"] is None
    inputs = random_inputs(net)
    assert_close(got.run(inputs), run_onnx(net, inputs), 1e-6)


@pytest.mark.parametrize("example", [True, False])
def test_a_limit_without_calibration_data_is_judged_on_what_the_summary_names(
    example: bool,
) -> None:
    net = sigmoid_net(SCALES)
    given = (batches(1)[0]["x"],) if example else None
    got = compile_model(
        net, given, target="toy", registry=registry(None, Harden), damage="nmse",
        budget=Budget(max_damage=1.0),
    )  # fmt: skip
    assert TAKEN in outcomes(got.ledger).values()
    data = "example inputs" if example else "random inputs"
    assert f"damage (nmse) on {data}" in got.summary()
    assert 0 < got.measurements["damage"] <= 1
    assert [g["name"] for g in got.measurements["gates"]] == ["damage"]


def test_fp32_leaves_lossy_passes_out_unless_they_are_asked_for() -> None:
    net = sigmoid_net(SCALES)
    shared: dict[str, Any] = {"precision": "fp32", "budget": Budget(max_damage=1.0)}
    assert "harden" not in {row.pass_name for row in compiled(net, **shared).ledger}
    asked = compiled(net, passes=["harden"], **shared)
    assert TAKEN in outcomes(asked.ledger).values()


def test_a_size_of_no_dimension_is_refused() -> None:
    with pytest.raises(InputError, match=r"size.batch: .* 'batch', there is none; leave it out"):
        compile_model(sigmoid_net(SCALES), target="toy:size.batch=4", registry=registry())
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[N, 4] x) => (float[N, 4] y) { y = Neg (x) }"""
    with pytest.raises(InputError, match=r"'n', there is N; leave it out"):
        compile_model(Program.from_text(text), target="toy:size.n=4", registry=registry())


def test_metric_decides() -> None:
    net = sigmoid_net(SCALES)
    x = batches(1)[0]["x"]
    (truth,) = run_onnx(net, {"x": x})

    def closeness(model: Callable[..., Any]) -> float:
        (y,) = model(x)
        return -float(np.abs(y - truth).max())

    got = compiled(net, budget=Budget(max_drop=0.05, metric=closeness))
    metric = got.measurements["metric"]
    assert metric["teacher"] == pytest.approx(0, abs=1e-6)
    assert 0 < metric["drop"] <= 0.05
    assert outcomes(got.ledger)["s0"] == REJECTED
    assert TAKEN in outcomes(got.ledger).values()


def test_latency_goal_stops_taking_losses() -> None:
    net = sigmoid_net(SCALES)
    got = compiled(net, budget=Budget(max_damage=1.0, max_latency_ms=0.25))
    kept = outcomes(got.ledger)
    assert [kept[s] for s in ("s0", "s1", "s2", "s3")].count(TAKEN) == 2
    assert kept["s0"] == REJECTED


def test_missed_gate_raises_with_the_best_artifact() -> None:
    with pytest.raises(GateError, match=r"size in MB is .* over 1e-06") as caught:
        compiled(sigmoid_net(SCALES), budget=Budget(max_size_mb=1e-6))
    assert caught.value.compiled is not None
    assert caught.value.compiled.measurements["gates"][0]["passed"] is False


def test_declines_are_rows() -> None:
    net = Program.from_text(
        '<ir_version: 10, opset_import: ["" : 20]>\nn (float[4,8] x) => (float[4,8] y) '
        "{ [t] y = Tanh (x) }"
    )
    got = compiled(net)
    (row,) = got.ledger
    assert (row.site, row.outcome, row.reason) == ("t", DECLINED, "a tanh is no sigmoid")
    assert got.ledger.about("t") == [row]


def exact(rewrite: Callable[[Program], None]) -> Any:
    return compiled(sigmoid_net((1.0, 2.0)), passes=[Rewrite(rewrite)])


def faulty(rewrite: Callable[[Program], None], said: str = "") -> Any:
    with pytest.warns(QuarantineWarning, match=said):
        return exact(rewrite)


def test_exact_patch_that_computes_something_else_is_rolled_back() -> None:
    got = faulty(lambda program: setattr(program.node("s0"), "op_type", "Tanh"))
    (row,) = got.ledger
    assert row.outcome == ROLLED_BACK
    assert "outputs differ" in row.reason
    assert "Tanh" not in op_types(got.program)


def test_patch_that_is_not_valid_onnx_is_rolled_back() -> None:
    got = faulty(lambda program: setattr(program.node("s0"), "op_type", "Nonsense"))
    (row,) = got.ledger
    assert row.outcome == ROLLED_BACK
    assert "rewrite[program=rewrite]: not valid ONNX" in row.reason


def test_patch_that_changes_the_interface_is_rolled_back() -> None:
    def rename(program: Program) -> None:
        program.graph.inputs[0].name = "z"

    (row,) = faulty(rename).ledger
    assert row.outcome == ROLLED_BACK
    assert "interface changed" in row.reason


def test_rewrite_may_decline_late_and_may_change_nothing() -> None:
    def decline(program: Program) -> None:
        raise Declined("on second thoughts")

    (row,) = exact(decline).ledger
    assert (row.outcome, row.reason) == (DECLINED, "on second thoughts")
    (row,) = exact(lambda program: None).ledger
    assert (row.outcome, row.reason) == (DECLINED, "it changed nothing")


def test_exact_patch_is_taken_and_stamped() -> None:
    def cut(program: Program) -> None:
        node = program.node("out")
        source = node.inputs[0].producer()
        fresh = ir.node("Identity", [source.outputs[0]], name="again")
        program.graph.insert_before(node, fresh)
        node.replace_input_with(0, fresh.outputs[0])
        fresh.outputs[0].name = "again_y"

    got = exact(cut)
    assert got.ledger[0].outcome == TAKEN
    assert got.program.node("again").metadata_props["optcompiler.pass"] == "rewrite"


def test_rewrite_that_raises_is_the_plugins_fault() -> None:
    def fail(program: Program) -> None:
        raise ZeroDivisionError("oops")

    said = r"rewrite\[program=rewrite\].*ZeroDivisionError: oops"
    with pytest.raises(PluginError, match=said):
        compiled(sigmoid_net((1.0, 2.0)), passes=[Rewrite(fail)], on_fault="stop")
    (row,) = faulty(fail, said).ledger
    assert row.outcome == ROLLED_BACK
    assert "ZeroDivisionError: oops" in row.reason


def test_backend_that_computes_something_else_is_caught() -> None:
    with pytest.raises(VerificationError, match="fault of the backend"):
        compiled(sigmoid_net((1.0,)), backend=ToyBackend(corrupt=True), passes=[])


def test_never_slower() -> None:
    """The candidates are predicted to be faster; the machine says otherwise."""
    slow = ToyBackend(timed=True, delays_us={"HardSigmoid": 12000, "Sigmoid": 1000, "Tanh": 1000})
    got = compiled(sigmoid_net((1.0, 1.0)), backend=slow, budget=Budget(max_damage=1.0))
    assert set(outcomes(got.ledger).values()) == {REVERTED}
    assert "µs with it" in got.ledger[0].reason
    assert "HardSigmoid" not in op_types(got.program)
    assert got.measurements["measured_us"] < 12000


def test_faster_is_kept_and_measured() -> None:
    fast = ToyBackend(timed=True, delays_us={"HardSigmoid": 100, "Sigmoid": 3000, "Tanh": 1000})
    got = compiled(sigmoid_net((1.0, 1.0)), backend=fast, budget=Budget(max_damage=1.0))
    assert set(outcomes(got.ledger).values()) == {TAKEN}
    assert got.measurements["measured_us"] < got.measurements["baseline_us"] / 2


def test_precision_of_another_target() -> None:
    with pytest.raises(InputError, match=r"no precision 'fp8'; it has fp32, int8"):
        compiled(sigmoid_net((1.0,)), precision="fp8")


def test_integer_precision_needs_calibration() -> None:
    with pytest.raises(InputError, match="needs calibration data"):
        compile_model(sigmoid_net((1.0,)), target="toy", registry=registry(), precision="int8")


def test_metric_that_fails_is_an_input_error() -> None:
    def broken(model: Any) -> float:
        raise KeyError("labels")

    with pytest.raises(InputError, match="metric raised KeyError"):
        compiled(sigmoid_net((1.0,)), budget=Budget(max_drop=1, metric=broken))
    with pytest.raises(InputError, match="finite"):
        compiled(sigmoid_net((1.0,)), budget=Budget(max_drop=1, metric=lambda model: float("nan")))


@pytest.mark.parametrize("limit", ["max_damage", "max_latency_ms", "max_size_mb"])
def test_negative_budgets_are_refused(limit: str) -> None:
    with pytest.raises(InputError, match=limit):
        Budget(**{limit: -1})
    with pytest.raises(InputError, match="needs a metric"):
        Budget(max_drop=1)


def test_one_tensor_is_enough_as_example_inputs() -> None:
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Sigmoid()).eval()
    x = torch.randn(4, 8)
    got = compile_model(module, x, target="toy", registry=registry(), precision="fp32")
    torch.testing.assert_close(got(x), module(x).detach())
    assert got.measurements["macs"] == {"before": 128, "after": 128}


def test_what_it_falls_back_to_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    original = finish.compare

    def recorded(session: Any, built: Any) -> None:
        compared.append(built.label)
        original(session, built)

    monkeypatch.setattr(finish, "compare", recorded)
    slow = ToyBackend(timed=True, delays_us={"HardSigmoid": 12000, "Sigmoid": 1000, "Tanh": 3000})
    compiled(sigmoid_net((1.0,)), backend=slow, budget=Budget(max_damage=1.0))
    assert len(compared) == 2
    assert compared[0] == "final"
