"""Conversion to the other layout and back: config, processor, files, ids, pixels and answers survive."""

import json
import random

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from cumo_model import CumoConfig, CumoForConditionalGeneration, build_processor, convert
from cumo_model.checkpoints.assemble import assemble, describe
from cumo_model.checkpoints.convert import KEPT, copy_files
from cumo_model.checkpoints.original_config import EXPORTED, differing, from_original, to_original
from cumo_model.checkpoints.processors import same_processor
from cumo_model.checkpoints.shards import Shards
from cumo_model.demo.tokenizer import train_tokenizer
from tests.model import original

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}"
)
TEMPLATE += "<image>{% else %}Q {{ part['text'] }} A{% endif %}{% endfor %}{% endfor %}"
ROPES = [
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 64},
]


def words():
    return train_tokenizer(["what is it?", "a red apple"] * 20, 300)


@pytest.fixture(scope="module")
def tokenizer():
    return words()


def picture():
    pixels = bytes(random.Random(2).randrange(256) for _ in range(20 * 14 * 3))
    return Image.frombytes("RGB", (20, 14), pixels)


def prompt(processor):
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": "what is it?"}]
    talk = [{"role": "user", "content": content}]
    return processor.apply_chat_template(talk, tokenize=True, return_dict=True, return_tensors="pt")


def answer(model, batch):
    return model.eval().generate(**batch, max_new_tokens=6, do_sample=False)


