"""Disk and memory of a stage: what it is estimated to write, before it starts, and memory that did not suffice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from yolo_compress.errors import EnvironmentLacks
from yolo_compress.store.manifest import Artifact
from yolo_compress.store.source_weights import find_weights

FREE_MIB = 512  # no stage starts on a disk with less
SPARE = 2  # times the estimate
# Of a model in float32, what a stage writes: `resume.pt` holds the model, its EMA and two moments of AdamW, and is there twice
# while the new one takes the old one's place; `export` is 8 models (YOLOv8n: 96 MiB of 12), 12 with those it works on.
COPIES = 12
MODEL_MIB = {
    "n": 12,
    "s": 43,
    "m": 99,
    "l": 167,
    "x": 260,
}  # float32, of 3.2, 11.2, 25.9, 43.7 and 68.2 million parameters
NO_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc")


def needed_mib(section: Any, inputs: Iterable[Artifact]) -> float:
    """What has to be free for a stage that writes models: twice the estimate, `FREE_MIB` at least.

    Args:
        section: Its section of the recipe; where the stage has no inputs, the model it starts from.
        inputs: What it reads. Their largest file is a model in float32.
    """
    sizes = [entry["size"] for artifact in inputs for entry in artifact.manifest.files.values()]
    if sizes:
        model_mib = max(sizes) / 2**20
    elif section.model is not None:
        model_mib = MODEL_MIB[section.model.removesuffix(".yaml")[-1]]
    else:
        model_mib = 2 * find_weights(section.checkpoint).stat().st_size / 2**20  # Ultralytics saves float16
    return max(FREE_MIB, SPARE * COPIES * model_mib)


@contextmanager
def memory_errors(stage: str) -> Iterator[None]:
    """Turns memory that does not suffice into an error that says what to lower.

    Raises:
        EnvironmentLacks: See above.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = str(error).strip().partition("\n")[0]
        if not isinstance(error, MemoryError) and not any(known in str(error).lower() for known in NO_MEMORY):
            raise
        raise EnvironmentLacks(
            f"stage {stage}: out of memory ({words or type(error).__name__}): lower data.imgsz or a batch of {stage}, or use a "
            "machine with more; the same command continues"
        ) from error
