"""Code for AArch64, cross-compiled and run by an emulator where both are installed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optcompiler as oc
from optcompiler.errors import InputError
from optcompiler_cpu import isa as processors
from optcompiler_cpu import weight_bytes
from optcompiler_cpu.backend import CpuBackend
from optcompiler_cpu.isa import ISAS, named_isas, supported
from optcompiler_cpu.runner import NUMPY
from optcompiler_cpu.toolchain import LIBRARIES
from tests.backends import test_cpu_bf16 as bf16
from tests.backends import test_cpu_weight_bytes as nibbles
from tests.backends.test_cpu import FLOATS, compiled, program
from tests.backends.test_cpu_integers import INTEGERS
from tests.backends.test_cpu_library import FOREIGN
from tests.support import assert_close, random_inputs, run_onnx

CC, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
OLD, NEW = ("-cpu", "cortex-a53"), ("-cpu", "max")
"""A processor without dot products, and one with all that there is."""

SLOW = pytest.mark.slow
needs_tools = pytest.mark.skipif(
    not (shutil.which(CC) and shutil.which(EMULATOR)), reason=f"no {CC} or no {EMULATOR}"
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFLAGS", "-O1")


RUN = """#include "net.h"
#include <stdio.h>
#include <stdlib.h>

int main(int count, char **sizes) {
  net_handle *net = net_create("net.weights");
  if (!net) return 3;
  if (count == 1) return puts(net_isa(net)) < 0;
  int n, m, given = 0;
  net_inputs(&n);
  net_outputs(&m);
  if (count != 1 + n + m || net_set_threads(net, 2)) return 2;
  void *data[64];
  for (; given < n + m; ++given) data[given] = malloc((size_t)atol(sizes[1 + given]) + 1);
  FILE *in = fopen("inputs", "rb"), *out = fopen("outputs", "wb");
  for (int i = 0; i < n; ++i)
    if (fread(data[i], 1, (size_t)atol(sizes[1 + i]), in) != (size_t)atol(sizes[1 + i])) return 2;
  net_run(net, (const void *const *)data, data + n);
  for (int i = n; i < n + m; ++i) fwrite(data[i], 1, (size_t)atol(sizes[1 + i]), out);
  return fclose(out);
}
"""


def built(source: oc.Program, place: Path, isa: str) -> Mapping[str, Any]:
    """A program that runs the net for AArch64, in `place`; what `lower` said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", CC)
        info = CpuBackend().lower(source, oc.Target("cpu", threads=1, isa=isa), place)
    (place / "run.c").write_text(RUN)
    subprocess.run(
        [CC, "-static", "run.c", "libnet.a", "-o", "run", *LIBRARIES], cwd=place, check=True
    )
    return info


def emulated(
    source: oc.Program, place: Path, isa: str, inputs: dict[str, np.ndarray]
) -> list[np.ndarray]:
    place.mkdir()
    ports = built(source, place, isa)["ports"]
    given = [np.ascontiguousarray(inputs[p.name]) for p in source.inputs]
    like = [np.empty(p["shape"], NUMPY[p["dtype"]]) for p in ports["outputs"]]
    (place / "inputs").write_bytes(b"".join(a.tobytes() for a in given))
    sizes = [str(a.nbytes) for a in (*given, *like)]
    subprocess.run([EMULATOR, *NEW, "./run", *sizes], cwd=place, check=True)
    data, found = (place / "outputs").read_bytes(), []
    for a in like:
        found.append(np.frombuffer(data[: a.nbytes], a.dtype).reshape(a.shape))
        data = data[a.nbytes :]
    return found


def picked(place: Path, *processor: str, **environment: str) -> str:
    """What a handle runs on the processor; empty where there is none."""
    done = subprocess.run(
        [EMULATOR, *processor, "./run"], cwd=place, env=environment, capture_output=True, text=True
    )
    assert done.returncode in (0, 3), done.stderr
    return done.stdout.strip()


