"""Choosing lossy candidates: the fastest plan whose measured loss stays inside the budget.

Each candidate is priced and damaged on its own, then all are ordered by damage per microsecond
saved, and the longest prefix of that order that holds the budget is searched by bisection. Of
alternatives at a site, a deeper one is ranked by what it damages and saves beyond the one before
it, so a prefix holds the deepest that is worth it at each site (the greedy of the multiple-choice
knapsack: Kellerer, Pferschy, Pisinger, "Knapsack Problems", 2004, section 11.2). What alone damages
more than the budget comes last, so that it stands in no other's way. A probe of a prefix applies it
and measures the result against the teacher, so what is decided on is never a sum of estimates; one
that is over the budget is tuned (when a tuning pass is in the pipeline) and measured again. The
plan chosen is tuned in the end if it was not and has something to win back.

Reduced precision pays between neighbours: alone, a quantised layer also pays for converting its
input and output. A candidate of stage QUANTIZE is therefore priced by what would be lost if it
alone were left out.

Where `Budget.max_size_mb` is given and the weights of that plan are larger, offers that save bytes
and no time are added to it, those of least damage for a byte first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from optcompiler.budget import Budget
from optcompiler.damage import Judge
from optcompiler.errors import Declined, PassFault, PluginError, VerificationError
from optcompiler.ledger import DECLINED, REJECTED, TAKEN, TUNING, Row
from optcompiler.program import Program
from optcompiler.rewriting import Candidate, Pass, Stage, guarded
from optcompiler.session import Refusal, Scorer, Session, Step

PROBES = 6
"""Most prefixes that one search tries."""

NEGLIGIBLE = 0.1
"""A plan that spends less than this share of the budget is not worth tuning."""

NO_FASTER = "predicted no faster"
NOTHING_LOSSY = "nothing was taken that could be tuned"

Key = tuple[str, str, str]

Tuned = tuple[Pass, Candidate, float, float, bool]
"""A tuning pass and its candidate, the damage before and after, and whether it was kept."""


@dataclass(frozen=True)
class Offer:
    """A lossy candidate with what it was measured to do on its own."""

    pass_: Pass
    candidate: Candidate
    saving_us: float
    damage: float
    saved_bytes: int = 0
    """By which the weights become smaller; see `stored_bytes`."""

    @property
    def key(self) -> Key:
        return (self.pass_.name, self.candidate.site, self.candidate.choice)

    @property
    def site(self) -> tuple[str, str]:
        """What offers of which one at most is taken share: all reduced precisions of a site do."""
        joint = self.pass_.stage is Stage.QUANTIZE
        return ("" if joint else self.pass_.name, self.candidate.site)


@dataclass(frozen=True)
class Probe:
    """One plan as tried: the program it gives and what was measured on it."""

    chosen: tuple[Offer, ...]
    program: Program
    damage: float
    score: float | None
    holds: bool
    why: str
    refused: dict[Key, tuple[str, str]]
    steps: tuple[Step, ...] = ()
    """What was applied, in order, tuning included."""
    tuned: tuple[Tuned, ...] = ()
    untuned: tuple[Row, ...] = ()
    """Tuning passes that were asked and changed nothing, with the reason."""


class Planner:
    """Plans the stages REDUCE, QUANTIZE and TUNE of one compile on top of an exact program.

    `judge` measures damage on all batches; `quick` does on few, for one candidate alone. `score`
    is the user's metric, None without one. `unjudged` is why candidates that are not exact cannot
    be judged; they are declined for it.
    """

    def __init__(
        self,
        session: Session,
        passes: Sequence[Pass],
        budget: Budget,
        judge: Judge,
        quick: Judge,
        score: Scorer | None,
        unjudged: str = "",
    ) -> None:
        self.session = session
        self.budget = budget
        self.judge = judge
        self.quick = quick
        self.score = score
        self.unjudged = unjudged
        self.lossy = [p for p in passes if p.stage in (Stage.REDUCE, Stage.QUANTIZE)]
        self.tuners = [p for p in passes if p.stage is Stage.TUNE]
        self.teacher_score = self._scored(session.teacher) if score else None
        minutes = budget.search_minutes
        self._deadline = time.monotonic() + 60 * minutes if minutes is not None else None

    def plan(self, base: Program) -> Probe:
        """The largest prefix of offers that holds the budget, applied to `base` and tuned.

        Every offer becomes a ledger row: taken, or rejected with the reason.
        """
        session = self.session
        offers = self._offers(base)
        self._place = {o.key: i for i, o in enumerate(offers)}
        order = in_order(offers, self.budget.damage_limit)
        best = self._empty(base)
        if order:
            best = self._search(base, order, best)
        best = self._finished(self._made_to_fit(base, offers, best))
        taken = {o.key for o in best.chosen}
        for offer in offers:
            if offer.key in best.refused:
                outcome, reason = best.refused[offer.key]
            elif offer.key in taken:
                note = offer.candidate.note
                outcome, reason = TAKEN, "inside the budget" + (f"; {note}" if note else "")
            else:
                outcome, reason = REJECTED, self._why_not(offer, order, best)
            row = session.row(offer.pass_, offer.candidate, outcome, reason)
            session.ledger.add(replace(row, saving_us=offer.saving_us, damage=offer.damage))
        for pass_, candidate, before, after, kept in best.tuned:
            outcome = TAKEN if kept else REJECTED
            reason = f"damage {before:.3g} before, {after:.3g} after"
            row = session.row(pass_, candidate, outcome, reason)
            details = {**row.details, TUNING: {"before": before, "after": after}}
            session.ledger.add(replace(row, damage=after, details=details))
        for row in best.untuned:
            session.ledger.add(row)
        if not best.tuned and not best.untuned:
            why = "the plan spends too little of the budget to be worth tuning"
            for tuner in self.tuners:
                session.ledger.add(self._not_tuned(tuner, why if best.chosen else NOTHING_LOSSY))
        return best

    def _why_not(self, offer: Offer, order: Sequence[Offer], best: Probe) -> str:
        """Why an offer is not in the plan, with the figures that decided."""
        choice, taken = offer.candidate.choice, None
        if not offer.saving_us > 0:
            limit = self.budget.max_size_mb
            if limit is not None and offer.saved_bytes > 0:
                return self._why_not_smaller(offer, limit, best)
            known = math.isfinite(offer.saving_us)
            return NO_FASTER + (f": it saves {offer.saving_us:.3g} us" if known else "")
        for other in best.chosen:
            if other.site == offer.site:
                taken = other
        limit = self.budget.damage_limit
        left = max(limit - best.damage, 0.0)
        alone = f"{choice} alone damages {offer.damage:.3g}"
        if taken is not None:
            name, more = taken.candidate.choice, offer.saving_us - taken.saving_us
            if more <= 0:
                less = f"{-more:.3g} us more" if more else "as much"
                return f"{name} taken, which saves {less} and damages {taken.damage:.3g} alone"
            further = offer.damage - taken.damage
            ending = f"; {name} taken"
            if further > left:
                return (
                    f"{alone}, {further:.3g} more than {name}, and {left:.3g} is left of the "
                    f"budget {limit:.3g}{ending}"
                )
        else:
            ending = ""
            if offer.damage > left:
                return f"{alone}, more than the {left:.3g} left of the budget {limit:.3g}"
        if offer not in order:
            return f"{alone} and saves {offer.saving_us:.3g} us, for which others do better{ending}"
        place = order.index(offer)
        for count, why in sorted(self._failed.items()):
            if count > place:
                others = f"with {count - 1} more " if count > 1 else ""
                return f"{alone}; {others}{why}{ending}"
        return f"{alone}; the search ended before it{ending}"

    def _why_not_smaller(self, offer: Offer, limit: float, best: Probe) -> str:
        """Why an offer that saves bytes and no time is not in the plan."""
        held = stored_bytes(best.program) / 1e6
        if any(o.site == offer.site for o in best.chosen):
            return f"{NO_FASTER}, and another choice is taken here"
        if held <= limit:
            return f"{NO_FASTER}, and the weights are {held:.3g} MB without it, within {limit:.3g}"
        return (
            f"it would save {offer.saved_bytes / 1e6:.3g} MB and damages {offer.damage:.3g} alone, "
            f"more with what is taken than the budget {self.budget.damage_limit:.3g} holds"
        )

    # -- offers -----------------------------------------------------------------------------

    def _offers(self, base: Program) -> list[Offer]:
        session = self.session
        priced: list[Offer] = []
        pending: list[tuple[Pass, Candidate]] = []
        for pass_ in self.lossy:
            for candidate in session.propose(pass_, base):
                if candidate.exact or not self.unjudged:
                    pending.append((pass_, candidate))
                else:
                    session.ledger.add(session.row(pass_, candidate, DECLINED, self.unjudged))
        price = session.price_us(base)
        for pass_, candidate in session.progress.track(pending, "weighing candidates"):
            patch = session.attempt(pass_, candidate, base)
            if isinstance(patch, Refusal):
                row = session.row(pass_, candidate, patch.outcome, patch.reason)
                session.ledger.add(row)
                continue
            damage = session.damage_of(self.quick, pass_, candidate, patch)
            saved = stored_bytes(base) - stored_bytes(patch.after)
            price_after = session.price_us(patch.after)
            priced.append(Offer(pass_, candidate, price - price_after, damage, saved))
        return self._priced_together(base, priced)

    def _priced_together(self, base: Program, offers: list[Offer]) -> list[Offer]:
        """QUANTIZE offers with the saving that leaving each out of all of them would cost."""
        joint = [o for o in offers if o.pass_.stage is Stage.QUANTIZE]
        deepest = list({o.site: o for o in joint}.values())
        if len(deepest) < 2:
            return offers
        full = self._price(base, deepest)
        savings: dict[Key, float] = {}
        for offer in self.session.progress.track(joint, "pricing candidates together"):
            others = [o for o in deepest if o.site != offer.site]
            with_it = full if offer in deepest else self._price(base, [*others, offer])
            savings[offer.key] = self._price(base, others) - with_it
        return [replace(o, saving_us=savings.get(o.key, o.saving_us)) for o in offers]

    def _price(self, base: Program, offers: Sequence[Offer]) -> float:
        """Predicted microseconds with these offers; infinite when together they are no program."""
        program, broken = self._together(base, offers)
        try:
            if broken is None:
                return self.session.price_us(program)
        except PluginError as error:
            broken = error
        try:
            program.verify()
        except VerificationError:
            return float("inf")
        raise broken

    def _together(self, base: Program, offers: Sequence[Offer]) -> tuple[Program, PassFault | None]:
        """These offers applied one after another to one copy, for pricing, with no verification.

        A fault of one of the passes ends it; the program is then what that pass was given.
        """
        copy = base.clone()
        for index, offer in enumerate(offers):
            pass_, candidate = offer.pass_, offer.candidate
            label = f"{pass_.name}[{candidate.site}={candidate.choice}]: the rewrite"
            seconds = self.session.seconds(pass_, base)
            try:
                guarded(label, seconds, lambda c=candidate: c.rewrite(copy))
            except Declined:
                continue
            except PassFault as fault:
                before, _ = self._together(base, offers[:index])
                return before, fault.by(pass_, before, candidate)
        return copy, None

    # -- search -----------------------------------------------------------------------------

    def _search(self, base: Program, order: Sequence[Offer], best: Probe) -> Probe:
        """The longest prefix of `order` that holds; the shortest that meets a latency goal."""
        low, high = 0, self._needed(base, order)
        self._failed = {}
        for _ in range(PROBES):
            if high <= low:
                break
            probe = self._probe(base, order[:high])
            if probe.holds:
                best, low = probe, high
                if high == len(order) or high == self._ceiling:
                    break
            else:
                self._failed[high] = probe.why
                self._ceiling = high - 1
            if self._ceiling <= low:
                break
            high = (low + self._ceiling + 1) // 2
            if self._time_is_over():
                self.session.progress.note("search time is over; taking the best plan so far")
                break
        return best

    _ceiling: int
    _failed: dict[int, str]
    """Why prefixes of the order did not hold, by their length."""
    _place: dict[Key, int]
    """Where each offer stands among all that were proposed. A plan is applied in this order: the
    same plan is then the same program, whatever the prices by which it was found."""

    def _time_is_over(self) -> bool:
        deadline = self._deadline
        if deadline is None:
            return False
        key = self.session.choices.numbered("search time is over")
        return self.session.choices.choose(key, lambda: time.monotonic() > deadline, False)

    def _scored(self, program: Program) -> float:
        assert self.score is not None
        score = self.score
        return self.session.choices.number("metric", lambda: score(program))

    def _damaged(self, program: Program) -> float:
        return self.session.choices.number("damage", lambda: self.judge.damage(program))

    def _needed(self, base: Program, order: Sequence[Offer]) -> int:
        """How many offers the latency goal asks for: all without one."""
        self._ceiling = len(order)
        goal = self.budget.max_latency_ms
        if goal is None:
            return len(order)
        for count in range(len(order) + 1):
            if self._price(base, _deepest(order[:count])) <= 1000 * goal:
                self._ceiling = max(count, 1)
                return count
        return len(order)

    def _empty(self, base: Program) -> Probe:
        score = self._scored(base) if self.score else None
        return Probe((), base, self._damaged(base), score, True, "", {})

    def _made_to_fit(self, base: Program, offers: Sequence[Offer], best: Probe) -> Probe:
        """`best` with offers that save bytes and no time, until its weights are `max_size_mb`.

        Those that damage least for a byte come first, at sites where `best` has nothing. With all
        that it takes over the budget, as many are taken as hold it.
        """
        limit = self.budget.max_size_mb
        over = stored_bytes(best.program) - 1e6 * limit if limit is not None else 0.0
        if not over > 0:
            return best
        taken = {o.site for o in best.chosen}
        left = [o for o in offers if o.saved_bytes > 0 >= o.saving_us and o.site not in taken]
        left.sort(key=lambda o: (o.damage / o.saved_bytes, o.key))
        order: list[Offer] = []
        for offer in left:
            if over > 0 and offer.site not in {o.site for o in order}:
                order.append(offer)
                over -= offer.saved_bytes
        low, high, bare = 0, len(order), best
        for _ in range(PROBES):
            if high <= low:
                break
            probe = self._probe(base, [*bare.chosen, *order[:high]])
            if probe.holds:
                best, low = probe, high
                if high == len(order):
                    break
            else:
                order = order[: high - 1]
            high = (low + len(order) + 1) // 2
        return best

    def _probe(self, base: Program, prefix: Sequence[Offer]) -> Probe:
        chosen = _deepest(prefix)
        in_place = sorted(chosen, key=lambda o: self._place[o.key])
        program, refused, steps = self._realise(base, in_place)
        try:
            damage = self._damaged(program)
        except Exception as error:
            why = f"together they cannot be run: {type(error).__name__}: {error}"
            self.session.progress.note(f"{len(chosen)} lossy candidates: {why}")
            return Probe((), base, float("inf"), None, False, why, refused)
        tuned: list[Tuned] = []
        untuned: list[Row] = []
        holds, why, score = self._within(program, damage)
        if not holds and self.tuners:
            program, damage, tuned, untuned = self._tune(program, damage)
            holds, why, score = self._within(program, damage)
        self.session.progress.note(
            f"{len(chosen)} lossy candidates: damage {damage:.3g}"
            + (f", metric {score:.4g}" if score is not None else "")
            + (" holds the budget" if holds else f"; {why}")
        )
        return Probe(
            tuple(o for o in chosen if o.key not in refused),
            program, damage, score, holds, why, refused, (*steps, *_kept(tuned)),
            tuple(tuned), tuple(untuned),
        )  # fmt: skip

    def _finished(self, probe: Probe) -> Probe:
        """The plan tuned, if it is not yet and spends a share of the budget worth winning back."""
        asked = probe.tuned or probe.untuned
        if asked or not probe.chosen or not self.tuners or not self._worth_tuning(probe):
            return probe
        program, damage, tuned, untuned = self._tune(probe.program, probe.damage)
        holds, why, score = self._within(program, damage)
        if not holds:
            lost = [self._not_tuned(p, f"tuned it no longer holds: {why}") for p, *_ in tuned]
            return replace(probe, untuned=(*untuned, *lost))
        return replace(
            probe, program=program, damage=damage, score=score,
            steps=(*probe.steps, *_kept(tuned)), tuned=tuple(tuned), untuned=tuple(untuned),
        )  # fmt: skip

    def _not_tuned(self, tuner: Pass, why: str) -> Row:
        return Row(tuner.name, "program", "-", DECLINED, why, exact=False, details={TUNING: {}})

    def _worth_tuning(self, probe: Probe) -> bool:
        limit, allowed = self.budget.damage_limit, self.budget.max_drop
        if probe.damage > NEGLIGIBLE * limit or (limit == float("inf") and allowed is None):
            return probe.damage > 0
        if probe.score is None or self.teacher_score is None or allowed is None:
            return False
        return self.budget.drop(self.teacher_score, probe.score) > NEGLIGIBLE * allowed

    def _tune(
        self, program: Program, damage: float
    ) -> tuple[Program, float, list[Tuned], list[Row]]:
        tuned: list[Tuned] = []
        untuned: list[Row] = []
        for tuner in self.tuners:
            candidates, declined = self.session.offers(tuner, program)
            for candidate in candidates:
                patch = self.session.attempt(tuner, candidate, program)
                if isinstance(patch, Refusal):
                    self.session.progress.note(f"{tuner.name}: {patch.reason}")
                    row = self.session.row(tuner, candidate, patch.outcome, patch.reason)
                    declined.append(row)
                    continue
                changed = self.session.damage_of(self.judge, tuner, candidate, patch)
                tuned.append((tuner, candidate, damage, changed, changed < damage))
                if changed < damage:
                    program, damage = patch.after, changed
            untuned += [replace(r, details={**r.details, TUNING: {}}) for r in declined]
        return program, damage, tuned, untuned

    def _realise(
        self, base: Program, chosen: Sequence[Offer]
    ) -> tuple[Program, dict[Key, tuple[str, str]], list[Step]]:
        """Apply the plan by stages; a later stage proposes anew on what an earlier one left."""
        session = self.session
        refused: dict[Key, tuple[str, str]] = {}
        steps: list[Step] = []
        program = base
        for pass_ in self.lossy:
            mine = {o.key: o for o in chosen if o.pass_ is pass_}
            if not mine:
                continue
            found = {k: o.candidate for k, o in mine.items()}
            if program is not base:
                fresh = session.propose(pass_, program, record=False)
                found = {(pass_.name, c.site, c.choice): c for c in fresh}
            for key in mine:
                if key not in found:
                    refused[key] = (DECLINED, "no longer offered after earlier candidates")
                    continue
                patch = session.attempt(pass_, found[key], program)
                if isinstance(patch, Refusal):
                    refused[key] = (patch.outcome, patch.reason)
                else:
                    program = patch.after
                    steps.append((pass_, found[key]))
        return program, refused, steps

    def _within(self, program: Program, damage: float) -> tuple[bool, str, float | None]:
        limit = self.budget.damage_limit
        if damage > limit:
            return False, f"damage {damage:.3g} is over {limit:.3g}", None
        if self.score is None or self.teacher_score is None:
            return True, "", None
        score = self._scored(program)
        drop = self.budget.drop(self.teacher_score, score)
        if self.budget.max_drop is not None and drop > self.budget.max_drop:
            return False, f"the metric drops by {drop:.3g}, over {self.budget.max_drop:.3g}", score
        return True, "", score

    def without(self, base: Program, probe: Probe, keys: set[Key]) -> Probe:
        """The plan with some offers taken out, applied and measured again."""
        return self._probe(base, [o for o in probe.chosen if o.key not in keys])


def stored_bytes(program: Program) -> int:
    """Bytes of the weights, those behind quantisers as the levels that they will be stored as."""
    total = program.weight_bytes
    for node in program.graph:
        value = node.inputs[0] if node.op_type == "QuantizeLinear" else None
        held = value.const_value if value is not None else None
        kind = node.outputs[0].dtype
        if value is not None and held is not None and kind is not None and len(value.uses()) == 1:
            total += int(held.size * kind.bitwidth / 8) - held.nbytes
    return total


def _kept(tuned: Sequence[Tuned]) -> list[Step]:
    return [(pass_, candidate) for pass_, candidate, *_, kept in tuned if kept]


def in_order(offers: Sequence[Offer], limit: float = math.inf) -> list[Offer]:
    """Offers that save time in the order in which a plan takes them.

    At a site each saves more than the one before it. They are ranked by what they damage beyond it
    for a microsecond saved beyond it; one that a deeper one beats in that is left out. Those that
    alone damage more than `limit` come after all others.
    """
    sites: dict[tuple[str, str], list[Offer]] = {}
    for offer in offers:
        if offer.saving_us > 0:
            sites.setdefault(offer.site, []).append(offer)
    ranked: list[tuple[bool, float, int, Key, Offer]] = []
    for found in sites.values():
        saved = damaged = 0.0
        place = 0
        for over in (False, True):
            left = [o for o in found if (o.damage > limit) is over]
            slope = -math.inf
            while left := [o for o in left if o.saving_us > saved]:
                rises = [_rise(o, saved, damaged) for o in left]
                least = min(rises)
                flattest = [o for o, rise in zip(left, rises, strict=True) if rise == least]
                offer = max(flattest, key=lambda o: (o.saving_us, -o.damage))
                slope = max(slope, least)
                ranked.append((over, slope, place, offer.key, offer))
                saved, damaged, place = offer.saving_us, offer.damage, place + 1
    return [offer for *_, offer in sorted(ranked, key=lambda entry: entry[:4])]


def _rise(offer: Offer, saved: float, damaged: float) -> float:
    """Damage for a microsecond, beyond what was saved and damaged before."""
    rise = (offer.damage - damaged) / max(offer.saving_us - saved, 1e-6)
    return math.inf if math.isnan(rise) else rise


def _deepest(prefix: Sequence[Offer]) -> list[Offer]:
    """The last offer of each site."""
    return list({o.site: o for o in prefix}.values())
