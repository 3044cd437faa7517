"""One accuracy path for every backend: what it refuses, what it counts, and that it is Ultralytics' on real images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from tests.support.given import find
from yolo_compress.data.dataset import load
from yolo_compress.errors import DataError, EnvironmentLacks, NumericsError, RecipeError
from yolo_compress.evaluate import accuracy as accuracy_module
from yolo_compress.evaluate.accuracy import accuracy
from yolo_compress.evaluate.backend_difference import max_abs_difference
from yolo_compress.evaluate.torch_backend import TorchBackend
from yolo_compress.evaluate.ultralytics_ap import ultralytics_ap
from yolo_compress.runtime.detect.detector import Detector
from yolo_compress.runtime.detect.pre import read_image
from yolo_compress.train import checkpoint, validate

NAMES = ("bolt", "nut")
IMGSZ = (64, 64)


@dataclass(frozen=True)
class Sample:
    image: Path
    width: int
    height: int
    boxes: tuple[tuple[int, float, float, float, float], ...]


class Drawn:
    """Sees a white rectangle on black as a bolt: the images' truth, read from their pixels."""

    needs_nms = True

    def __init__(self, batch: int | None = 1, change: Callable[[np.ndarray], None] = lambda out: None) -> None:
        self.names, self.imgsz, self.precision, self.executed = NAMES, IMGSZ, "fp32", "by hand"
        self.batch, self.channels, self.change, self.shapes = batch, 3, change, list[tuple[int, ...]]()

    def __call__(self, images_BCHW: np.ndarray, copy: bool = True) -> np.ndarray:
        self.shapes.append(images_BCHW.shape)
        output = np.zeros((len(images_BCHW), 6, 5), np.float32)
        for index, image in enumerate(images_BCHW):
            rows, columns = np.nonzero(image[0] > 0.9)
            if not len(rows):  # the rest of a fixed batch
                continue
            left, right, top, bottom = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
            output[index, :5, 2] = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top, 0.9
        self.change(output)
        return output


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder, made = tmp_path_factory.mktemp("images"), []
    for index in range(7):
        canvas = np.zeros((64 + 64 * (index % 2), 128, 3), np.uint8)
        x1, y1, x2, y2 = 16 + 4 * index, 20, 80 + 4 * index, 52
        canvas[y1:y2, x1:x2] = 255
        height, width = canvas.shape[:2]
        box = (0, (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        PIL.Image.fromarray(canvas).save(folder / f"{index}.png")
        made.append(Sample(folder / f"{index}.png", width, height, (box,)))
    return made


@pytest.mark.parametrize(("batch", "shapes"), [(1, [1] * 7), (3, [3, 3, 3]), (None, [4, 3])])
def test_every_image_counts_once_whatever_the_batch(
    batch: int | None, shapes: list[int], samples: list[Sample]
) -> None:
    backend, steps = Drawn(batch), list[int]()
    result = accuracy(backend, samples, NAMES, IMGSZ, steps.append, image_set="abc")  # type: ignore[arg-type]
    assert [shape[0] for shape in backend.shapes] == shapes and sum(steps) == 7
    assert result["map50_95"] == pytest.approx(1.0)
    assert (result["images"], result["image_set"], result["executed"]) == (7, "abc", "by hand")
    for sample, found in zip(samples, result["detections"], strict=True):
        _, x, y, w, h = sample.boxes[0]
        assert found.shape == (1, 6) and found[0, 4:].tolist() == [np.float32(0.9), 0]
        assert found[0, :4] == pytest.approx(
            np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2]) * ([sample.width, sample.height] * 2), abs=1e-3
        )


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("batch", [1, 3, None])
def test_reading_ahead_changes_nothing(
    cores: int, batch: int | None, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy_module, "usable_cpus", lambda: cores)
    ahead = accuracy(Drawn(batch), samples * 5, NAMES, IMGSZ)["detections"]  # type: ignore[arg-type]
    one = Detector(Drawn(batch))  # type: ignore[arg-type]
    for sample, found in zip(samples * 5, ahead, strict=True):
        assert np.array_equal(found, one(read_image(sample.image)))


@pytest.mark.fault(65)
def test_a_backend_of_other_classes_or_size_is_refused(samples: list[Sample]) -> None:
    backend = Drawn()
    with pytest.raises(RecipeError, match=r"\['bolt', 'nut'\], the data set's \['nut', 'bolt'\]"):
        accuracy(backend, samples, NAMES[::-1], IMGSZ)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"takes \[64, 64\] px, imgsz is \[64, 96\]"):
        accuracy(backend, samples, NAMES, (64, 96))  # type: ignore[arg-type]
    assert not backend.shapes, "before anything runs"


@pytest.mark.fault(64)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_output_that_is_not_finite_is_an_error_that_names_the_image(value: float, samples: list[Sample]) -> None:
    calls = [0]

    def third(output: np.ndarray) -> None:
        calls[0] += 1
        if calls[0] == 3:
            output[0, 1, 4] = value

    with pytest.raises(NumericsError, match=r"2\.png: .*NaN or infinity"):
        accuracy(Drawn(change=third), samples, NAMES, IMGSZ)  # type: ignore[arg-type]


def test_images_that_changed_since_preflight_are_errors(samples: list[Sample], tmp_path: Path) -> None:
    other = Sample(samples[0].image, 127, 64, samples[0].boxes)
    with pytest.raises(DataError, match=r"0\.png: 128x64 px, 127x64 at preflight"):
        accuracy(Drawn(), [*samples, other], NAMES, IMGSZ)  # type: ignore[arg-type]
    absent = Sample(tmp_path / "gone.png", 128, 64, samples[0].boxes)
    with pytest.raises(DataError, match=r"gone\.png"):
        accuracy(Drawn(), [*samples, absent], NAMES, IMGSZ)  # type: ignore[arg-type]


