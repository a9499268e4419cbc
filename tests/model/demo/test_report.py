"""What the report of the demo says about the model: its questions, a picture to chat about, how to resume."""

import json
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
from PIL import Image

from cumo_model.__main__ import main
from cumo_model.demo import report
from cumo_model.demo.processes import locked
from cumo_model.demo.questions import QUESTIONS
from cumo_model.demo.resume import command, resumable
from cumo_model.serving.chat import _printable
from cumo_model.training.claims import claim_recipe, claim_start
from cumo_model.training.recipe import DataSection, ModelSection, Recipe
from cumo_model.training.recover import Interrupted
from cumo_model.training.run_folder import RECIPE_FILE, START_FILE
from tests.model.training.small_runs import COLOURS, write_model
from tests.model.training.test_recover import wait_for
from tests.processes import Forked, finish

ROOT = Path(__file__).parents[3]
ANSWERS = {"name": "apple", "kind": "fruit", "colour": "red", "background": "blue", "group": "food"}


@pytest.fixture
def demo(tmp_path, tiny_config, monkeypatch):
    """A demo with three pictures and a function that sets what its model says: (picture, kind) -> answer."""
    data, records = tmp_path / "data", []
    data.mkdir()
    for colour in COLOURS[:3]:
        Image.new("RGB", (12, 12), colour).save(data / f"{colour}.png")
        for kind, answer in ANSWERS.items():
            if (colour, kind) != ("blue", "colour"):  # no clear colour
                turns = [
                    {"from": "human", "value": f"<image>\n{QUESTIONS[kind]}"},
                    {"from": "gpt", "value": answer},
                ]
                record = {"id": f"{colour}-{kind}", "image": f"{colour}.png", "conversations": turns}
                records.append(record | {"kind": kind, "answer": answer})
    (data / "test_a.json").write_text(json.dumps(records))
    (data / "baselines.json").write_text(json.dumps({kind: {"train_answers": 7} for kind in ANSWERS}))
    write_model(tmp_path, tiny_config)
    model, processor = report.load(tmp_path / "start")

    def says(right: dict[str, set[str]], in_chat: dict[str, set[str]] | None = None):
        def said(known, record):
            known = known.get(record["image"][:-4], set())
            return record["answer"] if record["kind"] in known else "nothing"

        items = report.EmojiExact("test_a").read(data).items
        rows = [(item, said(right, record)) for item, record in zip(items, records, strict=True)]
        monkeypatch.setattr(report, "answers", lambda *_: rows)

        def answer(model, processor, picture, question):
            colour = next(
                c
                for c in COLOURS[:3]
                if Image.new("RGB", (1, 1), c).getpixel((0, 0)) == picture.getpixel((0, 0))
            )
            kind = next(kind for kind, text in QUESTIONS.items() if text == question)
            record = next(r for r in records if r["image"] == f"{colour}.png" and r["kind"] == kind)
            return said(right if in_chat is None else in_chat, record)

        monkeypatch.setattr(report, "_answer", answer)
        return report.show(tmp_path, model, processor)

    return tmp_path, says


def test_the_picture_to_chat_about_is_the_one_with_the_most_right_answers(demo):
    folder, says = demo
    shown = says({"red": {"name"}, "green": set(ANSWERS) - {"name"}, "blue": {"kind"}})
    assert {asked.image for asked in shown} == {"green.png"} and sum(asked.is_right for asked in shown) == 4
    assert [asked.kind for asked in shown] == list(QUESTIONS)
    said = report._invitation(folder, folder / "start", shown)
    assert "4 of its 5 answers about this picture are right, as 'fruit'" in said
    assert said.endswith("--question 'what kind?'") and "green.png" in said


def test_a_picture_without_a_wrong_answer_is_preferred(demo):
    """Four of four are better than four of five; of those with all right, more questions are better."""
    shown = demo[1]({"blue": set(ANSWERS), "green": set(ANSWERS) - {"kind"}})
    assert {asked.image for asked in shown} == {"blue.png"} and len(shown) == 4
    shown = demo[1]({"blue": set(ANSWERS), "red": set(ANSWERS)})
    assert {asked.image for asked in shown} == {"red.png"}


def test_the_answer_in_a_chat_decides(demo):
    """In a batch the sums have another order, so an answer may be another one than in a chat."""
    _, says = demo
    shown = says({"red": set(ANSWERS)}, in_chat={"green": {"name"}})
    assert {asked.image for asked in shown} == {"green.png"}


def test_a_model_that_knows_nothing_is_said_to(demo):
    folder, says = demo
    said = report._invitation(folder, folder / "start", says({}))
    assert "none of its answers is right" in said and "--image" in said


def test_the_command_gives_the_answer_that_the_report_says(tmp_path, tiny_config, demo, capsys, monkeypatch):
    """Without stand-ins: the answer of a real model, and the printed command with the same model."""
    folder, says = demo
    says({})
    monkeypatch.undo()
    (folder / "sft").mkdir()
    (folder / "start").rename(folder / "sft" / "model")
    (folder / "start").symlink_to(folder / "sft" / "model")
    model, processor = report.load(folder / "start")
    shown = report.show(folder, model, processor)
    words = shlex.split(report._invitation(folder, folder / "start", shown).splitlines()[-1])
    assert words[1:4] == ["-m", "cumo_model", "chat"]
    new = ["--max-new-tokens", "64"]
    assert main([*words[3:], *new]) == 0
    asked = next(asked for asked in shown if asked.question == words[-1])
    shown = _printable(asked.said).strip()
    assert capsys.readouterr().out.strip().splitlines()[-1:] == shown.splitlines()[-1:]


