"""The ONNX front door: a file, a protobuf or an onnx_ir model becomes a verified program."""

from __future__ import annotations

import ast
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from optcompiler.bounds import refuse_growing_shapes
from optcompiler.errors import InputError, VerificationError
from optcompiler.inference import infer
from optcompiler.program import FUSED_DOMAIN, PASS_KEY, SOURCE_KEY, Program, stub_proto
from optcompiler.reading import graphs_of, one_line, own_tensor, quiet, read_model

MINIMUM_OPSET = 20
"""The default operator set is upgraded to this version where the converters can."""

POOLING_OPSET = 22
"""From here on inference leaves out a pooling window that would start in the padding at the end, as
runtimes do at every version; before, it counts one too many."""

MINIMUM_IR_VERSION = 10
"""First IR version with metadata on nodes and 4-bit integers."""

_NO_MODULE = "_empty_nn_module_stack"
_POOLINGS = ("AveragePool", "LpPool", "MaxPool")

Notes = Mapping[str, tuple[ir.TypeProtocol | None, ir.Shape | None]]


def program_from_onnx(source: str | Path | onnx.ModelProto | ir.Model) -> Program:
    """A verified program from an ONNX file, protobuf or onnx_ir model, which is left as it is.

    Functions of foreign domains are inlined, constants become initializers, unnamed or twice named
    nodes and values get unique names (unique ones keep theirs, whatever characters they hold), an
    output that is an input, a constant or another output gets an Identity of its own, the
    operator set is upgraded to `MINIMUM_OPSET` where the converters can (to `POOLING_OPSET` for a
    pooling that older inference has a wrong shape for), and shapes are inferred strictly. Weights
    in external data stay memory-mapped, small ones aside.

    Raises `InputError` naming the file for one that is missing, empty, truncated or not ONNX, for
    external data outside the model's directory, for NaN or infinite weights, for inputs or outputs
    of unknown type or rank, and for an invalid model.
    """
    model, label = read_model(source)
    # an onnx_ir model comes from a tool that may have rewritten it: its notes may be old
    notes = {} if isinstance(source, ir.Model) else _notes(model)
    _declutter(model, label)
    _check_ports("input", model.graph.inputs, label)
    _state_defaults(model)
    refuse_growing_shapes(model, label)
    opset = _needed_opset(model)
    stated: list[ir.Shape | None] = []
    if model.graph.opset_imports[""] < opset == POOLING_OPSET and _holds_before_upgrade(
        model, notes
    ):
        notes = {}
        stated = _open_outputs(model)
    program = Program(_at_opset(model, opset))
    _name_everything(program.model)
    _keep_source_paths(program.model)
    _set_ir_version(program.model)
    try:
        program.infer_shapes()
        infer_outputs(program)
        if stated:
            _close_outputs(program, stated)
        _settle_casts(program)
        program.verify()
    except VerificationError as error:
        cause = str(error).rstrip(" .")
        raise InputError(f"{label}: {cause}; fix the model or export it again.") from error
    _check_notes(program, notes, label)
    _check_ports("output", program.graph.outputs, label)
    return program


def _notes(model: ir.Model) -> Notes:
    """What a file says of the values between its nodes."""
    return {
        value.name: (value.type, value.shape)
        for node in model.graph
        for value in node.outputs
        if value.name and not value.is_graph_output()
    }


def _check_notes(program: Program, notes: Notes, label: str) -> None:
    """Refuse a file that says of a value what inference contradicts."""
    for node in program.graph:
        for value in node.outputs:
            type_, shape = notes.get(value.name or "", (None, None))
            if type_ is not None and value.type is not None and type_ != value.type:
                raise _contradiction(label, node, value, type_, value.type)
            if shape is None or value.shape is None:
                continue
            fits = len(shape) == len(value.shape) and all(
                a == b or not (isinstance(a, int) and isinstance(b, int))
                for a, b in zip(shape, value.shape, strict=True)
            )
            if not fits:
                raise _contradiction(label, node, value, shape, value.shape)


def _contradiction(
    label: str, node: ir.Node, value: ir.Value, said: object, found: object
) -> InputError:
    return InputError(
        f"{label}: value {value.name!r} of {node.op_type} {node.name!r} is said to be {said}, but "
        f"is {found}; fix the model or export it again."
    )


# -- normal form ----------------------------------------------------------------------------


