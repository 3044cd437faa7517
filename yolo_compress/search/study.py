"""A study on the disk: its goal and recipe, and a folder for each trial. Any number of workers may share it.

    searches/NAME/study.json               what is searched, and the fingerprint of recipe and data
    searches/NAME/base.yaml                the recipe, without `auto`
    searches/NAME/reference/               the unpruned baseline, measured like a trial
    searches/NAME/trials/0007/trial.json   the point, and how often it was given out
    searches/NAME/trials/0007/*.yaml       a recipe for each level; plan.json has their order
    searches/NAME/trials/0007/figures.json what the finished levels measured
    searches/NAME/trials/0007/result.json  how the trial ended, by the process that ran it
    searches/NAME/trials/0007/outcome.json the same, after its artefacts were kept; only with this file the trial counts

A worker holds the lock of the trial's folder while it runs the trial. The kernel releases the lock when the worker dies. A trial
without outcome and without holder is given out again, once: its store has the finished stages, so it continues.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, cast

from typing_extensions import TypedDict

from yolo_compress import chain, home
from yolo_compress.data.dataset import Dataset
from yolo_compress.errors import CorruptArtifact, Locked, RecipeError
from yolo_compress.files.atomic import atomic_write, storage_errors
from yolo_compress.files.lock import lock
from yolo_compress.files.strict_json import load
from yolo_compress.recipe import recipe as recipes
from yolo_compress.recipe.recipe import Recipe
from yolo_compress.search.front import Choice, Engine, Goal, choose, front
from yolo_compress.search.levels import Figures, Level, levels, placements
from yolo_compress.search.sampler import Sampler
from yolo_compress.search.space import Axis, Point, axes, own_point
from yolo_compress.store.fingerprint import explain, fingerprint, plain

SCHEMA = 2
STUDY, BASE, TRIAL, PLAN, FIGURES = "study.json", "base.yaml", "trial.json", "plan.json", "figures.json"
RESULT, OUTCOME = "result.json", "outcome.json"
CODE_OF_STUDY = 78  # exit code of a trial's process: its study or its machine is at fault
OWN_STORE: Literal["own"] = "own"
SHARED_STORE: Literal["shared"] = "shared"
GIVEN_MOST = 2  # a trial whose workers died twice is not given out a third time: it may be what kills them
MACHINE = ("trials", "hours", "storage", "workers")  # knobs of `search` that may change while a study goes on


class StudyFile(TypedDict):
    schema: int
    id: str  # random; a study in a database belongs to the folder with this id
    name: str
    key: dict[str, object]  # recipe, files and data, see `_key`
    fingerprint: str  # of `key`
    images: int  # training images


class TrialFile(TypedDict):
    number: int
    point: Point
    given: int  # how often a worker got the trial, without those that gave it back


class Step(TypedDict):
    """A step of a trial: a recipe file, and the stage to run it to."""

    name: str  # level or placement
    file: str
    target: str
    engines: list[str]  # precisions of the engines to measure; empty: the model of `target` is measured
    final: bool  # whether the engines are results of the trial


class Plan(TypedDict):
    store: Literal["own", "shared"]  # store of the trial's stages: the trial's own, or weights/
    before: list[Step]  # stages that all trials share and that have to run first; nothing is measured
    steps: list[Step]


class Outcome(TypedDict):
    """How a trial ended. "stopped": it was worse than others after a level."""

    state: Literal["done", "stopped", "failed"]
    after: str  # last level that finished; empty if none did
    why: str | None  # why it stopped or failed
    engines: list[Engine]
    seconds: float  # time of the process


@dataclass(frozen=True)
class Trial:
    """A trial, and everything that is known of it."""

    folder: Path
    number: int
    point: Point
    given: int
    figures: Mapping[str, Figures]
    outcome: Outcome | None


class Study:
    """A study in its folder. `create` and `open_study` return one."""

    def __init__(self, folder: Path, file: StudyFile, base: Recipe) -> None:
        self.folder, self.file, self.base = folder, file, base
        self._ended: dict[
            str, tuple[int, Trial]
        ] = {}  # folder -> time of its outcome.json, and the trial, which changes no more

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def goal(self) -> Goal:
        return goal(self.base)

    @cached_property
    def space(self) -> dict[str, Axis]:
        return axes(self.base, self.file["images"])

    @cached_property
    def own(self) -> Point:
        """The point of the recipe's own values."""
        return own_point(self.base, self.space)

    def locked(self) -> AbstractContextManager[None]:
        """Return the lock of the study, which is held only briefly."""
        return lock(self.folder / ".lock", f"study {self.name}")

    # Trials

    def trials(self) -> list[Trial]:
        """Return all trials by number."""
        folder = self.folder / "trials"
        with storage_errors(folder, "read"):
            names = sorted(os.listdir(folder)) if folder.is_dir() else []
            return [self._read(folder / name) for name in names if (folder / name / TRIAL).is_file()]

    def unfinished(self) -> bool:
        """Return whether a trial has no outcome: a worker runs it, or died."""
        return any(one.outcome is None for one in self.trials())

    def _read(self, folder: Path) -> Trial:
        """Read a trial, or take it from memory if it had ended when it was read."""
        try:
            written = (folder / OUTCOME).stat().st_mtime_ns
        except FileNotFoundError:
            return read_trial(folder)
        if self._ended.get(folder.name, (None,))[0] != written:
            self._ended[folder.name] = written, read_trial(folder)
        return self._ended[folder.name][1]

    def reference(self) -> list[Engine]:
        """Return the engines of the unpruned baseline. Empty: they are not measured yet."""
        outcome = read_outcome(self.folder / "reference")
        return outcome["engines"] if outcome else []

    @property
    def processor(self) -> str | None:
        """Processor or GPU that the baseline was timed on. None: the search lowers the size, or the baseline is not measured yet."""
        return next((one["processor"] for one in self.reference()), None)

    def engines(self, trials: Iterable[Trial]) -> list[Engine]:
        """Return the engines of the baseline and of the finished trials."""
        return [*self.reference(), *(engine for one in trials if one.outcome for engine in one.outcome["engines"])]

    def front(self, trials: Iterable[Trial]) -> list[Engine]:
        """Return the front over all engines, cheapest first."""
        return front(self.engines(trials))

    def choice(self, trials: Iterable[Trial]) -> Choice:
        return choose(self.engines(trials), self.goal)

    @contextmanager
    def given_out(self, sampler: Sampler, most: int) -> Iterator[Trial | None]:
        """Give a trial to this worker, and hold its lock during the block.

        A trial whose worker died comes first. Then a new one is drawn, unless there are `most` trials already.

        Yields:
            The trial. None: there is no trial to give out now. Others may still run.
        """
        with ExitStack() as held:
            with self.locked():
                trial = self._orphan(sampler, held) or self._new(sampler, most, held)
            yield trial

    def _orphan(self, sampler: Sampler, held: ExitStack) -> Trial | None:
        """Take a trial that nobody holds and that has no outcome. Tell Optuna about trials that ended without that."""
        known = {one.number: one for one in self.trials()}
        for number, point in sampler.waiting().items():
            if number not in known:  # the worker was killed between asking and writing the folder
                if point is None:
                    sampler.tell(number, None, failed=True)
                    continue
                known[number] = self._written(number, point, given=0)
            if (outcome := known[number].outcome) is not None:  # the worker was killed between writing and telling
                shutil.rmtree(known[number].folder / "store", ignore_errors=True)
                sampler.tell(number, self.objectives(outcome), outcome["state"] == "failed")
        for one in known.values():
            if one.outcome is not None or not _take(one, held):
                continue
            now = read_trial(one.folder)  # its worker may have finished it in the meantime
            done = read_outcome(now.folder, RESULT)  # its process ended, but its worker was killed before it read that
            if now.outcome is None and (now.given < GIVEN_MOST or done):
                return self._given(now)
            if now.outcome is None:
                self._finish(now, failed(f"its workers died {now.given} times", last_level(now)), sampler)
            held.pop_all().close()
        return None

    def _new(self, sampler: Sampler, most: int, held: ExitStack) -> Trial | None:
        if len(self.trials()) >= most:
            return None
        trial = self._written(*sampler.ask(), given=0)
        assert _take(trial, held), f"{trial.folder} was made here and is held by another process"
        return self._given(trial)

    def _given(self, trial: Trial) -> Trial:
        """Count that the trial is given out, and write its recipes, with the settings of this worker's machine."""
        found = levels(self.base, trial.point), placements(self.base, trial.point)
        steps = [*write_levels(trial.folder, found[0]), *write_levels(trial.folder, found[1], final=True)]
        _write(trial.folder / PLAN, {"store": OWN_STORE, "before": [], "steps": steps})
        _write(trial.folder / TRIAL, {"number": trial.number, "point": trial.point, "given": trial.given + 1})
        return read_trial(trial.folder)

    def _written(self, number: int, point: Point, given: int) -> Trial:
        """Write the folder of a new trial."""
        folder = self.folder / "trials" / f"{number:04d}"
        _write(folder / TRIAL, {"number": number, "point": point, "given": given})
        return read_trial(folder)

    def give_back(self, trial: Trial) -> None:
        """Record that a worker ended a trial in good order, because the time was over or it was interrupted."""
        _write(trial.folder / TRIAL, {"number": trial.number, "point": trial.point, "given": max(0, trial.given - 1)})

    def finish(self, trial: Trial, outcome: Outcome, sampler: Sampler) -> None:
        """Write the outcome of a trial, tell Optuna, and delete the trial's store.

        Artefacts of engines on the front have to be in the shared store before.
        """
        with self.locked():
            self._finish(trial, outcome, sampler)

    def _finish(self, trial: Trial, outcome: Outcome, sampler: Sampler) -> None:
        _write(trial.folder / OUTCOME, cast("Mapping[str, object]", outcome))
        shutil.rmtree(trial.folder / "store", ignore_errors=True)
        sampler.tell(trial.number, self.objectives(outcome), outcome["state"] == "failed")

    def objectives(self, outcome: Outcome) -> tuple[float, float] | None:
        """Return (lower end of the retention, cost) of a trial's best engine. None: it has no engine."""
        best = choose(outcome["engines"], self.goal).engine
        return None if best is None else (best["low"] if best["low"] is not None else best["retention"], best["cost"])

    # Time

    @contextmanager
    def session(self) -> Iterator[Path]:
        """Record the time that a worker spends. The worker calls `touch` on the yielded file from time to time."""
        name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}.json"
        file = self.folder / "sessions" / name
        start = time.time()
        _write(file, {"from": start, "to": start})
        try:
            yield file
        finally:
            touch(file)

    def spent_s(self) -> float:
        """Return how long workers have run. Time in which several ran at once counts once."""
        folder = self.folder / "sessions"
        times = [load(file, CorruptArtifact) for file in sorted(folder.glob("*.json"))] if folder.is_dir() else []
        return union_s([(float(one["from"]), float(one["to"])) for one in times])


