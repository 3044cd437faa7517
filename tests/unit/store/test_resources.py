"""Data workers: as many as processors and shared memory allow, and a number that does not fit is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from yolo_compress import preflight, ranks
from yolo_compress.errors import EnvironmentLacks
from yolo_compress.recipe import recipe
from yolo_compress.store import resources

BATCH_MIB = 4 * 16 * 3 * 640**2 / 2**20  # four batches of 16 images of 640 px: 75 MiB for each worker


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Shared memory of as many MiB as the test sets, and 16 processors."""
    room = {"mib": 1e6}
    monkeypatch.setattr(resources, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(resources, "free_mib", lambda path: room["mib"] if path == tmp_path else 1e6)
    monkeypatch.setattr(resources, "usable_cpus", lambda: 16)
    return room


@pytest.mark.parametrize(("mib", "expected"), [(1e6, 8), (3.5 * BATCH_MIB, 3), (64, 0), (0, 0)])
def test_workers_by_default(shared: dict[str, float], mib: float, expected: int) -> None:
    shared["mib"] = mib
    assert resources.data_workers("0", None, 16, 640) == expected


def test_workers_of_several_ranks_share(shared: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "local_world", lambda: 4)
    assert resources.data_workers("0,1,2,3", None, 16, 640) == 4
    shared["mib"] = 8 * BATCH_MIB
    assert resources.data_workers("0,1,2,3", None, 16, 640) == 2


def test_a_cpu_has_no_workers(shared: dict[str, float]) -> None:
    shared["mib"] = 0
    assert resources.data_workers("cpu", 8, 16, 640) == resources.data_workers("cpu", None, 16, 640) == 0


@pytest.mark.fault(52)
def test_shared_memory_that_is_too_small_is_refused_before_any_stage(
    shared: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    shared["mib"] = 2 * BATCH_MIB
    assert resources.data_workers("0", 2, 16, 640) == 2
    chosen = recipe.load(
        "custom",
        [
            ("data.yaml", "x.yaml"),
            ("baseline.model", "yolov8n.yaml"),
            ("run.device", "0"),
            ("run.workers", "8"),
            ("prune.batch", "16"),
        ],
    )
    with pytest.raises(EnvironmentLacks) as caught:
        preflight.check_processes(chosen, ["prune"])
    assert str(caught.value).startswith("run.workers=8: ") and "set run.workers=" in str(caught.value)
    assert caught.value.exit_code == 4
