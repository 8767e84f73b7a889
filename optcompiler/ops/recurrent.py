"""RNN, GRU and LSTM, step by step.

Inputs are [steps, batch, features] ([batch, steps, features] when `layout` is 1), weights
[directions, gates * hidden, features], biases [directions, 2 * gates * hidden].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from optcompiler.ops.activation import softplus
from optcompiler.ops.costs import recurrent_cost
from optcompiler.ops.declare import op, output_count
from optcompiler.ops.spec import OpSpec

Tensor = torch.Tensor
State = tuple[Tensor, ...]
Step = Callable[[Tensor, State, int], State]
Function = Callable[[Tensor], Tensor]

_DEFAULT_ALPHA = {
    "leakyrelu": 0.01,
    "elu": 1.0,
    "thresholdedrelu": 1.0,
    "hardsigmoid": 0.2,
    "affine": 1.0,
    "scaledtanh": 1.0,
}
_DEFAULT_BETA = {"hardsigmoid": 0.5, "scaledtanh": 1.0}


def _function(name: str, alpha: float | None, beta: float | None) -> Function:
    """An activation of the ONNX recurrent operators by its name, in any case."""
    key = name.lower()
    a = alpha if alpha is not None else _DEFAULT_ALPHA.get(key, 0.0)
    b = beta if beta is not None else _DEFAULT_BETA.get(key, 0.0)
    known: dict[str, Function] = {
        "relu": torch.relu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "softsign": F.softsign,
        "softplus": softplus,
        "affine": lambda x: a * x + b,
        "leakyrelu": lambda x: F.leaky_relu(x, a),
        "thresholdedrelu": lambda x: torch.where(x > a, x, torch.zeros_like(x)),
        "scaledtanh": lambda x: a * torch.tanh(b * x),
        "hardsigmoid": lambda x: torch.clamp(a * x + b, 0, 1),
        "elu": lambda x: F.elu(x, a),
    }
    return known[key]


def _functions(
    names: Sequence[str] | None,
    default: Sequence[str],
    directions: int,
    alphas: Sequence[float] | None,
    betas: Sequence[float] | None,
    clip: float | None,
) -> list[Function]:
    """The activations of all directions in order; `clip` bounds what goes into each."""
    chosen = list(names) if names else [*default] * directions
    found: list[Function] = []
    for i, name in enumerate(chosen):
        alpha = alphas[i] if alphas and i < len(alphas) else None
        beta = betas[i] if betas and i < len(betas) else None
        function = _function(name, alpha, beta)
        found.append(function if clip is None else _clipped(function, clip))
    return found


def _clipped(function: Function, clip: float) -> Function:
    return lambda x: function(torch.clamp(x, -clip, clip))


def _unroll(
    x: Tensor, initial: State, lengths: Tensor | None, backwards: bool, step: Step, direction: int
) -> tuple[Tensor, State]:
    """All hidden states in input order and the final state; short sequences keep theirs."""
    steps = x.shape[0]
    state = initial
    seen: list[Tensor] = [initial[0]] * steps
    for t in reversed(range(steps)) if backwards else range(steps):
        new = step(x[t], state, direction)
        shown = new[0]
        if lengths is not None:
            alive = (t < lengths).unsqueeze(1)
            shown = torch.where(alive, shown, torch.zeros_like(shown))
            new = tuple(torch.where(alive, n, old) for n, old in zip(new, state, strict=True))
        state, seen[t] = new, shown
    return torch.stack(seen), state


def _run(
    x: Tensor,
    hidden: int,
    direction: str,
    layout: int,
    lengths: Tensor | None,
    initial: Sequence[Tensor | None],
    step: Step,
    outputs: int,
) -> Tensor | tuple[Tensor, ...]:
    """Every direction unrolled: Y [steps, directions, batch, hidden], then the final states."""
    if layout:
        x = x.transpose(0, 1)
        initial = [None if s is None else s.transpose(0, 1) for s in initial]
    reversals = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]
    results: list[Tensor] = []
    finals: list[State] = []
    for i, backwards in enumerate(reversals):
        zero = torch.zeros((x.shape[1], hidden), dtype=x.dtype, device=x.device)
        start = tuple(zero if s is None else s[i] for s in initial)
        y, state = _unroll(x, start, lengths, backwards, step, i)
        results.append(y)
        finals.append(state)
    y = torch.stack(results, dim=1)
    last = [torch.stack(states) for states in zip(*finals, strict=True)]
    if layout:
        y = y.permute(2, 0, 1, 3)
        last = [s.transpose(0, 1) for s in last]
    return (y, *last)[:outputs] if outputs > 1 else y


def _bias(bias: Tensor | None, direction: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The input's and the state's bias of a direction."""
    if bias is None:
        zero = torch.zeros(weight.shape[1], dtype=weight.dtype, device=weight.device)
        return zero, zero
    first, second = bias[direction].chunk(2)
    return first, second


