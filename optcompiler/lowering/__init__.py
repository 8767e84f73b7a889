"""Program → the lowered form that code generators print."""

from optcompiler.lowering.arena import plan
from optcompiler.lowering.kernels import kernel_of, kernels_of
from optcompiler.lowering.lower import lower

__all__ = ["kernel_of", "kernels_of", "lower", "plan"]
