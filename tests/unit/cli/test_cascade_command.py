"""`yolo-compress cascade`: it recommends what wins, refuses what loses, and its policy folder opens like an engine folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.shade_engines import LARGE_PX, NAMES, SMALL_PX, shade_set, write_engine
from tests.support.typed import validate
from yolo_compress.cli import cascade
from yolo_compress.cli.main import main
from yolo_compress.evaluate.cascade.schema import CascadeDocument
from yolo_compress.evaluate.cascade.write import DOCUMENT
from yolo_compress.runtime.detect.detector import Detector
from yolo_compress.runtime.detect.pre import read_image
from yolo_compress.runtime.engine import open_engine

TRAIN, VAL = 60, 30


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, a small and a large engine, and one whose detections do not tell that they are wrong."""
    root = tmp_path_factory.mktemp("cascade")
    shade_set(root, TRAIN, VAL)
    write_engine(root / "small", SMALL_PX, blind=True)
    write_engine(root / "mute", SMALL_PX, blind=True, useful=False)
    write_engine(root / "large", LARGE_PX, blind=False)
    return root


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("ROUNDS", 2), ("SAMPLES", 30), ("FIRST_SAMPLES", 30)):
        monkeypatch.setattr(cascade, name, value)


def words(made: Path, small: str = "small", **options: object) -> list[str]:
    given = {
        "small": made / small / "engine",
        "large": made / "large/engine",
        "data": made / "set.yaml",
        "out": "policy",
        "replicates": 200,
        **options,
    }
    return [f"{key}={value}" for key, value in given.items() if value is not None]


