"""Factors of full rank compute what the whole convolution computes, and the error of a rank is what its singular values say."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from ultralytics.nn.modules import C2f, Conv, DWConv

from tests.support.random_norms import with_random_norms
from yolo_compress.nets.factors import SCHEMES, can_factorise, chain_of, is_factorised
from yolo_compress.prune.calibration_stats import Moments
from yolo_compress.prune.factorise import Factoriser, InputStatistics, input_statistics, refit_last
from yolo_compress.prune.reconstruct import add_ridge

PIXELS = 16


def block_of(inputs, outputs, kernel, stride=1, seed=0):
    torch.manual_seed(seed)
    return with_random_norms(Conv(inputs, outputs, kernel, stride).double().eval())


def images(inputs, count=2, seed=0):
    """Smooth images whose channels are correlated and have means, as feature maps are."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, inputs, PIXELS, PIXELS, dtype=torch.float64, generator=generator)
    mixed = torch.einsum("bchw,cd->bdhw", noise, torch.randn(inputs, inputs, dtype=torch.float64, generator=generator))
    return nn.functional.avg_pool2d(mixed, 3, 1, 1) + torch.arange(inputs).view(1, -1, 1, 1)


def statistics_of(block, batches):
    return input_statistics(nn.Sequential(block), {"0.conv": block.conv.kernel_size[0]}, batches)["0.conv"]


def full(block, scheme):
    outputs, inputs, kernel, _ = block.conv.weight.shape
    return {
        "mix": (min(outputs, inputs * kernel * kernel),),
        "reduce": (min(inputs, outputs * kernel * kernel),),
        "spatial": (min(outputs, inputs) * kernel,),
        "tucker": (inputs, outputs),
    }[scheme]


shapes = st.tuples(
    st.integers(1, 7), st.integers(1, 9), st.sampled_from((1, 3, 5)), st.sampled_from((1, 2)), st.integers(0, 5)
)


@settings(max_examples=40, deadline=None)
@given(shapes, st.sampled_from(SCHEMES), st.booleans())
def test_full_rank_is_the_whole_convolution(shape, scheme, data_aware):
    inputs, outputs, kernel, stride, seed = shape
    block, x_BCHW = block_of(inputs, outputs, kernel, stride, seed), images(inputs, seed=seed)
    factoriser = Factoriser(block, statistics_of(block, [x_BCHW]) if data_aware else None)
    factors = factoriser.factors(scheme, full(block, scheme))
    chain = chain_of(block, scheme, factors).eval()
    assert is_factorised(chain) and {type(part) for part in chain} == {Conv}
    expected, got = block(x_BCHW), chain(x_BCHW)
    assert got.shape == expected.shape and (got - expected).abs().max() < 1e-9
    assert factoriser.lost_mean_O(factors).abs().max() < 1e-9
    before = [parameter.clone() for parameter in chain.parameters()]
    refit_last(nn.ModuleDict({"b": block}), {"b": chain}, [x_BCHW], block)
    assert all((now - then).abs().max() < 1e-6 for now, then in zip(chain.parameters(), before, strict=True))
    assert (chain(x_BCHW) - expected).abs().max() < 1e-9


def metric_of(block, statistics):
    """The covariance of the input under the kernel, (C H W, C H W), and the factor of each output, (O,)."""
    kernel = block.conv.kernel_size[0]

    def toeplitz(correlations):
        at = [1.0, *correlations]
        return torch.tensor([[at[abs(i - j)] for j in range(kernel)] for i in range(kernel)], dtype=torch.float64)

    neighbours = torch.kron(toeplitz(statistics.column), toeplitz(statistics.row))
    scale_O = block.bn.weight / torch.sqrt(block.bn.running_var + block.bn.eps)
    return torch.kron(add_ridge(statistics.moments.cov_CC), neighbours), scale_O.detach()


def dense_kernel(factors, block):
    """The kernel of the whole chain, as the response to unit impulses."""
    outputs, inputs, kernel, _ = block.conv.weight.shape
    x = torch.zeros(inputs * kernel * kernel, inputs, kernel, kernel, dtype=torch.float64)
    x.view(len(x), -1).fill_diagonal_(1.0)
    for factor in factors:
        x = nn.functional.conv2d(x, factor.weight_OIHW)
    return x.flatten(1).T.reshape(outputs, -1)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("data_aware", [True, False])
def test_the_error_is_what_the_discarded_singular_values_say(scheme, kernel, data_aware):
    """The error is measured in the metric of the input's second moment, on the kernel of the chain."""
    block = block_of(6, 8, kernel)
    statistics = InputStatistics(
        Moments(torch.zeros(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)),
        (0.0,) * (kernel - 1),
        (0.0,) * (kernel - 1),
    )
    if data_aware:
        statistics = statistics_of(block, [images(6, 4)])
    factoriser = Factoriser(block, statistics)
    covariance, scale_O = metric_of(block, statistics)
    whole = scale_O[:, None] * block.conv.weight.detach().flatten(1)
    power = torch.einsum("on,nm,om->", whole, covariance, whole)
    errors, limits = factoriser.errors(scheme), full(block, scheme)
    assert float(errors[tuple(0 for _ in limits)]) == pytest.approx(1) and abs(float(errors[limits])) < 1e-9
    previous = torch.tensor(2.0)
    for rank in range(1, min(limits) + 1):
        ranks = (rank,) * len(limits)
        missed = whole - scale_O[:, None] * dense_kernel(factoriser.factors(scheme, ranks), block)
        measured = torch.einsum("on,nm,om->", missed, covariance, missed) / power
        assert float(errors[ranks]) == pytest.approx(float(measured), abs=1e-9)
        assert errors[ranks] <= previous
        previous = errors[ranks]


