"""What to compile for: a backend, the number of threads and the backend's own options."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from optcompiler.errors import InputError


class Target:
    """A backend with its options; immutable and hashable.

    `threads` is how many CPU threads the artifact runs with (None: every core this process may
    use). `sizes` fixes symbolic dimensions by name (`{"batch": 1}`), which backends that generate
    code need. `name` is what the artifact calls itself, for backends that write a library: its
    files and symbols begin with it. Any further keyword is an option of the backend
    (`isa="avx512_vnni"`), whose names and values the backend checks.
    """

    __slots__ = ("_threads_given", "backend", "name", "options", "sizes", "threads")

    backend: str
    threads: int
    sizes: Mapping[str, int]
    name: str | None
    options: Mapping[str, str]
    _threads_given: bool

    def __init__(
        self,
        backend: str,
        *,
        threads: int | None = None,
        sizes: Mapping[str, int] | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        object.__setattr__(self, "_threads_given", threads is not None)
        if threads is None:
            threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        if threads < 1:
            raise InputError(f"target {backend}: threads={threads}; give 1 or more.")
        object.__setattr__(self, "backend", backend)
        object.__setattr__(self, "threads", threads)
        object.__setattr__(self, "name", name)
        for dim, size in (sizes or {}).items():
            if size < 1:
                raise InputError(f"target {backend}: size {dim}={size}; give 1 or more.")
        object.__setattr__(self, "sizes", dict(sorted((sizes or {}).items())))
        object.__setattr__(self, "options", {k: str(v) for k, v in sorted(options.items())})

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Target is immutable; make a new one to change {name}.")

    @classmethod
    def parse(cls, text: str | Target) -> Target:
        """Read `"cpu"`, `"cpu:threads=2,isa=avx2"`, `"cpu:size.batch=1"` or `"cpu:name=mine"`."""
        if isinstance(text, Target):
            return text
        backend, _, rest = text.partition(":")
        options: dict[str, str] = {}
        sizes: dict[str, int] = {}
        for item in filter(None, rest.split(",")):
            key, sep, value = item.partition("=")
            if sep and key.startswith("size.") and value.isdigit():
                sizes[key.removeprefix("size.")] = int(value)
                continue
            if not sep or not key.isidentifier():
                raise InputError(f"target {text!r}: {item!r} is not key=value.")
            options[key] = value
        threads = options.pop("threads", None)
        if threads is not None and not threads.isdigit():
            raise InputError(f"target {text!r}: threads={threads!r} is not a whole number.")
        return cls(
            backend, threads=int(threads) if threads else None, sizes=sizes,
            name=options.pop("name", None), **options,
        )  # fmt: skip

    def completed(self, like: Target) -> Target:
        """This target with the threads, name and options of `like` where none were given."""
        threads = self.threads if self._threads_given else like.threads
        same = self.backend == like.backend
        options = {**like.options, **self.options} if same else self.options
        name = self.name or (like.name if same else None)
        return Target(self.backend, threads=threads, sizes=self.sizes, name=name, **options)

    def named(self, name: str | None) -> Target:
        """This target with `name`."""
        threads = self.threads if self._threads_given else None
        return Target(self.backend, threads=threads, sizes=self.sizes, name=name, **self.options)

    def __str__(self) -> str:
        items = [f"threads={self.threads}"]
        items += [f"size.{k}={v}" for k, v in self.sizes.items()]
        items += [f"name={self.name}"] if self.name else []
        items += [f"{k}={v}" for k, v in self.options.items()]
        return f"{self.backend}:{','.join(items)}"

    def __repr__(self) -> str:
        return f"Target({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Target) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))