def _declutter(model: ir.Model, label: str) -> None:
    if "ai.onnx" in model.opset_imports:
        model.opset_imports.setdefault("", model.opset_imports.pop("ai.onnx"))
    model.opset_imports.setdefault("", MINIMUM_OPSET)
    try:
        if model.functions:
            ir_passes.InlinePass(criteria=lambda f: f.domain != FUSED_DOMAIN)(model)
        ir_passes.RemoveInitializersFromInputsPass()(model)
        _fill_value_names(model)
        _separate_outputs(model.graph)
        ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        ir_passes.RemoveUnusedFunctionsPass()(model)
    except Exception as error:
        raise InputError(
            f"{label}: not a valid ONNX model ({one_line(error)}); export the model again."
        ) from error
    _round_attributes(model)
    for graph in graphs_of(model):
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                value.const_value = own_tensor(value.const_value, name)


def _round_attributes(model: ir.Model) -> None:
    """Float attributes take the float32 value that a file would hold."""
    for graph in graphs_of(model):
        for node in graph:
            for name, attribute in tuple(node.attributes.items()):
                if attribute.is_ref():
                    continue
                if attribute.type == ir.AttributeType.FLOAT:
                    rounded = float(np.float32(attribute.as_float()))
                    node.attributes[name] = ir.AttrFloat32(name, rounded)
                elif attribute.type == ir.AttributeType.FLOATS:
                    several = [float(np.float32(f)) for f in attribute.as_floats()]
                    node.attributes[name] = ir.AttrFloat32s(name, several)


def _fill_value_names(model: ir.Model) -> None:
    """Unnamed values get names early: passes of onnx_ir that lift constants need them."""
    taken = {v.name for v in _values(model)}
    counter = 0
    for value in _values(model):
        if value.name:
            continue
        while f"value_{counter}" in taken:
            counter += 1
        value.name = f"value_{counter}"
        taken.add(value.name)


def _separate_outputs(graph: ir.Graph) -> None:
    """An output that no node makes, or a second use of one, becomes an Identity's output."""
    seen: set[ir.Value] = set()
    taken = {v.name for v in graph.inputs} | set(graph.initializers)
    taken |= {v.name for n in graph.all_nodes() for v in n.outputs}
    for index, value in enumerate(tuple(graph.outputs)):
        producer = value.producer()
        constant = producer is not None and producer.op_type == "Constant" and not producer.domain
        plain = producer is not None and producer.graph is graph and not constant
        if plain and value not in seen:
            seen.add(value)
            continue
        assert value.name is not None
        renamed = next(
            n
            for i in range(1 << 30)
            if (n := f"{value.name}_{'value' if i == 0 else i}") not in taken
        )
        taken.add(renamed)
        name = renamed
        if constant or (producer is None and not value.is_graph_input() and value not in seen):
            # the output keeps its name; the constant behind it takes a new one
            name = value.name
        identity = ir.Node("", "Identity", [value])
        output = identity.outputs[0]
        output.type, output.shape = value.type, value.shape
        graph.append(identity)
        graph.outputs[index] = output
        if name == value.name:
            value.name = renamed
        output.name = name
        seen.add(value)


def _state_defaults(model: ir.Model) -> None:
    """State default attributes of operators that are a function without a shape inference of its
    own: inference over the function's body misses what is not stated (onnx 1.23)."""
    version = model.opset_imports[""]
    for node in model.graph.all_nodes():
        if node.domain or not onnx.defs.has(node.op_type):
            continue
        schema = onnx.defs.get_schema(node.op_type, min(version, onnx.defs.onnx_opset_version()))
        function: Any = schema  # the stubs of onnx lack what says that it is one
        if not function.has_function or function.has_type_and_shape_inference_function:
            continue
        for name, attribute in schema.attributes.items():
            if name not in node.attributes and attribute.default_value.type:
                node.attributes.add(ir.serde.deserialize_attribute(attribute.default_value))


def _needed_opset(model: ir.Model) -> int:
    late = any(_may_start_in_padding(n) for n in model.graph.all_nodes())
    return POOLING_OPSET if late else MINIMUM_OPSET


def _may_start_in_padding(node: ir.Node) -> bool:
    """Whether, at some size of the input, a last window would start in the padding at the end."""
    if node.domain or node.op_type not in _POOLINGS:
        return False
    given = node.attributes
    try:
        rounded_up = given.get_int("ceil_mode", 0) and given.get_string("auto_pad", "NOTSET")
        kernel = given.get_ints("kernel_shape", ())
        ones = [1] * len(kernel)
        ends = given.get_ints("pads", [0] * 2 * len(kernel))[len(kernel) :]
        strides, gaps = given.get_ints("strides", ones), given.get_ints("dilations", ones)
    except TypeError:  # an attribute of another type, of which the checker tells
        return False
    if rounded_up != "NOTSET":
        return False
    return any(
        stride + end > (taps - 1) * gap + 1
        for stride, end, taps, gap in zip(strides, ends, kernel, gaps, strict=False)
    )


