"""`optcompiler plugins`, `passes` and `device`: what there is on this machine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

import click

from optcompiler.cli.shell import common, write

if TYPE_CHECKING:
    from rich.console import RenderableType

    from optcompiler.plugins import Registry


@click.command()
@common
def plugins(as_json: bool, registry: Callable[[], Registry]) -> None:
    """List the plugins that are loaded, with what each brings."""
    rows = registry().describe()
    write({"plugins": rows}, lambda: _plugins(rows), as_json=as_json)


def _plugins(rows: list[dict[str, Any]]) -> Iterable[RenderableType]:
    from optcompiler.summary import cell, grid

    table = grid(
        ("plugin", "left"), ("from", "left"), ("backends", "left"), ("passes", "left"), wrap=True
    )
    for row in rows:
        owner = f"{row['distribution']} {row['version']}"
        brings = (", ".join(row["backends"]), ", ".join(row["passes"]))
        table.add_row(*map(cell, (row["name"], owner, *brings)))
    yield table


@click.command()
@click.argument("name", required=False)
@common
def passes(name: str | None, as_json: bool, registry: Callable[[], Registry]) -> None:
    """List passes, or describe the pass NAME with its options."""
    found = registry()
    if name is None:
        rows = [_describe(found, n) for n in found.passes]
        rows.sort(key=lambda r: (r["order"], r["name"]))
        write({"passes": rows}, lambda: _passes(rows), as_json=as_json)
        return
    row = _describe(found, name)
    write(row, lambda: _pass(row), as_json=as_json)


def _describe(registry: Registry, name: str) -> dict[str, Any]:
    cls = registry.pass_class(name)
    return {
        "name": name,
        "summary": cls.summary,
        "stage": cls.stage.name.lower(),
        "order": int(cls.stage),
        "default": cls.default,
        "owner": registry.owner_of_pass(name),
        "documentation": cls.__doc__ or "",
        "options": [
            {"name": f.name, "type": _type_name(f.type), "default": _default_of(f)}
            for f in fields(cls)  # pyright: ignore[reportArgumentType]
        ],
    }


def _type_name(annotation: Any) -> str:
    return (
        annotation
        if isinstance(annotation, str)
        else getattr(annotation, "__name__", str(annotation))
    )


def _default_of(field: Any) -> Any:
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else None


def _passes(rows: list[dict[str, Any]]) -> Iterable[RenderableType]:
    from optcompiler.summary import cell, grid

    table = grid(
        ("pass", "left"), ("stage", "left"), ("default", "left"), ("summary", "left"), wrap=True
    )
    for row in rows:
        default = "yes" if row["default"] else "no"
        table.add_row(*map(cell, (row["name"], row["stage"], default, row["summary"])))
    yield table


def _pass(row: dict[str, Any]) -> Iterable[RenderableType]:
    import inspect

    from optcompiler.summary import cell, grid

    default = "in the default pipeline" if row["default"] else "not in the default pipeline"
    yield cell(f"{row['name']} (stage {row['stage']}, {default}, from {row['owner']})")
    yield cell(inspect.cleandoc(row["documentation"]) or row["summary"])
    if row["options"]:
        yield cell("")
        table = grid(("option", "left"), ("type", "left"), ("default", "left"))
        for option in row["options"]:
            table.add_row(*map(cell, (option["name"], option["type"], repr(option["default"]))))
        yield table


@click.command()
@click.option(
    "--target", default="onnxruntime", show_default=True, metavar="NAME[:KEY=VALUE,...]",
    help="Backend with its options.",
)  # fmt: skip
@click.option("--remeasure", is_flag=True, help="Measure now, even when a profile is known.")
@common
def device(target: str, remeasure: bool, as_json: bool, registry: Callable[[], Registry]) -> None:
    """Show what a target reaches on this machine: rates, bandwidth, cost of a launch."""
    from optcompiler.device import profile_for
    from optcompiler.progress import progress_on
    from optcompiler.target import Target

    parsed = Target.parse(target)
    profile = profile_for(
        registry().backend(parsed.backend), parsed, remeasure=remeasure,
        progress=progress_on(sys.stderr),
    )  # fmt: skip
    write(
        {"target": str(parsed), "profile": profile.to_json()},
        lambda: _device(profile),
        as_json=as_json,
    )


def _device(profile: Any) -> Iterable[RenderableType]:
    from optcompiler.summary import cell, grid

    source = "nominal, not measured here" if profile.estimated else "measured here"
    yield cell(f"{profile.name}: {profile.backend}, {profile.threads} threads, {source}")
    yield cell(f"per call {profile.overhead_us:.1f} us, per kernel {profile.launch_us:.2f} us")
    yield cell(f"{len(profile.measured)} kernels measured")
    table = grid(("rate", "left"), ("at size", "right"), ("per second", "right"))
    for title, value in _rates(profile.to_json()):
        for size, rate in value:
            table.add_row(*map(cell, (title, f"{size:.3g}", f"{rate / 1e9:.3f} G")))
    yield table


def _rates(data: dict[str, Any]) -> Iterable[tuple[str, list[tuple[float, float]]]]:
    for key, unit in (("mac_rate", "multiply-accumulates"), ("flop_rate", "operations")):
        for kind, curve in data[key].items():
            yield f"{unit} {kind}", curve
    yield "bytes", data["bandwidth"]
