"""`optcompiler verify`."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from optcompiler.cli.models import program_of
from optcompiler.cli.shell import common, write

if TYPE_CHECKING:
    import numpy as np
    from rich.console import RenderableType

    from optcompiler.compiled import Compiled
    from optcompiler.plugins import Registry
    from optcompiler.program import Port, Program

EXACT_TOLERANCE = 1e-3
LOSSY_TOLERANCE = 0.1


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--against", metavar="MODEL", help="Compare outputs with this model's on seeded inputs."
)
@click.option(
    "--tolerance", type=click.FloatRange(0),
    help=f"Largest error, as a share of the largest output. Default: {EXACT_TOLERANCE} when only "
    f"exact rewrites were taken, else {LOSSY_TOLERANCE}.",
)  # fmt: skip
@click.option("--samples", type=click.IntRange(1), default=3, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--size",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Of symbolic dimensions, or the nearest within their bounds.",
)
@common
def verify(
    artifact: Path, against: str | None, tolerance: float | None, samples: int, seed: int,
    size: int, as_json: bool, registry: Callable[[], Registry],
) -> None:  # fmt: skip
    """Hash every file of an artifact again; with --against, compare what it computes.

    The model is run by stock ONNX Runtime with its graph optimisations off. Exit code 1 when an
    output differs by more than the tolerance.
    """
    from optcompiler.artifact import open_artifact
    from optcompiler.compiled import load
    from optcompiler.errors import VerificationError

    opened = open_artifact(artifact)
    data: dict[str, Any] = {"artifact": str(artifact), "files": len(opened.files)}
    if against is None:
        write(data, lambda: _parts(data), as_json=as_json)
        return
    program = program_of(against, like=opened.teacher_inputs, bounds=opened.target.bounds)
    lossy = any(not row.exact for row in opened.ledger.with_outcome("taken"))
    limit = tolerance if tolerance is not None else LOSSY_TOLERANCE if lossy else EXACT_TOLERANCE
    with load(artifact, registry=registry()) as compiled:
        errors = _errors(compiled, program, against, range(seed, seed + samples), size)
    worst = max(errors.values(), default=0.0)
    data |= {
        "against": against,
        "same_teacher": program.content_hash() == opened.manifest["teacher_hash"],
        "errors": errors,
        "max_error": worst,
        "tolerance": limit,
        "samples": samples,
    }
    if not worst <= limit:
        name = max(errors, key=lambda k: errors[k])
        raise VerificationError(
            f"{artifact}: output {name!r} differs from {against} by {worst:.3g} of its largest "
            f"value, more than {limit:g}; compile again with a tighter budget, or allow it with "
            f"--tolerance."
        )
    write(data, lambda: _parts(data), as_json=as_json)


def _errors(
    compiled: Compiled, program: Program, against: str, seeds: Iterable[int], size: int
) -> dict[str, float]:
    """Largest error of each output over all seeds, as a share of the largest expected magnitude."""
    from optcompiler.errors import InputError
    from optcompiler.synthesis import random_batch

    names = [p.name for p in program.outputs]
    fits = len(program.inputs) == len(compiled.inputs) and all(
        _takes(model, artifact)
        for model, artifact in zip(program.inputs, compiled.inputs, strict=True)
    )
    if not fits or names != [p.name for p in compiled.outputs]:
        raise InputError(
            f"the artifact has inputs {_ports(compiled.inputs)} and outputs "
            f"{_ports(compiled.outputs)}, the model {_ports(program.inputs)} and "
            f"{_ports(program.outputs)}; give the model that it was compiled from."
        )
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    worst = dict.fromkeys(names, 0.0)
    with _telling(against):
        session = onnxruntime.InferenceSession(
            program.to_proto().SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    for seed in seeds:
        inputs = random_batch(compiled.inputs, seed=seed, dynamic=size, bounds=compiled.bounds)
        with _telling(against):
            expected: Sequence[Any] = session.run(names, inputs)
        for name, want, got in zip(names, expected, compiled.run(inputs), strict=True):
            worst[name] = max(worst[name], _error(want, got))
    return worst


@contextlib.contextmanager
def _telling(against: str) -> Generator[None]:
    """Faults of stock ONNX Runtime, whose exceptions have no base of their own, as `InputError`."""
    from optcompiler.errors import InputError
    from optcompiler.reading import one_line

    try:
        yield
    except Exception as error:
        raise InputError(
            f"{against}: stock ONNX Runtime, whose outputs are compared with, cannot run it on "
            f"random inputs ({one_line(error)}); verify without --against."
        ) from error


def _error(want: np.ndarray, got: np.ndarray) -> float:
    """Infinite where shapes, types, or the places of NaN and infinity differ."""
    import numpy as np

    if want.shape != got.shape or want.dtype != got.dtype:
        return float("inf")
    wide, other = want.astype(np.float64), got.astype(np.float64)
    finite = np.isfinite(wide)
    if not np.array_equal(wide[~finite], other[~finite], equal_nan=True):
        return float("inf")
    if not np.isfinite(other[finite]).all():
        return float("inf")
    largest = float(np.abs(wide[finite]).max(initial=0.0))
    difference = float(np.abs(wide[finite] - other[finite]).max(initial=0.0))
    return difference / (largest or 1.0)


def _takes(model: Port, artifact: Port) -> bool:
    """Whether the model takes what the artifact takes."""
    return (model.name, model.dtype, len(model.shape)) == (
        artifact.name, artifact.dtype, len(artifact.shape)
    ) and all(
        a == b or isinstance(a, str) or isinstance(b, str)
        for a, b in zip(model.shape, artifact.shape, strict=True)
    )  # fmt: skip


def _ports(ports: Sequence[Any]) -> str:
    return f"({', '.join(map(str, ports))})"


def _parts(data: dict[str, Any]) -> Iterable[RenderableType]:
    from optcompiler.summary import cell

    yield cell(f"{data['artifact']}: {data['files']} files are what was compiled")
    if "errors" in data:
        for name, error in data["errors"].items():
            yield cell(f"output {name}: largest error {error:.3g} of its largest value")
        teacher = "the model it was compiled from" if data["same_teacher"] else "another model"
        held = f"within {data['tolerance']:g} on {data['samples']} inputs"
        yield cell(f"{data['against']} ({teacher}): {held}")
