"""Artefacts that one store takes from another: whole, linked, and never half there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from yolo_compress.errors import CorruptArtifact
from yolo_compress.store.fingerprint import fingerprint
from yolo_compress.store.manifest import Artifact
from yolo_compress.store.store import Store
from yolo_compress.store.transfer import adopt

KEY = {"stage": "prune", "version": 1}


def made(root: Path) -> Artifact:
    store = Store(root)
    partial = store.partial("prune", fingerprint(KEY))
    (partial / "model.pt").write_bytes(b"weights")
    (partial / "deep").mkdir()
    (partial / "deep" / "x.json").write_text("{}")
    return store.publish("prune", fingerprint(KEY), KEY, {"map50_95": 0.5}, {}, 1.0)


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "copies"])
def test_an_artefact_is_adopted_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:

        def refuse(source: object, target: object) -> None:
            raise OSError(18, "another file system")

        monkeypatch.setattr(os, "link", refuse)
    old, store = made(tmp_path / "a"), Store(tmp_path / "b")
    (store.directory("prune", old.fingerprint).with_suffix(".partial") / "work").mkdir(parents=True)  # of a killed run
    new = adopt(old, store)
    store.verify(new)
    assert store.find("prune", old.fingerprint) == new and new.manifest == old.manifest
    assert new.file("model.pt").samefile(old.file("model.pt")) == links
    assert [path.name for path in store.folder.glob("*-*")] == [new.path.name]


def test_an_artefact_that_is_there_stays(tmp_path: Path) -> None:
    old, own = made(tmp_path / "a"), made(tmp_path / "b")
    assert adopt(old, Store(tmp_path / "b")) == own


def test_a_damaged_artefact_is_not_adopted(tmp_path: Path) -> None:
    old = made(tmp_path / "a")
    old.file("model.pt").write_bytes(b"altered")
    with pytest.raises(CorruptArtifact):
        adopt(old, Store(tmp_path / "b"))
    assert Store(tmp_path / "b").find("prune", old.fingerprint) is None
