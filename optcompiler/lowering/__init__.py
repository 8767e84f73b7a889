"""Program → the lowered form that code generators print."""

from optcompiler.lowering.arena import plan
from optcompiler.lowering.kernels import kernel_of, kernels_of
from optcompiler.lowering.lower import lower
from optcompiler.lowering.sized import Bounds, lower_sized

__all__ = ["Bounds", "kernel_of", "kernels_of", "lower", "lower_sized", "plan"]
