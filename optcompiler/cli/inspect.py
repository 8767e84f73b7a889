"""`optcompiler inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from optcompiler.cli.models import program_of
from optcompiler.cli.shell import common, write

if TYPE_CHECKING:
    from rich.console import RenderableType

    from optcompiler.artifact import Artifact
    from optcompiler.plugins import Registry
    from optcompiler.program import Program


@click.command()
@click.argument("model_or_artifact")
@common
def inspect(model_or_artifact: str, as_json: bool, registry: Callable[[], Registry]) -> None:
    """Show what a model or an artifact holds: interface, operators, work, weights."""
    from optcompiler.artifact import open_artifact

    if Path(model_or_artifact).is_dir():
        facts = _artifact_facts(open_artifact(model_or_artifact))
    else:
        facts = _model_facts(program_of(model_or_artifact), registry())
    write(facts, lambda: _table(facts), as_json=as_json)


def _model_facts(program: Program, registry: Registry) -> dict[str, Any]:
    flat = program.inlined()
    specs = [(registry.ops.get(node), node) for node in flat.graph]
    return {
        "inputs": program.inputs,
        "outputs": program.outputs,
        "opset": program.opset,
        "nodes": len(program.graph),
        "functions": len(program.functions),
        "operators": dict(Counter(_operator(n) for n in program.graph).most_common()),
        "macs": sum(spec.cost(node).macs for spec, node in specs if spec is not None),
        "without_declaration": sorted({_operator(n) for spec, n in specs if spec is None}),
        "weights": len(program.weights()),
        "weight_bytes": program.weight_bytes,
        "program_hash": program.content_hash(),
    }


def _operator(node: Any) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _artifact_facts(artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    files = {**manifest["files"], **artifact.records["files"]}
    kept = ("target", "optcompiler", "options", "versions", "program_hash", "teacher_hash",
            "code_hash", "backend_info")  # fmt: skip
    return {
        "inputs": artifact.inputs,
        "outputs": artifact.outputs,
        **{k: manifest[k] for k in kept},
        "files": {k: v["size_bytes"] for k, v in files.items()},
        "size_bytes": sum(v["size_bytes"] for v in files.values()),
    }


def _table(facts: Mapping[str, Any]) -> Iterable[RenderableType]:
    from rich.table import Table

    from optcompiler.summary import cell, count, size_text

    spell: dict[str, Callable[[Any], str]] = {
        "macs": count,
        "weight_bytes": size_text,
        "size_bytes": size_text,
        "files": lambda v: _lines({k: size_text(size) for k, size in v.items()}),
        "options": _options,
    }
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for key, value in facts.items():
        text = spell.get(key, _lines)(value)
        if text:
            table.add_row(cell(key.replace("_", " ")), cell(text))
    yield table


def _options(options: Mapping[str, Any]) -> str:
    from optcompiler.summary import budget_text

    known = {k: v for k, v in options.items() if k not in ("budget", "passes")}
    lines = [_lines(known), f"budget: {budget_text(options.get('budget'))}"]
    for item in options.get("passes") or ():
        settings = ", ".join(f"{k}={v}" for k, v in item["options"].items())
        lines.append(f"pass {item['name']}({settings}) from {item['owner']}")
    return "\n".join(lines)


def _lines(value: Any) -> str:
    if isinstance(value, Mapping):
        pairs = cast("Mapping[str, Any]", value).items()
        return "\n".join(f"{k}: {v}" for k, v in pairs if v is not None)
    if isinstance(value, (list, tuple)):
        return "\n".join(map(str, cast("list[Any]", value)))
    return str(value)
