from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from optcompiler.errors import InputError, UnsupportedOperatorError
from optcompiler.program import SOURCE_KEY, Program
from optcompiler.target import Target
from optcompiler_onnxruntime.backend import OnnxRuntimeBackend
from optcompiler_onnxruntime.kernels import kernels_of
from tests.support import assert_close, filled_program, random_inputs, run_onnx

TARGET = Target("onnxruntime", threads=1)


def ones(count: int, value: object = 1) -> str:
    return ", ".join([str(value)] * count)


WEIGHTS = f"""float s = {{0.05}}, uint8 z = {{128}}, float s0 = {{0.02}}, uint8 z0 = {{0}},
 int8[8, 8, 1, 1] wc = {{{ones(64)}}}, int8[8, 8] wm = {{{ones(64)}}},
 float[8] ws = {{{ones(8, 0.01)}}}, int8[8] wz = {{{ones(8, 0)}}}, int32[8] bq = {{{ones(8)}}},
 float[8] bs = {{{ones(8, 0.0005)}}}, float low = {{0.0}}, float high = {{6.0}},
 int64[4] same = {{1, 8, 8, 8}}, float[8] bf = {{{ones(8)}}}, bool on = {{1}}"""
DATA = """q0 = QuantizeLinear (x0, s, z) d0 = DequantizeLinear (q0, s, z)
  q1 = QuantizeLinear (x1, s, z) d1 = DequantizeLinear (q1, s, z)"""
CONV = """w = DequantizeLinear <axis = 0> (wc, ws, wz) b = DequantizeLinear <axis = 0> (bq, bs)
  [op] c = Conv (d0, w, b)"""
MATMUL = """w = DequantizeLinear <axis = 1> (wm, ws, wz) b = DequantizeLinear <axis = 0> (bq, bs)
  [op] m = MatMul (d0, w)"""
END = "yq = QuantizeLinear (t, s0, z0) y = DequantizeLinear (yq, s0, z0)"


def quantized(nodes: str, shape: str = "1, 8, 8, 8", output: str | None = None) -> Program:
    return Program.from_text(
        f"""<ir_version: 10, opset_import: ["": 20]>
agraph (float[{shape}] x0, float[{shape}] x1) => (float[{output or shape}] y)
<{WEIGHTS}> {{
  {DATA}
  {nodes}
}}
"""
    )


PATTERNS = {
    "conv": (f"{CONV} {END}".replace("(t,", "(c,"), True),
    "conv relu": (f"{CONV} t = Relu (c) {END}", True),
    "conv clip": (f"{CONV} t = Clip (c, low, high) {END}", True),
    "conv sigmoid": (f"{CONV} t = Sigmoid (c) {END}", False),
    "conv to float": (f"{CONV} y = Relu (c)", False),
    "matmul to float": (f"{MATMUL} y = Add (m, b)", True),
    "matmul bias": (f"{MATMUL} t = Add (m, b) {END}", True),
    "matmul gelu": (f"{MATMUL} a = Add (m, b) y = Gelu (a)", True),
    "matmul of a transposed weight": (
        f"wt = Transpose (wm) {MATMUL.replace('(wm', '(wt')} y = Add (m, b)", True,
    ),
    "matmul of activations": (f"[op] t = MatMul (d0, d1) {END}", True),
    "add": (f"[op] t = Add (d0, d1) {END}", True),
    "mul": (f"[op] t = Mul (d0, d1) {END}", True),
    "sub": (f"[op] t = Sub (d0, d1) {END}", False),
    "average pool": (
        f"[op] t = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (d0) {END}", True,
    ),
    "sigmoid": (f"[op] t = Sigmoid (d0) {END}", True),
    "tanh": (f"[op] t = Tanh (d0) {END}", False),
    "softmax": (f"[op] t = Softmax (d0) {END}", True),
    "leaky relu": (f"[op] t = LeakyRelu (d0) {END}", True),
}  # fmt: skip


def optimized_types(program: Program, directory: Path) -> list[str]:
    OnnxRuntimeBackend().lower(program, TARGET, directory)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(directory / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(directory / "model.onnx"), options)
    return [n.op_type for n in onnx.load(directory / "optimized.onnx").graph.node]


