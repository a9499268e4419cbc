"""The command `eval`: all benchmarks in one run, resumed, in processes, over an endpoint, and bad input."""

import json

import pytest

from cumo_model.__main__ import main
from cumo_model.evaluation import paper
from cumo_model.evaluation.registry import TASKS
from cumo_model.evaluation.run import read, read_scores
from cumo_model.evaluation.task import percent
from cumo_model.serving.local import Local, load
from tests.model.conftest import tiny_config
from tests.model.evaluation import choice_data as choice
from tests.model.evaluation import official_data as official
from tests.model.evaluation.judge_server import judging, text_of
from tests.model.serving.conftest import write_checkpoint
from tests.model.serving.endpoint_server import serving
from tests.processes import Forked, kill, wait_until

SHORT = ("scienceqa", "textvqa", "gqa", "pope", "mme", "seed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    make = tiny_config.__wrapped__() if hasattr(tiny_config, "__wrapped__") else tiny_config
    return write_checkpoint(tmp_path_factory.mktemp("talker") / "model", make, positions=512, std=0.3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """All benchmarks, small, in their official formats."""
    root = tmp_path_factory.mktemp("data")
    for name, place in zip(SHORT, ("scienceqa", "textvqa", "gqa", "pope", "MME", "seed_bench"), strict=True):
        getattr(official, name)(root / place, True)
    official.vqav2_test(root / "vqav2", True)
    names = ["red", "green", "blue"]
    rows = choice.circle(1, names, "green") + choice.circle(2, names, "red", category="attribute")
    for language in ("", "_cn"):
        name = f"mmbench_dev{language}_{'20231003' if language else '20230712'}.tsv"
        choice.write_mmbench(root / "mmbench" / name, rows)
    choice.write_mmvet(root / "mm-vet", [("What is it?", "a cat", ["rec"]), ("How many?", "2", ["math"])])
    choice.write_llava_bench(root / "llava-bench-in-the-wild", [("What is it?", "conv"), ("Why?", "complex")])
    choice.write_mmmu_parquet(root / "MMMU")
    problems = [choice.mathvista_problem(1), choice.multiple(2, ["a cat", "a dog"], "a dog")]
    choice.write_mathvista(root / "mathvista", problems)
    objects = {"1.png": ["dog", "car"], "2.png": ["cat"]}
    for name in objects:
        choice.save_png(root / "objects" / "images" / name, "red")
    (root / "objects" / "labels.json").write_text(json.dumps(objects))
    (root / "objects" / "vocabulary.json").write_text(json.dumps({"dog": [], "car": [], "cat": ["cats"]}))
    return root


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_limit_has_a_folder_of_its_own_and_tables_add_up(folder, data, tmp_path, capsys):
    words = ["eval", str(folder), "--data", str(data), "--out", str(tmp_path), "--task"]
    assert main([*words, "gqa", "--limit", "1"]) == 0
    assert main([*words, "gqa"]) == 0
    assert main([*words, "pope"]) == 0
    for table, told in (
        ("limit-1/table.md", "| 1 of 3 | a part of the questions |"),
        ("table.md", "| 3 |  |"),
    ):
        assert told in (tmp_path / table).read_text()
    assert "| POPE |" in (tmp_path / "table.md").read_text()


def grade(request):
    """A judge of all three benchmarks that need one."""
    prompt = text_of(request)
    return "8 4\nclear" if "[End of" in prompt else "0.5" if "Grade:" in prompt else "3"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_all_benchmarks_in_one_run(folder, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUMO_JUDGE_KEY", "any")
    out, names = tmp_path / "out", [*paper.TABLE, "objects_pope", "chair"]
    words = ["eval", str(folder), "--task", ",".join(names), "--data", str(data), "--out", str(out)]
    assert main(words) == 0
    told, table = capsys.readouterr().err, (out / "table.md").read_text()
    for name in names:
        task = TASKS[name]
        count = len(read(task, data).items)
        lines = (out / name / "answers.jsonl").read_text().splitlines()
        assert len(lines) == count and f"| {task.title} |" in table
        known = paper.TABLE.get(name)
        assert known is None or f"| {known[0]} | {known[1]} |" in table
        missing = {"mmvet", "llava_bench", "mathvista"}
        note = "needs a judge" if name in missing else "scored by https://eval.ai" if name == "vqav2" else ""
        assert (out / name / "scores.json").exists() == (not note)
        if note:
            assert f"{name}: {count} questions answered; {note}" in told and note in table
            continue
        rows = read_scores(out / name / "scores.json").rows
        assert len({row.unit for row in rows}) == len(rows)
        score = next(iter(task.figures(rows).values()))
        if task.mean_of:
            assert score == percent([float(row.values[task.mean_of]) for row in rows])
    assert (out / "vqav2" / "submission.json").is_file() and (out / "mmbench" / "submission.xlsx").is_file()
    answers = {path: path.stat().st_mtime_ns for path in out.glob("*/answers.jsonl")}
    with judging(grade) as judge:
        assert main([*words, "--judge", "m", "--judge-url", judge.url]) == 0
        asked = len(judge.asked)
        assert main([*words, "--judge", "m", "--judge-url", judge.url]) == 0
        assert 4 <= asked == len(judge.asked)
    assert {path: path.stat().st_mtime_ns for path in answers} == answers
    table = (out / "table.md").read_text()
    assert "| LLaVA-Bench (wild) | relative score, % | 85.7 | 84.7 | 50.0 | 2 |" in table
    assert "| MM-Vet | score of the judge, % | 51.0 | 48.7 | 50.0 | 2 |" in table
    assert "needs a judge" not in table
    capsys.readouterr()
    assert main(["eval", "--compare", str(out), str(out), "--out", str(tmp_path / "compared")]) == 0
    assert "Intervals of a paired bootstrap with 1000 draws" in capsys.readouterr().out
    table = (tmp_path / "compared" / "comparison.md").read_text()
    assert table.count("| too few questions |") == 12 and table.count("| noise |") == 2  # MME and MMMU


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_run_goes_on_and_gives_the_same_answers(folder, data, tmp_path):
    words = [
        "-m",
        "cumo_model",
        "eval",
        folder,
        "--task",
        "mme",
        "--data",
        data,
        "--batch-size",
        "1",
        "--out",
    ]
    process = Forked([*words, tmp_path / "killed"], tmp_path / "log")
    part = tmp_path / "killed" / "mme" / "answers.jsonl.part-0"
    few = lambda: part.exists() and part.read_bytes().count(b"\n") > 2
    wait_until(process, few, tmp_path / "log")
    kill(process)
    assert not (tmp_path / "killed" / "mme" / "answers.jsonl").exists()
    for out in ("killed", "whole"):
        assert main([*map(str, words[2:]), str(tmp_path / out)]) == 0
    for file in ("answers.jsonl", "scores.json"):
        assert (tmp_path / "killed/mme" / file).read_bytes() == (tmp_path / "whole/mme" / file).read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_several_processes_and_an_endpoint_give_the_same_scores(folder, data, tmp_path, capsys):
    words = ["eval", "--task", "gqa,nothing,pope", "--data", str(data), "--out"]
    assert main([*words, str(tmp_path / "no"), str(folder)]) == 1
    assert "task must be all or some of scienceqa, textvqa" in capsys.readouterr().err
    words[2] = "gqa,mmbench_cn,pope"
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("gqa", "pope"):
        (bare / name).symlink_to(data / name)
    words[4] = str(bare)
    # one by one, as the endpoint answers: a batch has another order of sums
    words[1:1] = ["--batch-size", "1"]
    (tmp_path / "two" / "pope").mkdir(parents=True)
    (tmp_path / "two" / "pope" / "answers.jsonl").write_text("{}\n")
    assert main([*words, str(tmp_path / "two"), str(folder), "--processes", "2"]) == 1
    assert "pope/answers.jsonl exists already" in (tmp_path / "two" / "table.md").read_text()
    (tmp_path / "two" / "pope" / "answers.jsonl").unlink()
    for out, more in (("one", []), ("two", ["--processes", "2"])):
        assert main([*words, str(tmp_path / out), str(folder), *more]) == 1
    with serving(Local(*load(folder), name="talker"), name="model") as server:
        assert main([*words, str(tmp_path / "asked"), "--endpoint", server.url]) == 1
    told = capsys.readouterr()
    assert told.err.count("has no folder mmbench_cn or mmbench") >= 2
    table = (tmp_path / "one" / "table.md").read_text()
    assert "| MMBench-CN | circular accuracy, % | 66.6 | 68.0 | - | 0 | failed: " in table
    for name in ("gqa", "pope"):
        runs = [tmp_path / out / name for out in ("one", "two", "asked")]
        rows = [read_scores(run / "scores.json").rows for run in runs]
        assert rows[0] == rows[1] == rows[2]
        lines = [(run / "answers.jsonl").read_text().splitlines() for run in runs]
        texts = [[json.loads(line)["text"] for line in some] for some in lines]
        assert texts[0] == texts[1] == texts[2] and len(set(texts[0])) > 1


def test_answers_of_another_program_are_scored(data, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    said = {"101": "no", "102": "Woman.", "103": "fork"}
    path.write_text("".join(json.dumps({"question_id": n, "text": t}) + "\n" for n, t in said.items()))
    words = [
        "eval",
        "--task",
        "gqa",
        "--data",
        str(data),
        "--out",
        str(tmp_path / "out"),
        "--answers",
        str(path),
    ]
    assert main(words) == 0
    assert "gqa: accuracy, % 66.7" in capsys.readouterr().err
    path.write_text(path.read_text().splitlines()[0] + "\n")
    assert main(words) == 1
    assert "has answers to 1 of 3 questions; the first without one is '102'" in capsys.readouterr().err
