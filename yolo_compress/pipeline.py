"""Run the stages of a recipe in order, and skip stages that are up to date.

The fingerprint of a stage is known before it runs. It covers the stage, its version, its section of the recipe, the fingerprints of
its inputs and the digest of the data. For `engine` and `bench` the fingerprint also covers this machine and its engine libraries.
Fingerprints decide which stages run again. Modification times of files do not matter. A stage that runs again may write other bytes
under the same fingerprint. A manifest therefore also records a hash of the content of each input. If the content of an input has
changed, the artefact is stale.
"""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from yolo_compress import home, progress, ranks
from yolo_compress.data.dataset import Dataset, load, recheck, with_held_back, with_unlabelled
from yolo_compress.errors import CompressError, CorruptArtifact, RecipeError
from yolo_compress.files.atomic import require_free, storage_errors
from yolo_compress.recipe import auto_values
from yolo_compress.recipe import folder as recipe_folder
from yolo_compress.recipe.choices import OWN
from yolo_compress.recipe.controls import REPEATED
from yolo_compress.recipe.knob_types import IMGSZ_STEP
from yolo_compress.recipe.recipe import SHIPPED, Recipe
from yolo_compress.runtime.files import sha256_file
from yolo_compress.runtime.measure.device import cpu_model
from yolo_compress.store import environment
from yolo_compress.store.fingerprint import explain, fingerprint
from yolo_compress.store.manifest import BEGUN, WORK, Artifact
from yolo_compress.store.resources import FREE_MIB, data_workers, memory_errors, needed_mib
from yolo_compress.store.source_weights import find_weights
from yolo_compress.store.store import Store

if TYPE_CHECKING:
    from yolo_compress.stages._prune_dry_run import DryRun


@dataclass(frozen=True)
class Stage:
    """Properties of a stage, such as `prune`. They are equal for all recipes.

    Attributes:
        needs: Stages whose artefacts are its inputs.
        stand_in: If the recipe leaves this stage out, the artefact of the stage `stand_in` is used. None: this stage cannot be left
            out.
        version: Number to increase when a change of the code changes the result of the stage.
        trains: Whether the stage may train. The other ranks of a distributed run only take part in training.
        models: Whether the stage writes models. The disk space that it needs then depends on their size.
        machine: Whether this machine and its engine libraries are part of the fingerprint.
        checked: Whether the stage's module has a function `check(recipe, dataset)`. It runs before all stages, to find errors early.
    """

    needs: tuple[str, ...] = ()
    stand_in: str | None = None
    version: int = 1
    trains: bool = False
    models: bool = True
    machine: bool = False
    checked: bool = False


STAGES: dict[str, Stage] = {
    "baseline": Stage(version=2, trains=True, checked=True),
    "teacher": Stage(stand_in="baseline", version=2, trains=True, checked=True),
    "sparsify": Stage(("baseline",), stand_in="baseline", version=2, trains=True),
    "prune": Stage(("sparsify", "baseline"), stand_in="sparsify", version=5, trains=True, checked=True),
    "distill": Stage(("prune", "teacher"), stand_in="prune", version=4, trains=True, checked=True),
    "qat": Stage(("distill",), stand_in="distill", version=6, trains=True, checked=True),
    "export": Stage(("baseline", "distill", "qat"), version=4, checked=True),
    "engine": Stage(("export",), version=3, machine=True, checked=True),
    "bench": Stage(("export", "engine", "baseline", "distill"), version=3, models=False, machine=True),
    "control": Stage(
        ("baseline", "teacher", "sparsify", "prune", "distill"), stand_in="baseline", trains=True, checked=True
    ),
    "report": Stage(
        ("teacher", "baseline", "sparsify", "prune", "distill", "qat", "export", "engine", "bench", "control"),
        version=6,
        models=False,
    ),
}

SHOWN = 10  # number of findings and notes on the data that a run prints


class DataKey(TypedDict):
    digest: str  # of all images and labels
    imgsz: list[int]  # [height, width] of the input, px
    hold_back: NotRequired[float]  # absent if no image is held back


