"""Backend cpu: other kernels of a step, and which of them is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import optcompiler as oc
from optcompiler.backend import Runner
from optcompiler.choices import Choices
from optcompiler.errors import CacheWarning, InputError, ToolchainError
from optcompiler.lowering.ir import Conv, Lowered, MatMul
from optcompiler_cpu import search
from optcompiler_cpu.backend import CpuBackend, emit
from optcompiler_cpu.isa import ISAS, Isa
from optcompiler_cpu.search import TRIED, searched
from optcompiler_cpu.variants import print_other, variants_of
from tests.backends.test_cpu import HERE, program
from tests.backends.test_cpu_integers import INTEGERS
from tests.support import assert_close, random_inputs, run_onnx

FLOATS = (
    """(float[1, 32, 16, 17] x) => (float[1, 24] y) {
        a = Conv<pads = [1, 1, 1, 1]>(x, w0, b0) c = Relu(a)
        d = Conv<pads = [1, 1, 1, 1]>(c, w1)
        e = Conv<pads = [1, 1, 1, 1]>(d, w1)
        h = Conv<pads = [1, 1, 1, 1]>(e, w1)
        f = GlobalAveragePool(h) g = Flatten(f) y = MatMul(g, w2)
    }""",
    {"w0": (64, 32, 3, 3), "b0": (64,), "w1": (64, 64, 3, 3), "w2": (64, 24)},
)
MACHINE = {"name": "here"}


def form_of(source: oc.Program, isa: Isa) -> Lowered:
    return emit(source, [isa])[0][0]


class Fake(Runner):
    """Times by step and kernel as told, and an output."""

    def __init__(self, times: Mapping[str, float], output: float = 0.0) -> None:
        self.times, self.output = times, output

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return [np.full(3, self.output, np.float32)]

    def kernel_times_us(self, inputs: Mapping[str, np.ndarray]) -> dict[str, float]:
        return dict(self.times)


class Maker:
    """Makes runners of kernels that take `times[kernel]`, 10 where nothing is said."""

    def __init__(self, steps: Sequence[str], times: Mapping[str, float]) -> None:
        self.steps, self.times = steps, times
        self.made: list[Mapping[str, str]] = []
        self.outputs: dict[int, float] = {}
        self.broken: set[int] = set()

    def __call__(self, isa: Isa, place: Path) -> Runner:
        assert place.is_dir()
        self.made.append(isa.chosen)
        k = len(self.made) - 1
        if k in self.broken:
            raise ToolchainError("no room")
        times = {s: self.times.get(isa.chosen.get(s, ""), 10.0) for s in self.steps}
        return Fake(times, self.outputs.get(k, 0.0))


@pytest.fixture
def isa() -> Isa:
    return ISAS["avx2"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTCOMPILER_CACHE", str(tmp_path / "cache"))


def floats(isa: Isa) -> tuple[Lowered, dict[str, list[str]]]:
    lowered = form_of(program(FLOATS[0], **FLOATS[1]), isa)
    return lowered, {s.name: v for s in lowered.steps if (v := variants_of(s, isa))}


@pytest.mark.parametrize("name", dict.fromkeys((HERE[0], "portable")))
def test_the_first_is_the_usual_one_and_all_give_the_same(name: str, tmp_path: Path) -> None:
    isa = ISAS[name]
    for kind, (body, weights) in (("floats", FLOATS), ("integers", INTEGERS["convolutions"])):
        source = program(body, **weights)
        [lowered], plain = emit(source, [isa])
        options = {s.name: v for s in lowered.steps if (v := variants_of(s, isa))}
        assert options
        first = {step: names[0] for step, names in options.items()}
        assert emit(source, [replace(isa, chosen=first)])[1].sources == plain.sources
        inputs = random_inputs(source)
        want = run_onnx(source, inputs)
        for k in range(TRIED):
            chosen = {step: names[min(k, len(names) - 1)] for step, names in options.items()}
            place = tmp_path / f"{kind}{k}"
            place.mkdir()
            backend, target = CpuBackend(), oc.Target("cpu", threads=1, isa=name)
            info = backend._write(source, target, [replace(isa, chosen=chosen)], place)
            runner = backend.load(place, info, threads=1)
            got = runner.run(inputs)
            runner.close()
            if kind == "floats":
                assert_close(got, want, 1e-4)
            elif k == 0:
                want = got
            else:
                for a, b in zip(got, want, strict=True):
                    np.testing.assert_array_equal(a, b)


def test_the_quickest_is_kept_where_it_gains(isa: Isa) -> None:
    lowered, options = floats(isa)
    step = min(options, key=lambda s: len(options[s]))
    best = options[step][1]
    make = Maker(list(options), {best: 9.0})
    chosen, rows = searched(lowered, isa, make, MACHINE, Choices())
    assert chosen.chosen[step] == best
    assert [(r["us"], r["first_us"], r["first"]) for r in rows if r["step"] == step] == [
        (9.0, 10.0, options[step][0])
    ]
    assert len(make.made) > 1
    quick = Maker(list(options), {best: 9.9})
    assert searched(lowered, isa, quick, {"name": "other"}, Choices())[0].chosen == {}


def test_equal_kernels_are_judged_together(isa: Isa) -> None:
    lowered, options = floats(isa)
    texts: dict[str, list[str]] = {}
    for step in lowered.steps:
        if isinstance(step, (Conv, MatMul)) and step.name in options:
            text = print_other(step, isa, options[step.name][0]).text
            texts.setdefault(text, []).append(step.name)
    one, other = next(names for names in texts.values() if len(names) == 2)
    best = options[one][1]
    chosen, _ = searched(lowered, isa, Maker(list(options), {best: 5.0}), MACHINE, Choices())
    assert chosen.chosen[one] == chosen.chosen[other] == best


def test_what_was_measured_is_kept_for_the_next_compile(isa: Isa) -> None:
    lowered, options = floats(isa)
    first = Maker(list(options), {options[next(iter(options))][1]: 5.0})
    rows = searched(lowered, isa, first, MACHINE, Choices())[1]
    again = Maker(list(options), {})
    assert searched(lowered, isa, again, MACHINE, Choices())[1] == rows != []
    assert again.made == []
    searched(lowered, isa, again, {"name": "another machine"}, Choices())
    assert again.made


def test_a_lock_answers_and_without_clocks_nothing_is_measured(isa: Isa) -> None:
    lowered, options = floats(isa)
    make = Maker(list(options), {options[next(iter(options))][1]: 5.0})
    choices = Choices()
    chosen, rows = searched(lowered, isa, make, MACHINE, choices)
    count = len(make.made)
    for known in (Choices(choices.values()), Choices(timed=False)):
        replayed, again = searched(lowered, isa, make, {"name": "elsewhere"}, known)
        assert (replayed.chosen, again) == ((chosen.chosen, rows) if known.locked else ({}, []))
    assert len(make.made) == count


def test_what_was_quick_by_chance_is_not_kept(isa: Isa) -> None:
    lowered, options = floats(isa)
    best = options[next(iter(options))][1]

    class Chance(Maker):
        def __call__(self, isa: Isa, place: Path) -> Runner:
            self.times = {best: 5.0} if len(self.made) < TRIED else {}
            return super().__call__(isa, place)

    make = Chance(list(options), {})
    assert searched(lowered, isa, make, MACHINE, Choices())[0].chosen == {}
    assert len(make.made) == TRIED + 2


def test_a_search_that_was_interrupted_goes_on(isa: Isa, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered, options = floats(isa)
    monkeypatch.setattr(search, "AT_ONCE", 1)

    class Interrupted(Maker):
        def __call__(self, isa: Isa, place: Path) -> Runner:
            if len(self.made) > TRIED:
                raise KeyboardInterrupt
            return super().__call__(isa, place)

    with pytest.raises(KeyboardInterrupt):
        searched(lowered, isa, Interrupted(list(options), {}), MACHINE, Choices())
    again, whole = Maker(list(options), {}), Maker(list(options), {})
    searched(lowered, isa, again, MACHINE, Choices())
    searched(lowered, isa, whole, {"name": "other"}, Choices())
    assert 0 < len(again.made) < len(whole.made)


def test_kernels_that_failed_are_tried_again(isa: Isa) -> None:
    lowered, options = floats(isa)
    make = Maker(list(options), {names[1]: 1.0 for names in options.values()})
    make.broken = {1}
    with pytest.warns(CacheWarning):
        searched(lowered, isa, make, MACHINE, Choices())
    whole = Maker(list(options), make.times)
    chosen = searched(lowered, isa, whole, MACHINE, Choices())[0].chosen
    assert set(chosen) == set(options)


@pytest.mark.parametrize("fault", ["other numbers", "no room"])
def test_kernels_that_fail_are_left_out(fault: str, isa: Isa) -> None:
    lowered, options = floats(isa)
    make = Maker(list(options), {names[1]: 1.0 for names in options.values()})
    if fault == "no room":
        make.broken = {1}
    else:
        make.outputs = {1: 3.0}
    with pytest.warns(CacheWarning, match=fault):
        chosen, _ = searched(lowered, isa, make, MACHINE, Choices())
    assert all(chosen.chosen.get(step) != names[1] for step, names in options.items())


def test_another_machine_cannot_be_measured() -> None:
    name = next((n for n in ISAS if n not in HERE), None)
    if name is None:
        pytest.skip("this machine has every instruction set")
    backend, target = CpuBackend(), oc.Target("cpu", isa=name, search="kernels")
    source = program(FLOATS[0], **FLOATS[1])
    with pytest.raises(InputError, match="measures on the machine that compiles"):
        backend._searched(source, target, [ISAS[name]], Choices())


def test_a_search_is_replayed_to_the_byte(tmp_path: Path) -> None:
    source = program(FLOATS[0], **FLOATS[1])
    inputs = random_inputs(source)
    backend, target = CpuBackend(), oc.Target("cpu", threads=1, search="kernels")
    choices = Choices()
    for name, asked in (("one", choices), ("other", None)):
        (tmp_path / name).mkdir()
        asked = asked or Choices(choices.values())
        info = backend.lower(source, target, tmp_path / name, asked)
        runner = backend.load(tmp_path / name, info, threads=1)
        assert_close(runner.run(inputs), run_onnx(source, inputs), 1e-4)
        runner.close()
    for file in ("libnet.so", "net.weights"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
