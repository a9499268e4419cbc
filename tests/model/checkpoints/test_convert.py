"""Checkpoint files: content of a saved model, key tables of released checkpoints (cumo_spec.md section 5)."""

import json
import os
import shutil
import signal
from math import prod

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForImageTextToText

from cumo_model import CumoConfig, CumoForConditionalGeneration, CumoVisionModel, convert, original_layout
from cumo_model.__main__ import main
from cumo_model.checkpoints.folders import new_directory
from cumo_model.checkpoints.layout import own_layout
from cumo_model.checkpoints.shards import Shards
from cumo_model.model.cumo import CumoModel
from tests.model import original
from tests.processes import Forked, finish

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
    assert keys == set(own_layout(model.config))
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


# files in the original layout, made by tests/model/original.py

STAGES = [
    pytest.param({"kind": "mistral"}, id="7b"),
    pytest.param({"kind": "mixtral"}, id="8x7b"),
    pytest.param({"kind": "mistral", "clip_smoe": False, "mlp_smoe": False}, id="stage-2"),
]


def assert_same_tensors(folder, wanted):
    found = Shards(folder)
    assert found.shapes.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found.dtypes[name] == value.dtype and torch.equal(found[name], value), name


@pytest.mark.parametrize("options", STAGES)
def test_original_to_ours_and_back_is_bit_exact(tmp_path, options):
    theirs = original.write(tmp_path / "theirs", dtype=torch.bfloat16, shards=3, **options)
    (tmp_path / "theirs/notes.txt").write_text("{}")
    convert(tmp_path / "theirs", tmp_path / "ours", shard_bytes=30_000, progress=False)
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 2
    assert (tmp_path / "ours/notes.txt").read_text() == "{}"
    direct = CumoForConditionalGeneration.from_pretrained(tmp_path / "theirs")
    loaded, info = CumoForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()) and loaded.dtype == direct.dtype == torch.bfloat16
    for key, value in direct.config.to_dict().items():
        if key not in ("_name_or_path", "architectures"):
            assert loaded.config.to_dict()[key] == value, key
    for (name, value), other in zip(loaded.state_dict().items(), direct.state_dict().values(), strict=True):
        assert torch.equal(value, other), name

    convert(tmp_path / "ours", tmp_path / "back", shard_bytes=30_000, progress=False)
    assert_same_tensors(tmp_path / "back", theirs)
    back = json.loads((tmp_path / "back/config.json").read_text())
    wanted = original.config(dtype="bfloat16", **options)
    for key, value in wanted.items():
        if key not in ("training", "local_rank", "mm_vision_tower"):
            assert back[key] == value, key
    assert back["training"] is False
    # the converted copy loads like the source
    again = CumoForConditionalGeneration.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in direct.state_dict().items())


def test_a_model_of_ours_survives_the_original_layout(tiny_model, tiny_batch, tmp_path):
    model = tiny_model(text="mixtral").eval()
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", progress=False)
    names = set(Shards(tmp_path / "theirs").shapes)
    assert names == set(original_layout(model.config))
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "theirs").eval()
    assert type(again) is CumoForConditionalGeneration
    batch = tiny_batch()
    assert again.config.image_token_index == 60
    assert torch.equal(again(**batch).logits, model(**tiny_batch()).logits)
    again.save_pretrained(tmp_path / "saved")  # in this project's layout
    assert Shards(tmp_path / "saved").shapes.keys() == model.state_dict().keys()


@pytest.mark.parametrize("options", STAGES)
def test_every_class_reads_the_original_layout_or_says_that_it_does_not(tmp_path, options):
    original.write(tmp_path, dtype=torch.bfloat16, **options)
    whole = CumoForConditionalGeneration.from_pretrained(tmp_path)

    class Derived(CumoForConditionalGeneration):
        pass

    derived = Derived.from_pretrained(tmp_path)
    inner, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert (type(derived), type(inner)) == (Derived, CumoModel) and not info["missing_keys"]
    for model, wanted in ((derived, whole), (inner, whole.model)):
        found = model.state_dict()
        assert found.keys() == wanted.state_dict().keys()
        assert all(torch.equal(value, found[name]) for name, value in wanted.state_dict().items())
    with pytest.raises(ValueError, match="must contain a vision tower only, got a whole model"):
        CumoVisionModel.from_pretrained(tmp_path)
    derived.save_pretrained(tmp_path / "saved")
    assert Shards(tmp_path / "saved").shapes.keys() == whole.state_dict().keys()


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_a_checkpoint_that_breaks_its_promise_is_named_and_nothing_written(tmp_path, change):
    values = original.tensors()
    name = "model.mm_projector.experts.2.2.weight"
    if change == "missing":
        del values[name]
        words = rf"1 missing \({name}\)"
    elif change == "unknown":
        values["model.image_newline"] = torch.zeros(24)
        words = r"1 not known \(model.image_newline\)"
    else:
        values[name] = torch.zeros(3, 3)
        words = rf"1 of another shape \({name} is \(3, 3\), config.json says \(24, 24\)\)"
    original.write(tmp_path / "theirs", values)
    with pytest.raises(ValueError, match=words):
        convert(tmp_path / "theirs", tmp_path / "ours", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]
    with pytest.raises(ValueError, match=words):
        CumoForConditionalGeneration.from_pretrained(tmp_path / "theirs")


