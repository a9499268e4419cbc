"""MathVista: values by rules or by a judge, their normal forms, and both layouts."""

import json
import random

import pytest

from cumo_model.evaluation.judge import KEY, Judge
from cumo_model.evaluation.scorers.mathvista import by_rules, edit_distance, is_right, normalised
from cumo_model.evaluation.tasks.mathvista import MathVista
from cumo_model.serving.questions import pictures_of_questions
from tests.model.evaluation.choice_data import (
    HOSTILE,
    mathvista_problem,
    multiple,
    write_mathvista,
    write_mathvista_parquet,
)
from tests.model.evaluation.judge_server import judging, text_of

CHOICES = ["red", "blue", "dark blue"]


@pytest.mark.parametrize(
    "answer, kind, value",
    [
        ("", ("free_form", "integer"), ""),
        (" 14 ", ("free_form", "integer"), "14"),
        ("14.0", ("free_form", "integer"), None),
        ("٣", ("free_form", "integer"), "3"),
        ("14 apples", ("free_form", "integer"), None),
        ("1.50", ("free_form", "float"), "1.5"),
        ("$1.50", ("free_form", "float"), None),
        ("[1, 2]", ("free_form", "list"), None),
        ("blue", ("multi_choice", "text"), "blue"),
        ("Blue", ("multi_choice", "text"), None),
        ("(B)", ("multi_choice", "text"), "B"),
        ("B.", ("multi_choice", "text"), "B"),
        ("D", ("multi_choice", "text"), None),
        ("B or C", ("multi_choice", "text"), None),
    ],
)
def test_values_by_rules(answer, kind, value):
    assert by_rules(answer, *kind, CHOICES) == value


@pytest.mark.parametrize(
    "value, form",
    [
        ("B", "blue"),
        ("(c) dark blue", "dark blue"),
        ("(Z)", "red"),  # no choice has this letter: the nearest text
        ("the blue", "blue"),
        ("", "red"),  # the shortest
        ("dark bluee", "dark blue"),
    ],
)
def test_normal_forms_of_choices(value, form):
    assert normalised(value, "multi_choice", "text", CHOICES) == form


def test_choices_that_are_letters_in_brackets():
    choices = ["(c)", "(a)", "(e)", "(d)", "(b)"]  # as in problem 168
    value = by_rules("(b)", "multi_choice", "text", choices)
    assert value == "(b)" and normalised(value, "multi_choice", "text", choices) == "(a)"


def test_normal_forms_of_numbers():
    number = lambda value, kind, precision=None: normalised(value, "free_form", kind, (), precision)
    assert number("2.9", "integer") == "2"
    assert number("-2.9", "integer") == "-2"
    assert [number(value, "integer") for value in ("two", "nan", "1e999", "")] == [None] * 4
    assert number("1.456", "float", 2) == number("1.456", "float", 2.0) == "1.46"
    assert number("3", "float", 1) == "3.0"
    assert [number(value, "float", 1) for value in ("", "x", "1,5")] == [None] * 3
    assert number("[1, 2]", "list") == "[1, 2]"
    assert is_right("1.456", "1.46", "free_form", "float", (), 2)
    assert not is_right("[1,2]", "[1, 2]", "free_form", "list")  # character by character


def test_edit_distance():
    assert edit_distance("kitten", "sitting") == edit_distance("sitting", "kitten") == 3
    assert edit_distance("", "abc") == 3 and edit_distance("abc", "abc") == 0
    words, draws = [], random.Random(1)
    for _ in range(40):
        words.append("".join(draws.choice("ab") for _ in range(draws.randrange(6))))
    for a, b, c in zip(words, words[1:], words[2:], strict=False):
        assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
        assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))


def test_hostile_answers():
    for answer in HOSTILE:
        for kind in (("free_form", "integer"), ("free_form", "float"), ("free_form", "list")):
            assert by_rules(answer, *kind) in (None, "", "3", "3.0")
            assert not is_right(answer, "4", *kind, (), 1)
        assert by_rules(answer, "multi_choice", "text", CHOICES) in (None, "")
        assert normalised(answer, "multi_choice", "text", CHOICES) in CHOICES


def problems():
    return [
        mathvista_problem(1, answer="3"),
        mathvista_problem(2, "float", "1.5", precision=1, unit="cm"),
        multiple(
            3, CHOICES, "blue", metadata={"task": "geometry", "skills": ["geometry", "arithmetic reasoning"]}
        ),
        mathvista_problem(4, "list", "[1, 2]"),
    ]


def test_cumo_asks_the_bare_question(tmp_path):
    write_mathvista(tmp_path, problems())
    data = MathVista().read(tmp_path)
    assert [item.question.text for item in data.items] == [f"How many in picture {n}?" for n in range(1, 5)]
    assert data.more["source"] == "testmini.json"
    pictures = pictures_of_questions([item.question for item in data.items], data.pictures)
    assert pictures.load("images/3.jpg").size == (6, 4)


