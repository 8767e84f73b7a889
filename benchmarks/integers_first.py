"""A plugin for compiles that are to quantise whatever has an integer kernel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from optcompiler import Kernel, hookimpl
from optcompiler.cost import CostModel, DeviceProfile


class IntegersFirst(CostModel):
    """Narrow types are always cheaper: the planner leaves nothing in float for being no quicker.

    Its microseconds are nobody's: a nanosecond for each byte moved and for each four integer, two
    bfloat16 or one float multiply-accumulate.
    """

    name: ClassVar[str] = "integers-first"

    def kernel_us(self, kernel: Kernel, profile: DeviceProfile) -> float:
        macs = kernel.macs / {"int8": 4, "bf16": 2}.get(kernel.dtype, 1)
        return 1e-3 * (kernel.bytes_moved + kernel.weight_bytes + macs)


@hookimpl
def optcompiler_cost_models() -> Iterable[CostModel]:
    return [IntegersFirst()]
