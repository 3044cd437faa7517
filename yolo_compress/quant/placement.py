"""Which convolutions of a detector compute in INT8, and why the others do not."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from yolo_compress.errors import RecipeError


@dataclass(frozen=True)
class Plan:
    """`convs` in INT8, `skipped` in float as (name, reason); together every convolution, in the order of definition."""

    convs: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]


def plan(model: nn.Module) -> Plan:
    """Every convolution but the head's bare output convolutions and DFL's.

    Boxes (0 to 640 px) and logits leave through the output convolutions: a per-tensor INT8 step of their input would be
    the resolution of the boxes. Ultralytics' QAT leaves the same ones in float.

    Args:
        model: A detector whose layers are `model.0`, `model.1`, ..., the head last. Not changed.

    Raises:
        RecipeError: No convolution is left to quantise.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    layers = [name for name, _ in model.named_modules() if name.startswith("model.") and name.count(".") == 1]
    head = f"{layers[-1]}." if layers else "model."
    convs, skipped = [], []
    for name in names:
        if name.startswith(f"{head}dfl."):
            skipped.append((name, "DFL: the expectation over bins of the box decode"))
        elif name.startswith(head) and not name.endswith(".conv"):
            skipped.append((name, "output convolution of the head: boxes and logits keep float resolution"))
        else:
            convs.append(name)
    if not convs:
        raise RecipeError(f"nothing to quantise: {type(model).__name__} has {len(names)} convolutions, all in its head")
    return Plan(tuple(convs), tuple(skipped))
