"""Backends, cost models, observers and operators as the compiler calls them: what they must not do
becomes a `PluginError` that names the distribution and version they came from."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from optcompiler.backend import Backend, Capabilities, Kernel, Runner
from optcompiler.cost import CostModel, DeviceProfile
from optcompiler.errors import OptcompilerError, PluginError
from optcompiler.files import files_under
from optcompiler.foreign import contained
from optcompiler.ops.spec import Channels, OpSpec, Work
from optcompiler.target import Target

if TYPE_CHECKING:
    from optcompiler.choices import Choices
    from optcompiler.observers import Observer
    from optcompiler.program import Program

T = TypeVar("T")


class _Owned:
    """Who is to be named: kind and name of the thing, and its owner."""

    def __init__(self, kind: str, name: str, owner: str) -> None:
        self.who = f"{kind} {name!r} of {owner}"

    def call(self, method: str, function: Callable[[], T]) -> T:
        return contained(
            function,
            lambda _, did: PluginError(
                f"{self.who}: {method} {did}; report it to its author, or do without it."
            ),
            allowed=(OptcompilerError,),
        )

    def refuse(self, method: str, value: Any, wanted: str) -> PluginError:
        shown = f"{type(value).__name__} {value!r}"[:100]
        return PluginError(f"{self.who}: {method} gave {shown}, not {wanted}.")


class GuardedBackend(Backend):
    """`inner` with its faults named. `owner` is whose it is."""

    def __init__(self, inner: Backend, owner: str) -> None:
        self.inner = inner
        self.name = inner.name  # type: ignore[misc]
        self.summary = inner.summary  # type: ignore[misc]
        self.owner = owner
        self._owned = _Owned("backend", inner.name, owner)

    def __str__(self) -> str:
        return f"the {self._owned.who}"

    def capabilities(self, target: Target) -> Capabilities:
        return self._asked("capabilities", Capabilities, target)

    def kernels(self, program: Program, target: Target) -> Sequence[Kernel]:
        before = _outline(program)
        found: Any = self._owned.call("kernels", lambda: list(self.inner.kernels(program, target)))
        if _outline(program) != before:
            raise self._owned.refuse("kernels", program, "what it was given: it changed it")
        for item in found:
            if not isinstance(item, Kernel) or not _countable(item):
                raise self._owned.refuse("kernels", item, "a Kernel with counts that are 0 or more")
        return found

    def lower(
        self, program: Program, target: Target, directory: Path, choices: Choices | None = None
    ) -> Mapping[str, Any]:
        info: Any = self._asked("lower", Mapping, program.clone(), target, directory, choices)
        if not directory.is_dir():
            raise self._owned.refuse("lower", directory, "left where it was")
        for name in files_under(directory):
            if (directory / name).is_symlink():
                raise self._owned.refuse("lower", name, "a file of its own but a link")
        return cast("Mapping[str, Any]", info)

    def load(self, directory: Path, info: Mapping[str, Any], *, threads: int) -> Runner:
        runner: Any = self._owned.call(
            "load", lambda: self.inner.load(directory, info, threads=threads)
        )
        if not isinstance(runner, Runner):
            raise self._owned.refuse("load", runner, "a Runner")
        return _GuardedRunner(runner, self._owned)

    def spelled_out(self, target: Target) -> Target:
        return self._asked("spelled_out", Target, target)

    def name_for(self, text: str) -> str | None:
        return self._asked("name_for", (str, type(None)), text)

    def runs_here(self, target: Target) -> bool:
        return self._asked("runs_here", bool, target)

    def profiled_as(self, target: Target) -> Target:
        return self._asked("profiled_as", Target, target)

    def nominal_profile(self, target: Target) -> DeviceProfile | None:
        return self._asked("nominal_profile", (DeviceProfile, type(None)), target)

    def versions(self) -> Mapping[str, str]:
        found: Any = self._asked("versions", Mapping)
        return {str(k): str(v) for k, v in found.items()}

    def _asked(self, method: str, kind: Any, *args: Any) -> Any:
        """What the method gives, which must be of the kind."""
        found = self._owned.call(method, lambda: getattr(self.inner, method)(*args))
        if not isinstance(found, kind):
            raise self._owned.refuse(method, found, f"of type {_spelled(kind)}")
        return found


def _outline(program: Program) -> list[object]:
    """What a program looks like without its attributes and weights: costs less than a copy."""
    nodes = [(n, n.op_type, n.domain, n.inputs, n.outputs) for n in program.graph]
    return [*nodes, *program.graph.inputs, *program.graph.outputs]


def _spelled(kind: Any) -> str:
    kinds: tuple[type, ...] = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(k.__name__ for k in kinds)


def _countable(kernel: Kernel) -> bool:
    counts: tuple[Any, ...] = (
        kernel.macs, kernel.flops, kernel.bytes_moved, kernel.weight_bytes,
    )  # fmt: skip
    return isinstance(kernel.name, str) and all(  # pyright: ignore[reportUnnecessaryIsInstance]
        isinstance(n, (int, float, np.number)) and 0 <= n < math.inf for n in counts
    )


class _GuardedRunner(Runner):
    def __init__(self, inner: Runner, owned: _Owned) -> None:
        self._inner = inner
        self._owned = owned
        self.timed = inner.timed

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        found: Any = self._owned.call("run", lambda: self._inner.run(inputs))
        if not isinstance(found, (list, tuple)):
            raise self._owned.refuse("run", found, "a list of arrays")
        for item in cast("list[Any]", found):
            if not isinstance(item, (np.ndarray, np.generic, list, type(None))):
                raise self._owned.refuse("run", item, "an array")
        return cast("list[np.ndarray]", found)

    def kernel_times_us(self, inputs: Mapping[str, np.ndarray]) -> dict[str, float] | None:
        found: Any = self._owned.call(
            "kernel_times_us", lambda: self._inner.kernel_times_us(inputs)
        )
        if not found:
            return None
        try:
            times = {str(name): float(time) for name, time in found.items()}
        except (AttributeError, TypeError, ValueError):
            raise self._owned.refuse("kernel_times_us", found, "microseconds by name") from None
        if not all(0 <= t < math.inf for t in times.values()) or not any(times.values()):
            raise self._owned.refuse("kernel_times_us", found, "finite microseconds by name")
        return times

    def close(self) -> None:
        self._owned.call("close", self._inner.close)


class GuardedCostModel(CostModel):
    """`inner` with its faults named; prices are finite and not negative."""

    def __init__(self, inner: CostModel, owner: str) -> None:
        self.name = inner.name  # type: ignore[misc]
        self._inner = inner
        self._owned = _Owned("cost model", inner.name, owner)

    def kernel_us(self, kernel: Kernel, profile: DeviceProfile) -> float:
        return self._price("kernel_us", lambda: self._inner.kernel_us(kernel, profile))

    def program_us(self, kernels: Sequence[Kernel], profile: DeviceProfile) -> float:
        return self._price("program_us", lambda: self._inner.program_us(kernels, profile))

    def _price(self, method: str, function: Callable[[], Any]) -> float:
        found = self._owned.call(method, function)
        if not isinstance(found, (int, float, np.floating)) or not 0 <= found < math.inf:
            raise self._owned.refuse(method, found, "microseconds, finite and not negative")
        return float(found)


def guarded_observer(cls: type[Observer], owner: str) -> type[Observer]:
    """The observer class with the faults of its instances named."""
    owned = _Owned("observer", cls.name, owner)

    def wrapped(method: str) -> Any:
        inner = getattr(cls, method)

        @functools.wraps(inner)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return owned.call(method, lambda: inner(self, *args, **kwargs))

        return call

    def update(self: Any, array: Any) -> None:
        seen = np.asarray(array).view()
        seen.flags.writeable = False
        owned.call("update", lambda: cls.update(self, seen))

    def bounds(self: Any, bits: int, symmetric: bool) -> tuple[float, float]:
        found: Any = owned.call("range", lambda: cls.range(self, bits, symmetric))
        try:
            low, high = (float(v) for v in found)
        except (TypeError, ValueError):
            raise owned.refuse("range", found, "two numbers") from None
        if not -math.inf < low <= 0 <= high < math.inf:
            raise owned.refuse("range", found, "an interval of finite numbers around 0")
        return low, high

    members = {"update": update, "range": bounds, "__init__": wrapped("__init__")}
    return type(cls.__name__, (cls,), {**members, "__module__": cls.__module__})


def guarded_operator(spec: OpSpec, owner: str) -> OpSpec:
    """The operator with the faults of its functions named."""
    owned = _Owned("operator", f"{spec.domain}::{spec.op_type}", owner)

    def guarded(method: str, fits: Callable[[Any], bool], wanted: str) -> Any:
        inner = getattr(spec, method)
        if inner is None:
            return None

        @functools.wraps(inner)
        def call(*args: Any, **kwargs: Any) -> Any:
            found = owned.call(method, lambda: inner(*args, **kwargs))
            if not fits(found):
                raise owned.refuse(method, found, wanted)
            return found

        return call

    return replace(
        spec,
        torch=guarded("torch", _is_result, "a tensor or several"),
        cost=guarded("cost", lambda v: isinstance(v, Work), "Work"),
        channels=guarded("channels", lambda v: v is None or isinstance(v, Channels), "Channels"),
        facts=guarded("facts", lambda v: isinstance(v, Mapping), "a mapping"),
    )


def _is_result(value: Any) -> bool:
    """Whether it is what an operator may give; while torch.fx traces, anything may stand for it."""
    import torch

    if isinstance(value, (list, tuple)):
        return all(_is_result(v) for v in cast("list[Any]", value))
    return value is None or isinstance(value, (torch.Tensor, torch.fx.Proxy))
