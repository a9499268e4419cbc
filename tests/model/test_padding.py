"""Padding changes neither losses nor gradients nor statistics of a whole model with experts in all parts."""

import pytest
import torch
from torch.nn.functional import pad

from cumo_model.data.batches import Collator
from tests.model.conftest import IMAGE_TOKEN
from tests.model.gradients import gradients
from tests.rounding import assert_same_formula

pytestmark = pytest.mark.usefixtures("fp64")
COEFFICIENTS = {"balance_loss_coef": 2.0, "router_z_loss_coef": 0.3}
STATS = ("mean_probs", "top1_density", "mean_squared_logsumexp")


@pytest.fixture
def model(tiny_model):
    return tiny_model(text="mixtral", **COEFFICIENTS).double().train()


def widen(batch, left, right):
    """The batch with padding tokens, which are words like any other."""
    fill = {"input_ids": 7, "labels": -100, "attention_mask": 0}
    return {key: pad(t, (left, right), value=fill[key]) if key in fill else t for key, t in batch.items()}


def found(model, batch, **options):
    """All that depends on routing, the gradients of the whole loss, and logits and loss."""
    model.zero_grad()
    out = model(**batch, output_router_stats=True, use_cache=False, **options)
    if model.training:
        out.loss.backward()
    parts = out.loss_parts | {"loss": out.loss, "aux_loss": out.aux_loss}
    stats = {f"{place}.{name}": t for place, of in out.router_stats.items() for name, t in of.items()}
    return parts | stats | (gradients(model) if model.training else {})


@pytest.mark.parametrize("left, right", [(0, 20), (0, 60), (20, 0), (60, 0), (13, 5)])
def test_nothing_depends_on_the_amount_of_padding(model, tiny_batch, left, right):
    batch = {key: t.double() if t.is_floating_point() else t for key, t in tiny_batch().items()}
    wanted = found(model, batch)
    unmasked = {key: value for key, value in batch.items() if key != "attention_mask"}
    assert_same_formula(found(model, unmasked), wanted)
    assert_same_formula(found(model, widen(batch, left, right)), wanted)
    assert wanted["llm.tokens_per_expert"].sum(1).tolist() == [80, 80]


def test_nothing_depends_on_rows_that_are_padding(model, tiny_batch):
    batch = tiny_batch()
    batch["pixel_values"] = batch["pixel_values"].double()
    more = dict(batch)
    for key, value in (("input_ids", 7), ("labels", -100), ("attention_mask", 0)):
        more[key] = pad(batch[key], (0, 0, 1, 2), value=value)
    assert_same_formula(found(model, more), found(model, batch))


def test_evaluation_gives_the_same(model, tiny_batch):
    model.eval()
    batch = tiny_batch()
    batch["pixel_values"] = batch["pixel_values"].double()
    wanted, padded = (found(model, b, output_router_logits=True) for b in (batch, widen(batch, 9, 4)))
    assert wanted["aux_loss"] > 0
    assert_same_formula(padded, wanted)


def test_with_compat_padding_counts(tiny_model, tiny_batch):
    """Its embedding is zero in training, as in the original code."""
    model = tiny_model(text="mixtral", compat="cumo", **COEFFICIENTS).double().train()
    batch = tiny_batch()
    batch["pixel_values"] = batch["pixel_values"].double()
    one, other, third = (
        found(model, {**widen(batch, 0, n), **ids})
        for n, ids in (
            (0, {}),
            (20, {}),
            (20, {"input_ids": pad(batch["input_ids"], (0, 20), value=9)}),
        )
    )
    assert one["llm.tokens_per_expert"].sum(1).tolist() == [80, 80]
    assert other["llm.tokens_per_expert"].sum(1).tolist() == [160, 160]
    assert abs(other["llm_balance"] - one["llm_balance"]) > 1e-3
    assert_same_formula(other, third)
    real = batch | {"router_mask": torch.ones_like(batch["input_ids"])}
    real = widen(real, 0, 20) | {"router_mask": pad(real["router_mask"], (0, 20))}
    assert_same_formula(found(model, real)["llm_balance"], one["llm_balance"])


@pytest.mark.parametrize(
    "compat, training, is_zero", [("cumo", True, True), ("cumo", False, False), (None, True, False)]
)
def test_the_embedding_of_padding_is_zero_in_training_with_compat(
    tiny_model, tiny_batch, compat, training, is_zero
):
    """As in the original code, which pads embeddings; in evaluation and without compat it is the token's."""
    model, seen = tiny_model(text="mixtral", compat=compat).train(training), []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    batch = tiny_batch(images=0)
    batch["attention_mask"][0, 17:] = batch["attention_mask"][1, :2] = 0
    model(**batch)
    wanted = model.get_input_embeddings()(batch["input_ids"]).detach()
    if is_zero:
        wanted = wanted * batch["attention_mask"][:, :, None]
        assert wanted[0, 16].any() and not wanted[0, 17:].any() and not wanted[1, :2].any()
    assert torch.equal(seen[0], wanted)


def samples():
    source = torch.Generator().manual_seed(4)
    rows = []
    for length, has_picture in ((14, True), (1, False), (6, False), (17, True), (5, False)):
        ids = torch.randint(3, 50, (length,), generator=source)
        if has_picture:
            ids[2:11] = IMAGE_TOKEN
        pixels = torch.randn(1, 3, 12, 12, generator=source).double() if has_picture else None
        rows.append({"input_ids": ids, "labels": ids.clone(), "pixel_values": pixels})
    return rows


def test_packed_rows_have_the_losses_of_padded_ones(model):
    """Also where a conversation is one token, which has the position of padding."""
    rows = samples()
    padded = Collator(0, 12)([[row] for row in rows])
    packed = Collator(0, 12, packed=True)([rows[:3], rows[3:]])
    wider = {
        key: pad(t, (0, 9), value=-100 if key == "labels" else 0) if t.ndim == 2 else t
        for key, t in packed.items()
    }
    wanted = found(model, padded)
    assert wanted["llm.tokens_per_expert"].sum(1).tolist() == [86, 86]
    for batch in (packed, wider):
        assert (batch["router_mask"] == 0).any()
        assert_same_formula(found(model, batch), wanted)


def test_with_compat_padding_of_packed_rows_counts_too(tiny_model):
    model = tiny_model(text="mixtral", compat="cumo", **COEFFICIENTS).double().train()
    rows = samples()
    collator = Collator(0, 12, packed=True, padding_counts=True)
    batch = collator([rows[:3], rows[3:]])
    size = batch["input_ids"].numel()
    assert "router_mask" not in batch and size > 43
    assert found(model, batch)["llm.tokens_per_expert"].sum(1).tolist() == [2 * size, 2 * size]


def test_dense_decoders_take_packed_rows_too(tiny_model):
    model, rows = tiny_model(text="mistral").double().train(), samples()
    batches = Collator(0, 12)([[row] for row in rows]), Collator(0, 12, packed=True)([rows])
    assert_same_formula(*(found(model, batch) for batch in batches))


def test_a_mask_of_another_shape_is_named(model, tiny_batch):
    mask = torch.ones(2, 19)
    with pytest.raises(ValueError, match=r"router_mask must be \(2, 20\) like input_ids, got \(2, 19\)"):
        model(**tiny_batch(dtype=torch.float64), router_mask=mask)
