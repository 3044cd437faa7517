"""Words for what is wrong with a recipe or a command line: the value got, the values allowed, the word meant."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from .strict_yaml import shown

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


def allowed(field: FieldInfo) -> str:
    """Gives the values a knob takes, from its type and limits: `a number > 0 and < 1`, `one of fp32, fp16, int8`."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "allowed" in extra:
        return str(extra["allowed"])
    kind, optional = _without_none(field.annotation)
    metadata, auto = list(field.metadata), False
    if get_origin(kind) in (Union, types.UnionType):  # a number or `auto`
        number, auto = get_args(kind)[0], True
        kind, metadata = get_args(number)[0], [*get_args(number)[1].metadata]
    if get_origin(kind) is Literal:
        text = "one of " + ", ".join(str(word) for word in get_args(kind))
    else:
        limits = {name: getattr(item, name) for item in metadata for name, _ in _SIGNS if hasattr(item, name)}
        text = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
        text = " and ".join([text] + [f"{sign} {limits[name]}" for name, sign in _SIGNS if name in limits])
        text = text.replace(" and ", " ", 1)
    return text + (" or auto" if auto else "") + (" or null" if optional else "")


def takes_text(field: FieldInfo) -> bool:
    """Says whether any text is a value of the knob, so that the command line's word is taken as it stands."""
    return _without_none(field.annotation)[0] is str


def _without_none(kind: Any) -> tuple[Any, bool]:
    if get_origin(kind) in (Union, types.UnionType):
        rest = [part for part in get_args(kind) if part is not type(None)]
        if len(rest) == 1:
            return rest[0], True
    return kind, False
