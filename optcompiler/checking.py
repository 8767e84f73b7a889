"""JSON that somebody else wrote, held to the form that its readers count on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from optcompiler.errors import InputError

LARGEST = 1 << 63
"""Numbers beyond are no sizes of anything."""

Form = Any
"""A type or a tuple of types; `[form]` for a list; `{key: form}` for a mapping that may hold
more, where a key that ends in `?` may be missing or null and `*` stands for every key."""

NUMBER = (int, float)
_PORT = {"name": str, "dtype": str, "shape": [(int, str)], "kind?": str}
_FILE = {"sha256": str, "size_bytes": int}
_SPELLED = (int, float, str)

MANIFEST_FORM: Form = {
    "target": str, "backend": str, "optcompiler": str, "backend_info": {},
    "interface": {"inputs": [_PORT], "outputs": [_PORT]},
    "signature": {
        "parameters": [{"name": str, "positional": bool, "tree": {}}], "result": {},
        "inputs": [_PORT], "outputs": [_PORT],
    },
    "options": {
        "precision?": (str, list), "budget?": (str, dict),
        "passes?": [{"name": str, "owner": str, "options": {}}],
        "quarantined?": [{"pass": str, "owner": str, "reason": str}],
    },
    "versions": {"*": str}, "program_hash": str, "teacher_hash": str, "code_hash": str,
    "teacher_inputs": [_PORT],
    "files": {"*": _FILE},
}  # fmt: skip

RECORDS_FORM: Form = {"files": {"*": _FILE}, "manifest": str}

LOCK_FORM: Form = {
    "made_from": {"model": str, "data": str, "target": str, "options": {"timing": bool}},
    "versions": {"*": str}, "arithmetic": {"threads": int, "instructions": str}, "profile": {},
    "measured": {}, "gives": {"program": str, "code": str},
}  # fmt: skip

_PAIR = {"before?": NUMBER, "after?": NUMBER}
MEASUREMENTS_FORM: Form = {
    "predicted_us?": NUMBER, "measured_us?": NUMBER, "baseline_us?": NUMBER,
    "baseline_predicted_us?": NUMBER, "damage?": _SPELLED, "damage_measure?": str,
    "damage_data?": str,
    "metric?": {"teacher?": _SPELLED, "student?": _SPELLED, "drop?": _SPELLED},
    "macs?": _PAIR, "size_bytes?": _PAIR, "compile_seconds?": {"*": NUMBER},
    "gates?": [{"name?": str, "limit?": _SPELLED, "value?": _SPELLED}],
    "kernels?": [
        {"name?": str, "kind?": str, "dtype?": str, "nodes?": [str], "predicted_us?": NUMBER,
         "measured_us?": NUMBER}
    ],
}  # fmt: skip

LEDGER_FORM: Form = [
    {"pass_name": str, "site": str, "choice": str, "outcome": str, "reason": str, "exact": bool,
     "saving_us?": _SPELLED, "damage?": _SPELLED, "nodes": [str], "details": {}}
]  # fmt: skip


def check_form(value: Any, form: Form, label: str) -> None:
    """Raise `InputError`, which begins with `label`, naming the first place that does not fit."""
    waiting: list[tuple[str, Any, Form]] = [("", value, form)]
    while waiting:
        where, item, wanted = waiting.pop()
        kinds = dict if isinstance(wanted, dict) else list if isinstance(wanted, list) else wanted
        if not _is_a(item, kinds):
            raise InputError(
                f"{label}: not a whole artifact ({where or 'it'} is {_shortly(item)}, not "
                f"{_spelled(kinds)}); compile or copy the artifact again."
            )
        if isinstance(wanted, list):
            waiting += [(f"{where}[{i}]", v, wanted[0]) for i, v in enumerate(item)]
        elif isinstance(wanted, dict):
            waiting += _entries(where, item, cast("dict[str, Form]", wanted), label)


def _entries(
    where: str, item: Mapping[str, Any], wanted: Mapping[str, Form], label: str
) -> list[tuple[str, Any, Form]]:
    found: list[tuple[str, Any, Form]] = []
    for key, form in wanted.items():
        if key == "*":
            found += [(f"{where}.{k}"[:200].lstrip("."), v, form) for k, v in item.items()]
            continue
        name = key.removesuffix("?")
        if item.get(name) is not None:
            found.append((f"{where}.{name}".lstrip("."), item[name], form))
        elif name == key:
            raise InputError(
                f"{label}: not a whole artifact ({where or 'it'} has no {name!r}); compile or copy "
                f"the artifact again."
            )
    return found


def _is_a(item: Any, kinds: type | tuple[type, ...]) -> bool:
    if isinstance(item, bool):
        return kinds is bool
    if isinstance(item, (int, float)) and not abs(item) < LARGEST:
        return False
    return isinstance(item, kinds)


def _shortly(item: Any) -> str:
    return repr(item)[:100] if isinstance(item, (int, float, str)) else f"a {type(item).__name__}"


def _spelled(kinds: type | tuple[type, ...]) -> str:
    names = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false",
             "dict": "a mapping", "list": "a list"}  # fmt: skip
    return " or ".join(names[k.__name__] for k in (kinds if isinstance(kinds, tuple) else (kinds,)))
