"""What a .pt2 archive must keep to before torch is given it.

torch.export.load unpickles objects, loads compiled code, evaluates expressions, resolves operators
by any dotted name and lets names in the file into Python source that it runs. So an archive
is read here first, without torch: plain members only, no pickles but the tensors of the example
inputs, no compiled code, and no text but what its place allows.
"""

from __future__ import annotations

import io
import json
import pickletools
import re
import stat
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import IO, Any, cast

from optcompiler.errors import InputError
from optcompiler.expressions import is_size_expression
from optcompiler.untrusted import opened, parsed_json

MOST_MEMBERS = 1_000_000
MOST_TEXT_BYTES = 1 << 26
"""Of one JSON member: the graph of a model of seven billion parameters has a tenth of it."""

MOST_VIEWED_BYTES = 1 << 26
"""What views may make of an archive's weights beyond its own size: strides of zero repeat."""

Read = Callable[[str], bytes]

_AGAIN = "save the model again with torch.export.save"
_PLAIN = re.compile(
    r"archive_format|archive_version|byteorder|version|\.format_version|\.storage_alignment"
    r"|\.data/(version|serialization_id)|models/\w+\.json|extra/.*"
    r"|data/(weights|constants)/(\w+|\w+_config\.json)|data/sample_inputs/\w+\.pt",
    re.ASCII,
)
_IDENTIFIER = re.compile(r"\w*", re.ASCII)
_PATH = re.compile(r"[^\"'\\()\x00-\x1f\x7f]*")
_TARGET = re.compile(
    r"torch\.ops\.(aten|prims|higher_order|quantized_decomposed|torchvision|torchao|onnx)"
    r"(\.(?!__)\w+){1,2}"
    r"|torch\._?sym_\w+"
    r"|torch\._C\._set_grad_enabled|torch\.amp\.autocast_mode\._(enter|exit)_autocast"
    r"|math\.(ceil|floor|trunc|sqrt|log2?|exp|cos|sin|tan|cosh|sinh|tanh|acos|asin|atan)"
    r"|_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_"
    r"|not_|xor|invert|pow|rshift|index)",
    re.ASCII,
)
_TOUCHES_FILES = re.compile(r"torch\.ops\.\w+\.\w*(file|save|load)\w*(\..*)?", re.ASCII)
_TENSORS_ONLY = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v[23]|parameter)|torch device"
    r"|torch\.storage UntypedStorage|torch \w+Storage|torch (u?int|float|bfloat|complex|bool)\w*",
    re.ASCII,
)
_FREE = frozenset({"as_string", "as_strings", "torch_version", "guards_code"})
"""Texts that are only ever values; guards are dropped after loading."""

_ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 2, 7: 4, 8: 8, 9: 4, 10: 8, 11: 16, 12: 1, 13: 2}
"""By the numbers of torch's `ScalarType`; where unknown, torch checks."""


def screen_archive(path: Path, label: str) -> None:
    """Raise `InputError`, which begins with `label`, for a file that torch should not be given."""
    with opened(path, label) as (handle, size), open(handle, "rb", closefd=False) as stream:
        if size == 0:
            raise InputError(f"{label}: the file is empty; {_AGAIN}.")
        sizes, read = _members(stream, size, label)
        screen_members(sizes, read, label)


def screen_members(sizes: Mapping[str, int], read: Read, label: str) -> None:
    """Check the members of an archive, whoever read them: names without the top folder, bytes."""
    _check_kind(sizes, label)
    odd = next((n for n in sizes if not _PLAIN.fullmatch(n)), None)
    if odd is not None:
        raise InputError(
            f"{label}: holds {odd[:200]!r}, which is no part of a saved program; {_AGAIN}."
        )
    if read("archive_format") != b"pt2":
        raise InputError(f"{label}: is no .pt2 archive by its archive_format; {_AGAIN}.")
    names = [n.removeprefix("models/").removesuffix(".json") for n in sizes if n[:7] == "models/"]
    if "model" not in names:
        raise InputError(f"{label}: holds no program; {_AGAIN}.")
    for name in names:
        _check_program(_json(f"models/{name}.json", sizes, read, label), label)
        for kind in ("weights", "constants"):
            config = f"data/{kind}/{name}_{kind}_config.json"
            _check_payload(_json(config, sizes, read, label), f"data/{kind}/", sizes, label)
        _check_examples(f"data/sample_inputs/{name}.pt", sizes, read, label)


def _check_kind(names: Collection[str], label: str) -> None:
    first = sorted(names)
    if any(n == "constants.pkl" or n.startswith("code/") for n in first):
        raise InputError(
            f"{label}: a TorchScript archive, which holds code and pickles and is not read; export "
            f"the module it was made from with torch.export."
        )
    if any(n.startswith("data/aotinductor/") for n in first):
        raise InputError(
            f"{label}: holds compiled code (data/aotinductor), which is not loaded; {_AGAIN}."
        )
    pickled = next((n for n in first if n.endswith((".pkl", ".pickle"))), None)
    if pickled is not None or "archive_format" not in names:
        cause = f"holds the pickle {pickled!r}" if pickled else "no archive of torch.export"
        raise InputError(
            f"{label}: {cause}; pickles run code when they are loaded and are not read, so "
            f"{_AGAIN}."
        )


