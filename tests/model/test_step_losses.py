"""The loss of a step: its average over tokens, micro-batches and processes, and the router losses in it."""

import copy
from itertools import product

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments

from cumo_model.model.losses import smoothed_language_loss
from cumo_model.training.router_losses import RouterLosses
from tests.model.gradients import gradients
from tests.rounding import assert_same_formula

pytestmark = pytest.mark.usefixtures("fp64")
COEFFICIENTS = {"balance_loss_coef": 2.0, "router_z_loss_coef": 0.3}
OFF = {"balance_loss_coef": 0.0, "router_z_loss_coef": 0.0}


def rows():
    """Four rows with a picture each and 1, 11, 5 and 0 labels; three of the 11 are image tokens."""
    found = []
    for seed, first in enumerate((19, 12, 15, 20)):
        source = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 50, (20,), generator=source)
        ids[3:12] = 60
        labels = ids.masked_fill(torch.arange(20) < first, -100)
        if seed == 1:
            labels = ids.masked_fill(torch.arange(20) < 9, -100)
        pixels = torch.randn(1, 3, 12, 12, generator=source)
        found.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "labels": labels,
                "pixel_values": pixels,
            }
        )
    return found


def collate(samples):
    return {key: torch.stack([s[key] for s in samples]) for key in samples[0]}


