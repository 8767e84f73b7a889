"""Programs as differentiable `torch.fx.GraphModule`s, and back.

Every ONNX node becomes one `call_function` of the torch meaning that the operator table has for it;
calls of model-local functions are expanded, subgraphs become submodules. Quantised values are float
tensors that hold the levels and are cast to their declared type only at outputs and where an
operator wants integers.

Metadata: an FX node carries `meta["onnx_node"]` and `meta["onnx_value"]` (inside an expanded call
both begin with the caller's name and a slash) and `meta["onnx_type"]`, an `onnx_ir.DataType` or
None. `module.meta["onnx_weights"]` maps attribute names to initializer names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from optcompiler.errors import InputError, UnsupportedOperatorError
from optcompiler.ops import OpTable, builtin_table
from optcompiler.ops.fxgraph import NODE_KEY, TYPE_KEY, VALUE_KEY, WEIGHTS_KEY, GraphBuilder
from optcompiler.ops.types import (
    from_carrier,
    numpy_of,
    onnx_type,
    tensor_from_ir,
    tensor_of,
    torch_type,
)
from optcompiler.program import Program

__all__ = [
    "NODE_KEY", "TYPE_KEY", "VALUE_KEY", "WEIGHTS_KEY", "argument_of", "interpret", "observe",
    "refit", "to_torch",
]  # fmt: skip


def to_torch(
    program: Program,
    ops: OpTable | None = None,
    *,
    extra_outputs: Sequence[str] = (),
    trainable: bool = True,
) -> fx.GraphModule:
    """A module that computes `program`: graph inputs by position, a tuple of outputs.

    Float initializers are parameters and the others buffers, except for those that describe
    structure (shapes, axes, clip bounds, a scalar exponent), which are Python constants in the
    code. With `trainable` the module owns copies of them; without, it shares the program's memory,
    which may be a read-only file, requires no gradients, and must not be written to.

    `extra_outputs` names values of the main graph to be returned after the outputs; levels among
    them come in their declared integer type.

    Raises `UnsupportedOperatorError` for an operator that `ops` (default: the built-in table) does
    not have, and `InputError` for an extra output that does not exist.
    """
    outputs = [v.name or "" for v in program.graph.outputs]
    return _build(program, ops, [*outputs, *extra_outputs], trainable)


def refit(program: Program, module: fx.GraphModule) -> Program:
    """A program whose initializers hold the values that `module`, made by `to_torch`, has now.

    Only initializers whose values differ become new tensors. Raises `InputError` when the module
    does not come from a program with these initializers, or a tensor's shape changed.
    """
    names: Mapping[str, str] | None = module.meta.get(WEIGHTS_KEY)
    if names is None:
        raise InputError("refit: the module holds no weight map; pass a module made by to_torch.")
    result = program.clone()
    for attribute, name in names.items():
        value = result.graph.initializers.get(name)
        if value is None or value.const_value is None:
            raise InputError(
                f"refit: the program has no initializer {name!r}; "
                f"pass the program that the module was made from."
            )
        now = cast("torch.Tensor", getattr(module, attribute)).detach().cpu()
        before = tensor_from_ir(value.const_value)
        if now.shape != before.shape:
            raise InputError(
                f"refit: {name!r} has shape {list(now.shape)} in the module and "
                f"{list(before.shape)} in the program; keep shapes when training."
            )
        now = now.to(before.dtype)
        if not torch.equal(now, before):
            dtype = ir.DataType(value.const_value.dtype)
            result.set_weight(value, numpy_of(now, dtype).copy())
    return result


def interpret(
    source: Program | fx.GraphModule,
    inputs: Mapping[str, np.ndarray | torch.Tensor],
    names: Sequence[str],
    ops: OpTable | None = None,
) -> dict[str, torch.Tensor]:
    """The values of the main graph called `names`, computed without gradients.

    Only what they need is run. `source` may be a module made by `to_torch`, to save making one for
    each batch; then values are read on the fly, on that module's device.
    """
    found: dict[str, torch.Tensor] = {}
    if isinstance(source, Program):
        module = _build(source, ops, names, trainable=False)
        with torch.no_grad():
            results = module(*_arguments(module, inputs))
        return dict(zip(names, results, strict=True))
    observe(source, inputs, found.__setitem__, names)
    return found


def computed(
    node: ir.Node, ops: OpTable | None = None, values: Sequence[np.ndarray | None] | None = None
) -> list[ir.Tensor]:
    """The results of a node of a main graph for `values`, or with initializers as all operands.

    Raises `UnsupportedOperatorError` for an operator that `ops` (default: the built-in table) does
    not have, or that works on types that torch has not.
    """
    assert node.graph is not None
    held: dict[ir.Value, ir.Value] = {}
    for position, value in enumerate(node.inputs):
        if value is None:
            continue
        array = None if values is None else values[position]
        tensor = value.const_value if array is None else ir.tensor(array, name=value.name)
        assert tensor is not None
        held[value] = ir.val(
            value.name, tensor.dtype, ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
    outputs = [ir.val(v.name, v.dtype) for v in node.outputs]
    operands = [None if v is None else held[v] for v in node.inputs]
    copy = ir.Node(
        node.domain, node.op_type, operands, list(node.attributes.values()),
        outputs=outputs, name=node.name, version=node.version,
    )  # fmt: skip
    graph = ir.Graph(
        [], outputs, nodes=[copy], initializers=list(held.values()),
        opset_imports=node.graph.opset_imports,
    )  # fmt: skip
    names = [v.name or "" for v in outputs]
    found = interpret(Program(ir.Model(graph, ir_version=10)), {}, names, ops)
    results: list[ir.Tensor] = []
    for value in outputs:
        tensor = found[value.name or ""]
        if not isinstance(tensor, torch.Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UnsupportedOperatorError(
                f"{node.op_type} {node.name!r} gives a sequence or an optional, not a tensor."
            )
        dtype = value.dtype or onnx_type(tensor.dtype)
        results.append(ir.Tensor(numpy_of(tensor, dtype), dtype, name=value.name))
    return results


def observe(
    module: fx.GraphModule,
    inputs: Mapping[str, np.ndarray | torch.Tensor],
    callback: Callable[[str, torch.Tensor], None],
    names: Sequence[str],
) -> tuple[torch.Tensor, ...]:
    """Run without gradients; call `callback(name, tensor)` as each named value is computed.

    Nothing is kept after its last use, so memory does not grow with the number of names. Integers
    come in their declared type. Returns the outputs. Raises `InputError` for an unknown name.
    """
    known = {str(n.meta[VALUE_KEY]) for n in module.graph.nodes if VALUE_KEY in n.meta}
    missing = [name for name in names if name not in known]
    if missing:
        raise InputError(f"observe: no value {missing[0]!r} in the module; check the names.")
    with torch.no_grad():
        watcher = _Watcher(module, callback, frozenset(names))
        return watcher.run(*_arguments(module, inputs))


class _Watcher(fx.Interpreter):
    def __init__(
        self,
        module: fx.GraphModule,
        callback: Callable[[str, torch.Tensor], None],
        names: frozenset[str],
    ) -> None:
        super().__init__(module)
        self.callback = callback
        self.names = names

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        name = n.meta.get(VALUE_KEY)
        if name in self.names:
            dtype = n.meta.get(TYPE_KEY)
            shown = result if dtype is None else from_carrier(result, torch_type(dtype))
            self.callback(name, shown)
        return result


def _arguments(
    module: fx.GraphModule, inputs: Mapping[str, np.ndarray | torch.Tensor]
) -> list[Any]:
    """`inputs` in the order of the module's placeholders, on the module's device."""
    tensors = (*module.parameters(), *module.buffers())
    device = tensors[0].device if tensors else torch.device("cpu")
    arguments: list[Any] = []
    for node in module.graph.nodes:
        if node.op != "placeholder":
            continue
        name = str(node.meta[NODE_KEY])
        if name not in inputs:
            raise InputError(f"no value given for input {name!r}; give one for every graph input.")
        arguments.append(argument_of(inputs[name], device))
    return arguments


def argument_of(value: Any, device: torch.device | None = None) -> Any:
    """An input as a module of `to_torch` takes it: tensors, lists of them for sequences, or None.

    Arrays share their memory with the result where they can. Raises `UnsupportedOperatorError` for
    strings, which torch cannot hold.
    """
    if value is None:
        return None
    if isinstance(value, list):
        return [argument_of(item, device) for item in cast("list[Any]", value)]
    tensor = value if isinstance(value, torch.Tensor) else tensor_of(np.asarray(value))
    return tensor if device is None else tensor.to(device)


def _build(
    program: Program, ops: OpTable | None, names: Sequence[str], trainable: bool
) -> fx.GraphModule:
    builder = GraphBuilder(program.functions, ops or builtin_table(), trainable)
    values: dict[str, ir.Value] = {}
    for value in (*program.graph.inputs, *program.graph.initializers.values()):
        values[value.name or ""] = value
    for node in program.graph:
        values |= {v.name: v for v in node.outputs if v.name}
    missing = [name for name in names if name not in values]
    if missing:
        raise InputError(f"the program has no value {missing[0]!r}; check the name.")
    return builder.module(program.graph, [values[name] for name in names])
