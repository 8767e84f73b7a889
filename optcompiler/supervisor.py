"""The command line works in a process of its own, which an interruption certainly ends.

A signal (Ctrl-C, SIGTERM, a closed terminal) becomes a `KeyboardInterrupt` in the process that
works, which cleans up behind itself. Python code in it may swallow that, and native code does not
even see it: what has not ended after `GRACE_S` is killed with all the processes it started, and
what it was writing is removed here. Files survive that: each is written under another name first.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, NoReturn

GRACE_S = 0.8

LONG_S = 1.0
"""What works longer than this may be interrupted; then what that takes is imported beforehand."""

journal: int | None = None
"""Where the working process notes, each ended by NUL, the paths that it fills; see `claims`."""

struck: int | None = None
"""The signal that interrupted this process."""

_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def supervised(work: Callable[[], NoReturn]) -> NoReturn:
    """Call `work`, which ends with `SystemExit`, in a child process, and exit as that does.

    128 and its number is the exit code after a signal. Under `nohup`, SIGHUP stays ignored. Without
    `fork` the work is done in this process.
    """
    if not hasattr(os, "fork"):
        work()
    global journal
    if hasattr(os, "memfd_create"):
        journal = os.memfd_create("optcompiler-claims")
    _control(_PR_SET_CHILD_SUBREAPER, 1)
    # Shells start background jobs of a script with SIGINT ignored, but who sends it means it.
    watched = [
        s for s in _SIGNALS if s == signal.SIGINT or signal.getsignal(s) is not signal.SIG_IGN
    ]
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    supervisor = os.getpid()
    child = os.fork()
    if not child:
        _control(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor:
            os._exit(1)
        _work(work, watched)
    sys.exit(_watch(child, watched))


# -- the process that works -------------------------------------------------------------------


def _work(work: Callable[[], NoReturn], watched: Iterable[int]) -> NoReturn:
    for number in watched:
        signal.signal(number, _strike)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
    try:
        work()
    except BaseException as error:
        for number in watched:
            signal.signal(number, signal.SIG_IGN)
        if struck is None:
            raise
        if not isinstance(error, SystemExit):
            error = SystemExit(_interrupted(struck))
        _leave(error.code)


def _strike(number: int, frame: FrameType | None) -> None:
    """Interrupt once: a second signal must not cut short the clean-up after the first."""
    global struck
    if struck is None:
        struck = number
        sys.unraisablehook = threading.excepthook = _ignored
        raise KeyboardInterrupt


def _ignored(_: Any) -> None:
    """What breaks because of an interruption is not worth a traceback."""


def _leave(code: Any) -> NoReturn:
    """Exit without waiting for threads; only scratch directories are removed."""
    if (scratch := sys.modules.get("optcompiler.scratch")) is not None:
        scratch.remove_all()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


# -- the process that waits -------------------------------------------------------------------


def _watch(child: int, watched: Iterable[int]) -> int:
    """The exit code, once the child has ended."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (*watched, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
    first, deadline, ready = None, time.monotonic() + LONG_S, False
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        left = None if ready and first is None else max(deadline - time.monotonic(), 0.0)
        if left == 0 and first is not None:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        if left == 0:
            _get_ready()
            ready = True
        elif select.select([reader], [], [], left)[0]:
            for number in os.read(reader, 64):
                if number != signal.SIGCHLD and first is None:
                    first, deadline = number, time.monotonic() + GRACE_S
                    os.kill(child, number)
    code = os.waitstatus_to_exitcode(status)
    if first is not None or code < 0:
        _end_orphans()
        _clean_up()
    if code >= 0:
        return code
    return _interrupted(first) if first is not None else _died(-code)


def _get_ready() -> None:
    """Import what `_clean_up` and `_interrupted` need."""
    import importlib

    for name in ("optcompiler.claims", "optcompiler.cli.shell"):
        importlib.import_module(name)


def _interrupted(number: int) -> int:
    from optcompiler.cli.shell import interrupted

    return interrupted(number, "--json" in sys.argv)


def _died(number: int) -> int:
    from optcompiler.cli.shell import died

    return died(number, sys.argv[1:])


def _end_orphans() -> None:
    """Kill the processes that the child started, whom the system gave to this process."""
    end = time.monotonic() + GRACE_S
    while (orphans := list(_children())) and time.monotonic() < end:
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.005)


def _children() -> Iterator[int]:
    """Children of this process, where /proc tells."""
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as stream:
                    if int(stream.read().rpartition(b")")[2].split()[1]) == os.getpid():
                        yield int(name)


def _clean_up() -> None:
    """Remove what the child was filling."""
    if journal is None:
        return
    from pathlib import Path

    from optcompiler.claims import reclaim

    noted = os.pread(journal, os.fstat(journal).st_size, 0).split(b"\0")
    for path in noted[:-1]:
        with contextlib.suppress(OSError):
            reclaim(Path(os.fsdecode(path)))


def _control(option: int, value: int) -> None:
    """Linux's prctl; nothing elsewhere."""
    if sys.platform.startswith("linux"):
        import ctypes

        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
