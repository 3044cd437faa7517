"""The one door to `ultralytics.nn.modules`: which blocks this package can edit, the split view of C2f, channel selection.

Stock `C2f` computes both halves with one convolution `cv1` and cuts its output in two with `chunk`. Dependency tracing cannot
follow `chunk` (Torch-Pruning 1.6.1 raises IndexError), so it looks at `SplitC2f`, where each half has a convolution of its own.
Checkpoints hold stock classes only: any other class neither loads in plain Ultralytics nor under ULTRALYTICS_SAFE_LOAD=1.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from yolo_compress.errors import NumericsError, RecipeError
from yolo_compress.nets.hardening import harden

harden()

from ultralytics.nn.modules import DFL, SPPF, Bottleneck, C2f, Concat, Conv, Detect  # noqa: E402

_LAYER_ATTRIBUTES = ("i", "f", "type", "np")  # set by Ultralytics' parse_model on every layer of `model.model`
_SUPPORTED = "supported are YOLOv8 detection models: Conv, C2f, SPPF, Upsample, Concat and a legacy Detect head"


class SplitC2f(nn.Module):
    """C2f with `cv1` as two convolutions, `cv1a` (passed on) and `cv1b` (fed to the bottlenecks); same outputs as C2f."""

    def __init__(self, block: C2f) -> None:
        super().__init__()
        half = block.cv1.conv.out_channels // 2
        self.c = block.c
        self.cv1a = _rows(block.cv1, torch.arange(half))
        self.cv1b = _rows(block.cv1, torch.arange(half, 2 * half))
        self.cv2 = block.cv2
        self.m = block.m
        self.training = block.training
        _copy_attributes(block, self)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        parts = [self.cv1a(x_BCHW), self.cv1b(x_BCHW)]
        parts.extend(bottleneck(parts[-1]) for bottleneck in self.m)
        return self.cv2(torch.cat(parts, 1))


def split_c2f(model: nn.Module) -> nn.Module:
    """Replace every C2f of `model` by its SplitC2f view, in place, and return `model`; other blocks keep their tensors."""
    for parent, name, block in _children(model, C2f):
        setattr(parent, name, SplitC2f(block))
    return model


def merge_c2f(model: nn.Module) -> nn.Module:
    """Inverse of `split_c2f`, in place; returns `model`.

    Raises:
        RecipeError: the halves of a block differ in width, which stock C2f (`chunk`) cannot express.
    """
    for parent, name, block in _children(model, SplitC2f):
        setattr(parent, name, _merged(block))
    return model


def check_prunable(model: nn.Module) -> None:
    """Check that every block of a detection model is one whose channels can be selected, and that its weights are finite.

    Raises:
        RecipeError: another kind of block, head or model, a fused, quantised or otherwise wrapped convolution; names it.
        NumericsError: NaN or infinity in a weight or BatchNorm statistic; names the tensor.
    """
    layers = getattr(model, "model", None)
    if not isinstance(layers, nn.Sequential) or len(layers) == 0:
        raise RecipeError(
            f"prune: {type(model).__name__} is not an Ultralytics model with a `model` sequence; {_SUPPORTED}"
        )
    for index, layer in enumerate(layers):
        _check_layer(f"model.{index}", layer, last=index == len(layers) - 1)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all()):
            raise NumericsError(f"prune: {name} holds NaN or infinity; take weights from an earlier epoch")


def c2f_blocks(model: nn.Module) -> Iterator[tuple[str, C2f]]:
    """Every stock C2f of `model` with its name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, C2f))


def head_outputs(model: nn.Module) -> list[str]:
    """Names of the convolutions whose channels are the model's outputs (boxes, class scores, DFL); they are never pruned."""
    name, head = f"model.{len(model.model) - 1}", model.model[-1]
    branches = [f"{name}.{branch}.{i}.2" for branch in ("cv2", "cv3") for i in range(head.nl)]
    return [*branches, f"{name}.dfl.conv"]


def keep_channels(module: nn.Module, out_K: Tensor | None, in_K: Tensor | None = None) -> None:
    """Keep the listed channels of a Conv2d (groups=1) or BatchNorm2d, in place; gradients are dropped.

    Args:
        module: the convolution or normalisation.
        out_K: indices of output channels (of features for BatchNorm2d); None keeps all.
        in_K: indices of input channels; None keeps all.
    """
    if isinstance(module, nn.Conv2d):
        if out_K is not None:
            module.weight = _selected(module.weight, 0, out_K)
            if module.bias is not None:
                module.bias = _selected(module.bias, 0, out_K)
            module.out_channels = module.weight.shape[0]
        if in_K is not None:
            module.weight = _selected(module.weight, 1, in_K)
            module.in_channels = module.weight.shape[1]
    elif isinstance(module, nn.BatchNorm2d):
        if out_K is not None:
            module.weight, module.bias = _selected(module.weight, 0, out_K), _selected(module.bias, 0, out_K)
            index = out_K.to(module.weight.device)
            module.running_mean = module.running_mean.index_select(0, index)
            module.running_var = module.running_var.index_select(0, index)
            module.num_features = module.weight.shape[0]
    else:
        raise TypeError(f"expected Conv2d or BatchNorm2d, got {type(module).__name__}")


def refresh_attributes(model: nn.Module) -> None:
    """Bring what Ultralytics stores beside the tensors in line with their shapes: C2f.c and each layer's count `np`."""
    for _, block in c2f_blocks(model):
        block.c = block.cv1.conv.out_channels // 2
    for layer in model.model:
        if hasattr(layer, "np"):
            layer.np = sum(p.numel() for p in layer.parameters())


