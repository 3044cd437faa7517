"""Run the stages of a recipe in order, and skip stages that are up to date (`chain.current`)."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolo_compress import home, progress, ranks
from yolo_compress.chain import STAGES, Planned, contents, current, plan, provider, published
from yolo_compress.data.dataset import Dataset, recheck
from yolo_compress.errors import RecipeError
from yolo_compress.files.atomic import require_free, storage_errors
from yolo_compress.preflight import check, check_processes, prepare
from yolo_compress.recipe import auto_values
from yolo_compress.recipe import folder as recipe_folder
from yolo_compress.recipe.recipe import SHIPPED, Recipe
from yolo_compress.store import environment
from yolo_compress.store.fingerprint import fingerprint
from yolo_compress.store.manifest import BEGUN, WORK, Artifact
from yolo_compress.store.resources import FREE_MIB, memory_errors, needed_mib
from yolo_compress.store.source_weights import find_weights
from yolo_compress.store.store import Store

if TYPE_CHECKING:
    from yolo_compress.stages._prune_dry_run import DryRun


def run(recipe: Recipe, target: str, *, store: Store | None = None, wait: bool = True, again: bool = False) -> Artifact:
    """Run the recipe up to the stage `target` and return the artefact of `target`. Stages that are up to date do not run again.

    Args:
        recipe: Recipe from `recipe.load`.
        target: A key of `STAGES`: "baseline", "prune", "export", "report", ...
        store: Store of the artefacts. Default: `home.weights()`, which is `weights/` of the working directory.
        wait: If another run holds the store, wait for that run to end. If False, raise `Locked`.
        again: Run `target` again even if it is up to date. The old artefact stays until the new one is published. If the new
            artefact differs, as measurements do, the artefacts made from the old one become stale.

    Returns:
        The published artefact. A report is also returned if its gate failed; see `metrics["gate"]["passed"]`.

    Raises:
        CompressError: An error that a user can fix, such as bad data, missing weights or a full disk. `exit_code` is the exit
            code of the command line.
        RuntimeFailure: An engine cannot be built or run.
    """
    store = store or Store(home.weights())
    ranks.check_environment()
    if not ranks.several():
        with store.lock(f"{target} of recipe {recipe.name}", wait):
            return _run(recipe, target, store, again).last
    from yolo_compress.train import together, trainer

    machine = recipe.run
    with together.formed(machine.device, _agreed(recipe, target)):
        if ranks.rank() > 0:
            ended: Artifact = trainer.take_part(machine.device, machine.workers, machine.threads)
            return ended
        with store.lock(f"{target} of recipe {recipe.name}", wait):
            artifact = _run(recipe, target, store, again).last
        together.end(artifact)
        return artifact


def _agreed(recipe: Recipe, target: str) -> dict[str, str]:
    """Return the values that must be equal on all ranks of a distributed run.

    These are the recipe without the settings of the machine, the stage `target`, and the versions of the libraries.
    """
    content = recipe.model_dump(mode="json")
    for knob in type(recipe.run).MACHINE:
        content["run"].pop(knob)
    versions = {name: environment.version(name) for name in ("yolo-compress", "torch", "ultralytics")}
    return {"recipe": fingerprint(content), "stage": target, "version": fingerprint(versions)}


@dataclass(frozen=True)
class _Finished:
    """A finished run: the recipe without `auto`, the data set, and the artefacts by stage in the order of the chain."""

    recipe: Recipe
    dataset: Dataset
    artifacts: dict[str, Artifact]

    @property
    def last(self) -> Artifact:
        return list(self.artifacts.values())[-1]


def _run(recipe: Recipe, target: str, store: Store, again: bool) -> _Finished:
    asked, (recipe, dataset) = recipe, prepare(recipe, store)
    if text := auto_values.said(asked, recipe):
        progress.say(text)
    artifacts: dict[str, Artifact] = {}
    last = provider(recipe, target)
    chain = plan(recipe, dataset, target)
    forced = last if again else None
    done = current(store, chain, but=forced)
    check_processes(recipe, [stage for stage in chain if stage not in done])
    check(recipe, dataset, [stage for stage in chain if stage not in done])
    name = _label(recipe, store)
    for stage in chain:
        store.check_name(name, stage)
    recipe_folder.claim(store.root, recipe)
    for stage, planned in chain.items():
        found = None if stage == forced else published(store, planned, artifacts)
        if found:
            progress.say(f"{stage}: up to date")
        artifacts[stage] = found or _execute(recipe, planned, dataset, artifacts, store, name)
        store.link(name, artifacts[stage])
    return _Finished(recipe, dataset, artifacts)


def _label(recipe: Recipe, store: Store) -> str:
    """Return the name of the recipe's folder (`recipe_folder.label`). If it differs from the recipe's name, print a notice."""
    name = recipe_folder.label(store.root, recipe)
    if name != recipe.name:
        other = recipe_folder.owner_of(store.root, recipe.name)
        shown = other if other == SHIPPED else os.path.normpath(store.root / str(other))
        progress.notice(
            f"{store.root / recipe.name} leads to the results of another recipe of this name ({shown}); the results of this one "
            f"are in {store.root / name}"
        )
    return name


def _execute(
    recipe: Recipe, planned: Planned, dataset: Dataset, artifacts: Mapping[str, Artifact], store: Store, name: str
) -> Artifact:
    from yolo_compress.stages import Job  # imported here because only a running stage needs it

    stage = planned.stage
    inputs = {need: artifacts[source] for need, source in planned.inputs.items()}
    for artifact in inputs.values():
        store.verify(artifact)
    inputs_now = contents(planned, artifacts)
    partial = store.partial(stage, planned.fingerprint, inputs_now)
    needed = needed_mib(getattr(recipe, stage), inputs.values()) if STAGES[stage].models else FREE_MIB
    require_free(store.root, needed, f"stage {stage}")
    progress.say(f"{stage}: running")
    started = time.monotonic()
    _empty(partial)
    with memory_errors(stage):
        job = Job(getattr(recipe, stage), recipe, dataset, inputs, partial, partial / WORK)
        metrics = importlib.import_module(f"yolo_compress.stages.{stage}").run(job)
    recheck(dataset)
    seconds = time.monotonic() - started
    artifact = store.publish(
        stage, planned.fingerprint, planned.key, metrics, environment.describe(), seconds, inputs_now, name
    )
    progress.say(f"{stage}: done in {seconds:.0f} s -> {artifact.path}")
    return artifact


def _empty(partial: Path) -> None:
    """Empty the folder `partial`, which a stage writes into, except for `work` and `work.json`. Create `work` if needed."""
    (partial / WORK).mkdir(exist_ok=True)
    for entry in partial.iterdir():
        if entry.name not in (WORK, BEGUN):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def report_over(
    recipe: Recipe, files: list[Path], out: Path, *, store: Store | None = None, wait: bool = True
) -> dict[str, Any]:
    """Bring the report up to date. Write a copy into `out`, with measurements of other machines added.

    Args:
        recipe: Recipe from `recipe.load`.
        files: `device.json` files of robots, and `report.json` files of other recipes.
        out: Folder outside the store. It is created if needed, and a report in it is overwritten. The report in the store does
            not change.

    Returns:
        The metrics of the new report: `verdict`, `gate` and `table`.

    Raises:
        CompressError: A file cannot be used; `report.device_files.read` and `report.devices.add` list the causes. Or a stage failed,
            as in `run`. All files are read before any stage runs.
    """
    from yolo_compress.report import device_files
    from yolo_compress.stages import Job, report

    store = store or Store(home.weights())
    store.check_outside(out, "out")
    device_files.read(files)  # before any training
    with store.lock(f"report of recipe {recipe.name}", wait):
        done = _run(recipe, "report", store, again=False)
        inputs = {need: done.artifacts[provider(done.recipe, need)] for need in STAGES["report"].needs}
        for artifact in (done.last, *inputs.values()):
            store.verify(artifact)
        job = Job(done.recipe.report, done.recipe, done.dataset, inputs, out, out)
        return dict(report.add(job, done.last, files))


def dry_run(recipe: Recipe, store: Store | None = None) -> DryRun:
    """Return which channels `prune` would remove from the model, or what it would factorise. Nothing is trained.

    Raises:
        RecipeError: The recipe has no section `prune`, `prune.kind` makes zeros, or the baseline is not trained yet.
    """
    with _planning(recipe, store or Store(home.weights())) as (job, weights):
        shown: DryRun = importlib.import_module("yolo_compress.stages._prune_dry_run").dry_run(job, weights)
        return shown


def probe(recipe: Recipe, out: str, store: Store | None = None) -> Path:
    """Write the unpruned model at several widths into the folder `out`. A robot can then time the layers
    (`runtime.measure.layer_times`).

    Raises:
        RecipeError: The folder is not empty, the recipe has no section `prune`, or the baseline is not trained yet.
        StorageError: The folder cannot be written.
    """
    folder = Path(out)
    with storage_errors(folder):
        if folder.exists() and any(folder.iterdir()):
            raise RecipeError(f"out={out}: the folder is not empty")
    with _planning(recipe, store or Store(home.weights())) as (job, weights), storage_errors(folder):
        importlib.import_module("yolo_compress.stages._prune_plan").probe(job, weights, folder)
    return folder


@contextmanager
def _planning(recipe: Recipe, store: Store) -> Iterator[tuple[Any, Path]]:
    """Yield a job of `prune` with temporary folders, and the checkpoint that it would prune.

    The checkpoint is the result of `sparsify` if that is up to date. Else it is the trained baseline, else the file `weights` of
    the baseline in the recipe.

    Raises:
        RecipeError: The recipe does not prune, or its baseline is not trained yet.
    """
    from yolo_compress.stages import Job

    if recipe.prune is None:
        raise RecipeError(f"recipe {recipe.name} has no section `prune:`; `prune: {{}}` takes defaults")
    recipe, dataset = prepare(recipe, store)
    found = next(reversed(current(store, plan(recipe, dataset, "sparsify")).values()), None)
    if found is None and recipe.baseline.weights is None:
        raise RecipeError("prune: the plan needs a trained baseline; run `baseline` first")
    weights = found.file("model.pt") if found else find_weights(str(recipe.baseline.weights))
    with tempfile.TemporaryDirectory() as scratch, memory_errors("prune"):
        yield Job(recipe.prune, recipe, dataset, {}, Path(scratch), Path(scratch)), weights
