"""The gain of an image, the fit of a router, the choice of its threshold and the verdict, against known answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from yolo_compress.evaluate.cascade.choose import choose
from yolo_compress.evaluate.cascade.gain import Mixes, gains
from yolo_compress.evaluate.cascade.judge import Measured, control, judge
from yolo_compress.evaluate.cascade.router import fit
from yolo_compress.evaluate.cascade.schema import Demand
from yolo_compress.evaluate.cascade.timed_images import timed_images
from yolo_compress.runtime.measure.cascade_latency import split_latency, weighted_percentile
from yolo_compress.runtime.measure.coco_map import mean_ap

IMAGES, SMALL_MS, LARGE_MS = 60, 2.0, 10.0
FREE: Demand = {"latency_ms": None, "max_drop": None}
Scene = tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]


def scene(hard: np.ndarray, seed: int = 0) -> Scene:
    """Truths of two classes, and the detections of a small model, which misses the object of a hard image, and of a perfect one."""
    generator = np.random.default_rng(seed)
    truths, small, large = [], [], []
    for index, is_hard in enumerate(hard):
        corner = generator.uniform(0, 50, 2)
        box = np.array([*corner, *(corner + 30)])
        truths.append(np.array([[index % 2, *box]]))
        score = generator.uniform(0.5, 0.9)
        large.append(np.array([[*box, score, index % 2]]))
        small.append(np.array([[*(box + (40 if is_hard else 0)), score, index % 2]]))
    return truths, small, large


def every(hard_share: float) -> np.ndarray:
    return np.arange(IMAGES) % 10 < 10 * hard_share


def test_the_map_of_a_mix_is_that_of_its_detections() -> None:
    truths, small, large = scene(every(0.4))
    mixes = Mixes.of(truths, small, large, 2)
    masks = np.random.default_rng(1).random((6, IMAGES)) < np.array([0, 0.2, 0.5, 0.7, 0.9, 1.1])[:, None]
    for mask, value in zip(masks, mixes.map50_95(masks), strict=True):
        mixed = [b if takes else a for a, b, takes in zip(small, large, mask, strict=True)]
        assert value == pytest.approx(mean_ap(truths, mixed, ("a", "b"))["map50_95"], abs=1e-12)
    weights = np.random.default_rng(2).integers(0, 3, (1, IMAGES))
    repeated = [i for i in range(IMAGES) for _ in range(weights[0, i])]
    mixed = [large[i] if masks[2, i] else small[i] for i in repeated]
    expected = mean_ap([truths[i] for i in repeated], mixed, ("a", "b"))["map50_95"]
    assert mixes.map50_95(masks[2:3], weights)[0] == pytest.approx(expected, abs=1e-12)


def test_only_images_that_the_large_model_mends_gain() -> None:
    hard = every(0.3)
    truths, small, large = scene(hard)
    gain = gains(Mixes.of(truths, small, large, 2))
    assert np.abs(gain[~hard]).max() == 0 and gain[hard].min() > 0
    worse = gains(Mixes.of(truths, large, small, 2))
    assert np.allclose(worse, -gain, atol=1e-12), "with the models exchanged every change has the other sign"


def test_a_known_linear_gain_is_fitted_and_noise_is_not() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(3, [1, 5, 0.1, 1, 1], (200, 5))
    features[:, 4] = 7  # never varies
    gain = 0.02 * features[:, 0] - 0.001 * features[:, 1] + 0.3
    found = fit(features, gain)
    assert found.penalty is not None and found.explained > 0.95 and found.weights_F[4] == 0
    assert np.corrcoef(found.predict(features), gain)[0, 1] > 0.99
    assert np.corrcoef(found.held_out_I, gain)[0, 1] > 0.98
    useless = 0
    for seed in range(20):
        noise = fit(
            np.random.default_rng(seed).normal(0, 1, (60, 5)), np.random.default_rng(99 + seed).normal(0, 1, 60)
        )
        useless += noise.penalty is None
        assert noise.explained < 0.3
    assert useless >= 10, "for most noise the mean is the better predictor"
    with pytest.raises(ValueError, match="4 images, at least 5"):
        fit(features[:4], gain[:4])


def test_one_outlier_does_not_decide() -> None:
    features = np.linspace(0, 1, 100)[:, None]
    gain = 0.01 * features[:, 0]
    gain[3] = 50.0  # an image of a rare class
    found = fit(features, gain)
    assert found.penalty is not None and found.weights_F[0] > 0


def fitted(hard: np.ndarray) -> tuple[Any, np.ndarray, Mixes]:
    mixes = Mixes.of(*scene(hard), 2)
    features = np.column_stack([hard + np.linspace(0, 0.1, IMAGES), np.zeros(IMAGES)])
    return fit(features, gains(mixes)), features, mixes


def test_the_threshold_meets_what_is_asked() -> None:
    router, features, mixes = fitted(every(0.3))
    for latency in (3.0, 4.0):
        choice = choose(router, features, mixes, SMALL_MS, LARGE_MS, {**FREE, "latency_ms": latency})
        assert choice is not None
        assert SMALL_MS + choice.share * LARGE_MS <= latency < SMALL_MS + (choice.share + 0.05) * LARGE_MS
        assert (router.predict(features) > choice.threshold).mean() == pytest.approx(choice.share)
    choice = choose(router, features, mixes, SMALL_MS, LARGE_MS, {**FREE, "latency_ms": 9.9})
    assert choice is not None and choice.share == pytest.approx(0.3, abs=0.02), "the easy images gain nothing"
    assert choice.map50_95 == pytest.approx(mixes.map50_95(np.ones((1, IMAGES), bool))[0])
    choice = choose(router, features, mixes, SMALL_MS, LARGE_MS, FREE)
    assert choice is not None and choice.share == pytest.approx(0.3, abs=0.02) and choice.map50_95 > 0.99
    choice = choose(router, features, mixes, SMALL_MS, LARGE_MS, {**FREE, "latency_ms": 2.01})
    assert choice is None, "one image alone costs more"


def test_max_drop_is_met_on_other_images() -> None:
    met = 0
    for seed in range(10):
        generator = np.random.default_rng(seed)
        drawn = [generator.random(2 * IMAGES) < 0.3 for _ in range(2)]
        # a noisy sign of a hard image, so that some hard images look easy
        seen = [(hard + generator.normal(0, 0.35, len(hard)))[:, None] for hard in drawn]
        mixes = [Mixes.of(*scene(hard, seed), 2) for hard in drawn]
        router = fit(seen[0], gains(mixes[0]), seed)
        choice = choose(router, seen[0], mixes[0], SMALL_MS, LARGE_MS, {**FREE, "max_drop": 0.1}, seed)
        if choice is None:
            continue
        handed = router.predict(seen[1]) > choice.threshold
        assert handed.mean() < 1
        met += bool(mixes[1].map50_95(handed[None])[0] >= 0.9)
        assert choice.map50_95 >= 0.9
    assert met >= 7


def test_a_router_without_weights_gives_no_threshold() -> None:
    mixes = Mixes.of(*scene(every(0.3)), 2)
    features = np.zeros((IMAGES, 2))
    router = fit(features, gains(mixes))
    assert router.penalty is None and not router.weights_F.any()
    assert choose(router, features, mixes, SMALL_MS, LARGE_MS, FREE) is None


def measured(value: float, ms: float, spread: float = 0.001, seed: int = 0) -> Measured:
    return Measured(value, value + np.random.default_rng(seed).normal(0, spread, 500), ms)


def test_the_control_is_the_best_static_choice() -> None:
    models = {"small": measured(0.5, 2), "large": measured(0.6, 10)}
    found, replicates = control(models, 4)
    assert found["map50_95"] == pytest.approx(0.525) and found["label"] == "small with large for any 25% of the images"
    assert np.allclose(replicates, 0.75 * models["small"].map50_95_B + 0.25 * models["large"].map50_95_B)
    assert control(models, 10)[0]["label"] == control(models, 12)[0]["label"] == "large alone"
    models["static"] = measured(0.59, 3.9)
    found, _ = control(models, 4)
    assert found["label"].startswith("static with large") and found["map50_95"] > 0.59
    assert control({**models, "static": measured(0.59, 4.0)}, 4)[0] == {"label": "static alone", "map50_95": 0.59}
    assert control({**models, "large": measured(0.4, 10)}, 2.5)[0]["map50_95"] > 0.5, "small with static"


@pytest.mark.parametrize(
    ("cascade", "demand", "status", "instead", "says"),
    [
        (measured(0.58, 4, 0.002, 1), FREE, "pass", "small", "PASS: use the cascade: mAP50-95 0.580 at 4.00 ms; small with"),
        (measured(0.52, 4, 0.002, 1), FREE, "fail", "small", "a static choice is as good as the cascade"),
        (measured(0.53, 4, 0.02, 1), FREE, "inconclusive", "small", "these images cannot show that the cascade"),
        (measured(0.58, 4, 0.002, 1), {**FREE, "latency_ms": 3.9}, "pass", "small", "PASS"),
        (measured(0.58, 4, 0.002, 1), {**FREE, "latency_ms": 3.5}, "fail", "small", "misses latency_ms=3.5"),
        (measured(0.58, 4, 0.002, 1), {**FREE, "max_drop": 0.01}, "fail", "large", "misses max_drop=0.01"),
        (measured(0.58, 4, 0.002, 1), {**FREE, "max_drop": 0.05}, "pass", "large", "PASS"),
        (measured(0.59, 11, 0.002, 1), FREE, "fail", "large", "large alone has mAP50-95 0.600 at that mean latency"),
        (None, FREE, "fail", "large", "because"),
        (None, {**FREE, "latency_ms": 5.0}, "fail", "small", "because"),
        (None, {**FREE, "max_drop": 0.2}, "fail", "small", "because"),
    ],
)  # fmt: skip
def test_a_cascade_that_does_not_win_is_not_recommended(
    cascade: Measured | None, demand: Demand, status: str, instead: str, says: str
) -> None:
    models = {"small": measured(0.5, 2), "large": measured(0.6, 10)}
    verdict, _ = judge(models, cascade, demand, "because")
    assert verdict["status"] == status and verdict["instead"] == instead and says in verdict["line"], verdict["line"]
    assert (f"use {instead} alone" in verdict["line"]) == (status != "pass")


def test_the_mean_latency_counts_each_kind_of_image_by_its_share() -> None:
    handed = np.array([False, True, False])
    rounds = [[1.0, 5.0, 3.0, 1.0, 5.0, 3.0], [2.0, 6.0, 2.0]]
    split = split_latency(rounds, handed, 0.1)
    assert split.kept_ms == pytest.approx((1 + 3 + 1 + 3 + 2 + 2) / 6) and split.handed_ms == pytest.approx(16 / 3)
    assert split.mean_ms == pytest.approx(0.9 * 2 + 0.1 * 16 / 3)
    assert split_latency([[1.0, 3.0]], np.array([False, False]), 0.0) == (2.0, 2.0, None)
    with pytest.raises(ValueError, match="only one kind of image was timed"):
        split_latency([[1.0, 3.0]], np.array([False, False]), 0.1)


def test_percentiles_count_each_kind_of_image_by_its_share() -> None:
    """As many samples of each kind, but 3 of 100 images are hard: the percentiles are those of 97 easy and 3 hard images."""
    handed = np.array([False, True])
    easy, hard = np.linspace(1, 2, 100), np.linspace(10, 20, 100)
    rounds = [np.ravel([easy, hard], order="F").tolist()]
    for percent in (1, 50, 96, 98, 99, 100):
        expected = np.sort([*np.repeat(easy, 97), *np.repeat(hard, 3)])[int(np.ceil(percent * 100)) - 1]
        assert weighted_percentile(rounds, handed, 0.03, percent) == expected, percent
    assert weighted_percentile(rounds, handed, 0.0, 99) == easy[98]
    assert weighted_percentile(rounds, handed, 1.0, 50) == hard[49]


@pytest.mark.parametrize(("handed", "count"), [(0, 0), (1, 1), (50, 5), (999, 9), (1000, 10)])
def test_timed_images_have_both_kinds_in_their_shares(handed: int, count: int) -> None:
    mask = np.arange(1000) < handed
    chosen = timed_images(mask, 10) if handed != 50 else timed_images(mask, 100)
    assert len(set(chosen)) == (100 if handed == 50 else 10) and mask[chosen].sum() == count
    assert timed_images(mask, 5000) == list(range(1000))
