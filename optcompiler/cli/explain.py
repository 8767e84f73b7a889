"""`optcompiler explain`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from optcompiler.cli.shell import common, write

if TYPE_CHECKING:
    from rich.console import RenderableType

    from optcompiler.artifact import Artifact
    from optcompiler.explaining import Layer
    from optcompiler.ledger import Row
    from optcompiler.plugins import Registry


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("node", required=False)
@common
def explain(
    artifact: Path, node: str | None, as_json: bool, registry: Callable[[], Registry]
) -> None:
    """Say why NODE is as it is: what was tried on it, what came of it, which kernels hold it.

    For a layer whose precision was in question: the values that calibration saw, the ranges and
    scales tried, what they lose, and what tuning won back. Without NODE, every row of the ledger.
    """
    from optcompiler.artifact import open_artifact
    from optcompiler.explaining import layer_of

    opened = open_artifact(artifact)
    layer = None if node is None else layer_of(opened.ledger, node)
    rows = list(opened.ledger) if layer is None else list(layer.rows)
    data: dict[str, Any] = {"artifact": str(artifact), "node": node, "rows": rows}
    if node is not None:
        _require_known(opened, node)
        data["kernels"] = [k for k in _kernels(opened) if node in (k.get("nodes") or ())]
        data["program"] = _mentions(opened, node)
    if layer is not None:
        data |= layer.data()
    write(data, lambda: _parts(layer, rows, data), as_json=as_json)


def _kernels(artifact: Artifact) -> list[dict[str, Any]]:
    return artifact.measurements.get("kernels") or []


def _mentions(artifact: Artifact, node: str) -> str | None:
    """The line of the program text that is the node."""
    from optcompiler.cli.diff import node_lines

    text = (artifact.directory / "program.txt").read_text(encoding="utf-8")
    return node_lines(text).get(node)


def _require_known(artifact: Artifact, node: str) -> None:
    from optcompiler.cli.diff import node_lines
    from optcompiler.errors import InputError

    text = (artifact.directory / "program.txt").read_text(encoding="utf-8")
    known = set(node_lines(text))
    known |= {name for row in artifact.ledger for name in (row.site, *row.nodes)}
    known |= {str(n) for k in _kernels(artifact) for n in k.get("nodes") or ()}
    if node in known:
        return
    near = difflib.get_close_matches(node, sorted(known), n=3)
    raise InputError(
        f"{artifact.directory}: no node {node!r}; "
        + (f"near are {', '.join(near)}." if near else "see `optcompiler explain ARTIFACT`.")
    )


def _parts(layer: Layer | None, rows: list[Row], data: dict[str, Any]) -> Iterable[RenderableType]:
    from optcompiler.explaining import layer_parts
    from optcompiler.summary import cell, counts, kernel_table, row_table

    if layer is None:
        yield cell(counts(rows) or "the ledger is empty")
        yield row_table(rows, with_pass=True)
        return
    if data["program"]:
        yield cell(data["program"])
    if rows:
        yield cell("")
        yield row_table(rows, with_pass=True)
    else:
        yield cell(f"{layer.node}: no pass proposed or declined anything here")
    yield from layer_parts(layer)
    if data["kernels"]:
        yield cell("")
        yield kernel_table(data["kernels"])
