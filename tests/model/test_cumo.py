"""The whole model: total loss compared with literal losses, image merge, generation, training, errors."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from cumo_model import MoELayer, record_routing
from cumo_model.model.pyramid import image_pyramid
from tests.model.gradients import gradients
from tests.rounding import assert_same_formula, assert_same_sums, rounding_of


def gate_logits(model, batch):
    """Run the model; returns its output and the logits of each gate by module name."""
    logits, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, MoELayer):

            def keep(_module, _args, output, name=name):
                logits[name] = output

            handles.append(module.gate.register_forward_hook(keep))
    output = model(**batch)
    for handle in handles:
        handle.remove()
    return output, logits


def literal_losses(logits, num_groups):
    """cumo_spec.md 2.1 on one gate's logits (T, E): L_b averaged over groups, L_z over groups and tokens."""
    E, balance, z = logits.shape[1], 0, 0
    for group in logits.view(num_groups, -1, E):
        p = group.softmax(-1)
        f = torch.stack([(p.argmax(-1) == e).float().mean() for e in range(E)])
        balance = balance + E**2 * (f * p.mean(0)).mean() / num_groups
        z = z + group.logsumexp(-1).square().mean() / num_groups
    return balance, z


def mean(losses):
    return tuple(sum(values) / len(losses) for values in zip(*losses, strict=True))


def literal_parts(logits, scales, images, patches):
    """cumo_spec.md 2.3: mean over layers, then scales; connector per image; text over all tokens."""
    crops = patches + 1
    tower = [value for name, value in logits.items() if "vision_tower" in name]
    scale_losses, begin = [], 0
    for scale in scales:
        count = images * scale**2
        rows = slice(begin * crops, (begin + count) * crops)
        scale_losses.append(mean([literal_losses(value[rows], count) for value in tower]))
        begin += count
    parts = {}
    if tower:
        parts["clip_balance"], parts["clip_z"] = mean(scale_losses)
    for name, value in logits.items():
        if "projector" in name:
            parts["mlp_balance"], parts["mlp_z"] = literal_losses(value, images)
    text = [literal_losses(value, 1) for name, value in logits.items() if "language_model" in name]
    if text:
        parts["llm_balance"], parts["llm_z"] = mean(text)
    return parts


MODELS = [  # text, vision experts, projector experts, scales, terms that the total must have
    pytest.param("mistral", 4, 4, (1, 3), {"clip", "mlp"}, id="7b"),
    pytest.param("mixtral", 4, 4, (1, 3), {"clip", "mlp", "llm"}, id="8x7b"),
    pytest.param("mixtral", 1, 4, (1, 2, 3), {"mlp", "llm"}, id="dense-tower"),
    pytest.param("mixtral", 4, 1, (1,), {"clip", "llm"}, id="dense-connector"),
    pytest.param("mixtral", 1, 1, (1, 3), set(), id="mixtral-alone-has-no-aux"),
    pytest.param("mistral", 1, 1, (1, 3), set(), id="dense"),
]


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("text, vision_experts, projector_experts, scales, places", MODELS)
def test_total_is_the_specs(tiny_model, tiny_batch, text, vision_experts, projector_experts, scales, places):
    model = tiny_model(
        text=text, vision_experts=vision_experts, projector_num_experts=projector_experts, scales=scales
    ).train()
    batch = tiny_batch()
    output, logits = gate_logits(model, batch)
    parts = literal_parts(logits, scales, images=2, patches=9) if places else {}
    shifted, targets = output.logits[:, :-1].float(), batch["labels"][:, 1:]
    parts["language"] = cross_entropy(shifted.flatten(0, 1), targets.flatten())

    assert set(output.loss_parts) == {"language", *(f"{p}_{n}" for p in places for n in ("balance", "z"))}
    assert_same_formula(output.loss_parts, {name: parts[name] for name in output.loss_parts})
    coefs = {"balance": 0.1, "z": 0.01}
    total = sum(coefs.get(name.split("_")[-1], 1.0) * value for name, value in parts.items())
    assert_same_formula(output.loss, total)

    wanted = torch.autograd.grad(total, list(model.parameters()), allow_unused=True, retain_graph=True)
    output.loss.backward()
    assert_same_formula(gradients(model), gradients(model, wanted))