class Kept(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = gradients(model)


class WithRouterLosses(RouterLosses, Trainer):
    pass


def step(model, folder, micro, cls=Trainer, compute_loss_func=None, **options):
    """The gradients of one step over `rows()`, clipped by nothing, and its logged loss."""
    kept = Kept()
    arguments = TrainingArguments(
        str(folder),
        max_steps=1,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=4 // micro,
        learning_rate=0.0,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        **options,
    )
    trainer = cls(
        copy.deepcopy(model),
        arguments,
        train_dataset=rows(),
        data_collator=collate,
        callbacks=[kept],
        compute_loss_func=compute_loss_func,
    )
    trainer.train()
    return kept.gradients, trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize("text", ["mistral", "mixtral"])
def test_four_micro_batches_give_the_gradients_of_one(tiny_model, tmp_path, text):
    """Exactly, but for the router losses."""
    model = tiny_model(text=text, **OFF).train()
    (whole, _), (parts, _) = step(model, tmp_path, 4), step(model, tmp_path, 1)
    assert_same_formula(parts, whole)


def wanted_gradients(model, weigh):
    """Gradients of the sum over the rows of weigh(row's number, language loss, weighted router losses)."""
    model = copy.deepcopy(model).train()
    for number, row in enumerate(rows()):
        out = model(**collate([row]))
        weigh(number, out.loss - out.aux_loss, out.aux_loss).backward()
    return gradients(model)


COUNTED = [1, 11, 5, 0]  # labels of the rows, as transformers' Trainer counts them
PREDICTED = [1, 8, 5, 0]  # without image tokens


def test_router_losses_are_weighted_by_the_share_of_the_labels(tiny_model, tmp_path):
    model = tiny_model(text="mixtral", **COEFFICIENTS).train()
    wanted = wanted_gradients(
        model, lambda i, language, aux: language * PREDICTED[i] / 17 + aux * COUNTED[i] / 17
    )
    assert_same_formula(step(model, tmp_path, 1)[0], wanted)


def test_the_mean_of_the_micro_batches_on_request(tiny_model, tmp_path):
    model = tiny_model(text="mixtral", average_loss_over="micro_batches", **COEFFICIENTS).train()
    assert not model.accepts_loss_kwargs
    wanted = wanted_gradients(model, lambda i, language, aux: (language + aux) / 4)
    assert_same_formula(step(model, tmp_path, 1)[0], wanted)


def own_loss(outputs, labels, num_items_in_batch=None):
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    targets = targets.masked_fill(targets == 60, -100)
    return cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


def test_a_loss_computed_outside_the_model_keeps_the_router_losses(tiny_model, tmp_path):
    model = tiny_model(text="mixtral", **COEFFICIENTS).train()
    for micro in (4, 1):
        wanted = step(model, tmp_path, micro)
        found = step(model, tmp_path, micro, WithRouterLosses, compute_loss_func=own_loss)
        assert_same_formula(found, wanted)
        lost = step(model, tmp_path, micro, compute_loss_func=own_loss)
        with pytest.raises(AssertionError):
            assert_same_formula(lost, wanted)


@pytest.mark.parametrize("micro", [4, 1])
def test_label_smoothing_is_shifted_and_keeps_the_router_losses(tiny_model, tmp_path, micro):
    model = tiny_model(text="mixtral", **COEFFICIENTS).train()

    def smoothed(outputs, labels, num_items_in_batch=None):
        targets = labels[:, 1:].flatten()
        targets = targets.masked_fill(targets == 60, -100)
        rows = outputs.logits[:, :-1].flatten(0, 1)
        return cross_entropy(rows, targets, reduction="sum", label_smoothing=0.1) / num_items_in_batch

    wanted = step(model, tmp_path, micro, WithRouterLosses, compute_loss_func=smoothed)
    found = step(model, tmp_path, micro, WithRouterLosses, label_smoothing_factor=0.1)
    assert_same_formula(found, wanted)


def test_aux_loss_is_given_in_training_with_and_without_labels(tiny_model, tiny_batch):
    model, batch = tiny_model(text="mixtral", **COEFFICIENTS).train(), tiny_batch()
    labelled = model(**batch)
    coefs = {"balance": 2.0, "z": 0.3}
    parts = {name: value for name, value in labelled.loss_parts.items() if name != "language"}
    assert len(parts) == 6
    assert_same_formula(labelled.aux_loss, sum(coefs[n.split("_")[1]] * v for n, v in parts.items()))
    assert_same_formula(labelled.loss, labelled.loss_parts["language"] + labelled.aux_loss)
    labels = batch.pop("labels")
    free = model(**batch)
    assert free.loss is None and torch.equal(free.aux_loss, labelled.aux_loss)
    language = cross_entropy(free.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    (language + free.aux_loss).backward()
    found = gradients(model)
    model.zero_grad()
    model(**batch, labels=labels).loss.backward()
    assert_same_formula(found, gradients(model))
    assert model.eval()(**batch).aux_loss is None
    text = model.train()(
        batch["input_ids"].clamp(max=49), labels=labels
    )  # no picture: Mixtral's routers only
    llm = {name: value for name, value in text.loss_parts.items() if name != "language"}
    assert set(llm) == {"llm_balance", "llm_z"}
    assert_same_formula(text.aux_loss, sum(coefs[n.split("_")[1]] * v for n, v in llm.items()))
    assert_same_formula(text.loss, text.loss_parts["language"] + text.aux_loss)
    without = tiny_model(text="mixtral", vision_experts=1, projector_num_experts=1).train()
    out = without(**batch, labels=labels, output_router_logits=True)
    assert out.aux_loss == 0 and len(out.router_logits) == 2
    assert set(out.loss_parts) == {"language"} and out.loss == out.loss_parts["language"]


def test_router_logits_as_mixtral_has_them(tiny_model, tiny_batch):
    """(tokens, experts) for each layer, with gradients; the weighted losses are functions of them."""
    model, batch = tiny_model(text="mixtral", **COEFFICIENTS), tiny_batch()
    del batch["labels"]
    out = model.eval()(**batch, output_router_logits=True)
    shapes = [[tuple(x.shape) for x in name] for name in (
        out.router_logits, out.vision_router_logits, out.projector_router_logits)]  # fmt: skip
    assert shapes == [[(40, 4)] * 2, [(200, 4)] * 3, [(18, 4)]]
    llm = 0.0
    for logits in out.router_logits:
        density = torch.nn.functional.one_hot(logits.argmax(-1), 4).to(logits).mean(0)
        balance, z = 4 * (logits.softmax(-1).mean(0) * density).sum(), logits.logsumexp(-1).square().mean()
        llm += (2.0 * balance + 0.3 * z) / 2
    parts = model.train()(**batch).loss_parts
    assert_same_formula(llm, 2.0 * parts["llm_balance"] + 0.3 * parts["llm_z"])
    assert torch.equal(out.aux_loss, model.eval()(**batch, output_router_logits=True).aux_loss)
    out.router_logits[0].sum().backward()
    assert model.model.vision_tower.encoder.layers[0].mlp.gate.weight.grad is not None
    assert model(**batch).router_logits is None
    model.config.output_router_logits = True
    assert len(model(**batch).vision_router_logits) == 3
    dense = tiny_model(text="mistral").eval()(**batch, output_router_logits=True)
    assert dense.router_logits is None and len(dense.projector_router_logits) == 1
    # TRL adds config.router_aux_loss_coef * aux_loss, which is already weighted
    assert model.config.router_aux_loss_coef == 1.0


def test_num_items_shifted_labels_and_the_loss_function_are_those_of_transformers(tiny_model, tiny_batch):
    model, batch = tiny_model(**OFF).train(), tiny_batch()
    mean = model(**batch)
    targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    count = int((targets != -100).sum())
    for skip in (False, True):
        half = model(**batch, num_items_in_batch=2 * count, skip_logits=skip)
        assert_same_formula(half.loss * 2, mean.loss)
        assert_same_formula(half.loss_parts["language"], mean.loss)
        for labels in ({}, {"labels": batch["labels"]}):
            given = {key: value for key, value in batch.items() if key != "labels"} | labels
            assert_same_formula(model(**given, shift_labels=targets, skip_logits=skip).loss, mean.loss)
    with pytest.raises(ValueError, match=r"shift_labels must be \(2, 20\) like input_ids, got \(2, 19\)"):
        model(**batch, shift_labels=targets[:, 1:])
    nothing = dict(batch, labels=torch.full_like(batch["labels"], -100))
    assert model(**nothing).loss == 0 == model(**nothing, skip_logits=True).loss
    seen = []

    def seven(logits, labels, vocab_size, num_items_in_batch=None, shift_labels=None, **kwargs):
        seen.append((vocab_size, num_items_in_batch))
        return logits.sum() * 0 + 7

    model.loss_function = seven
    assert (
        model(**batch, num_items_in_batch=3).loss
        == 7
        == model(**batch, num_items_in_batch=3, skip_logits=True).loss
    )
    assert seen == [(50, 3), (50, 3)]
    given = {key: value for key, value in batch.items() if key != "labels"}
    passed = []

    def seen_targets(logits, labels, vocab_size, shift_labels=None, **kwargs):
        passed.append((labels, shift_labels))
        return logits.sum() * 0

    model.loss_function = seen_targets
    model(**given, shift_labels=targets)
    model(**batch)
    assert passed[0][0] is None and torch.equal(passed[0][1], targets)
    assert torch.equal(passed[1][0], batch["labels"]) and passed[1][1] is None


def test_skipping_logits_averages_over_the_predicted_tokens(tiny_model, tiny_batch):
    """Rows with 6 and 2 labels, and one on an image token: the mean of 7, or the sum / num_items_in_batch."""
    model, batch = tiny_model(**OFF).train(), tiny_batch()
    batch["labels"][1, :18] = -100
    batch["labels"][0, 14] = 60
    targets = batch["labels"][:, 1:].flatten()
    predicted = (targets != -100) & (targets != 60)
    assert predicted.sum() == 7
    rows = model(**batch).logits[:, :-1].flatten(0, 1)[predicted]
    total = -rows.log_softmax(-1)[torch.arange(7), targets[predicted]].sum()
    cases = [({}, 7), ({"num_items_in_batch": 30}, 30), ({"num_items_in_batch": 0}, 1)]
    cases.append(({"num_items_in_batch": torch.tensor([30])}, 30))  # as nn.DataParallel passes it
    shifted = {key: value for key, value in batch.items() if key != "labels"}
    shifted["shift_labels"] = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    for (options, divisor), given, skip in product(cases, (batch, shifted), (False, True)):
        out = model(**given, skip_logits=skip, **options)
        assert_same_formula(out.loss, total / divisor)
        assert_same_formula(out.loss_parts["language"], total / 7)
        assert out.loss.shape == ()


@pytest.mark.parametrize("shifted", [False, True])
def test_label_smoothing_of_a_model_is_that_of_the_definition(tiny_model, tiny_batch, shifted):
    """(1 - s) * -log p(label) + s / V * sum_v -log p(v), averaged over the predicted tokens."""
    model, batch = tiny_model(**OFF).train(), tiny_batch()
    batch["labels"][1, :18] = -100
    labels = batch.pop("labels")
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    logs = -logits[targets != -100].log_softmax(-1)
    each = 0.7 * logs[torch.arange(8), targets[targets != -100]] + 0.3 * logs.mean(1)
    given = {"shift_labels": torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)}
    given = given if shifted else {"labels": labels}
    model.loss_function = smoothed_language_loss(0.3)
    for skip in (False, True):
        assert_same_formula(model(**batch, **given, skip_logits=skip).loss, each.mean())
        loss = model(**batch, **given, skip_logits=skip, num_items_in_batch=30).loss
        assert_same_formula(loss, each.sum() / 30)
    unshifted = smoothed_language_loss(0.3)(model(**batch).logits, labels, 50)  # as a function of its own
    assert_same_formula(unshifted, each.mean())


def test_a_loss_function_is_called_as_transformers_calls_it(tiny_model, tiny_batch):
    """With the labels, image tokens masked, and the keyword arguments of the call; also without logits."""
    model, batch, seen = tiny_model(**OFF).train(), tiny_batch(), []
    batch["labels"][0, 5] = 60

    def own(logits, labels, vocab_size, weight=1.0, **kwargs):
        seen.append(sorted(kwargs))
        return weight * cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    wanted = model(**batch).loss
    model.loss_function = own
    for skip in (False, True):
        out = model(**batch, weight=3.0, skip_logits=skip)
        assert_same_formula(out.loss, 3 * wanted)
        assert (out.logits is None) == skip
    model(**batch, num_items_in_batch=7)
    assert seen == [[], [], ["num_items_in_batch"]]


def test_the_trainer_evaluates_and_keeps_the_best_model(tiny_model, tmp_path):
    """It looks for labels among the parameters of forward: all that it finds must be in a batch."""
    arguments = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False}
    arguments |= {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    arguments |= {"max_steps": 1, "load_best_model_at_end": True, "dataloader_pin_memory": False}
    model = tiny_model(**COEFFICIENTS)
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), **arguments),
        train_dataset=rows(),
        eval_dataset=rows()[:3],
        data_collator=collate,
    )
    trainer.train()
    assert trainer.state.best_metric == trainer.evaluate()["eval_loss"] > 0


def test_no_label_in_a_whole_step_is_no_division_by_zero(tiny_model, tiny_batch):
    model, batch = tiny_model().train(), tiny_batch()
    batch["labels"].fill_(-100)
    for none in (0, torch.tensor(0)):
        assert model(**batch, num_items_in_batch=none).loss == 0
    with pytest.raises(ValueError, match="logits_to_keep must be 0 with labels, got 3"):
        model(**batch, logits_to_keep=3)


def test_a_model_called_inside_another_has_no_part_in_its_losses(tiny_model, tiny_batch):
    """A teacher in a hook, a copy of the model, with and without gradients; and a tower of its own."""
    model, batch = tiny_model(text="mixtral", **COEFFICIENTS).train(), tiny_batch()
    wanted = model(**batch)
    inner = copy.deepcopy(model)

    def run(*_):
        inner(**batch)
        with torch.no_grad():
            inner(**batch)
            inner.model.vision_tower(batch["pixel_values"])

    handle = model.model.multi_modal_projector.register_forward_hook(run)
    found = model(**batch)
    handle.remove()
    assert torch.equal(found.loss, wanted.loss) and found.loss_parts == wanted.loss_parts
