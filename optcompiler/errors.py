"""The one family of exceptions; each class carries the exit code of the command line.

A message is one sentence of cause, with the offending value and the node or file, and one of
remedy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from optcompiler.compiled import Compiled
    from optcompiler.program import Program
    from optcompiler.rewriting import Candidate, Pass
    from optcompiler.session import Fault


class OptcompilerError(Exception):
    """Base of every error raised on purpose."""

    exit_code: ClassVar[int] = 70


class GateError(OptcompilerError):
    """A gate failed: accuracy, budget or verification.

    `compiled` is the best artifact found when a budget was missed, else None.
    """

    exit_code = 1

    def __init__(self, message: str, compiled: Compiled | None = None) -> None:
        super().__init__(message)
        self.compiled = compiled


class VerificationError(GateError):
    """A program is not valid, changed its interface, or computes something else than declared."""


class InputError(OptcompilerError):
    """Bad usage or bad input: a file, an option, example inputs or calibration data."""

    exit_code = 2


class UnsupportedOperatorError(OptcompilerError):
    """An operator that a backend or the FX executor has no meaning for."""

    exit_code = 3


class ToolchainError(OptcompilerError):
    """A compiler or another tool that a backend needs is missing or failed."""

    exit_code = 4


class PluginError(OptcompilerError):
    """A plugin failed to load, clashed with another, or broke the contract of a hook."""

    exit_code = 5


class PassFault(PluginError):
    """A pass broke its contract while it proposed or rewrote.

    `kind` is one of `FAULTS`. `pass_`, `program` and `candidate` say who did it, to what; without
    a candidate it was while proposing. The driver begins again without the pass.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.pass_: Pass | None = None
        self.program: Program | None = None
        self.candidate: Candidate | None = None

    def by(self, pass_: Pass, program: Program, candidate: Candidate | None = None) -> PassFault:
        """This fault, as what `pass_` did to `program`."""
        self.pass_, self.program, self.candidate = pass_, program, candidate
        return self


RAISED, OVERTIME, NONSENSE, INVALID, NUMBERS = FAULTS = (
    "raised", "time limit", "nonsense", "invalid program", "numbers",
)  # fmt: skip
"""An exception from the pass; it took too long; candidates that are none; a rewrite that left an
invalid program or another interface; outputs that differ by more than declared."""

CHECK = "check"
"""The kind of what a user's check found, see `bisecting`."""


class CacheWarning(UserWarning):
    """The cache cannot be used; what it would keep is made again by the next compile."""


class QuarantineWarning(UserWarning):
    """A compile goes on without a pass that broke its contract, as `fault` says."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(f"going on without {fault}")
        self.fault = fault


class Declined(OptcompilerError):
    """Raised by a rewrite that finds, on the program in front of it, that it does not apply.

    The driver turns it into a ledger row; it is the only exception that the driver treats so.
    """

    exit_code = 70
