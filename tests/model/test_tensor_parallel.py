"""Tensor parallelism of transformers on two processes: gloo, CPU, fp64."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.distributed import DistributedConfig

from cumo_model.model.tensor_parallel import check_parallel
from tests.model.tensor_parallel_worker import results
from tests.processes import Forked, finish
from tests.rounding import assert_same_formula

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")
HEADS = {"num_key_value_heads": 2}
MODELS = {
    "mistral-moe": {"text": "mistral"},
    "mixtral-moe": {"text": "mixtral"},
    "mistral-dense": {"text": "mistral", "vision_experts": 1, "projector_num_experts": 1},
    "mixtral-dense": {"text": "mixtral", "vision_experts": 1, "projector_num_experts": 1},
    "mistral-tied": {"text": "mistral", "tie_word_embeddings": True},
    "mixtral-tied": {"text": "mixtral", "tie_word_embeddings": True},
}


def make_batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 50, (2, 20), generator=generator)
    ids[:, 3:12] = 60
    labels = ids.clone()
    labels[:, :14] = -100
    pixels = torch.randn(2, 3, 12, 12, generator=generator, dtype=torch.float64)
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.usefixtures("fp64")
def test_two_processes_compute_the_same_as_one(tiny_model, tmp_path):
    """Logits, tokens, loss, every gradient, a step of SGD and the saved checkpoint.

    Each rank has half of attention, dense MLPs and experts.
    """
    batch, wanted = make_batch(), {}
    torch.save(batch, tmp_path / "batch.pt")
    for name, options in MODELS.items():
        model = tiny_model(scales=(1,), text_options=HEADS, **options)
        model.save_pretrained(tmp_path / name)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        wanted[name] = results(model, batch), state
    finish(Forked([WORKER, tmp_path, *MODELS], tmp_path / "out.txt", 2), seconds=190)
    for rank in range(2):
        error = (tmp_path / f"none-{rank}" / "error.txt").read_text()
        assert error.startswith("distributed_config must not ask for expert parallelism"), error
    for name in MODELS:
        for rank in range(2):
            found, sizes = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            assert torch.equal(found.pop("tokens"), wanted[name][0]["tokens"])
            assert_same_formula(found, {k: v for k, v in wanted[name][0].items() if k != "tokens"})
            check_sizes(sizes, wanted[name][1])
        saved = load_file(tmp_path / f"{name}-saved" / "model.safetensors")
        tied = {"lm_head.weight"} if name.endswith("tied") else set()
        assert saved.keys() == wanted[name][1].keys() - tied
        assert all(torch.equal(value, wanted[name][1][key]) for key, value in saved.items())


def check_sizes(sizes, state):
    """Which parameters each rank has half of."""
    halves = ("q_proj", "k_proj", "v_proj", "o_proj.weight", "out_proj.weight")  # attention
    halves += ("gate_proj", "up_proj", "down_proj.weight", "fc1", "fc2.weight")  # dense MLPs
    halves += ("experts.down_proj", "experts.gate_up_proj", "experts.up_proj", "experts.up_proj_bias")
    for name in state:
        is_half = any(f"{half}." in f"{name}." for half in halves)
        assert sizes.get(name, 1.0) == (0.5 if is_half else 1.0), name


REFUSED = [
    pytest.param(
        {}, {"tp_size": 3}, r"tp_size must divide text_config.num_attention_heads, 2, got 3", id="heads"
    ),
    pytest.param(
        {"vision": {"num_attention_heads": 1}},
        {"tp_size": 2},
        "tp_size must divide vision_config.num_attention_heads, 1, got 2",
        id="heads-of-the-tower",
    ),
    pytest.param(
        {"text_options": {"num_key_value_heads": 1}},
        {"tp_size": 2},
        "tp_size must divide text_config.num_key_value_heads, 1, got 2",
        id="key-value-heads",
    ),
    pytest.param(
        {"vision": {"intermediate_size": 49}},
        {"tp_size": 2},
        "tp_size must divide the inner size of model.vision_tower.encoder.layers.0.mlp.experts, 49, got 2",
        id="experts",
    ),
    pytest.param(
        {"vision_experts": 1, "vision": {"intermediate_size": 49}},
        {"tp_size": 2},
        "tp_size must divide the inner size of model.vision_tower.encoder.layers.0.mlp, 49, got 2",
        id="dense-mlp",
    ),
    pytest.param(
        {"text_options": {**HEADS, "intermediate_size": 41}},
        {"tp_size": 2},
        "tp_size must divide text_config.intermediate_size, 41, got 2",
        id="dense-text",
    ),
    pytest.param({"compat": "cumo"}, {"tp_size": 2}, "tp_size must be 1 with compat 'cumo'", id="compat"),
    pytest.param({}, {"pp_size": 2}, "pp_size 1 for CumoForConditionalGeneration, got 2", id="pipeline"),
]


@pytest.mark.parametrize("options, asked, words", REFUSED)
def test_refused_before_weights_are_loaded(tiny_model, options, asked, words):
    options = {"text_options": HEADS, **options}
    with pytest.raises(ValueError, match=words):
        check_parallel(tiny_model(**options), DistributedConfig(**asked))


@pytest.mark.parametrize("text", ["mistral", "mixtral"])
def test_expert_parallelism_of_transformers_is_refused(tiny_model, text):
    class Newer:  # transformers 5.24
        tp_size, ep_size, pp_size = 2, 2, 1

    model = tiny_model(text=text, text_options=HEADS)
    assert not model._ep_plan  # MixtralConfig has one
    for asked in (DistributedConfig(tp_size=2, enable_expert_parallel=True), Newer()):
        with pytest.raises(ValueError, match=r"must not ask for expert parallelism .* of CumoForCond"):
            type(model).maybe_distribute_model(model, asked, None)
