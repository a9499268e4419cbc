"""Answers to files of questions: the same as one by one, in order, resumed, shared, refused."""

import json
import os
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from cumo_model.__main__ import main
from cumo_model.serving.answer import _batches, answer_questions, is_out_of_memory
from cumo_model.serving.messages import user_message
from cumo_model.serving.questions import Question, read_questions
from cumo_model.serving.sampling import Sampling
from tests.model.serving.endpoint_server import serving
from tests.processes import Forked, finish, kill, wait_until

SHORT = Sampling(6)
COLOURS = ("red", "green", "blue")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (20 + number, 14), colour).save(folder / f"{colour}.png")
    return folder


def write(path: Path, values) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def asked(count: int = 12) -> list[dict]:
    """Questions of many lengths, without, with one and with two pictures."""
    found = []
    for number in range(count):
        question = {"question_id": number, "text": "what is it? " + "a red apple " * (number % 5)}
        if number % 4:
            question["image"] = f"{COLOURS[number % 3]}.png"
        found.append(question)
    found[1] |= {"text": "<image>\nthe blue door", "category": "doors"}
    found[2] |= {"image": ["red.png", "blue.png"], "text": "two green <image> pears <image> or"}
    found[3] |= {"image": ["red.png", "blue.png"]}
    return found


@pytest.fixture
def questions(tmp_path):
    return write(tmp_path / "q.jsonl", asked())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(capsys, *words) -> tuple[int, str, str]:
    code = main(["answer", *map(str, words)])
    return code, *capsys.readouterr()


def command(folder, questions, images, out, *more) -> list:
    options = ["--questions", questions, "--images", images, "--out", out, "--max-new-tokens", 6]
    return [folder, *options, *more]


def test_answers_are_those_of_each_question_alone_and_in_order(talker, questions, images, tmp_path):
    out = tmp_path / "new" / "a.jsonl"
    done = answer_questions(talker, read_questions(questions), images, out, SHORT, batch_size=5)
    assert (done.path, done.answers, done.new, done.failures) == (out, 12, 12, {})
    picture = {f"{colour}.png": Image.open(images / f"{colour}.png") for colour in COLOURS}
    found = lines(out)
    for question, answer in zip(asked(), found, strict=True):
        names = question.get("image", [])
        shown = [
            {"type": "image", "image": picture[n]} for n in ([names] if isinstance(names, str) else names)
        ]
        parts = [*shown, {"type": "text", "text": question["text"].replace("<image>\n", "").strip()}]
        if question["question_id"] == 2:  # several markers are places
            first, second, third = (
                {"type": "text", "text": text} for text in ("two green ", " pears ", " or")
            )
            parts = [first, shown[0], second, shown[1], third]
        reply = talker.stream([{"role": "user", "content": parts}], SHORT).read()
        assert answer["text"] == reply.text and answer["metadata"]["finish"] == reply.finish
        assert answer["prompt"] == question["text"] and answer["model_id"] == "talker"
        assert list(answer) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert [answer["question_id"] for answer in found] == list(range(12))
    assert len({answer["answer_id"] for answer in found}) == 12
    assert len({answer["text"] for answer in found}) > 6
    assert [a["metadata"].get("category") for a in found] == [None, "doors", *[None] * 10]
    assert [path.name for path in out.parent.iterdir()] == ["a.jsonl"]


def test_long_questions_are_answered_first_and_beside_their_like():
    questions = [Question(i, "x" * size, ("a",) * count) for i, (size, count) in enumerate(
        [(3, 0), (9, 0), (5, 1), (9, 0), (1, 2)])]  # fmt: skip
    assert [[q.id for q in batch] for batch in _batches(questions, 2)] == [[4, 2], [1, 3], [0]]