class MachineKey(TypedDict):
    cpu: str  # name of the processor
    libraries: dict[str, str | None]  # runtime -> installed version
    device: NotRequired[str]  # `run.device` of `bench`, if it is a GPU


class Key(TypedDict):
    """Everything that decides the result of a stage. The hash of this mapping is the stage's fingerprint."""

    stage: str
    version: int  # version of the stage
    config: dict[str, object]  # see `_config`
    inputs: dict[str, str]  # need -> fingerprint
    data: DataKey
    seed: int
    machine: NotRequired[MachineKey]  # absent if the result does not depend on this machine
    recipe: NotRequired[dict[str, object]]  # only for `report`, which shows the recipe


@dataclass(frozen=True)
class Planned:
    """A stage of one recipe, with its fingerprint and everything that the fingerprint covers."""

    stage: str
    key: Key
    inputs: dict[str, str]  # need -> stage that provides it in this recipe

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.key)


@dataclass(frozen=True)
class Status:
    """State of one stage, as `status` reports it."""

    stage: str
    state: str  # "up to date", "stale", "missing", "interrupted", "blocked" or "left out"
    why: tuple[str, ...] = ()


def provider(recipe: Recipe, stage: str) -> str:
    """Return the name of the stage whose artefact is used for `stage` in this recipe: `stage` itself or its stand-in.

    Raises:
        RecipeError: The recipe leaves out a stage that has no stand-in.
    """
    while getattr(recipe, stage) is None:
        stand_in = STAGES[stage].stand_in
        if stand_in is None:
            raise RecipeError(
                f"recipe {recipe.name} has no section `{stage}:`, which this needs; `{stage}: {{}}` takes defaults"
            )
        stage = stand_in
    return stage


def plan(recipe: Recipe, dataset: Dataset, target: str) -> dict[str, Planned]:
    """Return `target` and all stages that it needs, by name, in the order of the run. Nothing runs here."""
    planned: dict[str, Planned] = {}

    def visit(stage: str) -> None:
        if stage in planned:
            return
        row = STAGES[stage]
        inputs = {need: provider(recipe, need) for need in row.needs}
        for source in inputs.values():
            visit(source)
        key: Key = {
            "stage": stage,
            "version": row.version,
            "config": _config(recipe, stage, dataset),
            "inputs": {need: planned[source].fingerprint for need, source in inputs.items()},
            "data": {"digest": dataset.digest, "imgsz": list(recipe.data.imgsz_hw)},
            "seed": recipe.run.seed,
        }
        if recipe.data.hold_back:
            key["data"]["hold_back"] = recipe.data.hold_back
        if row.machine or _measures_here(recipe, stage):
            key["machine"] = {
                "cpu": cpu_model(),
                "libraries": {
                    name: environment.version(package) for name, package in environment.ENGINE_PACKAGES.items()
                },
            }
            if stage == "bench" and recipe.run.device != "cpu":  # its rows of torch are measured on `run.device`
                key["machine"]["device"] = recipe.run.device
        if stage == "report":  # the report shows the whole recipe; the section `report` is in `config` already
            whole = recipe.model_dump(mode="json", exclude={"report"})
            whole["run"]["workers"] = recipe.run.workers or 0  # null has the fingerprint of 0, the default before
            key["recipe"] = whole
        planned[stage] = Planned(stage, key, inputs)

    visit(provider(recipe, target))
    return planned


def _measures_here(recipe: Recipe, stage: str) -> bool:
    """Return whether latencies timed on this machine decide the result of the stage.

    They may decide the widths of `prune`, or the groups that `qat` keeps in float.
    """
    prune, qat = recipe.prune, recipe.qat
    if stage == "prune" and prune:
        return prune.latency_ms is not None and prune.latency_table is None
    return bool(stage == "qat" and qat and qat.sensitivity != "off" and qat.sensitivity_price != "gflops")


