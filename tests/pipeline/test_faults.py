"""What goes wrong with what users give us: one line that says what to do, the right exit code, nothing lost.

Numbers are those of the project's fault catalogue. The command line is called in this process, on two images.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from yolo_compress.cli.main import main
from yolo_compress.store.store import Store
from yolo_compress.train import checkpoint

pytestmark = pytest.mark.slow
NAMES = ["bolt", "nut"]


class Shop:
    """A working folder with a tiny data set and a checkpoint, and the command line called in it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        generator = np.random.default_rng(0)
        for split in ("train", "val"):
            (folder / "set" / "images" / split).mkdir(parents=True)
            (folder / "set" / "labels" / split).mkdir(parents=True)
            for index in range(3):
                pixels = generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "set" / "images" / split / f"{index}.png")
                (folder / "set" / "labels" / split / f"{index}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
        self.write_data({})
        (folder / "weights").mkdir()
        checkpoint.save_model(checkpoint.new_model("yolov8n.yaml", NAMES, 3, 0), folder / "weights" / "n.pt")

    def write_data(self, change: dict) -> None:
        data = {"path": "set", "train": "images/train", "val": "images/val", "names": NAMES, **change}
        (self.folder / "set.yaml").write_text(yaml.safe_dump(data))

    def recipe(self, **sections: object) -> str:
        usual: dict[str, object] = {"data": {"yaml": "set.yaml", "imgsz": 64}, "baseline": {"weights": "n.pt"}}
        (self.folder / "r.yaml").write_text(yaml.safe_dump({**usual, **sections}))
        return "recipe=r.yaml"

    def fails(self, code: int, *words: str, says: str) -> str:
        """Call, and check exit code and that the message is there without a traceback; returns stderr."""
        self.capsys.readouterr()
        assert main(list(words)) == code
        stderr = self.capsys.readouterr().err
        assert says in stderr and "Traceback" not in stderr, stderr
        assert not list((self.folder / "weights").glob("store/*[0-9a-f]")), "nothing may be published"
        return stderr


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shop:
    monkeypatch.chdir(tmp_path)
    return Shop(tmp_path, capsys)


# 1, 2, 7, 10: command line and recipe


@pytest.mark.fault(1, 2, 10)
@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("baseline.epoch=10", "did you mean epochs"),
        ("prune.keep_flops=abc", "prune.keep_flops: got 'abc'"),
        ("prune.keep_flops=1.5", "expected a number > 0 and < 1"),
        ("prune.keep_flops=-0.1", "expected a number > 0 and < 1"),
        ("prune.keep_flops=.nan", "prune.keep_flops"),
        ("data.imgsz=100", "the nearest to 100 is 96"),
        ("data.imgsz=0", "the nearest to 0 is 32"),
        ("data.imgsz=1000000", "the nearest to 1000000 is 4096"),
    ],
)
def test_bad_words(shop: Shop, word: str, says: str) -> None:
    shop.fails(2, "baseline", shop.recipe(), word, says=says)


@pytest.mark.fault(3, 4)
@pytest.mark.parametrize(
    "text", ["a: 1\na: 2\n", "!!python/object/apply:os.system ['touch ran']", "- 1\n", "", "\tdata: 1\n"]
)
def test_bad_recipe_files(shop: Shop, text: str) -> None:
    (shop.folder / "r.yaml").write_text(text)
    shop.fails(2, "baseline", "recipe=r.yaml", says="r.yaml")
    assert not (shop.folder / "ran").exists()


@pytest.mark.fault(7)
def test_distilling_from_oneself(shop: Shop) -> None:
    shop.fails(2, "distill", shop.recipe(distill={}), says="the same model")


@pytest.mark.fault(7, 79)
def test_a_group_that_the_net_does_not_have_stops_the_chain_before_it_trains(shop: Shop) -> None:
    stderr = shop.fails(
        2, "qat", shop.recipe(qat={"float_groups": ["model.99"]}), says="unknown group of tensors model.99"
    )
    assert "model.22.cv3.2.0" in stderr and "baseline: running" not in stderr


# 5: paths


