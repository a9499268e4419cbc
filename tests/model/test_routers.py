"""Options of routers: in config, layer and model, in training and evaluation, saved, upcycled and refused."""

import copy
import json

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from cumo_kernels import route
from cumo_kernels.ops.noise import jittered
from cumo_kernels.ops.noisy import noisy_top_k
from cumo_kernels.ops.routing import with_capacity
from cumo_model import (
    CumoConfig,
    CumoForConditionalGeneration,
    CumoVisionModel,
    MoELayer,
    record_routing,
    step0_difference,
    upcycle,
)
from cumo_model.checkpoints.original_config import to_original
from cumo_model.checkpoints.upcycle import upcycled_config
from cumo_model.model.routers import RouterOptions
from cumo_model.serving.vllm.limits import check_config
from tests.rounding import assert_same_formula

H, E, K = 8, 6, 2
LOSS_FREE = {"score": "sigmoid", "selection_bias": True}
GROUPED = {**LOSS_FREE, "expert_groups": 3, "top_groups": 2, "group_score": "top2", "scale": 2.5}
NOISY = {"noisy": True}
LIMITED = {"capacity_factor": 0.45, "drop": "weight"}
EVERY = [None, LOSS_FREE, GROUPED, NOISY, {"jitter": 0.2}, LIMITED, {**GROUPED, **LIMITED, "jitter": 0.1}]
NAMES = ["plain", "loss-free", "grouped", "noisy", "jitter", "limited", "all"]


def layer_of(router, dtype=torch.float32):
    layer = MoELayer(H, 5, E, K, "gelu", router=router)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    if layer.selection_bias is not None:
        layer.selection_bias.normal_()
    return layer.to(dtype)


def same(one, other):
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("topk_weights", "topk_indices", "tokens_per_expert", "permutation")
    )


# config


def test_a_config_of_before_is_read_and_written_as_before(tiny_config, tmp_path):
    config = tiny_config(text="mixtral")
    config.save_pretrained(tmp_path)
    written = (tmp_path / "config.json").read_text()
    values = json.loads(written)
    assert values.pop("router") is None and values["vision_config"].pop("router") is None
    old = CumoConfig.from_dict(values)
    assert old.router is None and old.to_dict() == CumoConfig.from_pretrained(tmp_path).to_dict()


@pytest.mark.parametrize("given", [{}, {"score": "softmax", "scale": 1.0, "drop": "position"}])
def test_the_defaults_are_no_options(tiny_config, given):
    assert tiny_config(router=given).router is None


def test_options_come_to_the_tower_and_back(tiny_config, tmp_path):
    config = tiny_config(router={**GROUPED, "expert_groups": 2, "top_groups": 1, "jitter": 0})
    assert config.router == config.vision_config.router == {**GROUPED, "expert_groups": 2, "top_groups": 1}
    config.save_pretrained(tmp_path)
    assert CumoConfig.from_pretrained(tmp_path).router == config.router
    alone = CumoConfig(vision_config=config.vision_config.to_dict(), text_config=config.text_config)
    assert alone.router == config.router


