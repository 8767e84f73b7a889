"""Files that are no models, and external data that leads elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from tests.hostile.corpus import CANARY, SECRET, add, item
from tests.hostile.graphs import model, node, relu_of

BYTES = 4096 * 4


def model_with_data(**entries: str) -> onnx.ModelProto:
    """Adds a float [4096] weight whose data is elsewhere, as `entries` say."""
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[1024, 4])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return model([node("ReduceSum", "w", "s", keepdims=0), node("Add", "x s", "y")], [tensor])


def with_data(prepare: Callable[[Path], None] | None = None, **entries: str):
    """Saves the model in the folder `model`, after `prepare` has made what lies about."""

    def make(folder: Path) -> list[str]:
        place = folder / "model"
        place.mkdir()
        (folder / SECRET).write_bytes(CANARY * (BYTES // len(CANARY)))
        if prepare is not None:
            prepare(place)
        spelled = {k: v.replace("FOLDER", str(folder)) for k, v in entries.items()}
        (place / "m.onnx").write_bytes(model_with_data(**spelled).SerializeToString())
        return ["compile", str(place / "m.onnx")]

    return make


def whole(place: Path) -> None:
    (place / "data").write_bytes(np.ones(4096, np.float32).tobytes())


def short(place: Path) -> None:
    (place / "data").write_bytes(bytes(BYTES - 1))


def linked_folder(place: Path) -> None:
    (place / "sub").symlink_to(place.parent)


for name, prepare, entries, words in (
    ("parent", None, {"location": "../secret"}, "../secret"),
    ("parent-in-the-middle", None, {"location": "sub/../../secret"}, "secret"),
    ("absolute", None, {"location": "FOLDER/secret"}, "secret"),
    ("symlink", lambda p: (p / "data").symlink_to(p.parent / "secret"), {"location": "data"},
     "data"),
    ("symlink-to-etc", lambda p: (p / "data").symlink_to("/etc/passwd"), {"location": "data"}, ""),
    ("symlinked-folder", linked_folder, {"location": "sub/secret"}, "secret"),
    ("hard-link", lambda p: os.link(p.parent / "secret", p / "data"), {"location": "data"}, "data"),
    ("fifo", lambda p: os.mkfifo(p / "data"), {"location": "data"}, "data"),
    ("directory", lambda p: (p / "data").mkdir(), {"location": "data"}, "data"),
    ("device", None, {"location": "/dev/zero"}, "/dev/zero"),
    ("missing", None, {"location": "data"}, "data"),
    ("model-itself", None, {"location": "m.onnx"}, ""),
    ("empty-location", None, {"location": ""}, ""),
    ("dot", None, {"location": "."}, ""),
    ("nul", None, {"location": "da\0ta"}, ""),
    ("very-long", None, {"location": "a" * 1_000_000}, ""),
    ("newline", None, {"location": "a\nb\x1b[2J"}, ""),
    ("no-location", None, {}, ""),
    ("too-short", short, {"location": "data"}, "data"),
    ("length-too-short", whole, {"location": "data", "length": "16"}, "data"),
    ("length-too-long", whole, {"location": "data", "length": str(1 << 20)}, "data"),
    ("length-huge", whole, {"location": "data", "length": str(1 << 62)}, "data"),
    ("length-beyond-int64", whole, {"location": "data", "length": "9" * 40}, "data"),
    ("length-of-many-digits", whole, {"location": "data", "length": "9" * 10_000}, ""),
    ("length-negative", whole, {"location": "data", "length": "-1"}, ""),
    ("length-no-number", whole, {"location": "data", "length": "all"}, ""),
    ("offset-huge", whole, {"location": "data", "offset": str(1 << 62)}, "data"),
    ("offset-negative", whole, {"location": "data", "offset": "-16"}, "data"),
    ("offset-overflowing", whole, {"location": "data", "offset": str((1 << 64) - 8)}, "data"),
    ("offset-no-number", whole, {"location": "data", "offset": "0x10"}, ""),
    ("unknown-key", whole, {"location": "data", "execute": "touch /tmp/x"}, "execute"),
):  # fmt: skip
    fresh = name in ("parent", "symlink", "fifo", "offset-huge")
    add(f"external-{name}", with_data(prepare, **entries), says=words, fresh=fresh)


@item("external-key-twice", says="location")
def _key_twice(folder: Path) -> list[str]:
    found = model_with_data(location="data")
    found.graph.initializer[0].external_data.add(key="location", value="../secret")
    (folder / "data").write_bytes(bytes(BYTES))
    (folder / "m.onnx").write_bytes(found.SerializeToString())
    return ["compile", str(folder / "m.onnx")]


@item("external-in-an-attribute", says="secret")
def _in_attribute(folder: Path) -> list[str]:
    place = folder / "model"
    place.mkdir()
    (folder / SECRET).write_bytes(CANARY * (BYTES // len(CANARY)))
    tensor = model_with_data(location="../secret").graph.initializer[0]
    found = model([node("Constant", "", "w", value=tensor), node("ReduceSum", "w", "s", keepdims=0),
                   node("Add", "x s", "y")])  # fmt: skip
    (place / "m.onnx").write_bytes(found.SerializeToString())
    return ["compile", str(place / "m.onnx")]


@item("external-and-raw")
def _external_and_raw(folder: Path) -> list[str]:
    found = model_with_data(location="data")
    found.graph.initializer[0].raw_data = bytes(BYTES)
    (folder / "m.onnx").write_bytes(found.SerializeToString())
    return ["compile", str(folder / "m.onnx")]


# -- bytes ----------------------------------------------------------------------------------


def of_bytes(data: bytes, suffix: str = ".onnx") -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        (folder / f"model{suffix}").write_bytes(data)
        return ["compile", str(folder / f"model{suffix}")]

    return make


_GOOD = model(
    [node("Add", "x w", "y")], [numpy_helper.from_array(np.ones((1, 4), np.float32), "w")]
).SerializeToString()
_RNG = np.random.default_rng(0)

add("file-empty", of_bytes(b""), says="empty", fresh=True)
add("file-zeros", of_bytes(bytes(4096)), fresh=True)
add("file-garbage", of_bytes(_RNG.bytes(4096)), fresh=True)
add("file-text", of_bytes(b"not a model\n" * 40))
add("file-html", of_bytes(b"<!doctype html><html><body>404 Not Found</body></html>"))
_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"
add("file-git-lfs", of_bytes(_POINTER))
for cut in (1, 10, len(_GOOD) // 2, len(_GOOD) - 1):
    add(f"file-truncated-{cut}", of_bytes(_GOOD[:cut]), fresh=cut == len(_GOOD) // 2)
for seed in range(8):
    rng = np.random.default_rng(seed)
    flipped = bytearray(_GOOD)
    for place in rng.integers(0, len(_GOOD), 6):
        flipped[place] ^= 1 << int(rng.integers(0, 8))
    # a flip in a weight or a name leaves a model that is another, and as good
    add(f"file-flipped-bits-{seed}", of_bytes(bytes(flipped)), codes=frozenset({0, 2, 3}))


@item("file-missing", says="no such file", fresh=True)
def _missing(folder: Path) -> list[str]:
    return ["compile", str(folder / "nothing.onnx")]


@item("file-fifo", fresh=True)
def _fifo(folder: Path) -> list[str]:
    os.mkfifo(folder / "model.onnx")
    return ["compile", str(folder / "model.onnx")]


@item("file-directory")
def _directory(folder: Path) -> list[str]:
    (folder / "model.onnx").mkdir()
    return ["compile", str(folder / "model.onnx")]


@item("file-symlink-loop")
def _loop(folder: Path) -> list[str]:
    (folder / "model.onnx").symlink_to(folder / "model.onnx")
    return ["compile", str(folder / "model.onnx")]


@item("file-device")
def _device(folder: Path) -> list[str]:
    (folder / "model.onnx").symlink_to("/dev/zero")
    return ["compile", str(folder / "model.onnx")]


@item("file-sparse-1-TiB")
def _sparse(folder: Path) -> list[str]:
    with (folder / "model.onnx").open("wb") as stream:
        stream.truncate(1 << 40)
    return ["compile", str(folder / "model.onnx")]


@item("file-sparse-1-GiB")
def _sparse_gib(folder: Path) -> list[str]:
    with (folder / "model.onnx").open("wb") as stream:
        stream.truncate(1 << 30)
    return ["compile", str(folder / "model.onnx")]


@item("file-unknown-suffix")
def _suffix(folder: Path) -> list[str]:
    (folder / "model.bin").write_bytes(_GOOD)
    return ["compile", str(folder / "model.bin")]


@item("inspect-garbage", fresh=True)
def _inspect(folder: Path) -> list[str]:
    (folder / "model.onnx").write_bytes(b"garbage" * 100)
    return ["inspect", str(folder / "model.onnx")]


@item("diff-garbage")
def _diff(folder: Path) -> list[str]:
    (folder / "a.onnx").write_bytes(relu_of().SerializeToString())
    (folder / "b.onnx").write_bytes(b"garbage")
    return ["diff", str(folder / "a.onnx"), str(folder / "b.onnx")]
