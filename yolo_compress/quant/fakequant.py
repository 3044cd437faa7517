"""Fake quantisation for quantisation-aware training (QAT) with ModelOpt. No other file imports ModelOpt.

The range of a tensor or weight, `amax`, is the largest absolute value that its INT8 values represent.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from yolo_compress.errors import CorruptArtifact, EnvironmentLacks
from yolo_compress.nets.flow import WHOLE_LAYER
from yolo_compress.quant.fixed import FixedRange
from yolo_compress.quant.learned import LOGARITHM, LearnedRange
from yolo_compress.quant.plan import IMAGES, Group, Plan, plan
from yolo_compress.quant.ranges import AMAX_FLOOR, QuantState
from yolo_compress.train.hook import TrainHook

ACTIVATION_BITS = 8


@contextmanager
def _quiet_import() -> Iterator[None]:
    """Hide two messages during an import: deprecations inside ModelOpt 0.47, and torch's note about missing CUDA."""
    log = logging.getLogger("torch.utils.cpp_extension")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        log.setLevel(level)


def check_installed() -> None:
    """Check that ModelOpt is installed. Training with fake quantisation needs it.

    Raises:
        EnvironmentLacks: ModelOpt or `huggingface_hub` is not installed.
    """
    _modelopt()


def _modelopt() -> ModuleType:
    """Import and return ModelOpt's package of quantised modules. The import takes seconds, so it happens on the first call.

    Raises:
        EnvironmentLacks: ModelOpt or `huggingface_hub` is not installed. ModelOpt imports the latter without requiring it.
    """
    try:
        with _quiet_import():
            import modelopt.torch.quantization.nn as quant_nn
    except ImportError as error:
        hint = "pip install nvidia-modelopt huggingface_hub"
        raise EnvironmentLacks(f"INT8 training needs ModelOpt: {error}; {hint}") from error
    return quant_nn


class QuantisedOutput(nn.Module):
    """Replacement for `Conv.act`: the activation of a Conv block, followed by the fake quantiser of the block's output."""

    def __init__(self, act: nn.Module, quantizer: nn.Module) -> None:
        super().__init__()
        self.act, self.quantizer = act, quantizer

    def forward(self, x_BCHW: Tensor) -> Tensor:
        quantised_BCHW: Tensor = self.quantizer(self.act(x_BCHW))
        return quantised_BCHW


class QuantisedSum(nn.Module):
    """Replacement for a block with shortcuts: each of its sums is followed by the fake quantiser.

    Parameters have the same names as in the block.

    Args:
        block: Block that computes `x = x + branch(x)` once for each branch.
        branches: For each branch, the names of the block's child modules that form it, in the order in which they run.
        quantizer: Fake quantiser of the sums.
    """

    add = True  # the attribute by which the model family recognises a shortcut in the stock block

    def __init__(self, block: nn.Module, branches: Sequence[Sequence[str]], quantizer: nn.Module) -> None:
        super().__init__()
        self.branches = branches
        for name in chain(*branches):
            self.add_module(name, block.get_submodule(name))
        self.quantizer = quantizer
        self.__dict__["stock"] = block  # for `detach`; stored in __dict__ so that it is not a submodule
        self.training = block.training

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for branch in self.branches:
            branch_BCHW = x_BCHW
            for name in branch:
                branch_BCHW = self.get_submodule(name)(branch_BCHW)
            x_BCHW = self.quantizer(x_BCHW + branch_BCHW)
        return x_BCHW


def _quantised_layer(layer: Any, x_BCHW: Tensor) -> Tensor:
    """Replacement for `forward` of a layer with a shortcut: its sum is followed by the fake quantiser. The class stays."""
    quantised_BCHW: Tensor = layer.quantizer(type(layer).forward(layer, x_BCHW))
    return quantised_BCHW


