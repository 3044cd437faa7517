"""The built-in digits: same seed same bytes, the splits share no digit, boxes are tight, and the preflight passes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from yolo_compress import home
from yolo_compress.cli.main import main
from yolo_compress.data import digits, shipped
from yolo_compress.data.data_yaml import find_yaml, read_yaml
from yolo_compress.data.dataset import load
from yolo_compress.errors import DataError, StorageError


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.*"))}


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    digits.draw(tmp_path / "a", 3, 2, 64, seed=5)
    digits.draw(tmp_path / "b", 3, 2, 64, seed=5)
    digits.draw(tmp_path / "c", 3, 2, 64, seed=6)
    a, b, c = (content(tmp_path / name) for name in "abc")
    assert a == b and len(a) == 2 * (3 + 2) + 1
    assert a.keys() == c.keys() and all(a[name] != c[name] for name in a)


def test_more_scenes_do_not_change_the_first(tmp_path: Path) -> None:
    digits.draw(tmp_path / "a", 2, 1, 64)
    digits.draw(tmp_path / "b", 3, 2, 64)
    a, b = content(tmp_path / "a"), content(tmp_path / "b")
    assert all(b[name] == a[name] for name in a if name != "digits.json")


def test_a_complete_folder_is_not_drawn_again_and_damage_is_repaired(tmp_path: Path) -> None:
    out = tmp_path / "out"
    digits.draw(out, 2, 1, 64)
    whole, inode = content(out), out.stat().st_ino
    digits.draw(out, 2, 1, 64)
    assert out.stat().st_ino == inode
    (out / "labels/train/00001.txt").write_text("")
    digits.draw(out, 2, 1, 64)
    assert content(out) == whole and not out.with_name("out.partial").exists()


def test_leftover_of_a_killed_draw_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out.partial/images").mkdir(parents=True)
    digits.draw(tmp_path / "out", 1, 1, 64)
    assert (tmp_path / "out/digits.json").is_file() and not (tmp_path / "out.partial").exists()


@pytest.mark.fault(54)
def test_two_at_once_draw_one_whole_set(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "yolo_compress.data.digits",
        "out",
        "--train",
        "9",
        "--val",
        "9",
        "--imgsz",
        "64",
    ]
    both = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [one.communicate(timeout=60)[1] for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert "".join(said).count("drawing 9 training and 9 validation images of 64 px into out") == 1
    digits.draw(tmp_path / "alone", 9, 9, 64)
    assert content(tmp_path / "out") == content(tmp_path / "alone")


def test_foreign_folder_is_never_deleted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.jpg").write_text("mine")
    assert digits.main([str(tmp_path / "mine"), "--train", "1", "--val", "1"]) == StorageError.exit_code
    assert "this program did not draw it" in capsys.readouterr().err
    assert (tmp_path / "mine/photo.jpg").read_text() == "mine"


def test_splits_share_no_source_digit() -> None:
    train, val = (set(digits.split_sources(1797, split).tolist()) for split in ("train", "val"))
    assert not train & val and len(train | val) == 1797 and len(val) == 360
    classes = digits.source_digits()[1]
    assert set(classes[sorted(val)]) == set(classes[sorted(train)]) == set(range(10))


def test_boxes_are_tight_around_the_ink(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle is the recorded layer of each digit: its box encloses the ink exactly, and is inside the scene."""
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


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and no variable set."""
    for name in ("YOLO_COMPRESS_DATA", home.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace `digits.draw` during a test: 12 and 4 images of 64 px."""
    real = digits.draw
    monkeypatch.setattr(digits, "draw", lambda out, train, val: real(out, train // 50, val // 37, 64))
    return digits.draw


def test_the_shipped_yaml_draws_its_images_once_and_they_pass_the_preflight(
    user: Path, few: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    got = load("digits.yaml")
    assert (got.names, len(got.train), len(got.val)) == (tuple("0123456789"), 12, 4)
    assert all(3 <= len(s.boxes) <= 7 for s in (*got.train, *got.val))
    assert {s.image.parents[2] for s in (*got.train, *got.val)} == {user / "datasets/digits"}
    assert (
        capsys.readouterr().err == "digits: drawing 12 training and 4 validation images of 64 px into datasets/digits\n"
    )
    monkeypatch.setattr(digits, "draw", lambda *_: pytest.fail("drawn again"))
    assert load("digits").digest == got.digest


def test_fetched_digits_go_to_the_home_and_damage_is_repaired(
    user: Path, few: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(home.VARIABLE, str(user / "home"))
    assert main(["fetch", "digits"]) == 0
    drawn = user / "home/datasets/digits"
    assert capsys.readouterr().out == f"{drawn}\n"
    whole = content(drawn)
    (drawn / "labels/train/00003.txt").unlink()
    assert main(["fetch", "digits"]) == 0
    assert content(drawn) == whole and len(whole) == 2 * (12 + 4) + 1
    assert sorted(path.name for path in user.iterdir()) == ["home"]


def test_digits_of_another_data_folder_are_used(
    user: Path, few: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    few(user / "shared/digits", 600, 150)
    monkeypatch.setenv("YOLO_COMPRESS_DATA", str(user / "shared"))
    assert len(load("digits.yaml").train) == 12
    assert not (user / "datasets").exists()


def test_the_larger_set_begins_with_the_scenes_of_the_smaller(user: Path, few: Callable[..., None]) -> None:
    small, large = load("digits.yaml"), load("digits_many.yaml")
    assert (len(large.train), len(large.val), large.names) == (30, 8, small.names)
    for split in ("train", "val"):
        pairs = zip(getattr(small, split), getattr(large, split), strict=False)
        assert all(a.image.read_bytes() == b.image.read_bytes() and a.boxes == b.boxes for a, b in pairs)
    assert {sample.image.parents[2] for sample in large.train} == {user / "datasets/digits_many"}


def test_nothing_is_drawn_for_a_yaml_of_the_user(user: Path) -> None:
    """Only the shipped file itself has a generator, not a file with its name or its text."""
    (user / "digits.yaml").write_bytes((shipped.FOLDER / "digits.yaml").read_bytes())
    with pytest.raises(DataError, match=r"^digits.yaml:2: path: digits is not a folder; searched in .*, datasets$"):
        load("digits.yaml")
    assert not (user / "datasets").exists()


@pytest.mark.parametrize("name", ["coco", "coco128"])
def test_shipped_coco_names_80_classes_and_how_to_get_it(name: str, user: Path) -> None:
    with pytest.raises(
        DataError, match=rf"path: {name} is not a folder; searched in datasets; run `yolo-compress fetch {name}`"
    ):
        load(name)
    (user / "datasets" / name).mkdir(parents=True)
    data = read_yaml(find_yaml(name))
    assert data.root == user / "datasets" / name
    assert (len(data.names), data.names[0], data.names[79]) == (80, "person", "toothbrush")
    assert "download" not in find_yaml(name).read_text()


def test_the_users_yaml_comes_before_the_shipped_one(user: Path) -> None:
    assert find_yaml("coco") == shipped.FOLDER / "coco.yaml"
    (user / "datasets").mkdir()
    (user / "datasets/coco.yaml").write_text("mine")
    assert find_yaml("coco") == user / "datasets/coco.yaml"


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert digits.main([str(tmp_path / "d"), "--train", "1", "--val", "1", "--imgsz", "64"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'd'}\n"
    assert digits.main([str(tmp_path / "e"), "--imgsz", "8"]) == 2
    assert "64 px" in capsys.readouterr().err
