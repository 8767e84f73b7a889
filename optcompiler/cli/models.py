"""Reading what the command line names: a model by reference, or an artifact by its directory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from optcompiler.program import Program


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


def program_of(reference: str) -> Program:
    """The program that a model reference names, imported as a compile would."""
    from optcompiler.frontend import import_model
    from optcompiler.sources import model_from_reference

    model, example_inputs = model_from_reference(reference)
    return import_model(model, example_inputs).program
