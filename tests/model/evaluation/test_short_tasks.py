"""Benchmarks with short answers: their official files and LLaVA's, scores by hand, wrong files."""

import json
import math
import shutil
from pathlib import Path

import pytest

from cumo_model.evaluation.task import SHORT, Task
from cumo_model.evaluation.tasks.gqa import Gqa
from cumo_model.evaluation.tasks.mme import Mme
from cumo_model.evaluation.tasks.pope import Pope
from cumo_model.evaluation.tasks.scienceqa import ScienceQa
from cumo_model.evaluation.tasks.seed import Seed
from cumo_model.evaluation.tasks.textvqa import TextVqa
from cumo_model.evaluation.tasks.vqav2 import Vqav2
from cumo_model.serving.questions import pictures_of_questions
from tests.model.evaluation import official_data as official

TASKS = {
    "gqa": (Gqa(), official.gqa),
    "textvqa": (TextVqa(), official.textvqa),
    "vqav2": (Vqav2(), official.vqav2_test),
    "vqav2, validation": (Vqav2(), lambda folder, with_list: official.vqav2_validation(folder)),
    "pope": (Pope(), official.pope),
    "mme": (Mme(), official.mme),
    "scienceqa": (ScienceQa(), official.scienceqa),
    "seed": (Seed(), official.seed),
}


def read(name, folder, with_list=True):
    task, make = TASKS[name]
    return task, task.read(make(folder, with_list))


def figures(task: Task, data, answers) -> dict[str, float]:
    rows = task.rows(data, answers)
    assert json.loads(json.dumps([row.values for row in rows])) == [row.values for row in rows]
    assert len({row.unit for row in rows}) == len(rows)
    return task.figures(rows)


@pytest.mark.parametrize("name", TASKS)
def test_official_files_give_the_prompts_of_the_list(name, tmp_path):
    _, listed = read(name, tmp_path / "a", True)
    _, built = read(name, tmp_path / "b", False)
    asked = [
        sorted(
            (item.question.text, item.question.images, json.dumps(item.reference), item.group)
            for item in data.items
        )
        for data in (listed, built)
    ]
    assert asked[0] == asked[1]
    for data in (listed, built):
        questions = [item.question for item in data.items]
        pictures_of_questions(questions, data.pictures)  # none is missing
        assert len({question.key for question in questions}) == len(questions)
        assert data.more["source"].startswith(str(tmp_path))
    if name != "vqav2, validation":
        assert listed.more["source"] != built.more["source"].replace("/b/", "/a/")


@pytest.mark.parametrize("name", TASKS)
def test_hostile_answers_have_figures(name, tmp_path):
    task, data = read(name, tmp_path)
    for answer in official.HOSTILE:
        answers = [answer] * len(data.items)
        if (rows := task.rows(data, answers)) is not None:
            found = task.figures(rows)
            assert all(0 <= value <= (2000 if name.startswith("mme") else 100) for value in found.values())
        task.submission(data, answers, tmp_path / "answers")
    if rows is not None:
        assert math.isnan(next(iter(task.figures([]).values())))
        with pytest.raises(ValueError, match="shorter"):
            task.rows(data, answers[1:])


