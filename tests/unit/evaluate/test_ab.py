"""A/B: exact where there is an answer (pycocotools, enumeration, binomial), and honest verdicts where there is none."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from tests.support.matching_scenes import NAMES, Scene, by_pycocotools, scene
from tests.support.matching_scenes import drawn as drawn_scenes
from tests.support.typed import validate
from yolo_compress.errors import DataError, RecipeError
from yolo_compress.evaluate import bootstrap
from yolo_compress.evaluate.ab.comparison import compare, verdict
from yolo_compress.evaluate.ab.latency_ratio import latency_ratio
from yolo_compress.evaluate.ab.operating_point import mcnemar
from yolo_compress.evaluate.ab.schema import AB
from yolo_compress.evaluate.bootstrap import interval, over_classes, replicate, resamples
from yolo_compress.runtime.measure.coco_map import AREAS, RECALLS_R, match

Rows = list[np.ndarray]


def worse(found: Rows, seed: int = 0) -> Rows:
    """The detections, displaced and with other scores."""
    generator = np.random.default_rng(seed)
    out = []
    for rows in found:
        rows = rows.copy()
        rows[:, :4] += generator.normal(0, 2, (len(rows), 4))
        rows[:, 4] = np.clip(rows[:, 4] + generator.normal(0, 0.1, len(rows)), 0.01, 0.99)
        out.append(rows)
    return out


def means(precision_TRKA: np.ndarray) -> np.ndarray:
    """ap_AK."""
    return precision_TRKA.mean(axis=(0, 1)).T


@pytest.mark.parametrize("seed", range(6))
def test_unit_weights_are_pycocotools(seed: int) -> None:
    truths, found = scene(seed)
    expected = by_pycocotools(truths, found, len(NAMES))
    ones = replicate([match(truths, found, len(NAMES))], np.ones((1, len(truths)), int))[0]
    np.testing.assert_allclose(ones.ap50_95_RAK[0], means(expected), rtol=0, atol=1e-12)
    np.testing.assert_allclose(ones.ap50_RK[0], expected[0, :, :, 0].mean(axis=0), rtol=0, atol=1e-12)


def test_a_replicate_is_pycocotools_on_the_images_drawn() -> None:
    truths, found = scene(5, tied=False)
    weights = resamples(len(truths), 6, seed=1)
    assert (weights.sum(axis=1) == len(truths)).all() and weights.max() > 1 and not weights.all()
    ours = replicate([match(truths, found, len(NAMES))], weights)[0]
    for number, weights_I in enumerate(weights):
        drawn = np.repeat(np.arange(len(truths)), weights_I)
        expected = by_pycocotools([truths[i] for i in drawn], [found[i] for i in drawn], len(NAMES))
        np.testing.assert_allclose(ours.ap50_95_RAK[number], means(expected), rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(drawn_scenes())
def test_replicates_are_pycocotools_on_what_hypothesis_draws(case: Scene) -> None:
    """Images without truths or detections, one image alone, equal scores, and an image that is drawn often or never.

    Of an image drawn twice, pycocotools takes detections of equal score copy by copy and `replicate` detection by detection, so
    scores are distinct there.
    """
    truths, found = case
    ends = np.cumsum([0, *map(len, found)])
    distinct = [
        rows + np.eye(6, dtype=np.float32)[4] * np.arange(a, b)[:, None] / 1000
        for rows, a, b in zip(found, ends, ends[1:], strict=False)
    ]
    for rows, weights_I in ((found, np.ones(len(truths), int)), (distinct, resamples(len(truths), 1, seed=0)[0])):
        chosen = np.repeat(np.arange(len(truths)), weights_I)
        expected = by_pycocotools([truths[i] for i in chosen], [rows[i] for i in chosen], len(NAMES))
        ours = replicate([match(truths, rows, len(NAMES))], weights_I[None])[0]
        np.testing.assert_allclose(ours.ap50_95_RAK[0], means(expected), rtol=0, atol=1e-12)


def test_chunks_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    truths, found = scene(2)
    models = [match(truths, rows, len(NAMES)) for rows in (found, worse(found))]
    weights = resamples(len(truths), 40, seed=0)
    whole = replicate(models, weights)
    monkeypatch.setattr(bootstrap, "_CHUNK", (7, 7))
    for first, second in zip(whole, replicate(models, weights), strict=True):
        np.testing.assert_array_equal(first.ap50_95_RAK, second.ap50_95_RAK)


def test_recall_points_are_counted_as_by_searchsorted() -> None:
    steps = np.concatenate([np.arange(n + 1) / n for n in range(1, 400)])
    recalls = np.clip(np.concatenate([steps, np.nextafter(steps, 0), np.nextafter(steps, 1)]), 0, 1)
    np.testing.assert_array_equal(bootstrap._passed(recalls), np.searchsorted(RECALLS_R, recalls, side="right"))


def toy() -> tuple[Rows, Rows, Rows]:
    """Four images, one class; what each model finds differs from image to image, so that every resample differs."""
    truths = [np.array([[0, 0, 0, 50, 50]], float), np.array([[0, 0, 0, 50, 50], [0, 60, 60, 99, 99]], float),
              np.array([[0, 10, 10, 70, 60]], float), np.array([[0, 0, 0, 30, 30]], float)]  # fmt: skip
    a = [[[0, 0, 50, 50, 0.9, 0]], [[0, 0, 50, 48, 0.8, 0]], [[10, 10, 70, 60, 0.7, 0], [80, 80, 90, 90, 0.75, 0]], []]
    b = [[[0, 0, 50, 44, 0.6, 0]], [[0, 0, 50, 50, 0.8, 0], [60, 60, 99, 99, 0.5, 0]], [[0, 0, 30, 30, 0.7, 0]],
         [[0, 0, 30, 30, 0.65, 0]]]  # fmt: skip
    return truths, *([np.array(rows, np.float32).reshape(-1, 6) for rows in model] for model in (a, b))


def enumerated(truths: Rows, a: Rows, b: Rows) -> Iterator[tuple[float, float]]:
    """(B less A, probability) of every resample of the images, by pycocotools."""
    images = range(len(truths))
    for drawn in itertools.combinations_with_replacement(images, len(truths)):
        ways = math.factorial(len(truths)) / math.prod(math.factorial(drawn.count(i)) for i in images)
        ap = [
            np.nanmean(by_pycocotools([truths[i] for i in drawn], [rows[i] for i in drawn], 1)[..., 0])
            for rows in (a, b)
        ]
        yield float(ap[1] - ap[0]), ways / len(truths) ** len(truths)


@pytest.mark.fault(67)
def test_the_interval_is_that_of_the_exact_bootstrap_distribution() -> None:
    """All 256 resamples enumerated: so much of them lies below each end as should, within Monte Carlo error."""
    truths, a, b = toy()
    deltas, probabilities = np.array(list(enumerated(truths, a, b))).T
    assert probabilities.sum() == pytest.approx(1) and len(np.unique(deltas.round(9))) > 20
    replicates = 20_000
    found = compare(truths, a, b, ["thing"], replicates=replicates)["map50_95"]
    for end, share in (("low", 0.025), ("high", 0.975)):
        error = 4 * math.sqrt(share * (1 - share) / replicates)
        assert probabilities[deltas < found[end] - 1e-9].sum() <= share + error
        assert probabilities[deltas <= found[end] + 1e-9].sum() >= share - error
    weights = np.array([np.bincount(d, minlength=4) for d in itertools.product(range(4), repeat=4)])
    ours = [
        over_classes(model.ap50_95_RAK[:, 0]) for model in replicate([match(truths, m, 1) for m in (a, b)], weights)
    ]
    assert (ours[1] - ours[0]).mean() == pytest.approx((deltas * probabilities).sum(), abs=1e-12)


@pytest.mark.fault(66)
def test_a_model_against_itself() -> None:
    truths, found = scene(3, tied=False)
    found = [rows[(rows[:, 2:4] > rows[:, :2]).all(axis=1)] for rows in found]
    document = compare(truths, found, [rows.copy() for rows in found], NAMES, replicates=50)
    assert document["verdict"]["status"] == "pass" and document["verdict"]["smallest_difference"] == 0
    assert [document["map50_95"][key] for key in ("delta", "low", "high")] == [0, 0, 0]
    assert document["flips"] == [] and document["operating"]["mcnemar"] == {
        "a_only": 0,
        "b_only": 0,
        "images": 0,
        "p": 1.0,
    }
    assert document["operating"]["score_shift"] == {"median": 0, "p10": 0, "p90": 0}
    assert document["operating"]["agreement"]["median_iou"] == 1
    assert document["pr"]["a"] == document["pr"]["b"] and len(document["pr"]["a"]) == 101


def test_the_document_is_json_repeats_itself_and_depends_on_its_seed() -> None:
    truths, found = scene(4)
    truths = [rows[rows[:, 0] != 2] for rows in truths]  # a class without truths
    first, second = (compare(truths, found, worse(found), NAMES, replicates=60) for _ in range(2))
    text = json.dumps(first, allow_nan=False)
    validate(first, AB)
    assert text == json.dumps(second, allow_nan=False)
    other = compare(truths, found, worse(found), NAMES, replicates=60, seed=1)
    assert other["map50_95"]["low"] != first["map50_95"]["low"]
    assert other["map50_95"]["delta"] == first["map50_95"]["delta"]
    absent = first["by_class"][2]
    assert absent["truths"] == 0 and absent["a"] is absent["low"] is None
    present = [row["delta"] for row in first["by_class"][:2]]
    assert first["map50_95"]["delta"] == pytest.approx(np.mean(present))
    assert [row["name"] for row in first["by_size"]] == [name for name in AREAS if name != "all"]
    assert sum(row["truths"] for row in first["by_size"]) == sum(row["truths"] for row in first["by_class"])


def test_what_a_clear_loss_and_a_clear_gain_say() -> None:
    truths, found = scene(6, images=40)
    nothing = [rows[:0] for rows in found]
    lost = compare(truths, found, nothing, NAMES, replicates=50)
    assert lost["verdict"]["status"] == "fail" and lost["verdict"]["line"].startswith(
        "FAIL: mAP50-95 of B is more than 1 % below"
    )
    assert lost["operating"]["threshold_b"] is None and lost["operating"]["agreement"]["median_iou"] is None
    assert compare(truths, nothing, found, NAMES, replicates=50)["verdict"]["status"] == "pass"


@pytest.mark.parametrize(
    ("low", "high", "status"),
    [(-0.004, 0.003, "pass"), (-0.02, -0.0051, "fail"), (-0.02, -0.004, "inconclusive"), (-0.005, 0.1, "inconclusive")],
)
def test_the_verdict_is_by_the_interval_against_the_margin(low: float, high: float, status: str) -> None:
    said = verdict({"a": 0.5, "b": 0.49, "delta": -0.01, "low": low, "high": high}, margin=0.01, images=87)
    assert said["status"] == status and said["line"].startswith(status.upper())
    assert said["smallest_difference"] == pytest.approx((high - low) / 2)
    assert f"the smallest difference that 87 images can show is {(high - low) / 2:.4f}" in said["line"]


def test_the_operating_point_by_hand() -> None:
    """A finds both things of image 0 and shows one wrong box; B finds one of them, and the thing of image 1."""
    truths = [np.array([[0, 0, 0, 10, 10], [0, 20, 20, 30, 30]], float), np.array([[0, 0, 0, 10, 10]], float)]
    a = [
        np.array([[0, 0, 10, 10, 0.9, 0], [20, 20, 30, 30, 0.8, 0], [50, 50, 60, 60, 0.7, 0]]),
        np.array([[0, 0, 10, 10, 0.25, 0]]),
    ]
    b = [np.array([[0, 0, 10, 9, 0.8, 0], [20, 20, 30, 30, 0.2, 0], [50, 50, 60, 60, 0.6, 0], [70, 70, 80, 80, 0.5, 0]]),
         np.array([[0, 0, 10, 10, 0.3, 0]])]  # fmt: skip
    document = compare(truths, a, b, ["thing"], replicates=10)
    at = document["operating"]
    assert at["a"] == {"recall": 2 / 3, "missed": 1, "false_positives": 1, "false_positives_per_image": 0.5}
    assert at["b"] == {"recall": 2 / 3, "missed": 1, "false_positives": 2, "false_positives_per_image": 1.0}
    assert at["mcnemar"] == {"a_only": 1, "b_only": 1, "images": 2, "p": 1.0}
    assert document["flips"] == [
        {"image": 0, "lost": 1, "gained": 0, "new_false_positives": 1},
        {"image": 1, "lost": 0, "gained": 1, "new_false_positives": 0},
    ]
    assert at["agreement"] == {"matched": 2, "median_iou": pytest.approx(0.95), "p05_iou": pytest.approx(0.905)}
    assert at["score_shift"]["median"] == pytest.approx(-0.1)
    assert at["threshold_b"] == pytest.approx(0.2999), "B's second truth has the score 0.3"
    restored = compare(truths, a, b, ["thing"], replicates=10, conf=at["threshold_b"])
    assert restored["operating"]["b"]["recall"] == at["a"]["recall"]


def by_image(*differences: int) -> float:
    """p of images whose truths that one model alone finds differ by so many."""
    d_I = np.array(differences)
    return float(mcnemar(d_I.clip(0), -d_I.clip(max=0))["p"])


def test_mcnemar_is_the_binomial_test_where_an_image_has_one_truth() -> None:
    assert by_image(*[1] * 10, *[-1] * 2) == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert by_image(*[1] * 2, *[-1] * 10) == by_image(*[1] * 10, *[-1] * 2)
    assert by_image(*[1, -1] * 5) == 1 and by_image() == 1 and by_image(0, 0) == 1
    exact = 2 * sum(math.comb(3000, i) for i in range(1401)) / 2**3000
    assert by_image(*[1] * 1400, *[-1] * 1600) == pytest.approx(exact, rel=1e-9)


def test_mcnemar_counts_images_and_not_boxes() -> None:
    """By enumeration of all signs; seven boxes of one image are one observation."""
    differences = (3, 3, -1, 2, 5, -2)
    sums = [
        sum(sign * d for sign, d in zip(signs, differences, strict=True))
        for signs in itertools.product((1, -1), repeat=6)
    ]
    assert by_image(*differences) == pytest.approx(np.mean([abs(one) >= sum(differences) for one in sums]))
    assert by_image(7) == 1 and by_image(7, 7) == 0.5
    rng, equal, by_box = np.random.default_rng(0), [], []
    for _ in range(200):
        lost = 7 * rng.choice([0, 1, -1], 300, p=[0.9, 0.05, 0.05])
        equal.append(by_image(*lost))
        by_box.append(by_image(*[1] * int(lost.clip(0).sum()), *[-1] * int(-lost.clip(max=0).sum())))
    assert np.mean(np.array(equal) < 0.05) <= 0.08, "as often as 5 % says"
    assert np.mean(np.array(by_box) < 0.05) == pytest.approx(0.45, abs=0.08), "over boxes"


def test_latency_is_a_ratio_of_medians_with_an_interval() -> None:
    generator = np.random.default_rng(0)
    mood = [1.0, 1.3, 0.9]
    a, b = ([(base * m * generator.lognormal(0, 0.02, 200)).tolist() for m in mood] for base in (10.0, 4.0))
    found = latency_ratio(a, b, 300, seed=0)
    assert found["a_p50_ms"] == np.median(np.concatenate(a)) and found["ratio"] == pytest.approx(2.5, rel=0.02)
    assert found["low"] < found["ratio"] < found["high"] and found["high"] - found["low"] < 0.2, "the mood is shared"
    assert latency_ratio([[2.0]], [[4.0]], 5, 0) == {
        "a_p50_ms": 2,
        "b_p50_ms": 4,
        "ratio": 0.5,
        "low": 0.5,
        "high": 0.5,
    }
    for one, other in (([[1.0]], [[1.0], [2.0]]), ([[1.0]], [[]]), ([], [])):
        with pytest.raises(ValueError, match="rounds"):
            latency_ratio(one, other, 5, 0)


@pytest.mark.fault(66)
def test_an_interval_of_nothing_is_none() -> None:
    assert interval(np.full(5, np.nan)) == (None, None)
    assert interval(np.array([1.0, np.nan, 1.0])) == (1.0, 1.0)


@pytest.mark.parametrize("setting", [{"margin": -0.1}, {"margin": math.nan}, {"conf": 1.5}, {"replicates": 0}])
def test_settings_out_of_range_are_refused(setting: dict[str, Any]) -> None:
    truths, found = scene(0, images=2)
    with pytest.raises(RecipeError, match=next(iter(setting))):
        compare(truths, found, found, NAMES, **setting)


@pytest.mark.fault(66)
def test_without_truths_there_is_nothing_to_compare_by() -> None:
    truths, found = scene(0, images=2)
    with pytest.raises(DataError, match="no ground truth in 2 images"):
        compare([rows[:0] for rows in truths], found, found, NAMES)
    with pytest.raises(DataError, match="1 names"):
        compare([np.array([[2, 0, 0, 9, 9]])] * 2, found, found, NAMES[:1])
    with pytest.raises(ValueError, match="but 1 sets"):
        compare(truths, found, found[:1], NAMES)


@pytest.mark.fault(66)
@pytest.mark.parametrize("images", [1, 9])
def test_of_too_few_images_nothing_is_decided(images: int) -> None:
    """One image resampled is the same image: an interval without width is no certainty."""
    truth = np.array([[0, 10, 10, 50, 50]], np.float64)
    found = np.array([[10, 10, 50, 50, 0.9, 0]], np.float64)
    empty = [np.zeros((0, 5))] * 20
    said = compare(
        [*[truth] * images, *empty],
        [*[found] * images, *[np.zeros((0, 6))] * 20],
        [*[found] * images, *[np.zeros((0, 6))] * 20],
        ["a"],
        replicates=20,
    )
    assert said["verdict"]["status"] == "inconclusive"
    assert (
        f"; {images} image{'s' * (images > 1)} with objects, an interval needs at least 10" in said["verdict"]["line"]
    )
    enough = compare([truth] * 10, [found] * 10, [found] * 10, ["a"], replicates=20)
    assert enough["verdict"]["status"] == "pass"
