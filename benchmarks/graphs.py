"""Graphs of any number of nodes, to see what grows faster than they do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CHANNELS, SIDE, TOKENS, HEADS = 4, 4, 4, 2


class _Builder:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(0)

    def weight(self, *shape: int, scale: float = 0.5) -> str:
        return self.constant(self.rng.normal(0, scale, shape).astype(np.float32))

    def constant(self, array: np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def add(self, op_type: str, *inputs: str, **attributes: object) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [f"{name}_y"], name, **attributes))
        return f"{name}_y"

    def model(self, shape: list[int], result: str) -> onnx.ModelProto:
        self.nodes.append(helper.make_node("Identity", [result], ["y"], "last"))
        ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("x", "y")]
        graph = helper.make_graph(self.nodes, "scale", ports[:1], ports[1:], self.weights)
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10,
            producer_name="optcompiler benchmarks",
        )  # fmt: skip

    def full(self, nodes: int) -> bool:
        return len(self.nodes) >= nodes


def deep(nodes: int) -> onnx.ModelProto:
    """A chain of residual blocks: Conv, BatchNormalization, Relu, Conv, BatchNormalization, Add,
    Clip; `[1, 4, 4, 4]`, every Conv with weights of its own."""
    b, value = _Builder(), "x"
    low, high = b.constant(np.float32(-1)), b.constant(np.float32(1))
    while not b.full(nodes):
        inner = b.add("Relu", _normalised(b, b.add("Conv", value, *_conv(b))))
        branch = _normalised(b, b.add("Conv", inner, *_conv(b)))
        value = b.add("Clip", b.add("Add", branch, value), low, high)
    return b.model([1, CHANNELS, SIDE, SIDE], value)


def _conv(b: _Builder) -> tuple[str, str]:
    return b.weight(CHANNELS, CHANNELS, 1, 1), b.weight(CHANNELS)


def _normalised(b: _Builder, value: str) -> str:
    spread = b.constant(b.rng.uniform(0.5, 1.5, CHANNELS).astype(np.float32))
    scale, shift, mean = (b.weight(CHANNELS) for _ in range(3))
    return b.add("BatchNormalization", value, scale, shift, mean, spread)


def transformer(nodes: int) -> onnx.ModelProto:
    """Encoder blocks of 25 nodes with attention spelled out; `[1, 4, 4]`, two heads."""
    b, value = _Builder(), "x"
    size = CHANNELS // HEADS
    scale = b.constant(np.float32(size**-0.5))
    split = b.constant(np.array([1, TOKENS, HEADS, size]))
    joined = b.constant(np.array([1, TOKENS, CHANNELS]))
    while not b.full(nodes):
        normal = b.add("LayerNormalization", value, b.weight(CHANNELS), b.weight(CHANNELS))
        heads = [
            b.add(
                "Transpose",
                b.add("Reshape", _linear(b, normal, CHANNELS, CHANNELS), split),
                perm=perm,
            )
            for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
        ]
        scores = b.add("Softmax", b.add("Mul", b.add("MatMul", *heads[:2]), scale))
        mixed = b.add("Transpose", b.add("MatMul", scores, heads[2]), perm=[0, 2, 1, 3])
        value = b.add("Add", _linear(b, b.add("Reshape", mixed, joined), CHANNELS, CHANNELS), value)
        normal = b.add("LayerNormalization", value, b.weight(CHANNELS), b.weight(CHANNELS))
        wide = b.add("Gelu", _linear(b, normal, CHANNELS, 2 * CHANNELS))
        value = b.add("Add", _linear(b, wide, 2 * CHANNELS, CHANNELS), value)
    return b.model([1, TOKENS, CHANNELS], value)


def _linear(b: _Builder, value: str, inputs: int, outputs: int) -> str:
    return b.add("Add", b.add("MatMul", value, b.weight(inputs, outputs)), b.weight(outputs))


def wide(nodes: int) -> onnx.ModelProto:
    """Branches Conv, Relu that all read the input, summed sixteen at a time; `[1, 4, 4, 4]`."""
    b = _Builder()
    sums: list[str] = []
    while not b.full(nodes - len(sums) // 16):
        branches = [b.add("Relu", b.add("Conv", "x", *_conv(b))) for _ in range(16)]
        sums.append(b.add("Sum", *branches))
    while len(sums) > 1:
        sums = [b.add("Mean", *sums[i : i + 16]) for i in range(0, len(sums), 16)]
    return b.model([1, CHANNELS, SIDE, SIDE], sums[0])


def quantized(nodes: int) -> onnx.ModelProto:
    """Conv and Relu between QuantizeLinear and DequantizeLinear, weights too; `[1, 4, 4, 4]`."""
    b, value = _Builder(), "x"
    zero = b.constant(np.array(128, np.uint8))
    zeros = b.constant(np.zeros(CHANNELS, np.int8))
    while not b.full(nodes):
        step = b.constant(np.float32(1 / 32))
        value = b.add("DequantizeLinear", b.add("QuantizeLinear", value, step, zero), step, zero)
        steps = b.constant(np.full(CHANNELS, 1 / 64, np.float32))
        weight = b.add("QuantizeLinear", b.weight(CHANNELS, CHANNELS, 1, 1), steps, zeros, axis=0)
        weight = b.add("DequantizeLinear", weight, steps, zeros, axis=0)
        value = b.add("Relu", b.add("Conv", value, weight, b.weight(CHANNELS)))
    return b.model([1, CHANNELS, SIDE, SIDE], value)


def shared(nodes: int) -> onnx.ModelProto:
    """Conv, BatchNormalization, Relu, Add with one set of weights for all; `[1, 4, 4, 4]`."""
    b, value = _Builder(), "x"
    conv, skip = _conv(b), b.weight(1, CHANNELS, SIDE, SIDE)
    spread = b.constant(b.rng.uniform(0.5, 1.5, CHANNELS).astype(np.float32))
    rest = [b.weight(CHANNELS) for _ in range(3)]
    low, high = b.constant(np.float32(-1)), b.constant(np.float32(1))
    while not b.full(nodes):
        normal = b.add("BatchNormalization", b.add("Conv", value, *conv), *rest, spread)
        value = b.add("Clip", b.add("Add", b.add("Relu", normal), skip), low, high)
    return b.model([1, CHANNELS, SIDE, SIDE], value)


KINDS: dict[str, Callable[[int], onnx.ModelProto]] = {
    "deep": deep, "transformer": transformer, "wide": wide, "quantized": quantized,
    "shared": shared,
}  # fmt: skip
