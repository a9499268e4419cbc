"""The processor of a checkpoint: image token of the model, settings that are kept, template by name."""

import re

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from cumo_model import CumoForConditionalGeneration, CumoModel, build_processor, convert
from cumo_model.__main__ import main
from cumo_model.checkpoints.assemble import assemble, describe
from cumo_model.checkpoints.processors import (
    PROCESSOR_FILES,
    read_processor,
    same_processor,
    template_for,
    with_settings,
)
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.processing.conversation import chat_template
from cumo_model.processing.processor import load_tokenizer
from cumo_model.training.recipe import DataSection, ModelSection
from cumo_model.training.start import start_model
from tests.model import original
from tests.model.training.small_runs import COLOURS, write_data, write_recipe

TEXT = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 128}  # fmt: skip
SENTENCES = [f"what colour? {colour}" for colour in COLOURS]
CUSTOM = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def with_image_word():
    """The tokenizer of the demo has <image> as id 3."""
    return train_tokenizer(SENTENCES, 300)


def without_image_word():
    """A tokenizer of whole words; <image> becomes its next id."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", *dict.fromkeys(re.findall(r"\w+|[^\w\s]", " ".join(SENTENCES)))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


# tokenizer, size of the vocabulary minus that of the tokenizer
VOCABULARIES = {
    "has <image>": (with_image_word, 0),
    "has <image>, padded": (with_image_word, 20),
    "no <image>": (without_image_word, 0),
    "no <image>, padded": (without_image_word, 20),
    "no <image>, tokenizer larger": (without_image_word, -1),
}


def write_parts(folder, name):
    make, more = VOCABULARIES[name]
    tokenizer = make()
    CLIPVisionModel(CLIPVisionConfig(**original.CLIP_CONFIG)).save_pretrained(folder / "vision")
    config = MistralConfig(**TEXT, vocab_size=len(tokenizer) + more)
    MistralForCausalLM(config).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    return load_tokenizer(folder / "text").convert_tokens_to_ids("<image>")


@pytest.mark.parametrize("name", VOCABULARIES)
def test_stage_1_takes_the_image_token_of_the_tokenizer(tmp_path, name, capsys):
    """By the command, from a CLIP and a language model; the result answers with every class that reads it."""
    wanted = write_parts(tmp_path, name)
    write_data(tmp_path, text_rows=0)
    model = {"vision": str(tmp_path / "vision"), "language": str(tmp_path / "text"), "scales": [1]}
    data = {"files": [str(tmp_path / "colours.jsonl")], "images": [str(tmp_path)], "template": "plain"}
    stage = {"batch_size": 2, "learning_rate": 1e-3, "trains": ["projector"]}
    recipe = write_recipe(tmp_path, model=model, data=data, stage=stage, trainer__max_steps=1)
    if name == "no <image>, tokenizer larger":
        with pytest.warns(UserWarning, match=r"has 1 tokens without an embedding in the vocabulary of \d+"):
            start_model(ModelSection(vision=model["vision"], language=model["language"]), DataSection())
        data["files"] = [str(tmp_path / "few.jsonl")]  # the word without an embedding is `orange`
        lines = (tmp_path / "colours.jsonl").read_text().splitlines()
        (tmp_path / "few.jsonl").write_text("\n".join(line for line in lines if "orange" not in line))
        recipe = write_recipe(tmp_path, model=model, data=data, stage=stage, trainer__max_steps=1)
    assert main(["train", "--config", str(recipe)]) == 0, capsys.readouterr().err
    result = tmp_path / "run/model"
    for kind in (AutoModelForImageTextToText, AutoModel, CumoForConditionalGeneration):
        assert kind.from_pretrained(result).config.image_token_index == wanted
    loaded, processor = assemble(result)
    assert loaded.config.image_token_index == processor.image_token_id == wanted
    batch = processor(images=torch.zeros(3, 12, 12), text="<image>", return_tensors="pt")
    assert loaded(**batch).logits.isfinite().all()


@pytest.mark.parametrize("layout", ["ours", "released"])
@pytest.mark.parametrize("tokenizer", [with_image_word, without_image_word])
def test_a_folder_with_only_a_tokenizer_is_read_in_one_way(tiny_model, tmp_path, layout, tokenizer):
    tiny_model(text_options={"vocab_size": 320}).save_pretrained(tmp_path / "start")
    tokenizer().save_pretrained(tmp_path / "start")
    if layout == "released":
        convert(tmp_path / "start", tmp_path / "theirs", progress=False)
    folder = tmp_path / ("start" if layout == "ours" else "theirs")
    wanted = load_tokenizer(folder).convert_tokens_to_ids("<image>")
    assert wanted != 60
    model, processor = assemble(folder)
    assert (model.config.image_token_index, processor.image_token_id) == (wanted, wanted)
    assert AutoModelForImageTextToText.from_pretrained(folder).config.image_token_index == wanted
    inner = CumoModel.from_pretrained(tmp_path, subfolder=folder.name)
    assert inner.config.image_token_index == wanted
    assert same_processor(AutoProcessor.from_pretrained(folder), processor)
    given = CumoForConditionalGeneration.from_pretrained(folder, config=tiny_config_of(folder, 7))
    assert given.config.image_token_index == 7  # what the user gives stays
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{")
    damaged = AutoModelForImageTextToText.from_pretrained(folder)  # the weights are still valid
    assert damaged.config.image_token_index == (60 if layout == "ours" else wanted)


def tiny_config_of(folder, token):
    config = describe(folder)[0]
    config.image_token_index = token
    return config


def test_a_processor_of_another_model_is_told_by_both_ids(tiny_model):
    processor = build_processor(with_image_word(), 12, 4)
    model = tiny_model(text_options={"vocab_size": 320}, image_token_index=319)
    batch = processor(images=torch.zeros(3, 12, 12), text="what<image>", return_tensors="pt")
    words = (
        r"must have 9 image tokens \(id 319\), .* got 0, but 9 tokens of id 3: if this is image_token_id of "
        "the processor, config.image_token_index of the model must be the same"
    )
    with pytest.raises(ValueError, match=words):
        model(**batch)


def test_load_tokenizer_keeps_special_tokens_and_lengths(tmp_path):
    tokenizer = without_image_word()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<box>", "<ref>"], "mask_token": "<mask>"})
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(tmp_path)
    found = load_tokenizer(tmp_path)
    assert found.extra_special_tokens == ["<box>", "<ref>", "<image>"]
    assert (found.mask_token, found.model_max_length) == ("<mask>", 77)
    ids = found("<box> red <mask>", add_special_tokens=False)["input_ids"]
    assert found.decode(ids, skip_special_tokens=True).strip() == "red"
    assert ids == tokenizer("<box> red <mask>", add_special_tokens=False)["input_ids"]


def test_other_settings_of_a_processor_are_kept(tiny_model, tmp_path):
    model = tiny_model(text_options={"vocab_size": 320})
    model.save_pretrained(tmp_path / "start")
    processor = build_processor(with_image_word(), 12, 4, template="vicuna_v1")
    changed = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "resample": 2}
    changed |= {"rescale_factor": 1 / 127.5, "do_center_crop": False, "size": {"height": 12, "width": 12}}
    for name, value in changed.items():
        setattr(processor.image_processor, name, value)
    processor.num_additional_image_tokens = 1
    processor.tokenizer.padding_side = "left"
    processor.save_pretrained(tmp_path / "start")
    before = describe(tmp_path / "start")[1]
    _, found = assemble(tmp_path / "start", aspect="square", template="plain")
    kept, wanted = found.image_processor.to_dict(), before.image_processor.to_dict()
    assert kept | {"image_aspect_ratio": "pad"} == wanted and kept["image_aspect_ratio"] == "square"
    assert kept["resample"] == 2 and list(kept["image_mean"]) == [0.1, 0.2, 0.3]
    assert found.chat_template == chat_template("plain") and found.tokenizer.padding_side == "left"
    assert found.to_dict() | {"image_processor": None} == before.to_dict() | {"image_processor": None}
    again = with_settings(found, "vicuna_v1", "pad")
    assert same_processor(again, before) and found.image_processor.image_aspect_ratio == "square"


def test_training_keeps_aspect_and_template_of_its_start(tiny_model, tmp_path):
    tiny_model(text_options={"vocab_size": 320}).save_pretrained(tmp_path / "start")
    own = build_processor(with_image_word(), 12, 4, template="vicuna_v1", image_aspect_ratio="square")
    own.save_pretrained(tmp_path / "start")
    start = ModelSection(start=str(tmp_path / "start"))
    _, processor = start_model(start, DataSection())
    assert processor.image_processor.image_aspect_ratio == "square"
    assert processor.chat_template == own.chat_template
    _, processor = start_model(start, DataSection(aspect="pad", template="plain"))
    assert processor.image_processor.image_aspect_ratio == "pad"
    assert processor.chat_template == chat_template("plain")
    write_parts(tmp_path, "has <image>")
    parts = ModelSection(vision=str(tmp_path / "vision"), language=str(tmp_path / "text"))
    _, processor = start_model(parts, DataSection())
    assert processor.image_processor.image_aspect_ratio == "pad"
    assert template_for(processor) == "mistral_instruct_system"


def test_training_from_anyres_says_what_to_set(tiny_model, tmp_path):
    grids = {"image_grid_pinpoints": [[12, 24], [24, 12]]}
    model = tiny_model(text_options={"vocab_size": 320}, **grids)
    model.save_pretrained(tmp_path / "start")
    build_processor(with_image_word(), 12, 4, image_aspect_ratio="anyres", **grids).save_pretrained(
        tmp_path / "start"
    )
    start = ModelSection(start=str(tmp_path / "start"))
    with pytest.raises(ValueError, match=r"data.aspect must be pad or square .* \(anyres\).* got None"):
        start_model(start, DataSection())
    assert not start_model(start, DataSection(aspect="pad"))[1].is_tiled()


def test_the_template_of_a_processor_by_its_name():
    processor = build_processor(with_image_word(), 12, 4, template="vicuna_v1")
    assert template_for(processor) == "vicuna_v1" and template_for(processor, "plain") == "plain"
    processor.chat_template = {"default": processor.chat_template, "other": CUSTOM}
    assert template_for(processor) == "vicuna_v1"
    with pytest.raises(ValueError, match="template must be one of plain"):
        template_for(processor, "nothing")
    for chat, words in (
        (CUSTOM, "is none of them"),
        ({"default": CUSTOM}, "is none of them"),
        (None, "is missing"),
    ):
        processor.chat_template = chat
        with pytest.raises(
            ValueError, match=rf"data.template must be given, .*'s chat template {words}, got None"
        ):
            template_for(processor, None, "data.template")


def test_training_and_analysis_ask_for_a_template_that_has_no_name(tiny_model, tmp_path, capsys):
    write_data(tmp_path)
    tiny_model(text_options={"vocab_size": 320, "max_position_embeddings": 256}).save_pretrained(
        tmp_path / "start"
    )
    processor = build_processor(with_image_word(), 12, 4)
    processor.chat_template = CUSTOM
    processor.save_pretrained(tmp_path / "start")
    data = {"files": [str(tmp_path / "colours.jsonl")], "images": [str(tmp_path)]}
    recipe = write_recipe(tmp_path, model={"start": str(tmp_path / "start")}, data=data)
    assert main(["train", "--config", str(recipe)]) == 1
    assert "data.template must be given, one of plain," in capsys.readouterr().err
    arguments = ["experts", "--checkpoint", str(tmp_path / "start"), "--data", data["files"][0]]
    arguments += ["--images", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "template must be given, one of plain," in capsys.readouterr().err
    assert main([*arguments, "--template", "vicuna_v1"]) == 0


@pytest.mark.parametrize("name", PROCESSOR_FILES)
@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_file_of_a_processor_is_named(tiny_model, tmp_path, name, content):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    build_processor(with_image_word(), 12, 4).save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} (is damaged|must hold an object)"):
        read_processor(tmp_path, model.config)
