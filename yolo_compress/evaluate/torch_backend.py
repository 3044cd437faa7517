"""A backend for torch modules. With it, the same code measures torch and the engines."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from yolo_compress.errors import EnvironmentLacks, RecipeError
from yolo_compress.nets import detect
from yolo_compress.runtime.backends.base import check_input

_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16}


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Compute FP32 convolutions in FP32. By default cuDNN rounds their inputs to the 10 bits of TF32."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class TorchBackend:
    """Backend that runs a detector in torch.

    In eval mode, the detector's `forward` must return y or (y, ...). y is [B, 4 + nc, A] with boxes in letterboxed px. Of an
    end-to-end head, the one-to-one branches are used (`detect.deploy`).

    Args:
        module: a detector, fused or not. It is not changed: a copy is used if the device, type or mode differs, or `deploy` would
            change it.
        names: class names in the order of their index.
        imgsz: height and width, px.
        device: "cpu", "cuda:0" and so on.
        precision: fp64, fp32 or fp16. On a CPU, torch chooses how to run fp16.
        threads: number of CPU threads. It applies to the whole process, since torch has no other setting. None: do not change it.

    Raises:
        RecipeError: the precision is not fp64, fp32 or fp16.
        EnvironmentLacks: the device does not exist.
    """

    batch: int | None = None

    def __init__(
        self,
        module: nn.Module,
        names: Sequence[str],
        imgsz: tuple[int, int],
        device: str = "cpu",
        precision: str = "fp32",
        threads: int | None = None,
    ) -> None:
        if precision not in _DTYPES:
            raise RecipeError(f"torch backend: precision {precision!r}, expected one of {', '.join(_DTYPES)}")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise EnvironmentLacks(
                f"device {device}: torch {torch.__version__} sees no GPU; use cpu, or install a driver"
            )
        if threads is not None:
            torch.set_num_threads(threads)
        self.names, self.imgsz, self.precision = tuple(names), (int(imgsz[0]), int(imgsz[1])), precision
        convs = (layer for layer in module.modules() if isinstance(layer, nn.Conv2d))
        self.channels = next((conv.in_channels for conv in convs), 3)
        self.threads = torch.get_num_threads()
        self._device, self._dtype = torch.device(device), _DTYPES[precision]
        self.needs_nms = detect.needs_nms(module)
        self._module = self._prepared(module)

    def _prepared(self, module: nn.Module) -> nn.Module:
        ready = not module.training and all(
            p.device.type == self._device.type
            and self._device.index in (None, p.device.index)
            and p.dtype == self._dtype
            for p in module.parameters()
        )
        if ready and not detect.only_trained(module):
            return module
        made = copy.deepcopy(module).to(self._device, self._dtype).eval()
        detect.deploy(made)
        return made

    @property
    def executed(self) -> str:
        """Parameter type, and the device if it is a GPU."""
        return self.precision if self._device.type == "cpu" else f"{self.precision} ({self._device})"

    @torch.no_grad()
    def _forward(self, images: torch.Tensor) -> torch.Tensor:
        with _without_tf32():
            output = self._module(images)
        return output[0] if isinstance(output, (tuple, list)) else output

    def _tensor(self, images_BCHW: np.ndarray) -> torch.Tensor:
        images_BCHW = check_input(images_BCHW, self)
        return torch.from_numpy(images_BCHW).to(self._device, self._dtype)

    def __call__(self, images_BCHW: np.ndarray, copy: bool = True) -> np.ndarray:
        output = self._forward(self._tensor(images_BCHW)).float().cpu().numpy()
        if output.ndim != 3 or output.shape[1] != 4 + len(self.names):
            raise RecipeError(f"the model returns {list(output.shape)}, expected [B, {4 + len(self.names)}, anchors]")
        return output

    def bind(self, images_BCHW: np.ndarray) -> Callable[[], Any]:
        """Copy the images to the device. Return a function that runs one inference on them and waits for the GPU."""
        images = self._tensor(images_BCHW)

        def run() -> None:
            self._forward(images)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)

        return run

    def __enter__(self) -> TorchBackend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._module
