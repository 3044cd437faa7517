"""The whole chain on one screen: which stage needs which, what is up to date, and what runs.

A fingerprint is known before anything runs: it covers the stage, its version, its section of the recipe, the
fingerprints of its inputs, the digest of the data and, for `engine` and `bench`, this machine and its engine libraries.
So fingerprints decide what is run again, not times of files. One fingerprint can give other bytes when a stage runs again,
so a manifest also records the content of the inputs that were read: an artefact made of other bytes is stale.
"""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from yolo_compress import home, progress
from yolo_compress.choices import OWN
from yolo_compress.data.dataset import Dataset, load, recheck, with_unlabelled
from yolo_compress.errors import CompressError, CorruptArtifact, RecipeError
from yolo_compress.files.atomic import require_free, storage_errors
from yolo_compress.recipe import folder as recipe_folder
from yolo_compress.recipe import sizing
from yolo_compress.recipe.knobs import IMGSZ_STEP
from yolo_compress.recipe.recipe import SHIPPED, Recipe
from yolo_compress.store import environment
from yolo_compress.store.fingerprint import explain, fingerprint
from yolo_compress.store.manifest import BEGUN, WORK, Artifact, sha256_file
from yolo_compress.store.resources import FREE_MIB, memory_errors, needed_mib
from yolo_compress.store.source_weights import find_weights
from yolo_compress.store.store import Store

if TYPE_CHECKING:
    from yolo_compress.stages._prune_plan import DryRun


@dataclass(frozen=True)
class Stage:
    """A row of the chain.

    Attributes:
        needs: Stages whose artefacts are its inputs.
        stand_in: The stage whose artefact takes its place where the recipe leaves it out; None: it cannot be left out.
        version: Goes up when the same config would now give other bytes.
        trains: Every rank of a distributed run takes part.
        models: It writes models, so the disk it takes depends on their size.
        machine: This machine and its engine libraries are part of the fingerprint.
        checked: Its module's `check(recipe, dataset)` runs before any stage does, so that what cannot work costs no training.
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
    "prune": Stage(("sparsify", "baseline"), stand_in="sparsify", version=4, trains=True, checked=True),
    "distill": Stage(("prune", "teacher"), stand_in="prune", version=3, trains=True, checked=True),
    "qat": Stage(("distill",), stand_in="distill", version=5, trains=True, checked=True),
    "export": Stage(("baseline", "distill", "qat"), version=4, checked=True),
    "engine": Stage(("export",), version=2, machine=True, checked=True),
    "bench": Stage(("export", "engine", "baseline", "distill"), version=3, models=False, machine=True),
    "report": Stage(
        ("teacher", "baseline", "sparsify", "prune", "distill", "qat", "export", "engine", "bench"),
        version=5,
        models=False,
    ),
}

SAID = 10  # findings and notes of the data that a run says


class DataKey(TypedDict):
    digest: str  # of all images and labels
    imgsz: list[int]  # [height, width] of the input, px


class MachineKey(TypedDict):
    cpu: str  # name of the processor
    libraries: dict[str, str | None]  # runtime -> installed version


class Key(TypedDict):
    """What decides the result of a stage; its hash is the fingerprint."""

    stage: str
    version: int  # of the stage
    config: dict[str, object]  # see `_config`
    inputs: dict[str, str]  # need -> fingerprint
    data: DataKey
    seed: int
    machine: NotRequired[MachineKey]  # absent where this machine decides nothing
    recipe: NotRequired[dict[str, object]]  # of `report` alone, which shows it


@dataclass(frozen=True)
class Planned:
    """A stage of a recipe with everything that decides its result."""

    stage: str
    key: Key
    inputs: dict[str, str]  # need -> the stage that provides it in this recipe

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.key)


@dataclass(frozen=True)
class Status:
    """What `status` says of one stage."""

    stage: str
    state: str  # "up to date", "stale", "missing", "interrupted", "blocked" or "left out"
    why: tuple[str, ...] = ()


def provider(recipe: Recipe, stage: str) -> str:
    """The stage whose artefact serves as `stage` in this recipe.

    Raises:
        RecipeError: The recipe leaves out a stage that nothing stands in for.
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
    """What `target` takes, in the order of work."""
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
        if row.machine or _measures_here(recipe, stage):
            key["machine"] = {
                "cpu": environment.cpu_name(),
                "libraries": {
                    name: environment.version(package) for name, package in environment.ENGINE_PACKAGES.items()
                },
            }
        if stage == "report":  # it shows the recipe; its own section is the config
            key["recipe"] = recipe.model_dump(mode="json", exclude={"report"})
        planned[stage] = Planned(stage, key, inputs)

    visit(provider(recipe, target))
    return planned


