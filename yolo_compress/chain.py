"""The stages of the chain, what each of them reads, and which of them are up to date.

The fingerprint of a stage is known before it runs. It covers the stage, its version, its section of the recipe, the fingerprints of
its inputs and the digest of the data. For `engine` and `bench` the fingerprint also covers this machine and its engine libraries.
Fingerprints decide which stages run again. Modification times of files do not matter. A stage that runs again may write other bytes
under the same fingerprint. A manifest therefore also records a hash of the content of each input. If the content of an input has
changed, the artefact is stale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

from yolo_compress.data.dataset import Dataset
from yolo_compress.errors import RecipeError
from yolo_compress.recipe.choices import OWN
from yolo_compress.recipe.recipe import Recipe
from yolo_compress.runtime.files import sha256_file
from yolo_compress.runtime.measure.device import cpu_model
from yolo_compress.store import environment
from yolo_compress.store.fingerprint import fingerprint
from yolo_compress.store.manifest import Artifact
from yolo_compress.store.source_weights import find_weights
from yolo_compress.store.store import Store


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
            whole = recipe.model_dump(mode="json", exclude={"report", "search"})
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
    digests = files(recipe, stage)
    if "weights" in digests:
        return {"weights_sha256": digests["weights"]}
    for knob, digest in digests.items():
        function = {"function": config[knob].rpartition(":")[2]} if knob in OWN else {}
        config[knob] = {"sha256": digest, **function}
    if config.get("images") is not None:
        config["images"] = {"digest": dataset.unlabelled_digest}
    return config


def files(recipe: Recipe, stage: str) -> dict[str, str]:
    """Return knob -> SHA-256 of the file that it names, for the knobs of the stage's section that name a file.

    Raises:
        RecipeError: A file does not exist or cannot be read.
        EnvironmentLacks: A checkpoint is in none of its places.
    """
    section = getattr(recipe, stage)
    named: dict[str, Path] = {}
    for knob in ("weights", "pretrained"):
        if (name := getattr(section, knob, None)) is not None:
            named[knob] = find_weights(name)
    for knob in (*OWN, "latency_table"):
        value = getattr(section, knob, None) or ""
        if file := value.rpartition(":")[0] if knob in OWN else value:  # a user's own criterion is `file.py:function`
            if not Path(file).is_file():
                raise RecipeError(f"{stage}.{knob}: no file {file!r}")
            named[knob] = Path(file)
    return {knob: sha256_file(path) for knob, path in named.items()}


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
        if artifact := published(store, planned, found):
            found[stage] = artifact
    return found


def published(store: Store, planned: Planned, artifacts: Mapping[str, Artifact]) -> Artifact | None:
    """Return the stored artefact of the stage if it was made from the content of `artifacts`, its inputs. Otherwise None."""
    found = store.find(planned.stage, planned.fingerprint)
    return found if found and found.manifest.inputs == contents(planned, artifacts) else None


def contents(planned: Planned, artifacts: Mapping[str, Artifact]) -> dict[str, str]:
    """Return the name of each input -> the content hash of its artefact. The manifest records the same mapping."""
    return {need: artifacts[source].manifest.content for need, source in planned.inputs.items()}
