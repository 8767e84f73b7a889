"""A plugin of a distribution that is not there, whose parts a test chooses."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from optcompiler import Registry, hookimpl, plugins
from optcompiler.rewriting import Candidate, Pass, Stage

OWNER = "optcompiler-evil 6.6"


@dataclass
class Entry:
    """An entry point; loading it calls `load`."""

    name: str
    load: Callable[[], Any]
    distribution: str = "optcompiler-evil"
    value: str = "somewhere"

    @property
    def dist(self) -> Any:
        return SimpleNamespace(name=self.distribution, version="6.6")


def installed(monkeypatch: pytest.MonkeyPatch, *entries: Entry) -> Registry:
    """A registry of these entry points alone."""
    monkeypatch.delenv(plugins.LOAD_VARIABLE, raising=False)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: list(entries))
    return Registry()


def offering(**hooks: Any) -> Any:
    """A plugin: `passes=[...]` for the hook `optcompiler_passes`, or a function that is it."""
    members: dict[str, Any] = {}
    for name, given in hooks.items():

        def hook(self: Any, given: Any = given) -> Any:
            return given() if callable(given) and not isinstance(given, type) else given

        hook.__name__ = f"optcompiler_{name}"
        hook.__defaults__ = (given,)
        members[hook.__name__] = hookimpl(hook)
    return type("Plugin", (), members)()


def pass_of(
    propose: Callable[..., Any], stage: Stage = Stage.CLEAN, name: str = "evil", **members: Any
) -> type[Pass]:
    """A pass whose `propose(program, context)` is given."""

    def method(self: Any, program: Any, context: Any) -> Any:
        return propose(program, context)

    fields = {"name": name, "stage": stage, "propose": method, **members}
    return dataclass(frozen=True)(type("Evil", (Pass,), {"__annotations__": {}, **fields}))


def rewriting(rewrite: Callable[..., Any], stage: Stage = Stage.CLEAN) -> type[Pass]:
    """A pass with one candidate, exact where the stage wants that."""
    exact = stage in (Stage.CLEAN, Stage.FUSE)

    def propose(program: Any, context: Any) -> Iterable[Candidate]:
        yield Candidate("program", "rewrite", rewrite, exact, ("s0",))

    return pass_of(propose, stage)
