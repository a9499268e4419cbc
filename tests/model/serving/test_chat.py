"""The chat command: answers, and a one-line error for every kind of invalid input."""

import base64
import io
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from cumo_model import CumoForConditionalGeneration
from cumo_model.__main__ import main
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.processing.conversation import chat_template
from cumo_model.processing.processor import build_processor
from cumo_model.serving import chat as serving
from cumo_model.serving.chat import Printer, answer, load, own_template
from tests.model import original


@pytest.fixture
def checkpoint(tiny_config, tmp_path):
    tokenizer = train_tokenizer(["what is it? a red apple"] * 4, 300)
    config = tiny_config(
        text_options={"vocab_size": len(tokenizer), "eos_token_id": 2, "pad_token_id": 0},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        scales=(1, 3),
    )
    folder = tmp_path / "checkpoint"
    CumoForConditionalGeneration(config).save_pretrained(folder)
    build_processor(tokenizer, 12, 4).save_pretrained(folder)
    return folder


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (20, 14), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def run(capsys, *arguments):
    code = main(["chat", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_chat_prints_the_models_answer(checkpoint, picture, capsys):
    code, out, _ = run(
        capsys,
        "--checkpoint",
        checkpoint,
        "--image",
        picture,
        "--question",
        "what is it?",
        "--max-new-tokens",
        5,
    )
    model, processor = load(checkpoint)
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}]
    said = answer(model, processor, Image.open(picture), turns, "mistral_instruct", 5)
    assert code == 0 and out.strip() == said


def test_the_released_layout_chats_with_its_own_template(tmp_path, picture, capsys, monkeypatch):
    """Loaded directly from a folder whose tokenizer has `<image>` inside its vocabulary."""
    tokenizer = train_tokenizer(["what is it? a red apple"] * 4, 300)
    monkeypatch.setattr(original, "VOCAB", len(tokenizer))
    original.write(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    options = ("--checkpoint", tmp_path / "theirs", "--image", picture, "--question", "what is it?")
    code, out, err = run(capsys, *options, "--max-new-tokens", 5)
    assert code == 0, err
    model, processor = load(tmp_path / "theirs")
    assert model.config.image_token_index == processor.image_token_id < len(tokenizer)
    assert own_template(processor) == "mistral_instruct_system"
    content = [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": "what is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert out.strip() == tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_a_picture_of_several_tiles_is_talked_about(tiny_config, picture):
    tokenizer = train_tokenizer(["what is it? a red apple"] * 4, 300)
    tiles = {"patch_merge_type": "spatial_unpad", "image_grid_pinpoints": [[12, 24]]}
    config = tiny_config(
        text_options={"vocab_size": len(tokenizer), "eos_token_id": None, "max_position_embeddings": 256},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **tiles,
    )
    processor = build_processor(tokenizer, 12, 4, image_aspect_ratio="anyres", **tiles)
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}]
    model = CumoForConditionalGeneration(config).eval()
    assert answer(model, processor, Image.open(picture), turns, "mistral_instruct", 3)


