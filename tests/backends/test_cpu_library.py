"""What backend cpu writes, as a C programmer meets it: names, symbols, warnings, checks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optcompiler as oc
from optcompiler.errors import InputError, ToolchainError
from optcompiler_cpu.backend import CpuBackend
from optcompiler_cpu.isa import ISAS, named_isas, supported
from optcompiler_cpu.naming import TAKEN, is_name, library_name
from optcompiler_cpu.toolchain import LIBRARIES
from tests.backends.test_cpu import FLOATS, program
from tests.backends.test_cpu_integers import INTEGERS
from tests.support import random_inputs, run_onnx

TINY = "(float[2, 3] x) => (float[2, 3] y) { y = Relu(x) }"
PAIR = "(float[2, 3] x) => (float[2, 2] y) { y = MatMul(x, w) }"
COMPILERS = [c for c in ("gcc", "clang") if shutil.which(c)]
INFO: dict[Path, Mapping[str, Any]] = {}
HERE = [name for name, isa in ISAS.items() if supported(isa)]


def lowered(source: oc.Program, place: Path, name: str | None = None, **options: str) -> Path:
    """The code of `source` in a folder of its own in `place`."""
    code = place / (name or "net") / "code"
    code.mkdir(parents=True)
    target = oc.Target("cpu", threads=1, name=name, **options)
    INFO[code] = CpuBackend().lower(source, target, code)
    return code


def ran(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def symbols(*command: str | Path) -> set[str]:
    lines = ran(*command, cwd=Path("/")).splitlines()
    return {line.split()[-1] for line in lines if len(line.split()) == 3}


@pytest.mark.parametrize("isa", [*HERE, "multi"])
def test_every_symbol_begins_with_the_name_and_only_the_interface_is_exported(
    isa: str, tmp_path: Path
) -> None:
    body, weights = FLOATS["attention"]
    code = lowered(program(body, **weights), tmp_path, "mymodel", isa=isa, weights="embedded")
    interface = set(re.findall(r"\bmymodel_[a-z_]+(?=\()", (code / "mymodel.h").read_text()))
    assert "mymodel_run" in interface
    assert symbols("nm", "-D", "--defined-only", code / "libmymodel.so") == interface
    inside = symbols("nm", "-g", "--defined-only", code / "libmymodel.a")
    assert interface < inside
    kernel = "mymodel_portable_kernel_0" if isa == "multi" else "mymodel_kernel_0"
    assert {"mymodel_embedded", kernel} < inside
    assert all(s.startswith("mymodel_") for s in inside)


TWO = """#include "one.h"
#include "two.h"
#include <stdio.h>
#include <string.h>

int main(int argc, char **argv) {
  if (argc != 3) return 2;
  one_handle *one = one_create(argv[1]);
  two_handle *two = two_create(argv[2]);
  if (!one || !two || one_create(argv[2])) return 3;
  float x[6] = {-1, 2, -3, 4, -5, 6}, y[6], z[4];
  const void *inputs[] = {x};
  void *ones[] = {y}, *twos[] = {z};
  if (one_set_threads(one, 2) || two_set_threads(two, 2)) return 4;
  one_run(one, inputs, ones);
  two_run(two, inputs, twos);
  int n;
  const one_port *port = one_inputs(&n);
  printf("%d %s %s %ld: %g %g, %g %g\\n", n, port->name, port->dtype, port->shape[1], y[0], y[5],
         z[0], z[3]);
  one_destroy(one);
  two_destroy(two);
  two_destroy(NULL);
  return 0;
}
"""


@pytest.mark.parametrize("cc", COMPILERS)
@pytest.mark.parametrize("kind", ["so", "a"])
def test_two_networks_go_into_one_program(kind: str, cc: str, tmp_path: Path) -> None:
    w = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    places = {
        "one": lowered(program(TINY), tmp_path, "one"),
        "two": lowered(program(PAIR, w=w), tmp_path, "two"),
    }
    libraries = [code / f"lib{name}.{kind}" for name, code in places.items()]
    (tmp_path / "main.c").write_text(TWO)
    warnings = ("-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror")
    ran(
        cc, *warnings, *(f"-I{c}" for c in places.values()), "main.c", *libraries, "-o", "main",
        *(f"-Wl,-rpath,{c}" for c in places.values()), *LIBRARIES, cwd=tmp_path,
    )  # fmt: skip
    weights = [code / f"{name}.weights" for name, code in places.items()]
    assert ran("./main", *weights, cwd=tmp_path) == "1 x FLOAT 3: 0 6, -4 1\n"


def test_the_header_is_cpp(tmp_path: Path) -> None:
    if not shutil.which("g++"):
        pytest.skip("no g++")
    code = lowered(program(TINY), tmp_path, "one")
    (tmp_path / "main.cpp").write_text(
        '#include "one.h"\n'
        "int main(int, char **argv) { one_destroy(one_create(argv[1])); return 0; }\n"
    )
    ran(
        "g++", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{code}", "main.cpp",
        code / "libone.a", "-o", "main", *LIBRARIES, cwd=tmp_path,
    )  # fmt: skip
    ran("./main", code / "one.weights", cwd=tmp_path)


@pytest.mark.parametrize("cc", COMPILERS)
@pytest.mark.parametrize("isa", HERE)
def test_the_source_compiles_without_warnings(cc: str, isa: str, tmp_path: Path) -> None:
    for name in ("attention", "odds", "convolutions"):
        body, weights = {**FLOATS, **INTEGERS}[name]
        code = tmp_path / name / "code"
        (code / "src").mkdir(parents=True)
        write_sources(program(body, **weights), code, isa)
        ran(
            "make", "-s", "-j2", "-f", code / "src" / "Makefile", "all",
            f"BUILD={tmp_path}/b{name}", cwd=tmp_path, CC=cc, CFLAGS="-O0 -Werror",
        )  # fmt: skip


def write_sources(source: oc.Program, code: Path, isa: str) -> None:
    """The sources alone, without building what is going to be built another way."""
    from optcompiler_cpu.backend import emit
    from optcompiler_cpu.packaging import package

    _, module = emit(source, named_isas(isa))
    for path, text in (dict(module.sources) | package(module)).items():
        (code / path).write_text(text)


MEMORY = """#include "net.h"
#include <stdio.h>
#include <stdlib.h>

