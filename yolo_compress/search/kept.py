"""Artefacts of the front and of the chosen engine are in the shared store, with links `weights/STUDY-0007-int8/<stage>`.

The links are what `gc` keeps them for.

When an engine is neither any more, its links are removed, and `gc` deletes the artefacts that nothing else needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from yolo_compress import home
from yolo_compress.files.atomic import storage_errors
from yolo_compress.search.front import Engine, choose, front
from yolo_compress.search.study import Study, Trial
from yolo_compress.store.manifest import Artifact
from yolo_compress.store.store import Store
from yolo_compress.store.transfer import adopt


def keep(study: Study, trial: Trial, engines: Sequence[Engine]) -> list[Engine]:
    """Take the artefacts of a trial's engines that are on the front or chosen now into the shared store, and link them.

    Args:
        study: The study.
        trial: A trial that has just ended.
        engines: Its engines.

    Returns:
        The front with these engines.
    """
    others = [one for one in study.trials() if one.number != trial.number]
    now = front([*study.engines(others), *engines])
    own, shared = Store(trial.folder / "store"), Store(home.weights())
    mine = [one for one in _wanted(study, [*study.engines(others), *engines]) if one["trial"] == trial.number]
    if mine and own.root.is_dir():
        with shared.lock(f"study {study.name}"):
            for engine in mine:
                for artifact in _linked(own, engine["placement"]):
                    shared.link(link_name(study.name, trial.number, engine["placement"]), adopt(artifact, shared))
    return now


def release(study: Study) -> None:
    """Remove the links to engines of ended trials that are neither on the front nor chosen."""
    with study.locked():  # two workers may release at the same time
        trials = study.trials()
        wanted = {
            link_name(study.name, one["trial"], one["placement"])
            for one in _wanted(study, study.engines(trials))
            if one["trial"] is not None
        }
        ended = {one.number for one in trials if one.outcome}
        for folder, number in _link_folders(study.name):
            if number in ended and folder.name not in wanted:
                with storage_errors(folder, "clean"):
                    for link in folder.iterdir():
                        if link.is_symlink():
                            link.unlink()
                    if not any(folder.iterdir()):
                        folder.rmdir()


def _wanted(study: Study, engines: Sequence[Engine]) -> list[Engine]:
    """Return the front, and the chosen engine, which with few images is not always on it."""
    found, best = front(engines), choose(engines, study.goal).engine
    return found if best is None or best in found else [*found, best]


def link_name(study: str, number: int, placement: str) -> str:
    """Return the name of the folder in weights/ with the links to an engine and to the stages before it."""
    return f"{study}-{number:04d}-{placement}"


def _link_folders(study: str) -> Iterator[tuple[Path, int]]:
    """Yield (folder of links, number of the trial)."""
    root = home.weights()
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        match = re.fullmatch(rf"{re.escape(study)}-(\d{{4,}})-.*", folder.name)
        if match and folder.is_dir():
            yield folder, int(match[1])


def _linked(store: Store, placement: str) -> list[Artifact]:
    """Return the artefacts that the recipe of a placement is linked to in the trial's store."""
    folder = store.root / placement
    names = sorted(path.name for path in folder.iterdir() if path.is_symlink()) if folder.is_dir() else []
    return [found for name in names if (found := store.linked(placement, name))]
