"""Every example of README.md and docs/, page by page, in a folder that holds what the examples name.

Python blocks run in their order, and so do the lines of bash blocks. A block below
`<!-- not run: reason -->` is only parsed: its Python is compiled, its commands go through the parsers of the
programs themselves.
"""

import dataclasses
import importlib.util
import json
import re
import shlex
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    TrainingArguments,
)
from transformers import MixtralForCausalLM as Mixtral

import cumo_kernels.__main__ as kernels
import cumo_model.__main__ as model
from cumo_kernels.tiles import tune
from cumo_kernels.verification import self_check, verify
from cumo_model import CumoForConditionalGeneration, command_line
from cumo_model.demo.tokenizer import train_tokenizer
from cumo_model.training.recipe import SHIPPED, load_recipe
from tests.model import original

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- not run: ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TEXT = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 320, "max_position_embeddings": 512}  # fmt: skip
DATA = ("text", "json", "yaml")  # no programs
TARGETS = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@dataclass
class Block:
    """A fenced block; `reason` says why it does not run, `name` is what the text behind it saves it as."""

    language: str
    code: str
    reason: str | None
    name: str | None = None


def blocks(text: str) -> list[Block]:
    found = []
    for match in BLOCK.finditer(text):
        name = re.search(r"Saved as `(.+?)`", text[match.end() :].partition("\n```")[0])
        found.append(Block(match[2], match[3], match[1], name and name[1]))
    return found


def commands(code: str, keep_variables: bool = False) -> list[list[str]]:
    """Words of each line of a bash block, by default without variables set before a command."""
    lines = [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines()]
    if keep_variables:
        return [words for words in lines if words]
    bare = [words[next((i for i, w in enumerate(words) if "=" not in w), 0) :] for words in lines]
    return [words for words in bare if words]


def ours(words: list[str]) -> tuple[str, list[str]] | None:
    """(module, its arguments) of a command that starts a program of ours."""
    scripts = {"cumo": "cumo_model", "cumo-kernels": "cumo_kernels"}
    if words[0] in scripts:
        return scripts[words[0]], words[1:]
    if words[0] in ("python", "torchrun") and "-m" in words:
        at = words.index("-m")
        return words[at + 1], words[at + 2 :]
    return None


def run(words: list[str]) -> int:
    module, arguments = ours(words) or ("", [])
    if module == "cumo_model" and words[0] != "torchrun":
        return model.main(arguments)
    if module == "cumo_kernels" and arguments[:1] == ["explain"]:
        return kernels.main(arguments)
    raise AssertionError(f"{shlex.join(words)}: mark the block with <!-- not run: reason -->")


def parse(words: list[str], monkeypatch) -> None:
    """Refuse what the program, make or pip would refuse at once."""
    if words[0] == "make":
        assert words[1] in TARGETS, words
        return
    if words[:2] == ["pip", "install"]:
        for extra in re.findall(r"\[(\w+)\]", shlex.join(words)):
            assert extra in EXTRAS, words
        return
    module, arguments = ours(words) or ("", [])
    if module == "cumo_model":
        args = command_line.parser().parse_args(arguments)
        if args.command == "train":
            known = {field.name for field in dataclasses.fields(TrainingArguments)}
            trainer = load_recipe(args.config, args.overrides).trainer
            assert set(trainer) <= known, words
            engines = [value for value in trainer.values() if str(value).startswith("engines/")]
            assert all((SHIPPED / value).is_file() for value in engines), words
    elif module == "cumo_kernels":
        with monkeypatch.context() as patched:
            for program in (tune, verify, self_check):
                patched.setattr(program, "main", lambda args: 0)
            patched.setattr(kernels, "_bench", lambda words: 0)
            assert kernels.main(arguments) == 0
    elif module.split(".")[0] in ("benchmarks", "tests"):
        file = Path(importlib.util.find_spec(module).origin)
        source = "".join(path.read_text() for path in [file, *file.parent.glob("*.py")])
        assert all(f'"{word}"' in source for word in arguments if word.startswith("--")), words
    else:
        raise AssertionError(f"{shlex.join(words)}: no program of this project; leave it out of the block")


