"""Lowering: its result, interpreted in numpy, agrees with ONNX Runtime; fusion, memory, errors."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from optcompiler.errors import InputError, UnsupportedOperatorError
from optcompiler.lowering import kernels_of, lower
from optcompiler.lowering.build import view_array, whole
from optcompiler.lowering.expressions import OPERATIONS, POINTWISE
from optcompiler.lowering.ir import (
    Accumulator,
    Buffer,
    Call,
    Const,
    Conv,
    Dequantize,
    Expr,
    Index,
    Load,
    Loop,
    Lowered,
    MatMul,
    Normalization,
    Quantize,
    Reduction,
    Softmax,
    Step,
    View,
    loads,
    row_major,
    walk,
)
from optcompiler.program import Program
from tests.support import NUMPY_TYPES, assert_close, random_inputs, run_onnx

HEAD = '<ir_version: 10, opset_import: ["": 21, "optcompiler.fused": 1]> g '


def program(body: str, **weights: np.ndarray | tuple[int, ...]) -> Program:
    model = onnx.parser.parse_model(HEAD + body)
    rng = np.random.default_rng(0)
    for name, value in weights.items():
        array = value if isinstance(value, np.ndarray) else rng.standard_normal(value, np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Program.from_onnx(model)


class Interpreter:
    """Runs a lowered program with numpy, temporaries in the planned arena."""

    def __init__(self, lowered: Lowered) -> None:
        self.lowered = lowered
        self.arena = np.full(lowered.arena_bytes + 64, 0xA5, np.uint8)
        self.memory: dict[int, np.ndarray] = {}

    def run(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        for port in self.lowered.inputs:
            self.memory[port.buffer.index] = inputs[port.name].reshape(-1)
        for step in self.lowered.steps:
            self.step(step)
        return [self.data(p.buffer).reshape(p.shape).copy() for p in self.lowered.outputs]

    def data(self, buffer: Buffer) -> np.ndarray:
        if buffer.array is not None:
            return buffer.array.reshape(-1)
        if buffer.index not in self.memory:
            dtype = np.dtype(NUMPY_TYPES[buffer.dtype])
            if buffer.kind == "temp":
                assert buffer.offset % 64 == 0
                room = self.arena[buffer.offset : buffer.offset + buffer.size_bytes]
                self.memory[buffer.index] = room.view(dtype)
            else:
                self.memory[buffer.index] = np.zeros(buffer.elements, dtype)
        return self.memory[buffer.index]

    def at(self, view: View) -> np.ndarray:
        data = self.data(view.buffer)[view.offset :]
        strides = tuple(s * data.itemsize for s in view.strides)
        return np.lib.stride_tricks.as_strided(data, view.shape, strides)

    def step(self, step: Step) -> None:
        acc: Any = None
        shape = step.out.shape
        match step:
            case MatMul() | Conv():
                acc = self.contraction(step)
            case Softmax():
                x = self.value(step.value, shape, None)
                e = np.exp(x - x.max(axis=step.axis, keepdims=True))
                acc = e / e.sum(axis=step.axis, keepdims=True)
            case Normalization():
                x = self.value(step.value, shape, None)
                axes = tuple(range(step.axis, len(shape)))
                d = x - x.mean(axis=axes, keepdims=True)
                acc = d / np.sqrt((d * d).mean(axis=axes, keepdims=True) + step.epsilon)
            case Reduction():
                x = self.value(step.value, step.space, None)
                call = {"sum": np.sum, "mean": np.mean, "max": np.max, "min": np.min}[step.op]
                acc = call(np.broadcast_to(x, step.space), axis=step.axes, keepdims=True)
            case Loop():
                pass
            case _:
                raise AssertionError(step)
        result = np.broadcast_to(self.value(step.epilogue, shape, acc), shape).copy()
        self.at(step.out)[...] = result

    def contraction(self, step: MatMul | Conv) -> np.ndarray:
        a, b = (self.at(o.view).astype(np.float64) for o in (step.a, step.b))
        scale: Any = 1.0
        tail = (1,) * (2 if isinstance(step, Conv) else 0)
        if step.a.quantization is not None and step.b.quantization is not None:
            a = a - step.a.quantization.zero_point
            scale = step.a.quantization.scale * step.b.quantization.scale
            scale = scale.reshape(-1, *tail) if scale.ndim else scale
        if isinstance(step, Conv):
            total = self.convolve(step, a, b)
        else:
            total = a @ b
        if step.bias is not None:
            total = total + step.bias.reshape(-1, *tail)
        return (total * scale).astype(np.float32)

    @staticmethod
    def convolve(step: Conv, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        top, left, bottom, right = step.pads
        a = np.pad(a, ((0, 0), (0, 0), (top, bottom), (left, right)))
        result = np.zeros(step.out.shape)
        _, oc, oh, ow = step.out.shape
        each, group = oc // step.groups, b.shape[1]
        for c in range(oc):
            first = c // each * group
            for y, x in np.ndindex(oh, ow):
                y0, x0 = y * step.strides[0], x * step.strides[1]
                rows = slice(y0, y0 + (b.shape[2] - 1) * step.dilations[0] + 1, step.dilations[0])
                cols = slice(x0, x0 + (b.shape[3] - 1) * step.dilations[1] + 1, step.dilations[1])
                window = a[:, first : first + group, rows, cols]
                result[:, c, y, x] = (window * b[c]).sum(axis=(1, 2, 3))
        return result

    def value(self, expr: Expr, shape: tuple[int, ...], acc: Any) -> Any:
        match expr:
            case Accumulator():
                return acc
            case Load():
                assert expr.view.shape == shape
                return self.at(expr.view)
            case Const():
                return np.array(expr.value, NUMPY_TYPES[expr.dtype])
            case Index():
                return np.indices(shape)[expr.axis]
            case Quantize():
                x, s, z = (
                    self.value(e, shape, acc) for e in (expr.arg, expr.scale, expr.zero_point)
                )
                info = np.iinfo(NUMPY_TYPES[expr.dtype])
                level = np.rint(x / s) + z.astype(np.float64)
                return np.clip(level, info.min, info.max).astype(info.dtype)
            case Dequantize():
                q, s, z = (
                    self.value(e, shape, acc) for e in (expr.arg, expr.scale, expr.zero_point)
                )
                return ((q.astype(np.float64) - z) * s).astype(np.float32)
            case Call():
                args = [self.value(e, shape, acc) for e in expr.args]
                return CALLS[expr.op](*args).astype(NUMPY_TYPES[expr.dtype])
            case _:
                raise AssertionError(expr)


CALLS: dict[str, Any] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.maximum,
    "min": np.minimum, "cast": lambda x: x, "tanh": np.tanh, "exp": np.exp, "sqrt": np.sqrt,
    "erf": np.vectorize(math.erf, otypes=[np.float32]), "isnan": np.isnan, "where": np.where,
    "gelu": lambda x: x / 2 * (1 + CALLS["erf"](x / math.sqrt(2))),
    "lt": np.less, "ge": np.greater_equal, "le": np.less_equal, "and": np.logical_and,
}  # fmt: skip


def check(source: Program, rtol: float = 1e-5) -> Lowered:
    lowered = lower(source)
    inputs = random_inputs(source, 2)
    assert_close(Interpreter(lowered).run(inputs), run_onnx(source, inputs), rtol)
    return lowered


def kinds(lowered: Lowered) -> list[str]:
    return [type(s).__name__ for s in lowered.steps]


def test_a_residual_block_is_its_convolutions() -> None:
    source = program(
        """(float[1, 3, 6, 5] x) => (float[1, 4, 6, 5] y) {
            c = Conv<pads = [1, 1, 1, 1]>(x, w0, b0)
            r = Relu(c)
            d = Conv<pads = [1, 1, 1, 1]>(r, w1, b0)
            s = Conv(x, w2)
            a = Add(d, s)
            z = Relu(a)
            y = Conv(z, w3)
        }""",
        w0=(4, 3, 3, 3), b0=(4,), w1=(4, 4, 3, 3), w2=(4, 3, 1, 1), w3=(4, 4, 1, 1),
    )  # fmt: skip
    lowered = check(source)
    assert kinds(lowered) == ["Loop", "Conv", "Conv", "Conv", "Conv", "Loop"]
    nodes = [s.nodes for s in lowered.steps if isinstance(s, Conv)]
    assert [len(n) for n in nodes] == [2, 1, 3, 1]


def test_attention_moves_nothing() -> None:
    source = program(
        """(float[1, 6, 8] x, bool[1, 1, 1, 6] mask) => (float[1, 6, 8] y) {
            q = MatMul(x, wq)
            k = MatMul(x, wk)
            v = MatMul(x, wv)
            qs = Reshape(q, heads)
            ks = Reshape(k, heads)
            vs = Reshape(v, heads)
            qt = Transpose<perm = [0, 2, 1, 3]>(qs)
            kt = Transpose<perm = [0, 2, 3, 1]>(ks)
            vt = Transpose<perm = [0, 2, 1, 3]>(vs)
            d = MatMul(qt, kt)
            dm = Where(mask, d, low)
            p = Softmax(dm)
            n = IsNaN(p)
            pp = Where(n, zero, p)
            o = MatMul(pp, vt)
            ot = Transpose<perm = [0, 2, 1, 3]>(o)
            oo = Reshape(ot, merged)
            r = Add(oo, x)
            l = LayerNormalization(r, one, one)
            g = Gelu(l)
            y = Tanh(g)
        }""",
        wq=(8, 8), wk=(8, 8), wv=(8, 8), one=(8,), heads=np.array([1, 6, 2, 4]),
        low=np.array(-1e9, np.float32), zero=np.array(0, np.float32), merged=np.array([1, 6, 8]),
    )  # fmt: skip
    lowered = check(source)
    assert kinds(lowered) == [*["MatMul"] * 4, "Softmax", "MatMul", "Loop", "Normalization"]


INTEGER = """(float[1, 3, 5, 5] x) => (uint8[1, 4, 5, 5] y) {
    q = QuantizeLinear(x, sx, zx)
    d = DequantizeLinear(q, sx, zx)
    wd = DequantizeLinear<axis = 0>(w, sw, zw)
    bd = DequantizeLinear<axis = 0>(b, sb)
    c = Conv<pads = [1, 1, 1, 1]>(d, wd, bd)
    r = Relu(c)
    y = QuantizeLinear(r, sy, zx)
}"""
CONSTANTS = {
    "sx": np.array(0.02, np.float32), "zx": np.array(128, np.uint8),
    "w": np.random.default_rng(0).integers(-127, 128, (4, 3, 3, 3)).astype(np.int8),
    "sw": np.array([0.5, 0.25, 0.125, 1], np.float32) / 64, "zw": np.zeros(4, np.int8),
    "b": np.array([100, -50, 0, 7], np.int32), "sy": np.array(0.03, np.float32),
}  # fmt: skip


GELU = """half = Mul(half_, x) cube = Pow(x, three) small = Mul(cube, c) inner = Add(x, small)
    scaled = Mul(inner, root) bell = Tanh(scaled) up = Add(bell, one) g = Mul(half, up)"""
GELU_CONSTANTS = {
    "half_": np.array(0.5, np.float32), "three": np.array(3, np.float32),
    "c": np.array(0.044715, np.float32), "root": np.array(math.sqrt(2 / math.pi), np.float32),
    "one": np.array(1, np.float32),
}  # fmt: skip


def once(lowered: Lowered, op: str) -> bool:
    """Whether one step alone computes `op`, and once an element."""
    found = [e for s in lowered.steps for e in walk(s.epilogue) if isinstance(e, Call)]
    return sum(e.op == op for e in found) == 1


@pytest.mark.parametrize("text", [GELU, GELU.replace("half = Mul(half_, x)", "").replace(
    "g = Mul(half, up)", "half = Mul(half_, x) g = Mul(half, up)"
)])  # fmt: skip
def test_what_an_operand_is_used_for_several_times_is_one_loop(text: str) -> None:
    body = f"(float[3, 40] x) => (float[3, 40] g) {{ {text} }}"
    lowered = check(program(body, **GELU_CONSTANTS))
    assert kinds(lowered) == ["Loop"]
    assert len(lowered.steps[0].nodes) == 8
    assert once(lowered, "tanh")
    assert len(list(loads(lowered.steps[0].epilogue))) == 1


def test_a_product_fuses_what_follows_a_change_of_shape() -> None:
    source = program(
        f"""(float[1, 6, 8] data, float[1, 6, 4] residual) => (float[1, 6, 4] y) {{
            rows = Reshape(data, flat)
            m = Gemm(rows, w, b)
            x = Reshape(m, deep)
            {GELU}
            scaled_ = Mul(g, per_channel)
            wide = Reshape(scaled_, flat4)
            tall = Unsqueeze(wide, zero)
            y = Add(residual, tall)
        }}""",
        w=(8, 4), b=(4,), per_channel=(4,), flat=np.array([6, 8]), deep=np.array([1, 6, 4]),
        flat4=np.array([6, 4]), zero=np.array([0]), **GELU_CONSTANTS,
    )  # fmt: skip
    lowered = check(source)
    assert kinds(lowered) == ["MatMul"]
    assert once(lowered, "tanh")


def test_integers_leave_a_product_through_a_change_of_shape() -> None:
    source = program(
        f"""(float[6, 8] data) => (uint8[3, 2, 4] y) {{
            q = QuantizeLinear(data, s, z) d = DequantizeLinear(q, s, z)
            wd = DequantizeLinear<axis = 1>(w, sw)
            m = Gemm(d, wd)
            x = Reshape(m, deep)
            {GELU}
            y = QuantizeLinear(g, s, z)
        }}""",
        s=np.array(0.02, np.float32), z=np.array(100, np.uint8), deep=np.array([3, 2, 4]),
        w=np.random.default_rng(1).integers(-99, 99, (8, 4)).astype(np.int8),
        sw=np.array([0.02, 0.01, 0.03, 0.005], np.float32), **GELU_CONSTANTS,
    )  # fmt: skip
    lowered, inputs = lower(source), random_inputs(source, 2)
    got, want = Interpreter(lowered).run(inputs)[0], run_onnx(source, inputs)[0]
    assert np.abs(got.astype(int) - want.astype(int)).max() <= 1
    assert kinds(lowered) == ["Loop", "MatMul"]
    assert lowered.steps[1].out.dtype == "UINT8"


@pytest.mark.parametrize(
    ("operand", "steps"),
    [
        ("float[2, 3, 4] z", ["MatMul"]),
        ("float[4] z", ["MatMul"]),
        ("float[2, 1, 1] z", ["MatMul", "Loop"]),  # no stride says which third of the rows it is
        ("float[5, 2, 3, 4] z", ["MatMul", "Loop"]),
    ],
)
def test_an_operand_of_another_shape_is_read_where_strides_can_say_it(
    operand: str, steps: list[str]
) -> None:
    shape = "5, 2, 3, 4" if "5" in operand else "2, 3, 4"
    source = program(
        f"""(float[6, 8] data, {operand}) => (float[{shape}] y) {{
            m = MatMul(data, w) x = Reshape(m, deep) y = Add(x, z)
        }}""",
        w=(8, 4), deep=np.array([2, 3, 4]),
    )  # fmt: skip
    assert kinds(check(source)) == steps


def test_an_operand_that_lies_otherwise_is_copied() -> None:
    source = program(
        """(float[6, 8] data, float[4, 3, 2] z) => (float[2, 3, 4] y) {
            m = MatMul(data, w) x = Reshape(m, deep) t = Transpose(z) y = Add(x, t)
        }""",
        w=(8, 4), deep=np.array([2, 3, 4]),
    )  # fmt: skip
    assert kinds(check(source)) == ["Loop", "MatMul"]


def test_what_waits_for_a_kernel_is_left_to_it() -> None:
    source = program(
        """(float[6, 6] x) => (float[6, 6] y) {
            d = Mul(x, x) m = MatMul(x, w) g = Tanh(m) y = Add(d, g)
        }""",
        w=(6, 6),
    )
    lowered = check(source)
    assert kinds(lowered) == ["MatMul", "Loop"]
    assert len(lowered.steps[0].nodes) == 2


def test_what_is_read_elsewhere_is_a_step_of_its_own() -> None:
    source = program(
        """(float[6, 6] x) => (float[6, 6] y, float[6] z) {
            d = Mul(x, x) e = Exp(x) g = Tanh(e) y = Add(d, g) z = ReduceMax<keepdims = 0>(e, axes)
        }""",
        axes=np.array([1]),
    )
    assert kinds(check(source)) == ["Loop", "Loop", "Reduction"]


def test_integers_that_vectors_cannot_add_stay_out_of_a_loop_of_floats() -> None:
    source = program(
        """(float[6, 6] x, int64[6, 6] i, int64[6, 6] j) => (float[6, 6] y) {
            d = Mul(x, x) k = Add(i, j) c = Less(i, k) e = Exp(x) y = Where(c, d, e)
        }"""
    )
    assert [len(s.nodes) for s in check(source).steps] == [2, 3]


def test_a_quantised_convolution_is_one_integer_step() -> None:
    scales = {"sb": CONSTANTS["sw"] * CONSTANTS["sx"]}
    source = program(INTEGER, **CONSTANTS, **scales)
    lowered = lower(source)
    inputs = random_inputs(source, 2)
    got, want = Interpreter(lowered).run(inputs)[0], run_onnx(source, inputs)[0]
    assert np.abs(got.astype(int) - want.astype(int)).max() <= 1
    conv = lowered.steps[-2]
    assert isinstance(conv, Conv)
    assert conv.a.quantization is not None
    np.testing.assert_array_equal(conv.bias, CONSTANTS["b"])
    assert [k.dtype for k in kernels_of(lowered) if k.kind == "conv"] == ["int8"]


def test_a_bias_of_another_scale_stays_in_the_epilogue() -> None:
    source = program(INTEGER, **CONSTANTS, sb=np.full(4, 0.5, np.float32))
    conv = next(s for s in lower(source).steps if isinstance(s, Conv))
    assert conv.bias is None
    assert conv.a.quantization is not None


def test_weights_of_four_bits_in_blocks_become_floats() -> None:
    source = program(
        """(float[2, 6] x) => (float[2, 3] y) {
            q = QuantizeLinear<axis = 0>(w, s, z)
            d = DequantizeLinear<axis = 0, block_size = 2>(v, t)
            m = DequantizeLinear<axis = 0>(q, s, z)
            a = Add(d, m)
            y = MatMul(x, a)
        }""",
        w=(6, 3), s=np.full(6, 0.1, np.float32), z=np.arange(6, dtype=np.int8),
        v=np.arange(18, dtype=np.int8).reshape(6, 3), t=(3, 3),
    )  # fmt: skip
    check(source)


def test_a_table_that_is_a_transposed_weight_too_is_turned_when_compiling() -> None:
    source = program(
        """(float[2, 5] x) => (float[2, 5] y) {
            h = MatMul(x, table) t = Transpose(table) w = Identity(t) y = MatMul(h, w)
        }""",
        table=(5, 7),
    )
    assert kinds(check(source)) == ["MatMul", "MatMul"]


def test_functions_are_expanded_and_named_by_their_calls() -> None:
    text = (
        HEAD
        + """(float[2, 3] x, float[3, 4] w) => (float[2, 4] y) {
        y = optcompiler.fused.region(x, w)
    }
    <domain: "optcompiler.fused", opset_import: ["": 21]>
    region (a, b) => (c) { m = MatMul(a, b) c = Relu(m) }
    """
    )
    source = Program.from_text(text)
    lowered = check(source)
    assert kinds(lowered) == ["MatMul"]
    assert lowered.steps[0].nodes == tuple(n.name for n in source.graph)


def test_pointwise_steps_work_in_place_and_memory_is_reused() -> None:
    body = "(float[64, 64] x) => (float[64, 64] y) { "
    for i in range(6):
        body += f"m{i} = MatMul({'x' if i == 0 else f'm{i - 1}'}, w) "
    lowered = check(program(body + "y = Tanh(m5) }", w=(64, 64)), 1e-4)
    assert lowered.arena_bytes == 2 * 64 * 64 * 4
    chain = """(float[64, 64] x) => (float[64, 64] y) {
        s = Softmax(x) t = Transpose(s) a = Add(s, t) u = Softmax<axis = 0>(a) y = Add(u, a) }"""
    assert check(program(chain)).arena_bytes <= 2 * 64 * 64 * 4


def test_large_temporaries_do_not_begin_whole_pages_apart() -> None:
    body = """(float[128, 128] x) => (float[128, 128] y) {
        a = MatMul(x, w) b = MatMul(a, w) c = MatMul(b, w) d = Add(c, a) y = MatMul(d, b) }"""
    lowered = check(program(body, w=(128, 128)), 1e-4)
    places = sorted({b.offset % 4096 for b in lowered.buffers if b.kind == "temp"})
    assert len(places) == 3
    assert min(b - a for a, b in itertools.pairwise(places)) >= 512


def test_temporaries_that_live_together_do_not_overlap() -> None:
    source = program(
        """(float[4, 40] x) => (float[4, 30] y) {
            a = MatMul(x, w) b = MatMul(x, v) c = Concat<axis = 1>(a, b) s = Softmax(c)
            d, e = Split<axis = 1, num_outputs = 2>(s) f = Mul(d, e) g = ReduceMax(f, axes)
            h = Sub(c, g) i = Slice(h, zero, thirty, axes) y = Tanh(i)
        }""",
        w=(40, 20), v=(40, 20), axes=np.array([1]), zero=np.array([0]), thirty=np.array([30]),
    )  # fmt: skip
    lowered = lower(source)
    temps = [b for b in lowered.buffers if b.kind == "temp" and b.first >= 0]
    for one in temps:
        for two in temps:
            alive = one.first < two.last and two.first < one.last
            if one is not two and alive:
                assert (
                    one.offset + one.size_bytes <= two.offset
                    or two.offset + two.size_bytes <= one.offset
                )


@pytest.mark.parametrize(
    ("shape", "order", "into", "possible"),
    [
        ((2, 3, 4), (0, 1, 2), (6, 4), True),
        ((2, 3, 4), (0, 1, 2), (4, 6), True),
        ((2, 3, 4), (0, 2, 1), (2, 12), False),
        ((2, 3, 4), (0, 2, 1), (2, 2, 2, 3), True),
        ((1, 3, 1), (2, 0, 1), (3,), True),
        ((2, 3, 4), (1, 0, 2), (3, 8), False),
    ],
)
def test_a_view_reshapes_like_numpy(
    shape: tuple[int, ...], order: tuple[int, ...], into: tuple[int, ...], possible: bool
) -> None:
    array = np.arange(math.prod(shape), dtype=np.float32)
    buffer = Buffer(0, "FLOAT", array.size, "constant", "", array)
    view = View(buffer, shape, row_major(shape)).permute(order).reshape(into)
    assert (view is not None) == possible
    if view is not None:
        strides = tuple(4 * s for s in view.strides)
        got = np.lib.stride_tricks.as_strided(array, view.shape, strides)
        np.testing.assert_array_equal(got, array.reshape(shape).transpose(order).reshape(into))


def test_dynamic_shapes_and_unknown_operators_are_refused() -> None:
    with pytest.raises(InputError, match=r"'x' has dynamic dimensions \('N'\).*size\.N=1 after"):
        lower(program("(float[N, 2] x) => (float[N, 2] y) { y = Relu(x) }"))
    odd = program("(float[4, 2, 2] x) => (float[4] y) { y = Det(x) }")
    odd.graph.node(0).name = "the_node"
    with pytest.raises(UnsupportedOperatorError, match="Det of node 'the_node'"):
        lower(odd)
    with pytest.raises(UnsupportedOperatorError, match=r"Slice .* ends computed at run time"):
        lower(program("(float[4] x, int64[1] end) => (float[2] y) { y = Slice(x, zero, end) }",
                      zero=np.array([0])))  # fmt: skip


def test_every_pointwise_operator_uses_declared_operations() -> None:
    x = Accumulator("FLOAT")
    for name, build in POINTWISE.items():
        arity = 3 if name == "Where" else 1 if name in {"Not", "IsNaN", "IsInf"} else 2
        try:
            expr = build([x] * arity, {})
        except ValueError:
            expr = build([x], {})
        stack = [expr]
        while stack:
            e = stack.pop()
            if isinstance(e, Call):
                assert e.op in OPERATIONS
                stack += e.args


def test_a_view_of_a_repeated_number_reads_that_number_alone():
    memory = np.arange(9, dtype=np.int8)
    repeated = np.broadcast_to(memory[4:5].reshape(()), (4, 3))
    view = whole(Buffer(0, "INT8", 12, "constant", "", repeated), (4, 3))
    assert (view_array(view) == 4).all()
    turned = View(view.buffer, (3, 4), (-1, 3), 2)
    assert (view_array(turned) == 4).all()
