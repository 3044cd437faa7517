"""Validates JSON against TypedDicts: a key that is missing, of another type, or without a type fails."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import typing_extensions
from pydantic import ConfigDict, TypeAdapter

_known: dict[Any, Any] = {}


def validate(content: Any, kind: Any) -> None:
    """Raises pydantic's ValidationError where `content` is not of `kind`, as JSON has it.

    Args:
        content: JSON types; tuples count as lists.
        kind: A TypedDict of `typing` or `typing_extensions`, or a type made of such.
    """
    adapter = TypeAdapter(list[_closed(kind)], config=ConfigDict(extra="forbid"))
    adapter.validate_json(json.dumps([content], allow_nan=False), strict=True)


def _closed(kind: Any) -> Any:
    """The same type with TypedDicts that pydantic reads on Python 3.11, and that allow no other key."""
    if typing_extensions.is_typeddict(kind):
        return _typed_dict(kind)
    arguments = typing.get_args(kind)
    if not arguments or typing.get_origin(kind) is typing.Literal:
        return kind
    origin, inner = typing.get_origin(kind), tuple(map(_closed, arguments))
    if origin in (typing.Union, types.UnionType):
        return typing.Union[inner]  # noqa: UP007
    if origin in (Mapping, dict):
        return dict[inner]
    return list[inner] if origin is Sequence else origin[inner]


def _typed_dict(kind: Any) -> Any:
    if kind not in _known:
        keys = {}
        for name, hint in typing_extensions.get_type_hints(kind, include_extras=True).items():
            needed = (
                name in kind.__required_keys__
            )  # which does not see what `from __future__ import annotations` hides
            if typing.get_origin(hint) is typing.NotRequired:
                needed, (hint,) = False, typing.get_args(hint)
            keys[name] = (typing_extensions.Required if needed else typing_extensions.NotRequired)[_closed(hint)]
        made = typing_extensions.TypedDict(kind.__name__, keys)
        made.__pydantic_config__ = ConfigDict(extra="forbid")
        _known[kind] = made
    return _known[kind]
