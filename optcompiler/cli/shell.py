"""What every command shares: exit codes, JSON, plugins, and what happens when something breaks."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import secrets
import shlex
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from optcompiler import supervisor
from optcompiler._version import __version__
from optcompiler.errors import CacheWarning, OptcompilerError, QuarantineWarning

if TYPE_CHECKING:
    from rich.console import RenderableType

    from optcompiler.plugins import Registry
    from optcompiler.session import Fault

INTERNAL = 70
SIGNALLED = 128
BROKEN_PIPE = 141
DISTRIBUTION = "optcompiler"
LONGEST_LINE = 1000


class Shell(click.Group):
    """A group whose `main` turns every outcome into an exit code and at most one sentence."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> NoReturn:  # pyright: ignore[reportIncompatibleMethodOverride]
        # ONNX Runtime would write a device id into the home directory and send events
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        arguments = list(sys.argv[1:] if args is None else args)
        extra = {"prog_name": DISTRIBUTION, **extra, "standalone_mode": False}
        as_json = "--json" in arguments
        try:
            code: Any = super().main(arguments, **extra)
        except SystemExit:
            raise
        except BaseException as error:
            code = _ended(error, arguments, as_json)
        try:
            sys.stdout.flush()
        except OSError:
            _forget_stdout()
        sys.exit(code)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            _forget_stdout()
            ctx.exit(BROKEN_PIPE)
        except KeyboardInterrupt as error:
            raise click.exceptions.Abort from error  # else click writes an empty line first


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options `--json` and `--no-plugins`; the command gets `as_json` and `registry`.

    `registry` is a function without arguments, so that a command which needs no plugin loads none.
    """

    @click.option("--json", "as_json", is_flag=True, help="Write JSON to stdout, errors included.")
    @click.option(
        "--no-plugins", is_flag=True, help="Leave out plugins of other distributions than ours."
    )
    @click.pass_context
    @functools.wraps(command)
    def wrapped(ctx: click.Context, /, *args: Any, no_plugins: bool, **kwargs: Any) -> Any:
        given: Callable[[], Registry] | None = ctx.obj
        kwargs["registry"] = given or functools.partial(load_registry, no_plugins)
        return ctx.invoke(command, *args, **kwargs)

    return wrapped


def load_registry(no_plugins: bool) -> Registry:
    """Every installed plugin, or only those of the distribution `optcompiler`."""
    from optcompiler.plugins import GROUP, LOAD_VARIABLE, Registry

    if not no_plugins:
        return Registry()
    own = [
        e.name
        for e in importlib.metadata.entry_points(group=GROUP)
        if e.dist is not None and e.dist.name == DISTRIBUTION
    ]
    if LOAD_VARIABLE in os.environ:
        wanted = {n.strip() for n in os.environ[LOAD_VARIABLE].split(",")}
        own = [n for n in own if n in wanted]
    return Registry(load=own)


def write(
    data: Any, parts: Callable[[], Iterable[RenderableType]], *, as_json: bool, wide: bool = False
) -> None:
    """`data` as JSON, or the renderables that `parts` makes, to stdout.

    Text is as wide as the terminal, 100 columns where there is none, and with `wide` never cut.
    """
    if as_json:
        from optcompiler.files import to_json

        click.echo(to_json(data), nl=False)
        return
    from optcompiler.summary import WIDTH, to_text

    width = WIDTH
    if wide:
        width = 100_000
    elif sys.stdout.isatty():
        width = max(60, os.get_terminal_size(sys.stdout.fileno()).columns)
    click.echo(to_text(parts(), width), nl=False)


def _forget_stdout() -> None:
    """Let what is still buffered go nowhere, so that one error is not followed by a second."""
    try:
        handle = sys.stdout.fileno()
    except (OSError, ValueError):
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, handle)
    os.close(nowhere)


@contextlib.contextmanager
def telling_faults() -> Generator[list[Fault]]:
    """A line on stderr for each pass that is left out; the faults, as they come."""
    faults: list[Fault] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always", QuarantineWarning)
        shown = warnings.showwarning

        def show(message: Warning | str, *rest: Any, **more: Any) -> None:
            if isinstance(message, QuarantineWarning):
                faults.append(message.fault)
                say(str(message))
            elif isinstance(message, CacheWarning):
                say(str(message))
            else:
                shown(message, *rest, **more)

        warnings.showwarning = show
        yield faults


def say(message: str) -> None:
    """One line on stderr."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.split()))
    if len(line) > LONGEST_LINE:  # names in models may be of any length
        line = f"{line[: LONGEST_LINE // 2]} … {line[-LONGEST_LINE // 2 :]}"
    click.echo(f"{DISTRIBUTION}: {line}", err=True)


