"""Compute the detection loss on labelled images without augmentation. Pruning criteria use the gradients of this loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from ultralytics.cfg import get_cfg

from yolo_compress.data.dataset import Dataset, Sample
from yolo_compress.nets.eval_mode import evaluating
from yolo_compress.train.dataset import PreflightDataset


def losses(
    model: nn.Module, dataset: Dataset, samples: Sequence[Sample], imgsz_px: int, batch: int = 4
) -> Iterator[Tensor]:
    """Yield the detection loss of each batch, with gradient: the sum of the box, class and DFL terms, as mean over the images.

    An end-to-end head has such a loss for each of its branches. They have the weights of the first epoch (`detect.branch_weights`).

    Args:
        model: Stock detector, run in evaluation mode, so BatchNorm statistics do not change. `args` and `criterion` are restored.
        dataset: The data set of the samples.
        samples: Images and labels. Images are letterboxed to a square.
        imgsz_px: Side of the square.
        batch: Images per loss. Keep it small: criteria with squared gradients are defined for single images.
    """
    args = get_cfg(overrides={"task": "detect", "mode": "train", "imgsz": imgsz_px, "batch": batch})
    data = {"names": dict(enumerate(dataset.names)), "nc": len(dataset.names), "channels": dataset.channels}
    images = PreflightDataset(
        samples, cache=False, imgsz=imgsz_px, batch_size=batch, augment=False, hyp=args, rect=False, stride=32, pad=0.0,
        data=data,
    )  # fmt: skip
    like = next(model.parameters())
    before = {name: getattr(model, name) for name in ("args", "criterion") if hasattr(model, name)}
    model.args = args
    model.criterion = model.init_criterion()  # type: ignore[operator]
    try:
        for start in range(0, len(samples), batch):
            chosen = images.collate_fn([images[i] for i in range(start, min(start + batch, len(samples)))])
            moved = {
                key: value.to(like.device) if isinstance(value, Tensor) else value for key, value in chosen.items()
            }
            moved["img"] = moved["img"].to(like.dtype) / 255
            with evaluating(model):
                loss = model.loss(moved)[0].sum() / len(moved["img"])  # type: ignore[operator]
            yield loss
    finally:
        for name in ("args", "criterion"):
            if name in before:
                setattr(model, name, before[name])
            else:
                delattr(model, name)
