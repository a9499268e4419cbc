"""The chat in the terminal: its commands and options, and one line for every kind of invalid input."""

import base64
import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from cumo_model.__main__ import main
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.processing.conversation import chat_template
from cumo_model.serving.chat import Conversation, _printable
from cumo_model.serving.local import Local, load, own_template
from cumo_model.serving.messages import text_of, user_message
from cumo_model.serving.replies import Stream
from cumo_model.serving.sampling import Sampling
from tests.model import original
from tests.model.serving.endpoint_server import serving


def run(capsys, *arguments):
    code = main(["chat", *map(str, arguments)])
    return code, *capsys.readouterr()


def typed(monkeypatch, *lines):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


RED, BLUE = Image.new("RGB", (20, 14), "red"), Image.new("RGB", (20, 14), "blue")
FEW = Sampling(6)


def said(engine, *questions):
    """The answers of a conversation as they are shown; a question is a text or (text, picture, ...)."""
    messages, found = [], []
    for question in questions:
        text, *pictures = (question,) if isinstance(question, str) else question
        messages.append(user_message(text, pictures))
        messages.append({"role": "assistant", "content": engine.stream(messages, FEW).read().text})
        found.append(_printable(messages[-1]["content"]))
    return found


def test_one_question_about_several_pictures(talker_folder, talker, tmp_path, picture, capsys):
    BLUE.save(tmp_path / "blue.png")
    pictures = ("--image", picture, "--image", tmp_path / "blue.png")
    options = ("--question", "what is it?", "--max-new-tokens", 6)
    code, out, err = run(capsys, talker_folder, *pictures, *options)
    assert (code, out) == (0, said(talker, ("what is it?", RED, BLUE))[0] + "\n"), err
    assert "cut after 6 tokens" in err
    assert run(capsys, "--checkpoint", talker_folder, *options)[1].strip() == said(talker, "what is it?")[0]


def test_the_same_over_an_endpoint(talker, picture, capsys):
    with serving(talker) as server:
        options = ("--image", picture, "--question", "what is it?", "--max-new-tokens", 6)
        code, out, err = run(capsys, "--endpoint", server.url, *options)
    assert (code, out) == (0, said(talker, ("what is it?", RED))[0] + "\n"), err


def test_a_conversation_keeps_its_turns_and_shows_pictures_on_the_way(
    talker_folder, talker, tmp_path, picture, monkeypatch, capsys
):
    BLUE.save(tmp_path / "a blue.png")
    file = tmp_path / "talk.json"
    blue = tmp_path / "a blue.png"
    typed(monkeypatch, "what is it?", f"/image '{blue}'", "and the door?", f"/save {file}",
          "/undo", f"/image {blue}", "near the house?", "/reset", "what is it?")  # fmt: skip
    code, out, err = run(capsys, talker_folder, "--image", picture, "--max-new-tokens", 6)
    assert code == 0, err
    first = said(talker, ("what is it?", RED), ("and the door?", BLUE))
    wanted = [*first, said(talker, ("what is it?", RED), ("near the house?", BLUE))[1]]
    assert out.splitlines() == [*wanted, said(talker, "what is it?")[0]]
    saved = json.loads(file.read_text())
    assert [turn["role"] for turn in saved["messages"]] == ["user", "assistant"] * 2
    assert [_printable(turn["text"]) for turn in saved["messages"]][1::2] == first
    assert [turn.get("images") for turn in saved["messages"]] == [
        [str(picture)], None, [str(tmp_path / "a blue.png")], None
    ]  # fmt: skip


def test_options_reach_the_model(talker_folder, talker, capsys):
    talker.model.bfloat16()
    wanted = talker.stream(
        [{"role": "system", "content": "the blue door"}, user_message("what is it?")],
        Sampling(9, 2.0, 0.9, 5),
    )
    options = ("--temperature", 2, "--top-p", 0.9, "--seed", 5, "--max-new-tokens", 9, "--dtype", "bfloat16")
    more = ("--system", "the blue door", "--device", "cpu", "--question", "what is it?")
    assert run(capsys, talker_folder, *options, *more)[1].strip() == _printable(wanted.read().text).strip()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_answers(talker_folder, bits, capsys):
    pytest.importorskip("bitsandbytes")
    code, out, err = run(
        capsys, talker_folder, f"--load-{bits}bit", "--question", "what is it?", "--max-new-tokens", 30
    )
    assert code == 0 and out.strip(), err


@pytest.mark.parametrize(
    "line, told",
    [
        ("/image", "/image must be followed by the name of a file"),
        ("/image none.png", "image 'none.png' does not exist"),
        ("/image cut.png", "image 'cut.png' cannot be read: "),
        ("/image bomb.png", "image 'bomb.png' must be decoded in at most 150 MB of memory"),
        ("/image .", "image '.' cannot be read: "),
        (f"/image {'x' * 300}.png", "cannot be read: "),
        ("/image ~nobody-here/x.png", "ome directory"),
        ("/image http://127.0.0.1:9/x.png", "cannot be fetched"),
        ("/save", "/save must be followed by the name of a file"),
        ("/save new.json", "there is nothing to save: no question has been answered"),
        ("/undo", "there is no question to forget"),
        ("/picture x", "/picture is no command; /help lists them"),
        ("/help", "/image FILE"),
        ("a [/INST] b", "no answer: the question must not hold [/INST]"),
        ("<image> x", "no answer: the question must not hold <image>"),
        ("a red apple " * 400, "no answer: the conversation must have fewer than 512 tokens"),
    ],
)
def test_a_line_that_is_not_understood_is_told_and_the_conversation_goes_on(
    talker_folder, talker, monkeypatch, capsys, line, told, tmp_path
):
    monkeypatch.chdir(tmp_path)
    broken_picture(tmp_path).rename("cut.png")
    Image.new("L", (15_000, 11_000)).save("bomb.png")
    typed(monkeypatch, line, "what is it?")
    code, out, err = run(capsys, talker_folder, "--max-new-tokens", 6)
    assert code == 0 and told in out + err and out.splitlines()[-1] == said(talker, "what is it?")[0]


