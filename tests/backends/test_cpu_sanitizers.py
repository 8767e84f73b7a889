"""The emitted code of real architectures under sanitizers: AddressSanitizer with UBSan, and
ThreadSanitizer with two threads."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

import optcompiler as oc
from optcompiler_cpu.backend import emit
from optcompiler_cpu.isa import named_isas
from optcompiler_cpu.packaging import package
from tests.backends.test_cpu import FLOATS, program
from tests.backends.test_cpu_integers import INTEGERS
from tests.nets import NETS

NATIVE = named_isas("native")[0].name
SANITIZERS = {"address,undefined": 1, "thread": 2}
"""Threads that run under each."""


PRECISIONS = {"resnet": "int8", "mobilenet": "fp32", "bert": "int8", "digits": "fp32"}
WRITTEN = {
    "convolutions": INTEGERS["convolutions"],
    "block": FLOATS["block"],
    "bytes": (
        """(uint8[1, 1, 16, 16] x) => (float[1, 4, 14, 14] y)
        <float s = {0.05}, uint8 z = {117}, float[4] ws = {0.01, 0.02, 0.03, 0.04},
         int8[4] wz = {0, 0, 0, 0}> {
            d = DequantizeLinear(x, s, z)
            q = QuantizeLinear<axis = 0>(w, ws, wz)
            k = DequantizeLinear<axis = 0>(q, ws, wz)
            y = Conv(d, k)
        }""",
        {"w": (4, 1, 3, 3)},
    ),
    "divided": (
        """(float[1, 8, 40, 40] x) => (float[1, 40, 40, 24] y) {
            c = Conv<pads = [1, 1, 1, 1]>(x, w)
            t = Transpose<perm = [0, 2, 3, 1]>(c)
            s = Softmax(t)
            n = LayerNormalization(s, one)
            m = MatMul(n, v)
            y = Tanh(m)
        }""",
        {"w": (24, 8, 3, 3), "one": (24,), "v": (24, 24)},
    ),
}
"""Programs beside the architectures; the last one's work is divided between threads."""


@functools.cache
def compiled(net: str) -> tuple[oc.Program, bytes]:
    """The final program of a net, and a reference for it."""
    precision = PRECISIONS.get(net, "fp32")
    if net in WRITTEN:
        body, weights = WRITTEN[net]
        model, inputs, batches = program(body, **weights), None, None
    else:
        model, x = NETS[net]()
        inputs = (x,)
        batches = [x] if precision == "int8" else None
    with oc.compile(
        model, inputs, target=oc.Target("cpu", threads=1, isa="portable"), precision=precision,
        calibration=batches, budget=oc.Budget(max_damage=1e9), timing=False,
        passes=["simplify", "fold-batchnorm", "insert-qdq", "pack-weights", "move-integers",
                "fuse-operators"],
    ) as made:  # fmt: skip
        assert made.program is not None
        integer = any(k["dtype"] == "int8" for k in made.measurements["kernels"])
        assert integer == (precision == "int8" or net in ("convolutions", "bytes"))
        return made.program, (made.directory / "reference.bin").read_bytes()


@functools.cache
def works(sanitizer: str) -> bool:
    """Whether the compiler has the sanitizer and its programs run here."""
    with tempfile.TemporaryDirectory() as place:
        Path(place, "main.c").write_text("int main(void) { return 0; }\n")
        command = ["cc", f"-fsanitize={sanitizer}", "main.c", "-o", "main"]
        made = subprocess.run(command, cwd=place, capture_output=True)
        return not made.returncode and not subprocess.run([f"{place}/main"]).returncode


def checked(
    net: str, isa: str, sanitizer: str, place: Path, edit: Callable[[str], str] = str
) -> subprocess.CompletedProcess[str]:
    """The check of a library built under the sanitizer from the texts that `edit` gives."""
    if not works(sanitizer):
        pytest.skip(f"no -fsanitize={sanitizer} here")
    source, reference = compiled(net)
    _, module = emit(source, named_isas(isa))
    (place / "code" / "src").mkdir(parents=True)
    for path, text in {**module.sources, **package(module)}.items():
        (place / "code" / path).write_text(edit(text))
    (place / "code" / "net.weights").write_bytes(b"".join(module.weights))
    (place / "reference.bin").write_bytes(reference)
    build = place / "build"
    return subprocess.run(
        ["make", "-s", "-j2", "-f", place / "code" / "src" / "Makefile", "check",
         f"BUILD={build}", f"LIBRARY={build}/libnet.a", f"THREADS={SANITIZERS[sanitizer]}",
         f"CFLAGS=-O1 -g1 -Werror -fsanitize={sanitizer} -fno-sanitize-recover=all"],
        cwd=place, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("isa", dict.fromkeys((NATIVE, "portable")))
@pytest.mark.parametrize("net", [*WRITTEN, *NETS])
def test_nets_run_clean(net: str, isa: str, sanitizer: str, tmp_path: Path) -> None:
    done = checked(net, isa, sanitizer, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "values agree" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("picked", dict.fromkeys((NATIVE, "portable")))
def test_a_library_of_several_runs_clean(
    picked: str, sanitizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled("convolutions")
    monkeypatch.setenv("net_ISA", picked)
    done = checked("convolutions", f"{NATIVE}+portable", sanitizer, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def test_an_arena_that_is_too_small_is_noticed(tmp_path: Path) -> None:
    def smaller(text: str) -> str:
        return re.sub(r"(?<=\.arena_size = )\d+", "64", text)

    done = checked("convolutions", "portable", "address,undefined", tmp_path, smaller)
    assert done.returncode
    assert "heap-buffer-overflow" in done.stderr


def test_threads_that_do_not_wait_are_noticed(tmp_path: Path) -> None:
    def unfenced(text: str) -> str:
        return text.replace("unsigned long all = run *", "unsigned long all = 0 * run *")

    done = checked("divided", "portable", "thread", tmp_path, unfenced)
    assert done.returncode
    assert "data race" in done.stderr
