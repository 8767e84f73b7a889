"""Program → the lowered form that code generators print."""

from optcompiler.lowering.arena import plan
from optcompiler.lowering.kernels import kernels_of
from optcompiler.lowering.lower import lower

__all__ = ["kernels_of", "lower", "plan"]
