"""Let each block of a quantised program compute what the same block of its teacher does."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from optcompiler.errors import InputError
from optcompiler.program import Program
from optcompiler.rewriting import Candidate, Decline, Pass, PassContext, Stage

PASSES = 3
"""Forward passes that one step of a unit costs: its own, and two for the gradients."""

FEWEST_STEPS = 20
STEPS = {"few bits": 400, "8 bits": 120}
ROLES = ("rounding", "scales", "biases")


@dataclass(frozen=True)
class Reconstruct(Pass):
    """Learn rounding, scales and biases block by block from the teacher's block outputs.

    Before: every weight is rounded to the nearest level, whatever that does to the layer's output.
    After: the same program with other values in its initializers. Weights are `scale * level`
    exactly, so they quantise to the level that was learnt.

    Rules:
    1. A unit is what lies between values that every path passes, in both programs; small ones are
       put together up to `unit_weights` quantised weights. A residual block stays whole.
    2. Units learn in order. A unit's inputs are those that the student's earlier units give, of
       which `drop` of the elements are the teacher's in training; its goal is what the teacher's
       unit computes from its own (Li et al., "BRECQ", 2021; Wei et al., "QDrop", 2022).
    3. The loss is the squared error over the teacher's variance. With `weighting="fisher"` a
       channel weighs as much as the mean squared gradient of the teacher's log-likelihood there
       (BRECQ, section 3.3).
    4. "rounding" is AdaRound's (Nagel et al., "Up or Down?", 2020): each weight's level is the one
       below or above, by a rectified sigmoid that a regulariser drives to 0 or 1. It is learnt for
       weights of fewer than 8 bits, and for all with `rounding="all"`.
    5. "scales" are those of activations (Esser et al., "Learned Step Size Quantization", 2020),
       of which QDrop leaves a `drop` share of the elements in float; "biases" are all that is
       added to a channel.
    6. Each unit keeps the state that is nearest to the teacher on the hold-out samples (a quarter
       of the calibration where there are none), the first one included.
    7. `steps` is for each unit: 400 where weights have fewer than 8 bits, else 120, and fewer (at
       least 20) where all units together would cost more than `work_tmacs` tera
       multiply-accumulates.
    8. What units have learnt is kept in the cache: an interrupted compile goes on after them.

    It declines when nothing is quantised, when the program computes what the teacher does, without
    calibration data, and when no unit came nearer.
    """

    name: ClassVar[str] = "reconstruct"
    stage: ClassVar[Stage] = Stage.TUNE
    after: ClassVar[tuple[str, ...]] = ("equalize", "correct-bias")
    summary: ClassVar[str] = "learn rounding and scales block by block from the original model"
    time_limit_s: ClassVar[float] = math.inf

    steps: int | None = None
    learning_rate: float = 2e-3
    rounding_rate: float = 5e-2
    rounding_weight: float = 1.0
    rounding: str = "auto"
    learn: tuple[str, ...] = ROLES
    weighting: str = "fisher"
    drop: float = 0.5
    unit_weights: int = 3
    samples: int = 1024
    batch_size: int = 32
    work_tmacs: float = 10.0
    device: str = "auto"

    def __post_init__(self) -> None:
        unknown = [r for r in self.learn if r not in ROLES]
        if unknown:
            raise InputError(
                f"reconstruct: cannot learn {unknown[0]!r}; take from {', '.join(ROLES)}."
            )
        for name, known in (("rounding", ("auto", "all")), ("weighting", ("fisher", "none"))):
            if getattr(self, name) not in known:
                raise InputError(
                    f"reconstruct: {name}={getattr(self, name)!r}; there is {', '.join(known)}."
                )
        if not 0 <= self.drop < 1:
            raise InputError(f"reconstruct: drop={self.drop}; give a number from 0 to below 1.")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"reconstruct: steps={self.steps}; give 1 or more.")
        for name in ("learning_rate", "rounding_rate", "work_tmacs", "batch_size", "samples",
                     "unit_weights"):  # fmt: skip
            value = getattr(self, name)
            if not value > 0:
                raise InputError(f"reconstruct: {name}={value}; give a positive number.")

    def propose(self, program: Program, context: PassContext) -> Iterable[Candidate | Decline]:
        if not context.calibration:
            yield Decline("program", "no calibration data to learn from; pass calibration=batches")
            return
        if not any(n.op_type == "QuantizeLinear" for n in program.graph):
            yield Decline("program", "nothing is quantised")
            return

        from optcompiler_passes import _kd, _teaching
        from optcompiler_passes._samples import sample_count

        if _kd.same_function(program, context):
            yield Decline("program", "the student equals the teacher")
            return
        details: dict[str, Any] = {}

        def rewrite(student: Program) -> None:
            details["units"] = _teaching.reconstruct(student, context, self)

        samples = sample_count(context.calibration)
        yield Candidate(
            "program", "block by block", rewrite, exact=False,
            note=f"learns from {samples} samples", details=details,
        )  # fmt: skip

    def rounds(self, levels: int) -> bool:
        """Whether the rounding of weights of so many levels is learnt."""
        return "rounding" in self.learn and (levels < 256 or self.rounding == "all")

    def steps_for(self, fewest_bits: int, work: float) -> int:
        """Steps of each unit; `work` is multiply-accumulates of one step of all units."""
        wanted = self.steps or STEPS["few bits" if fewest_bits < 8 else "8 bits"]
        afforded = int(1e12 * self.work_tmacs / max(PASSES * work, 1))
        return min(wanted, max(afforded, FEWEST_STEPS))
