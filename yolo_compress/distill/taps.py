"""Taps: the outputs of named layers of a net, caught as they are computed, for as long as they are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from yolo_compress.errors import RecipeError
from yolo_compress.nets import detect
from yolo_compress.nets.eval_mode import evaluating

PROBE_CELLS = 2  # cells of the coarsest level in the images that a net is sized with


class Taps:
    """Forward hooks on the layers `names` of one net.

    They are attached when training starts and not before: a copy of a tapped net (the EMA) would carry the taps.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._caught: dict[str, Any] = {}
        self._handles: list[RemovableHandle] = []

    def attach(self, net: nn.Module) -> None:
        """Start to listen; a second call changes nothing."""
        if not self._handles:
            modules = dict(net.named_modules())
            self._handles = [modules[name].register_forward_hook(self._catcher(name)) for name in self.names]

    def _catcher(self, name: str) -> Any:
        def catch(module: nn.Module, inputs: Any, output: Any) -> None:
            self._caught[name] = output

        return catch

    def take(self) -> list[Tensor]:
        """Maps of the last forward pass in the order of the names; they are let go of here."""
        caught, self._caught = self._caught, {}
        return [caught[name] for name in self.names]

    def remove(self) -> None:
        """Stop to listen, and drop what was caught."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._caught = [], {}


def split_pairs(layers: Sequence[str]) -> list[tuple[str, str]]:
    """`model.15` and `model.18=model.21` as (student's layer, teacher's layer)."""
    return [(student, teacher or student) for student, _, teacher in (layer.partition("=") for layer in layers)]


def map_shapes(net: nn.Module, names: Sequence[str], who: str) -> list[tuple[int, int, int]]:
    """(C, H, W) of the maps of layers, found by running the net on an empty image; BatchNorm's averages stay.

    Args:
        net: Stock detector.
        names: Layers by module name.
        who: "student" or "teacher", for errors.

    Raises:
        RecipeError: There is no such layer, or its output is no map.
    """
    known = dict(net.named_modules())
    for name in names:
        if name not in known:
            last = len(net.model) - 1  # type: ignore[arg-type]
            raise RecipeError(
                f"distill.layers: the {who} has no layer {name!r}; its layers are model.0 to model.{last}"
            )
    like = next(net.parameters())
    channels = next(module.in_channels for module in net.modules() if isinstance(module, nn.Conv2d))
    side = PROBE_CELLS * int(net.stride.max())  # type: ignore[operator,union-attr]
    taps = Taps(names)
    with evaluating(net), torch.no_grad():
        detect.return_raw_outputs(net)  # it then remembers no anchors of this image
        taps.attach(net)
        try:
            net(torch.zeros(1, channels, side, side, device=like.device, dtype=like.dtype))
            maps = taps.take()
        finally:
            taps.remove()
    for name, feat in zip(names, maps, strict=True):
        if not isinstance(feat, Tensor) or feat.dim() != 4:
            raise RecipeError(
                f"distill.layers: {name} of the {who} ({type(known[name]).__name__}) gives no feature map"
            )
    return [(feat.shape[1], feat.shape[2], feat.shape[3]) for feat in maps]


def matched_widths(student: nn.Module, teacher: nn.Module, pairs: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
    """(student's, teacher's) channels of each pair of layers.

    Raises:
        RecipeError: A layer is not there, or the maps of a pair differ in height or width; names both.
    """
    own = map_shapes(student, [name for name, _ in pairs], "student")
    other = map_shapes(teacher, [name for _, name in pairs], "teacher")
    side = PROBE_CELLS * int(student.stride.max())  # type: ignore[operator,union-attr]
    for (mine, yours), (_, *size), (_, *wanted) in zip(pairs, own, other, strict=True):
        if size != wanted:
            raise RecipeError(
                f"distill.layers: {mine} of the student is {size[0]} x {size[1]}, {yours} of the teacher {wanted[0]} x "
                f"{wanted[1]} on {side} px; pair layers of the same stride"
            )
    return [(mine[0], yours[0]) for mine, yours in zip(own, other, strict=True)]
