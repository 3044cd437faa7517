"""A study whose trials take milliseconds: `python -m tests.support.toy_study FOLDER` is such a trial, and this module starts workers.
`python -m tests.support.toy_study work|ray NAME` is a worker, or the command of a search on a Ray cluster.

A toy trial reads its recipe file, as a real one does. The retention rises with keep_flops and a hidden optimum of round_to, and so does
the latency.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from yolo_compress.data.dataset import Dataset
from yolo_compress.errors import Terminated
from yolo_compress.recipe import recipe
from yolo_compress.recipe.recipe import Recipe
from yolo_compress.runtime.measure.device import cpu_model
from yolo_compress.search import cluster
from yolo_compress.search.front import Engine
from yolo_compress.search.space import Point
from yolo_compress.search.study import RESULT, Outcome, Study, create, open_study, read_plan, write_outcome
from yolo_compress.search.worker import Worker

RECIPE = """
data: {yaml: x.yaml}
baseline: {model: yolov8n.yaml, epochs: 2, batch: 8, optimizer: AdamW, lr0: 0.001, close_mosaic: 0}
prune: {epochs: 8, batch: 8, close_mosaic: 0}
distill: {epochs: 2, batch: 8, close_mosaic: 0}
qat: {epochs: 1, batch: 8}
"""
SECONDS = "TOY_SECONDS"  # variable: time of a trial
KILLER = "TOY_KILLER"  # variable: the trial of this number kills its worker


class FileSampler:
    """A sampler in a file: points on a grid, in order. It does what Optuna does for a study of several processes."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "sampler.json"

    def _read(self) -> dict[str, str]:
        return json.loads(self.file.read_text()) if self.file.is_file() else {}

    def _write(self, states: dict[str, str]) -> None:
        self.file.with_suffix(".tmp").write_text(json.dumps(states))
        os.replace(self.file.with_suffix(".tmp"), self.file)

    @staticmethod
    def point(number: int) -> Point:
        return {
            "keep_flops": round(0.3 + 0.5 * (number * 0.381966 % 1), 4),
            "criterion": ("obs", "taylor")[number % 2],
            "round_to": (8, 16)[number % 2],
        }

    def ask(self) -> tuple[int, Point]:
        states = self._read()
        number = len(states)
        self._write(states | {str(number): "running"})
        return number, self.point(number)

    def tell(self, number: int, values: tuple[float, float] | None, failed: bool = False) -> None:
        states = self._read()
        if states.get(str(number)) == "running":
            self._write(states | {str(number): "failed" if failed else "done" if values else "stopped"})

    def waiting(self) -> dict[int, Point | None]:
        return {int(number): self.point(int(number)) for number, state in self._read().items() if state == "running"}


def base(folder: Path, *overrides: tuple[str, str]) -> Recipe:
    file = folder / "toy.yaml"
    file.write_text(RECIPE)
    return recipe.load(file, [("search.trials", "12"), ("search.latency_ms", "4"), *overrides])


def dataset(digest: str = "d") -> Dataset:
    """1,000 training images, which nobody reads."""
    images = (None,) * 1000
    return Dataset(Path("x.yaml"), ("a",), 3, images, (), (), (), digest * 64, "t" * 64, "v" * 64)


def study(folder: Path, name: str = "toy", *overrides: tuple[str, str]) -> Study:
    """Make a study in `searches/` of the working folder, or open it."""
    return create(name, base(folder, *overrides), dataset())


def engine(number: int | None, keep_flops: float, placement: str = "int8") -> Engine:
    """The engine of a toy trial: 10 ms and all of the mAP at keep_flops=1."""
    retention = 1 - 0.1 * (1 - keep_flops) ** 2
    ms = 10 * keep_flops
    return {
        "trial": number, "placement": placement, "retention": retention, "low": retention - 0.01, "high": retention + 0.01,
        "map50_95": 0.5 * retention, "cost": ms, "latency_ms": ms, "size_mib": 3.0, "processor": cpu_model(), "quiet": True,
    }  # fmt: skip


def measure_reference(study: Study) -> None:
    """Write the result of the baseline, so that no process has to measure it."""
    outcome: Outcome = {"state": "done", "after": "dense", "why": None, "engines": [engine(None, 1)], "seconds": 1.0}
    write_outcome(study.folder / "reference", outcome)


def run(folder: Path) -> None:
    """Do what a process of a trial does: read the recipe files, write the result."""
    is_trial = folder.parent.name == "trials"
    number = int(folder.name) if is_trial else None
    steps = read_plan(folder)["steps"]
    loaded = [recipe.load(folder / step["file"]) for step in steps]
    with (folder / "runs.txt").open("a") as log:
        log.write(f"{os.getpid()}\n")
    time.sleep(float(os.environ.get(SECONDS, "0")))
    if str(number) == os.environ.get(KILLER):
        os.kill(os.getppid(), 9)
        time.sleep(60)
    keep = loaded[-1].prune.keep_flops if loaded[-1].prune else 1.0
    assert keep is not None
    write_outcome(
        folder,
        {"state": "done", "after": steps[-1]["name"], "why": None, "engines": [engine(number, keep)], "seconds": 0.01},
        RESULT,
    )


def toy_process(folder: Path) -> list[str]:
    return [sys.executable, "-m", "tests.support.toy_study", str(folder)]


class Instant(Worker):
    """A worker whose trials run in this process. It has no process to kill, and takes no time."""

    def _process(self, folder: Path, deadline: float, watch: object) -> int:
        if time.monotonic() > deadline:
            return -1000
        run(folder)
        return 0


def instant(study: Study) -> Instant:
    return Instant(study, FileSampler(study.folder))


def worker(study: Study) -> Worker:
    """A worker whose trials are processes, as those of a real one."""
    return Worker(study, FileSampler(study.folder), toy_process)


if __name__ == "__main__":
    from tests.support import toy_study as itself  # Ray finds `worker` in the tasks by the name of its module

    if sys.argv[1] == "work":
        itself.worker(open_study(sys.argv[2])).run()
    elif sys.argv[1] == "ray":
        try:
            cluster.run(open_study(sys.argv[2]), itself.worker)
        except Terminated:
            sys.exit(143)
    else:
        run(Path(sys.argv[1]))
