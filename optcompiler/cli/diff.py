"""`optcompiler diff`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from optcompiler.cli.shell import common, write

if TYPE_CHECKING:
    from rich.console import RenderableType

    from optcompiler.ledger import Ledger
    from optcompiler.plugins import Registry

_WEIGHT = re.compile(r"^#   (?P<name>\".*\"): (?P<rest>.*)$")


@dataclass(frozen=True)
class Side:
    """What is compared of an artifact or a model."""

    interface: dict[str, str]
    text: str
    ledger: Ledger | None = None
    measurements: Mapping[str, Any] = field(default_factory=dict[str, Any])
    code_hash: str | None = None


@click.command()
@click.argument("a")
@click.argument("b")
@common
def diff(a: str, b: str, as_json: bool, registry: Callable[[], Registry]) -> None:
    """Compare two artifacts or models: interface, nodes, weights, decisions, latency."""
    before, after = _side(a), _side(b)
    data: dict[str, Any] = {
        "a": a,
        "b": b,
        "interface": _changes(before.interface, after.interface),
        "nodes": _changes(node_lines(before.text), node_lines(after.text)),
        "weights": _changes(_weights(before.text), _weights(after.text)),
    }
    if before.ledger is not None and after.ledger is not None:
        data["ledger"] = _changes(_decisions(before.ledger), _decisions(after.ledger))
        data["measurements"] = {
            key: [before.measurements.get(key), after.measurements.get(key)]
            for key in ("measured_us", "predicted_us", "damage")
        }
        data["same_code"] = before.code_hash == after.code_hash
    write(data, lambda: _parts(data), as_json=as_json, wide=True)


def node_lines(text: str) -> dict[str, str]:
    """Lines of a program's text by the name of the node that each is."""
    from optcompiler.artifact import NODE_LINE

    found = ((NODE_LINE.match(line), line.strip()) for line in text.splitlines())
    return {match["name"]: line for match, line in found if match}


def _weights(text: str) -> dict[str, str]:
    found = map(_WEIGHT.match, text.splitlines())
    return {json.loads(match["name"]): match["rest"] for match in found if match}


def _side(path: str) -> Side:
    from optcompiler.artifact import open_artifact, program_text
    from optcompiler.cli.models import program_of

    if Path(path).is_dir():
        artifact = open_artifact(path)
        return Side(
            _interface(artifact.inputs, artifact.outputs),
            (artifact.directory / "program.txt").read_text(encoding="utf-8"),
            artifact.ledger,
            artifact.measurements,
            artifact.manifest.get("code_hash"),
        )
    program = program_of(path)
    return Side(_interface(program.inputs, program.outputs), program_text(program))


def _interface(inputs: Iterable[Any], outputs: Iterable[Any]) -> dict[str, str]:
    return {f"input {p.name}": str(p) for p in inputs} | {
        f"output {p.name}": str(p) for p in outputs
    }


def _decisions(ledger: Ledger) -> dict[str, str]:
    return {
        f"{row.pass_name}[{row.site}={row.choice}]": f"{row.outcome}: {row.reason}"
        for row in ledger
    }


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, Any]:
    return {
        "removed": {k: v for k, v in before.items() if k not in after},
        "added": {k: v for k, v in after.items() if k not in before},
        "changed": {k: [v, after[k]] for k, v in before.items() if k in after and after[k] != v},
    }


def _parts(data: Mapping[str, Any]) -> Iterable[RenderableType]:
    from optcompiler.summary import cell, figure

    for title in ("interface", "nodes", "weights", "ledger"):
        lines = _lines(data.get(title) or {}, with_key=title in ("weights", "ledger"))
        if lines:
            yield cell(f"{title}:")
            yield from (cell(line) for line in lines)
    pairs: Mapping[str, list[Any]] = data.get("measurements", {})
    for key, (old, new) in pairs.items():
        if old is not None and new is not None:
            ratio = f" ({float(old) / float(new):.2f}x)" if key != "damage" and float(new) else ""
            yield cell(f"{key.replace('_', ' ')}: {figure(old)} -> {figure(new)}{ratio}")
    if "same_code" in data:
        yield cell("code: the same bytes" if data["same_code"] else "code: differs")
    elif not any(any(data[k].values()) for k in ("interface", "nodes", "weights")):
        yield cell("no difference")


def _lines(changes: Mapping[str, Any], with_key: bool) -> list[str]:
    def spell(key: str, value: str) -> str:
        return f"{key}: {value}" if with_key else value

    lines = [f"  - {spell(k, v)}" for k, v in changes.get("removed", {}).items()]
    lines += [f"  + {spell(k, v)}" for k, v in changes.get("added", {}).items()]
    for key, (old, new) in changes.get("changed", {}).items():
        lines += [f"  - {spell(key, old)}", f"  + {spell(key, new)}"]
    return lines
