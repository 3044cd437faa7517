"""The working folder of a study."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("YOLO_COMPRESS_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path