def _config(recipe: Recipe, stage: str, dataset: Dataset) -> dict[str, object]:
    """Return the stage's section of the recipe, as the fingerprint covers it.

    File names are replaced by the SHA-256 of the files. If `weights` is given, the training knobs have no effect and are dropped.
    """
    config = getattr(recipe, stage).model_dump(mode="json")
    if config.get("weights") is not None:
        return {"weights_sha256": sha256_file(find_weights(config["weights"]))}
    if config.get("pretrained") is not None:
        config["pretrained"] = {"sha256": sha256_file(find_weights(config["pretrained"]))}
    for knob in OWN:
        file, _, function = str(config.get(knob, "")).rpartition(":")
        if file:  # a user's own criterion, `file.py:function`
            if not Path(file).is_file():
                raise RecipeError(f"{stage}.{knob}: no file {file!r}")
            config[knob] = {"sha256": sha256_file(Path(file)), "function": function}
    if (table := config.get("latency_table")) is not None:
        if not Path(table).is_file():
            raise RecipeError(f"{stage}.latency_table: no file {table!r}")
        config["latency_table"] = {"sha256": sha256_file(Path(table))}
    if config.get("images") is not None:
        config["images"] = {"digest": dataset.unlabelled_digest}
    return config


def prepare(recipe: Recipe, store: Store) -> tuple[Recipe, Dataset]:
    """Replace each `auto` in the recipe by a number, and check all images and labels. Print which images are left out.

    Returns:
        The recipe without `auto`, and the dataset of the images that passed.
    """
    dataset = _load_dataset(recipe, store)
    return auto_values.resolve(recipe, len(dataset.train), len(dataset.names)), dataset


def _load_dataset(recipe: Recipe, store: Store) -> Dataset:
    data = recipe.data
    cache = store.root / ".cache" / "data"
    dataset = load(
        data.yaml,
        limit_train=data.limit_train,
        limit_val=data.limit_val,
        max_unlabelled=data.max_unlabelled,
        max_det=data.max_det,
        on_bad=data.on_bad,
        allow_overlap=data.allow_overlap,
        cache=cache,
    )
    if recipe.distill and recipe.distill.images is not None:
        dataset = with_unlabelled(
            dataset, recipe.distill.images, on_bad=data.on_bad, allow_overlap=data.allow_overlap, cache=cache
        )
    if data.hold_back:
        dataset = with_held_back(dataset, data.hold_back)
        progress.say(f"data: {len(dataset.held)} training images are held back")
    if dataset.skipped:
        progress.say(f"data: {len(dataset.skipped)} findings, these images are left out of every model:")
        for finding in dataset.skipped[:SHOWN]:
            progress.say(f"  {finding}")
    for note in dataset.notes[:SHOWN]:
        progress.say(f"data: {note}")
    if len(dataset.notes) > SHOWN:
        progress.say(f"data: {len(dataset.notes) - SHOWN} more notes; `yolo-compress check` shows all")
    return dataset


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


def current(store: Store, chain: Mapping[str, Planned], but: str | None = None) -> dict[str, Artifact]:
    """Return the artefacts of the stages that are up to date.

    A stage is up to date if all its inputs are up to date, and if its artefact was made from their present content.

    Args:
        store: Store of the artefacts.
        chain: Stages of the recipe, from `plan`.
        but: Name of a stage that counts as not up to date. None: no such stage.

    Raises:
        CorruptArtifact: A manifest is damaged.
    """
    found: dict[str, Artifact] = {}
    for stage, planned in chain.items():
        if stage == but or not found.keys() >= set(planned.inputs.values()):
            continue
        if artifact := _published(store, planned, found):
            found[stage] = artifact
    return found


def _contents(planned: Planned, artifacts: Mapping[str, Artifact]) -> dict[str, str]:
    """Return the name of each input -> the content hash of its artefact. The manifest records the same mapping."""
    return {need: artifacts[source].manifest.content for need, source in planned.inputs.items()}


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
    _check_processes(recipe, [stage for stage in chain if stage not in done])
    check(recipe, dataset, [stage for stage in chain if stage not in done])
    name = _label(recipe, store)
    for stage in chain:
        store.check_name(name, stage)
    recipe_folder.claim(store.root, recipe)
    for stage, planned in chain.items():
        found = None if stage == forced else _published(store, planned, artifacts)
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


def _published(store: Store, planned: Planned, artifacts: Mapping[str, Artifact]) -> Artifact | None:
    """Return the stored artefact of the stage if it was made from the content of `artifacts`, its inputs. Otherwise None."""
    found = store.find(planned.stage, planned.fingerprint)
    return found if found and found.manifest.inputs == _contents(planned, artifacts) else None


