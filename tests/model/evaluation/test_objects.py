"""Questions about objects made from labels, and captions: POPE's and CHAIR's figures on own pictures."""

import json

import pytest

from cumo_model.evaluation.tasks.objects import Chair, ObjectsPope, pope_items
from cumo_model.serving.questions import pictures_of_questions
from tests.model.evaluation import official_data as official

# frequencies: dog 4, car 3, cup 2, apple 1, owl 1; with the owl: only the apple
LABELS = {
    "1.png": ["dog", "car"],
    "2.png": ["dog", "car", "cup"],
    "3.png": ["dog", "cup"],
    "4.png": ["owl", "apple"],
    "5.png": ["car", "dog", "car"],
    "6.png": [],
}


@pytest.fixture
def folder(tmp_path):
    official.write(tmp_path / "labels.json", LABELS)
    vocabulary = {"dog": ["dogs"], "car": ["cars"], "cup": [], "apple": [], "owl": ["owls"]}
    official.write(tmp_path / "vocabulary.json", vocabulary)
    for name in LABELS:
        official.picture(tmp_path / "images" / name)
    return tmp_path


def absent(items, picture: str) -> list[str]:
    return [
        item.question.id.split("/")[2]
        for item in items
        if not item.reference and picture in item.question.images
    ]


def test_as_many_no_as_yes_and_each_kind_asks_about_the_same_objects():
    items = pope_items(LABELS)
    for kind in ("random", "popular", "adversarial"):
        some = [item for item in items if item.group == kind]
        assert [item.reference for item in some] == [True, False] * (len(some) // 2)
        for item in some:
            picture, name = item.question.images[0], item.question.id.split("/")[2]
            assert (name in LABELS[picture]) == item.reference
    shown = [
        [item.question.text for item in items if item.reference and item.group == kind]
        for kind in ("random", "popular", "adversarial")
    ]
    assert shown[0] == shown[1] == shown[2]
    assert len({item.question.id for item in items}) == len(items) == 3 * 2 * (2 + 2 + 2 + 2 + 2)


def test_popular_are_the_most_frequent_and_adversarial_the_nearest():
    popular, adversarial = (pope_items(LABELS, kinds=[kind], each=2) for kind in ("popular", "adversarial"))
    assert absent(popular, "4.png") == ["dog", "car"]
    assert absent(popular, "1.png") == ["cup", "apple"]
    assert absent(adversarial, "1.png") == ["cup", "apple"]  # cup with dog twice and with car once
    assert absent(adversarial, "4.png") == ["car", "cup"]  # all are as near: by name
    # with the cup the dog is more often than the car, which is more frequent by itself
    labels = {"a": ["cup", "dog"], "b": ["cup", "dog"], "c": ["car", "cup"], "d": ["cup"]}
    labels |= {str(number): ["car"] for number in range(5)}
    assert absent(pope_items(labels, kinds=["adversarial"], each=1), "d") == ["dog"]
    assert absent(pope_items(labels, kinds=["popular"], each=1), "d") == ["car"]


def test_draws_depend_on_seed_and_picture_alone():
    # five of ten objects in each picture, so that present and absent ones are drawn
    many = {f"{number}.png": [f"object {(number + at) % 10}" for at in range(5)] for number in range(20)}
    drawn = lambda labels, **options: {
        item.question.key for item in pope_items(labels, kinds=["random"], **options)
    }
    assert drawn(many) == drawn({name: many[name][::-1] for name in reversed(many)})
    assert drawn(many) != drawn(many, seed=1)
    assert len(drawn(many)) == 20 * 2 * 3


def test_each_picture_has_draws_of_its_own():
    alike = {f"{number}.png": ["dog", "cat", "cup", "car", "bus"][number % 2 :] for number in range(20)}
    alike |= {"all": [f"object {number}" for number in range(10)]}
    items = pope_items(alike, kinds=["random"], each=2)
    assert len({tuple(absent(items, f"{number}.png")) for number in range(1, 20, 2)}) > 1
    assert (
        len({item.question.text for item in items if item.reference and item.question.images != ("all",)})
        == 5
    )


def test_article_and_template():
    texts = {item.question.text for item in pope_items(LABELS, "Is {a} {object} there?")}
    assert "Is an owl there?" in texts and "Is an apple there?" in texts and "Is a dog there?" in texts
    assert all(item.question.text.startswith("Is there a") for item in pope_items(LABELS))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"each": 0}, "each must be at least 1, got 0"),
        ({"kinds": ["rare"]}, "kinds must be from random, popular, adversarial, got 'rare'"),
        ({"template": "Is it?"}, "template must hold {object}, got 'Is it\\?'"),
        ({"labels": {"a": ["dog"], "b": []}}, "picture that shows some of the objects and not all, got none"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        pope_items(**{"labels": LABELS, **arguments})


def test_pope_of_own_pictures(folder):
    task = ObjectsPope()
    data = task.read(folder)
    pictures_of_questions([item.question for item in data.items], data.pictures)
    assert data.items[0].question.text.endswith(" in the image?" + official.SHORT)
    found = task.figures(task.rows(data, ["yes" if item.reference else "no" for item in data.items]))
    assert found["mean F1"] == found["category: popular, f1"] == 100
    assert (
        task.figures(task.rows(data, ["Yes"] * len(data.items)))["mean F1"]
        == 100 * (2 / 3 + 2 / 3 + 2 / 3) / 3
    )


def test_chair_of_own_pictures(folder):
    task = Chair()
    data = task.read(folder)
    pictures_of_questions([item.question for item in data.items], data.pictures)
    captions = ["a dog and two cars", "A cup, a dog, an OWL", "cups", "", "dogs", "An apple"]
    assert dict(zip(LABELS, captions, strict=True))["2.png"] == captions[1]
    rows = task.rows(data, captions)
    assert json.loads(json.dumps([row.values for row in rows]))[1] == {
        "mentions": 3,
        "absent": 1,
        "objects": 3,
        "named": 2,
    }
    assert task.figures(rows) == {"CHAIR_s": 100 * 2 / 6, "CHAIR_i": 100 * 2 / 7, "recall": 100 * 5 / 11}
    assert next(iter(task.figures(rows))) == "CHAIR_s" and "lower is better" in task.metric


@pytest.mark.parametrize(
    "path, content, message",
    [
        ("labels.json", None, "labels.json does not exist"),
        ("labels.json", "{}", "must hold at least one picture, got none"),
        ("labels.json", '{"1.png": "dog"}', "picture 1.png: must be a list of names, got 'dog'"),
        ("labels.json", '{"1.png": ["dog", ""]}', "must be a list of names"),
        ("labels.json", '{"1.png": ["cat"]}', "vocabulary.json must have 'cat', an object of picture 1.png"),
        ("vocabulary.json", None, "vocabulary.json does not exist"),
        ("vocabulary.json", '{"dog": ["hound"], "cat": ["hound"]}', "'hound' must name one object"),
        ("vocabulary.json", '{"dog": 3}', "vocabulary.json, dog: must be a list of names, got 3"),
    ],
)
def test_a_wrong_file_is_named(path, content, message, folder):
    (folder / path).unlink() if content is None else (folder / path).write_text(content)
    with pytest.raises(ValueError, match=message):
        Chair().read(folder)
