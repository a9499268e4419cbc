"""The connector compared with a literal loop and with two nn.Linear; errors."""

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import gelu

from cumo_kernels.testing import assert_as_accurate_as_torch
from cumo_model import CumoForConditionalGeneration, load_balancing_loss, record_routing, router_z_loss
from cumo_model.model.mlp_moe import CumoProjector
from tests.rounding import assert_spread


def literal(x, gate, up, up_bias, down, down_bias):
    """x (B, n, H), each image as a group -> output, balance loss, z-loss."""
    (B, n, _), E = x.shape, gate.shape[0]
    out, balance, z = [], 0, 0
    for image in x:
        probs, first, rows = 0, torch.zeros(E, dtype=x.dtype), []
        for token in image:
            logits = gate @ token
            p = logits.softmax(0)
            best = p.argsort(descending=True)[:2]
            w = p[best] / p[best].sum()
            hidden = [gelu(up[e] @ token + up_bias[e]) for e in best]
            rows.append(sum(w[k] * (down[e] @ hidden[k] + down_bias[e]) for k, e in enumerate(best)))
            first[best[0]] += 1 / n
            probs = probs + p / n
            z = z + logits.logsumexp(0) ** 2 / (B * n)
        out.append(torch.stack(rows))
        balance = balance + E**2 * (first * probs).mean() / B
    return torch.stack(out), balance, z


def test_output_losses_and_gradients_are_the_loops(tiny_config):
    projector = CumoProjector(tiny_config())
    parameters = {name: torch.randn_like(value) / 4 for name, value in projector.named_parameters()}
    assert list(parameters) == [
        "mlp.gate.weight",
        *(f"mlp.experts.{name}" for name in ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias")),
    ]

    def op(x, *values):
        with record_routing() as records:
            out = functional_call(projector, dict(zip(parameters, values, strict=True)), (x,))
        (record,) = records
        assert record.place == "mlp" and record.routing.stats.mean_probs.shape == (3, 4)
        return out, load_balancing_loss(record.routing.stats), router_z_loss(record.routing.stats)

    assert_as_accurate_as_torch(op, literal, torch.randn(3, 5, 64), *parameters.values())


def test_one_expert_is_a_dense_mlp_without_routing(tiny_config):
    projector = CumoProjector(tiny_config(projector_num_experts=1))
    x = torch.randn(3, 5, 64)
    fc1, fc2 = projector.mlp.fc1, projector.mlp.fc2
    with record_routing() as records:
        out = projector(x)
    assert records == []
    assert torch.equal(out, gelu(x @ fc1.weight.T + fc1.bias) @ fc2.weight.T + fc2.bias)


@pytest.mark.parametrize("num_experts", [1, 4])
def test_input_is_as_wide_as_the_scales_together(tiny_config, num_experts):
    projector = CumoProjector(tiny_config(scales=(1, 2, 3), projector_num_experts=num_experts))
    assert projector(torch.randn(2, 9, 96)).shape == (2, 9, 24)


SIZES = {"vision": {"hidden_size": 96}, "text_options": {"hidden_size": 400}, "scales": (1, 2)}


def assert_uniform(drawn, bound):
    """Uniform in [-bound, bound]: at least 400 draws, so one is beyond 0.97 at both ends (p < 0.003)."""
    assert drawn.numel() >= 400 and -bound <= drawn.min() < -0.97 * bound
    assert 0.97 * bound < drawn.max() <= bound
    assert_spread(drawn, bound / 3**0.5)


def test_a_new_connector_starts_as_nn_linear_does(tiny_config):
    """Every expert and the gate as in the original code: weights and biases from U(+-1/sqrt(fan_in))."""
    first, second = (2 * 96) ** -0.5, 400**-0.5  # of the features of both scales, and of the inner units
    model = CumoForConditionalGeneration(tiny_config(projector_num_experts=5, **SIZES))
    layer = model.model.multi_modal_projector.mlp
    assert_uniform(layer.gate.weight, first)
    experts, biases = layer.experts, []
    for weight, bias, bound in (
        (experts.up_proj, experts.up_proj_bias, first),
        (experts.down_proj, experts.down_proj_bias, second),
    ):
        assert len(weight) == len(bias) == 5
        for expert in weight:
            assert_uniform(expert, bound)
        assert_uniform(bias, bound)
        biases += bias.tolist()
        assert len({expert.flatten()[0].item() for expert in weight}) == 5
    assert len(set(map(tuple, biases))) == 10


def test_a_new_dense_connector_starts_as_nn_linear_does(tiny_config):
    model = CumoForConditionalGeneration(tiny_config(projector_num_experts=1, **SIZES))
    mlp = model.model.multi_modal_projector.mlp
    for layer, bound in ((mlp.fc1, (2 * 96) ** -0.5), (mlp.fc2, 400**-0.5)):
        assert_uniform(layer.weight, bound)
        assert_uniform(layer.bias, bound)


@pytest.mark.parametrize("shape", [(2, 9, 32), (9, 64)])
def test_bad_input_is_named(tiny_config, shape):
    with pytest.raises(ValueError, match=r"features must be \(B, n, 64\), got \("):
        CumoProjector(tiny_config())(torch.randn(shape))


def test_bad_config_is_named(tiny_config):
    for top_k in (3, 0):
        message = rf"projector_num_experts_per_tok must be .* 2 experts, got {top_k}"
        with pytest.raises(ValueError, match=message):
            tiny_config(projector_num_experts=2, projector_num_experts_per_tok=top_k)
