"""Small files in the official formats of MMBench, MMMU, MathVista, MM-Vet and LLaVA-Bench."""

import base64
import csv
import io
import json

from PIL import Image

from cumo_model.evaluation.tasks.mmmu import DISCIPLINES

# what a model may say: each scorer gets them all
HOSTILE = (
    "",
    " ",
    "\n",
    "B\nA",
    "A B",
    "yes.",
    "Yes, there is",
    "٣",
    "３",
    "<s>",
    "\ud800",
    "x" * 10_000,
    "(",
    "\\",
)
COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source")
COLUMNS = (*COLUMNS, "l2-category", "comment", "split")


def png(colour):
    """The bytes of a small picture."""
    file = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(file, "PNG")
    return file.getvalue()


def save_png(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(colour))


def mmbench_row(index, choices, answer, colour="red", **more):
    """A row of MMBench's table."""
    row = dict.fromkeys(COLUMNS, "")
    row |= {"index": str(index), "question": "What is it?", "answer": answer, "split": "dev"}
    row |= dict(zip("ABCD", choices, strict=False))
    return row | {"image": base64.b64encode(png(colour)).decode() if colour else "", **more}


def write_mmbench(path, rows, columns=COLUMNS):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns, delimiter="\t", extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


def circle(index, choices, right, **more):
    """The rows of a question with its choices in all orders."""
    rows = []
    for turn in range(len(choices)):
        order = choices[turn:] + choices[:turn]
        rows.append(mmbench_row(index + turn * 1_000_000, order, "ABCD"[order.index(right)], **more))
    return rows


def mmmu_record(number, subject="Art", options=("a cat", "a dog", "a cow"), answer="B", question=None):
    """A question of MMMU as in the hub's files; without options an open one."""
    return {
        "id": f"validation_{subject}_{number}",
        "question": question or "Which <image 1> is like <image 2>?",
        "options": str(list(options)),
        "answer": answer,
        "question_type": "multiple-choice" if options else "open",
        "image_1": f"images/{subject}_{number}.png",
    }


def write_mmmu_json(folder, records):
    for record in records:
        save_png(folder / record["image_1"], "red")
    (folder / "validation.json").write_text(json.dumps(records))


def write_mmmu_parquet(folder, subjects=None):
    """The hub's layout: one question for each subject."""
    import pyarrow
    import pyarrow.parquet

    for subject in DISCIPLINES if subjects is None else subjects:
        record = mmmu_record(1, subject)
        record["image_1"] = {"bytes": png("blue"), "path": "1.png"}
        record["image_2"] = None
        path = folder / subject / "validation-00000-of-00001.parquet"
        path.parent.mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), path)


def mathvista_problem(pid, answer_type="integer", answer="3", **more):
    """A problem of MathVista's testmini.json."""
    metadata = {"task": "math word problem", "skills": ["arithmetic reasoning"]}
    return {
        "question": f"How many in picture {pid}?",
        "image": f"images/{pid}.jpg",
        "choices": None,
        "unit": None,
        "precision": None,
        "answer": answer,
        "question_type": "free_form",
        "answer_type": answer_type,
        "pid": str(pid),
        "metadata": metadata,
        **more,
    }


def multiple(pid, choices, answer, **more):
    options = {"question_type": "multi_choice", "choices": choices}
    return mathvista_problem(pid, "text", answer, **options, **more)


def write_mathvista(folder, problems, below="data"):
    path = folder / below / "testmini.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({problem["pid"]: problem for problem in problems}))
    for problem in problems:
        save_png(folder / problem["image"], "red")


def write_mathvista_parquet(folder, problems):
    import pyarrow
    import pyarrow.parquet

    records = [{**p, "decoded_image": {"bytes": png("green"), "path": None}} for p in problems]
    schema = pyarrow.Table.from_pylist(records).schema
    # as on the hub: decimals are floats there
    place = schema.get_field_index("precision")
    schema = schema.set(place, pyarrow.field("precision", pyarrow.float64()))
    (folder / "data").mkdir(parents=True)
    path = folder / "data" / "testmini-00000-of-00001-abc.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records, schema), path)


def write_mmvet(folder, records):
    """The unpacked mm-vet.zip."""
    found = {}
    for number, (question, answer, capabilities) in enumerate(records):
        name = f"v1_{number}.png"
        save_png(folder / "mm-vet" / "images" / name, "red")
        found[f"v1_{number}"] = {
            "imagename": name,
            "question": question,
            "answer": answer,
            "imagesource": "somewhere",
            "capability": capabilities,
        }
    (folder / "mm-vet" / "mm-vet.json").write_text(json.dumps(found))


def write_lines(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values))


def write_llava_bench(folder, questions, rules=None):
    """Questions are (text, category), each about a picture of its own."""
    names = [f"{number:03}.jpg" for number in range(1, len(questions) + 1)]
    for name in names:
        save_png(folder / "images" / name, "red")
    asked = enumerate(zip(names, questions, strict=True))
    write_lines(
        folder / "questions.jsonl",
        [{"question_id": n, "image": i, "text": text, "category": kind} for n, (i, (text, kind)) in asked],
    )
    write_lines(
        folder / "context.jsonl",
        [{"id": name[:3], "image": name, "caption": f"It shows {name}."} for name in names],
    )
    write_lines(
        folder / "answers_gpt4.jsonl",
        [{"question_id": n, "text": f"reference {n}", "answer_id": str(n)} for n in range(len(names))],
    )
    if rules is not None:
        (folder / "rule.json").write_text(json.dumps(rules))