def attach(model: nn.Module, state: QuantState, learned: bool = False) -> None:
    """Insert fake quantisers for the tensors and weights of `state` into a model, in place.

    A tensor is quantised where it is computed (`QuantisedOutput`, `QuantisedSum`, `_quantised_layer`). The input image is quantised
    where the first convolution reads it. Tensors that share a scale share one quantiser. Weights have one range per output channel.
    Tensors and weights are symmetric INT8; weights have `state.weight_bits` bits. Gradients are straight-through.

    Ranges are buffers, or parameters if `learned` is True. Two models with the same INT8 tensors can load each other's state dict.
    `copy.deepcopy` of the model works, but pickling does not.

    Args:
        model: A detector with stock modules.
        state: Ranges of the tensors and weights of the model.
        learned: Train the ranges together with the weights (LSQ, see `LearnedRange`).

    Raises:
        CorruptArtifact: `state` does not fit the model: a tensor or convolution does not exist, a number of channels differs, or
            tensors that must share a scale have different ranges.
        EnvironmentLacks: ModelOpt is not installed.
    """
    quant_nn, quantiser = _modelopt(), LearnedRange if learned else FixedRange
    modules: dict[str, Any] = dict(model.named_modules())
    for name, amax_C in state.weights.items():
        conv: Any = modules.get(name)
        if type(conv) is not nn.Conv2d or conv.out_channels != len(amax_C):
            raise CorruptArtifact(
                f"quantiser state: {name} with {len(amax_C)} output channels does not match the model's {conv}; run qat again"
            )
    placed = plan(model)
    if unknown := set(state.activations) - {tensor for group in placed.groups for tensor in group.tensors}:
        raise CorruptArtifact(f"quantiser state: the model has no tensor {', '.join(sorted(unknown))}; run qat again")
    for name, amax_C in state.weights.items():
        conv = modules[name]
        quant_nn.QuantModuleRegistry.convert(conv)
        conv.input_quantizer.disable()
        # As many INT8 values below 0 as above: a BatchNorm with negative gamma then folds with a change of sign only.
        amax_O111 = torch.tensor(amax_C).view(-1, 1, 1, 1).to(conv.weight.device)
        conv.weight_quantizer = quantiser(amax_O111, state.weight_bits, narrow_range=True)
    for group in placed.groups:
        amax = {state.activations[tensor] for tensor in group.tensors if tensor in state.activations}
        if not amax:
            continue
        if len(amax) > 1 or not all(tensor in state.activations for tensor in group.tensors):
            raise CorruptArtifact(f"quantiser state: {', '.join(group.tensors)} have to share a scale")
        scale = torch.tensor(amax.pop()).to(next(model.parameters()).device)
        quantizer = quantiser(scale, ACTIVATION_BITS, narrow_range=False)
        for tensor in group.tensors:
            _insert_quantizer(model, placed, tensor, quantizer)


def _insert_quantizer(model: nn.Module, placed: Plan, tensor: str, quantizer: nn.Module) -> None:
    if tensor == IMAGES:
        for name in placed.group_of(IMAGES).convs:
            model.get_submodule(name).input_quantizer = quantizer
        return
    module = model.get_submodule(tensor)
    if placed.sums.get(tensor) == WHOLE_LAYER:
        module.quantizer, module.forward = quantizer, partial(_quantised_layer, module)
    elif tensor in placed.sums:
        parent, _, child = tensor.rpartition(".")
        setattr(model.get_submodule(parent), child, QuantisedSum(module, placed.sums[tensor], quantizer))
    else:
        module.act = QuantisedOutput(module.act, quantizer)


def read(model: nn.Module) -> QuantState:
    """Return the current ranges of a model with fake quantisers (`attach`). The field `outputs` of the result is empty.

    Raises:
        CorruptArtifact: The model has no fake quantisers.
        NumericsError: A range is not finite.
    """
    convs = dict(_attached(model))
    if not convs:
        raise CorruptArtifact("the model has no fake-quantised convolution; call attach() first")
    modules = dict(model.named_modules(remove_duplicate=False))
    quantizers: dict[str, Any] = {}
    for group in plan(model).groups:
        for tensor in group.tensors:
            holder: Any = modules.get(f"{tensor}.act", modules.get(tensor))
            if tensor == IMAGES:
                if group.convs[0] in convs:
                    quantizers[tensor] = convs[group.convs[0]].input_quantizer
            elif isinstance(holder, (QuantisedOutput, QuantisedSum)) or _is_quantised_layer(holder):
                quantizers[tensor] = holder.quantizer
    return QuantState(
        activations={tensor: max(float(quantizer.amax), AMAX_FLOOR) for tensor, quantizer in quantizers.items()},
        weights={
            name: tuple(conv.weight_quantizer.amax.float().flatten().clamp_min(AMAX_FLOOR).tolist())
            for name, conv in convs.items()
        },
        weight_bits=next(iter(convs.values())).weight_quantizer.num_bits,
    )