def _holds_before_upgrade(model: ir.Model, notes: Notes) -> bool:
    """Whether the shapes that a file states are those that inference finds at the file's version:
    the wrong ones, if any are."""
    program = Program(model.clone())
    try:
        program.infer_shapes()
        _check_notes(program, notes, "")
    except (VerificationError, InputError):
        return False
    return True


def _open_outputs(model: ir.Model) -> list[ir.Shape | None]:
    """Leave the sizes of outputs to inference; what they were."""
    stated = [value.shape for value in model.graph.outputs]
    for value in model.graph.outputs:
        if value.shape is not None:
            value.shape = ir.Shape(None if isinstance(d, int) else d for d in value.shape)
    return stated


def _close_outputs(program: Program, stated: Sequence[ir.Shape | None]) -> None:
    """Take the stated sizes of outputs where inference has found none."""
    for value, shape in zip(program.graph.outputs, stated, strict=True):
        if shape is None or value.shape is None or len(value.shape) != len(shape):
            continue
        value.shape = ir.Shape(
            found if isinstance(found, int) else said
            for found, said in zip(value.shape, shape, strict=True)
        )


def _at_opset(model: ir.Model, opset: int) -> ir.Model:
    """`model` at `opset` or later; as it is where the converters cannot take it there."""
    if model.graph.opset_imports[""] >= opset or model.functions:
        return model
    from onnxscript import version_converter

    converted = model.clone()
    try:
        with quiet():
            _align_slopes(converted)
            version_converter.convert_version(converted, opset, fallback=True)
        for node in converted.graph.all_nodes():
            node.version = None
        # one of the converters states what inference finds at the old version
        for value, stated in zip(converted.graph.outputs, model.graph.outputs, strict=True):
            value.shape = stated.shape
        if converted.graph.opset_imports[""] < opset:
            return model
        _fill_value_names(converted)
        ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(converted)
        candidate = Program(converted.clone())
        _name_everything(candidate.model)
        _set_ir_version(candidate.model)
        candidate.infer_shapes()
        candidate.verify(like=Program(model))
    except Exception as error:
        logging.getLogger(__name__).debug("opset kept: %s", error)
        return model
    return converted


def _align_slopes(model: ir.Model) -> None:
    """Before opset 7 the slopes of PRelu lie along axis 1; no converter moves them there."""
    found = [n for n in model.graph.all_nodes() if n.op_type == "PRelu" and not n.domain]
    if model.graph.opset_imports[""] >= 7 or not found:
        return
    ir_passes.ShapeInferencePass()(model)
    for node in found:
        data, slope = node.inputs
        assert data is not None and slope is not None and node.graph is not None  # noqa: PT018
        if data.shape is None or slope.shape is None:
            raise ValueError(f"PRelu {node.name!r} of unknown rank")
        if len(slope.shape) == 1 and slope.shape[0] != 1 and len(data.shape) > 2:
            axes = ir.AttrInt64s("axes", range(1, len(data.shape) - 1))
            aligned = ir.Node("", "Unsqueeze", [slope], [axes])
            aligned.outputs[0].name = f"{node.outputs[0].name}_slope"
            node.graph.insert_before(node, aligned)
            node.replace_input_with(1, aligned.outputs[0])


def _values(model: ir.Model) -> Iterator[ir.Value]:
    """Every value of the main graph and its subgraphs once: inputs, initializers, results."""
    for graph in model.graphs():
        yield from graph.inputs
        yield from tuple(graph.initializers.values())
        for node in graph:
            yield from node.outputs


def _name_everything(model: ir.Model) -> None:
    """Unique names for nodes and for values; the first holder of a name keeps it.

    An optional output that is left out is a value without a name, and stays so when nothing
    reads it.
    """
    values = list(dict.fromkeys(_values(model)))
    nodes = [node for graph in model.graphs() for node in graph]
    names = Counter(v.name for v in values if v.name) + Counter(n.name for n in nodes if n.name)
    taken = set(names)
    fixed = {*model.graph.inputs, *model.graph.outputs}
    seen: set[str] = {v.name for v in fixed if v.name}
    for value in values:
        if value in fixed:
            continue
        if not value.name:
            if value.uses():
                value.name = _fresh("value", taken)
        elif value.name in seen:
            value.name = _fresh(value.name, taken)
        seen.add(value.name or "")
    seen = set()
    for node in nodes:
        if not node.name:
            node.name = _fresh(node.op_type, taken)
        elif node.name in seen:
            node.name = _fresh(node.name, taken)
        seen.add(node.name)