@pytest.mark.fault(5, 60)
@pytest.mark.parametrize("kind", ["missing", "folder", "dangling", "loop"])
def test_bad_weights_path(shop: Shop, kind: str) -> None:
    path = shop.folder / "weights" / "w.pt"
    if kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to("nowhere.pt")
    elif kind == "loop":
        path.symlink_to("w.pt")
    code = 4 if kind == "missing" else 2
    stderr = shop.fails(code, "baseline", shop.recipe(baseline={"weights": "w.pt"}), says="w.pt")
    assert kind != "missing" or (
        "put it into weights/" in stderr and "fetch" not in stderr
    )  # it fetches official names alone
    if kind == "missing":
        official = shop.recipe(baseline={"weights": "yolov8n.pt"})
        shop.fails(4, "baseline", official, says="run `yolo-compress fetch yolov8n.pt` on a machine with a network")


# 9: classes


@pytest.mark.fault(9)
def test_other_classes_and_other_order(shop: Shop) -> None:
    shop.write_data({"names": ["nut", "bolt"]})
    shop.fails(2, "baseline", shop.recipe(), says="0: bolt in the model, nut in the data")
    shop.write_data({"names": ["bolt", "nut", "washer"]})
    shop.fails(2, "baseline", shop.recipe(), says="2: nothing in the model, washer in the data")


# 11: what the environment says


@pytest.mark.fault(11)
@pytest.mark.parametrize(
    "change",
    [
        {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TZ": "Pacific/Kiritimati"},
        {"HOME": None, "XDG_CONFIG_HOME": None, "XDG_STATE_HOME": None},
        {"HOME": "/proc", "XDG_STATE_HOME": "/proc", "TZ": "no/where"},
        {"TMPDIR": ""},
    ],
    ids=["locale and time zone", "no HOME", "read-only HOME", "TMPDIR elsewhere"],
)
def test_the_environment_changes_nothing(shop: Shop, change: dict[str, str | None]) -> None:
    shop.write_data({"names": ["Schraube é", "ナット"]})
    model = checkpoint.new_model("yolov8n.yaml", ["Schraube é", "ナット"], 3, 0)
    checkpoint.save_model(model, shop.folder / "weights" / "n.pt")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), **change}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:  # another device
        if "TMPDIR" in change:
            environment["TMPDIR"] = other
        done = subprocess.run(
            [sys.executable, "-m", "yolo_compress", "export", shop.recipe(export={"precisions": ["fp32"]})],
            cwd=shop.folder,
            env={name: value for name, value in environment.items() if value is not None},
            capture_output=True,
            timeout=250,
            check=False,
        )
        assert not [path for path in Path(other).rglob("*") if path.suffix in (".pt", ".onnx", ".torchscript")]
    assert done.returncode == 0, done.stderr
    artifact = Path(json.loads(done.stdout.splitlines()[-1])["artifact"])
    assert (shop.folder / artifact / "original/fp32.onnx").is_file()
    assert b"Traceback" not in done.stderr
    assert {path.name for path in shop.folder.iterdir()} == {"set", "set.yaml", "weights", "r.yaml"}


# 13, 14, 16, 18, 20: data


@pytest.mark.fault(13)
@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "0.png"), (b"<html>not found</html>", "0.png")],
)
def test_bad_image_stops_and_can_be_skipped(shop: Shop, content: bytes, says: str) -> None:
    (shop.folder / "set/images/val/0.png").write_bytes(content)
    shop.fails(3, "baseline", shop.recipe(), says=says)
    assert main(["baseline", "recipe=r.yaml", "data.on_bad=skip"]) == 0
    metrics = Store(Path("weights")).linked("r", "baseline").metrics
    assert metrics["images"] == 2


@pytest.mark.fault(14)
@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("7 0.5 0.5 0.4 0.4", "1.txt:1"),
        ("-1 0.5 0.5 0.4 0.4", "1.txt:1"),
        ("0 0.5 0.5 nan 0.4", "1.txt:1"),
        ("0 0.5 0.5 1.7 0.4", "1.txt:1"),
        ("0 0.5 0.5 0.4", "1.txt:1"),
    ],
)
def test_bad_label_is_named_by_line(shop: Shop, row: str, says: str) -> None:
    (shop.folder / "set/labels/train/1.txt").write_text(row + "\n")
    shop.fails(3, "baseline", shop.recipe(), says=says)


@pytest.mark.fault(16)
def test_training_images_in_the_validation_split(shop: Shop) -> None:
    shutil.copy(shop.folder / "set/images/train/0.png", shop.folder / "set/images/val/0.png")
    shop.fails(3, "baseline", shop.recipe(), says="data.allow_overlap=true")
    assert main(["baseline", "recipe=r.yaml", "data.allow_overlap=true"]) == 0