int main(void) {
  static _Alignas(64) char weights[1 << 16];
  FILE *file = fopen("net/code/net.weights", "rb");
  const size_t size = fread(weights, 1, sizeof weights, file);
  fclose(file);
  if (net_create_from_memory(weights, size - 1) || net_create_from_memory(NULL, size)) return 1;
  if (net_create_from_memory(weights + 4, size)) return 2;
  net_handle *net = CREATE;
  if (!net) return 3;
  const float x[6] = {1, 2, 3, 4, 5, 6};
  float y[4];
  net_run(net, (const void *const[]){x}, (void *const[]){y});
  net_destroy(net);
  weights[0] ^= 1;
  if (net_create_from_memory(weights, size)) return 4;
  printf("%g %g %g %g\\n", y[0], y[1], y[2], y[3]);
  return 0;
}
"""


@pytest.mark.parametrize(
    ("create", "options"),
    [("net_create_from_memory(weights, size)", {}), ("net_create(NULL)", {"weights": "embedded"})],
)
def test_weights_in_memory(create: str, options: Mapping[str, str], tmp_path: Path) -> None:
    w = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    code = lowered(program(PAIR, w=w), tmp_path, **options)
    (tmp_path / "main.c").write_text(MEMORY)
    ran(
        "cc", "-std=c11", "-Wall", "-Wextra", "-Werror", f"-DCREATE={create}", f"-I{code}",
        "main.c", code / "libnet.a", "-o", "main", *LIBRARIES, cwd=tmp_path,
    )  # fmt: skip
    assert ran("./main", cwd=tmp_path) == "22 28 49 64\n"


def test_the_same_bytes_of_libraries_with_embedded_weights(tmp_path: Path) -> None:
    found = []
    for place in ("a", "elsewhere/b"):
        code = lowered(program(PAIR, w=(3, 2)), tmp_path / place, "one", weights="embedded")
        found.append({p.name: p.read_bytes() for p in code.rglob("*.*")})
        runner = CpuBackend().load(code, INFO[code], threads=1)
        inputs = random_inputs(program(PAIR, w=(3, 2)))
        want = run_onnx(program(PAIR, w=(3, 2)), inputs)
        np.testing.assert_allclose(runner.run(inputs)[0], want[0], rtol=1e-5)
        runner.close()
    assert found[0] == found[1]


# -- names --------------------------------------------------------------------------------------

ODD = (
    "", ".", "..", "-o", "my model", "a/b", "x;touch owned", "$(touch owned)", "`id`", "9lives",
    "@NAME@", "ünet", "\U0001f600", "a" * 300, "math", "C", "m", "stdio", "%s\n#include", "__x",
    "_", 'q"uote', "back\\slash", "TABLES", "int", "main", "net.v2",
)  # fmt: skip


@pytest.mark.parametrize("text", ODD)
def test_any_text_gives_a_harmless_name(text: str) -> None:
    name = library_name(text)
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,59}", name)
    assert name.lower() not in TAKEN
    assert library_name(name) == name
    if text != name:
        with pytest.raises(InputError, match=f"name={name}"):
            CpuBackend().capabilities(oc.Target("cpu", name=text or " "))


def test_plain_names_are_kept() -> None:
    assert [library_name(n) for n in ("net", "Model_2", "my-model")] == [
        "net",
        "Model_2",
        "my_model",
    ]
    assert not is_name("math")


@pytest.mark.parametrize("name", ["int", "main", "TABLES", "kernels", "verify", "variant"])
def test_words_of_c_and_of_the_source_are_names_too(name: str, tmp_path: Path) -> None:
    code = lowered(program(TINY), tmp_path, name, isa="portable")
    (tmp_path / "use.c").write_text(
        f'#include "{name}.h"\n'
        f"int main(int n, char **v) {{ (void)n; return !{name}_create(v[1]); }}\n"
    )
    ran(
        "cc", "-Wall", "-Werror", f"-I{code}", "use.c", code / f"lib{name}.a", "-o", "use",
        *LIBRARIES, cwd=tmp_path,
    )  # fmt: skip
    ran("./use", code / f"{name}.weights", cwd=tmp_path)


def test_a_backend_whose_artifacts_have_no_name_refuses_one() -> None:
    with pytest.raises(InputError, match="leave name= out"):
        oc.compile(program(TINY), target="onnxruntime:name=mine", timing=False)


# -- the check ----------------------------------------------------------------------------------


def check(artifact: Path, build: Path, **variables: object) -> subprocess.CompletedProcess[str]:
    settings = [f"{k}={v}" for k, v in {"BUILD": build, **variables}.items()]
    return subprocess.run(
        ["make", "-s", "-j2", "-f", artifact / "code" / "src" / "Makefile", "check", *settings],
        cwd=build.parent, capture_output=True, text=True,
    )  # fmt: skip


NETS = {
    "floats": FLOATS["attention"],
    "types": (
        """(float16[3] h, int64[3] i, bool[3] b, double[3] d)
            => (float16[3] x, int64[3] y, bool[3] z, double[3] w, float[0] none) {
            x = Add(h, h) y = Mul(i, i) z = Not(b) w = Add(d, d) t = Cast<to = 1>(h)
            none = Slice(t, zero, zero)
        }""",
        {"zero": np.array([0])},
    ),
    "nan": ("(float[4] x) => (float[4] y) { s = Sub(x, x) y = Div(x, s) }", {}),
}  # fmt: skip


@pytest.mark.parametrize("net", NETS)
def test_the_check_holds_and_fails_where_weights_or_values_differ(net: str, tmp_path: Path) -> None:
    body, weights = NETS[net]
    artifact = tmp_path / "art"
    source = program(body, **weights)
    with oc.compile(
        source, random_inputs(source, 3), target="cpu:threads=1,name=mine", timing=False
    ) as compiled:
        compiled.save(artifact)
        assert "reference.bin" in compiled._artifact.records["files"]
    done = check(artifact, tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"mine: \d+ values agree, error \S+ of 0.001 allowed\n", done.stdout)
    oc.load(artifact).close()  # nothing was left in it

    reference = bytearray((artifact / "reference.bin").read_bytes())
    (tmp_path / "short.bin").write_bytes(reference[:-8])
    done = check(artifact, tmp_path / "b", REFERENCE=tmp_path / "short.bin")
    assert done.returncode
    assert done.stdout == "mine: the reference is cut short\n"
    if net == "types":
        return
    reference[-8:] = np.array([1e3]).tobytes()
    (tmp_path / "other.bin").write_bytes(reference)
    done = check(artifact, tmp_path / "b", REFERENCE=tmp_path / "other.bin")
    assert done.returncode
    assert re.fullmatch(r"mine: output y differs by \S+, more than 0.001\n", done.stdout)


CALLER = r"""
#include "net.h"
#include <stdio.h>
static float x[64 * 96 * 96], y[10];
int main(int count, char **given) {
  net_handle *net = net_create(given[1]);
  if (count != 2 || !net || net_set_threads(net, 2)) return 1;
  const void *inputs[] = {x};
  void *outputs[] = {y};
  for (int i = 0; i < 3; ++i) net_run(net, inputs, outputs);
  FILE *status = fopen("/proc/self/status", "r");
  char line[256];
  long kilobytes = 0;
  while (fgets(line, sizeof line, status)) sscanf(line, "VmHWM: %ld", &kilobytes);
  printf("%ld\n", kilobytes);
  return 0;
}
"""


def test_it_takes_the_memory_of_weights_and_arena(tmp_path: Path) -> None:
    """And less than 10 MB beside them, the program that calls it included."""
    source = program(
        """(float[1, 64, 96, 96] x) => (float[1, 10] y) {
            a = Conv<pads = [1, 1, 1, 1]>(x, w0) b = Relu(a) c = Conv<pads = [1, 1, 1, 1]>(b, w0)
            d = Add(c, b) e = AveragePool<kernel_shape = [6, 6], strides = [6, 6]>(d)
            f = Flatten(e) g = MatMul(f, w1) y = MatMul(g, w2)
        }""",
        w0=(64, 64, 3, 3), w1=(16384, 512), w2=(512, 10),
    )  # fmt: skip
    code = lowered(source, tmp_path)
    (tmp_path / "caller.c").write_text(CALLER)
    ran("cc", f"-I{code}", "caller.c", code / "libnet.a", *LIBRARIES, "-o", "caller", cwd=tmp_path)
    took = 1024 * int(ran(tmp_path / "caller", code / "net.weights", cwd=tmp_path))
    weights = (code / "net.weights").stat().st_size
    assert weights < took < weights + INFO[code]["arena_bytes"] + 10_000_000


# -- another machine ----------------------------------------------------------------------------

FOREIGN = """#!/bin/sh
for word; do [ "$word" = -dumpmachine ] && echo aarch64-linux-gnu && exit; done
exec cc "$@"
"""


def test_what_is_compiled_for_another_machine_is_written_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "foreign-cc"
    compiler.write_text(FOREIGN)
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    source = program(TINY)
    with oc.compile(source, random_inputs(source), target="cpu:threads=1") as compiled:
        compiled.save(tmp_path / "net")
        assert compiled.target.options["isa"] == "portable"
        assert not compiled.measurements["ran_here"]
        assert compiled.measurements["measured_us"] is None
    with oc.load(tmp_path / "net") as net, pytest.raises(InputError, match="'aarch64-linux-gnu'"):
        net.run(random_inputs(source))
    with pytest.raises(InputError, match=r"isa=avx2 is of x86_64, but .* for aarch64-linux-gnu"):
        CpuBackend().lower(source, oc.Target("cpu", isa="avx2"), tmp_path)


def test_flags_are_honoured_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFLAGS", "-O1 -DOWN='x y'")
    monkeypatch.setenv("LDFLAGS", "-Wl,-z,now")
    assert CpuBackend().versions().items() >= {
        "CFLAGS": "-O1 -DOWN=x y", "LDFLAGS": "-Wl,-z,now",
    }.items()  # fmt: skip
    code = lowered(program(TINY), tmp_path)
    assert "BIND_NOW" in ran("readelf", "-d", code / "libnet.so", cwd=tmp_path)
    monkeypatch.setenv("CFLAGS", "--no-such-flag")
    with pytest.raises(ToolchainError, match="no-such-flag"):
        lowered(program(TINY), tmp_path, "other")


@pytest.mark.slow
def test_an_arm_library_agrees_under_an_emulator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cc = "aarch64-linux-gnu-gcc"
    if not shutil.which(cc) or not shutil.which("qemu-aarch64"):
        pytest.skip(f"no {cc} or no qemu-aarch64")
    monkeypatch.setenv("CC", cc)
    body, weights = INTEGERS["convolutions"]
    source = program(body, **weights)
    with oc.compile(source, random_inputs(source), target="cpu:threads=1") as compiled:
        compiled.save(tmp_path / "art")
    build = tmp_path / "b"
    done = check(
        tmp_path / "art", build, LIBRARY=build / "libnet.a", LDFLAGS="-static", RUN="qemu-aarch64"
    )
    assert done.returncode == 0, done.stderr
    assert "values agree" in done.stdout


def test_code_has_no_warnings_and_the_same_bytes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optcompiler_cpu import toolchain

    monkeypatch.setattr(toolchain, "FLAGS", (*toolchain.FLAGS, "-Werror"))
    body, weights = INTEGERS["convolutions"]
    files = []
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        CpuBackend().lower(program(body, **weights), oc.Target("cpu", threads=1), tmp_path / place)
        files.append({f.name: f.read_bytes() for f in (tmp_path / place).rglob("*.*")})
    assert files[0] == files[1]
