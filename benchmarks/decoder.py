"""A decoder of Llama-7B's shapes as ONNX, with its weights in a sparse file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ALIGNMENT = 4096


@dataclass(frozen=True)
class Shape:
    """Of a decoder; the default is Llama-7B's (6.7e9 parameters)."""

    layers: int = 32
    hidden: int = 4096
    inner: int = 11008
    heads: int = 32
    vocabulary: int = 32000
    tokens: int = 128

    @property
    def head(self) -> int:
        return self.hidden // self.heads


def write(directory: Path, shape: Shape, dtype: str = "float32") -> Path:
    """`decoder.onnx` in `directory`, and its weights in `decoder.data` beside it.

    Prefill of a fixed number of tokens as exporters write it: RMSNorm spelled out, rotary positions
    computed in every layer, causal attention with a guard against NaN, SwiGLU, residual branches
    scaled by a constant (as in Granite), Identity where dropout was.

    The data file has its full length, but only the first row of each matrix is written, and of
    those that end an attention or an MLP the first column: no channel is dead, and all else are
    holes, which read as zeros and take no disk.
    """
    path = directory / "decoder.onnx"
    with open(directory / "decoder.data", "wb") as file:
        writer = _Writer(file, shape, np.dtype(dtype))
        model = writer.model()
        file.truncate(writer.end)
    onnx.save(model, path)
    return path


class _Writer:
    def __init__(self, file: BinaryIO, shape: Shape, dtype: np.dtype) -> None:
        self.file = file
        self.shape = shape
        self.dtype = dtype
        self.type = helper.np_dtype_to_tensor_dtype(dtype)
        self.end = 0
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(0)

    def add(self, op_type: str, *inputs: str, **attributes: object) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [f"{name}_y"], name, **attributes))
        return f"{name}_y"

    def constant(self, name: str, array: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def matrix(self, name: str, rows: int, columns: int, *, first_column: bool = False) -> str:
        """An external initializer `[rows, columns]`, mostly holes."""
        start = -(-self.end // ALIGNMENT) * ALIGNMENT
        size = self.dtype.itemsize
        self.end = start + rows * columns * size
        self.file.seek(start)
        self.file.write(self.rng.normal(0, 0.5, columns).astype(self.dtype).tobytes())
        for row in range(1, rows if first_column else 0):
            self.file.seek(start + row * columns * size)
            self.file.write(self.dtype.type(self.rng.normal(0, 0.5)).tobytes())
        tensor = TensorProto(
            name=name, data_type=self.type, dims=(rows, columns),
            data_location=TensorProto.EXTERNAL,
        )  # fmt: skip
        for key, value in (("location", "decoder.data"), ("offset", start),
                           ("length", self.end - start)):  # fmt: skip
            tensor.external_data.add(key=key, value=str(value))
        self.weights.append(tensor)
        return name

    def model(self) -> onnx.ModelProto:
        s = self.shape
        scalar = {k: self.constant(k, self.dtype.type(v)) for k, v in
                  {"two": 2, "epsilon": 1e-5, "one": 1, "zero": 0, "scale": s.head**-0.5,
                   "residual": 0.22}.items()}  # fmt: skip
        self.scalar = scalar
        self.last = self.constant("last", np.array([-1]))
        self.split = self.constant("split", np.array([1, s.tokens, s.heads, s.head]))
        self.joined = self.constant("joined", np.array([1, s.tokens, s.hidden]))
        self.halves = [self.constant(f"half{i}", np.array([i * s.head // 2])) for i in range(3)]
        self.positions = self.constant("positions", np.arange(s.tokens).astype(self.dtype)[:, None])
        rates = 1e4 ** (-np.arange(0, s.head, 2) / s.head)
        self.rates = self.constant("rates", rates.astype(self.dtype)[None])
        mask = np.triu(np.full((s.tokens, s.tokens), -1e4), 1)
        self.mask = self.constant("mask", mask.astype(self.dtype))
        value = self.add("Gather", self.matrix("embedding", s.vocabulary, s.hidden), "tokens")
        for layer in range(s.layers):
            value = self.layer(f"layers.{layer}", value)
        head = self.matrix("head", s.hidden, s.vocabulary)
        self.add("MatMul", self.normalized("norm", value), head)
        self.nodes[-1].output[0] = "logits"
        graph = helper.make_graph(
            self.nodes, "decoder",
            [helper.make_tensor_value_info("tokens", TensorProto.INT64, [1, s.tokens])],
            [helper.make_tensor_value_info("logits", self.type, [1, s.tokens, s.vocabulary])],
            self.weights,
        )  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)

    def layer(self, name: str, value: str) -> str:
        s = self.shape
        normal = self.normalized(f"{name}.norm1", value)
        q, k, v = (
            self.add("Transpose", self.add("Reshape", self.linear(f"{name}.{n}", normal, s.hidden,
                     s.hidden), self.split), perm=[0, 2, 1, 3])
            for n in "qkv"
        )  # fmt: skip
        angles = self.add("MatMul", self.positions, self.rates)
        angles = self.add("Concat", angles, angles, axis=-1)
        turns = self.add("Cos", angles), self.add("Sin", angles)
        keys = self.add("Transpose", self.rotated(k, *turns), perm=[0, 1, 3, 2])
        scores = self.add("MatMul", self.rotated(q, *turns), keys)
        scores = self.add("Add", self.add("Mul", scores, self.scalar["scale"]), self.mask)
        weights = self.add("Softmax", scores, axis=-1)
        weights = self.add("Where", self.add("IsNaN", weights), self.scalar["zero"], weights)
        weights = self.add("Identity", weights)
        mixed = self.add("Transpose", self.add("MatMul", weights, v), perm=[0, 2, 1, 3])
        mixed = self.add("Reshape", mixed, self.joined)
        value = self.branch(value, self.linear(f"{name}.o", mixed, s.hidden, s.hidden, True))
        normal = self.normalized(f"{name}.norm2", value)
        gate = self.linear(f"{name}.gate", normal, s.hidden, s.inner)
        gate = self.add("Mul", gate, self.add("Sigmoid", gate))
        wide = self.add("Mul", gate, self.linear(f"{name}.up", normal, s.hidden, s.inner))
        return self.branch(value, self.linear(f"{name}.down", wide, s.inner, s.hidden, True))

    def branch(self, value: str, result: str) -> str:
        return self.add("Add", value, self.add("Mul", result, self.scalar["residual"]))

    def linear(self, name: str, value: str, inputs: int, outputs: int, last: bool = False) -> str:
        return self.add("MatMul", value, self.matrix(name, inputs, outputs, first_column=last))

    def normalized(self, name: str, value: str) -> str:
        mean = self.add("ReduceMean", self.add("Pow", value, self.scalar["two"]), self.last)
        root = self.add("Sqrt", self.add("Add", mean, self.scalar["epsilon"]))
        gain = self.rng.uniform(0.5, 1.5, self.shape.hidden).astype(self.dtype)
        scaled = self.add("Mul", value, self.add("Div", self.scalar["one"], root))
        return self.add("Mul", scaled, self.constant(name, gain))

    def rotated(self, value: str, cos: str, sin: str) -> str:
        zero, half, end = self.halves
        first = self.add("Slice", value, zero, half, self.last)
        second = self.add("Slice", value, half, end, self.last)
        turned = self.add("Concat", self.add("Neg", second), first, axis=-1)
        return self.add("Add", self.add("Mul", value, cos), self.add("Mul", turned, sin))


def used_bytes(path: Path) -> int:
    """What a file takes of the disk."""
    return 512 * os.stat(path).st_blocks
