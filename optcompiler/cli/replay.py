"""`optcompiler replay`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from optcompiler.cli import options
from optcompiler.cli.shell import common, write

if TYPE_CHECKING:
    from rich.console import RenderableType

    from optcompiler.plugins import Registry


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@options.check
@options.check_seconds
@common
@click.pass_context
def replay(
    ctx: click.Context, directory: Path, command: str | None, check_seconds: float, as_json: bool,
    registry: Callable[[], Registry],
) -> None:  # fmt: skip
    """Do again what a reproducer records: let the pass work on the smallest program it failed on.

    DIRECTORY is a reproducer, or its name alone when it lies in the user's cache. What `bisect`
    wrote needs --check. Exit code 0: the pass no longer fails; 1: it does; 5: it is not installed.
    """
    from optcompiler.cache import location
    from optcompiler.cli.checking import Command
    from optcompiler.replaying import replay as run

    kept = location() / "reproducers" / directory
    check = Command(command, check_seconds) if command is not None else None
    done = run(directory if directory.exists() else kept, registry(), check)
    data: dict[str, Any] = {
        "pass": done.record["pass"],
        "owner": done.owner,
        "site": done.record["site"],
        "choice": done.record["choice"],
        "fails": done.fault is not None,
        "recorded": {k: done.record[k] for k in ("kind", "reason", "owner")},
        "now": {"kind": done.fault.kind, "reason": str(done.fault)} if done.fault else None,
    }
    write(data, lambda: _parts(data), as_json=as_json)
    if done.fault is not None:
        ctx.exit(1)


def _parts(data: dict[str, Any]) -> Iterable[RenderableType]:
    from optcompiler.summary import cell

    yield cell(f"recorded of {data['recorded']['owner']}: {data['recorded']['reason']}")
    now = data["now"]["reason"] if data["fails"] else f"{data['pass']} no longer fails here."
    yield cell(f"now with {data['owner']}: {now}")
