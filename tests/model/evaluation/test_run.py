"""Running benchmarks: answers, figures, limits, and what goes on when something fails."""

import json
from types import SimpleNamespace

import pytest

from cumo_model.evaluation.run import earlier, evaluate, given_answers, limited, read, read_scores
from cumo_model.evaluation.task import Data, Item
from cumo_model.serving.local import Local, load
from cumo_model.serving.messages import user_message
from cumo_model.serving.questions import Question
from cumo_model.serving.sampling import Sampling
from tests.model.conftest import tiny_config
from tests.model.evaluation.toy import Colours, Elsewhere, Judged, write_colours
from tests.model.serving.conftest import write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    make = tiny_config.__wrapped__() if hasattr(tiny_config, "__wrapped__") else tiny_config
    return write_checkpoint(tmp_path_factory.mktemp("talker") / "model", make, positions=512, std=0.3)


@pytest.fixture(scope="module")
def engine(folder):
    return Local(*load(folder), name="talker")


@pytest.fixture
def data(tmp_path):
    return write_colours(tmp_path / "data")


class Words:
    """A judge that always says the same words."""

    model = "words"
    __call__ = lambda self, text: "what is it a red apple two"


class Absent(Colours):
    name, title, folders = "absent", "Absent", ("nowhere", "nothing")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_answers_are_asked_scored_and_kept(engine, data, tmp_path):
    out, told, task = tmp_path / "out", [], Colours()
    path = data / "colours" / "questions.json"
    values = json.loads(path.read_text())
    for value in values[::3]:  # words that the model says
        picture = str(data / "colours" / "images" / value["image"])
        reply = engine.stream([user_message(value["text"], [picture])], Sampling(6)).read()
        value["word"] = reply.text.split()[0]
    path.write_text(json.dumps(values))
    (outcome,) = evaluate(engine, [task], data, out, batch_size=1, each=told.append)
    assert told == [outcome] and not outcome.error and not outcome.note
    answers = [json.loads(line) for line in (out / "colours" / "answers.jsonl").read_text().splitlines()]
    said = []
    for value, answer in zip(values, answers, strict=True):
        picture = str(data / "colours" / "images" / value["image"])
        said.append(engine.stream([user_message(value["text"], [picture])], Sampling(6)).read().text)
        assert answer["text"] == said[-1] and answer["model_id"] == "talker"
    right = [value["word"] in text.split() for value, text in zip(values, said, strict=True)]
    assert outcome.score == 100 * sum(right) / 6 > 0 and (outcome.questions, outcome.of) == (12, 12)
    assert outcome.submission.read_text() == "\n".join(said)
    scores = read_scores(out / "colours" / "scores.json")
    assert (scores.task, scores.model) == ("colours", "talker")
    assert [row.values["right"] for row in scores.rows] == [
        a + b for a, b in zip(right[::2], right[1::2], strict=True)
    ]
    assert [row.group for row in scores.rows] == ["r", "g", "b"] * 2
    kept = json.loads((out / "colours" / "scores.json").read_text())
    assert kept["figures"]["words per picture"] == outcome.score and kept["source"] == "questions.json"
    before = contents(out)
    assert evaluate(engine, [task], data, out, batch_size=1, progress=False) == [outcome]
    assert contents(out) == before


def test_what_fails_is_named_and_the_other_benchmarks_go_on(engine, data, tmp_path):
    found = evaluate(engine, [Absent(), Colours()], data, tmp_path / "out")
    assert found[0].error == f"{data} has no folder nowhere or nothing, so the data of Absent are absent"
    assert found[1].score is not None
    image = data / "colours" / "images" / "green1.png"
    image.write_bytes(image.read_bytes()[:60])
    broken, fine = evaluate(engine, [Colours(), Elsewhere()], data, tmp_path / "new")
    assert broken.score is None and fine.score is None
    assert broken.error.startswith("2 of 12 questions have no answer, such as 2: image")
    assert read_scores(tmp_path / "out" / "colours" / "scores.json").rows
    image.unlink()
    evaluate(engine, [Colours()], data, tmp_path / "out")
    assert not (tmp_path / "out" / "colours" / "scores.json").exists()  # not those of before
    (gone,) = evaluate(engine, [Colours()], data, tmp_path / "third")
    assert "question 3: image 'green1.png' does not exist" in gone.error
    (data / "colours" / "questions.json").write_text("[]")
    assert "must hold at least one question" in evaluate(engine, [Colours()], data, tmp_path / "out")[0].error
    (data / "colours" / "questions.json").write_text("{}")
    assert "must hold a list, got dict" in evaluate(engine, [Colours()], data, tmp_path / "out")[0].error


def test_a_second_question_with_the_same_id_and_text_is_refused(data):
    path = data / "colours" / "questions.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps([*values, values[0]]))
    with pytest.raises(ValueError, match="question 13: the question 0 is also at question 1"):
        read(Colours(), data)


def test_without_a_judge_or_references_there_are_answers_and_no_score(engine, data, tmp_path):
    judged, elsewhere = evaluate(engine, [Judged(), Elsewhere()], data, tmp_path)
    assert (judged.figures, judged.note, judged.error) == (None, "needs a judge", "")
    assert (elsewhere.figures, elsewhere.note) == (None, "scored by example.org")
    for outcome in (judged, elsewhere):
        name = outcome.task.name
        assert (tmp_path / name / "answers.jsonl").is_file() and outcome.submission.is_file()
        assert not (tmp_path / name / "scores.json").exists()
    (again,) = evaluate(engine, [Judged()], data, tmp_path, judge=Words())
    assert again.score > 0 and read_scores(tmp_path / "judged" / "scores.json").judge == "words"