def _measures_here(recipe: Recipe, stage: str) -> bool:
    """Whether the speed of this machine decides what the stage makes: widths, or groups in float."""
    prune, qat = recipe.prune, recipe.qat
    if stage == "prune" and prune:
        return prune.latency_ms is not None and prune.latency_table is None
    return bool(stage == "qat" and qat and qat.sensitivity != "off" and qat.sensitivity_price != "gflops")


def _config(recipe: Recipe, stage: str, dataset: Dataset) -> dict[str, object]:
    """The section as it counts: given files by their bytes, and with given weights nothing of how one would train."""
    config = getattr(recipe, stage).model_dump(mode="json")
    if config.get("weights") is not None:
        return {"weights_sha256": sha256_file(find_weights(config["weights"]))}
    if config.get("pretrained") is not None:
        config["pretrained"] = {"sha256": sha256_file(find_weights(config["pretrained"]))}
    for knob in OWN:
        file, _, function = str(config.get(knob, "")).rpartition(":")
        if file:  # a user's own, `file.py:function`
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
    """The recipe with a number for each `auto`, and its data set after the preflight; images left out are printed."""
    dataset = _load_dataset(recipe, store)
    return sizing.resolve(recipe, len(dataset.train), len(dataset.names)), dataset


def _load_dataset(recipe: Recipe, store: Store) -> Dataset:
    data = recipe.data
    cache = store.root / ".cache" / "data.json"
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
    if dataset.skipped:
        progress.say(f"data: {len(dataset.skipped)} findings, these images are left out of every model:")
        for finding in dataset.skipped[:SAID]:
            progress.say(f"  {finding}")
    for note in dataset.notes[:SAID]:
        progress.say(f"data: {note}")
    if len(dataset.notes) > SAID:
        progress.say(f"data: {len(dataset.notes) - SAID} more notes; `yolo-compress check` shows all")
    return dataset


def run(recipe: Recipe, target: str, *, store: Store | None = None, wait: bool = True, again: bool = False) -> Artifact:
    """Bring `target` up to date and return its artefact; what is published already is reused.

    Args:
        recipe: As `recipe.load` gives it.
        target: A key of `STAGES`: "baseline", "prune", "export", "report", ...
        store: Where artefacts are; `home.weights()` by default, which is `weights/` of the working directory.
        wait: Wait for another run that holds the store; False raises `Locked`.
        again: Do `target` once more although it is up to date; the artefact that is there stays until the new one is
            published. Where it comes out otherwise, as a measurement does, what was made of it before is stale.

    Returns:
        The published artefact. A report whose gate failed is one too: `metrics["gate"]["passed"]` says so.

    Raises:
        CompressError: Whatever a user can mend: data, weights, disk, a package that is missing, NaN; its `exit_code` is the
            command line's.
        RuntimeFailure: An engine that cannot be built or run.
    """
    store = store or Store(home.weights())
    with store.lock(f"{target} of recipe {recipe.name}", wait) if _rank() == 0 else nullcontext():
        return _run(recipe, target, store, again)


def current(store: Store, chain: Mapping[str, Planned], but: str | None = None) -> dict[str, Artifact]:
    """The artefacts of the stages that are up to date: made of the bytes that their inputs, up to date too, now have.

    Args:
        store: Where artefacts are.
        chain: As `plan` gives it.
        but: A stage that is not looked at.

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
    """What a manifest records of the inputs."""
    return {need: artifacts[source].manifest.content for need, source in planned.inputs.items()}


def _run(recipe: Recipe, target: str, store: Store, again: bool) -> Artifact:
    asked, (recipe, dataset) = recipe, prepare(recipe, store)
    if text := sizing.said(asked, recipe):
        progress.say(text)
    artifacts: dict[str, Artifact] = {}
    last = provider(recipe, target)
    chain = plan(recipe, dataset, target)
    forced = last if again else None
    done = current(store, chain, but=forced)
    check(recipe, dataset, [stage for stage in chain if stage not in done])
    name = _label(recipe, store)
    for stage in chain:
        store.check_name(name, stage)
    if _rank() == 0:
        recipe_folder.claim(store.root, recipe)
    for stage, planned in chain.items():
        found = None if stage == forced else _published(store, planned, artifacts)
        if found:
            progress.say(f"{stage}: up to date")
        artifacts[stage] = found or _execute(recipe, planned, dataset, artifacts, store, name)
        if _rank() == 0:
            store.link(name, artifacts[stage])
    return artifacts[last]


def _label(recipe: Recipe, store: Store) -> str:
    """See `recipe_folder.label`; says where it is not the recipe's name."""
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
    """The artefact of the stage, if it was made of these inputs."""
    found = store.find(planned.stage, planned.fingerprint)
    return found if found and found.manifest.inputs == _contents(planned, artifacts) else None


