"""Even out channels that are far apart, before their common scale loses the small ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from optcompiler.channels import ChannelGroup, unshare_vectors
from optcompiler.errors import InputError
from optcompiler.observers import Observer
from optcompiler.program import Program
from optcompiler.rewriting import Candidate, Decline, Declined, Pass, PassContext, Stage
from optcompiler_passes._homogeneous import Scaling, mark_group
from optcompiler_passes._rescaling import (
    observer_of,
    refresh_scales,
    take_weights,
    without_pairs,
)


@dataclass(frozen=True)
class Equalize(Pass):
    """Scale channels where that leaves the float function alone, so that they share a range.

        y = Conv(x, w, b)                             y' = Conv(x, w / s, b / s)
        r = Relu(y)                              →    r' = Relu(y')
        z = Conv(Q(r), v)                             z  = Conv(Q'(r'), v · s)

    with s > 0 for each channel and Q a quantise-dequantise pair. Relu is positively homogeneous, so
    without Q z is the same, and Q' loses less: it has one scale for all channels.

    1. A group is made of channels that pass from weights (of Conv, ConvTranspose, Gemm, MatMul; the
       gamma and beta of a normalisation; a vector that is multiplied by) to weights through
       homogeneous operators alone. A depthwise Conv ends a group and begins another.
    2. Factors that are tried: none, and a^α / w^(1 - α) for `alphas`, with a the largest magnitude
       of a channel on the calibration data, or the mean one where activations stay in float, and w
       the largest of the weights that read it, each row of those relative to its own largest.
       α = 1/2 is SmoothQuant (Xiao et al., 2022, equation 4), α = 1 cross-layer equalisation with
       weights that have a scale for each output channel (Nagel et al., "Data-Free Quantization",
       2019, section 4.1), and means are AWQ's (Lin et al., 2023, section 3).
    3. Of those, the one with the least squared error of the readers' results is taken, measured on
       a bounded number of calibration samples with activations and weights quantised.
    4. Scales of pairs on scaled values, and of weights, are computed anew; no structure changes.
    5. Where the damage on the hold-out batches does not fall, the half of the groups that gain most
       is tried, and so on; it declines where none is left, or none gained.

    Groups that end at an input, an output or an operator that is not homogeneous (a Clip at 6, a
    Sigmoid) are declined by name.
    """

    name: ClassVar[str] = "equalize"
    stage: ClassVar[Stage] = Stage.TUNE
    summary: ClassVar[str] = "scale channels so that quantisation loses less, without a change"
    time_limit_s: ClassVar[float] = math.inf

    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.65, 0.8, 1.0)
    observer: str = "mse"
    weight_observer: str = "mse"

    def __post_init__(self) -> None:
        wrong = [a for a in self.alphas if not 0 <= a <= 1]
        if wrong:
            raise InputError(f"equalize: alpha {wrong[0]} is not in [0, 1].")
        if self.weight_observer not in ("mse", "minmax"):
            raise InputError(
                f"equalize: weight_observer={self.weight_observer!r}; take mse or minmax."
            )

    def propose(self, program: Program, context: PassContext) -> Iterable[Candidate | Decline]:
        make = observer_of(self.observer, "equalize", context)
        if not context.calibration:
            yield Decline("program", "no calibration data to measure on; pass calibration=batches")
            return
        if not any(node.op_type == "QuantizeLinear" for node in program.graph):
            yield Decline("program", "nothing in it is quantised")
            return
        plain = without_pairs(program)
        unshare_vectors(plain)
        found: list[str] = []
        for group in Scaling(plain, context.ops).groups:
            if group.pinned:
                yield Decline(group.name, group.pinned, (*group.producers, *group.consumers))
            else:
                found.append(group.name)
        if not found:
            yield Decline("program", "no group of channels can be scaled")
            return

        def rewrite(student: Program) -> None:
            _equalize(student, context, self, make)

        note = f"{len(found)} groups of channels"
        yield Candidate("program", "scaled", rewrite, exact=False, note=note)


def _equalize(
    student: Program, context: PassContext, options: Equalize, make: type[Observer]
) -> None:
    from optcompiler.damage import Judge
    from optcompiler_passes._equalisation import Search

    plain = without_pairs(student)
    unshare_vectors(plain)
    search = Search(student, Scaling(plain, context.ops), context, options)
    chosen = search.chosen()
    if not chosen:
        raise Declined("no group of channels loses less when it is scaled.")
    judge = Judge(context.teacher, context.holdout or context.calibration, context.ops)
    old = new = judge.damage(student)
    while chosen:
        tried = student.clone()
        _scale(tried, context, options, make, chosen)
        new = judge.damage(tried)
        if new < old:
            break
        chosen = chosen[: len(chosen) // 2]
    else:
        raise Declined(f"the damage on data held out is {old:.3g} before and {new:.3g} after.")
    _scale(student, context, options, make, chosen)


def _scale(
    student: Program,
    context: PassContext,
    options: Equalize,
    make: type[Observer],
    chosen: Sequence[tuple[ChannelGroup, np.ndarray]],
) -> None:
    """Scale groups of the program and compute the scales anew of all that they touch."""
    plain = without_pairs(student)
    unshare_vectors(plain)
    scaling = Scaling(plain, context.ops)
    touched: set[str] = set()
    nodes: list[str] = []
    for group, factors in chosen:
        scaling.scale(group, factors)
        touched |= {m.value for m in group.members}
        nodes += [*group.producers, *group.consumers]
    take_weights(student, plain)
    for group, factors in chosen:
        mark_group(student, group, factors)
    refresh_scales(student, touched, dict.fromkeys(nodes), context, make, options.weight_observer)