@pytest.fixture
def judge_of(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, "any")
    return lambda server: Judge("m", tmp_path / "judge.jsonl", server.url)


def test_scores_by_hand_with_a_judge(tmp_path, judge_of):
    write_mathvista(tmp_path, problems())
    data = MathVista().read(tmp_path)
    answers = ["3", "It is 1.52 cm", "The dark one, I think", "from 1 to 2"]

    def reply(request):
        said = text_of(request).rsplit("\nReply: ", 1)[1].removesuffix("\nFinal answer:")
        return {answers[1]: " 1.52 ", answers[2]: "C", answers[3]: "[1, 2]"}[said]

    assert MathVista().rows(data, answers) is None  # a judge is needed
    with judging(reply) as server, judge_of(server) as judge:
        rows = MathVista().rows(data, answers, judge)
    assert [row.values["right"] for row in rows] == [True, True, False, True]
    assert [row.values["judged"] for row in rows] == [False, True, True, True]
    assert json.loads(json.dumps(rows[1].values)) == rows[1].values
    assert MathVista().figures(rows) == {
        "accuracy, %": 75.0,
        "values extracted by the judge, %": 75.0,
        "category: math word problem": 100.0,
        "category: geometry": 0.0,
        "skill: arithmetic reasoning": 75.0,
        "skill: geometry": 0.0,
    }
    asked = {text_of(request).split("\n\n")[-1] for request in server.asked}
    assert any(
        "\nQuestion: How many in picture 2? (Unit: cm)\nReply: It is 1.52 cm" in text for text in asked
    )
    assert any("\nChoices:\n(A) red\n(B) blue\n(C) dark blue\nReply: The dark" in text for text in asked)


def test_rules_alone_where_they_suffice(tmp_path):
    write_mathvista(tmp_path, problems()[:3], below=".")
    data = MathVista().read(tmp_path)
    rows = MathVista().rows(data, ["4", "1.49", "(B)"])
    assert [row.values["right"] for row in rows] == [False, True, True]
    assert MathVista().figures(rows)["values extracted by the judge, %"] == 0.0


def test_the_official_query_goes_to_the_judge(tmp_path, judge_of):
    write_mathvista(tmp_path, problems()[:1])
    (tmp_path / "data" / "query.json").write_text(json.dumps({"1": "the official text"}))
    data = MathVista().read(tmp_path)
    assert data.more["source"] == "testmini.json, query.json"
    with judging(lambda request: "3") as server, judge_of(server) as judge:
        (row,) = MathVista().rows(data, ["three"], judge)
    assert row.values["right"] and "\nthe official text\nReply: three\n" in text_of(server.asked[0])


def test_the_parquet_of_the_hub(tmp_path):
    write_mathvista_parquet(tmp_path, problems()[:3])
    data = MathVista().read(tmp_path)
    assert data.items[1].reference["precision"] == 1.0
    pictures = pictures_of_questions([item.question for item in data.items], data.pictures)
    assert pictures.load(data.items[0].question.images[0]).convert("RGB").getpixel((0, 0)) == (0, 128, 0)
    rows = MathVista().rows(data, ["3", "1.5", "blue"])
    assert all(row.values["right"] for row in rows)


def test_the_test_set_has_no_scores(tmp_path):
    write_mathvista(tmp_path, [mathvista_problem(1, answer="")])
    assert MathVista().rows(MathVista().read(tmp_path), ["3"]) is None


@pytest.mark.parametrize(
    "change, told",
    [
        ({"question_type": "riddle"}, "question_type must be multi_choice or free_form, got 'riddle'"),
        ({"answer_type": "word"}, "answer_type must be one of "),
        ({"question_type": "multi_choice"}, "choices must be 1 to 26 texts, got 0"),
        ({"choices": "red"}, "choices must be a list of texts, got 'red'"),
        ({"answer_type": "float"}, "precision must be int or float, got None"),
        ({"answer_type": "float", "precision": 1.5}, "precision must be a number of decimals, got 1.5"),
        ({"answer": 3}, "answer must be str, got 3"),
        ({"metadata": "x"}, "metadata must be an object, got str"),
        ({"image": None}, "image must be str, got None"),
    ],
)
def test_a_bad_problem_is_named(tmp_path, change, told):
    write_mathvista(tmp_path, problems()[:1])
    bad = {"1": {**problems()[0], **change}}
    (tmp_path / "data" / "testmini.json").write_text(json.dumps(bad))
    with pytest.raises(ValueError, match=f"testmini.json, problem 1: {told}"):
        MathVista().read(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"must hold data/testmini.json or testmini.json or "):
        MathVista().read(tmp_path)
