"""The artifact: a directory that says what it is, what it was made from, and why it is as it is.

Layout::

    manifest.json       what this is, and the SHA-256 of code/ and program.txt
    code/               what the backend wrote; its business alone
    program.txt         structure of the final program, for people and for diff
    records.json        the SHA-256 of the manifest and of the records, which are:
    ledger.json         every candidate and its outcome
    measurements.json   what was predicted and measured
    summary.txt         the same as a table
    lock.json           what makes the same artifact again; see `lock`
    reference.bin       one run of the program, where the backend asks for it; see `finish`

The manifest depends on what was decided, the records also on what was measured: two compiles that
decide the same have the same manifest. Nothing in it is executed to read it; no file holds a time
of day or an absolute path.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir

from optcompiler._version import __version__
from optcompiler.checking import (
    LEDGER_FORM,
    MANIFEST_FORM,
    MEASUREMENTS_FORM,
    RECORDS_FORM,
    Form,
    check_form,
)
from optcompiler.errors import InputError
from optcompiler.files import (
    files_under,
    inside,
    plain,
    sha256_of,
    to_json,
    write_bytes,
    write_text,
)
from optcompiler.ledger import Ledger, rows_of
from optcompiler.program import Port, Program, port, tensor_hash
from optcompiler.signature import Signature
from optcompiler.target import Target
from optcompiler.untrusted import json_of

FORMAT = "optcompiler-artifact"
FORMAT_VERSION = 3
MANIFEST = "manifest.json"
RECORDS = "records.json"
REFERENCE = "reference.bin"
CODE = "code"
PROGRAM = "program.txt"
NODE_LINE = re.compile(r"^\s*\[(?P<name>.+?)\] (?=.* = )")
"""A node in a program's text."""

MOST_TEXT_BYTES = 1 << 28
"""Of one JSON file of an artifact."""

_SHOWN_ELEMENTS = 16


@dataclass(frozen=True)
class Contents:
    """Everything an artifact says about itself.

    `program` is the final program, `teacher` the imported one, whose sizes may not be bound yet,
    `backend_info` what `Backend.lower` returned, `options` what the compile was asked for.
    `measurements` may hold "predicted_us", "measured_us", "baseline_us", "baseline_predicted_us",
    "kernels" (dicts of name, kind, dtype, nodes, predicted_us, measured_us), "damage",
    "damage_measure", "metric" (teacher, student, drop), "macs" and "size_bytes" (before, after),
    "compile_seconds" (by stage) and "gates" (dicts of name, limit, value, passed); any may be
    missing or None. `lock` is the content of the lock file and `reference` that of reference.bin;
    None writes none.
    """

    program: Program
    teacher: Program
    target: Target
    backend_info: Mapping[str, Any]
    signature: Signature
    ledger: Ledger
    options: dict[str, Any]
    versions: dict[str, str]
    measurements: dict[str, Any]
    lock: Mapping[str, Any] | None = None
    reference: bytes | None = None


@dataclass(frozen=True)
class Artifact:
    """An artifact whose files have been found to be what its manifest says."""

    directory: Path
    manifest: dict[str, Any]
    records: dict[str, Any]
    ledger: Ledger
    measurements: dict[str, Any]
    signature: Signature
    target: Target
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    teacher_inputs: tuple[Port, ...]
    """Of the program as imported, before the target's sizes were bound."""

    @property
    def code(self) -> Path:
        return self.directory / CODE

    @property
    def files(self) -> list[str]:
        """Every file of the artifact, as a path inside it; the two that hold the hashes last."""
        return [*self.manifest["files"], *self.records["files"], MANIFEST, RECORDS]

    @property
    def backend_info(self) -> Mapping[str, Any]:
        return self.manifest["backend_info"]


def assemble(code: Path, contents: Contents, directory: Path) -> dict[str, Any]:
    """Make `directory` (absent or empty) an artifact, moving the folder `code` into it.

    Returns the manifest. Equal contents and code give equal bytes.
    """
    from optcompiler.summary import render

    directory.mkdir(parents=True, exist_ok=True)
    shutil.move(code, directory / CODE)
    write_text(directory / PROGRAM, program_text(contents.program))
    manifest = _manifest(contents)
    written = [f"{CODE}/{name}" for name in files_under(directory / CODE)]
    manifest["files"] = _hashes(directory, [*written, PROGRAM])
    manifest["code_hash"] = code_hash(directory / CODE)
    write_text(directory / MANIFEST, to_json(manifest))
    measurements = plain(contents.measurements)
    records = {
        "ledger.json": to_json(list(contents.ledger)),
        "measurements.json": to_json(measurements),
        "summary.txt": render(manifest, contents.ledger, measurements),
    }
    if contents.lock is not None:
        records["lock.json"] = to_json(contents.lock)
    for name, text in records.items():
        write_text(directory / name, text)
    named = [*records]
    if contents.reference is not None:
        write_bytes(directory / REFERENCE, contents.reference)
        named.append(REFERENCE)
    seal = {"files": _hashes(directory, named), "manifest": sha256_of(directory / MANIFEST)}
    write_text(directory / RECORDS, to_json(seal))
    return manifest


def _hashes(directory: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "sha256": sha256_of(directory / name),
            "size_bytes": (directory / name).stat().st_size,
        }
        for name in names
    }


def _manifest(contents: Contents) -> dict[str, Any]:
    program = contents.program
    return plain(
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "optcompiler": __version__,
            "target": str(contents.target),
            "backend": contents.target.backend,
            "backend_info": contents.backend_info,
            "interface": {"inputs": program.inputs, "outputs": program.outputs},
            "signature": contents.signature.to_json(),
            "options": contents.options,
            "versions": contents.versions,
            "program_hash": program.content_hash(),
            "teacher_hash": contents.teacher.content_hash(),
            "teacher_inputs": contents.teacher.inputs,
        }
    )


