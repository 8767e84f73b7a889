"""The ONNX front door: a file, a protobuf or an onnx_ir model becomes a verified program."""

from __future__ import annotations

import ast
import contextlib
import logging
import os
import stat
import threading
import warnings
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes import common as ir_passes

from optcompiler.errors import InputError, VerificationError
from optcompiler.program import FUSED_DOMAIN, PASS_KEY, SOURCE_KEY, Program

MINIMUM_OPSET = 20
"""The default operator set is upgraded to this version where the converters can."""

MINIMUM_IR_VERSION = 10
"""First IR version with metadata on nodes and 4-bit integers."""

MAPPED_ABOVE_BYTES = 1024
"""Smaller external tensors are read: protobufs made for checking hold them, which have no path."""

_FLOATS = frozenset(t for t in ir.DataType if t.is_floating_point())
_CHUNK = 1 << 22
_NO_MODULE = "_empty_nn_module_stack"


def program_from_onnx(source: str | Path | onnx.ModelProto | ir.Model) -> Program:
    """A verified program from an ONNX file, protobuf or onnx_ir model, which is left as it is.

    Functions of foreign domains are inlined, constants become initializers, unnamed or twice named
    nodes and values get unique names (unique ones keep theirs, whatever characters they hold), an
    output that is an input, a constant or another output gets an Identity of its own, the
    operator set is upgraded to `MINIMUM_OPSET` where the converters can, and shapes are inferred
    strictly. Weights in external data stay memory-mapped, small ones aside.

    Raises `InputError` naming the file for one that is missing, empty, truncated or not ONNX, for
    external data outside the model's directory, for NaN or infinite weights, for inputs or outputs
    of unknown type or rank, and for an invalid model.
    """
    model, label = _load(source)
    _check_external_data(model, label)
    stated = {
        name for name, value in model.graph.initializers.items() if value.const_value is not None
    }
    _check_connected(model, label)
    _own_weights(model, label)
    _check_finite(model, stated, label)
    _declutter(model, label)
    _check_ports("input", model.graph.inputs, label)
    _state_defaults(model)
    program = Program(_at_minimum_opset(model))
    _name_everything(program.model)
    _keep_source_paths(program.model)
    _set_ir_version(program.model)
    try:
        program.infer_shapes()
        infer_outputs(program)
        _settle_casts(program)
        program.verify()
    except VerificationError as error:
        cause = str(error).rstrip(" .")
        raise InputError(f"{label}: {cause}; fix the model or export it again.") from error
    _check_ports("output", program.graph.outputs, label)
    return program


# -- reading --------------------------------------------------------------------------------


