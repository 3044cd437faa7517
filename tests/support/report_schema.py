"""Validation of JSON against the types of `report.schema`."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from yolo_compress.report.schema import Document


def validate(content: Any, kind: Any = Document) -> None:
    """Check JSON against a type.

    Raises:
        pydantic.ValidationError: A key is missing, has another type, or is not in the type.
    """
    adapter = TypeAdapter(list[kind], config=ConfigDict(extra="forbid"))
    adapter.validate_json(json.dumps([content], allow_nan=False), strict=True)