def check(recipe: Recipe, dataset: Dataset, stages: Iterable[str] = tuple(STAGES)) -> None:
    """Refuse what one of these stages of the recipe would refuse, as far as it can be known before any of them runs.

    Raises:
        CompressError: See `check` of the modules of `stages`.
    """
    stages = list(stages)
    _check_batches(recipe, dataset, stages)
    for stage in stages:
        if STAGES[stage].checked and getattr(recipe, stage) is not None:
            importlib.import_module(f"yolo_compress.stages.{stage}").check(recipe, dataset)


def _check_batches(recipe: Recipe, dataset: Dataset, stages: Iterable[str]) -> None:
    """Refuse a last batch of one image where the deepest layer sees one pixel of it: BatchNorm has no variance then.

    Raises:
        RecipeError: See above.
    """
    if max(recipe.data.imgsz_hw) > IMGSZ_STEP:
        return
    for stage in stages:
        config = getattr(recipe, stage)
        if config is None or not STAGES[stage].trains or not getattr(config, "epochs", 0):
            continue
        if stage in ("baseline", "teacher") and config.weights is not None:
            continue
        images = _training_images(config, dataset)
        batch = min(int(config.batch), images)
        if batch == 1 or images % batch == 1:
            raise RecipeError(
                f"{stage}.batch={config.batch}: {images} training images leave one alone in the last batch, and at "
                f"data.imgsz={IMGSZ_STEP} the deepest layer sees one pixel of it, which BatchNorm cannot train on; set another "
                f"{stage}.batch, or a larger data.imgsz"
            )


def _training_images(config: Any, dataset: Dataset) -> int:
    """How many images a section trains on: those of the data set, or what `distill` takes instead."""
    if getattr(config, "images", None) is not None:
        return len(dataset.unlabelled)
    return getattr(config, "data_free", None) or len(dataset.train)


def _execute(
    recipe: Recipe, planned: Planned, dataset: Dataset, artifacts: Mapping[str, Artifact], store: Store, name: str
) -> Artifact:
    from yolo_compress.stages import Job  # torch-free, but only needed when something runs

    stage = planned.stage
    before = None
    with suppress(CorruptArtifact):  # one that is damaged is done again for that
        before = store.find(stage, planned.fingerprint)
    if _rank() != 0 and not STAGES[stage].trains:
        return _await(store, planned, artifacts, before)
    inputs = {need: artifacts[source] for need, source in planned.inputs.items()}
    for artifact in inputs.values():
        store.verify(artifact)
    contents = _contents(planned, artifacts)
    partial = store.partial(stage, planned.fingerprint, contents if _rank() == 0 else None)
    needed = needed_mib(getattr(recipe, stage), inputs.values()) if STAGES[stage].models else FREE_MIB
    require_free(store.root, needed, f"stage {stage}")
    progress.say(f"{stage}: running")
    started = time.monotonic()
    with _output(partial) as out, memory_errors(stage):
        job = Job(getattr(recipe, stage), recipe, dataset, inputs, out, partial / WORK)
        metrics = importlib.import_module(f"yolo_compress.stages.{stage}").run(job)
    if _rank() != 0:
        return _await(store, planned, artifacts, before)
    recheck(dataset)
    seconds = time.monotonic() - started
    artifact = store.publish(
        stage, planned.fingerprint, planned.key, metrics, environment.describe(), seconds, contents, name
    )
    progress.say(f"{stage}: done in {seconds:.0f} s -> {artifact.path}")
    return artifact


class _output:
    """The folder a stage writes into: emptied but for `work` on rank 0, a scratch folder on the other ranks."""

    def __init__(self, partial: Path) -> None:
        self.partial = partial
        self.scratch: Path | None = None

    def __enter__(self) -> Path:
        (self.partial / WORK).mkdir(exist_ok=True)
        if _rank() != 0:
            self.scratch = Path(tempfile.mkdtemp())
            return self.scratch
        for entry in self.partial.iterdir():
            if entry.name not in (WORK, BEGUN):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        return self.partial

    def __exit__(self, *error: object) -> None:
        if self.scratch:
            shutil.rmtree(self.scratch, ignore_errors=True)


def _rank() -> int:
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


def _await(store: Store, planned: Planned, artifacts: Mapping[str, Artifact], before: Artifact | None) -> Artifact:
    """Other ranks wait for rank 0 to publish another than `before`; torchrun ends them when rank 0 fails."""
    while not (found := _published(store, planned, artifacts)) or found == before:
        time.sleep(0.5)
    return found


