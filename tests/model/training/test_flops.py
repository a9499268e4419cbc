"""FLOPs of a step by hand: what a frozen part costs, tokens that get logits, routers of the last layer."""

import pytest

from cumo_model.training.flops import projector_flops, step_flops, text_flops, vision_flops

# parts that are trained -> how often the forward pass of tower, connector and language model is paid: once
# if nothing before or in the part is trained, twice if gradients pass through, three times if it is trained
PAID = {
    ("vision", "projector", "language"): (3, 3, 3),
    ("vision",): (3, 2, 2),
    ("projector",): (1, 3, 2),
    ("vision", "projector"): (3, 3, 2),
    ("language",): (1, 1, 3),
    ("projector", "language"): (1, 3, 3),
}


@pytest.mark.parametrize("trains", PAID)
def test_a_part_is_paid_for_by_what_is_trained_in_and_before_it(tiny_config, trains):
    config = tiny_config(scales=(1, 3))
    tower, connector, language = PAID[trains]
    text = text_flops(config, 34, 17, 5)
    pictures = tower * vision_flops(config, True) + connector * projector_flops(config)
    assert step_flops(config, trains, 34, 17, 5, 3) == language * text + 3 * pictures
    assert step_flops(config, trains, 34, 17, 5, 0) == language * text


def test_forward_flops_of_the_language_model_by_hand(tiny_config):
    """Two heads of 16, wider than the hidden size, one with keys and values; five tokens get logits.

    One layer of Mixtral has a gate over five experts, of which a token uses three.
    """
    options = {"head_dim": 16, "num_hidden_layers": 1}
    tokens, width, predicted, hidden, inner, words = 34, 17, 5, 24, 40, 50
    attention = hidden * 16 * (2 + 1 + 1 + 2) + 2 * 17 * 2 * 16  # q, k, v, o; scores and values of each query
    head = 2 * predicted * hidden * words
    dense = tiny_config(text_options=options)
    wanted = 2 * tokens * (attention + 3 * hidden * inner) + head
    assert text_flops(dense, tokens, width, predicted) == wanted
    options |= {"num_local_experts": 5, "num_experts_per_tok": 3}
    sparse = tiny_config(text="mixtral", text_options=options)
    wanted = 2 * tokens * (attention + 3 * 3 * hidden * inner + 5 * hidden) + head
    assert text_flops(sparse, tokens, width, predicted) == wanted


@pytest.mark.parametrize("experts, top_k", [(1, 2), (5, 3)])
def test_forward_flops_of_tower_and_connector_by_hand(tiny_config, experts, top_k):
    """Nine patches and a class token; the features are those of the last layer but one, of three.

    The last layer runs for the statistics of its router only, so it has attention and a gate.
    """
    config = tiny_config(
        vision_experts=experts, vision={"num_experts_per_tok": top_k}, projector_num_experts=experts,
        projector_num_experts_per_tok=top_k, scales=(1, 3),
    )  # fmt: skip
    used, gate = (top_k, experts) if experts > 1 else (1, 0)
    attention = 10 * 4 * 32 * 32 + 2 * 10 * 10 * 32 + 10 * gate * 32
    tower = 2 * (attention + 10 * used * 2 * 32 * 48) + 9 * 32 * 3 * 4 * 4
    last = attention if gate else 0
    assert vision_flops(config, True) == 2 * (tower + last) * (1 + 9)
    assert vision_flops(config, False) == 2 * tower * (1 + 9)
    wide = 2 * 32  # both scales
    assert projector_flops(config) == 2 * 9 * (used * (wide * 24 + 24 * 24) + gate * wide)
