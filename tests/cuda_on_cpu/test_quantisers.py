"""QAT as on CUDA: a step with channels_last tensors makes no layout copies and no reads by the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.quant_net import images, net
from yolo_compress.quant.calibrate import ptq
from yolo_compress.quant.fakequant import attach


class Counted(TorchDispatchMode):
    """Count reads of a value by the host, and copies that change a tensor from channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._local_scalar_dense.default:
            self.found["host reads"] += 1
        if function in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source: Tensor = args[0] if function is not torch.ops.aten.copy_.default else args[1]
            if source.dim() == 4 and not source.is_contiguous() and made.is_contiguous():
                self.found["layout copies"] += 1
        return made


def counts(model: nn.Module, batch: Tensor) -> Counter[str]:
    """Count host reads and layout copies of a forward pass and the backward pass of its raw outputs."""
    with Counted() as counted:
        outputs = model(batch)
        (outputs["scores"].sum() + outputs["boxes"].sum()).backward()
    return counted.found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_fake_quantisers_add_no_host_reads_and_no_layout_copies(learned: bool, device: str) -> None:
    plain = net()
    state = ptq(plain, lambda: [images(2)])
    batch = images(2).to(device).to(memory_format=torch.channels_last)
    plain = plain.to(device, memory_format=torch.channels_last).train()
    before = counts(plain, batch)
    attach(plain, state, learned)
    after = counts(plain.to(memory_format=torch.channels_last), batch)
    assert after["host reads"] == before["host reads"]
    assert after["layout copies"] == before["layout copies"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_codes_do_not_depend_on_the_layout(learned: bool, device: str) -> None:
    model = net()
    attach(model, ptq(model, lambda: [images(2)]), learned)
    model = model.to(device)
    quantiser, x = model.model[1].act.quantizer, torch.randn(2, 8, 16, 16, device=device)
    codes = quantiser(x.to(memory_format=torch.channels_last)).detach()
    assert codes.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(codes, quantiser(x))
    step = quantiser.amax / 127
    assert float((codes / step - (codes / step).round()).abs().max()) < 1e-3
    assert float(codes.abs().max()) <= float(128 * step) * (1 + 1e-6)
