from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace
from typing import ClassVar

import pytest

from optcompiler import Registry, hookimpl, plugins
from optcompiler.errors import InputError, PluginError


class Named:
    name: ClassVar[str] = "twice"


def entry(name: str, value: str, dist: str = "some-dist") -> importlib.metadata.EntryPoint:
    made = importlib.metadata.EntryPoint(name, value, plugins.GROUP)
    return made._for(SimpleNamespace(name=dist, version="1.2"))  # type: ignore[attr-defined]


def entry_points(monkeypatch: pytest.MonkeyPatch, *entries: importlib.metadata.EntryPoint) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: list(entries))


class First:
    @hookimpl
    def optcompiler_backends(self) -> list[object]:
        return [Named()]


class Second(First):
    pass


class Nameless:
    @hookimpl
    def optcompiler_backends(self) -> list[object]:
        return [object()]


def test_built_ins_come_through_the_entry_point_group() -> None:
    registry = Registry()
    assert [p.name for p in registry.loaded] == ["cpu", "cuda", "onnxruntime", "passes"]
    assert {"cpu", "cuda", "onnxruntime"} <= set(registry.backends)
    assert "simplify" in registry.passes
    assert registry.owner_of_pass("simplify").startswith("optcompiler ")


def test_environment_narrows_what_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugins.LOAD_VARIABLE, "")
    assert Registry().loaded == []
    monkeypatch.setenv(plugins.LOAD_VARIABLE, "passes")
    assert [p.name for p in Registry().loaded] == ["passes"]
    monkeypatch.setenv(plugins.LOAD_VARIABLE, "nonsense")
    with pytest.raises(InputError, match="no plugin 'nonsense'"):
        Registry()


def test_failing_import_names_distribution_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch, entry("broken", "no_such_module_anywhere"))
    with pytest.raises(PluginError, match=r"'broken' of some-dist 1\.2 failed to import"):
        Registry()


def test_two_distributions_with_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch, entry("same", "json", "first"), entry("same", "csv", "second"))
    with pytest.raises(PluginError, match=r"claimed by first 1\.2 and second 1\.2"):
        Registry()


def test_two_items_with_one_name() -> None:
    registry = Registry(load=[], extra=[First(), Second()])
    with pytest.raises(
        PluginError, match=r"'twice' is claimed by two plugins: First .* and Second"
    ):
        _ = registry.backends


def test_item_without_a_name() -> None:
    registry = Registry(load=[], extra=[Nameless()])
    with pytest.raises(PluginError, match="which has no name"):
        _ = registry.backends


def test_hook_that_raises_names_the_plugin() -> None:
    class Raises:
        @hookimpl
        def optcompiler_passes(self) -> list[object]:
            raise RuntimeError("out of luck")

    with pytest.raises(
        PluginError, match=r"Raises .*optcompiler_passes raised RuntimeError: out of luck"
    ):
        _ = Registry(load=[], extra=[Raises()]).passes


def test_unknown_hook_is_refused() -> None:
    class Misspelt:
        @hookimpl
        def optcompiler_pases(self) -> list[object]:
            return []

    with pytest.raises(PluginError, match="optcompiler_pases"):
        Registry(load=[], extra=[Misspelt()])


def test_unknown_names_list_what_there_is() -> None:
    registry = Registry()
    with pytest.raises(InputError, match="no target 'gpu'; there is cpu, cuda"):
        registry.backend("gpu")
    with pytest.raises(InputError, match="no pass 'magic'"):
        registry.pass_class("magic")
