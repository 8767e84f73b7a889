"""bfloat16 on the cpu backend: kernels of every instruction set against the FX executor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from ml_dtypes import bfloat16

import optcompiler as oc
from optcompiler.damage import run_batches
from optcompiler.lowering import lower
from optcompiler.lowering.ir import Conv, Loop, MatMul
from optcompiler.ops import builtin_table
from optcompiler.program import Program
from optcompiler.target import Target
from optcompiler_cpu.backend import CpuBackend
from optcompiler_cpu.isa import ISAS, supported

HERE = [name for name, isa in ISAS.items() if supported(isa)]
HEAD = '<ir_version: 10, opset_import: ["": 22]> g '
ROUNDING = 2.0**-8
"""Half a unit in the last place of a bfloat16, relative: what one rounding may add."""


def program(body: str, **weights: tuple[int, ...]) -> Program:
    """A program in ONNX text; weights are seeded bfloat16 numbers of the given shapes."""
    model = onnx.parser.parse_model(HEAD + body)
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        fan_in = int(np.prod(shape[1:])) if len(shape) == 4 else shape[0]
        array = (rng.standard_normal(shape) / np.sqrt(fan_in)).astype(bfloat16)
        tensor = onnx.helper.make_tensor(
            name, onnx.TensorProto.BFLOAT16, shape, array.tobytes(), raw=True
        )
        model.graph.initializer.append(tensor)
    return Program.from_onnx(model)


def inputs_of(source: Program) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        p.name: rng.standard_normal([int(d) for d in p.shape]).astype(np.float32)
        for p in source.inputs
    }


def reference(source: Program, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    [outputs] = run_batches(source, [inputs], builtin_table())
    return [torch.as_tensor(o).float().numpy() for o in outputs]


def compiled(
    source: Program, directory: Path, isa: str, inputs: dict[str, np.ndarray], threads: int = 1
) -> list[np.ndarray]:
    directory.mkdir(exist_ok=True)
    backend = CpuBackend()
    info = backend.lower(source, Target("cpu", threads=threads, isa=isa), directory)
    runner = backend.load(directory, info, threads=threads)
    try:
        return [np.asarray(o, np.float32) for o in runner.run(inputs)]
    finally:
        runner.close()


def product(m: int, k: int, n: int) -> tuple[str, dict[str, tuple[int, ...]]]:
    return (
        f"""(float[{m}, {k}] x) => (float[{m}, {n}] y) {{
            h = Cast<to = 16>(x)
            p = MatMul(h, w)
            y = Cast<to = 1>(p)
        }}""",
        {"w": (k, n)},
    )


def convolution(
    image: tuple[int, ...], out: tuple[int, ...], weight: tuple[int, ...], attributes: str
) -> tuple[str, dict[str, tuple[int, ...]]]:
    x, y = (",".join(map(str, shape)) for shape in (image, out))
    return (
        f"""(float[{x}] x) => (float[{y}] y) {{
            h = Cast<to = 16>(x)
            c = Conv<{attributes}>(h, w, b)
            r = Relu(c)
            y = Cast<to = 1>(r)
        }}""",
        {"w": weight, "b": (weight[0],)},
    )


PROGRAMS = {
    "even": product(64, 384, 128),
    "odd depth": product(7, 33, 48),
    "odd columns": product(13, 32, 37),
    "all odd": product(5, 17, 101),
    "depth 1": product(3, 1, 16),
    "one row": product(1, 129, 70),
    "conv 3x3": convolution((1, 32, 9, 11), (1, 40, 9, 11), (40, 32, 3, 3), "pads=[1,1,1,1]"),
    "conv odd channels": convolution((2, 3, 12, 9), (2, 20, 6, 5), (20, 3, 3, 3),
                                     "pads=[1,1,1,1], strides=[2,2]"),
    "conv dilated": convolution((1, 5, 11, 12), (1, 16, 7, 8), (16, 5, 3, 3), "dilations=[2,2]"),
    "conv grouped": convolution((1, 14, 8, 8), (1, 10, 8, 8), (10, 7, 3, 3),
                                "pads=[1,1,1,1], group=2"),
    "conv pointwise, strided": convolution((1, 17, 9, 9), (1, 24, 5, 5), (24, 17, 1, 1),
                                           "strides=[2,2]"),
    "depthwise": convolution((1, 21, 8, 9), (1, 21, 8, 9), (21, 1, 3, 3),
                             "pads=[1,1,1,1], group=21"),
    "gemm": (
        """(float[6, 19] x) => (float[6, 35] y) {
            h = Cast<to = 16>(x)
            p = Gemm<transB = 1>(h, w, b)
            y = Cast<to = 1>(p)
        }""",
        {"w": (35, 19), "b": (35,)},
    ),
    "two computed operands": (
        """(float[3, 9, 21] x, float[3, 13, 21] z) => (float[3, 9, 13] y, float[3, 9, 21] v) {
            h = Cast<to = 16>(x)
            i = Cast<to = 16>(z)
            t = Transpose<perm = [0, 2, 1]>(i)
            p = MatMul(h, t)
            y = Cast<to = 1>(p)
            s = Softmax(y)
            sh = Cast<to = 16>(s)
            q = MatMul(sh, i)
            v = Cast<to = 1>(q)
        }""",
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("name", PROGRAMS)
def test_contractions_agree_with_the_executor(name: str, isa: str, tmp_path: Path) -> None:
    """Sums are made in another order in float32, so a result may round to the next bfloat16."""
    body, weights = PROGRAMS[name]
    source = program(body, **weights)
    inputs = inputs_of(source)
    wanted = reference(source, inputs)
    for got, want in zip(compiled(source, tmp_path, isa, inputs), wanted, strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=2 * ROUNDING, atol=1e-2 * ROUNDING)
        assert np.mean(got == want) > 0.98


@pytest.mark.parametrize("name", PROGRAMS)
def test_instructions_and_widening_give_the_same_numbers(name: str, tmp_path: Path) -> None:
    """Each accumulator sums the same products in the same order, whatever multiplies them."""
    fused = [isa for isa in HERE if isa != "portable"]
    body, weights = PROGRAMS[name]
    source = program(body, **weights)
    inputs = inputs_of(source)
    first, *others = [compiled(source, tmp_path / isa, isa, inputs) for isa in fused]
    for other in others:
        for a, b in zip(first, other, strict=True):
            if name != "two computed operands":
                np.testing.assert_array_equal(a, b)


NETWORK = (
    """(float[1, 6, 17, 13] x) => (float[1, 5] y, float[1, 20, 9, 7] z) {
        h = Cast<to = 16>(x)
        c0 = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(h, w0, b0)
        r0 = Relu(c0)
        m0 = MaxPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [1, 1]>(r0)
        c1 = Conv<pads = [1, 1, 1, 1]>(m0, w1)
        f1 = Cast<to = 1>(c1)
        s1 = Sigmoid(f1)
        z = Mul(f1, s1)
        a = GlobalAveragePool(z)
        f = Flatten(a)
        fh = Cast<to = 16>(f)
        g = MatMul(fh, w2)
        y = Cast<to = 1>(g)
    }""",
    {"w0": (18, 6, 3, 3), "b0": (18,), "w1": (20, 18, 3, 3), "w2": (20, 5)},
)


@pytest.mark.parametrize("isa", HERE)
def test_a_network_agrees_and_does_not_depend_on_threads(isa: str, tmp_path: Path) -> None:
    source = program(NETWORK[0], **NETWORK[1])
    inputs = inputs_of(source)
    one, two = (compiled(source, tmp_path / str(n), isa, inputs, n) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
    for got, want in zip(one, reference(source, inputs), strict=True):
        np.testing.assert_allclose(got, want, rtol=4 * ROUNDING, atol=2 * ROUNDING)


def test_activations_between_two_layers_stay_narrow() -> None:
    lowered = lower(program(NETWORK[0], **NETWORK[1]), narrow=frozenset({"BFLOAT16"}))
    convs = [s for s in lowered.steps if isinstance(s, Conv)]
    assert convs[0].out.dtype == convs[1].a.view.dtype == "BFLOAT16"
    assert convs[1].out.dtype == "FLOAT"
    kernels = CpuBackend().kernels(program(NETWORK[0], **NETWORK[1]), Target("cpu", isa="avx2"))
    assert [k.dtype for k in kernels if k.macs] == ["bf16"] * 3


def test_a_printer_that_asks_for_nothing_gets_floats() -> None:
    lowered = lower(program(NETWORK[0], **NETWORK[1]))
    for step in lowered.steps:
        if isinstance(step, (Conv, MatMul)):
            assert step.a.view.dtype == step.b.view.dtype == "FLOAT"


SPECIAL = [0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.3895e38, 3.4e38, np.inf,
           -np.inf, np.nan, 1e-30]  # fmt: skip


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("size", [12, 40, 41])
def test_stores_round_to_nearest_even(isa: str, size: int, tmp_path: Path) -> None:
    source = program(
        f"(float[{size}] x) => (bfloat16[{size}] h, float[{size}] y)"
        "{ h = Cast<to = 16>(x) w = Cast<to = 1>(h) y = Add(w, w) }"
    )
    x = np.resize(np.array(SPECIAL, np.float32), size)
    with np.errstate(all="ignore"):
        want = x.astype(bfloat16).astype(np.float32)
        got = compiled(source, tmp_path, isa, {"x": x})
        np.testing.assert_array_equal(got[0], want)
        np.testing.assert_array_equal(got[1], want + want)


@pytest.mark.parametrize("isa", HERE)
def test_what_follows_an_odd_row_does_not_reach_it(isa: str, tmp_path: Path) -> None:
    """The element after a row of odd length is the next row's: here infinite, and times zero."""
    source = program(
        """(bfloat16[2, 3] x) => (float[2, 16] y) { p = MatMul(x, w) y = Cast<to = 1>(p) }""",
        w=(3, 16),
    )  # fmt: skip
    x = np.array([[1, 2, 3], [np.inf, 2, 3]], bfloat16)
    [y] = compiled(source, tmp_path, isa, {"x": x})
    assert np.isfinite(y[0]).all()
    assert not np.isfinite(y[1]).any()


