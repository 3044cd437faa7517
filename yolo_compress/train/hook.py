"""The one extension point of training: sparse training, distillation and QAT are lists of hooks over one loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from torch import Tensor, nn


class Batch(TypedDict):
    """A batch of Ultralytics' loader, as far as hooks read it; it has other keys too."""

    img: Tensor  # images_BCHW, RGB or grey float32 in 0..1
    cls: Tensor  # classes_N1 of all boxes of the batch
    bboxes: Tensor  # boxes_N4: centre x, centre y, width, height, 0 to 1
    batch_idx: Tensor  # index_N of the image of each box
    im_file: list[str]  # files of the images


class TrainHook:
    """What a method adds to a training run; every method here is a no-op to be overridden.

    The trainer calls the hooks of a list in order, and this is the whole of it::

        for hook in hooks: hook.on_model(model)            # may change modules in place; before EMA, DDP, optimizer
        optimizer.add(hook.modules() for hook in hooks)    # trainable extras, resumed, never in a checkpoint of the model
        optimizer.scale(hook.rates(model) for hook in hooks)
        optimizer.exempt(hook.undecayed(model) for hook in hooks)
        for epoch in range(start, epochs):
            for hook in hooks: hook.on_epoch_start(epoch, epochs)
            for batch in loader:
                predictions = model(batch["img"])
                loss = detection_loss(predictions, batch)
                for hook in hooks:
                    loss += sum(hook.extra_loss(batch, predictions).values()) * batch_size
                loss.backward()
                unscale(gradients)
                for hook in hooks: hook.before_step(model)
                clip(gradients of the model, and of each module apart); optimizer.step(); ema.update(model)
            for hook in hooks: hook.on_epoch_end(epoch, model) -> rows of metrics, logged under their names
            save(model, ema, optimizer, [hook.state_dict() for hook in hooks])
        for hook in hooks: hook.on_end(model)              # in `finally`: taps are removed whatever happened
        for hook in reversed(hooks): hook.to_stock(ema)    # back to stock Ultralytics classes

    `model` is always the bare module (no DDP wrapper). A loss is the mean over the images of the batch, named, finite,
    in the graph of the student and the hook's `modules()` alone; it is logged as `train/<name>`, and what it is of the total
    as `share/<name>`.
    """

    def on_model(self, model: nn.Module) -> None:
        """Sees the model once, on its device, before EMA, DDP and optimizer exist."""

    def modules(self) -> nn.ModuleDict:
        """Trainable extras by name (aligners, ...)."""
        return nn.ModuleDict()

    def rates(self, model: nn.Module) -> dict[str, float]:
        """Parameter of the model by name -> multiple of the learning rate there; 1 for those that no hook names."""
        return {}

    def undecayed(self, model: nn.Module) -> Iterable[str]:
        """Parameters of the model, by name, that get no weight decay: those that are neither weights nor of BatchNorm."""
        return ()

    def on_epoch_start(self, epoch: int, epochs: int) -> None:
        """`epoch` counts from 0."""

    def extra_loss(self, batch: Batch, predictions: Any) -> dict[str, Tensor]:
        """Named scalar losses of this batch; `predictions` is what the student's head returned in training mode."""
        return {}

    def before_step(self, model: nn.Module) -> None:
        """Gradients are unscaled and not yet clipped."""

    def on_epoch_end(self, epoch: int, model: nn.Module) -> dict[str, float]:
        """Figures of this epoch for results.csv and the progress line."""
        return {}

    def on_end(self, model: nn.Module) -> None:
        """Called in `finally`."""

    def to_stock(self, model: nn.Module) -> None:
        """Turn what `on_model` changed in `model` (the EMA at the end) back into stock classes, in place."""

    def state_dict(self) -> dict[str, object]:
        """What resume needs beyond `modules()`: tensors and plain values only."""
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Inverse of `state_dict`, called after `on_model`."""
