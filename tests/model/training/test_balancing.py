"""Balancing without a loss in training: the load of a whole step, any Trainer, resumed runs, recipes."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from cumo_model import MoELayer, record_routing
from cumo_model.training import balancing
from cumo_model.training.balancing import SelectionBiasCallback, biased_layers
from cumo_model.training.lora import BESIDE
from cumo_model.training.recipe import load_recipe
from cumo_model.training.recover import Interrupted
from cumo_model.training.run_folder import checkpoints
from cumo_model.training.trainer import build_trainer, run_recipe
from tests.model.training.small_runs import write_recipe
from tests.model.training.test_recover import StopAt, same_result

LOSS_FREE = {"score": "sigmoid", "selection_bias": True}
RATE = 2**-10  # exact; a large step is taken back by the next one, and a bias is 0 after two
EVENTS = (SimpleNamespace(), SimpleNamespace(), SimpleNamespace())  # args, state, control: not read


def biases(model):
    return {name: b.clone() for name, b in model.named_buffers() if name.endswith("selection_bias")}


class Counting(Trainer):
    """Counts the load of each step by itself, from what its own block records."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loads = []

    def compute_loss(self, model, inputs, *args, **kwargs):
        with record_routing() as records:
            found = super().compute_loss(model, inputs, *args, **kwargs)
        self.loads.append({(r.place, r.layer): r.chosen_per_expert for r in records})
        return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_any_trainer_moves_the_biases_by_the_load_of_each_whole_step(
    tiny_model, tiny_batch, tmp_path, checkpointing
):
    """Two steps of two micro-batches; half of one row is padding; some slots are dropped."""
    router = {**LOSS_FREE, "capacity_factor": 1.0}
    model, batch = tiny_model(text="mixtral", router=router), tiny_batch()
    batch["attention_mask"][1, 10:] = 0
    rows = [
        {"input_ids": batch["input_ids"][i], "labels": batch["labels"][i],
         "attention_mask": batch["attention_mask"][i], "pixel_values": batch["pixel_values"][i]}
        for i in (0, 1, 1, 0)
    ]  # fmt: skip
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], max_steps=2, per_device_train_batch_size=1,
        gradient_accumulation_steps=2, learning_rate=0.01, save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    trainer = Counting(model, args, train_dataset=rows, callbacks=[SelectionBiasCallback(0.25)])
    trainer.train()
    assert len(trainer.loads) == 4 and len(biased_layers(model)) == 6
    moved = 0
    for layer in biased_layers(model).values():
        key = layer.place, layer.layer
        wanted = torch.zeros(4)
        for step in (0, 2):
            load = trainer.loads[step][key] + trainer.loads[step + 1][key]
            wanted += 0.25 * (load.float().mean() - load).sign()
        assert torch.equal(layer.selection_bias, wanted), key
        moved += int(wanted.any())
    assert moved >= 4
    padded = trainer.loads[0]["llm", 0].sum() + trainer.loads[1]["llm", 0].sum()
    assert padded == (20 + 10) * 2


def test_processes_add_their_loads_up_in_one_collective(monkeypatch):
    """The other process has run one layer only, which this one has not."""
    layers = torch.nn.ModuleList(
        MoELayer(8, 6, experts, 2, "gelu", place="llm", layer=i, router=LOSS_FREE)
        for i, experts in enumerate((4, 3))
    )
    sent = []

    def all_reduce(load):
        sent.append(load.clone())
        load += torch.tensor([0, 0, 0, 0, 8, 1, 0])

    group = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        get_world_size=lambda: 2,
        all_reduce=all_reduce,
    )
    monkeypatch.setattr(balancing, "dist", group)
    callback = SelectionBiasCallback(1.0)
    callback.on_step_begin(*EVENTS, model=layers)
    with record_routing() as records:
        layers[0](torch.randn(5, 8))
    callback.on_optimizer_step(*EVENTS, model=layers)
    load = records[0].tokens_per_expert
    assert len(sent) == 1 and torch.equal(sent[0], torch.cat([load.long(), torch.zeros(3, dtype=torch.long)]))
    assert torch.equal(layers[0].selection_bias, (load.float().mean() - load).sign())
    assert torch.equal(layers[1].selection_bias, torch.tensor([-1.0, 1, 1]))