@pytest.mark.usefixtures("fp64")
def test_one_call_is_the_originals_pass_per_scale(tiny_model):
    """One tower call with the crops of both scales gives the statistics of each scale."""
    model = tiny_model().train()
    pixels = torch.randn(2, 3, 12, 12)
    with record_routing() as together:
        model.model._encode_tiles(pixels, all_routers=True)
    crops = image_pyramid(pixels, (1, 3))
    apart = []
    for part in (crops[:2], crops[2:]):
        with record_routing() as records:
            model.model.vision_tower(part, feature_layer=-2, all_routers=True)
        apart.append(records)
    for layer in range(3):
        stats = [records[layer].routing.stats.mean_probs for records in apart]
        assert_same_formula(together[layer].routing.stats.mean_probs, torch.cat(stats))


@pytest.mark.usefixtures("fp64")
def test_coefficients_come_from_the_config(tiny_model, tiny_batch):
    model = tiny_model(balance_loss_coef=3.0, router_z_loss_coef=0.0).train()
    output = model(**tiny_batch())
    parts = output.loss_parts
    total = parts["language"] + 3 * (parts["mlp_balance"] + parts["clip_balance"])
    assert_same_formula(output.loss, total)


def test_parts_of_the_loss_are_fp32_without_gradient(tiny_model, tiny_batch):
    parts = tiny_model(text="mixtral").bfloat16().train()(**tiny_batch(dtype=torch.bfloat16)).loss_parts
    assert len(parts) == 7
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in parts.values())


def test_evaluation_has_the_language_loss_alone(tiny_model, tiny_batch):
    output = tiny_model(text="mixtral").eval()(**tiny_batch())
    assert set(output.loss_parts) == {"language"} and output.loss == output.loss_parts["language"]


def test_text_alone_has_only_its_own_terms(tiny_model, tiny_batch):
    output = tiny_model(text="mixtral").train()(**tiny_batch(images=0))
    assert set(output.loss_parts) == {"language", "llm_balance", "llm_z"}


def test_only_dead_experts_are_without_gradient(tiny_model, tiny_batch):
    model = tiny_model(text="mixtral").train()
    model(**tiny_batch()).loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without and all(
        name.startswith("model.vision_tower.encoder.layers.2.mlp.experts.") for name in without
    )


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_checkpointing_changes_nothing(tiny_model, tiny_batch, name):
    model = tiny_model(text="mixtral").train()
    twin = copy.deepcopy(model)
    getattr(twin, f"{name}_enable")()
    batch, runs = tiny_batch(), []
    for each in (model, twin):
        counts = {"tower": 0, "text": 0}
        runs.append(counts)
        layers = {
            "tower": each.model.vision_tower.encoder.layers,
            "text": each.model.language_model.layers,
        }
        for place, norms in layers.items():
            for layer in norms:
                norm = layer.layer_norm1 if place == "tower" else layer.input_layernorm
                norm.register_forward_hook(
                    lambda *_, counts=counts, place=place: counts.update({place: counts[place] + 1})
                )
    outputs = [m(**batch) for m in (model, twin)]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    for output in outputs:
        output.loss.backward()
    # every layer runs once, and with checkpointing once more in backward
    assert runs == [{"tower": 3, "text": 2}, {"tower": 6, "text": 4}]
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("fp64")
def test_layers_sharded_by_fsdp_give_the_same_gradients(tiny_model, tiny_batch, process_group):
    """Includes the last tower layer: backward needs its parameters although its output is not used."""
    model, batch = tiny_model(text="mixtral").train(), tiny_batch()
    model(**batch).loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    parts = model.model
    for unit in (
        *parts.vision_tower.encoder.layers,
        *parts.language_model.layers,
        parts.multi_modal_projector,
        model,
    ):
        fully_shard(unit, mesh=init_device_mesh("cpu", (1,)))
    model(**batch).loss.backward()
    found = [None if p.grad is None else p.grad.full_tensor() for p in model.parameters()]
    assert_same_formula(gradients(model, found), wanted)


@pytest.mark.slow
def test_compiles_without_a_break(tiny_model, tiny_batch):
    model = tiny_model(vision={"num_hidden_layers": 2}, text_options={"num_hidden_layers": 1}).train()
    batch = tiny_batch()

    def run(forward=model):
        model.zero_grad()
        forward(**batch).loss.backward()
        return gradients(model)

    compiled = run(torch.compile(model, backend="aot_eager", fullgraph=True))
    assert_same_sums(compiled, run(), rounding_of(run))


# merging