def test_every_kind_of_question_is_shown_with_an_example(demo):
    folder, says = demo
    scores = {"exact": {kind: [1, 4] for kind in ANSWERS}}
    table = report._questions_table(folder, says({"blue": set(ANSWERS)}), scores)
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["question"] == list(QUESTIONS.values())
    assert cells["answer"] == ["apple", "fruit", "not asked: no clear answer", "blue", "food"]
    page = (ROOT / "docs" / "demo.md").read_text()
    assert all(f"| `{question}` |" in page for question in QUESTIONS.values())


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), Interrupted("runs/x: stopped at step 3, progress is saved")]
)
def test_a_stop_is_one_line_with_the_command_that_resumes(capsys, error):
    def run():
        raise error

    assert resumable(run, "demo", "--out", "my runs", "--quick") == 130
    (line,) = capsys.readouterr().err.splitlines()
    said = str(error) or "stopped"
    assert line == f"cumo: {said}; to resume: {command('demo', '--out', 'my runs', '--quick')}"
    assert "--out 'my runs' --quick" in line


def test_other_errors_of_a_demo_are_not_changed():
    def run():
        raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        resumable(run, "demo")


def test_the_python_of_the_command_starts(monkeypatch, tmp_path):
    import subprocess

    words = shlex.split(command("--help"))
    done = subprocess.run(
        [*words[:1], "-c", "import sys; print(sys.executable)"], capture_output=True, text=True
    )
    assert Path(done.stdout.strip()).resolve() == Path(sys.executable).resolve()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["cumo_model.demo.run.make_dataset", "cumo_model.demo.run.run_tasks"])
def test_a_signal_anywhere_in_the_demo_ends_it_with_one_line(tmp_path, place, number):
    """A real process and a real signal, in the data and in the tasks."""
    module, _, name = place.rpartition(".")
    code = (
        f"import sys, time, {module} as m; from pathlib import Path; from cumo_model.__main__ import main\n"
        "m.make_dataset = lambda *a, **k: None\n"
        f"m.{name} = lambda *a, **k: (Path(sys.argv[1], 'there').touch(), time.sleep(60))\n"
        "sys.exit(main(['demo', '--quick', '--out', sys.argv[1] + '/run']))"
    )
    process = Forked(["-c", code, tmp_path], tmp_path / "out.txt")
    wait_for((tmp_path / "there").exists, process)
    process.send_signal(number)
    lines = finish(process, code=130).splitlines()
    assert len(lines) == 2 and lines[0].startswith("CuMo demo in")
    assert lines[1].startswith("cumo: stopped; to resume: ") and lines[1].endswith("/run --quick")


def test_leftovers_of_a_killed_demo_are_deleted(tmp_path):
    left = [
        tmp_path / name for name in (".data-abcd1234", "sft/.model-12345678", "rows/dense-0/.model-abcdefgh")
    ]
    kept = [tmp_path / name for name in ("data", "sft/model", ".data-abc", "sft/checkpoint-3")]
    for path in (*left, *kept):
        path.mkdir(parents=True)
        (path / "file").touch()
    with locked(tmp_path):
        assert not any(path.exists() for path in left)
        assert all((path / "file").exists() for path in kept)


def a_run(name: str) -> Recipe:
    model = ModelSection(start=f"{name}/pft/model")
    data = DataSection(files=[f"{name}/data/stage3.json"], images=[f"{name}/data"])
    return Recipe(f"{name}/sft", model=model, data=data)


def test_a_moved_demo_resumes_and_another_one_does_not(tmp_path, monkeypatch):
    """The identities of its runs have paths in them, and digests of the content, which must still agree."""
    monkeypatch.chdir(tmp_path)
    out, start = Path("runs/demo"), a_run("runs/demo").model.start
    for path in (out / "sft" / "checkpoint-1", out / "data", Path(start)):
        path.mkdir(parents=True)
    for file in (
        out / "sft/checkpoint-1/trainer_state.json",
        out / "data/stage3.json",
        Path(start, "config.json"),
    ):
        file.write_text("{}")
    claim_recipe(out / "sft" / RECIPE_FILE, a_run("runs/demo"))
    claim_start(out / "sft" / START_FILE, a_run("runs/demo").model)
    moved = shutil.move(out, Path("there/second"))
    claim_recipe(moved / "sft" / RECIPE_FILE, a_run("there/second"))
    claim_start(moved / "sft" / START_FILE, a_run("there/second").model)
    (moved / "pft/model/config.json").write_text('{"another": 1}')
    with pytest.raises(ValueError, match=r"run with another content of model\.start"):
        claim_start(moved / "sft" / START_FILE, a_run("there/second").model)
    shutil.copytree(moved, out)
    claim_recipe(
        moved / "sft" / RECIPE_FILE, a_run("there/second")
    )  # a new demo at the old place is another one
    with pytest.raises(ValueError, match=r"run with another data\.files"):  # a copy is not a move
        claim_recipe(out / "sft" / RECIPE_FILE, a_run("runs/demo"))