def rnn(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    initial: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    outputs: int = 3,
) -> Tensor | tuple[Tensor, ...]:
    """Y, Y_h of `f(x W' + h R' + b)`."""
    chosen = _functions(activations, ["Tanh"], w.shape[0], activation_alpha, activation_beta, clip)

    def step(frame: Tensor, state: State, d: int) -> State:
        wb, rb = _bias(bias, d, w)
        return (chosen[d](F.linear(frame, w[d], wb) + F.linear(state[0], r[d], rb)),)

    return _run(x, r.shape[-1], direction, layout, lengths, [initial], step, outputs)


def gru(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    initial: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
    outputs: int = 3,
) -> Tensor | tuple[Tensor, ...]:
    """Y, Y_h of a gated recurrent unit with gates in the order z, r, h."""
    chosen = _functions(
        activations, ["Sigmoid", "Tanh"], w.shape[0], activation_alpha, activation_beta, clip
    )

    def step(frame: Tensor, state: State, d: int) -> State:
        gate, candidate = chosen[2 * d], chosen[2 * d + 1]
        (h,) = state
        wb, rb = _bias(bias, d, w)
        xz, xr, xh = F.linear(frame, w[d], wb).chunk(3, -1)
        rz, rr, rh = r[d].chunk(3)
        bz, br, bh = rb.chunk(3)
        z = gate(xz + F.linear(h, rz, bz))
        reset = gate(xr + F.linear(h, rr, br))
        if linear_before_reset:
            new = candidate(xh + reset * F.linear(h, rh, bh))
        else:
            new = candidate(xh + F.linear(reset * h, rh, bh))
        return ((1 - z) * new + z * h,)

    return _run(x, r.shape[-1], direction, layout, lengths, [initial], step, outputs)


def lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    peepholes: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
    outputs: int = 3,
) -> Tensor | tuple[Tensor, ...]:
    """Y, Y_h, Y_c of a long short-term memory with gates in the order i, o, f, c."""
    chosen = _functions(
        activations,
        ["Sigmoid", "Tanh", "Tanh"],
        w.shape[0],
        activation_alpha,
        activation_beta,
        clip,
    )

    def step(frame: Tensor, state: State, d: int) -> State:
        gate, cell, show = chosen[3 * d : 3 * d + 3]
        h, c = state
        wb, rb = _bias(bias, d, w)
        i, o, f, g = (F.linear(frame, w[d], wb) + F.linear(h, r[d], rb)).chunk(4, -1)
        pi: Any = 0
        po: Any = 0
        pf: Any = 0
        if peepholes is not None:
            pi, po, pf = peepholes[d].chunk(3)
        i = gate(i + pi * c)
        f = 1 - i if input_forget else gate(f + pf * c)
        new = f * c + i * cell(g)
        return gate(o + po * new) * show(new), new

    return _run(x, r.shape[-1], direction, layout, lengths, [initial_h, initial_c], step, outputs)


SPECS: tuple[OpSpec, ...] = (
    op("RNN", rnn, recurrent_cost, since=7, facts=output_count),
    op("GRU", gru, recurrent_cost, since=7, facts=output_count),
    op("LSTM", lstm, recurrent_cost, since=7, facts=output_count),
)
