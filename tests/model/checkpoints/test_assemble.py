"""assemble: every starting point leads to a model and a processor that agree with each other."""

import re
import tempfile

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    MistralConfig,
    MistralForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
)

from cumo_model import CumoForConditionalGeneration, CumoVisionModel, MoELayer, convert
from cumo_model.checkpoints.assemble import assemble, describe
from cumo_model.checkpoints.upcycle_checkpoint import probe, upcycle_checkpoint
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.serving.local import load
from cumo_model.training.recipe import DataSection, ModelSection
from cumo_model.training.start import start_model
from tests.model import original
from tests.rounding import assert_same_formula

TEXT = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 320, "max_position_embeddings": 128}  # fmt: skip
EXPERTS = {"vision_experts": 4, "projector_experts": 4, "text_experts": 4}
STARTS = (
    "ours",
    "ours without processor",
    "released",
    "parts",
    "parts, our tower",
    "parts, mm_projector.bin",
)


@pytest.fixture
def tokenizer():
    return train_tokenizer(["what is it?", "a red apple"] * 20, 320)


@pytest.fixture
def start(tmp_path, tiny_model, tokenizer):
    """Factory: name of STARTS -> keywords of `assemble`; all are dense."""

    def parts(vision):
        vision.save_pretrained(tmp_path / "vision")
        MistralForCausalLM(MistralConfig(**TEXT)).save_pretrained(tmp_path / "text")
        tokenizer.save_pretrained(tmp_path / "text")
        return {"vision": tmp_path / "vision", "text": tmp_path / "text"}

    def make(name):
        clip = CLIPVisionModel(CLIPVisionConfig(**original.CLIP_CONFIG))
        if name == "released":
            original.write(tmp_path / "start", clip_smoe=False, mlp_smoe=False)
            tokenizer.save_pretrained(tmp_path / "start")
        elif name.startswith("ours"):
            model = tiny_model(vision_experts=1, projector_num_experts=1, text_options={"vocab_size": 320})
            model.save_pretrained(tmp_path / "start")
            tokenizer.save_pretrained(tmp_path / "start")
            if name == "ours":
                assemble(tmp_path / "start")[1].save_pretrained(tmp_path / "start")
        elif name == "parts, our tower":
            config = tiny_model(vision_experts=1).config.vision_config
            return parts(CumoVisionModel(config))
        elif name == "parts, mm_projector.bin":
            connector = {k: v for k, v in original.tensors(mlp_smoe=False).items() if "mm_projector" in k}
            torch.save(connector, tmp_path / "mm_projector.bin")
            return parts(clip) | {"projector": tmp_path / "mm_projector.bin", "scales": (1, 3)}
        else:
            return parts(clip)
        return {"checkpoint": tmp_path / "start"}

    return make


def layers(model):
    return [module for module in model.modules() if isinstance(module, MoELayer)]


