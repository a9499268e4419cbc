"""Small benchmarks in the formats of their official files, and in LLaVA's."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
MME_TASKS = (
    *(
        "existence",
        "count",
        "position",
        "color",
        "posters",
        "celebrity",
        "scene",
        "landmark",
        "artwork",
        "OCR",
    ),
    *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
)
APART = ("posters", "celebrity", "scene", "landmark", "artwork")  # tasks with folders for pictures and texts
HOSTILE = (
    "",
    " ",
    "\n",
    ".",
    "yes.",
    "Yes, there is",
    "A, B",
    "A\nB",
    "No\nno",
    "٣",
    "x" * 10_000,
    "." * 10_000,
    "A" * 10_000,
    "<s>",
    "\ud800",
    "\0",
)


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path, "PNG")


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def write_lines(path: Path, values: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def listed(number: Any, image: str, text: str, category: str = "default") -> dict:
    """A line of LLaVA's files."""
    return {"question_id": number, "image": image, "text": text, "category": category}


def gqa(folder: Path, with_list: bool) -> Path:
    questions = {
        "101": ("Is it overcast?", "n1", "no", "verify"),
        "102": ("Who is wearing the dress?", "n2", "woman", "query"),
        "103": ("What is to the left of the cup?", "n2", "spoon", "query"),
    }
    records = {
        number: {"question": text, "imageId": image, "answer": answer, "isBalanced": True}
        | {"types": {"structural": kind, "semantic": "rel"}}
        for number, (text, image, answer, kind) in questions.items()
    }
    write(folder / "data/testdev_balanced_questions.json", records)
    for name in ("n1", "n2"):
        picture(folder / f"data/images/{name}.jpg")
    if with_list:
        lines = [listed(number, f"{one[1]}.jpg", one[0] + SHORT) for number, one in questions.items()]
        write_lines(folder / "llava_gqa_testdev_balanced.jsonl", lines)
    return folder


