"""RNN, GRU and LSTM written out step by step; the input's product is one for all steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from optcompiler.errors import UnsupportedOperatorError
from optcompiler.lowering.decompose.tape import Tape, ints, typed
from optcompiler.lowering.expand import Decomposition, Expansion, Facts
from optcompiler.ops.spec import attributes_of

LONGEST = 512
"""Steps that are written out; code grows with them."""

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
USUAL = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
PLAIN = {"relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid", "softsign": "Softsign",
         "softplus": "Softplus"}  # fmt: skip
SHAPED = {"leakyrelu": ("LeakyRelu", 0.01), "elu": ("Elu", 1.0),
          "thresholdedrelu": ("ThresholdedRelu", 1.0)}  # fmt: skip

Function = Callable[[ir.Value], ir.Value]
State = tuple[ir.Value, ...]


class Recurrence:
    """One recurrent node: its operands, the activations, and the tape it is written on."""

    def __init__(self, node: ir.Node, facts: Facts) -> None:
        self.tape, self.node, self.facts = Tape(), node, facts
        self.kind = node.op_type
        self.given: Mapping[str, Any] = attributes_of(node)
        x, w, r = node.inputs[:3]
        assert x is not None
        assert w is not None
        assert r is not None
        self.w, self.r = w, r
        self.x = self.tape("Transpose", x, perm=[1, 0, 2]) if self.given.get("layout") else x
        shape = facts.shapes[x]
        self.steps, self.batch = shape[:2][:: -1 if self.given.get("layout") else 1]
        self.features, self.hidden = shape[2], facts.shapes[r][-1]
        directions = facts.shapes[w][0]
        self.names = list(self.given.get("activations") or USUAL[self.kind] * directions)
        self.like = x

    def operand(self, place: int) -> ir.Value | None:
        return self.node.inputs[place] if place < len(self.node.inputs) else None

    def of(self, x: ir.Value, direction: int) -> ir.Value:
        """The part of a weight that belongs to a direction, without its first axis."""
        return self.tape("Gather", x, np.array(direction, np.int64), axis=0)

    def function(self, place: int) -> Function:
        """The activation at a place of the list, what goes into it clipped."""
        name = str(self.names[place]).lower()
        alphas, betas = (self.given.get(f"activation_{k}") for k in ("alpha", "beta"))
        alpha = alphas[place] if alphas and place < len(alphas) else None
        beta = betas[place] if betas and place < len(betas) else None
        clip, tape = self.given.get("clip"), self.tape

        def apply(x: ir.Value) -> ir.Value:
            if clip is not None:
                x = tape("Clip", x, typed(-clip, self.like), typed(clip, self.like))
            if name in PLAIN:
                return tape(PLAIN[name], x)
            if name in SHAPED:
                op, usual = SHAPED[name]
                return tape(op, x, alpha=float(usual if alpha is None else alpha))
            if name == "hardsigmoid":
                a, b = (float(u if v is None else v) for v, u in ((alpha, 0.2), (beta, 0.5)))
                return tape("HardSigmoid", x, alpha=a, beta=b)
            a, b = (float(u if v is None else v) for v, u in ((alpha, 1.0), (beta, 0.0)))
            if name == "affine":
                product = tape("Mul", x, typed(a, self.like))
                return tape("Add", product, typed(b, self.like))
            if name == "scaledtanh":
                inner = tape("Mul", x, typed(1.0 if beta is None else b, self.like))
                return tape("Mul", tape("Tanh", inner), typed(a, self.like))
            raise UnsupportedOperatorError(
                f"{self.kind} {self.node.name!r}: the activation {name!r} is not one of ONNX's."
            )

        return apply

    def run(self) -> Expansion:
        reversals = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}
        order = reversals[str(self.given.get("direction") or "forward")]
        seen = [self.direction(d, backwards) for d, backwards in enumerate(order)]
        tape = self.tape
        every = [tape("Unsqueeze", y, ints(1)) for y, _ in seen]
        y = tape("Concat", *every, axis=1)
        last = [
            tape("Concat", *(tape("Unsqueeze", s, ints(0)) for s in states), axis=0)
            for states in zip(*(states for _, states in seen), strict=True)
        ]
        if self.given.get("layout"):
            y = tape("Transpose", y, perm=[2, 0, 1, 3])
            last = [tape("Transpose", s, perm=[1, 0, 2]) for s in last]
        return tape.done(*(y, *last)[: len(self.node.outputs)])

    def direction(self, d: int, backwards: bool) -> tuple[ir.Value, State]:
        """Hidden states [steps, batch, hidden] in input order, and the final state."""
        tape, hidden = self.tape, self.hidden
        weight = tape("Transpose", self.of(self.w, d), perm=[1, 0])
        flat = tape.reshape(self.x, [self.steps * self.batch, self.features])
        frames = tape("MatMul", flat, weight)
        bias = self.operand(3)
        wide = GATES[self.kind] * hidden
        recurrent = None
        if bias is not None:
            both = self.of(bias, d)
            frames = tape("Add", frames, tape.part(both, 0, 0, wide))
            recurrent = tape.part(both, 0, wide, 2 * wide)
        states = self.start(d)
        lengths = self.operand(4)
        seen: list[ir.Value] = [states[0]] * self.steps
        step = {"RNN": self.rnn, "GRU": self.gru, "LSTM": self.lstm}[self.kind](d, recurrent)
        for t in reversed(range(self.steps)) if backwards else range(self.steps):
            frame = tape.part(frames, 0, t * self.batch, (t + 1) * self.batch)
            new = step(frame, states)
            shown = new[0]
            if lengths is not None:
                long = tape("Cast", lengths, to=ir.DataType.INT64)
                alive = tape("Unsqueeze", tape("Greater", long, ints(t)), ints(1))
                shown = tape("Where", alive, shown, typed(0, self.like))
                new = tuple(
                    tape("Where", alive, n, old) for n, old in zip(new, states, strict=True)
                )
            states, seen[t] = new, tape("Unsqueeze", shown, ints(0))
        return tape("Concat", *seen, axis=0), states

    def start(self, d: int) -> State:
        states: list[ir.Value] = []
        for place in (5, 6)[: 2 if self.kind == "LSTM" else 1]:
            given = self.operand(place)
            if given is None:
                zeros = np.zeros((self.batch, self.hidden))
                states.append(self.tape.constant(typed(zeros, self.like)))
                continue
            if self.given.get("layout"):
                given = self.tape("Transpose", given, perm=[1, 0, 2])
            states.append(self.of(given, d))
        return tuple(states)

    def rows(self, d: int, gate: int, count: int = 1) -> ir.Value:
        """Recurrence weights of some gates, [hidden, count * hidden]."""
        low, high = gate * self.hidden, (gate + count) * self.hidden
        return self.tape("Transpose", self.tape.part(self.of(self.r, d), 0, low, high), perm=[1, 0])

    def product(self, h: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
        y = self.tape("MatMul", h, weight)
        return y if bias is None else self.tape("Add", y, bias)

    def gate(self, x: ir.Value, place: int) -> ir.Value:
        return self.tape.part(x, 1, place * self.hidden, (place + 1) * self.hidden)

    def rnn(self, d: int, bias: ir.Value | None) -> Callable[[ir.Value, State], State]:
        f, weight = self.function(d), self.rows(d, 0)

        def step(frame: ir.Value, state: State) -> State:
            return (f(self.tape("Add", frame, self.product(state[0], weight, bias))),)

        return step

    def gru(self, d: int, bias: ir.Value | None) -> Callable[[ir.Value, State], State]:
        tape, hidden = self.tape, self.hidden
        gate, candidate = self.function(2 * d), self.function(2 * d + 1)
        two, one = self.rows(d, 0, 2), self.rows(d, 2)
        first = None if bias is None else tape.part(bias, 0, 0, 2 * hidden)
        third = None if bias is None else tape.part(bias, 0, 2 * hidden, 3 * hidden)

        def step(frame: ir.Value, state: State) -> State:
            (h,) = state
            both = self.product(h, two, first)
            z = gate(tape("Add", self.gate(frame, 0), self.gate(both, 0)))
            r = gate(tape("Add", self.gate(frame, 1), self.gate(both, 1)))
            if self.given.get("linear_before_reset"):
                inner = tape("Mul", r, self.product(h, one, third))
            else:
                inner = self.product(tape("Mul", r, h), one, third)
            new = candidate(tape("Add", self.gate(frame, 2), inner))
            kept = tape("Sub", typed(1, self.like), z)
            return (tape("Add", tape("Mul", kept, new), tape("Mul", z, h)),)

        return step

    def lstm(self, d: int, bias: ir.Value | None) -> Callable[[ir.Value, State], State]:
        tape = self.tape
        gate, cell, show = (self.function(3 * d + i) for i in range(3))
        weight, peephole = self.rows(d, 0, 4), self.operand(7)
        peeps = None if peephole is None else self.of(peephole, d)

        def seen(x: ir.Value, c: ir.Value, place: int) -> ir.Value:
            if peeps is None:
                return x
            part = tape.part(peeps, 0, place * self.hidden, (place + 1) * self.hidden)
            return tape("Add", x, tape("Mul", part, c))

        def step(frame: ir.Value, state: State) -> State:
            h, c = state
            every = tape("Add", frame, self.product(h, weight, bias))
            i = gate(seen(self.gate(every, 0), c, 0))
            if self.given.get("input_forget"):
                f = tape("Sub", typed(1, self.like), i)
            else:
                f = gate(seen(self.gate(every, 2), c, 2))
            fresh = tape("Mul", i, cell(self.gate(every, 3)))
            new = tape("Add", tape("Mul", f, c), fresh)
            o = gate(seen(self.gate(every, 1), new, 1))
            return tape("Mul", o, show(new)), new

        return step


def recurrent(node: ir.Node, facts: Facts) -> Expansion | None:
    x = node.inputs[0]
    assert x is not None
    layout = attributes_of(node).get("layout")
    steps = facts.shapes[x][1 if layout else 0]
    return Recurrence(node, facts).run() if 0 < steps <= LONGEST else None


RECURRENT: Mapping[str, Decomposition] = dict.fromkeys(GATES, recurrent)
