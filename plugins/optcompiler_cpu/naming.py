"""The name of a library: what its files are called and its symbols begin with."""

from __future__ import annotations

import re

from optcompiler.errors import InputError

DEFAULT = "net"

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,59}")

TAKEN = frozenset({
    "assert", "complex", "ctype", "errno", "fcntl", "fenv", "float", "inttypes", "iso646",
    "limits", "locale", "math", "pthread", "sched", "setjmp", "signal", "stdalign", "stdarg",
    "stdatomic", "stdbool", "stddef", "stdint", "stdio", "stdlib", "stdnoreturn", "string",
    "tgmath", "threads", "time", "uchar", "unistd", "wchar", "wctype", "alloca", "dirent",
    "dlfcn", "elf", "emmintrin", "endian", "features", "immintrin", "link", "malloc", "memory",
    "netdb", "poll", "regex", "semaphore", "spawn", "stdc", "syslog", "termios", "utime",
    "values", "windows", "c", "dl", "gcc_s", "m", "rt", "util",
})  # fmt: skip
"""Headers of C and POSIX and libraries of the system, which a file of that name would hide."""


def library_name(text: str) -> str:
    """A name made of `text`, which is returned as it is when it is one."""
    if is_name(text):
        return text
    name = re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")[:50].rstrip("_")
    if not name:
        return DEFAULT
    if not name[0].isalpha():
        name = f"{DEFAULT}_{name}"
    return name if is_name(name) else f"{name}_{DEFAULT}"


def is_name(text: str) -> bool:
    return NAME.fullmatch(text) is not None and text.lower() not in TAKEN


def checked_name(text: str | None) -> str:
    """The name a target gives, or the default. Raises `InputError` for one that will not do."""
    if text is None:
        return DEFAULT
    if not is_name(text):
        raise InputError(
            f"target cpu: name={text!r} cannot name files and C symbols; take "
            f"name={library_name(text)}."
        )
    return text
