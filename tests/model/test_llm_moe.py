"""Mixtral with MoELayer compared with transformers' Mixtral and with a literal loop; checkpoints; errors."""

import pytest
import torch
from safetensors import safe_open
from torch.func import functional_call
from torch.nn.functional import silu
from transformers import (
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    MixtralModel,
    Qwen3MoeConfig,
    StaticCache,
)
from transformers.activations import ACT2FN

from cumo_kernels.testing import assert_as_accurate_as_torch
from cumo_model import MoELayer, load_balancing_loss, record_routing, router_z_loss
from cumo_model.model.compat import cache_argument
from cumo_model.model.llm_moe import GATED_ACTIVATION_OF, CumoMixtralModel, build_language_model
from tests.rounding import assert_same_formula, assert_spread

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 30,
    "max_position_embeddings": 64,
}


def mixtral_config(**options) -> MixtralConfig:
    return MixtralConfig(**SIZES, num_local_experts=5, initializer_range=0.3, **options)


def literal(x, gate, gate_up, down):
    """x (B, S, H), all tokens as one group -> output, balance loss, z-loss."""
    tokens, E = x.flatten(0, 1), gate.shape[0]
    T = len(tokens)
    rows, first, probs, z = [], [0] * E, 0, 0
    for token in tokens:
        logits = gate @ token
        p = logits.softmax(0)
        best = p.argsort(descending=True)[:2].tolist()
        out = 0
        for e in best:
            w1, w3 = gate_up[e].chunk(2)
            out = out + p[e] / p[best].sum() * (down[e] @ (silu(w1 @ token) * (w3 @ token)))
        rows.append(out)
        first[best[0]] += 1
        probs = probs + p
        z = z + logits.logsumexp(0) ** 2
    balance = E**2 * sum(f / T * P / T for f, P in zip(first, probs, strict=True)) / E
    return torch.stack(rows).view_as(x), balance, z / T


def test_output_losses_and_gradients_are_the_loops():
    mlp = CumoMixtralModel(mixtral_config()).layers[1].mlp
    names = [name for name, _ in mlp.named_parameters()]
    assert names == ["gate.weight", "experts.gate_up_proj", "experts.down_proj"]

    def op(x, *values):
        with record_routing() as records:
            out = functional_call(mlp, dict(zip(names, values, strict=True)), (x,))
        (record,) = records
        assert (record.place, record.layer) == ("llm", 1)
        return out, load_balancing_loss(record.routing.stats), router_z_loss(record.routing.stats)

    assert_as_accurate_as_torch(op, literal, torch.randn(2, 7, 16), *(p.detach() for p in mlp.parameters()))


def test_whole_model_is_transformers_mixtral():
    options = {"rms_norm_eps": 0.1, "pad_token_id": 0}  # a token without gradient
    theirs = MixtralModel(mixtral_config(**options, experts_implementation="eager"))
    ours = build_language_model(mixtral_config(**options))
    ours.load_state_dict(theirs.state_dict())
    names = [name for name, _ in ours.named_parameters()]
    input_ids = torch.randint(30, (2, 9))
    mask = torch.ones_like(input_ids)
    mask[0, :4] = 0

    def run(model):
        def function(*values):
            arguments = {"input_ids": input_ids, "attention_mask": mask, "use_cache": False}
            return functional_call(model, dict(zip(names, values, strict=True)), kwargs=arguments)[0][:, 4:]

        return function

    assert_as_accurate_as_torch(run(ours), run(theirs), *(p.detach() for p in theirs.parameters()))


MASKS = {
    "none": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]],
    "left": [[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 1, 0, 1], [1, 1, 0, 1, 1, 1]],
    "a row": [[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]],
    "all": [[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
}


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("kind", [torch.bool, torch.int64])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_statistics_are_those_of_the_tokens_of_the_mask(mask, kind):
    """And those of all tokens with compat, also without logits; the plan has all tokens in any case."""
    mask = torch.tensor(mask, dtype=kind)
    input_ids = torch.randint(30, (2, 6))
    for compat in (None, "cumo"):
        model = build_language_model(mixtral_config(), compat).double()
        with record_routing(logits=True) as records:
            model(input_ids=input_ids, attention_mask=mask, use_cache=False)
        with record_routing() as again:
            model(input_ids=input_ids, attention_mask=mask, use_cache=False)
        real = mask.flatten().bool() if compat is None else torch.ones(12, dtype=torch.bool)
        count = max(1, int(real.sum()))
        for record, other in zip(records, again, strict=True):
            kept, chosen = record.logits[real], record.routing.topk_indices[real].flatten()
            stats = {
                "mean_probs": kept.softmax(-1).sum(0)[None] / count,
                "top1_density": torch.nn.functional.one_hot(kept.argmax(-1), 5).double().sum(0)[None] / count,
                "mean_squared_logsumexp": kept.logsumexp(-1).square().sum()[None] / count,
            }
            for name, wanted in stats.items():
                assert_same_formula(getattr(record.routing.stats, name), wanted)
                assert torch.equal(getattr(record.routing.stats, name), getattr(other.routing.stats, name))
            assert record.tokens_per_expert.tolist() == torch.bincount(chosen, minlength=5).tolist()
            assert record.tokens_per_expert.dtype == torch.int32
            assert int(record.num_slots) == 2 * int(real.sum())
            assert record.routing.num_tokens == 12 and int(record.routing.tokens_per_expert.sum()) == 24


def test_masks_of_other_forms_do_not_say_what_is_padding():
    model = build_language_model(mixtral_config())
    input_ids = torch.randint(30, (2, 6))
    allowed = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6)
    for mask in (None, allowed):
        with record_routing() as records:
            model(input_ids=input_ids, attention_mask=mask, use_cache=False)
        assert all(record.counted is None for record in records)


