"""Local tasks of lmms-eval, and a run of `python -m lmms_eval` in a process of its own, without a network."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from cumo_model import CumoForConditionalGeneration, CumoProcessor
from tests.serve.checkpoints import write
from tests.serve.questions import image

ROOT = Path(__file__).parents[2]
NEW_TOKENS = 8
HELPERS = """
from PIL import Image

def pictures(doc):
    return [Image.open(path) for path in doc["pictures"]]

def turns(doc):
    first = [{"type": "image", "url": Image.open(doc["pictures"][0])}, {"type": "text", "text": doc["text"]}]
    rest = [("assistant", "a red square"), ("user", "how many dots are there")]
    rest = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in rest]
    return [{"role": "user", "content": first}, *rest]

def film(doc):
    return ["film.mp4"]
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_visual: !function helpers.pictures
doc_to_text: text
doc_to_target: answer
"""
GENERATED = f"""
output_type: generate_until
generation_kwargs:
  max_new_tokens: {NEW_TOKENS}
  temperature: 0
  do_sample: false
  num_beams: 1
  image_aspect_ratio: original
  until: UNTIL
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
CHOSEN = """
output_type: multiple_choice
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_talker(folder: Path) -> Path:
    """A checkpoint that answers in words, which are tokens of their own; no answer ends by itself."""
    write(folder, text="mistral", scales=[1], seed=2)
    model = CumoForConditionalGeneration.from_pretrained(folder)
    tokenizer = CumoProcessor.from_pretrained(folder).tokenizer
    with torch.no_grad():
        for number, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
            if not re.fullmatch("\u0120[a-z]{2,}", token):  # the letter stands for a space
                model.lm_head.weight[number] = 0
    model.save_pretrained(folder)
    return folder


def record(folder: Path, text: str, pictures: tuple[int, ...], **more) -> dict:
    """A question of a task; its pictures, by number, are written to `folder`."""
    paths = [folder / f"{number}.png" for number in pictures]
    for number, path in zip(pictures, paths, strict=True):
        image(number).save(path)
    return {"text": text, "pictures": [str(path) for path in paths], **more}


def write_task(folder: Path, name: str, records: list[dict], until: str = "[]", **options: str) -> None:
    """Write a task; with choices in the records it compares probabilities. `options`: lines of its YAML."""
    folder.mkdir(exist_ok=True)
    (folder / "helpers.py").write_text(HELPERS)
    data = folder / f"{name}.json"
    data.write_text("\n".join(map(json.dumps, records)))
    text = TASK.format(name=name, data=data)
    text += CHOSEN if "choices" in records[0] else GENERATED.replace("UNTIL", until)
    lines = [f"{key}: {value}" for key, value in options.items()]
    (folder / f"{name}.yaml").write_text("\n".join([text, *lines]) + "\n")


def run(checkpoint: Path, tasks: Path, names: str, *options: str, processes: int = 1) -> tuple[dict, str]:
    """Results and samples of each task, {name: (results, samples)}, and what was printed."""
    out = tasks.parent / f"out{len(names)}-{processes}"
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    words = [
        sys.executable, "-m", *(torchrun if processes > 1 else []), "lmms_eval", "--model", "cumo",
        "--model_args", f"pretrained={checkpoint}", "--tasks", names, "--include_path", str(tasks),
        "--device", "cpu", "--output_path", str(out), "--log_samples", *options,
    ]  # fmt: skip
    environment = {
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tasks.parent / "home"),
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        words, cwd=tasks.parent, env=os.environ | environment, text=True, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    found = {}
    for path in out.glob("*/*_results.json"):
        for name, results in json.loads(path.read_text())["results"].items():
            (samples,) = out.glob(f"*/*_samples_{name}.jsonl")
            lines = [json.loads(line) for line in samples.read_text().splitlines()]
            found[name] = results, sorted(lines, key=lambda line: line["doc_id"])
    return found, done.stdout
