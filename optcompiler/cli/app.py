"""The command group. Commands import what they need when they run, so that help is quick."""

from __future__ import annotations

import click

from optcompiler._version import __version__
from optcompiler.cli.bench import bench
from optcompiler.cli.bisect import bisect
from optcompiler.cli.compile import compile_
from optcompiler.cli.diff import diff
from optcompiler.cli.explain import explain
from optcompiler.cli.inspect import inspect
from optcompiler.cli.listing import device, passes, plugins
from optcompiler.cli.replay import replay
from optcompiler.cli.shell import Shell
from optcompiler.cli.verify import verify


@click.group(cls=Shell, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="optcompiler", message="%(prog)s %(version)s")
def main() -> None:
    """A trained model and an accuracy budget in, the fastest artifact for a target out.

    Results go to stdout, progress to stderr. Exit codes: 0 fine; 1 a gate failed (accuracy,
    budget, verification); 2 bad usage or input; 3 unsupported operator; 4 toolchain missing; 5
    plugin fault; 70 internal error, with a reproducer written; 130 interrupted, 143 by
    SIGTERM.
    """


for command in (
    compile_, inspect, bench, verify, explain, diff, bisect, replay, plugins, passes, device,
):  # fmt: skip
    main.add_command(command)
