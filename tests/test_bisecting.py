"""Which pass, which candidate and which nodes break a check: in Python and on the command line."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result

from optcompiler import Budget, Registry
from optcompiler.bisecting import Culprit, bisect
from optcompiler.cli import main
from optcompiler.cli.checking import Command
from optcompiler.errors import GateError, InputError
from optcompiler.program import Program
from optcompiler.rewriting import Candidate, Stage
from tests.misbehaving import OWNER, Entry, installed, offering, pass_of
from tests.support import assert_close, op_types, random_inputs, run_onnx
from tests.toy import PRICES_US, ToyBackend

LENGTH = 24
BAD = "n13"


def net(length: int = LENGTH) -> Program:
    steps = "\n".join(f"[n{i}] h{i + 1} = Tanh (h{i})" for i in range(length))
    text = (
        f'<ir_version: 10, opset_import: ["" : 20]>\nnet (float[2,4] h0) => (float[2,4] y) '
        f"{{ {steps}\n[last] y = Identity (h{length}) }}"
    )
    return Program.from_text(text)


def turned(names: tuple[str, ...], into: str) -> Callable[[Program], None]:
    def rewrite(program: Program) -> None:
        for node in program.graph:
            if node.op_type == "Tanh" and (not names or node.name in names):
                node.op_type = into

    return rewrite


def one_by_one(program: Program, context: Any) -> Iterator[Candidate]:
    """A candidate for each Tanh: another activation, which the toy says is cheaper."""
    for node in program.graph:
        if node.op_type == "Tanh":
            name = str(node.name)
            yield Candidate(name, "Elu", turned((name,), "Elu"), False, (name,))


def all_at_once(program: Program, context: Any) -> Iterator[Candidate]:
    yield Candidate("program", "Elu", turned((), "Elu"), False)


def renaming(program: Program, context: Any) -> Iterator[Candidate]:
    """Exact candidates: an Identity behind each of three nodes."""

    def rewrite(copy: Program, name: str) -> None:
        node = copy.node(name)
        assert node is not None
        readers = list(node.outputs[0].uses())
        fresh = ir.node("Identity", [node.outputs[0]], name=f"{name}_twin")
        fresh.outputs[0].name = f"{name}_twin_out"
        fresh.outputs[0].type, fresh.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        copy.graph.insert_after(node, fresh)
        for reader, position in readers:
            reader.replace_input_with(position, fresh.outputs[0])

    for i in (2, 5, 9):
        yield Candidate(f"n{i}", "twin", lambda p, n=f"n{i}": rewrite(p, n), True, (f"n{i}",))


CLEAN = pass_of(renaming, Stage.CLEAN, name="twin")
EACH = pass_of(one_by_one, Stage.REDUCE, name="each")
WHOLE = pass_of(all_at_once, Stage.REDUCE, name="whole")


def without_elu_at(*names: str) -> Callable[[Program], bool]:
    def check(program: Program) -> bool:
        return not all(
            (node := program.node(name)) is not None and node.op_type == "Elu" for name in names
        )

    return check


@pytest.fixture(autouse=True)
def _nominal_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optcompiler.device.measure", lambda *_: None)
    monkeypatch.setitem(PRICES_US, "Elu", 10)


@pytest.fixture
def having(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Registry]:
    def made(*passes: type[Any]) -> Registry:
        toy = Entry("a", lambda: offering(backends=[ToyBackend()]), "toy")
        return installed(monkeypatch, toy, Entry("evil", lambda: offering(passes=passes)))

    return made


@pytest.fixture
def blamed(having: Any, tmp_path: Path) -> Callable[..., Culprit]:
    def run(check: Any, *passes: type[Any], **options: Any) -> Culprit:
        return bisect(
            options.pop("program", None) or net(), check, target="toy", registry=having(*passes),
            budget=Budget(max_damage=100), damage="nmse", reproducers=tmp_path / "kept",
            calibration=[random_inputs(net(), seed) for seed in range(3)], **options,
        )  # fmt: skip

    return run


def test_the_candidate_is_found_among_many(blamed: Any) -> None:
    found = blamed(without_elu_at(BAD), CLEAN, EACH)
    assert (found.pass_name, found.owner, found.site, found.choice) == ("each", OWNER, BAD, "Elu")
    assert not found.exact
    assert found.steps == LENGTH + 3
    assert found.nodes == (BAD,)
    assert found.narrowed
    halving = [t for t in found.trials if not t.part]
    assert len(halving) <= 2 + 5 + 2
    assert found.before == (f"[{BAD}] h14 = Tanh (h13)  # h14: float[2, 4]",)
    assert found.after == (f"[{BAD}] h14 = Elu (h13)  # h14: float[2, 4]",)


def test_the_nodes_are_found_within_a_candidate(blamed: Any) -> None:
    found = blamed(without_elu_at("n7", "n19"), CLEAN, WHOLE)
    assert (found.pass_name, found.site) == ("whole", "program")
    assert found.nodes == ("n7", "n19")
    assert found.narrowed
    assert len(found.trials) <= 36
    assert len(found.after) == 2


def test_the_reproducer_holds_both_programs(blamed: Any) -> None:
    check = without_elu_at(BAD)
    found = blamed(check, WHOLE, command="look {}")
    before = Program.from_onnx(found.reproducer / "program.onnx")
    after = Program.from_onnx(found.reproducer / "after.onnx")
    assert check(before)
    assert not check(after)
    assert op_types(after).count("Elu") == 1
    record = json.loads((found.reproducer / "reproducer.json").read_text())
    assert (record["check"], record["part"], record["kind"]) == ("look {}", [BAD], "check")
    assert "--check 'look {}'" in (found.reproducer / "README.txt").read_text()


def test_an_exact_pass_may_be_to_blame(blamed: Any) -> None:
    found = blamed(lambda program: program.node("n5_twin") is None, CLEAN, EACH)
    assert (found.pass_name, found.site, found.exact) == ("twin", "n5", True)
    assert any("n5_twin" in line for line in found.after)


def test_a_part_put_back_computes_what_it_should(blamed: Any) -> None:
    """What the check was shown while nodes were looked for is the program, but for those nodes."""
    shown: list[Program] = []

    def check(program: Program) -> bool:
        shown.append(program)
        return without_elu_at("n12")(program)

    blamed(check, WHOLE)
    inputs = random_inputs(net())
    for program in shown[-3:]:
        program.verify(like=net())
        names = tuple(str(n.name) for n in program.graph if n.op_type == "Elu")
        expected = net()
        turned(names or ("none",), "Elu")(expected)
        assert_close(run_onnx(program, inputs), run_onnx(expected, inputs))


def test_programs_that_cannot_be_judged_are_gone_around(blamed: Any) -> None:
    def check(program: Program) -> bool | None:
        count = op_types(program).count("Elu")
        return None if count in (6, 11, 12) else without_elu_at(BAD)(program)

    assert blamed(check, EACH).site == BAD

    def blind(program: Program) -> bool | None:
        return None if 10 <= op_types(program).count("Elu") < 20 else without_elu_at(BAD)(program)

    with pytest.raises(GateError, match=r"each\[n\d+=Elu\], each"):
        blamed(blind, EACH)


def test_what_cannot_be_blamed_on_a_pass(blamed: Any) -> None:
    with pytest.raises(InputError, match="fails for the model as imported"):
        blamed(lambda program: False, EACH)
    with pytest.raises(InputError, match="skips the model as imported"):
        blamed(lambda program: None, EACH)
    with pytest.raises(GateError, match="holds after all 24 candidates"):
        blamed(lambda program: True, EACH)


def test_a_check_that_contradicts_itself(blamed: Any) -> None:
    answers = iter([True, False] + 6 * [True] + 20 * [True])
    with pytest.raises(GateError, match="says otherwise when asked again"):
        blamed(lambda program: next(answers), EACH)


def test_a_pass_that_breaks_its_contract_is_left_out(blamed: Any) -> None:
    def fail(program: Program, context: Any) -> Any:
        raise RuntimeError("oops")

    with pytest.warns(match="going on without"):
        found = blamed(without_elu_at(BAD), EACH, pass_of(fail, Stage.CLEAN, name="failing"))
    assert [f.pass_name for f in found.faults] == ["failing"]
    assert found.site == BAD


# -- on the command line ----------------------------------------------------------------------

SCRIPT = """
import sys