def code_hash(code: Path) -> str:
    """One hash over the backend's files in the folder `code`: what a rebuild has to reproduce."""
    lines = [f"{CODE}/{name} {sha256_of(code / name)}\n" for name in files_under(code)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def program_text(program: Program) -> str:
    """ONNX text of the nodes and functions, a line each; types and weights are comments.

    Weights of at most 16 elements are written out, others are named by their SHA-256.
    """
    copy = program.clone()
    copy.graph.initializers.clear()
    types: dict[str, str] = {}
    for node in copy.graph:
        types[node.name or ""] = ", ".join(str(port(v)) for v in node.outputs if v.name)
        for value in node.outputs:
            if not value.is_graph_output():
                value.type = value.shape = None
    lines = ir.to_onnx_text(copy.model).rstrip("\n").splitlines()
    for i, line in enumerate(lines):
        if (match := NODE_LINE.match(line)) and (type_ := types.pop(match["name"], None)):
            lines[i] = f"{line}  # {type_}"
    weights = sorted(program.weights().items())
    lines += ["# weights, which the text above leaves out:"] if weights else []
    for name, tensor in weights:
        content = f"sha256 {tensor_hash(tensor)}"
        if tensor.size <= _SHOWN_ELEMENTS:
            content = f"{{{', '.join(map(str, tensor.numpy().flat))}}}"
        shape = ", ".join(map(str, tensor.shape))
        lines.append(f"#   {json.dumps(name)}: {tensor.dtype}[{shape}] {content}")
    return "\n".join(lines) + "\n"


def is_artifact(directory: str | Path) -> bool:
    """Whether `directory` holds a manifest that calls itself one of ours; checks nothing else."""
    try:
        manifest = json_of(Path(directory) / MANIFEST, str(directory), MOST_TEXT_BYTES)
    except InputError:
        return False
    return isinstance(manifest, dict) and cast("dict[str, Any]", manifest).get("format") == FORMAT


def open_artifact(directory: str | Path) -> Artifact:
    """Read an artifact and hash every file that its manifest and its records list.

    Raises `InputError` when the directory is none of ours or of a newer format, when a listed file
    is missing, altered or outside the directory, and when `code/` holds a file that is not listed.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory)
    try:
        _check_files(directory, manifest["files"])
        _check_code(directory, manifest["files"])
        records = _record(directory, RECORDS, RECORDS_FORM)
        _check_files(directory, records["files"])
        if records["manifest"] != sha256_of(directory / MANIFEST):
            raise InputError(
                f"{directory}: {RECORDS} belongs to another {MANIFEST}; compile or copy the "
                f"artifact again."
            )
        interface = manifest["interface"]
        return Artifact(
            directory=directory,
            manifest=manifest,
            records=records,
            ledger=Ledger(rows_of(_record(directory, "ledger.json", LEDGER_FORM))),
            measurements=_record(directory, "measurements.json", MEASUREMENTS_FORM),
            signature=Signature.from_json(manifest["signature"]),
            target=Target.parse(manifest["target"]),
            inputs=_ports(interface["inputs"]),
            outputs=_ports(interface["outputs"]),
            teacher_inputs=_ports(manifest["teacher_inputs"]),
        )
    except (KeyError, TypeError, AttributeError, ValueError, OSError, RecursionError) as error:
        raise InputError(
            f"{directory}: not a whole artifact ({type(error).__name__}: {error}); compile again."
        ) from error


def _read_manifest(directory: Path) -> dict[str, Any]:
    try:
        manifest = json_of(directory / MANIFEST, f"{directory}: {MANIFEST}", MOST_TEXT_BYTES)
    except InputError as error:
        raise InputError(
            f"{directory} is not an artifact ({str(error).partition('; ')[0]}); give the directory "
            f"that `optcompiler compile -o` wrote, or compile again."
        ) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:  # type: ignore[union-attr]
        raise InputError(
            f"{directory}: {MANIFEST} is not one of optcompiler's; give the directory that "
            f"`optcompiler compile -o` wrote."
        )
    version = cast("dict[str, Any]", manifest).get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"{directory}: artifact format {version!r}, but optcompiler {__version__} reads format "
            f"{FORMAT_VERSION}; compile it again, or use the optcompiler that wrote it."
        )
    check_form(manifest, MANIFEST_FORM, f"{directory}: {MANIFEST}")
    return cast("dict[str, Any]", manifest)


def _check_files(directory: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    for name, entry in files.items():
        path = inside(directory, name)
        if not path.is_file():
            raise InputError(f"{directory}: {name} is missing; compile or copy the artifact again.")
        if path.stat().st_size != entry["size_bytes"] or sha256_of(path) != entry["sha256"]:
            raise InputError(
                f"{directory}: {name} is not the file that was compiled (its SHA-256 differs from "
                f"what is recorded); compile or copy the artifact again."
            )


def _check_code(directory: Path, files: Mapping[str, Any]) -> None:
    for name in files_under(directory / CODE):
        if f"{CODE}/{name}" not in files:
            raise InputError(
                f"{directory}: {CODE}/{name} is not in the manifest; remove it or compile again."
            )


def _ports(entries: list[dict[str, Any]]) -> tuple[Port, ...]:
    return tuple(
        Port(e["name"], e["dtype"], tuple(e["shape"]), e.get("kind", "tensor")) for e in entries
    )


def _record(directory: Path, name: str, form: Form) -> Any:
    label = f"{directory}: {name}"
    if not (directory / name).is_file():
        raise InputError(f"{label} is missing; compile or copy the artifact again.")
    value = json_of(directory / name, label, MOST_TEXT_BYTES)
    check_form(value, form, label)
    return value
