"""What the user's environment names, read before any test runs: only tests marked `real` may ask for it.

The others run as in a fresh clone, whatever is set: tests/conftest.py takes these variables out of the environment.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

GIVEN = {name: value for name, value in os.environ.items() if name.startswith("YOLO_COMPRESS_")}


def find(variable: str, name: str) -> Path:
    """The file or folder `name` in the folders of `variable`; the test that asks fails where it is missing."""
    for folder in filter(None, GIVEN.get(variable, "").split(os.pathsep)):
        if (found := Path(folder).resolve() / name).exists():
            return found
    pytest.fail(f"{variable}={GIVEN.get(variable, '')} has no {name}: set it to a folder that does", pytrace=False)