@needs_tools
@pytest.mark.parametrize(
    "name",
    ["convolutions", *(pytest.param(n, marks=SLOW) for n in INTEGERS if n != "convolutions")],
)
def test_integers_are_those_of_every_machine(name: str, tmp_path: Path) -> None:
    body, weights = INTEGERS[name]
    source = program(body, **weights)
    inputs = random_inputs(source, 5)
    here = compiled(source, tmp_path / "here", "portable", inputs)
    there = emulated(source, tmp_path / "neon", "neon_dotprod", inputs)
    for a, b in zip(here, there, strict=True):
        if a.dtype == np.float32 or name == "products":  # sums of floats come in another order
            assert_close([b.astype(np.float32)], [a.astype(np.float32)], 1e-2)
        else:
            np.testing.assert_array_equal(a, b)
    texts = [path.read_text() for path in (tmp_path / "neon" / "src").glob("kernels_*.c")]
    assert any("vi_sdot(" in text for text in texts)


def bytes_of(k: int, n: int) -> np.ndarray:
    return np.random.default_rng(k).integers(-128, 128, (k, n)).astype(np.int8)


def integer_sums(m: int, k: int, n: int) -> oc.Program:
    """A product of bytes whose sums are seen as they are."""
    return program(
        f"""(uint8[{m}, {k}] x) => (float[{m}, {n}] y)
        <float one = {{1.0}}, uint8 z = {{3}}, int8 o = {{0}}> {{
            d = DequantizeLinear(x, one, z)
            e = DequantizeLinear(w, one, o)
            y = MatMul(d, e)
        }}""",
        w=bytes_of(k, n),
    )


@needs_tools
@pytest.mark.parametrize(("m", "k", "n"), [(11, 75, 23), (5, 130, 16)])
def test_sums_of_bytes_are_exact(m: int, k: int, n: int, tmp_path: Path) -> None:
    source = integer_sums(m, k, n)
    x = np.random.default_rng(1).integers(0, 256, (m, k)).astype(np.uint8)
    x[0] = 255
    [got] = emulated(source, tmp_path / "neon", "neon_dotprod", {"x": x})
    w = bytes_of(k, n).astype(np.int64)
    np.testing.assert_array_equal(got, (x.astype(np.int64) - 3) @ w)


@needs_tools
@pytest.mark.parametrize(
    "name", ["block", *(pytest.param(n, marks=SLOW) for n in FLOATS if n != "block")]
)
def test_floats_agree(name: str, tmp_path: Path) -> None:
    body, weights = FLOATS[name]
    source = program(body, **weights)
    inputs = random_inputs(source, 3)
    found = emulated(source, tmp_path / "neon", "neon_dotprod", inputs)
    assert_close(found, run_onnx(source, inputs), 1e-5)


@SLOW
@needs_tools
def test_functions_agree_where_numbers_are_not_finite(tmp_path: Path) -> None:
    names = ("Exp", "Log", "Tanh", "Erf", "Sigmoid", "Floor", "Ceil", "Round", "Abs", "Sqrt")
    outputs = ", ".join(f"float[26] y{i}" for i, _ in enumerate(names))
    lines = "\n".join(f"y{i} = {op}(x)" for i, op in enumerate(names))
    source = program(
        f"(float[26] x) => ({outputs}, float[26] a, float[26] b) {{ {lines} "
        f"a = Min(x, one) b = Max(x, one) }}",
        one=np.ones(26, np.float32),
    )
    special = [np.nan, np.inf, -np.inf, 0.0, -0.0, 0.5, 1.5, -2.5, 88.9, -104.5]
    x = np.array([*special, *np.linspace(-9, 9, 16)], np.float32)
    here = compiled(source, tmp_path / "here", "portable", {"x": x})
    there = emulated(source, tmp_path / "neon", "neon_dotprod", {"x": x})
    for a, b in zip(here, there, strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-6, atol=1e-6, equal_nan=True)


