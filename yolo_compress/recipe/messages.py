"""Words for what is wrong with a recipe or a command line: the value got, the values allowed, the word meant."""

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
    """Gives the known word that is most like a mistyped one, None when none is near."""
    near = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return near[0] if near else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Gives `, did you mean WORD?`, or nothing when no known word is near."""
    near = nearest(word, known)
    return f", did you mean {near}?" if near else ""


def got(value: object) -> str:
    """Gives a value as a message shows it: YAML's words, on one line, cut to 80 characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinity"
    text = f"'{shown(value)}'" if isinstance(value, str) else shown(value)
    return text if len(text) <= 80 else text[:77] + "..."


def typed(value: object) -> str:
    """Gives a value as the command line takes it: `null`, `true`, `0.5`, `fp32,int8`."""
    if isinstance(value, tuple):
        return ",".join(typed(item) for item in value)
    if value is None or isinstance(value, bool):
        return got(value)
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def allowed(field: FieldInfo) -> str:
    """Gives the values a knob takes, from its type and limits: `a number > 0 and < 1`, `one of fp32, fp16, int8`."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "allowed" in extra:
        return str(extra["allowed"])
    parts = _alternatives(field.annotation, field.metadata)
    return " or ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def takes_text(field: FieldInfo) -> bool:
    """Says whether any text is a value of the knob, so that the command line's word is taken as it stands."""
    return {kind for kind, _ in _members(field.annotation, ())} - {type(None)} == {str}


def _alternatives(kind: Any, limits: Iterable[Any]) -> list[str]:
    """Gives a phrase for each alternative of a type: single words such as auto first, null last."""
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
    """Gives ` >= 1 and < 8`."""
    found = {name: getattr(item, name) for item in limits for name, _ in _SIGNS if hasattr(item, name)}
    text = " and ".join(f"{sign} {typed(found[name])}" for name, sign in _SIGNS if name in found)
    return f" {text}" if text else ""


def _members(kind: Any, limits: Iterable[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """Yields the members of a union, each with the limits that hold for it; looks inside `Annotated`."""
    if get_origin(kind) is Annotated:
        inner, *notes = get_args(kind)
        own = [item for note in notes for item in (note.metadata if isinstance(note, FieldInfo) else [note])]
        yield from _members(inner, [*limits, *own])
    elif get_origin(kind) in (Union, types.UnionType):
        for part in get_args(kind):
            yield from _members(part, limits)
    else:
        yield kind, list(limits)
