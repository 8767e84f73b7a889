"""Reading what the command line names: a model by reference, or an artifact by its directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from optcompiler.plugins import Registry
    from optcompiler.program import Port, Program


Dynamic = dict[str, dict[int, str] | tuple[int, int]]


def dynamic_axes(
    ctx: click.Context, param: click.Parameter, values: Sequence[str]
) -> Dynamic | str | None:
    """What `compile(dynamic=...)` takes, from one `SYMBOL` or from texts `NAME:AXIS=SYMBOL`; each
    may end in `=LEAST..MOST`."""
    if len(values) == 1 and values[0].isidentifier():
        return values[0]
    named: dict[str, dict[int, str]] = {}
    bounds: dict[str, tuple[int, int]] = {}
    for value in values:
        rest, ends = value, _ends(value.rpartition("=")[2])
        if ends is not None:
            rest = value.rpartition("=")[0]
        left, _, symbol = rest.rpartition("=")
        name, _, axis = left.rpartition(":")
        placed = bool(name) and axis.isdigit()
        if not symbol.isidentifier() or not (placed or (ends is not None and not left)):
            raise click.BadParameter(
                f"{value!r} is not NAME:AXIS=SYMBOL, for example input_ids:1=tokens, nor "
                f"SYMBOL=LEAST..MOST, for example batch=1..32, nor the only SYMBOL.",
                ctx,
                param,
            )
        if placed:
            named.setdefault(name, {})[int(axis)] = symbol
        if ends is not None:
            bounds[symbol] = ends
    return {**named, **bounds} or None


def _ends(text: str) -> tuple[int, int] | None:
    """The numbers of `LEAST..MOST`."""
    least, dots, most = text.partition("..")
    return (int(least), int(most)) if dots and least.isdigit() and most.isdigit() else None


def model_of(reference: str, registry: Registry) -> tuple[Any, Any]:
    """A model that can be compiled, and its example inputs; a file is read and looked through."""
    from optcompiler.sources import model_from_reference

    model, example_inputs = model_from_reference(reference)
    if isinstance(model, Path) and model.suffix == ".onnx":
        from optcompiler.bounds import refuse_what_cannot_run
        from optcompiler.program import Program

        model = Program.from_onnx(model)
        refuse_what_cannot_run(model, registry.domains)
    return model, example_inputs


def program_of(
    reference: str, like: Sequence[Port] | None = None,
    bounds: Mapping[str, tuple[int, int]] = MappingProxyType({}),
) -> Program:  # fmt: skip
    """The program that a model reference names, imported as a compile would.

    `like`: the inputs that an earlier import of it had, to get symbolic and fixed dimensions as
    there, and the `bounds` that symbols had.
    """
    from optcompiler.frontend import import_like, import_model
    from optcompiler.sources import model_from_reference

    model, example_inputs = model_from_reference(reference)
    if like is not None:
        return import_like(model, example_inputs, like, bounds)
    return import_model(model, example_inputs).program