def test_no_rank_r_kernel_is_better():
    """Eckart and Young: random kernels of the same rank, and the one of plain SVD, have a larger error."""
    block = block_of(6, 8, 1)
    statistics = statistics_of(block, [images(6, 4)])
    covariance, scale_O = metric_of(block, statistics)
    whole = scale_O[:, None] * block.conv.weight.detach().flatten(1)
    power = torch.einsum("on,nm,om->", whole, covariance, whole)
    best = float(Factoriser(block, statistics).errors("mix")[3])
    left, values, right = torch.linalg.svd(block.conv.weight.detach().flatten(1))
    plain = scale_O[:, None] * ((left[:, :3] * values[:3]) @ right[:3])
    for kernel in (
        plain,
        *(torch.randn(8, 3, dtype=torch.float64) @ torch.randn(3, 6, dtype=torch.float64) for _ in range(20)),
    ):
        missed = whole - kernel
        assert float(torch.einsum("on,nm,om->", missed, covariance, missed) / power) > best


def test_the_error_of_a_1x1_convolution_is_that_of_its_output_on_the_images():
    block, x_BCHW = block_of(6, 8, 1), images(6, 4)
    factoriser = Factoriser(block, statistics_of(block, [x_BCHW]))
    whole = block.bn(block.conv(x_BCHW)).detach()
    variance = whole.var((0, 2, 3), correction=0).sum()
    for rank in (1, 3, 5):
        factors = factoriser.factors("mix", (rank,))
        chain = chain_of(block, "mix", factors).eval()
        chain[-1].bn.running_mean.sub_(factoriser.lost_mean_O(factors))
        first, last = chain
        missed = whole - last.bn(last.conv(first(x_BCHW))).detach()
        assert missed.mean((0, 2, 3)).abs().max() < 1e-6, "moments are sums of float32 values"
        error = float(missed.var((0, 2, 3), correction=0).sum() / variance)
        assert error == pytest.approx(float(factoriser.errors("mix")[rank]), rel=1e-2, abs=1e-6)
        assert first(x_BCHW).var((0, 2, 3)).detach().numpy() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_refitting_lowers_the_error_on_the_images_and_keeps_the_mean(scheme):
    block, x_BCHW = block_of(6, 8, 3), images(6, 4)
    factoriser = Factoriser(block, statistics_of(block, [x_BCHW]))
    ranks = (3, 3) if scheme == "tucker" else (3,)
    chain = chain_of(block, scheme, factoriser.factors(scheme, ranks)).eval()

    def output(net):
        *inner, last = net
        y = x_BCHW
        for part in inner:
            y = part(y)
        return last.bn(last.conv(y)).detach()

    whole = block.bn(block.conv(x_BCHW)).detach()
    before = (whole - output(chain)).var((0, 2, 3)).sum()
    refit_last(nn.ModuleDict({"b": block}), {"b": chain}, [x_BCHW[:2], x_BCHW[2:]], block)
    missed = whole - output(chain)
    assert missed.var((0, 2, 3)).sum() < before and missed.mean((0, 2, 3)).abs().max() < 1e-9


def test_correlations_are_those_of_neighbours():
    x_BCHW = images(3, 6)
    statistics = statistics_of(block_of(3, 4, 3), [x_BCHW[:2], x_BCHW[2:]])
    centred = x_BCHW - x_BCHW.mean((0, 2, 3), keepdim=True)
    variance = centred.square().sum(1).mean()
    for axis, found in ((2, statistics.column), (3, statistics.row)):
        for distance in (1, 2):
            size = PIXELS - distance
            both = centred.narrow(axis, 0, size) * centred.narrow(axis, distance, size)
            assert found[distance - 1] == pytest.approx(float(both.sum(1).mean() / variance), abs=0.03)


def test_only_plain_convolutions_with_one_group_can_be_factorised():
    assert can_factorise(block_of(4, 6, 3, 2)) and can_factorise(block_of(4, 6, 1))
    assert not can_factorise(DWConv(4, 4, 3)) and not can_factorise(Conv(4, 4, 3, g=4)), "depthwise"
    assert not can_factorise(Conv(4, 8, 3, g=2)), "grouped"
    assert not can_factorise(Conv(4, 4, 3, d=2)) and not can_factorise(Conv(4, 4, (1, 3)))
    assert not can_factorise(nn.Conv2d(4, 4, 1)) and not can_factorise(C2f(4, 4))


def test_a_dead_channel_gives_finite_factors():
    block = block_of(4, 6, 3)
    with torch.no_grad():
        block.bn.weight[2] = 0
        block.conv.weight[:, 1] = 0
    x_BCHW = images(4)
    x_BCHW[:, 3] = 0.5
    for scheme in SCHEMES:
        chain = chain_of(
            block, scheme, Factoriser(block, statistics_of(block, [x_BCHW])).factors(scheme, full(block, scheme))
        )
        assert (chain.eval()(x_BCHW) - block(x_BCHW)).abs().max() < 1e-9


def test_the_block_itself_does_not_change():
    block = block_of(4, 6, 3)
    before = copy.deepcopy(block.state_dict())
    chain = chain_of(block, "mix", Factoriser(block, None).factors("mix", (2,)))
    with torch.no_grad():
        for tensor in [*chain.parameters(), *chain.buffers()]:
            tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())
