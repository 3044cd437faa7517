"""Estimate the disk space and shared memory that a stage needs, and explain errors when memory runs out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from yolo_compress import ranks
from yolo_compress.errors import EnvironmentLacks
from yolo_compress.files.atomic import free_mib
from yolo_compress.runtime.measure.device import usable_cpus
from yolo_compress.store.manifest import Artifact
from yolo_compress.store.source_weights import find_weights

FREE_MIB = 512  # least free disk space for a stage
SPARE = 2  # safety factor on the estimate
# Disk space of a stage, in copies of the float32 model. `resume.pt` is 4 copies (model, EMA, two moments of AdamW), and for a
# moment there are two of it. `export` writes 8 copies (YOLOv8n: 96 MiB, model 12 MiB) and needs 4 more in `work`.
COPIES = 12
MODEL_MIB = {
    "n": 12,
    "s": 43,
    "m": 99,
    "l": 167,
    "x": 260,
}  # in float32: 3.2, 11.2, 25.9, 43.7 and 68.2 million parameters
SHARED_MEMORY = Path("/dev/shm")  # data workers hand over their batches in it; a container often has only 64 MiB
PREFETCHED = 4  # batches that each data worker loads ahead
MAX_WORKERS = 8
NO_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc")


def needed_mib(section: Any, inputs: Iterable[Artifact]) -> float:
    """Return the free disk space in MiB that a stage needs for its models.

    This is `SPARE` times the estimated size of the stage's output, but at least `FREE_MIB`.

    Args:
        section: Section of the stage in the recipe. If there are no inputs, the size of its initial model counts.
        inputs: Input artefacts. The size of their largest file counts as the size of the float32 model.
    """
    sizes = [entry["size"] for artifact in inputs for entry in artifact.manifest.files.values()]
    if sizes:
        model_mib = max(sizes) / 2**20
    elif section.model is not None:
        model_mib = MODEL_MIB[section.model.removesuffix(".yaml")[-1]]
    else:
        model_mib = 2 * find_weights(section.checkpoint).stat().st_size / 2**20  # Ultralytics saves float16
    return max(FREE_MIB, SPARE * COPIES * model_mib)


def data_workers(device: str, workers: int | None, batch: int, imgsz_px: int) -> int:
    """Return the number of processes of a rank that load images. On a CPU the training process loads them itself.

    Args:
        device: `run.device`.
        workers: `run.workers`. None: one for each processor, at most `MAX_WORKERS` and what `SHARED_MEMORY` has room for.
        batch: Images of a batch of the rank.
        imgsz_px: Side of the images.

    Raises:
        EnvironmentLacks: `SHARED_MEMORY` has no room for the batches of so many workers.
    """
    if device == "cpu":
        return 0
    each_mib = PREFETCHED * batch * 3 * imgsz_px**2 / 2**20
    free = free_mib(SHARED_MEMORY) / ranks.local_world() if SHARED_MEMORY.is_dir() else float("inf")
    fit = int(min(free // each_mib, MAX_WORKERS * usable_cpus()))
    if workers is None:
        return min(MAX_WORKERS, usable_cpus() // ranks.local_world(), fit)
    if workers > fit and workers * each_mib > free:
        raise EnvironmentLacks(
            f"run.workers={workers}: {SHARED_MEMORY} has {free:.0f} MiB for the batches of each GPU's workers, which need "
            f"{workers * each_mib:.0f} MiB: set run.workers={fit}, or enlarge it (docker run --shm-size)"
        )
    return workers


@contextmanager
def memory_errors(stage: str) -> Iterator[None]:
    """Turn out-of-memory errors into an error that names the knobs to lower.

    Raises:
        EnvironmentLacks: The block ran out of memory.
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
