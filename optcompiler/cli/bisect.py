"""`optcompiler bisect`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from optcompiler.cli import options
from optcompiler.cli.models import Dynamic, model_of
from optcompiler.cli.shell import common, say, telling_faults, write

if TYPE_CHECKING:
    from rich.console import RenderableType

    from optcompiler.bisecting import Culprit
    from optcompiler.plugins import Registry
    from optcompiler.program import Program

_MOST_LINES = 20


@click.command()
@click.argument("model")
@options.check
@options.check_seconds
@click.option(
    "--artifact", is_flag=True,
    help="Show CMD artifacts for the target instead of .onnx files: this judges the backend too.",
)  # fmt: skip
@options.target
@options.precision
@options.calibration
@options.max_damage
@options.damage
@options.passes
@options.dynamic
@options.seed
@options.time_limit
@options.reproducers
@common
def bisect(
    model: str, command: str | None, check_seconds: float, artifact: bool, target: str,
    precision: str, calibration: str | None, max_damage: float | None, damage: str,
    passes: tuple[str, ...], dynamic: Dynamic | str | None, seed: int,
    time_limit_s: float | None, reproducers: Path | None, as_json: bool,
    registry: Callable[[], Registry],
) -> None:  # fmt: skip
    """Find the pass, and then the nodes, that make a check of yours fail for MODEL.

    A compile is a sequence of candidates. CMD is run, as by `git bisect run`, on the model as
    imported (which it must find good), on the result of all candidates (bad), and then on what the
    first of them make, halving what is left. Exit code 0: found; 1: nothing to find, or CMD
    contradicts itself; 2: CMD cannot be run or finds fault with MODEL itself.
    """
    from optcompiler.budget import Budget
    from optcompiler.cli.checking import Command
    from optcompiler.pipeline import resolve
    from optcompiler.progress import progress_on
    from optcompiler.sources import calibration_from_reference

    if command is None:
        raise click.UsageError("give the check with --check CMD.")
    plugins = registry()
    resolve(list(passes), plugins)  # names and options, before anything that takes time
    writer = _artifacts(target, plugins) if artifact else None
    check = Command(command, check_seconds, writer)
    source, example_inputs = model_of(model, plugins)
    from optcompiler.bisecting import bisect as run  # imports torch; what is refused costs little

    with telling_faults():
        found = run(
            source, check, example_inputs, target=target, precision=precision,
            calibration=calibration_from_reference(calibration) if calibration else None,
            budget=Budget(max_damage=max_damage), passes=list(passes) or None, dynamic=dynamic,
            damage=damage, seed=seed, registry=plugins, progress=progress_on(sys.stderr),
            time_limit_s=time_limit_s, reproducers=reproducers, command=command,
        )  # fmt: skip
    data = dataclasses.asdict(found)
    write(data, lambda: _parts(found), as_json=as_json)


def _artifacts(target: str, registry: Registry) -> Callable[[Program, Path], Path | None]:
    """Writes programs as artifacts; one that the backend cannot build is told and skipped."""
    from optcompiler.errors import OptcompilerError

    def write_artifact(program: Program, folder: Path) -> Path | None:
        from optcompiler.compiler import compile as build

        try:
            with build(program, target=target, precision="fp32", passes=[],
                       registry=registry) as made:  # fmt: skip
                return made.save(folder / "artifact")
        except OptcompilerError as error:
            say(f"skipped: {error}")
            return None

    return write_artifact


def _parts(found: Culprit) -> Iterable[RenderableType]:
    from optcompiler.summary import cell

    kind = "exact" if found.exact else "not exact"
    yield cell(f"{found.pass_name} of {found.owner} breaks the check")
    yield cell(f"candidate {found.step} of {found.steps}: {found.site} = {found.choice} ({kind})")
    if found.note:
        yield cell(found.note)
    how = "the fewest nodes that it has to be applied to" if found.narrowed else "what it changes"
    yield cell(f"{how}: {', '.join(found.nodes) or 'no node'}")
    for title, lines in (("before", found.before), ("after", found.after)):
        yield cell(f"\n{title}")
        for line in lines[:_MOST_LINES]:
            yield cell(f"  {line}")
        if len(lines) > _MOST_LINES:
            yield cell(f"  and {len(lines) - _MOST_LINES} more lines")
    yield cell(f"\n{len(found.trials)} checks; both programs are in {found.reproducer}")
