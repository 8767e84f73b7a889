"""Plans on paper: which candidates are taken, in which order they are tried, and what rows say."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from optcompiler import planner as planner_module
from optcompiler.budget import Budget
from optcompiler.errors import INVALID, RAISED, Declined, PassFault, PluginError
from optcompiler.ledger import DECLINED, REJECTED, TAKEN, TUNING, Row
from optcompiler.planner import Offer, Planner, Probe, in_order
from optcompiler.program import Program
from optcompiler.rewriting import Candidate, Decline, Pass, Stage
from optcompiler.session import Session
from tests.paper import (
    PaperBackend,
    PaperCosts,
    PaperJudge,
    chain,
    operators,
    paper_pass,
    paper_session,
    replace_operator,
    side_by_side,
    swap,
)

INSIDE = "inside the budget"


@dataclass
class Outcome:
    """A plan, what it was made with, and its rows by site and choice."""

    planner: Planner
    probe: Probe
    judge: PaperJudge
    session: Session

    @property
    def rows(self) -> dict[tuple[str, str], Row]:
        return {(r.site, r.choice): r for r in self.session.ledger}

    @property
    def taken(self) -> set[str]:
        return {r.site for r in self.session.ledger.with_outcome(TAKEN)}

    @property
    def notes(self) -> list[str]:
        return self.session.progress.notes  # type: ignore[attr-defined]


def plan(
    program: Program,
    passes: Sequence[Pass] | Sequence[Candidate | Decline],
    damages: dict[tuple[str, str], float] | None = None,
    *,
    costs: PaperCosts | None = None,
    backend: PaperBackend | None = None,
    cannot_run: Iterable[str] = (),
    quick: PaperJudge | None = None,
    score: Callable[[Program], float] | None = None,
    session: dict[str, Any] | None = None,
    **budget: Any,
) -> Outcome:
    """Plan the passes (or one pass that offers the given candidates) for `program`."""
    if not any(isinstance(p, Pass) for p in passes):
        passes = [paper_pass(passes)]  # type: ignore[arg-type]
    made = paper_session(program, costs, backend, **session or {})
    judge = PaperJudge(damages or {}, frozenset(cannot_run))
    quick = quick or PaperJudge(judge.damages, judge.cannot_run)
    planner = Planner(made, passes, Budget(**budget), judge, quick, score)  # type: ignore[arg-type]
    return Outcome(planner, planner.plan(program), judge, made)


def relus(names: str) -> Program:
    return side_by_side(**dict.fromkeys(names, "Relu"))


# -- what is taken ----------------------------------------------------------------------------


def test_all_that_fits_is_taken_and_says_what_it_saves_and_damages() -> None:
    got = plan(
        relus("ab"), [swap("a", "Neg"), swap("b", "Abs")],
        {("a", "Neg"): 0.25, ("b", "Abs"): 0.125}, max_damage=0.375,
    )  # fmt: skip
    assert operators(got.probe.program) == {"a": "Neg", "b": "Abs"}
    assert [(r.site, r.choice, r.outcome, r.reason) for r in got.session.ledger] == [
        ("a", "Neg", TAKEN, INSIDE),
        ("b", "Abs", TAKEN, INSIDE),
    ]
    assert [(r.saving_us, r.damage) for r in got.session.ledger] == [(90, 0.25), (60, 0.125)]
    assert [o.key for o in got.probe.chosen] == [("swap", "b", "Abs"), ("swap", "a", "Neg")]
    assert (got.probe.damage, got.probe.holds, got.probe.score) == (0.375, True, None)
    assert [(p.name, c.site) for p, c in got.probe.steps] == [("swap", "a"), ("swap", "b")]
    assert got.notes == ["2 lossy candidates: damage 0.375 holds the budget"]


def test_what_a_taken_candidate_remarks_is_in_its_reason() -> None:
    remarked = swap("a", "Neg", note="its table stays")
    got = plan(relus("a"), [remarked], {("a", "Neg"): 0.25}, max_damage=0.375)
    assert got.rows["a", "Neg"].reason == f"{INSIDE}; its table stays"


def test_nothing_on_offer_leaves_the_program() -> None:
    program = relus("a")
    got = plan(program, [Decline("a", "too small", ("a",))], max_damage=1.0)
    assert got.probe.program is program
    assert got.probe.chosen == ()
    assert got.probe.holds
    (row,) = got.session.ledger
    assert (row.outcome, row.reason, row.nodes) == (DECLINED, "too small", ("a",))
    assert len(got.judge.tried) == 1


def test_least_damage_for_a_microsecond_goes_first() -> None:
    """`a` damages least but saves little; `c` damages most and saves much."""
    got = plan(
        relus("abc"), [swap("a", "Abs"), swap("b", "Neg"), swap("c", "Neg")],
        {("a", "Abs"): 0.25, ("b", "Neg"): 0.75, ("c", "Neg"): 0.3125}, max_damage=0.3125,
    )  # fmt: skip
    assert got.taken == {"c"}
    assert got.rows["a", "Abs"].outcome == REJECTED
    assert {r.site: r.reason for r in got.session.ledger.with_outcome(REJECTED)} == {
        "a": "Abs alone damages 0.25, more than the 0 left of the budget 0.312",
        "b": "Neg alone damages 0.75, more than the 0 left of the budget 0.312",
    }
    assert [sorted(k for k, v in t.items() if v != "Relu") for t in got.judge.tried] == [
        [], ["a", "b", "c"], ["c"], ["a", "c"],
    ]  # fmt: skip


def test_equal_ranks_go_by_name() -> None:
    got = plan(
        relus("ab"), [swap("b", "Neg"), swap("a", "Neg")],
        {("a", "Neg"): 0.5, ("b", "Neg"): 0.5}, max_damage=0.5,
    )  # fmt: skip
    assert got.taken == {"a"}


def test_damage_at_the_limit_holds_and_above_does_not() -> None:
    offers, damages = [swap("a", "Neg")], {("a", "Neg"): 0.5}
    assert plan(relus("a"), offers, damages, max_damage=0.5).taken == {"a"}
    over = plan(relus("a"), offers, damages, max_damage=0.25)
    assert over.taken == set()
    assert over.notes == ["1 lossy candidates: damage 0.5; damage 0.5 is over 0.25"]
    assert operators(over.probe.program) == {"a": "Relu"}


def test_what_is_predicted_no_faster_is_never_tried() -> None:
    got = plan(relus("ac"), [swap("a", "Exp"), swap("c", "Sin")],
               costs=PaperCosts({"Relu": 100, "Exp": 100, "Sin": 99}), max_damage=1.0)  # fmt: skip
    row = got.rows["a", "Exp"]
    assert (row.outcome, row.reason, row.saving_us) == (
        REJECTED,
        "predicted no faster: it saves 0 us",
        0,
    )
    assert got.taken == {"c"}
    assert all(t["a"] == "Relu" for t in got.judge.tried)


def test_nothing_faster_means_nothing_is_searched() -> None:
    program = relus("a")
    got = plan(program, [swap("a", "Exp")], max_damage=1.0)
    assert got.probe.program is program
    assert got.notes == []


@pytest.mark.parametrize("fits", [0, 1, 5, 8, 11, 12])
def test_bisection_finds_the_longest_prefix(fits: int) -> None:
    names = "abcdefghijkl"
    got = plan(
        relus(names), [swap(n, "Neg") for n in names],
        {(n, "Neg"): 1.0 for n in names}, max_damage=float(fits),
    )  # fmt: skip
    assert got.taken == set(names[:fits])
    assert got.probe.damage == fits
    assert len(got.judge.tried) <= 1 + planner_module.PROBES
    assert got.probe.holds


def test_search_gives_up_after_a_number_of_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner_module, "PROBES", 2)
    names = "abcdefgh"
    got = plan(
        relus(names), [swap(n, "Neg") for n in names],
        {(n, "Neg"): 1.0 for n in names}, max_damage=7.0,
    )  # fmt: skip
    assert len(got.judge.tried) == 3
    assert len(got.taken) == 4


# -- sites ------------------------------------------------------------------------------------


def test_of_alternatives_at_a_site_one_is_taken() -> None:
    got = plan(
        relus("a"), [swap("a", "Abs"), swap("a", "Neg")],
        {("a", "Abs"): 0.125, ("a", "Neg"): 0.5}, max_damage=1.0,
    )  # fmt: skip
    assert operators(got.probe.program) == {"a": "Neg"}
    assert got.rows["a", "Abs"].outcome == REJECTED
    assert got.rows["a", "Abs"].reason == (
        "Neg taken, which saves 30 us more and damages 0.5 alone"
    )
    assert got.rows["a", "Neg"].outcome == TAKEN
    assert [o.candidate.choice for o in got.probe.chosen] == ["Neg"]


def test_the_milder_alternative_is_fallen_back_to() -> None:
    got = plan(
        relus("ab"), [swap("a", "Abs"), swap("a", "Neg"), swap("b", "Neg")],
        {("a", "Abs"): 0.125, ("a", "Neg"): 0.5, ("b", "Neg"): 1.0}, max_damage=0.25,
    )  # fmt: skip
    assert operators(got.probe.program) == {"a": "Abs", "b": "Relu"}
    assert got.rows["a", "Neg"].reason == (
        "Neg alone damages 0.5, 0.375 more than Abs, and 0.125 is left of the budget 0.25; "
        "Abs taken"
    )
    assert got.rows["b", "Neg"].reason == (
        "Neg alone damages 1, more than the 0.125 left of the budget 0.25"
    )


def test_two_passes_may_work_at_one_site() -> None:
    first = paper_pass([swap("a", "Abs")], "first")
    second = paper_pass([swap("a", "Neg")], "second")
    got = plan(relus("a"), [first, second], {("a", "Abs"): 0.25}, max_damage=1.0)
    assert {r.pass_name for r in got.session.ledger.with_outcome(TAKEN)} == {"first", "second"}
    assert operators(got.probe.program) == {"a": "Neg"}


def weighed(site: str, choice: str, saving_us: float, damage: float) -> Offer:
    return Offer(quantizer(), swap(site, choice), saving_us, damage)


def ordered(limit: float, *offers: Offer) -> list[str]:
    return [o.candidate.site + o.candidate.choice for o in in_order(offers, limit)]


def test_a_deeper_choice_is_ranked_by_what_it_adds() -> None:
    """Alone, 4 bits damage less for a microsecond than 8; they are still an addition to them."""
    eight, four = weighed("a", "8", 10.0, 0.01), weighed("a", "4", 30.0, 0.015)
    other = weighed("b", "8", 10.0, 0.004)
    assert ordered(1.0, eight, four, other) == ["b8", "a4"]
    four = weighed("a", "4", 30.0, 0.05)
    assert ordered(1.0, four, eight, other) == ["b8", "a8", "a4"]
    middle = weighed("a", "4.8", 12.0, 0.04)
    assert ordered(1.0, four, middle, eight, other) == ["b8", "a8", "a4"]
    assert ordered(0.045, four, middle, eight, other) == ["b8", "a8", "a4.8", "a4"]


def test_the_order_stands_infinities_and_what_is_no_number() -> None:
    inf, nan = float("inf"), float("nan")
    offers = [weighed("a", "x", inf, 0.1), weighed("a", "y", inf, 0.2), weighed("b", "x", nan, 0.1),
              weighed("c", "x", 1.0, inf), weighed("c", "y", 2.0, inf), weighed("d", "x", inf, inf),
              weighed("e", "x", -1.0, 0.0)]  # fmt: skip
    assert ordered(inf, *offers) == ["ax", "cy", "dx"]
    assert ordered(1.0, *offers) == ["ax", "cy", "dx"]


def test_a_plan_of_all_takes_the_deepest_though_a_milder_one_has_the_higher_rank() -> None:
    damages = {("a", "Abs"): 0.4, ("a", "Neg"): 0.45}
    got = plan(relus("a"), [swap("a", "Abs"), swap("a", "Neg")], damages, max_damage=1.0)
    assert operators(got.probe.program) == {"a": "Neg"}
    assert got.rows["a", "Abs"].reason == "Neg taken, which saves 30 us more and damages 0.45 alone"


def test_what_alone_is_over_the_budget_stands_in_no_others_way() -> None:
    """`a` saves so much that it comes first for a microsecond, and can never be held."""
    got = plan(
        relus("abc"), [swap("a", "Neg"), swap("b", "Abs"), swap("c", "Abs")],
        {("a", "Neg"): 0.5, ("b", "Abs"): 0.4, ("c", "Abs"): 0.4},
        costs=PaperCosts({"Relu": 1000, "Neg": 1, "Abs": 999}), max_damage=0.45,
    )  # fmt: skip
    assert got.taken == {"b"}
    assert got.rows["a", "Neg"].reason == (
        "Neg alone damages 0.5, more than the 0.05 left of the budget 0.45"
    )


def test_a_layer_that_hurts_stays_higher_and_says_by_how_much() -> None:
    names = "abc"
    eight, four = [swap(n, "Neg") for n in names], [swap(n, "Abs") for n in names]
    damages = {(n, "Neg"): 0.001 for n in names} | {(n, "Abs"): 0.002 for n in names}
    damages["b", "Abs"] = 0.012
    got = plan(chain(a="Relu", b="Relu", c="Relu"), [quantizer(*eight, *four)], damages,
               costs=QUANTIZED, max_damage=0.01)  # fmt: skip
    assert operators(got.probe.program) == {"a": "Abs", "b": "Neg", "c": "Abs"}
    assert got.rows["b", "Abs"].reason == (
        "Abs alone damages 0.012, 0.011 more than Neg, and 0.005 is left of the budget 0.01; "
        "Neg taken"
    )


def test_one_that_would_fit_alone_is_told_what_it_did_beside_others() -> None:
    """Together they damage more than the sum of what each does."""

    class Growing(PaperJudge):
        def damage(self, program: Program) -> float:
            return super().damage(program) ** 2 * 4

    judge = Growing({(n, "Neg"): 0.25 for n in "ab"})
    session = paper_session(relus("ab"))
    passes = [paper_pass([swap("a", "Neg"), swap("b", "Neg")])]
    planner = Planner(session, passes, Budget(max_damage=0.6), judge, judge, None)  # type: ignore[arg-type]
    planner.plan(session.teacher)
    assert [r.reason for r in session.ledger] == [
        INSIDE, "Neg alone damages 0.25; with 1 more damage 1 is over 0.6",
    ]  # fmt: skip


# -- refusals and faults ----------------------------------------------------------------------


def declines_late(program: Program) -> None:
    raise Declined("on second thoughts")


def fails(program: Program) -> None:
    raise ZeroDivisionError("oops")


def candidate(site: str, choice: str, rewrite: Callable[[Program], None]) -> Candidate:
    return Candidate(site, choice, rewrite, False, (site,))


def test_a_rewrite_that_declines_is_a_row_and_no_offer() -> None:
    late, idle = candidate("a", "x", declines_late), candidate("b", "x", lambda p: None)
    got = plan(relus("abc"), [late, idle, swap("c", "Neg")], max_damage=1.0)
    found = {r.site: (r.outcome, r.reason) for r in got.session.ledger}
    assert found == {
        "a": (DECLINED, "on second thoughts"),
        "b": (DECLINED, "it changed nothing"),
        "c": (TAKEN, INSIDE),
    }
    assert len(got.session.ledger) == 3


def faulty(passes: Sequence[Any], names: str, **options: Any) -> tuple[PassFault, Program]:
    """The fault that planning the passes for Relus ends in, and the program."""
    program = relus(names)
    with pytest.raises(PassFault) as caught:
        plan(program, passes, max_damage=1.0, **options)
    return caught.value, program


def test_a_fault_names_pass_candidate_and_program() -> None:
    guilty = candidate("b", "x", fails)
    bad, good = paper_pass([swap("a", "Neg"), guilty]), paper_pass([swap("d", "Neg")], "good")
    fault, program = faulty([bad, good], "abd")
    assert (fault.kind, fault.pass_, fault.candidate, fault.program) == (
        RAISED, bad, guilty, program,
    )  # fmt: skip
    assert "swap[b=x]: the rewrite raised ZeroDivisionError: oops" in str(fault)


def test_what_cannot_be_run_alone_is_a_fault() -> None:
    guilty = swap("a", "Sin")
    bad = paper_pass([guilty, swap("b", "Neg")])
    fault, program = faulty([bad], "ab", cannot_run=["Sin"])
    assert (fault.kind, fault.pass_, fault.candidate) == (INVALID, bad, guilty)
    assert fault.program is program
    assert "what it made cannot be run: RuntimeError: no such kernel." in str(fault)


def test_what_cannot_be_run_together_is_left_out() -> None:
    """The quick judge has not seen what the whole data brings up."""
    got = plan(relus("ab"), [swap("a", "Neg"), swap("b", "Sin")],
               {("b", "Sin"): 0.5}, cannot_run=["Sin"],
               quick=PaperJudge({("b", "Sin"): 0.5}), max_damage=1.0)  # fmt: skip
    assert got.taken == {"a"}
    assert got.notes[0] == (
        "2 lossy candidates: together they cannot be run: RuntimeError: no such kernel"
    )
    failed = got.planner.without(got.session.teacher, got.probe, set())
    assert failed.holds
    alone = got.planner._probe(got.session.teacher, got.planner._offers(got.session.teacher))
    assert (alone.chosen, alone.program, alone.holds) == ((), got.session.teacher, False)
    assert (alone.damage, alone.score) == (float("inf"), None)
    assert alone.why == "together they cannot be run: RuntimeError: no such kernel"


def test_a_fault_while_the_plan_is_applied_is_of_the_program_then() -> None:
    """`b` works on the program as it was, not on what `a` left."""

    def moody(program: Program) -> None:
        if operators(program)["a"] != "Relu":
            raise ZeroDivisionError("oops")
        replace_operator("b", "Neg")(program)

    guilty = candidate("b", "x", moody)
    fault, _ = faulty([swap("a", "Neg"), guilty, swap("c", "Neg")], "abc")
    assert fault.candidate == guilty
    assert fault.program is not None
    assert operators(fault.program) == {"a": "Neg", "b": "Relu", "c": "Relu"}


def test_one_that_declines_after_the_others_is_declined() -> None:
    def shy(program: Program) -> None:
        if operators(program)["a"] != "Relu":
            raise Declined("the neighbour changed")
        replace_operator("b", "Neg")(program)

    got = plan(relus("ab"), [swap("a", "Neg"), candidate("b", "x", shy)], max_damage=1.0)
    found = {r.site: (r.outcome, r.reason) for r in got.session.ledger}
    assert found == {"a": (TAKEN, INSIDE), "b": (DECLINED, "the neighbour changed")}
    assert [o.candidate.site for o in got.probe.chosen] == ["a"]


def test_a_later_pass_proposes_anew_on_what_an_earlier_left() -> None:
    def halves(program: Program) -> Iterable[Any]:
        for name, op_type in operators(program).items():
            if op_type == "Relu":
                yield swap(name, "Abs")
            else:
                yield Decline(name, "no relu")

    first = paper_pass([swap("a", "Neg")], "first")
    got = plan(relus("ab"), [first, paper_pass(halves, "second")], max_damage=1.0)
    found = {(r.pass_name, r.site): (r.outcome, r.reason) for r in got.session.ledger}
    assert found == {
        ("first", "a"): (TAKEN, INSIDE),
        ("second", "a"): (DECLINED, "no longer offered after earlier candidates"),
        ("second", "b"): (TAKEN, INSIDE),
    }
    assert operators(got.probe.program) == {"a": "Neg", "b": "Abs"}


# -- joint pricing ----------------------------------------------------------------------------

QUANTIZED = PaperCosts({"Relu": 100, "Neg": 40, "Abs": 20}, 50, frozenset({"Neg", "Abs"}))


def quantizer(*offers: Candidate, name: str = "quantize") -> Pass:
    return paper_pass(offers, name, Stage.QUANTIZE)


def test_reduced_precision_is_priced_between_its_neighbours() -> None:
    """Alone, each would cost two conversions more than it saves."""
    got = plan(chain(a="Relu", b="Relu", c="Relu"),
               [quantizer(*(swap(n, "Neg") for n in "abc"))],
               costs=QUANTIZED, max_damage=1.0)  # fmt: skip
    savings = {r.site: r.saving_us for r in got.session.ledger}
    assert savings == {"a": 60, "b": 160, "c": 60}
    assert got.taken == {"a", "b", "c"}


def test_one_reduced_layer_pays_its_conversions() -> None:
    got = plan(chain(a="Relu"), [quantizer(swap("a", "Neg"))], costs=QUANTIZED, max_damage=1.0)
    (row,) = got.session.ledger
    assert (row.outcome, row.saving_us) == (REJECTED, -40)


def test_alternatives_are_priced_in_place_of_the_deepest() -> None:
    got = plan(chain(a="Relu", b="Relu"),
               [quantizer(swap("a", "Neg"), swap("a", "Abs"), swap("b", "Neg"))],
               costs=QUANTIZED, max_damage=1.0)  # fmt: skip
    savings = {(r.site, r.choice): r.saving_us for r in got.session.ledger}
    assert savings == {("a", "Neg"): 60, ("a", "Abs"): 80, ("b", "Neg"): 60}
    assert ("pricing candidates together", 3) in got.session.progress.tracked  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("limit", "taken"), [(1.0, {"a": "Abs", "b": "Abs"}), (0.5, {"a": "Neg", "b": "Abs"}),
                         (0.125, {"a": "Neg", "b": "Neg"}), (0.05, {"a": "Neg", "b": "Relu"})],
)  # fmt: skip
def test_precisions_of_two_passes_compete_for_a_site(limit: float, taken: dict[str, str]) -> None:
    """`halves` saves less for less damage, `bytes` more for more: the deepest that fits."""
    halves = quantizer(swap("a", "Neg"), swap("b", "Neg"), name="halves")
    bytes_ = quantizer(swap("a", "Abs"), swap("b", "Abs"), name="bytes")
    damages = {("a", "Neg"): 0.05, ("b", "Neg"): 0.075, ("a", "Abs"): 0.5, ("b", "Abs"): 0.4}
    got = plan(chain(a="Relu", b="Relu"), [halves, bytes_], damages, costs=QUANTIZED,
               max_damage=limit)  # fmt: skip
    assert operators(got.probe.program) == taken
    if limit == 1.0:
        reason = "Abs taken, which saves 20 us more and damages 0.5 alone"
        assert got.rows["a", "Neg"].reason == reason


def test_a_precision_that_another_beats_in_both_is_not_tried() -> None:
    halves = quantizer(swap("a", "Abs"), name="halves")
    bytes_ = quantizer(swap("a", "Neg"), swap("b", "Neg"), name="bytes")
    damages = {("a", "Abs"): 0.1, ("a", "Neg"): 0.2, ("b", "Neg"): 0.1}
    got = plan(chain(a="Relu", b="Relu"), [halves, bytes_], damages, costs=QUANTIZED,
               max_damage=1.0)  # fmt: skip
    assert operators(got.probe.program) == {"a": "Abs", "b": "Neg"}
    row = got.rows["a", "Neg"]
    assert (row.pass_name, row.outcome, row.reason) == (
        "bytes", REJECTED, "Abs taken, which saves 20 us more and damages 0.1 alone",
    )  # fmt: skip


def test_reductions_are_priced_alone_beside_reduced_precision() -> None:
    reduce_ = paper_pass([swap("c", "Neg")], "reduce")
    got = plan(chain(a="Relu", b="Relu", c="Relu"),
               [reduce_, quantizer(swap("a", "Neg"), swap("b", "Neg"))],
               costs=QUANTIZED, max_damage=1.0)  # fmt: skip
    savings = {(r.pass_name, r.site): r.saving_us for r in got.session.ledger}
    assert savings == {
        ("reduce", "c"): -40, ("quantize", "a"): 60, ("quantize", "b"): 60,
    }  # fmt: skip


def test_what_declines_while_priced_together_saves_nothing_there() -> None:
    def shy(program: Program) -> None:
        if operators(program)["a"] != "Relu":
            raise Declined("the neighbour changed")
        replace_operator("b", "Neg")(program)

    got = plan(chain(a="Relu", b="Relu", c="Relu"),
               [quantizer(swap("a", "Neg"), candidate("b", "x", shy), swap("c", "Neg"))],
               costs=QUANTIZED, max_damage=1.0)  # fmt: skip
    assert {r.site: r.saving_us for r in got.session.ledger}["b"] == 0


def test_a_fault_while_priced_together_is_of_what_the_others_left() -> None:
    def moody(program: Program) -> None:
        if operators(program)["a"] != "Relu":
            raise ZeroDivisionError("oops")
        replace_operator("b", "Neg")(program)

    guilty = candidate("b", "x", moody)
    bad, good = quantizer(guilty, name="bad"), quantizer(swap("a", "Neg"), swap("c", "Neg"))
    with pytest.raises(PassFault, match=r"bad\[b=x\]: the rewrite raised ZeroDivision") as caught:
        plan(chain(a="Relu", b="Relu", c="Relu"), [good, bad], costs=QUANTIZED, max_damage=1.0)
    assert (caught.value.pass_, caught.value.candidate) == (bad, guilty)
    assert caught.value.program is not None
    assert operators(caught.value.program) == {"a": "Neg", "b": "Relu", "c": "Neg"}


def spoils(name: str, other: str) -> Callable[[Program], None]:
    """A rewrite that is no program any more once both of two were made."""

    def rewrite(program: Program) -> None:
        replace_operator(name, "Neg")(program)
        if operators(program)[other] == "Neg":
            program.node(name).op_type = "Nonsense"  # type: ignore[union-attr]

    return rewrite


def test_what_is_no_program_together_has_no_price() -> None:
    class Strict(PaperBackend):
        def kernels(self, program: Program, target: Any) -> Any:
            if "Nonsense" in operators(program).values():
                raise PluginError("cannot read it")
            return super().kernels(program, target)

    offers = [candidate("a", "x", spoils("a", "b")), candidate("b", "x", spoils("b", "a"))]
    got = plan(chain(a="Relu", b="Relu"), [quantizer(*offers)], costs=QUANTIZED,
               backend=Strict(), max_damage=1.0)  # fmt: skip
    assert [(r.outcome, r.saving_us) for r in got.session.ledger] == 2 * [(REJECTED, -float("inf"))]
    assert operators(got.probe.program) == {"a": "Relu", "b": "Relu"}


def test_a_backend_that_cannot_price_a_valid_program_is_at_fault() -> None:
    class Picky(PaperBackend):
        def kernels(self, program: Program, target: Any) -> Any:
            if list(operators(program).values()).count("Neg") > 1:
                raise PluginError("too many")
            return super().kernels(program, target)

    offers = [swap("a", "Neg"), swap("b", "Neg")]
    with pytest.raises(PluginError, match="too many"):
        plan(chain(a="Relu", b="Relu"), [quantizer(*offers)], costs=QUANTIZED, backend=Picky(),
             max_damage=1.0)  # fmt: skip


# -- goals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("goal_us", "expected"),
    [(400, 1), (310, 1), (309, 2), (220, 2), (130, 3), (41, 4), (40, 4), (39, 4), (0, 4)],
)
def test_a_latency_goal_takes_no_more_than_it_needs(goal_us: float, expected: int) -> None:
    damages = {(n, "Neg"): d for n, d in zip("abcd", (0.125, 0.25, 0.375, 0.5), strict=True)}
    got = plan(relus("abcd"), [swap(n, "Neg") for n in "dcba"], damages,
               max_damage=10.0, max_latency_ms=goal_us / 1000)  # fmt: skip
    if goal_us == 400:
        assert got.taken == set()
        return
    assert got.taken == set("abcd"[:expected])
    assert len(got.judge.tried) == 2


def test_a_goal_out_of_the_budgets_reach_takes_what_fits() -> None:
    damages = {(n, "Neg"): 1.0 for n in "abcd"}
    got = plan(relus("abcd"), [swap(n, "Neg") for n in "abcd"], damages,
               max_damage=2.0, max_latency_ms=0.13)  # fmt: skip
    assert got.taken == {"a", "b"}


class Clock:
    """Advances by `step` seconds at every look."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def monotonic(self) -> float:
        self.now += self.step
        return self.now