def test_two_runs_are_the_same_file_and_a_finished_one_is_left_alone(
    talker_folder, questions, images, tmp_path, capsys
):
    options = ("--temperature", 0.9, "--top-p", 0.8, "--seed", 5, "--system", "two green pears")
    for name in ("a", "b"):
        code, out, err = run(capsys, *command(talker_folder, questions, images, tmp_path / name, *options))
        assert (code, out) == (0, f"answers to 12 of 12 questions: {tmp_path / name}\n"), err
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert {answer["model_id"] for answer in lines(tmp_path / "a")} == {"model"}
    before = (tmp_path / "a").stat()
    code, out, _ = run(capsys, *command(talker_folder, questions, images, tmp_path / "a", *options))
    assert (code, out) == (0, f"already finished: answers to 12 questions are in {tmp_path / 'a'}\n")
    assert (tmp_path / "a").stat() == before
    code, _, err = run(capsys, *command(talker_folder, questions, images, tmp_path / "a"))
    assert code == 1 and "a exists already, with answers to other questions or with other settings" in err
    assert (tmp_path / "a").stat() == before and not list(tmp_path.glob("*.part-*"))
    run(capsys, *command(talker_folder, questions, images, tmp_path / "c", *options[:-4], "--seed", 6))
    texts = [[answer["text"] for answer in lines(tmp_path / name)] for name in "ac"]
    assert texts[0] != texts[1]


def test_the_system_text_is_in_each_conversation(talker, questions, images, tmp_path):
    asked = read_questions(questions, 1)
    answer_questions(talker, asked, images, tmp_path / "a", SHORT, system="a red door")
    talk = [{"role": "system", "content": "a red door"}, asked[0].message()]
    assert lines(tmp_path / "a")[0]["text"] == talker.stream(talk, SHORT).read().text
    assert lines(tmp_path / "a")[0]["text"] != talker.stream(talk[1:], SHORT).read().text


def test_each_batch_has_samples_of_its_own(talker, tmp_path):
    same = [Question(number, "what is it?") for number in range(4)]
    answer_questions(talker, same, None, tmp_path / "a", Sampling(6, 2.0, seed=1), batch_size=1)
    assert len({answer["text"] for answer in lines(tmp_path / "a")}) == 4


def interrupted(words, out: Path, log: Path, ranks: int = 1) -> list[Path]:
    """Start the command, kill it with SIGKILL after a few answers, and return the parts it has left."""
    process = Forked(["-m", "cumo_model", "answer", *map(str, words)], log, ranks)
    parts = [out.with_name(f"{out.name}.part-{rank}") for rank in range(ranks)]
    few = lambda: all(part.exists() and part.read_bytes().count(b"\n") > 2 for part in parts)
    wait_until(process, few, log, 100)
    kill(process)
    process.communicate(timeout=90)
    return parts


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(talker_folder, images, tmp_path, capsys):
    questions = write(tmp_path / "q.jsonl", asked(40))
    whole, out = tmp_path / "whole", tmp_path / "a"
    assert run(capsys, *command(talker_folder, questions, images, whole, "--batch-size", 2))[0] == 0
    words = command(talker_folder, questions, images, out, "--batch-size", 2)
    (part,) = interrupted(words, out, tmp_path / "log")
    assert not out.exists()
    head, first, *rest = part.read_bytes().splitlines(keepends=True)
    kept = json.loads(first)
    kept[0]["text"] = "kept"  # it must not be asked again
    part.write_bytes(head + json.dumps(kept).encode() + b"\n" + b"".join(rest) + b'[{"question_id": 0, "pro')
    code, _, err = run(capsys, *words[:-4], "--max-new-tokens", 7)
    assert code == 1 and "belongs to a run with max_new_tokens 6, not 7: choose another --out" in err
    code, _, err = run(capsys, *words, "--limit", 39)
    assert code == 1 and f"{part} belongs to other questions" in err
    assert run(capsys, *words)[0] == 0
    expected = lines(whole)
    expected[kept[0]["question_id"]]["text"] = "kept"
    assert lines(out) == expected and not part.exists()


