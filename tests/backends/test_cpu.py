"""Backend cpu: numbers against ONNX Runtime for every instruction set, threads, names, errors."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from optcompiler.errors import InputError, ToolchainError, UnsupportedOperatorError
from optcompiler.program import Program
from optcompiler.target import Target
from optcompiler_cpu.backend import CpuBackend
from optcompiler_cpu.isa import ISAS, supported
from tests.support import assert_close, random_inputs, run_onnx

HEAD = '<ir_version: 10, opset_import: ["": 20]> g '
HERE = [name for name, isa in ISAS.items() if supported(isa)]
WHOLE = np.ndarray | tuple[int, ...]


def program(body: str, **weights: WHOLE) -> Program:
    """A program in ONNX text; weights are arrays, or shapes to fill with seeded normal numbers."""
    model = onnx.parser.parse_model(HEAD + body)
    rng = np.random.default_rng(0)
    for name, value in weights.items():
        array = (
            value
            if isinstance(value, np.ndarray)
            else rng.standard_normal(value).astype(np.float32)
        )
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Program.from_onnx(model)


def compiled(
    source: Program, directory: Path, isa: str, inputs: dict[str, np.ndarray], threads: int = 1
) -> list[np.ndarray]:
    directory.mkdir(exist_ok=True)
    backend = CpuBackend()
    info = backend.lower(source, Target("cpu", threads=threads, isa=isa), directory)
    runner = backend.load(directory, info, threads=threads)
    try:
        return runner.run(inputs)
    finally:
        runner.close()


FLOATS = {
    "block": (
        """(float[1, 3, 17, 13] x) => (float[1, 5] y) {
            c0 = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(x, w0, b0)
            r0 = Relu(c0)
            m0 = MaxPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [1, 1]>(r0)
            c1 = Conv<pads = [1, 1, 1, 1], group = 20>(m0, w1)
            c2 = Conv<pads = [2, 0, 1, 1], dilations = [2, 1], group = 2>(c1, w2, b2)
            c3 = Conv<kernel_shape = [1, 1]>(m0, w3)
            p3 = Pad(c3, pads)
            a2 = AveragePool<kernel_shape = [2, 3], pads = [0, 1, 1, 1], strides = [1, 1]>(c2)
            k2 = Slice(a2, zero, height, two)
            g2 = GlobalAveragePool(c2)
            h2 = HardSwish(g2)
            f2 = Flatten(h2)
            q2 = GlobalMaxPool(p3)
            e2 = Flatten(q2)
            s2 = Sub(f2, e2)
            u2 = ReduceMean<keepdims = 0>(k2, axes)
            v2 = Add(s2, u2)
            y = Gemm<transB = 1, beta = 0.5>(v2, w4, b4)
        }""",
        {
            "w0": (20, 3, 3, 3), "b0": (20,), "w1": (20, 1, 3, 3), "w2": (8, 10, 3, 3), "b2": (8,),
            "w3": (8, 20, 1, 1), "pads": np.array([0, 0, 1, 0, 0, 0, 0, 1]), "w4": (5, 8),
            "b4": (1, 5), "zero": np.array([1]), "height": np.array([4]), "two": np.array([2]),
            "axes": np.array([2, 3]),
        },
    ),
    "attention": (
        """(int64[1, 6] ids, bool[1, 6] mask) => (float[1, 6, 12] y) {
            e = Gather(table, ids)
            n = LayerNormalization(e, s, b)
            m = MatMul(n, w)
            mb = Add(m, wb)
            q, k, v = Split<axis = 2, num_outputs = 3>(mb)
            qs = Reshape(q, heads)
            ks = Reshape(k, heads)
            vs = Reshape(v, heads)
            qt = Transpose<perm = [0, 2, 1, 3]>(qs)
            kt = Transpose<perm = [0, 2, 3, 1]>(ks)
            vt = Transpose<perm = [0, 2, 1, 3]>(vs)
            d = MatMul(qt, kt)
            dd = Mul(d, scale)
            ex = Unsqueeze(mask, twelve)
            dm = Where(ex, dd, low)
            p = Softmax<axis = -1>(dm)
            nan = IsNaN(p)
            pp = Where(nan, zero, p)
            o = MatMul(pp, vt)
            ot = Transpose<perm = [0, 2, 1, 3]>(o)
            oo = Reshape(ot, merged)
            r = Add(oo, e)
            g = Gelu(r)
            y = Mul(g, g)
        }""",
        {
            "table": (9, 12), "s": (12,), "b": (12,), "w": (12, 36), "wb": (36,),
            "heads": np.array([0, 0, 3, 4]), "scale": np.array(0.5, np.float32),
            "twelve": np.array([1, 2]), "low": np.array(-1e9, np.float32),
            "zero": np.array(0, np.float32), "merged": np.array([0, 0, 12]),
        },
    ),
    "odds": (
        """(float[3, 21] x, int64[3, 5] i) => (float[3, 21] a, int64[3, 5] b, bool[3, 5] c,
            float[21, 3] d, float[3, 1] e, float[6, 21] f, float[3, 2] g, int32[3, 5] h) {
            t = Tanh(x)
            u = Sigmoid(t)
            v = Erf(u)
            w = Exp(v)
            o = Log(w)
            z = Pow(o, three)
            a = Clip(z, low, high)
            j = Mul(i, two)
            b = CumSum(j, one)
            c = GreaterOrEqual(i, j)
            d = Transpose(a)
            e = ReduceMax(x, axis)
            f = Concat<axis = 0>(a, x)
            s = Slice(x, start, end, axis, step)
            g = Softplus(s)
            h = Cast<to = 6>(i)
        }""",
        {
            "three": np.array(3, np.float32), "low": np.array(0.1, np.float32),
            "high": np.array(0.9, np.float32), "two": np.array([2]), "one": np.array(1),
            "axis": np.array([1]), "start": np.array([-1]), "end": np.array([0]),
            "step": np.array([-10]),
        },
    ),
    "composites": (
        """(float[2, 6, 5, 4] x, int64[2, 3] i, float[2, 9] t) => (float[2, 7, 10, 12] a,
            float[2, 3] b, int64[2, 5, 4] c, int64[2, 6, 5, 1] d, float[4, 27] e, float[2, 9] f,
            float[3] g) {
            v = Conv(x, w)
            n = InstanceNormalization(v, s, o)
            r = Relu(n)
            a = Resize<mode = "nearest", coordinate_transformation_mode = "asymmetric",
                nearest_mode = "floor">(r, , scales)
            b = GatherElements<axis = 1>(t, i)
            c = ArgMax<axis = 1, keepdims = 0>(x)
            d = ArgMin<axis = -1>(x)
            e = Tile(t, repeats)
            f = LogSoftmax(t)
            g = GatherND(t, places)
        }""",
        {
            "w": (7, 6, 1, 1), "s": (7,), "o": (7,), "scales": np.array([1, 1, 2, 3], np.float32),
            "repeats": np.array([2, 3]), "places": np.array([[0, 1], [-1, 8], [1, 3]]),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("name", FLOATS)
def test_float_programs_agree_with_onnx_runtime(name: str, isa: str, tmp_path: Path) -> None:
    body, weights = FLOATS[name]
    source = program(body, **weights)
    inputs = random_inputs(source, 3)
    assert_close(compiled(source, tmp_path, isa, inputs), run_onnx(source, inputs), 1e-5)


def test_windows_that_would_start_in_the_padding_are_left_out(tmp_path: Path) -> None:
    source = program("""(float[1, 2, 9, 10] x) => (float[1, 2, H, W] y, float[1, 2, 4, 4] z) {
        y = AveragePool<kernel_shape = [3, 2], pads = [1, 0, 1, 1], strides = [2, 2],
            ceil_mode = 1, count_include_pad = 0>(x)
        z = MaxPool<kernel_shape = [2, 2], pads = [1, 1, 1, 1], strides = [3, 3], ceil_mode = 1>(x)
    }""")
    inputs = random_inputs(source)
    expected = run_onnx(source, inputs)
    assert [v.shape for v in expected] == [(1, 2, 5, 5), (1, 2, 4, 4)]
    assert_close(compiled(source, tmp_path, HERE[-1], inputs), expected)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("dtype", ["float", "double"])
def test_nan_passes_through_minima_and_maxima(dtype: str, isa: str, tmp_path: Path) -> None:
    """Elements and rows, by vectors for floats (whole ones and what is left) and one by one."""
    body = """(T[3, 21] x, T[3, 21] z) => (T[3, 21] relu, T[3, 21] clip, T[3, 21] most,
              T[3, 21] least, T[3, 21] bound, T[3, 1] top, T[1, 21] low, int64[3, 1] at) {
        relu = Relu(x)
        clip = Clip(x, a, b)
        most = Max(x, z)
        least = Min(x, a, z)
        bound = Clip(x, c)
        top = ReduceMax(x, one)
        low = ReduceMin(x, zero)
        at = ArgMax<axis = 1>(x)
    }"""
    kind = np.float32 if dtype == "float" else np.float64
    source = program(
        body.replace("T[", f"{dtype}["), a=np.array(-1, kind), b=np.array(1, kind),
        c=np.array(float("-inf"), kind), one=np.array([1]), zero=np.array([0]),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    inputs = {k: rng.standard_normal((3, 21)).astype(kind) for k in ("x", "z")}
    x, z = inputs["x"], inputs["z"]
    x[0, [0, 3]] = x[1, 19] = z[0, [0, 4]] = z[2, 20] = np.nan
    relu, clip, most, least, bound, top, low, at = compiled(source, tmp_path, isa, inputs)
    np.testing.assert_array_equal(relu, np.maximum(x, 0))
    np.testing.assert_array_equal(clip, np.clip(x, -1, 1))
    np.testing.assert_array_equal(most, np.maximum(x, z))
    np.testing.assert_array_equal(least, np.minimum(np.minimum(x, -1), z))
    np.testing.assert_array_equal(bound, x)
    np.testing.assert_array_equal(top, x.max(1, keepdims=True))
    np.testing.assert_array_equal(low, x.min(0, keepdims=True))
    np.testing.assert_array_equal(at, x.argmax(1)[:, None])


@pytest.mark.parametrize("isa", HERE)
def test_nan_passes_through_the_epilogue_of_a_product(isa: str, tmp_path: Path) -> None:
    source = program(
        """(float[5, 7] x) => (float[5, 19] y) { m = MatMul(x, w) r = Relu(m) y = Min(r, six) }""",
        w=(7, 19), six=np.array(6, np.float32),
    )  # fmt: skip
    x = np.ones((5, 7), np.float32)
    x[2, 3] = np.nan
    (y,) = compiled(source, tmp_path, isa, {"x": x})
    np.testing.assert_array_equal(np.isnan(y).all(1), np.isnan(x).any(1))
    assert np.isnan(y).sum() == 19


@pytest.mark.parametrize("isa", HERE)
def test_functions_are_accurate_and_pass_on_what_is_not_finite(isa: str, tmp_path: Path) -> None:
    names = ("Exp", "Log", "Tanh", "Erf", "Sigmoid")
    size = 4007
    outputs = ", ".join(f"float[{size}] y{n}" for n in names)
    body = " ".join(f"y{n} = {n}(x)" for n in names)
    source = program(f"(float[{size}] x) => ({outputs}) {{ {body} }}")
    special = np.array([0, -0.0, 1e-30, 88.0, -87.0, np.inf, np.nan], np.float32)
    x = np.concatenate([np.linspace(-12, 12, size - 7, dtype=np.float32), special])
    wide = x.astype(np.float64)
    with np.errstate(all="ignore"):
        wants = (
            np.exp(wide), np.log(wide), np.tanh(wide), np.vectorize(math.erf)(wide),
            1 / (1 + np.exp(-wide)),
        )  # fmt: skip
    for got, want in zip(compiled(source, tmp_path, isa, {"x": x}), wants, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=5e-7)


@pytest.mark.parametrize("isa", HERE)
def test_gelu_is_accurate(isa: str, tmp_path: Path) -> None:
    """To 3e-7 of what goes in, or in absolute terms below 1."""
    size = 4000
    source = program(
        f"""(float[{size}] x) => (float[{size}] y, float[{size}] z) {{
            y = Gelu(x) z = Gelu<approximate = "tanh">(x) }}"""
    )
    special = np.array([1e-30, -1e-30, -1e9, 1e9, np.inf, np.nan], np.float32)
    x = np.concatenate([np.linspace(-9, 9, size - 6, dtype=np.float32), special])
    wide = x.astype(np.float64)
    with np.errstate(all="ignore"):
        inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    exact = (np.vectorize(math.erf)(wide / math.sqrt(2)), np.tanh(inner))
    for got, bell in zip(compiled(source, tmp_path, isa, {"x": x}), exact, strict=True):
        finite = np.isfinite(wide)
        want = wide / 2 * (1 + bell)
        difference = np.abs(got[finite] - want[finite]) / np.maximum(1, np.abs(wide[finite]))
        assert difference.max() < 3e-7
        np.testing.assert_allclose(got[-6:-4], want[-6:-4], rtol=1e-6, atol=0)
        np.testing.assert_array_equal(got[-4:], np.array([0, 1e9, np.inf, np.nan], np.float32))


def test_results_do_not_depend_on_threads(tmp_path: Path) -> None:
    source = program(
        """(float[1, 8, 40, 40] x) => (float[1, 40, 40, 24] y) {
            c = Conv<pads = [1, 1, 1, 1]>(x, w, b)
            r = Relu(c)
            t = Transpose<perm = [0, 2, 3, 1]>(r)
            s = Softmax(t)
            n = LayerNormalization(s, one)
            y = MatMul(n, v)
        }""",
        w=(24, 8, 3, 3), b=(24,), one=(24,), v=(24, 24),
    )  # fmt: skip
    inputs = random_inputs(source)
    backend = CpuBackend()
    info = backend.lower(source, Target("cpu", threads=1), tmp_path)
    results = []
    for threads in (1, 2, 3):
        runner = backend.load(tmp_path, info, threads=threads)
        results += [runner.run(inputs)[0] for _ in range(3)]
        runner.close()
        runner.close()
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


def test_two_handles_in_two_threads(tmp_path: Path) -> None:
    source = program(
        "(float[4, 8] x) => (float[4, 8] y) { m = MatMul(x, w) y = Tanh(m) }", w=(8, 8)
    )
    backend = CpuBackend()
    info = backend.lower(source, Target("cpu", threads=1), tmp_path)
    feeds = [random_inputs(source, seed) for seed in (1, 2)]
    wants = [run_onnx(source, f)[0] for f in feeds]
    wrong: list[int] = []

    def work(which: int) -> None:
        runner = backend.load(tmp_path, info, threads=1)
        for _ in range(200):
            got = runner.run(feeds[which])[0]
            if not np.allclose(got, wants[which], atol=1e-5):
                wrong.append(which)

    workers = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


HOSTILE = '*/ system("x"); /* \\ " % $(id) `id` ../../e\n#define int ??/'


def test_names_stay_out_of_the_code(tmp_path: Path) -> None:
    source = program(
        "(float[4, 8] x) => (float[4, 8] y) { m = MatMul(x, w) y = Tanh(m) }", w=(8, 8)
    )
    for value in (source.graph.inputs[0], source.graph.outputs[0]):
        value.name = f"{HOSTILE}{value.name}"
    for node in source.graph:
        node.name = f"{HOSTILE}{node.name}"
    inputs = random_inputs(source)
    backend = CpuBackend()
    info = backend.lower(source, Target("cpu", threads=1), tmp_path)
    runner = backend.load(tmp_path, info, threads=1)
    assert_close(runner.run(inputs), run_onnx(source, inputs))
    text = "".join(path.read_text() for path in tmp_path.rglob("*.[ch]"))
    assert "system(" not in text.replace("\\042", '"').replace('system("x")', "")
    assert 'system("' not in text


def test_profile_names_every_step(tmp_path: Path) -> None:
    source = program(
        "(float[4, 8] x) => (float[4, 8] y) { m = MatMul(x, w) y = Softmax(m) }", w=(8, 8)
    )
    backend = CpuBackend()
    info = backend.lower(source, Target("cpu", threads=1), tmp_path)
    runner = backend.load(tmp_path, info, threads=1)
    times = runner.kernel_times_us(random_inputs(source))
    assert times is not None
    names = [k.name for k in backend.kernels(source, Target("cpu", threads=1))]
    assert list(times) == names
    assert all(t >= 0 for t in times.values())


def test_a_missing_compiler_is_a_toolchain_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = program("(float[4, 8] x) => (float[4, 8] y) { y = Tanh(x) }")
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    with pytest.raises(ToolchainError, match="no-such-compiler"):
        CpuBackend().lower(source, Target("cpu", threads=1), tmp_path)
    monkeypatch.setenv("CC", "false")
    with pytest.raises(ToolchainError, match="exit status 1"):
        CpuBackend().lower(source, Target("cpu", threads=1), tmp_path)
    assert ToolchainError.exit_code == 4


def test_options_shapes_and_operators_are_refused_by_name(tmp_path: Path) -> None:
    backend = CpuBackend()
    with pytest.raises(InputError, match="isa='sse9'"):
        backend.capabilities(Target("cpu", isa="sse9"))
    with pytest.raises(InputError, match="unknown option 'tile'"):
        backend.capabilities(Target("cpu", tile=4))
    dynamic = program("(float[N, 8] x) => (float[N, 8] y) { y = Tanh(x) }")
    with pytest.raises(InputError, match=r"input 'x' has dynamic dimensions \('N'\).*fixed size"):
        backend.lower(dynamic, Target("cpu"), tmp_path)
    odd = program("(float[4, 8, 8] x) => (float[4] y) { y = Det(x) }")
    with pytest.raises(UnsupportedOperatorError, match="Det"):
        backend.lower(odd, Target("cpu"), tmp_path)


def test_weights_of_another_artifact_are_refused(tmp_path: Path) -> None:
    backend = CpuBackend()
    infos = []
    for i in (0, 1):
        (tmp_path / str(i)).mkdir()
        source = program("(float[4, 8] x) => (float[4, 8] y) { y = MatMul(x, w) }",
                         w=np.full((8, 8), i, np.float32))  # fmt: skip
        infos.append(backend.lower(source, Target("cpu", threads=1), tmp_path / str(i)))
    (tmp_path / "0" / "net.weights").write_bytes((tmp_path / "1" / "net.weights").read_bytes())
    with pytest.raises(InputError, match=r"net\.weights"):
        backend.load(tmp_path / "0", infos[0], threads=1)


def test_a_library_that_took_the_place_of_a_loaded_one_is_the_one_that_runs(tmp_path: Path) -> None:
    backend = CpuBackend()
    place, x = tmp_path / "net", np.ones((2, 3), np.float32)
    runners = []
    for i, (op, want) in enumerate((("Tanh", np.tanh(x)), ("Neg", -x), ("Exp", np.exp(x)))):
        if place.exists():
            place.rename(tmp_path / f"old{i}")
        place.mkdir()
        info = backend.lower(
            program(f"(float[2, 3] x) => (float[2, 3] y) {{ y = {op}(x) }}"), Target("cpu"), place
        )
        runners.append((backend.load(place, info, threads=1), want))
        runners.append((backend.load(place, info, threads=1), want))
    for runner, want in runners:
        np.testing.assert_allclose(runner.run({"x": x})[0], want, rtol=1e-5)