def _load(source: str | Path | onnx.ModelProto | ir.Model) -> tuple[ir.Model, str]:
    if isinstance(source, ir.Model):
        return source.clone(), "the model"
    if isinstance(source, onnx.ModelProto):
        return _from_proto(source, "the model"), "the model"
    if not isinstance(source, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(
            f"a {type(source).__name__} is not an ONNX model; "
            f"give a path, an onnx.ModelProto or an onnx_ir.Model."
        )
    path = Path(source).absolute()
    label = str(source)
    model = _from_proto(_read(path, label), label)
    for tensor in _tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            tensor.base_dir = str(path.parent)
    return model, label


def _read(path: Path, label: str) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        data = path.read_bytes()
        if not data:
            raise InputError(f"{label}: the file is empty; export the model again.")
        proto.ParseFromString(data)
    except FileNotFoundError as error:
        raise InputError(f"{label}: no such file; check the path.") from error
    except OSError as error:
        raise InputError(f"{label}: cannot be read ({error.strerror}); check the path.") from error
    except DecodeError as error:
        raise InputError(
            f"{label}: truncated, or not an ONNX file; export or copy the model again."
        ) from error
    return proto


def _from_proto(proto: onnx.ModelProto, label: str) -> ir.Model:
    if not proto.HasField("graph") or not proto.opset_import:
        raise InputError(f"{label}: holds no ONNX graph; export the model again.")
    try:
        with quiet():
            return ir.from_proto(proto)
    except Exception as error:
        raise InputError(
            f"{label}: not a valid ONNX model ({_one_line(error)}); export the model again."
        ) from error


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in _graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.is_ref():
                    continue
                if attribute.type == ir.AttributeType.TENSOR:
                    yield attribute.as_tensor()
                elif attribute.type == ir.AttributeType.TENSORS:
                    yield from attribute.as_tensors()


def _graphs(model: ir.Model) -> Iterator[ir.Graph]:
    yield from model.graphs()
    for function in model.functions.values():
        yield function.graph


def _check_external_data(model: ir.Model, label: str) -> None:
    sizes: dict[str, int] = {}
    for tensor in _tensors(model):
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        location = os.fspath(tensor.location)
        where = f"{label}: external data {location!r} of {tensor.name!r}"
        if not os.fspath(tensor.base_dir):
            raise InputError(f"{where} has no directory to be in; give the path of the file.")
        base = os.path.realpath(tensor.base_dir)
        path = os.path.realpath(os.path.join(base, location))
        if os.path.isabs(location) or os.path.commonpath([base, path]) != base:
            raise InputError(
                f"{where} lies outside the model's directory; put the data beside the model."
            )
        if location not in sizes:
            sizes[location] = _size_of_data(path, where)
        end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
        if end > sizes[location] or (tensor.length or tensor.nbytes) < tensor.nbytes:
            raise InputError(
                f"{where} ends at byte {end} of {sizes[location]}; copy the data file again."
            )


def _size_of_data(path: str, where: str) -> int:
    try:
        status = os.stat(path)
    except OSError as error:
        raise InputError(
            f"{where} cannot be read ({error.strerror}); put the data beside the model."
        ) from error
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise InputError(
            f"{where} is not a file of its own (hard links lead elsewhere); copy it to a new file."
        )
    return status.st_size


def _check_connected(model: ir.Model, label: str) -> None:
    for node in model.graph.all_nodes():
        for value in node.inputs:
            if value is None or value.producer() is not None:
                continue
            if not (value.is_graph_input() or value.is_initializer()):
                raise InputError(
                    f"{label}: {node.op_type} {node.name!r} reads {value.name!r}, "
                    f"which nothing makes; export the model again."
                )


def _own_weights(model: ir.Model, label: str) -> None:
    """Give every initializer a tensor object of its own over the same bytes.

    onnx_ir writes names into tensors, which may belong to the caller's protobuf or model; and a
    protobuf's tensor decodes its bytes at every access.
    """
    for graph in _graphs(model):
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None:
                if not value.is_graph_input():
                    raise InputError(
                        f"{label}: initializer {name!r} has no data; load its weights."
                    )
                continue
            try:
                value.const_value = _own(tensor, name)
            except (ValueError, TypeError, OSError, RuntimeError) as error:
                raise InputError(
                    f"{label}: initializer {name!r} cannot be read ({_one_line(error)}); "
                    f"export the model again."
                ) from error
            value.dtype = value.const_value.dtype
            value.shape = ir.Shape(tensor.shape.numpy())


def _own(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes > MAPPED_ABOVE_BYTES:
        return ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
            base_dir=tensor.base_dir,
        )
    if tensor.dtype == ir.DataType.STRING:
        return ir.StringTensor(tensor.numpy(), shape=ir.Shape(tensor.shape.numpy()), name=name)
    return ir.Tensor(tensor.numpy(), tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name)


def _check_finite(model: ir.Model, names: Iterable[str], label: str) -> None:
    for name in names:
        tensor = model.graph.initializers[name].const_value
        if tensor is None or tensor.dtype not in _FLOATS:
            continue
        bad = not_finite(tensor.numpy())
        if bad:
            raise InputError(
                f"{label}: initializer {name!r} holds {bad} NaN or infinite values "
                f"of {tensor.size}; fix the checkpoint."
            )


def not_finite(array: np.ndarray) -> int:
    """How many elements are NaN, or infinite in an array that is no mask.

    A mask (an attention mask, a clipping bound) holds nothing but zeros, ones and infinities.
    """
    flat = array.reshape(-1)
    chunks = [flat[i : i + _CHUNK] for i in range(0, flat.size, _CHUNK)]
    bad = sum(int(np.count_nonzero(~np.isfinite(c))) for c in chunks)
    if bad == 0:
        return 0
    mask = all(bool(np.all(np.isinf(c) | (c == 0) | (c == 1))) for c in chunks)
    return 0 if mask else bad


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
            f"{label}: not a valid ONNX model ({_one_line(error)}); export the model again."
        ) from error
    _round_attributes(model)
    for graph in _graphs(model):
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                value.const_value = _own(value.const_value, name)


def _round_attributes(model: ir.Model) -> None:
    """Float attributes take the float32 value that a file would hold."""
    for graph in _graphs(model):
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


def _at_minimum_opset(model: ir.Model) -> ir.Model:
    """`model` at `MINIMUM_OPSET` or later; as it is where the converters cannot take it there."""
    if model.graph.opset_imports[""] >= MINIMUM_OPSET or model.functions:
        return model
    from onnxscript import version_converter

    converted = model.clone()
    try:
        with quiet():
            version_converter.convert_version(converted, MINIMUM_OPSET, fallback=True)
        for node in converted.graph.all_nodes():
            node.version = None
        if converted.graph.opset_imports[""] < MINIMUM_OPSET:
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
    for graph in _graphs(model):
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
    inferred = program.clone()
    with quiet():
        ir_passes.ShapeInferencePass(strict_mode=False, data_prop=True)(inferred.model)
    for value, found in zip(outputs, inferred.graph.outputs, strict=True):
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


# -- small helpers --------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """No log records and no warnings for the duration: exporters have much to say.

    Several threads may be inside at once; the last to leave restores what the first found.
    """
    with _quiet_lock:
        if not _quiet_before:
            filters = warnings.catch_warnings()
            filters.__enter__()
            warnings.simplefilter("ignore")
            _quiet_before.append((logging.root.manager.disable, filters))
            logging.disable(logging.CRITICAL)
        _quiet_depth.append(None)
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_depth.pop()
            if not _quiet_depth:
                before, filters = _quiet_before.pop()
                logging.disable(before)
                filters.__exit__(None, None, None)


_quiet_lock = threading.Lock()
_quiet_depth: list[None] = []
_quiet_before: list[tuple[int, warnings.catch_warnings[None]]] = []


def _one_line(error: Exception) -> str:
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return " ".join(str(error).split())[:300]
