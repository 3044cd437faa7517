"""The preflight finds everything that would make a result wrong, and names file and line. Its cache hides no change."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from yolo_compress.data import data_yaml, reader
from yolo_compress.data import dataset as data_module
from yolo_compress.data.cache import FileCache, stamps
from yolo_compress.data.dataset import BadData, Dataset, Sample, calibration_subset, load, recheck, with_held_back
from yolo_compress.errors import DataError, RecipeError

YAML = "path: .\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n"
ROW = b"1 0.5 0.5 0.25 0.5\n"


def encoded(
    seed: int, kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (24, 16), **options: object
) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind, **options)
    return out.getvalue()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A valid data set of 4 + 2 images in `set/`. The working directory is its parent folder."""
    monkeypatch.delenv("YOLO_COMPRESS_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "set"
    for split, count in (("train", 4), ("val", 2)):
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True)
        for i in range(count):
            (root / "images" / split / f"{i}.png").write_bytes(encoded(10 * count + i))
            (root / "labels" / split / f"{i}.txt").write_bytes(ROW)
    (root / "data.yaml").write_text(YAML)
    return root


def findings(root: Path, **options: object) -> tuple[str, ...]:
    with pytest.raises(BadData) as caught:
        load(str(root / "data.yaml"), **options)  # type: ignore[arg-type]
    assert caught.value.exit_code == 3
    assert str(caught.value).startswith(f"set/data.yaml: {len(caught.value.findings)} finding")
    return caught.value.findings


def test_good_set(root: Path) -> None:
    got = load("set/data.yaml")
    assert [s.name for s in got.train] == [f"images/train/{i}.png" for i in range(4)]
    assert (got.names, got.channels, got.skipped) == (("cat", "dog"), 3, ())
    assert (got.val[0].width, got.val[0].height, got.val[0].boxes) == (24, 16, ((1, 0.5, 0.5, 0.25, 0.5),))
    assert got.val[0].image == root / "images/val/0.png"
    assert got.notes == (
        "train: no box of cat; they cannot be learnt",
        "val: no box of cat; their AP is undefined, and the mean ignores it",
    )


@pytest.mark.fault(13, 14)
def test_all_findings_are_listed_and_skip_drops_just_those(root: Path) -> None:
    (root / "images/train/0.png").write_bytes(encoded(0)[:300])
    (root / "labels/train/1.txt").write_bytes(ROW + b"7 .5 .5 .1 .1\n")
    (root / "images/val/9.jpg").symlink_to("nowhere.jpg")
    (root / "images/val/b.gif").write_bytes(encoded(0, "GIF"))
    (root / "images/val/notes.md").write_text("no image")
    (root / "images/val/.hidden.png").write_bytes(b"")
    got = findings(root)
    assert got == (
        "set/images/val/b.gif: .gif images are not supported",
        got[1],
        "set/labels/train/1.txt:2: class 7 is outside 0..1",
        "set/images/val/9.jpg: dangling symbolic link",
    )
    assert got[1].startswith("set/images/train/0.png: corrupt image (")
    kept = load("set/data.yaml", on_bad="skip")
    assert kept.skipped == got
    assert [s.name for s in (*kept.train, *kept.val)] == [
        "images/train/2.png", "images/train/3.png", "images/val/0.png", "images/val/1.png"
    ]  # fmt: skip


def test_message_lists_ten_and_counts_the_rest(root: Path) -> None:
    for i in range(13):
        (root / f"images/train/bad{i:02d}.png").write_bytes(b"")
    with pytest.raises(BadData) as caught:
        load("set/data.yaml")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("set/data.yaml: 13 findings; fix them, or set data.on_bad=skip")
    assert lines[1] == "  set/images/train/bad00.png: empty file"
    assert (len(lines), lines[-1], len(caught.value.findings)) == (12, "  ... and 3 more", 13)


@pytest.mark.fault(13)
def test_right_format_under_a_wrong_suffix_is_accepted(root: Path) -> None:
    (root / "images/train/0.png").rename(root / "images/train/0.jpg")
    assert len(load("set/data.yaml").train) == 4


