"""Backend cpu with sizes that are read at run time: every size within bounds, from one library."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optcompiler as oc
from optcompiler.binding import bind
from optcompiler.damage import run_batches
from optcompiler.errors import InputError, UnsupportedOperatorError
from optcompiler.ops import builtin_table
from optcompiler_cpu.backend import CpuBackend, emit
from optcompiler_cpu.isa import ISAS
from optcompiler_cpu.toolchain import LIBRARIES, compiler
from tests.backends.test_cpu import FLOATS, HERE, compiled, program
from tests.backends.test_cpu_integers import INTEGERS
from tests.backends.test_cpu_weights import program as weights_program
from tests.backends.test_cpu_weights import quantised_weight
from tests.support import assert_close, random_inputs, run_onnx

Bounds = Mapping[str, tuple[int, int]]

BATCH: Bounds = {"batch": (1, 9)}
CONVOLUTIONS = program(
    """(float[batch, 3, 13, 11] x) => (float[batch, 10] y, float[batch, 16, 6, 5] z) {
        c0 = Conv<pads = [1, 1, 1, 1]>(x, w0)
        c = Relu(c0)
        d0 = Conv<pads = [1, 1, 1, 1], group = 32>(c, w1)
        d = Tanh(d0)
        e = Conv<pads = [1, 1, 1, 1]>(d, w2)
        f = Add(e, c)
        g = Conv(f, w3)
        z = MaxPool<kernel_shape = [3, 3], strides = [2, 2]>(g)
        m = GlobalAveragePool(z)
        v = Flatten(m)
        y = Gemm(v, w4, b4)
    }""",
    w0=(32, 3, 3, 3), w1=(32, 1, 3, 3), w2=(32, 32, 3, 3), w3=(16, 32, 1, 1), w4=(16, 10),
    b4=(10,),
)  # fmt: skip


@dataclass
class Library:
    """A compiled program, its folder and what its manifest says."""

    source: oc.Program
    place: Path
    info: Mapping[str, Any]

    def run(self, inputs: dict[str, np.ndarray], threads: int = 1) -> list[np.ndarray]:
        runner = CpuBackend().load(self.place, self.info, threads=threads)
        try:
            return runner.run(inputs)
        finally:
            runner.close()

    @classmethod
    def of(cls, source: oc.Program, place: Path, bounds: Bounds, **options: str) -> Library:
        target = oc.Target("cpu", threads=1, sizes=dict(bounds), **options)
        return cls(source, place, CpuBackend().lower(source, target, place))


@pytest.fixture(scope="module")
def convolutions(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library.of(CONVOLUTIONS, tmp_path_factory.mktemp("sizes"), BATCH)


def test_convolutions_of_any_batch(convolutions: Library) -> None:
    for n in (9, 1, 2, 7, 5, 9):
        inputs = random_inputs(CONVOLUTIONS, seed=n, dynamic=n)
        assert_close(convolutions.run(inputs), run_onnx(CONVOLUTIONS, inputs), 1e-5)


def test_threads_change_nothing(convolutions: Library) -> None:
    for n in (1, 4, 9):
        inputs = random_inputs(CONVOLUTIONS, seed=n, dynamic=n)
        for a, b in zip(convolutions.run(inputs), convolutions.run(inputs, 2), strict=True):
            np.testing.assert_array_equal(a, b)


MAIN = r"""
#include "net.h"
#include <stdio.h>
#include <stdlib.h>
int main(int argc, char **argv) {
  int sizes, count;
  const net_size *size = net_sizes(&sizes);
  const net_port *in = net_inputs(&count);
  printf("%d %s %ld %ld %ld\n", sizes, size->name, size->least, size->most, in->shape[0]);
  net_handle *net = net_create(argv[1]);
  printf("%d %d ", net_set_size(net, 0, 0), net_set_size(net, 0, 10));
  printf("%d %d\n", net_set_size(net, 1, 3), net_set_size(net, 0, atol(argv[2])));
  printf("%ld %ld %ld %ld\n", net_input_length(net, 0, 0), net_input_length(net, 0, 1),
         net_output_length(net, 1, 0), net_output_length(net, 0, 7));
  const long n = net_input_length(net, 0, 0);
  float *x = malloc((size_t)n * 429 * sizeof *x), *y = malloc((size_t)n * 10 * sizeof *y);
  float *z = malloc((size_t)n * 480 * sizeof *z);
  for (long i = 0; i < n * 429; ++i) x[i] = (float)(i % 7) - 3;
  const void *inputs[] = {x};
  void *outputs[] = {y, z};
  net_run(net, inputs, outputs);
  for (long i = 0; i < n * 10; ++i) printf("%.9g\n", y[i]);
  net_destroy(net);
  return argc == 3 ? 0 : 1;
}
"""


def test_from_c(convolutions: Library, tmp_path: Path) -> None:
    (tmp_path / "main.c").write_text(MAIN)
    code = convolutions.place
    built = [*compiler(), "-Wall", "-Wextra", "-Werror", f"-I{code}", "main.c", code / "libnet.a"]
    subprocess.run([*built, "-o", "main", *LIBRARIES], cwd=tmp_path, check=True)
    command = [tmp_path / "main", code / "net.weights", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, second, third, *numbers = done.stdout.splitlines()
    assert first == "1 batch 1 9 9"
    assert second == "-1 -1 -1 0"
    assert third == "3 3 3 -1"
    x = (np.arange(3 * 429) % 7 - 3).astype(np.float32).reshape(3, 3, 13, 11)
    want = run_onnx(CONVOLUTIONS, {"x": x})[0]
    assert_close([np.array(numbers, np.float32).reshape(3, 10)], [want], 1e-5)


def test_integers_are_those_of_the_library_of_one_size(tmp_path: Path) -> None:
    body, weights = INTEGERS["convolutions"]
    source = program(
        body.replace("[1, 3,", "[batch, 3,").replace("[1, 20,", "[batch, 20,"), **weights
    )
    (tmp_path / "sized").mkdir()
    sized = Library.of(source, tmp_path / "sized", {"batch": (1, 5)})
    for n in (1, 3):
        inputs = random_inputs(source, seed=n, dynamic=n)
        fixed = compiled(bind(source, {"batch": n}), tmp_path / f"{n}", HERE[0], inputs)
        for a, b in zip(fixed, sized.run(inputs), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("isa", ["portable", HERE[0]])
def test_attention_of_any_batch_and_length(isa: str, tmp_path: Path) -> None:
    body, weights = FLOATS["attention"]
    body = body.replace("[1, 6, 12]", "[batch, tokens, 12]").replace("[1, 6]", "[batch, tokens]")
    source = program(body, **weights)
    sized = Library.of(source, tmp_path, {"batch": (1, 3), "tokens": (2, 70)}, isa=isa)
    rng = np.random.default_rng(0)
    for batch, tokens in ((3, 70), (1, 2), (2, 17), (1, 64), (3, 33)):
        ids = rng.integers(0, 9, (batch, tokens))
        inputs = {"ids": ids, "mask": rng.random((batch, tokens)) < 0.7}
        for threads in (1, 2):
            assert_close(sized.run(inputs, threads), run_onnx(source, inputs), 1e-5)


def test_a_mean_over_a_length_and_a_table_of_the_largest(tmp_path: Path) -> None:
    source = program(
        """(float[2, tokens, 20] x) => (float[2, 20] y, float[2, tokens, 20] z, float[] n) {
            shape = Shape<start = 1, end = 2>(x)
            part = Slice(table, zero, shape)
            z = Add(x, part)
            e = ReduceSum(z)
            n = Squeeze(e)
            y = ReduceMean<keepdims = 0>(z, one)
        }""",
        table=(40, 20), zero=np.array([0]), one=np.array([1]),
    )  # fmt: skip
    sized = Library.of(source, tmp_path, {"tokens": (3, 40)})
    for tokens in (3, 19, 40):
        inputs = random_inputs(source, dynamic=tokens)
        assert_close(sized.run(inputs), run_onnx(source, inputs), 1e-5)


def test_compile_takes_bounds_and_refuses_other_sizes() -> None:
    import torch

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(20, 33), torch.nn.ReLU(), torch.nn.Linear(33, 5))
    with oc.compile(
        module, (torch.ones(2, 20),), target="cpu:threads=1", dynamic={"batch": (2, 17)},
        timing=False,
    ) as net:  # fmt: skip
        assert net.bounds == {"batch": (2, 17)}
        assert str(net.target).startswith("cpu:threads=1,size.batch=2..17,")
        for n in (2, 11, 17):
            x = torch.randn(n, 20)
            torch.testing.assert_close(net(x), module(x), rtol=1e-5, atol=1e-5)
        with pytest.raises(InputError, match="has batch 18, 2 to 17 expected"):
            net(torch.ones(18, 20))
        with pytest.raises(InputError, match="has batch 1, 2 to 17"):
            net(torch.ones(1, 20))
        runner = CpuBackend().load(net.directory / "code", net.manifest["backend_info"], threads=1)
        with pytest.raises(InputError, match="the inputs have batch 18"):
            runner.run({net.inputs[0].name: np.ones((18, 20), np.float32)})
        runner.close()


def test_a_library_of_several_instruction_sets_has_sizes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    isas = dict.fromkeys((HERE[0], "portable"))
    library = Library.of(CONVOLUTIONS, tmp_path, BATCH, isa="+".join(isas))
    for isa in isas:
        monkeypatch.setenv("net_ISA", isa)
        for n in (9, 2):
            inputs = random_inputs(CONVOLUTIONS, seed=n, dynamic=n)
            assert_close(library.run(inputs), run_onnx(CONVOLUTIONS, inputs), 1e-5)


def test_a_step_without_such_a_form_names_its_node() -> None:
    source = program(
        "(float[1, 8, tokens] x) => (float[1, 8, out] y) "
        "{ [conv] y = Conv<strides = [2], pads = [1, 1]>(x, w) }",
        w=(8, 8, 3),
    )  # fmt: skip
    with pytest.raises(UnsupportedOperatorError, match="conv"):
        emit(source, [ISAS["portable"]], bounds={"tokens": (4, 32)})


def test_a_library_of_one_size_has_none_of_it() -> None:
    _, module = emit(bind(CONVOLUTIONS, {"batch": 2}), [ISAS["portable"]])
    text = "".join(module.sources.values())
    assert not any(word in text for word in ("set_size", "SIZES", "oc_even", "n_batch"))


def test_symbols_that_c_spells_alike_are_refused() -> None:
    source = program(
        """(float["a b", 3] x, float[a_b, 3] z) => (float["a b", 3] y, float[a_b, 3] w) {
            y = Relu(x)
            w = Relu(z)
        }"""
    )
    with pytest.raises(InputError, match="both spelled n_a_b"):
        emit(source, [ISAS["portable"]], bounds={"a b": (1, 2), "a_b": (1, 2)})


def test_the_kernel_is_chosen_by_the_size(tmp_path: Path) -> None:
    """A convolution of few pixels and many weights is a direct sum for one image alone."""
    source = program(
        "(float[batch, 256, 6, 6] x) => (float[batch, 256, 6, 6] y) "
        "{ y = Conv<pads = [1, 1, 1, 1]>(x, w) }",
        w=(256, 256, 3, 3),
    )  # fmt: skip
    _, module = emit(source, [ISAS["avx512_vnni"]], bounds={"batch": (1, 12)})
    text = "".join(module.sources.values())
    assert re.search(r"if \(\(4 \* n_batch\) >= \d+\) net_kernel_\d_many", text)
    sized = Library.of(source, tmp_path, {"batch": (1, 12)})
    for n in (1, 2, 12):
        inputs = random_inputs(source, seed=n, dynamic=n)
        for threads in (1, 2):
            assert_close(sized.run(inputs, threads), run_onnx(source, inputs), 1e-4)


@pytest.mark.parametrize("isa", ["portable", HERE[0]])
def test_compressed_weights(isa: str, tmp_path: Path) -> None:
    model, attributes = quantised_weight("INT4", 64, 48, 16, zero=True)
    source = weights_program(
        f"(float[rows, 64] x) => (float[rows, 48] y) "
        f"{{ d = DequantizeLinear{attributes}(w, s, z) y = MatMul(x, d) }}",
        **model,
    )
    sized = Library.of(source, tmp_path, {"rows": (1, 40)}, isa=isa)
    once = 64 * 48 // 2
    assert (tmp_path / "net.weights").stat().st_size < once * 2
    for n in (1, 2, 3, 24, 25, 40):
        inputs = random_inputs(source, seed=n, dynamic=n)
        want = run_batches(source, [inputs], builtin_table())[0][0].numpy()
        assert_close(sized.run(inputs), [want], 1e-5)


def test_small_sizes_lie_densely() -> None:
    (lowered,), _ = emit(CONVOLUTIONS, [ISAS["portable"]], bounds=BATCH)
    assert [s.name for s in lowered.arena_scale] == ["batch"]
    (large,), _ = emit(bind(CONVOLUTIONS, {"batch": 9}), [ISAS["portable"]])
    (small,), _ = emit(bind(CONVOLUTIONS, {"batch": 1}), [ISAS["portable"]])
    assert lowered.arena_bytes <= 1.1 * large.arena_bytes
    assert lowered.arena_bytes // 9 <= 1.1 * small.arena_bytes
    assert large.arena_scale == ()
