"""`init`: a recipe that loads, whose numbers follow the rules, for what was really found; and nothing trained or overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.noise_set import noise_set
from yolo_compress.cli import grammar, init
from yolo_compress.cli.main import main
from yolo_compress.data.dataset import load as load_data
from yolo_compress.errors import DataError, EnvironmentLacks, RecipeError, StorageError
from yolo_compress.recipe import auto_values, recipe
from yolo_compress.train import checkpoint

OTHERS, NAMES = ["apple", "pear", "plum"], ["bolt", "nut"]


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a data set of NAMES and two checkpoints."""
    monkeypatch.chdir(tmp_path)
    noise_set(tmp_path, train=4, val=2, names=NAMES)
    for name, classes in (("others.pt", OTHERS), ("same.pt", NAMES)):
        checkpoint.save_model(checkpoint.new_model("yolov8n.yaml", classes, 3, seed=0), tmp_path / name)
    return tmp_path


def order(*words: str) -> init.Order:
    command = grammar.parse(["init", *words])
    return init.order(command.options, command.overrides)


def made(*words: str) -> tuple[recipe.Recipe, dict[str, Any]]:
    summary = init.run(order("data.yaml=set.yaml", *words))
    return recipe.load(Path(summary["recipe"])), summary


def test_other_classes_start_from_the_checkpoint(shop: Path) -> None:
    chosen, summary = made("weights=others.pt")
    assert summary["recipe"] == "set-recipe.yaml" and (shop / "set-recipe.yaml").read_text() == summary["text"]
    assert (chosen.baseline.pretrained, chosen.baseline.weights, chosen.teacher) == ("others.pt", None, None)
    sized = auto_values.resolve(
        recipe.load("custom", [("data.yaml", "set.yaml"), ("baseline.pretrained", "others.pt")]), 4, 2
    )
    assert chosen.distill is None, "no larger teacher: the parent has taught in prune already"
    for stage in ("baseline", "prune", "qat"):
        for knob in ("epochs", "batch", "close_mosaic", "mosaic", "lr0"):
            mine = getattr(getattr(auto_values.resolve(chosen, 4, 2), stage), knob)
            assert mine == getattr(getattr(sized, stage), knob), (stage, knob)
    assert chosen.data.imgsz == 64 and chosen.qat is not None and chosen.qat.weight_bits == 7
    assert set(summary["minutes"]) == {"baseline", "prune", "qat", "rest"}
    assert summary["next"][0] == "yolo-compress run recipe=set-recipe.yaml"


def test_the_same_classes_are_taken_and_a_teacher_of_others_is_trained(shop: Path) -> None:
    chosen, summary = made("weights=same.pt", "teacher=others.pt", "target=jetson-orin", "out=mine.yaml")
    assert chosen.baseline.weights == "same.pt" and chosen.teacher is not None
    assert chosen.teacher.pretrained == "others.pt" and chosen.qat is not None and chosen.qat.weight_bits == 8
    assert set(summary["minutes"]) == {"teacher", "prune", "distill", "qat", "rest"}


def test_every_number_has_its_reason(shop: Path) -> None:
    _, summary = made("weights=others.pt")
    lines = [line for line in summary["text"].splitlines() if line.startswith("  ")]
    assert len(lines) >= 17 and all("  # " in line or line.startswith("  mosaic") for line in lines)
    assert "4 training and 2 validation images of 64x48 px, 2 classes, 1.0 objects an image" in summary["text"]


def test_values_of_the_command_line_replace_ours(shop: Path) -> None:
    chosen, summary = made(
        "weights=others.pt", "prune.keep_flops=0.7", "data.imgsz=96,64", "qat=null", "sparsify.epochs=2"
    )
    assert chosen.prune is not None and chosen.prune.keep_flops == 0.7 and chosen.data.imgsz == (96, 64)
    assert chosen.qat is None and chosen.sparsify is not None and chosen.sparsify.epochs == 2
    assert summary["text"].count("# as asked") == 3
    short, _ = made("weights=others.pt", "baseline.epochs=8", "out=short.yaml")
    assert (short.baseline.epochs, short.baseline.close_mosaic) == (8, 1)
    assert "latency_ms: 5" in made("weights=others.pt", "prune.latency_ms=5", "out=ms.yaml")[1]["text"]


