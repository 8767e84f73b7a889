"""Calibration folders whose .npz files hold pickles, lie, explode or lead elsewhere."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.hostile.archives import PICKLE
from tests.hostile.corpus import Make, add
from tests.hostile.graphs import relu_of


def folder_with(fill: Callable[[Path], object]) -> Make:
    def make(folder: Path) -> list[str]:
        (folder / "m.onnx").write_bytes(relu_of().SerializeToString())
        (folder / "data").mkdir()
        fill(folder / "data")
        return ["compile", str(folder / "m.onnx"), "--calibration", str(folder / "data"),
                "--precision", "int8"]  # fmt: skip

    return make


def npy(header: str, data: bytes) -> bytes:
    text = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def npz(data: bytes, how: int = zipfile.ZIP_STORED) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", how) as archive:
            archive.writestr("x.npy", data)
        (folder / "a.npz").write_bytes(stream.getvalue())

    return write


def _header(shape: object, kind: str = "<f4") -> str:
    return f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}, }}"


for name, fill in (
    ("empty-folder", lambda d: None),
    ("pickle", npz(npy(_header((1,), "|O"), PICKLE))),
    ("pickle-alone", lambda d: (d / "a.npz").write_bytes(PICKLE)),
    ("pickle-member", npz(PICKLE)),
    ("garbage", lambda d: (d / "a.npz").write_bytes(b"garbage" * 99)),
    ("empty-file", lambda d: (d / "a.npz").write_bytes(b"")),
    ("shape-huge", npz(npy(_header((1 << 40,)), bytes(16)))),
    ("shape-negative", npz(npy(_header((-1, 4)), bytes(16)))),
    ("shape-overflowing", npz(npy(_header((1 << 62, 1 << 62)), bytes(16)))),
    ("shape-is-code", npz(npy(_header("__import__('os').system('touch owned')"), bytes(16)))),
    ("too-short", npz(npy(_header((1, 4)), bytes(7)))),
    ("shape-of-another", npz(npy(_header((3, 9)), bytes(108)))),
    ("zip-bomb", lambda d: npz(npy(_header((1 << 25,)), bytes(1 << 27)), zipfile.ZIP_DEFLATED)(d)),
    ("nan", npz(npy(_header((1, 4)), np.full(4, np.nan, np.float32).tobytes()))),
    ("fifo", lambda d: os.mkfifo(d / "a.npz")),
    ("device", lambda d: (d / "a.npz").symlink_to("/dev/zero")),
    ("symlink-out", lambda d: (d / "a.npz").symlink_to("/etc/passwd")),
    ("directory", lambda d: (d / "a.npz").mkdir()),
    ("sparse-1-TiB", lambda d: ((d / "a.npz").touch(), os.truncate(d / "a.npz", 1 << 40))),
):  # fmt: skip
    late = name in ("nan", "shape-of-another")
    add(f"calibration-{name}", folder_with(fill), bounded=not late)