def called(capsys: pytest.CaptureFixture[str], given: Sequence[str]) -> tuple[int, list[str], str]:
    """Exit code, lines of stdout, stderr."""
    code = main(["cascade", *given])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def predicted(capsys: pytest.CaptureFixture[str], engine: object, source: Path) -> list[Any]:
    """The JSON lines that `predict` writes."""
    assert main(["predict", f"source={source}", f"engine={engine}", "engines=2"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()][:-1]


@pytest.mark.slow
def test_a_cascade_that_wins_is_written_and_opens_like_an_engine(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines, err = called(capsys, words(made, static=made / "mute/engine"))
    document = json.loads(lines[-1])
    assert code == 0 and lines[0].startswith("PASS: use the cascade: mAP50-95 1.000 at "), err
    stored = json.loads(Path("policy", DOCUMENT).read_text())
    validate(stored, CascadeDocument)
    assert document == {**stored, "out": "policy"}
    own, router = document["cascade"], document["router"]
    assert own["kept"] == 0.5 and own["map50_95"] == document["large"]["map50_95"] == 1.0
    assert document["small"]["map50_95"] < 0.9 and router["explained"] > 0.95 and router["images"] == TRAIN
    assert own["kept_ms"] < own["mean_ms"] < document["large"]["mean_ms"] < own["handed_ms"]
    assert own["mean_ms"] == pytest.approx((own["kept_ms"] + own["handed_ms"]) / 2)
    assert own["p99_ms"] is None, "not from 60 samples"
    assert document["verdict"]["low"] > 0 and document["control"]["map50_95"] < 1

    source = made / "images/val"
    cascaded = predicted(capsys, "policy", source)
    alone = {name: predicted(capsys, made / name / "engine", source) for name in ("small", "large")}
    for index, line in enumerate(sorted(cascaded, key=lambda one: int(Path(one["picture"]).stem))):
        (name,) = ("large",) if index % 2 else ("small",)  # every second image is dark
        assert line == next(one for one in alone[name] if one["picture"] == line["picture"])

    for b in ("large", "small"):
        code = main(["ab", "a=policy", f"b={made / b / 'engine'}", f"data={made / 'set.yaml'}", "replicates=50"])
        compared = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (code == 0) == (b == "large") and compared["map50_95"]["a"] == pytest.approx(1.0)
        assert compared["latency"]["a_p50_ms"] > 0 and "imgsz" not in compared["a"] and "imgsz" in compared["b"]
    assert main(["ab", "a=policy", "b=policy", f"data={made / 'set.yaml'}", "imgsz=64"]) == 2
    assert "imgsz=64,64: has no effect on two cascades" in capsys.readouterr().err


@pytest.mark.slow
def test_a_router_that_cannot_tell_falls_back_to_a_model_alone(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, _ = called(capsys, words(made, small="mute", force="true"))
    document = json.loads(lines[-1])
    assert code == 1 and document["cascade"] is None and document["out"] is None and not Path("policy").exists()
    assert lines[0].startswith("FAIL: use large alone: mAP50-95 1.000 at ")
    assert lines[0].endswith("the small model's detections do not tell which images gain from the large model")
    assert document["router"]["penalty"] is None and set(document["router"]["weights"]) == {0.0}


@pytest.mark.slow
def test_a_small_model_that_is_as_good_is_used_alone(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_engine(made / "sharp", SMALL_PX, blind=False)
    code, lines, _ = called(capsys, words(made, small="sharp"))
    assert code == 1 and lines[0].startswith("FAIL: use small alone: mAP50-95 1.000 at ")


@pytest.mark.slow
def test_max_drop_is_met_on_images_that_the_router_never_saw(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, err = called(capsys, words(made, max_drop=0.02))
    document = json.loads(lines[-1])
    assert code == 0, err
    assert document["verdict"]["met"] is True
    assert document["cascade"]["map50_95"] >= 0.98 * document["large"]["map50_95"]
    assert 0.4 <= document["cascade"]["kept"] <= 0.5, "a step of the shares that are tried is two images"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ({"latency_ms": 0.001}, 2, "latency_ms=0.001: small alone takes "),
        ({"latency_ms": 1e6}, 2, "so no cascade is needed; use large alone"),
        ({"swap": True}, 2, "large has to be the slower model; exchange them"),
    ],
)
def test_latencies_that_leave_nothing_are_refused(
    made: Path, options: dict[str, Any], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if options.pop("swap", False):
        options = {"small": made / "large/engine", "large": made / "small/engine"}
        given = [word for word in words(made) if not word.startswith(("small=", "large="))]
        given += [f"{key}={value}" for key, value in options.items()]
    else:
        given = words(made, **options)
    found, lines, err = called(capsys, given)
    assert found == code and says in err and not lines and not Path("policy").exists()


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({"latency_ms": 5, "max_drop": 0.1}, 2, "latency_ms and max_drop are both given"),
        ({"max_drop": 1}, 2, "max_drop: got '1', expected a number >= 0 and < 1"),
        ({"latency_ms": "nan"}, 2, "latency_ms: got 'nan', expected a number above 0"),
        ({"seed": -1}, 2, "seed: got '-1', expected a whole number from 0 to"),
        ({"out": "."}, 2, "out: got '.', expected a new name in a folder that exists"),
        ({"out": "gone/policy"}, 2, "out: got 'gone/policy', expected a new name"),
        ({"static": "net.pt"}, 2, "static=net.pt: a checkpoint, but a cascade needs engines"),
        ({"static": "gone"}, 2, "no engine folder"),
    ],
)
def test_bad_options_are_refused_before_any_work(
    made: Path, change: dict[str, Any], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, lines, err = called(capsys, words(made, **change))
    assert found == code and says in err and not lines


def test_pairs_and_data_that_cannot_work_are_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_engine(tmp_path / "other", LARGE_PX, blind=False, names=("bolt", "screw"))
    few, bare, third = tmp_path / "few", tmp_path / "bare", tmp_path / "third"
    shade_set(few, cascade.FIT_LEAST - 1, VAL)
    shade_set(bare, TRAIN, VAL, labels=False)
    shade_set(third, TRAIN, VAL, names=("bolt", "screw"))
    shade_set(tmp_path / "short", TRAIN, 8)
    both = tmp_path / "both"
    shade_set(both, TRAIN, 12)
    (both / "set.yaml").write_text(f"train: images/train\nval: images/train\nnames: [{', '.join(NAMES)}]\n")
    same = made / "small/engine"
    cases: list[tuple[Path | None, Path | None, int, str]] = [
        (other, None, 2, "a cascade needs two models of the same classes in the same order"),
        (same, None, 2, "small and large are the same model"),
        (
            None,
            few,
            3,
            f"{cascade.FIT_LEAST - 1} training images with objects, a router needs at least {cascade.FIT_LEAST}",
        ),
        (None, bare, 3, "are background"),
        (None, third, 2, "the models' classes are"),
        (None, tmp_path / "short", 3, "8 validation images with objects, an interval of the difference needs"),
        (None, both, 3, "same bytes as"),
    ]
    for large, data, code, says in cases:
        given = words(made, **({"data": data / "set.yaml"} if data else {}))
        if large:
            given = [word for word in given if not word.startswith("large=")] + [f"large={large}"]
        found, lines, err = called(capsys, given)
        assert found == code and says in err and not lines, (says, err)


@pytest.mark.parametrize(("name", "precision"), [("fp16", "fp16"), ("fp32", "fp32"), ("net", "fp32")])
def test_an_exported_file_has_the_precision_of_its_name(made: Path, tmp_path: Path, name: str, precision: str) -> None:
    """A policy states it, and a robot builds the engine in it."""
    shutil.copyfile(made / "small/net.onnx", tmp_path / f"{name}.onnx")
    chosen = cascade.Settings(str(tmp_path / f"{name}.onnx"), str(made / "large/engine"), "set.yaml", tmp_path / "out")
    (tmp_path / "scratch").mkdir()
    small, _ = cascade.open_entrants(chosen, tmp_path / "scratch")
    assert small.info.precision == precision


def test_a_policy_of_other_engines_is_refused(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from yolo_compress.evaluate.cascade.write import fill, policy_json, publish
    from yolo_compress.runtime.backends.base import load_info
    from yolo_compress.runtime.detect.cascade import FEATURES

    paths = [made / name / "engine" for name in ("small", "large")]
    small, large = ((path, load_info(path)) for path in paths)
    weights = np.zeros(len(FEATURES))
    fill(tmp_path / "filled", policy_json(small[1], large[1], weights, 1.0, 0.0), small, large)
    publish(tmp_path / "filled", tmp_path / "policy", {})
    image = read_image(made / "images/val/1.png")
    with open_engine(tmp_path / "policy", threads=1) as opened, open_engine(paths[1], threads=1) as alone:
        assert np.array_equal(Detector(opened)(image), Detector(alone)(image)), "bias above threshold: always large"
    shutil.rmtree(tmp_path / "policy/large")
    shutil.copytree(made / "mute/engine", tmp_path / "policy/large")
    code, _, err = called_predict(capsys, tmp_path / "policy", made / "images/val")
    assert code == 5 and "but the policy was fitted to" in err and "run `yolo-compress cascade` for this engine" in err
    (tmp_path / "policy/policy.json").write_text("{}")
    code, _, err = called_predict(capsys, tmp_path / "policy", made / "images/val")
    assert code == 5 and "damaged or of another version" in err


def called_predict(capsys: pytest.CaptureFixture[str], engine: Path, source: Path) -> tuple[int, str, str]:
    code = main(["predict", f"source={source}", f"engine={engine}"])
    return (code, *capsys.readouterr())
