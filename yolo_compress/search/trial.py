"""One trial, in a process of its own: `python -m yolo_compress.search.trial FOLDER`.

All that the process knows is in files: the recipes of its levels, which it reads one after another (`plan.json` has the order), and
the results of the other trials. It writes `figures.json` after each level, and `result.json` at the end. It ends when its worker dies.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from yolo_compress import home, pipeline
from yolo_compress.chain import Planned, current, plan, provider
from yolo_compress.data.dataset import Dataset
from yolo_compress.errors import CompressError, EnvironmentLacks, RecipeError, Terminated
from yolo_compress.evaluate.rows import engine_rows
from yolo_compress.evaluate.stored_detections import kept
from yolo_compress.exits import explain
from yolo_compress.files.atomic import storage_errors
from yolo_compress.preflight import prepare
from yolo_compress.recipe import recipe as recipes
from yolo_compress.recipe.recipe import BenchConfig, Recipe
from yolo_compress.search import measure
from yolo_compress.search.front import Engine
from yolo_compress.search.levels import Figures, ends
from yolo_compress.search.machine import processor
from yolo_compress.search.study import (
    CODE_OF_STUDY,
    RESULT,
    SHARED_STORE,
    Outcome,
    Step,
    Study,
    open_study,
    read_plan,
    write_figures,
    write_outcome,
)
from yolo_compress.store.manifest import Artifact
from yolo_compress.store.store import Store
from yolo_compress.store.transfer import adopt

SHARED_STAGES = ("baseline", "teacher", "sparsify")  # equal for all trials of a study


class Run:
    """A trial, or the reference, that is run.

    Attributes:
        study: The study.
        folder: Folder of the trial.
        number: Number of the trial. None: the reference.
        store: Store of its stages.
    """

    def __init__(self, study: Study, folder: Path, number: int | None) -> None:
        self.study, self.folder, self.number = study, folder, number
        self.plan = read_plan(folder)
        self.shared = Store(home.weights())
        self.store = self.shared if self.plan["store"] == SHARED_STORE else Store(folder / "store")
        self.figures: dict[str, Figures] = {}
        self.engines: list[Engine] = []

    def run(self, dataset: Dataset) -> Outcome:
        """Run the steps in order until the trial is done or worse than others."""
        started = time.monotonic()
        for step in self.plan["before"]:
            with measure.beside_others():
                pipeline.run(self._recipe(step), step["target"], store=self.store)
        why = None
        for step in self.plan["steps"]:
            recipe = self._recipe(step)
            with measure.beside_others():
                pipeline.run(recipe, step["target"], store=self.store)
            made = current(self.store, plan(recipe, dataset, step["target"]))
            if step["final"]:
                self.engines += [self._engine(step, precision, recipe, dataset, made) for precision in step["engines"]]
                continue
            self.figures[step["name"]] = self._level(step, recipe, dataset, made)
            write_figures(self.folder, self.figures)
            if why := self._ends(step["name"]):
                break
        return {
            "state": "stopped" if why else "done",
            "after": self.plan["steps"][-1]["name"] if not why else list(self.figures)[-1],
            "why": why,
            "engines": self.engines,
            "seconds": round(time.monotonic() - started, 3),
        }

    def _recipe(self, step: Step) -> Recipe:
        return recipes.load(self.folder / step["file"])

    def prepared(self) -> Dataset:
        """Check the data, and take the stages that all trials share from the shared store, so that they are not run again.

        Raises:
            CompressError: Images or weights have changed, or are gone. It is no fault of this trial.
        """
        recipe = self._recipe(self.plan["steps"][-1])
        if self.store is not self.shared:
            cache = self.store.root / ".cache"
            with storage_errors(cache):
                self.store.root.mkdir(parents=True, exist_ok=True)
                if not cache.is_symlink():  # so that images are not read and checked again
                    cache.symlink_to((self.shared.root / ".cache").absolute())
        recipe, dataset = prepare(recipe, self.store)
        if self.store is not self.shared:
            chain: dict[str, Planned] = {}
            for stage in SHARED_STAGES:
                chain |= plan(recipe, dataset, stage)
            found = current(self.shared, chain)
            if gone := ", ".join(stage for stage in chain if stage not in found):
                raise RecipeError(
                    f"the results of {gone} that study {self.study.name} compares with are gone, or images or weights have changed "
                    "since: give another name"
                )
            with self.store.lock("the shared stages"):
                for artifact in found.values():
                    adopt(artifact, self.store)
        return dataset

    def _level(self, step: Step, recipe: Recipe, dataset: Dataset, made: dict[str, Artifact]) -> Figures:
        """Return the retention of the model of a level. The level with engines also has the cost, which later levels share."""
        stage = provider(recipe, "distill")
        found = measure.retained(dataset, recipe, *(self._stored(made[name], dataset) for name in ("baseline", stage)))
        if step["engines"]:
            cost = min(self._cost(precision, recipe, dataset, made)[0] for precision in step["engines"])
        else:
            cost = next(iter(self.figures.values()))["cost"]
        return {"retention": found.retention, "low": found.low, "high": found.high, "cost": cost}

    def _engine(
        self, step: Step, precision: str, recipe: Recipe, dataset: Dataset, made: dict[str, Artifact]
    ) -> Engine:
        """Return the accuracy and the cost of a finished engine."""
        folder = self._folder(precision, made)
        with measure.beside_others():
            detected = measure.detections(dataset, recipe, folder)
        found = measure.retained(dataset, recipe, self._stored(made["baseline"], dataset), detected)
        cost, size_mib, timing = self._cost(precision, recipe, dataset, made)
        return {
            "trial": self.number,
            "placement": step["name"] if self.number is not None else precision,
            "retention": found.retention,
            "low": found.low,
            "high": found.high,
            "map50_95": found.map50_95,
            "cost": cost,
            "latency_ms": timing.p50_ms if timing else None,
            "size_mib": size_mib,
            "processor": processor(self.study.goal.runtime) if timing else None,
            "quiet": timing is None or timing.quiet,
        }

    def _cost(
        self, precision: str, recipe: Recipe, dataset: Dataset, made: dict[str, Artifact]
    ) -> tuple[float, float, measure.Timing | None]:
        """Return (cost, size in MiB, timing) of an engine. The timing is None if the search lowers the size."""
        folder = self._folder(precision, made)
        size_mib = next(
            row["size_mib"] for row in engine_rows(made["engine"]) if row.get("folder") == self._row(precision)
        )
        if self.study.goal.cost == "size":
            return size_mib, size_mib, None
        settings = self.study.base.bench or BenchConfig()
        timing = measure.timed(folder, dataset, recipe, settings, self.folder)
        return timing.p50_ms, size_mib, timing

    def _row(self, precision: str) -> str:
        return f"compressed/{self.study.goal.runtime}-{precision}"

    def _folder(self, precision: str, made: dict[str, Artifact]) -> Path:
        row = next((row for row in engine_rows(made["engine"]) if row.get("folder") == self._row(precision)), None)
        if row is None:
            reasons = {str(one["reason"]) for one in engine_rows(made["engine"]) if one["precision"] == precision}
            raise EnvironmentLacks(
                f"search: no {precision} engine for {self.study.goal.runtime} can be built here: "
                f"{'; '.join(sorted(reasons)) or 'there is no file to build it from'}"
            )
        return made["engine"].path / self._row(precision)

    def _stored(self, artifact: Artifact, dataset: Dataset) -> list[measure.np.ndarray]:
        return kept(artifact.file(measure.DETECTIONS), len(dataset.val))

    def _ends(self, level: str) -> str | None:
        """Return why the trial ends after this level, by the figures that other trials have there now."""
        others = [
            one.figures[level] for one in self.study.trials() if one.number != self.number and level in one.figures
        ]
        return ends(level, self.figures[level], others, self.study.goal)


def main(words: list[str]) -> int:
    """Run the trial in the folder `words[0]`, and return the exit code. `CODE_OF_STUDY`: no trial of the study could run here."""
    signal.signal(signal.SIGTERM, _terminate)
    threading.Thread(target=_end_with_worker, daemon=True).start()
    folder = Path(words[0]).absolute()
    try:
        is_trial = folder.parent.name == "trials"
        study = open_study(folder.parents[1].name if is_trial else folder.parent.name)
        write_figures(folder, {})  # not deleted, because others may read it now
        trial = Run(study, folder, int(folder.name) if is_trial else None)
        try:
            dataset = trial.prepared()
        except CompressError as error:
            explain(error, continues=False)
            return CODE_OF_STUDY
        write_outcome(folder, trial.run(dataset), RESULT)
    except (Exception, KeyboardInterrupt, Terminated) as error:
        return explain(error, continues=False)
    return 0


def _terminate(number: int, frame: object) -> None:
    raise Terminated


def _end_with_worker() -> None:
    """Wait until the worker closes stdin, which its death does too, and end this process."""
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