class Harm:
    def __reduce__(self):
        return (open, ("/tmp/cumo-was-here", "w"))


def test_pickles_are_read_only_if_they_hold_nothing_but_tensors(tmp_path):
    theirs = original.write(tmp_path / "theirs", pickled=True)
    convert(tmp_path / "theirs", tmp_path / "ours", progress=False)
    convert(tmp_path / "ours", tmp_path / "back", progress=False)
    assert_same_tensors(tmp_path / "back", theirs)
    assert list((tmp_path / "back").glob("*.bin")) == []
    bad = tmp_path / "theirs/pytorch_model-00002-of-00002.bin"
    torch.save({**torch.load(bad, weights_only=True), "x": Harm()}, bad)
    with pytest.raises(
        ValueError, match=r"pytorch_model-00002-of-00002.bin is refused: .* more than tensors"
    ):
        convert(tmp_path / "theirs", tmp_path / "again", progress=False)


def test_convert_is_a_command_that_says_what_is_wrong(tmp_path, capsys):
    original.write(tmp_path / "theirs")
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    assert "writing: 100%" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 1
    assert "exists already" in capsys.readouterr().err
    for source, words in (("nothing", "is not a folder"), ("ours", "layout must be one of")):
        arguments = ["convert", str(tmp_path / source), str(tmp_path / "x"), "--layout", "cumo"]
        if source == "nothing":
            assert main(arguments) == 1
            assert words in capsys.readouterr().err
    damaged = tmp_path / "theirs/model-00001-of-00002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "y")]) == 1
    assert "model-00001-of-00002.safetensors is damaged" in capsys.readouterr().err


LEAN = """
import resource, sys
import torch
from cumo_model import convert
torch.set_num_threads(1)  # the stack and heap of another thread are nothing that conversion takes
used = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
limit = used + int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
convert(sys.argv[1], sys.argv[2], shard_bytes=8_000_000, progress=False)
convert(sys.argv[2], sys.argv[3], shard_bytes=8_000_000, progress=False)
"""


def test_converting_takes_the_memory_of_a_shard_not_of_the_model(tmp_path):
    """Converts 80 MB in shards of 8 MB in a process that may allocate only 40 MB more than at its start."""
    config = CumoConfig(
        vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                       "num_attention_heads": 2, "image_size": 12, "patch_size": 4},
        text_config={"model_type": "mixtral", "hidden_size": 64, "intermediate_size": 1024,
                     "num_hidden_layers": 25, "num_attention_heads": 2, "num_key_value_heads": 1,
                     "vocab_size": 50, "num_local_experts": 4},
    )  # fmt: skip
    config.save_pretrained(tmp_path / "ours")
    layout = list(own_layout(config).items())
    for i in range(0, len(layout), 25):
        tensors = {name: torch.zeros(shape) for name, shape in layout[i : i + 25]}
        save_file(tensors, tmp_path / f"ours/model-{i:05}.safetensors")
    folders = [str(tmp_path / name) for name in ("ours", "theirs", "again")]
    finish(Forked(["-c", LEAN, *folders, "40000000"], tmp_path / "out.txt"))
    total = sum(path.stat().st_size for path in (tmp_path / "again").glob("*.safetensors"))
    assert total > 75_000_000


