"""Measuring a device: rates of a machine whose speed is known, and the cache of profiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from optcompiler import device
from optcompiler.backend import Backend, Capabilities, Kernel, Runner
from optcompiler.choices import Choices
from optcompiler.cost import DeviceProfile, RooflineCostModel
from optcompiler.device import interleaved_us, measure, profile_for, remember
from optcompiler.errors import CacheWarning, InputError, UnsupportedOperatorError
from optcompiler.ops import builtin_table
from optcompiler.program import Program
from optcompiler.target import Target
from tests.support import filled_program

KNOWN = DeviceProfile(
    name="made up", backend="clockwork", threads=1,
    mac_rate={"gemm/fp32": ((1.0, 2e9),), "conv/fp32": ((1.0, 1e9),),
              "gemm/bf16": ((1.0, 3e9),), "conv/bf16": ((1.0, 2e9),),
              "gemm/int8": ((1.0, 4e9),), "conv/int8": ((1.0, 3e9),)},
    flop_rate={"pointwise/fp32": ((1.0, 5e8),)}, bandwidth=((1.0, 8e9),),
    launch_us=4.0, overhead_us=25.0,
)  # fmt: skip
KINDS = {"MatMul": "gemm", "Gemm": "gemm", "Conv": "conv"}
EPILOGUE = {"Cast", "Relu", "QuantizeLinear", "DequantizeLinear", "Transpose"}
TARGET = Target("clockwork", threads=1)


class Clock:
    """Time that passes when a runner says so; stands for the `time` module."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@dataclass
class ClockworkRunner(Runner):
    clock: Clock
    us: float
    timed: bool = True
    runs: int = 0

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        self.runs += 1
        disturbed = 3.0 if self.runs % 3 == 0 else 1.0
        self.clock.now += disturbed * self.us / 1e6
        return []


@dataclass
class Clockwork(Backend):
    """Takes exactly as long as the cost model says that `KNOWN` takes, when nothing disturbs it."""

    name = "clockwork"
    clock: Clock = field(default_factory=Clock)
    timed: bool = True
    here: bool = True
    refused: frozenset[str] = frozenset()
    nominal: DeviceProfile | None = None

    def capabilities(self, target: Target) -> Capabilities:
        return Capabilities(frozenset({"fp32", "bf16", "int8"}))

    def kernels(self, program: Program, target: Target) -> Sequence[Kernel]:
        table = builtin_table()
        contracts = any(n.op_type in KINDS for n in program.graph)
        found = []
        for node in program.graph:
            if contracts and node.op_type in EPILOGUE:
                continue
            work = table.require(node).cost(node)
            if node.op_type in KINDS:
                made = node.inputs[1].producer() if node.inputs[1] is not None else None
                int8 = made is not None and made.op_type == "DequantizeLinear"
                narrow = node.outputs[0].dtype == ir.DataType.BFLOAT16
                kind, dtype = KINDS[node.op_type], "int8" if int8 else "bf16" if narrow else "fp32"
                found.append(Kernel(str(node.name), kind, dtype, (), macs=work.macs))
                continue
            flops = 0 if node.op_type == "Relu" else work.flops
            moved = work.bytes_read + work.bytes_written
            found.append(
                Kernel(str(node.name), "pointwise", "fp32", (), flops=flops, bytes_moved=moved)
            )
        return found

    def lower(
        self, program: Program, target: Target, directory: Path, choices: Choices | None = None
    ) -> Mapping[str, Any]:
        for node in program.graph:
            if node.op_type in self.refused:
                raise UnsupportedOperatorError(f"no {node.op_type}")
        return {"us": RooflineCostModel().program_us(self.kernels(program, target), KNOWN)}

    def load(self, directory: Path, info: Mapping[str, Any], *, threads: int) -> Runner:
        return ClockworkRunner(self.clock, info["us"], self.timed)

    def runs_here(self, target: Target) -> bool:
        return self.here

    def nominal_profile(self, target: Target) -> DeviceProfile | None:
        return self.nominal


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(device, "time", clock)
    return clock


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Target]:
    """Measuring replaced by `KNOWN`; the targets it was asked for."""
    asked: list[Target] = []

    def known(backend: Backend, target: Target, progress: Any = None) -> DeviceProfile | None:
        asked.append(target)
        return KNOWN if backend.runs_here(target) else None

    monkeypatch.setattr(device, "measure", known)
    return asked


# -- fitting --------------------------------------------------------------------------------


