"""Names in a model are legal whatever they hold, and harmless in paths, reports and terminals."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import optcompiler
from optcompiler.cli import main
from optcompiler.program import Program
from tests.backends.test_hostile_names import NAMES, program

ODD = (*NAMES, "<script>alert(1)</script>", "[red]owned[/red]", "a\x9b31m\u2028\x7f", "n" * 5000)


@pytest.fixture(scope="module")
def odd() -> Program:
    return program(ODD)


def harmless(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.parametrize("target", ["onnxruntime:threads=1", "cpu:isa=portable,threads=1"])
def test_names_stay_data(
    odd: Program, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    odd.save(work / "m.onnx")
    before = set(tmp_path.rglob("*"))
    options = ["--target", target, "--precision", "fp32", "--no-timing"]
    texts = [ran("compile", "m.onnx", "-o", "net", *options)]
    made = set(tmp_path.rglob("*")) - before
    assert all((work / "net") in (p, *p.parents) for p in made)
    texts += [ran("inspect", "m.onnx"), ran("inspect", "net"), ran("explain", "net")]
    with optcompiler.load(work / "net") as net:
        assert [p.name for p in net.inputs] == [p.name for p in odd.inputs]
        texts.append(net.summary())
        page = net.report(tmp_path / "report.html").read_text()
        nodes = [n for row in net.ledger for n in row.nodes]
    for node in nodes[:8]:
        texts += [ran("explain", "net", "--", node)]
    assert all(map(harmless, texts))
    assert harmless(page)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "[red]owned[/red]" in page
    assert any("[red]" in t for t in texts)
    assert not list(tmp_path.rglob("owned*"))


def ran(*arguments: str) -> str:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return result.output