def check(recipe: Recipe, dataset: Dataset, stages: Iterable[str] = tuple(STAGES)) -> None:
    """Run the checks of the given stages, which find errors in recipe, data and machine before any stage runs.

    Raises:
        CompressError: A check found an error. The function `check` of each module in `stages` lists its causes.
    """
    stages = list(stages)
    _check_batches(recipe, dataset, stages)
    for stage in stages:
        if STAGES[stage].checked and getattr(recipe, stage) is not None:
            importlib.import_module(f"yolo_compress.stages.{stage}").check(recipe, dataset)


def _check_processes(recipe: Recipe, stages: Iterable[str]) -> None:
    """Check that the GPUs exist, one process for each, that each batch can be divided among them, and that data workers have room.

    Raises:
        RecipeError: A stage would train on several GPUs in one process, or its batch cannot be divided.
        EnvironmentLacks: A GPU does not exist, or `resources.data_workers` finds too little room.
    """
    stages = list(stages)
    trainings = _trainings(recipe, stages)
    if trainings and not ranks.several() and len(ranks.devices(recipe.run.device)) > 1:
        raise RecipeError(
            f"run.device={recipe.run.device}: {trainings[0]} trains on several GPUs only as a command of its own: "
            f"`yolo-compress {trainings[0]}` first, or one GPU"
        )
    if recipe.run.device != "cpu" and any(STAGES[stage].trains or stage == "bench" for stage in stages):
        import torch  # here, because `status` needs no torch

        ranks.check_devices(recipe.run.device, torch.cuda.device_count())
    for stage in trainings:
        batch = int(getattr(recipe, stage).batch)
        ranks.check_batch(f"{stage}.batch", batch)
        data_workers(recipe.run.device, recipe.run.workers, batch // ranks.world(), max(recipe.data.imgsz_hw))


def _trainings(recipe: Recipe, stages: Iterable[str]) -> list[str]:
    """Return the sections that the given stages train with: `epochs` is above 0 and no `weights` are given."""
    named = dict.fromkeys(name for stage in stages for name in (REPEATED if stage == "control" else (stage,)))
    sections = {name: getattr(recipe, name) for name in named if STAGES[name].trains}
    return [
        name
        for name, section in sections.items()
        if section and section.epochs and not getattr(section, "weights", None)
    ]


def _check_batches(recipe: Recipe, dataset: Dataset, stages: Iterable[str]) -> None:
    """Check that BatchNorm always has a variance to compute: more than one value per channel.

    If the deepest feature map has one pixel, a last batch of one image has only one value per channel.

    Raises:
        RecipeError: A stage has such a batch.
    """
    if max(recipe.data.imgsz_hw) > IMGSZ_STEP:
        return
    for stage in _trainings(recipe, stages):
        config = getattr(recipe, stage)
        images = -(-_training_images(config, dataset) // ranks.world())
        batch = min(int(config.batch) // ranks.world(), images)
        if batch == 1 or images % batch == 1:
            raise RecipeError(
                f"{stage}.batch={config.batch}: {images} training images leave one alone in the last batch, and at "
                f"data.imgsz={IMGSZ_STEP} the deepest layer sees one pixel of it, which BatchNorm cannot train on; set another "
                f"{stage}.batch, or a larger data.imgsz"
            )


def _training_images(config: Any, dataset: Dataset) -> int:
    """Return the number of images that a stage trains on: images of the dataset, or unlabelled images of `distill`."""
    if getattr(config, "images", None) is not None:
        return len(dataset.unlabelled)
    return getattr(config, "data_free", None) or len(dataset.train)


def _execute(
    recipe: Recipe, planned: Planned, dataset: Dataset, artifacts: Mapping[str, Artifact], store: Store, name: str
) -> Artifact:
    from yolo_compress.stages import Job  # imported here because only a running stage needs it

    stage = planned.stage
    inputs = {need: artifacts[source] for need, source in planned.inputs.items()}
    for artifact in inputs.values():
        store.verify(artifact)
    contents = _contents(planned, artifacts)
    partial = store.partial(stage, planned.fingerprint, contents)
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
        stage, planned.fingerprint, planned.key, metrics, environment.describe(), seconds, contents, name
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


def status(recipe: Recipe, store: Store | None = None) -> Iterator[Status]:
    """Yield the state of every stage, with the differences that make it stale. No stage runs and torch is not imported."""
    store = store or Store(home.weights())
    recipe, dataset = prepare(recipe, store)
    done: dict[str, Artifact] = {}
    name = recipe_folder.label(store.root, recipe)
    for stage in STAGES:
        if getattr(recipe, stage) is None:
            try:
                yield Status(stage, "left out", (f"{provider(recipe, stage)} is used instead",))
            except RecipeError:
                yield Status(stage, "left out")
            continue
        try:
            planned = plan(recipe, dataset, stage)[stage]
            found = store.find(stage, planned.fingerprint)
            linked = store.linked(name, stage)
            partial = store.directory(stage, planned.fingerprint).with_suffix(".partial")
        except CompressError as error:
            yield Status(stage, "blocked", (str(error),))
            continue
        why = _changed_inputs(planned, found, done) if found else ()
        if found and not why:
            done[stage] = found
            drift = _drift(found) if STAGES[stage].trains else ()
            again = ("force=true was interrupted; force=true again continues it",) if partial.is_dir() else ()
            yield Status(stage, "up to date", drift + again)
        elif partial.is_dir():
            yield Status(stage, "interrupted", ("continues where it stopped",))
        elif why:
            yield Status(stage, "stale", why)
        elif linked:
            yield Status(stage, "stale", tuple(explain(planned.key, linked.manifest.key)))
        else:
            yield Status(stage, "missing")


def _changed_inputs(planned: Planned, artifact: Artifact, done: Mapping[str, Artifact]) -> tuple[str, ...]:
    """Return one line of text for each input that has changed, or may have changed, since `artifact` was made."""
    lines = []
    for need, source in planned.inputs.items():
        before = artifact.manifest.inputs.get(need)
        if source not in done:
            lines.append(f"{source} has to run first; this stage runs again unless {source} gives the same bytes")
        elif before != (now := done[source].manifest.content):
            lines.append(f"content of {source}: {before[:6] if before else 'not recorded'} -> {now[:6]}")
    return tuple(dict.fromkeys(lines))


def _drift(artifact: Artifact) -> tuple[str, ...]:
    """Return one line for each library whose version has changed since the artefact was made. This does not make it stale."""
    made = artifact.manifest.environment.get("packages", {})
    now = environment.describe()["packages"]
    return tuple(f"made with {name} {made[name]}, now {now.get(name)}" for name in made if now.get(name) != made[name])


def referred(store: Store, recipe: Recipe | None = None) -> set[str]:
    """Return the fingerprints of the artefacts that `gc` must not remove.

    These are the artefacts that a link `<recipe>/<stage>` points to, the artefacts of `recipe`, and all their inputs. The inputs
    of an artefact with a damaged manifest are unknown.

    Raises:
        CompressError: The recipe cannot be planned, for example because its data or weights are missing.
    """
    known: set[str] = set()
    waiting = [(stage, artifact.fingerprint) for stage, artifact in _named(store)]
    if recipe is not None:
        recipe, dataset = prepare(recipe, store)
        for stage in STAGES:
            if getattr(recipe, stage) is not None:
                waiting += [(one.stage, one.fingerprint) for one in plan(recipe, dataset, stage).values()]
    while waiting:
        stage, fingerprint = waiting.pop()
        if fingerprint not in known:
            known.add(fingerprint)
            with suppress(CorruptArtifact):
                if found := store.find(stage, fingerprint):
                    parents = found.manifest.key.get("inputs", {}).values()
                    waiting += [(one, parent) for parent in parents for one in STAGES]
    return known


def _named(store: Store) -> Iterator[tuple[str, Artifact]]:
    """Yield (stage, artefact) for every artefact that a link `<recipe>/<stage>` points to."""
    for name in store.recipes():
        for stage in STAGES:
            with suppress(CorruptArtifact):
                if artifact := store.linked(name, stage):
                    yield stage, artifact