def mention(words: list[str]) -> None:
    """Refuse a command or option that is named in running text and does not exist."""
    module, arguments = ours(words) or ("", [])
    if words[0] == "make":
        assert words[1] in TARGETS, words
    elif module in ("cumo_model", "cumo_kernels"):
        files = [
            model.__file__,
            command_line.__file__,
            *(program.__file__ for program in (kernels, verify, self_check, tune)),
        ]
        source = "".join(Path(file).read_text() for file in files)
        given = [word for word in arguments[:1] if not word.startswith("-")]
        given += [word for word in arguments if word.startswith("--")]
        assert all(f'"{word}"' in source for word in given), words
    else:
        parse(words, None)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """Checkpoints of a few thousand parameters, pictures and data under the names that the examples use."""
    folder = tmp_path_factory.mktemp("workshop")
    tokenizer = train_tokenizer(["what is it?", "a red apple"] * 20, 320)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(original, "VOCAB", 320)
        original.write(folder / "checkpoints/CuMo-mistral-7b", std=0.1)
        Mixtral(MixtralConfig(**TEXT, num_local_experts=4)).save_pretrained("checkpoints/mixtral")
        MistralForCausalLM(MistralConfig(**TEXT)).save_pretrained("checkpoints/mistral")
        CLIPVisionModel(CLIPVisionConfig(**original.CLIP_CONFIG)).save_pretrained("checkpoints/clip")
        for name in ("CuMo-mistral-7b", "mixtral", "mistral"):
            tokenizer.save_pretrained(f"checkpoints/{name}")
        parts = ["--vision", "checkpoints/clip", "--text", "checkpoints/mistral"]
        assert model.main(["upcycle", *parts, "--out", "runs/demo/sft/model"]) == 0
        records = []
        for number, colour in enumerate(("red", "green", "blue", "white")):
            turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "an apple"}]
            kind = ("colour", "name")[number % 2]
            records.append({"id": number, "kind": kind, "image": f"{colour}.png", "conversations": turns})
            for place in (Path("data/images"), Path("runs/demo/data")):
                place.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (12, 12), colour).save(place / f"{colour}.png")
        Path("data/talks.jsonl").write_text("\n".join(map(json.dumps, records)))
        Path("runs/demo/data/test_a.json").write_text(json.dumps(records))
        question = {"question_id": 1, "image": "red.png", "text": "What is it?"}
        Path("q.jsonl").write_text(json.dumps(question))
        for name in ("picture.png", "cat.png"):
            Image.new("RGB", (30, 20), (200, 30, 30)).save(name)
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_examples(page, workshop, tmp_path, monkeypatch, capsys):
    text = (ROOT / page).read_text()
    found = blocks(text)
    assert len(found) == text.count("\n```") / 2, "every fence begins a line and is closed"
    if any("peft" in block.code for block in found):
        pytest.importorskip("peft")
    if any(block.language == "bash" and " experts " in block.code for block in found):
        pytest.importorskip("matplotlib")
    if any(block.reason is None and " train " in block.code for block in found if block.language == "bash"):
        pytest.importorskip("accelerate")
    shutil.copytree(workshop, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    names: dict = {}
    for block in found:
        if block.language == "python":
            program = compile(block.code, page, "exec")
            if block.reason is None:
                exec(program, names)
        elif block.language == "bash":
            for words in commands(block.code):
                if block.reason is None:
                    assert run(words) == 0, (words, capsys.readouterr().err)
                else:
                    parse(words, monkeypatch)
        elif block.language == "json":
            Path("record.json").write_text(f"[{block.code}]")
            assert model.main(["data", "check", "record.json", "--images", "."]) == 0, capsys.readouterr().out
        else:
            assert block.language in DATA, f"a block of {page} has the language {block.language!r}"
            if block.language == "yaml":
                assert block.name, f"{page}: say behind the recipe: Saved as `name.yaml`"
                Path(block.name).write_text(block.code)
                load_recipe(block.name)
    CHECKS.get(page, lambda *_: None)(names, capsys.readouterr().out)


def check_readme(names: dict, out: str) -> None:
    assert names["out"].shape == (577, 1024)
    assert type(names["ask"].model) is CumoForConditionalGeneration
    assert "what is it?" not in out.lower() and "a mixture of experts" not in out.lower()  # answers only


def check_model(names: dict, out: str) -> None:
    assert 0 < len(names["answer"]) <= 20 and "a chat between" not in out.lower()  # the answer only
    assert any(p.requires_grad and "experts" in n for n, p in names["model"].named_parameters())
    moe = CumoForConditionalGeneration.from_pretrained("checkpoints/moe", dtype=torch.float32)
    assert moe.config.text_config.num_local_experts == 4


def check_training(names: dict, out: str) -> None:
    assert Path("runs/mine/model/config.json").is_file()


def check_analysis(names: dict, out: str) -> None:
    assert Path("runs/demo/patches/patches-picture.png").is_file()


def check_serving(names: dict, out: str) -> None:
    assert "answers to 1 of 1 questions: " in out and [type(reply.text) for reply in names["replies"]] == [
        str,
        str,
    ]


CHECKS = {
    "README.md": check_readme,
    "docs/serving.md": check_serving,
    "docs/model.md": check_model,
    "docs/training.md": check_training,
    "docs/analysis.md": check_analysis,
}


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_commands_in_running_text_exist(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for span in text.split("`")[1::2]:
        if re.match(
            r"(make|cumo|cumo-kernels|python -m (cumo_kernels|cumo_model|(benchmarks|tests)\S*)) \S", span
        ):
            mention(shlex.split(span))


def test_a_block_that_does_not_run_must_be_marked(monkeypatch):
    for line in ("make test", "torchrun -m cumo_model train --config mistral-7b/sft", "rm -r x"):
        with pytest.raises(AssertionError, match="not run"):
            run(commands(line)[0])
    parse(
        commands("A=1 torchrun --nproc-per-node=8 -m cumo_model train --config mistral-7b/sft")[0],
        monkeypatch,
    )


@pytest.mark.parametrize(
    "line",
    [
        "make nothing",
        "pip install cumo[nothing]",
        "python -m cumo_model train --config mistral-7b/nothing",
        "python -m cumo_model train --config mistral-7b/sft stage.nothing=1",
        "python -m cumo_model train --config mistral-7b/sft trainer.nothing=1",
        "python -m cumo_model train --config mistral-7b/sft trainer.fsdp_config=engines/nothing.json",
        "python -m cumo_model demo --nothing",
        "python -m cumo_kernels verify --nothing",
        "python -m benchmarks.predictions --nothing",
        "curl example.org",
    ],
)
def test_an_example_that_went_stale_is_seen(line, monkeypatch):
    with pytest.raises((AssertionError, ValueError, SystemExit)):
        parse(commands(line)[0], monkeypatch)


@pytest.mark.parametrize("line", ["make nothing", "cumo nothing", "python -m cumo_kernels verify --nothing"])
def test_a_mention_that_went_stale_is_seen(line):
    with pytest.raises(AssertionError):
        mention(shlex.split(line))