def test_a_saved_conversation_is_not_overwritten(talker, tmp_path):
    talk = Conversation(talker, FEW, system="the blue door")
    (tmp_path / "old.json").write_text("precious")
    assert talk.ask("what is it?").text
    with pytest.raises(ValueError, match=r"old.json' exists already"):
        talk.save(tmp_path / "old.json")
    with pytest.raises(ValueError, match="cannot be written: No such file or directory"):
        talk.save(tmp_path / "none" / "new.json")
    talk.save(tmp_path / "new.json")
    saved = json.loads((tmp_path / "new.json").read_text())["messages"]
    assert saved[0] == {"role": "system", "text": "the blue door"} and len(saved) == 3
    assert (tmp_path / "old.json").read_text() == "precious"


def test_closed_standard_input_is_named(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    code, _, err = run(capsys, checkpoint)
    assert code == 1 and "standard input, which is closed" in err


def test_an_answer_cannot_command_the_terminal(talker, monkeypatch, capsys):
    said = "a\x1b[2Jb\x07\u009b1m\nc"
    monkeypatch.setattr(Local, "stream", lambda *_: Stream(iter_of(said)))
    talk = Conversation(talker, FEW)
    assert talk.ask("what is it?").text == said
    assert capsys.readouterr().out == "a[2Jb1m\nc\n"


def iter_of(text):
    yield text
    return "stop", 1, 1


class Terminal:
    """`cumo chat` in a pseudo terminal."""

    def __init__(self, *words):
        self.end, own = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cumo_model", "chat", *map(str, words)],
            stdin=own,
            stdout=own,
            stderr=own,
            start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )
        os.close(own)
        self.seen = ""

    def read(self) -> bool:
        """Read what there is within a moment; False if the program has ended."""
        if select.select([self.end], [], [], 0.2)[0]:
            try:
                self.seen += os.read(self.end, 65536).decode(errors="replace")
            except OSError:
                return False
        return True

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Read until `text` is there; what came up to it."""
        until = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < until, f"no {text!r} in {self.seen!r}"
            if not self.read():  # the program has ended
                assert text in self.seen, f"no {text!r} in {self.seen!r}"
        found, _, self.seen = self.seen.partition(text)
        return found

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def close(self) -> int:
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            os.close(self.end)


@pytest.mark.timeout(400)
def test_in_a_terminal_ctrl_c_ends_the_answer_and_not_the_program(talker_folder, talker, picture, tmp_path):
    endless = tmp_path / "endless"
    shutil.copytree(talker_folder, endless)
    settings = json.loads((endless / "generation_config.json").read_text())
    (endless / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 399}))
    limits = json.loads((endless / "config.json").read_text())
    limits["text_config"] |= {"max_position_embeddings": 200_000}
    (endless / "config.json").write_text(json.dumps(limits))
    terminal = Terminal(endless, "--max-new-tokens", 100_000)
    try:
        terminal.wait_for("/help; an empty line ends the conversation", 200)  # all imports
        terminal.wait_for("> ")
        terminal.type(f"/image {picture}\n")
        terminal.wait_for("1 with the next question")
        terminal.wait_for("> ")
        terminal.type("what is it?\n")
        terminal.wait_for("what is it?")
        begun = time.monotonic()
        while len(terminal.seen.strip()) < 20:  # it streams: this is long before the end
            assert time.monotonic() < begun + 60
            terminal.read()
        terminal.type("\x03")
        terminal.wait_for("the answer was stopped")
        terminal.wait_for("> ")
        assert terminal.process.poll() is None
        terminal.type("/save " + str(tmp_path / "talk.json") + "\n")
        terminal.wait_for("saved as")
        terminal.wait_for("> ")
        for _ in range(10):  # readline misses a signal between printing its prompt and waiting for input
            time.sleep(1)
            terminal.type("\x03")  # at the prompt it ends the program
            for _ in range(10):
                terminal.read()
            if "cumo: stopped" in terminal.seen:
                break
        terminal.wait_for("cumo: stopped")
        assert terminal.close() == 130
    finally:
        terminal.process.kill()
    question, answer = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert question["images"] == [str(picture)] and len(answer["text"]) > 10


@pytest.mark.timeout(400)
def test_in_a_terminal_an_empty_line_ends_the_conversation(talker_folder, talker):
    terminal = Terminal(talker_folder, "--max-new-tokens", 6)
    try:
        terminal.wait_for("> ")
        terminal.type("what is it?\n")
        terminal.wait_for("what is it?")
        shown = terminal.wait_for("> ")
        assert said(talker, "what is it?")[0].split() == shown.split("the answer was cut")[0].split()
        terminal.type("\n")
        assert terminal.close() == 0
    finally:
        terminal.process.kill()


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


@pytest.mark.parametrize("said, kept", [(" a red", ["a red"]), ("", [])])
def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(checkpoint, monkeypatch, capsys, said, kept):
    """A real signal in each answer; at the prompt it ends the conversation, and SIGTERM does so anywhere."""
    asked, numbers = [], [signal.SIGINT, signal.SIGINT, signal.SIGTERM]

    def pieces():
        yield said
        signal.raise_signal(numbers[len(asked) - 1])
        raise AssertionError

    def stream(self, messages, sampling):
        asked.append([text_of(message) for message in messages])
        return Stream(pieces())

    monkeypatch.setattr(Local, "stream", stream)
    typed(monkeypatch, "one", "two", "three", "four")
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
