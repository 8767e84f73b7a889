from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from optcompiler import Registry, hookimpl, pipeline
from optcompiler.errors import InputError, PluginError
from optcompiler.program import Program
from optcompiler.rewriting import Candidate, Pass, PassContext, Stage


def pass_class(name: str, stage: Stage, **facts: Any) -> type[Pass]:
    def propose(self: Pass, program: Program, context: PassContext) -> Iterable[Candidate]:
        return []

    made = type(name, (Pass,), {"name": name, "stage": stage, "propose": propose, **facts})
    return dataclass(frozen=True)(made)


@dataclass(frozen=True)
class Optional(Pass):
    name: ClassVar[str] = "optional"
    stage: ClassVar[Stage] = Stage.REDUCE
    default: ClassVar[bool] = False
    ratio: float = 0.5
    ratios: tuple[float, ...] = ()
    limit: int | None = None
    careful: bool = False

    def propose(self, program: Program, context: PassContext) -> Iterable[Candidate]:
        return []


def registry(*classes: type[Pass]) -> Registry:
    class Plugin:
        @hookimpl
        def optcompiler_passes(self) -> list[type[Pass]]:
            return list(classes)

    return Registry(load=[], extra=[Plugin()])


FUSE = pass_class("a-fuse", Stage.FUSE, after=("pack",))
PACK = pass_class("pack", Stage.FUSE)
CLEAN = pass_class("z-clean", Stage.CLEAN)


def names(passes: Iterable[Pass]) -> list[str]:
    return [p.name for p in passes]


def test_default_pipeline_is_ordered_by_stage_and_after() -> None:
    found = registry(FUSE, PACK, CLEAN, Optional)
    assert names(pipeline.resolve(None, found)) == ["z-clean", "pack", "a-fuse"]


def test_default_and_more() -> None:
    found = registry(FUSE, PACK, CLEAN, Optional)
    chosen = pipeline.resolve(["default", Optional(ratio=0.25)], found)
    assert names(chosen) == ["z-clean", "optional", "pack", "a-fuse"]
    assert names(pipeline.resolve(["a-fuse", CLEAN], found)) == ["z-clean", "a-fuse"]


def test_options_in_text() -> None:
    text = "optional:ratio=0.25,ratios=0.5+0.75,limit=3,careful=yes"
    (made,) = pipeline.resolve([text], registry(Optional))
    assert made == Optional(0.25, (0.5, 0.75), 3, True)
    assert made.options() == {"ratio": 0.25, "ratios": (0.5, 0.75), "limit": 3, "careful": True}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("optional:speed=1", "no option 'speed'; it has careful, limit, ratio, ratios"),
        ("optional:ratio=fast", "ratio='fast'"),
        ("optional:ratio", "not key=value"),
        ("nothing", "no pass 'nothing'"),
    ],
)
def test_bad_options(text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        pipeline.resolve([text], registry(Optional))


def test_twice() -> None:
    with pytest.raises(InputError, match="given twice"):
        pipeline.resolve([Optional(), "optional"], registry(Optional))


def test_circular_order() -> None:
    first = pass_class("first", Stage.CLEAN, after=("second",))
    second = pass_class("second", Stage.CLEAN, after=("first",))
    with pytest.raises(PluginError, match="after each other"):
        pipeline.resolve(None, registry(first, second))
