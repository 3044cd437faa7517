"""Data sets and weights of the user's environment variables. Only tests marked `real` may use them.

The variables are read before any test runs. Then tests/conftest.py deletes them from the environment, so that the other tests
run as in a fresh clone.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

GIVEN = {name: value for name, value in os.environ.items() if name.startswith("YOLO_COMPRESS_")}


def find(variable: str, name: str) -> Path:
    """Return the file or folder `name` in the folders of `variable`. If it is missing, the test fails."""
    for folder in filter(None, GIVEN.get(variable, "").split(os.pathsep)):
        if (found := Path(folder).resolve() / name).exists():
            return found
    pytest.fail(f"{variable}={GIVEN.get(variable, '')} has no {name}: set it to a folder that does", pytrace=False)