# -- the zip file ---------------------------------------------------------------------------


def _members(stream: IO[bytes], size: int, label: str) -> tuple[dict[str, int], Read]:
    """Sizes by name without the top folder, and how to read one."""
    _check_directory(stream, size, label)
    try:
        archive = zipfile.ZipFile(stream)
    except Exception as error:
        raise InputError(f"{label}: not a .pt2 archive ({error}); {_AGAIN}.") from error
    entries = archive.infolist()
    for entry in entries:
        cause = _oddity(entry)
        if cause:
            raise InputError(f"{label}: member {entry.orig_filename[:200]!r} {cause}; {_AGAIN}.")
    twice = [n for n, count in Counter(e.filename for e in entries).items() if count > 1]
    if twice:
        raise InputError(f"{label}: holds {twice[0][:200]!r} twice; {_AGAIN}.")
    if min((e.header_offset for e in entries), default=1) != 0:
        raise InputError(f"{label}: does not begin with a member; {_AGAIN}.")
    if sum(e.file_size for e in entries) > size:
        raise InputError(f"{label}: its members overlap; {_AGAIN}.")
    tops = {e.filename.partition("/")[0] for e in entries}
    if len(tops) != 1:
        raise InputError(f"{label}: {len(tops)} folders at the top, not one; {_AGAIN}.")
    top = tops.pop()

    def read(name: str) -> bytes:
        try:
            return archive.read(f"{top}/{name}")
        except Exception as error:
            raise InputError(f"{label}: {name} cannot be read ({error}); {_AGAIN}.") from error

    return {e.filename.removeprefix(f"{top}/"): e.file_size for e in entries}, read


def _oddity(entry: zipfile.ZipInfo) -> str:
    name = entry.orig_filename
    parts = name.split("/")
    if name != entry.filename or "\\" in name or ":" in name or {"", ".", ".."} & {*parts}:
        return "has a name that is no plain path"
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "is a symbolic link"
    if entry.flag_bits & 1:
        return "is encrypted"
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        return "is compressed, which torch does not do"
    return ""


def _check_directory(stream: IO[bytes], size: int, label: str) -> None:
    """Bound the number of members before they are listed, and leave readers no choice of which
    directory to believe: it ends the file."""
    stream.seek(max(size - 22, 0))
    end = stream.read(22)
    if len(end) < 22 or end[:4] != b"PK\5\6":
        stream.seek(0)
        pickled = stream.read(2)[:1] == b"\x80"
        cause = (
            "a pickle, which runs code when it is loaded" if pickled else "truncated, or no .pt2"
        )
        raise InputError(f"{label}: {cause}; {_AGAIN}.")
    count, comment = struct.unpack("<H8xH", end[10:])
    if comment:
        raise InputError(f"{label}: something follows the archive's directory; {_AGAIN}.")
    if count == 0xFFFF:
        stream.seek(max(size - 42, 0))
        where = struct.unpack("<4s4xQ4x", stream.read(20))[1]
        stream.seek(min(where, size))
        record = stream.read(56)
        count = struct.unpack("<32xQ16x", record)[0] if len(record) == 56 else 1 << 64
    if count > MOST_MEMBERS:
        raise InputError(f"{label}: {count} members, more than {MOST_MEMBERS}; {_AGAIN}.")


# -- members --------------------------------------------------------------------------------


def _json(name: str, sizes: Mapping[str, int], read: Read, label: str) -> Any:
    if name not in sizes:
        raise InputError(f"{label}: {name} is missing; {_AGAIN}.")
    if sizes[name] > MOST_TEXT_BYTES:
        raise InputError(
            f"{label}: {name} has {sizes[name]} bytes, more than {MOST_TEXT_BYTES}; {_AGAIN}."
        )
    return parsed_json(read(name), f"{label}: {name}", _AGAIN)


def _check_program(program: Any, label: str) -> None:
    if not isinstance(program, dict) or not isinstance(program.get("graph_module"), dict):  # pyright: ignore[reportUnknownMemberType]
        raise InputError(f"{label}: holds no program of torch.export; {_AGAIN}.")
    for key, text in _texts(program):
        if _allowed(key, text):
            continue
        if key in ("target", "as_operator"):
            raise InputError(
                f"{label}: operator {text[:200]!r} is none that a saved program may call; {_AGAIN}."
            )
        raise InputError(f"{label}: {key} is {text[:200]!r}, which is no {_kind(key)}; {_AGAIN}.")


