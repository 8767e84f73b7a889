"""`python -P watched.py LOG ARGUMENT...` runs optcompiler and notes what Python opens, starts and
loads; `reached` says what of that an item had no business with.

What native code opens by itself raises no audit event: canaries stand in for that.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections.abc import Iterable
from typing import Any

_STARTS = frozenset({"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"})
_TALKS = frozenset({"socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request"})
_CHANGES = frozenset(
    {"os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink",
     "os.truncate", "os.chown", "os.utime"}
)  # fmt: skip
_LOADS = frozenset({"ctypes.dlopen", "import", "pickle.find_class"})
_EVENTS = _STARTS | _TALKS | _CHANGES | _LOADS | {"open", "exec"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

FACTS = (
    "/proc", "/sys", "/dev", "/etc/localtime", "/etc/timezone", "/usr/share/zoneinfo",
    "/etc/os-release", "/usr/lib/os-release",
)  # fmt: skip
"""Where the system tells about itself."""

CODE = (".py", ".pyc", ".so")


def watch(log: str) -> None:
    """Note events in the file `log`, a line each, from here to the end of the process."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS:
            return
        if event == "exec":
            subject, flags = getattr(arguments[0], "co_filename", None), 0
        elif event == "import":
            subject, flags = arguments[1], 0
        elif event == "pickle.find_class":
            subject, flags = ".".join(map(str, arguments)), 0
        else:
            subject, flags = arguments[0], arguments[2] if event == "open" else 0
        if isinstance(subject, os.PathLike):
            subject = os.fspath(subject)
        if isinstance(subject, bytes):
            subject = os.fsdecode(subject)
        if subject is None or isinstance(subject, int):
            return
        subject = str(subject)
        if event in _CHANGES or event == "open":
            subject = os.path.join(os.getcwd(), subject)
        os.write(handle, (json.dumps([event, subject, flags]) + "\n").encode())

    sys.addaudithook(note)


def reached(lines: Iterable[str], place: str, cache: str, secrets: Iterable[str]) -> list[str]:
    """What a process had no business with, one text for each.

    It may read `place`, except the files `secrets` and except as code, and Python with all that is
    installed; it may write `place` and `cache`; it may start nothing and talk to nobody.
    """
    own, hidden = _real(place), {_real(s) for s in secrets}
    installed = [_real(p) for p in (sys.base_prefix, sys.prefix, *sys.path) if p]
    installed += [_real(p) for p in sysconfig.get_paths().values()]
    readable = [own, _real(cache), *installed, *FACTS]
    found: set[str] = set()
    for line in lines:
        event, subject, flags = json.loads(line)
        if event in _STARTS | _TALKS or event == "pickle.find_class":
            found.add(f"{event} {subject}")
        elif event in _CHANGES or (event == "open" and flags & _WRITING):
            parent = _real(os.path.dirname(subject))
            if not _inside(parent, [own, _real(cache), "/dev"]):
                found.add(f"{event} for writing {subject}")
        elif event == "open":
            path = _unfollowed(subject) if flags & os.O_NOFOLLOW else _real(subject)
            if path in hidden or not _inside(path, readable):
                found.add(f"open {subject}")
            elif _inside(path, [own]) and path.endswith(CODE):
                found.add(f"open as code {subject}")
        elif subject.startswith("/") and _inside(_real(subject), [own]):
            found.add(f"{event} {subject}")
    return sorted(found)


def _unfollowed(path: str) -> str:
    return os.path.join(_real(os.path.dirname(path)), os.path.basename(path))


def _real(path: str) -> str:
    return os.path.realpath(path.replace("\0", "%00"))


def _inside(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(root.rstrip("/") + "/") for root in roots)


def _main() -> None:
    log, *arguments = sys.argv[1:]
    watch(log)
    from optcompiler.__main__ import main

    sys.argv = ["optcompiler", *arguments]
    main()


if __name__ == "__main__":
    _main()