def test_an_engine_that_cannot_be_made_ends_the_run(data, tmp_path):
    calls = []

    def make():
        calls.append(1)
        raise ValueError("no such checkpoint")

    with pytest.raises(ValueError, match="no such checkpoint"):
        evaluate(make, [Colours(), Elsewhere()], data, tmp_path, settings={}, model_id="m")
    assert len(calls) == 1


def test_a_limit_keeps_units_whole_and_spreads_them(engine, data, tmp_path):
    whole = read(Colours(), data)
    some = limited(whole, 3)
    assert [item.question.id for item in some.items] == [0, 1, 4, 5, 8, 9]
    assert limited(whole, 6) is whole and limited(whole, 99) is whole and limited(whole, None) is whole
    alone = Data([Item(Question(number, "q")) for number in range(10)], None)
    assert [item.question.id for item in limited(alone, 4).items] == [0, 2, 5, 7]
    (outcome,) = evaluate(engine, [Colours()], data, tmp_path, limit=3)
    assert (outcome.questions, outcome.of, outcome.note) == (6, 12, "a part of the questions")
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        evaluate(engine, [Colours()], data, tmp_path, limit=0)


def test_other_settings_are_not_mixed_into_a_run(engine, data, tmp_path):
    evaluate(engine, [Colours()], data, tmp_path, settings={"model": "a"})
    (other,) = evaluate(engine, [Colours()], data, tmp_path, settings={"model": "b"})
    assert "exists already, with answers to other questions or with other settings" in other.error


def write(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_given_answers_are_those_of_their_questions(data, tmp_path):
    questions = [Question(1, "who?"), Question("2", "what?"), Question(1, "where?")]
    path = write(
        tmp_path / "a.jsonl",
        {"question_id": 2, "text": "b"},
        {"question_id": "1", "prompt": "<image>\nwhere?", "text": "c"},
        {"question_id": 7, "text": "of another benchmark"},
        {"question_id": 1, "prompt": "who?", "text": ""},
        {"question_id": 1, "prompt": "why?", "text": "of another question"},
    )
    assert given_answers(path, questions) == ["", "b", "c"]
    assert given_answers(path, questions[2:]) == ["c"]
    # answers of LLaVA's scripts lack the last line of some prompts
    begun = [Question(1, "where?\nAnswer with a word."), Question(1, "who?\nAnswer with a word.")]
    assert given_answers(path, begun) == ["c", ""]
    with pytest.raises(ValueError, match="answers to 0 of 1 questions"):
        given_answers(path, [Question(1, "what is it?")])
    with pytest.raises(ValueError, match="has answers to 3 of 4 questions; the first without one is 'x'"):
        given_answers(path, [*questions, Question("x", "why?")])
    write(path, {"question_id": 2, "text": "b"}, {"question_id": "2", "text": "c"})
    with pytest.raises(ValueError, match="line 2: the question '2' has two answers"):
        given_answers(path, questions)
    for bad in ({"question_id": 1}, {"text": "a"}, {"question_id": 1, "text": 3}):
        with pytest.raises(ValueError, match="line 1: must have question_id, and text"):
            given_answers(write(path, bad), questions)
    (outcome,) = evaluate(None, [Colours()], data, tmp_path / "out", answers=path)
    assert "line 1: must have question_id" in outcome.error


def test_a_file_of_answers_is_scored_without_a_model(engine, data, tmp_path):
    (asked,) = evaluate(engine, [Colours()], data, tmp_path / "asked")
    file = tmp_path / "asked" / "colours" / "answers.jsonl"
    (scored,) = evaluate(None, [Colours()], data, tmp_path / "scored", answers=file)
    assert (
        scored.figures == asked.figures and not (tmp_path / "scored" / "colours" / "answers.jsonl").exists()
    )
    with pytest.raises(ValueError, match="answers must be those of one benchmark, got 2"):
        evaluate(None, [Colours(), Judged()], data, tmp_path, answers=file)
    with pytest.raises(ValueError, match=r"data must be a folder, got .*, which does not exist"):
        evaluate(None, [Colours()], data / "no", tmp_path, answers=file)


def test_damaged_scores_are_named(tmp_path):
    for text in ("[]", "{}", '{"rows": [1], "task": "a", "model": "b", "source": "", "judge": ""}', "x"):
        (tmp_path / "scores.json").write_text(text)
        with pytest.raises(ValueError, match=r"scores\.json must"):
            read_scores(tmp_path / "scores.json")


def test_what_is_no_number_is_kept_as_null(engine, data, tmp_path):
    class Undefined(Colours):
        figures = lambda self, rows: {"precision": float("nan")}

    evaluate(engine, [Undefined()], data, tmp_path)
    text = (tmp_path / "colours" / "scores.json").read_text()
    assert json.loads(text, parse_constant=lambda name: SimpleNamespace())["figures"] == {"precision": None}


def test_a_submission_that_cannot_be_written_leaves_the_scores(engine, data, tmp_path):
    class NoSheet(Colours):
        def submission(self, data, answers, path):
            raise ValueError("needs the package openpyxl")

    (outcome,) = evaluate(engine, [NoSheet()], data, tmp_path)
    assert outcome.error == "needs the package openpyxl" and outcome.score is not None
    assert (tmp_path / "colours" / "scores.json").is_file()


def test_scores_of_an_earlier_run_of_the_same_model_are_found(engine, data, tmp_path):
    task = Colours()
    (outcome,) = evaluate(engine, [task], data, tmp_path)
    found = earlier(task, tmp_path, "talker")
    assert (found.figures, found.questions, found.of) == (outcome.figures, 12, 12)
    assert earlier(task, tmp_path, "another") is None and earlier(Judged(), tmp_path, "talker") is None
