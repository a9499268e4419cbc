"""A training step needs no host synchronisation, except in the attention masks of transformers."""

import copy
from contextlib import nullcontext

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import cumo_kernels.integrations.transformers  # noqa: F401  registers "cumo"
from cumo_kernels import hostsync, use_backend
from cumo_kernels.hostsync import HostSync, no_host_sync
from cumo_model.model.image_tokens import check_no_placeholders, check_placeholders

# it checks whether a padding mask is all ones, except while a graph is traced
MASKS = "transformers.masking_utils"


def step(model, batch):
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def run():
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    return run


@pytest.mark.parametrize("text", ["mistral", "mixtral"])
def test_a_training_step_of_cumo(tiny_model, tiny_batch, text):
    model = tiny_model(text=text).train()
    run = step(model, tiny_batch())
    with use_backend("torch"):
        before = run()  # optimizer states and caches are created once
        with no_host_sync(MASKS):
            loss = run()
    assert loss.isfinite() and loss < before


def test_a_training_step_of_mixtral_with_our_experts():
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, vocab_size=50, output_router_logits=True,
    )  # fmt: skip
    torch.manual_seed(0)
    tokens = torch.randint(0, 50, (2, 12))
    batch = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
    steps = {}
    for implementation in ("eager", "cumo"):
        model = MixtralForCausalLM(copy.deepcopy(config)).train()
        model.set_experts_implementation(implementation)
        steps[implementation] = step(model, batch)
    with use_backend("torch"):
        for run in steps.values():
            run()
        with no_host_sync(MASKS):
            loss = steps["cumo"]()
            with pytest.raises(HostSync):  # its loop reads which experts have tokens
                steps["eager"]()
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("rows", "wanted", "lengths", "right"),
    [
        ([4, 4], [4, 4], None, True),
        ([8, 0], [4, 4], None, True),
        ([3, 5], [3, 5], None, True),
        ([0, 0], [], None, True),
        ([6, 2], [4, 4], None, False),  # the same total, but one picture extends over two rows
        ([4, 0], [4, 4], None, False),
        ([4, 4], [], None, False),
        ([3, 2], [4, 4], [3, 2], True),
        ([5, 0], [4, 4], [5, 0], False),
        ([3, 3], [4, 4], [3, 2], False),
    ],
)
def test_the_device_asserts_what_the_host_checks(rows, wanted, lengths, right, monkeypatch):
    is_image = torch.arange(9) < torch.tensor(rows)[:, None]
    lengths = None if lengths is None else torch.tensor(lengths)
    for guarding, error in ((False, ValueError), (True, RuntimeError)):
        monkeypatch.setattr(hostsync._guard, "active", guarding)
        with nullcontext() if right else pytest.raises(error, match="image"):
            check_placeholders(is_image, 60, wanted, lengths)
        with nullcontext() if not any(rows) else pytest.raises(error, match="pixel_values must come with"):
            check_no_placeholders(is_image, 60)