def test_a_detector_takes_an_image_to_its_own_pixels(samples: list[Sample]) -> None:
    image = np.asarray(PIL.Image.open(samples[1].image))
    found = Detector(Drawn())(image)  # type: ignore[arg-type]
    assert found[0, :4] == pytest.approx([20, 20, 84, 52], abs=1e-3)
    assert Detector(Drawn(), conf=0.95)(image).shape == (0, 6)  # type: ignore[arg-type]
    assert Detector(Drawn()).detect([]) == []  # type: ignore[arg-type]


def test_the_padding_of_the_last_batch_is_not_reported() -> None:
    image = np.zeros((*IMGSZ, 3), np.uint8)
    image[8:24, 8:24] = 255
    backend = Drawn(batch=4)
    found = Detector(backend).detect([image] * 5)  # type: ignore[arg-type]
    assert len(found) == 5 and [shape[0] for shape in backend.shapes] == [4, 4]


# ---- the torch backend


@pytest.fixture(scope="module")
def model() -> Any:
    return checkpoint.new_model("yolov8n.yaml", NAMES, 3, seed=0)


def test_torch_is_run_as_a_copy_in_eval_mode(model: Any) -> None:
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    image = np.random.default_rng(0).random((2, 3, *IMGSZ), dtype=np.float32)
    with TorchBackend(model, NAMES, IMGSZ) as backend:
        output = backend(image)
        backend.bind(image)()
        assert (backend.batch, backend.executed, backend.precision) == (None, "fp32", "fp32")
        assert max_abs_difference(backend, backend, image) == {"scores": 0.0, "boxes_px": 0.0, "images": 2.0}
    assert output.shape == (2, 6, 84) and output.dtype == np.float32
    assert model.training and all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_fp32_on_a_gpu_is_not_tf32(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    hook = model.eval().register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    with TorchBackend(model, NAMES, IMGSZ) as backend:
        image = np.zeros((1, 3, *IMGSZ), np.float32)
        backend(image)
        backend.bind(image)()
        backend._device = torch.device("cuda:0")
        assert backend.executed == "fp32 (cuda:0)"
    hook.remove()
    assert seen == [False, False] and torch.backends.cudnn.allow_tf32


@pytest.mark.gpu
def test_fp32_on_a_gpu_is_that_of_the_cpu(model: Any) -> None:
    image = np.random.default_rng(0).random((2, 3, *IMGSZ), dtype=np.float32)
    with TorchBackend(model, NAMES, IMGSZ) as cpu, TorchBackend(model, NAMES, IMGSZ, device="cuda:0") as gpu:
        assert gpu.executed == "fp32 (cuda:0)"
        found = max_abs_difference(cpu, gpu, image)
    assert found["scores"] < 1e-5 and found["boxes_px"] < 1e-2, "TF32 differs by 1e-3 and more"


def test_torch_refuses_what_it_has_not(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="precision 'int8'"):
        TorchBackend(model, NAMES, IMGSZ, precision="int8")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(EnvironmentLacks, match="device cuda:0"):
        TorchBackend(model, NAMES, IMGSZ, device="cuda:0")
    with (
        TorchBackend(model, ("a", "b", "c"), IMGSZ) as backend,
        pytest.raises(RecipeError, match=r"returns \[1, 6, 84\], expected \[B, 7, anchors\]"),
    ):
        backend(np.zeros((1, 3, *IMGSZ), np.float32))


def test_comparing_wants_finite_outputs_of_one_shape_and_an_image() -> None:
    image = np.zeros((3, *IMGSZ), np.float32)
    image[:, 8:24, 8:24] = 1

    def broken(output: np.ndarray) -> None:
        output[0, 0, 0] = np.nan

    def moved(output: np.ndarray) -> None:
        output[0, 1, 2] += 3
        output[0, 5, 0] += 0.25

    same, other, bad = Drawn(), Drawn(change=moved), Drawn(change=broken)
    assert max_abs_difference(same, other, [image]) == {"scores": 0.25, "boxes_px": 3.0, "images": 1.0}  # type: ignore[arg-type]
    with pytest.raises(NumericsError, match="NaN or infinity"):
        max_abs_difference(same, bad, [image])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no images"):
        max_abs_difference(same, other, [])  # type: ignore[arg-type]


# ---- real images

BCCD_PX = 320  # the checkpoint was trained at that


@pytest.mark.real
def test_bccd_is_what_pycocotools_and_ultralytics_say() -> None:
    """pycocotools 0.6136 at 320 px; Ultralytics' AP of our detections is what its own validator prints, within 0.002."""
    dataset = load(str(find("YOLO_COMPRESS_DATA", "bccd.yaml")))
    model = checkpoint.load_model(find("YOLO_COMPRESS_WEIGHTS", "yolov8n_bccd.pt"))
    size = BCCD_PX
    with TorchBackend(model, dataset.names, (size, size)) as backend:
        ours = accuracy(backend, dataset.val, dataset.names, (size, size))
    theirs = ultralytics_ap(dataset.val, ours["detections"], dataset.names)
    printed = validate.validate(model, dataset, size, rect=False)
    figures = (
        f"pycocotools {ours['map50_95']:.4f}, ultralytics_ap {theirs['map50_95']:.4f}, val {printed['map50_95']:.4f}"
    )
    assert theirs["map50_95"] == pytest.approx(printed["map50_95"], abs=0.002), figures
    assert theirs["map50"] == pytest.approx(printed["map50"], abs=0.002), figures
    assert ours["map50_95"] == pytest.approx(0.6136, abs=5e-4), figures
    print(figures)
