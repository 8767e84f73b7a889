"""A compiled library in this process, called through ctypes without copies."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from optcompiler.backend import Runner
from optcompiler.errors import InputError

NUMPY = {
    "FLOAT": np.float32, "DOUBLE": np.float64, "INT64": np.int64, "INT32": np.int32,
    "INT16": np.int16, "INT8": np.int8, "UINT8": np.uint8, "BOOL": np.bool_,
    "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64, "FLOAT16": np.float16,
    "BFLOAT16": ml_dtypes.bfloat16, "FLOAT8E4M3FN": ml_dtypes.float8_e4m3fn,
    "FLOAT8E4M3FNUZ": ml_dtypes.float8_e4m3fnuz, "FLOAT8E5M2": ml_dtypes.float8_e5m2,
    "FLOAT8E5M2FNUZ": ml_dtypes.float8_e5m2fnuz, "FLOAT4E2M1": ml_dtypes.float4_e2m1fn,
    "INT4": ml_dtypes.int4, "UINT4": ml_dtypes.uint4, "INT2": ml_dtypes.int2,
    "UINT2": ml_dtypes.uint2,
}  # fmt: skip


_loaded: dict[Path, list[tuple[int, int]]] = {}
_loading = threading.Lock()


def _spelling(library: Path) -> str:
    """A spelling of the path under which no other file has been loaded in this process.

    dlopen takes a path that it has seen for the library it loaded from there, even after another
    artifact has been saved in that place; under a new path it compares device and inode.
    """
    status = library.stat()
    with _loading:
        files = _loaded.setdefault(library, [])
        if (file := (status.st_dev, status.st_ino)) not in files:
            files.append(file)
        return os.path.join(library.parent, *["."] * files.index(file), library.name)


class _Port(ctypes.Structure):
    """`NAME_port` of the header."""

    _fields_ = (
        ("name", ctypes.c_char_p), ("dtype", ctypes.c_char_p), ("rank", ctypes.c_int),
        ("shape", ctypes.POINTER(ctypes.c_long)),
    )  # fmt: skip


def _check_ports(function: Any, said: Sequence[Mapping[str, Any]], library: str) -> None:
    """Refuse a manifest with another interface than the library, which checks no sizes itself."""
    count = ctypes.c_int()
    function.restype = ctypes.POINTER(_Port)
    ports: Any = function(ctypes.byref(count))
    found = [(p.dtype.decode(), [p.shape[i] for i in range(p.rank)]) for p in ports[: count.value]]
    stated = [(str(p["dtype"]), [int(d) for d in p["shape"]]) for p in said]
    if found != stated:
        raise InputError(
            f"{library} has the interface {found}, but the manifest says {stated}; compile or copy "
            f"the artifact again."
        )


def _step_names(function: Any) -> tuple[str, ...]:
    count = ctypes.c_int()
    function.restype = ctypes.POINTER(ctypes.c_char_p)
    names: Any = function(ctypes.byref(count))
    return tuple(name.decode("utf-8", "surrogatepass") for name in names[: count.value])


class CpuRunner(Runner):
    """One handle of the library `name` in `directory`. `ports` are the manifest's inputs and
    outputs, `sizes` what it says of sizes that are set before a run."""

    def __init__(
        self, directory: Path, name: str, ports: Mapping[str, Any], threads: int,
        sizes: Sequence[Mapping[str, Any]] = (),
    ) -> None:  # fmt: skip
        library, weights = directory / f"lib{name}.so", directory / f"{name}.weights"
        self._inputs = [str(p["name"]) for p in ports["inputs"]]
        self._outputs = [
            (tuple(int(d) for d in p["shape"]), np.dtype(NUMPY[p["dtype"]]))
            for p in ports["outputs"]
        ]
        try:
            lib = ctypes.CDLL(_spelling(library.resolve()))
        except OSError as error:
            raise InputError(
                f"cannot load {library.name}: {error}; compile it again for this machine."
            ) from error
        for kind in ("inputs", "outputs"):
            _check_ports(getattr(lib, f"{name}_{kind}"), ports[kind], library.name)
        create, self._destroy = getattr(lib, f"{name}_create"), getattr(lib, f"{name}_destroy")
        create.restype = ctypes.c_void_p
        create.argtypes = [ctypes.c_char_p]
        set_threads = getattr(lib, f"{name}_set_threads")
        set_threads.argtypes = [ctypes.c_void_p, ctypes.c_int]
        table = ctypes.POINTER(ctypes.c_void_p)
        self._run = getattr(lib, f"{name}_run")
        self._run.argtypes = [ctypes.c_void_p, table, table]
        self._run_profiled = getattr(lib, f"{name}_run_profiled")
        self._run_profiled.argtypes = [ctypes.c_void_p, table, table, ctypes.c_void_p]
        self._destroy.argtypes = [ctypes.c_void_p]
        self._net: int | None = create(str(weights.resolve()).encode())
        if not self._net:
            if wanted := os.environ.get(f"{name}_ISA"):
                raise InputError(
                    f"{library.name} has no code for {name}_ISA={wanted!r} that this machine runs, "
                    f"or {weights.name} is missing; unset the variable, or save the artifact again."
                )
            raise InputError(
                f"{weights.name} is missing or belongs to another artifact; save it again."
            )
        if set_threads(self._net, threads):
            raise InputError(f"cannot start {threads} threads; give fewer.")
        self._steps = _step_names(getattr(lib, f"{name}_steps"))
        self._sizes = [
            (str(s["name"]), [(str(n), int(axis)) for n, axis in s["axes"]]) for s in sizes
        ]
        self._set: list[list[int]] = []
        if self._sizes:
            self._set_size = getattr(lib, f"{name}_set_size")
            self._set_size.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_long]
            self._length = getattr(lib, f"{name}_output_length")
            self._length.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
            self._length.restype = ctypes.c_long

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return self._call(inputs, None)

    def kernel_times_us(self, inputs: Mapping[str, np.ndarray]) -> dict[str, float]:
        times = np.zeros(max(len(self._steps), 1), np.float64)
        self._call(inputs, times)
        return {name: float(t) for name, t in zip(self._steps, times, strict=False)}

    def _call(self, inputs: Mapping[str, np.ndarray], times: np.ndarray | None) -> list[np.ndarray]:
        if self._net is None:
            raise InputError("this artifact was closed; load it again.")
        arrays = [np.ascontiguousarray(inputs[name]) for name in self._inputs]
        outputs = [np.empty(shape, dtype) for shape, dtype in self._shapes(inputs)]
        sources = (ctypes.c_void_p * max(len(arrays), 1))(*(a.ctypes.data for a in arrays))
        targets = (ctypes.c_void_p * max(len(outputs), 1))(*(o.ctypes.data for o in outputs))
        if times is None:
            self._run(self._net, sources, targets)
        else:
            self._run_profiled(self._net, sources, targets, times.ctypes.data)
        return outputs

    def _shapes(
        self, inputs: Mapping[str, np.ndarray]
    ) -> Sequence[tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shapes and types of the outputs, after the library was told the sizes of the inputs."""
        sizes = [[inputs[port].shape[axis] for port, axis in axes] for _, axes in self._sizes]
        if sizes == self._set:
            return self._outputs
        self._set = []
        for place, ((name, _), found) in enumerate(zip(self._sizes, sizes, strict=True)):
            if len({*found}) != 1 or self._set_size(self._net, place, found[0]):
                raise InputError(
                    f"the inputs have {name} {', '.join(map(str, dict.fromkeys(found)))}; give one "
                    f"size within the bounds that the artifact was compiled for."
                )
        self._outputs = [
            (tuple(self._length(self._net, i, axis) for axis in range(len(shape))), dtype)
            for i, (shape, dtype) in enumerate(self._outputs)
        ]
        self._set = sizes
        return self._outputs

    def close(self) -> None:
        if self._net is not None:
            self._destroy(self._net)
            self._net = None

    def __del__(self) -> None:
        if getattr(self, "_net", None) is not None:
            self.close()