def _selected(parameter: nn.Parameter, dim: int, index_K: Tensor) -> nn.Parameter:
    kept = parameter.detach().index_select(dim, index_K.to(parameter.device))
    return nn.Parameter(kept, requires_grad=parameter.requires_grad)


def _rows(conv: Conv, index_K: Tensor) -> Conv:
    """A copy of `conv` with some of its output channels; BatchNorm settings, flags and dtype are kept.

    The activation stays shared: stock models have one module for all (`Conv.default_act`), which holds no tensors.
    """
    part = copy.deepcopy(conv, {id(conv.act): conv.act})
    keep_channels(part.conv, index_K)
    keep_channels(part.bn, index_K)
    return part


def _merged(block: SplitC2f) -> C2f:
    first, second = block.cv1a, block.cv1b
    half = first.conv.out_channels
    if half != second.conv.out_channels:
        raise RecipeError(
            f"C2f halves of {half} and {second.conv.out_channels} channels cannot merge; keep equal counts"
        )
    cv1 = copy.deepcopy(first, {id(first.act): first.act})
    cv1.conv.weight = _joined(first.conv.weight, second.conv.weight)
    cv1.conv.out_channels = cv1.bn.num_features = 2 * half
    cv1.bn.weight, cv1.bn.bias = _joined(first.bn.weight, second.bn.weight), _joined(first.bn.bias, second.bn.bias)
    cv1.bn.running_mean = torch.cat([first.bn.running_mean, second.bn.running_mean])
    cv1.bn.running_var = torch.cat([first.bn.running_var, second.bn.running_var])

    merged = C2f.__new__(C2f)  # the constructor would allocate and initialise a whole block, only to be thrown away
    nn.Module.__init__(merged)
    merged.c, merged.cv1, merged.cv2, merged.m = half, cv1, block.cv2, block.m
    merged.training = block.training
    _copy_attributes(block, merged)
    return merged


def _joined(first: nn.Parameter, second: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.cat([first.detach(), second.detach()]), requires_grad=first.requires_grad)


def _copy_attributes(source: nn.Module, target: nn.Module) -> None:
    for name in _LAYER_ATTRIBUTES:
        if name in source.__dict__:
            setattr(target, name, source.__dict__[name])


def _children(model: nn.Module, kind: type[nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is kind
    ]


def _check_layer(name: str, layer: nn.Module, last: bool) -> None:
    if last:
        _check_head(name, layer)
    elif type(layer) is Conv:
        _check_conv(name, layer)
    elif type(layer) is C2f:
        _check_conv(f"{name}.cv1", layer.cv1)
        _check_conv(f"{name}.cv2", layer.cv2)
        for i, bottleneck in enumerate(layer.m):
            if type(bottleneck) is not Bottleneck:
                raise RecipeError(
                    f"prune: {name}.m.{i} is a {type(bottleneck).__name__}, not a Bottleneck; {_SUPPORTED}"
                )
            _check_conv(f"{name}.m.{i}.cv1", bottleneck.cv1)
            _check_conv(f"{name}.m.{i}.cv2", bottleneck.cv2)
    elif type(layer) is SPPF:
        _check_conv(f"{name}.cv1", layer.cv1)
        _check_conv(f"{name}.cv2", layer.cv2)
    elif type(layer) not in (nn.Upsample, Concat):
        raise RecipeError(f"prune: {name} is a {type(layer).__name__}; {_SUPPORTED}")


def _check_head(name: str, head: nn.Module) -> None:
    if type(head) is not Detect:
        raise RecipeError(f"prune: {name} is a {type(head).__name__} head; {_SUPPORTED}")
    if getattr(head, "one2one_cv2", None) is not None or head.cv2 is None:
        raise RecipeError(f"prune: {name} is an end-to-end head (one2one branches); {_SUPPORTED}")
    if type(head.dfl) is not DFL:
        raise RecipeError(f"prune: {name}.dfl is a {type(head.dfl).__name__}, expected DFL (reg_max > 1); {_SUPPORTED}")
    for branch in ("cv2", "cv3"):
        for i, convs in enumerate(getattr(head, branch)):
            _check_conv(f"{name}.{branch}.{i}.0", convs[0])
            _check_conv(f"{name}.{branch}.{i}.1", convs[1])
            _check_conv2d(f"{name}.{branch}.{i}.2", convs[2])


def _check_conv(name: str, block: nn.Module) -> None:
    if type(block) is not Conv:
        raise RecipeError(f"prune: {name} is a {type(block).__name__}, expected Conv; {_SUPPORTED}")
    norm = getattr(block, "bn", None)
    if norm is None:
        raise RecipeError(
            f"prune: {name} has no BatchNorm (a fused or deployed model); give the checkpoint as it was trained"
        )
    if type(norm) is not nn.BatchNorm2d or not norm.affine or not norm.track_running_stats:
        raise RecipeError(
            f"prune: {name}.bn is a {type(norm).__name__}, expected BatchNorm2d with gamma, beta and statistics"
        )
    _check_conv2d(f"{name}.conv", block.conv)


def _check_conv2d(name: str, conv: nn.Module) -> None:
    if type(conv) is not nn.Conv2d:
        raise RecipeError(
            f"prune: {name} is a {type(conv).__name__}, expected a plain Conv2d; prune before QAT or wrapping"
        )
    if conv.groups != 1:
        raise RecipeError(f"prune: {name} is a grouped convolution (groups={conv.groups}); {_SUPPORTED}")