@pytest.mark.slow
def test_two_processes_share_the_questions_and_one_goes_on_for_both(talker_folder, images, tmp_path, capsys):
    questions = write(tmp_path / "q.jsonl", asked(80))
    whole, both, out = tmp_path / "whole", tmp_path / "both", tmp_path / "a"
    assert run(capsys, *command(talker_folder, questions, images, whole, "--batch-size", 4))[0] == 0
    words = command(talker_folder, questions, images, both, "--batch-size", 4)
    process = Forked(["-m", "cumo_model", "answer", *map(str, words)], tmp_path / "log", 2)
    assert finish(process).strip().endswith(f"answers to 80 of 80 questions: {both}")
    assert both.read_bytes() == whole.read_bytes() and not list(tmp_path.glob("*.part-*"))
    words = command(talker_folder, questions, images, out, "--batch-size", 4)
    parts = [lines(part)[1:] for part in interrupted(words, out, tmp_path / "log", 2)]
    ids = [{answer["question_id"] for batch in part for answer in batch} for part in parts]
    assert ids[0] and ids[1] and not ids[0] & ids[1]
    assert run(capsys, *words)[0] == 0
    assert out.read_bytes() == whole.read_bytes() and not list(tmp_path.glob("*.part-*"))


@pytest.mark.slow
def test_processes_starts_several_and_failures_of_all_are_counted_once(
    talker_folder, images, tmp_path, capfd
):
    values = asked(12)
    for number in (4, 5):
        values[number]["text"] = "a red apple " * 300
    questions, out = write(tmp_path / "q.jsonl", values), tmp_path / "a"
    words = command(talker_folder, questions, images, out, "--processes", 2, "--batch-size", 1)
    assert main(["answer", *map(str, words)]) == 1
    err = capfd.readouterr().err
    assert err.count("the conversation must have fewer than 512 tokens") == 2
    assert err.count("2 of 12 questions have no answer") == 1 and "Traceback" not in err
    assert [answer["question_id"] for answer in lines(out)] == [0, 1, 2, 3, *range(6, 12)]


def bomb(path: Path) -> None:
    """A small PNG that says it is of 60000 x 60000 pixels."""
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)


def test_a_question_that_cannot_be_answered_is_named_and_tried_again(talker_folder, images, tmp_path, capsys):
    values = asked(9)
    (images / "text.png").write_text("no picture")
    Image.new("RGB", (9, 9)).save(images / "bomb.png")
    bomb(images / "bomb.png")
    values[5]["image"], values[6]["image"] = "text.png", "bomb.png"
    values[7]["text"] = "a red apple " * 300
    values[8]["text"] = "a [/INST] b"
    questions, out = write(tmp_path / "q.jsonl", values), tmp_path / "a"
    words = command(talker_folder, questions, images, out)
    code, said, err = run(capsys, *words)
    assert code == 1 and not said and "Traceback" not in err
    reasons = ("text.png' is not a picture", "bomb.png' ", "fewer than 512 tokens", "must not hold [/INST]")
    told = {line.split(": ")[1]: line for line in err.splitlines() if "cumo: question" in line}
    for number, reason in enumerate(reasons, 5):
        assert reason in told[f"question {number}"]
    assert err.splitlines()[-1].startswith("cumo: 4 of 9 questions have no answer, see above; 5 answers are")
    before = lines(out)
    assert [answer["question_id"] for answer in before] == [0, 1, 2, 3, 4]
    assert not list(tmp_path.glob("*.part-*"))
    Image.new("RGB", (9, 9)).save(images / "text.png")
    before[0]["text"] = "kept"
    write(out, before)
    code, _, err = run(capsys, *words)
    assert code == 1 and "cumo: 3 of 9 questions have no answer" in err
    assert lines(out)[:5] == before and lines(out)[5]["question_id"] == 5 and len(lines(out)) == 6


class Small:
    """An engine with memory for batches of two."""

    def __init__(self, engine):
        self.engine, self.name, self.template, self.sizes = engine, engine.name, engine.template, []
        self.check = engine.check

    def answers(self, talks, sampling):
        self.sizes.append(len(talks))
        if len(talks) > 2:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            except torch.OutOfMemoryError as error:
                raise ValueError("it cannot answer: CUDA out of memory") from error
        return self.engine.answers(talks, sampling)


