"""Reading what the command line names: a model by reference, or an artifact by its directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from optcompiler.plugins import Registry
    from optcompiler.program import Port, Program


def dynamic_axes(
    ctx: click.Context, param: click.Parameter, values: Sequence[str]
) -> dict[str, dict[int, str]] | str | None:
    """What `compile(dynamic=...)` takes, from one `SYMBOL` or from texts `NAME:AXIS=SYMBOL`."""
    if len(values) == 1 and values[0].isidentifier():
        return values[0]
    dynamic: dict[str, dict[int, str]] = {}
    for value in values:
        left, _, symbol = value.rpartition("=")
        name, _, axis = left.rpartition(":")
        if not (name and axis.isdigit() and symbol.isidentifier()):
            raise click.BadParameter(
                f"{value!r} is not NAME:AXIS=SYMBOL, for example input_ids:1=tokens, nor the only "
                f"SYMBOL.",
                ctx,
                param,
            )
        dynamic.setdefault(name, {})[int(axis)] = symbol
    return dynamic or None


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


def program_of(reference: str, like: Sequence[Port] | None = None) -> Program:
    """The program that a model reference names, imported as a compile would.

    `like`: the inputs that an earlier import of it had, to get symbolic and fixed dimensions as
    there.
    """
    from optcompiler.frontend import import_like, import_model
    from optcompiler.sources import model_from_reference

    model, example_inputs = model_from_reference(reference)
    if like is not None:
        return import_like(model, example_inputs, like)
    return import_model(model, example_inputs).program