def _texts(value: Any) -> Iterator[tuple[str, str]]:
    """Every text in JSON with the key of the nearest mapping; `metadata` is notes alone."""
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        key, item = waiting.pop()
        if isinstance(item, str):
            yield key, item
        elif isinstance(item, dict):
            found = cast("dict[str, Any]", item)
            waiting += [(k, v) for k, v in found.items() if k != "metadata"]
        elif isinstance(item, list):
            waiting += [(key, v) for v in cast("list[Any]", item)]


def _allowed(key: str, text: str) -> bool:
    if key in _FREE:
        return True
    if key in ("target", "as_operator"):
        return bool(_TARGET.fullmatch(text)) and not _TOUCHES_FILES.fullmatch(text)
    if key == "expr_str":
        return is_size_expression(text)
    if key in ("in_spec", "out_spec"):
        return _is_plain_tree(text)
    if (key.endswith("_name") and key != "as_name") or key in ("fqn", "class_fqn"):
        return bool(_PATH.fullmatch(text))
    return bool(_IDENTIFIER.fullmatch(text))


def _kind(key: str) -> str:
    kinds = {"expr_str": "expression of sizes", "in_spec": "plain tree", "out_spec": "plain tree"}
    return kinds.get(key, "plain name")


def _is_plain_tree(text: str) -> bool:
    """Whether pytree would import nothing for it, and its keyword arguments are identifiers."""
    if not text:
        return True
    try:
        _, outer = json.loads(text)
        waiting: list[Any] = [outer]
        while waiting:
            item = waiting.pop()
            if isinstance(item, dict):
                found = cast("dict[str, Any]", item)
                if found.keys() & {"__enum__", "default_factory_module"}:
                    return False
                waiting += found.values()
                if isinstance(found.get("context"), str):
                    waiting.append(_context(found["context"]))
            elif isinstance(item, list):
                waiting += cast("list[Any]", item)
        children: list[Any] = outer["children_spec"]
        keywords = children[1]["context"] if len(children) == 2 else None
        names = _context(keywords) if isinstance(keywords, str) else keywords
        return not isinstance(names, list) or all(
            isinstance(n, str) and bool(_IDENTIFIER.fullmatch(n)) for n in cast("list[Any]", names)
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _context(text: str) -> Any:
    """A context is JSON, or the name of a class that was registered."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _check_payload(config: Any, folder: str, sizes: Mapping[str, int], label: str) -> None:
    try:
        viewed = sum(
            _payload_bytes(name, entry, folder, sizes, label)
            for name, entry in config["config"].items()
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{label}: {folder} is described wrongly ({type(error).__name__}: "
            f"{str(error)[:200]}); {_AGAIN}."
        ) from error
    if viewed > sum(sizes.values()) + MOST_VIEWED_BYTES:
        raise InputError(
            f"{label}: {folder} is said to hold {viewed} bytes, more than the archive; {_AGAIN}."
        )


def _payload_bytes(
    name: str, entry: Mapping[str, Any], folder: str, sizes: Mapping[str, int], label: str
) -> int:
    where = f"{label}: {folder[5:-1]} {name[:200]!r}"
    path = str(entry["path_name"])
    if entry["use_pickle"] or not path.startswith(("weight_", "tensor_")):
        raise InputError(f"{where} is pickled, which runs code when it is loaded; {_AGAIN}.")
    meta = entry["tensor_meta"]
    shape, strides = ([int(d["as_int"]) for d in meta[k]] for k in ("sizes", "strides"))
    offset = int(meta["storage_offset"]["as_int"])
    item = _ITEM_BYTES.get(meta["dtype"], 1)
    has = sizes.get(f"{folder}{path}", -1)
    last = offset + sum((d - 1) * s for d, s in zip(shape, strides, strict=True))
    ends = (last + 1) * item if all(shape) else 0
    if has < 0 or min([offset, *shape, *strides]) < 0 or ends > has:
        raise InputError(
            f"{where} ends at byte {ends} of the {max(has, 0)} in {path[:200]!r}; {_AGAIN}."
        )
    return prod(shape) * item


def _check_examples(name: str, sizes: Mapping[str, int], read: Read, label: str) -> None:
    """Example inputs are pickled by torch.save; nothing but tensors in containers may be."""
    if sizes.get(name, 0) == 0:
        raise InputError(f"{label}: {name} is missing; {_AGAIN}.")
    where = f"{label}: {name}"
    inner, read_inner = _members(io.BytesIO(read(name)), sizes[name], where)
    if "data.pkl" not in inner:
        raise InputError(f"{where}: holds no tensors; {_AGAIN}.")
    try:
        for opcode, argument, _ in pickletools.genops(read_inner("data.pkl")):
            banned = opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "DUP")
            if opcode.name == "GLOBAL" and not _TENSORS_ONLY.fullmatch(str(argument)):
                raise InputError(
                    f"{where}: pickles {argument!r}, and only tensors are read; {_AGAIN}."
                )
            if banned:
                raise InputError(f"{where}: pickles more than tensors; {_AGAIN}.")
    except ValueError as error:
        raise InputError(f"{where}: cannot be read ({str(error)[:200]}); {_AGAIN}.") from error