def contents(folder):
    """Files by their path; JSON files as values, and weights by name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".json" and not name.endswith("index.json"):
            found[name] = json.loads(path.read_text())
        elif path.is_file() and not name.startswith("model"):
            found[name] = path.read_bytes()
    shards = Shards(folder)
    weights = {name: (str(shards.dtypes[name]), shards[name].float().tolist()) for name in shards.shapes}
    return found, weights


def assert_same(one, other):
    (files, weights), (others, other_weights) = contents(one), contents(other)
    assert files.keys() == others.keys()
    for name in files:
        assert files[name] == others[name], name
    assert weights == other_weights


def assert_same_answers(folder, other):
    """By the Auto classes and by `assemble`."""
    results = []
    for place in (folder, other):
        for model, processor in (
            (AutoModelForImageTextToText.from_pretrained(place), AutoProcessor.from_pretrained(place)),
            assemble(place),
        ):
            batch = prompt(processor)
            results.append({**batch, "answer": answer(model, batch), "logits": model(**batch).logits})
    for result in results[1:]:
        assert result.keys() == results[0].keys()
        for name, value in result.items():
            assert torch.equal(value, results[0][name]), name


def tower(draw):
    return {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 12, "patch_size": 4, "hidden_act": draw(st.sampled_from(["quick_gelu", "gelu"])),
        "layer_norm_eps": draw(st.sampled_from([1e-5, 1e-3])),
        "projection_dim": draw(st.sampled_from([512, 8])),
        "num_experts": draw(st.sampled_from([1, 3])), "num_experts_per_tok": 2,
    }  # fmt: skip


@st.composite
def checkpoints(draw):
    """Config, settings of the processor, and whether only the tokenizer is saved."""
    kind = draw(st.sampled_from(["mistral", "mixtral"]))
    tiles = draw(st.sampled_from([None, [[12, 24], [24, 12]]]))
    text = {
        "model_type": kind, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": draw(st.sampled_from([300, 320])),
        "max_position_embeddings": 256, "rope_parameters": dict(draw(st.sampled_from(ROPES))),
        "sliding_window": draw(st.sampled_from([None, 32])), "head_dim": draw(st.sampled_from([8, 4])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "attention_dropout": draw(st.sampled_from([0.0, 0.5])),
        "tie_word_embeddings": draw(st.booleans()),
        **({"num_local_experts": 3, "router_aux_loss_coef": 0.5} if kind == "mixtral" else {}),
    }  # fmt: skip
    config = CumoConfig(
        vision_config=tower(draw),
        text_config=text,
        projector_num_experts=draw(st.sampled_from([1, 3])),
        scales=draw(st.sampled_from([(1,), (1, 2)])),
        vision_feature_layer=draw(st.sampled_from([-2, 1, [-2]])),
        patch_merge_type=draw(st.sampled_from(["flat", "spatial_unpad"])) if tiles else "flat",
        image_grid_pinpoints=tiles,
        balance_loss_coef=draw(st.sampled_from([0.1, 0.0])),
        average_loss_over=draw(st.sampled_from(["tokens", "micro_batches"])),
        output_router_logits=draw(st.booleans()),
        compat=draw(st.sampled_from([None, "cumo"])),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
    )
    look = {
        "image_mean": draw(st.sampled_from([[0.5, 0.4, 0.3], None])),
        "resample": draw(st.sampled_from([2, 3])),
        "do_normalize": draw(st.booleans()),
        "image_aspect_ratio": "anyres" if tiles else draw(st.sampled_from(["pad", "square"])),
    }
    chat = draw(st.sampled_from(["vicuna_v1", TEMPLATE, {"default": TEMPLATE, "other": "{{ messages }}"}]))
    return config, look, chat, draw(st.booleans())


def write_ours(folder, config, look, chat, tokenizer_only):
    torch.manual_seed(0)
    model = CumoForConditionalGeneration(config).to(config.dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.data = parameter.data.float()  # gates may stay in fp32
    model.generation_config = GenerationConfig(max_new_tokens=5, repetition_penalty=1.5, eos_token_id=2)
    model.save_pretrained(folder, max_shard_size="20KB")
    tokenizer = words()
    more = {"extra_special_tokens": ["<box>"]}
    tokenizer.add_special_tokens(more, replace_extra_special_tokens=False)
    processor = build_processor(
        tokenizer,
        12,
        4,
        template=chat if chat == "vicuna_v1" else "plain",
        image_aspect_ratio=look["image_aspect_ratio"],
        patch_merge_type=config.patch_merge_type,
        **({"image_grid_pinpoints": config.image_grid_pinpoints} if config.image_grid_pinpoints else {}),
    )
    if chat != "vicuna_v1":
        processor.chat_template = chat
    for name, value in look.items():
        if value is not None:
            setattr(processor.image_processor, name, value)
    if tokenizer_only:
        tokenizer.chat_template = processor.chat_template
        tokenizer.save_pretrained(folder)
    else:
        tokenizer.padding_side = "left"
        processor.save_pretrained(folder)
    describe(folder)[0].save_pretrained(folder)  # with the image token of the tokenizer
    (folder / "notes").mkdir()
    (folder / "notes/read.me").write_text("by hand")


@pytest.mark.timeout(400)  # twelve models, each written three times
@settings(
    max_examples=12,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # a failing example would take minutes to shrink
    suppress_health_check=[HealthCheck.too_slow],
)
@given(checkpoints())
def test_ours_to_original_and_back(tmp_path_factory, checkpoint):
    folder = tmp_path_factory.mktemp("trip")
    write_ours(folder / "ours", *checkpoint)
    convert(folder / "ours", folder / "theirs", progress=False, shard_bytes=30_000)
    convert(folder / "theirs", folder / "back", progress=False, shard_bytes=30_000)
    assert_same(folder / "ours", folder / "back")
    assert not differing(describe(folder / "ours")[0], describe(folder / "theirs")[0])
    assert same_processor(describe(folder / "ours")[1], describe(folder / "theirs")[1])
    assert_same_answers(folder / "ours", folder / "theirs")


CHANGES = [
    {},
    {"image_aspect_ratio": "square", "unknown": {"a": [1, None]}, "use_cache": False},
    {"rope_scaling": {"type": "linear", "factor": 2.0}, "sliding_window": 16, "transformers_version": "4.37"},
    {"num_experts": 4, "clip_smoe": False, "mm_projector_lr": 1e-5, "scales": "1,3", "dropout": True},
]


@pytest.mark.parametrize("change", CHANGES, ids=["released", "square", "rope", "stage-2"])
def test_original_to_ours_and_back_gives_the_same_files(tmp_path, tokenizer, change):
    values = original.tensors(clip_smoe=change.get("clip_smoe", True))
    original.write(tmp_path / "theirs", values)
    path = tmp_path / "theirs/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"training": False} | change))
    tokenizer.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs/special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    (tmp_path / "theirs/logs").mkdir()
    (tmp_path / "theirs/logs/state.json").write_text("{}")
    convert(tmp_path / "theirs", tmp_path / "ours", progress=False)
    convert(tmp_path / "ours", tmp_path / "back", progress=False)
    assert_same(tmp_path / "theirs", tmp_path / "back")
    assert (tmp_path / "ours" / KEPT / "tokenizer_config.json").is_file()
    assert same_processor(describe(tmp_path / "theirs")[1], describe(tmp_path / "ours")[1])


def test_a_processor_that_was_changed_is_not_replaced_by_that_of_the_source(tmp_path, tokenizer):
    original.write(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", progress=False)
    processor = describe(tmp_path / "ours")[1]
    processor.chat_template, processor.image_processor.image_mean = TEMPLATE, [0.1, 0.2, 0.3]
    processor.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", progress=False)
    assert same_processor(describe(tmp_path / "back")[1], processor)
    assert not (tmp_path / "back" / KEPT).exists()


def test_values_changed_after_the_export_win(tiny_config):
    config = tiny_config(compat="cumo", average_loss_over="micro_batches", vision={"hidden_act": "gelu"})
    values = json.loads(json.dumps(to_original(config)))
    values |= {"mm_vision_tower": "openai/clip-vit-large-patch14"}  # another tower
    values |= {
        "balance_loss_coef": 0.7,
        "rope_theta": 77.0,
        "vocab_size": 64,
        "transformers_version": "4.37.2",
    }
    again = CumoConfig(**from_original(values))
    assert (again.compat, again.average_loss_over) == ("cumo", "micro_batches")
    assert (again.balance_loss_coef, again.text_config.vocab_size) == (0.7, 64)
    assert again.text_config.rope_parameters["rope_theta"] == 77.0
    assert (again.vision_config.hidden_act, again.vision_config.hidden_size) == ("quick_gelu", 1024)
    assert again.text_config.hidden_size == 24
    for wrong in ({}, [], {"config": 1}):
        with pytest.raises(ValueError, match=r"cumo of config\.json must be an object with a config, got"):
            from_original(values | {EXPORTED: wrong})


def test_a_copy_that_says_something_else_is_refused(tmp_path, tokenizer, monkeypatch):
    """What the other layout loses, of the model or of its processor, is an error and not a copy."""
    original.write(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", progress=False)

    def forgetful(config, pictures, folder):
        return to_original(config, pictures, folder) | {"balance_loss_coef": 0.875}

    with monkeypatch.context() as patch:
        patch.setattr("cumo_model.checkpoints.convert.to_original", forgetful)
        with pytest.raises(ValueError, match=r"the layout of the copy cannot describe .*balance_loss_coef"):
            convert(tmp_path / "ours", tmp_path / "back", progress=False)

    def careless(source, files, work, processor):
        copy_files(source, files, work)
        processor.image_processor.image_mean = [0.1, 0.2, 0.3]
        processor.save_pretrained(work)
        processor.image_processor.image_mean = [0.4, 0.5, 0.6]

    with monkeypatch.context() as patch:
        patch.setattr("cumo_model.checkpoints.convert._copy_to_original", careless)
        with pytest.raises(ValueError, match="the layout of the copy cannot describe the processor"):
            convert(tmp_path / "ours", tmp_path / "back", progress=False)
    assert not (tmp_path / "back").exists()


def test_scales_that_the_original_code_ignores_are_refused(tiny_config):
    with pytest.raises(ValueError, match=r"scales must begin with 1 for the original layout.*got \[3, 1\]"):
        to_original(tiny_config(scales=(3, 1)))


def test_further_weights_are_named(tmp_path):
    original.write(tmp_path / "theirs")
    (tmp_path / "theirs/training_args.bin").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"not copied from .*theirs: training_args.bin"):
        convert(tmp_path / "theirs", tmp_path / "ours", progress=False)
