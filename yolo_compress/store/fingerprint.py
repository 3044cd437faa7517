"""Fingerprints of stages. A key has everything that decides a stage's result. This file hashes keys, and says how two keys differ."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

NOT_SET = "not set"


def canonical(value: Any) -> str:
    """Return the canonical JSON text of a value: sorted keys, no spaces, shortest floats that round-trip.

    Raises:
        ValueError: The value holds NaN or infinity, which JSON does not have.
        TypeError: The value holds a type that JSON does not have. Or a key is not a string: in JSON, 1 and "1" would be equal.
    """
    _check_json(value, "")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _check_json(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"key {key!r} of {where or 'the mapping'} is {type(key).__name__}, expected str")
            _check_json(item, f"{where}.{key}" if where else key)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]")
    elif isinstance(value, float) and not abs(value) < float("inf"):
        raise ValueError(f"{where or 'the value'} is {value}, and JSON has finite numbers only")


def plain(value: Mapping[str, object]) -> dict[str, Any]:
    """Return a copy of `value` in JSON types, such as lists for tuples. The copy equals the value that a manifest gives back."""
    return dict(json.loads(canonical(value)))


def fingerprint(key: Mapping[str, object]) -> str:
    """Return the fingerprint of a key: the SHA-256 of its canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical(key).encode()).hexdigest()


def explain(new: Mapping[str, object], old: Mapping[str, object]) -> list[str]:
    """Return a line for each field that differs between two keys, such as `qat.epochs: 5 -> 10` (old -> new).

    Fields of `config` have the name of the stage in front, as in a recipe.
    """
    stage = str(new.get("stage", "config"))
    before, after = _flatten(old, stage), _flatten(new, stage)
    return [
        f"{name}: {_show(before.get(name))} -> {_show(after.get(name))}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def _flatten(key: Mapping[str, object], stage: str) -> dict[str, str]:
    """Return dotted path -> canonical JSON for each single value of a key. As in the hash, 1 differs from True and 1.0."""
    leaves: dict[str, str] = {}

    def walk(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, Mapping) and value:
            for name, item in value.items():
                walk(item, (*path, name))
        else:
            leaves[".".join(path)] = canonical(value)

    for name, value in key.items():
        if name != "config":
            walk(value, (name,))
        elif isinstance(value, Mapping) and stage in value:
            walk(value, ())
        else:
            walk(value, (stage,))
    return leaves


def _show(leaf: str | None) -> str:
    if leaf is None:
        return NOT_SET
    value = json.loads(leaf)
    if not isinstance(value, str):
        return leaf
    return value[:6] if re.fullmatch(r"[0-9a-f]{32,}", value) else value
