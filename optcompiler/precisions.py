"""Which precisions a compile may use, from what the user asks for and what the target has."""

from __future__ import annotations

from collections.abc import Iterable

from optcompiler.backend import Capabilities
from optcompiler.errors import InputError
from optcompiler.target import Target


def spelled(precision: str | Iterable[str]) -> str:
    """One spelling of what may be a name, names joined by commas or a collection of names.

    Raises `InputError` when no name is among them.
    """
    given = precision.split(",") if isinstance(precision, str) else list(precision)
    names = sorted({str(name).strip() for name in given} - {""})
    if not names:
        raise InputError(f"precision {precision!r} names none; give auto, fp32 or int8, say.")
    return ",".join(names)


def allowed_precisions(
    precision: str, capabilities: Capabilities, target: Target
) -> frozenset[str]:
    """What passes may use: "auto" is all that the target has; a name adds to float32.

    Several names are joined by commas. Raises `InputError` for a precision that the target lacks.
    """
    known = capabilities.precisions | capabilities.emulated
    names = set(precision.split(","))
    allowed = {"fp32"}
    if "auto" in names:
        names.remove("auto")
        allowed = set(capabilities.precisions)
    for name in sorted(names - known):
        has = ", ".join(sorted(known))
        raise InputError(f"target {target} has no precision {name!r}; it has {has}.")
    return frozenset(allowed | names)