@SLOW
@needs_tools
def test_products_with_nibbles_are_those_of_every_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_bytes, "MANY_WEIGHTS", 1)
    source = nibbles.joined(nibbles.CASES)
    inputs = nibbles.inputs_of(source)
    here = compiled(source, tmp_path / "here", "portable", inputs)
    there = emulated(source, tmp_path / "neon", "neon_dotprod", inputs)
    for name, a, b in zip(nibbles.CASES, here, there, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


@SLOW
@needs_tools
def test_half_floats_are_rounded_as_everywhere(tmp_path: Path) -> None:
    source = program("(float[67] x) => (float16[67] y) { y = Cast<to = 10>(x) }")
    rng = np.random.default_rng(2)
    x = (rng.standard_normal(67) * 2.0 ** rng.integers(-26, 18, 67)).astype(np.float32)
    x[:4] = 65520, 2**-25, 1 + 2**-11, np.inf
    [got] = emulated(source, tmp_path / "neon", "neon_dotprod", {"x": x})
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(got, x.astype(np.float16))


@SLOW
@needs_tools
def test_bfloat16_agrees(tmp_path: Path) -> None:
    body, weights = bf16.PROGRAMS["two computed operands"]
    source = bf16.program(body, **weights)
    inputs = bf16.inputs_of(source)
    found = emulated(source, tmp_path / "neon", "neon_dotprod", inputs)
    for got, want in zip(found, bf16.reference(source, inputs), strict=True):
        assert_close([got.astype(np.float32)], [want], 2 * bf16.ROUNDING)


@needs_tools
def test_a_library_of_two_picks_by_what_the_processor_has(tmp_path: Path) -> None:
    source = program("(float[2, 3] x) => (float[2, 2] y) { y = MatMul(x, w) }", w=(3, 2))
    info = built(source, tmp_path, "multi")
    assert info["isa"] == "neon_dotprod+portable"
    assert picked(tmp_path, *NEW) == "neon_dotprod"
    assert picked(tmp_path, *OLD) == "portable"
    assert picked(tmp_path, *NEW, net_ISA="portable") == "portable"
    assert picked(tmp_path, *OLD, net_ISA="neon_dotprod") == ""


def test_a_compiler_says_which_instruction_sets_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(FOREIGN)
    compiler.chmod(0o755)
    source, backend = program("(float[3] x) => (float[3] y) { y = Relu(x) }"), CpuBackend()
    with pytest.raises(
        InputError, match=r"isa=neon_dotprod is of aarch64, .* give isa=amx_int8 or"
    ):
        backend.lower(source, oc.Target("cpu", isa="neon_dotprod+portable"), tmp_path)
    monkeypatch.setenv("CC", str(compiler))
    multi = backend.spelled_out(oc.Target("cpu", isa="multi"))
    assert multi.options["isa"] == "neon_dotprod+portable"
    assert backend.spelled_out(oc.Target("cpu")).options["isa"] == "portable"
    for isa in ("avx2", "avx2+portable"):
        with pytest.raises(
            InputError, match=r"isa=avx2 is of x86_64, .* give isa=neon_dotprod or portable"
        ):
            backend.lower(source, oc.Target("cpu", isa=isa), tmp_path)


def test_native_is_what_the_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "cpu_flags", lambda: frozenset({"fp", "asimd"}))
    assert named_isas("native") == (ISAS["portable"],)
    monkeypatch.setattr(processors, "cpu_flags", lambda: frozenset({"fp", "asimd", "asimddp"}))
    assert named_isas("native") == (ISAS["neon_dotprod"],)


def test_features_are_read_as_linux_prints_them(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd crc32 asimddp\nflags\t: no\n"
    monkeypatch.setattr(Path, "read_text", lambda _: text)
    monkeypatch.setattr(processors.platform, "machine", lambda: "aarch64")
    assert processors.cpu_flags() == {"fp", "asimd", "crc32", "asimddp"}
    assert supported(ISAS["neon_dotprod"])
    monkeypatch.setattr(processors.platform, "machine", lambda: "riscv64")
    assert processors.cpu_flags() == frozenset()
    assert not supported(ISAS["neon_dotprod"])
