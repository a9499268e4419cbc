"""The benchmarks on the demo's data: what is asked, and when an answer is right."""

import json

import pytest

from cumo_model.demo.benchmarks import EmojiChoice, EmojiExact, EmojiPope, benchmarks
from cumo_model.demo.evaluate import exact_match

KINDS = {"a": "fruit", "b": "bird", "c": "fruit"}
NAMES = ["apple", "owl", "plum", "crow"]


@pytest.fixture
def folder(tmp_path):
    records = []
    for image, kind in KINDS.items():
        for asked, answer in (("kind", kind), ("name", {"a": "apple", "b": "owl", "c": "plum"}[image])):
            turns = [{"from": "human", "value": f"<image>\nwhat {asked}?"}, {"from": "gpt", "value": answer}]
            record = {"id": f"{image}-{asked}", "image": f"{image}.png", "conversations": turns}
            record |= {"kind": asked, "answer": answer, "choices": NAMES}
            records.append(record | ({"choices_same_kind": NAMES[::-1]} if record["id"] == "b-name" else {}))
    (tmp_path / "test_a.json").write_text(json.dumps(records))
    return tmp_path


def test_exact_match_wants_the_whole_answer(folder):
    task = EmojiExact("test_a")
    data = task.read(folder)
    texts = [(item.question.text, item.question.images, item.group) for item in data.items[:2]]
    assert texts == [("what kind?", ("a.png",), "kind"), ("what name?", ("a.png",), "name")]
    rows = task.rows(data, ["fruit", "Apple.", "birds", "owl", "frui", "plum"])
    assert [row.values["right"] for row in rows] == [True, True, False, True, False, True]
    found = exact_match(rows, {"kind": "fruit", "name": "none of them"})
    assert found["exact"] == {"kind": [1, 3], "name": [3, 3]}
    assert found["majority"] == {"kind": [2, 3], "name": [0, 3]}
    assert list(task.figures(rows)) == ["accuracy", "kind", "name"]


def test_pope_asks_for_the_kind_and_another_one(folder):
    task = EmojiPope("test_a")
    items = task.read(folder).items
    asked = [(item.question.images[0], item.question.text, item.reference) for item in items]
    assert asked[:2] == [("a.png", "is the kind fruit?", True), ("a.png", "is the kind bird?", False)]
    assert len(asked) == 12 and {item.group for item in items} == {"random", "popular"}


def test_a_choice_is_right_in_all_orders_of_the_names(folder):
    task = EmojiChoice("test_a")
    data = task.read(folder)
    assert len(data.items) == 16 and len({item.unit for item in data.items}) == 4
    texts = [item.question.text for item in data.items[:4]]
    assert texts[:2] == ["which of apple, owl, plum, crow?", "which of owl, plum, crow, apple?"]
    assert len(set(texts)) == 4
    said = [item.reference for item in data.items]
    assert task.figures(task.rows(data, said)) == dict.fromkeys(
        ("right in all four orders", "right in the first order"), 100
    )
    said[1] = "crow"  # the second order of the first question
    found = task.figures(task.rows(data, said))
    assert list(found.values()) == [75, 100]
    assert [row.group for row in task.rows(data, said)] == ["name", "name", "name, same kind", "name"]


def test_names_of_benchmarks_are_those_of_their_test_file():
    names = [[task.name for task in benchmarks(part)] for part in ("test_a", "test_b")]
    assert names[0] == ["exact_test_a", "pope_test_a", "choice_test_a"] and not {*names[0]} & {*names[1]}
