"""Libraries with code for several instruction sets, one of which is picked for a handle."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optcompiler as oc
from optcompiler.device import _facts
from optcompiler.errors import InputError
from optcompiler_cpu import isa as processors
from optcompiler_cpu.backend import CpuBackend, emit
from optcompiler_cpu.isa import ISAS, MULTI, best_here, named_isas, supported
from optcompiler_cpu.toolchain import target_processor
from tests.backends.test_cpu import program
from tests.backends.test_cpu_integers import INTEGERS
from tests.backends.test_cpu_library import check, ran
from tests.support import assert_close, random_inputs, run_onnx

MULTIPLE = named_isas(MULTI.get(target_processor(), "portable"))
HERE = [isa for isa in MULTIPLE if supported(isa)]
DEPTHWISE = (
    """(uint8[1, 80, 6, 6] x) => (uint8[1, 80, 4, 4] y)
    <float s = {0.05}, uint8 z = {117}, int8[80] wz> {
        d = DequantizeLinear(x, s, z)
        q = QuantizeLinear<axis = 0>(w, ws, wz)
        k = DequantizeLinear<axis = 0>(q, ws, wz)
        c = Conv<group = 80>(d, k)
        y = QuantizeLinear(c, s, z)
    }""",
    {"w": (80, 1, 3, 3), "ws": np.full(80, 0.02, np.float32), "wz": np.zeros(80, np.int8)},
)
"""On AVX-512 alone its last channels have a step of their own."""

Library = tuple[Path, Mapping[str, Any], oc.Program]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    body, weights = INTEGERS["convolutions"]
    source, place = program(body, **weights), tmp_path_factory.mktemp("multi")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CFLAGS", "-O1")
        return place, CpuBackend().lower(source, oc.Target("cpu", isa="multi"), place), source


def isa_of(place: Path) -> str:
    """What a handle made now runs, as the library says."""
    lib = ctypes.CDLL(str(place / "libnet.so"))
    lib.net_create.restype = ctypes.c_void_p
    lib.net_isa.argtypes, lib.net_isa.restype = [ctypes.c_void_p], ctypes.c_char_p
    lib.net_destroy.argtypes = [ctypes.c_void_p]
    net = lib.net_create(str(place / "net.weights").encode())
    name = lib.net_isa(net).decode()
    lib.net_destroy(net)
    return name


def test_the_best_that_the_machine_has_is_picked(library: Library) -> None:
    place, info, _ = library
    assert info["isa"] == "+".join(isa.name for isa in MULTIPLE)
    assert isa_of(place) == HERE[0].name


def test_integers_are_equal_whatever_is_picked(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, info, source = library
    inputs = random_inputs(source, 5)
    found: list[list[np.ndarray]] = []
    for isa in HERE:
        monkeypatch.setenv("net_ISA", isa.name)
        assert isa_of(place) == isa.name
        runner = CpuBackend().load(place, info, threads=2)
        found.append(runner.run(inputs))
        runner.close()
    assert len(found) > 1
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
    for got, want in zip(found[0], run_onnx(source, inputs), strict=True):
        assert np.abs(got.astype(float) - want.astype(float)).max() <= 1


@pytest.mark.parametrize("isa", ["avx9", "amx_int8", ""])
def test_what_the_library_does_not_have_is_not_picked(
    library: Library, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, info, _ = library
    monkeypatch.setenv("net_ISA", isa)
    if not isa:
        assert isa_of(place) == HERE[0].name
        return
    with pytest.raises(InputError, match=f"no code for net_ISA='{isa}'"):
        CpuBackend().load(place, info, threads=1)


def test_a_library_without_code_for_this_machine_gives_no_handle(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the library sees it and, before that, as the backend does."""
    missing = next((i.name for i in ISAS.values() if i.processor and not supported(i)), None)
    same = missing and ISAS[missing].processor == target_processor()
    if not same:
        pytest.skip("this machine has every instruction set")
    source = program("(float[2, 3] x) => (float[2, 3] y) { y = Relu(x) }")
    info = CpuBackend().lower(source, oc.Target("cpu", isa=missing), tmp_path)
    with pytest.raises(InputError, match="which this machine does not have"):
        CpuBackend().load(tmp_path, info, threads=1)
    with pytest.raises(InputError, match=r"net\.weights is missing or belongs to another"):
        CpuBackend().load(tmp_path, {**info, "isa": "portable"}, threads=1)


