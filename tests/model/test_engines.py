"""The same recipe on two processes under DDP, FSDP2 and expert parallelism; LoRA."""

import pytest
import torch
from safetensors.torch import load_file

from cumo_model import CumoForConditionalGeneration
from cumo_model.recipe import load_recipe
from cumo_model.recover import checkpoints
from cumo_model.train import Interrupted
from cumo_model.trainer import build_trainer, run_recipe
from tests.model.test_recover import StopAt, finish, losses, same_result, start
from tests.model.training import write_data, write_model, write_recipe


@pytest.fixture
def folder(tmp_path, tiny_config):
    write_data(tmp_path)
    write_model(tmp_path, tiny_config)
    return tmp_path


OPTIONS = {"trainer__per_device_train_batch_size": 1, "trainer__max_steps": 4, "model__text_experts": 0}
ENGINES = {
    "fsdp": {"trainer__fsdp_config": "engines/fsdp2.json"},
    "experts": {"stage__expert_parallel": 2},
    "both": {"stage__expert_parallel": 2, "trainer__fsdp_config": "engines/fsdp2.json"},
}


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_engines_train_alike(folder):
    """Losses and weights after four steps, checkpoints on the way, steps of text alone among them."""
    finish(start(write_recipe(folder, "ddp", **OPTIONS), 2))
    wanted, weights = losses(folder / "ddp"), load_file(folder / "ddp" / "model" / "model.safetensors")
    for name, options in ENGINES.items():
        finish(start(write_recipe(folder, name, **OPTIONS, **options), 2))
        for one, other in zip(losses(folder / name), wanted, strict=True):
            assert one == pytest.approx(other, rel=1e-5), name
        found = load_file(folder / name / "model" / "model.safetensors")
        assert found.keys() == weights.keys(), name
        for key, value in weights.items():
            # Adam's first steps are the sign of a gradient, which rounding may turn where it is nearly zero
            differs = ((found[key] - value).abs() > 1e-5).float().mean()
            assert differs < 0.02, (name, key)
        assert len(checkpoints(folder / name)) == 2


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_with_spread_experts_goes_on(folder):
    """From a checkpoint of whole tensors, on as many processes: the same losses, bit for bit."""
    options = {**OPTIONS, **ENGINES["experts"], "trainer__save_steps": 2}
    finish(start(write_recipe(folder, "whole", **options), 2))
    recipe = write_recipe(folder, "again", **options)
    run = folder / "again"
    run.mkdir()
    (folder / "whole" / "checkpoint-2").rename(run / "checkpoint-2")
    finish(start(recipe, 2))
    assert losses(folder / "whole") == losses(run)


def test_lora_trains_adapters_and_the_connector(folder):
    peft = pytest.importorskip("peft")
    lora = {"r": 4, "alpha": 8, "dropout": 0.0, "target_parameters": ["experts.gate_up_proj"]}
    recipe = write_recipe(
        folder, trainer__max_steps=2, stage__lora=lora, stage__trains=["projector", "language"]
    )
    trainer = build_trainer(load_recipe(recipe))
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("lora_A" in n and "self_attn.q_proj" in n for n in trained)
    assert any("lora_A" in n and "experts" in n for n in trained)
    assert any("multi_modal_projector" in n for n in trained)
    assert not any("vision_tower" in n or ("language_model" in n and "lora_" not in n) for n in trained)
    assert isinstance(trainer.model, peft.PeftModel)


def test_a_lora_stage_stops_goes_on_and_leaves_a_whole_model(folder):
    """The connector's own training, beside the adapters, is in checkpoints and in the result: the next stage
    begins with what this one computed."""
    pytest.importorskip("peft")
    lora = {"r": 4, "alpha": 8, "dropout": 0.0, "target_parameters": ["experts.gate_up_proj"]}
    options = {"stage__lora": lora, "stage__trains": ["projector", "language"], "trainer__max_steps": 4}
    whole = run_recipe(load_recipe(write_recipe(folder, "whole", **options)))
    recipe = load_recipe(write_recipe(folder, "cut", **options, trainer__save_steps=100))
    with pytest.raises(Interrupted, match="stopped at step 2"):
        run_recipe(recipe, [StopAt(1).callback])
    run_recipe(recipe)
    same_result(folder / "whole", folder / "cut")

    trainer = build_trainer(load_recipe(write_recipe(folder, "whole", **options)))
    trainer._load_from_checkpoint(str(folder / "whole" / "checkpoint-4"))
    batch = trainer.data_collator([trainer.train_dataset[0]])
    model = CumoForConditionalGeneration.from_pretrained(whole).eval()
    trained, merged = (one.eval()(**batch).logits for one in (trainer.model, model))
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in model.named_parameters())
    following = write_recipe(folder, "next", model__start=str(whole), trainer__max_steps=1)
    assert run_recipe(load_recipe(following)).is_dir()


def test_stacked_experts_are_one_parameter(folder):
    """What an engine waits for is a parameter; none of ours belongs to one expert."""
    trainer = build_trainer(load_recipe(write_recipe(folder)))
    names = [name for name, p in trainer.model.named_parameters() if "experts" in name]
    assert names and all(p.shape[0] == 4 for n, p in trainer.model.named_parameters() if "experts" in n)
    assert torch.nn.ModuleList not in {type(m) for n, m in trainer.model.named_modules() if "experts" in n}
