"""Language models of many architectures in a CuMo: loaded, upcycled, saved and read, with their head."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

from cumo_model import CumoForConditionalGeneration, assemble, from_parts
from tests.model import original
from tests.model.decoders import decoder_config
from tests.model.test_head import own_and_ours, padded_rows
from tests.rounding import assert_same_formula

SAMPLE = """bloom cohere falcon gemma2 glm gpt2 gpt_neox gpt_neox_japanese granite hyperclovax llama minicpm3
mistral mixtral mpt olmo2 opt phi phi3 qwen2 qwen3 smollm3 stablelm starcoder2""".split()


@pytest.fixture
def folder(tmp_path):
    """Factory: the folder of a tiny causal language model, and the model; a CLIP's folder is beside it."""

    def make(model_type, **options):
        CLIPVisionModel(CLIPVisionConfig(**original.CLIP_CONFIG)).save_pretrained(tmp_path / "clip")
        own, _ = own_and_ours(decoder_config(model_type, **options))
        own.save_pretrained(tmp_path / "text")
        return tmp_path / "text", own

    return make


def edit(folder, change):
    """Rewrite the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("model_type", SAMPLE)
def test_assembled_upcycled_and_reloaded_logits_are_its_own(folder, tmp_path, model_type):
    text, own = folder(model_type)
    ids, _ = padded_rows()
    wanted = own(ids).logits
    dense, _ = assemble(vision=tmp_path / "clip", text=text)
    moe, _ = assemble(
        vision=tmp_path / "clip", text=text, experts={"vision_experts": 3, "projector_experts": 2}
    )
    moe.save_pretrained(tmp_path / "saved")
    again = CumoForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    is_tied = own.get_output_embeddings().weight is own.get_input_embeddings().weight
    for model in (dense, moe, again):
        assert_same_formula(model(ids).logits, wanted)
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == is_tied
    assert again.config.vision_config.num_experts == 3


@pytest.mark.parametrize("model_type, name", [("llama", "lm_head.bias"), ("mistral", "model.layers.0.more")])
def test_a_tensor_that_has_no_place_is_named(folder, tmp_path, model_type, name):
    text, _ = folder(model_type)
    edit(text, lambda tensors: tensors.update({name: torch.ones(50)}))
    with pytest.raises(ValueError, match=rf"does not match its config.json: .* 1 not known \({name}\)"):
        from_parts(tmp_path / "clip", text)


def test_a_tensor_that_its_own_class_ignores_is_ignored(folder, tmp_path):
    text, own = folder("gpt2")
    edit(text, lambda tensors: tensors.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)}))
    AutoModelForCausalLM.from_pretrained(text)
    ids, _ = padded_rows()
    got = from_parts(tmp_path / "clip", text)(ids).logits
    assert torch.equal(got.argmax(-1), own(ids).logits.argmax(-1))


@pytest.mark.parametrize("model_type, name", [("phi", "lm_head.bias"), ("gpt_neox", "embed_out.weight")])
def test_a_head_that_is_missing_is_named(folder, tmp_path, model_type, name):
    text, _ = folder(model_type)

    def remove(tensors):
        del tensors[name]

    edit(text, remove)
    with pytest.raises(
        ValueError, match=r"does not match its config.json: .* 1 missing \((lm_head|embed_out)\."
    ):
        from_parts(tmp_path / "clip", text)


def test_a_head_of_its_own_is_not_replaced_by_the_embedding(folder, tmp_path):
    text, _ = folder("mistral")
    with pytest.raises(
        ValueError, match=r"tie_word_embeddings must be False for .*text, whose output embedding"
    ):
        from_parts(tmp_path / "clip", text, tie_word_embeddings=True)


def test_a_tensor_of_a_checkpoint_that_has_no_place_is_named(folder, tmp_path):
    text, _ = folder("mistral")
    from_parts(tmp_path / "clip", text).save_pretrained(tmp_path / "saved")
    assemble(tmp_path / "saved")
    edit(tmp_path / "saved", lambda tensors: tensors.update({"lm_head.bias": torch.ones(50)}))
    with pytest.raises(
        ValueError, match=r"saved does not match its config.json: .* 1 not known \(lm_head.bias\)"
    ):
        assemble(tmp_path / "saved")


def test_a_language_model_is_refused_while_its_checkpoint_is_loaded(folder, tmp_path):
    """In the dtype and on the device of `from_pretrained`."""
    text, _ = folder("mistral")
    from_parts(tmp_path / "clip", text, dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    config = CumoForConditionalGeneration.config_class.from_pretrained(tmp_path / "saved")
    config.text_config = decoder_config("falcon_h1")
    with pytest.raises(ValueError, match="'falcon_h1': its decoder computes something else with input_ids"):
        CumoForConditionalGeneration.from_pretrained(tmp_path / "saved", config=config, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "model_type, name",
    [
        ("gptj", "transformer.h.0.attn.masked_bias"),
        ("gpt_neo", "transformer.h.0.attn.attention.bias"),
        ("codegen", "transformer.h.0.attn.causal_mask"),
        ("xglm", "model.embed_positions.weights"),
        ("opt", "model.decoder.version"),
    ],
)
def test_buffers_of_older_releases_are_ignored(folder, tmp_path, model_type, name):
    """Masks and positions that models now compute."""
    text, own = folder(model_type)
    edit(text, lambda tensors: tensors.update({name: torch.ones(1, 1, 4, 4)}))
    ids = torch.tensor([[5, 6, 7]])
    model = from_parts(tmp_path / "clip", text).eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, own(ids).logits)


def test_a_mixtral_whose_tied_head_has_weights_of_its_own_is_refused(folder, tmp_path):
    text, _ = folder("mixtral", tie_word_embeddings=True)
    from_parts(tmp_path / "clip", text)
    edit(text, lambda tensors: tensors.update({"lm_head.weight": torch.ones(50, 32)}))
    with pytest.raises(ValueError, match=r"tie_word_embeddings must be False for .*text, whose output"):
        from_parts(tmp_path / "clip", text)


def test_new_experts_beside_quantised_weights_are_refused_before_loading(folder, tmp_path):
    text, _ = folder("mistral")
    config = json.loads((text / "config.json").read_text())
    (text / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(ValueError, match=r"experts must be None for .*text', whose quantization_config"):
        assemble(vision=tmp_path / "clip", text=text, experts={"vision_experts": 4})