def test_only_the_step_counts_and_only_the_layers_of_the_model_with_a_trained_gate():
    make = lambda i: MoELayer(8, 6, 4, 1, "gelu", place="llm", layer=i, router=LOSS_FREE)
    model, other, x = torch.nn.ModuleList([make(0), make(1)]), make(0), torch.randn(5, 8)
    model[1].gate.requires_grad_(False)
    callback = SelectionBiasCallback(1.0)
    for layer in (*model, other):
        layer(x)  # before the step
    callback.on_step_begin(*EVENTS, model=model)
    for layer in (*model, other):
        layer(torch.cat([x, x + 3]))
    callback.on_optimizer_step(*EVENTS, model=model)
    first = model[0].selection_bias.clone()
    model[0].selection_bias.zero_()
    load = model[0].route(torch.cat([x, x + 3])).tokens_per_expert
    assert torch.equal(first, (load.float().mean() - load).sign()) and first.any()
    assert not model[1].selection_bias.any() and not other.selection_bias.any()


def test_a_step_that_failed_leaves_nothing_to_the_next():
    layer, callback = MoELayer(8, 6, 4, 1, "gelu", router=LOSS_FREE), SelectionBiasCallback(1.0)
    callback.on_step_begin(*EVENTS, model=layer)
    layer(torch.randn(7, 8))
    callback.on_step_begin(*EVENTS, model=layer)
    callback.on_optimizer_step(*EVENTS, model=layer)
    assert not layer.selection_bias.any()


def test_layers_of_one_place_and_index_have_each_its_own_load():
    """Those that a model of somebody else makes without naming them; one is frozen."""
    model = torch.nn.ModuleList(MoELayer(8, 6, 4, 1, "gelu", router=LOSS_FREE) for _ in range(3))
    model[1].gate.requires_grad_(False)
    callback, inputs = SelectionBiasCallback(1.0), [torch.randn(n, 8) for n in (9, 40, 7)]
    callback.on_step_begin(*EVENTS, model=model)
    with record_routing() as records:
        for layer, x in zip(model, inputs, strict=True):
            layer(x)
    callback.on_optimizer_step(*EVENTS, model=model)
    for i in (0, 2):
        load = records[i].tokens_per_expert
        assert torch.equal(model[i].selection_bias, (load.float().mean() - load).sign())
    assert not model[1].selection_bias.any()


def test_a_step_that_data_parallel_ran_is_refused_and_one_without_pictures_is_not():
    """The threads of nn.DataParallel record nothing; without it, nothing ran."""
    model = torch.nn.ModuleDict({"a": MoELayer(8, 6, 4, 1, "gelu", router=LOSS_FREE)})
    callback = SelectionBiasCallback(1.0)
    split = SimpleNamespace(n_gpu=2), *EVENTS[1:]
    wrapped = torch.nn.ModuleDict({"d": torch.nn.DataParallel(model["a"])})
    for events, made in ((split, model), (EVENTS, wrapped)):
        if made is wrapped:
            wrapped["d"].device_ids = [0, 1]  # of two GPUs
        callback.on_step_begin(*events, model=made)
        with pytest.raises(
            ValueError, match=r"torch.nn.DataParallel, whose .* torchrun.*, got no .* layers "
        ):
            callback.on_optimizer_step(*events, model=made)
    callback.on_step_begin(*EVENTS, model=model)
    callback.on_optimizer_step(*EVENTS, model=model)
    model["a"].gate.requires_grad_(False)  # nothing to move
    callback.on_step_begin(*split, model=model)
    callback.on_optimizer_step(*split, model=model)
    assert not model["a"].selection_bias.any()


def test_the_host_reads_no_value():
    """A meta tensor has none."""
    layer, callback = MoELayer(8, 6, 4, 2, "gelu", router=LOSS_FREE).to("meta"), SelectionBiasCallback()
    callback.on_step_begin(*EVENTS, model=layer)
    layer(torch.randn(7, 8, device="meta"))
    callback.on_optimizer_step(*EVENTS, model=layer)


@pytest.mark.parametrize("rate", [-1, float("inf"), "fast", None])
def test_a_wrong_rate_is_named(rate):
    with pytest.raises(ValueError, match=r"rate must be .*, got"):
        SelectionBiasCallback(rate)


# recipes


