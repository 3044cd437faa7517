"""A search with one real trial on tiny data, to its report and its chosen recipe.

What needs no real stage is in tests/unit/search: test_trial.py has searches whose stages take milliseconds, test_study.py many trials.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.pipeline.conftest import BASELINE, IMGSZ, ROOT, Bench, draw, prepare
from yolo_compress.runtime.measure.device import cpu_model
from yolo_compress.store.entries import entries
from yolo_compress.store.manifest import read_artifact

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

WORDS = (
    "search", "recipe=tiny.yaml", "study=u", "run.threads=1", "search.trials=1", "search.latency_ms=null", "search.max_drop=0.5",
    "search.keep_flops=0.5,0.9", "search.int8_max_drop=null",
)  # fmt: skip


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A working folder with a short recipe, in which nothing has run."""
    pytest.importorskip("optuna")
    folder = tmp_path_factory.mktemp("search") / "user"
    ready = prepare(
        folder,
        data={"yaml": "shapes.yaml", "imgsz": IMGSZ},
        baseline={**BASELINE, "epochs": 12},
        sparsify=None,
        control=None,
        prune={"epochs": 2, "batch": 4, "lr0": 0.001, "calib_images": 16, "mosaic": 0.0},
        distill=None,
        qat={"epochs": 0, "calib_images": 8},
        export={"calib_images": 8, "torchscript": False},
        engine={"runtimes": ["onnxruntime"]},  # the chosen recipe takes it, the search has its own
    )
    shutil.rmtree(folder / "datasets" / "shapes" / "images" / "val")
    shutil.rmtree(folder / "datasets" / "shapes" / "labels" / "val")
    draw(folder / "datasets" / "shapes", "val", 16, seed=1)  # enough for an interval
    return ready


def stages(root: Path) -> list[str]:
    return sorted(entry.stage for entry in entries(root / "store"))


def test_a_search_from_start_to_the_chosen_model(searched: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, study = searched.folder / "weights", searched.folder / "searches" / "u"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the processes of the trials
    front = searched.run(*WORDS)
    answer = json.loads(front.stdout.splitlines()[-1])
    document = json.loads((study / "report.json").read_text())
    assert answer["verdict"] == "reached" and answer["counts"]["done"] == 1, front.stderr
    assert {(row["trial"], row["placement"]) for row in document["engines"]} == {(None, "int8"), (0, "int8")}
    assert all(row["latency_ms"] > 0 and row["processor"] == cpu_model() for row in document["engines"])
    log = (study / "trials" / "0000" / "log.txt").read_text()
    assert "baseline: up to date" in log and "baseline: running" not in log, "computed once"
    assert stages(weights).count("baseline") == 1
    kept = [folder for folder in weights.iterdir() if folder.name.startswith("u-00")]
    assert len(kept) == sum(row["front"] and row["trial"] is not None for row in document["engines"])
    (baseline,) = (entry.path for entry in entries(weights / "store") if entry.stage == "baseline")
    content = read_artifact(baseline).manifest.content
    for links in kept:
        assert read_artifact((links / "prune").resolve()).manifest.inputs["baseline"] == content
    assert not (study / "trials" / "0000" / "store").exists()

    # `gc` keeps the front, the chosen recipe reuses it, and `status` shows the study.
    before = stages(weights)
    searched.run("gc")
    assert stages(weights).count("prune") == before.count("prune")
    assert answer["chosen"]["trial"] == 0
    again = searched.run("engine", f"recipe={study / 'u-chosen.yaml'}", "run.threads=1")
    assert "prune: up to date" in again.stderr and "prune: running" not in again.stderr
    shown = searched.run("search", "status", "study=u").stdout
    assert "1 of 1 trials ended" in shown and json.loads(shown.splitlines()[-1])["study"] == "u"
