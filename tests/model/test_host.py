"""What every model with MoELayers does differently: saving, checkpointing, experts_implementation."""

import copy
from functools import partial

import pytest
import torch
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, Trainer, TrainingArguments

from cumo_model import CumoForConditionalGeneration
from cumo_model.model import moe
from cumo_model.model.clip_moe import CumoVisionModel
from cumo_model.model.compat import CHECKPOINTING, NEWER, OLDER, checkpointing_arguments
from cumo_model.model.cumo import CumoModel
from cumo_model.model.llm_moe import CumoMixtralModel
from cumo_model.model.moe import MoELayer
from cumo_model.model.quantize import quantize_experts
from cumo_model.training.parallel import expert_parallel
from tests.model.gradients import gradients
from tests.rounding import assert_same_formula

PARTS = {
    "whole": lambda model: model,
    "without-head": lambda model: model.model,
    "tower": lambda model: model.model.vision_tower,
    "mixtral": lambda model: model.model.language_model,
}
LOADERS = {
    "whole": CumoForConditionalGeneration,
    "without-head": CumoModel,
    "tower": CumoVisionModel,
    "mixtral": CumoMixtralModel,
}


def names_in(folder) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("part", PARTS)
def test_every_model_saves_stacked_experts_and_reads_them_again(tiny_model, tmp_path, part):
    model = PARTS[part](tiny_model(text="mixtral"))
    model.save_pretrained(tmp_path / "saved")
    state = model.state_dict()
    assert names_in(tmp_path / "saved") == set(state)
    again, info = LOADERS[part].from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    for name, value in again.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert type(AutoModel.from_pretrained(tmp_path / "saved")) is not None


@pytest.mark.parametrize("part", ["whole", "without-head", "mixtral"])
def test_one_tensor_per_expert_is_written_on_request(tiny_model, tmp_path, part):
    model = PARTS[part](tiny_model(text="mixtral"))
    model.save_pretrained(tmp_path, save_original_format=True)
    assert any("block_sparse_moe.experts.3.w1.weight" in name for name in names_in(tmp_path))
    again = LOADERS[part].from_pretrained(tmp_path).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("part", PARTS)
def test_every_part_with_quantised_experts_can_be_saved(tiny_model, tmp_path, part):
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    model = tiny_model(text="mixtral", vision=sizes, text_options=sizes)
    quantize_experts(model)
    whole = PARTS[part](model)
    with pytest.raises(ValueError, match="save_original_format must be False for experts in four bits"):
        whole.save_pretrained(tmp_path / "saved", save_original_format=True)
    assert not (tmp_path / "saved").exists()
    whole.save_pretrained(tmp_path / "saved")
    again = LOADERS[part].from_pretrained(tmp_path / "saved").state_dict()
    assert again.keys() == whole.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert type(value) is type(again[name]), name
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("suffix, one, other", [("", True, False), ("_kwargs", {"use_reentrant": False}, {})])
def test_the_trainers_checkpointing_goes_by_either_name(suffix, one, other):
    wanted = {f"{CHECKPOINTING}{suffix}": one, "seed": 1}
    for given in ([OLDER], [NEWER], [OLDER, NEWER]):
        found = checkpointing_arguments({"seed": 1} | {name + suffix: one for name in given})
        assert found == wanted
    with pytest.raises(ValueError, match="one argument under two names, got"):
        checkpointing_arguments({OLDER + suffix: one, NEWER + suffix: other})
    assert checkpointing_arguments({OLDER + suffix: other}) == {f"{CHECKPOINTING}{suffix}": other}


def test_transformers_shards_the_parts_that_it_should(tiny_model):
    """Its FSDP gathers each of them for its own call; the last ones stay whole until backward."""
    fsdp = pytest.importorskip("transformers.distributed.fsdp")
    model = tiny_model(text="mixtral")
    freed, kept = ([name for name, _ in part] for part in fsdp.expand_fsdp_plan(model, model._fsdp_plan))
    assert freed == [
        *(f"model.vision_tower.encoder.layers.{i}" for i in range(3)),
        "model.multi_modal_projector",
        "model.language_model.embed_tokens",
        *(f"model.language_model.layers.{i}" for i in range(2)),
    ]
    assert kept == ["model.language_model.norm", "lm_head"]


REFUSAL = r"must have use_reentrant False where there are experts, got True for "


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_reentrant_checkpointing_is_refused_at_every_level_with_experts(tiny_model, part, name):
    model = PARTS[part](tiny_model(text="mixtral"))
    with pytest.raises(ValueError, match=REFUSAL + type(model).__name__):
        getattr(model, f"{name}_enable")({"use_reentrant": True})
    with pytest.raises(ValueError, match="got None for"):
        getattr(model, f"{name}_enable")({"use_reentrant": None})  # torch takes it as True
    getattr(model, f"{name}_enable")({})
    assert model.is_gradient_checkpointing