def test_features_take_the_places_of_their_markers(tiny_model, tiny_batch):
    """Two images in row 0 and one in row 1; each group of nine placeholders gets the next image, in order."""
    model = tiny_model().eval()
    embed = model.get_input_embeddings()
    input_ids = torch.randint(3, 50, (2, 24))
    places = [(0, 2), (0, 13), (1, 7)]
    for row, start in places:
        input_ids[row, start : start + 9] = 60
    pixels = torch.randn(3, 3, 12, 12)
    features = torch.stack(model.get_image_features(pixels).pooler_output)
    wanted = embed(input_ids.masked_fill(input_ids == 60, 0)).clone()
    for (row, start), feature in zip(places, features, strict=True):
        wanted[row, start : start + 9] = feature
    merged = model(input_ids=input_ids, pixel_values=pixels)
    assert torch.equal(merged.logits, model(inputs_embeds=wanted).logits)
    assert torch.equal(merged.image_hidden_states, features)


def test_marker_may_be_in_the_vocabulary_or_negative(tiny_model, tiny_batch):
    model = tiny_model().eval()
    batch = tiny_batch()
    wanted = model(**batch).logits
    for token in (0, 49, -200):
        twin, changed = copy.deepcopy(model), dict(batch)
        twin.config.image_token_index = twin.model.config.image_token_index = token
        changed["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == 60, token)
        if (changed["input_ids"] == token).sum() == 18:
            assert torch.equal(twin(**changed).logits, wanted)


def test_full_strategy_keeps_the_class_token(tiny_model):
    model = tiny_model(scales=(1,), vision_feature_select_strategy="full").eval()
    assert model.config.image_seq_length == 10
    pixels = torch.randn(1, 3, 12, 12)
    features = model.model.vision_tower(pixels, feature_layer=-2).last_hidden_state
    assert torch.equal(
        torch.stack(model.get_image_features(pixels).pooler_output),
        model.model.multi_modal_projector(features),
    )


@pytest.mark.parametrize("layer", [-1, -3, 1])
def test_feature_layer_is_honoured(tiny_model, layer):
    model = tiny_model(vision_feature_layer=layer, scales=(1,)).eval()
    pixels = torch.randn(1, 3, 12, 12)
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    assert torch.equal(
        torch.stack(model.get_image_features(pixels).pooler_output),
        model.model.multi_modal_projector(states[layer][:, 1:]),
    )


# generation


@pytest.mark.parametrize("text", ["mistral", "mixtral"])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_greedy_generation_with_cache_is_the_plain_loop(tiny_model, tiny_batch, text, attn_implementation):
    model = tiny_model(text=text, text_options={"eos_token_id": None}).eval()
    model.set_attn_implementation(attn_implementation)
    assert model.model.vision_tower.config._attn_implementation == attn_implementation
    assert model.model.language_model.config._attn_implementation == attn_implementation
    batch = tiny_batch()
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    for _ in range(6):
        following = model(input_ids=ids, pixel_values=pixels).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], 1)
    for use_cache in (True, False):
        generated = model.generate(
            input_ids=batch["input_ids"],
            pixel_values=pixels,
            max_new_tokens=6,
            do_sample=False,
            use_cache=use_cache,
        )
        assert torch.equal(generated, ids)


@pytest.mark.parametrize("text", ["mistral", "mixtral"])
def test_left_padded_batch_generates_as_each_row_alone(tiny_model, tiny_batch, text):
    model = tiny_model(text=text, text_options={"eos_token_id": None, "pad_token_id": 0}).eval()
    batch = tiny_batch()
    rows = [batch["input_ids"][:1, 2:], batch["input_ids"][1:]]  # 18 and 20 tokens
    padded = torch.cat([torch.nn.functional.pad(rows[0], (2, 0)), rows[1]])
    mask = torch.ones_like(padded)
    mask[0, :2] = 0
    options = {"max_new_tokens": 5, "do_sample": False}
    pixels = batch["pixel_values"]
    together = model.generate(input_ids=padded, attention_mask=mask, pixel_values=pixels, **options)[:, 20:]
    for row, ids in enumerate(rows):
        alone = model.generate(input_ids=ids, pixel_values=pixels[row : row + 1], **options)
        assert torch.equal(alone[0, ids.shape[1] :], together[row])


def test_generation_encodes_the_image_once(tiny_model, tiny_batch):
    model = tiny_model(text_options={"eos_token_id": None}).eval()
    batch, runs = tiny_batch(), []
    model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    model.generate(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], max_new_tokens=4)
    assert runs == [1]


# configuration and training


