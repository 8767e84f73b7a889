"""What the compiler knows of operators: types here, built-in declarations loaded when asked for."""

from __future__ import annotations

import functools

from optcompiler.ops.spec import (
    Axis,
    ChannelRule,
    Channels,
    CostRule,
    Coupling,
    OpSpec,
    OpTable,
    TorchMeaning,
    Work,
    attributes_of,
    tensor_bytes,
)

__all__ = [
    "Axis", "ChannelRule", "Channels", "CostRule", "Coupling", "OpSpec", "OpTable", "TorchMeaning",
    "Work", "attributes_of", "builtin_specs", "builtin_table", "tensor_bytes",
]  # fmt: skip


@functools.lru_cache(maxsize=1)
def builtin_specs() -> tuple[OpSpec, ...]:
    """Declarations of the ONNX operators that the compiler knows. Imports torch."""
    from optcompiler.ops import (
        activation,
        aten,
        attention,
        contraction,
        detection,
        elementwise,
        indexing,
        loss,
        movement,
        normalization,
        pooling,
        quantization,
        recurrent,
        reduction,
        resize,
        sequences,
        shape,
        signal,
    )

    families = (
        activation,
        aten,
        attention,
        contraction,
        detection,
        elementwise,
        indexing,
        loss,
        movement,
        normalization,
        pooling,
        quantization,
        recurrent,
        reduction,
        resize,
        sequences,
        shape,
        signal,
    )
    return tuple(spec for family in families for spec in family.SPECS)


@functools.lru_cache(maxsize=1)
def builtin_table() -> OpTable:
    """The table of built-in operators, without those that plugins add."""
    return OpTable(builtin_specs())