def test_a_batch_without_memory_is_halved(talker, questions, images, tmp_path):
    small = Small(talker)
    asked = read_questions(questions, 5)
    done = answer_questions(small, asked, images, tmp_path / "a", SHORT, batch_size=5)
    assert small.sizes == [5, 3, 2, 1, 2] and done.answers == 5
    answer_questions(talker, asked, images, tmp_path / "b", SHORT, batch_size=2)
    texts = [[answer["text"] for answer in lines(tmp_path / name)] for name in "ab"]
    assert texts[0] == texts[1]


def test_lack_of_memory_is_told_from_other_errors():
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."))
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(ValueError("x"))


def test_an_engine_that_fails_ends_the_run_which_can_go_on(talker, questions, images, tmp_path):
    class Gone(Small):
        def answers(self, talks, sampling):
            if len(self.sizes) == 2:
                raise ValueError("it is gone")
            return super().answers(talks, sampling)

    asked = read_questions(questions)
    with pytest.raises(ValueError, match="it is gone"):
        answer_questions(Gone(talker), asked, images, tmp_path / "a", SHORT, batch_size=2)
    assert not (tmp_path / "a").exists()
    done = answer_questions(talker, asked, images, tmp_path / "a", SHORT, batch_size=2)
    assert (done.answers, done.new) == (12, 8)


def test_an_endpoint_is_asked_several_questions_at_once(talker, images, tmp_path, capsys):
    values = asked(16)
    values[9]["text"] = "a red apple " * 300
    questions = write(tmp_path / "q.jsonl", values)
    answer_questions(talker, read_questions(questions), images, tmp_path / "own", SHORT, batch_size=1)
    with serving(talker, "tiny") as server:
        options = ("--endpoint", server.url, "--at-once", 4, "--max-new-tokens", 6)
        files = ("--questions", questions, "--images", images, "--out", tmp_path / "a")
        code, _, err = run(capsys, *options, *files)
        assert code == 1 and "question 9: " in err and "1 of 16 questions have no answer" in err
        assert len(server.asked) == 17  # a second time without the length, which the server may have meant
        assert run(capsys, *options, *files)[0] == 1 and len(server.asked) == 19
    own, found = lines(tmp_path / "own"), lines(tmp_path / "a")
    assert [(a["question_id"], a["text"]) for a in found] == [(a["question_id"], a["text"]) for a in own]
    assert {answer["model_id"] for answer in found} == {"tiny"}
    code, _, err = run(capsys, *options, *files)
    assert code == 1 and err.startswith("cumo: endpoint ") and len(err.splitlines()) == 1


def test_a_run_that_writes_the_same_file_is_noticed(talker, questions, images, tmp_path):
    out = tmp_path / "a"
    process = Forked(["-c", "import fcntl, sys, time; file = open(sys.argv[1], 'ab'); "
                      "fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True); time.sleep(100)",
                      f"{out}.part-0"], tmp_path / "log")  # fmt: skip
    wait_until(process, lambda: "held" in (tmp_path / "log").read_text(), tmp_path / "log", 100)
    with pytest.raises(ValueError, match="is being written by another run"):
        answer_questions(talker, read_questions(questions), images, out, SHORT)
    kill(process)
    assert answer_questions(talker, read_questions(questions), images, out, SHORT).answers == 12


def test_questions_with_one_id_and_different_texts_are_several(talker, tmp_path):
    """In LLaVA's files for TextVQA and MME the id is that of the picture."""
    values = [{"question_id": "a", "text": text} for text in ("what is it?", "two green pears?")]
    found = read_questions(write(tmp_path / "q.jsonl", values))
    for _ in range(2):
        done = answer_questions(talker, found, None, tmp_path / "a", SHORT)
        assert done.answers == 2
    wanted = [talker.stream([user_message(value["text"])], SHORT).read().text for value in values]
    assert [answer["text"] for answer in lines(tmp_path / "a")] == wanted


def test_a_link_stays_a_link_and_a_device_is_refused(talker, tmp_path):
    found = [Question(1, "what is it?")]
    (tmp_path / "link").symlink_to(tmp_path / "target")
    answer_questions(talker, found, None, tmp_path / "link", SHORT)
    assert (tmp_path / "link").is_symlink() and len(lines(tmp_path / "target")) == 1
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"out must be a file, got .*pipe', which is a device or a pipe"):
        answer_questions(talker, found, None, tmp_path / "pipe", SHORT)