def report_over(
    recipe: Recipe, files: list[Path], out: Path, *, store: Store | None = None, wait: bool = True
) -> dict[str, Any]:
    """Bring the report up to date and write another one into `out`, with the rows of other machines beside ours.

    Args:
        recipe: As `recipe.load` gives it.
        files: `device.json` of robots, `report.json` of other recipes.
        out: Folder outside the store, made if need be; reports in it are overwritten. The published report stays as it is.

    Returns:
        `verdict`, `gate` and `table`, as the metrics of the stage.

    Raises:
        CompressError: See `report.device_files.read`, before any stage runs; `report.devices.add` and `run`.
    """
    from yolo_compress.report import device_files
    from yolo_compress.stages import Job, report

    store = store or Store(home.weights())
    store.check_outside(out, "out")
    device_files.read(files)  # before any training
    with store.lock(f"report of recipe {recipe.name}", wait):
        published = _run(recipe, "report", store, again=False)
        recipe, dataset = prepare(recipe, store)
        planned = plan(recipe, dataset, "report")
        artifacts = current(store, planned)
        inputs = {need: artifacts[source] for need, source in planned["report"].inputs.items()}
        for artifact in (published, *inputs.values()):
            store.verify(artifact)
        return dict(report.add(Job(recipe.report, recipe, dataset, inputs, out, out), published, files))


def dry_run(recipe: Recipe, store: Store | None = None) -> DryRun:
    """What `prune` would do.

    Raises:
        RecipeError: See `_planning`.
    """
    with _planning(recipe, store or Store(home.weights())) as (job, weights):
        shown: DryRun = importlib.import_module("yolo_compress.stages._prune_plan").dry_run(job, weights)
        return shown


def probe(recipe: Recipe, out: str, store: Store | None = None) -> Path:
    """Write the dense net at several widths, whose layers a robot times (`runtime.layers`), into the folder `out`.

    Raises:
        RecipeError: See `_planning`; or the folder is not empty.
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
    """A job of `prune` that publishes nothing, and the checkpoint it would cut, as far as there is one.

    That is the sparse net if it is up to date, else the baseline, else the weights that the baseline is given.

    Raises:
        RecipeError: The recipe does not prune, or its baseline is trained from scratch and was not yet.
    """
    from yolo_compress.stages import Job

    if recipe.prune is None:
        raise RecipeError(f"recipe {recipe.name} has no section `prune:`; `prune: {{}}` takes defaults")
    recipe, dataset = prepare(recipe, store)
    found = next(reversed(current(store, plan(recipe, dataset, "sparsify")).values()), None)
    if found is None and recipe.baseline.weights is None:
        raise RecipeError(
            "prune: there is nothing to plan on yet: the baseline has to be trained; run `baseline` first"
        )
    weights = found.file("model.pt") if found else find_weights(str(recipe.baseline.weights))
    with tempfile.TemporaryDirectory() as scratch, memory_errors("prune"):
        yield Job(recipe.prune, recipe, dataset, {}, Path(scratch), Path(scratch)), weights


def status(recipe: Recipe, store: Store | None = None) -> Iterator[Status]:
    """State of every stage, with the fields that make it stale; runs nothing and imports no torch."""
    store = store or Store(home.weights())
    recipe, dataset = prepare(recipe, store)
    done: dict[str, Artifact] = {}
    name = recipe_folder.label(store.root, recipe)
    for stage in STAGES:
        if getattr(recipe, stage) is None:
            try:
                yield Status(stage, "left out", (f"{provider(recipe, stage)} takes its place",))
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
        why = _made_of_others(planned, found, done) if found else ()
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


def _made_of_others(planned: Planned, artifact: Artifact, done: Mapping[str, Artifact]) -> tuple[str, ...]:
    """Inputs that are not, or may not be, those that the artefact was made of."""
    lines = []
    for need, source in planned.inputs.items():
        before = artifact.manifest.inputs.get(need)
        if source not in done:
            lines.append(f"{source} has to run first; this stage runs again unless {source} comes out the same")
        elif before != (now := done[source].manifest.content):
            lines.append(f"content of {source}: {before[:6] if before else 'not recorded'} -> {now[:6]}")
    return tuple(dict.fromkeys(lines))


def _drift(artifact: Artifact) -> tuple[str, ...]:
    """Library versions that differ from those that made the artefact; they do not make it stale."""
    made = artifact.manifest.environment.get("packages", {})
    now = environment.describe()["packages"]
    return tuple(f"made with {name} {made[name]}, now {now.get(name)}" for name in made if now.get(name) != made[name])


def referred(store: Store, recipe: Recipe | None = None) -> set[str]:
    """Fingerprints that `gc` keeps: what friendly names lead to and what `recipe` plans, with everything they were made from.

    An artefact whose manifest is damaged leads nowhere.

    Raises:
        CompressError: The recipe cannot be planned, as when its data or weights are not there.
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
    """The artefacts that have a friendly name, with their stage."""
    for name in store.recipes():
        for stage in STAGES:
            with suppress(CorruptArtifact):
                if artifact := store.linked(name, stage):
                    yield stage, artifact