def goal(base: Recipe) -> Goal:
    """Return the goal of a recipe's search."""
    search = base.search
    assert search is not None
    limit = search.latency_ms if search.cost == "latency" else search.size_mib
    return Goal(search.cost, search.runtime, limit, search.max_drop)


def create(name: str, base: Recipe, dataset: Dataset) -> Study:
    """Make the study, or open the one that is there if it has the same recipe and data.

    Args:
        name: Name of the study, and of its folder in `searches/`.
        base: Recipe with a section `search`, without `auto`.
        dataset: Data of the study.

    Raises:
        RecipeError: The name cannot be that of a folder, there is nothing to search, or a study of this name has another recipe,
            other files or other data.
    """
    folder = _folder(name)
    key = _key(base, dataset)
    with lock(folder / ".lock", f"study {name}"):
        if (folder / STUDY).is_file():
            there = open_study(name)
            if there.file["fingerprint"] != fingerprint(key):
                changed = explain(key, there.file["key"])
                raise RecipeError(
                    f"study {name} has another recipe, files or data ({'; '.join(changed[:3])}): give another name, or delete {folder}"
                )
            _write_base(folder, base)  # other trials, hours or storage
            return open_study(name)
        file: StudyFile = {
            "schema": SCHEMA,
            "id": uuid.uuid4().hex,
            "name": name,
            "key": key,
            "fingerprint": fingerprint(key),
            "images": len(dataset.train),
        }
        study = Study(folder, file, base)
        if all(axis.fixed for axis in study.space.values()):
            raise RecipeError(
                "search: every range is null or has one value, so there is nothing to search; set search.keep_flops=auto"
            )
        _write_base(folder, base)
        _write(folder / STUDY, cast("Mapping[str, object]", file))
    return open_study(name)


