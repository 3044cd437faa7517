"""Kept detections give the mAP of those they were kept from, and nothing else passes for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.matching_scenes import NAMES, scene
from yolo_compress.errors import CorruptArtifact
from yolo_compress.evaluate.stored_detections import keep, kept
from yolo_compress.runtime.measure.coco_map import mean_ap


def test_map_of_what_is_kept_is_that_of_all(tmp_path: Path) -> None:
    truths, found = scene(1)
    noise = np.random.default_rng(0).uniform(0, 90, (300, 6)).astype(np.float32)
    noise[:, 2:4] += noise[:, :2]
    noise[:, 4], noise[:, 5] = noise[:, 4] / 100, np.repeat([0, 1, 2], 100)
    crowded = [found[0][:0], *(np.concatenate([noise, rows]) for rows in found[1:])]
    keep(tmp_path / "row.npy", crowded)
    back = kept(tmp_path / "row.npy", len(truths))
    assert mean_ap(truths, back, NAMES) == mean_ap(truths, crowded, NAMES)
    assert len(back[0]) == 0 and max(map(len, back)) == 300 < max(map(len, crowded))
    keep(tmp_path / "none.npy", [found[0][:0]] * 2)
    assert [len(rows) for rows in kept(tmp_path / "none.npy", 2)] == [0, 0]


@pytest.mark.fault(64)
def test_another_table_is_refused(tmp_path: Path) -> None:
    keep(tmp_path / "row.npy", [np.ones((1, 6))] * 3)
    with pytest.raises(CorruptArtifact, match="no detections of 2 images"):
        kept(tmp_path / "row.npy", 2)
    np.save(tmp_path / "other.npy", np.zeros((3, 6)))
    with pytest.raises(CorruptArtifact, match="no detections of 3 images"):
        kept(tmp_path / "other.npy", 3)