def test_what_need_not_be_trained_is_not_timed(shop: Path) -> None:
    _, summary = made("weights=same.pt", "prune=null", "qat=null")
    assert set(summary["minutes"]) == {"rest"}
    chosen, summary = made("weights=others.pt", "baseline.epochs=auto", "data.limit_train=2", "out=auto.yaml")
    assert chosen.baseline.epochs == "auto" and "2 training and 2 validation images" in summary["text"]


def test_a_path_of_any_form_stays_a_path(shop: Path) -> None:
    """Long, with blanks, a hash and a colon: one line of YAML, with its comment beside it."""
    folder = shop / ("a long folder with blanks #1: " + "x" * 120)
    folder.mkdir()
    (shop / "others.pt").rename(folder / "others.pt")
    chosen, _ = made(f"weights={folder / 'others.pt'}")
    assert chosen.baseline.pretrained == str(folder / "others.pt") and chosen.baseline.epochs == 100


def test_nothing_is_trained_and_nothing_published(shop: Path) -> None:
    before = {file: file.read_bytes() for file in shop.rglob("*") if file.is_file()}
    made("weights=others.pt")
    after = {file: file.read_bytes() for file in shop.rglob("*") if file.is_file() and ".cache" not in file.parts}
    assert {**after, shop / "set-recipe.yaml": b""} == {**before, shop / "set-recipe.yaml": b""}


def test_a_file_that_exists_is_refused_before_anything_is_read(shop: Path) -> None:
    (shop / "mine.yaml").write_text("mine")
    with pytest.raises(RecipeError, match=r"mine\.yaml exists; give another out=FILE\.yaml"):
        order("data.yaml=gone.yaml", "weights=gone.pt", "out=mine.yaml")
    assert (shop / "mine.yaml").read_text() == "mine"


def test_a_folder_that_takes_no_file(shop: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot write nowhere/mine\.yaml"):
        init.run(order("data.yaml=set.yaml", "weights=others.pt", "out=nowhere/mine.yaml"))


def test_bad_data_is_refused_with_the_findings_of_the_preflight(shop: Path) -> None:
    (shop / "labels/train/0.txt").write_text("9 0.5 0.5 0.1 0.1\n")
    with pytest.raises(DataError, match=r"labels/train/0\.txt:1"):
        init.run(order("data.yaml=set.yaml", "weights=others.pt"))
    for image in (shop / "images/train").iterdir():
        image.unlink()
    with pytest.raises(DataError, match="train: no image in"):
        init.run(order("data.yaml=set.yaml", "weights=others.pt"))
    assert not (shop / "set-recipe.yaml").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("weights=others.pt",), "init needs data.yaml"),
        (("data.yaml=set.yaml",), "init needs weights"),
        (("data.yaml=set.yaml", "weights=a.pt", "target=jetson-orim"), "did you mean jetson-orin"),
        (("data.yaml=set.yaml", "weights=a.pt", "out=mine.txt"), "a name that ends in .yaml"),
        (("data.yaml=set.yaml", "weights=a.pt", "baseline.weights=b.pt"), "init takes weights=FILE and chooses"),
        (("data.yaml=set.yaml", "weights=a.pt", "recipe=digits"), "init takes no recipe"),
    ],
)
def test_wrong_orders(shop: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        order(*words)


def test_a_checkpoint_that_cannot_start_is_refused_now(shop: Path) -> None:
    with pytest.raises(EnvironmentLacks, match=r"gone\.pt: no such checkpoint"):
        init.run(order("data.yaml=set.yaml", "weights=gone.pt"))
    checkpoint.save_model(checkpoint.new_model("yolov8n.yaml", OTHERS, 1, seed=0), shop / "grey.pt")
    with pytest.raises(RecipeError, match="takes 1 image channels, the data set has 3"):
        init.run(order("data.yaml=set.yaml", "weights=grey.pt"))
    assert not (shop / "set-recipe.yaml").exists()


def test_the_last_line_of_stdout_is_one_json_document(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "data.yaml=set.yaml", "weights=others.pt"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1])["recipe"] == "set-recipe.yaml"
    assert any(line.strip() == "yolo-compress run recipe=set-recipe.yaml" for line in printed)
    assert load_data("set.yaml").names == tuple(NAMES)
