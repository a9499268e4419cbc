"""MM-Vet: both files of questions, grades of a judge, and the file for the official evaluator."""

import json

import pytest

from cumo_model.evaluation.judge import KEY, Judge
from cumo_model.evaluation.scorers.reviews import correctness_of
from cumo_model.evaluation.tasks.mmvet import MmVet
from cumo_model.serving.questions import pictures_of_questions
from tests.model.evaluation.choice_data import HOSTILE, write_lines, write_mmvet
from tests.model.evaluation.judge_server import judging, text_of

RECORDS = [
    ("What is x?", "-1<AND>-5", ["ocr", "math"]),
    ("Who is it?", "a cat<OR>a pet", ["rec"]),
    ("Where is it?", "left", ["rec", "spat"]),
]


@pytest.mark.parametrize(
    "review, score",
    [("0.5", 0.5), (" 1.0 since it is right", 1.0), ("0", 0.0), ("1.1", None), ("-0.1", None), ("nan", None)],
)
def test_the_grade_of_a_review(review, score):
    assert correctness_of(review) == score


def test_hostile_reviews_have_no_grade():
    assert [correctness_of(review) for review in HOSTILE] == [None] * len(HOSTILE)


def asked_of(data):
    return [(item.question.id, item.question.text, item.question.images) for item in data.items]


def test_the_official_file_or_that_of_llava(tmp_path):
    write_mmvet(tmp_path, RECORDS)
    data = MmVet().read(tmp_path)
    assert asked_of(data) == [(n, text, (f"v1_{n}.png",)) for n, (text, *_) in enumerate(RECORDS)]
    assert data.more["source"] == "mm-vet.json"
    pictures = pictures_of_questions([item.question for item in data.items], data.pictures)
    assert pictures.load("v1_2.png").size == (6, 4)
    asked = [{"question_id": n, "image": f"v1_{n}.png", "text": f"LLaVA: {n}?"} for n in (2, 0)]
    write_lines(tmp_path / "llava-mm-vet.jsonl", asked)
    data = MmVet().read(tmp_path)
    assert asked_of(data) == [(2, "LLaVA: 2?", ("v1_2.png",)), (0, "LLaVA: 0?", ("v1_0.png",))]
    assert data.more["source"] == "llava-mm-vet.jsonl"
    assert data.items[1].reference == {"answer": "-1 <AND> -5", "capabilities": ["ocr", "math"]}


def test_grades_by_hand(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, "any")
    write_mmvet(tmp_path, RECORDS)
    data = MmVet().read(tmp_path)
    grades = {"x = -1": "0.5", "a cat": "1.0", "right": "I cannot say"}

    def reply(request):
        return grades[text_of(request).rsplit("\nAnswer: ", 1)[1].removesuffix("\nGrade:")]

    with judging(reply) as server, Judge("m", tmp_path / "judge.jsonl", server.url) as judge:
        rows = MmVet().rows(data, list(grades), judge)
    assert MmVet().figures(rows) == {
        "score of the judge, %": 50.0,
        "replies without a grade, %": 100 / 3,
        "category: rec": 50.0,
        "category: ocr": 50.0,
        "category: spat": 0.0,
        "category: math": 50.0,
    }
    assert any("Reference: -1 <AND> -5\nAnswer: x = -1\n" in text_of(request) for request in server.asked)


def test_without_a_judge_or_references_there_are_no_scores(tmp_path):
    write_mmvet(tmp_path, RECORDS)
    assert MmVet().rows(MmVet().read(tmp_path), ["a"] * 3) is None
    (tmp_path / "mm-vet" / "mm-vet.json").unlink()
    write_lines(tmp_path / "llava-mm-vet.jsonl", [{"question_id": 0, "image": "v1_0.png", "text": "What?"}])
    data = MmVet().read(tmp_path)
    assert data.items[0].reference is None


def test_the_file_for_the_official_evaluator(tmp_path):
    write_mmvet(tmp_path, RECORDS)
    data = MmVet().read(tmp_path)
    path = MmVet().submission(data, ["x", "\ud800", "٣"], tmp_path / "run.1")
    assert path.name == "run.1.json"
    assert json.loads(path.read_text()) == {"v1_0": "x", "v1_1": "\ud800", "v1_2": "٣"}


def test_bad_files_are_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"must hold llava-mm-vet.jsonl or mm-vet/mm-vet.json or mm-vet.json"
    ):
        MmVet().read(tmp_path)
    write_mmvet(tmp_path, RECORDS)
    write_lines(tmp_path / "llava-mm-vet.jsonl", [{"question_id": 9, "image": "v1_0.png", "text": "What?"}])
    with pytest.raises(ValueError, match=r"mm-vet.json must have v1_9, a question of llava-mm-vet.jsonl$"):
        MmVet().read(tmp_path)
    write_lines(tmp_path / "llava-mm-vet.jsonl", [{"question_id": "a", "image": "v1_0.png", "text": "What?"}])
    with pytest.raises(ValueError, match=r"line 1: question_id must be an int of its own, got 'a'$"):
        MmVet().read(tmp_path)
    (tmp_path / "llava-mm-vet.jsonl").unlink()
    (tmp_path / "mm-vet" / "mm-vet.json").write_text('{"v2_0": {}}')
    with pytest.raises(ValueError, match=r"mm-vet.json: names must be like v1_0, got 'v2_0'$"):
        MmVet().read(tmp_path)
    (tmp_path / "mm-vet" / "mm-vet.json").write_text('{"v1_0": 3}')
    with pytest.raises(ValueError, match=r"v1_0: must be an object, got int$"):
        MmVet().read(tmp_path)
