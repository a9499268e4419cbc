"""The two router losses on statistics with known results, and their averages over layers and scales."""

import pytest
import torch

from cumo_kernels import RouterStats, route
from cumo_kernels.testing import assert_as_accurate_as_torch
from cumo_model import load_balancing_loss, router_z_loss
from cumo_model.model.losses import place_losses, smoothed_language_loss
from tests.rounding import assert_same_formula


def test_uniform_routing_costs_one():
    density = torch.full((3, 8), 1 / 8)
    assert load_balancing_loss((density, density)) == 1


def test_collapse_costs_the_number_of_experts():
    collapsed = torch.eye(8)[:1]
    assert load_balancing_loss((collapsed, collapsed)) == 8


def test_density_counts_first_choices_only():
    """Tokens with the same second choice and different first choices are balanced."""
    logits = torch.full((4, 5), -9.0)
    logits[torch.arange(4), torch.arange(4)] = 2.0
    logits[:, 4] = 1.0
    stats = route(logits, 2).stats
    assert torch.equal(stats.top1_density, torch.tensor([[0.25, 0.25, 0.25, 0.25, 0.0]]))


def test_groups_are_averaged_after_the_product():
    """Two crops, each collapsed to another expert: balanced over the batch, collapsed per crop."""
    logits = 50 * torch.eye(2).repeat_interleave(4, 0)
    assert load_balancing_loss(route(logits, 1, groups=2).stats) == 2
    assert load_balancing_loss(route(logits, 1, groups=1).stats) == 1


@pytest.mark.usefixtures("fp64")
def test_gradient_flows_through_probabilities_only():
    logits = torch.randn(6, 4, requires_grad=True)
    stats = route(logits, 2).stats
    assert not stats.top1_density.requires_grad
    load_balancing_loss(stats).backward()
    p = logits.detach().softmax(-1).requires_grad_()
    (p.mean(0) * stats.top1_density[0]).sum().mul(4).backward()
    with torch.no_grad():
        wanted = p * (p.grad - (p.grad * p).sum(-1, keepdim=True))
    assert_same_formula(logits.grad, wanted)


@pytest.mark.usefixtures("fp64")
def test_z_loss_is_the_mean_of_squared_logsumexp():
    logits = torch.randn(6, 4)
    assert_same_formula(router_z_loss(route(logits, 2, groups=3).stats), logits.logsumexp(-1).square().mean())


def test_losses_are_fp32_scalars():
    stats = route(torch.randn(6, 4).bfloat16(), 2).stats
    for loss in (load_balancing_loss(stats), router_z_loss(stats), *place_losses([stats, stats])):
        assert loss.shape == () and loss.dtype == torch.float32


def test_the_smoothed_loss_of_16_bit_logits_is_fp32():
    logits, labels = (8 * torch.randn(2, 50, 300)).bfloat16(), torch.randint(300, (2, 50))
    wide, narrow = (smoothed_language_loss(0.1)(x, labels, 300) for x in (logits.float(), logits))
    assert narrow.dtype == torch.float32 and torch.equal(narrow, wide)


def test_layers_then_scales_are_averaged():
    """Mean over layers within a scale, then unweighted mean over scales: 2 crops have the weight of 18."""
    counts = [2, 18, 8]

    def op(mean_probs, density, z):
        return place_losses([RouterStats(*row) for row in zip(mean_probs, density, z, strict=True)], counts)

    def reference(mean_probs, density, z):
        totals, begin = [0, 0], 0
        for count in counts:
            scale = slice(begin, begin + count)
            layers = [
                (load_balancing_loss((p[scale], f[scale])), s[scale].mean())
                for p, f, s in zip(mean_probs, density, z, strict=True)
            ]
            for i in range(2):
                totals[i] = totals[i] + sum(layer[i] for layer in layers) / len(layers) / len(counts)
            begin += count
        return tuple(totals)

    assert_as_accurate_as_torch(op, reference, torch.rand(3, 28, 4), torch.rand(3, 28, 4), torch.rand(3, 28))


@pytest.mark.usefixtures("fp64")
def test_one_scale_is_the_mean_over_layers_and_groups():
    stats = [route(torch.randn(6, 4), 2, groups=3).stats for _ in range(2)]
    for counts in (None, [3]):
        balance, z = place_losses(stats, counts)
        assert_same_formula(balance, (load_balancing_loss(stats[0]) + load_balancing_loss(stats[1])) / 2)
        assert_same_formula(z, (router_z_loss(stats[0]) + router_z_loss(stats[1])) / 2)