ONE = {"question_id": 1, "text": "what?"}
BAD_LINES = {
    "{": "q.jsonl, line 2: must be JSON: ",
    "[]": "line 2: must be an object with question_id and text, got list",
    '{"question_id": 2}': "line 2: must have text, got question_id",
    '{"text": "x"}': "line 2: must have question_id, got text",
    '{"question_id": 2.5, "text": "x"}': "line 2: question_id must be an int or text, got 2.5",
    '{"question_id": true, "text": "x"}': "line 2: question_id must be an int or text, got True",
    '{"question_id": 2, "text": 3}': "line 2: text must be text, got int",
    '{"question_id": 2, "text": " <image>", "image": "a"}': "line 2: text must not be empty",
    '{"question_id": 2, "text": "x \\ud800"}': "line 2: text must be text in UTF-8",
    '{"question_id": 2, "text": "x", "image": 3}': "line 2: image must be the name of a picture or a list",
    '{"question_id": 2, "text": "<image> x"}': "one <image> for each of the 0 pictures, or none, got 1",
    '{"question_id": 2, "text": "<image> x", "image": ["a", "b"]}': "of the 2 pictures, or none, got 1",
    '{"question_id": 1, "text": "what?"}': "question_id must be that of no other question",
}  # fmt: skip


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(ONE) + "\n" + line + "\n")
    with pytest.raises(ValueError) as error:
        read_questions(path)
    assert BAD_LINES[line] in str(error.value) and "\n" not in str(error.value)
    assert [question.id for question in read_questions(path, 1)] == [1]


def test_a_list_and_other_bytes(tmp_path):
    path = tmp_path / "q.json"
    path.write_text(json.dumps([ONE, {**ONE, "question_id": "1"}]))
    assert [question.id for question in read_questions(path)] == [1, "1"]
    refused = {"{}": "a list of questions, got dict", "[": "must be JSON"}
    refused |= {"[3]": "question 1: must be an object", "[]": "at least one question"}
    for text, told in refused.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=told):
            read_questions(path)
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'{"question_id": 1, "text": "x"}\n{"question_id": 2, "text": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2: must be text in UTF-8"):
        read_questions(path)


def test_missing_pictures_are_named_before_a_model_is_loaded(checkpoint, images, tmp_path, capsys):
    (checkpoint / "model.safetensors").write_text("not read")
    values = asked(9)
    (tmp_path / "secret.png").write_bytes((images / "red.png").read_bytes())
    for number, name in enumerate(("none.png", "../secret.png", "no.png", "nothing.png"), 5):
        values[number]["image"] = name
    questions = write(tmp_path / "q.jsonl", values)
    code, _, err = run(capsys, *command(checkpoint, questions, images, tmp_path / "a"))
    assert code == 1 and len(err.splitlines()) == 1
    assert "line 6: image 'none.png' does not exist under" in err and err.endswith("; and 1 more\n")
    assert "line 7: image '../secret.png' must lie under" in err
    code, _, err = run(capsys, checkpoint, "--questions", questions, "--out", tmp_path / "a")
    assert code == 1 and "images must be given: " in err and "names the picture 'green.png'" in err
    assert not (tmp_path / "a").exists()
    code, _, err = run(capsys, *command(checkpoint, questions, images, questions))
    assert code == 1 and "out must be another file than the questions" in err


def test_the_words_of_several_processes_are_those_of_one(talker_folder, questions, images, tmp_path):
    from cumo_model.__main__ import _words
    from cumo_model.checks import check
    from cumo_model.command_line import parsed

    words = command(talker_folder, questions, images, tmp_path / "a", "--load-8bit", "--images", images)
    args = parsed(["answer", *map(str, words), "--system=-x-", "--temperature", "0.5"])
    check(args)
    again = parsed(_words(vars(args)))
    check(again)
    assert {**vars(again), "folder": None} == {**vars(args), "folder": None}
