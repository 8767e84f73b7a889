"""Bring a pruned or quantised program back to its teacher by training on calibration data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from optcompiler.errors import InputError
from optcompiler.program import Program
from optcompiler.rewriting import Candidate, Decline, Pass, PassContext, Stage

PASSES = 4
"""Forward passes that one step costs: the teacher's, the student's, and two for the gradients."""

FEWEST_STEPS = 20

ROLES = ("scales", "biases", "weights", "zero_points")


@dataclass(frozen=True)
class Distill(Pass):
    """Train what the program holds until its outputs agree with the teacher's; no labels needed.

    The loss is temperature² * KL(softmax(teacher / temperature) || softmax(student / temperature))
    over outputs whose last axis has more than one element (Hinton et al., "Distilling the Knowledge
    in a Neural Network", 2015, section 2), plus block_weight times the mean squared error, relative
    to the teacher's variance, of the outputs and of block boundaries: values with the same name and
    shape in both programs that every path from an input passes.

    Rules:
    1. Only values of initializers change: `learn` picks from "scales" (of quantisers, kept positive
       by training their logarithm), "biases", "weights" (float, before their quantiser, straight
       through it) and "zero_points" (of activations whose range does not begin or end at zero).
    2. The scale of a quantiser after a Clip stays small enough to imply the clip.
    3. Step sizes are relative to the magnitude of each tensor: `learning_rate` at most, less the
       nearer the student is to begin with, and decaying to zero along a cosine.
    4. The state kept is the one whose outputs are nearest to the teacher's on the hold-out batches
       (the calibration batches when there are none); the rewrite is declined when that is the
       state it began with.
    5. Inputs that are all floating point are mixed at random, teacher and student seeing the same.
    6. At most `steps` steps are taken, fewer (but at least 20) for a model so large that they would
       cost more than `work_tmacs` tera multiply-accumulates (moving a byte counts as ten).
    7. The same seed, device and number of threads give the same result, unless `minutes` is
       reached: then fewer steps are planned after the first few, and a lock repeats those plans.

    It declines when the program computes what the teacher does, and without calibration data.
    """

    name: ClassVar[str] = "distill"
    stage: ClassVar[Stage] = Stage.TUNE
    after: ClassVar[tuple[str, ...]] = ("equalize", "correct-bias", "reconstruct")
    summary: ClassVar[str] = "recover accuracy by distillation from the original model"
    time_limit_s: ClassVar[float] = math.inf

    steps: int = 400
    learning_rate: float = 1e-2
    temperature: float = 2.0
    block_weight: float = 1.0
    learn: tuple[str, ...] = ROLES
    work_tmacs: float = 1.0
    batch_size: int = 32
    augment: bool = True
    minutes: float = 10.0
    device: str = "auto"

    def __post_init__(self) -> None:
        unknown = [r for r in self.learn if r not in ROLES]
        if unknown:
            raise InputError(f"distill: cannot learn {unknown[0]!r}; take from {', '.join(ROLES)}.")
        for name in ("steps", "learning_rate", "temperature", "work_tmacs", "batch_size",
                     "minutes"):  # fmt: skip
            value = getattr(self, name)
            if not value > 0:
                raise InputError(f"distill: {name}={value}; give a positive number.")

    def propose(self, program: Program, context: PassContext) -> Iterable[Candidate | Decline]:
        if not context.calibration:
            yield Decline("program", "no calibration data to learn from; pass calibration=batches")
            return

        from optcompiler_passes import _kd
        from optcompiler_passes._learnables import learnables
        from optcompiler_passes._samples import sample_count

        if _kd.same_function(program, context):
            yield Decline("program", "the student equals the teacher")
            return
        learnt = learnables(program, self.learn)
        if not learnt:
            yield Decline("program", f"it holds no {' or '.join(self.learn)} to learn")
            return

        samples = sample_count(context.calibration)
        each = _kd.work_per_sample(context) * min(self.batch_size, samples)
        afforded = int(1e12 * self.work_tmacs / max(PASSES * each, 1))
        steps = min(self.steps, max(afforded, FEWEST_STEPS))

        def rewrite(student: Program) -> None:
            _kd.distill(student, context, replace(self, steps=steps))

        yield Candidate(
            "program",
            f"kd {steps} steps",
            rewrite,
            exact=False,
            note=f"{len(learnt)} tensors learn from {samples} samples",
        )
