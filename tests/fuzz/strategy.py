"""Whole programs, drawn by Hypothesis."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from hypothesis import strategies as st

from tests.fuzz.families import FAMILIES, available
from tests.fuzz.graph import BOOL, DOUBLE, Draw, Graph, Refused
from tests.fuzz.motifs import MOTIFS

OPSETS = (20, 21, 17, 13, 18, 22, 23, 24, 26)
MOST_STEPS = 5


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and what it gives for them in float64 (integers and booleans exactly).

    `largest` is, for each output, the largest number that went into it: the scale of what float32
    may lose. `steps` counts what was drawn, and what of it was refused.
    """

    model: onnx.ModelProto
    inputs: Mapping[str, np.ndarray]
    expected: tuple[np.ndarray, ...]
    largest: tuple[float, ...]
    steps: Counter[str]

    def __repr__(self) -> str:
        from tests.fuzz.regression import as_text

        return "\n" + as_text(self.model, self.inputs)


@st.composite
def cases(draw: Callable[[Any], Any]) -> Case:
    """Graphs of one to some twenty nodes: motifs, and operators alone, on values of either."""
    d = Draw(draw)
    opset = d.one_of(OPSETS)
    g = Graph(opset, np.random.default_rng(d.integer(0, 2**16)), constant=d.chance(8))
    if d.chance(30):
        g.input([0 if d.chance(8) else size for size in d.shape(0, 4)])
    else:
        g.image(d) if d.chance(50) else g.input(d.shape(2, 3))
    steps: Counter[str] = Counter()
    names = available(opset)
    for _ in range(d.integer(1, MOST_STEPS)):
        if d.chance(55):
            kind = d.one_of(names)
            grow = FAMILIES[kind]
        else:
            kind = d.one_of(tuple(MOTIFS))
            grow = _motif(kind)
        try:
            grow(g, d, kind)
        except Refused:
            steps[f"{kind} refused"] += 1
        else:
            steps[kind] += 1
    if not g.nodes:
        g.add("Relu", g.find(d))
    if g.constant:
        _meet_an_input(g)
    return _finished(g, d, steps)


def _motif(name: str) -> Callable[[Graph, Draw, str], Any]:
    return lambda g, d, _: MOTIFS[name](g, d)


def _meet_an_input(g: Graph) -> None:
    """Read what constants have become: what an output names is never computed beforehand."""
    g.constant = False
    read = {v for n in g.nodes for v in n.inputs if v is not None}
    for value in [v for n in g.nodes for v in n.outputs if v not in read]:
        with contextlib.suppress(Refused):
            g.add("Where", g.input((), BOOL), value, value)


def _finished(g: Graph, d: Draw, steps: Counter[str]) -> Case:
    """Most leaves become outputs, some stay dead; now and then an inner value is one too."""
    read = {v for n in g.nodes for v in n.inputs if v is not None}
    made = [v for n in g.nodes for v in n.outputs if bool(np.isfinite(g.largest[v]))]
    leaves = [v for v in made if v not in read]
    outputs = [v for v in leaves if d.chance(85)] or leaves[-1:]
    if d.chance(20):
        inner = d.one_of(made)
        outputs = [v for v in outputs if v is not inner] + [inner]
    model = g.model(outputs)
    expected = []
    for value in outputs:
        array = g.known[value].numpy()
        expected.append(array)
    used = {i.name for i in model.graph.input}
    inputs = {}
    for value in g.inputs:
        if value.name in used:
            array = g.known[value].numpy()
            inputs[value.name] = (
                array if value.dtype == DOUBLE else array.astype(value.dtype.numpy())
            )
    return Case(model, inputs, tuple(expected), tuple(g.largest[v] for v in outputs), steps)


def replayed(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> Case:
    """The case of a model that was not drawn here."""
    g, graph = _evaluated(model, inputs)
    outputs = graph.outputs
    return Case(
        model, inputs, tuple(g.known[v].numpy() for v in outputs),
        tuple(g.largest[v] for v in outputs), Counter(),
    )  # fmt: skip


def known_values(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What every value of the model holds, by name, in its own type."""
    g, _ = _evaluated(model, inputs)
    return {
        v.name or "": t.numpy().astype(v.dtype.numpy())
        for v, t in g.known.items()
        if v.dtype is not None
    }


def _evaluated(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> tuple[Graph, ir.Graph]:
    inferred = ir.from_proto(onnx.shape_inference.infer_shapes(model, data_prop=True)).graph
    g = Graph(inferred.opset_imports[""], np.random.default_rng(0))
    for value in inferred.inputs:
        g.learn(value, torch.from_numpy(inputs[value.name or ""]))
    for value in inferred.initializers.values():
        assert value.const_value is not None
        g.learn(value, torch.from_numpy(value.const_value.numpy().copy()))
    for node in inferred:
        g.evaluate(node)
    return g, inferred
