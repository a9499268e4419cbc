"""Runs side by side: paired differences and their intervals."""

import json
import random
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cumo_model.evaluation import compare as comparing
from cumo_model.evaluation import paper, report
from cumo_model.evaluation.compare import BETTER, NOISE, WORSE, compare, difference
from cumo_model.evaluation.report import differences, markdown, number
from cumo_model.evaluation.run import Scores
from cumo_model.evaluation.task import Row
from tests.model.evaluation.toy import Colours

COLOURS = Colours()


class Lower(Colours):
    lower_is_better = True


class Median(Colours):
    """A figure that is no mean."""

    mean_of = ""
    figures = lambda self, rows: {"median": sorted(row.values["right"] for row in rows)[len(rows) // 2]}


def scores(values, first=0):
    rows = [Row(str(number), "", {"right": value}) for number, value in enumerate(values, first)]
    return Scores("colours", "m", "", "", rows)


def test_the_same_draws_are_made_for_both_runs():
    values = [random.Random(0).uniform(-9, 9) for _ in range(50)]
    found = difference(
        COLOURS, "b", scores([4 * v for v in range(50)]), scores([4 * v + 0.25 for v in range(50)])
    )
    assert (found.low, found.difference, found.high) == (25, 25, 25) and found.verdict == BETTER
    same = difference(COLOURS, "b", scores(values), scores(values))
    assert (same.low, same.difference, same.high) == (0, 0, 0) and same.verdict == NOISE


def test_noise_is_called_so_and_a_real_difference_is_not():
    generator = random.Random(1)
    first = [generator.random() < 0.5 for _ in range(400)]
    noise = [not right if generator.random() < 0.3 else right for right in first]
    found = difference(COLOURS, "b", scores(first), scores(noise))
    assert found.low < 0 < found.high and found.verdict == NOISE
    better = [right or generator.random() < 0.4 for right in first]
    assert difference(COLOURS, "b", scores(first), scores(better)).verdict == BETTER
    assert difference(COLOURS, "b", scores(better), scores(first)).verdict == WORSE
    assert difference(Lower(), "b", scores(first), scores(better)).verdict == WORSE


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_an_interval_lies_among_the_differences_of_questions(pairs):
    first, second = zip(*pairs, strict=True)
    found = difference(COLOURS, "b", scores(first), scores(second))
    each = [100 * (b - a) for a, b in pairs]
    assert min(each) <= found.low <= found.high <= max(each)


def test_a_mean_is_the_same_with_and_without_its_short_cut(monkeypatch):
    first, second = [1, 0, 1, 1, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 1, 1]  # multiples of 1/8: sums are exact
    short = difference(COLOURS, "b", scores(first), scores(second))
    monkeypatch.setattr(Colours, "mean_of", "")
    assert difference(COLOURS, "b", scores(first), scores(second)) == short
    assert comparing.headline(COLOURS, scores(first).rows) == 50


def test_a_figure_that_is_no_mean_and_questions_of_one_run_alone():
    found = difference(Median(), "b", scores([1, 2, 3, 4, 5]), scores([12, 13, 14, 15, 99], first=1))
    assert found.verdict == "too few questions" and found.draws == 4
    assert (found.first, found.score, found.units, found.only_one) == (4, 14, 4, 2)
    assert 7 <= found.low <= found.high <= 11
    with pytest.raises(ValueError, match="answered none of the questions"):
        difference(COLOURS, "b", scores([1]), scores([1], first=5))


def write_run(folder, values, name="colours", judge=""):
    (folder / name).mkdir(parents=True)
    rows = [
        {"unit": str(n), "group": "", "values": {"right": v}, "picture": ""} for n, v in enumerate(values)
    ]
    content = {"task": name, "model": folder.name, "source": "q.json", "judge": judge, "rows": rows}
    (folder / name / "scores.json").write_text(json.dumps(content))
    return folder


def test_runs_are_compared_with_the_first(tmp_path):
    tasks = {"colours": COLOURS, "other": Lower()}
    runs = [write_run(tmp_path / name, values) for name, values in
            (("a", [0, 1] * 50), ("b", [1, 1] * 50), ("c", [0, 1] * 50))]  # fmt: skip
    write_run(tmp_path / "b", [1], "other")
    found = compare(runs, tasks)
    assert [(one.run, one.verdict) for one in found] == [(str(runs[1]), BETTER), (str(runs[2]), NOISE)]
    assert found == compare(runs, tasks)  # the draws are the same each time
    text = markdown(*differences(found, str(runs[0])))
    assert f"| Colours | accuracy, % | {runs[1]} | 100.0 | 50.0 | +50.00 |" in text
    alone = write_run(tmp_path / "d", [1], "other")
    with pytest.raises(ValueError, match=r"has scores of other, and .* of colours: they have none in common"):
        compare([runs[0], alone], tasks)
    with pytest.raises(ValueError, match="has no scores"):
        compare([runs[0], tmp_path], tasks)
    with pytest.raises(ValueError, match="does not exist"):
        compare([runs[0], tmp_path / "no"], tasks)
    with pytest.raises(ValueError, match="at least two runs, got 1"):
        compare(runs[:1], tasks)


def test_numbers_of_a_table():
    assert [number(value) for value in (None, float("nan"), 1548.6, 0)] == ["-", "undefined", "1548.6", "0.0"]
    assert set(map(len, paper.TABLE.values())) == {len(paper.MODELS)} and len(paper.TABLE) == 13


def test_questions_about_one_picture_are_drawn_together():
    """Forty questions about twenty pictures are as few draws as twenty questions with the same answers."""
    values = [number % 3 == 0 for number in range(25)]

    def of(values, times):
        rows = [
            Row(f"{n}-{t}", "", {"right": v}, f"{n}.png") for n, v in enumerate(values) for t in range(times)
        ]
        return Scores("colours", "m", "", "", rows)

    zeros = [0] * len(values)
    for task in (COLOURS, Median()):
        one = difference(task, "b", of(zeros, 1), of(values, 1))
        three = difference(task, "b", of(zeros, 3), of(values, 3))
        assert (one.low, one.high, one.draws) == (three.low, three.high, three.draws) and three.units == 75
    apart = [replace(row, picture="") for row in of(values, 3).rows]
    alone = difference(COLOURS, "b", of(zeros, 3), Scores("colours", "m", "", "", apart))
    assert alone.draws == three.draws  # the pictures are those of the first run


def test_what_else_differs_is_said(tmp_path):
    runs = [write_run(tmp_path / name, [0, 1] * 50, judge=name) for name in "ab"]
    write_run(tmp_path / "a", [1], "other")
    (one,) = compare(runs, {"colours": COLOURS, "other": Lower()})
    assert one.note == "other judge: b"
    assert comparing.not_compared(runs, {"colours": COLOURS, "other": Lower()}) == [
        f"{runs[1]} has no scores of other."
    ]


def test_damaged_rows_and_questions_named_twice_are_refused():
    damaged = scores([1, 0])
    damaged.rows[1].values.clear()
    with pytest.raises(ValueError, match="are damaged"):
        difference(COLOURS, "b", scores([1, 0]), damaged)
    twice = scores([1, 0])
    twice.rows.append(twice.rows[0])
    with pytest.raises(ValueError, match="name a question twice"):
        difference(COLOURS, "b", scores([1, 0]), twice)


def test_names_are_shown_as_they_are(capsys):
    report.show(["run", "[/b]"], [["[bold]x", "1.0"]])
    told = capsys.readouterr().out
    assert "[/b]" in told and "[bold]x" in told


def test_without_rich_a_table_is_markdown(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    report.show(["a"], [["1|2"]])
    assert capsys.readouterr().out == "| a |\n| --- |\n| 1\\|2 |\n"
