"""Fake quantisation for training, with ModelOpt's modules. The only file that imports ModelOpt."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

from yolo_compress.errors import CorruptArtifact, EnvironmentLacks
from yolo_compress.hook import TrainHook
from yolo_compress.quant.state import AMAX_FLOOR, QuantState


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


def attach(model: nn.Module, state: QuantState, weight_bits: int = 8) -> None:
    """Turn the convolutions of `state` into fake-quantising ones with its ranges, in place.

    Inputs are quantised a tensor, weights an output channel, both symmetric INT8 (weights in `weight_bits` of the 8, as
    `qdq.WEIGHT_QMAX` ships them to CPUs: 7 bits are codes -63 to 63); gradients pass straight through. The
    ranges are buffers (`*.input_quantizer._amax`, `*.weight_quantizer._amax`), so the state dict of a model attached with
    any state of the same plan loads strictly into another one. `copy.deepcopy` works; pickling the module does not.

    Raises:
        CorruptArtifact: `state` names a convolution that the model does not have, or has with other channels.
        EnvironmentLacks: ModelOpt is not installed.
    """
    quant_nn = _modelopt()
    modules: dict[str, Any] = dict(model.named_modules())
    for name, amax in state.activations.items():
        conv: Any
        conv, amax_C = modules.get(name), torch.tensor(state.weights[name])
        if type(conv) is not nn.Conv2d or conv.out_channels != amax_C.numel():
            raise CorruptArtifact(
                f"quantiser state: {name} with {amax_C.numel()} output channels does not fit the network's {conv}"
            )
        device = conv.weight.device
        quant_nn.QuantModuleRegistry.convert(conv)
        # Codes -127 to 127: a BatchNorm with negative gamma then folds without moving any code.
        conv.weight_quantizer._narrow_range = True
        conv.weight_quantizer.num_bits = weight_bits
        conv.weight_quantizer.amax = amax_C.view(-1, 1, 1, 1).to(device)
        conv.input_quantizer.amax = torch.tensor(amax).to(device)


def read(model: nn.Module) -> QuantState:
    """The ranges that an attached model holds now (no `outputs`).

    Raises:
        CorruptArtifact: The model is not attached.
        NumericsError: A range is not finite.
    """
    convs = dict(_attached(model))
    if not convs:
        raise CorruptArtifact("no fake-quantising convolution in the model: attach() first")
    return QuantState(
        activations={name: max(float(conv.input_quantizer.amax), AMAX_FLOOR) for name, conv in convs.items()},
        weights={
            name: tuple(conv.weight_quantizer.amax.float().flatten().clamp_min(AMAX_FLOOR).tolist())
            for name, conv in convs.items()
        },
    )


def detach(model: nn.Module) -> None:
    """Back to plain `nn.Conv2d`, in place; weights stay as trained, ranges go (`read` them before)."""
    for _, conv in list(_attached(model)):
        conv.export()
        conv.__dict__.pop("_parallel_state", None)  # ModelOpt 0.47 leaves its process groups behind


def _attached(model: nn.Module) -> Iterator[tuple[str, Any]]:
    quant_nn = _modelopt()
    for name, module in model.named_modules():
        if isinstance(module, quant_nn.QuantModule):
            yield name, module


class FakeQuant(TrainHook):
    """QAT: ranges calibrated once before training and held, weights learn to live with them.

    Args:
        calibrate: Finds the ranges of a model, for example `partial(ptq, batches=batches, method="mse")`. Called on the
            float model before training, and at its end on the quantised one, where only the ranges of `outputs` are taken.
        state: Ranges to start from instead of calibrating (a resumed run).
        weight_bits: Of the weights, as `attach` takes them: what the engine will hold is what has to be trained.

    Attributes:
        state: After `to_stock`, the ranges that belong to the model given back.
    """

    def __init__(
        self, calibrate: Callable[[nn.Module], QuantState], state: QuantState | None = None, weight_bits: int = 8
    ) -> None:
        self._calibrate = calibrate
        self.state = state
        self.weight_bits = weight_bits
        self._model: nn.Module | None = None

    def on_model(self, model: nn.Module) -> None:
        """Calibrates unless there is a state, then attaches."""
        if self.state is None:
            self.state = self._calibrate(model)
        attach(model, self.state, self.weight_bits)
        self._model = model

    def to_stock(self, model: nn.Module) -> None:
        """Reads the ranges into `state`, then detaches."""
        held = read(model)
        seen = self._calibrate(model)
        self.state = QuantState(held.activations, held.weights, seen.outputs, method=seen.method)
        detach(model)

    def state_dict(self) -> dict[str, Any]:
        """The ranges as plain data."""
        return {} if self.state is None else {"quant": self.state.to_json()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the ranges of a saved run, before or after `on_model`."""
        self.state = QuantState.from_json(state["quant"])
        if self._model is not None:
            detach(self._model)
            attach(self._model, self.state, self.weight_bits)
