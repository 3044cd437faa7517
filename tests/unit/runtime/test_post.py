"""NMS is Ultralytics', box for box; `to_image` undoes the letterbox."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision  # noqa: F401  ultralytics takes its NMS where it is imported

from yolo_compress.nets.hardening import harden
from yolo_compress.runtime.detect.post import EVERY_BOX, MAX_CANDIDATES, nms, to_image
from yolo_compress.runtime.detect.pre import Letterbox, letterbox


def output(classes: int, anchors: int, seed: int, crowd: float = 60.0, rounded: bool = False) -> np.ndarray:
    """Clustered boxes (so that many overlap) and scores of which some tie."""
    generator = np.random.default_rng(seed)
    centre = generator.integers(0, 5, (2, anchors)) * 120 + generator.normal(0, crowd, (2, anchors))
    size = np.abs(generator.normal(80, 40, (2, anchors)))
    scores = generator.random((classes, anchors)) ** 4
    if rounded:
        scores, centre, size = np.round(scores, 2), np.round(centre, -1), np.round(size, -1)
    return np.concatenate([centre, size, scores]).astype(np.float32)


def by_ultralytics(out_CA: np.ndarray, conf: float, iou: float, max_det: int, multi_label: bool) -> np.ndarray:
    harden()
    from ultralytics.utils.nms import non_max_suppression

    found = non_max_suppression(
        torch.from_numpy(out_CA.copy())[None], conf, iou, multi_label=multi_label, max_det=max_det, max_time_img=60.0
    )
    return found[0].numpy()


@pytest.mark.parametrize(
    ("classes", "anchors", "conf", "iou", "max_det", "multi_label"),
    [
        (3, 1000, 0.001, 0.7, 300, True),
        (80, 60, 0.001, 0.7, 300, True),
        (1, 2000, 0.001, 0.7, 300, True),
        (5, 1000, 0.25, 0.45, 300, False),
        (5, 1000, 0.25, 0.45, 10, True),
        (3, 700, 0.001, 0.5, 5000, True),
        (4, 500, 0.999, 0.7, 300, True),
    ],
)
@pytest.mark.parametrize("rounded", [False, True])
def test_nms_equals_ultralytics(
    classes: int, anchors: int, conf: float, iou: float, max_det: int, multi_label: bool, rounded: bool
) -> None:
    for seed in range(3):
        out_CA = output(classes, anchors, seed, rounded=rounded)
        expected = by_ultralytics(out_CA, conf, iou, max_det, multi_label)
        found = nms(out_CA, conf, iou, max_det, multi_label)
        assert found.dtype == np.float32 and found.shape == expected.shape
        assert np.array_equal(found[:, 4:], expected[:, 4:]), "scores and classes, in order"
        assert np.array_equal(found[:, :4], expected[:, :4])


@pytest.mark.parametrize(
    ("classes", "anchors", "conf", "max_det"), [(3, 1000, 0.001, 300), (1, 500, 0.3, 20), (80, 400, 0.5, 300)]
)
def test_every_box_is_ultralytics_end_to_end_output(classes: int, anchors: int, conf: float, max_det: int) -> None:
    harden()
    from ultralytics.nn.modules import Detect
    from ultralytics.utils.nms import non_max_suppression

    head = Detect(classes, 1, True, (16, 16, 16))
    head.max_det = max_det
    for seed in range(3):
        out_CA = output(classes, anchors, seed)
        found = nms(out_CA, conf, EVERY_BOX, max_det, multi_label=True)
        corners = np.concatenate([out_CA[:2] - out_CA[2:4] / 2, out_CA[:2] + out_CA[2:4] / 2, out_CA[4:]])
        best = head.postprocess(torch.from_numpy(corners.T[None].copy()))
        expected = non_max_suppression(best, conf, max_det=max_det, end2end=True)[0].numpy()
        assert len(found) and np.array_equal(found, expected)
        one = nms(out_CA, conf, EVERY_BOX, max_det, multi_label=False)
        assert len({tuple(row) for row in one[:, :4].tolist()}) == len(one), "a box has only its best class"


def test_no_more_than_ultralytics_candidates_are_looked_at() -> None:
    out_CA = output(16, 2000, 0)  # 32 000 candidates
    out_CA[4:] += np.float32(0.01)
    assert out_CA[4:].size > MAX_CANDIDATES
    expected = by_ultralytics(out_CA, 0.001, 0.9, 300, True)
    assert np.array_equal(nms(out_CA, 0.001, 0.9, 300, True), expected)


def test_suppression_stays_within_a_class() -> None:
    box = [[10, 10], [10, 10], [8, 8], [8, 8]]
    together = np.array([*box, [0.9, 0.8], [0.0, 0.0]], np.float32)
    apart = np.array([*box, [0.9, 0.0], [0.0, 0.8]], np.float32)
    assert nms(together)[:, 4:].tolist() == [[np.float32(0.9), 0]]
    assert nms(apart)[:, 4:].tolist() == [[np.float32(0.9), 0], [np.float32(0.8), 1]]
    assert nms(apart)[0, :4].tolist() == [6, 6, 14, 14], "corners of centre and size"


def test_nothing_above_the_threshold() -> None:
    assert nms(np.zeros((7, 20), np.float32)).shape == (0, 6)


def test_an_output_is_one_images() -> None:
    with pytest.raises(ValueError, match="one image"):
        nms(np.zeros((1, 7, 20), np.float32))


@pytest.mark.parametrize("shape", [(480, 640), (33, 200), (641, 333), (96, 96), (20, 30)])
@pytest.mark.parametrize("imgsz", [(96, 96), (64, 128)])
def test_to_image_undoes_the_letterbox(shape: tuple[int, int], imgsz: tuple[int, int]) -> None:
    height, width = shape
    _, placed = letterbox(np.zeros((height, width, 3), np.uint8), imgsz)
    original = np.array([[1, 2, width - 3, height - 4, 0.5, 1], [0, 0, width, height, 0.25, 0]], np.float32)
    boxed = original.copy()
    boxed[:, [0, 2]] = boxed[:, [0, 2]] * placed.ratio[1] + placed.pad_left
    boxed[:, [1, 3]] = boxed[:, [1, 3]] * placed.ratio[0] + placed.pad_top
    before = boxed.copy()
    assert np.allclose(to_image(boxed, placed), original, atol=1e-3 * max(shape) / 10)
    assert np.array_equal(boxed, before), "a new array"


def test_boxes_land_on_the_object_that_was_drawn() -> None:
    image = np.zeros((300, 500, 3), np.uint8)
    image[100:200, 250:400] = 255
    chw, placed = letterbox(image, (160, 160))
    rows, columns = np.nonzero(chw[0] > 0.9)
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1, 1, 0]
    found = to_image(np.array([box], np.float32), placed)[0, :4]
    assert np.abs(found - [250, 100, 400, 200]).max() < 2 / placed.ratio[0]


def test_boxes_are_clipped_to_the_image() -> None:
    placed = Letterbox((0.5, 0.5), 0, 16, 64, 128)
    found = to_image(np.array([[-20, -20, 90, 90, 0.5, 2]], np.float32), placed)
    assert found.tolist() == [[0, 0, 128, 64, 0.5, 2]]