def detach(model: nn.Module) -> None:
    """Remove all fake quantisers from a model, in place. The trained weights stay. The ranges are lost, so call `read` before."""
    for _, conv in list(_attached(model)):
        conv.export()
        conv.__dict__.pop("_parallel_state", None)  # ModelOpt 0.47 does not remove its process groups
    for module in list(model.modules()):
        if _is_quantised_layer(module):
            del module.forward, module.quantizer
        for name, child in list(module.named_children()):
            if isinstance(child, QuantisedOutput):
                setattr(module, name, child.act)
            elif isinstance(child, QuantisedSum):
                stock = child.stock
                for part in chain(*child.branches):
                    setattr(stock, part, child.get_submodule(part))
                setattr(module, name, stock.train(child.training))


def _is_quantised_layer(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func is _quantised_layer


@contextmanager
def in_float(model: nn.Module, groups: Iterable[Group]) -> Iterator[None]:
    """Make the model compute `groups` in float inside a `with` block.

    The quantisers of these tensors are disabled. So are the weight quantisers of all convolutions that read the tensors.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    disabled: list[Any] = []
    for group in groups:
        disabled += [
            modules[name].weight_quantizer for name in group.convs if hasattr(modules[name], "weight_quantizer")
        ]
        holder: Any = modules.get(f"{group.name}.act", modules.get(group.name))
        disabled.append(modules[group.convs[0]].input_quantizer if group.name == IMAGES else holder.quantizer)
    disabled = [quantizer for quantizer in disabled if quantizer.is_enabled]
    for quantizer in disabled:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in disabled:
            quantizer.enable()


def _attached(model: nn.Module) -> Iterator[tuple[str, Any]]:
    quant_nn = _modelopt()
    for name, module in model.named_modules():
        if isinstance(module, quant_nn.QuantModule):
            yield name, module


class FakeQuant(TrainHook):
    """Hook for QAT: train the weights with fake quantisation.

    The ranges stay fixed during training, or are trained as well if `learned` is True.

    Args:
        calibrate: Function that returns the ranges of a model, for example `partial(ptq, batches=batches, method="mse")`. After
            training it runs on the quantised model, and only the field `outputs` of its result is used.
        state: Calibrated ranges of the model before training. All ranks receive them with the hook.
        learned: Train the ranges together with the weights (`LearnedRange`).

    Attributes:
        state: Current ranges. After `to_stock` they are the ranges of the trained model.
    """

    def __init__(
        self,
        calibrate: Callable[[nn.Module], QuantState],
        state: QuantState,
        learned: bool = False,
    ) -> None:
        self._calibrate = calibrate
        self.state = state
        self.learned = learned
        self._model: nn.Module | None = None

    def on_model(self, model: nn.Module) -> None:
        """Insert the fake quantisers."""
        attach(model, self.state, self.learned)
        self._model = model

    def undecayed(self, model: nn.Module) -> list[str]:
        """Return the names of parameters without weight decay: the learned ranges.

        The parameter is the logarithm of a range, so a decay would pull every range towards 1.
        """
        return [name for name, _ in model.named_parameters() if name.endswith(LOGARITHM)]

    def to_stock(self, model: nn.Module) -> None:
        """Read the trained ranges into `state`, then remove the fake quantisers from the model."""
        trained = read(model)
        calibrated = self._calibrate(model)
        self.state = replace(trained, outputs=calibrated.outputs, method=calibrated.method)
        detach(model)

    def state_dict(self) -> dict[str, Any]:
        """Return the ranges as JSON types, for a checkpoint of the training."""
        return {"quant": self.state.to_json()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the ranges of a saved run. May be called before or after `on_model`."""
        self.state = QuantState.from_json(state["quant"])
        if self._model is not None and not self.learned:  # learned ranges are parameters of the model
            detach(self._model)
            attach(self._model, self.state)
