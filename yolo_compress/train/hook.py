"""Hooks, with which pruning, distillation and quantisation extend the training loop. There is no other way to extend it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from torch import Tensor, nn


class Batch(TypedDict):
    """The keys of a batch of Ultralytics' loader that hooks read. A batch has further keys."""

    img: Tensor  # images_BCHW, RGB or grey float32 in 0..1
    cls: Tensor  # classes_N1 of all boxes of the batch
    bboxes: Tensor  # boxes_N4: centre x, centre y, width, height, 0 to 1
    batch_idx: Tensor  # index_N of the image of each box
    im_file: list[str]  # files of the images


class TrainHook:
    """Base class of the hooks by which compression methods extend training. Every method does nothing until it is overridden.

    The trainer calls the hooks in the order of their list::

        for hook in hooks: hook.on_model(model)            # may change modules in place; before EMA, DDP, optimizer
        optimizer.add(hook.modules() for hook in hooks)    # trainable extras; in resume.pt, never in the model
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
                clip(gradients of the model, and of each module separately); optimizer.step(); ema.update(model)
            for hook in hooks: hook.on_epoch_end(epoch, model) -> rows of metrics, logged under their names
            save(model, ema, optimizer, [hook.state_dict() for hook in hooks])
        for hook in hooks: hook.on_end(model)              # in `finally`: taps are removed also after an error
        for hook in reversed(hooks): hook.to_stock(ema)    # back to stock Ultralytics classes

    `model` is never wrapped in DDP. A loss has a name, is finite, and is the mean over the images of the batch. Its graph
    contains only the student and the `modules()` of the hook. It is logged as `train/<name>`, and its share of the total
    loss as `share/<name>`.
    """

    def on_model(self, model: nn.Module) -> None:
        """Change the model in place. Called once, with the model on its device, before EMA, DDP and optimizer exist."""

    def modules(self) -> nn.ModuleDict:
        """Return further trainable modules by name, such as aligners. They are not part of the model."""
        return nn.ModuleDict()

    def rates(self, model: nn.Module) -> dict[str, float]:
        """Return factors on the learning rate: parameter name of the model -> factor. All other parameters have factor 1."""
        return {}

    def undecayed(self, model: nn.Module) -> Iterable[str]:
        """Return names of parameters of the model to train without weight decay. Biases and BatchNorm never have weight decay."""
        return ()

    def on_epoch_start(self, epoch: int, epochs: int) -> None:
        """Called before each epoch. `epoch` counts from 0."""

    def extra_loss(self, batch: Batch, predictions: Any) -> dict[str, Tensor]:
        """Return further losses of this batch, scalars by name. `predictions` is the output of the model's head in training mode."""
        return {}

    def before_step(self, model: nn.Module) -> None:
        """Called before each step of the optimizer, with gradients unscaled and not yet clipped."""

    def on_epoch_end(self, epoch: int, model: nn.Module) -> dict[str, float]:
        """Return metrics of this epoch by name, for results.csv and the progress line."""
        return {}

    def on_end(self, model: nn.Module) -> None:
        """Called once after training, also after an error. Remove taps here."""

    def to_stock(self, model: nn.Module) -> None:
        """Replace the modules that `on_model` inserted by Ultralytics' own classes, in place. `model` is the EMA after training."""

    def state_dict(self) -> dict[str, object]:
        """Return the state that a resume needs beyond `modules()`: only tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore the state that `state_dict` returned. Called after `on_model`."""
