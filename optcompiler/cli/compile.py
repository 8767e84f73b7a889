"""`optcompiler compile`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from optcompiler.cli import options
from optcompiler.cli.models import Dynamic, model_of
from optcompiler.cli.shell import common, telling_faults, write

if TYPE_CHECKING:
    from optcompiler.plugins import Registry
    from optcompiler.session import Fault


@click.command("compile")
@click.argument("model")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR",
    help="Where the artifact goes; one that is there is replaced in one step.",
)  # fmt: skip
@options.target
@options.precision
@options.calibration
@options.calibration_samples
@click.option(
    "--metric", metavar="REF", help="module:function or file.py:function, model to score."
)
@click.option("--smaller-is-better", is_flag=True, help="The metric is a loss.")
@click.option("--max-drop", type=float, help="How much the metric may lose, in its own unit.")
@options.max_damage
@click.option("--max-latency-ms", type=float, help="Median latency to reach.")
@click.option("--max-size-mb", type=float, help="Size of code and weights to reach, in 10^6 bytes.")
@click.option("--search-minutes", type=float, help="Then the best plan so far is taken.")
@options.passes
@options.dynamic
@click.option(
    "--keep-best", type=click.Path(path_type=Path), metavar="DIR",
    help="When a gate fails, write the best artifact that was found here.",
)  # fmt: skip
@options.damage
@click.option("--cost-model", default="roofline", show_default=True)
@options.seed
@click.option(
    "--on-fault", type=click.Choice(["continue", "stop"]), default="continue", show_default=True,
    help="When a pass breaks its contract: go on without it, or stop with exit code 5.",
)  # fmt: skip
@options.time_limit
@options.reproducers
@click.option(
    "--no-timing", is_flag=True,
    help="Time nothing: nominal prices, the same artifact on every run.",
)  # fmt: skip
@click.option(
    "--locked", type=click.Path(path_type=Path), metavar="ARTIFACT",
    help="Measure nothing: make this artifact, or that of this lock.json, once more.",
)  # fmt: skip
@click.option(
    "--depfile", type=click.Path(path_type=Path), metavar="FILE",
    help="Write what was read as a rule for Make: DIR/manifest.json depends on it.",
)  # fmt: skip
@common
def compile_(
    model: str, output: Path, target: str, precision: str, calibration: str | None,
    calibration_samples: int | None, metric: str | None, smaller_is_better: bool,
    max_drop: float | None, max_damage: float | None,
    max_latency_ms: float | None, max_size_mb: float | None, search_minutes: float | None,
    passes: tuple[str, ...], dynamic: Dynamic | str | None,
    keep_best: Path | None, damage: str, cost_model: str, seed: int, on_fault: str,
    time_limit_s: float | None, reproducers: Path | None, no_timing: bool, locked: Path | None,
    depfile: Path | None, as_json: bool, registry: Callable[[], Registry],
) -> None:  # fmt: skip
    """Compile MODEL and write the artifact to DIR.

    MODEL is file.onnx, file.pt2, package.module:function or file.py:function; a function returns
    the model and its example inputs. When a gate fails the exit code is 1 and DIR is
    as it was.
    """
    from optcompiler.artifact import MANIFEST
    from optcompiler.compiled import refuse_other_than_artifact
    from optcompiler.depfile import Inputs, write_depfile
    from optcompiler.errors import GateError, InputError
    from optcompiler.pipeline import resolve
    from optcompiler.progress import progress_on
    from optcompiler.sources import (
        calibration_from_reference,
        metric_from_reference,
        referred,
    )
    from optcompiler.target import Target

    if depfile is not None and depfile.resolve().is_relative_to(output.resolve()):
        raise InputError(f"{depfile} is inside of {output}, which is replaced; put it beside.")
    for place in (output, keep_best):
        if place is not None and place.exists():
            refuse_other_than_artifact(place)
    plugins = registry()
    resolve(list(passes), plugins)  # names and options, before anything that takes time
    inputs = Inputs()
    budget = _budget(
        metric=metric_from_reference(metric) if metric else None,
        larger_is_better=not smaller_is_better, max_drop=max_drop, max_damage=max_damage,
        max_latency_ms=max_latency_ms, max_size_mb=max_size_mb, search_minutes=search_minutes,
    )  # fmt: skip
    aim = Target.parse(target)
    if aim.name is None and locked is None and aim.backend in plugins.backends:
        aim = aim.named(plugins.backend(aim.backend).name_for(output.resolve().name))
    source, example_inputs = model_of(model, plugins)
    batches = calibration_from_reference(calibration) if calibration else None
    from optcompiler.compiler import compile as run  # imports torch; what is refused costs little

    try:
        with telling_faults() as faults:
            compiled = run(
                source, example_inputs, target=aim, precision=precision,
                calibration=batches, calibration_samples=calibration_samples,
                budget=budget, passes=list(passes) or None, dynamic=dynamic, damage=damage,
                cost_model=cost_model, seed=seed, registry=plugins,
                progress=progress_on(sys.stderr), on_fault=on_fault, time_limit_s=time_limit_s,
                reproducers=reproducers, timing=not no_timing, locked=locked,
            )  # fmt: skip
    except GateError as error:
        best = getattr(error, "compiled", None)
        if best is not None:
            with best:
                if keep_best is not None:
                    best.save(keep_best)
        raise
    with compiled:
        if depfile is not None:
            for reference in filter(None, (model, referred(calibration or ""), metric)):
                inputs.add_reference(reference)
            if locked is not None:
                inputs.add_lock(locked)
            write_depfile(depfile, output / MANIFEST, inputs.files())
        compiled.save(output)
        _report(compiled, output, faults, as_json)


def _budget(**limits: Any) -> Any:
    from optcompiler.budget import Budget

    return Budget(**limits)


def _report(compiled: Any, output: Path, faults: list[Fault], as_json: bool) -> None:
    from rich.text import Text

    from optcompiler.ledger import OUTCOMES

    data = {
        "artifact": str(output),
        "manifest": compiled.manifest,
        "measurements": compiled.measurements,
        "ledger": {o: len(compiled.ledger.with_outcome(o)) for o in OUTCOMES},
        "quarantined": faults,
    }
    lines = compiled.summary() + f"\nwritten to {output}"
    write(data, lambda: [Text(lines)], as_json=as_json)
