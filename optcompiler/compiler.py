"""`compile`: a model and a budget in, the fastest artifact that stays inside it out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from optcompiler import artifact, cache, device, finish, pipeline, scratch
from optcompiler.backend import require_determined, require_tensors
from optcompiler.batching import Batched
from optcompiler.binding import refuse_unknown_sizes, resolved
from optcompiler.budget import Budget
from optcompiler.choices import Choices, Consulted
from optcompiler.collecting import collecting_seldom
from optcompiler.compiled import Compiled
from optcompiler.contract import EXACT, protected, protected_batch
from optcompiler.cost import DeviceProfile, nominal_profile
from optcompiler.errors import GateError, InputError, OptcompilerError, PassFault
from optcompiler.executor import to_torch
from optcompiler.files import number
from optcompiler.finish import Built
from optcompiler.ledger import REVERTED
from optcompiler.lock import (
    Lock,
    arithmetic,
    arithmetic_threads,
    data_hash,
    read_lock,
    versions_of,
)
from optcompiler.planner import Planner, Probe
from optcompiler.plugins import Registry
from optcompiler.precisions import allowed_precisions, spelled
from optcompiler.program import Program
from optcompiler.progress import Silent
from optcompiler.rewriting import Batch, Pass, PassContext, Progress, Stage
from optcompiler.sealing import Seal
from optcompiler.session import Session, judge_of
from optcompiler.signature import Signature, is_torch
from optcompiler.target import Target

if TYPE_CHECKING:
    from optcompiler.frontend import Imported
    from optcompiler.program import Port

WEIGHING_SAMPLES = 8
"""Samples on which one candidate alone is damaged; the plan as a whole is judged on all."""

UNJUDGED = (
    "no calibration data to measure damage on; pass calibration=batches, or a budget with "
    "max_damage to measure it on the example inputs"
)

DEFAULT_COST_MODEL = "roofline"

T = TypeVar("T")


def compile(
    model: Any,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    target: str | Target = "onnxruntime",
    precision: str | Iterable[str] = "auto",
    calibration: Any = None,
    calibration_samples: int | None = None,
    budget: Budget | None = None,
    passes: Iterable[str | Pass | type[Pass]] | None = None,
    dynamic: Any = None,
    damage: str = "kl",
    cost_model: str = DEFAULT_COST_MODEL,
    seed: int = 0,
    registry: Registry | None = None,
    progress: Progress | None = None,
    on_fault: str = "continue",
    time_limit_s: float | None = None,
    reproducers: str | Path | None = None,
    timing: bool = True,
    locked: str | Path | None = None,
) -> Compiled:
    """Compile `model` for `target` inside `budget`.

    `model`: an nn.Module, ExportedProgram, fx.GraphModule, a .pt2 or .onnx path, an onnx
    ModelProto, an onnx_ir Model or a Program. `example_inputs`: a tuple, or a dict by name; not
    needed for ONNX. `precision`: "fp32" (exact passes only), a precision of the target such as
    "int8" or "bf16", several (`{"int8", "w4a8"}` or "int8,w4a8"), or "auto" (all that the target
    has). `calibration`: an iterable of inputs, a folder of .npz files, a source that makes samples
    (`synthetic`, `select`, `augment`), or None. `calibration_samples`: how many samples are kept
    of it at most, by default 512 or as many as such a source makes.
    `passes`: None for the default pipeline, else names (with options), passes, or "default".
    `dynamic`: dimensions that stay symbolic, see `frontend.import_model`; with bounds, as
    `{"batch": (1, 32)}`, the artifact takes every size from the one to the other.
    `damage`: "kl" or "nmse".
    `on_fault`: when a pass breaks its contract the compile begins again without it and with a
    `QuarantineWarning` ("continue"), or stops with a `PluginError` ("stop"). `time_limit_s`: what
    proposing, and each rewrite, may take per thousand nodes, in place of what the passes declare.
    `reproducers`: where such faults are written, by default in the user's cache.
    `timing`: False times nothing: prices come from the backend's nominal profile, nothing is undone
    for being slower, and the artifact depends on the inputs, the options and the versions alone.
    `locked`: an artifact, or its lock file: measures nothing and makes that artifact once more.

    Raises `InputError`, `UnsupportedOperatorError`, `ToolchainError` or `PluginError` for what
    cannot be compiled or does not fit the lock, and `GateError` when the budget cannot be met (the
    error's `compiled` then holds the best artifact found) or when what was locked came out
    otherwise.
    """
    lock = read_lock(locked) if locked is not None else None
    threads = arithmetic()["threads"] if timing else 1
    with collecting_seldom(), arithmetic_threads(lock.threads if lock else threads):
        job = Job.prepare(
            model, example_inputs, target=target, precision=precision, calibration=calibration,
            calibration_samples=calibration_samples, budget=budget or Budget(), passes=passes,
            dynamic=dynamic, damage=damage, cost_model=cost_model, seed=seed,
            registry=registry or Registry(), progress=progress or Silent(), on_fault=on_fault,
            time_limit_s=time_limit_s, reproducers=reproducers, timing=timing, lock=lock,
        )  # fmt: skip
        return job.run()


@dataclass(frozen=True)
class Rewritten:
    """What passes and planner made of a program: after CLEAN, as planned, and in the end."""

    clean: Program
    planner: Planner | None
    probe: Probe | None
    final: Program


@dataclass
class Job:
    """One compile, step by step."""

    session: Session
    signature: Signature
    passes: list[Pass]
    budget: Budget
    damage: str
    options: dict[str, Any]
    registry: Registry
    batches: list[Batch]
    data: str
    """What damage is measured on, in words."""
    seal: Seal
    lock: Lock | None
    made_from: dict[str, Any]
    versions: dict[str, str]
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    _clock: float = field(default_factory=time.perf_counter)

    @classmethod
    def prepare(
        cls, model: Any, example_inputs: Any, *, target: str | Target,
        precision: str | Iterable[str], calibration: Any, budget: Budget, passes: Any,
        dynamic: Any, damage: str, cost_model: str, seed: int, registry: Registry,
        progress: Progress, on_fault: str, time_limit_s: float | None,
        reproducers: str | Path | None, timing: bool = True, lock: Lock | None = None,
        calibration_samples: int | None = None,
    ) -> Job:  # fmt: skip
        from optcompiler.bounds import refuse_what_cannot_run
        from optcompiler.calibration import load_calibration, split_holdout
        from optcompiler.calibration_sources import CalibrationSource, Given
        from optcompiler.frontend import import_model, split_bounds

        start = time.perf_counter()
        precision = spelled(precision)
        if on_fault not in ("continue", "stop"):
            raise InputError(f'on_fault is {on_fault!r}; it is "continue" or "stop".')
        target = Target.parse(target).sized(split_bounds(dynamic)[1])
        if lock is not None:
            target = target.completed(lock.target)
        elif not timing:
            budget.refuse_clocks()
        backend = registry.backend(target.backend)
        target = backend.spelled_out(target)
        if target.name is not None and backend.name_for(target.name) is None:
            raise InputError(f"target {target}: its artifacts have no name; leave name= out.")
        capabilities = backend.capabilities(target)
        precisions = allowed_precisions(precision, capabilities, target)
        chosen = pipeline.resolve(passes, registry, lossy=precision != "fp32")
        owners = {p.name: registry.owner_of_pass(p) for p in chosen}
        pricing = registry.cost_model(cost_model)
        imported = import_model(model, example_inputs, dynamic=dynamic)
        teacher, signature = imported.program, imported.signature
        refuse_what_cannot_run(teacher, registry.domains)
        require_determined(teacher)
        refuse_unknown_sizes(teacher, target.all_sizes)
        if not capabilities.any_port:
            require_tensors(teacher, f"target {target}")
        teacher = protected(teacher)
        batches = load_calibration(
            calibration, signature, max_samples=calibration_samples, note=progress.note,
            given=Given(teacher, signature, registry.ops, seed, progress),
        )  # fmt: skip
        batches = [protected_batch(b) for b in batches]
        if precision not in ("auto", "fp32") and not batches:
            raise InputError(
                f"precision {precision} needs calibration data; pass calibration=... (a few "
                f"batches of inputs), or precision='fp32'."
            )
        if precision == "fp32":
            chosen = [p for p in chosen if p.stage is not Stage.QUANTIZE]
        tune, holdout = split_holdout(batches)
        check = batches[0] if batches else protected_batch(_example(imported, example_inputs))
        options: dict[str, Any] = {
            "target": str(target), "precision": precision, "budget": budget.describe(),
            "damage": damage, "seed": seed, "cost_model": cost_model,
            "calibration_samples": sum(_samples(b) for b in batches),
            "timing": lock.made_from["options"]["timing"] if lock else timing,
            "passes": [
                {"name": p.name, "options": pipeline.options_of(p, owners[p.name]),
                 "owner": owners[p.name]}
                for p in chosen
            ],
        }  # fmt: skip
        if isinstance(calibration, CalibrationSource):
            options["calibration"] = calibration.options()
        made_from = {
            "model": teacher.content_hash(), "data": data_hash(batches or [check]),
            "target": str(target),
            "options": {k: v for k, v in options.items() if k != "target"},
        }  # fmt: skip
        versions = versions_of(backend)
        if lock is not None:
            lock.require(made_from, versions)
        choices = Choices(lock.measured if lock else None, timed=options["timing"])
        imported_at = time.perf_counter()
        if lock is not None:
            profile = DeviceProfile.from_json(dict(lock.profile))
        elif timing:
            profile = device.profile_for(backend, target, progress=progress)
        else:
            known = backend.nominal_profile(target)
            profile = known or nominal_profile(target.backend, target.threads)
        profile = replace(profile, measured=Consulted(profile.measured))
        context = PassContext(
            target=target, capabilities=capabilities, precisions=precisions,
            teacher=teacher.clone(), calibration=tune, holdout=holdout, ops=registry.ops,
            seed=seed, progress=progress, kernels=lambda p: backend.kernels(p, target),
            price_us=lambda p: float("nan"), observers=registry.observers, choices=choices,
        )  # fmt: skip
        session = Session(
            teacher, backend, target, pricing, profile, context, check, on_fault=on_fault,
            owners=owners, time_limit_s=time_limit_s,
            reproducers=Path(reproducers or cache.location() / "reproducers"),
        )  # fmt: skip
        session.context = replace(context, price_us=session.price_us)
        gone = {f.pass_name for f in session.quarantined_before()}
        chosen = [p for p in chosen if p.name not in gone]
        data = "random inputs" if example_inputs is None else "example inputs"
        data = "calibration data" if batches else data
        seal = Seal([*batches, *tune, *holdout, check], teacher)
        job = cls(
            session, signature, chosen, budget, damage, options, registry, batches, data, seal,
            lock, made_from, versions,
        )  # fmt: skip
        job.seconds["import"] = imported_at - start
        job.seconds["device profile"] = time.perf_counter() - imported_at
        job._clock = time.perf_counter()
        return job

    def _lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._clock
        self._clock = now

    # -- the compile ----------------------------------------------------------------------

    def run(self) -> Compiled:
        return self.holding_passes_to_contract(lambda: self._build(self.rewritten()))

    def holding_passes_to_contract(self, work: Callable[[], T]) -> T:
        """`work()`; begun again without the pass, as if it were not there, when one fails."""
        while True:
            try:
                return work()
            except PassFault as fault:
                if fault.pass_ is not None:
                    self.seal.check(self._named([fault.pass_]))
                gone = self.session.quarantine(fault)
                self.passes = [p for p in self.passes if p.name != gone.pass_name]

    def rewritten(self) -> Rewritten:
        """The program with all that passes and planner do to it, and what that was."""
        session = self.session
        clean = self._exact(Stage.CLEAN, session.teacher)
        self._lap("clean")
        planner, probe = self._plan(clean)
        if probe is not None:
            session.history += probe.steps
            lossy = [p for p in self.passes if p.stage not in EXACT]
            self._check_seal(lossy, probe.program)
        self._lap("plan")
        final = self._exact(Stage.FUSE, probe.program if probe else clean)
        self._lap("fuse")
        return Rewritten(clean, planner, probe, final)

    def _build(self, made: Rewritten) -> Compiled:
        session, clean, planner, probe = self.session, made.clean, made.planner, made.probe
        builds: list[Built] = []
        try:
            final = finish.build(session, made.final, "final")
            builds.append(final)
            reference = self._references(builds, clean, lossy=bool(probe and probe.chosen))
            self._lap("build")
            finish.measure(session, builds)
            final, probe = self._never_slower(builds, clean, planner, probe)
            if final is not builds[0]:
                finish.compare(session, final)
            self._lap("measure")
            return self._finish(final, reference, planner, probe)
        finally:
            for built in builds:
                built.close()

    def _exact(self, stage: Stage, program: Program, *, record: bool = True) -> Program:
        for pass_ in self.passes:
            if pass_.stage is stage:
                self.session.progress.note(f"{pass_.name}: {pass_.summary}")
                program = self.session.apply_exact(pass_, program, record=record)
                self._check_seal([pass_], program)
        return program

    def _check_seal(self, passes: Sequence[Pass], program: Program) -> None:
        """Raise `PluginError` when one of the passes wrote to what all share."""
        self.seal.check(self._named(passes))
        self.seal.hold(self.session.teacher, program)

    def _named(self, passes: Sequence[Pass]) -> list[str]:
        return [f"pass {p.name} of {self.session.owners[p.name]}" for p in passes]

    def _plan(self, clean: Program) -> tuple[Planner | None, Probe | None]:
        lossy = [p for p in self.passes if p.stage in (Stage.REDUCE, Stage.QUANTIZE)]
        if not lossy or not (self.batches or self._simulated()):
            return None, None
        batches = self.batches or [self.session.check]
        judge = judge_of(self.session, batches, self.damage)
        quick = judge_of(self.session, _few(batches, WEIGHING_SAMPLES), self.damage)
        score = self._score if self.budget.metric else None
        unjudged = "" if self.batches or self.budget.allows_loss else UNJUDGED
        planner = Planner(self.session, self.passes, self.budget, judge, quick, score, unjudged)
        return planner, planner.plan(clean)

    def _simulated(self) -> bool:
        """Whether the FX executor, by which lossy rewrites are judged, runs the model."""
        self.session.outputs(self.session.teacher)
        tensors = all(p.kind == "tensor" for p in self.session.teacher.outputs)
        return self.session.simulated and tensors

    def _score(self, program: Program) -> float:
        """The user's metric of a program, run by the FX executor."""
        import torch

        module = to_torch(program, self.session.context.ops, trainable=False)
        names = [p.name for p in program.inputs]

        def run(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
            with torch.no_grad():
                tensors = [torch.from_numpy(np.asarray(inputs[n], order="C")) for n in names]
                return [t.numpy() for t in module(*tensors)]

        return self._metric(run, self.signature)

    def _metric(
        self, run: Callable[[Mapping[str, np.ndarray]], list[np.ndarray]], signature: Signature
    ) -> float:
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(args, kwargs)
            return signature.restore(run(bound), like_torch=_any_torch((args, kwargs)))

        model = _batched(call, signature.inputs, signature.bounds)
        assert self.budget.metric is not None
        try:
            value = float(self.budget.metric(model))
        except OptcompilerError:
            raise
        except Exception as error:
            raise InputError(
                f"the metric raised {type(error).__name__}: {error}; it is called with the model "
                f"as its one argument and returns a number."
            ) from error
        if not np.isfinite(value):
            raise InputError(f"the metric gave {value}; it must return a finite number.")
        return value

    # -- building and measuring -----------------------------------------------------------

    def _references(self, builds: list[Built], clean: Program, *, lossy: bool) -> Built | None:
        """Build what the artifact is compared with: the program as imported and, when it is lossy,
        the exact one. Returns the former, or the latter where the backend cannot run the former."""
        session = self.session
        if not finish.timed(session, builds[0]):
            return None
        before = finish.try_build(session, session.teacher, "as imported")
        if before is not None:
            builds.append(before)
        if lossy:
            exact = self._exact(Stage.FUSE, clean, record=False)
            built = finish.try_build(session, exact, "exact passes only")
            if built is not None:
                builds.append(built)
                before = before or built
        return before

    def _never_slower(
        self, builds: list[Built], clean: Program, planner: Planner | None, probe: Probe | None
    ) -> tuple[Built, Probe | None]:
        """Undo what made the artifact slower than the exact program or the one as imported."""
        final = builds[0]
        others = [b for b in builds[1:] if self._fits(b) or not self._fits(final)]
        fastest = min(others, key=lambda b: b.measured_us or float("inf"), default=None)
        if fastest is None or not finish.slower(final, fastest):
            return final, probe
        if planner is not None and probe is not None and len(probe.chosen) > 1:
            half = sorted(probe.chosen, key=lambda o: o.saving_us)[: len(probe.chosen) // 2]
            smaller = planner.without(clean, probe, {o.key for o in half})
            if smaller.holds:
                program = self._exact(Stage.FUSE, smaller.program, record=False)
                built = finish.build(self.session, program, "fewer lossy candidates")
                builds.append(built)
                finish.measure(self.session, [built, fastest, final])
                if not finish.slower(built, fastest):
                    self._revert([o.key for o in half], final, built)
                    return built, smaller
        exact = next((b for b in others if b.label == "exact passes only"), None)
        if probe is not None and probe.chosen:
            keys = [o.key for o in probe.chosen]
            keys += [(p.name, c.site, c.choice) for p, c, *_, kept in probe.tuned if kept]
            winner = exact if exact is not None and not finish.slower(exact, fastest) else fastest
            self._revert(keys, final, winner)
            if exact is not None and winner is exact:
                return exact, None
        for row in list(self.session.ledger):
            if row.outcome == "taken" and row.exact:
                self._revert([row.key], final, fastest)
        return fastest, None

    def _fits(self, built: Built) -> bool:
        """Whether the size limit allows it: what is too large is no alternative to what is not."""
        limit = self.budget.max_size_mb
        return limit is None or built.size_bytes <= 1e6 * limit

    def _revert(self, keys: Sequence[tuple[str, str, str]], slow: Built, fast: Built) -> None:
        reason = (
            f"the artifact measured {slow.measured_us or 0:.0f} µs with it, "
            f"{fast.measured_us or 0:.0f} µs without"
        )
        for key in keys:
            self.session.ledger.revise(key, REVERTED, reason)

    # -- the artifact ---------------------------------------------------------------------

    def _finish(
        self, final: Built, before: Built | None, planner: Planner | None, probe: Probe | None
    ) -> Compiled:
        session, budget, choices = self.session, self.budget, self.session.choices
        profile = session.profile
        times = finish.learn_kernels(session, final)
        if session.profile is not profile:
            device.remember(session.backend, session.target, session.profile)
        bounds = tuple((dim, *ends) for dim, ends in session.target.bounds.items())
        signature = replace(self.signature.with_ports(final.program), bounds=bounds)
        lossy = bool(probe and probe.chosen)
        batches = self.batches or ([session.check] if lossy else [])
        damage = number(
            choices.keep("damage of the code", lambda: self._artifact_damage(final, batches))
        )
        metric = None
        if budget.metric is not None:
            teacher = planner.teacher_score if planner else None
            if teacher is None:
                teacher = choices.number("metric", lambda: self._score(session.teacher))
            student = choices.number(
                "metric of the code",
                lambda: self._metric(
                    lambda inputs: final.runner.run(finish.contiguous(inputs)), signature
                ),
            )
            metric = {
                "teacher": teacher, "student": student, "drop": budget.drop(teacher, student),
            }  # fmt: skip
        size = final.size_bytes
        imported = session.bound(session.teacher)
        drop = metric["drop"] if metric else None
        gates = budget.gates(damage, drop, final.measured_us, size)
        measurements: dict[str, Any] = {
            "predicted_us": final.predicted_us,
            "measured_us": final.measured_us,
            "baseline_us": before.measured_us if before else None,
            "baseline_predicted_us": before.predicted_us if before else None,
            "kernels": [
                {
                    "name": k.name, "kind": k.kind, "dtype": k.dtype, "nodes": list(k.nodes),
                    "predicted_us": predicted, "measured_us": times.get(k.name),
                }
                for k, predicted in zip(final.kernels, final.kernel_us, strict=True)
            ],
            "damage": damage,
            "damage_measure": self.damage,
            "damage_data": self.data if batches else None,
            "ran_here": choices.keep("ran", lambda: session.backend.runs_here(session.target)),
            "machine": profile.name,
            "metric": metric,
            "macs": {"before": self._macs(imported), "after": self._macs(final.program)},
            "size_bytes": {
                "before": before.size_bytes if before else imported.weight_bytes, "after": size
            },
            "compile_seconds": choices.choose("seconds", lambda: dict(self.seconds), {}),
            "gates": gates,
        }  # fmt: skip
        session.keep_quarantined()
        capabilities = session.context.capabilities
        reference = finish.reference(session, final) if capabilities.reference else None
        lock = self._locked(final, profile)
        contents = artifact.Contents(
            program=final.program, teacher=session.teacher, target=session.target,
            backend_info=final.info, signature=signature,
            ledger=session.ledger, options=self._options(), versions=self.versions,
            measurements=measurements, lock=lock.to_json(), reference=reference,
        )  # fmt: skip
        final.runner.close()
        backend = self.registry.backend(session.target.backend)
        directory = scratch.new()
        try:
            artifact.assemble(final.code, contents, directory)
        except BaseException:
            scratch.remove(directory)
            raise
        compiled = Compiled(directory, backend, owned=True, program=final.program)
        failed = [g for g in gates if not g["passed"]]
        if failed:
            raise GateError(
                "; ".join(f"{g['name']} is {g['value']:.4g}, over {g['limit']:.4g}" for g in failed)
                + "; loosen the budget, or take the best artifact found (--keep-best on the "
                "command line, the error's `compiled` in Python).",
                compiled,
            )
        return compiled

    def _options(self) -> dict[str, Any]:
        """The options, and which passes of those did not last."""
        faults = [f.record() for f in self.session.faults]
        return self.options | ({"quarantined": faults} if faults else {})

    def _artifact_damage(self, final: Built, batches: Sequence[Batch]) -> float | None:
        if not batches:
            return None
        judge = judge_of(self.session, batches, self.damage)
        names = [p.name for p in final.program.inputs]

        def run(*arrays: np.ndarray) -> list[np.ndarray]:
            return final.runner.run(finish.contiguous(dict(zip(names, arrays, strict=True))))

        bounds = [(dim, *ends) for dim, ends in self.session.target.bounds.items()]
        call = _batched(run, final.program.inputs, bounds)
        return judge.damage_of(lambda batch: call(*(batch[n] for n in names)))

    def _macs(self, program: Program) -> int:
        table = self.session.context.ops
        total = 0
        for node in resolved(program).graph:
            spec = table.get(node)
            total += spec.cost(node).macs if spec else 0
        return total

    def _locked(self, final: Built, profile: DeviceProfile) -> Lock:
        """The lock that this compile goes by, or writes."""
        gives = {
            "program": final.program.content_hash(), "code": artifact.code_hash(final.code),
        }  # fmt: skip
        if self.lock is not None:
            self.lock.require_same(gives)
            return self.lock
        consulted = profile.measured
        assert isinstance(consulted, Consulted)
        return Lock(
            made_from=self.made_from, versions=self.versions, arithmetic=arithmetic(),
            profile=replace(profile, measured=consulted.seen()).to_json(),
            measured=self.session.choices.values(), gives=gives,
        )  # fmt: skip


def session_for(
    program: Program, registry: Registry, *, target: str, precisions: frozenset[str], batch: Batch,
    calibrated: bool, seed: int,
) -> Session:  # fmt: skip
    """A session outside of a compile, on one batch; priced by the data sheet where there is one."""
    aim = Target.parse(target)
    backend = registry.backend(aim.backend)
    batch = protected_batch(batch)
    given = [batch] if calibrated else []
    profile = backend.nominal_profile(aim) or device.profile_for(backend, aim)
    context = PassContext(
        target=aim, capabilities=backend.capabilities(aim), precisions=precisions,
        teacher=program.clone(), calibration=given, holdout=given, ops=registry.ops, seed=seed,
        progress=Silent(), kernels=lambda p: backend.kernels(p, aim),
        price_us=lambda p: float("nan"), observers=registry.observers,
    )  # fmt: skip
    cost_model = registry.cost_model(DEFAULT_COST_MODEL)
    session = Session(protected(program), backend, aim, cost_model, profile, context, batch)
    session.context = replace(context, price_us=session.price_us)
    return session


def _example(imported: Imported, example_inputs: Any) -> Batch:
    """The example inputs as a batch, or seeded random ones for an ONNX model without."""
    from optcompiler.frontend import split_examples

    program: Program = imported.program
    if example_inputs is not None:
        args, kwargs = split_examples(example_inputs)
        try:
            return imported.signature.bind(args, kwargs)
        except InputError:
            if all(p.static for p in program.inputs):
                raise
    from optcompiler.synthesis import random_batch

    return random_batch(program.inputs)


def _batched(
    call: Callable[..., Any], ports: Sequence[Port], bounds: Sequence[tuple[str, int, int]]
) -> Callable[..., Any]:
    """`call` for any number of samples, when the first dimension that all inputs share has a
    fixed size or bounds."""
    firsts = {p.shape[0] for p in ports if p.shape}
    first = next(iter(firsts)) if len(firsts) == 1 else None
    if isinstance(first, int):
        return Batched(call, first)
    ends = next(((least, most) for dim, least, most in bounds if dim == first), None)
    return call if ends is None else Batched(call, ends[1], ends[0])


def _samples(batch: Batch) -> int:
    return max((a.shape[0] for a in batch.values() if a.ndim), default=1)


def _few(batches: Sequence[Batch], samples: int) -> list[Batch]:
    kept: list[Batch] = []
    for batch in batches:
        if samples <= 0:
            break
        kept.append(batch)
        samples -= _samples(batch)
    return kept


def _any_torch(tree: Any) -> bool:
    if isinstance(tree, Mapping):
        return any(_any_torch(v) for v in tree.values())
    if isinstance(tree, (tuple, list)):
        return any(_any_torch(v) for v in tree)
    return is_torch(tree)