def test_the_arguments_of_the_trainer_are_refused(tiny_model, tmp_path):
    options = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True, max_steps=1, **options)
    trainer = Trainer(tiny_model(), arguments, train_dataset=[{"input_ids": [1, 2], "labels": [1, 2]}])
    with pytest.raises(ValueError, match=REFUSAL):
        trainer.train()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize(
    "experts, where",
    [
        ({"vision_experts": 1, "projector_num_experts": 1}, lambda model: model),
        ({"vision_experts": 1, "projector_num_experts": 1}, lambda model: model.model),
        ({}, lambda model: model.model.language_model),
        ({"vision_experts": 1}, lambda model: model.model.vision_tower),
    ],
    ids=["dense", "dense-without-head", "dense-decoder", "dense-tower"],
)
def test_reentrant_checkpointing_is_allowed_where_no_experts_are(tiny_model, tiny_batch, experts, where):
    plain, batch = tiny_model(**experts).train(), tiny_batch()
    twin = copy.deepcopy(plain)
    where(twin).gradient_checkpointing_enable({"use_reentrant": True})
    for model in (plain, twin):
        model(**batch, use_cache=False).loss.backward()
    for (name, one), other in zip(twin.named_parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        assert one.grad is None or torch.equal(one.grad, other.grad), name


def reentrant(forward, *args, **kwargs):
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=True)


@pytest.mark.parametrize("trained", [True, False])
def test_layers_wrapped_by_hand_must_keep_the_gradients_of_the_router_losses(tiny_model, tiny_batch, trained):
    model, batch = tiny_model(text="mixtral").train(), tiny_batch()
    for layer in model.model.language_model.layers:
        layer.forward = partial(reentrant, layer.forward)
        layer.mlp.gate.requires_grad_(trained)
    if trained:
        with pytest.raises(
            ValueError, match=r"use_reentrant must be False .*layers.0.mlp ran without gradients"
        ):
            model(**batch, use_cache=False)
    else:
        model(**batch, use_cache=False).loss.backward()
    with torch.no_grad():
        model(**batch, use_cache=False)


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("compat", [None, "cumo"])
@pytest.mark.parametrize("text", ["mixtral", "mistral"])
def test_eager_experts_compute_the_same(tiny_model, tiny_batch, monkeypatch, text, compat):
    model, batch = tiny_model(text=text, compat=compat).train(), tiny_batch(dtype=torch.float64)
    twin = copy.deepcopy(model)
    twin.set_experts_implementation("eager")
    assert set(twin.get_experts_implementation().values()) == {"eager"}
    assert model.get_experts_implementation()[""] == "cumo"
    losses = [m(**batch, use_cache=False).loss for m in (model, twin)]
    for loss in losses:
        loss.backward()
    assert_same_formula(losses[1], losses[0])
    assert_same_formula(gradients(twin), gradients(model))
    for name in ("expert_mlp", "grouped_gemm"):
        monkeypatch.setattr(moe, name, None)  # not used by eager experts
    twin(**batch)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        model(**batch)


def implementations(model) -> dict[str, set[str]]:
    found = {}
    for module in model.modules():
        if isinstance(module, MoELayer):
            found.setdefault(module.place, set()).add(module.experts.implementation)
    return found


def test_the_implementation_can_be_chosen_at_any_time_and_for_each_part(tiny_model, tmp_path):
    model = tiny_model(text="mixtral")
    assert implementations(model) == {"clip": {"cumo"}, "mlp": {"cumo"}, "llm": {"cumo"}}
    model.set_experts_implementation({"vision_config": "eager"})
    assert implementations(model) == {"clip": {"eager"}, "mlp": {"cumo"}, "llm": {"cumo"}}
    model.model.language_model.set_experts_implementation("eager")
    assert implementations(model) == {"clip": {"eager"}, "mlp": {"cumo"}, "llm": {"eager"}}
    model.save_pretrained(tmp_path)
    load = CumoForConditionalGeneration.from_pretrained
    assert implementations(load(tmp_path)) == {"clip": {"cumo"}, "mlp": {"cumo"}, "llm": {"cumo"}}
    again = load(tmp_path, experts_implementation="eager")
    assert implementations(again) == {"clip": {"eager"}, "mlp": {"eager"}, "llm": {"eager"}}
    again.set_experts_implementation("cumo")
    assert implementations(again) == {"clip": {"cumo"}, "mlp": {"cumo"}, "llm": {"cumo"}}


def test_eager_experts_cannot_be_spread_over_processes(tiny_model):
    model = tiny_model(text="mixtral")
    model.set_experts_implementation("eager")
    with pytest.raises(ValueError, match=r"must be 'cumo' for experts spread .* got 'eager' for "):
        expert_parallel(model, None)
    model.set_experts_implementation("cumo")
    model.model.language_model.layers[0].mlp.experts.exchange = "exact"  # as expert_parallel leaves it
    with pytest.raises(ValueError, match=r"must be 'cumo' where experts are spread .* got 'eager'"):
        model.set_experts_implementation("eager")


@pytest.mark.parametrize("name", ["grouped_mm", "batched_mm", "triton", ""])
def test_other_implementations_are_refused(tiny_model, tmp_path, name):
    model = tiny_model(text="mixtral")
    model.save_pretrained(tmp_path)
    words = rf"experts_implementation must be 'cumo' or 'eager' for \w+, got '{name}'"
    for part in PARTS.values():
        with pytest.raises(ValueError, match=words):
            part(model).set_experts_implementation(name)
    with pytest.raises(ValueError, match=words):
        CumoForConditionalGeneration.from_pretrained(tmp_path, experts_implementation=name)
    assert set(implementations(model)) == {"clip", "mlp", "llm"}
    assert all(found == {"cumo"} for found in implementations(model).values())