def _fresh(stem: str, taken: set[str]) -> str:
    name = next(n for i in range(1 << 30) if (n := f"{stem}_{i}") not in taken)
    taken.add(name)
    return name


def _keep_source_paths(model: ir.Model) -> None:
    """Drop what exporters noted on nodes and values, except the module a node came from."""
    model.doc_string = None
    model.metadata_props.clear()
    for graph in graphs_of(model):
        graph.doc_string = None
        graph.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            _forget(value)
        for node in graph:
            path = source_path(node)
            maker = node.metadata_props.get(PASS_KEY)
            node.doc_string = None
            node.metadata_props.clear()
            if path:
                node.metadata_props[SOURCE_KEY] = path
            if maker:
                node.metadata_props[PASS_KEY] = maker
            for value in node.outputs:
                _forget(value)


def _forget(value: ir.Value) -> None:
    value.doc_string = None
    value.metadata_props.clear()


def source_path(node: ir.Node) -> str:
    """The module a node was traced from (`layer1.0.conv1`), or "" where the exporter did not say.

    `torch.onnx` notes the scopes around a node, outermost first and the node's own name last.
    """
    known = node.metadata_props.get(SOURCE_KEY, "")
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    if known or not scopes:
        return known
    try:
        paths = ast.literal_eval(scopes)
    except (ValueError, SyntaxError):
        return ""
    if not isinstance(paths, list) or not all(isinstance(p, str) for p in paths):
        return ""
    named = (p for p in reversed(paths[:-1]) if p and not p.startswith(_NO_MODULE))
    return next(named, "")


def _set_ir_version(model: ir.Model) -> None:
    """The lowest IR version that the operator sets allow: stock runtimes refuse newer ones."""
    imports = [onnx.helper.make_opsetid(d, v) for d, v in model.opset_imports.items()]
    needed = onnx.helper.find_min_ir_version_for(imports, ignore_unknown=True)
    model.ir_version = max(MINIMUM_IR_VERSION, needed)


def infer_outputs(program: Program) -> None:
    """Give graph outputs the type and dimensions that inference finds and the file left open."""
    outputs = program.graph.outputs
    if all(v.type is not None and v.shape is not None and v.shape.is_static() for v in outputs):
        return
    inferred = infer(stub_proto(program.model), strict=False)
    for value, info in zip(outputs, inferred.graph.output, strict=True):
        found = ir.serde.deserialize_value_info_proto(info, None)
        if value.type is None:
            value.type = found.type
        if found.shape is None or (
            value.shape is not None and len(value.shape) != len(found.shape)
        ):
            continue
        known = value.shape or ir.Shape([None] * len(found.shape))
        value.shape = ir.Shape(
            f if not isinstance(d, int) and (isinstance(f, int) or d.value is None) else d
            for d, f in zip(known, found.shape, strict=True)
        )


def _settle_casts(program: Program) -> None:
    """CastLike of a known type becomes Cast: exporters write it, few runtimes have it."""
    for node in tuple(program.graph.all_nodes()):
        like = node.inputs[1] if node.op_type == "CastLike" and not node.domain else None
        if like is None or like.dtype is None:
            continue
        attributes = [*node.attributes.values(), ir.AttrInt64("to", int(like.dtype))]
        cast = ir.Node(
            "", "Cast", node.inputs[:1], attributes, name=node.name, num_outputs=1,
            metadata_props=dict(node.metadata_props),
        )  # fmt: skip
        old, new = node.outputs[0], cast.outputs[0]
        new.name, new.type, new.shape = old.name, old.type, old.shape
        assert node.graph is not None
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], [cast], [old], [new])


def _check_ports(kind: str, values: Sequence[ir.Value], label: str) -> None:
    for value in values:
        if not isinstance(value.type, (ir.TensorType, ir.SequenceType, ir.OptionalType)):
            raise InputError(
                f"{label}: {kind} {value.name!r} is {value.type or 'of unknown type'}; "
                f"only tensors, sequences and optionals can be compiled, so cut the model there."
            )
        if isinstance(value.type, ir.TensorType) and value.shape is None:
            raise InputError(
                f"{label}: {kind} {value.name!r} has no shape; "
                f"declare its number of dimensions and export again."
            )
    if kind == "output" and not values:
        raise InputError(f"{label}: the model has no outputs; export it again.")
