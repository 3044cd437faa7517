"""Zeros through the real training loop, under fake quantisers and in every file: exactly 0.0, and the others do train."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from torch import Tensor, nn

from tests.support.noise_set import noise_set
from tests.support.quant_net import NAMES, SIZE, images, net
from yolo_compress.data.dataset import Dataset, load
from yolo_compress.export.float_onnx import export_onnx
from yolo_compress.export.fp16 import to_fp16
from yolo_compress.export.qdq import FORMS, insert_qdq
from yolo_compress.prune.masks import HoldZeros, apply, two_four, unstructured
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.fakequant import FakeQuant
from yolo_compress.quant.ranges import fold
from yolo_compress.report.zeros import zeros_note
from yolo_compress.train import trainer
from yolo_compress.train.hook import TrainHook
from yolo_compress.train.settings import TrainSettings

SLOW = pytest.mark.slow
KINDS = {"two_four": two_four, "unstructured": partial(unstructured, sparsity=0.7, scope="global")}


def sparse(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    model = net()
    masks = KINDS[kind](model)
    apply(model, masks)
    return model, masks


def weight(model: nn.Module, name: str) -> Tensor:
    """The trained parameter; a fake-quantising convolution has another one behind the attribute while it computes."""
    return model.get_submodule(name)._parameters["weight"].detach()


def moved(model: nn.Module, masks: dict[str, Tensor]) -> list[str]:
    """Convolutions of which a masked weight is not exactly zero."""
    return [name for name, mask in masks.items() if bool(weight(model, name)[~mask].any())]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load(str(noise_set(tmp_path_factory.mktemp("set"), train=4, val=4, names=NAMES, size_hw=(64, 64))))


class Last(TrainHook):
    """Keeps the weights that the optimizer left, beside the EMA that `train` returns."""

    model: nn.Module

    def on_end(self, model: nn.Module) -> None:
        self.model = deepcopy(model).cpu()


def trained(
    dataset: Dataset, work: Path, model: nn.Module, hooks: list[TrainHook], optimizer: str = "SGD"
) -> tuple[nn.Module, nn.Module]:
    """The EMA and the model after four steps."""
    model.names = dict(enumerate(NAMES))
    settings = TrainSettings(
        epochs=1,
        batch=1,
        imgsz_px=64,
        optimizer=optimizer,
        lr0=1e-2,
        momentum=0.9,
        weight_decay=0.1,
        warmup_epochs=0.0,
    )
    last = Last()
    ema = trainer.train(model, dataset, settings, [*hooks, last], work, "t")
    return ema, last.model


@pytest.mark.parametrize("optimizer", ["SGD", *(pytest.param(name, marks=SLOW) for name in ("AdamW", "Adam"))])
@pytest.mark.slow
def test_zeros_stay_and_the_others_move(dataset: Dataset, tmp_path: Path, optimizer: str) -> None:
    model, masks = sparse("unstructured")
    before = deepcopy(model)
    for after in trained(dataset, tmp_path, model, [HoldZeros()], optimizer):
        assert moved(after, masks) == []
        for name, mask in masks.items():
            changed = weight(after, name) != weight(before, name)
            assert float(changed[mask].float().mean()) > 0.9, name


@SLOW
def test_without_the_hook_zeros_are_lost(dataset: Dataset, tmp_path: Path) -> None:
    model, masks = sparse("two_four")
    ema, last = trained(dataset, tmp_path, model, [])
    assert len(moved(ema, masks)) == len(moved(last, masks)) == len(masks)


@SLOW
def test_fake_quantisers_keep_zeros(dataset: Dataset, tmp_path: Path) -> None:
    model, masks = sparse("two_four")
    before = deepcopy(model)
    calibrate = partial(ptq, batches=lambda: [images(4)], method="max")
    quantiser = FakeQuant(calibrate, calibrate(model))
    ema, last = trained(dataset, tmp_path, model, [quantiser, HoldZeros()])  # the order of `stages._training.fit`
    assert moved(ema, masks) == moved(last, masks) == []
    for name, mask in masks.items():
        codes = last.get_submodule(name).weight_quantizer(weight(last, name))  # `last` is still attached
        assert not bool(codes[~mask].any()), name
        changed = weight(last, name) != weight(before, name)
        assert float(changed[mask].float().mean()) > 0.9, f"{name}: rounding to zero must not freeze a weight"


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {item.name: numpy_helper.to_array(item) for item in onnx.load(str(path)).graph.initializer}


@pytest.mark.parametrize("kind", ["two_four", pytest.param("unstructured", marks=SLOW)])
def test_every_file_holds_true_zeros(tmp_path: Path, kind: str) -> None:
    model, masks = sparse(kind)
    floats = tmp_path / "fp32.onnx"
    export_onnx(model, floats, SIZE, names=NAMES)
    to_fp16(floats, tmp_path / "fp16.onnx")
    state = fold(ptq(model, lambda: [images(4)], "max"), model)
    for target in FORMS:
        insert_qdq(floats, tmp_path / f"{target}.onnx", state, target)
    stored, halves = initializers(floats), initializers(tmp_path / "fp16.onnx")
    codes = [initializers(tmp_path / f"{target}.onnx") for target in FORMS]
    for name, mask in masks.items():
        gone = ~mask.numpy()
        assert np.array_equal(stored[f"{name}.weight"] == 0, gone), f"{name}: folding makes no zeros and loses none"
        assert not halves[f"{name}.weight_fp16"][gone].any(), name
        assert not any(part[f"{name}.weight_quantized"][gone].any() for part in codes), name


def test_two_four_is_what_tensorrt_checks(tmp_path: Path) -> None:
    """The loop of TensorRT's developer guide ("Sparsity"), over the file that it reads."""
    model, masks = sparse("two_four")
    export_onnx(model, tmp_path / "a.onnx", SIZE, names=NAMES)
    stored = initializers(tmp_path / "a.onnx")
    for name in masks:
        kernel_KCRS = stored[f"{name}.weight"]
        for r in range(kernel_KCRS.shape[2]):
            for s in range(kernel_KCRS.shape[3]):
                for c in range(kernel_KCRS.shape[1] // 4):
                    nonzero_K = np.count_nonzero(kernel_KCRS[:, 4 * c : 4 * c + 4, r, s], axis=1)
                    assert (nonzero_K == 2).all(), name


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_report_says_what_each_runtime_makes_of_the_zeros(kind: str) -> None:
    said = zeros_note(kind, 0.4981)
    assert [line.split(maxsplit=1)[0] for line in said] == ["49.8%", "ONNX", "OpenVINO", "TensorRT"]
    assert all("as dense" in line for line in said[1:3])
    assert ("SPARSE_WEIGHTS" in said[3]) == (kind == "two_four")
