"""Reading ONNX as untrusted input: bytes become an onnx_ir model that is safe to work on."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import warnings
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from optcompiler.errors import InputError
from optcompiler.screening import screen
from optcompiler.untrusted import mapped, opened

MOST_FILE_BYTES = 1 << 31
"""What protobuf reads."""

MAPPED_ABOVE_BYTES = 1024
"""Smaller external tensors are read: protobufs made for checking hold them, which have no path."""

_FLOATS = frozenset(t for t in ir.DataType if t.is_floating_point())
_CHUNK = 1 << 22


def read_model(source: str | Path | onnx.ModelProto | ir.Model) -> tuple[ir.Model, str]:
    """An onnx_ir model of one's own, with weights of its own, and what messages call it.

    Raises `InputError` as `importing.program_from_onnx` says.
    """
    model, label = _load(source)
    _check_external_data(model, label)
    stated = {
        name for name, value in model.graph.initializers.items() if value.const_value is not None
    }
    _check_connected(model, label)
    _own_weights(model, label)
    _check_finite(model, stated, label)
    return model, label


def check_file(path: Path) -> None:
    """Raise `InputError` for an ONNX file that no runtime should be given."""
    model = _from_proto(_read(path, str(path)), str(path))
    for tensor in _tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            tensor.base_dir = str(path.absolute().parent)
    _check_external_data(model, str(path))


def data_files(path: Path) -> list[Path]:
    """The files of external data that an ONNX file refers to, beside it as it is spelled."""
    model, _ = _load(path)
    tensors = (t for t in _tensors(model) if isinstance(t, ir.ExternalTensor))
    return [path.parent / name for name in sorted({str(t.location) for t in tensors})]


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
    remedy = "a protobuf holds 2 GiB, so save the weights as external data"
    with mapped(path, label, MOST_FILE_BYTES, remedy) as data:
        try:
            proto.ParseFromString(data)  # type: ignore[arg-type]  # its stubs know bytes alone
        except DecodeError as error:
            raise InputError(
                f"{label}: truncated, nested too deep, or not an ONNX file; export or copy the "
                f"model again."
            ) from error
    return proto


def _from_proto(proto: onnx.ModelProto, label: str) -> ir.Model:
    if not proto.HasField("graph"):
        raise InputError(f"{label}: holds no ONNX graph; export the model again.")
    screen(proto, label)
    try:
        with quiet():
            return ir.from_proto(proto)
    except Exception as error:
        raise InputError(
            f"{label}: not a valid ONNX model ({one_line(error)}); export the model again."
        ) from error


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in graphs_of(model):
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


def graphs_of(model: ir.Model) -> Iterator[ir.Graph]:
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
    with opened(Path(path), where, "put the data beside the model") as (handle, size):
        if os.fstat(handle).st_nlink > 1:
            raise InputError(
                f"{where} is not a file of its own (hard links lead elsewhere); copy it to a new "
                f"file."
            )
        return size


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
    for value in model.graph.outputs:
        if value.producer() is None and not (value.is_graph_input() or value.is_initializer()):
            raise InputError(
                f"{label}: output {value.name!r} is made by nothing; export the model again."
            )


def _own_weights(model: ir.Model, label: str) -> None:
    """Give every initializer a tensor object of its own over the same bytes.

    onnx_ir writes names into tensors, which may belong to the caller's protobuf or model; and a
    protobuf's tensor decodes its bytes at every access.
    """
    for graph in graphs_of(model):
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None:
                if not value.is_graph_input():
                    raise InputError(
                        f"{label}: initializer {name!r} has no data; load its weights."
                    )
                continue
            try:
                value.const_value = own_tensor(tensor, name)
            except (ValueError, TypeError, OSError, RuntimeError) as error:
                raise InputError(
                    f"{label}: initializer {name!r} cannot be read ({one_line(error)}); "
                    f"export the model again."
                ) from error
            value.dtype = value.const_value.dtype
            value.shape = ir.Shape(tensor.shape.numpy())


def own_tensor(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
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


def one_line(error: Exception) -> str:
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return " ".join(str(error).split())[:300]