@pytest.mark.fault(13)
@pytest.mark.parametrize("kind", ["image", "label"])
def test_pipe_does_not_hang(root: Path, kind: str) -> None:
    path = root / ("images/train/p.png" if kind == "image" else "labels/train/0.txt")
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert findings(root) == (f"{path.relative_to(root.parent)}: not a regular file",)


def test_unreadable_file_is_a_finding(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_bytes

    def refuse(self: Path) -> bytes:
        if self.name == "2.txt":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert findings(root) == ("set/labels/train/2.txt: Permission denied",)


def test_files_left_out_by_their_ending_are_counted_in_one_line(root: Path) -> None:
    for name in ("a.jfif", "b.JFIF", "c.svg", "d", "labels.txt", "data.json", ".hidden.jfif"):
        (root / "images/train" / name).write_bytes(b"x")
    notes = load("set/data.yaml").notes
    assert notes[0] == "train: 4 files left out, because they have no image suffix (.jfif 2, .svg 1, no suffix 1)"
    assert not [note for note in notes if note.startswith("val:") and "left out," in note]


@pytest.mark.parametrize("links", [1, 2])
def test_links_that_lead_back_through_others_are_findings(root: Path, links: int) -> None:
    """With two links in a folder to itself there are 2^40 paths of 40 folders."""
    other = root.parent / "other"
    other.mkdir()
    for number in range(links):
        (other / f"again{number}").symlink_to(other)
    (root / "images/train/out").symlink_to(other)
    assert findings(root) == tuple(
        f"set/images/train/out/again{number}: symbolic link to one of its parent folders" for number in range(links)
    )


def test_more_folders_than_a_data_set_has_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a row of folders, each has two links to the next. So every folder doubles the number of paths."""
    monkeypatch.setattr(data_yaml, "MAX_FOLDERS", 200)
    rows = [root.parent / f"row{number}" for number in range(12)]
    for row, following in itertools.pairwise(rows):
        row.mkdir()
        (row / "a").symlink_to(following), (row / "b").symlink_to(following)
    rows[-1].mkdir()
    (root / "images/train/out").symlink_to(rows[0])
    with pytest.raises(DataError, match="more than 200 folders, with symbolic links"):
        load("set/data.yaml")


def test_folder_loop_is_a_finding(root: Path) -> None:
    (root / "images/train/again").symlink_to(root / "images")
    assert findings(root) == ("set/images/train/again: symbolic link to one of its parent folders",)


@pytest.mark.fault(16)
def test_overlap_is_found_by_content(root: Path) -> None:
    os.link(root / "images/train/3.png", root / "images/val/other-name.png")
    (root / "labels/val/other-name.txt").write_bytes(ROW)
    shutil.copy(root / "images/train/1.png", root / "images/val/1.png")
    assert findings(root) == (
        "set/images/val/1.png: same bytes as set/images/train/1.png of train",
        "set/images/val/other-name.png: same bytes as set/images/train/3.png of train",
    )
    notes = load("set/data.yaml", allow_overlap=True).notes
    assert "2 of 3 validation images are training images too; accepted by data.allow_overlap" in notes


def test_on_bad_skip_does_not_accept_overlap(root: Path) -> None:
    shutil.copy(root / "images/train/1.png", root / "images/val/1.png")
    assert "images/val/1.png" in "\n".join(findings(root, on_bad="skip"))


@pytest.mark.fault(15)
def test_background_images_are_noted(root: Path) -> None:
    (root / "labels/train/0.txt").unlink()
    (root / "labels/train/1.txt").write_bytes(b" \n")
    assert "train: 2 of 4 images are background (1 without label file)" in load("set/data.yaml").notes


@pytest.mark.parametrize(
    ("break_it", "what"),
    [
        (lambda r: shutil.rmtree(r / "labels/val"), "val: no image has a label file; searched in set/labels/val"),
        (lambda r: [p.write_bytes(b"") for p in (r / "labels/train").iterdir()], "all 4 images are background"),
        (lambda r: [p.unlink() for p in (r / "images/val").iterdir()], "set/data.yaml: val: no image in images/val"),
        (lambda r: shutil.rmtree(r / "images/val"), "set/data.yaml:3: val: set/images/val does not exist"),
        (lambda r: [p.write_bytes(b"") for p in (r / "images/val").iterdir()], "no image of val is left"),
    ],
)  # fmt: skip
def test_split_without_use_is_an_error_even_in_skip_mode(root: Path, break_it, what: str) -> None:  # type: ignore[no-untyped-def]
    break_it(root)
    with pytest.raises(DataError) as caught:
        load("set/data.yaml", on_bad="skip")
    assert what in str(caught.value)


def test_digest_depends_on_content_alone(root: Path, tmp_path: Path) -> None:
    first = load("set/data.yaml")
    shutil.copytree(root, tmp_path / "moved")
    for path in (tmp_path / "moved").rglob("*.*"):
        os.utime(path, (1, 1))
    assert load("moved/data.yaml").digest == first.digest
    (root / "labels/train/0.txt").write_bytes(b"0 .5 .5 .25 .5\n")
    second = load("set/data.yaml")
    assert second.digest != first.digest and second.train_digest != first.train_digest
    assert second.val_digest == first.val_digest
    (root / "images/val/0.png").write_bytes(encoded(999))
    assert load("set/data.yaml").val_digest != first.val_digest
    (root / "data.yaml").write_text(YAML.replace("dog", "fox"))
    assert load("set/data.yaml").train_digest != second.train_digest


def test_digest_does_not_depend_on_row_order_or_spelling(root: Path) -> None:
    (root / "labels/train/0.txt").write_bytes(b"0 .1 .1 .1 .1\n1 .5 .5 .1 .1\n")
    first = load("set/data.yaml")
    (root / "labels/train/0.txt").write_bytes(b"1 0.50 0.5 0.1 1e-1\r\n0 .1 .1 .1 .1")
    assert load("set/data.yaml").digest == first.digest


def test_digest_is_that_of_earlier_versions(root: Path) -> None:
    """Fingerprints of stores depend on it: SHA-256 of this JSON, whether the cache has it or not."""
    (root / "labels/train/0.txt").write_bytes(b"1 .5 .5 .1 .1\n0 .123456 .1 .1 .1\n")
    (root / "labels/train/1.txt").unlink()
    for _ in range(2):
        dataset = load("set/data.yaml", cache=root.parent / "cache")
        rows = sorted([s.name, s.sha256, sorted(s.boxes)] for s in dataset.train)
        text = json.dumps([["cat", "dog"], 3, rows], separators=(",", ":"))
        assert dataset.train_digest == hashlib.sha256(text.encode()).hexdigest()
        both = json.dumps([dataset.train_digest, dataset.val_digest], separators=(",", ":"))
        assert dataset.digest == hashlib.sha256(both.encode()).hexdigest()


def test_samples_are_a_sequence(root: Path) -> None:
    (root / "labels/train/1.txt").write_bytes(2 * ROW + b"0 .1 .1 .1 .1\n")
    (root / "labels/train/2.txt").unlink()
    samples = load("set/data.yaml").train
    assert [len(s.boxes) for s in samples] == [1, 2, 0, 1] and samples[1].boxes[1] == (0, 0.1, 0.1, 0.1, 0.1)
    assert samples[1].sha256 == hashlib.sha256(samples[1].image.read_bytes()).hexdigest()
    assert samples[-1] == samples[3] and samples[1:3] == (samples[1], samples[2]) and samples[::-1][0] == samples[3]
    assert samples == tuple(samples) == pickle.loads(pickle.dumps(samples)) and samples != samples[:3]
    with pytest.raises(IndexError):
        samples[4]


def test_cached_load_reads_only_files_that_changed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = root.parent / "sub/cache"
    first = load("set/data.yaml", cache=cache)
    opened: list[str] = []
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: (opened.append(self.name), read(self))[1])
    assert load("set/data.yaml", cache=cache) == first
    assert opened == ["cache"]
    label = root / "labels/val/1.txt"
    before = label.stat()
    label.write_bytes(ROW.replace(b"1", b"0", 1))  # the same size and mtime: only ctime shows the change
    os.utime(label, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = load("set/data.yaml", cache=cache)
    assert opened[1:] == ["cache", "1.txt"]
    assert second.val[1].boxes[0][0] == 0 and second.digest == load("set/data.yaml").digest != first.digest


def test_findings_are_cached_too_and_belong_to_the_class_count(root: Path) -> None:
    (root / "labels/val/1.txt").write_bytes(ROW + b"2 .5 .5 .1 .1\n")
    cache = root.parent / "cache.json"
    assert (
        findings(root, cache=cache)
        == findings(root, cache=cache)
        == ("set/labels/val/1.txt:2: class 2 is outside 0..1",)
    )
    (root / "data.yaml").write_text(YAML.replace("dog", "dog, fox"))
    assert len(load("set/data.yaml", cache=cache).val[1].boxes) == 2


def test_damaged_cache_is_ignored_and_replaced(root: Path) -> None:
    cache = root.parent / "cache"
    first = load("set/data.yaml", cache=cache)
    content = cache.read_bytes()
    other = content.replace(b'"version": 2', b'"version": 1')
    cut = [content[:length] for length in (0, 1, 40, len(content) - 1)]
    flipped = [content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] for i in range(0, len(content), 7)]
    (root / "labels/train.cache").write_bytes(b"\x80\x04cos\nsystem\n.")  # Ultralytics' cache is not read
    for damaged in [b"\x80\x04K\x01.", b"[]", b"{" * 100_000 + b"\n", content + b"0", other, *cut, *flipped]:
        cache.write_bytes(damaged)
        assert not len(FileCache(cache).records)
    assert load("set/data.yaml", cache=cache) == first
    assert cache.read_bytes() == content


def test_killed_preflight_continues_where_it_was(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block of images is saved, and the fourth image cannot be read for now."""
    monkeypatch.setattr(reader, "BLOCK", 1)
    monkeypatch.setattr(reader, "SAVE_SECONDS", 0)
    monkeypatch.setattr(reader, "usable_cpus", lambda: 1)
    cache, opened, read = root.parent / "cache", list[str](), Path.read_bytes

    def count(self: Path) -> bytes:
        opened.append(self.name)
        if self.name == "3.png":
            raise MemoryError
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", count)
    with pytest.raises(MemoryError):
        load("set/data.yaml", cache=cache)
    assert not cache.exists(), "only parts of it"
    assert len(list(root.parent.glob("cache.part-*"))) == 3
    opened.clear()
    monkeypatch.setattr(Path, "read_bytes", lambda self: (opened.append(self.name), read(self))[1])
    second = load("set/data.yaml", cache=cache)
    assert [name for name in opened if "cache" not in name] == ["3.png", "3.txt", "0.png", "0.txt", "1.png", "1.txt"]
    assert second == load("set/data.yaml") and [path.name for path in root.parent.glob("cache*")] == ["cache"]


def test_cache_that_cannot_be_written_is_a_note(root: Path) -> None:
    (root.parent / "file").write_text("")
    assert (
        load("set/data.yaml", cache=root.parent / "file/cache.json").notes[0].startswith("the cache of the preflight")
    )


@pytest.mark.fault(18)
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda r: (r / "labels/val/0.txt").write_bytes(b"0 .5 .5 .1 .1"), "set/labels/val/0.txt changed during"),
        (lambda r: (r / "images/train/2.png").unlink(), "set/images/train/2.png is gone"),
        (lambda r: (r / "labels/train/new.txt").write_bytes(ROW), "set/labels/train/new.txt appeared during"),
    ],
)
def test_recheck_names_the_file_that_changed(root: Path, change, what: str) -> None:  # type: ignore[no-untyped-def]
    (root / "images/train/new.png").write_bytes(encoded(77))
    dataset = load("set/data.yaml")
    recheck(dataset)
    for path in (root / "images/train").iterdir():
        os.utime(path, (1, 1))
    recheck(dataset)  # other times, same bytes
    change(root)
    with pytest.raises(DataError) as caught:
        recheck(dataset)
    assert str(caught.value).startswith(what)