def _ended(error: BaseException, arguments: Sequence[str], as_json: bool) -> int:
    """Tell of what ended a command; the exit code."""
    stopped = isinstance(error, (click.exceptions.Abort, KeyboardInterrupt))
    if stopped or supervisor.struck is not None:
        return interrupted(supervisor.struck or signal.SIGINT, as_json)
    if isinstance(error, click.ClickException):
        return _misused(error, as_json)
    if isinstance(error, OptcompilerError) and error.exit_code != INTERNAL:
        return _failed(type(error).__name__, str(error), error.exit_code, as_json)
    from optcompiler.files import no_room

    if remedy := no_room(error):
        return _failed("InputError", f"there is no room to write: {error}; {remedy}.", 2, as_json)
    return _crashed(error, arguments, as_json)


def interrupted(number: int, as_json: bool) -> int:
    """Tell that signal `number` ended a command; the exit code."""
    name = signal.Signals(number).name
    message = "interrupted." if number == signal.SIGINT else f"interrupted by {name}."
    return _failed("Interrupted", message, SIGNALLED + number, as_json)


def died(number: int, arguments: Sequence[str]) -> int:
    """Tell that the process of a command was ended by a signal; the exit code."""
    name, as_json = signal.Signals(number).name, "--json" in arguments
    if number in _FAULTS:
        return _crashed(RuntimeError(f"ended by {name} in native code"), arguments, as_json)
    message = f"killed by {name}; if nobody did that, the machine ran out of memory."
    return _failed("Killed", message, SIGNALLED + number, as_json)


_FAULTS = frozenset(
    getattr(signal, name)
    for name in ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL")
    if hasattr(signal, name)
)


def _failed(kind: str, message: str, code: int, as_json: bool, **more: str) -> int:
    say(message)
    if as_json:
        error = {"kind": kind, "message": message, "exit_code": code, **more}
        with contextlib.suppress(OSError):
            click.echo(json.dumps({"error": error}, indent=1, sort_keys=True))
    return code


def _misused(error: click.ClickException, as_json: bool) -> int:
    if not as_json:
        error.show()
        return 2
    return _failed(type(error).__name__, error.format_message(), 2, as_json)


def _crashed(error: BaseException, arguments: Sequence[str], as_json: bool) -> int:
    kind = type(error).__name__
    message = f"internal error: {kind}: {error}"
    try:
        place = str(_reproducer(error, arguments))
    except OptcompilerError as problem:
        click.echo("".join(traceback.format_exception(error)), err=True)
        return _failed(kind, f"{message}; no reproducer written: {problem}", INTERNAL, as_json)
    message = f"{message}; what is needed to reproduce it is in {place}, please report it."
    return _failed(kind, message, INTERNAL, as_json, reproducer=place)


def _reproducer(error: BaseException, arguments: Sequence[str]) -> Path:
    """A fresh directory with the traceback, the command line and the versions in use."""
    from optcompiler.files import replacing_directory, to_json

    command = f"cd {shlex.quote(os.getcwd())}\n{shlex.join([DISTRIBUTION, *arguments])}\n"
    versions = {
        "optcompiler": __version__,
        "python": sys.version,
        "platform": platform.platform(),
        "packages": {
            d.metadata["Name"]: d.version
            for d in importlib.metadata.distributions()
            if d.metadata["Name"]
        },
    }
    place = Path(tempfile.gettempdir(), f"{DISTRIBUTION}-crash-{secrets.token_hex(4)}")
    with replacing_directory(place, lambda _: None, mode=0o700) as fresh:
        trace = "".join(traceback.format_exception(error))
        (fresh / "traceback.txt").write_text(trace, "utf-8", errors="backslashreplace")
        (fresh / "command.txt").write_text(command, "utf-8", errors="backslashreplace")
        (fresh / "versions.json").write_text(to_json(versions), "utf-8")
    return place