def test_loops_over_bfloat16_are_vectors() -> None:
    lowered = lower(
        program("(bfloat16[64] x) => (bfloat16[64] y) { y = Tanh(x) }"),
        narrow=frozenset({"BFLOAT16"}),
    )
    from optcompiler_cpu.loops import print_loop

    [step] = lowered.steps
    assert isinstance(step, Loop)
    text = print_loop(step, ISAS["portable"]).text
    assert "vb_load(" in text
    assert "vb_store(" in text


def encoder() -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, padding=1, stride=2), torch.nn.ReLU(), torch.nn.Conv2d(32, 48, 3),
        torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(48 * 36, 64), torch.nn.GELU(),
        torch.nn.Linear(64, 10),
    ).eval()  # fmt: skip
    return module, torch.randn(8, 3, 16, 16)


@pytest.mark.skipif(not supported(ISAS["avx512_bf16"]), reason="needs bfloat16 products")
def test_a_compile_in_bf16_stays_inside_its_budget(tmp_path: Path) -> None:
    module, x = encoder()
    compiled = oc.compile(
        module, (x[:4],), target=oc.Target("cpu", threads=1, isa="avx512_bf16"), precision="bf16",
        calibration=[(x[:4],), (x[4:],)], budget=oc.Budget(max_damage=1e-3), damage="nmse",
        timing=False,
    )  # fmt: skip
    taken = {r.site for r in compiled.ledger if r.pass_name == "cast-bf16" and r.outcome == "taken"}
    assert len(taken) == 4
    with torch.no_grad():
        want = module(x[4:])
    got = compiled(x[4:])
    error = float(torch.mean((got - want) ** 2) / torch.mean(want**2))
    assert 0 < error < 1e-3


def test_a_target_without_instructions_does_not_offer_it() -> None:
    backend = CpuBackend()
    offered = {
        isa: "bf16" in backend.capabilities(Target("cpu", isa=isa)).precisions for isa in ISAS
    }
    assert offered == {
        "amx_int8": True, "avx512_bf16": True, "avx512_vnni": False, "avx_vnni": False,
        "avx2": False, "neon_dotprod": False, "portable": False,
    }  # fmt: skip
