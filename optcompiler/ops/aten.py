"""torch operators that ONNX has no operator for, carried through a program as themselves.

A node of domain `org.pytorch.aten` is called like the operator of torch (an overload other than
"default" after a dot), takes its tensors as inputs in the order of torch's schema, and everything
else as attributes of the same names; complex results are a last axis of length 2. The FX executor
runs them by torch; a backend that does not know one refuses it by name. Only the operators listed
here are carried and run: a file cannot reach any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import onnx_ir as ir
import torch

from optcompiler.ops.costs import TRANSCENDENTAL, reading_cost
from optcompiler.ops.declare import op
from optcompiler.ops.spec import OpSpec
from optcompiler.ops.types import torch_type

DOMAIN = "org.pytorch.aten"

NAMES = (
    "_linalg_det", "_linalg_eigh", "_linalg_slogdet", "_linalg_solve_ex", "_linalg_svd",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "as_strided_scatter", "cholesky",
    "cholesky_inverse", "cholesky_solve", "cummax", "cummin", "diagonal_scatter", "digamma",
    "erfinv", "fractional_max_pool2d", "fractional_max_pool3d", "frexp.Tensor", "geqrf",
    "grid_sampler_3d", "histc", "histogram.bin_ct", "i0", "igamma", "igammac", "index_reduce",
    "kthvalue", "lgamma", "linalg_cholesky", "linalg_cholesky_ex", "linalg_det", "linalg_eig",
    "linalg_eigh", "linalg_eigvalsh", "linalg_householder_product", "linalg_inv", "linalg_inv_ex",
    "linalg_ldl_factor", "linalg_ldl_factor_ex", "linalg_ldl_solve", "linalg_lstsq", "linalg_lu",
    "linalg_lu_factor", "linalg_lu_factor_ex", "linalg_lu_solve", "linalg_matrix_exp",
    "linalg_pinv", "linalg_pinv.atol_rtol_tensor", "linalg_qr", "linalg_slogdet", "linalg_solve",
    "linalg_solve_triangular", "linalg_svd", "linalg_svdvals", "linalg_tensorinv", "logdet",
    "lu_unpack", "median", "median.dim", "mode", "mvlgamma", "nanmedian", "nanmedian.dim",
    "nextafter", "nonzero_static", "ormqr", "polygamma", "put", "segment_reduce", "special_airy_ai",
    "special_bessel_j0", "special_bessel_j1", "special_bessel_y0", "special_bessel_y1",
    "special_chebyshev_polynomial_t", "special_chebyshev_polynomial_u",
    "special_chebyshev_polynomial_v", "special_chebyshev_polynomial_w", "special_entr",
    "special_erfcx", "special_hermite_polynomial_h", "special_hermite_polynomial_he", "special_i0e",
    "special_i1", "special_i1e", "special_laguerre_polynomial_l", "special_legendre_polynomial_p",
    "special_log_ndtr", "special_modified_bessel_i0", "special_modified_bessel_i1",
    "special_modified_bessel_k0", "special_modified_bessel_k1", "special_ndtri",
    "special_scaled_modified_bessel_k0", "special_scaled_modified_bessel_k1",
    "special_shifted_chebyshev_polynomial_t", "special_shifted_chebyshev_polynomial_u",
    "special_shifted_chebyshev_polynomial_v", "special_shifted_chebyshev_polynomial_w",
    "special_spherical_bessel_j0", "special_zeta", "triangular_solve", "unique_consecutive",
)  # fmt: skip
"""Operators as torch.export leaves them, without those that ONNX can express."""


def overload_of(name: str) -> Any:
    """The operator of torch (an OpOverload) behind a node's type."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def schema_of(name: str) -> Any:
    """The arguments and returns of the operator as torch declares them (a FunctionSchema)."""
    return overload_of(name)._schema


def is_tensor(argument: Any) -> bool:
    """Whether an argument of a torch schema is an input of the node; the others are attributes."""
    return "Tensor" in str(argument.type)


def _meaning(name: str) -> Callable[..., Any]:
    overload = overload_of(name)
    arguments = schema_of(name).arguments

    def call(*tensors: torch.Tensor | None, **attributes: Any) -> Any:
        inputs = iter(tensors)
        given = {a.name: _value(a, inputs, attributes) for a in arguments}
        positional = [given.pop(a.name) for a in arguments if not a.kwarg_only]
        result = overload(*positional, **given)
        if isinstance(result, torch.Tensor):
            return _pairs(result)
        return tuple(_pairs(r) for r in cast("tuple[torch.Tensor, ...]", result))

    call.__name__ = call.__qualname__ = name.replace(".", "_")
    return call


def _value(argument: Any, inputs: Iterator[torch.Tensor | None], attributes: dict[str, Any]) -> Any:
    if is_tensor(argument):
        return next(inputs, None)
    value = attributes.get(argument.name, argument.default_value)
    if value is not None and "ScalarType" in str(argument.real_type):
        return torch_type(ir.DataType(value))
    return bool(value) if str(argument.type) == "bool" else value


def _pairs(result: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(result) if result.is_complex() else result


SPECS: tuple[OpSpec, ...] = tuple(
    op(name, _meaning(name), reading_cost(TRANSCENDENTAL), domain=DOMAIN) for name in NAMES
)