def test_an_answer_is_greedy_and_of_the_length_asked_for(checkpoint, picture):
    """Whatever the generation config says; the tokens are those of the largest logits."""
    model, processor = load(checkpoint)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.double()
    model.generation_config.update(do_sample=True, temperature=5.0, max_new_tokens=2, eos_token_id=None)
    streamed, turns = [], [{"from": "human", "value": "<image>\nwhat is it?"}]
    streamer = type("Tokens", (), {"put": lambda self, ids: streamed.append(ids), "end": lambda self: None})()
    said = [
        answer(model, processor, Image.open(picture), turns, "mistral_instruct", 7, streamer)
        for _ in range(2)
    ]
    prompt, *tokens = streamed[: len(streamed) // 2]
    assert said[0] == said[1] and len(tokens) == 7
    pixels = processor(images=Image.open(picture), text="<image>", return_tensors="pt")["pixel_values"]
    ids = prompt.view(1, -1)
    for token in tokens:
        logits = model(input_ids=ids, pixel_values=pixels.double(), use_cache=False).logits[0, -1]
        assert token.item() == logits.argmax()
        ids = torch.cat([ids, token.view(1, 1)], 1)
    decoded = processor.tokenizer.decode(torch.stack(tokens).flatten(), skip_special_tokens=True)
    assert said[0] == decoded.strip().removesuffix("</s>").strip()


def test_the_picture_matters_and_a_second_turn_keeps_the_first(checkpoint, picture):
    model, processor = load(checkpoint)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    prompts = []
    model.bfloat16().generate = lambda **inputs: prompts.append(inputs) or inputs["input_ids"]
    first = [{"from": "human", "value": "<image>\nwhat is it?"}]
    answer(model, processor, Image.open(picture), first, "mistral_instruct")
    second = [*first, {"from": "gpt", "value": "a red apple"}, {"from": "human", "value": "what is it?"}]
    answer(model, processor, Image.open(picture), second, "mistral_instruct")
    one, two = (prompt["input_ids"][0].tolist() for prompt in prompts)
    assert two[: len(one)] == one and len(two) > len(one)
    assert prompts[0]["pixel_values"].shape == (1, 3, 12, 12)
    assert prompts[0]["pixel_values"].dtype == torch.bfloat16  # as the original's


def broken_picture(tmp_path):
    path = tmp_path / "broken.png"
    Image.new("RGB", (300, 300), "red").save(path)
    path.write_bytes(path.read_bytes()[:-200])
    return path


@pytest.mark.parametrize("kind", ["missing", "cut off", "text"])
def test_a_bad_picture_is_named(checkpoint, tmp_path, capsys, kind):
    path = {"missing": tmp_path / "none.png", "text": checkpoint / "config.json"}.get(kind)
    path = path or broken_picture(tmp_path)
    code, _, err = run(capsys, "--checkpoint", checkpoint, "--image", path, "--question", "?")
    assert code == 1 and path.name in err and err.startswith("cumo: image ") and "Traceback" not in err


def cut(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage, words",
    [
        (shutil.rmtree, "is not a folder"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded: "),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded: "),
        (lambda folder: cut(folder / "model.safetensors"), "cannot be loaded: "),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot be loaded: "),
    ],
    ids=["no-folder", "no-config", "bad-config", "no-weights", "truncated-weights", "no-tokenizer"],
)
def test_a_damaged_checkpoint_is_named(checkpoint, picture, capsys, damage, words):
    damage(checkpoint)
    code, _, err = run(capsys, "--checkpoint", checkpoint, "--image", picture, "--question", "?")
    assert code == 1 and words in err and str(checkpoint) in err and "Traceback" not in err


def test_a_checkpoint_of_something_else_is_refused_before_a_model_is_built(checkpoint):
    (checkpoint / "config.json").write_text('{"model_type": "clip_vision_model"}')
    with pytest.raises(ValueError, match=r"must be of model_type cumo, .*, got 'clip_vision_model'"):
        load(checkpoint)


def test_tensors_of_another_shape_are_named(checkpoint, capsys):
    from safetensors.torch import load_file, save_file

    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].contiguous()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 of another shape \(lm_head.weight is \(\d+, 24\), config"):
        load(checkpoint)
    assert "REPORT" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("question", ["<image> x", "a [/INST] b"])
def test_an_unaskable_question_is_an_error(checkpoint, question, capsys):
    code, out, err = run(capsys, "--checkpoint", checkpoint, "--question", question)
    assert code == 1 and not out and "question must not hold" in err


def test_a_question_that_is_not_utf8_is_refused_and_the_conversation_goes_on(checkpoint, capsys, monkeypatch):
    told = "question must be text in UTF-8"
    code, out, err = run(capsys, "--checkpoint", checkpoint, "--question", "what \udcff")
    assert code == 1 and not out and told in err
    monkeypatch.setattr(
        "sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff?\nwhat is it?\n"), errors="surrogateescape")
    )
    code, out, err = run(capsys, "--checkpoint", checkpoint)
    assert code == 0 and out and told in err


def test_missing_tensors_are_named(checkpoint):
    from safetensors.torch import load_file, save_file

    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing \(lm_head.weight\)"):
        load(checkpoint)