def test_recheck_reads_no_file_whose_stamp_is_the_same(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load("set/data.yaml")
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail(f"read {self}"))
    recheck(dataset)


def test_limits_are_evenly_spaced_and_checked_alone(root: Path) -> None:
    (root / "images/train/1.png").write_bytes(b"")
    got = load("set/data.yaml", limit_train=2, limit_val=1)
    assert [s.name[-5:] for s in (*got.train, *got.val)] == ["0.png", "2.png", "0.png"]
    with pytest.raises(RecipeError, match=r"data\.limit_val must be at least 1, not 0"):
        load("set/data.yaml", limit_val=0)


@pytest.mark.fault(63)
@pytest.mark.slow
def test_a_hundred_thousand_files_are_listed_in_bounded_time(root: Path) -> None:
    """The preflight reads only the 16 images that it is asked for, so almost all of the time is for listing."""
    for number in range(100_000):
        os.close(os.open(root / f"images/train/{number:06d}.png", os.O_CREAT | os.O_WRONLY))
    there = sorted(path.name for path in (root / "images/train").iterdir())
    chosen = (there[i * len(there) // 16] for i in range(16))  # as `limit_train` does
    for seed, name in enumerate(chosen):
        (root / "images/train" / name).write_bytes(encoded(100 + seed))
        (root / "labels/train" / name).with_suffix(".txt").write_bytes(ROW)
    started = time.process_time()
    dataset = load(str(root / "data.yaml"), limit_train=16)
    assert len(dataset.train) == 16 and len(dataset.files[0].paths) == 32
    assert time.process_time() - started < 30


def test_progress_is_shown_for_images_that_are_read(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load("set/data.yaml")
    assert not capsys.readouterr().err, "a few images take no time"
    monkeypatch.setattr(reader, "SHOWN_FROM", 1)
    for shown in ("check images: 6/6 image (100%)", ""):
        load("set/data.yaml", cache=root.parent / "cache")
        assert shown in capsys.readouterr().err.splitlines()[-1:].__str__()


def test_calibration_subset_is_a_function_of_the_seed(root: Path) -> None:
    samples = load("set/data.yaml").train
    chosen = {seed: calibration_subset(samples, 2, seed) for seed in range(8)}
    assert all(len(c) == 2 and c == sorted(c, key=lambda s: s.name) for c in chosen.values())
    assert len({tuple(s.name for s in c) for c in chosen.values()}) > 1
    assert calibration_subset(samples[::-1], 2, 3) == chosen[3]
    assert calibration_subset(samples, 100, 0) == list(samples)
    for bad in ((samples, 0), ((), 5)):
        with pytest.raises(DataError, match="at least one training image"):
            calibration_subset(*bad, seed=0)


def test_folders_have_no_stamp(tmp_path: Path) -> None:
    stamps_N4, failed = stamps([str(tmp_path)])
    assert not stamps_N4.any() and str(failed[0]) == "[Errno 0] not a regular file"


def test_loading_imports_neither_torch_nor_ultralytics() -> None:
    code = "import sys, yolo_compress.data.dataset; print({'torch', 'ultralytics', 'PIL', 'numpy'} & set(sys.modules))"
    package_parent = Path(data_module.__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=package_parent)
    assert out.stdout.strip() == "set()"


def test_a_link_to_a_folder_of_images_has_its_labels_next_to_the_link(root: Path) -> None:
    """Ultralytics does the same. Next to the link's target there may be labels of another data set."""
    plain = load("set/data.yaml")
    shutil.move(root / "images/train", root.parent / "elsewhere")
    (root / "images/train").symlink_to(root.parent / "elsewhere")
    linked = load("set/data.yaml")
    assert linked.digest == plain.digest and all(sample.boxes for sample in linked.train)
    (root / "images/val/again").symlink_to(root / "images/val")
    assert findings(root) == ("set/images/val/again: symbolic link to one of its parent folders",)


@pytest.mark.fault(80)
def test_many_images_without_a_label_file_are_an_error(root: Path) -> None:
    (root / "labels/train/0.txt").unlink()
    assert any("1 of 4 images are background (1 without label file)" in note for note in load("set/data.yaml").notes)
    (root / "labels/train/2.txt").unlink()
    with pytest.raises(DataError) as caught:
        load("set/data.yaml")
    assert str(caught.value) == (
        "set/data.yaml: train: 2 of 4 images have no label file, such as set/labels/train/0.txt. "
        "If all of them are background, set data.max_unlabelled=0.5"
    )
    assert len(load("set/data.yaml", max_unlabelled=0.5).train) == 4


@pytest.mark.fault(80)
@pytest.mark.parametrize("name", ["0.TXT", "0.Txt"])
def test_a_label_file_in_another_case_is_a_finding(root: Path, name: str) -> None:
    (root / "labels/train/0.txt").rename(root / "labels/train" / name)
    assert findings(root) == (f"set/labels/train/{name}: not read; the label file of images/train/0.png must be 0.txt",)


@pytest.mark.fault(15)
def test_validation_images_without_any_object_are_refused(root: Path) -> None:
    (root / "labels/val/0.txt").write_bytes(b"")
    assert len(load("set/data.yaml").val) == 2
    with pytest.raises(
        DataError, match=r"all 1 images are background.*data\.limit_val=1 may have left out the images with"
    ):
        load("set/data.yaml", limit_val=1)
    (root / "labels/val/1.txt").write_bytes(b"")
    with pytest.raises(DataError, match="val: all 2 images are background, nothing to evaluate$"):
        load("set/data.yaml")


@pytest.mark.fault(81)
def test_more_objects_than_coco_counts_are_noted(root: Path) -> None:
    def rows(count: int) -> bytes:
        return b"".join(b"%d %.6f 0.5 0.01 0.5\n" % (i % 2, 0.01 + 0.98 * i / count) for i in range(count))

    (root / "labels/val/0.txt").write_bytes(rows(200))
    assert not [note for note in load("set/data.yaml").notes if "objects" in note], "100 of each class"
    (root / "labels/val/0.txt").write_bytes(rows(202))
    (note,) = (note for note in load("set/data.yaml").notes if "objects" in note)
    assert note == (
        "val: 1 images have over 100 objects of a class (up to 101), but mAP counts only the 100 best detections of a class in an "
        "image, so no model reaches mAP 1. Set data.max_det=301 to count them all"
    )
    assert not [note for note in load("set/data.yaml", max_det=301).notes if "objects" in note]
    (root / "labels/val/1.txt").write_bytes(rows(301))
    notes = load("set/data.yaml").notes
    assert any(
        note.startswith("val: 1 images have over 300 objects, but NMS keeps 300 detections of an") for note in notes
    )


EMPTY = Dataset(Path("d.yaml"), ("a",), 3, (), (), (), (), "", "", "")


def samples(contents: str, boxes: tuple[tuple[float, ...], ...] = ((0, 0.5, 0.5, 0.2, 0.2),)) -> tuple[Sample, ...]:
    """Return a sample for each letter; equal letters are copies of one image."""
    return tuple(
        Sample(image=Path(f"{number}.png"), name=f"{number}.png", width=8, height=8, boxes=boxes, sha256=letter)  # type: ignore[arg-type]
        for number, letter in enumerate(contents)
    )


@pytest.mark.parametrize(("share", "count"), [(0.1, 2), (0.25, 5), (0.5, 10)])
def test_images_held_back_are_no_training_images(share: float, count: int) -> None:
    letters = "abcdefghijklmnopqrst"
    whole = replace(EMPTY, train=samples(letters))
    split = with_held_back(whole, share)
    assert len(split.held) == count and set(split.train) | set(split.held) == set(whole.train)
    assert not {s.sha256 for s in split.train} & {s.sha256 for s in split.held}
    other = with_held_back(replace(EMPTY, train=samples(letters[::-1])), share)
    assert {s.sha256 for s in other.held} == {s.sha256 for s in split.held}, "the order has no part in the choice"
    twice = with_held_back(replace(EMPTY, train=samples(letters * 2)), share)
    assert len(twice.held) == 2 * count and not {s.sha256 for s in twice.train} & {s.sha256 for s in twice.held}


@pytest.mark.parametrize(("contents", "share"), [("a", 0.4), ("abc", 0.1), ("ab", 0.0)])
def test_held_back_of_too_few_images_is_refused(contents: str, share: float) -> None:
    with pytest.raises(DataError, match=r"^data\.hold_back="):
        with_held_back(replace(EMPTY, train=samples(contents)), share)
    with pytest.raises(DataError, match="10 are held back, and none of them has an object"):
        with_held_back(replace(EMPTY, train=samples("abcdefghijklmnopqrst", boxes=())), 0.5)