def test_empty_split(shop: Shop) -> None:
    shutil.rmtree(shop.folder / "set/images/val")
    (shop.folder / "set/images/val").mkdir()
    shop.fails(3, "baseline", shop.recipe(), says="val")


@pytest.mark.fault(18)
def test_data_changed_while_a_stage_ran(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    from yolo_compress.stages import baseline

    whole = baseline.run

    def run(job):
        (shop.folder / "set/labels/val/1.txt").write_text("1 0.5 0.5 0.4 0.4\n")
        return whole(job)

    monkeypatch.setattr(baseline, "run", run)
    shop.fails(3, "baseline", shop.recipe(), says="1.txt")


@pytest.mark.fault(20)
@pytest.mark.parametrize(
    "download", ["import os; os.system('touch ran')", "bash touch ran", "https://example.com/x.zip"]
)
def test_download_of_a_yaml_is_never_executed(shop: Shop, download: str) -> None:
    shop.write_data({"download": download})
    assert main(["baseline", shop.recipe()]) == 0
    assert not (shop.folder / "ran").exists() and not (shop.folder / "set/ran").exists()


# 15: what has no ground truth has no AP


@pytest.mark.fault(15)
def test_a_class_without_boxes_is_left_out_of_the_mean(shop: Shop) -> None:
    assert main(["baseline", shop.recipe()]) == 0
    from yolo_compress.data.dataset import load
    from yolo_compress.evaluate.coco import mean_ap

    samples = load("set.yaml").val
    perfect = [np.array([[19.2, 19.2, 44.8, 44.8, 0.9, 0]])] * len(samples)
    found = mean_ap(samples, perfect, NAMES)
    assert found["map50_95"] == pytest.approx(1.0) and found["per_class"]["nut"] is None


# 23, 24, 25, 26: checkpoints


@pytest.mark.fault(23)
def test_truncated_at_every_step(shop: Shop) -> None:
    whole = (shop.folder / "weights/n.pt").read_bytes()
    for size in [0, 1, *range(4096, len(whole), max(4096, len(whole) // 12)), len(whole) - 1]:
        (shop.folder / "weights/cut.pt").write_bytes(whole[:size])
        shop.fails(5, "baseline", shop.recipe(baseline={"weights": "cut.pt"}), says="not a loadable YOLO checkpoint")


class _Evil:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (Path(self.marker),)


@pytest.mark.fault(24)
@pytest.mark.parametrize("form", ["torch", "pickle", "zip"])
def test_nothing_in_a_checkpoint_is_run(shop: Shop, form: str) -> None:
    target = shop.folder / "weights/evil.pt"
    evil = _Evil(str(shop.folder / "ran"))
    if form == "torch":
        torch.save({"model": evil}, target)
    elif form == "pickle":
        target.write_bytes(pickle.dumps(evil))
    else:
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(evil))
            archive.writestr("archive/version", "3\n")
    shop.fails(5, "baseline", shop.recipe(baseline={"weights": "evil.pt"}), says="nothing in it was run")
    assert not (shop.folder / "ran").exists()


@pytest.mark.fault(24)
def test_state_dict_only(shop: Shop) -> None:
    model = checkpoint.load_model(shop.folder / "weights/n.pt")
    torch.save(model.state_dict(), shop.folder / "weights/state.pt")
    shop.fails(5, "baseline", shop.recipe(baseline={"weights": "state.pt"}), says="not a loadable YOLO checkpoint")


def test_a_segmentation_net_is_refused(shop: Shop) -> None:
    from ultralytics.nn.tasks import SegmentationModel

    buffer = io.BytesIO()
    torch.save({"model": SegmentationModel("yolov8n-seg.yaml", nc=2, verbose=False)}, buffer)
    (shop.folder / "weights/seg.pt").write_bytes(buffer.getvalue())
    shop.fails(2, "baseline", shop.recipe(baseline={"weights": "seg.pt"}), says="expected Detect")


@pytest.mark.fault(25)
@pytest.mark.parametrize("kind", ["nan", "inf", "variance"])
def test_unusable_numbers_are_named_by_layer(shop: Shop, kind: str) -> None:
    model = checkpoint.load_model(shop.folder / "weights/n.pt")
    with torch.no_grad():
        if kind == "variance":
            model.model[3].bn.running_var[0] = -1.0
        else:
            model.model[3].conv.weight[0, 0, 0, 0] = float(kind)
    checkpoint.save_model(model, shop.folder / "weights/bad.pt")
    shop.fails(7, "baseline", shop.recipe(baseline={"weights": "bad.pt"}), says="model.3.")


@pytest.mark.fault(26)
def test_a_fused_checkpoint_is_refused(shop: Shop) -> None:
    fused = checkpoint.load_model(shop.folder / "weights/n.pt").fuse(verbose=False)
    checkpoint.save_model(fused, shop.folder / "weights/fused.pt")
    shop.fails(2, "prune", shop.recipe(baseline={"weights": "fused.pt"}, prune={"epochs": 0}), says="fused")


@pytest.mark.fault(26)
def test_an_already_pruned_checkpoint_is_pruned_further(shop: Shop) -> None:
    assert main(["prune", shop.recipe(prune={"epochs": 0, "calib_images": 3})]) == 0
    first = Store(Path("weights")).linked("r", "prune")
    shutil.copy(first.file("model.pt"), "weights/pruned.pt")
    assert main(["prune", shop.recipe(baseline={"weights": "pruned.pt"}, prune={"epochs": 0, "calib_images": 3})]) == 0
    second = Store(Path("weights")).linked("r", "prune")
    assert second.metrics["compute_gflops"] < 0.6 * first.metrics["compute_gflops"]


# 27: what plain ultralytics does to a pruned net, and that ours does not


@pytest.mark.fault(27)
def test_training_keeps_the_widths_that_ultralytics_would_restore(shop: Shop) -> None:
    recipe = shop.recipe(prune={"epochs": 1, "batch": 3, "calib_images": 3, "keep_flops": 0.5})
    assert main(["prune", recipe]) == 0
    store = Store(Path("weights"))
    pruned, base = (checkpoint.load_model(store.linked("r", stage).file("model.pt")) for stage in ("prune", "baseline"))
    assert sum(p.numel() for p in pruned.parameters()) < 0.8 * sum(p.numel() for p in base.parameters())
    rebuilt = type(pruned)(pruned.yaml, nc=2, verbose=False)  # what YOLO(...).train() does first
    assert checkpoint.widths(rebuilt) == checkpoint.widths(base) != checkpoint.widths(pruned)


# 8: another seed is another run


def test_ones_own_criterion_counts_by_its_text(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    shop.fails(2, "prune", shop.recipe(prune={"epochs": 0, "criterion": "mine.py:mine"}), says="no file 'mine.py'")
    told = []
    for body in ("return torch.ones(group.width)", "return torch.arange(1.0, group.width + 1)"):
        (shop.folder / "mine.py").write_text(f"import torch\n\n\ndef mine(evidence, group):\n    {body}\n")
        recipe = shop.recipe(prune={"epochs": 0, "calib_images": 3, "criterion": "mine.py:mine"})
        assert main(["prune", recipe]) == 0
        told.append(json.loads(capsys.readouterr().out.splitlines()[-1])["fingerprint"])
    assert told[0] != told[1]


@pytest.mark.parametrize("criterion", ["taylor", "hessian"])
def test_criteria_with_gradients_read_the_labels(shop: Shop, criterion: str) -> None:
    assert main(["prune", shop.recipe(prune={"epochs": 0, "calib_images": 3, "criterion": criterion})]) == 0


@pytest.mark.fault(8)
def test_seed_and_data_are_part_of_the_fingerprint(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["baseline", shop.recipe()]) == 0
    capsys.readouterr()
    assert main(["status", "recipe=r.yaml", "run.seed=1"]) == 0
    assert "seed: 0 -> 1" in capsys.readouterr().out
    (shop.folder / "set/labels/train/1.txt").write_text("1 0.5 0.5 0.4 0.4\n")
    assert main(["status", "recipe=r.yaml"]) == 0
    assert "data.digest" in capsys.readouterr().out


# 47: a full disk


@pytest.mark.fault(47)
def test_a_full_disk_is_said_and_leaves_no_artefact(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    shop.fails(6, "baseline", shop.recipe(), says="No space left")


# 37: NaN in training


@pytest.mark.fault(37)
def test_nan_in_training_stops_with_the_last_good_state(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    from yolo_compress.train import trainer

    class Poison(trainer._HookedCriterion):
        calls = 0

        def __call__(self, predictions, batch):
            loss, items = super().__call__(predictions, batch)
            Poison.calls += 1
            return (loss * float("nan"), items) if Poison.calls == 2 else (loss, items)

    monkeypatch.setattr(trainer, "_HookedCriterion", Poison)
    shop.fails(
        7,
        "baseline",
        shop.recipe(baseline={"model": "yolov8n.yaml", "epochs": 3, "batch": 3}),
        says="became NaN or infinite in epoch 2",
    )
    (partial,) = Path("weights/store").glob("baseline-*.partial")
    assert torch.load(partial / "work/resume.pt", weights_only=True)["epoch"] == 0


@pytest.mark.fault(36)
def test_a_collapsed_layer_stops_with_the_last_good_state(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    from yolo_compress.prune.sparsify import SparseTraining

    finished = SparseTraining.on_epoch_end

    def faded(self, epoch, model):
        if epoch == 1:
            torch.nn.init.zeros_(model.model[3].bn.weight)
        return finished(self, epoch, model)

    monkeypatch.setattr(SparseTraining, "on_epoch_end", faded)
    words = ["sparsify", shop.recipe(sparsify={"epochs": 3, "batch": 3})]
    for _ in range(2):  # the second time it goes on after the good epoch, and stops there again
        assert main(words) == 7
        stderr = shop.capsys.readouterr().err
        assert "every gamma of model.3.bn" in stderr and "in epoch 2" in stderr and "Traceback" not in stderr
        (partial,) = Path("weights/store").glob("sparsify-*.partial")
        state = torch.load(partial / "work/resume.pt", weights_only=True)
        assert state["epoch"] == 0
        assert state["model"]["model.3.bn.weight"].abs().min() > 0.1
        assert state["hooks"][0]["state"]["histograms"]["epochs"] == [-1, 0]


@pytest.mark.parametrize("penalty", ["l1", "polarization", "group_lasso"])
def test_each_penalty_trains_and_says_what_it_did(shop: Shop, penalty: str) -> None:
    section = {"epochs": 1, "batch": 3, "warmup_epochs": 0.0, "penalty": penalty, "lambda_scale": "macs", "l1": 0.1}
    section["gamma_lr_scale"] = 1.0
    assert main(["sparsify", shop.recipe(sparsify=section)]) == 0
    captured = shop.capsys.readouterr()
    answer = json.loads(captured.out.splitlines()[-1])
    before, after = json.loads((Path(answer["artifact"]) / "gammas.json").read_text())["counts"]
    assert before[20] == sum(before)  # all gammas are 1
    assert after[19] + after[20] == sum(
        after
    )  # one step of AdamW takes them to 0.999 or, where the loss alone pulls, 1.001
    assert after[19] > (0.2 if penalty == "polarization" else 0.9) * sum(after)  # even gammas: none is under the mean
    metrics = answer["metrics"]
    assert metrics["gamma_mass_under_cut_before"] == {"25": 0.25, "50": 0.5, "75": 0.75}
    assert metrics["gamma_mass_under_cut_after"] == pytest.approx({"25": 0.25, "50": 0.5, "75": 0.75}, abs=1e-3)
    assert "% of channels: before 25.0%, 50.0%, 75.0%; after" in captured.err
    assert "lambda had little effect: raise sparsify.l1" in captured.err


@pytest.mark.fault(36)
@pytest.mark.parametrize(("fresh", "code"), [(0.4, 0), (0.01, 7)])
def test_a_net_that_finds_nothing_gets_fresh_statistics_first(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, fresh: float, code: int
) -> None:
    from yolo_compress.stages import _training

    found = iter([0.5, 0.02, fresh])  # baseline, as trained, with statistics taken anew
    monkeypatch.setattr(_training, "measure", lambda job, model, what="": {"map50_95": next(found)})
    assert main(["sparsify", shop.recipe(sparsify={"epochs": 1, "batch": 3})]) == code
    captured = shop.capsys.readouterr()
    if code:
        assert "fell from 0.500 to 0.010: the model collapsed" in captured.err and "Lower sparsify.l1" in captured.err
        return
    answer = json.loads(captured.out.splitlines()[-1])
    assert answer["metrics"]["map50_95"] == 0.4
    assert "had not followed the gammas (mAP50-95 0.020)" in captured.err
    net = checkpoint.load_model(Path(answer["artifact"]) / "model.pt")
    pixels = torch.stack(
        [torch.from_numpy(np.array(Image.open(path))) for path in sorted(Path("set/images/train").iterdir())]
    )
    mean_C = net.model[0].conv(pixels.permute(0, 3, 1, 2) / 255).mean((0, 2, 3))
    torch.testing.assert_close(
        net.model[0].bn.running_mean, mean_C, rtol=1e-4, atol=1e-4
    )  # of these images, and of no others
