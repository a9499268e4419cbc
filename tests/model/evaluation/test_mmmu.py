"""MMMU: both layouts, letters and open answers, and the official guesses."""

import json
import random

import pytest

from cumo_model.evaluation.scorers.mmmu import candidates, is_open_right, letter_of, normalised
from cumo_model.evaluation.tasks.mmmu import DISCIPLINES, Mmmu
from cumo_model.serving.questions import pictures_of_questions
from tests.model.evaluation.choice_data import (
    HOSTILE,
    mmmu_record,
    save_png,
    write_mmmu_json,
    write_mmmu_parquet,
)

OPTIONS = ("a red cat", "dog", "cow")


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"),
        ("B.", "B"),
        ("'B'", "B"),
        (".;B", "B"),  # each mark is taken off once, in the official order
        ("(A) or rather (C)", "C"),  # the last one in brackets
        ("(A), not B", "A"),  # brackets go before bare letters
        ("A is wrong, B is right", "B"),
        ("A\nB", ""),  # a letter beside a line break does not count
        ("It is A) I think", ""),
        ("it must be the DOG in the middle", "B"),
        ("a dog, and beside it a cow", "C"),  # the text that stands last
        ("the dog, a cow", ""),  # five words at most are not searched
        ("D", ""),
        ("b", ""),
    ],
)
def test_the_letter_of_an_answer(answer, letter):
    assert letter_of(answer, OPTIONS) == letter


def test_hostile_answers_have_no_letter():
    found = {answer: letter_of(answer, OPTIONS) for answer in HOSTILE}
    assert found.pop("A B") == "B"
    assert set(found.values()) == {""}


def test_normal_forms():
    assert normalised(" 1,234.567 ") == [1234.57]
    assert normalised("٣") == normalised("３") == [3.0]
    assert normalised("1_0") == [10.0]
    assert normalised("X") == [" x", "x "]
    assert normalised("The End") == ["the end"]


def test_what_an_open_answer_may_mean():
    assert candidates("The area is 12.5 cm.") == ["12.5 cm", 12.5]
    # of a line the shortest rest behind a key counts, and "=" in the last line only
    assert candidates("so x = 3\nThe answer is y = 4") == ["x = 3", 4.0, 3.0]
    assert candidates("x = 3\ny = 4") == [4.0]
    # the official patterns also find the ends of numbers with commas or exponents
    numbers = [1234.0, 5000.0, 234.0, 3.0, -2.0]
    assert candidates("1,234 of 5e3 and -2") == ["1,234 of 5e3 and -2", *numbers]


@pytest.mark.parametrize(
    "answer, reference, right",
    [
        ("12.97", "12.97", True),
        ("about 12.974 mol", "12.97", True),  # rounded to two decimals
        ("12.98", "12.97", False),
        ("It is Tampa, in the south", ["Tampa", "Florida"], True),
        ("Orlando", ["Tampa", "Florida"], False),
        ("3.429", ["24/7", "3.429"], True),
        ("1,000", "1000", True),
        ("C", "C", True),
        ("Carbon", "C", False),  # one character must stand beside a space
        ("vitamin C", "C", True),
        ("11", "1", False),
        ("it is 1\nor 2", "2", False),  # only the line with a key counts
        ("", "Tampa", False),
    ],
)
def test_open_answers(answer, reference, right):
    assert is_open_right(answer, reference) is right


def test_hostile_open_answers_are_wrong():
    assert not any(is_open_right(answer, "Tampa") for answer in HOSTILE)
    assert is_open_right("٣", "3") and is_open_right("9" * 10_000, "1e999")


def write(folder, records, official=None):
    write_mmmu_json(folder, records)
    if official is not None:
        (folder / "eval").mkdir()
        (folder / "eval" / "answer_dict_val.json").write_text(json.dumps(official))
    return Mmmu().read(folder)


def test_the_prompt_is_that_of_cumo(tmp_path):
    data = write(
        tmp_path,
        [mmmu_record(1), mmmu_record(2, "Math", (), "3", "<image 1> How many?")],
    )
    first = "Which  is like <image 2>?\n(A) a cat\n(B) a dog\n(C) a cow\n\n"
    first += "Answer with the option's letter from the given choices directly"
    second = "How many?\nAnswer the question using a single word or phrase."
    assert [item.question.text for item in data.items] == [first, second]
    assert [item.question.images for item in data.items] == [("images/Art_1.png",), ("images/Math_2.png",)]
    pictures = pictures_of_questions([item.question for item in data.items], data.pictures)
    assert pictures.load("images/Math_2.png").size == (6, 4)
    assert data.more["source"] == "validation.json"


