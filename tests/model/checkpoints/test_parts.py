"""Assembly of a dense CuMo from a CLIP, a language model and mm_projector.bin; the upcycle command."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from cumo_model import CumoForConditionalGeneration, convert, from_parts, record_routing
from cumo_model.__main__ import main
from cumo_model.checkpoints.shards import Shards
from cumo_model.checkpoints.upcycle_checkpoint import probe
from cumo_model.demo.tokenizer import train_tokenizer
from tests.model import original
from tests.rounding import assert_same_formula, assert_spread

TEXT = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 50, "max_position_embeddings": 128}  # fmt: skip
LANGUAGE = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**TEXT)),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**TEXT, num_local_experts=4, experts_implementation="eager")
    ),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=True)),
}


@pytest.fixture
def parts(tmp_path):
    """Factory: folders of a tiny CLIP and a tiny language model, and a stage-1 mm_projector.bin."""

    def make(kind="mistral", smoe=False):
        clip = CLIPVisionModel(CLIPVisionConfig(**original.CLIP_CONFIG))
        text = LANGUAGE[kind]()
        clip.save_pretrained(tmp_path / "clip")
        text.save_pretrained(tmp_path / "text")
        tensors = original.tensors(mlp_smoe=smoe)
        connector = {name: value for name, value in tensors.items() if "mm_projector" in name}
        torch.save(connector, tmp_path / "mm_projector.bin")
        return clip.eval(), text.eval(), connector

    return make


def step_0(out):
    """Values printed by the command: the largest difference of a logit at step 0, and the largest logit."""
    said = out.split("step-0 difference: ")[1].split()
    return float(said[0]), float(said[-1].rstrip(")"))


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("kind", LANGUAGE)
def test_the_parts_compute_what_they_did(parts, tmp_path, kind):
    clip, text, connector = parts(kind)
    model = from_parts(tmp_path / "clip", tmp_path / "text", tmp_path / "mm_projector.bin", scales=(1,) * 2)
    batch = probe(model)
    states = clip(batch["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    x = torch.cat([states, states], -1)  # two scales of 1, because mm_projector.bin has the size for two
    x = torch.nn.functional.linear(x, *(connector[f"model.mm_projector.0.{p}"] for p in ("weight", "bias")))
    x = torch.nn.functional.gelu(x)
    x = torch.nn.functional.linear(x, *(connector[f"model.mm_projector.2.{p}"] for p in ("weight", "bias")))
    embeds = torch.cat([x, text.get_input_embeddings()(batch["input_ids"][:, 9:])], 1)
    assert_same_formula(model(**batch).logits, text(inputs_embeds=embeds).logits)
    assert model.config.image_token_index == 50
    model.save_pretrained(tmp_path / "saved")
    again = CumoForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    assert_same_formula(again(**batch).logits, model(**batch).logits)


def test_a_connector_with_experts_is_taken_as_it_is(parts, tmp_path):
    parts(smoe=True)
    model = from_parts(
        tmp_path / "clip", tmp_path / "text", tmp_path / "mm_projector.bin", projector_num_experts_per_tok=1
    )
    with record_routing() as records:
        model(**probe(model))
    (record,) = records
    assert (record.place, record.routing.num_experts, record.routing.top_k) == ("mlp", 4, 1)


@pytest.mark.parametrize("smoe", [False, True], ids=["stage-2", "stage-3"])
def test_the_tower_of_a_clip_bin_dense_or_with_experts(parts, tmp_path, smoe):
    """The original code cannot start from a clip.bin with experts."""
    parts(smoe=smoe)
    tensors = original.tensors(clip_smoe=smoe)
    start = "model.vision_tower."
    tower = {n.removeprefix(start): v for n, v in tensors.items() if n.startswith(start)}
    more = {"logit_scale": torch.zeros(()), "vision_model.post_layernorm.weight": torch.ones(32)}
    torch.save(tower | ({} if smoe else more), tmp_path / "clip.bin")
    sources = (tmp_path / "clip", tmp_path / "text", tmp_path / "mm_projector.bin")
    model = from_parts(*sources, clip=tmp_path / "clip.bin")
    assert (model.config.vision_config.num_experts, model.config.projector_num_experts) == (
        (4, 4) if smoe else (1, 1)
    )
    convert_to = tmp_path / "saved"
    model.save_pretrained(convert_to)
    convert(convert_to, tmp_path / "back", progress=False)
    found = Shards(tmp_path / "back")
    for name, value in tensors.items():
        if name.startswith(start):
            assert torch.equal(found[name], value), name
    del tower["vision_model.pre_layrnorm.bias"]
    torch.save(tower, tmp_path / "clip.bin")
    with pytest.raises(ValueError, match=r"clip.bin does not match .* 1 missing \(pre_layrnorm.bias"):
        from_parts(*sources, clip=tmp_path / "clip.bin")
    torch.save({"model.norm.weight": torch.ones(2)}, tmp_path / "clip.bin")
    with pytest.raises(ValueError, match=r"clip.bin must hold vision_model tensors, got \['model.norm"):
        from_parts(*sources, clip=tmp_path / "clip.bin")


def test_parts_may_have_a_newline_of_their_own(parts, tmp_path):
    parts()
    tiles = {"patch_merge_type": "spatial_unpad", "image_grid_pinpoints": [[12, 24]]}
    model = from_parts(tmp_path / "clip", tmp_path / "text", **tiles)
    newline = model.model.image_newline
    assert newline.shape == (24,) and newline.device.type == "cpu"
    assert_spread(newline, 24**-0.5)  # as LLaVA draws it: normal, divided by the root of the width


def test_parts_keep_the_generation_config_of_the_language_model(parts, tmp_path):
    parts()
    for options in ({"max_new_tokens": 7, "top_k": 3, "do_sample": True}, {"max_new_tokens": 9}):
        GenerationConfig(**options).save_pretrained(tmp_path / "text")
        config = from_parts(tmp_path / "clip", tmp_path / "text").generation_config
        assert {name: getattr(config, name) for name in options} == options


def test_all_tensors_of_the_parts_are_of_one_dtype(parts, tmp_path):
    """By default that of the language model, whatever the dtype of the tower and the connector."""
    clip, text, _ = parts()
    text.bfloat16().save_pretrained(tmp_path / "text")
    paths = [tmp_path / name for name in ("clip", "text", "mm_projector.bin")]
    for asked, wanted in ((None, torch.bfloat16), (torch.float16, torch.float16)):
        model = from_parts(*paths, dtype=asked, scales=(1, 1))
        assert {value.dtype for value in model.state_dict().values()} == {wanted}
        assert model.config.dtype == wanted
        tower = model.model.vision_tower.encoder.layers[1].mlp.fc1.weight
        own = next(p for n, p in clip.named_parameters() if n.endswith("layers.1.mlp.fc1.weight"))
        assert torch.equal(tower, own.to(wanted))


@pytest.mark.usefixtures("fp64")
def test_upcycle_command_makes_experts_everywhere_and_says_step_0(parts, tmp_path, capsys):
    parts()
    train_tokenizer(["what is it?", "a red apple"] * 20, 320).save_pretrained(tmp_path / "text")
    paths = ["--vision", "clip", "--text", "text", "--projector", "mm_projector.bin", "--out", "moe"]
    paths = [word if word.startswith("--") else str(tmp_path / word) for word in paths]
    numbers = ["--vision-experts", "3", "--text-experts", "8", "--text-top-k", "3", "--projector-top-k", "1"]
    assert main(["upcycle", *paths, *numbers]) == 0
    difference, largest = step_0(capsys.readouterr().out)
    assert_same_formula(largest + difference, largest)
    model = CumoForConditionalGeneration.from_pretrained(tmp_path / "moe")
    vision, text = model.config.vision_config, model.config.text_config
    assert (vision.num_experts, vision.num_experts_per_tok) == (3, 2)
    assert (model.config.projector_num_experts, model.config.projector_num_experts_per_tok) == (4, 1)
    assert (text.model_type, text.num_local_experts, text.num_experts_per_tok) == ("mixtral", 8, 3)
    first = torch.load(tmp_path / "mm_projector.bin")["model.mm_projector.0.weight"]
    connector = model.model.multi_modal_projector.mlp.experts.up_proj
    assert all(torch.equal(expert, first.to(connector)) for expert in connector)
    assert main(["upcycle", *paths[:-1], str(tmp_path / "half"), "--dtype", "float16"]) == 0
    half = Shards(tmp_path / "half")
    assert set(half.dtypes.values()) == {torch.float16} and not any(".experts.4." in n for n in half.shapes)
    assert half.shapes["model.vision_tower.encoder.layers.0.mlp.gate.weight"][0] == 4  # by default
    capsys.readouterr()
    processor = AutoProcessor.from_pretrained(tmp_path / "moe")
    assert processor.image_token_id == model.config.image_token_index
    # from a checkpoint with experts: places given as 0 do not change, and the model can be trained
    again = ["upcycle", "--checkpoint", str(tmp_path / "moe"), "--out", str(tmp_path / "more")]
    assert main(again) == 1
    assert "there is nothing to upcycle: tower and connector have experts" in capsys.readouterr().err
    assert main([*again, "--vision-experts", "4"]) == 1
    assert "vision_experts must be 0 for a place that has experts already" in capsys.readouterr().err
    assert main(["upcycle", "--out", str(tmp_path / "x")]) == 1
    assert "either a checkpoint, or vision and text" in capsys.readouterr().err
    assert main([*again, "--vision", str(tmp_path / "clip")]) == 1
    assert "got a checkpoint and vision" in capsys.readouterr().err


@pytest.mark.parametrize("experts", [4, 8])
def test_the_released_layout_gets_experts_in_its_dense_language_model(tmp_path, capsys, experts):
    """CLIP-MoE and MLP-MoE stay bit-identical, and Mistral gets 4 or 8 experts: an ablation without code."""
    original.write(tmp_path / "theirs", std=0.1, dtype=torch.bfloat16)
    paths = ["--checkpoint", str(tmp_path / "theirs"), "--out", str(tmp_path / "moe")]
    assert main(["upcycle", *paths, "--text-experts", str(experts)]) == 0
    assert "step-0 difference" in capsys.readouterr().out
    before = CumoForConditionalGeneration.from_pretrained(tmp_path / "theirs")
    after = CumoForConditionalGeneration.from_pretrained(tmp_path / "moe")
    assert after.dtype == torch.bfloat16 and after.config.text_config.num_local_experts == experts
    values = after.state_dict()
    for name, value in before.state_dict().items():
        if "language_model" not in name or ".mlp." not in name:
            assert torch.equal(values[name], value), name
    down = before.model.language_model.layers[1].mlp.down_proj.weight
    assert all(torch.equal(e, down) for e in values["model.language_model.layers.1.mlp.experts.down_proj"])
    batch = probe(after)
    batch["labels"] = batch["input_ids"]
    assert {"llm_balance", "clip_z", "mlp_z"} <= set(after.train()(**batch).loss_parts)


@pytest.mark.usefixtures("fp64")
def test_noise_and_drop_tell_experts_apart_and_the_difference_shows_it(parts, tmp_path, capsys):
    parts()
    paths = ["--vision", str(tmp_path / "clip"), "--text", str(tmp_path / "text")]
    for name, extra in (("noise", ["--noise", "0.1"]), ("drop", ["--drop", "0.5"])):
        assert main(["upcycle", *paths, "--out", str(tmp_path / name), *extra]) == 0
        difference, largest = step_0(capsys.readouterr().out)
        with pytest.raises(AssertionError, match=r"is off by \d"):  # larger than rounding
            assert_same_formula(largest + difference, largest)
    dense = from_parts(*(tmp_path / part for part in ("clip", "text"))).state_dict()
    at = "model.vision_tower.encoder.layers.1.mlp."
    source = dense[f"{at}fc1.weight"]
    noisy, dropped = (
        CumoForConditionalGeneration.from_pretrained(tmp_path / name).state_dict()[f"{at}experts.up_proj"]
        for name in ("noise", "drop")
    )
    assert_spread(noisy - source, 0.1 * source.std())
    assert not torch.equal(noisy[0], noisy[1])
    down = CumoForConditionalGeneration.from_pretrained(tmp_path / "noise").state_dict()
    down, source_down = down[f"{at}experts.down_proj"], dense[f"{at}fc2.weight"]
    assert_spread(down - source_down, 0.1 * source_down.std())
    kept = (dropped == source).all(-1)  # whole units are kept or resampled, half of them in each expert
    assert kept.sum(-1).tolist() == [24] * 4 and not torch.equal(kept[0], kept[1])
    assert_spread(dropped[~kept], source.std())


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_training_continues_from_a_sparse_checkpoint_of_the_original(tmp_path, kind):
    original.write(tmp_path / "theirs", kind=kind, std=0.1)
    model = CumoForConditionalGeneration.from_pretrained(tmp_path / "theirs").train()
    batch = probe(model)
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == 50, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        output = model(**batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0] and {"clip_balance", "mlp_z"} <= set(output.loss_parts)


def test_parts_that_do_not_fit_are_named(parts, tmp_path):
    parts()
    with pytest.raises(ValueError, match=r"vision must be a folder with a config.json, got .*nowhere"):
        from_parts(tmp_path / "nowhere", tmp_path / "text")
    with pytest.raises(ValueError, match=r"mm_projector.bin does not match .* 1 of another shape \(0.weight"):
        from_parts(tmp_path / "clip", tmp_path / "text", tmp_path / "mm_projector.bin", scales=(1,))
    torch.save({"lm_head.weight": torch.zeros(2)}, tmp_path / "other.bin")
    with pytest.raises(ValueError, match=r"other.bin must hold mm_projector tensors"):
        from_parts(tmp_path / "clip", tmp_path / "text", tmp_path / "other.bin")
    (tmp_path / "cut.bin").write_bytes((tmp_path / "mm_projector.bin").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cut.bin is refused"):
        from_parts(tmp_path / "clip", tmp_path / "text", tmp_path / "cut.bin")


def drop(folder, *words):
    """Remove the tensors with one of these words in their names from the file of a folder."""
    path = folder / "model.safetensors"
    kept = {k: v for k, v in load_file(path).items() if not any(word in k for word in words)}
    save_file(kept, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "folder, name, count",
    [("clip", "layers.0.mlp.fc1", 2), ("text", "layers.1.mlp.down_proj", 1)],
    ids=["clip", "mistral"],
)
def test_parts_that_lack_tensors_are_refused(parts, tmp_path, folder, name, count):
    parts()
    drop(tmp_path / folder, "post_layernorm.")
    from_parts(tmp_path / "clip", tmp_path / "text")  # the tower does not use this norm
    drop(tmp_path / folder, name)
    with pytest.raises(ValueError, match=rf"{folder} does not match .* {count} missing \(.*{name}"):
        from_parts(tmp_path / "clip", tmp_path / "text")


def test_parts_of_another_shape_or_kind_are_refused(parts, tmp_path):
    parts()
    with pytest.raises(ValueError, match=r"vision must be a folder of model_type clip or .*, got 'mistral'"):
        from_parts(tmp_path / "text", tmp_path / "text")
    path = tmp_path / "text/model.safetensors"
    save_file(load_file(path) | {"model.norm.weight": torch.ones(23)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"text does not match .* 1 of another shape \(model.norm.weight"):
        from_parts(tmp_path / "clip", tmp_path / "text")


def test_upcycle_refuses_a_checkpoint_that_is_foreign_or_lacks_tensors(parts, tmp_path, capsys):
    parts()
    from_parts(tmp_path / "clip", tmp_path / "text").save_pretrained(tmp_path / "dense")
    drop(tmp_path / "dense", "layers.0.mlp.fc1")
    for folder, words in (
        ("dense", "dense does not match its config.json"),
        ("clip", "must be of model_type cumo, llava_mistral or llava_mixtral, got 'clip_vision"),
        ("nowhere", "is not a folder"),
    ):
        assert main(["upcycle", "--checkpoint", str(tmp_path / folder), "--out", str(tmp_path / "x")]) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
