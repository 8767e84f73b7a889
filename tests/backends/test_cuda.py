from __future__ import annotations

import functools
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from optcompiler.errors import InputError, ToolchainError
from optcompiler.lowering import ir as low
from optcompiler.lowering import plan
from optcompiler.program import Program
from optcompiler.target import Target
from optcompiler_cuda.backend import CudaBackend
from optcompiler_cuda.emit import emit
from optcompiler_cuda.runner import InterpretedRunner
from tests.support import assert_close, random_inputs, run_onnx

pytest.importorskip("triton")

GOLDEN = Path(__file__).parent / "golden" / "cuda_kernels.txt"
UPDATE = "OPTCOMPILER_UPDATE_GOLDEN"
HEAD = '<ir_version: 9, opset_import: ["" : 20]>\n'


def text(source: str, **weights: np.ndarray) -> Program:
    """A program in ONNX text without initializers, and the initializers."""
    model = onnx.parser.parse_model(HEAD + source)
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items())
    return Program.from_onnx(model)


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def longs(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def interpret(
    program: Program, directory: Path, inputs: dict[str, np.ndarray] | None = None
) -> list[np.ndarray]:
    """Outputs of the artifact under Triton's interpreter, for `random_inputs` by default."""
    backend = CudaBackend()
    info = backend.lower(program, Target("cuda", interpret=1, precompile=0), directory)
    runner = backend.load(directory, info, threads=1)
    try:
        return runner.run(inputs or random_inputs(program))
    finally:
        runner.close()


def contractions() -> Program:
    return text(
        """contractions (float[2,3,9,11] x, float[2,5,19,33] m, float[2,5,33,18] m2,
                         float[2,6,7,8] xg, float[1,37] v)
        => (float[2,7,5,6] strided, float[2,5,5,6] pointwise_filter, float[2,5,5,6] depthwise,
            float[2,6,5,5] grouped, float[2,12,7,8] multiplied, float[2,7,9,11] dilated,
            float[2,5,19,17] shared_right, float[2,5,19,18] batched, float[2,6,7] line,
            float[1,13] row) {
          c = Conv<strides=[2,2],pads=[1,1,1,1]>(x, wc, bc)
          strided = Relu(c)
          pointwise_filter = Conv(strided, w11)
          depthwise = Conv<group=5,pads=[1,1,1,1]>(pointwise_filter, wd)
          grouped = Conv<group=3,dilations=[1,3]>(xg, wg)
          multiplied = Conv<group=6,pads=[1,1,1,1]>(xg, wm)
          w3 = Conv<pads=[2,2,2,2],dilations=[2,2]>(x, wc)
          dilated = Sigmoid(w3)
          shared_right = MatMul(m, wg2)
          batched = MatMul(m, m2)
          flat = ReduceMax<keepdims=0>(xg, last)
          line = Conv<pads=[1,1]>(flat, wl)
          row = Gemm<transB=1>(v, wr, br)
        }""",
        wc=floats(7, 3, 3, 3), bc=floats(7), w11=floats(5, 7, 1, 1), wd=floats(5, 1, 3, 3),
        wg=floats(6, 2, 3, 2), wm=floats(12, 1, 3, 3), wg2=floats(33, 17), wl=floats(6, 6, 3),
        wr=floats(13, 37), br=floats(13), last=longs(-1),
    )  # fmt: skip


def rows() -> Program:
    return text(
        """rows (float[3,5,37] x, float[2,3,9,11] image, float[2,3,5] small)
        => (float[3,5,37] softmax, float[3,5,37] softmax_middle, float[3,5,37] log_softmax,
            float[3,5,37] layer_norm, float[3,1,37] sum, float[5] mean, float[3,5] min,
            float[3,5] norm, float[2,3] prod, float[2,3,4,5] max_pool, float[2,3,9,11] mean_pool,
            float[2,3,5,6] mean_pool_padding, float[2,3,5,6] ceiling, float[2,3,1,1] global_pool,
            float[2,3,5] cumsum) {
          softmax = Softmax<axis=-1>(x)
          softmax_middle = Softmax<axis=1>(x)
          log_softmax = LogSoftmax<axis=-1>(x)
          layer_norm = LayerNormalization<axis=-1,epsilon=0.00001>(x, gain, shift)
          sum = ReduceSum(x, middle)
          mean = ReduceMean<keepdims=0>(x, outer)
          min = ReduceMin<keepdims=0>(x, last)
          norm = ReduceL2<keepdims=0>(x, last)
          prod = ReduceProd<keepdims=0>(small, last)
          max_pool = MaxPool<kernel_shape=[3,3],strides=[2,2]>(image)
          mean_pool = AveragePool<kernel_shape=[3,3],pads=[1,1,1,1]>(image)
          mean_pool_padding =
            AveragePool<kernel_shape=[3,3],pads=[1,1,1,1],strides=[2,2],count_include_pad=1>(image)
          ceiling = MaxPool<kernel_shape=[2,2],strides=[2,2],ceil_mode=1>(image)
          global_pool = GlobalAveragePool(image)
          cumsum = CumSum<reverse=1,exclusive=1>(small, one)
        }""",
        gain=floats(37), shift=floats(37, seed=1), middle=longs(1), outer=longs(0, 2),
        last=longs(-1), one=np.array(1, dtype=np.int64),
    )  # fmt: skip


def elements() -> Program:
    return text(
        """elements (float[3,5,37] x, int64[3,5] whole)
        => (float[3,2,3,37] gather, float[3,185] reshape, float[37,3,5] transpose,
            float[3,2,10] slice, float[3,8,39] pad, float[3,10,37] concat,
            float[3,5,37] broadcast, float[3,5,37] hard, bool[3,5,37] less, int64[3,5] integers,
            float[3,5,37] gelu, float[3,5,37] power, int64[3,5] modulo, int64[3,5] quotient,
            float[3,5,37] chosen, int32[3,5,37] cast, int8[3,5,37] levels) {
          gather = Gather<axis=1>(x, places)
          reshape = Reshape(x, shape)
          transpose = Transpose<perm=[2,0,1]>(x)
          slice = Slice(x, starts, ends, axes, steps)
          pad = Pad(x, pads)
          mirrored = Neg(x)
          concat = Concat<axis=1>(x, mirrored)
          a1 = Add(x, rows)
          a2 = Mul(a1, column)
          broadcast = Tanh(a2)
          d = Div(x, rows)
          c = Clip(d)
          e = Elu(c)
          hard = HardSwish(e)
          less = Less(x, rows)
          squares = Mul(whole, whole)
          integers = Sub(squares, seven)
          gelu = Gelu(x)
          size = Abs(x)
          power = Pow(size, rows)
          modulo = Mod(integers, three)
          quotient = Div(integers, three)
          r = Mul(x, half)
          rounded = Round(r)
          chosen = Where(less, rounded, x)
          cast = Cast<to=6>(r)
          levels = QuantizeLinear(x, scale, zero)
        }""",
        places=np.array([[4, -1, 0], [2, 2, -5]], dtype=np.int64), shape=longs(3, -1),
        starts=longs(1, 30), ends=longs(4, 2), axes=longs(1, 2), steps=longs(2, -3),
        pads=longs(0, 1, 2, 0, 2, 0), rows=floats(3, 1, 37), column=floats(5, 1),
        seven=np.array(7, dtype=np.int64), three=np.array(3, dtype=np.int64),
        half=np.array(2.5, dtype=np.float32), scale=np.array(0.02, dtype=np.float32),
        zero=np.array(-3, dtype=np.int8),
    )  # fmt: skip


def types() -> Program:
    return text(
        """types (double[2,3] d, bool[4] p, bool[4] q, uint8[2,5] u, int32[2,5] i, float[2,3] f)
        => (double[2,3] double_exp, double[2,3] double_round, bool[4] both, bool[4] same,
            float[2,5] widened, int32[2,5] largest, uint8[2,5] narrowed, float[2,3] patched,
            bool[2,3] nan, float[2,3] sign) {
          square = Mul(d, d)
          double_exp = Exp(square)
          double_round = Round(d)
          both = And(p, q)
          different = Xor(p, q)
          same = Not(different)
          widened = Cast<to=1>(u)
          largest = Max(i, ramp)
          narrowed = Cast<to=2>(largest)
          root = Sqrt(f)
          nan = IsNaN(root)
          patched = Where(nan, f, root)
          sign = Sign(f)
        }""",
        ramp=np.array([[1, 2, 3, 4, 5]], dtype=np.int32),
    )  # fmt: skip


TEMPLATES = {"contractions": contractions, "rows": rows, "elements": elements, "types": types}
CASES = {
    "contractions": [
        "strided", "pointwise_filter", "depthwise", "grouped", "multiplied", "dilated",
        "shared_right", "batched", "line", "row",
    ],
    "rows": [
        "softmax", "softmax_middle", "log_softmax", "layer_norm", "sum", "mean", "min", "norm",
        "prod", "max_pool", "mean_pool", "mean_pool_padding", "ceiling", "global_pool", "cumsum",
    ],
    "elements": [
        "gather", "reshape", "transpose", "slice", "pad", "concat", "broadcast", "hard", "less",
        "integers", "gelu", "power", "modulo", "quotient", "chosen", "cast", "levels",
    ],
    "types": [
        "double_exp", "double_round", "both", "same", "widened", "largest", "narrowed", "patched",
        "nan", "sign",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def template_outputs(tmp_path_factory: pytest.TempPathFactory):
    """By program: (ours, ONNX Runtime's), each by output name; each program runs once."""

    @functools.cache
    def outputs(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        program = TEMPLATES[name]()
        names = [p.name for p in program.outputs]
        ours = interpret(program, tmp_path_factory.mktemp(name))
        return (
            dict(zip(names, ours, strict=True)),
            dict(zip(names, run_onnx(program, random_inputs(program)), strict=True)),
        )

    return outputs


@pytest.mark.parametrize(
    ("program", "output"), [(p, output) for p, outputs in CASES.items() for output in outputs]
)
def test_template_equals_onnxruntime(program, output, template_outputs) -> None:
    ours, expected = template_outputs(program)
    assert_close([ours[output]], [expected[output]], 2e-6)


def cnn() -> onnx.ModelProto:
    """Three Conv+Relu with batch norm folded, a global mean, a Gemm; 8×8 images."""
    nodes, weights, x, channels = [], {}, "x", 1
    for i, (out, stride) in enumerate([(8, 1), (16, 2), (16, 1)]):
        weights[f"w{i}"] = floats(out, channels, 3, 3) * np.float32(0.5 / channels**0.5)
        weights[f"b{i}"] = floats(out) * np.float32(0.1)
        at = [1, 1, 1, 1]
        nodes += [
            helper.make_node(
                "Conv", [x, f"w{i}", f"b{i}"], [f"c{i}"], pads=at, strides=[stride, stride]
            ),
            helper.make_node("Relu", [f"c{i}"], [f"r{i}"]),
        ]
        x, channels = f"r{i}", out
    weights |= {"wf": floats(10, 16), "bf": floats(10)}
    nodes += [
        helper.make_node("GlobalAveragePool", [x], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "wf", "bf"], ["y"], transB=1),
    ]
    return model(nodes, weights, ("x", TensorProto.FLOAT, [2, 1, 8, 8]), [2, 10])


def encoder(hidden: int = 32, heads: int = 2, length: int = 8) -> onnx.ModelProto:
    """Two layers of a transformer encoder over token numbers, averaged over the sequence."""
    nodes: list[onnx.NodeProto] = []
    weights = {
        "table": floats(50, hidden), "split": longs(0, 0, heads, hidden // heads),
        "merged": longs(0, 0, hidden), "root": np.array((hidden / heads) ** 0.5, dtype=np.float32),
        "sequence": longs(1),
    }  # fmt: skip

    def node(op: str, inputs: list[str], out: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op, inputs, [out], name=f"{out}_node", **attributes))
        return out

    def linear(x: str, name: str, i: int, o: int) -> str:
        weights[f"{name}_w"] = floats(i, o, seed=len(weights)) / np.float32(i**0.5)
        weights[f"{name}_b"] = floats(o, seed=len(weights)) * np.float32(0.1)
        return node("Add", [node("MatMul", [x, f"{name}_w"], f"{name}_m"), f"{name}_b"], name)

    def norm(x: str, name: str) -> str:
        weights[f"{name}_g"] = 1 + floats(hidden, seed=len(weights)) * np.float32(0.1)
        weights[f"{name}_s"] = floats(hidden, seed=len(weights)) * np.float32(0.1)
        return node("LayerNormalization", [x, f"{name}_g", f"{name}_s"], name, axis=-1)

    def head(x: str, name: str, order: list[int]) -> str:
        apart = node("Reshape", [linear(x, name, hidden, hidden), "split"], f"{name}_r")
        return node("Transpose", [apart], f"{name}_t", perm=order)

    x = node("Gather", ["table", "x"], "embedded")
    for i in range(2):
        q, k, v = (
            head(x, f"{n}{i}", [0, 2, 3, 1] if n == "k" else [0, 2, 1, 3]) for n in ("q", "k", "v")
        )
        scores = node("Div", [node("MatMul", [q, k], f"qk{i}"), "root"], f"s{i}")
        mixed = node("MatMul", [node("Softmax", [scores], f"p{i}", axis=-1), v], f"a{i}")
        together = node("Transpose", [mixed], f"at{i}", perm=[0, 2, 1, 3])
        joined = node("Reshape", [together, "merged"], f"ar{i}")
        x = norm(node("Add", [linear(joined, f"o{i}", hidden, hidden), x], f"x{i}"), f"n{i}")
        wide = node("Gelu", [linear(x, f"f{i}", hidden, 2 * hidden)], f"g{i}")
        x = norm(node("Add", [linear(wide, f"h{i}", 2 * hidden, hidden), x], f"z{i}"), f"m{i}")
    node("ReduceMean", [x, "sequence"], "y", keepdims=0)
    return model(nodes, weights, ("x", TensorProto.INT64, [2, length]), [2, hidden])


def model(nodes, weights, port, out) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(*port)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def quantized(net: onnx.ModelProto, directory: Path, activations: str) -> Program:
    """`net` as ONNX Runtime's static quantiser writes it: QDQ, int8 weights per channel."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    class Batches:
        def __init__(self) -> None:
            program = Program.from_onnx(net)
            self.left = [random_inputs(program, seed) for seed in range(4)]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    onnx.save(net, directory / "float.onnx")
    logging.disable(logging.WARNING)
    try:
        quantize_static(
            directory / "float.onnx", directory / "int8.onnx", Batches(),
            quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType[activations], weight_type=QuantType.QInt8,
        )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)
    return Program.from_onnx(directory / "int8.onnx")


def test_nan_passes_through_minima_and_maxima(tmp_path: Path) -> None:
    program = text(
        """g (float[3,5] x, float[3,5] z) => (float[3,5] relu, float[3,5] least, float[3,1] top,
                                               int64[3,1] at) {
          relu = Relu(x)
          least = Min(x, z)
          top = ReduceMax(x, last)
          at = ArgMax<axis=1>(x)
        }""",
        last=longs(1),
    )  # fmt: skip
    x, z = floats(3, 5), floats(3, 5, seed=1)
    x[0, 2] = x[1, 4] = z[2, 0] = np.nan
    relu, least, top, at = interpret(program, tmp_path, {"x": x, "z": z})
    np.testing.assert_array_equal(relu, np.maximum(x, 0))
    np.testing.assert_array_equal(least, np.minimum(x, z))
    np.testing.assert_array_equal(top, x.max(1, keepdims=True))
    np.testing.assert_array_equal(at, x.argmax(1)[:, None])


@pytest.mark.parametrize("net", [cnn, encoder])
def test_float_net_equals_onnxruntime(net, tmp_path: Path) -> None:
    program = Program.from_onnx(net())
    assert_close(interpret(program, tmp_path), run_onnx(program, random_inputs(program)))


@pytest.mark.parametrize(
    ("net", "activations", "kernel"),
    [(cnn, "QInt8", "conv_int8"), (cnn, "QUInt8", "conv_int8"), (encoder, "QInt8", "gemm_int8")],
)
def test_int8_net_is_within_a_step_of_onnxruntime(net, activations, kernel, tmp_path) -> None:
    program = quantized(net(), tmp_path, activations)
    directory = tmp_path / "artifact"
    directory.mkdir()
    got = interpret(program, directory)
    assert_close(got, run_onnx(program, random_inputs(program)), 1 / 100)
    assert f"def {kernel}_" in (directory / "kernels.py").read_text()


@pytest.mark.parametrize("dtypes", [("UINT8", "INT8"), ("INT8", "UINT8")])
def test_product_of_two_integer_activations(dtypes, tmp_path: Path) -> None:
    """Zero points on both sides of a right side that is known at run time alone."""
    lowered = low.Lowered((), ())
    rng = np.random.default_rng(0)
    shapes, arrays, operands, ports = ((2, 19, 37), (2, 37, 21)), [], [], []
    for i, (shape, dtype, zero) in enumerate(zip(shapes, dtypes, (7, 100), strict=True)):
        kind = np.dtype(dtype.lower())
        info = np.iinfo(kind)
        arrays.append(rng.integers(info.min, info.max + 1, shape).astype(kind))
        buffer = low.Buffer(i, dtype, arrays[-1].size, "input", f"x{i}")
        lowered.buffers.append(buffer)
        ports.append(low.PortBuffer(f"x{i}", dtype, shape, buffer))
        quantization = low.Quantization(np.array(0.01, np.float32), np.array(zero, np.int32))
        operands.append(low.Operand(low.View(buffer, shape, low.row_major(shape)), quantization))
    out = low.Buffer(2, "FLOAT", 2 * 19 * 21, "output", "y")
    lowered.buffers.append(out)
    lowered.inputs = tuple(ports)
    lowered.outputs = (low.PortBuffer("y", "FLOAT", (2, 19, 21), out),)
    view = low.View(out, (2, 19, 21), low.row_major((2, 19, 21)))
    product = low.MatMul(
        name="0_matmul",
        nodes=("m",),
        out=view,
        epilogue=low.Accumulator("FLOAT"),
        a=operands[0],
        b=operands[1],
    )
    lowered.steps.append(product)
    plan(lowered)
    emit(lowered).write(tmp_path)
    runner = InterpretedRunner(tmp_path, 1)
    got = runner.run({"x0": arrays[0], "x1": arrays[1]})
    runner.close()
    a, b = (x.astype(np.int32) - z for x, z in zip(arrays, (7, 100), strict=True))
    assert_close(got, [((a @ b) * np.float32(0.0001)).astype(np.float32)], 1e-6)


PRODUCT = "product (float[64,64] x) => (float[64,32] y) { h = MatMul(x, w) y = Relu(h) }"


def test_cubins_are_compiled_without_a_gpu_and_reproducibly(tmp_path: Path) -> None:
    program = text(PRODUCT, w=floats(64, 32))
    written = []
    for name in ("first", "second"):
        directory = tmp_path / name
        directory.mkdir()
        info = CudaBackend().lower(program, Target("cuda"), directory)
        assert info["precompiled"]
        files = sorted(p for p in directory.rglob("*") if p.is_file())
        written.append({str(p.relative_to(directory)): p.read_bytes() for p in files})
    assert written[0] == written[1]
    cubins = [name for name in written[0] if name.endswith(".cubin")]
    assert len(cubins) == 1
    assert written[0][cubins[0]].startswith(b"\x7fELF")
    about = json.loads(written[0][cubins[0].replace(".cubin", ".json")])
    assert about["arch"] == 90
    assert about["signature"] == {"a": "*fp32", "b": "*fp32", "out": "*fp32"}
    assert about["block"] == [about["num_warps"] * 32, 1, 1]
    assert about["shared_bytes"] > 0


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_compiles_for_hopper(name: str, tmp_path: Path) -> None:
    info = CudaBackend().lower(TEMPLATES[name](), Target("cuda"), tmp_path)
    assert len(list(tmp_path.glob("cubins/*.cubin"))) == info["specialisations"]


def test_integer_convolution_compiles_for_hopper(tmp_path: Path) -> None:
    program = quantized(cnn(), tmp_path, "QInt8")
    directory = tmp_path / "artifact"
    directory.mkdir()
    CudaBackend().lower(program, Target("cuda"), directory)
    assert list(directory.glob("cubins/conv_int8_*.cubin"))


def test_a_failing_kernel_names_the_remedy(tmp_path: Path) -> None:
    from optcompiler.lowering import lower
    from optcompiler_cuda.precompile import precompile

    emitted = emit(lower(text(PRODUCT, w=floats(64, 32))))
    broken = emitted.source.replace("tl.dot(", "tl.no_such_function(")
    replace(emitted, source=broken).write(tmp_path)
    with pytest.raises(ToolchainError, match=r"(?s)no_such_function.*precompile=0"):
        precompile(tmp_path, 90)


def test_steps_that_differ_in_sizes_alone_share_a_function() -> None:
    program = text(
        """two (float[32,64] x) => (float[32,32] y)
        { h = MatMul(x, w) r = Relu(h) g = MatMul(r, v) y = Relu(g) }""",
        w=floats(64, 64), v=floats(64, 32),
    )  # fmt: skip
    from optcompiler.lowering import lower

    emitted = emit(lower(program))
    assert emitted.source.count("@triton.jit") == 2  # one is what Relu calls
    assert len({s.function for s in emitted.schedule.specialisations}) == 1
    assert len(emitted.schedule.launches) == 2
    assert len(emitted.schedule.specialisations) == 2


def test_golden_kernels() -> None:
    from optcompiler.lowering import lower

    program = text(
        """golden (float[2,3,9,9] x) => (float[2,5] y) {
          qx = QuantizeLinear(x, s, z)
          dx = DequantizeLinear(qx, s, z)
          dw = DequantizeLinear<axis=0>(w, ws, wz)
          c = Conv<pads=[1,1,1,1],strides=[2,2]>(dx, dw)
          r = Relu(c)
          qr = QuantizeLinear(r, s, z)
          dr = DequantizeLinear(qr, s, z)
          p = GlobalAveragePool(dr)
          f = Flatten(p)
          m = MatMul(f, v)
          y = Softmax<axis=-1>(m)
        }""",
        s=np.array(0.05, dtype=np.float32), z=np.array(-4, dtype=np.int8),
        w=np.arange(216, dtype=np.int8).reshape(8, 3, 3, 3), ws=np.full(8, 0.01, np.float32),
        wz=np.zeros(8, np.int8), v=floats(8, 5),
    )  # fmt: skip
    source = emit(lower(program)).source
    if os.environ.get(UPDATE) == "1":
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(source)
    assert source == GOLDEN.read_text(), f"run with {UPDATE}=1 and review the difference"


def test_without_a_gpu_integers_are_predicted_faster_and_nothing_is_timed(tmp_path: Path) -> None:
    from optcompiler.backend import Kernel
    from optcompiler.cost import RooflineCostModel

    assert not InterpretedRunner.timed
    profile = CudaBackend().nominal_profile(Target("cuda"))
    assert profile is not None
    assert profile.estimated
    float_us, int8_us = (
        RooflineCostModel().kernel_us(Kernel("k", "gemm", dtype, (), macs=10**9), profile)
        for dtype in ("fp32", "int8")
    )
    assert int8_us < float_us / 2


def test_without_a_gpu_loading_says_what_to_do(tmp_path: Path, monkeypatch) -> None:
    import torch

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    info = CudaBackend().lower(
        text(PRODUCT, w=floats(64, 32)), Target("cuda", precompile=0), tmp_path
    )
    with pytest.raises(ToolchainError, match="TRITON_INTERPRET=1"):
        CudaBackend().load(tmp_path, info, threads=1)


def test_without_triton_lowering_says_how_to_install_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ToolchainError, match=r"pip install optcompiler\[cuda\]"):
        CudaBackend().lower(text(PRODUCT, w=floats(64, 32)), Target("cuda"), tmp_path)


@pytest.mark.parametrize("options", [{"isa": "avx2"}, {"precompile": "yes"}, {"arch": "hopper"}])
def test_unknown_options_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        CudaBackend().capabilities(Target("cuda", **options))


def test_importing_the_plugin_imports_neither_torch_nor_triton() -> None:
    code = (
        "import sys, optcompiler_cuda as c; (b,) = c.optcompiler_backends(); "
        "assert b.name == 'cuda'; assert not {'torch', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
