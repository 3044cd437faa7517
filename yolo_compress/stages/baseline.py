"""The net as it is before anything is done to it: everything later is measured against it."""

from __future__ import annotations

from typing import Any

from yolo_compress.stages import Job, source


def run(job: Job) -> dict[str, Any]:
    """`model.pt` of the given or freshly trained baseline."""
    return source.run(job, "baseline")
