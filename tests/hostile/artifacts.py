"""Artifacts whose bytes were altered, whose files are gone, and whose manifest lies.

One small artifact is compiled for each run; an item is a copy of it with one thing changed. Those
that change what is hashed are sealed again, as somebody would who wants to be believed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.corpus import FINE, Make, add
from tests.hostile.graphs import function_chain, relu_of


@functools.cache
def good() -> Path:
    """An artifact of Relu for onnxruntime; made in another process, where forks cannot inherit
    its threads."""
    place = Path(tempfile.mkdtemp(prefix="hostile-good-"))
    (place / "m.onnx").write_bytes(relu_of().SerializeToString())
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            import optcompiler

            options = {"target": "onnxruntime:threads=1", "precision": "fp32"}
            with optcompiler.compile(place / "m.onnx", **options) as compiled:
                compiled.save(place / "net")
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("the good artifact does not compile")
    return place / "net"


def seal(net: Path) -> None:
    """Make every hash that is recorded right again."""
    for name in ("manifest.json", "records.json"):
        path = net / name
        if not path.exists():
            continue
        data = json.loads(path.read_text())
        for file, entry in data["files"].items():
            content = (net / file).read_bytes()
            entry |= {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
        if "manifest" in data:
            data["manifest"] = hashlib.sha256((net / "manifest.json").read_bytes()).hexdigest()
        path.write_text(json.dumps(data))


def artifact(change: Callable[[Path], object], *command: str, sealed: bool = False) -> Make:
    def make(folder: Path) -> list[str]:
        net = folder / "net"
        shutil.copytree(good(), net)
        change(net)
        if sealed:
            seal(net)
        return [command[0], str(net), *command[1:]]

    return make


def manifest(change: Callable[[dict[str, Any]], object], name: str = "manifest.json"):
    def rewrite(net: Path) -> None:
        data = json.loads((net / name).read_text())
        replaced = change(data)
        (net / name).write_text(json.dumps(data if replaced is None else replaced))
        if name == "manifest.json" and (net / "records.json").exists():
            records = json.loads((net / "records.json").read_text())
            records["manifest"] = hashlib.sha256((net / name).read_bytes()).hexdigest()
            (net / "records.json").write_text(json.dumps(records))

    return rewrite


def write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda net: (net / name).write_bytes(data)


def altered(name: str) -> Callable[[Path], object]:
    def flip(net: Path) -> None:
        data = bytearray((net / name).read_bytes())
        data[len(data) // 2] ^= 1
        (net / name).write_bytes(data)

    return flip


def gone(name: str) -> Callable[[Path], object]:
    return lambda net: (net / name).unlink()


def _replaced(name: str, kind: Callable[[Path], object]) -> Callable[[Path], object]:
    def replace(net: Path) -> None:
        (net / name).unlink()
        kind(net / name)

    return replace


def _link_in(net: Path) -> None:
    (net / "code" / "more").symlink_to("/etc/passwd")


def _put(keys: str, value: object) -> Callable[[dict[str, Any]], object]:
    def put(data: dict[str, Any]) -> None:
        *path, last = keys.split(" ")
        at: Any = data
        for key in path:
            at = at[int(key) if isinstance(at, list) else key]
        at[int(last) if isinstance(at, list) else last] = value

    return put


def _file(name: str) -> Callable[[dict[str, Any]], object]:
    entry = {"sha256": "0" * 64, "size_bytes": 1}
    return lambda data: data["files"].update({name: entry})


def _object(reference: str, *pairs: tuple[str, object]) -> dict[str, Any]:
    items = [{"kind": "constant", "value": v} for _, v in pairs]
    return {"kind": "object", "type": reference, "keys": [k for k, _ in pairs], "items": items}


def _deep(depth: int) -> str:
    return '{"format": "optcompiler-artifact", "x": ' + "[" * depth + "]" * depth + "}"


_PROGRAM = "code/model.onnx"
for name, change in (
    ("code-altered", altered(_PROGRAM)), ("code-gone", gone(_PROGRAM)),
    ("code-empty", write(_PROGRAM, b"")), ("ledger-altered", altered("ledger.json")),
    ("text-altered", altered("program.txt")), ("ledger-gone", gone("ledger.json")),
    ("measurements-gone", gone("measurements.json")),
    ("code-more", write("code/more.so", b"\x7fELF")), ("code-more-link", _link_in),
    ("code-fifo", _replaced(_PROGRAM, os.mkfifo)),
    ("code-link-out", _replaced(_PROGRAM, lambda p: p.symlink_to("/etc/passwd"))),
    ("code-link-device", _replaced(_PROGRAM, lambda p: p.symlink_to("/dev/zero"))),
    ("code-directory", _replaced(_PROGRAM, lambda p: p.mkdir())),
    ("manifest-gone", gone("manifest.json")), ("manifest-empty", write("manifest.json", b"")),
    ("manifest-garbage", write("manifest.json", b"\xff\xfe garbage")),
    ("manifest-list", write("manifest.json", b"[]")),
    ("manifest-deep", write("manifest.json", _deep(100_000).encode())),
    ("manifest-fifo", _replaced("manifest.json", os.mkfifo)),
    ("manifest-device", _replaced("manifest.json", lambda p: p.symlink_to("/dev/zero"))),
    ("manifest-loop", _replaced("manifest.json", lambda p: p.symlink_to("manifest.json"))),
    ("manifest-key-twice", write("manifest.json",
     b'{"format": "optcompiler-artifact", "format": "optcompiler-artifact"}')),
    ("format-other", manifest(_put("format", "zip"))),
    ("format-newer", manifest(_put("format_version", 999))),
    ("format-text", manifest(_put("format_version", "1"))),
    ("hash-wrong", manifest(_put(f"files {_PROGRAM} sha256", "0" * 64))),
    ("size-wrong", manifest(_put(f"files {_PROGRAM} size_bytes", 1))),
    ("size-huge", manifest(_put(f"files {_PROGRAM} size_bytes", 10**30))),
    ("size-negative", manifest(_put(f"files {_PROGRAM} size_bytes", -1))),
    ("size-text", manifest(_put(f"files {_PROGRAM} size_bytes", "all"))),
    ("file-parent", manifest(_file("../../secret"))),
    ("file-absolute", manifest(_file("/etc/passwd"))),
    ("file-backslash", manifest(_file("..\\secret"))),
    ("file-nul", manifest(_file("code/a\0b"))), ("file-nameless", manifest(_file(""))),
    ("file-long", manifest(_file("a/" * 100_000))),
    ("files-list", manifest(_put("files", []))), ("files-null", manifest(_put("files", None))),
    ("target-number", manifest(_put("target", 5))),
    ("target-odd", manifest(_put("target", "onnxruntime:threads=" + "9" * 5000))),
    ("interface-null", manifest(_put("interface", None))),
    ("interface-name", manifest(_put("interface inputs 0 name", ["x"]))),
    ("interface-shape", manifest(_put("interface inputs 0 shape", [[1], {}]))),
    ("interface-dim-huge", manifest(_put("interface inputs 0 shape", [10**40]))),
    ("signature-null", manifest(_put("signature", None))),
    ("signature-index", manifest(_put("signature parameters 0 tree", {"kind": "tensor",
     "index": 7}))),
    ("signature-kind", manifest(_put("signature result", {"kind": "code", "value": "import os"}))),
    ("signature-keys", manifest(_put("signature result", {"kind": "dict", "keys": [{}],
     "items": []}))),
    ("options-number", manifest(_put("options", 5))),
    ("passes-text", manifest(_put("options passes", ["simplify"]))),
    ("versions-list", manifest(_put("versions", [1]))),
):  # fmt: skip
    fresh = name in ("code-altered", "manifest-fifo", "file-parent", "signature-kind")
    for command in ("inspect", "bench", "verify", "explain"):
        if command == "inspect" or fresh:
            add(f"artifact-{name}-{command}", artifact(change, command), fresh=fresh)

for name, file, data in (
    ("ledger-text", "ledger.json", b'"rows"'),
    ("ledger-rows", "ledger.json", b'[{"a": 1}]'),
    ("ledger-deep", "ledger.json", b"[" * 50_000),
    ("ledger-empty", "ledger.json", b""),
    ("measurements-list", "measurements.json", b"[]"),
    ("measurements-kernels", "measurements.json", b'{"kernels": [{"predicted_us": "soon"}]}'),
    ("measurements-huge", "measurements.json", b'{"measured_us": 1e999}'),
):
    for command in ("explain", "inspect", "verify"):
        add(f"artifact-{name}-{command}", artifact(write(file, data), command, sealed=True))

for name, change in (
    ("model-outside", manifest(_put("backend_info model", "../../secret.onnx"))),
    ("model-absolute", manifest(_put("backend_info model", "/etc/passwd"))),
    ("model-unnamed", manifest(lambda d: d["backend_info"].clear())),
    ("model-garbage", write(_PROGRAM, b"garbage")),
    ("model-bomb", write(_PROGRAM, function_chain(3000).SerializeToString())),
    ("interface-huge", manifest(lambda d: [
        _put(f"{k} inputs 0 shape", [1 << 40])(d) for k in ("interface", "signature")] and None)),
    ("interface-other", manifest(lambda d: [
        _put(f"{k} inputs 0 shape", [3, 9])(d) for k in ("interface", "signature")] and None)),
    ("backend-unknown", manifest(_put("target", "nowhere:threads=1"))),
):  # fmt: skip
    sealed = artifact(change, "bench", "--seconds", "0", sealed=True)
    add(f"artifact-{name}-bench", sealed, codes=frozenset({2, 3}))


def _runs_popen(net: Path) -> None:
    manifest(_put("signature result", _object(
        "subprocess:Popen", ("args", "touch owned"), ("shell", True))))(net)  # fmt: skip


add("artifact-names-a-class", artifact(_runs_popen, "bench", "--seconds", "0"), codes=FINE)


def _two(folder: Path) -> list[str]:
    shutil.copytree(good(), folder / "a")
    shutil.copytree(good(), folder / "b")
    altered(_PROGRAM)(folder / "b")
    return ["diff", str(folder / "a"), str(folder / "b")]


add("artifact-diff", _two, says="SHA-256")


def _output(folder: Path) -> list[str]:
    """The output is a folder with somebody's own files: they stay."""
    (folder.parent / "out").mkdir()
    (folder.parent / "out" / "thesis.txt").write_text("years of work")
    (folder / "m.onnx").write_bytes(relu_of().SerializeToString())
    return ["compile", str(folder / "m.onnx")]


add("output-holds-something-else", _output, says="not an optcompiler artifact")