def open_study(name: str, overrides: Sequence[tuple[str, str]] = ()) -> Study:
    """Open a study. The overrides are settings of this machine, such as ("run.device", "1").

    Raises:
        RecipeError: There is no such study here.
        CorruptArtifact: Its file is damaged.
    """
    folder = _folder(name)
    if not (folder / STUDY).is_file():
        there = ", ".join(sorted(path.parent.name for path in home.searches().glob(f"*/{STUDY}"))) or "no study"
        raise RecipeError(
            f"no study {name} in {home.searches().absolute()}, which has {there}. "
            f"All workers of a study need the same folder: set {home.VARIABLE} to one on a file system that they share"
        )
    file = load(folder / STUDY, CorruptArtifact)
    if file.get("schema") != SCHEMA:
        raise CorruptArtifact(f"{folder / STUDY}: schema {file.get('schema')}, expected {SCHEMA}: delete the folder")
    return Study(folder, cast(StudyFile, file), recipes.load(folder / BASE, overrides))


def check_storage(study: Study, owner: str | None) -> None:
    """Check that the study in Optuna's storage belongs to this folder.

    Args:
        study: The study.
        owner: Id of the folder that the study in the storage belongs to. None: the storage does not know the study.

    Raises:
        RecipeError: It belongs to another folder, or the storage has lost it.
    """
    if owner is None and study.trials():
        raise RecipeError(
            f"study {study.name} has trials that its storage does not know: give the search.storage that it was begun with, or delete "
            f"{study.folder}"
        )
    if owner is not None and owner != study.file["id"]:
        raise RecipeError(
            f"the storage has a study {study.name} of another folder than {study.folder.absolute()}: give the study another name, or "
            f"set {home.VARIABLE} to the folder that the workers share"
        )