def test_the_exported_config_is_that_of_the_model_not_of_its_past(tmp_path):
    original.write(tmp_path / "theirs", dtype=torch.bfloat16)
    model = CumoForConditionalGeneration.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    model.resize_token_embeddings(58)
    model.config.balance_loss_coef, model.config.router_z_loss_coef = 0.5, 0.0
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", progress=False)
    values = json.loads((tmp_path / "back/config.json").read_text())
    assert (values["vocab_size"], values["torch_dtype"]) == (58, "float32")
    assert (values["balance_loss_coef"], values["router_z_loss_coef"]) == (0.5, 0.0)
    again = CumoForConditionalGeneration.from_pretrained(tmp_path / "back")
    assert again.dtype == torch.float32 and again.config.balance_loss_coef == 0.5
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_experts_of_one_place_in_two_dtypes_are_refused(tmp_path):
    values = original.tensors(torch.bfloat16)
    name = "model.mm_projector.experts.1.0.weight"
    values[name] = values[name].float()
    original.write(tmp_path / "theirs", values, dtype=torch.bfloat16)
    words = rf"experts.0.0.weight and {name} must have one dtype .* got torch.bfloat16 and torch.float32"
    with pytest.raises(ValueError, match=words):
        convert(tmp_path / "theirs", tmp_path / "ours", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_an_error_leaves_no_folder_and_a_killed_run_is_told_of(tmp_path):
    with pytest.raises(RuntimeError), new_directory(tmp_path / "new") as work:
        (work / "half").write_text("")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".new-abcd1234").mkdir()
    with pytest.warns(UserWarning, match=r"\.new-abcd1234 is left over from a killed run"):
        with new_directory(tmp_path / "new") as work:
            pass
    assert (tmp_path / "new").is_dir()


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    original.write(tmp_path / "theirs")
    arguments = ["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        assert main(arguments) == 1
    assert " MB free, got 0.00 MB" in capsys.readouterr().err
    # a disk that becomes full during writing, simulated by a limit on file sizes, which gives the same error
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "from cumo_model.__main__ import main; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); "
        f"sys.exit(main({arguments!r}))"
    )
    printed = finish(Forked(["-c", code], tmp_path.with_suffix(".txt")), code=1)
    assert "Traceback" not in printed
    assert "model.safetensors cannot be written" in printed.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_sigterm_leaves_nothing_half_written(tmp_path, monkeypatch, capsys):
    from cumo_model.checkpoints import convert

    def write(folder, *rest):
        assert folder.is_dir()
        os.kill(os.getpid(), signal.SIGTERM)

    original.write(tmp_path / "theirs")
    # so that a failing test does not end the test run
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    monkeypatch.setattr(convert, "write_shards", write)
    try:
        assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 130
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "stopped" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


@pytest.mark.parametrize(
    "file, change, words",
    [
        ("config.json", lambda values: [], "config.json must hold an object, got list"),
        (
            "config.json",
            lambda values: {k: v for k, v in values.items() if k != "vocab_size"},
            "must have an integer vocab_size, got None",
        ),
        ("config.json", lambda values: values | {"scales": None}, "scales must be integers, got None"),
        ("config.json", lambda values: values | {"scales": "a,b"}, "scales must be integers, got 'a,b'"),
        ("model.safetensors.index.json", lambda values: {}, "index.json must have a weight_map"),
        ("model.safetensors.index.json", lambda values: [], "index.json must hold an object, got list"),
    ],
)
def test_damaged_json_is_one_line(tmp_path, capsys, file, change, words):
    original.write(tmp_path / "theirs")
    path = tmp_path / "theirs" / file
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 1
    assert words in capsys.readouterr().err


def test_other_dtypes_are_copied_bit_for_bit(tmp_path):
    values = original.tensors(torch.float8_e4m3fn)
    original.write(tmp_path / "theirs", values, shards=1)
    convert(tmp_path / "theirs", tmp_path / "ours", progress=False)
    convert(tmp_path / "ours", tmp_path / "back", progress=False)
    found = Shards(tmp_path / "back")
    for name, value in values.items():
        assert found.dtypes[name] == value.dtype
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), name


@pytest.mark.parametrize("size", ["0", "-1", "nan"])
def test_a_shard_has_a_size(tmp_path, capsys, size):
    assert main(["convert", str(tmp_path), str(tmp_path / "x"), "--shard-gb", size]) == 1
    assert "--shard-gb must be positive" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lnk.txt", "inner/lnk.txt", "chat_template.jinja", "gone.txt", "folder"])
def test_links_out_of_the_checkpoint_are_refused(tiny_model, tmp_path, name):
    source, away = tmp_path / "source", tmp_path / "away"
    tiny_model().save_pretrained(source)
    (source / "inner").mkdir()
    away.mkdir()
    (away / "lnk.txt").write_text("secret")
    targets = {"folder": away, "gone.txt": away / "nothing"}
    (source / name).symlink_to(targets.get(name, away / "lnk.txt"))
    with pytest.raises(ValueError, match=f"'{name}' is a link that leads out of .*; copy the file, or make"):
        convert(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_links_within_the_checkpoint_are_copied_as_files(tiny_model, tmp_path):
    source = tmp_path / "source"
    tiny_model().save_pretrained(source)
    (source / "inner").mkdir()
    (source / "inner/notes.txt").write_text("notes")
    (source / "lnk.txt").symlink_to("inner/notes.txt")
    (source / "again").symlink_to("inner")
    (source / "gone.txt").symlink_to("inner/nothing")
    with pytest.warns(UserWarning, match="not copied from .*: again, gone.txt$"):
        convert(source, tmp_path / "out", progress=False)
    assert (tmp_path / "out/lnk.txt").read_text() == (tmp_path / "out/inner/notes.txt").read_text() == "notes"
    assert not (tmp_path / "out/lnk.txt").is_symlink() and not (tmp_path / "out/again").exists()
