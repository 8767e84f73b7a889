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
    code need; a pair in place of a size (`{"batch": (1, 32)}`) says from what to what it may be at
    run time, and goes to `bounds`. `name` is what the artifact calls itself, for backends that
    write a library: its files and symbols begin with it. Any further keyword is an option of the
    backend (`isa="avx512_vnni"`), whose names and values the backend checks.
    """

    __slots__ = ("_threads_given", "backend", "bounds", "name", "options", "sizes", "threads")

    backend: str
    threads: int
    sizes: Mapping[str, int]
    bounds: Mapping[str, tuple[int, int]]
    name: str | None
    options: Mapping[str, str]
    _threads_given: bool

    def __init__(
        self,
        backend: str,
        *,
        threads: int | None = None,
        sizes: Mapping[str, int | tuple[int, int]] | None = None,
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
        fixed: dict[str, int] = {}
        bounds: dict[str, tuple[int, int]] = {}
        for dim, size in sorted((sizes or {}).items()):
            least, most = (size, size) if isinstance(size, int) else size
            if least < 1:
                raise InputError(f"target {backend}: size {dim}={least}; give 1 or more.")
            if least > most:
                raise InputError(
                    f"target {backend}: size {dim}={least}..{most} is from more to less; give the "
                    f"least size first."
                )
            if least == most:
                fixed[dim] = least
            else:
                bounds[dim] = (least, most)
        object.__setattr__(self, "sizes", fixed)
        object.__setattr__(self, "bounds", bounds)
        object.__setattr__(self, "options", {k: str(v) for k, v in sorted(options.items())})

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Target is immutable; make a new one to change {name}.")

    @classmethod
    def parse(cls, text: str | Target) -> Target:
        """Read `"cpu"`, `"cpu:threads=2,isa=avx2"`, `"cpu:size.batch=1"`, `"cpu:size.batch=1..32"`
        or `"cpu:name=mine"`."""
        if isinstance(text, Target):
            return text
        backend, _, rest = text.partition(":")
        options: dict[str, str] = {}
        sizes: dict[str, int | tuple[int, int]] = {}
        for item in filter(None, rest.split(",")):
            key, sep, value = item.partition("=")
            ends = value.split("..")
            if sep and key.startswith("size.") and all(map(str.isdigit, ends)) and len(ends) < 3:
                sizes[key.removeprefix("size.")] = (int(ends[0]), int(ends[-1]))
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
        return Target(self.backend, threads=threads, sizes=self.all_sizes, name=name, **options)

    def named(self, name: str | None) -> Target:
        """This target with `name`."""
        threads = self.threads if self._threads_given else None
        return Target(
            self.backend, threads=threads, sizes=self.all_sizes, name=name, **self.options
        )

    def sized(self, bounds: Mapping[str, tuple[int, int]]) -> Target:
        """This target with sizes more. Raises `InputError` for one that has others already."""
        for dim, ends in bounds.items():
            if self.all_sizes.get(dim, ends) != ends:
                raise InputError(
                    f"target {self}: dynamic says {dim}={ends[0]}..{ends[1]}; leave one out."
                )
        threads = self.threads if self._threads_given else None
        sizes = {**self.all_sizes, **bounds}
        return Target(self.backend, threads=threads, sizes=sizes, name=self.name, **self.options)

    @property
    def all_sizes(self) -> dict[str, int | tuple[int, int]]:
        """`sizes` and `bounds` as they are given."""
        return {**self.sizes, **self.bounds}

    @property
    def most(self) -> dict[str, int]:
        """The greatest size of each dimension in `bounds`."""
        return {dim: most for dim, (_, most) in self.bounds.items()}

    def __str__(self) -> str:
        items = [f"threads={self.threads}"]
        items += [f"size.{k}={v}" for k, v in self.sizes.items()]
        items += [f"size.{k}={least}..{most}" for k, (least, most) in self.bounds.items()]
        items += [f"name={self.name}"] if self.name else []
        items += [f"{k}={v}" for k, v in self.options.items()]
        return f"{self.backend}:{','.join(items)}"

    def __repr__(self) -> str:
        return f"Target({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Target) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))