def check_files(study: Study) -> None:
    """Check that the files which the recipe names are those that the study was begun with.

    Raises:
        RecipeError: A file was changed, or is not here.
        EnvironmentLacks: A checkpoint is in none of its places.
    """
    before = cast("Mapping[str, str]", study.file["key"]["files"])
    if changed := [knob for knob, digest in _files(study.base).items() if before.get(knob) != digest]:
        raise RecipeError(
            f"{changed[0]}: the file has changed since study {study.name} was begun: restore it, or give the study another name"
        )


def write_levels(folder: Path, found: Sequence[Level], final: bool = False) -> list[Step]:
    """Write the recipe of each level into `folder`, and return the steps that read them."""
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    steps: list[Step] = []
    for level in found:
        file = f"{level.name}.yaml"
        atomic_write(folder / file, level.recipe.dump())
        steps.append(
            {"name": level.name, "file": file, "target": level.target, "engines": list(level.engines), "final": final}
        )
    return steps


def write_plan(folder: Path, plan: Plan) -> None:
    _write(folder / PLAN, cast("Mapping[str, object]", plan))


def read_plan(folder: Path) -> Plan:
    return cast(Plan, load(folder / PLAN, CorruptArtifact))


def write_figures(folder: Path, figures: Mapping[str, Figures]) -> None:
    _write(folder / FIGURES, cast("Mapping[str, object]", figures))


