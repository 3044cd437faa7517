"""The embedded data set: same seed same bytes, splits share no digit, boxes are tight, and it passes our preflight."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("sklearn")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits_generator", ROOT / "datasets/digits.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.*"))}


def test_same_seed_same_bytes(digits: ModuleType, tmp_path: Path) -> None:
    digits.draw(tmp_path / "a", 3, 2, 64, seed=5)
    digits.draw(tmp_path / "b", 3, 2, 64, seed=5)
    digits.draw(tmp_path / "c", 3, 2, 64, seed=6)
    a, b, c = (content(tmp_path / name) for name in "abc")
    assert a == b and len(a) == 2 * (3 + 2) + 1
    assert a.keys() == c.keys() and all(a[name] != c[name] for name in a)


def test_more_scenes_do_not_change_the_first(digits: ModuleType, tmp_path: Path) -> None:
    digits.draw(tmp_path / "a", 2, 1, 64)
    digits.draw(tmp_path / "b", 3, 2, 64)
    a, b = content(tmp_path / "a"), content(tmp_path / "b")
    assert all(b[name] == a[name] for name in a if name != "digits.json")


def test_complete_folder_is_kept_and_damage_is_mended(digits: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out"
    digits.draw(out, 2, 1, 64)
    whole, inode = content(out), out.stat().st_ino
    digits.draw(out, 2, 1, 64)
    assert out.stat().st_ino == inode
    (out / "labels/train/00001.txt").write_text("")
    digits.draw(out, 2, 1, 64)
    assert content(out) == whole and not out.with_name("out.partial").exists()


def test_leftover_of_a_killed_draw_is_replaced(digits: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "out.partial/images").mkdir(parents=True)
    digits.draw(tmp_path / "out", 1, 1, 64)
    assert (tmp_path / "out/digits.json").is_file() and not (tmp_path / "out.partial").exists()


def test_two_at_once_draw_one_whole_set(digits: ModuleType, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(digits.draw, tmp_path / "out", 2, 1, 64) for _ in range(2)]:
            done.result()
    digits.draw(tmp_path / "alone", 2, 1, 64)
    assert content(tmp_path / "out") == content(tmp_path / "alone")


def test_foreign_folder_is_never_deleted(
    digits: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.jpg").write_text("mine")
    assert digits.main([str(tmp_path / "mine"), "--train", "1", "--val", "1"]) == 2
    assert "not drawn by this program" in capsys.readouterr().err
    assert (tmp_path / "mine/photo.jpg").read_text() == "mine"


def test_splits_share_no_source_digit(digits: ModuleType) -> None:
    train, val = (set(digits.split_sources(1797, split).tolist()) for split in ("train", "val"))
    assert not train & val and len(train | val) == 1797 and len(val) == 360
    classes = digits.source_digits()[1]
    assert set(classes[sorted(val)]) == set(classes[sorted(train)]) == set(range(10))


def test_boxes_are_tight_around_the_ink(digits: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded layers are the oracle: each box is the extreme of its layer's ink, and inside the scene."""
    layers = []
    paint = digits._paint

    def record(rng: np.random.Generator, canvas: np.ndarray, layer: np.ndarray, ink: np.ndarray) -> np.ndarray:
        layers.append(layer)
        return paint(rng, canvas, layer, ink)

    monkeypatch.setattr(digits, "_paint", record)
    scans, classes = digits.source_digits()
    seen: set[int] = set()
    for seed in range(12):
        layers.clear()
        image, boxes = digits.scene(np.random.default_rng(seed), scans, classes, np.arange(1797), 128)
        assert image.shape == (128, 128, 3) and image.dtype == np.uint8
        assert 3 <= len(boxes) <= 7 and len(boxes) == len(layers)
        seen |= {box[0] for box in boxes}
        hidden = np.zeros((128, 128), bool)
        for (_, x1, y1, x2, y2), layer in zip(reversed(boxes), reversed(layers), strict=True):
            assert 0 <= x1 < x2 <= 128 and 0 <= y1 < y2 <= 128
            ink = layer >= digits.INK
            assert not ink[:, :x1].any() and not ink[:, x2:].any() and not ink[:y1].any() and not ink[y2:].any()
            assert ink[:, x1].any() and ink[:, x2 - 1].any() and ink[y1].any() and ink[y2 - 1].any()
            assert (ink & hidden).sum() <= digits.MAX_COVERED * ink.sum()
            hidden |= ink
    assert seen == set(range(10))


def test_drawn_set_passes_the_preflight(digits: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from yolo_compress.data import load

    (tmp_path / "digits.yaml").write_bytes((ROOT / "datasets/digits.yaml").read_bytes())
    digits.draw(tmp_path / "digits", 12, 4, 64)
    got = load(str(tmp_path / "digits.yaml"))
    assert (got.names, len(got.train), len(got.val)) == (tuple("0123456789"), 12, 4)
    assert all(3 <= len(s.boxes) <= 7 for s in got.train + got.val)


@pytest.mark.parametrize("name", ["coco", "coco128"])
def test_coco_yamls_name_80_classes_and_no_download(name: str, tmp_path: Path) -> None:
    from yolo_compress.datayaml import read_yaml

    text = (ROOT / f"datasets/{name}.yaml").read_text()
    (tmp_path / name).mkdir()
    (tmp_path / "x.yaml").write_text(text)
    data = read_yaml(tmp_path / "x.yaml")
    assert (len(data.names), data.names[0], data.names[79]) == (80, "person", "toothbrush")
    assert "download" not in text


def test_command_line(digits: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert digits.main([str(tmp_path / "d"), "--train", "1", "--val", "1", "--imgsz", "64"]) == 0
    assert "1 training and 1 validation scenes of 64 px, seed 0" in capsys.readouterr().out
    assert digits.main([str(tmp_path / "e"), "--imgsz", "8"]) == 2
    assert "64 px" in capsys.readouterr().err
