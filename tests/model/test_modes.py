"""Training steps in the modes available on a CPU: precision, compilation, optimizers, QLoRA, reporters."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from cumo_model import CumoForConditionalGeneration
from cumo_model.training.recipe import load_recipe
from cumo_model.training.trainer import build_trainer, run_recipe, training_arguments
from tests.model.training.small_runs import write_data, write_model, write_recipe
from tests.rounding import assert_close_after, assert_same_formula, assert_same_sums, in_fp64, rounding_of


@pytest.fixture
def folder(tmp_path, tiny_config):
    write_data(tmp_path, text_rows=0)
    write_model(tmp_path, tiny_config)
    return tmp_path


def run(folder, name, **options):
    """Loss and gradient norm of two steps; the second has the full learning rate."""
    options = {"trainer__max_steps": 2, "trainer__warmup_steps": 0, "model__text_experts": 0, **options}
    result = run_recipe(load_recipe(write_recipe(folder, name, **options)))
    entries = json.loads((result / "trainer_state.json").read_text())["log_history"]
    return [(entry["loss"], entry["grad_norm"]) for entry in entries if "loss" in entry], result


@pytest.fixture
def wanted(folder):
    """The expected values, in fp64 like the values compared with them."""
    with in_fp64():
        return run(folder, "plain", model__dtype="float64")[0]


def test_bf16_computes_in_bf16_beside_fp32_weights(folder):
    """The loss differs from that of fp32, but by no more than the rounding error of bf16.

    The loss of a token is a logit minus a logsumexp of logits. The tolerance is half a step of bf16 for the
    rounding of a logit, and the same for the roundings before it.
    """
    wanted, _ = run(folder, "plain")
    found, result = run(folder, "bf16", trainer__bf16=True)
    assert found != wanted
    for one, other in zip(found, wanted, strict=True):
        assert_close_after(2, one[0], other[0], torch.bfloat16)
    assert {value.dtype for value in load_file(result / "model.safetensors").values()} == {torch.float32}
    found, result = run(folder, "weights", model__dtype="bfloat16")
    assert found[0][0] != wanted[0][0]
    assert_close_after(2, found[0][0], wanted[0][0], torch.bfloat16)
    assert {value.dtype for value in load_file(result / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in fp16")
def test_fp16_and_tf32_without_a_gpu(folder):
    with pytest.raises(ValueError, match=r"trainer\.fp16 needs a GPU, .* trainer\.bf16 runs on both"):
        training_arguments(load_recipe(write_recipe(folder, trainer__fp16=True)))
    assert not training_arguments(load_recipe("mistral-7b/sft", ["trainer.dataloader_num_workers=0"])).tf32


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("optimizer", ["adamw_torch", "adafactor", "sgd"])
def test_other_optimizers(folder, wanted, optimizer):
    """The first loss does not depend on the optimizer; the second does. Both AdamW implementations agree."""
    found, _ = run(folder, optimizer, trainer__optim=optimizer, model__dtype="float64")
    assert found[0] == wanted[0]
    if optimizer == "adamw_torch":
        assert_same_formula(found[1], wanted[1])
    else:
        with pytest.raises(AssertionError, match=r"is off by \d"):
            assert_same_formula(found[1][0], wanted[1][0])


def test_8_bit_adam(folder):
    pytest.importorskip("bitsandbytes")
    trainer = build_trainer(
        load_recipe(write_recipe(folder, trainer__max_steps=1, trainer__optim="adamw_bnb_8bit"))
    )
    trainer.train()
    assert type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__module__.startswith(
        "bitsandbytes"
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled(folder):
    """All operations of cumo_kernels are traced; `aot_eager` runs the traced graph without a compiler."""
    options = {"trainer__torch_compile": True, "trainer__torch_compile_backend": "aot_eager"}
    names = itertools.count()

    def series(**options):  # losses and norms as one tensor each, so that all steps have one tolerance
        return torch.tensor(run(folder, f"run-{next(names)}", **options)[0], dtype=torch.float64).unbind(1)

    assert_same_sums(series(**options), series(), rounding_of(series))


# relative to the largest weight of a row or block: int8 has 254 steps, the widest of NF4 is from -1 to -0.696
WIDEST_STEP = {4: 0.304, 8: 1 / 127}


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_on_a_model_with_new_experts(folder, bits):
    """Experts are made of unquantised weights; then the language model is quantised and adapters are trained.

    Quantised weights equal the original ones up to one quantisation step, and the model computes with them.
    """
    bnb = pytest.importorskip("bitsandbytes")
    options = {
        "model__quantize": bits,
        "model__text_experts": 0,
        "stage__trains": ["projector"],
        "stage__lora": {"r": 4, "alpha": 8, "dropout": 0.0},
        "trainer__max_steps": 2,
    }
    recipe = load_recipe(write_recipe(folder, "qlora", **options))
    trainer = build_trainer(recipe)
    kind = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
    packed = {name: module for name, module in trainer.model.named_modules() if isinstance(module, kind)}
    assert packed and all("language_model" in name for name in packed)
    whole = build_trainer(
        load_recipe(write_recipe(folder, "whole", trainer__max_steps=1, model__text_experts=0))
    )
    for name, module in packed.items():
        weight, near = module.weight, name.removeprefix("base_model.model.").removesuffix(".base_layer")
        if bits == 4:
            rough = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        else:
            rough = weight.CB * weight.SCB[:, None] / 127
        exact = whole.model.get_submodule(near).weight
        assert 0 < (rough - exact).abs().max() < WIDEST_STEP[bits] * exact.abs().max(), name
        exact.data = rough
    batch = whole.data_collator([whole.train_dataset[0], whole.train_dataset[1]])

    @torch.no_grad()
    def logits(model=whole.model):
        return model.train()(**batch, use_cache=False).logits

    assert_same_sums(logits(trainer.model), logits(), rounding_of(logits))
    result = run_recipe(recipe)
    assert not (folder / "qlora" / ".start").exists()
    again = CumoForConditionalGeneration.from_pretrained(result)
    assert again.config.vision_config.num_experts == 4 and again.dtype == torch.float32


def test_wandb_offline_gets_every_layer(folder, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(folder))
    run(folder, "reported", trainer__report_to="wandb")
    import wandb

    wandb.teardown()  # ends the writer process
    (log,) = folder.rglob("run-*.wandb")
    written = log.read_bytes()
    for name in (b"experts/clip.01/load_entropy", b"mlp_balance", b"grad_norm_gates", b"tokens_per_second"):
        assert name in written, name