@pytest.mark.parametrize("experts", [None, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("name", STARTS)
def test_every_start_gives_a_model_and_a_processor_that_agree(start, tokenizer, name, experts):
    model, processor = assemble(**start(name), experts=experts, template="mistral_instruct")
    assert type(model) is CumoForConditionalGeneration and not model.training
    wanted = tokenizer.convert_tokens_to_ids("<image>")
    assert processor.image_token_id == model.config.image_token_index == wanted
    assert len(layers(model)) == (0 if experts is None else 3 + 1 + 2)
    picture = processor(images=[torch.zeros(3, 12, 12)], text="<image>", return_tensors="pt")
    assert (picture["input_ids"] == wanted).sum() == model.config.image_seq_length
    assert model(**picture).logits.isfinite().all()


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("name", STARTS)
def test_experts_copy_the_dense_model(start, name):
    where = start(name)
    dense, _ = assemble(**where, seed=3, dtype=torch.float64)
    moe, _ = assemble(**where, seed=3, dtype=torch.float64, experts=EXPERTS)
    batch = probe(dense)
    assert_same_formula(moe(**batch).logits, dense(**batch).logits)
    scratch, _ = assemble(**where, seed=3, dtype=torch.float64, experts=EXPERTS, scratch=True)
    with pytest.raises(AssertionError, match=r"is off by \d"):  # more than rounding
        assert_same_formula(scratch(**batch).logits, dense(**batch).logits)


@pytest.mark.parametrize("name", ["ours", "released", "parts"])
def test_training_upcycling_conversion_and_chat_take_the_same_image_token(start, tmp_path, tokenizer, name):
    where = {key: str(path) for key, path in start(name).items()}
    wanted = tokenizer.convert_tokens_to_ids("<image>")
    section = {"start": where.get("checkpoint"), "vision": where.get("vision"), "language": where.get("text")}
    model, processor = start_model(ModelSection(**section), DataSection())
    assert (model.config.image_token_index, processor.image_token_id) == (wanted, wanted)
    upcycle_checkpoint(tmp_path / "moe", **where)
    folders = [tmp_path / "moe"]
    if name == "released":
        folders.append(convert(tmp_path / "start", tmp_path / "converted", progress=False))
    for folder in folders:
        model, processor = load(folder)
        assert (model.config.image_token_index, processor.image_token_id) == (wanted, wanted)
        config, described = describe(folder)
        assert (config.image_token_index, described.image_token_id) == (wanted, wanted)


def test_a_place_keeps_as_many_experts_as_it_has(start, tmp_path):
    model, processor = assemble(**start("ours"), experts={**EXPERTS, "text_experts": 0})
    for part in (model, processor):
        part.save_pretrained(tmp_path / "moe")
    again, _ = assemble(tmp_path / "moe", experts=EXPERTS)
    assert len(layers(again)) == 6 and again.config.text_config.model_type == "mixtral"
    values = again.state_dict()
    kept = {key: value for key, value in model.state_dict().items() if "language_model" not in key}
    assert all(torch.equal(value, values[key]) for key, value in kept.items())
    with pytest.raises(ValueError, match=r"vision_experts must be 4, what .*moe has already, got 8"):
        assemble(tmp_path / "moe", experts={"vision_experts": 8})


def test_the_processor_is_the_checkpoints_own_unless_asked_otherwise(start, tmp_path):
    where = start("ours")
    assemble(**where, template="vicuna_v1", aspect="square")[1].save_pretrained(tmp_path / "start")
    kept = assemble(**where)[1]
    assert kept.image_processor.image_aspect_ratio == "square"
    other = assemble(**where, template="mistral_instruct")[1]
    assert other.chat_template != kept.chat_template
    assert other.image_processor.image_aspect_ratio == "square"
    other = assemble(**where, aspect="pad")[1]
    assert other.chat_template == kept.chat_template
    assert other.image_processor.image_aspect_ratio == "pad"
    with pytest.raises(ValueError, match="aspect must be pad or square, got 'wide'"):
        assemble(**where, aspect="wide")


def test_the_seed_decides_and_the_global_generator_stays(start):
    where = start("parts")
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one, two, other = (assemble(**where, experts=EXPERTS, seed=seed)[0].state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    differ = {key for key, value in one.items() if not torch.equal(value, other[key])}
    assert {key for key in one if key.endswith("gate.weight")} <= differ
    assert any("multi_modal_projector" in key for key in differ)
    assert not any("vision_tower" in key and "gate" not in key for key in differ)
    one, two, other = (
        assemble(**where, experts=EXPERTS, scratch=True, seed=seed)[0].state_dict() for seed in (5, 5, 6)
    )
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    new = {key for key in one if ".experts." in key}
    assert new and not any(torch.equal(one[key], other[key]) for key in new)


@pytest.mark.parametrize("name", ["ours", "released", "parts"])
def test_dtype_and_attention_are_those_asked_for(start, name):
    where = start(name)
    plain, _ = assemble(**where)
    asked, _ = assemble(**where, dtype=torch.float16, attn_implementation="eager")
    places = ("", "model.language_model", "model.vision_tower")
    for model, dtype, attention in ((plain, torch.float32, "sdpa"), (asked, torch.float16, "eager")):
        assert {value.dtype for value in model.parameters()} == {dtype} and model.config.dtype == dtype
        configs = [model.get_submodule(place).config for place in places]
        assert [config._attn_implementation for config in configs] == [attention] * 3


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_checkpoint(start, bits):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    where = start("ours")
    model, processor = assemble(**where, quantize=bits, dtype=torch.bfloat16)
    kind = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
    language = [m for m in model.model.language_model.modules() if isinstance(m, kind)]
    assert len(language) == 2 * 7 and not isinstance(model.lm_head, kind)
    quantised = [m for m in model.modules() if isinstance(m, kind)]
    assert len(quantised) == len(language)  # none in the tower and the connector
    if bits == 4:  # as QLoRA: NF4 with quantised scales (arXiv 2305.14314), computed in the model's dtype
        states = [m.weight.quant_state for m in quantised]
        assert all(state.quant_type == "nf4" and state.nested for state in states)
        assert {m.compute_dtype for m in quantised} == {torch.bfloat16}
    assert processor.image_token_id == model.config.image_token_index


def test_a_quantised_checkpoint_computes_in_the_dtype_of_its_files(start):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    where = start("ours")
    assemble(**where, dtype=torch.bfloat16)[0].save_pretrained(where["checkpoint"])
    for asked, wanted in ((None, torch.bfloat16), (torch.float16, torch.float16)):
        model, _ = assemble(**where, quantize=4, dtype=asked)
        found = {m.compute_dtype for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
        assert found == {wanted}


def test_pickled_weights_of_our_layout_are_not_read(start):
    where = start("ours")
    folder = where["checkpoint"]
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be loaded: .*safetensors"):
        assemble(**where)


@pytest.mark.parametrize("name", ["ours", "released", "parts"])
def test_every_start_can_be_quantised_with_new_experts(start, tmp_path, monkeypatch, name):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    where = start(name)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    model, processor = assemble(**where, quantize=4, experts=EXPERTS, seed=2)
    assert list((tmp_path / "temporary").iterdir()) == []
    assert len(layers(model)) == 3 + 1 + 2 and processor.image_token_id == model.config.image_token_index
    packed = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(packed) == 2 * 4 and all(m.compute_dtype == model.dtype for m in packed)  # attention
    whole, _ = assemble(**where, experts=EXPERTS, seed=2)
    gates = {key: value for key, value in whole.state_dict().items() if key.endswith("gate.weight")}
    assert gates and all(torch.equal(model.state_dict()[key], value) for key, value in gates.items())


def test_a_model_without_tokenizer_has_no_processor(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path / "start")
    model, processor = assemble(tmp_path / "start")
    assert processor is None and model.config.image_token_index == 60
    with pytest.raises(ValueError, match="cannot be loaded: it has no tokenizer"):
        load(tmp_path / "start")
    with pytest.raises(
        ValueError, match=r"model.start must be a folder with a tokenizer, got .*start', which has no tok"
    ):
        start_model(ModelSection(start=str(tmp_path / "start")), DataSection())


def test_anyres_is_kept_with_another_template(start, tmp_path):
    grids = {"image_grid_pinpoints": [[12, 24], [24, 12]], "patch_merge_type": "spatial_unpad"}
    for part in assemble(**start("parts"), **grids):
        part.save_pretrained(tmp_path / "tiles")
    processor = assemble(tmp_path / "tiles", template="vicuna_v1")[1]
    assert processor.image_processor.image_aspect_ratio == "anyres"
    assert processor.image_processor.image_grid_pinpoints == grids["image_grid_pinpoints"]


@pytest.mark.parametrize(
    "given, words",
    [
        ({"dtype": "bfloat16"}, "dtype must be None or a floating-point torch.dtype, got 'bfloat16'"),
        ({"dtype": torch.int8}, "dtype must be None or a floating-point torch.dtype, got torch.int8"),
        ({"experts": {"tower": 4}}, "experts must be keyword arguments of upcycle, got tower"),
        ({"experts": {"vision_experts": -4}}, "vision_experts must not be negative"),
        ({"template": "nothing"}, "template must be one of plain"),
        ({"quantize": 3}, "quantize must be 4 or 8, got 3"),
        ({"scale": (1,)}, "options must be fields of CumoConfig, got scale"),
        ({"text_config": {}}, "options must be fields of CumoConfig, got text_config"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(start, given, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        assemble(**start("parts"), **given)


def test_a_place_without_a_number_stays_dense(start):
    model, _ = assemble(**start("parts"), experts={"vision_experts": None, "top_k": 1})
    assert layers(model) == []


@pytest.mark.parametrize("kind", ["clip", "openai-gpt"])
def test_a_language_model_of_another_kind_is_refused(start, tmp_path, kind):
    where, words = start("parts"), "text must be a folder of a causal language model, got a clip_vision_model"
    if kind == "openai-gpt":
        config = OpenAIGPTConfig(vocab_size=320, n_embd=24, n_layer=2, n_head=2)
        OpenAIGPTLMHeadModel(config).save_pretrained(tmp_path / kind)
        words = "openai-gpt cannot be the language model: .* 'openai-gpt': its decoder does not take"
    with pytest.raises(ValueError, match=words):
        assemble(vision=where["vision"], text=tmp_path / kind if kind == "openai-gpt" else where["vision"])


def test_a_processor_that_is_damaged_is_named(start, tmp_path):
    where = start("ours")
    (tmp_path / "start" / "processor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"start/processor_config.json is damaged: "):
        assemble(**where)


@pytest.mark.parametrize(
    "given, words",
    [
        ({}, "give either a checkpoint, or vision and text; got neither"),
        ({"text": "x"}, "give either a checkpoint, or vision and text; got text"),
        ({"checkpoint": "x", "clip": "y"}, "got a checkpoint and clip"),
        ({"checkpoint": "x", "scales": (1,)}, "got a checkpoint and scales"),
        ({"checkpoint": "nowhere"}, "checkpoint must be a folder, got 'nowhere'"),
    ],
)
def test_a_start_that_is_none_or_two_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        assemble(**given)