def test_known_rates_are_recovered(clock: Clock) -> None:
    got = measure(Clockwork(clock), TARGET)
    assert got is not None
    assert got.launch_us == pytest.approx(KNOWN.launch_us, rel=0.2)
    assert got.overhead_us == pytest.approx(KNOWN.overhead_us, rel=0.2)
    fitted = {**got.mac_rate, "pointwise": got.flop_rate["pointwise/fp32"], "all": got.bandwidth}
    known = {**KNOWN.mac_rate, "pointwise": ((1.0, 5e8),), "all": KNOWN.bandwidth}
    assert set(fitted) == set(known)
    for key, ((_, rate),) in known.items():
        assert fitted[key][-1][1] == pytest.approx(rate, rel=0.02), key
        for size, reached in fitted[key]:
            # The work of the launch probe itself counts as launch, so small kernels look faster.
            expected = KNOWN.launch_us + 1e6 * size / rate
            assert got.launch_us + 1e6 * size / reached == pytest.approx(expected, rel=0.2), key
    assert (got.backend, got.threads, got.estimated) == ("clockwork", 1, False)

    program = filled_program("""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[32,200] x) => (float[32,50] y) <float[200,300] v, float[300,50] w> {
            h = MatMul (x, v)
            a = Tanh (h)
            y = MatMul (a, w)
        }
    """)
    kernels = Clockwork().kernels(program, TARGET)
    model = RooflineCostModel()
    expected = model.program_us(kernels, KNOWN)
    assert model.program_us(kernels, got) == pytest.approx(expected, rel=0.2)


def test_probes_that_the_backend_refuses_are_left_out(clock: Clock) -> None:
    got = measure(Clockwork(clock, refused=frozenset({"Conv", "Erf"})), TARGET)
    assert got is not None
    assert set(got.mac_rate) == {"gemm/fp32", "gemm/bf16", "gemm/int8"}


def test_what_cannot_be_timed_is_not_measured(clock: Clock) -> None:
    assert measure(Clockwork(clock, timed=False), TARGET) is None
    assert measure(Clockwork(clock, here=False), TARGET) is None
    assert measure(Clockwork(clock, refused=frozenset({"Softmax"})), TARGET) is None


def test_runs_are_timed_in_turn(clock: Clock) -> None:
    runners = [ClockworkRunner(clock, us) for us in (1000.0, 20.0)]
    got = interleaved_us([lambda r=r: r.run({}) for r in runners], seconds=0.1)
    assert got == pytest.approx([1000, 20])
    assert runners[0].runs == runners[1].runs >= 7


# -- cache ----------------------------------------------------------------------------------


def entries(directory: Path) -> list[Path]:
    return list(directory.glob("device-*.entry"))


def test_a_profile_is_measured_once(tmp_path: Path, counted: list[Target]) -> None:
    backend = Clockwork()
    assert profile_for(backend, TARGET, cache=tmp_path) == KNOWN
    assert profile_for(backend, TARGET, cache=tmp_path) == KNOWN
    assert len(counted) == 1
    profile_for(backend, TARGET, cache=tmp_path, remeasure=True)
    assert len(counted) == 2
    others = (Target("clockwork", threads=2), Target("clockwork", threads=1, isa="avx2"))
    for other in others:
        profile_for(backend, other, cache=tmp_path)
    assert counted[2:] == list(others)
    assert len(entries(tmp_path)) == 3


@pytest.mark.parametrize("value", [None, "{", [], {"mac_rate": {}}, "launch_us", "bandwidth"])
def test_a_profile_that_cannot_be_read_is_measured_again(
    tmp_path: Path, counted: list[Target], monkeypatch: pytest.MonkeyPatch, value: Any
) -> None:
    """As after an upgrade that forgot to change `FORMAT`; altered files are the cache's matter."""
    known = KNOWN.to_json()
    written = {**known, value: "x"} if isinstance(value, str) and value in known else value
    with monkeypatch.context() as patch:
        patch.setattr(DeviceProfile, "to_json", lambda _: written)
        profile_for(Clockwork(), TARGET, cache=tmp_path)
    assert profile_for(Clockwork(), TARGET, cache=tmp_path) == KNOWN
    assert profile_for(Clockwork(), TARGET, cache=tmp_path) == KNOWN
    assert len(counted) == 2


def test_measured_kernels_are_remembered_but_estimates_are_not(
    tmp_path: Path, counted: list[Target]
) -> None:
    one, other = {"gemm/fp32/1/1/1/1/1": 7.0}, {"gemm/fp32/2/2/2/2/2": 8.0}
    for times in (one, other):
        remember(Clockwork(), TARGET, KNOWN.with_measured(times), tmp_path)
    more = KNOWN.with_measured(one | other)
    assert profile_for(Clockwork(), TARGET, cache=tmp_path) == more
    remember(Clockwork(), TARGET, replace(KNOWN, estimated=True), tmp_path)
    assert profile_for(Clockwork(), TARGET, cache=tmp_path) == more
    assert counted == []


def test_a_nominal_profile_stands_in_and_is_not_cached(
    tmp_path: Path, counted: list[Target]
) -> None:
    nominal = replace(KNOWN, estimated=True)
    away = Clockwork(here=False, nominal=nominal)
    assert profile_for(away, TARGET, cache=tmp_path) == nominal
    assert entries(tmp_path) == []
    with pytest.raises(InputError, match="has no nominal profile"):
        profile_for(Clockwork(here=False), TARGET, cache=tmp_path)


def test_without_a_cache_it_is_measured_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[Target]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPTCOMPILER_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        with pytest.warns(CacheWarning, match="nothing is kept for the next compile"):
            assert profile_for(Clockwork(), TARGET) == KNOWN
    assert len(counted) == 2
