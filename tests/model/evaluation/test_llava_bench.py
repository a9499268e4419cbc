"""LLaVA-Bench: what the judge is told, and relative scores."""

import pytest

from cumo_model.evaluation.judge import KEY, Judge
from cumo_model.evaluation.scorers.reviews import pair_of, relative_score
from cumo_model.evaluation.tasks.llava_bench import LlavaBench
from tests.model.evaluation.choice_data import HOSTILE, write_lines, write_llava_bench
from tests.model.evaluation.judge_server import judging, text_of

QUESTIONS = [("What is it?", "conv"), ("Describe it.", "detail"), ("Why is it so?", "conv")]


@pytest.mark.parametrize(
    "review, pair",
    [
        ("8 7\nThe first is better.", (8, 7)),
        ("8,7.5", (8, 7.5)),
        ("8, 7", None),  # two separators, as in the official script
        ("8 7 6", None),
        ("8", None),
        ("8/10 7/10", None),
        ("\n8 7", None),
        ("nan 7", None),
    ],
)
def test_the_scores_of_a_review(review, pair):
    assert pair_of(review) == pair


def test_hostile_reviews_have_no_scores():
    assert [pair_of(review) for review in HOSTILE] == [None] * len(HOSTILE)


def test_the_relative_score_is_one_of_sums():
    assert relative_score([(8, 4), (2, 4)]) == 80.0
    assert relative_score([]) != relative_score([])  # nan


def scored(folder, replies, answers=("a0", "a1", "a2")):
    data = LlavaBench().read(folder)
    with judging(
        lambda request: next(
            r for a, r in zip(answers, replies, strict=True) if f"\n{a}\n" in text_of(request)
        )
    ) as server:
        with Judge("m", folder / "judge.jsonl", server.url) as judge:
            return LlavaBench().rows(data, list(answers), judge), server.asked


def test_scores_by_hand(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, "any")
    write_llava_bench(tmp_path, QUESTIONS)
    rows, asked = scored(tmp_path, ["8 6\nfine", "10 5", "no scores"])
    assert [(row.values["reference"], row.values["answer"]) for row in rows] == [(8, 6), (10, 5), (-1, -1)]
    figures = LlavaBench().figures(rows)
    assert figures == {
        "relative score, %": 100 * 10 / 17,
        "own score, %": pytest.approx(100 * 10 / 30),
        "score of GPT-4's answers, %": pytest.approx(100 * 17 / 30),
        "reviews without scores, %": 100 / 3,
        "category: conv": 100 * 5 / 7,
        "category: detail": 50.0,
    }
    assert {(request["temperature"], request["max_tokens"]) for request in asked} == {(0.2, 1024)}
    first = next(text_of(request) for request in asked if "a0" in text_of(request))
    assert first.startswith(
        "[Context]\nIt shows 001.jpg.\n\n[Question]\nWhat is it?\n\n[Assistant 1]\nreference 0\n\n"
        "[End of Assistant 1]\n\n[Assistant 2]\na0\n\n[End of Assistant 2]\n\n[System]\n"
    )
    assert "that of Assistant 1 first" in first


def test_the_official_instructions_are_used_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, "any")
    kinds = ("conv", "detail")
    rules = {f"llava_bench_{kind}": {"role": "Helper", "prompt": f"Grade a {kind}."} for kind in kinds}
    write_llava_bench(tmp_path, QUESTIONS, rules)
    assert LlavaBench().read(tmp_path).more["source"] == "questions.jsonl, rule.json"
    _, asked = scored(tmp_path, ["8 6"] * 3)
    ends = sorted(text_of(request).split("[End of Helper 2]")[1] for request in asked)
    assert ends == ["\n\n[System]\nGrade a conv.\n\n"] * 2 + ["\n\n[System]\nGrade a detail.\n\n"]


def test_without_a_judge_there_are_no_scores(tmp_path):
    write_llava_bench(tmp_path, QUESTIONS)
    assert LlavaBench().rows(LlavaBench().read(tmp_path), ["a"] * 3) is None


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"questions.jsonl does not exist$"):
        LlavaBench().read(tmp_path)
    write_llava_bench(tmp_path, QUESTIONS, {"llava_bench_conv": {"role": "a", "prompt": "b"}})
    with pytest.raises(ValueError, match=r"questions.jsonl, line 2: rule.json: must have llava_bench_detail"):
        LlavaBench().read(tmp_path)
    write_lines(tmp_path / "answers_gpt4.jsonl", [{"question_id": 0, "text": "a"}])
    with pytest.raises(ValueError, match=r"answers_gpt4.jsonl must have an answer to question 1$"):
        (tmp_path / "rule.json").unlink()
        LlavaBench().read(tmp_path)
    write_lines(tmp_path / "context.jsonl", [{"image": "001.jpg", "caption": ["a", "b"]}])
    with pytest.raises(ValueError, match=r"line 2: image must be one of context.jsonl, got \('002.jpg',\)$"):
        LlavaBench().read(tmp_path)