@pytest.mark.parametrize(
    "router, message",
    [
        ({"scores": "sigmoid"}, r"router must have keys among score, .*, got 'scores'"),
        ({"score": "tanh"}, "router.score must be one of .*, got 'tanh'"),
        ({"selection_bias": 1}, "router.selection_bias must be True or False, got 1"),
        ({"expert_groups": 3}, "router.expert_groups must divide the 4 experts evenly, got 3"),
        ({"expert_groups": 8}, "router.expert_groups must divide the 4 experts evenly, got 8"),
        (
            {"expert_groups": 4, "top_groups": 1},
            "router.top_groups must hold the 2 experts of a token, got 1 groups of 1 experts",
        ),
        ({"top_groups": 2}, "router.top_groups must be at most the 1 expert_groups, got 2"),
        ({"group_score": "sum"}, "router.group_score must be one of .*, got 'sum'"),
        ({"scale": 0}, "router.scale must be between 1e-30 and 1e.30, got 0"),
        ({"capacity_factor": 0}, "router.capacity_factor must be finite and above 0, got 0"),
        ({"capacity_factor": "1"}, "router.capacity_factor must be a number or None, got '1'"),
        ({"drop": "weight"}, "router.drop must be left out without router.capacity_factor, got 'weight'"),
        ({"jitter": 1.0}, "router.jitter must be at least 0 and below 1, got 1.0"),
        ({"noisy": True, "score": "sigmoid"}, "router.noisy must be False with router.score, got True"),
        ({"noisy": True, "jitter": 0.1}, "router.noisy must be False with router.jitter, got True"),
        ({"noisy": "yes"}, "router.noisy must be True or False, got 'yes'"),
    ],
)
def test_a_wrong_option_is_named(tiny_config, router, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(router=router)


def test_compat_refuses_all_but_the_defaults(tiny_config):
    with pytest.raises(ValueError, match=r"router must be None with compat 'cumo', .*got .*sigmoid"):
        tiny_config(router=LOSS_FREE, compat="cumo")
    with pytest.raises(ValueError, match=r"router must be None with compat 'cumo', got .*noisy"):
        MoELayer(H, 5, E, K, "gelu", compat="cumo", router=NOISY)
    assert tiny_config(compat="cumo", router={}).router is None


def test_a_tower_with_other_routers_is_refused(tiny_config):
    """Neither may be dropped; {} are the defaults, asked for."""
    tower = tiny_config().vision_config.to_dict()
    for own, of_tower in ((LOSS_FREE, NOISY), ({}, NOISY), (LOSS_FREE, {})):
        with pytest.raises(ValueError, match=r"router must be that of vision_config, .*router=.*{") as error:
            CumoConfig(router=own, vision_config={**tower, "router": of_tower})
        assert str(own) in str(error.value) and f"vision_config.router={of_tower}" in str(error.value)
    config = CumoConfig(router=LOSS_FREE, vision_config={**tower, "router": {**LOSS_FREE, "scale": 1}})
    assert config.router == config.vision_config.router == LOSS_FREE
    again = CumoConfig.from_dict(config.to_dict())
    assert again.router == again.vision_config.router == LOSS_FREE


def test_a_noise_weight_that_is_not_finite_is_named():
    layer = MoELayer(H, 5, E, K, "gelu", router=NOISY)
    with torch.no_grad():
        layer.noise_gate.weight[1] = torch.nan
    for mode in (True, False):
        with pytest.raises(ValueError, match=r"noise_weight must be finite .*, got NaN .* for expert 1"):
            layer.train(mode)(torch.randn(3, H))
    layer = MoELayer(H, 5, E, K, "gelu", router=NOISY)
    with pytest.raises(ValueError, match=r"logits must"):  # not those of the noise
        layer(torch.full((3, H), torch.nan))


# layer


@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize("router", EVERY, ids=NAMES)
def test_a_layer_routes_as_the_kernels_with_its_options(router, mode):
    layer, x = layer_of(router).train(mode == "training"), torch.randn(30, H)
    with record_routing() as records:
        found = layer.route(x)
    options, seed = RouterOptions.of(router), records[0].seed
    draws = mode == "training" and (options.jitter or options.noisy)
    assert (seed is not None) == bool(draws)
    if options.noisy:
        noise = layer.noise_gate.weight
        wanted = noisy_top_k(x, K, layer.gate.weight, noise, seed=seed)
        assert torch.equal(records[0].balance, wanted.importance_loss + wanted.load_loss)
        wanted = wanted.routing
    else:
        assert records[0].balance is None
        bias = {"selection_bias": layer.selection_bias} if options.selection_bias else {}
        fed = jittered(x, options.jitter, seed) if draws else x
        wanted = route(fed, K, layer.gate.weight, **options.choosing(), **bias)
    if options.capacity_factor is not None and mode == "training":
        assert torch.equal(records[0].topk_indices, wanted.topk_indices)
        wanted = with_capacity(wanted, 5, options.drop)  # ceil(0.45 * 30 * 2 / 6)
        assert (found.topk_indices == E).any() and found.tokens_per_expert.max() <= 5
        assert torch.equal(
            records[0].chosen_per_expert, torch.bincount(records[0].topk_indices.flatten(), minlength=E).int()
        )
    else:
        assert torch.equal(records[0].topk_indices, found.topk_indices)
    assert same(found, wanted)


def test_the_capacity_is_a_share_of_the_slots_rounded_up():
    found = [RouterOptions(capacity_factor=factor).capacity(6, 2, 4) for factor in (1, 1.25, 1.01, 0.01)]
    assert found == [3, 4, 4, 1] and RouterOptions(capacity_factor=1).capacity(0, 2, 4) == 1


@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize("router", EVERY, ids=NAMES)
def test_few_tokens(router, num_tokens):
    layer, x = layer_of(router), torch.randn(num_tokens, H, requires_grad=True)
    with record_routing() as records:
        out = layer(x)
    loss = out.sum() + (0 if records[0].balance is None else records[0].balance)
    loss.backward()
    assert out.shape == (num_tokens, H)
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("router", EVERY[1:], ids=NAMES[1:])
def test_a_gate_that_is_called_routes_the_same(router):
    """With a hook, as those of offloading."""
    layer, x = layer_of(router, torch.float64), torch.randn(30, H, dtype=torch.float64)
    found = []
    for hook in (False, True):
        if hook:
            layer.gate.register_forward_hook(lambda *_: None)
        torch.manual_seed(0)
        with record_routing(logits=True) as records:
            layer(x)
        found.append(records[0])
    assert torch.equal(found[0].topk_indices, found[1].topk_indices)
    assert_same_formula(*(record.routing.topk_weights for record in found))
    assert_same_formula(*(record.logits for record in found))


@pytest.mark.parametrize("router", EVERY, ids=NAMES)
def test_recomputation_has_the_noise_of_the_first_time(router):
    layer, x = layer_of(router), torch.randn(30, H, requires_grad=True)
    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(5)
        layer.zero_grad(), setattr(x, "grad", None)
        out = run(x)
        torch.randn(3)  # the state of the generator goes on before backward
        (out * torch.arange(H)).sum().backward()
        found.append([out, x.grad, *(p.grad for p in layer.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("router", EVERY, ids=NAMES)
def test_a_layer_compiles_to_one_graph(router):
    layer, x = layer_of(router, torch.float64), torch.randn(30, H, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = []
    for run in (layer, compiled):
        torch.manual_seed(5)
        layer.zero_grad()
        out = run(x)
        out.square().sum().backward()
        found.append([out, *(p.grad for p in layer.parameters())])
    for one, other in zip(*found, strict=True):
        assert_same_formula(one, other)
    torch.manual_seed(6)
    changes = RouterOptions.of(router)
    assert torch.equal(compiled(x), out) != bool(changes.jitter or changes.noisy)


def test_each_call_has_its_own_noise():
    layer, x = layer_of({"jitter": 0.5}), torch.randn(30, H)
    with record_routing() as records:
        layer(x), layer(x)
    assert not torch.equal(records[0].routing.topk_weights, records[1].routing.topk_weights)


def test_padding_does_not_count_in_the_losses_of_noisy_top_k():
    layer, x = layer_of(NOISY, torch.float64).eval(), torch.randn(20, H, dtype=torch.float64)
    counted = torch.arange(20) < 12
    with record_routing() as records:
        layer(x, counted=counted)
        layer(x[:12])
    assert_same_formula(records[0].balance, records[1].balance)
    assert_same_formula(records[0].routing.stats.mean_probs, records[1].routing.stats.mean_probs)


def test_a_new_router_starts_without_noise_weight_and_bias():
    noisy, biased = MoELayer(H, 5, E, K, "gelu", router=NOISY), MoELayer(H, 5, E, K, "gelu", router=LOSS_FREE)
    assert not noisy.noise_gate.weight.any() and not biased.selection_bias.any()
    assert set(MoELayer(H, 5, E, K, "gelu").state_dict()) == {
        "gate.weight",
        *(f"experts.{name}" for name in ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias")),
    }


def test_the_bias_stays_fp32():
    layer = layer_of(LOSS_FREE)
    before = layer.selection_bias.clone()
    for kind in (torch.bfloat16, torch.float16, torch.float64):
        layer.to(kind)
        assert layer.gate.weight.dtype == kind and torch.equal(layer.selection_bias, before)
    assert copy.deepcopy(layer.bfloat16()).selection_bias.dtype == torch.float32
    assert layer.to("meta").selection_bias.is_meta


# model


@pytest.mark.parametrize(
    "router", [LOSS_FREE, NOISY, {"jitter": 0.1, **LIMITED}], ids=["bias", "noise", "jitter"]
)
def test_a_model_trains_with_options_in_all_places(tiny_model, tiny_batch, router):
    model, batch = tiny_model(text="mixtral", router=router).train(), tiny_batch()
    for layer in (module for module in model.modules() if isinstance(module, MoELayer)):
        if layer.selection_bias is not None:
            layer.selection_bias.normal_()
    with record_routing() as records:
        out = model(**batch)
    assert {record.place for record in records} == {"clip", "mlp", "llm"}
    out.loss.backward()
    gates = [p for name, p in model.named_parameters() if name.endswith("gate.weight")]
    assert len(gates) == (3 + 1 + 2) * (2 if router is NOISY else 1)
    assert all(p.grad is not None and p.grad.any() for p in gates)
    if router is NOISY:
        own = [record.balance for record in records if record.place == "clip"]
        assert torch.equal(out.loss_parts["clip_balance"], torch.stack(own).mean().detach())


def test_checkpointing_of_a_model_repeats_its_noise(tiny_model, tiny_batch):
    model, batch, found = tiny_model(text="mixtral", router=NOISY).train(), tiny_batch(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(1)
        model(**batch).loss.backward()
        found.append([p.grad for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_checkpointing_that_draws_other_noise_is_refused(tiny_model):
    model = tiny_model(router=NOISY)
    with pytest.raises(ValueError, match=r"must have preserve_rng_state True .*router noise, got False"):
        model.gradient_checkpointing_enable({"preserve_rng_state": False})
    tiny_model().gradient_checkpointing_enable({"preserve_rng_state": False})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("router", [LOSS_FREE, NOISY], ids=["bias", "noise"])
def test_a_saved_model_opens_with_bias_and_noise(tiny_model, tiny_batch, tmp_path, router, dtype):
    model = tiny_model(text="mixtral", router=router).to(dtype).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("selection_bias"):
            buffer.normal_()
    model.save_pretrained(tmp_path)
    again = CumoForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    state = again.state_dict()
    kinds = {name: value.dtype for name, value in state.items() if name.endswith("selection_bias")}
    assert len(kinds) == (6 if router is LOSS_FREE else 0) and set(kinds.values()) <= {torch.float32}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert again(**tiny_batch(dtype=dtype)).logits.isfinite().all()


def test_what_a_checkpoint_lacks_is_zero(tiny_model, tmp_path):
    tiny_model(text="mixtral").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for router in (LOSS_FREE, NOISY):
        (tmp_path / "config.json").write_text(json.dumps(values | {"router": router}))
        model = CumoForConditionalGeneration.from_pretrained(tmp_path)
        added = [v for name, v in model.state_dict().items() if "noise_gate" in name or "selection" in name]
        assert len(added) == 6 and not any(value.any() for value in added)


def test_a_tower_alone_keeps_its_routers(tiny_model, tmp_path):
    tower = tiny_model(router=LOSS_FREE).model.vision_tower
    tower.save_pretrained(tmp_path)
    again = CumoVisionModel.from_pretrained(tmp_path)
    assert again.encoder.layers[0].mlp.router == RouterOptions.of(LOSS_FREE)


# upcycling


@pytest.mark.parametrize(
    "router", [LOSS_FREE, NOISY, {"scale": 1, "jitter": 0.1}], ids=["bias", "noise", "jitter"]
)
def test_upcycling_makes_routers_with_options(tiny_model, tiny_batch, router):
    dense = tiny_model(vision_experts=1, projector_num_experts=1).eval()
    moe, plain = upcycle(dense, text_experts=4, router=router), upcycle(dense, text_experts=4)
    assert moe.config.router == RouterOptions.of(router).changed()
    batch = {name: value for name, value in tiny_batch().items() if name != "labels"}
    assert step0_difference(dense, moe, batch) < 10 * step0_difference(dense, plain, batch) + 1e-5
    added = [v for name, v in moe.state_dict().items() if "noise_gate" in name or "selection" in name]
    assert len(added) == (0 if "jitter" in router else 6) and not any(value.any() for value in added)


def test_upcycling_keeps_the_routers_that_are_there(tiny_model):
    model = tiny_model(projector_num_experts=1, router=LOSS_FREE)
    assert upcycle(model, 0, 4).config.router == LOSS_FREE
    assert upcycle(model, 0, 4, router=LOSS_FREE).config.router == LOSS_FREE
    with pytest.raises(ValueError, match=r"router must be .*sigmoid.*, that of the experts that are there"):
        upcycle(model, 0, 4, router=NOISY)
    with pytest.raises(ValueError, match=r"router must be .*sigmoid"):  # before the number of experts
        upcycle(model, router=NOISY)


def test_upcycling_gives_a_dense_model_other_routers_than_its_config_has(tiny_model):
    dense = tiny_model(vision_experts=1, projector_num_experts=1, router=LOSS_FREE)
    for router in (NOISY, {}):
        for made in (upcycled_config(dense.config, router=router), upcycle(dense, router=router).config):
            assert CumoConfig.from_dict(made.to_dict()).router == (router or None)
            assert made.vision_config.router == (router or None)


def test_upcycling_refuses_options_that_do_not_fit(tiny_model):
    dense = tiny_model(vision_experts=1, projector_num_experts=1)
    with pytest.raises(ValueError, match=r"router.expert_groups must divide the 4 experts evenly, got 3"):
        upcycle(dense, router={"expert_groups": 3})


# other programs


def test_the_original_layout_and_vllm_refuse_options(tiny_config):
    config = tiny_config(router=LOSS_FREE)
    for refuse in (to_original, check_config):
        with pytest.raises(ValueError, match=r"router must be None.*, got .*sigmoid"):
            refuse(config)
