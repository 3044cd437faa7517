"""Data yamls and image lists: read strictly, nothing executed, nothing outside the data root."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from yolo_compress.data.dataset import BadData, find_yaml, load
from yolo_compress.errors import DataError, RecipeError

YAML = "path: .\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A valid data set of 4 + 2 images in `set/`. The working directory is its parent folder."""
    for name in ("YOLO_COMPRESS_DATA", "YOLO_COMPRESS_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "set"
    for split, count in (("train", 4), ("val", 2)):
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (16, 16), (i, count, 0)).save(root / f"images/{split}/{i}.png")
            (root / f"labels/{split}/{i}.txt").write_text("1 0.5 0.5 0.25 0.5\n")
    (root / "data.yaml").write_text(YAML)
    return root


@pytest.mark.fault(22)
def test_lists_with_crlf_dot_slash_missing_and_repeated_members(root: Path) -> None:
    (root / "train.txt").write_bytes(b"\xef\xbb\xbf./images/train/0.png\r\nimages/train/1.png\r\n\r\n")
    (root / "val.txt").write_text(
        "./images/val/0.png\nimages/val/gone.png\n./images/val/0.png\nimages/val/1\nimages/val/\0.png\n"
    )
    (root / "data.yaml").write_text("train: [train.txt, images/train/../train/]\nval: val.txt\nnames: [cat, dog]\n")
    with pytest.raises(BadData) as caught:
        load("set/data.yaml")
    assert caught.value.findings == (
        "set/val.txt:4: 'images/val/1' is not an image of a supported format",
        "set/val.txt:5: 'images/val/\\x00.png' is not an image of a supported format",
        "set/val.txt:3: images/val/0.png is listed twice, first at set/val.txt:1",
        "set/val.txt:2: set/images/val/gone.png: no such file",
    )
    kept = load("set/data.yaml", on_bad="skip")
    assert [s.name[-5:] for s in kept.train] == ["0.png", "0.png", "1.png", "1.png", "2.png", "3.png"]
    assert [s.name for s in kept.val] == ["images/val/0.png"]


@pytest.mark.fault(22)
@pytest.mark.parametrize("where", ["yaml", "list"])
def test_leaving_the_root_is_an_error(root: Path, where: str) -> None:
    shutil.copytree(root / "images/val", root.parent / "outside")
    (root / "val.txt").write_text("./images/val/0.png\n../outside/1.png\n")
    entry = "../outside" if where == "yaml" else "val.txt"
    (root / "data.yaml").write_text(YAML.replace("val: images/val", f"val: {entry}"))
    with pytest.raises(DataError) as caught:
        load("set/data.yaml", on_bad="skip")
    place = "set/data.yaml:3: ../outside" if where == "yaml" else "set/val.txt:2: ../outside/1.png"
    assert str(caught.value).startswith(f"{place} leads out of set")


def test_roboflow_export_with_wrong_paths_is_read(root: Path) -> None:
    (root / "data.yaml").write_text("train: ../images/train\nval: ../images/val\nnc: 2\n")
    got = load("set/data.yaml")
    assert (got.names, len(got.val)) == (("class_0", "class_1"), 2)


@pytest.mark.fault(22)
@pytest.mark.parametrize(
    ("text", "what"),
    [
        (YAML + "val: images/train\n", "set/data.yaml:5: "),
        (YAML + "x: !!python/object/apply:os.system ['touch marker']\n", "set/data.yaml:5: "),
        (YAML + "a: &a [1, 1]\nb: [*a, *a]\n", "set/data.yaml:5: "),
        (YAML + "nc: 3\n", "set/data.yaml:5: nc is 3 but names: lists 2"),
        (YAML + "channels: 4\n", "set/data.yaml:5: channels must be 1 or 3, not 4"),
        (YAML.replace("val: images/val", "val:"), "set/data.yaml:3: val: must be a folder"),
        (YAML.replace("[cat, dog]", "{0: cat, 2: dog}"), "set/data.yaml:4: names: must number the classes from 0 to 1"),
        (YAML.replace("[cat, dog]", "[cat, cat]"), "set/data.yaml:4: class name 'cat' is given twice"),
        (YAML.replace("[cat, dog]", "[cat, true]"), "set/data.yaml:4: class name True is not text"),
        (YAML.replace("path: .", "path: nowhere"), "set/data.yaml:1: path: nowhere is not a folder"),
        ("- train\n", "set/data.yaml:1: "),
        ("", "set/data.yaml: "),
        ("train: [" * 5000, "set/data.yaml:1: "),
    ],
)
def test_bad_yaml(root: Path, text: str, what: str) -> None:
    (root / "data.yaml").write_text(text)
    with pytest.raises(DataError) as caught:
        load("set/data.yaml")
    assert str(caught.value).startswith(what)
    assert not (root.parent / "marker").exists()


