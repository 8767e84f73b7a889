"""Backends, cost models and observers as the compiler calls them: what they must not do becomes a
`PluginError` that names the distribution and version they came from."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from optcompiler.backend import Backend, Capabilities, Kernel, Runner
from optcompiler.cost import CostModel, DeviceProfile
from optcompiler.errors import OptcompilerError, PluginError
from optcompiler.foreign import contained

if TYPE_CHECKING:
    from optcompiler.observers import Observer
    from optcompiler.program import Program
    from optcompiler.target import Target

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
    """`inner` with its faults named."""

    def __init__(self, inner: Backend, owner: str) -> None:
        self.inner = inner
        self.name = inner.name  # type: ignore[misc]
        self.summary = inner.summary  # type: ignore[misc]
        self._owned = _Owned("backend", inner.name, owner)

    def capabilities(self, target: Target) -> Capabilities:
        found: Any = self._owned.call("capabilities", lambda: self.inner.capabilities(target))
        if not isinstance(found, Capabilities):
            raise self._owned.refuse("capabilities", found, "Capabilities")
        return found

    def kernels(self, program: Program, target: Target) -> Sequence[Kernel]:
        found: Any = self._owned.call("kernels", lambda: list(self.inner.kernels(program, target)))
        for item in found:
            if not isinstance(item, Kernel):
                raise self._owned.refuse("kernels", item, "a Kernel")
        return found

    def lower(self, program: Program, target: Target, directory: Path) -> Mapping[str, Any]:
        own = program.clone()
        info: Any = self._owned.call("lower", lambda: self.inner.lower(own, target, directory))
        if not isinstance(info, Mapping):
            raise self._owned.refuse("lower", info, "a mapping")
        return cast("Mapping[str, Any]", info)

    def load(self, directory: Path, info: Mapping[str, Any], *, threads: int) -> Runner:
        runner: Any = self._owned.call(
            "load", lambda: self.inner.load(directory, info, threads=threads)
        )
        if not isinstance(runner, Runner):
            raise self._owned.refuse("load", runner, "a Runner")
        return _GuardedRunner(runner, self._owned)

    def runs_here(self, target: Target) -> bool:
        return bool(self._owned.call("runs_here", lambda: self.inner.runs_here(target)))

    def nominal_profile(self, target: Target) -> DeviceProfile | None:
        found: Any = self._owned.call("nominal_profile", lambda: self.inner.nominal_profile(target))
        if found is not None and not isinstance(found, DeviceProfile):
            raise self._owned.refuse("nominal_profile", found, "a DeviceProfile")
        return found

    def versions(self) -> Mapping[str, str]:
        found: Any = self._owned.call("versions", self.inner.versions)
        if not isinstance(found, Mapping):
            raise self._owned.refuse("versions", found, "a mapping")
        return cast("Mapping[str, str]", found)


class _GuardedRunner(Runner):
    def __init__(self, inner: Runner, owned: _Owned) -> None:
        self._inner = inner
        self._owned = owned
        self.timed = inner.timed

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        found: Any = self._owned.call("run", lambda: self._inner.run(inputs))
        if not isinstance(found, (list, tuple)):
            raise self._owned.refuse("run", found, "a list of arrays")
        return cast("list[np.ndarray]", found)

    def kernel_times_us(self, inputs: Mapping[str, np.ndarray]) -> dict[str, float] | None:
        return self._owned.call("kernel_times_us", lambda: self._inner.kernel_times_us(inputs))

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
        def call(self: Any, *args: Any) -> Any:
            return owned.call(method, lambda: inner(self, *args))

        return call

    def bounds(self: Any, bits: int, symmetric: bool) -> tuple[float, float]:
        found: Any = owned.call("range", lambda: cls.range(self, bits, symmetric))
        try:
            low, high = (float(v) for v in found)
        except (TypeError, ValueError):
            raise owned.refuse("range", found, "two numbers") from None
        if not -math.inf < low <= 0 <= high < math.inf:
            raise owned.refuse("range", found, "an interval of finite numbers around 0")
        return low, high

    members = {"update": wrapped("update"), "range": bounds, "__init__": wrapped("__init__")}
    return type(cls.__name__, (cls,), {**members, "__module__": cls.__module__})