@pytest.mark.parametrize(("nodes", "integer"), PATTERNS.values(), ids=PATTERNS)
def test_predicted_integer_kernels_are_those_that_onnxruntime_makes(
    nodes: str, integer: bool, tmp_path: Path
):
    program = quantized(nodes)
    kernel = next(k for k in kernels_of(program) if "op" in k.nodes)
    assert (kernel.dtype == "int8") == integer
    made = {
        t
        for t in optimized_types(program, tmp_path)
        if t not in ("QuantizeLinear", "DequantizeLinear")
    }
    assert any(t.startswith(("QLinear", "QGemm", "MatMulInteger")) for t in made) == integer


def test_weights_without_zero_points_still_make_integer_kernels(tmp_path: Path):
    nodes = MATMUL.replace("(wm, ws, wz)", "(wm, ws)") + f" t = Add (m, b) {END}"
    assert "QGemm" in optimized_types(quantized(nodes), tmp_path)


SHARED = f"""{CONV} t = Relu (c) yq = QuantizeLinear (t, s, z) d = DequantizeLinear (yq, s, z)
  w2 = DequantizeLinear <axis = 0> (wc2, ws, wz) y = Conv (d, w2)"""


@pytest.mark.parametrize("second", ["wc", "wc2"])
def test_shared_weights_and_zero_points_run_everywhere(second: str, tmp_path: Path):
    text = f"int8[8, 8, 1, 1] wc2 = {{{ones(64, 2)}}}, "
    program = Program.from_text(
        f"""<ir_version: 10, opset_import: ["": 20]>
agraph (float[1, 8, 8, 8] x0, float[1, 8, 8, 8] x1) => (float[1, 8, 8, 8] y)
<{text}{WEIGHTS}> {{
  {DATA}
  {SHARED.replace("wc2", second)}
}}
"""
    )
    backend = OnnxRuntimeBackend()
    runner = backend.load(tmp_path, backend.lower(program, TARGET, tmp_path), threads=1)
    inputs = random_inputs(program, 3)
    assert_close(runner.run(inputs), run_onnx(program, inputs), 1e-3)


def test_kernels_count_work_and_bytes():
    program = quantized(f"{CONV} t = Relu (c) {END}")
    [quantize, conv, dequantize] = kernels_of(program)
    assert (conv.name, conv.kind, conv.dtype) == ("op", "conv", "int8")
    assert conv.macs == 8 * 8 * 64
    assert conv.bytes_moved == 2 * 8 * 64
    assert conv.weight_bytes >= 64 + 8 * 4
    assert (quantize.kind, quantize.bytes_moved) == ("pointwise", (4 + 1) * 8 * 64)
    assert (dequantize.kind, dequantize.bytes_moved) == ("pointwise", (1 + 4) * 8 * 64)


FLOAT = """<ir_version: 10, opset_import: ["": 20]>
agraph (float[2, 4] x) => (float[2, 2, 2] y)
<float[4, 4] w = {1, -1, 0, 2, 3, 1, -2, 0, 0, 1, 1, -1, 2, 2, 0, 1}, float[4] b = {1, 2, 3, 4},
 int64[3] shape = {2, 2, 2}> {
  [mm] m = MatMul (x, w)
  [bias] a = Add (m, b)
  [relu] r = Relu (a)
  [view] y = Reshape (r, shape)
}
"""


def test_float_fusions_and_views():
    kernels = kernels_of(Program.from_text(FLOAT))
    assert [(k.name, k.nodes) for k in kernels] == [
        ("mm", ("mm", "bias", "relu")),
        ("view", ("view",)),
    ]
    assert kernels[0].macs == 2 * 4 * 4
    assert kernels[0].shape == (2, 4, 4)
    assert (kernels[1].kind, kernels[1].bytes_moved) == ("movement", 0)


def test_lower_writes_equal_bytes_and_runs(tmp_path: Path):
    backend = OnnxRuntimeBackend()
    program = Program.from_text(FLOAT)
    program.graph[0].metadata_props.update({SOURCE_KEY: "net.fc", "other": "gone"})
    program.model.doc_string = "gone"
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        info = backend.lower(program, TARGET, tmp_path / name)
        contents.append((tmp_path / name / "model.onnx").read_bytes())
    assert contents[0] == contents[1]
    assert info["external_data"] is None
    model = onnx.load(tmp_path / "one" / "model.onnx")
    assert [p.value for n in model.graph.node for p in n.metadata_props] == ["net.fc"]
    assert model.doc_string == ""
    runner = backend.load(tmp_path / "one", info, threads=1)
    inputs = random_inputs(program)
    assert_close(runner.run(inputs), run_onnx(program, inputs), 1e-6)
    times = runner.kernel_times_us(inputs)
    assert times
    assert "mm" in times
    runner.close()
    runner.close()
    with pytest.raises(InputError, match="closed"):
        runner.run(inputs)


