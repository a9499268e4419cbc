"""MMBench: official tables, letters in answers, circular evaluation, and the sheet for the server."""

import pytest

from cumo_model.evaluation.scorers.circular import is_right_in_all, letter_of
from cumo_model.evaluation.tasks.mmbench import MmBench, MmBenchCn, is_missing
from cumo_model.serving.questions import pictures_of_questions
from tests.model.evaluation.choice_data import HOSTILE, circle, mmbench_row, write_mmbench

FILE = "mmbench_dev_20230712.tsv"
CHOICES = {"A": "red fox", "B": "dog", "C": "cow", "D": "hot dog"}


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"),
        ("B.", "B"),
        ("(C)", "C"),
        ("The answer is D", "D"),
        ("A", "A"),
        ("A fox", "A"),
        ("A large cow is here", "C"),  # "A" in a long answer can be the article
        ("A big one is there", ""),
        ("B or C", ""),
        ("B. or (C)", "B"),  # "X." is looked for before "(X)"
        ("E", "E"),
        ("It is the RED FOX", "A"),
        ("a hot dog", ""),  # the text of two choices
        ("B\nA", ""),
        ("b", ""),
        (":C", "C"),
    ],
)
def test_the_letter_of_an_answer(answer, letter):
    assert letter_of(answer, CHOICES) == letter


def test_hostile_answers_have_no_letter():
    assert {answer: letter_of(answer, CHOICES) for answer in HOSTILE} == dict.fromkeys(HOSTILE, "")


def test_a_circle_is_right_where_all_orders_are():
    assert is_right_in_all(["A", "B"], ["A", "B"])
    assert not is_right_in_all(["A", "B"], ["A", "C"])
    assert not is_right_in_all(["A", ""], ["A", "B"])


def read(folder, rows, task=None, name=FILE, **options):
    write_mmbench(folder / name, rows, **options)
    return (task or MmBench()).read(folder)


def test_the_prompt_is_that_of_cumo(tmp_path):
    rows = [
        mmbench_row(5, ["a", "b", "None", "d"], "A", hint="Look."),
        mmbench_row(6, ["a", "b"], "B", "blue"),
    ]
    data = read(tmp_path, rows)
    # CuMo's script drops a choice "None" and those behind it
    end = "Answer with the option's letter from the given choices directly."
    texts = [f"Look.\nWhat is it?\nA. a\nB. b\n{end}", f"What is it?\nA. a\nB. b\n{end}"]
    assert [item.question.text for item in data.items] == texts
    pictures = pictures_of_questions([item.question for item in data.items], data.pictures)
    assert pictures.load("6").convert("RGB").getpixel((0, 0)) == (0, 0, 255)
    chinese = read(tmp_path, rows, MmBenchCn(), "mmbench_dev_cn_20231003.tsv")
    assert chinese.items[1].question.text == "What is it?\nA. a\nB. b\n请直接回答选项字母。"
    assert chinese.more["source"] == "mmbench_dev_cn_20231003.tsv"


def test_circular_scores_by_hand(tmp_path):
    first = circle(1, ["cat", "cow", "pig"], "cow", category="animal", **{"l2-category": "FP"})
    second = circle(2, ["one", "two"], "one", category="number", **{"l2-category": "AR"})
    third = circle(3, ["x", "y"], "y", category="animal", **{"l2-category": "AR"})
    # rows of a circle need not be beside each other
    data = read(tmp_path, [*first[:1], *second, *third, *first[1:]])
    right = {item.question.id: item.reference["answer"] for item in data.items}
    said = dict(right)
    said[1_000_002] = "a word that is no choice"  # one order of the second question
    said[3], said[1_000_003] = "A", "y"  # the third in its first order; the other by its text
    rows = MmBench().rows(data, [said[item.question.id] for item in data.items])
    assert [(row.unit, row.values["right"]) for row in rows] == [("1", True), ("2", False), ("3", False)]
    figures = MmBench().figures(rows)
    assert next(iter(figures)) == MmBench.metric
    assert figures == {
        "circular accuracy, %": 100 / 3,
        "accuracy in the first order, %": 200 / 3,
        "answers without a letter, %": 100 / 7,
        "ability: FP": 100.0,
        "ability: AR": 0.0,
        "category: animal": 50.0,
        "category: number": 0.0,
    }