def test_prompts_are_those_of_cumo(tmp_path):
    texts = {name: read(name, tmp_path / name)[1].items[-1].question.text for name in TASKS}
    assert (
        texts["gqa"] == "What is to the left of the cup?\nAnswer the question using a single word or phrase."
    )
    assert texts["textvqa"] == (
        "how many?\nReference OCR token: NOKIA, 12:00\nAnswer the question using a single word or phrase."
    )
    assert texts["seed"] == (
        "What is 103?\nA. the a\nB. the b\nC. the c\nD. the d\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert texts["scienceqa"] == (
        "Context: Look here.\nWhich colony?\nA. Ohio\nB. Maine\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert texts["mme"] == "Is there a cat?\nAnswer the question using a single word or phrase."
    tokens = {name: TASKS[name][0].max_new_tokens for name in TASKS}
    assert {name for name in TASKS if tokens[name] == SHORT == 128} == set(TASKS) - {"scienceqa"}
    assert tokens["scienceqa"] == 1024


def test_gqa_by_hand(tmp_path):
    task, data = read("gqa", tmp_path)
    assert figures(task, data, ["No.", "Woman", "a spoon"]) == {
        "accuracy": 100 * 2 / 3,
        "category: binary": 100.0,
        "category: open": 50.0,
    }


def test_textvqa_by_hand(tmp_path):
    task, data = read("textvqa", tmp_path)
    # "Nokia!" is "nokia" five times; 3 and three are the same, so three of ten
    assert [row.values["accuracy"] for row in task.rows(data, ["Nokia!", "Three"])] == [1.0, 0.9]
    assert [row.unit for row in task.rows(data, ["", ""])] == ["34602", "34603"]
    assert figures(task, data, ["", "3"]) == {"accuracy": 45.0}


def test_textvqa_needs_the_words_of_the_pictures(tmp_path):
    folder = official.textvqa(tmp_path, True)
    (folder / "llava_textvqa_val_v051_ocr.jsonl").unlink()
    with pytest.raises(ValueError, match=r"must hold llava_textvqa.*Rosetta.*words of an OCR program"):
        TextVqa().read(folder)


def test_textvqa_asks_equal_questions_apart(tmp_path):
    folder = official.textvqa(tmp_path, True)
    path = folder / "llava_textvqa_val_v051_ocr.jsonl"
    path.write_text(path.read_text() + path.read_text())
    data = TextVqa().read(folder)
    assert [item.question.id for item in data.items] == ["00a", "00a", "00a (2)", "00a (2)"]
    assert [row.unit for row in TextVqa().rows(data, [""] * 4)] == [
        "34602",
        "34603",
        "34602 (2)",
        "34603 (2)",
    ]


@pytest.mark.parametrize("with_list", [True, False])
def test_vqav2_writes_what_its_server_takes(with_list, tmp_path):
    task, data = read("vqav2", tmp_path, with_list)
    assert task.rows(data, ["", ""]) is None
    path = task.submission(data, ["The Red.", "Two"], tmp_path / "run.1")
    assert path == tmp_path / "run.1.json"
    assert json.loads(path.read_text()) == [
        {"question_id": 14000, "answer": "red"},
        {"question_id": 14001, "answer": ""},
        {"question_id": 14002, "answer": "2"},
    ]


def test_vqav2_scores_the_validation_split(tmp_path):
    official.vqav2_test(tmp_path, True)
    task, data = read("vqav2, validation", tmp_path)
    assert figures(task, data, ["The red", "two", "Yes."]) == {
        "accuracy": 100 * 1.9 / 3,
        "category: other": 90.0,
        "category: number": 0.0,
        "category: yes/no": 100.0,
    }
    assert task.submission(data, ["", "", ""], tmp_path / "run") is None


def test_pope_by_hand(tmp_path):
    task, data = read("pope", tmp_path)
    # random: all right; popular: always yes; adversarial: yes to dog and car only
    said = {"random": ["yes", "no"] * 2, "popular": ["Yes"] * 4, "adversarial": ["Yes.", "Yes", "No", "No."]}
    given = {kind: iter(answers) for kind, answers in said.items()}
    found = figures(task, data, [next(given[item.group]) for item in data.items])
    assert list(found)[:2] == ["mean F1", "mean accuracy"]
    assert found["mean F1"] == 100 * (1 / 2 + 1 + 2 / 3) / 3
    assert found["mean accuracy"] == 100 * (1 + 0.5 + 0.5) / 3
    assert {name: value for name, value in found.items() if name.startswith("category: popular")} == {
        "category: popular, accuracy": 50.0,
        "category: popular, precision": 50.0,
        "category: popular, recall": 100.0,
        "category: popular, f1": 100 * (2 / 3),
        "category: popular, yes ratio": 100.0,
    }


def test_mme_by_hand(tmp_path):
    task, data = read("mme", tmp_path)
    right = {"0001": {"dog": "Yes", "cat": "No"}, "0002": {"dog": "No", "cat": "Yes"}}

    def answer(item) -> str:
        picture, kind = item.unit.split("/")[1], "dog" if "dog" in item.question.text else "cat"
        if item.group == "OCR" and picture == "0002":
            return "maybe" if kind == "dog" else "Yes"
        return "no" if item.group == "code_reasoning" else right[picture][kind]

    answers = [answer(item) for item in data.items]
    found = figures(task, data, answers)
    assert len(task.rows(data, answers)) == len(data.items) // 2 == 28
    assert found["category: OCR"] == 75 + 50
    assert found["category: code_reasoning"] == 50 + 0
    assert found["category: artwork"] == 200
    assert (found["perception"], found["cognition"]) == (9 * 200 + 125, 3 * 200 + 50)
    assert found["accuracy"] == 100 * (56 - 1 - 2) / 56 and found["accuracy+"] == 100 * (28 - 1 - 2) / 28
    assert found["answers that are neither yes nor no"] == 100 / 56
    assert next(iter(found)) == "perception"


def test_scienceqa_by_hand(tmp_path):
    task, data = read("scienceqa", tmp_path)
    assert [item.question.id for item in data.items] == ["5", "6"]  # 4 has no picture
    assert figures(task, data, ["A. Boise", "The answer is C."]) == {
        "accuracy": 50.0,
        "answers without a letter": 50.0,  # the second question has two choices
        "category: social science": 100.0,
        "category: natural science": 0.0,
    }


def test_seed_by_hand(tmp_path):
    task, data = read("seed", tmp_path)
    assert [item.question.id for item in data.items] == [101, 102, 103]  # v1 is about a video
    assert figures(task, data, ["A", "B.", "A, C"]) == {
        "accuracy": 100 / 3,
        "accuracy, letter by pattern": 100 * 2 / 3,
        "category: Scene Understanding": 50.0,
        "category: Instance Identity": 0.0,
    }


@pytest.mark.parametrize(
    "name, path, content, message",
    [
        (
            "gqa",
            "data/testdev_balanced_questions.json",
            None,
            "testdev_balanced_questions.json or .* got none of them",
        ),
        ("gqa", "data/testdev_balanced_questions.json", "[]", "must hold an object, got list"),
        ("gqa", "data/testdev_balanced_questions.json", '{"101": 1}', "101 must be dict, got 1"),
        ("gqa", "data/testdev_balanced_questions.json", "{}", r"line 1: must have 101, got nothing"),
        ("gqa", "llava_gqa_testdev_balanced.jsonl", "", "must hold at least one question, got none"),
        ("gqa", "llava_gqa_testdev_balanced.jsonl", '{"question_id": "101"}', "line 1: must have text"),
        ("textvqa", "TextVQA_0.5.1_val.json", None, "TextVQA_0.5.1_val.json does not exist"),
        ("textvqa", "TextVQA_0.5.1_val.json", '{"data": [1]}', "question 1: must be an object, got int"),
        ("textvqa", "TextVQA_0.5.1_val.json", '{"data": []}', "has no question 'what is the brand"),
        (
            "textvqa",
            "llava_textvqa_val_v051_ocr.jsonl",
            '{"question_id": "00a", "image": "00a.jpg", "text": "how many?"}',
            "line 1: text must be lines with a question, .* got 1 lines",
        ),
        ("vqav2", "llava_vqav2_mscoco_test-dev2015.jsonl", None, "test-dev2015.* got none of them"),
        ("vqav2, validation", "v2_OpenEnded_mscoco_val2014_questions.json", None, "does not exist"),
        (
            "vqav2, validation",
            "v2_mscoco_val2014_annotations.json",
            '{"annotations": []}',
            "has no answers to",
        ),
        ("pope", "coco/coco_pope_popular.json", None, "coco_pope_popular.json does not exist"),
        ("pope", "coco/coco_pope_popular.json", "", "must hold at least one question"),
        (
            "pope",
            "coco/coco_pope_popular.json",
            '{"question_id": 1, "image": "a", "text": "b", "label": "perhaps"}',
            "line 1: label must be yes or no, got 'perhaps'",
        ),
        (
            "pope",
            "coco/coco_pope_popular.json",
            '{"question_id": 1, "image": "a", "text": "b", "label": "no"}',
            "image must be that of question 1 of coco_pope_popular.json, got 'COCO_val2014_1.jpg'",
        ),
        ("mme", "MME_Benchmark_release_version/OCR", None, "OCR does not exist"),
        ("mme", "MME_Benchmark_release_version/OCR/0001.png", None, "picture 0001 must be in"),
        (
            "mme",
            "MME_Benchmark_release_version/OCR/0001.txt",
            "Is it?\tperhaps",
            "line 1: must be a question, a tab",
        ),
        (
            "mme",
            "MME_Benchmark_release_version/OCR/0001.txt",
            "Is it?\tno\n",
            "has no question 'Is there a dog",
        ),
        ("mme", "MME_Benchmark_release_version/OCR/0001.txt", "Is it?\tno\n" * 2, "line 2: no two questions"),
        ("mme", "llava_mme.jsonl", "half", "must have two questions about .*, got 1"),
        ("pope", "llava_pope_test.jsonl", "half", "must have all 4 questions of coco_pope_"),
        ("scienceqa", "problems.json", "{}", "must have 5, got nothing"),
        ("scienceqa", "llava_test_CQM-A.json", "[]", "at least one question with a picture, got none"),
        ("scienceqa", "llava_test_CQM-A.json", "[1]", "question 1: must be an object, got int"),
        ("seed", "SEED-Bench.json", "{", "must be JSON"),
        ("seed", "SEED-Bench.json", '{"question_type": {}, "questions": []}', "has no question 101"),
    ],
)
def test_a_wrong_file_is_named(name, path, content, message, tmp_path):
    task, make = TASKS[name]
    folder = make(tmp_path, True)
    if content is None and (folder / path).is_dir():
        shutil.rmtree(folder / path)
    elif content is None:
        (folder / path).unlink()
    elif content == "half":
        lines = (folder / path).read_text().splitlines(keepends=True)
        (folder / path).write_text("".join(lines[: len(lines) // 2 + 1]))
    else:
        (folder / path).write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        task.read(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"vqav2, validation"}))
def test_a_list_with_fewer_questions_is_called_a_part(name, tmp_path):
    task, data = read(name, tmp_path)
    assert data.of in (0, len(data.items))
    if name in ("gqa", "textvqa", "seed", "mme", "scienceqa"):
        path = Path(data.more["source"])
        if path.suffix == ".json":
            path.write_text(json.dumps(json.loads(path.read_text())[:-1]))
        else:
            path.write_text(
                "".join(path.read_text().splitlines(keepends=True)[: -2 if name == "mme" else -1])
            )
        if name == "seed":  # its last one is about a video
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
        part = task.read(tmp_path if name in ("gqa", "textvqa") else path.parent)
        assert 0 < len(part.items) < part.of == len(data.items)


def test_a_second_question_with_an_id_of_seed_has_its_own_reference(tmp_path):
    for with_list in (True, False):
        folder = official.seed(tmp_path / str(with_list), with_list)
        path = folder / "SEED-Bench.json"
        content = json.loads(path.read_text())
        twin = {**content["questions"][0], "question": "Whose is 101?", "answer": "D"}
        path.write_text(json.dumps({**content, "questions": [*content["questions"], twin]}))
        if with_list:
            listed = folder / "llava-seed-bench.jsonl"
            line = json.loads(listed.read_text().splitlines()[0])
            more = {**line, "text": line["text"].replace("What is 101?", "Whose is 101?")}
            listed.write_text(f"{listed.read_text()}{json.dumps(more)}\n")
        data = Seed().read(folder)
        found = {item.question.text.split("\n")[0]: item.reference["letter"] for item in data.items}
        assert found["What is 101?"] == "A" and found["Whose is 101?"] == "D" and len(data.items) == 4
        rows = Seed().rows(data, ["A"] * 4)
        assert len({row.unit for row in rows}) == 4


def test_mme_in_a_second_folder_and_files_of_another_system(tmp_path):
    folder = official.mme(tmp_path, False)
    count = len(Mme().read(folder).items)
    release = folder / "MME_Benchmark_release_version"
    (release / "existence" / "._0001.txt").write_bytes(b"\0\1")
    for suffix in ("png", "txt"):
        (release / "count" / f"0001.{suffix}").rename(release / "count" / f"a.b.{suffix}")
    release.rename(folder / "inner")
    release.mkdir()
    (folder / "inner").rename(release / release.name)
    assert len(Mme().read(folder).items) == count
