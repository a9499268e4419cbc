"""update_selection_bias: exact signs, no host sync, and a skewed router that it brings to balance."""

import pytest
import torch

from cumo_kernels import route, update_selection_bias


@pytest.mark.parametrize("count", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_bias_moves_by_the_rate_towards_the_mean(dtype, count):
    bias = torch.tensor([0.5, -0.25, 0.0, 1.0, 0.0], dtype=dtype)
    load = torch.tensor([10, 4, 7, 7, 7], dtype=count)  # mean 7
    wanted = bias + 0.01 * torch.tensor([-1, 1, 0, 0, 0], dtype=dtype)
    assert update_selection_bias(bias, load, 0.01) is None
    assert torch.equal(bias, wanted)


def test_the_rate_is_a_thousandth_by_default():
    bias = torch.zeros(2)
    update_selection_bias(bias, torch.tensor([3, 1]))
    assert torch.equal(bias, torch.tensor([-0.001, 0.001]))


def test_rows_of_counts_are_added_up_and_a_strided_bias_is_changed_in_place():
    whole = torch.zeros(6)
    update_selection_bias(whole[::2], torch.tensor([[9, 0, 0], [0, 4, 5]], dtype=torch.int32), 1.0)
    assert torch.equal(whole, torch.tensor([-1.0, 0, 1, 0, 1, 0]))


@pytest.mark.parametrize("load", [[5, 5, 5], [0, 0, 0]])
def test_an_even_load_leaves_the_bias(load):
    bias = torch.randn(3)
    before = bias.clone()
    update_selection_bias(bias, torch.tensor(load))
    assert torch.equal(bias, before)


def test_counts_near_the_mean_have_an_exact_sign():
    """In fp32 both loads would be the mean."""
    bias = torch.zeros(2)
    update_selection_bias(bias, torch.tensor([2**31 - 1, 2**31 - 3]), 1.0)
    assert torch.equal(bias, torch.tensor([-1.0, 1.0]))


def test_a_parameter_is_changed_without_a_gradient():
    bias = torch.zeros(3, requires_grad=True)
    update_selection_bias(bias, torch.tensor([1, 0, 0]), 1.0)
    assert bias.grad_fn is None and torch.equal(bias.detach(), torch.tensor([-1.0, 1, 1]))


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_a_skewed_router_comes_to_balance(score):
    """Two of eight experts get most tokens at first; in the end all loads are within a tenth of the mean."""
    logits = torch.randn(4000, 8) + 3.0 * (torch.arange(8) < 2)
    bias, rate = torch.zeros(8), 0.001
    first = route(logits, 2, score=score, selection_bias=bias).tokens_per_expert
    for _ in range(1000):
        routing = route(logits, 2, score=score, selection_bias=bias)
        update_selection_bias(bias, routing.tokens_per_expert, rate)
    mean = 4000 * 2 / 8
    assert first.max() > 2 * mean
    assert (routing.tokens_per_expert - mean).abs().max() < mean / 10


COUNTS = torch.zeros(4, dtype=torch.int32)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([0.0] * 4, COUNTS), "bias must be a tensor, got list"),
        ((torch.zeros(2, 2), COUNTS), r"bias must be \(E,\), got \(2, 2\)"),
        ((COUNTS, COUNTS), "bias must be float32 or float64, which hold small steps, got torch.int32"),
        ((torch.zeros(4).bfloat16(), COUNTS), "bias must be float32 or float64, .*, got torch.bfloat16"),
        ((torch.zeros(4).half(), COUNTS), "bias must be float32 or float64, .*, got torch.float16"),
        ((torch.zeros(4), [1, 2, 3, 4]), "tokens_per_expert must be a tensor, got list"),
        ((torch.zeros(3), COUNTS), r"tokens_per_expert must be \(3,\) or \(G, 3\) like bias, got \(4,\)"),
        ((torch.zeros(4), COUNTS[None, None]), r"tokens_per_expert must be \(4,\) or \(G, 4\) like bias"),
        ((torch.zeros(4), torch.zeros(4)), "tokens_per_expert must be int32 or int64, got torch.float32"),
        ((torch.zeros(4, device="meta"), COUNTS), "tokens_per_expert must be on the device of bias, meta"),
        ((torch.zeros(4), COUNTS, "fast"), "rate must be a number, got 'fast'"),
        ((torch.zeros(4), COUNTS, True), "rate must be a number, got True"),
        ((torch.zeros(4), COUNTS, float("nan")), "rate must be finite and not negative, got nan"),
        ((torch.zeros(4), COUNTS, -0.1), "rate must be finite and not negative, got -0.1"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        update_selection_bias(*arguments)