def test_yaml_in_another_encoding(root: Path) -> None:
    (root / "data.yaml").write_bytes(YAML.encode() + b"# caf\xe9\n")
    with pytest.raises(DataError, match=r"^set/data.yaml:5: .*UTF-8"):
        load("set/data.yaml")


@pytest.mark.fault(20)
@pytest.mark.parametrize(
    "download", ["touch marker", "bash touch marker", "|\n  open('marker', 'w')", "https://x.invalid/a.zip"]
)
def test_download_is_never_executed(root: Path, download: str) -> None:
    (root / "data.yaml").write_text(f"{YAML}download: {download}\n")
    load("set/data.yaml")
    shutil.rmtree(root / "images/val")
    with pytest.raises(DataError):
        load("set/data.yaml")
    assert not (root.parent / "marker").exists()


def test_yaml_is_found_by_name_and_the_error_lists_the_available_yamls(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YOLO_COMPRESS_DATA", str(root))
    assert find_yaml("data") == find_yaml("data.yaml") == root / "data.yaml"
    with pytest.raises(
        RecipeError,
        match=r"no data yaml 'dato'.*available: coco\.yaml, coco128\.yaml, data\.yaml, digits\.yaml, digits_many",
    ):
        find_yaml("dato")
    with pytest.raises(RecipeError, match="is a folder"):
        find_yaml("set")


def test_path_is_looked_up_in_the_data_folders(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets/pets.yaml").write_text(YAML.replace("path: .", "path: set"))
    monkeypatch.setenv("YOLO_COMPRESS_DATA", str(tmp_path))
    assert len(load("pets").train) == 4


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("nc: 2147483648", "data.yaml:4: nc must be a whole number from 1 to 20000, not 2147483648"),
        ("nc: true", "nc must be a whole number"),
        ("kpt_shape: 17", "data.yaml:5: kpt_shape must be two numbers from 0 to 10000, not 17"),
        ("kpt_shape: {0: 17, 1: 3}", "kpt_shape must be two numbers"),
        ("kpt_shape: [true, 3]", "kpt_shape must be two numbers"),
        ("kpt_shape: [1000000000, 3]", "kpt_shape must be two numbers"),
    ],
)
def test_counts_that_are_not_numbers_in_range(root: Path, line: str, says: str) -> None:
    """Earlier, two thousand million classes used up the memory, and one number instead of two was a traceback."""
    text = YAML.replace("names: [cat, dog]", line) if "nc" in line else YAML + line
    (root / "data.yaml").write_text(text)
    with pytest.raises(DataError) as caught:
        load("set/data.yaml")
    assert says in str(caught.value)


@pytest.mark.parametrize("where", ["path", "train", "list"])
def test_an_invalid_file_name_in_a_list_is_a_finding_with_its_line(root: Path, where: str) -> None:
    """Earlier, it was exit code 6, as for a full disk, and on_bad=skip did not leave it out."""
    long = "x" * 300 + ".png"
    if where == "list":
        (root / "list.txt").write_text(f"images/train/0.png\n{long}/{long}\n")
        (root / "data.yaml").write_text(YAML.replace("train: images/train", "train: list.txt"))
        assert len(load("set/data.yaml", on_bad="skip").train) == 1
    else:
        (root / "data.yaml").write_text(
            YAML.replace("path: .", f"path: {long}")
            if where == "path"
            else YAML.replace("train: images/train", f"train: {long}")
        )
    with pytest.raises(DataError, match=long):
        load("set/data.yaml")