def test_scores_by_hand(tmp_path):
    records = [
        mmmu_record(1, "Art"),
        mmmu_record(2, "Art_Theory"),
        mmmu_record(3, "Math", (), "['$MgS$', 'MgS']", "What?"),
        mmmu_record(4, "Math", (), "5", "How many?"),
        mmmu_record(5, "Basic_Medical_Science"),
        mmmu_record(6, "Basic_Medical_Science"),
    ]
    data = write(tmp_path, records)
    rows = Mmmu().rows(data, ["B", "(A)", "It is MgS.", "6", "", ""])
    # the official draws: the first and second of a generator with seed 42, for these two answers
    draws = random.Random(42)
    guesses = [draws.choice("ABC") == "B" for _ in range(2)]
    assert [row.values["right"] for row in rows] == [True, False, True, False, *guesses]
    figures = Mmmu().figures(rows)
    right = 2 + sum(guesses)
    assert figures == {
        "accuracy, %": 100 * right / 6,
        "guessed letters, %": 100 * 2 / 6,
        "accuracy without guesses, %": 100 * 2 / 6,
        "accuracy of multiple choice, %": 100 * (1 + sum(guesses)) / 4,
        "accuracy of open, %": 50.0,
        "discipline: Art and Design": 50.0,
        "discipline: Science": 50.0,
        "discipline: Health and Medicine": 100 * sum(guesses) / 2,
        "category: Art": 100.0,
        "category: Art_Theory": 0.0,
        "category: Math": 50.0,
        "category: Basic_Medical_Science": 100 * sum(guesses) / 2,
    }
    assert Mmmu().rows(data, ["B", "(A)", "It is MgS.", "6", "", ""]) == rows


def test_the_official_references_are_used_where_they_are(tmp_path):
    kinds = {"question_type": "short-answer", "ground_truth": ["Tampa", "Florida"]}
    data = write(
        tmp_path,
        [mmmu_record(4, "Geography", (), "?", "Where?"), mmmu_record(1)],
        {"validation_Geography_4": kinds},
    )
    assert [item.reference["answer"] for item in data.items] == [["Tampa", "Florida"], "B"]
    assert data.more["source"] == "validation.json, references of answer_dict_val.json"


def test_without_references_there_are_no_scores(tmp_path):
    assert Mmmu().rows(write(tmp_path, [mmmu_record(1, answer="?")]), ["A"]) is None


def test_the_layout_of_the_hub(tmp_path):
    write_mmmu_parquet(tmp_path)
    data = Mmmu().read(tmp_path)
    assert [item.group for item in data.items] == sorted(DISCIPLINES)
    assert data.more["source"] == "parquet files of 30 subjects"
    pictures = pictures_of_questions([item.question for item in data.items], data.pictures)
    colour = pictures.load(data.items[7].question.images[0]).convert("RGB").getpixel((0, 0))
    assert colour == (0, 0, 255)
    figures = Mmmu().figures(Mmmu().rows(data, ["B"] * 15 + ["A"] * 15))
    assert figures["accuracy, %"] == 50.0
    assert len([name for name in figures if name.startswith("discipline: ")]) == 6


def test_incomplete_or_wrong_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"must hold validation.json or Accounting/validation-00000"):
        Mmmu().read(tmp_path)
    write_mmmu_parquet(tmp_path, ["Art", "Music"])
    with pytest.raises(
        ValueError, match=r"all 30 subjects, got none of Accounting, Agriculture, .* 25 more$"
    ):
        Mmmu().read(tmp_path)
    for subject in DISCIPLINES:
        save_png(tmp_path / subject / "validation-00000-of-00001.parquet", "red")
    with pytest.raises(ValueError, match=r"Accounting/validation-00000-of-00001.parquet must be a parquet"):
        Mmmu().read(tmp_path)


@pytest.mark.parametrize(
    "change, told",
    [
        (
            {"id": "validation_Alchemy_1"},
            "id must be like validation_Accounting_1, got 'validation_Alchemy_1'",
        ),
        ({"options": "list('ab')"}, "options must be a list of texts, or such a list as text"),
        ({"options": "[1, 2]"}, "options must be a list of texts"),
        ({"options": "[]"}, "options must be 1 to 26 texts, got 0"),
        ({"question": 3}, "question must be str, got 3"),
        ({"id": "validation_Art_1"}, "id must be that of no other question, got 'validation_Art_1'"),
    ],
)
def test_a_bad_question_is_named(tmp_path, change, told):
    write_mmmu_json(tmp_path, [mmmu_record(1), mmmu_record(2)])
    (tmp_path / "validation.json").write_text(json.dumps([mmmu_record(1), {**mmmu_record(2), **change}]))
    with pytest.raises(ValueError, match=rf"validation.json, question 2: {told}"):
        Mmmu().read(tmp_path)