def test_fused_functions_are_inlined(tmp_path: Path):
    from optcompiler_passes.fuse_operators import FuseOperators
    from tests.support import apply_all

    program, _ = apply_all(FuseOperators(), Program.from_text(FLOAT))
    assert program.functions
    info = OnnxRuntimeBackend().lower(program, TARGET, tmp_path)
    model = onnx.load(tmp_path / str(info["model"]))
    assert not model.functions
    assert [o.domain for o in model.opset_import] == [""]
    kernels = OnnxRuntimeBackend().kernels(program, TARGET)
    assert [k.macs for k in kernels] == [k.macs for k in kernels_of(Program.from_text(FLOAT))]


@pytest.mark.parametrize(
    ("program", "step"),
    [(Program.from_text(FLOAT), 1e-5), (quantized(PATTERNS["conv relu"][0]), 0.0201)],
)
def test_openvino_loads_it_too(program: Program, step: float, tmp_path: Path):
    openvino = pytest.importorskip("openvino")
    OnnxRuntimeBackend().lower(program, TARGET, tmp_path)
    model = openvino.Core().compile_model(
        str(tmp_path / "model.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    inputs = random_inputs(program)
    found = model([inputs[p.name] for p in program.inputs])
    assert float(np.abs(found[0] - run_onnx(program, inputs)[0]).max()) <= step


def test_integer_movement_is_predicted_as_such():
    program = quantized(
        "[op] r = Reshape (q0, flat) y = DequantizeLinear (r, s, z)".replace("flat", "same")
    )
    kernel = next(k for k in kernels_of(program) if k.name == "op")
    assert (kernel.kind, kernel.dtype) == ("movement", "int8")


@pytest.mark.parametrize("dtype", ["uint4", "int4", "float8e4m3fn", "int8"])
@pytest.mark.parametrize("activation", ["Relu (c)", "Clip (c, low, high)", "Clip (c, , high)"])
def test_bounds_hold_before_quantisers_of_few_bits(dtype: str, activation: str, tmp_path: Path):
    zero = "0" if dtype == "float8e4m3fn" else "3"
    program = filled_program(
        f"""<ir_version: 10, opset_import: ["": 21]>
        g (float[1,3,5,5] x) => (float[1,4,5,5] y)
        <float[4,3,3,3] w, float s = {{0.2}}, {dtype} z = {{{zero}}}, float low = {{0.5}},
         float high = {{0.9}}> {{
          c = Conv<pads = [1,1,1,1]>(x, w)
          [bounded] t = {activation}
          q = QuantizeLinear(t, s, z)
          y = DequantizeLinear(q, s, z)
        }}"""
    )
    info = OnnxRuntimeBackend().lower(program, TARGET, tmp_path)
    runner = OnnxRuntimeBackend().load(tmp_path, info, threads=1)
    inputs = random_inputs(program, 0)
    assert_close(runner.run(inputs), run_onnx(program, inputs))
    runner.close()
    written = onnx.load(tmp_path / "model.onnx").graph.node
    [bounded] = [n.op_type for n in written if n.name == "bounded"]
    changed = {"R": "Max", "Clip (c, l": "Min", "Clip (c, ,": "Min"}
    wanted = next(v for k, v in changed.items() if activation.startswith(k))
    assert bounded == (activation.split()[0] if dtype == "int8" else wanted)


def test_weights_of_bytes_are_told_to_the_runner(tmp_path: Path):
    text = """<ir_version: 10, opset_import: ["": 21]>
    g (float[2,4] x) => (float[2,3] y)
    <int8[4,3] q = {1,2,3,4,5,6,7,8,9,10,11,12}, float[3] s = {0.1,0.2,0.3}, int8[3] z = {0,0,0}> {
      w = DequantizeLinear<axis = 1>(q, s, z)
      y = MatMul(x, w)
    }"""
    for dtype, wanted in (("int8", True), ("int4", False)):
        program = Program.from_text(
            text.replace("int8", dtype).replace("8,9,10,11,12", "7,6,5,4,3")
        )
        directory = tmp_path / dtype
        directory.mkdir()
        info = OnnxRuntimeBackend().lower(program, TARGET, directory)
        assert info["weights_of_bytes"] is wanted
        runner = OnnxRuntimeBackend().load(directory, info, threads=1)
        inputs = random_inputs(program, 0)
        assert_close(runner.run(inputs), run_onnx(program, inputs), 0.02)
        runner.close()


def test_large_weights_go_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("optcompiler_onnxruntime.backend.EXTERNAL_ABOVE_BYTES", 100)
    monkeypatch.setattr("optcompiler_onnxruntime.backend.EXTERNAL_TENSOR_BYTES", 16)
    program = Program.from_text(
        """<ir_version: 10, opset_import: ["": 20]>
agraph (float[2, 32] x) => (float[2, 32] y) <float[32, 32] w = {WEIGHTS}> { y = MatMul (x, w) }
""".replace("WEIGHTS", ones(1024, 0.5))
    )
    info = OnnxRuntimeBackend().lower(program, TARGET, tmp_path)
    assert info["external_data"] == "model.onnx.data"
    assert (tmp_path / "model.onnx.data").stat().st_size >= 4096
    runner = OnnxRuntimeBackend().load(tmp_path, info, threads=1)
    inputs = random_inputs(program)
    assert_close(runner.run(inputs), run_onnx(program, inputs), 1e-6)


def test_dynamic_shapes_run(tmp_path: Path):
    program = Program.from_text(
        """<ir_version: 10, opset_import: ["": 20]>
agraph (float[n, 4] x) => (float[n, 4] y) { y = Relu (x) }"""
    )
    info = OnnxRuntimeBackend().lower(program, TARGET, tmp_path)
    runner = OnnxRuntimeBackend().load(tmp_path, info, threads=1)
    for n in (1, 5):
        [y] = runner.run({"x": -np.ones((n, 4), np.float32)})
        assert y.shape == (n, 4)


def test_foreign_operators_and_options_are_refused(tmp_path: Path):
    program = Program.from_text(FLOAT)
    program.graph[2].domain = "acme"
    program.graph.opset_imports["acme"] = 1
    with pytest.raises(UnsupportedOperatorError, match="acme::Relu of node 'relu'"):
        OnnxRuntimeBackend().lower(program, TARGET, tmp_path)
    with pytest.raises(InputError, match="no option 'isa'"):
        OnnxRuntimeBackend().capabilities(Target("onnxruntime", isa="avx2"))


def test_an_operator_without_a_kernel_is_unsupported(tmp_path: Path):
    program = Program.from_text(
        """<ir_version: 10, opset_import: ["": 20]>
agraph (bfloat16[2] x) => (bfloat16[2] y) { y = Relu (x) }"""
    )
    with pytest.raises(UnsupportedOperatorError, match="'x' is bfloat16"):
        OnnxRuntimeBackend().lower(program, TARGET, tmp_path)
    inside = Program.from_text(
        """<ir_version: 10, opset_import: ["": 20]>
agraph (float[2] x) => (float[2] y) {
  b = Cast <to = 16> (x)
  r = Relu (b)
  y = Cast <to = 1> (r)
}"""
    )
    info = OnnxRuntimeBackend().lower(inside, TARGET, tmp_path)
    with pytest.raises(UnsupportedOperatorError, match="has no kernel"):
        OnnxRuntimeBackend().load(tmp_path, info, threads=1)


def test_a_damaged_file_is_bad_input(tmp_path: Path):
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(InputError, match=r"model\.onnx: truncated"):
        OnnxRuntimeBackend().load(tmp_path, {"model": "model.onnx"}, threads=1)


def test_loading_and_running_import_no_torch(tmp_path: Path):
    info = OnnxRuntimeBackend().lower(Program.from_text(FLOAT), TARGET, tmp_path)
    code = f"""
import sys, numpy, pathlib
from optcompiler_onnxruntime.backend import OnnxRuntimeBackend
assert "onnxruntime" not in sys.modules
runner = OnnxRuntimeBackend().load(pathlib.Path({str(tmp_path)!r}), {dict(info)!r}, threads=1)
print(runner.run({{"x": numpy.ones((2, 4), numpy.float32)}})[0].shape, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "(2, 2, 2) False"