# name and operator of a node, one after the other as protobuf writes them
sys.exit(b'n13"\\x03Elu' in open(sys.argv[1], "rb").read())
"""


def run(registry: Registry, *arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], obj=lambda: registry)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    net().save(tmp_path / "net.onnx")
    (tmp_path / "data").mkdir()
    for seed in range(3):
        np.savez(tmp_path / "data" / f"{seed}.npz", **random_inputs(net(), seed))
    (tmp_path / "check.py").write_text(SCRIPT)
    return tmp_path / "net.onnx"


def python(script: Path | str) -> str:
    """A check that runs a script or a line."""
    if isinstance(script, Path):
        return f"{sys.executable} {script}"
    return f'{sys.executable} -c "{script}" {{}}'


def test_bisect_and_replay_by_command(model: Path, tmp_path: Path, having: Any) -> None:
    check = python(tmp_path / "check.py")
    result = run(
        having(EACH), "bisect", model, "--check", check, "--target", "toy",
        "--calibration", tmp_path / "data", "--max-damage", "100", "--damage", "nmse",
        "--reproducers", tmp_path / "kept", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["pass_name"], found["owner"], found["site"]) == ("each", OWNER, BAD)
    assert found["nodes"] == [BAD]
    assert len(found["trials"]) <= 10
    place = found["reproducer"]
    again = run(having(EACH), "replay", place, "--check", check)
    assert again.exit_code == 1
    assert "the check holds before it and fails after it" in again.stdout
    assert run(having(EACH), "replay", place, "--check", python("pass")).exit_code == 0
    without = run(having(EACH), "replay", place)
    assert (without.exit_code, "--check" in without.stderr) == (2, True)


def test_bisect_tells_it_in_words(model: Path, tmp_path: Path, having: Any) -> None:
    result = run(
        having(CLEAN), "bisect", model, "--target", "toy", "--reproducers", tmp_path / "kept",
        "--check", python("import sys; sys.exit(b'n5_twin' in open(sys.argv[1], 'rb').read())"),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"twin of {OWNER} breaks the check" in result.stdout
    assert "candidate 2 of 3: n5 = twin (exact)" in result.stdout
    assert "[n5_twin]" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("check", "code", "said"),
    [
        ("no-such-program {}", 2, "'no-such-program' cannot be run: No such file"),
        ("'", 2, "cannot be read: No closing quotation"),
        ("", 2, "the check is empty"),
        (python("import time; time.sleep(60)"), 2, "had not ended after 0.5 s"),
        (python("import os; os.kill(os.getpid(), 9)"), 2, "was killed by SIGKILL"),
        (python("raise SystemExit(200)"), 2, "ended with 200"),
        (python("raise SystemExit(1)"), 2, "fails for the model as imported"),
        (python("raise SystemExit(125)"), 2, "skips the model as imported"),
        (python("pass"), 1, "holds after all 3 candidates"),
    ],
)
def test_bisect_refuses_in_one_sentence(
    model: Path, having: Any, check: str, code: int, said: str
) -> None:
    seconds = "0.5" if "sleep" in check else "60"
    result = run(
        having(CLEAN), "bisect", model, "--target", "toy", "--check", check,
        "--check-seconds", seconds,
    )  # fmt: skip
    assert result.exit_code == code, result.output
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_bisect_wants_a_check(model: Path, having: Any) -> None:
    result = run(having(), "bisect", model)
    assert result.exit_code == 2
    assert "--check CMD" in result.stderr


def test_artifacts_can_be_judged(model: Path, tmp_path: Path, having: Any) -> None:
    """The check is shown what the backend wrote of each program."""
    look = "import sys; data = open(sys.argv[1] + '/code/model.onnx', 'rb').read(); "
    result = run(
        having(CLEAN), "bisect", model, "--target", "toy", "--artifact", "--json",
        "--reproducers", tmp_path / "kept",
        "--check", python(look + "sys.exit(b'n9_twin' in data)"),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["site"] == "n9"


def test_the_place_stands_where_the_braces_are(tmp_path: Path) -> None:
    line = "import sys; sys.exit(sys.argv[1:] != ['--model=' + sys.argv[2], sys.argv[2]])"
    check = Command(f'{sys.executable} -c "{line}" --model={{}} {{}}', 60)
    assert check.judge(tmp_path / "a b; exit 1") is True
    assert Command(f"{sys.executable} -c 'import sys; sys.exit(len(sys.argv) != 2)'", 60).judge(
        tmp_path
    )


def test_what_a_check_started_ends_with_it(tmp_path: Path) -> None:
    line = (
        "import subprocess, sys; "
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(2); "
        f'open(\\"{tmp_path}/late\\", \\"w\\")\'])'
    )
    (tmp_path / "check.py").write_text(line.replace('\\"', '"'))
    assert Command(f"{sys.executable} {tmp_path / 'check.py'}", 60).judge(tmp_path) is True
    time.sleep(3)
    assert not (tmp_path / "late").exists()
