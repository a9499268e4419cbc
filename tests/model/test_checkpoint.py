"""Files: what a saved model holds, and the key tables of the released ones (cumo_spec.md section 5)."""

from math import prod

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from cumo_model import CumoConfig, CumoForConditionalGeneration, original_layout

V = "model.vision_tower.vision_model."
COMMON = [  # key patterns of cumo_spec.md section 5: (pattern, ranges of its braces, shape)
    (V + "embeddings.class_embedding", (), (1024,)),
    (V + "embeddings.patch_embedding.weight", (), (1024, 3, 14, 14)),
    (V + "embeddings.position_embedding.weight", (), (577, 1024)),
    (V + "pre_layrnorm.weight", (), (1024,)),
    (V + "pre_layrnorm.bias", (), (1024,)),
    *(
        (V + f"encoder.layers.{{}}.self_attn.{p}_proj.weight", (24,), (1024, 1024))
        for p in ("q", "k", "v", "out")
    ),
    *((V + f"encoder.layers.{{}}.self_attn.{p}_proj.bias", (24,), (1024,)) for p in ("q", "k", "v", "out")),
    *(
        (V + f"encoder.layers.{{}}.layer_norm{i}.{p}", (24,), (1024,))
        for i in (1, 2)
        for p in ("weight", "bias")
    ),
    (V + "encoder.layers.{}.gate.weight", (24,), (4, 1024)),
    (V + "encoder.layers.{}.experts.{}.fc1.weight", (24, 4), (4096, 1024)),
    (V + "encoder.layers.{}.experts.{}.fc1.bias", (24, 4), (4096,)),
    (V + "encoder.layers.{}.experts.{}.fc2.weight", (24, 4), (1024, 4096)),
    (V + "encoder.layers.{}.experts.{}.fc2.bias", (24, 4), (1024,)),
    ("model.mm_projector.gate.weight", (), (4, 2048)),
    ("model.mm_projector.experts.{}.0.weight", (4,), (4096, 2048)),
    ("model.mm_projector.experts.{}.0.bias", (4,), (4096,)),
    ("model.mm_projector.experts.{}.2.weight", (4,), (4096, 4096)),
    ("model.mm_projector.experts.{}.2.bias", (4,), (4096,)),
    ("model.embed_tokens.weight", (), (32000, 4096)),
    ("lm_head.weight", (), (32000, 4096)),
    ("model.norm.weight", (), (4096,)),
    *((f"model.layers.{{}}.self_attn.{p}_proj.weight", (32,), (4096, 4096)) for p in "qo"),
    *((f"model.layers.{{}}.self_attn.{p}_proj.weight", (32,), (1024, 4096)) for p in "kv"),
    ("model.layers.{}.input_layernorm.weight", (32,), (4096,)),
    ("model.layers.{}.post_attention_layernorm.weight", (32,), (4096,)),
]
MISTRAL = [
    ("model.layers.{}.mlp.gate_proj.weight", (32,), (14336, 4096)),
    ("model.layers.{}.mlp.up_proj.weight", (32,), (14336, 4096)),
    ("model.layers.{}.mlp.down_proj.weight", (32,), (4096, 14336)),
]
MIXTRAL = [
    ("model.layers.{}.block_sparse_moe.gate.weight", (32,), (8, 4096)),
    ("model.layers.{}.block_sparse_moe.experts.{}.w1.weight", (32, 8), (14336, 4096)),
    ("model.layers.{}.block_sparse_moe.experts.{}.w3.weight", (32, 8), (14336, 4096)),
    ("model.layers.{}.block_sparse_moe.experts.{}.w2.weight", (32, 8), (4096, 14336)),
]


def expand(rows):
    table = {}
    for pattern, ranges, shape in rows:
        names = [pattern]
        for size in ranges:
            names = [name.replace("{}", str(i), 1) for name in names for i in range(size)]
        table.update(dict.fromkeys(names, shape))
    return table


def parameters(layout, prefix=""):
    return sum(prod(shape) for name, shape in layout.items() if name.startswith(prefix))


@pytest.mark.parametrize(
    "config, rows, tensors, total, layers",
    [
        pytest.param(CumoConfig(), MISTRAL, 1009, 8_250_388_480, 6_979_584_000, id="7b"),
        pytest.param(
            CumoConfig(text_config={"model_type": "mixtral"}),
            MIXTRAL,
            1713,
            47_711_449_088,
            46_440_644_608,
            id="8x7b",
        ),
    ],
)
def test_released_models_have_this_table(config, rows, tensors, total, layers):
    layout = original_layout(config)
    assert layout == expand(COMMON + rows)
    assert (len(layout), parameters(layout)) == (tensors, total)
    assert parameters(layout, "model.vision_tower.") == 907_952_128
    assert parameters(layout, "model.mm_projector.") == 100_704_256
    assert parameters(layout, "model.layers.") == layers


def test_dense_places_follow_stages_1_and_2():
    config = CumoConfig(vision_config={"num_experts": 1}, projector_num_experts=1)
    layout = original_layout(config)
    assert layout[V + "encoder.layers.23.mlp.fc1.weight"] == (4096, 1024)
    assert layout[V + "encoder.layers.23.mlp.fc2.bias"] == (1024,)
    projector = {name: shape for name, shape in layout.items() if "mm_projector" in name}
    assert projector == {
        "model.mm_projector.0.weight": (4096, 2048),
        "model.mm_projector.0.bias": (4096,),
        "model.mm_projector.2.weight": (4096, 4096),
        "model.mm_projector.2.bias": (4096,),
    }


@pytest.mark.parametrize("text", ["mistral", "mixtral", "llama"])
@pytest.mark.parametrize("experts", [1, 3])
def test_nothing_is_lost_or_doubled(tiny_model, text, experts):
    model = tiny_model(text=text, vision_experts=experts, projector_num_experts=experts)
    layout = original_layout(model.config)
    assert parameters(layout) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("text", ["mistral", "mixtral"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_saved_model_is_the_same_model(tiny_model, tiny_batch, tmp_path, text, tied):
    model = tiny_model(text=text, text_options={"tie_word_embeddings": tied}).eval()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert keys == set(model.state_dict()) - ({"lm_head.weight"} if tied else set())
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is CumoForConditionalGeneration and not any(info.values())
    batch = tiny_batch()
    assert torch.equal(again.eval()(**batch).logits, model(**batch).logits)


def test_per_expert_checkpoint_of_mixtral_loads(tiny_model, tmp_path):
    model = tiny_model(text="mixtral")
    model.save_pretrained(tmp_path, save_original_format=True)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert "model.language_model.layers.1.block_sparse_moe.experts.3.w2.weight" in keys
    assert "model.vision_tower.encoder.layers.2.mlp.experts.down_proj_bias" in keys
    again = CumoForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, again[name]), name


def test_bf16_loads_as_bf16_and_trains(tiny_model, tiny_batch, tmp_path):
    tiny_model(text="mixtral").save_pretrained(tmp_path)
    model = CumoForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    output = model(**tiny_batch())
    output.loss.backward()
    assert output.loss.dtype == torch.float32 and output.loss.isfinite()
    assert {value.dtype for value in output.loss_parts.values()} == {torch.float32}
