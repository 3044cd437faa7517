"""The net that teaches in `distill`: given, or trained from scratch on the same data."""

from __future__ import annotations

from typing import Any

from yolo_compress.stages import Job, source


def run(job: Job) -> dict[str, Any]:
    """`model.pt` of the teacher."""
    return source.run(job, "teacher")