def test_steps_are_those_of_what_is_picked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body, weights = DEPTHWISE
    source = program(body, **weights)
    names = [isa for isa in ("avx512_vnni", "portable") if supported(ISAS[isa])]
    info = CpuBackend().lower(source, oc.Target("cpu", isa="+".join(names)), tmp_path)
    inputs = random_inputs(source, 1)
    counts, results = [], []
    for isa in names:
        monkeypatch.setenv("net_ISA", isa)
        runner = CpuBackend().load(tmp_path, info, threads=1)
        times = runner.kernel_times_us(inputs)
        results.append(runner.run(inputs)[0])
        runner.close()
        (lowered,), _ = emit(source, [ISAS[isa]])
        assert list(times) == [step.name for step in lowered.steps]
        counts.append(len(times))
    assert all(np.array_equal(r, results[0]) for r in results)
    assert len(names) == 1 or counts[0] == counts[1] + 1


def test_equal_weights_are_kept_once() -> None:
    body, weights = INTEGERS["convolutions"]
    source = program(body, **weights)

    def size_of(isa: str) -> int:
        return sum(map(len, emit(source, named_isas(isa))[1].weights))

    assert size_of("avx_vnni+avx2") == size_of("avx2")
    assert size_of("avx2") < size_of("avx2+portable") < size_of("avx2") + size_of("portable")
    source = program("(float[9, 40] x) => (float[9, 64] y) { y = MatMul(x, w) }", w=(40, 64))
    assert size_of("avx2+portable") == size_of("avx2") < size_of("avx512_vnni+avx2")
    assert size_of("neon_dotprod+portable") == size_of("portable")


def test_prices_and_profiles_are_those_of_what_this_machine_picks() -> None:
    body, weights = DEPTHWISE
    source, backend = program(body, **weights), CpuBackend()
    multi, alone = oc.Target("cpu", isa="multi"), oc.Target("cpu", isa=HERE[0].name)
    assert backend.spelled_out(multi).options["isa"] == "+".join(i.name for i in MULTIPLE)
    assert backend.kernels(source, multi) == backend.kernels(source, alone)
    assert backend.capabilities(multi) == backend.capabilities(alone)
    assert _facts(backend, multi) == _facts(backend, alone)


def test_the_order_is_from_best_to_portable() -> None:
    assert [i.name for i in named_isas("portable+avx2+avx512_bf16+avx2")] == [
        "avx512_bf16", "avx2", "portable",
    ]  # fmt: skip
    for text in ("avx2+sse9", "avx2+", "multi+avx2", "native+avx2"):
        with pytest.raises(InputError, match="is not known; give native, multi, amx_int8"):
            CpuBackend().capabilities(oc.Target("cpu", isa=text))


def test_a_machine_with_less_has_less_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "cpu_flags", lambda: ISAS["avx2"].needs)
    monkeypatch.setattr(processors.platform, "machine", lambda: "x86_64")
    best = best_here(named_isas("avx512_vnni+avx2+portable"))
    assert best is ISAS["avx2"]
    assert named_isas("native") == (ISAS["avx2"],)


def test_the_same_bytes_again(tmp_path: Path) -> None:
    body, weights = DEPTHWISE
    source, files = program(body, **weights), []
    for place in (tmp_path / "a", tmp_path / "b"):
        place.mkdir()
        CpuBackend().lower(source, oc.Target("cpu", isa=f"{HERE[0].name}+portable"), place)
        files.append({p.name: p.read_bytes() for p in place.rglob("*.*")})
    assert files[0] == files[1]


def test_an_artifact_is_compiled_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = program("(float[2, 3] x) => (float[2, 2] y) { y = MatMul(x, w) }", w=(3, 2))
    inputs, artifact = random_inputs(source), tmp_path / "art"
    target = f"cpu:threads=1,isa={HERE[0].name}+portable,weights=embedded"
    with oc.compile(source, inputs, target=target, timing=False) as compiled:
        assert_close([compiled(*inputs.values())[0]], run_onnx(source, inputs), 1e-5)
        compiled.save(artifact)
    for isa in (HERE[0].name, "portable"):
        monkeypatch.setenv("net_ISA", isa)
        done = check(artifact, tmp_path / "b")
        assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.setenv("net_ISA", "none")
    assert check(artifact, tmp_path / "b").returncode
    monkeypatch.delenv("net_ISA")
    build = tmp_path / "own"
    ran(
        "make", "-s", "-f", artifact / "code" / "src" / "Makefile", "check", f"BUILD={build}",
        f"LIBRARY={build}/libnet.a", "CFLAGS=-O1 -Werror", cwd=tmp_path,
    )  # fmt: skip