def test_a_circle_with_a_missing_answer_is_not_right(tmp_path):
    data = read(tmp_path, circle(1, ["cat", "cow"], "cow"))
    less = type(data)(data.items[:1], data.pictures, data.more)
    (row,) = MmBench().rows(less, ["B"])
    assert row.values["plain"] and not row.values["right"]


def test_without_circles_the_figure_says_so(tmp_path):
    data = read(tmp_path, [mmbench_row(1, ["a", "b"], "A"), mmbench_row(2, ["a", "b"], "B")])
    figures = MmBench().figures(MmBench().rows(data, ["A", "A"]))
    assert list(figures.items())[:2] == [
        ("accuracy without circles, %", 50.0),
        ("answers without a letter, %", 0.0),
    ]


def test_a_picture_may_be_that_of_another_row(tmp_path):
    rows = [mmbench_row(7, ["a", "b"], "A", "blue"), mmbench_row(1_000_007, ["b", "a"], "B", image="7")]
    data = read(tmp_path, rows)
    assert [item.question.images for item in data.items] == [("7",), ("7",)]
    assert data.pictures.load("7").size == (6, 4)


def test_the_sheet_is_that_of_the_converter(tmp_path):
    import openpyxl

    rows = [mmbench_row(4, ["a", "b"], "B", comment="c"), mmbench_row(5, ["a", "=b", "c", "d"], "B")]
    data = read(tmp_path, rows)
    hostile = "=1+1 \x00 \ud800 <s>"
    path = MmBench().submission(data, [hostile, "B"], tmp_path / "run.1")
    assert path == tmp_path / "run.1.xlsx"
    sheet = openpyxl.load_workbook(path).active
    assert [[cell.value for cell in row] for row in sheet.rows] == [
        ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"],
        [4, "What is it?", "a", "b", None, None, "=1+1 \ufffd \ufffd <s>", "B", "dev"],
        [5, "What is it?", "a", "=b", "c", "d", "B", "B", "dev"],
    ]
    assert sheet.cell(2, 7).data_type == "s"
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE, "run.1.xlsx"]


def test_a_row_that_was_not_asked_has_no_prediction(tmp_path):
    import openpyxl

    data = read(tmp_path, [mmbench_row(4, ["a", "b"], "B"), mmbench_row(5, ["a", "b"], "B")])
    less = type(data)(data.items[1:], data.pictures, data.more)
    sheet = openpyxl.load_workbook(MmBench().submission(less, ["B"], tmp_path / "run")).active
    assert [row[6].value for row in sheet.rows] == ["prediction", None, "B"]
    with pytest.raises(ValueError, match=r"row 3: a cell must have at most 32767 characters, got 40000$"):
        MmBench().submission(less, ["x" * 40_000], tmp_path / "run")


def test_a_test_set_has_no_scores(tmp_path):
    columns = [name for name in mmbench_row(1, ["a", "b"], "") if name != "answer"]
    data = read(tmp_path, [mmbench_row(1, ["a", "b"], "")], name="mmbench_test_20230712.tsv", columns=columns)
    assert MmBench().rows(data, ["A"]) is None


def test_what_pandas_takes_for_missing():
    assert all(map(is_missing, ["", "nan", "NaN", "None", "none", "NA", "N/A", "null"]))
    assert not any(map(is_missing, ["None of them", "0", "no", "na"]))


@pytest.mark.parametrize(
    "row, told",
    [
        (mmbench_row("x", ["a", "b"], "A"), r"row 3: index must be an integer, got 'x'$"),
        (mmbench_row(1, ["a", "b"], "A"), r"row 3: index must be that of no other row, got 1, as in row 2$"),
        (mmbench_row(2, ["a"], "A"), r"row 3: must have the choices A and B, got 1$"),
        (mmbench_row(2, ["a", "b"], "C"), r"row 3: answer must be one of A, B, got 'C'$"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, told):
    with pytest.raises(ValueError, match=told):
        read(tmp_path, [mmbench_row(1, ["a", "b"], "A"), row])


def test_a_missing_file_or_picture_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"must hold mmbench_dev_20230712.tsv or "):
        MmBench().read(tmp_path)
    with pytest.raises(ValueError, match="at least one row"):
        read(tmp_path, [])
    data = read(tmp_path, [mmbench_row(1, ["a", "b"], "A", image="9")])
    with pytest.raises(ValueError, match=r"row 2: image '9' does not exist$"):
        pictures_of_questions([item.question for item in data.items], data.pictures)