def test_compat_reaches_every_place(tiny_model):
    model = tiny_model(text="mixtral", compat="cumo")
    found = {m.place: m.compat for m in model.modules() if isinstance(m, MoELayer)}
    assert found == {"clip": "cumo", "mlp": "cumo", "llm": "cumo_llm"}


class Rows(torch.utils.data.Dataset):
    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {name: value[i % 2] for name, value in self.batch.items()}


def trainer(model, batch, folder, **options):
    arguments = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "save_strategy": "no",
        "logging_strategy": "no",
        "lr_scheduler_type": "constant",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **options,
    }
    return Trainer(model, TrainingArguments(**arguments), train_dataset=Rows(batch))


@pytest.mark.usefixtures("fp64")
def test_trainer_does_not_multiply_the_losses_by_accumulation(tiny_model, tiny_batch, tmp_path):
    model = tiny_model()
    twin = copy.deepcopy(model).train()
    batch = tiny_batch()
    batch["labels"][1, :15] = -100
    run = trainer(model, batch, tmp_path, max_steps=1, max_grad_norm=0.0, data_seed=1)
    seen = []
    run.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    run.train()
    assert len(seen) == 2
    shares = [(inputs["labels"][:, 1:] != -100).sum() / seen[0]["num_items_in_batch"] for inputs in seen]
    assert sum(shares) == 1 and shares[0] != shares[1]
    twins = [{**inputs, "num_items_in_batch": None} for inputs in seen]
    sum(share * twin(**inputs).loss for share, inputs in zip(shares, twins, strict=True)).backward()
    wanted = {name: p if p.grad is None else p - p.grad for name, p in twin.named_parameters()}
    assert_same_formula(dict(model.named_parameters()), wanted)


def test_trainer_resumes_every_tensor(tiny_model, tiny_batch, tmp_path):
    model, options = (
        tiny_model(text="mixtral"),
        {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2},
    )
    twin, batch = copy.deepcopy(model), tiny_batch()
    trainer(model, batch, tmp_path, **options).train()
    trainer(twin, batch, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name


# errors


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param(
            lambda batch: batch["input_ids"][:, 12:14].fill_(60),
            r"input_ids must have 18 image tokens \(id 60\), 9 for each of the 2 images .*, got 22",
            id="more-markers-than-features",
        ),
        pytest.param(
            lambda batch: batch["input_ids"][1].fill_(5),
            r"input_ids must have 18 image tokens \(id 60\), 9 for each of the 2 images .*, got 9",
            id="fewer-markers-than-features",
        ),
        pytest.param(
            lambda batch: batch.pop("pixel_values"),
            r"pixel_values must come with the image tokens \(id 60\) of input_ids, got none for 18",
            id="markers-without-images",
        ),
        pytest.param(
            lambda batch: (batch["input_ids"][0, 12].fill_(60), batch["input_ids"][1, 3].fill_(5)),
            r"input_ids must have a multiple of 9 image tokens \(id 60\) in every row, got 10 in row 0",
            id="markers-of-one-image-in-two-rows",
        ),
        pytest.param(
            lambda batch: batch.update(pixel_values=torch.randn(2, 3, 12, 16)),
            r"pixel_values must be \(B, 3, 12, 12\), got \(2, 3, 12, 16\)",
            id="wrong-image-size",
        ),
        pytest.param(
            lambda batch: batch.update(labels=batch["labels"][:, 1:]),
            r"labels must be \(2, 20\) like input_ids, got \(2, 19\)",
            id="wrong-labels",
        ),
        pytest.param(
            lambda batch: batch.update(inputs_embeds=torch.randn(2, 20, 24), pixel_values=None),
            r"exactly one of input_ids and inputs_embeds",
            id="two-inputs",
        ),
        pytest.param(
            lambda batch: batch.update(input_ids=None, inputs_embeds=torch.randn(2, 20, 24)),
            r"input_ids must be given with inputs_embeds and pixel_values.* id 60 .* vocabulary of 50",
            id="images-without-markers",
        ),
    ],
)
def test_bad_input_is_named(tiny_model, tiny_batch, change, message):
    batch = tiny_batch()
    change(batch)
    with pytest.raises(ValueError, match=message):
        tiny_model()(**batch)


def test_reentrant_checkpointing_is_refused(tiny_model):
    with pytest.raises(ValueError, match=r"activation_checkpointing_kwargs .* must have use_reentrant False"):
        tiny_model().activation_checkpointing_enable({"use_reentrant": True})