@pytest.mark.slow
@pytest.mark.parametrize("router", [LOSS_FREE, {"noisy": True}], ids=["bias", "noise"])
def test_a_resumed_run_has_the_bits_of_a_whole_one(folder, router):
    changes = {"model__router": router, "trainer__save_total_limit": 9}
    if router is LOSS_FREE:
        changes |= {"stage__selection_bias_rate": RATE, "stage__balance_loss_coef": 0.0}
    whole = run_recipe(load_recipe(write_recipe(folder, "whole", **changes)))
    recipe = load_recipe(write_recipe(folder, "cut", **changes))
    with pytest.raises(Interrupted):
        run_recipe(recipe, [StopAt(3).callback])
    run_recipe(recipe)
    same_result(whole.parent, folder / "cut")
    states = [load_file(path / "model.safetensors") for path in (*checkpoints(whole.parent), whole)]
    name = "selection_bias" if router is LOSS_FREE else "noise_gate.weight"
    own = [key for key in states[0] if key.endswith(name)]
    assert len(own) == 6 and all(torch.equal(states[-1][key], states[-2][key]) for key in own)
    assert all(any(state[key].any() for state in states) for key in own)
    if router is LOSS_FREE:
        moved = torch.cat([states[0][key] for key in own]).abs()
        assert set(moved.tolist()) <= {0.0, RATE, 2 * RATE}  # after two steps


@pytest.mark.slow
def test_a_lora_stage_keeps_the_biases_of_the_gates_that_it_trains(folder):
    """In checkpoints, in a resumed run and in the merged result; the frozen gates' stay zero."""
    pytest.importorskip("peft")
    lora = {"r": 2, "alpha": 4, "dropout": 0.1, "target_parameters": ["experts.down_proj"]}
    changes = {"model__router": LOSS_FREE, "trainer__save_total_limit": 9, "stage__selection_bias_rate": RATE,
               "stage__lora": lora, "stage__trains": ["projector", "language"]}  # fmt: skip
    whole = run_recipe(load_recipe(write_recipe(folder, "whole", **changes)))
    recipe = load_recipe(write_recipe(folder, "cut", **changes))
    with pytest.raises(Interrupted):
        run_recipe(recipe, [StopAt(3).callback])
    run_recipe(recipe)
    same_result(whole.parent, folder / "cut")
    last = load_file(checkpoints(whole.parent)[-1] / BESIDE)
    (name,) = (key for key in last if key.endswith("selection_bias"))
    state = load_file(whole / "model.safetensors")
    found = {key: bias for key, bias in state.items() if key.endswith("selection_bias")}
    own = name.removeprefix("base_model.model.")
    assert "projector" in own and last[name].any() and torch.equal(found.pop(own), last[name])
    assert len(found) == 5 and not any(bias.any() for bias in found.values())


def test_a_recipe_gives_the_rate_and_the_usual_one_is_a_thousandth(folder):
    found = []
    for changes in ({}, {"stage__selection_bias_rate": 0.5}):
        recipe = load_recipe(write_recipe(folder, model__router=LOSS_FREE, **changes))
        callbacks = build_trainer(recipe).callback_handler.callbacks
        found += [c.rate for c in callbacks if isinstance(c, SelectionBiasCallback)]
    assert found == [0.001, 0.5]
    plain = build_trainer(load_recipe(write_recipe(folder, "plain"))).callback_handler.callbacks
    assert not any(isinstance(callback, SelectionBiasCallback) for callback in plain)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stage__selection_bias_rate": 0.1}, r"stage.selection_bias_rate must be left out .*, got 0.1"),
        ({"model__router": {"score": "tanh"}}, r"model.router.score must be one of .*, got 'tanh'"),
        ({"model__router": {"expert_groups": 3}}, r"model.router.expert_groups must divide the 4 experts"),
        (
            {"model__router": LOSS_FREE, "model__vision_experts": 0, "model__projector_experts": 0,
             "model__text_experts": 0},
            r"model.router must be left out, as the model has no experts, got",
        ),
    ],
)  # fmt: skip
def test_a_wrong_key_is_named(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        build_trainer(load_recipe(write_recipe(folder, **changes)))


def test_a_stage_keeps_the_routers_that_the_model_has(folder):
    result = run_recipe(load_recipe(write_recipe(folder, model__router=LOSS_FREE, trainer__max_steps=1)))
    again = {"model__start": str(result), "trainer__max_steps": 1}
    trainer = build_trainer(load_recipe(write_recipe(folder, "again", **again)))
    assert trainer.model.config.router == LOSS_FREE and len(biases(trainer.model)) == 6
    build_trainer(load_recipe(write_recipe(folder, "same", **again, model__router=LOSS_FREE)))
    with pytest.raises(ValueError, match=r"model.router must be .*sigmoid.*, that of the experts that are"):
        build_trainer(load_recipe(write_recipe(folder, "other", **again, model__router={"noisy": True})))
