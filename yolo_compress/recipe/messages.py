"""Parts of error messages about a recipe or command line: the wrong value, the allowed values, the nearest known word."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from ..files.strict_yaml import shown

_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_SIGNS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word most similar to a mistyped word. None: no word is similar."""
    near = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return near[0] if near else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `, did you mean WORD?`, or "" if no known word is similar."""
    near = nearest(word, known)
    return f", did you mean {near}?" if near else ""


def got(value: object) -> str:
    """Return a value as error messages show it: in YAML, on one line, cut to 80 characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinity"
    text = f"'{shown(value)}'" if isinstance(value, str) else shown(value)
    return text if len(text) <= 80 else text[:77] + "..."


def typed(value: object) -> str:
    """Return a value in the form of the command line: `null`, `true`, `0.5`, `fp32,int8`."""
    if isinstance(value, tuple):
        return ",".join(typed(item) for item in value)
    if value is None or isinstance(value, bool):
        return got(value)
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def allowed(field: FieldInfo) -> str:
    """Return the allowed values of a knob, from its type and limits: `a number > 0 and < 1`, `one of fp32, fp16`."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "allowed" in extra:
        return str(extra["allowed"])
    parts = _alternatives(field.annotation, field.metadata)
    return " or ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def takes_text(field: FieldInfo) -> bool:
    """Return whether the knob takes any text. Its value on the command line is then not parsed as YAML."""
    return {kind for kind, _ in _members(field.annotation, ())} - {type(None)} == {str}


def _alternatives(kind: Any, limits: Iterable[Any]) -> list[str]:
    """Return a phrase for each member of a union: single words such as auto first, null last."""
    words, phrases, null = list[str](), list[str](), list[str]()
    for part, own in _members(kind, limits):
        if part is type(None):
            null.append("null")
        elif get_origin(part) is Literal:
            choices = [str(word) for word in get_args(part)]
            (words if len(choices) == 1 else phrases).append("one of " * (len(choices) > 1) + ", ".join(choices))
        elif get_origin(part) is tuple:
            phrases.append("a list of " + ", ".join(str(word) for word in get_args(get_args(part)[0])))
        else:
            phrases.append(_NAMES[part] + _limited(own))
    return words + phrases + null


def _limited(limits: Iterable[Any]) -> str:
    """Return limits as text, such as ` >= 1 and < 8`."""
    values = {name: getattr(item, name) for item in limits for name, _ in _SIGNS if hasattr(item, name)}
    text = " and ".join(f"{sign} {typed(values[name])}" for name, sign in _SIGNS if name in values)
    return f" {text}" if text else ""


def _members(kind: Any, limits: Iterable[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """Yield (member, limits of the member) for each member of a union, also inside `Annotated`. Another type is its only member."""
    if get_origin(kind) is Annotated:
        inner, *notes = get_args(kind)
        own = [item for note in notes for item in (note.metadata if isinstance(note, FieldInfo) else [note])]
        yield from _members(inner, [*limits, *own])
    elif get_origin(kind) in (Union, types.UnionType):
        for part in get_args(kind):
            yield from _members(part, limits)
    else:
        yield kind, list(limits)
