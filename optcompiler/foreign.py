"""Calling code that is not ours: what it must not do comes out as one kind of error."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from typing import TypeVar

from optcompiler.errors import OVERTIME, RAISED, InputError
from optcompiler.files import no_room
from optcompiler.overtime import Overtime, TimeIsUp, within

T = TypeVar("T")


def contained(
    call: Callable[[], T],
    fault: Callable[[str, str], Exception],
    *,
    seconds: float = math.inf,
    allowed: tuple[type[Exception], ...] = (),
) -> T:
    """`call()`; raises `fault(kind, what)` for all that it raises and when it does not end in time.

    `kind` is "raised" or "time limit", `what` goes on from the name of what was called. Exceptions
    that are `allowed` go through, and so do Ctrl-C and the limit of a call around this one. A full
    disk is nobody's fault and an `InputError`.
    """
    try:
        return within(seconds, call)
    except allowed:
        raise
    except TimeIsUp:
        raise fault(OVERTIME, f"had not ended after {seconds:g} s") from None
    except (KeyboardInterrupt, Overtime):
        raise
    except BaseException as error:
        if remedy := no_room(error):
            raise InputError(
                f"there is no room to write ({told(error)}); {remedy}, or set TMPDIR to a folder "
                f"with more."
            ) from error
        raise fault(RAISED, f"raised {told(error)}") from error


def told(error: BaseException) -> str:
    """Type and message in one line, also of an exception that cannot be printed."""
    return " ".join(traceback.format_exception_only(error)[-1].split())