@pytest.mark.parametrize(("minutes", "probes"), [(1.0, 2), (2.0, 4), (None, 5)])
def test_the_search_ends_in_time(
    minutes: float | None, probes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(40.0)
    monkeypatch.setattr(planner_module, "time", types.SimpleNamespace(monotonic=clock.monotonic))
    names = "abcdefghijklmnop"
    got = plan(relus(names), [swap(n, "Neg") for n in names], {(n, "Neg"): 1.0 for n in names},
               max_damage=1.0, search_minutes=minutes)  # fmt: skip
    assert len(got.judge.tried) == 1 + probes
    late = "search time is over; taking the best plan so far"
    assert (late in got.notes) == (minutes is not None)


# -- the user's metric ------------------------------------------------------------------------


def slow_share(program: Program) -> float:
    """A metric: how many nodes are as they were."""
    return float(list(operators(program).values()).count("Relu"))


def ignored(model: Any) -> float:
    raise AssertionError("the planner asks its scorer")


def test_the_metric_decides_what_holds() -> None:
    damages = {(n, "Neg"): d for n, d in zip("abcd", (0.5, 0.25, 1.0, 2.0), strict=True)}
    got = plan(relus("abcd"), [swap(n, "Neg") for n in "abcd"], damages,
               score=slow_share, metric=ignored, max_drop=2.0)  # fmt: skip
    assert got.taken == {"a", "b"}
    assert (got.planner.teacher_score, got.probe.score) == (4.0, 2.0)
    assert got.notes == [
        "4 lossy candidates: damage 3.75, metric 0; the metric drops by 4, over 2",
        "2 lossy candidates: damage 0.75, metric 2 holds the budget",
        "3 lossy candidates: damage 1.75, metric 1; the metric drops by 3, over 2",
    ]


def test_a_metric_may_be_better_when_smaller() -> None:
    got = plan(relus("ab"), [swap("a", "Neg"), swap("b", "Neg")], {("b", "Neg"): 1.0},
               score=lambda p: -slow_share(p), metric=ignored, larger_is_better=False,
               max_drop=1.0)  # fmt: skip
    assert got.taken == {"a"}


def test_damage_is_held_before_the_metric_is_asked() -> None:
    asked: list[dict[str, str]] = []

    def score(program: Program) -> float:
        asked.append(operators(program))
        return 1.0

    got = plan(relus("a"), [swap("a", "Neg")], {("a", "Neg"): 1.0},
               score=score, metric=ignored, max_drop=1.0, max_damage=0.5)  # fmt: skip
    assert got.taken == set()
    assert asked == [{"a": "Relu"}, {"a": "Relu"}]


def test_a_metric_without_a_drop_is_shown_and_decides_nothing() -> None:
    got = plan(relus("a"), [swap("a", "Neg")], score=slow_share, metric=ignored, max_damage=1.0)
    assert got.taken == {"a"}
    assert got.probe.score == 0.0
    assert got.notes == ["1 lossy candidates: damage 0, metric 0 holds the budget"]


def test_the_metric_of_nothing_taken_is_the_programs() -> None:
    got = plan(relus("a"), [], score=slow_share, metric=ignored, max_damage=1.0)
    assert got.probe.score == 1.0


# -- tuning -----------------------------------------------------------------------------------


def tuner(source: str = "Neg", target: str = "Sin", name: str = "tune") -> Pass:
    """Turns the first `source` into `target`."""

    def propose(program: Program) -> Iterable[Any]:
        for site, op_type in operators(program).items():
            if op_type == source:
                yield Candidate("program", "tune", replace_operator(site, target), False, (site,))
                return
        yield Decline("program", "nothing to tune")

    return paper_pass(propose, name, Stage.TUNE)


def test_tuning_brings_a_plan_back_into_the_budget() -> None:
    got = plan(relus("a"), [paper_pass([swap("a", "Neg")]), tuner()],
               {("a", "Neg"): 1.0, ("a", "Sin"): 0.25}, max_damage=0.5)  # fmt: skip
    assert operators(got.probe.program) == {"a": "Sin"}
    assert got.probe.damage == 0.25
    assert [(r.pass_name, r.outcome, r.reason, r.damage) for r in got.session.ledger] == [
        ("swap", TAKEN, INSIDE, 1.0),
        ("tune", TAKEN, "damage 1 before, 0.25 after", 0.25),
    ]
    assert got.session.ledger[1].details == {TUNING: {"before": 1.0, "after": 0.25}}
    assert got.notes == ["1 lossy candidates: damage 0.25 holds the budget"]


def test_tuning_that_does_not_help_is_dropped() -> None:
    got = plan(relus("a"), [paper_pass([swap("a", "Neg")]), tuner()],
               {("a", "Neg"): 0.25, ("a", "Sin"): 0.25}, max_damage=0.5)  # fmt: skip
    assert operators(got.probe.program) == {"a": "Neg"}
    row = got.rows["program", "tune"]
    assert (row.outcome, row.reason) == (REJECTED, "damage 0.25 before, 0.25 after")


def test_a_plan_that_holds_is_tuned_in_the_end() -> None:
    got = plan(relus("a"), [paper_pass([swap("a", "Neg")]), tuner()],
               {("a", "Neg"): 0.25, ("a", "Sin"): 0.125}, max_damage=0.5)  # fmt: skip
    assert operators(got.probe.program) == {"a": "Sin"}
    assert got.probe.damage == 0.125
    assert got.rows["program", "tune"].outcome == TAKEN
    assert [p.name for p, _ in got.probe.steps] == ["swap", "tune"]


def test_tuners_follow_one_another() -> None:
    got = plan(relus("a"), [paper_pass([swap("a", "Neg")]), tuner(),
                            tuner("Sin", "Exp", "worse"), tuner("Sin", "Cos", "more")],
               {("a", "Neg"): 1.0, ("a", "Sin"): 0.5, ("a", "Cos"): 0.25, ("a", "Exp"): 2.0},
               max_damage=0.5)  # fmt: skip
    assert [(r.pass_name, r.outcome, r.reason) for r in got.session.ledger][1:] == [
        ("tune", TAKEN, "damage 1 before, 0.5 after"),
        ("worse", REJECTED, "damage 0.5 before, 2 after"),
        ("more", TAKEN, "damage 0.5 before, 0.25 after"),
    ]
    assert operators(got.probe.program) == {"a": "Cos"}
    assert [p.name for p, _ in got.probe.steps] == ["swap", "tune", "more"]


@pytest.mark.parametrize(
    ("damage", "budget", "tuned"),
    [
        (0.0625, {"max_damage": 1.0}, False),
        (0.125, {"max_damage": 1.0}, True),
        (0.0, {"max_damage": 0.0}, False),
        (0.0625, {"max_damage": float("inf")}, True),
        (0.0, {"max_damage": float("inf")}, False),
    ],
)
def test_a_plan_that_spends_little_is_not_tuned(
    damage: float, budget: dict[str, float], tuned: bool
) -> None:
    got = plan(relus("a"), [paper_pass([swap("a", "Neg")]), tuner()],
               {("a", "Neg"): damage}, **budget)  # fmt: skip
    assert got.taken >= {"a"}
    assert bool(got.probe.tuned) == tuned
    row = list(got.session.ledger)[-1]
    assert row.pass_name == "tune"
    if not tuned:
        assert (row.site, row.choice, row.outcome) == ("program", "-", DECLINED)
        assert row.reason == "the plan spends too little of the budget to be worth tuning"
        assert row.exact is False


@pytest.mark.parametrize(("drop", "tuned"), [(0.0625, False), (0.125, True)])
def test_a_drop_of_the_metric_is_worth_tuning(drop: float, tuned: bool) -> None:
    def score(program: Program) -> float:
        return {"Relu": 1.0, "Neg": 1.0 - drop, "Sin": 1.0}[operators(program)["a"]]

    got = plan(relus("a"), [paper_pass([swap("a", "Neg")]), tuner()], {("a", "Neg"): 5.0},
               score=score, metric=ignored, max_drop=1.0)  # fmt: skip
    assert bool(got.probe.tuned) == tuned
    assert got.probe.score == (1.0 if tuned else 1.0 - drop)


def test_tuning_that_loses_the_metric_is_undone() -> None:
    def score(program: Program) -> float:
        return {"Relu": 1.0, "Neg": 0.5, "Sin": -5.0}[operators(program)["a"]]

    got = plan(relus("a"), [paper_pass([swap("a", "Neg")]), tuner()], {("a", "Neg"): 5.0},
               score=score, metric=ignored, max_drop=1.0)  # fmt: skip
    assert operators(got.probe.program) == {"a": "Neg"}
    assert got.probe.tuned == ()
    row = list(got.session.ledger)[-1]
    assert (row.pass_name, row.outcome) == ("tune", DECLINED)
    assert row.reason.startswith("tuned it no longer holds: ")


def test_nothing_lossy_is_not_tuned() -> None:
    got = plan(relus("a"), [paper_pass([swap("a", "Neg")]), tuner()],
               {("a", "Neg"): 2.0, ("a", "Sin"): 2.0}, max_damage=1.0)  # fmt: skip
    assert list(got.session.ledger)[-1].reason == "nothing was taken that could be tuned"


def test_nothing_taken_is_not_tuned() -> None:
    got = plan(relus("a"), [paper_pass([swap("a", "Neg")]), tuner("Relu")],
               {("a", "Neg"): 2.0, ("a", "Relu"): 0.5}, max_damage=1.0)  # fmt: skip
    assert got.probe.tuned == ()
    assert operators(got.probe.program) == {"a": "Relu"}


def test_a_tuner_that_declines_is_noted() -> None:
    late = paper_pass([candidate("program", "tune", declines_late)], "late", Stage.TUNE)
    got = plan(relus("a"), [paper_pass([swap("a", "Neg")]), late, tuner()],
               {("a", "Neg"): 1.0, ("a", "Sin"): 0.25}, max_damage=0.5)  # fmt: skip
    assert "late: on second thoughts" in got.notes
    assert [t[0].name for t in got.probe.tuned] == ["tune"]
    rows = [(r.pass_name, r.outcome, r.reason) for r in list(got.session.ledger)[1:]]
    assert rows == [
        ("tune", TAKEN, "damage 1 before, 0.25 after"),
        ("late", DECLINED, "on second thoughts"),
    ]


def test_a_tuner_whose_work_cannot_be_run_is_at_fault() -> None:
    guilty = swap("a", "Cos")
    bad = paper_pass([guilty], "bad", Stage.TUNE)
    with pytest.raises(PassFault, match="cannot be run") as caught:
        plan(relus("a"), [paper_pass([swap("a", "Neg")]), bad], {("a", "Neg"): 1.0},
             cannot_run=["Cos"], max_damage=0.5)  # fmt: skip
    assert (caught.value.pass_, caught.value.candidate) == (bad, guilty)
    assert caught.value.program is not None
    assert operators(caught.value.program) == {"a": "Neg"}


def test_what_a_tuner_declines_is_its_row() -> None:
    got = plan(relus("a"), [paper_pass([swap("a", "Neg")]), tuner("Exp")],
               {("a", "Neg"): 0.5}, max_damage=1.0)  # fmt: skip
    rows = [r for r in got.session.ledger if r.pass_name == "tune"]
    assert [(r.outcome, r.reason) for r in rows] == [(DECLINED, "nothing to tune")]


# -- taking out again -------------------------------------------------------------------------


def test_a_plan_without_some_of_its_offers() -> None:
    program = relus("abc")
    got = plan(program, [swap(n, "Neg") for n in "abc"], {(n, "Neg"): 0.25 for n in "abc"},
               max_damage=1.0)  # fmt: skip
    fewer = got.planner.without(program, got.probe, {("swap", "b", "Neg")})
    assert operators(fewer.program) == {"a": "Neg", "b": "Relu", "c": "Neg"}
    assert (fewer.damage, fewer.holds) == (0.5, True)
    assert [o.candidate.site for o in fewer.chosen] == ["a", "c"]


def test_exact_passes_are_not_the_planners() -> None:
    clean = paper_pass([swap("a", "Neg", exact=True)], "clean", Stage.CLEAN)
    fuse = paper_pass([swap("a", "Neg", exact=True)], "fuse", Stage.FUSE)
    got = plan(relus("a"), [clean, fuse], max_damage=1.0)
    assert len(got.session.ledger) == 0
    assert got.planner.lossy == []
    assert got.planner.tuners == []
