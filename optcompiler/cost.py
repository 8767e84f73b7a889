"""Pricing kernels: a table of measured kernels over an analytical formula fitted on the device.

The formula is a roofline with fitted rates::

    t = launch + max(macs / mac_rate(kind, dtype, macs) + flops / flop_rate(kind, dtype, flops),
                     bytes / bandwidth(bytes))

`launch` is what one more kernel costs when it does nothing; `mac_rate` the multiply-accumulates per
second that kernels of this kind and type reach at this size, `flop_rate` the pointwise operations
per second, `bandwidth` the bytes per second at which a working set of this size streams. Each rate
is a curve through measured (size, rate) points, interpolated on logarithmic axes and flat beyond
its ends: small kernels reach less than large ones. All points come from the `DeviceProfile` that
`device.measure` fits on the machine by running probe programs through the backend itself; measure
again when the processor, the number of threads or a version named in the profile changes. A kernel
found in `DeviceProfile.measured` is priced by what it took.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar

from optcompiler.backend import Kernel

Curve = tuple[tuple[float, float], ...]
"""(size, rate) points by rising size."""


def at(curve: Curve, size: float) -> float:
    """The rate at `size`: log-log interpolation, constant outside the measured range."""
    if size <= curve[0][0]:
        return curve[0][1]
    for (x0, y0), (x1, y1) in pairwise(curve):
        if size <= x1:
            t = (math.log(size) - math.log(x0)) / (math.log(x1) - math.log(x0))
            return math.exp(math.log(y0) + t * (math.log(y1) - math.log(y0)))
    return curve[-1][1]


@dataclass(frozen=True)
class DeviceProfile:
    """What one backend reaches on one machine with one number of threads.

    `mac_rate`: multiply-accumulates per second by "kind/dtype" ("conv/int8"), `flop_rate`:
    pointwise operations per second by "kind/dtype", `bandwidth`: bytes per second by working set
    in bytes. `launch_us`: microseconds per kernel; `overhead_us`: per call of a whole program.
    `measured`: microseconds by `Kernel.signature`. `estimated`: from a data sheet, not measured.
    """

    name: str
    backend: str
    threads: int
    mac_rate: Mapping[str, Curve]
    flop_rate: Mapping[str, Curve]
    bandwidth: Curve
    launch_us: float
    overhead_us: float
    measured: Mapping[str, float] = field(default_factory=dict[str, float])
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    estimated: bool = False

    def with_measured(self, times_us: Mapping[str, float]) -> DeviceProfile:
        """A profile whose table also holds these kernels, microseconds by signature."""
        return replace(self, measured={**self.measured, **times_us})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DeviceProfile:
        """Read back what `to_json` gives.

        Raises `KeyError`, `TypeError` or `ValueError` for anything else.
        """

        def curve(points: Any) -> Curve:
            found = tuple((float(a), float(b)) for a, b in points)
            if not found:
                raise ValueError("a rate without points")
            return found

        return cls(
            name=str(data["name"]),
            backend=str(data["backend"]),
            threads=int(data["threads"]),
            mac_rate={str(k): curve(v) for k, v in dict(data["mac_rate"]).items()},
            flop_rate={str(k): curve(v) for k, v in dict(data["flop_rate"]).items()},
            bandwidth=curve(data["bandwidth"]),
            launch_us=float(data["launch_us"]),
            overhead_us=float(data["overhead_us"]),
            measured={str(k): float(v) for k, v in dict(data["measured"]).items()},
            versions={str(k): str(v) for k, v in dict(data["versions"]).items()},
            estimated=bool(data["estimated"]),
        )


def nominal_profile(backend: str, threads: int) -> DeviceProfile:
    """A device that nobody measured, for compiles that time nothing: the round numbers of one core
    of a server of 2023, times `threads` where work is divided. It ranks kernels; its microseconds
    are nobody's."""
    floats: Curve = ((1e4, 1e10 * threads), (1e6, 3e10 * threads), (1e8, 5e10 * threads))
    integers: Curve = ((1e4, 1e10 * threads), (1e6, 8e10 * threads), (1e8, 16e10 * threads))
    halves: Curve = tuple((size, 2 * rate) for size, rate in floats)
    taps: Curve = ((1e5, 1e10 * threads),)
    return DeviceProfile(
        name="nominal",
        backend=backend,
        threads=threads,
        mac_rate={
            "gemm/fp32": floats, "conv/fp32": floats, "depthwise/fp32": taps,
            "gemm/bf16": halves, "conv/bf16": halves, "depthwise/bf16": taps,
            "gemm/int8": integers, "conv/int8": integers,
            "depthwise/int8": tuple((size, 2 * rate) for size, rate in taps),
        },
        flop_rate={"pointwise/fp32": ((1e5, 1e10 * threads),)},
        bandwidth=((1e4, 5e10), (1e6, 5e10), (1e8, 1e10)),
        launch_us=0.5,
        overhead_us=5.0,
        estimated=True,
    )  # fmt: skip


def rate_curve(rates: Mapping[str, Curve], kind: str, dtype: str) -> Curve:
    """The curve of "kind/dtype"; one never measured takes the same kind in fp32, then "gemm" or
    "pointwise" in its own type, then any curve at all."""
    for key in (f"{kind}/{dtype}", f"gemm/{dtype}", f"{kind}/fp32", f"pointwise/{dtype}",
                "pointwise/fp32"):  # fmt: skip
        if key in rates:
            return rates[key]
    return next(iter(rates.values()))


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
            seconds += kernel.macs / at(
                rate_curve(profile.mac_rate, kernel.kind, kernel.dtype), kernel.macs
            )
        if kernel.flops:
            seconds += kernel.flops / at(
                rate_curve(profile.flop_rate, kernel.kind, kernel.dtype), kernel.flops
            )
        moved = kernel.bytes_moved + kernel.weight_bytes
        if moved:
            seconds = max(seconds, moved / at(profile.bandwidth, moved))
        return profile.launch_us + 1e6 * seconds