def test_demo_refuses_a_folder_that_is_not_its_own(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 1
    assert "contains something that is not a demo" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "chat, told", [("{{ messages[0]['content'] }}", "is none of them"), ("plain", "captions only")]
)
def test_a_checkpoint_without_an_instruct_template_asks_for_one(checkpoint, picture, capsys, chat, told):
    _, processor = load(checkpoint)
    processor.chat_template = chat_template("plain") if chat == "plain" else chat
    processor.save_pretrained(checkpoint)
    options = [
        "--checkpoint",
        checkpoint,
        "--image",
        picture,
        "--question",
        "what is it?",
        "--max-new-tokens",
        2,
    ]
    code, _, err = run(capsys, *options)
    assert code == 1 and "template must be given" in err and told in err
    assert run(capsys, *options, "--template", "mistral_instruct")[0] == 0


def test_an_empty_question_is_refused_before_the_model_is_loaded(picture, capsys):
    code, _, err = run(capsys, "--checkpoint", "nowhere", "--image", picture, "--question", " ")
    assert code == 1 and "question must not be empty" in err


def test_an_answer_does_not_begin_with_a_blank(checkpoint, capsys):
    _, processor = load(checkpoint)
    printer = Printer(processor.tokenizer)
    for piece in ("", " ", "\n a", " red", " apple "):
        printer.on_finalized_text(piece)
    printer.on_finalized_text("", stream_end=True)
    assert capsys.readouterr().out == "a red apple \n" and printer.said == "a red apple "


def test_a_question_from_standard_input_has_the_picture_in_its_first_turn(
    checkpoint, picture, monkeypatch, capsys
):
    asked = []

    def generate(model, processor, image, turns, template, new_tokens, streamer):
        asked.append(([(turn["from"], turn["value"]) for turn in turns], image.size, template, new_tokens))
        return f"answer {len(asked)}"

    monkeypatch.setattr(serving, "answer", generate)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n two \n\nthree\n"))
    assert run(capsys, "--checkpoint", checkpoint, "--image", picture, "--max-new-tokens", 9)[0] == 0
    first = [("human", "<image>\none")]
    second = [*first, ("gpt", "answer 1"), ("human", "two")]
    assert asked == [(turns, (20, 14), "mistral_instruct", 9) for turns in (first, second)]


@pytest.mark.parametrize("said, kept", [(" a red", ["a red"]), ("", [])])
def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(checkpoint, monkeypatch, capsys, said, kept):
    """A real signal in each answer; at the prompt it ends the conversation, and SIGTERM does so anywhere."""
    asked, numbers = [], [signal.SIGINT, signal.SIGINT, signal.SIGTERM]

    def generate(model, processor, picture, turns, template, new_tokens, streamer):
        asked.append([turn["value"] for turn in turns])
        streamer.on_finalized_text(said)
        signal.raise_signal(numbers[len(asked) - 1])
        raise AssertionError

    monkeypatch.setattr(serving, "answer", generate)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\nthree\nfour\n"))
    code, _, err = run(capsys, "--checkpoint", checkpoint)
    assert code == 130 and err.count("the answer was stopped") == 2 and err.endswith("cumo: stopped\n")
    assert asked == [["one"], [*(["one", *kept] if kept else []), "two"],
                     [*(["one", *kept, "two", *kept] if kept else []), "three"]]  # fmt: skip

    def prompt(text):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("builtins.input", prompt)
    assert run(capsys, "--checkpoint", checkpoint)[0] == 130
    asked.clear()
    assert run(capsys, "--checkpoint", checkpoint, "--question", "one")[0] == 130


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x.png", "https://127.0.0.1:9//a.png?b=c", "DATA"])
def test_urls_reach_the_reader_of_pictures_unchanged(checkpoint, picture, capsys, url):
    if url == "DATA":
        url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
        options = ("--question", "what is it?", "--max-new-tokens", 2)
        assert run(capsys, "--checkpoint", checkpoint, "--image", url, *options)[0] == 0
        return
    code, _, err = run(capsys, "--checkpoint", checkpoint, "--image", url, "--question", "?")
    assert code == 1 and err.startswith(f"cumo: image {url!r} cannot be fetched: ")
