"""The state of each stage of a recipe, and the artefacts that recipes use. Nothing runs here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from yolo_compress import home
from yolo_compress.chain import STAGES, Planned, plan, provider
from yolo_compress.errors import CompressError, CorruptArtifact, RecipeError
from yolo_compress.preflight import prepare
from yolo_compress.recipe import folder as recipe_folder
from yolo_compress.recipe.recipe import Recipe
from yolo_compress.store import environment
from yolo_compress.store.fingerprint import explain
from yolo_compress.store.manifest import Artifact
from yolo_compress.store.store import Store


@dataclass(frozen=True)
class Status:
    """State of one stage, as `status` reports it."""

    stage: str
    state: str  # "up to date", "stale", "missing", "interrupted", "blocked" or "left out"
    why: tuple[str, ...] = ()


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
