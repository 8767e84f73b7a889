"""Pricing kernels: a table of measured kernels over an analytical formula fitted on the device.

The formula (a roofline with a fitted rate per kind and type)::

    t = launch + max(macs / mac_rate[kind, dtype] + flops / flop_rate, bytes / bandwidth(bytes))

`launch` is the cost of reaching a kernel that does nothing, `mac_rate` the multiply-accumulates per
second that kernels of this kind and type reach on the device, `flop_rate` pointwise operations per
second, and `bandwidth` the rate at which a working set of that size streams (stepwise by cache
level). All come from the `DeviceProfile` that `device.measure` fits on the machine by running probe
programs through the backend itself; measure again when the processor, the number of threads or a
version named in the profile changes. A kernel found in `DeviceProfile.measured` is priced by what
it took.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from optcompiler.backend import Kernel


@dataclass(frozen=True)
class DeviceProfile:
    """What one backend reaches on one machine with one number of threads.

    `mac_rate`: multiply-accumulates per second by "kind/dtype" ("conv/int8"). `flop_rate`:
    pointwise operations per second by dtype. `bandwidth`: (bytes of working set, bytes per second)
    by rising size. `launch_us`: microseconds per kernel; `overhead_us`: per call of the whole
    program. `measured`: microseconds by `Kernel.signature`.
    """

    name: str
    backend: str
    threads: int
    mac_rate: dict[str, float]
    flop_rate: dict[str, float]
    bandwidth: tuple[tuple[int, float], ...]
    launch_us: float
    overhead_us: float
    measured: dict[str, float] = field(default_factory=dict[str, float])
    versions: dict[str, str] = field(default_factory=dict[str, str])
    estimated: bool = False

    def bandwidth_for(self, working_set: int) -> float:
        for size, rate in self.bandwidth:
            if working_set <= size:
                return rate
        return self.bandwidth[-1][1]

    def rate(self, kind: str, dtype: str) -> float:
        """Multiply-accumulates per second; a kind never measured takes the dtype's median."""
        exact = self.mac_rate.get(f"{kind}/{dtype}")
        if exact is not None:
            return exact
        same = sorted(v for k, v in self.mac_rate.items() if k.endswith(f"/{dtype}"))
        if not same:
            same = sorted(v for k, v in self.mac_rate.items() if k.endswith("/fp32"))
        return same[len(same) // 2]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DeviceProfile:
        pairs = tuple((int(a), float(b)) for a, b in data["bandwidth"])
        return cls(**{**data, "bandwidth": pairs})


class CostModel(ABC):
    """Predicts microseconds. Instances are stateless."""

    name: ClassVar[str]

    @abstractmethod
    def kernel_us(self, kernel: Kernel, profile: DeviceProfile) -> float:
        """Microseconds that `kernel` takes on the profiled device."""

    def program_us(self, kernels: Sequence[Kernel], profile: DeviceProfile) -> float:
        """Microseconds of one call: the kernels one after another, and the call itself."""
        return profile.overhead_us + sum(self.kernel_us(k, profile) for k in kernels)


class RooflineCostModel(CostModel):
    """The formula of this module."""

    name: ClassVar[str] = "roofline"

    def kernel_us(self, kernel: Kernel, profile: DeviceProfile) -> float:
        known = profile.measured.get(kernel.signature)
        if known is not None:
            return known
        seconds = 0.0
        if kernel.macs:
            seconds += kernel.macs / profile.rate(kernel.kind, kernel.dtype)
        if kernel.flops:
            rates = profile.flop_rate
            seconds += kernel.flops / rates.get(kernel.dtype, rates["fp32"])
        moved = kernel.bytes_moved + kernel.weight_bytes
        seconds = max(seconds, moved / profile.bandwidth_for(moved))
        return profile.launch_us + 1e6 * seconds
