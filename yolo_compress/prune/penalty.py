"""What sparse training adds to the loss, as its subgradient: L1 on gammas, all or the weak, or group lasso on whole channels.

Legend: T channels of all groups end to end, O and I output and input channels of a convolution, C features of a BatchNorm.
Positions of every tensor's channels among the T are found once; a step is a few passes over the weights, without a loop over groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from yolo_compress.errors import RecipeError
from yolo_compress.prune.cost import channel_macs
from yolo_compress.prune.graph import Group

SMALLEST_NORM = 1e-12  # divides instead of a smaller norm: at 0 the subgradient is 0, and nothing is NaN


class Penalty(ABC):
    """A sum over the channels of groups, each group times its own scale."""

    @abstractmethod
    def bind(self, model: nn.Module, groups: Sequence[Group], scale: Mapping[str, float]) -> None:
        """Finds the weights, once, on the model's device; `scale` is by group name, 1 where it is silent."""

    @abstractmethod
    def add_subgradient(self, model: nn.Module, strength: float) -> None:
        """Adds `strength` times the subgradient to the gradients.

        Raises:
            RecipeError: a weight is frozen: freezing and sparsifying the same layer contradict each other.
        """


class L1(Penalty):
    """`sum_g s_g sum |gamma|` (Network Slimming, arXiv 1708.06519, equation 1); its subgradient is `s_g sign(gamma)`."""

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
    """`sum_g s_g sum |gamma|` over the channels that are weaker than the mean of their group: the weak fade, the strong stay.

    L1 pulls all gammas down alike, which ranks nothing until many of them are 0, and empties layers that little depends on.
    Zhuang et al. (NeurIPS 2020, "Neuron-level Structured Pruning using Polarization Regularizer", equation 2) subtract
    `sum |gamma - mean|`, which for t = 1 leaves twice this, but for a term of the mean's own derivative that is near 0. Here the
    mean is that of a group instead of the whole net, so that no layer fades as a whole. A channel's strength is the sum of its
    gammas over the BatchNorms of the group, as for the criterion `bn_gamma`.
    """

    def bind(self, model: nn.Module, groups: Sequence[Group], scale: Mapping[str, float]) -> None:
        norms = _places(model, groups)["norm"]
        self._scale_T = _per_channel(model, groups, scale)
        self._names = list(norms)
        self._place = torch.cat(list(norms.values()))
        self._sizes = [len(place_C) for place_C in norms.values()]
        width_G = torch.tensor([group.width for group in groups], device=self._place.device)
        own_T = torch.arange(len(groups), device=self._place.device).repeat_interleave(width_G)
        self._group_T = torch.cat([own_T, own_T.new_tensor([len(groups)])])  # the last: channels in no group
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
    """`sum_g s_g sum_k n_gk`, where `n_gk` is the L2 norm of all weights that leave with channel k of group g.

    These are, as in the sparse training of DepGraph (arXiv 2301.12900), for all members of the group: the filters that write the
    channel, the slices of the filters that read it, and its gammas; no biases. So coupled layers agree on which channel fades.

    With `n_gk^2 = sum of theta^2`, the derivative by a weight theta is `s_g theta / n_gk`, and 0 where the channel is all
    zeros. A gamma belongs to one channel. `w_OI` of a convolution belongs to the channel that it writes and to the one that it
    reads, so it gets `w_OI * (r_O + r_I)` with `r = s / n`; `r` is 0 for channels in no group (images, outputs of Detect).

    DepGraph penalises `c_k n_k^2` with `c_k` from 1 to 16, larger for weaker channels; here `1 / n_k` does that, without a range
    to choose. The norm is not multiplied by the root of the number of weights as in Yuan and Lin, so that lambda acts on a
    gamma no harder than under L1: the pull on a channel is a vector of length `s_g`.
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
            patches.append(inputs[-1].repeat_interleave(weight_OIHW[0, 0].numel()))  # of a filter's I x H x W numbers
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
        """`n_gk` of all channels; the last entry gathers what is in no group.

        One tensor at a time: squares of all at once leave the cache and take a CPU four times as long.
        """
        out, patches = [], []
        for filter_OIHW in filters:
            square_OIHW = filter_OIHW * filter_OIHW
            out.append(square_OIHW.sum((1, 2, 3)))
            patches.append(square_OIHW.sum(0).flatten())  # the rest of the sum over (0, 2, 3) is in the index
        terms = torch.cat([*torch._foreach_mul(gammas, gammas), *out, *patches])
        return torch.zeros_like(self._scale_T).index_add_(0, self._squares_to, terms).sqrt_()


PENALTIES: Mapping[str, type[Penalty]] = {"l1": L1, "polarization": Polarization, "group_lasso": GroupLasso}


def macs_scale(model: nn.Module, groups: Sequence[Group], imgsz_hw: tuple[int, int]) -> dict[str, float]:
    """Group name -> MACs that one of its channels costs, over the mean of all channels: the costly are pushed harder.

    So the penalty counts FLOPs that are still in use, as MorphNet's does (Gordon et al., arXiv 1711.06798), at the first widths.
    """
    macs = channel_macs(model, groups, imgsz_hw)
    mean = sum(group.width * macs[group.name] for group in groups) / sum(group.width for group in groups)
    return {name: cost / mean for name, cost in macs.items()}


def _places(model: nn.Module, groups: Sequence[Group]) -> dict[str, dict[str, Tensor]]:
    """Role -> module -> where each channel of that side stands among the T; T itself for channels in no group."""
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
    """`scale` of all T channels, and 0 for what is in no group."""
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
                f"sparsify: the weight of {name} gets no gradient (frozen?); unfreeze it or leave sparsify out"
            )
    return gradients
