"""Penalties of sparse training, as subgradients: L1 on all gammas, L1 on weak gammas, or group lasso on all weights of a channel.

Shapes: T are the channels of all groups, concatenated. O and I are output and input channels of a convolution, C channels of a
BatchNorm. For each tensor, the positions of its channels in T are computed once. A training step then needs a few passes over the
weights and no loop over groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from yolo_compress.errors import RecipeError
from yolo_compress.prune.cost import channel_macs
from yolo_compress.prune.graph import Group

SMALLEST_NORM = 1e-12  # minimum of a divisor: if a norm is 0, the subgradient is then 0 instead of NaN


class Penalty(ABC):
    """Base class of penalties on weights. A penalty is a sum over the channels of all groups, with one factor per group."""

    @abstractmethod
    def bind(self, model: nn.Module, groups: Sequence[Group], scale: Mapping[str, float]) -> None:
        """Prepare the penalty for a model. Called once, after the model is on its device.

        Args:
            model: Stock model that will be trained.
            groups: `graph.prunable(model)`.
            scale: Group name -> factor of the penalty. Groups that are not in `scale` have the factor 1.
        """

    @abstractmethod
    def add_subgradient(self, model: nn.Module, strength: float) -> None:
        """Add `strength` times the subgradient of the penalty to the gradients of the model, in place.

        Raises:
            RecipeError: A weight is frozen, so the penalty has no effect on it.
        """


class L1(Penalty):
    """L1 penalty on gammas, `sum_g s_g sum |gamma|` with the factor `s_g` of group g. The subgradient is `s_g sign(gamma)`.

    This is equation 1 of Network Slimming (arXiv 1708.06519).
    """

    def bind(self, model: nn.Module, groups: Sequence[Group], scale: Mapping[str, float]) -> None:
        norms = _places(model, groups)["norm"]
        scale_T = _per_channel(model, groups, scale)
        self._names = list(norms)
        self._scales = [scale_T[place_C] for place_C in norms.values()]

    @torch.no_grad()
    def add_subgradient(self, model: nn.Module, strength: float) -> None:
        gammas = _weights(model, self._names)
        pulls = torch._foreach_sign(gammas)
        torch._foreach_mul_(pulls, self._scales)
        torch._foreach_add_(_gradients(gammas, self._names), pulls, alpha=strength)


class Polarization(Penalty):
    """L1 penalty on the gammas of weak channels only. A channel is weak if its strength is below the mean of its group.

    The penalty is `sum_g s_g sum |gamma|` with the factor `s_g` of group g. The strength of a channel is the sum of its |gamma| over
    the BatchNorms of the group, as in the criterion `bn_gamma`.

    Plain L1 reduces all gammas alike. The order of channels does not change until many gammas are 0, and unimportant layers lose
    all channels. The penalty of Zhuang et al. (NeurIPS 2020, "Neuron-level Structured Pruning using Polarization Regularizer",
    equation 2) is L1 minus `sum |gamma - mean|`. With their t = 1 it is twice the penalty here, if the derivative of the mean (near
    0) is neglected. Their mean is over the model. Here each group has its own mean, so that no layer loses all channels.
    """

    def bind(self, model: nn.Module, groups: Sequence[Group], scale: Mapping[str, float]) -> None:
        norms = _places(model, groups)["norm"]
        self._scale_T = _per_channel(model, groups, scale)
        self._names = list(norms)
        self._place = torch.cat(list(norms.values()))
        self._sizes = [len(place_C) for place_C in norms.values()]
        width_G = torch.tensor([group.width for group in groups], device=self._place.device)
        own_T = torch.arange(len(groups), device=self._place.device).repeat_interleave(width_G)
        # The last entry is for channels that belong to no group.
        self._group_T = torch.cat([own_T, own_T.new_tensor([len(groups)])])
        self._width_G = torch.cat([width_G, width_G.new_tensor([1])])

    @torch.no_grad()
    def add_subgradient(self, model: nn.Module, strength: float) -> None:
        gammas = _weights(model, self._names)
        gradients = _gradients(gammas, self._names)
        flat = torch.cat(gammas)
        mass_T = torch.zeros_like(self._scale_T).index_add_(0, self._place, flat.abs())
        sum_G = torch.zeros_like(self._width_G, dtype=mass_T.dtype).index_add_(0, self._group_T, mass_T)
        pull_T = strength * self._scale_T * (mass_T < (sum_G / self._width_G)[self._group_T])
        torch._foreach_add_(gradients, list((flat.sign() * pull_T[self._place]).split(self._sizes)))


class GroupLasso(Penalty):
    """Group lasso: penalises the L2 norm of all weights that are removed together with a channel.

    The penalty is `sum_g s_g sum_k n_gk`. `s_g` is the factor of group g and `n_gk` is the norm for channel k of this group. As in
    the sparse training of DepGraph (arXiv 2301.12900), the norm is over three kinds of weights: filters that write the channel,
    slices of filters that read the channel, and its gammas. Biases are left out. All members of a group thus weaken the same
    channels.

    With `n_gk^2 = sum of theta^2`, the derivative by a weight theta is `s_g theta / n_gk`. If all weights of the channel are 0, the
    derivative is 0. A gamma belongs to one channel. A weight `w_OI` belongs to two channels: it writes O and reads I. So its
    derivative is `w_OI * (r_O + r_I)` with `r = s / n`. For channels that belong to no group (images, outputs of Detect) `r` is 0.

    DepGraph penalises `c_k n_k^2`, with `c_k` from 1 to 16 and larger for weaker channels. Here the factor `1 / n_k` has the same
    effect, and no range of `c_k` has to be chosen. Yuan and Lin multiply the norm by the root of the number of weights. Here the norm
    is not multiplied. The subgradient of a channel therefore has the length `s_g`, and lambda acts on a gamma at most as strongly
    as in L1.
    """

    def bind(self, model: nn.Module, groups: Sequence[Group], scale: Mapping[str, float]) -> None:
        places = _places(model, groups)
        self._scale_T = _per_channel(model, groups, scale)
        self._norms = list(places["norm"])
        self._convs = list(dict.fromkeys([*places["out"], *places["in"]]))
        nowhere = len(self._scale_T) - 1
        out, inputs, patches = [], [], []
        for name in self._convs:
            weight_OIHW = model.get_submodule(name).weight
            device = weight_OIHW.device
            out.append(places["out"].get(name, torch.full((weight_OIHW.shape[0],), nowhere, device=device)))
            inputs.append(places["in"].get(name, torch.full((weight_OIHW.shape[1],), nowhere, device=device)))
            # one position per weight of a filter (I x H x W)
            patches.append(inputs[-1].repeat_interleave(weight_OIHW[0, 0].numel()))
        norms = list(places["norm"].values())
        self._sizes = [len(place) for place in [*norms, *out, *inputs]]
        self._squares_to = torch.cat([*norms, *out, *patches])
        self._ratios_from = torch.cat([*norms, *out, *inputs])

    @torch.no_grad()
    def add_subgradient(self, model: nn.Module, strength: float) -> None:
        gammas, filters = _weights(model, self._norms), _weights(model, self._convs)
        gradients = _gradients([*gammas, *filters], [*self._norms, *self._convs])
        ratio_T = strength * self._scale_T / self._norm_T(gammas, filters).clamp(min=SMALLEST_NORM)
        ratios = ratio_T[self._ratios_from].split(self._sizes)
        of_gammas, of_filters = list(ratios[: len(gammas)]), ratios[len(gammas) :]
        torch._foreach_addcmul_(gradients[: len(gammas)], gammas, of_gammas)
        out, inputs = of_filters[: len(filters)], of_filters[len(filters) :]
        for gradient, filter_OIHW, ratio_O, ratio_I in zip(gradients[len(gammas) :], filters, out, inputs, strict=True):
            gradient.addcmul_(filter_OIHW, ratio_O.view(-1, 1, 1, 1) + ratio_I.view(1, -1, 1, 1))

    def _norm_T(self, gammas: list[Tensor], filters: list[Tensor]) -> Tensor:
        """Return the norm `n_gk` of every channel. The last entry is for channels that belong to no group.

        The function processes one tensor at a time. If all tensors are processed at once, their squares exceed the cache, and a CPU
        takes four times as long.
        """
        out, patches = [], []
        for filter_OIHW in filters:
            square_OIHW = filter_OIHW * filter_OIHW
            out.append(square_OIHW.sum((1, 2, 3)))
            patches.append(square_OIHW.sum(0).flatten())  # `index_add_` below sums over the kernel positions
        terms = torch.cat([*torch._foreach_mul(gammas, gammas), *out, *patches])
        return torch.zeros_like(self._scale_T).index_add_(0, self._squares_to, terms).sqrt_()


PENALTIES: Mapping[str, type[Penalty]] = {"l1": L1, "polarization": Polarization, "group_lasso": GroupLasso}


def macs_scale(model: nn.Module, groups: Sequence[Group], imgsz_hw: tuple[int, int]) -> dict[str, float]:
    """Return group name -> factor that makes a penalty proportional to FLOPs, as in MorphNet (Gordon et al., arXiv 1711.06798).

    The factor is the MACs that one channel of the group costs, divided by the mean over all channels. The MACs are counted in the
    model before training.
    """
    macs = channel_macs(model, groups, imgsz_hw)
    mean = sum(group.width * macs[group.name] for group in groups) / sum(group.width for group in groups)
    return {name: cost / mean for name, cost in macs.items()}


def _places(model: nn.Module, groups: Sequence[Group]) -> dict[str, dict[str, Tensor]]:
    """Return role -> module -> position in T of each channel on that side of the module.

    For a channel that belongs to no group, the position is the length of T.
    """
    width = sum(group.width for group in groups)
    places: dict[str, dict[str, Tensor]] = {"norm": {}, "out": {}, "in": {}}
    start = 0
    for group in groups:
        for member in group.members:
            weight = model.get_submodule(member.module).weight
            blank = torch.full((weight.shape[1 if member.role == "in" else 0],), width, device=weight.device)
            place = places[member.role].setdefault(member.module, blank)
            place[member.offset : member.offset + group.width] = torch.arange(start, start + group.width)
        start += group.width
    return places


def _per_channel(model: nn.Module, groups: Sequence[Group], scale: Mapping[str, float]) -> Tensor:
    """Return the penalty factor of each of the T channels, followed by a 0 for channels that belong to no group."""
    values = [scale.get(group.name, 1.0) for group in groups for _ in range(group.width)]
    weight = next(model.parameters())
    return torch.tensor([*values, 0.0], dtype=weight.dtype, device=weight.device)


def _weights(model: nn.Module, names: Sequence[str]) -> list[Tensor]:
    return [model.get_submodule(name).weight for name in names]


def _gradients(weights: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
    gradients = [weight.grad for weight in weights]
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is None:
            raise RecipeError(
                f"sparsify: the weight of {name} gets no gradient (frozen?); unfreeze it, or leave out the section sparsify"
            )
    return gradients