def textvqa(folder: Path, with_list: bool) -> Path:
    ten = ["nokia"] * 4 + ["Nokia phone"] * 3 + ["phone", "the nokia", "unanswerable"]
    two = ["3"] * 2 + ["three"] + ["4"] * 7
    data = [
        {"question": "what is the Brand?", "image_id": "00a", "question_id": 34602, "answers": ten},
        {"question": "how many?", "image_id": "00a", "question_id": 34603, "answers": two},
    ]
    write(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": data})
    picture(folder / "train_images/00a.jpg")
    prompts = [
        f"what is the Brand?\nReference OCR token: NOKIA, 12:00{SHORT}",
        f"how many?\nReference OCR token: NOKIA, 12:00{SHORT}",
    ]
    if with_list:
        lines = [listed("00a", "00a.jpg", text) for text in prompts]
        write_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", lines)
    else:
        tokens = [{"image_id": "00a", "ocr_tokens": ["NOKIA", "12:00"], "ocr_info": []}]
        write(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": tokens})
    return folder


def vqav2_test(folder: Path, with_list: bool) -> Path:
    picture(folder / "test2015/COCO_test2015_000000000014.jpg")
    asked = [(14000, "What color is it?"), (14002, "Is it 2?")]
    others = [(14001, "Not in test-dev")]
    for split, questions in (("test-dev2015", asked), ("test2015", sorted(asked + others))):
        if with_list:
            image = "COCO_test2015_000000000014.jpg"
            lines = [listed(number, image, text + SHORT) for number, text in questions]
            write_lines(folder / f"llava_vqav2_mscoco_{split}.jsonl", lines)
        else:
            records = [
                {"image_id": 14, "question": text, "question_id": number} for number, text in questions
            ]
            write(folder / f"v2_OpenEnded_mscoco_{split}_questions.json", {"questions": records})
    return folder


def vqav2_validation(folder: Path) -> Path:
    picture(folder / "val2014/COCO_val2014_000000000014.jpg")
    asked = {14000: ("What color is it?", "other", ["red"] * 3 + ["dark red"] * 7)}
    asked |= {14002: ("How many?", "number", ["two"] * 10), 14003: ("Is it?", "yes/no", ["yes"] * 10)}
    questions = [{"image_id": 14, "question": one[0], "question_id": number} for number, one in asked.items()]
    annotations = [
        {"question_id": number, "image_id": 14, "answer_type": one[1], "question_type": "what"}
        | {"answers": [{"answer": text, "answer_id": at} for at, text in enumerate(one[2], 1)]}
        for number, one in asked.items()
    ]
    write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    return folder


def pope(folder: Path, with_list: bool) -> Path:
    """Each file: dog (yes) and car (no) in picture 1, cup (yes) and bus (no) in picture 2."""
    asked = [("dog", 1, "yes"), ("car", 1, "no"), ("cup", 2, "yes"), ("bus", 2, "no")]
    lines, number = [], 0
    for kind in ("random", "popular", "adversarial"):
        official = [
            {"question_id": at, "image": f"COCO_val2014_{image}.jpg", "label": label}
            | {"text": f"Is there a {name} in the image?"}
            for at, (name, image, label) in enumerate(asked, 1)
        ]
        write_lines(folder / f"coco/coco_pope_{kind}.json", official)
        for one in official:
            number += 1
            lines.append(listed(number, one["image"], one["text"] + SHORT, kind))
    for image in (1, 2):
        picture(folder / f"val2014/COCO_val2014_{image}.jpg")
    if with_list:
        # LLaVA's file has another order of kinds, and the order of the official file within each
        order = lines[8:] + lines[:4] + lines[4:8]
        write_lines(folder / "llava_pope_test.jsonl", order)
    return folder


def mme(folder: Path, with_list: bool) -> Path:
    """Of each task two pictures: "Is there a dog?" is right in the first, "Is there a cat?" in the second."""
    lines = []
    for task in MME_TASKS:
        root = folder / "MME_Benchmark_release_version" / task
        texts, images = (root / "questions_answers_YN", root / "images") if task in APART else (root, root)
        texts.mkdir(parents=True, exist_ok=True)
        for stem, dog in (("0001", "Yes"), ("0002", "No")):
            picture(images / f"{stem}.png")
            cat = "No" if dog == "Yes" else "Yes"
            (texts / f"{stem}.txt").write_text(
                f"Is there a dog? Please answer yes or no.\t{dog}\n"
                f"Is there a cat?  Please answer yes or no.\t{cat}\n"
            )
            inner = "images/" if task in APART else ""
            for text in ("Is there a dog?", "Is there a cat?"):
                lines.append(listed(f"{task}/{stem}.png", f"{task}/{inner}{stem}.png", text + SHORT, task))
    if with_list:
        write_lines(folder / "llava_mme.jsonl", lines)
    return folder


def scienceqa(folder: Path, with_list: bool) -> Path:
    capital = {
        "question": "Which is a capital?",
        "choices": ["Boise", "Omaha", "Reno"],
        "answer": 0,
        "hint": "",
    }
    colony = {"question": "Which colony?", "choices": ["Ohio", "Maine"], "answer": 1, "hint": "Look  here."}
    problems = {
        "4": {**capital, "image": None, "subject": "social science"},
        "5": {**capital, "image": "image.png", "subject": "social science"},
        "6": {**colony, "image": "image.png", "subject": "natural science"},
        "7": {**colony, "image": "image.png", "subject": "natural science"},  # not in the test split
    }
    write(folder / "problems.json", problems)
    write(folder / "pid_splits.json", {"train": ["7"], "test": ["4", "5", "6"]})
    for number in (5, 6):
        picture(folder / f"images/test/{number}/image.png")
    if with_list:
        texts = {
            "4": "Which is a capital?\nA. Boise\nB. Omaha\nC. Reno",
            "5": "Which is a capital?\nA. Boise\nB. Omaha\nC. Reno\n<image>",
            "6": "Context: Look here.\nWhich colony?\nA. Ohio\nB. Maine\n<image>",
        }
        lines = [
            {"id": number, "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "A"}]}
            | ({"image": f"{number}/image.png"} if "<image>" in text else {})
            for number, text in texts.items()
        ]
        write(folder / "llava_test_CQM-A.json", lines)
    return folder


def seed(folder: Path, with_list: bool) -> Path:
    def record(number, kind, answer, data, data_type="image"):
        choices = {f"choice_{letter}": f"the {letter}" for letter in "abcd"}
        own = {"question": f"What is {number}?", "question_id": number, "question_type_id": kind}
        return {**choices, **own, "answer": answer, "data_id": data, "data_type": data_type}

    questions = [record("101", 1, "A", "1_1"), record("102", 1, "B", "1_2"), record("103", 2, "C", "1_2")]
    questions.append(record("v1", 10, "D", "video.mp4", "video"))
    types = {"Scene Understanding": 1, "Instance Identity": 2, "Action Recognition": 10}
    write(folder / "SEED-Bench.json", {"questions": questions, "question_type": types})
    for name in ("1_1", "1_2"):
        picture(folder / f"SEED-Bench-image/{name}")
    if with_list:
        choices = "\nA. the a\nB. the b\nC. the c\nD. the d"
        lines = [
            listed(
                int(one["question_id"]) if one["data_type"] == "image" else one["question_id"],
                f"SEED-Bench-image/{one['data_id']}",
                one["question"] + choices + LETTER,
            )
            for one in questions
        ]
        write_lines(folder / "llava-seed-bench.jsonl", lines)
    return folder
