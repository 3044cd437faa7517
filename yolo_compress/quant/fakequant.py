"""Fake quantisation for training, with ModelOpt's modules. The only file that imports ModelOpt."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from yolo_compress.errors import CorruptArtifact, EnvironmentLacks
from yolo_compress.quant.fixed import FixedRange
from yolo_compress.quant.learned import LOGARITHM, LearnedRange
from yolo_compress.quant.plan import IMAGES, Group, Plan, plan
from yolo_compress.quant.ranges import AMAX_FLOOR, QuantState
from yolo_compress.train.hook import TrainHook

ACTIVATION_BITS = 8


@contextmanager
def _quiet_import() -> Iterator[None]:
    """Deprecations inside ModelOpt 0.47 (torch.jit.script) and torch's note that there is no CUDA are not the user's."""
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
    """Refuse an environment that cannot train in INT8.

    Raises:
        EnvironmentLacks: See `_modelopt`.
    """
    _modelopt()


def _modelopt() -> ModuleType:
    """ModelOpt's quantised modules, imported on first use (seconds).

    Raises:
        EnvironmentLacks: It is not installed, or `huggingface_hub`, which it imports without requiring it.
    """
    try:
        with _quiet_import():
            import modelopt.torch.quantization.nn as quant_nn
    except ImportError as error:
        hint = "pip install nvidia-modelopt huggingface_hub"
        raise EnvironmentLacks(f"INT8 training needs ModelOpt: {error}; {hint}") from error
    return quant_nn


class QuantisedOutput(nn.Module):
    """The activation of a block and the quantiser of what the block gives; takes the place of `Conv.act`."""

    def __init__(self, act: nn.Module, quantizer: nn.Module) -> None:
        super().__init__()
        self.act, self.quantizer = act, quantizer

    def forward(self, x_BCHW: Tensor) -> Tensor:
        codes_BCHW: Tensor = self.quantizer(self.act(x_BCHW))
        return codes_BCHW


class QuantisedSum(nn.Module):
    """A block with shortcut, and the quantiser of its sum; the same parameters under the same names.

    Args:
        block: Computes `x + branch(x)`.
        branch: Names of its children whose chain is the branch.
        quantizer: Of the sum.
    """

    add = True  # the shortcut, as the wiring of the family asks the stock block

    def __init__(self, block: nn.Module, branch: Sequence[str], quantizer: nn.Module) -> None:
        super().__init__()
        self.branch = tuple(branch)
        for name in branch:
            self.add_module(name, block.get_submodule(name))
        self.quantizer = quantizer
        self.__dict__["stock"] = block  # what `detach` puts back; no module of this one
        self.training = block.training

    def forward(self, x_BCHW: Tensor) -> Tensor:
        branch_BCHW = x_BCHW
        for name in self.branch:
            branch_BCHW = self.get_submodule(name)(branch_BCHW)
        codes_BCHW: Tensor = self.quantizer(x_BCHW + branch_BCHW)
        return codes_BCHW


def attach(model: nn.Module, state: QuantState, learned: bool = False) -> None:
    """Make the tensors and weights of `state` fake-quantised, in place.

    Tensors are quantised where they are made (`QuantisedOutput`, `QuantisedSum`; the image where the first convolution reads
    it), those of a group by one quantiser; weights an output channel. Both symmetric INT8 (weights in `state.weight_bits`
    of the 8); gradients pass straight through. The ranges are buffers, or parameters where they are `learned` (LSQ), so the
    state dict of a model attached with any state of the same plan loads strictly into another one. `copy.deepcopy` works;
    pickling the module does not.

    Raises:
        CorruptArtifact: `state` names a tensor or convolution that the model does not have, has with other channels, or
            gives tensors that have to share a scale different ones.
        EnvironmentLacks: ModelOpt is not installed.
    """
    quant_nn, quantiser = _modelopt(), LearnedRange if learned else FixedRange
    modules: dict[str, Any] = dict(model.named_modules())
    for name, amax_C in state.weights.items():
        conv: Any = modules.get(name)
        if type(conv) is not nn.Conv2d or conv.out_channels != len(amax_C):
            raise CorruptArtifact(
                f"quantiser state: {name} with {len(amax_C)} output channels does not fit the network's {conv}"
            )
    placed = plan(model)
    if unknown := set(state.activations) - {tensor for group in placed.groups for tensor in group.tensors}:
        raise CorruptArtifact(f"quantiser state: the network has no tensor {', '.join(sorted(unknown))}")
    for name, amax_C in state.weights.items():
        conv = modules[name]
        quant_nn.QuantModuleRegistry.convert(conv)
        conv.input_quantizer.disable()
        # As many codes below 0 as above: a BatchNorm with negative gamma then folds without moving any code.
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
            _put(model, placed, tensor, quantizer)


def _put(model: nn.Module, placed: Plan, tensor: str, quantizer: nn.Module) -> None:
    if tensor == IMAGES:
        for name in placed.group_of(IMAGES).convs:
            model.get_submodule(name).input_quantizer = quantizer
        return
    module = model.get_submodule(tensor)
    if tensor in placed.sums:
        parent, _, child = tensor.rpartition(".")
        setattr(model.get_submodule(parent), child, QuantisedSum(module, placed.sums[tensor], quantizer))
    else:
        module.act = QuantisedOutput(module.act, quantizer)


def read(model: nn.Module) -> QuantState:
    """The ranges that an attached model holds now (no `outputs`).

    Raises:
        CorruptArtifact: The model is not attached.
        NumericsError: A range is not finite.
    """
    convs = dict(_attached(model))
    if not convs:
        raise CorruptArtifact("no fake-quantising convolution in the model: attach() first")
    modules = dict(model.named_modules(remove_duplicate=False))
    quantizers: dict[str, Any] = {}
    for group in plan(model).groups:
        for tensor in group.tensors:
            holder: Any = modules.get(f"{tensor}.act", modules.get(tensor))
            if tensor == IMAGES:
                if group.convs[0] in convs:
                    quantizers[tensor] = convs[group.convs[0]].input_quantizer
            elif isinstance(holder, (QuantisedOutput, QuantisedSum)):
                quantizers[tensor] = holder.quantizer
    return QuantState(
        activations={tensor: max(float(held.amax), AMAX_FLOOR) for tensor, held in quantizers.items()},
        weights={
            name: tuple(conv.weight_quantizer.amax.float().flatten().clamp_min(AMAX_FLOOR).tolist())
            for name, conv in convs.items()
        },
        weight_bits=next(iter(convs.values())).weight_quantizer.num_bits,
    )


def detach(model: nn.Module) -> None:
    """Back to the stock model, in place; weights stay as trained, ranges go (`read` them before)."""
    for _, conv in list(_attached(model)):
        conv.export()
        conv.__dict__.pop("_parallel_state", None)  # ModelOpt 0.47 leaves its process groups behind
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, QuantisedOutput):
                setattr(module, name, child.act)
            elif isinstance(child, QuantisedSum):
                stock = child.stock
                for part in child.branch:
                    setattr(stock, part, child.get_submodule(part))
                setattr(module, name, stock.train(child.training))


@contextmanager
def in_float(model: nn.Module, groups: Iterable[Group]) -> Iterator[None]:
    """An attached model with some groups of its plan, and the weights of the convolutions that read them, not quantised."""
    modules = dict(model.named_modules(remove_duplicate=False))
    off: list[Any] = []
    for group in groups:
        off += [modules[name].weight_quantizer for name in group.convs if hasattr(modules[name], "weight_quantizer")]
        holder: Any = modules.get(f"{group.name}.act", modules.get(group.name))
        off.append(modules[group.convs[0]].input_quantizer if group.name == IMAGES else holder.quantizer)
    off = [quantizer for quantizer in off if quantizer.is_enabled]
    for quantizer in off:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in off:
            quantizer.enable()


def _attached(model: nn.Module) -> Iterator[tuple[str, Any]]:
    quant_nn = _modelopt()
    for name, module in model.named_modules():
        if isinstance(module, quant_nn.QuantModule):
            yield name, module


class FakeQuant(TrainHook):
    """QAT: ranges calibrated once before training and held, weights learn to live with them; or ranges learned along.

    Args:
        calibrate: Finds the ranges of a model, for example `partial(ptq, batches=batches, method="mse")`. Called on the
            float model before training, and at its end on the quantised one, where only the ranges of `outputs` are taken.
        state: Ranges to start from instead of calibrating (a resumed run).
        learned: Train the ranges too (`LearnedRange`).

    Attributes:
        state: After `to_stock`, the ranges that belong to the model given back.
    """

    def __init__(
        self,
        calibrate: Callable[[nn.Module], QuantState],
        state: QuantState | None = None,
        learned: bool = False,
    ) -> None:
        self._calibrate = calibrate
        self.state = state
        self.learned = learned
        self._model: nn.Module | None = None

    def on_model(self, model: nn.Module) -> None:
        """Calibrates unless there is a state, then attaches."""
        if self.state is None:
            self.state = self._calibrate(model)
        attach(model, self.state, self.learned)
        self._model = model

    def undecayed(self, model: nn.Module) -> list[str]:
        """Learned ranges: a decay of the logarithm of a range would pull every range towards 1."""
        return [name for name, _ in model.named_parameters() if name.endswith(LOGARITHM)]

    def to_stock(self, model: nn.Module) -> None:
        """Reads the ranges into `state`, then detaches."""
        held = read(model)
        seen = self._calibrate(model)
        self.state = replace(held, outputs=seen.outputs, method=seen.method)
        detach(model)

    def state_dict(self) -> dict[str, Any]:
        """The ranges as plain data."""
        return {} if self.state is None else {"quant": self.state.to_json()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the ranges of a saved run, before or after `on_model`."""
        self.state = QuantState.from_json(state["quant"])
        if self._model is not None and not self.learned:  # learned ones are the model's parameters, and come with them
            detach(self._model)
            attach(self._model, self.state)