@pytest.mark.parametrize("cache", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=10)])
def test_with_a_cache_the_mask_begins_before_the_tokens(cache):
    config = mixtral_config()
    model = build_language_model(config).eval()
    mask = torch.tensor([[0, 1, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1, 1]])
    input_ids, earlier = torch.randint(30, (2, 7)), cache(config=config)
    with torch.no_grad(), record_routing() as records:
        for part in (slice(0, 4), slice(4, 6), slice(6, 7)):
            model(input_ids[:, part], mask[:, : part.stop], **cache_argument(earlier))
    for number, part in enumerate((slice(0, 4), slice(4, 6), slice(6, 7))):
        assert torch.equal(records[2 * number].counted, mask[:, part].flatten().bool())


def test_an_explicit_mask_counts_before_the_attention_mask_and_with_compat():
    ids, mask = torch.randint(30, (2, 6)), torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    for compat in (None, "cumo"):
        with record_routing() as records:
            build_language_model(mixtral_config(), compat)(
                ids, torch.ones_like(mask), router_mask=mask, use_cache=False
            )
        assert all(torch.equal(record.counted, mask.flatten().bool()) for record in records)


def test_a_layer_names_a_mask_that_does_not_fit():
    layer, x = build_language_model(mixtral_config()).layers[0].mlp, torch.randn(2, 6, 16)
    with pytest.raises(
        ValueError, match=r"counted must be \(2, 6\) of torch.bool, got \(12,\) of torch.bool"
    ):
        layer(x, counted=torch.ones(12, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"counted must be .*, got \(2, 6\) of torch.int64"):
        layer(x, counted=torch.ones(2, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match="groups must be 1 with counted, got 2"):
        layer(x, groups=2, counted=torch.ones(2, 6, dtype=torch.bool))


@pytest.mark.parametrize("per_expert", [True, False], ids=["per-expert", "stacked"])
def test_checkpoints_of_transformers_load_unchanged(tmp_path, per_expert):
    theirs = MixtralModel(mixtral_config()).eval()
    theirs.save_pretrained(tmp_path, save_original_format=per_expert)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert any("block_sparse_moe.experts.4.w1.weight" in key for key in file.keys()) == per_expert
    ours, info = CumoMixtralModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
    ours.save_pretrained(tmp_path / "again")
    again = MixtralModel.from_pretrained(tmp_path / "again").state_dict()
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, again[name]), name


def test_compat_reaches_the_layers():
    assert {layer.mlp.compat for layer in build_language_model(mixtral_config(), "cumo").layers} == {
        "cumo_llm"
    }
    assert {layer.mlp.compat for layer in build_language_model(mixtral_config()).layers} == {None}


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("act", GATED_ACTIVATION_OF)
def test_experts_have_the_activation_of_the_config(act):
    config = mixtral_config(hidden_act=act)
    layer, x = build_language_model(config).layers[0].mlp, torch.randn(6, 16)
    gate_up, down = layer.experts.gate_up_proj, layer.experts.down_proj
    with torch.no_grad():
        gate_up.copy_(gate_up[:1].expand_as(gate_up)), down.copy_(down[:1].expand_as(down))
    gate, up = (x @ gate_up[0].T).chunk(2, -1)
    assert_same_formula(layer(x), ACT2FN[act](gate) * up @ down[0].T)


def test_weights_start_as_transformers():
    model = build_language_model(mixtral_config())
    for name, _ in model.layers[0].mlp.named_parameters():
        assert_spread(torch.stack([layer.mlp.get_parameter(name) for layer in model.layers]), 0.3)


@pytest.mark.parametrize("config", [MistralConfig(**SIZES), LlamaConfig(**SIZES)], ids=["mistral", "llama"])
def test_dense_models_stay_as_they_are(config):
    model = build_language_model(config)
    assert type(model).__module__.startswith("transformers.")
    assert not any(isinstance(module, MoELayer) for module in model.modules())


def test_what_cannot_run_is_named():
    sparse = Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=8)
    with pytest.raises(ValueError, match=r"model_type must be mixtral or a dense model, got 'qwen3_moe'"):
        build_language_model(sparse)
    with pytest.raises(ValueError, match=r"text_config.router_jitter_noise must be 0, got 0.1"):
        build_language_model(mixtral_config(router_jitter_noise=0.1))
    with pytest.raises(ValueError, match=r"text_config.hidden_act must be one of .*, got 'tanh'"):
        build_language_model(mixtral_config(hidden_act="tanh"))
