"""A search of two real trials on tiny data, to its report and its chosen recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.pipeline.conftest import BASELINE, IMGSZ, Bench, draw, prepare
from yolo_compress.store.entries import entries
from yolo_compress.store.manifest import read_artifact

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

WORDS = (
    "search", "recipe=tiny.yaml", "study=s", "run.threads=1", "search.latency_ms=1000", "search.max_drop=0.5",
    "search.keep_flops=0.5,0.9", "search.precision=fp32,int8", "search.int8_max_drop=null",
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
    )
    shutil.rmtree(folder / "datasets" / "shapes" / "images" / "val")
    shutil.rmtree(folder / "datasets" / "shapes" / "labels" / "val")
    draw(folder / "datasets" / "shapes", "val", 16, seed=1)  # enough for an interval
    return ready


def stages(root: Path) -> list[str]:
    return sorted(entry.stage for entry in entries(root / "store"))


def test_a_search_from_start_to_the_chosen_model(searched: Bench) -> None:
    folder, weights = searched.folder / "searches" / "s", searched.folder / "weights"

    # A goal that the baseline meets: it is said, and nothing trains.
    met = json.loads(searched.run_apart(*WORDS, "search.trials=2").stdout.splitlines()[-1])
    assert met["verdict"] == "dense" and met["counts"]["done"] == 0 and (folder / "chosen.yaml").is_file()

    # One that needs trials: less than any engine has.
    words = [word.replace("study=s", "study=t").replace("latency_ms=1000", "latency_ms=0.001") for word in WORDS]
    words = [word for word in words if "latency_ms" not in word] + [
        "search.cost=size",
        "search.trials=2",
        "search.size_mib=0.1",
    ]
    missed = searched.run_apart(*words, code=1)
    answer = json.loads(missed.stdout.splitlines()[-1])
    assert answer["verdict"] == "missed" and "The size stands in the way" in answer["line"]
    assert answer["counts"] == {"done": 0, "stopped": 2, "failed": 0, "open": 0}, "above the limit after `cut`"

    # One without a limit: the front.
    words = [word for word in words if "size_mib" not in word]
    words[words.index("study=t")] = "study=u"
    front = searched.run_apart(*words)
    answer = json.loads(front.stdout.splitlines()[-1])
    study = searched.folder / "searches" / "u"
    document = json.loads((study / "report.json").read_text())
    assert answer["verdict"] in ("reached", "unproven", "missed") and answer["counts"]["done"] >= 1, front.stderr
    assert {row["trial"] for row in document["engines"]} >= {None, 0}
    log = (study / "trials" / "0000" / "log.txt").read_text()
    assert "baseline: up to date" in log and "baseline: running" not in log, (
        "computed once, for all trials of all studies"
    )
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
    if answer["chosen"]["trial"] is not None:
        again = searched.run_apart("engine", f"recipe={study / 'chosen.yaml'}", "run.threads=1")
        assert "prune: up to date" in again.stderr and "prune: running" not in again.stderr
    shown = searched.run("search", "status", "study=u").stdout
    assert "2 of 2 trials ended" in shown and json.loads(shown.splitlines()[-1])["study"] == "u"