def write_outcome(folder: Path, outcome: Outcome, file: str = OUTCOME) -> None:
    _write(folder / file, cast("Mapping[str, object]", outcome))


def failed(why: str, after: str) -> Outcome:
    """Return the outcome of a trial that failed."""
    return {"state": "failed", "after": after, "why": why, "engines": [], "seconds": 0.0}


def last_level(trial: Trial) -> str:
    """Return the name of the last level that a trial finished. Empty: none."""
    return list(trial.figures)[-1] if trial.figures else ""


def touch(session: Path) -> None:
    """Record in the file of a session that the worker still runs."""
    _write(session, {"from": load(session, CorruptArtifact)["from"], "to": time.time()})


def union_s(times: Sequence[tuple[float, float]]) -> float:
    """Return the length of the union of intervals (start, end)."""
    total, last = 0.0, float("-inf")
    for start, end in sorted(times):
        total += max(0.0, end - max(start, last))
        last = max(last, end)
    return total


def _folder(name: str) -> Path:
    if not home.is_recipe_name(name) or name.startswith("."):
        raise RecipeError(
            f"study={name}: expected a name that can be a folder in {home.searches()}/: it starts with a letter or digit"
        )
    return home.searches() / name


def _key(base: Recipe, dataset: Dataset) -> dict[str, object]:
    """Return what decides the results of a study: the recipe without settings of the machine, the files that it names, and the data."""
    recipe = base.model_dump(mode="json", exclude={"name", "report", "control"})
    for knob in type(base.run).MACHINE:
        recipe["run"].pop(knob)
    for knob in MACHINE:
        recipe["search"].pop(knob)
    digests = {"data_digest": dataset.digest, "unlabelled_digest": dataset.unlabelled_digest}
    return plain({**recipe, "files": _files(base), **digests})


def _files(base: Recipe) -> dict[str, str]:
    """Return knob -> SHA-256 of the file that it names, such as "baseline.weights"."""
    return {
        f"{stage}.{knob}": digest
        for stage in chain.STAGES
        if getattr(base, stage) is not None
        for knob, digest in chain.files(base, stage).items()
    }


def _take(trial: Trial, held: ExitStack) -> bool:
    """Lock a trial for this process until `held` ends. Return False if another process holds it."""
    try:
        held.enter_context(lock(trial.folder / ".lock", f"trial {trial.number}", wait=False))
    except Locked:
        return False
    return True


def read_trial(folder: Path) -> Trial:
    """Read everything that is known of a trial."""
    file = cast(TrialFile, load(folder / TRIAL, CorruptArtifact))
    figures = load(folder / FIGURES, CorruptArtifact) if (folder / FIGURES).is_file() else {}
    return Trial(
        folder, file["number"], file["point"], file["given"], cast("dict[str, Figures]", figures), read_outcome(folder)
    )


def read_outcome(folder: Path, file: str = OUTCOME) -> Outcome | None:
    """Return the outcome of the trial, or of the reference, in a folder. None: it has not ended."""
    return cast(Outcome, load(folder / file, CorruptArtifact)) if (folder / file).is_file() else None


def _write_base(folder: Path, base: Recipe) -> None:
    atomic_write(folder / BASE, base.dump())


def _write(file: Path, content: Mapping[str, object]) -> None:
    with storage_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, json.dumps(content, indent=1, allow_nan=False) + "\n")
